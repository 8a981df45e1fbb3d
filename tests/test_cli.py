"""ws.cli: thin commands, exit codes, and where relative paths are seen from."""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from test_batch import write_notebook

from ws import batch, cli

HOME = Path(cli.__file__).parents[1]


def call(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    return ended.value.code


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Records what would be run; the run answers as told."""
    calls = []
    answers = {"run": batch.Run("probe", tmp_path, "new", True, 2.0)}

    def run_notebook(name, params=None, out_dir=None, timeout=None, **options):
        calls.append((name, params, timeout, options))
        return answers["run"]

    monkeypatch.setattr(batch, "run_notebook", run_notebook)
    return calls, answers


def test_nb_passes_everything_on(asked, monkeypatch, tmp_path, capsys):
    calls, _ = asked
    monkeypatch.setenv("WS_TYPED_IN", str(tmp_path))
    args = ("-p", "ALPHAS", "-1,1", "-p", "NAME", "two words", "-f", "set.yaml", "--force", "--timeout", "9")
    assert call("nb", "probe.ipynb", *args) == 0
    name, params, timeout, options = calls[0]
    assert (name, params, timeout) == ("probe", {"ALPHAS": "-1,1", "NAME": "two words"}, 9)
    assert options == {"files": [tmp_path / "set.yaml"], "force": True, "cwd": tmp_path}
    assert "probe: ran in 2 s (new)" in capsys.readouterr().out


def test_a_failed_run_exits_1_and_shows_the_end_of_its_traceback(asked, tmp_path, capsys):
    _, answers = asked
    answers["run"] = batch.Run("probe", tmp_path, "new", False, 2.0, "long\n" * 50 + "ValueError: layer 3 is NaN")
    assert call("nb", "probe") == 1
    told = capsys.readouterr().err
    assert "ValueError: layer 3 is NaN" in told and "probe.failed.ipynb" in told and told.count("long") == 11


def test_wrong_parameters_exit_2_before_anything_runs(tmp_path, monkeypatch, capsys):
    write_notebook(tmp_path, "probe", "print(1)")
    monkeypatch.setattr(batch, "run_notebook", partial(batch.run_notebook, nbs=tmp_path))
    assert call("nb", "probe", "-p", "SEDE", "3") == 2
    assert "unknown parameter SEDE; did you mean SEED?" in capsys.readouterr().err
    assert call("nb", "other") == 2 and "no such notebook" in capsys.readouterr().err
    assert call("nb", "probe", "-p", "SEED") == 2 and call("nonsense") == 2 and call() == 2


def test_inspect_prints_a_diff_and_names_a_missing_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WS_TYPED_IN", str(tmp_path))
    torch.save({"model.layers.3.mlp.down_proj.weight": torch.eye(4)}, tmp_path / "w.pt")
    assert call("inspect", "w.pt") == 0
    told = capsys.readouterr().out
    assert "model.layers.3.mlp.down_proj.weight" in told and "norm: 2" in told
    assert call("inspect", "none.pt") == 2 and "none.pt" in capsys.readouterr().err


def test_the_command_starts_without_heavy_modules():
    heavy = "torch", "transformers", "polars", "papermill"
    code = f"import sys, ws.cli, ws.batch, ws.report; print([m for m in {heavy} if m in sys.modules])"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and time.monotonic() - start < 5


def test_just_hands_arguments_over_unsplit_and_says_where_they_were_typed():
    text = (HOME / "justfile").read_text()
    assert "set positional-arguments" in text and "export WS_TYPED_IN := invocation_directory()" in text
    just = Path(sys.executable).parent / "just"
    listed = subprocess.run([just, "--list"], cwd=HOME, capture_output=True, text=True, check=True).stdout
    for recipe in "setup demo test test-slow check sync lab nb report tiny-model bench".split():
        assert f"    {recipe}" in listed


def test_demo_runs_both_notebooks_and_shows_the_table(asked, monkeypatch, tmp_path, capsys):
    calls, answers = asked
    shown = []
    monkeypatch.setattr("ws.tables.read_table", lambda path: shown.append(path.name))
    monkeypatch.setattr("ws.conclusion.top_table", lambda table, rows, style: "THE TABLE")
    monkeypatch.setattr("ws.report.report", lambda: tmp_path / "index.html")
    assert call("demo") == 0
    told = capsys.readouterr().out
    assert [(c[0], c[1]) for c in calls] == [(n, {"MODEL_ID": "tiny"}) for n in ("weight_diff", "v7_sweep")]
    assert shown == ["v7_summary_pct.tsv"] and "THE TABLE" in told and f"report: {tmp_path / 'index.html'}" in told
    answers["run"] = batch.Run("weight_diff", tmp_path, "new", False, 2.0, "ValueError: x")
    calls.clear()
    assert call("demo") == 1 and len(calls) == 1  # the second step does not start on a failed first
