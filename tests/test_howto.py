"""docs/howto: what the pages tell to type works. Blocks of a page run in its order, in one folder and one namespace.

Commands are typed in processes that have loaded everything (`clumsy.Typing`); tests/test_wheel.py starts one whole.
"""

import re
import shlex
from pathlib import Path

import pytest
from clumsy import Typing

import ws
from ws.cache.places import root

PAGES = sorted((root() / "docs" / "howto").glob("*.md"))
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def test_there_are_pages_and_each_says_how():
    assert not any("\\\\\n" in page.read_text() for page in PAGES)  # a command goes on after one backslash
    assert len(PAGES) >= 6 and all(FENCE.search(page.read_text()) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_works(page, tmp_path, monkeypatch, adapters, type_in):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    for side in ("pos", "neg"):
        (tmp_path / side).symlink_to(adapters / side)
    space, ran = {}, 0
    for kind, name, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if name:
            (tmp_path / name).write_text(text)
        elif kind == "python":
            exec(compile(text, str(page), "exec"), space)
        elif kind == "console":
            for line in (line[2:] for line in text.splitlines() if line.startswith("$ ws ")):
                env = {"WS_OUT": str(tmp_path / "out"), "WS_TYPED_IN": str(tmp_path), "OMP_NUM_THREADS": "1"}
                told = type_in(shlex.split(line)[1:], tmp_path, env, timeout=300)
                assert told.code == 0, f"{line}\n{told.out}\n{told.err}"
        ran += 1
    assert ran


@pytest.fixture(scope="module")
def type_in(tmp_path_factory) -> Typing:
    return Typing(tmp_path_factory.mktemp("said"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """Two adapters, as somebody trained them."""
    folder = tmp_path_factory.mktemp("adapters")
    few = ws.PairConfig(topics=2, personas=1, samples=1, max_new_tokens=8)
    config = ws.TrainConfig(few, max_steps=3)
    ws.train_diff(ws.load_lm("tiny"), "sycophancy", config=config, folder=folder, progress=False)
    return folder / "adapters"


LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\(([^)\s]+)\)|!\[[^\]\n]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize(
    "page",
    [root() / "README.md", root() / "CONTRIBUTING.md", *sorted((root() / "docs").rglob("*.md"))],
    ids=lambda page: page.relative_to(root()).as_posix(),
)
def test_links_lead_somewhere(page):
    for found in LINK.findall(page.read_text(encoding="utf-8")):
        target = next(filter(None, found)).partition("#")[0]
        if target and not re.match(r"(https?|mailto):", target):
            assert (page.parent / target).exists(), target


def test_every_public_name_stands_in_the_reference():
    text = (root() / "docs" / "api.md").read_text(encoding="utf-8")
    assert re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE) == [f"{m}.{n}" for n, m in ws.EXPORTS.items()]
