"""ws.runs.grid, ws.runs.results: which runs a grid has, what each needs, why it would run; the table of all runs."""

import os
from dataclasses import replace

import polars as pl
import pytest
from stubs import LORA, RUN, stub_jobs, write_project

from ws.cache import keys, made
from ws.cache.places import ASSETS
from ws.runs import failed, grid, identity, parameters, results
from ws.runs.grid import Grid, located, make_jobs, parse_seeds, plan, plan_text, read_grid, read_options
from ws.runs.once import prepare


@pytest.fixture
def place(tmp_path):
    return write_project(tmp_path)


def finish(place, jobs) -> None:
    """Make these jobs look done: files and records as a run leaves them."""
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        if job.notebook == "weight_diff":
            (job.folder.parent / "w.safetensors").write_text(f"w of {job.name}")
        if job.notebook == "v7_sweep":
            (job.folder / "v7_per_layer.csv").write_text(f"of {job.name}")
        (job.folder / "result.txt").write_text(job.name)
        target = job.folder / f"{job.notebook}.ipynb"
        target.write_text("{}")
        content = parameters.read_notebook(place.nbs / target.name)
        key = identity.run_key(job.notebook, content, job.values, place.out)
        about = {
            "outputs": identity.outputs(job.folder),
            "products": identity.products(job.notebook, job.folder, job.values, place.out),
            "parameters": job.values,
            "inputs": identity.input_keys(job.notebook, job.values, place.out),
        }
        made.mark_made(target, key, about)


def states(place, jobs, **options) -> dict[str, str]:
    """What would happen to each job, in short."""
    steps = plan(jobs, place=place, **options)
    return {step.job.name.removeprefix(f"{RUN} "): step.why.partition(": ")[0] for step in steps if step.run}


def test_a_grid_has_every_run_once_and_each_after_what_it_needs(place):
    jobs = make_jobs(Grid(adapters=("lora", "dora"), seeds=(4, 2, 3), set={"SCALE": "5"}), None, place)
    assert len(jobs) == 2 * (3 + 5 + 3 + 1) and len({j.name for j in jobs}) == len({j.folder for j in jobs}) == 24
    place_of = {job.name: i for i, job in enumerate(jobs)}
    assert all(place_of[need] < place_of[job.name] for job in jobs for need in job.needs)
    by_name = {job.name: job for job in jobs}
    sweep = by_name["tiny sycophancy dora seed 3: v7_sweep"]
    assert sweep.needs == (
        "tiny sycophancy dora seed 3: weight_diff",
        *(f"tiny sycophancy dora seed {seed} null: weight_diff" for seed in (2, 3, 4, 5, 6)),
    )
    adapter = place.out / "tiny" / "sycophancy" / "dora"
    nulls = [str(adapter / f"seed_{seed}" / "null_diff" / "w.safetensors") for seed in (2, 3, 4, 5, 6)]
    assert sweep.values["NULL_W_PATH"] == nulls
    assert [job.name for job in jobs if job.notebook == "v7_sweep" and job.values["NULL_W_PATH"] == nulls] == [
        f"tiny sycophancy dora seed {seed}: v7_sweep" for seed in (2, 3, 4)
    ]
    assert sweep.values["PROTOCOL"] == "v7b" and sweep.folder == adapter / "seed_3" / "v7b"
    assert "SCALE" not in sweep.values and by_name[sweep.needs[0]].values["SCALE"] == 5
    null = by_name[sweep.needs[1]]
    assert null.values["NULL_DIFF"] is True and null.values["SEED"] == 2 and null.values["SCALE"] == 5
    assert null.needs == () and null.folder == adapter / "seed_2" / "null_diff" / "weight_diff"
    last = by_name["tiny sycophancy dora all seeds: v7b_stability"]
    assert last.values["SEEDS"] == [2, 3, 4] and len(last.needs) == 3 and last.folder == adapter / "v7b_seeds2-4"


