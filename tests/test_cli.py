"""ws.cli: thin commands, exit codes, and where relative paths are seen from."""

import errno
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import polars as pl
import pytest
import torch
from test_batch import write_notebook

from ws import cli
from ws.lab import check_job
from ws.ready import check_inputs  # noqa: F401  a mistake's time is counted beyond loading
from ws.runs import once
from ws.runs.notebooks import Place

HOME = Path(cli.__file__).parents[1]


def call(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    return ended.value.code


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Records what would be run; the run answers as told."""
    calls = []
    answers = {"run": once.Ending("ran", "new", 2.0, folder=tmp_path)}

    def run_notebook(name, params=None, timeout=None, **options):
        calls.append((name, params, timeout, options))
        return answers["run"]

    monkeypatch.setattr(once, "run_notebook", run_notebook)
    return calls, answers


def test_nb_passes_everything_on(asked, monkeypatch, tmp_path, capsys):
    calls, _ = asked
    monkeypatch.setenv("WS_TYPED_IN", str(tmp_path))
    args = ("-p", "ALPHAS", "-1,1", "-p", "NAME", "two words", "-f", "set.yaml", "--force", "--timeout", "9")
    assert call("nb", "probe.ipynb", *args) == 0
    name, params, timeout, options = calls[0]
    assert (name, params, timeout) == ("probe", {"ALPHAS": "-1,1", "NAME": "two words"}, 9)
    assert options.pop("check") is check_job
    assert options == {"files": [tmp_path / "set.yaml"], "force": True, "cwd": tmp_path}
    assert "probe: ran in 2 s (new)" in capsys.readouterr().out


def test_a_run_that_is_ended_says_so(monkeypatch, capsys):
    def ended(*args: object, **options: object):
        raise SystemExit(143)

    monkeypatch.setattr(once, "run_notebook", ended)
    assert call("nb", "probe") == 143 and "ended by SIGTERM; run the same command again" in capsys.readouterr().err


def test_a_failed_run_exits_1_and_shows_the_end_of_its_traceback(asked, tmp_path, capsys):
    _, answers = asked
    answers["run"] = once.Ending(
        "failed", "new", 2.0, "long\n" * 50 + "ValueError: layer 3 is NaN", tmp_path, kept=tmp_path / "failed" / "1"
    )
    assert call("nb", "probe") == 1
    told = capsys.readouterr().err
    assert (
        "ValueError: layer 3 is NaN" in told
        and f"kept in {tmp_path / 'failed' / '1'}" in told
        and told.count("long") == 11
    )


def test_a_full_disk_is_told_in_a_line(monkeypatch, capsys):
    def full(number: int):
        def run_notebook(*args: object, **options: object):
            raise OSError(number, os.strerror(number))

        return run_notebook

    monkeypatch.setattr(once, "run_notebook", full(errno.ENOSPC))
    assert call("nb", "probe") == 1
    assert capsys.readouterr().err.startswith("error: No space left on device: make room; ")
    monkeypatch.setattr(once, "run_notebook", full(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        cli.main(["nb", "probe"])


@pytest.mark.parametrize("words", [["real", "--help"], ["nb", "delta_svd", "--help"]])
def test_output_that_nobody_reads_ends_the_command_quietly(words):
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "ws", *words], stdout=writes, stderr=subprocess.PIPE, text=True, cwd=HOME
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


def test_wrong_parameters_exit_2_before_anything_runs(tmp_path, monkeypatch, capsys):
    write_notebook(tmp_path, "probe", "print(1)")
    monkeypatch.setattr(once, "run_notebook", partial(once.run_notebook, place=Place(nbs=tmp_path)))
    assert call("nb", "probe", "-p", "SEDE", "3") == 2
    assert "unknown parameter SEDE; did you mean SEED?" in capsys.readouterr().err
    assert call("nb", "other") == 2 and "no such notebook" in capsys.readouterr().err
    assert call("nb", "probe", "-p", "SEED") == 2 and call("nonsense") == 2 and call() == 2


MISTAKES = [
    "nb weight_diff -p SEED -1",
    "nb weight_diff -p SEED 4294967296",
    "nb weight_diff -p ALPHAS [nan]",
    "nb weight_diff -p ALPHAS 1",
    "nb weight_diff -p LORA_LAYERS 2-x",
    "nb weight_diff -p LORA_LAYERS 5-2",
    "nb weight_diff -p ADAPTER lorra",
    "nb weight_diff -p LR 0",
    "nb weight_diff -p MAX_STEPS 0",
    "nb weight_diff -p POS_ADAPTER x",
    "nb weight_diff -p W_PATH w.pt -p POS_ADAPTER x -p NEG_ADAPTER y",
    "nb weight_diff -p MODEL_ID ./nothing",
    "nb weight_diff -p BEHAVIOR flattery",
    "nb weight_diff -f tag.yaml",
    "nb weight_diff -f broken.yaml",
    "nb v7_sweep -p PCS 0",
    "nb v7_sweep -p N_NULL -5",
    "nb v7_sweep -p ADAPTER ../../../tmp/x",
    "nb v7_sweep -p PROTOCOL v8",
    "nb v7_sweep -p SOURCES v99",
    "nb v7b_stability -p SEEDS []",
    "nb v7b_stability -p SEEDS 0,0",
    "nb delta_svd -p MODE flood",
    "nb theta_fit -p HELDOUT 1",
    "nb theta_fit -p DEVICE gpu",
    "batch --seeds 0 --set PCS 0 --dry-run",
    "batch --seeds 0-4294967296 --dry-run",
    "batch --seeds 4294967296 --dry-run",
    "batch --seeds 5-2 --dry-run",
    "batch --adapters lorra --dry-run",
    "batch --models ./nothing --dry-run",
    "batch --behaviors none.json --dry-run",
    "batch --set LR fast",
    "batch --workers -1",
    "batch --threads -4",
    "batch --timeout 0",
    "nb delta_svd -p COMPARE .",
]


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_costs_one_line_and_no_time(line, tmp_path, monkeypatch, capsys):
    for name in ("WS_OUT", "WS_TYPED_IN"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "WS_TYPED_IN").mkdir()
    (tmp_path / "WS_TYPED_IN" / "tag.yaml").write_text(f"SEED: !!python/object/apply:os.mkdir ['{tmp_path}/WS_OUT']")
    (tmp_path / "WS_TYPED_IN" / "broken.yaml").write_text("SEED: [1")
    start = time.process_time()  # of this process: what else the machine does is not the message's fault
    assert call(*line.split()) == 2
    took, told = time.process_time() - start, capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and len(told.err) < 300 and not told.out
    assert not (tmp_path / "WS_OUT").exists() and not (tmp_path / "logs").exists()
    assert took < 3, took


def test_a_batch_that_has_everything_before_it_is_planned(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    assert call("batch", "--seeds", "0-1", "--dry-run") == 0
    assert "10 would run" in capsys.readouterr().out
    assert call("batch", "--seeds", "0-1", "--nulls", "0", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "5 would run" in told and "null" not in told
    assert call("batch", "--help") == 0 and "0 trains none" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("line", "said"),
    {
        "nb weight_diff -p SEED": "Missing value for argument '-p/--params'. Expected 2 values: KEY VALUE; see ws nb --help",
        "nb weight_diff --forse": "Unrecognized options: --forse; did you mean --force?; see ws nb --help",
        "batch --seed 0": "--seed (applied to ws batch) 0 (applied to ws batch); did you mean --seeds?; see ws batch",
        "batch --workers two": "--workers: invalid literal for int() with base 10: 'two'; see ws batch --help",
        "nonsense": "Unrecognized options: nonsense; Available subcommands: nb, batch, ",
        "nb": "a notebook of nbs/, without its suffix. (required); see ws nb --help",
        "": "Expected one of {nb, batch, results, demo, real, predict, audit, atlas, inspect, export, trim, generate, chat,"
        " table, doctor, report, status, clean}"
        "; see ws --help",
    }.items(),
)
@pytest.mark.parametrize("columns", ["40", "120"])
def test_a_command_that_is_none_is_told_in_a_line(line, said, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert call(*line.split()) == 2
    told = capsys.readouterr()
    assert said in told.err and told.err.startswith("error: ") and told.err.count("\n") == 1 and not told.out


@pytest.mark.parametrize("name", sorted(p.stem for p in (HOME / "nbs").glob("*.ipynb")))
def test_a_notebooks_help_lists_all_its_parameters(name, capsys):
    from ws.runs.rules import RULES

    assert call("nb", f"nbs/{name}.py", "-p", "SEED", "3", "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and f"usage: ws nb {name} " in "\n".join(lines)
    listed = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("   ")]
    assert sorted(listed) == sorted(RULES[name])
    shown = " ".join(" ".join(lines).split())
    told = {
        "weight_diff": ("LR None learning rate; None: the model's own", "a number above 0; default: 0.0002, tiny: 0.005,",
                        "ALPHAS [-1.0, -0.5, 0.0, 0.5, 1.0] strengths at which w is added", "ADAPTER \"lora\" lora, rslora"),
        "theta_fit": ("LAM 1e-4 weight", "[a number between 0 and 1]", "2.0] at which the fitted thetas are worn"),
        "v7b_stability": ("PROTOCOL \"v7b\"", "[one of v7, v7b]"),
    }  # fmt: skip
    assert all(words in shown for words in told.get(name, ()))


def test_help_reads_any_cell_and_names_an_unknown_notebook(tmp_path, capsys):
    from ws.runs.manual import manual

    cell = 'A = [  # the first\n    1, 2,\n]\n# a heading\n# of two lines\nB = (\n    ""  # of the second\n)\nC = 3\nOUT_DIR = ""'
    write_notebook(tmp_path, "probe", "print(1)", parameters_cell=cell)
    text = manual("probe", Place(nbs=tmp_path))
    assert "  A        [1, 2]        the first [a list such as [1, 2]]\n\na heading of two lines\n  B " in text
    assert "of the second\n  C        3             [int]\n" in text
    assert call("nb", "wieght_diff", "-h") == 2 and "did you mean weight_diff?" in capsys.readouterr().err
    assert call("nb", "--help") == 0 and "--timeout" in capsys.readouterr().out


def test_help_needs_no_kernel_and_no_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-X", "importtime", "-m", "ws", "nb", "weight_diff", "--help"]
    done = subprocess.run(words, cwd=HOME, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert "LORA_LAYERS" in done.stdout and took < 1.5, took
    assert not any(f" {heavy}\n" in done.stderr for heavy in ("torch", "papermill", "jupyter_client", "polars"))


def test_inspect_prints_a_diff_and_names_a_missing_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WS_TYPED_IN", str(tmp_path))
    torch.save({"model.layers.3.mlp.down_proj.weight": torch.eye(4)}, tmp_path / "w.pt")
    assert call("inspect", "w.pt") == 0
    told = capsys.readouterr().out
    assert "model.layers.3.mlp.down_proj.weight" in told and "norm: 2" in told
    assert call("inspect", "none.pt") == 2 and "none.pt" in capsys.readouterr().err


def test_the_command_starts_without_heavy_modules():
    heavy = "torch", "transformers", "polars", "papermill"
    code = f"import sys, ws.cli, ws.runs.once, ws.runs.html; print([m for m in {heavy} if m in sys.modules])"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and time.monotonic() - start < 5


def test_just_hands_arguments_over_unsplit_and_says_where_they_were_typed():
    text = (HOME / "justfile").read_text()
    assert "set positional-arguments" in text and "export WS_TYPED_IN := invocation_directory()" in text
    just = Path(sys.executable).parent / "just"
    listed = subprocess.run([just, "--list"], cwd=HOME, capture_output=True, text=True, check=True).stdout
    for recipe in "setup demo real test test-slow check sync lab nb report tiny-model bench".split():
        assert f"    {recipe}" in listed


def test_demo_runs_one_batch_and_shows_the_table(asked, monkeypatch, tmp_path, capsys):
    from ws.runs.once import Ending

    asked_for = []

    def fake(state):
        def run_jobs(jobs, place, settings):
            asked_for.append((jobs, settings.workers, settings.threads))
            return {jobs[0].name: Ending(state)}, "THE SUMMARY"

        return run_jobs

    monkeypatch.setattr("ws.demo.show_report", lambda show: "THE TABLE")
    monkeypatch.setattr("ws.demo.steered_text", lambda show: "THE TEXT")
    monkeypatch.setattr("ws.runs.index.report", lambda: tmp_path / "index.html")
    monkeypatch.setattr("ws.runs.engine.run_jobs", fake("done"))
    assert call("demo") == 0
    told = capsys.readouterr().out
    assert (
        told.index("THE SUMMARY") < told.index("THE TEXT") < told.index("THE TABLE")
        and f"report: {tmp_path / 'index.html'}" in told
    )
    jobs, workers, threads = asked_for[0]
    assert workers * threads <= max(2, os.cpu_count() or 1)
    counts = Counter(job.notebook for job in jobs)
    once = dict.fromkeys(("v7b_stability", "theta_fit", "delta_svd", "benchmark"), 1)
    assert counts == {"weight_diff": 8, "v7_sweep": 4, "causal_check": 3} | once
    beside = next(job for job in jobs if job.notebook == "benchmark")
    assert beside.needs == tuple(job.name for job in jobs if job.notebook == "causal_check") and len(beside.needs) == 3
    assert beside.values["SIZE"] == "quick"
    assert jobs[-1].notebook == "v7b_stability" and sum("causal_check" in need for need in jobs[-1].needs) == 3
    assert {(job.values["DRAWS"], job.values["FORWARD"]) for job in jobs if job.notebook == "causal_check"} == {
        (300, 8)
    }
    assert all(need in [other.name for other in jobs[:i]] for i, job in enumerate(jobs) for need in job.needs)
    assert {job.values["SEED"] for job in jobs if job.notebook == "weight_diff"} == {0, 1, 2, 3, 4}
    nulls = [job.name for job in jobs if job.values.get("NULL_DIFF")]
    assert len(nulls) == 5 and all(set(nulls) < set(job.needs) for job in jobs if job.notebook == "v7_sweep")
    assert all((job.values["LR"], job.values["SAMPLES"]) == (5e-3, 4) for job in jobs if job.notebook == "weight_diff")
    monkeypatch.setattr("ws.runs.engine.run_jobs", fake("failed"))
    assert call("demo") == 1 and "THE TABLE" not in capsys.readouterr().out


@pytest.mark.parametrize("quick", [False, True])
def test_real_runs_one_batch_on_smollm2(monkeypatch, tmp_path, quick):
    from ws.runs.once import Ending

    asked_for = []

    def run_jobs(jobs, place, settings):
        asked_for.extend(jobs)
        return {job.name: Ending("done") for job in jobs}, "THE SUMMARY"

    monkeypatch.setattr("ws.demo.show_report", lambda show: "THE TABLE")
    monkeypatch.setattr("ws.demo.steered_text", lambda show: "THE TEXT")
    monkeypatch.setattr("ws.runs.index.report", lambda: tmp_path / "index.html")
    monkeypatch.setattr("ws.runs.engine.run_jobs", run_jobs)
    assert call("real", *(["--quick"] if quick else [])) == 0
    assert {job.values["MODEL_ID"] for job in asked_for} == {"smollm2"}
    seeds = {job.values["SEED"] for job in asked_for if job.notebook == "weight_diff" and not job.values["NULL_DIFF"]}
    assert seeds == ({0} if quick else {0, 1, 2})
    nulls = [job for job in asked_for if job.values.get("NULL_DIFF")]
    assert len(nulls) == (0 if quick else 3)
    trained = [job for job in asked_for if job.notebook == "weight_diff"]
    assert all(job.values["PAIRS"] == "sycophancy" and job.identity.adapter == "lora" for job in trained)
    counts = Counter(job.notebook for job in asked_for)
    assert counts["delta_svd"] == counts["benchmark"] == 1 and counts["causal_check"] == len(seeds)
    assert counts["theta_fit"] == counts["v7b_stability"] == (not quick)


def test_the_demo_ends_with_steered_text(monkeypatch, tmp_path):
    from ws import demo
    from ws.steer.evaluate import write_blind

    monkeypatch.setenv("WS_OUT", str(tmp_path))
    (folder := demo.DEMO.run.folder(tmp_path) / "weight_diff").mkdir(parents=True)
    rows = [
        {"topic": t, "prompt": f"Prompt {t}?", "alpha": alpha, "completion": f"said  {t}\n at {alpha:g}"}
        for t in (0, 1)
        for alpha in (-1.0, 0.0, 1.0)
    ]
    write_blind(rows, folder)
    assert demo.steered_text(demo.DEMO).splitlines() == [
        "tiny, seed 0, held out: Prompt 0?", "  alpha -1: said 0 at -1", "  alpha  0: said 0 at 0", "  alpha +1: said 0 at 1",
    ]  # fmt: skip


def test_doctor_says_what_is_there_and_what_is_missing(monkeypatch, tmp_path, capsys):
    from ws.runs import doctor

    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    (tmp_path / "out" / "tiny" / "cache").mkdir(parents=True)
    (tmp_path / "out" / "tiny" / "cache" / "x").write_bytes(bytes(3 << 20))
    assert call("doctor") == 0
    told = capsys.readouterr().out
    assert "torch" in told and "3 MiB" in told and "GiB free" in told and "BAD" not in told
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "_needed", lambda: ["torch", "no-such-package"])
    monkeypatch.setattr(
        doctor.tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(OSError(13, "Permission denied"))
    )
    assert call("doctor") == 1
    told = capsys.readouterr().out
    assert (
        "BAD no-such-package" in told
        and "pip install no-such-package" in told
        and "absent: models in .gguf files" in told
    )
    assert "cannot be written (Permission denied); name another: WS_OUT=folder" in told


def test_a_table_for_a_paper(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WS_TYPED_IN", str(tmp_path))
    (tmp_path / "t.tsv").write_text("name\tR_w\tok\na_b\t1.23456\ttrue\nc\tNaN\tfalse\nd\t12345.6\ttrue\n")
    assert call("table", "t.tsv", "--to", "latex", "--sort", "R_w", "--rows", "2") == 0
    told = capsys.readouterr().out
    assert (
        told.startswith("\\begin{tabular}{lrl}\n\\toprule")
        and "a\\_b" in told
        and "1.23 & yes" in " ".join(told.split())
    )
    assert told.index("1.23e+04") < told.index("1.23 ")
    assert call("table", "t.tsv", "--to", "csv", "--columns", "R_w", "name", "--digits", "2") == 0
    assert capsys.readouterr().out == "R_w,name\n1.2,a_b\nNaN,c\n1.2e+04,d\n"
    assert (
        call("table", "t.tsv", "--columns", "R_v") == 2
        and "no column R_v; did you mean R_w?" in capsys.readouterr().err
    )
    assert call("table", "nowhere.tsv") == 2 and "nowhere.tsv: no such table" in capsys.readouterr().err


def test_demo_report_reads_the_table_and_the_verdict(monkeypatch, tmp_path):
    from ws import demo
    from ws.show.tables import write_table

    monkeypatch.setenv("WS_OUT", str(tmp_path))
    folder = demo.DEMO.run.adapter_folder(tmp_path)
    (folder / "seed_0" / "v7").mkdir(parents=True)
    (folder / "v7b").mkdir()
    names = ["mean_conc_act", "mean_conc_w_combined", "joint_score", "mean_pct_oracle_act", "mean_pct_oracle_combined",
             "mean_z_act", "mean_z_w_combined"]  # fmt: skip
    table = pl.DataFrame({"subspace": ["write"], "family": ["W:write"], "source": ["v5"], **{n: [1.5] for n in names}})
    write_table(table, folder / "seed_0" / "v7" / "v7_summary_pct.tsv")
    (folder / "v7b" / "v7b_conclusion.md").write_text("# x\n\n## Verdict\n\n- **No winner** here.\n\n## Next\n\nmore\n")
    text = demo.show_report(demo.DEMO)
    assert "write" in text and "1.5" in text and "- **No winner** here." in text and "more" not in text
    (quick := demo.QUICK.run.folder(tmp_path) / "v7b").mkdir(parents=True)
    write_table(table, quick / "v7_summary_pct.tsv")
    page = "## Does w steer?\n\nw moves it.\n\n## Leader of this seed\n\n**write** leads.\n\n## Against null diffs\n\nmore\n"
    (quick / "v7_conclusion.md").write_text(page)
    text = demo.show_report(demo.QUICK)
    assert "1.5" in text and "w moves it." in text and "**write** leads." in text and "more" not in text
