"""ws.cache.keys and ws.cache.made: keys that tell the reason; what is made once under them, whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ws.cache import keys
from ws.cache import made as store

HOME = Path(store.__file__).parents[1]


def run_python(code: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=HOME, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_file_key_follows_content_not_name_or_time(tmp_path):
    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    assert store.file_key(tmp_path / "a") == store.file_key(tmp_path / "b")
    first = store.file_key(tmp_path / "a")
    (tmp_path / "a").write_text("more")
    assert store.file_key(tmp_path / "a") != first
    with pytest.raises(FileNotFoundError, match="missing.safetensors"):
        store.file_key(tmp_path / "missing.safetensors")


def test_folder_key_sees_names_and_contents_but_not_sidecars(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "weights").write_text("1")
    first = store.file_key(folder)
    (folder / ".made.json").write_text("{}")
    assert store.file_key(folder) == first
    (folder / "weights").rename(folder / "renamed")
    assert store.file_key(folder) != first


def test_large_file_key_reads_little_and_sees_the_header(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "LARGE", 1 << 20)
    header = json.dumps({"x": {"dtype": "F32"}}).encode()
    body = os.urandom(8 << 20)

    def write(name: str, head: bytes, tail: bytes) -> Path:
        (tmp_path / name).write_bytes(len(head).to_bytes(8, "little") + head + tail)
        return tmp_path / name

    first = store.file_key(write("a.safetensors", header, body))
    assert store.file_key(write("b.safetensors", header, body)) == first
    assert store.file_key(write("c.safetensors", header.replace(b"F32", b"F16"), body)) != first
    assert store.file_key(write("d.safetensors", header, body[:-1])) != first
    assert store.file_key(write("e.safetensors", header, os.urandom(8 << 20))) != first


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `pk` where a -> b -> c by different kinds of import, and d stands alone."""
    root = tmp_path / "pk"
    (root / "sub").mkdir(parents=True)
    sources = {
        "__init__.py": "",
        "a.py": "from pk.b import value\n",
        "b.py": "def value():\n    from . import sub\n    return sub\n",
        "sub/__init__.py": "from .c import number\n",
        "sub/c.py": "number = 1\n",
        "d.py": "import numpy\n",
    }
    for name, text in sources.items():
        (root / name).write_text(text)
    monkeypatch.setattr(keys, "PACKAGE", root)
    return root


def test_source_key_follows_real_imports(package):
    assert store.source_modules("pk.a") == ["pk", "pk.a", "pk.b", "pk.sub", "pk.sub.c"]
    assert store.source_modules("pk.d") == ["pk", "pk.d"]
    a, d = store.source_key("pk.a"), store.source_key("pk.d")
    (package / "sub" / "c.py").write_text("number = 22\n")
    assert store.source_key("pk.a") != a and store.source_key("pk.d") == d
    changed = store.source_key("pk.a")
    (package / "sub" / "c.py").write_text("# why\nnumber  =  22  # a remark\n")
    assert store.source_key("pk.a") == changed  # layout and comments do not count
    with pytest.raises(ValueError, match="pk.nothing"):
        store.source_key("pk.nothing")


def test_stage_key_tells_what_changed(package, tmp_path):
    data = tmp_path / "data.json"
    data.write_text("1")

    def key(**change):
        return store.stage_key(**{"params": {"seed": 0, "lr": 1e-4}, "inputs": [data], "modules": ["pk.a"], **change})

    first = key()
    assert key(params={"lr": 1e-4, "seed": 0}) == first and str(key()) == str(first)
    assert first.differs(key(params={"seed": 1, "lr": 1e-4})) == "changed parameters"
    assert first.differs(key(modules=["pk.d"])) == "changed code"
    data.write_text("22")
    assert first.differs(key()) == "changed inputs" and str(key()) != str(first)
    assert store.stage_key({}, code="import pk.a\n") != store.stage_key({}, code="import pk.d\n")
    assert store.imported_modules("from pk import a, unknown\nimport os") == ["pk", "pk.a"]


def test_made_runs_once_and_says_why_it_runs_again(package, tmp_path):
    target, runs = tmp_path / "out" / "x.txt", []

    def make(path: Path) -> None:
        runs.append(path)
        path.write_text(f"run {len(runs)}")

    def ask(params, **options):
        return store.made(target, store.stage_key(params, modules=["pk.d"]), make, **options)

    assert [ask({"a": 1}), ask({"a": 1}), ask({"a": 2})] == ["new", "done", "changed parameters"]
    assert target.read_text() == "run 2" and len(runs) == 2
    (package / "d.py").write_text("import scipy\n")
    assert ask({"a": 2}, keep_stale=True) == "stale" and len(runs) == 2
    assert ask({"a": 2}) == "changed code" and len(runs) == 3
    assert ask({"a": 2}, remake=True) == "done" and len(runs) == 4
    target.write_text("cut")
    assert ask({"a": 2}) == "damaged" and target.read_text() == "run 5"
    os.utime(target, (1, 1))
    assert ask({"a": 2}) == "done"  # only the time moved: the content decides
    target.unlink()
    assert ask({"a": 2}) == "new"
    assert names(target.parent) == [".made.x.txt.json", "x.txt"]


def test_made_folder_and_failure(tmp_path):
    target = tmp_path / "adapter"
    key = store.stage_key({"a": 1})

    def broken(path: Path) -> None:
        (path / "half").write_text("")
        raise ValueError("loss is NaN at step 3")

    with pytest.raises(ValueError, match="step 3"):
        store.made(target, key, broken, folder=True)
    assert not target.exists() and store.state(target, key) == "failed before"
    assert store.read_failure(target)["error"] == "ValueError: loss is NaN at step 3"

    def good(path: Path) -> None:
        (path / "w").write_text("whole")

    assert store.made(target, key, good, folder=True, about={"seed": 3}) == "failed before"
    assert store.state(target, key) == "done" and store.read_sidecar(target)["about"] == {"seed": 3}
    assert store.read_failure(target) == {}
    (target / "w").write_text("who")
    assert store.state(target, key) == "damaged"


def test_two_processes_make_one_target_once(tmp_path):
    code = (
        "import time; from pathlib import Path; from ws import store\n"
        f"base = Path({str(tmp_path)!r})\n"
        "def make(path):\n"
        "    with (base / 'log').open('a') as log: log.write('made\\n')\n"
        "    time.sleep(0.5); path.write_text('x')\n"
        "print('found', store.made(base / 'pairs.json', store.stage_key({'n': 1}), make))"
    )
    both = [run_python(code), run_python(code)]
    found = sorted(p.communicate()[0].split("found ")[1].strip() for p in both)
    assert found == ["done", "new"] and (tmp_path / "log").read_text() == "made\n"
