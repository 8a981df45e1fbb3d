"""ws.cache.keys and ws.cache.made: keys that tell the reason; what is made once under them, whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ws.cache import keys, made, places, syntax
from ws.cache.keys import file_key, stage_key

HOME = places.PACKAGE.parent


def run_python(code: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=HOME, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_file_key_follows_content_not_name_or_time(tmp_path):
    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    assert file_key(tmp_path / "a") == file_key(tmp_path / "b")
    first = file_key(tmp_path / "a")
    (tmp_path / "a").write_text("more")
    assert file_key(tmp_path / "a") != first
    with pytest.raises(FileNotFoundError, match="missing.safetensors"):
        file_key(tmp_path / "missing.safetensors")


def test_folder_key_sees_names_and_contents_but_not_sidecars(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "weights").write_text("1")
    first = file_key(folder)
    (folder / ".made.json").write_text("{}")
    assert file_key(folder) == first
    (folder / "weights").rename(folder / "renamed")
    assert file_key(folder) != first


def test_the_hash_of_a_large_file_is_of_all_its_bytes_and_is_taken_once(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "LARGE", 1 << 10)
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    file, body = tmp_path / "w.safetensors", bytearray(os.urandom(1 << 16))
    file.write_bytes(body)
    first = file_key(file)
    note = next((tmp_path / "out" / ".hashes").iterdir())
    keys._file_key.cache_clear()
    monkeypatch.setattr(keys, "read_hash", lambda path: pytest.fail("read again"))
    assert file_key(file) == first  # another process reads what this one noted
    monkeypatch.undo()
    monkeypatch.setattr(keys, "LARGE", 1 << 10)
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    body[40_000] ^= 1  # in the middle, as long as before
    file.write_bytes(body)
    assert file_key(file) != first
    note.write_text("{")
    keys._file_key.cache_clear()
    body[40_000] ^= 1
    file.write_bytes(body)
    assert file_key(file) == first


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `pk` where a -> b -> c by different kinds of import, and d stands alone."""
    root = tmp_path / "pk"
    (root / "sub").mkdir(parents=True)
    sources = {
        "__init__.py": "",
        "a.py": "from pk.b import value\n\n\ndef top():\n    return value()\n",
        "b.py": "def value():\n    from . import sub\n    return sub.number\n",
        "sub/__init__.py": "from .c import number\n",
        "sub/c.py": "number = 1\nother = 1\n",
        "d.py": "def alone():\n    return 1\n",
    }
    for name, text in sources.items():
        (root / name).write_text(text)
    monkeypatch.setattr(syntax, "PACKAGE", root)
    return root


def test_stage_key_tells_what_changed(package, tmp_path):
    data = tmp_path / "data.json"
    data.write_text("1")

    def key(**change):
        return stage_key(**{"params": {"seed": 0, "lr": 1e-4}, "inputs": [data], "code": ["pk.a.top"], **change})

    first = key()
    assert key(params={"lr": 1e-4, "seed": 0}) == first and str(key()) == str(first)
    assert first.differs(key(params={"seed": 1, "lr": 1e-4})) == "changed parameters"
    assert first.differs(key(code=["pk.d.alone"])) == "changed code"
    (package / "sub" / "c.py").write_text("# why\nnumber  =  1  # a remark\nother = 2\n")
    assert key() == first  # layout, comments and what is not used do not count
    (package / "sub" / "c.py").write_text("number = 22\n")
    assert first.differs(key()) == "changed code"
    data.write_text("22")
    assert first.differs(key()) == "changed inputs" and str(key()) != str(first)
    with pytest.raises(ValueError, match="pk.nothing"):
        key(code=["pk.nothing.here"])


def test_made_runs_once_and_says_why_it_runs_again(package, tmp_path):
    target, runs = tmp_path / "out" / "x.txt", []

    def make(path: Path) -> None:
        runs.append(path)
        path.write_text(f"run {len(runs)}")

    def ask(params, **options):
        return made.made(target, stage_key(params, code=["pk.d.alone"]), make, **options)

    assert [ask({"a": 1}), ask({"a": 1}), ask({"a": 2})] == ["new", "done", "changed parameters"]
    assert target.read_text() == "run 2" and len(runs) == 2
    (package / "d.py").write_text("def alone():\n    return 2\n")
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
    key = stage_key({"a": 1})

    def broken(path: Path) -> None:
        (path / "half").write_text("")
        raise ValueError("loss is NaN at step 3")

    with pytest.raises(ValueError, match="step 3"):
        made.made(target, key, broken, folder=True)
    assert not target.exists() and made.state(target, key) == "failed before"
    assert made.read_failure(target)["error"] == "ValueError: loss is NaN at step 3"

    def good(path: Path) -> None:
        (path / "w").write_text("whole")

    assert made.made(target, key, good, folder=True, about={"seed": 3}) == "failed before"
    assert made.state(target, key) == "done" and made.read_sidecar(target)["about"] == {"seed": 3}
    assert made.read_failure(target) == {}
    (target / "w").write_text("who")
    assert made.state(target, key) == "damaged"


def test_two_processes_make_one_target_once(tmp_path):
    code = (
        "import time; from pathlib import Path; from ws.cache.keys import stage_key; from ws.cache.made import made\n"
        f"base = Path({str(tmp_path)!r})\n"
        "def make(path):\n"
        "    with (base / 'log').open('a') as log: log.write('made\\n')\n"
        "    time.sleep(0.5); path.write_text('x')\n"
        "print('found', made(base / 'pairs.json', stage_key({'n': 1}), make))"
    )
    both = [run_python(code), run_python(code)]
    found = sorted(p.communicate()[0].split("found ")[1].strip() for p in both)
    assert found == ["done", "new"] and (tmp_path / "log").read_text() == "made\n"
