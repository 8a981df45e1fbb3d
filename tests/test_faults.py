"""Fault drills: what a batch loses when something is killed, cut off or raises: nothing that was finished.

Each drill starts a batch (two workers, stub notebooks), breaks something at a known moment, and then gives the same
command again. At the end every table and every weight difference equals that of an undisturbed run byte for byte, and
what was finished before the fault was not run a second time. docs/reliability.md has the results.
"""

import os
import signal

import psutil
import pytest
from stubs import (
    LORA,
    alive,
    copy_project,
    counts,
    descendants,
    end,
    running_cluster,
    start_driver,
    tables,
    wait_for,
    write_project,
)

from ws.runs import identity

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run."""
    base = tmp_path_factory.mktemp("whole")
    place = write_project(base)
    assert start_driver(base).wait(timeout=120) == 0, (base / "driver.log").read_text()
    return base, tables(place)


def hung(base, name: str) -> int:
    """Wait until the kernel of a run hangs in its trap; its pid."""
    file = base / "pids" / name
    wait_for(file.is_file, what=f"the kernel of {name}")
    return int(file.read_text())


def release(base, name: str) -> None:
    (base / "traps" / f"hang-{name}").unlink()


def log(base) -> str:
    return (base / "driver.log").read_text()


def completes(base, place, whole, settings: dict | None = None, **expected: int) -> None:
    """The same command again ends well, equals the undisturbed run, and left no litter; `expected`: runs begun."""
    driver = start_driver(base, **(settings or {}))
    assert driver.wait(timeout=120) == 0, log(base)
    equals(base, place, whole, **expected)


def equals(base, place, whole, **expected: int) -> None:
    assert tables(place) == whole[1]
    assert counts(base) == {name.replace("__", "-"): n for name, n in expected.items()}
    left = [p for pattern in (".tmp-*", ".was-*", ".lock*", "failed") for p in place.out.rglob(pattern)]
    assert not left, left


def kernel_worker(kernel: int) -> int:
    """The Dask worker above a kernel: kernel < run's process < worker."""
    return psutil.Process(kernel).parent().parent().pid


@pytest.mark.parametrize("after", ["at once", "later"])
def test_kill_a_worker(whole, tmp_path, after):
    """The scheduler gives the run to another worker: the batch itself completes.

    `after`: the dead worker's kernel may go on at once, so that its run may be anywhere on its way to its end when it
    is ended, or hangs until then.
    """
    place = copy_project(whole[0], tmp_path, "seed_1", "v7b_seeds0-1")
    (tmp_path / "traps" / "hang-weight_diff-1").touch()
    driver = start_driver(tmp_path)
    try:
        kernel = hung(tmp_path, "weight_diff-1")
        os.kill(kernel_worker(kernel), signal.SIGKILL)
        if after == "later":
            wait_for(lambda: not alive(kernel), what="the end of the dead worker's kernel")
        release(tmp_path, "weight_diff-1")
        assert driver.wait(timeout=120) == 0, log(tmp_path)
        wait_for(lambda: not alive(kernel), what="the end of the dead worker's kernel")
    finally:
        end(driver)
    assert tables(place) == whole[1] and "begun anew 1 x" in log(tmp_path)
    completes(tmp_path, place, whole, weight_diff__1=2, v7_sweep__1=1, v7b_stability=1)


def test_kill_the_driver(whole, tmp_path):
    """Workers, runs and kernels end by themselves; the dead owner's lock does not block. A live one's does."""
    place = copy_project(whole[0], tmp_path, "seed_1", "v7b_seeds0-1")
    (tmp_path / "traps" / "hang-weight_diff-1").touch()
    driver = start_driver(tmp_path)
    try:
        kernel = hung(tmp_path, "weight_diff-1")
        second = start_driver(tmp_path)
        assert second.wait(timeout=60) != 0 and f"in use by pid {driver.pid} on" in log(tmp_path)
        family = descendants(driver.pid)
        assert kernel in family and len(family) >= 4
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        wait_for(lambda: not any(alive(pid) for pid in family), 30, "the end of all processes of the batch")
    finally:
        end(driver)
    release(tmp_path, "weight_diff-1")
    completes(tmp_path, place, whole, weight_diff__1=2, v7_sweep__1=1, v7b_stability=1)


def test_kill_the_driver_of_a_running_cluster(whole, tmp_path):
    """Its workers are not the batch's to end: the run in progress goes on, and the next batch takes its result."""
    place = copy_project(whole[0], tmp_path, "seed_1", "v7b_seeds0-1")
    (tmp_path / "traps" / "hang-weight_diff-1").touch()
    with running_cluster(tmp_path) as (at, started):
        driver = start_driver(tmp_path, **at)
        try:
            kernel = hung(tmp_path, "weight_diff-1")
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
            driver = start_driver(tmp_path, **at)
            wait_for(lambda: "weight_diff: waiting for" in log(tmp_path), what="the next batch to meet the run")
            assert alive(kernel)
            release(tmp_path, "weight_diff-1")
            assert driver.wait(timeout=120) == 0, log(tmp_path)
        finally:
            end(driver)
        assert all(process.poll() is None for process in started)
    equals(tmp_path, place, whole, weight_diff__1=1, v7_sweep__1=1, v7b_stability=1)