def test_null_diffs_that_are_there_count_and_more_take_the_lowest_seeds(place):
    def seeds(number: int, of: tuple[int, ...] = (1, 2)) -> list[int]:
        jobs = stub_jobs(place, of, nulls=number)
        nulls = [job for job in jobs if job.values.get("NULL_DIFF")]
        paths = [str(job.folder.parent / "w.safetensors") for job in nulls]
        for job in (job for job in jobs if job.notebook == "v7_sweep"):
            assert job.needs[1:] == tuple(null.name for null in nulls) and job.values["NULL_W_PATH"] == paths
        return [job.values["SEED"] for job in nulls]

    assert seeds(5) == [1, 2, 3, 4, 5] and seeds(1) == [1] and seeds(0) == []
    assert seeds(3, (2**32 - 2, 2**32 - 1))[-1] < 2**32
    finish(place, [job for job in stub_jobs(place, (3, 8), nulls=1) if job.values.get("NULL_DIFF")])
    assert seeds(1) == [3] and seeds(5) == [1, 2, 3, 4, 5] and seeds(2, (7,)) == [3, 7]
    finish(place, [job for job in stub_jobs(place, (0,), nulls=4) if job.values.get("NULL_DIFF")])
    assert seeds(2) == [0, 1, 2, 3]  # all that are there, as a sweep that is run by itself finds them
    bare = [job for job in stub_jobs(place, nulls=0) if job.notebook == "v7_sweep"]
    assert all(len(job.needs) == 1 and len(job.values["NULL_W_PATH"]) == 4 for job in bare)
    assert (
        prepare(
            "v7_sweep", {"MODEL_ID": "org/stub", "BEHAVIOR": str(place.nbs.parent / "stub.json")}, place=place
        ).values["NULL_W_PATH"]
        == bare[0].values["NULL_W_PATH"]
    )


def test_another_null_diff_is_another_input_of_the_same_run(place):
    before = stub_jobs(place, nulls=0)
    finish(place, before)
    folders = [job.folder for job in before]
    for number, added in ((1, ["seed_0"]), (3, ["seed_1", "seed_2"])):
        jobs = stub_jobs(place, nulls=number)
        nulls = [job for job in jobs if job.values.get("NULL_DIFF")]
        assert [job.folder for job in jobs if job not in nulls] == folders
        waiting = states(place, jobs)
        assert {name for name, why in waiting.items() if why == "new"} == {
            f"{seed.replace('_', ' ')} null: weight_diff" for seed in added
        }
        assert waiting["seed 1: v7_sweep"] == "changed inputs"
        finish(place, nulls)
        sweeps = [step for step in plan(jobs, place=place) if step.job.notebook == "v7_sweep"]
        told = "changed inputs: " + ", ".join(["w.safetensors"] * len(added))
        assert [step.why for step in sweeps] == [told] * 2
        finish(place, jobs)
        assert states(place, jobs) == {}


