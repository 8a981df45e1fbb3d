"""ws.cache.keys and ws.cache.made: keys that tell the reason; what is made once under them, whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harm import cut, empty, flip, high

from ws.cache import keys, records, syntax
from ws.cache import made as store
from ws.cache.sources import Unkeyed, code_key, text_key

HOME = Path(store.__file__).parents[2]


def run_python(code: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=HOME, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_file_key_follows_content_not_name_or_time(tmp_path):
    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    assert keys.file_key(tmp_path / "a") == keys.file_key(tmp_path / "b")
    first = keys.file_key(tmp_path / "a")
    (tmp_path / "a").write_text("more")
    assert keys.file_key(tmp_path / "a") != first
    with pytest.raises(FileNotFoundError, match="missing.safetensors"):
        keys.file_key(tmp_path / "missing.safetensors")


def test_folder_key_sees_names_and_contents_but_not_sidecars(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "weights").write_text("1")
    first = keys.file_key(folder)
    (folder / ".made.json").write_text("{}")
    assert keys.file_key(folder) == first
    (folder / "weights").rename(folder / "renamed")
    assert keys.file_key(folder) != first


def test_all_bytes_of_a_large_file_count_and_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "LARGE", 1 << 16)
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    big = tmp_path / "model.safetensors"
    big.write_bytes(os.urandom(1 << 18))
    first = keys.file_key(big)
    changed = bytearray(big.read_bytes())
    changed[len(changed) // 2] ^= 1
    before = big.stat()
    big.write_bytes(bytes(changed))
    os.utime(big, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    second = keys.file_key(big)
    assert second != first
    keys._file_key.cache_clear()  # as another process
    monkeypatch.setattr(keys, "read_hash", lambda path: pytest.fail("read again"))
    assert keys.file_key(big) == second


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `pk`: a.first -> b.value -> sub.c.number by different kinds of import; d stands alone."""
    root = tmp_path / "pk"
    (root / "sub").mkdir(parents=True)
    sources = {
        "__init__.py": "",
        "a.py": "from pk.b import value\nfrom pk import figures\n\ndef first():\n    figures.draw()\n    return value()\n",
        "b.py": "def value():\n    from .sub import number\n    return number\n\ndef other():\n    return 0\n",
        "sub/__init__.py": "from .c import number\n",
        "sub/c.py": "number = 1\n",
        "figures.py": "def draw():\n    return 'red'\n",
        "d.py": "import numpy\n\ndef alone():\n    return numpy\n",
    }
    for name, text in sources.items():
        (root / name).write_text(text)
    monkeypatch.setattr(syntax, "PACKAGE", root)
    return root


def test_code_key_follows_functions_and_nothing_else(package):
    first, alone = code_key("pk.a.first"), code_key("pk.d.alone")
    (package / "sub" / "c.py").write_text("# why\nnumber  =  1  # a remark\n")
    (package / "figures.py").write_text("def draw():\n    return 'blue'\n")
    b = (package / "b.py").read_text()
    (package / "b.py").write_text(b.replace("return 0", "return 1").replace("def value():", 'def value():\n    "Doc."'))
    assert code_key("pk.a.first") == first  # comments, layout, docstrings, figures and a neighbour do not count
    (package / "sub" / "c.py").write_text("number = 22\n")
    assert code_key("pk.a.first") != first and code_key("pk.d.alone") == alone
    with pytest.raises(ValueError, match="pk.nothing"):
        code_key("pk.nothing")


def test_stage_key_tells_what_changed(package, tmp_path):
    data = tmp_path / "data.json"
    data.write_text("1")

    def key(**change):
        return keys.stage_key(**{"params": {"seed": 0, "lr": 1e-4}, "inputs": [data], "code": ["pk.a.first"], **change})

    first = key()
    assert key(params={"lr": 1e-4, "seed": 0}) == first and str(key()) == str(first)
    assert first.differs(key(params={"seed": 1, "lr": 1e-4})) == "changed parameters"
    assert first.differs(key(code=["pk.d.alone"])) == "changed code"
    data.write_text("22")
    assert first.differs(key()) == "changed inputs" and str(key()) != str(first)
    cells = text_key("from pk.a import first\nfirst()")
    assert text_key("from pk.a import first  # why\n\nfirst()") == cells != text_key("from pk.d import alone\nalone()")
    (package / "sub" / "c.py").write_text("number = 5\n")
    assert text_key("from pk.a import first\nfirst()") != cells


