"""ws.runs.once, runs, parameters: a notebook runs once, with the parameters that were asked for, or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import pytest

from ws.cache.names import RunId
from ws.cache.places import root
from ws.runs import identity, once
from ws.runs.failed import tries
from ws.runs.notebooks import Place

HOME = root()
run = partial(once.run_notebook, quiet=True)
PARAMETERS = (
    'SEED = 0\nRATE = 0.5\nNAME = "tiny"\nFLAG = False\nALPHAS = [-1.0, 1.0]\nLAYERS = None\nW_PATH = ""\nOUT_DIR = ""'
)
BODY = """
import json, os, sys
from pathlib import Path
from ws.cache.models import model_slug
from ws.cache.files import write_json
count = Path(OUT_DIR).parent / "count"
count.write_text(count.read_text() + "x" if count.exists() else "x")
write_json(Path(OUT_DIR) / "result.json", [SEED, RATE, NAME, FLAG, ALPHAS, LAYERS, W_PATH])
print("stdout of the notebook"); print("progress 3/3", file=sys.stderr)
"""


def write_notebook(nbs: Path, name: str, *cells: str, tag: bool = True, parameters_cell: str = PARAMETERS) -> Path:
    nbs.mkdir(parents=True, exist_ok=True)
    first = nbformat.v4.new_code_cell(parameters_cell, metadata={"tags": ["parameters"]} if tag else {})
    title = nbformat.v4.new_markdown_cell(f"# Report of {name}")
    notebook = nbformat.v4.new_notebook(cells=[title, first, *(nbformat.v4.new_code_cell(c) for c in cells)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, nbs / f"{name}.ipynb")
    return nbs / f"{name}.ipynb"


@pytest.fixture
def place(tmp_path):
    """Folders of a small project: notebooks, results, logs."""
    return Place(tmp_path / "nbs", tmp_path / "out")


def count(place) -> int:
    return len((place.out / "tiny" / "sycophancy" / "lora" / "seed_3" / "count").read_text())


def test_a_run_is_done_once_and_remade_for_a_reason(place, tmp_path):
    write_notebook(place.nbs, "probe", BODY)
    first = run("probe", {"SEED": "3", "ALPHAS": "-2,2", "FLAG": "true"}, place=place)
    folder = RunId("tiny", "sycophancy", "lora", 3).folder(place.out) / "probe"
    assert first.ok and first.found == "new" and first.folder == folder, first.error
    assert json.loads((folder / "result.json").read_text()) == [3, 0.5, "tiny", True, [-2.0, 2.0], None, ""]
    visible = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".made"))
    assert visible == ["params.json", "probe.html", "probe.ipynb", "result.json"]
    about = json.loads((folder / "params.json").read_text())
    assert about["parameters"]["SEED"] == 3 and about["parameters"]["RATE"] == 0.5
    assert set(about) == {"notebook", "parameters", "source_revision", "versions", "environment", "timings"}
    assert about["environment"]["threads"] == once.threads() >= 1
    assert about["versions"]["torch"] and about["timings"]["seconds"] > 0
    log = next(place.logs.glob("*_probe_*.log")).read_text()
    assert "stdout of the notebook" in log and "progress 3/3" in log and "ended well" in log

    start = time.monotonic()
    again = run("probe", {"SEED": 3, "ALPHAS": [-2, 2], "FLAG": True}, place=place)
    assert again.ok and again.found == "done" and time.monotonic() - start < 1 and count(place) == 1

    assert run("probe", {"SEED": "3"}, place=place).found == "changed parameters" and count(place) == 2
    (folder / "result.json").unlink()
    assert run("probe", {"SEED": "3"}, place=place).found == "damaged" and count(place) == 3
    (folder / "probe.html").unlink()
    assert run("probe", {"SEED": "3"}, place=place).found == "done" and (folder / "probe.html").is_file()
    write_notebook(place.nbs, "probe", BODY, "print('one more')")
    assert run("probe", {"SEED": "3"}, place=place).found == "changed code" and count(place) == 4
    assert run("probe", {"SEED": "3"}, force=True, place=place).ok and count(place) == 5


def test_an_input_counts_by_what_it_holds(place, tmp_path):
    write_notebook(place.nbs, "probe", "open(OUT_DIR + '/x', 'w').write('x')")
    data = tmp_path / "here" / "w.pt"
    data.parent.mkdir()
    data.write_text("one")

    def ask(path: str, cwd: Path):
        return run("probe", {"W_PATH": path, "OUT_DIR": "res"}, cwd=cwd, place=place)

    first = ask("w.pt", data.parent)
    assert first.ok and first.folder == data.parent / "res" and (first.folder / "probe.html").is_file(), first.error
    assert json.loads((first.folder / "params.json").read_text())["parameters"]["W_PATH"] == str(data)
    assert ask(str(data), data.parent).found == "done"
    data.write_text("two")
    with pytest.raises(ValueError, match=r"holds the finished run of .*w from w\.pt .*; choose another folder"):
        ask("w.pt", data.parent)  # another w is another run: it has a folder of its own
    own = run("probe", {"W_PATH": "w.pt"}, cwd=data.parent, place=place)
    assert own.found == "new" and own.folder.parent.name.startswith("w-w-"), own.error
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        ask("missing.pt", data.parent)


def test_a_failed_run_is_kept_apart_and_told(place):
    write_notebook(place.nbs, "probe", "if SEED == 3: raise RuntimeError('planted at seed 3')", "print('not reached')")
    failed = run("probe", {"SEED": 3}, place=place)
    assert not failed.ok and failed.error.endswith("RuntimeError: planted at seed 3") and "\x1b" not in failed.error
    assert [p.name for p in failed.folder.iterdir()] == ["failed"] and failed.kept.parent == failed.folder / "failed"
    kept = nbformat.read(failed.kept / "probe.ipynb", as_version=4)
    assert kept.metadata.papermill.exception is True
    told = tries(failed.folder, "probe")[0]
    assert told["error"] == failed.error and told["reason"] == "RuntimeError: planted at seed 3"
    write_notebook(place.nbs, "probe", "print(SEED)")
    again = run("probe", {"SEED": 3}, place=place)
    assert again.ok and again.found == "failed before"
    assert sorted(p.name for p in again.folder.rglob("*.ipynb")) == ["probe.ipynb"]
    assert not (again.folder / "failed").exists()
    done = nbformat.read(again.folder / "probe.ipynb", as_version=4).metadata.papermill
    assert done.end_time and done.exception is None and done.output_path == "probe.ipynb"


def test_a_cell_that_kills_its_kernel_fails_the_run(place):
    write_notebook(place.nbs, "probe", "import os; os._exit(9)")
    failed = run("probe", {}, place=place)
    assert not failed.ok and "Kernel died" in failed.error and (failed.kept / "probe.ipynb").is_file()


def test_two_notebooks_may_share_a_folder(place, tmp_path):
    write_notebook(place.nbs, "first", "open(OUT_DIR + '/a', 'w').write('a')")
    write_notebook(place.nbs, "second", "open(OUT_DIR + '/b', 'w').write('b')")
    for _ in range(2):
        found = [run(name, {"OUT_DIR": str(tmp_path / "res")}, place=place).found for name in ("first", "second")]
    assert found == ["done", "done"]
    for name, own in (("first", "a"), ("second", "b")):
        assert list(identity.record_of(name, tmp_path / "res")["outputs"]) == [own]


def test_refusals_name_the_thing(place):
    write_notebook(place.nbs, "untagged", "print(1)", tag=False)
    write_notebook(place.nbs, "probe", "print(1)")
    write_notebook(place.nbs, "derived", "print(1)", parameters_cell="OUT_DIR = ''\nX = [1] * 3")
    cases = [
        ("untagged", {"SEED": 3}, "untagged: no cell is tagged 'parameters'"),
        ("probe", {"SEDE": 3}, r"probe: unknown parameter SEDE; did you mean SEED\? Known: SEED, RATE"),
        ("probe", {"SEED": "three"}, "SEED: expects int, got 'three'"),
        ("probe", {"FLAG": "maybe"}, "FLAG: expects true or false"),
        ("derived", {}, "derived: parameter X is not a literal"),
    ]
    for name, values, message in cases:
        with pytest.raises(ValueError, match=message):
            run(name, values, place=place)
    with pytest.raises(FileNotFoundError, match="prob: no such notebook.*did you mean probe"):
        run("prob", {}, place=place)
    assert not place.out.exists()  # nothing was started


def test_sigterm_after_the_last_cell_leaves_nothing_behind(place, monkeypatch):
    """The notebook has ended and is being rendered: no kernel is there to be told, but files and the lock are."""
    write_notebook(place.nbs, "probe", BODY)
    folder = RunId("tiny", "sycophancy", "lora", 3).folder(place.out) / "probe"
    seen = []

    def interrupted(notebook: Path, target: Path, title: str) -> None:
        seen.extend(sorted(p.name[:5] for p in folder.parent.iterdir()))
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # an impatient second one must not disturb the tidying
        time.sleep(1)
        raise AssertionError("SIGTERM was not heard")

    with monkeypatch.context() as patch:
        patch.setattr("ws.runs.html.render", interrupted)
        with pytest.raises(SystemExit) as ended:
            run("probe", {"SEED": 3}, place=place)
    assert ended.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert seen == [".lock", ".tmp-", "count"] and [p.name for p in folder.parent.iterdir()] == ["count"]
    again = run("probe", {"SEED": 3}, place=place)
    assert again.ok and again.found == "new" and count(place) == 2


DRIVER = """
from pathlib import Path
from ws.runs import once
from ws.runs.notebooks import Place
base = Path({base!r})
run = once.run_notebook("probe", {{"SEED": 3}}, place=Place(base / "nbs", base / "out"), quiet=True)
print(run.found, run.ok)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_ends_its_kernel_and_the_next_one_completes(place, tmp_path, number):
    slow = "import os, time\nfrom pathlib import Path\nfrom ws.cache.files import atomic_file\n"
    slow += f"pid = Path({str(tmp_path / 'pid')!r})\n"
    slow += "if not pid.exists():\n    with atomic_file(OUT_DIR + '/half') as t:\n        t.write_text('half')\n"
    slow += "        with atomic_file(pid) as p: p.write_text(str(os.getpid()))\n        time.sleep(60)\n"
    write_notebook(place.nbs, "probe", slow, "open(OUT_DIR + '/whole', 'w').write('x')")
    driver = [sys.executable, "-c", DRIVER.format(base=str(tmp_path))]
    process = subprocess.Popen(
        driver, cwd=HOME, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    until = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    kernel = int((tmp_path / "pid").read_text())
    os.kill(process.pid, number)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode != 0, output
    until = time.monotonic() + 30
    while Path(f"/proc/{kernel}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{kernel}").exists()
    folder = RunId("tiny", "sycophancy", "lora", 3).folder(place.out) / "probe"
    assert not (folder / "probe.ipynb").exists()
    done = subprocess.run(driver, cwd=HOME, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "new True", done.stdout + done.stderr
    left = sorted(p.name for p in folder.iterdir())
    assert left == [
        ".made.probe.html.json",
        ".made.probe.ipynb.json",
        "params.json",
        "probe.html",
        "probe.ipynb",
        "whole",
    ]