def test_a_second_batch_waits_when_asked(whole, tmp_path):
    """`--wait`: it starts when the first has ended, and finds everything done."""
    place = copy_project(whole[0], tmp_path, "seed_1", "v7b_seeds0-1")
    (tmp_path / "traps" / "hang-weight_diff-1").touch()
    first = start_driver(tmp_path)
    second = None
    try:
        hung(tmp_path, "weight_diff-1")
        second = start_driver(tmp_path, wait=True)
        wait_for(lambda: f"in use by pid {first.pid} on" in log(tmp_path), what="the second batch to meet the lock")
        release(tmp_path, "weight_diff-1")
        assert first.wait(timeout=120) == 0 and second.wait(timeout=60) == 0, log(tmp_path)
    finally:
        for driver in (first, second):
            if driver:
                end(driver)
    assert "6 done in" in log(tmp_path)
    equals(tmp_path, place, whole, weight_diff__1=1, v7_sweep__1=1, v7b_stability=1)


def test_interrupt(whole, tmp_path):
    """Ctrl-C in the terminal: the whole process group gets SIGINT; no kernel is left, nothing is half written."""
    place = copy_project(whole[0], tmp_path, "seed_1", "v7b_seeds0-1")
    (tmp_path / "traps" / "hang-weight_diff-1").touch()
    driver = start_driver(tmp_path)
    try:
        hung(tmp_path, "weight_diff-1")
        family = descendants(driver.pid)
        os.killpg(driver.pid, signal.SIGINT)
        assert driver.wait(timeout=40) != 0
        wait_for(lambda: not any(alive(pid) for pid in family), 5, "the end of all processes of the batch")
    finally:
        end(driver)
    release(tmp_path, "weight_diff-1")
    completes(tmp_path, place, whole, weight_diff__1=2, v7_sweep__1=1, v7b_stability=1)


def test_kill_a_kernel(whole, tmp_path):
    """That run fails and says so; what needs it is skipped."""
    place = copy_project(whole[0], tmp_path, "seed_1/v7b", "v7b_seeds0-1")
    (tmp_path / "traps" / "hang-v7_sweep-1").touch()
    driver = start_driver(tmp_path)
    try:
        os.kill(hung(tmp_path, "v7_sweep-1"), signal.SIGKILL)
        assert driver.wait(timeout=120) == 1, log(tmp_path)
    finally:
        end(driver)
    assert "Kernel died" in log(tmp_path) and "4 done, 1 failed, 1 skipped" in log(tmp_path)
    assert list((place.out / LORA / "seed_1/v7b/failed").glob("*/v7_sweep.ipynb"))
    release(tmp_path, "v7_sweep-1")
    completes(tmp_path, place, whole, v7_sweep__1=2, v7b_stability=1)


def test_kill_the_process_of_a_run(whole, tmp_path):
    """Its kernel ends by itself, the run fails, and the same command does not meet what it left."""
    place = copy_project(whole[0], tmp_path, "seed_1/v7b", "v7b_seeds0-1")
    (tmp_path / "traps" / "hang-v7_sweep-1").touch()
    driver = start_driver(tmp_path)
    try:
        kernel = hung(tmp_path, "v7_sweep-1")
        psutil.Process(kernel).parent().kill()
        assert driver.wait(timeout=120) == 1, log(tmp_path)
        wait_for(lambda: not alive(kernel), 10, "the end of the kernel")
    finally:
        end(driver)
    assert "ended with code -9" in log(tmp_path) and "4 done, 1 failed, 1 skipped" in log(tmp_path)
    release(tmp_path, "v7_sweep-1")
    completes(tmp_path, place, whole, v7_sweep__1=2, v7b_stability=1)


def test_truncate_a_diff_in_the_middle_of_a_batch(whole, tmp_path):
    """The sweep that needs it refuses it, whatever the notebook would have made of it; the next batch makes it anew."""
    place = copy_project(whole[0], tmp_path, "seed_0/v7b", "seed_1/v7b", "v7b_seeds0-1", "seed_0/null_diff")
    (tmp_path / "traps" / "hang-null-0").touch()
    driver = start_driver(tmp_path)
    try:
        hung(tmp_path, "null-0")
        w = place.out / LORA / "seed_1" / "w.safetensors"
        os.truncate(w, w.stat().st_size // 2)
        release(tmp_path, "null-0")
        assert driver.wait(timeout=120) == 1, log(tmp_path)
    finally:
        end(driver)
    assert f"{w}: is not what weight_diff made" in log(tmp_path) and "2 ran, 2 done, 1 failed, 1 skipped" in log(
        tmp_path
    )
    assert identity.missing_output("weight_diff", w.parent / "weight_diff") == str(w)
    completes(tmp_path, place, whole, null__0=1, weight_diff__1=1, v7_sweep__0=1, v7_sweep__1=1, v7b_stability=1)


def test_a_notebook_that_raises_for_one_seed(whole, tmp_path):
    """Its notebook is kept with the traceback; the other seed finishes."""
    place = copy_project(whole[0], tmp_path, "seed_0/v7b", "seed_1/v7b", "v7b_seeds0-1")
    trap = tmp_path / "traps" / "raise-v7_sweep-1"
    trap.touch()
    assert start_driver(tmp_path).wait(timeout=120) == 1, log(tmp_path)
    assert "RuntimeError: planted in v7_sweep-1" in log(tmp_path) and "seed_1/v7b/failed/" in log(tmp_path)
    assert "1 ran, 3 done, 1 failed, 1 skipped" in log(tmp_path)
    trap.unlink()
    completes(tmp_path, place, whole, v7_sweep__0=1, v7_sweep__1=2, v7b_stability=1)


def test_two_runs_of_the_same_grid_are_equal(whole, tmp_path):
    place = write_project(tmp_path)
    completes(
        tmp_path,
        place,
        whole,
        null__0=1,
        weight_diff__0=1,
        weight_diff__1=1,
        v7_sweep__0=1,
        v7_sweep__1=1,
        v7b_stability=1,
    )
