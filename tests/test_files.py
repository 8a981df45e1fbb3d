"""ws.cache.files: whole or absent, leftovers of dead processes, locks that end with their owner."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_store import names, run_python

from ws.cache import files


def test_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "sub" / "table.tsv"
    with files.atomic_file(target) as temporary:
        temporary.write_text("new")
        temporary.chmod(0o600)
        assert not target.exists() and temporary.suffix == ".tsv" and temporary.parent == target.parent
    (tmp_path / "plain").write_text("")
    assert target.read_text() == "new" and target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(KeyError), files.atomic_file(target) as temporary:
        temporary.write_text("half")
        raise KeyError("stop")
    assert target.read_text() == "new" and names(target.parent) == ["table.tsv"]
    with pytest.raises(FileNotFoundError, match=r"table\.tsv.*nothing was written"), files.atomic_file(target):
        pass
    assert target.read_text() == "new"


def test_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "adapter"
    for content in ("one", "two"):
        with files.atomic_dir(target) as temporary:
            (temporary / content).write_text(content)
        assert names(target) == [content]
    with pytest.raises(RuntimeError), files.atomic_dir(target) as temporary:
        (temporary / "half").write_text("")
        raise RuntimeError
    assert names(target) == ["two"] and names(tmp_path) == ["adapter"]


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_live_one_kept(tmp_path):
    code = (
        "import sys, time; from ws.cache.files import atomic_file\n"
        f"with atomic_file({str(tmp_path / 'big.bin')!r}) as t:\n"
        "    t.write_bytes(b'half'); print('ready', flush=True); time.sleep(60)"
    )
    process = run_python(code)
    assert process.stdout.readline() == "ready\n"
    live = names(tmp_path)
    assert len(live) == 1 and live[0].startswith(".tmp-")
    assert files.sweep(tmp_path) == []
    process.kill()
    process.wait()
    files.write_text(tmp_path / "other.txt", "x")
    assert names(tmp_path) == sorted([*live, "other.txt"])  # another target's leftover is not this one's business
    files.write_text(tmp_path / "big.bin", "whole")
    assert names(tmp_path) == ["big.bin", "other.txt"]


def test_sweep_finds_leftovers_below(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    left = tmp_path / "a" / f".tmp-{files._host()}-{dead.pid}-1-0.adapter"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    foreign = tmp_path / "a" / f".tmp-elsewhere-{dead.pid}-1-0.adapter"  # another machine's: not ours to judge
    foreign.mkdir()
    assert files.sweep(tmp_path) == [left] and names(tmp_path / "a") == [foreign.name]


def test_a_process_that_ended_but_was_not_asked_for_is_dead(tmp_path):
    """A worker's orphan may stay a zombie for as long as its new parent likes."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # ended, still in the table of processes
    left = tmp_path / f".tmp-{files._host()}-{child}-{files._stat(child)[1]}-0.table.tsv"
    left.write_text("half")
    try:
        assert files._stat(child)[0] == "Z" and files.sweep(tmp_path) == [left] and not left.exists()
    finally:
        os.waitpid(child, 0)


def test_lock_refuses_with_the_owners_pid_and_a_dead_owner_does_not_block(tmp_path):
    code = (
        "import time; from ws.cache.files import lock\n"
        f"with lock({str(tmp_path)!r}): print('held', flush=True); time.sleep(60)"
    )
    owner = run_python(code)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(files.Locked, match=f"pid {owner.pid} on "), files.lock(tmp_path, wait_s=0):
        pass
    start = time.monotonic()
    with pytest.raises(files.Locked), files.lock(tmp_path, wait_s=0.3):
        pass
    assert time.monotonic() - start >= 0.3
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    with files.lock(tmp_path, wait_s=0):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    assert names(tmp_path) == []


def test_json_is_written_whole_or_not(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, "é"]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": [\n    1.5,\n    "é"\n  ]\n}\n'
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["b"] == 1
