"""What a killed run or batch leaves in the temporary folder is gone after the same command again."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from stubs import HOME, alive, counts, descendants, end, start_driver, wait_for, write_project

from ws.cache import files
from ws.runs.execute import _kernels, temporary_folder

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from stubs import Place
from ws.runs.once import run_notebook
base = Path({base!r})
values = {{"MODEL_ID": "org/stub", "BEHAVIOR": str(base / "stub.json"), "SEED": 1}}
print(run_notebook("weight_diff", values, place=Place(nbs=base / "nbs", out=base / "out")))
"""


def dead_pid() -> int:
    return next(pid for pid in range(400_000, 4_000_000) if not psutil.pid_exists(pid))


def test_a_dead_owners_folder_is_removed_and_a_live_ones_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f".tmp-{files._host()}-{dead_pid()}-1-0.ws"
    other = tmp_path / f".tmp-{files._host()}-{dead_pid()}-1-0.of-another-program"
    for folder in (left, other):
        (folder / "deep").mkdir(parents=True)
    with temporary_folder() as first, temporary_folder() as second:
        assert sorted(tmp_path.iterdir()) == sorted([other, first, second])
        assert first.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == [other]


def test_a_kernels_temporary_files_lie_in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", "before")
    with _kernels(tmp_path / "out") as config:
        folder = Path(os.environ["TMPDIR"])
        assert folder.parent == tmp_path and Path(config.KernelManager.connection_file).parent == folder
    assert not folder.exists() and os.environ["TMPDIR"] == "before"


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    """A project whose first run hangs, and an empty folder for everything temporary."""
    base, left = tmp_path / "p", Path(tempfile.mkdtemp(prefix="t"))  # a short name: sockets have paths
    write_project(base)
    (base / "traps" / "hang-weight_diff-1").touch()
    for name, folder in {"TMPDIR": left, "JUPYTER_RUNTIME_DIR": left / "runtime"}.items():
        monkeypatch.setenv(name, str(folder))
    yield base, left
    files._remove(left)


def hung(base: Path) -> int:
    file = base / "pids" / "weight_diff-1"
    wait_for(file.is_file, what="the kernel")
    return int(file.read_text())


@pytest.mark.slow
def test_kill_a_run_by_hand(hanging):
    base, left = hanging
    script = base / "run.py"
    script.write_text(RUN.format(tests=str(Path(__file__).parent), base=str(base)))

    def start() -> subprocess.Popen:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        return subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(HOME)}, **quiet)

    process = start()
    try:
        kernel = hung(base)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda: not alive(kernel), what="the end of the kernel")
        assert list(left.iterdir())
    finally:
        end(process)
    (base / "traps" / "hang-weight_diff-1").unlink()
    assert start().wait(timeout=60) == 0 and counts(base)["weight_diff-1"] == 2
    assert not list(left.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["driver", "run"])
def test_kill_a_batch(hanging, what):
    """Its driver, or the process of one of its runs: that batch itself tidies up."""
    base, left = hanging
    driver = start_driver(base)
    try:
        kernel, family = hung(base), descendants(driver.pid)
        os.kill(driver.pid if what == "driver" else psutil.Process(kernel).ppid(), signal.SIGKILL)
        driver.wait(timeout=120)
        wait_for(lambda: not any(alive(pid) for pid in family), what="the end of all processes of the batch")
        assert bool(list(left.iterdir())) == (what == "driver")
    finally:
        end(driver)
    (base / "traps" / "hang-weight_diff-1").unlink()
    assert start_driver(base).wait(timeout=120) == 0, (base / "driver.log").read_text()
    assert not list(left.iterdir())