def test_the_number_of_null_diffs_is_read_from_a_file_and_an_option(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("seeds: 1\nnulls: 7\n")
    assert read_grid(file).nulls == 7 and read_options({}, {}, file, tmp_path, 2).nulls == 2
    assert read_options({}, {}, file, tmp_path).nulls == 7 and read_options({}, {}, None, tmp_path).nulls == 5
    assert read_options({}, {}, file, tmp_path, 0).nulls == 0
    for text in ("-1", "many", "true", "[1, 2]", "1.5"):
        file.write_text(f"nulls: {text}\n")
        with pytest.raises(ValueError, match="nulls: a whole number from 0 to|nulls: expects a whole number"):
            read_grid(file)


def test_only_what_depends_on_a_change_runs_again(place):
    jobs = stub_jobs(place)
    assert states(place, jobs) == {
        "seed 0: weight_diff": "new",
        "seed 0 null: weight_diff": "new",
        "seed 1: weight_diff": "new",
        "seed 0: v7_sweep": "new",
        "seed 1: v7_sweep": "new",
        "all seeds: v7b_stability": "new",
    }
    finish(place, jobs)
    assert states(place, jobs) == {}
    more = states(place, stub_jobs(place, (0, 1, 2)))
    assert more == {
        "seed 2: weight_diff": "new",
        "seed 2: v7_sweep": "new",
        "all seeds: v7b_stability": "new",  # another seed set is another report
    }
    lora = place.out / LORA
    w = lora / "seed_1" / "w.safetensors"
    text, stat = w.read_text(), w.stat()
    w.write_text(text[:5])
    assert states(place, jobs) == {
        "seed 1: weight_diff": "damaged",
        "seed 1: v7_sweep": "changed inputs",
        "all seeds: v7b_stability": "changed inputs",
    }
    w.write_text(text)
    assert states(place, jobs) == {}  # the same content is the same, whenever it was written
    w.write_text("w" + text[1:].replace("seed", "deed"))
    os.utime(w, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert states(place, jobs)["seed 1: weight_diff"] == "damaged"  # as long, but other bytes
    w.write_text(text)
    (lora / "seed_0" / "null_diff" / "w.safetensors").unlink()
    assert states(place, jobs) == {
        "seed 0 null: weight_diff": "damaged",
        "seed 0: v7_sweep": "changed inputs",
        "seed 1: v7_sweep": "changed inputs",
        "all seeds: v7b_stability": "done; looked at again after v7_sweep",
    }


def test_changed_code_reruns_its_notebook_and_a_failure_is_told(place):
    jobs = stub_jobs(place)
    finish(place, jobs)
    notebook = place.nbs / "v7b_stability.ipynb"
    notebook.write_text(notebook.read_text().replace("means = []", "means = list()"))
    assert states(place, jobs) == {"all seeds: v7b_stability": "changed code"}
    (jobs[-1].folder / "v7b_stability.ipynb").unlink()
    work = jobs[-1].folder / "work"
    work.mkdir()
    failed.keep_failed("v7b_stability", {}, jobs[-1].folder, work, "Traceback\nValueError: x")
    assert states(place, jobs) == {"all seeds: v7b_stability": "failed before"}
    text = plan_text(plan(stub_jobs(place, SCALE=2), place=place))
    assert text.count("changed parameters: SCALE 1 -> 2") == 3
    text = plan_text(plan(jobs, place=place))
    assert "failed before: ValueError: x" in text and "1 would run, 0 would be looked at again, 5 are done" in text


def test_stale_adapters_are_kept_and_said_so_unless_asked(place):
    jobs = stub_jobs(place)
    finish(place, jobs)
    for side in ("pos", "neg"):
        folder = place.out / LORA / "seed_1" / "adapters" / side
        folder.mkdir(parents=True)
        made.mark_made(folder, keys.stage_key({}, code=["ws.train.lora.train_adapter"]), {})
    assert states(place, jobs, retrain=True) == {}
    made.mark_made(folder, keys.Key("p", "i", "sources of last year"), {})
    steps = plan(jobs, place=place)
    assert not any(step.run for step in steps) and [s.job.name for s in steps if s.stale] == [jobs[1].name]
    assert steps[1].why == "stale adapters kept" and "1 have stale adapters" in plan_text(steps)
    changed = {step.job.name: step.why for step in plan(stub_jobs(place, SCALE=2), place=place)}
    assert (
        changed[jobs[1].name] == "changed parameters: SCALE 1 -> 2; stale adapters"
    )  # whether they are kept, the training will say
    asked = states(place, jobs, retrain=True)
    assert asked["seed 1: weight_diff"] == "training code changed, --retrain" and len(asked) == 3
    assert [s.job.name for s in plan(jobs, True, place) if s.retrain] == [jobs[1].name]


def test_candidates_of_a_batch_are_files_that_count_by_what_they_hold(place, tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "grid.yaml").write_text("models: org/stub\nset: {CANDIDATES: ../mine.py}\n")
    typed = make_jobs(Grid(("org/stub",), set={"CANDIDATES": "mine.py"}), tmp_path, place)
    for jobs in (typed, make_jobs(read_grid(tmp_path / "sets" / "grid.yaml"), None, place)):
        values = {job.notebook: job.values.get("CANDIDATES") for job in jobs}
        mine = [str(tmp_path / "mine.py")]
        assert values == {"weight_diff": None, "v7_sweep": mine, "v7b_stability": mine}
    finish(place, typed)
    assert not any(step.run for step in plan(typed, place=place))
    (tmp_path / "mine.py").write_text("x = 2\n")
    why = [(step.job.notebook, step.why) for step in plan(typed, place=place) if step.run]
    assert why == [("v7_sweep", "changed inputs: mine.py")] * 3 + [("v7b_stability", "changed inputs: mine.py")]


def test_whether_adapters_were_retrained_is_no_part_of_a_run(place):
    job = stub_jobs(place)[0]
    content = parameters.read_notebook(place.nbs / "weight_diff.ipynb")
    keys = {identity.run_key("weight_diff", content, job.values | {"RETRAIN": x}, place.out) for x in (True, False)}
    assert len(keys) == 1


def test_options_win_over_the_file_and_paths_are_seen_from_it(place, tmp_path):
    (tmp_path / "own.json").write_text("{}")
    (tmp_path / "model").mkdir()
    file = tmp_path / "grid.yaml"
    file.write_text(
        "models: [tiny, model, org/name]\nbehaviors: own.json\nseeds: [0-2, 7]\nadapters: [pissa]\nset: {SCALE: 3, R: 8}\n"
    )
    read = read_grid(file)
    assert read == Grid(
        ("tiny", str(tmp_path / "model"), "org/name"),
        (str(tmp_path / "own.json"),),
        ("pissa",),
        (0, 1, 2, 7),
        {"SCALE": 3, "R": 8},
    )
    axes = {"models": ("tiny",), "behaviors": (), "adapters": (), "seeds": ("1", "0,1")}
    both = read_options(axes, {"SCALE": "4"}, file, tmp_path)
    assert (both.models, both.adapters, both.seeds, both.set) == (("tiny",), ("pissa",), (0, 1), {"SCALE": "4", "R": 8})
    assert read_options({}, {}, None, tmp_path) == Grid()
    from ws.train.lora import ADAPTERS

    assert grid.ADAPTERS == ADAPTERS


def test_refusals_name_the_thing(place, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("model: tiny\n")
    with pytest.raises(ValueError, match="grid.yaml: unknown key model; known: models"):
        read_grid(file)
    for axes, message in [
        ({"adapters": ("lorra",)}, "unknown adapter lorra; known: lora, rslora"),
        ({"behaviors": ("flattery",)}, "flattery is neither a shipped behaviour nor a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_options(axes, {}, None, tmp_path)
    for word in ("x", "1-", "-1", "2-x"):
        with pytest.raises(ValueError, match=f"got '{word}'"):
            parse_seeds([word])
    for extra, message in [
        ({"SCALLE": "1"}, "unknown parameter SCALLE; did you mean SCALE?"),
        ({"SEED": "1"}, "SEED: the grid decides it"),
        ({"W_PATH": "w.pt"}, "W_PATH: the grid decides it"),
        ({"SCALE": "much"}, "SCALE: expects int, got 'much'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_jobs(Grid(set=extra), None, place)
    with pytest.raises(ValueError, match="seeds: the grid has none"):
        grid.located(Grid(seeds=()), tmp_path)


def sweep(out, seed: int, scores: dict[str, float], protocol: str = "v7b", **more: float):
    folder = out / "tiny" / "sycophancy" / "lora" / f"seed_{seed}" / protocol
    folder.mkdir(parents=True)
    rows = [{"subspace": name, "kind": "write", "joint_score": score, **more} for name, score in scores.items()]
    pl.DataFrame(rows).write_csv(folder / "v7_summary.tsv", separator="\t")
    (folder / "v7_sweep.ipynb").write_text("{}")
    made.mark_made(folder / "v7_sweep.ipynb", keys.Key("p", "i", "s"), {"outputs": {}})
    return folder


def test_results_hold_every_finished_sweep_and_are_filtered(tmp_path, capsys):
    assert results.collect(tmp_path).is_empty()
    sweep(tmp_path, 10, {"a_pca": 2.0, "b": float("nan")})
    sweep(tmp_path, 2, {"a_pca": 3.0, "b": 1.0}, gap=0.5)
    sweep(tmp_path, 2, {"a_pca": 9.0}, protocol="v7")
    unfinished = sweep(tmp_path, 3, {"a_pca": 7.0})
    made.sidecar(unfinished / "v7_sweep.ipynb").unlink()
    damaged = sweep(tmp_path, 4, {"a_pca": 5222.0})
    made.mark_made(damaged / "v7_sweep.ipynb", keys.Key("p", "i", "s"), {"outputs": {"v7_summary.tsv": "another"}})
    unreadable = sweep(tmp_path, 5, {"a_pca": 5222.0})
    made.sidecar(unreadable / "v7_sweep.ipynb").write_bytes(b"\xff{")
    path = results.write_results(tmp_path)
    said = capsys.readouterr().err
    assert "seed_4/v7b/v7_summary.tsv: damaged" in said and "seed_5/v7b/.made.v7_sweep.ipynb.json: damaged" in said
    first = path.read_bytes()
    assert results.write_results(tmp_path).read_bytes() == first
    table = pl.read_parquet(path)
    assert table.columns == [*results.KEYS, "subspace", "kind", "joint_score", "gap"]
    assert table["seed"].to_list() == [2, 2, 2, 10, 10] and table["protocol"].to_list()[:2] == ["v7", "v7b"]
    assert table["gap"].to_list() == [None, 0.5, 0.5, None, None]
    best = results.select(table, {"protocol": ("v7b",), "subspace": ("a_*", "b"), "model": ()}, "joint_score", 3)
    assert best["joint_score"].to_list() == [3.0, 2.0, 1.0]
    assert results.select(table, {"seed": ("10",)}, "joint_score", 0)["joint_score"].to_list()[0] == 2.0
    assert results.select(table, {}, "subspace", 1)["subspace"].to_list() == ["a_pca"]
    text = results.results_text(best, ["seed", "joint_score"])
    assert text.splitlines()[0].split() == ["seed", "joint_score"] and "3" in text.splitlines()[2]
    with pytest.raises(ValueError, match="subspace a_pcb: no such run; did you mean a_pca"):
        results.select(table, {"subspace": ("a_pcb",)}, "", 0)
    with pytest.raises(ValueError, match="cannot sort by joint; did you mean joint_score"):
        results.select(table, {}, "joint", 0)


def test_the_other_behaviours_of_a_batch_are_a_control(tmp_path):
    """Of each sweep, through the real notebooks; what the caller names instead counts."""
    (tmp_path / "tidy.json").write_text((ASSETS / "sycophancy.json").read_text().replace('"sycophancy"', '"tidy"', 1))
    grid = located(Grid(behaviors=("sycophancy", "tidy.json"), seeds=(0,), nulls=0), tmp_path)
    sweeps = [job.values for job in make_jobs(grid, tmp_path) if job.notebook == "v7_sweep"]
    assert [values["OTHERS"] for values in sweeps] == [[str(tmp_path / "tidy.json")], ["sycophancy"]]
    assert {values["GRADIENTS"] for values in sweeps} == {"own"}
    chosen = make_jobs(replace(grid, set={"OTHERS": [], "GRADIENTS": "none"}), tmp_path)
    values = next(job.values for job in chosen if job.notebook == "v7_sweep")
    assert values["OTHERS"] == [] and values["GRADIENTS"] == "none"