def test_a_replaced_function_of_this_package_counts_as_what_it_is(monkeypatch):
    from ws.stability import intervals

    before = code_key("ws.stability.intervals.crossed_bootstrap")
    monkeypatch.setattr(intervals, "resample_counts", lambda n, draws, generator: None)
    assert code_key("ws.stability.intervals.crossed_bootstrap") != before
    monkeypatch.undo()
    assert code_key("ws.stability.intervals.crossed_bootstrap") == before
    monkeypatch.setattr(intervals, "CHUNK", 7)
    assert code_key("ws.stability.intervals.crossed_bootstrap") != before


SCALE, TABLE = 2.0, {"a": [1, 2]}


def helper(x):
    """Not counted."""
    return SCALE * x


def own(x):
    return helper(x) + len(TABLE)


def test_the_callers_functions_count_with_what_they_call_and_hold(monkeypatch):
    module = sys.modules[__name__]
    before = code_key(own)
    assert code_key(own) == before
    monkeypatch.setattr(module, "SCALE", 3.0)
    assert code_key(own) != before
    monkeypatch.undo()
    monkeypatch.setitem(TABLE, "a", [1, 3])
    assert code_key(own) != before
    monkeypatch.undo()
    monkeypatch.setattr(module, "helper", lambda x: x)
    assert code_key(own) != before
    monkeypatch.undo()
    assert code_key(own) == before

    def holding(thing):
        return lambda: thing

    assert code_key(holding(1)) != code_key(holding(2))
    with pytest.raises(Unkeyed, match="whose content cannot be hashed"):
        code_key(holding(open(__file__)))  # noqa: SIM115


def test_made_runs_once_and_says_why_it_runs_again(package, tmp_path):
    target, runs = tmp_path / "out" / "x.txt", []

    def make(path: Path) -> None:
        runs.append(path)
        path.write_text(f"run {len(runs)}")

    def ask(params, **options):
        return store.made(target, keys.stage_key(params, code=["pk.d.alone"]), make, **options)

    assert [ask({"a": 1}), ask({"a": 1}), ask({"a": 2})] == ["new", "done", "changed parameters"]
    assert target.read_text() == "run 2" and len(runs) == 2
    (package / "d.py").write_text("import scipy\n\ndef alone():\n    return scipy\n")
    assert ask({"a": 2}, keep_stale=True) == "stale" and len(runs) == 2
    assert ask({"a": 2}) == "changed code" and len(runs) == 3
    assert ask({"a": 2}, remake=True) == "done" and len(runs) == 4
    target.write_text("cut")
    assert ask({"a": 2}) == "damaged" and target.read_text() == "run 5"
    os.utime(target, (1, 1))
    assert ask({"a": 2}) == "done"  # only the time moved: the content decides
    before = target.stat()
    target.write_text("RUN 5")
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ask({"a": 2}) == "damaged" and target.read_text() == "run 6"  # same size, same time
    store.sidecar(target).write_bytes(b"\xff\xfe")
    assert ask({"a": 2}) == "damaged"
    target.unlink()
    assert ask({"a": 2}) == "new"
    assert names(target.parent) == [".made.x.txt.json", "x.txt"]


def test_made_folder_and_failure(tmp_path):
    target = tmp_path / "adapter"
    key = keys.stage_key({"a": 1})

    def broken(path: Path) -> None:
        (path / "half").write_text("")
        raise ValueError("loss is NaN at step 3")

    with pytest.raises(ValueError, match="step 3"):
        store.made(target, key, broken, folder=True)
    assert not target.exists() and store.state(target, key) == "failed before"
    assert store.read_record(store._failure(target))["error"] == "ValueError: loss is NaN at step 3"

    def good(path: Path) -> None:
        (path / "w").write_text("whole")

    assert store.made(target, key, good, folder=True) == "failed before"
    assert store.state(target, key) == "done" and store.read_sidecar(target)["key"]["params"] == key.params
    assert not store._failure(target).exists()
    (target / "w").write_text("who")
    assert store.state(target, key) == "damaged"


