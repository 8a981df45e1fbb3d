"""ws.runs, ws.demo, ws.lab: where a causal check and a benchmark stand in a batch, in the demo, in the results, and what
is refused before their kernels start."""

import json
import shutil
from functools import partial

import polars as pl
import pytest
from stubs import LORA, RUN, copy_project, counts, stub_jobs, tables, write_project

from ws import demo, lab
from ws.cache.places import ASSETS
from ws.cache.records import write_record
from ws.runs import engine, results
from ws.runs.engine import Settings, run_jobs
from ws.runs.grid import make_jobs, plan, read_grid, read_options
from ws.runs.notebooks import Place
from ws.runs.once import prepare, run_notebook

TWO = Settings(workers=2, threads=1)
CHECKS = ("causal_check-0", "causal_check-1")


def short(endings) -> dict[str, str]:
    return {name.removeprefix(f"{RUN} "): ending.state for name, ending in endings.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A project after its batch, its tables then, and what the same batch with causal checks did to it."""
    base = tmp_path_factory.mktemp("whole")
    place = write_project(base)
    plain, _ = run_jobs(stub_jobs(place), place, TWO)
    assert all(ending.ok for ending in plain.values())
    before = tables(place)
    endings, summary = run_jobs(stub_jobs(place, causal=True), place, TWO)
    return base, place, before, endings, summary


def test_causal_checks_are_added_to_a_batch_that_is_done(whole):
    base, place, before, endings, summary = whole
    ran = {"seed 0: causal_check", "seed 1: causal_check", "all seeds: v7b_stability"}
    assert {name for name, state in short(endings).items() if state == "ran"} == ran, summary
    assert set(short(endings).values()) == {"ran", "done"}
    assert counts(base) == dict.fromkeys(counts(base), 1) | {"v7b_stability": 2}
    assert [json.loads(before[f"{LORA}/v7b_seeds0-1/checked.txt"])] == [[]]
    assert json.loads((place.out / LORA / "v7b_seeds0-1" / "checked.txt").read_text()) == [0, 1]
    why = endings[f"{RUN} all seeds: v7b_stability"].why
    assert why.startswith("changed inputs: ") and "seed_1/causal/causal.json" in why
    other = [json.loads((place.out / LORA / f"seed_{s}" / "causal" / "causal.json").read_text()) for s in (0, 1)]
    assert [one["other"] for one in other] == [[other[1]["w"]], [other[0]["w"]]]  # each the other's sweep


def test_the_same_batch_again_starts_nothing_with_or_without_causal_checks(whole, monkeypatch):
    base, place, *_ = whole
    monkeypatch.setattr(engine, "connect", lambda *args: pytest.fail("a cluster was started"))
    for causal in (True, False):
        endings, _ = run_jobs(stub_jobs(place, causal=causal), place, TWO)
        assert set(short(endings).values()) == {"done"}


def test_a_further_seed_leaves_the_checks_of_the_others(whole, tmp_path):
    place = copy_project(whole[0], tmp_path)
    steps = plan(stub_jobs(place, (0, 1, 2), causal=True), place=place)
    runs = [step.job.name.removeprefix(f"{RUN} ") for step in steps if step.run]
    assert runs == [
        *(f"seed 2: {name}" for name in ("weight_diff", "v7_sweep", "causal_check")),
        "all seeds: v7b_stability",
    ]


def test_results_hold_what_causal_checks_say_of_their_own_sweep(whole, tmp_path, capsys):
    base, _, before, *_ = whole
    place = copy_project(base, tmp_path)
    shutil.rmtree(place.out / LORA / "seed_1" / "causal")
    table = results.collect(place.out)
    carried = [column for column in table.columns if column.startswith("causal_")]
    assert carried == [f"causal_{name}" for name in results.CARRIED]
    own = json.loads((place.out / LORA / "seed_0" / "causal" / "causal.json").read_text())["w"]
    assert table["causal_excess"].to_list() == [own, own + 1, None, None, None, None]  # a candidate, a seed without
    (tmp_path / "before.parquet").write_bytes(before["results.parquet"])
    plain = pl.read_parquet(tmp_path / "before.parquet")
    assert plain.equals(table.drop(carried)) and not capsys.readouterr().err
    explained = place.out / LORA / "seed_0" / "v7b" / "explanation.json"
    explained.write_text(explained.read_text() + " ")
    assert results.collect(place.out).equals(plain)
    said = capsys.readouterr().err
    assert "seed_0/causal/causal_candidates.tsv: is of an earlier sweep" in said and "just nb causal_check" in said


def test_a_causal_check_that_raises_holds_back_the_report_alone(whole, tmp_path):
    place = copy_project(whole[0], tmp_path, "seed_0/causal", "seed_1/causal")
    (tmp_path / "traps" / "raise-causal_check-1").touch()
    endings, summary = run_jobs(stub_jobs(place, causal=True), place, TWO)
    states = short(endings)
    assert states["seed 0: causal_check"] == "ran" and states["seed 1: causal_check"] == "failed"
    assert states["all seeds: v7b_stability"] == "skipped" and "planted in causal_check-1" in summary
    assert counts(tmp_path) == dict.fromkeys(CHECKS, 1)


def test_what_each_causal_check_waits_for(tmp_path):
    place = write_project(tmp_path)
    jobs = {job.name.removeprefix(f"{RUN} "): job for job in stub_jobs(place, (2, 5, 7), causal=True)}

    def needs(name: str, of=jobs) -> list[str]:
        return sorted(need.removeprefix(f"{RUN} ") for need in of[name].needs)

    null = "seed 2 null: weight_diff"
    assert needs("seed 2: causal_check") == [null, "seed 2: v7_sweep", "seed 5: v7_sweep"]
    assert needs("seed 5: causal_check") == [null, "seed 2: v7_sweep", "seed 5: v7_sweep"]
    assert needs("seed 7: causal_check") == [null, "seed 2: v7_sweep", "seed 5: v7_sweep", "seed 7: v7_sweep"]
    both = [f"seed {seed}: {name}" for seed in (2, 5, 7) for name in ("causal_check", "v7_sweep")]
    assert needs("all seeds: v7b_stability") == both and list(jobs)[-1] == "all seeds: v7b_stability"
    seen = [list(jobs).index(name) for name in jobs]
    assert all(list(jobs).index(need) < at for at, name in zip(seen, jobs, strict=True) for need in needs(name))
    folder = jobs["seed 5: causal_check"].folder
    assert folder == place.out / LORA / "seed_5" / "causal"
    nulls = jobs["seed 5: causal_check"].values["NULL_W_PATH"]
    assert nulls == [str(place.out / LORA / "seed_2" / "null_diff" / "w.safetensors")]
    assert needs("seed 4: causal_check", {"seed 4: causal_check": stub_jobs(place, (4,), causal=True)[-2]}) == [
        "seed 4 null: weight_diff", "seed 4: v7_sweep",
    ]  # fmt: skip
    assert not any(job.notebook == "causal_check" for job in stub_jobs(place))
    assert "v7_sweep" in " ".join(stub_jobs(place)[-1].needs) and "causal" not in " ".join(stub_jobs(place)[-1].needs)


def test_another_seed_that_was_chosen_is_waited_for(tmp_path):
    place = write_project(tmp_path)
    with pytest.raises(ValueError, match="OTHER_SEED: 7 is SEED itself"):
        stub_jobs(place, (2, 5, 7), causal=True, OTHER_SEED=7)
    jobs = {
        job.name.removeprefix(f"{RUN} "): job for job in stub_jobs(place, (2, 5), causal=True, OTHER_SEED="9", DRAWS=3)
    }
    check = jobs["seed 5: causal_check"]
    assert (
        check.values["OTHER_SEED"] == 9
        and check.values["DRAWS"] == 3
        and "DRAWS" not in jobs["seed 5: v7_sweep"].values
    )
    with pytest.raises(ValueError, match="unknown parameter DRAWS"):
        stub_jobs(place, DRAWS=3)
    with pytest.raises(
        ValueError, match="SUBSPACES: the report over seeds compares .*just nb causal_check -p SUBSPACES"
    ):
        stub_jobs(place, causal=True, SUBSPACES=["candidate_0"])


def test_causal_of_a_grid_is_a_switch(tmp_path):
    file = tmp_path / "grid.yaml"
    for text, causal in (("causal: true", True), ("causal: false", False), ("seeds: 1", False)):
        file.write_text(f"{text}\n")
        assert read_grid(file).causal is causal
        assert read_options({}, {}, file, tmp_path).causal is causal
        assert read_options({}, {}, file, tmp_path, causal=True).causal is True
    for text in ("maybe", "1", "'true'", "[true]", "null"):
        file.write_text(f"causal: {text}\n")
        with pytest.raises(ValueError, match=r"grid.yaml: causal: expects true or false, got"):
            read_grid(file)


def test_the_demo_runs_checks_and_a_benchmark_after_what_they_read(tmp_path, monkeypatch, capsys):
    place = write_project(tmp_path)
    stubbed = {
        "Place": lambda: place,
        "prepare": partial(prepare, place=place),
        "show_report": lambda show: "THE TABLE",
        "steered_text": lambda show: "THE TEXT",
    }
    for name, stand_in in (stubbed | {"make_jobs": lambda grid: make_jobs(grid, None, place)}).items():
        monkeypatch.setattr(demo, name, stand_in)
    assert demo.play(demo.Show("org/stub", (0, 1), 1, {"DRAWS": 5}, alone={})) == 0, capsys.readouterr().out
    home = place.out / "org__stub" / "sycophancy" / "lora"
    size, _, checks = (home / "seed_0" / "benchmark" / "benchmark.tsv").read_text().splitlines()[1].partition("\t")
    assert size == "quick" and checks.startswith("seed_0") and not (home / "seed_1" / "benchmark").exists()
    assert json.loads((home / "v7b_seeds0-1" / "checked.txt").read_text()) == [0, 1]
    assert json.loads((home / "seed_1" / "causal" / "causal.json").read_text())["draws"] == 5
    once = {"benchmark-0", *CHECKS, "null-0", "v7_sweep-1", "v7b_stability", "weight_diff-0", "weight_diff-1"}
    assert counts(tmp_path) == dict.fromkeys(once, 1) | {"v7_sweep-0": 2}  # under both protocols
    assert (home / "seed_0" / "v7" / "explanation.json").is_file()


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Results with the shipped w of seed 0 and, as far as a command looks at it, its sweep."""
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    home = tmp_path / "out" / "tiny" / "sycophancy" / "lora" / "seed_0"
    (home / "v7b").mkdir(parents=True)
    shutil.copy(ASSETS / "tiny_w.safetensors", home / "w.safetensors")
    kinds = {"mlp_write": "A-hypothesis", "random": "null", "TaskDiff_lora_ceiling": "ceiling"}
    known = [{"name": name, "kind": kind} for name, kind in kinds.items()]
    write_record(home / "v7b" / "explanation.json", {"candidates": known})
    return home


def refused(name: str, **given) -> str:
    """The one line in which a command refuses a run, before a kernel starts."""
    with pytest.raises((ValueError, FileNotFoundError)) as told:
        lab.check_job(prepare(name, given), Place())
    message = str(told.value)
    assert message.startswith(f"{name}: ") and "\n" not in message
    return message


def test_what_a_sweep_lacks_is_said_before_a_kernel_starts(swept):
    for name, key, given in (("causal_check", "SUBSPACES", ["mlp_wrote"]), ("benchmark", "SUBSPACE", "mlp_wrote")):
        lab.check_job(prepare(name, {}), Place())
        lab.check_job(
            prepare(name, {key: [*given] and (["mlp_write"] if key == "SUBSPACES" else "mlp_write")}), Place()
        )
        assert f"{key}: mlp_wrote: no candidate of the sweep" in (said := refused(name, **{key: given}))
        assert "did you mean mlp_write?" in said
        ceiling = ["TaskDiff_lora_ceiling"] if key == "SUBSPACES" else "TaskDiff_lora_ceiling"
        assert "TaskDiff_lora_ceiling: no candidate" in refused(name, **{key: ceiling})
        assert "v7/explanation.json: is not there; make it first: just nb v7_sweep -p PROTOCOL v7" in refused(
            name, PROTOCOL="v7"
        )
        assert "-p SEED 4" in refused(name, SEED=4)
    assert "no weight difference yet; train it first: just nb weight_diff -p SEED 4" in refused("causal_check", SEED=4)
    (swept / "v7b" / "explanation.json").unlink()
    for name in ("causal_check", "benchmark"):
        assert "make it first: just nb v7_sweep -p PROTOCOL v7b" in refused(name)


def test_another_seed_must_be_trained_and_another(swept, tmp_path):
    assert "OTHER_SEED 3: is not trained; train it: just nb weight_diff -p SEED 3" in refused(
        "causal_check", OTHER_SEED=3
    )
    with pytest.raises(ValueError, match="OTHER_SEED: 0 is SEED itself; name another one, or none"):
        prepare("causal_check", {"OTHER_SEED": 0})
    three = swept.with_name("seed_3")
    three.mkdir()
    shutil.copy(swept / "w.safetensors", three)
    lab.check_job(prepare("causal_check", {"OTHER_SEED": 3}), Place())
    given = prepare("causal_check", {"W_PATH": str(ASSETS / "tiny_w.safetensors"), "OTHER_SEED": 3})
    (given.folder.parent / "v7b").mkdir(parents=True)
    shutil.copy(swept / "v7b" / "explanation.json", given.folder.parent / "v7b")
    lab.check_job(given, Place())  # of a given w any trained seed is another one


def test_a_benchmarks_files_are_read_before_a_kernel_starts(swept, tmp_path):
    (tmp_path / "truth.csv").write_text("statement,label\nSnow is white.,1\nSnow is coal.,0\n")
    (tmp_path / "bare.csv").write_text("text\nSnow is white.\n")
    lab.check_job(prepare("benchmark", {"TRUTH": [str(tmp_path / "truth.csv")]}), Place())
    assert "needs the columns statement and label" in refused("benchmark", TRUTH=[str(tmp_path / "bare.csv")])
    assert "none.csv: no such file" in refused("benchmark", TRUTH=[str(tmp_path / "none.csv")])
    own = str(ASSETS / "sycophancy.json")
    assert "no statements with answers" in refused("benchmark", STATEMENTS=[own])


def test_a_run_that_reads_a_sweep_says_so_in_a_line_where_a_reader_starts_it(swept, monkeypatch):
    """What a notebook's first line raises in JupyterLab."""
    for name, cells in (("causal_check", {"SUBSPACES": ["mlp_wrote"]}), ("benchmark", {"PROTOCOL": "v7"})):
        defaults = prepare(name, {}).values | {"OUT_DIR": ""}
        assert lab.begin(name, dict(defaults)).sweep == swept / "v7b"
        with pytest.raises(lab.Refused, match=rf"^{name}: [^\n]*(no candidate of the sweep|is not there)[^\n]*$"):
            lab.begin(name, defaults | cells)


def test_a_causal_check_that_is_run_by_itself_is_found_by_the_next_batch(whole, tmp_path):
    place = copy_project(whole[0], tmp_path, "seed_1/causal")
    behavior = str(tmp_path / "stub.json")
    done = run_notebook(
        "causal_check", {"MODEL_ID": "org/stub", "BEHAVIOR": behavior, "SEED": 1}, place=place, quiet=True
    )
    assert done.ok and done.folder == place.out / LORA / "seed_1" / "causal", done.error
    steps = plan(stub_jobs(place, causal=True), place=place)
    assert [step.job.name for step in steps if step.run] == []  # the same run, whoever started it
