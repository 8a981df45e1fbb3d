"""ws.runs.mend: damage of runs, named in a line and mended by the same command. The kernel is a stand-in (drills)."""

import json
from pathlib import Path

import pytest
from drills import stand_in, ws_command
from harm import cut, empty, flip, high
from test_batch import write_notebook

import ws.runs.notebooks
from ws.cache.made import sidecar
from ws.runs import index
from ws.runs.failed import tries
from ws.runs.notebooks import Notebook

MAKES = "(Path(OUT_DIR).parent / 'product').write_text('p'); (Path(OUT_DIR) / 'table.csv').write_text('t')"
READS = "(Path(OUT_DIR) / 'got').write_text((Path(OUT_DIR).parent / 'first' / 'table.csv').read_text())"


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Results of a project of two notebooks: `first` makes what `second` reads; both are finished."""
    write_notebook(tmp_path / "nbs", "first", f"from pathlib import Path\n{MAKES}")
    write_notebook(tmp_path / "nbs", "second", f"from pathlib import Path\n{READS}")
    home = ws.runs.notebooks.seed_folder
    made = Notebook("first", products=lambda params, out: [home(params, out) / "product"])
    read = Notebook("second", inputs=lambda params, out: [home(params, out) / "first" / "table.csv"])
    monkeypatch.setattr(ws.runs.notebooks, "TABLE", {"first": made, "second": read})
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    monkeypatch.setattr("ws.cache.places.CLONE", tmp_path)
    stand_in(monkeypatch)
    for name in ("first", "second"):
        assert ws_command("nb", name, "-p", "SEED", "3")[0] == 0
    return tmp_path / "out"


def folder_of(out: Path, name: str) -> Path:
    return next(out.rglob(f"{name}.ipynb")).parent


def test_what_can_be_made_without_a_run_is(out):
    for name, harms in {"first.html": [flip, high, cut, empty], "params.json": [high, empty]}.items():
        file = folder_of(out, "first") / name
        whole = file.read_bytes()
        for harm in harms:
            harm(file)
            code, said = ws_command("nb", "first", "-p", "SEED", "3")
            assert code == 0 and "already done" in said and f"{name} is not what was written" in said
            assert file.read_bytes() == whole
        harm(file)
        assert ws_command("report")[0] == 0 and file.read_bytes() == whole


@pytest.mark.parametrize("name", ["first.ipynb", "table.csv", ".made.first.ipynb.json"])
def test_the_index_and_the_next_run_name_what_is_damaged(out, name):
    high(folder_of(out, "first") / name)
    code, said = ws_command("status")
    assert code == 0 and f"{name}; the same command makes it anew" in said
    assert ws_command("report")[0] == 0
    code, said = ws_command("nb", "second", "-p", "SEED", "3", "-p", "RATE", "2.0")
    if name != "first.ipynb":  # what the second reads, and what it is verified by
        assert code == 2 and said.count("\n") == 1 and f"{name}: damaged" in said
        assert "Traceback" not in said and ("just nb first -p SEED 3 makes it anew" in said) == (name == "table.csv")
    code, said = ws_command("nb", "first", "-p", "SEED", "3")
    assert code == 0 and "damaged: " in said and name in said
    assert ws_command("nb", "second", "-p", "SEED", "3", "-p", "RATE", "2.0")[0] == 0


def test_a_damaged_input_that_nothing_tells_of_is_refused_and_made_anew(out, monkeypatch):
    monkeypatch.setattr("ws.cache.keys._identity", lambda path: (path.stat().st_size,))
    monkeypatch.setattr("ws.cache.keys.LARGE", 0)  # every hash is remembered on disk
    file = folder_of(out, "first") / "table.csv"
    assert ws_command("nb", "first", "-p", "SEED", "3")[0] == 0
    flip(file)
    assert "already done" in ws_command("nb", "first", "-p", "SEED", "3")[1]
    code, said = ws_command("nb", "second", "-p", "SEED", "3", "-p", "RATE", "2.0")
    assert code == 2 and "just nb first -p SEED 3 makes it anew" in said
    assert "damaged" in ws_command("nb", "first", "-p", "SEED", "3")[1] and file.read_text() == "t"


def test_a_record_of_a_product_counts_too(out):
    product = next(out.rglob("product"))
    product.with_name(sidecar(product).name).write_bytes(b"\xff{")
    code, said = ws_command("nb", "first", "-p", "SEED", "3")
    assert code == 0 and ".made.product.json" in said


def test_an_unreadable_failure_stops_no_index(out):
    folder = folder_of(out, "first")
    failed = folder / "failed" / "20261128-083000"
    failed.mkdir(parents=True)
    (failed / "first.ipynb").write_text(json.dumps({"cells": []}))
    for text in (b"\xff", b"", b'{"notebook": "first", "reason": "x", "at": "soon"}', b'{"reason": "x"}'):
        (failed / "failure.json").write_bytes(text)
        assert [one["reason"] for one in tries(folder, "first")] == ["damaged: failure.json"]
        assert "damaged: failure.json" in next(r["note"] for r in index.runs(out) if r["notebook"] == "first")
        assert index.report(out).is_file()