@pytest.mark.parametrize("harm", [flip, high, cut, empty])
def test_a_damaged_record_is_damage_and_not_a_raw_error(tmp_path, harm):
    target, key = tmp_path / "x", keys.stage_key({"a": 1})
    assert store.made(target, key, lambda path: path.write_text("x")) == "new"
    harm(store.sidecar(target))
    assert store.read_sidecar(target) == {} and store.state(target, key) == "damaged"
    with pytest.raises(store.Damaged, match=r"\.made\.x\.json: damaged, .* makes it anew"):
        store.verified(target)
    assert store.made(target, key, lambda path: path.write_text("x")) == "damaged"
    assert store.made(target, key, lambda path: pytest.fail("it is done")) == "done"


def test_every_bit_of_a_record_counts(tmp_path):
    path = tmp_path / "r.json"
    records.write_record(path, {"title": "lora, seed 0", 1: [0.1, None]})
    data, known = path.read_bytes(), records.read_record(path)
    assert known == {"title": "lora, seed 0", "1": [0.1, None]}
    for at in range(8 * len(data)):
        path.write_bytes(data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :])
        without_seal = {k: v for k, v in records.read_record(path).items() if k in known}
        assert without_seal in ({}, known)  # a flipped seal leaves what it seals


@pytest.fixture
def rotting(monkeypatch):
    """A disk that changes bits by itself: no time, size or inode says so."""
    monkeypatch.setattr(keys, "_identity", lambda path: (path.stat().st_size,))


def test_what_is_asked_for_is_read_whatever_is_remembered_of_it(tmp_path, rotting, monkeypatch):
    monkeypatch.setattr(keys, "LARGE", 0)
    monkeypatch.setenv("WS_OUT", str(tmp_path))
    target, key = tmp_path / "x", keys.stage_key({"a": 1})
    store.made(target, key, lambda path: path.write_text("whole"))
    known = keys.file_key(target)
    flip(target)
    assert keys.file_key(target) == known  # nothing tells that it was written
    assert store.state(target, key) == "damaged" and keys.file_key(target) != known
    with pytest.raises(store.Damaged, match="x: damaged"):
        store.verified(target)
    assert store.kept(target, key, lambda path: path.write_text("whole"), Path.read_text) == "whole"
    assert store.verified(target) == target


def test_a_damaged_note_of_a_hash_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "LARGE", 0)
    monkeypatch.setenv("WS_OUT", str(tmp_path))
    (tmp_path / "x").write_text("content")
    known = keys.file_key(tmp_path / "x")
    (note,) = (tmp_path / ".hashes").iterdir()
    note.write_text(note.read_text().replace(known, known[::-1]))
    keys._file_key.cache_clear()
    assert keys.file_key(tmp_path / "x") == known


def test_what_cannot_be_read_is_not_done(tmp_path):
    target, key, made = tmp_path / "x", keys.stage_key({"a": 1}), []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("half" if len(made) == 1 else "whole")

    store.made(target, key, make)
    assert store.kept(target, key, make, lambda path: {"whole": 1}[path.read_text()]) == 1 and len(made) == 2


def test_files_of_others_are_as_they_are(tmp_path):
    (tmp_path / "w.pt").write_text("mine")
    assert store.verified(tmp_path / "w.pt") == tmp_path / "w.pt" and store.verified(tmp_path) == tmp_path
    assert store.verified(tmp_path / "missing") == tmp_path / "missing"  # the reader says so in its own words


def test_two_processes_make_one_target_once(tmp_path):
    code = (
        "import time; from pathlib import Path; from ws.cache.made import made; from ws.cache.keys import stage_key\n"
        f"base = Path({str(tmp_path)!r})\n"
        "def make(path):\n"
        "    with (base / 'log').open('a') as log: log.write('made\\n')\n"
        "    time.sleep(0.5); path.write_text('x')\n"
        "print('found', made(base / 'pairs.json', stage_key({'n': 1}), make))"
    )
    both = [run_python(code), run_python(code)]
    found = sorted(p.communicate()[0].split("found ")[1].strip() for p in both)
    assert found == ["done", "new"] and (tmp_path / "log").read_text() == "made\n"
