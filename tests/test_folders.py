"""Nothing finished is ever lost: a run's folder belongs to its identity, a failed try stands beside it, what is done by hand
goes elsewhere."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from stubs import stub_jobs, write_project
from test_batch import DRIVER, HOME, write_notebook

from ws.cache import files
from ws.runs import failed, folders, here, html, index, notebooks, once, parameters
from ws.runs.grid import plan, plan_text
from ws.runs.notebooks import Place, notebook_of

run = partial(once.run_notebook, quiet=True)
BODY = """
from pathlib import Path
(Path(OUT_DIR) / "result.txt").write_text(f"of {SEED} at {RATE}")
if RATE < 0:
    raise ValueError("RATE must not be negative")
"""


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path / "nbs", tmp_path / "out")
    write_notebook(place.nbs, "probe", BODY)
    return place


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder but those of failed tries, byte for byte."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if "failed/" not in name}


def test_a_typo_after_a_finished_run_leaves_it_and_is_told(place, monkeypatch):
    done = run("probe", {"SEED": 3}, place=place)
    before = content(place.out)
    for rate in ("-1", "-2", "-3", "-4"):
        tried = run("probe", {"SEED": 3, "RATE": rate}, place=place)
        assert tried.state == "failed" and tried.kept.is_dir() and content(place.out) == before
    assert len(list(done.folder.glob("failed/*"))) == failed.KEPT  # the last few
    assert run("probe", {"SEED": 3}, place=place).state == "done"
    (row,) = index.runs(place.out, place)
    assert row["state"] == "done" and "RATE 0.5 -> -4" in row["note"] and row["note"].endswith("must not be negative")
    text = index.report(place.out).read_text()
    assert "RATE must not be negative" in text and 'class="state-done"' in text
    told = index.status(done.folder, {"RATE": "0.75"}, place.out, place)
    assert "changed parameters: RATE 0.5 -> 0.75" in told and told.count("failed 20") == failed.KEPT
    assert len(index.clear_failed(place.out)) == failed.KEPT and list(done.folder.glob("failed/*"))  # says, does not do
    index.clear_failed(place.out, really=True)
    assert not (done.folder / "failed").exists() and content(place.out / "tiny") == {
        name.removeprefix("tiny/"): data for name, data in before.items()
    }


def test_a_finished_run_is_replaced_by_the_next_finished_one_in_one_step(place, monkeypatch):
    done = run("probe", {"SEED": 3}, place=place)
    seen = []
    publish = files.publish_dir

    def watched(work: Path, folder: Path) -> Path:
        seen.append((folder / "result.txt").read_text())
        result = publish(work, folder)
        seen.append((folder / "result.txt").read_text())
        return result

    monkeypatch.setattr(once, "publish_dir", watched)
    again = run("probe", {"SEED": 3, "RATE": 0.75}, place=place)
    assert again.why == "changed parameters: RATE 0.5 -> 0.75" and again.folder == done.folder
    assert seen == ["of 3 at 0.5", "of 3 at 0.75"]
    run("probe", {"SEED": 3, "RATE": -1}, place=place)
    assert run("probe", {"SEED": 3, "RATE": 1}, place=place).ok and not (done.folder / "failed").exists()


@pytest.mark.parametrize("can", [True, False])
def test_a_folder_is_exchanged_and_where_the_system_cannot_it_is_set_aside(tmp_path, monkeypatch, can):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    if not can:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    with files.atomic_dir(tmp_path / "a") as work:
        (work / "new").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "new"]


def test_a_folder_that_was_set_aside_when_its_process_died_gets_its_name_back(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    code = "import os, sys; from pathlib import Path; from ws.cache import files; files.exchange = lambda a, b: False\n"
    code += "rename = os.rename\ndef dying(a, b):\n    rename(a, b)\n    os._exit(9)\nfiles.os.rename = dying\n"
    code += "with files.atomic_dir(Path(sys.argv[1])) as work: (work / 'new').write_text('new')"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], cwd=HOME, check=False).returncode == 9
    assert not (tmp_path / "a").exists()
    files.sweep(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "old"]


def test_a_killed_run_leaves_what_was_finished(place, tmp_path):
    done = run("probe", {"SEED": 3}, place=place)
    write_notebook(
        place.nbs, "probe", BODY, "import os, signal; os.kill(os.getppid(), signal.SIGKILL)\nwhile True: pass"
    )
    before = content(done.folder)
    driver = [sys.executable, "-c", DRIVER.format(base=str(tmp_path))]
    ended = subprocess.run(driver, cwd=HOME, capture_output=True, start_new_session=True, check=False)
    assert ended.returncode == -signal.SIGKILL and content(done.folder) == before
    write_notebook(place.nbs, "probe", BODY)
    assert run("probe", {"SEED": 3}, place=place).state == "done"
    index.report(place.out)
    assert not [p for p in place.out.rglob(".*") if p.name.startswith((".tmp", ".was", ".lock"))]


def test_another_w_is_another_run_and_the_title_names_it(place, tmp_path):
    found = {}
    for name, text in (("mine.pt", "one"), ("other.pt", "two"), ("mine.pt", "three")):
        (tmp_path / name).write_text(text)
        found[text] = run("probe", {"W_PATH": name}, cwd=tmp_path, place=place)
    homes = [done.folder.parent.name for done in found.values()]
    assert len(set(homes)) == 3 and [h[:7] for h in homes] == ["w-mine-", "w-other", "w-mine-"]
    record = json.loads((found["one"].folder / ".made.probe.ipynb.json").read_text())["about"]
    assert record["title"] == f"tiny, sycophancy, w from mine.pt ({homes[0][-8:]})" and "seed" not in record["title"]
    assert {row["seed"] for row in index.runs(place.out, place)} == {""}


def test_folders_tell_runs_apart_and_a_usual_run_has_the_plain_one(tmp_path):
    def folder(name: str, **params) -> str:
        return notebook_of(name).own_folder(params, tmp_path).relative_to(tmp_path).as_posix()

    lora = "tiny/sycophancy/lora"
    assert folder("v7_sweep", PCS=8, K_BROAD=64, SOURCES=[], FOLD_GAIN="") == f"{lora}/seed_0/v7"
    assert folder("v7_sweep", PCS=16, FOLD_GAIN="true") == f"{lora}/seed_0/v7_pcs16_fold_gaintrue"
    assert folder("v7b_stability", SEEDS=[0, 1, 2]) == f"{lora}/v7b"
    assert folder("v7b_stability", SEEDS=[5, 6]) == f"{lora}/v7b_seeds5-6"
    assert folder("v7b_stability", SEEDS=[5, 7], PROTOCOL="v7") == f"{lora}/v7b_seeds5.7_protocolv7"
    check = folder("causal_check", SEED=1, PROTOCOL="v7b", SUBSPACES=[], ALPHA=1.0, DRAWS=20, OTHER_SEED=2)
    assert check == f"{lora}/seed_1/causal" and folder("causal_check") == f"{lora}/seed_0/causal"
    assert folder("causal_check", PROTOCOL="v7", ALPHA=2.0) == f"{lora}/seed_0/causal_protocolv7_alpha2.0"
    assert folder("causal_check", SUBSPACES=["write", "gate"]) == f"{lora}/seed_0/causal_subspaceswrite.gate"
    assert folder("benchmark", KL_TARGET=[0.1], SIZE="quick") == f"{lora}/seed_0/benchmark"
    assert folder("benchmark", ALONG="continuation") == f"{lora}/seed_0/benchmark_alongcontinuation"
    assert folder("weight_diff", SEED=1, LR=None, TOPICS=None) == f"{lora}/seed_1/weight_diff"
    assert folder("weight_diff", LR=0.5, LORA_LAYERS=[2, 3]) == f"{lora}-LORA_LAYERS2-3-LR0.5/seed_0/weight_diff"
    drawn = {"SAMPLES": 5, "RESAMPLE_PAIRS": True}
    assert folder("weight_diff", **drawn) == folder("weight_diff", SAMPLES=5) == f"{lora}-SAMPLES5/seed_0/weight_diff"
    assert (
        folder("weight_diff", RESAMPLE_PAIRS=True) == f"{lora}-RESAMPLE_PAIRStrue/seed_0/weight_diff"
    )  # tiny's own: 4
    shared = folder("weight_diff", SAMPLES=5, RESAMPLE_PAIRS=False)
    assert shared == f"{lora}-SAMPLES5-RESAMPLE_PAIRSfalse/seed_0/weight_diff"
    assert folder("weight_diff", RESAMPLE_PAIRS=False) == folder("weight_diff") == f"{lora}/seed_0/weight_diff"
    assert folder("delta_svd", MODE="documents") == "tiny/delta_svd_modedocuments"
    assert folder("delta_svd", DTYPE="bfloat16", REVISION="v1-2") == "tiny.v1-2.bfloat16/delta_svd"
    assert folder("theta_fit", DTYPE="float32", THETA_DIM=64, SEED=42) == "tiny/theta_fit"
    (tmp_path / "texts.txt").write_text("x")
    assert folder("delta_svd", CALIBRATION=str(tmp_path / "texts.txt")).startswith("tiny/delta_svd_calibrationtexts-")
    many = folder("weight_diff", **{key: 7 for key in folders.RECIPE}).split("/")[2]
    assert len(many) <= folders.LONGEST + len("lora") and many != folder("weight_diff", LR=7).split("/")[2]
    file = tmp_path / "mine.json"
    file.write_text('{"name": "sycophancy"}')
    assert folder("weight_diff", BEHAVIOR=str(file)).split("/")[1].startswith("sycophancy-")  # not the shipped one's


def test_what_goes_without_saying_is_what_the_notebooks_say():
    for name, entry in notebooks.TABLE.items():
        known = parameters.defaults(parameters.read_notebook(Place().notebook(name)), name)
        said = {key: usual for key, usual in entry.usual.items() if folders.differs(known, key, usual)}
        assert not said and set(entry.usual) <= set(known) and known["DTYPE"] == entry.dtype


def test_a_dry_run_names_the_parameter_and_a_recipe_has_its_own_runs(tmp_path):
    place = write_project(tmp_path)
    jobs = stub_jobs(place)
    text = plan_text(plan(stub_jobs(place, SCALE=2), place=place))
    assert text.count("new") == 6 and jobs[-1].folder.name == "v7b_seeds0-1"


def test_a_plan_names_an_edit_that_was_not_synced(tmp_path):
    import jupytext

    from ws.lab import check_steps

    place = write_project(tmp_path)
    script = place.notebook("v7_sweep").with_suffix(".py")
    jupytext.write(jupytext.read(place.notebook("v7_sweep")), script)
    steps = plan(stub_jobs(place), place=place)
    place.notebook("v7_sweep").write_text(place.notebook("v7_sweep").read_text().replace("rows = ", "rows  = "))
    with pytest.raises(ValueError, match="v7_sweep.py and v7_sweep.ipynb differ: run `just sync`"):
        check_steps(steps, place)


def test_files_of_others_stay_when_a_run_is_replaced(place, tmp_path):
    out = tmp_path / "mine"
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "notes.md").write_text("mine")
    for rate in (0.5, 0.75):
        assert run("probe", {"OUT_DIR": str(out), "RATE": rate}, place=place).ok
        assert (out / "sub" / "notes.md").read_text() == "mine" and (
            out / "result.txt"
        ).read_text() == f"of 0 at {rate}"
    with pytest.raises(ValueError, match="holds the finished run of tiny, sycophancy, lora, seed 0, not of .* seed 1"):
        run("probe", {"OUT_DIR": str(out), "SEED": 1}, place=place)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file is a file, no folder; choose another folder with -p OUT_DIR"):
        run("probe", {"OUT_DIR": str(tmp_path / "file" / "x")}, place=place)

    with monkeypatch.context() as patch:
        patch.setattr(once.os, "access", lambda path, mode: path != tmp_path)
        with pytest.raises(ValueError, match="the folder of logs, cannot be written; change that, or WS_OUT"):
            run("probe", {}, place=place)

    def refuse(dir: Path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(once.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\); choose another"):
        run("probe", {}, place=place)
    assert not place.logs.exists()


def test_a_notebook_is_not_lost_to_its_rendering(place, monkeypatch):
    def broken(*args: object, **options: object):
        raise html.NotRendered("probe.ipynb: SelectorSyntaxError")

    with monkeypatch.context() as patch:
        patch.setattr(html, "render", broken)
        done = run("probe", {"SEED": 3}, place=place)
        assert done.ok and "SelectorSyntaxError" in done.unrendered and (done.folder / "probe.ipynb").is_file()
        index.report(place.out)
        assert index.runs(place.out, place)[0]["note"] == "its page could not be rendered"
    for damage in (lambda page: None, lambda page: page.write_text(""), lambda page: page.write_text("<html>")):
        damage(done.folder / "probe.html")
        index.report(place.out)
        assert (done.folder / "probe.html").read_text().rstrip().endswith("</html>") and not index.runs(
            place.out, place
        )[0]["note"]
    assert run("probe", {"SEED": 3}, place=place).state == "done"


# --- by hand ----------------------------------------------------------------------------------------------------------


def cells(name: str, **changed: object) -> dict[str, object]:
    """What the parameters cell of a shipped notebook sets."""
    return parameters.defaults(parameters.read_notebook(Place().notebook(name)), name) | changed


def test_by_hand_reads_what_is_finished_and_writes_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    seed = tmp_path / "out/tiny/sycophancy/lora/seed_0"
    with pytest.raises(here.Refused, match=r"w.safetensors: is not there; make it first: just nb weight_diff"):
        _ = here.begin("v7_sweep", cells("v7_sweep")).w
    files.write_text(seed / "w.safetensors", "finished")
    hand = here.begin("v7_sweep", cells("v7_sweep"))
    own = tmp_path / "out/by_hand/tiny/sycophancy/lora/seed_0"
    assert hand.by_hand and hand.w == seed / "w.safetensors" and hand.folder == own / "v7" and hand.nulls == []
    trained = here.begin("weight_diff", cells("weight_diff"))
    assert (trained.folder, trained.home, trained.finished_home) == (own / "weight_diff", own, seed)
    files.write_text(own.with_name("seed_7") / "w.safetensors", "by hand")
    assert here.begin("v7_sweep", cells("v7_sweep", SEED=7)).w == own.with_name("seed_7") / "w.safetensors"
    chosen = here.begin("weight_diff", cells("weight_diff", OUT_DIR=str(tmp_path / "mine")))
    assert chosen.folder == chosen.home == tmp_path / "mine"
    with pytest.raises(
        here.Refused, match=r"seed_0/v7b/explanation.json: is not there; make it first: just nb v7_sweep"
    ):
        _ = here.begin("v7b_stability", cells("v7b_stability")).sweeps


def test_a_run_works_in_a_scratch_folder_and_trains_into_its_seeds(tmp_path, monkeypatch):
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    seed = tmp_path / "out/tiny/sycophancy/lora/seed_0"
    with files.scratch(seed / "weight_diff") as work:
        run = here.begin("weight_diff", cells("weight_diff", OUT_DIR=str(work)))
        assert not run.by_hand and run.folder == work and run.home == seed
    with files.scratch(tmp_path / "chosen") as work:
        run = here.begin("weight_diff", cells("weight_diff", OUT_DIR=str(work)))
        assert not run.by_hand and run.home == work


def test_a_refusal_is_one_line_in_a_notebook(place):
    write_notebook(place.nbs, "probe", "from ws.runs.here import Refused\nraise Refused('SEED -1: no seed')")
    failed = run("probe", {}, place=place)
    assert failed.error.splitlines()[-1] == "Refused: SEED -1: no seed" and len(failed.error.splitlines()) <= 3
    assert os.listdir(failed.folder) == ["failed"]


def test_a_sweep_is_compared_with_its_adapters_null_diffs_whoever_asks(tmp_path, monkeypatch):
    """What a batch says by a path, a single run finds: the same parameters, the same run."""
    monkeypatch.setenv("WS_OUT", str(tmp_path))
    lora = tmp_path / "tiny/sycophancy/lora"
    assert once.prepare("v7_sweep", {"SEED": 1}).values["NULL_W_PATH"] == []
    assert here.begin("v7_sweep", cells("v7_sweep", SEED=1)).nulls == []
    found: list[Path] = []
    for seed in (10, 2, 0):
        found.insert(0, lora / f"seed_{seed}/null_diff/w.safetensors")
        files.write_text(found[0], f"null {seed}")
        for own in (1, 2):
            assert once.prepare("v7_sweep", {"SEED": own}).values["NULL_W_PATH"] == list(map(str, found))
            assert here.begin("v7_sweep", cells("v7_sweep", SEED=own)).nulls == found
    files.write_text(lora / "seed_x/null_diff/w.safetensors", "of nobody")
    one, two = map(str, found[:2])
    for given, paths in ((one, [one]), (f"{one},{two}", [one, two]), ([two], [two]), (f'["{one}"]', [one])):
        assert once.prepare("v7_sweep", {"NULL_W_PATH": given}, cwd=tmp_path).values["NULL_W_PATH"] == paths
    typed = once.prepare("v7_sweep", {"NULL_W_PATH": "seed_2/null_diff/w.safetensors"}, cwd=lora)
    assert typed.values["NULL_W_PATH"] == [two]
    assert typed.folder == once.prepare("v7_sweep", {}).folder
    assert here.begin("v7_sweep", cells("v7_sweep", NULL_W_PATH=[two])).nulls == found[1:2]
    assert here.begin("v7_sweep", cells("v7_sweep", NULL_W_PATH=two)).nulls == found[1:2]


def test_another_notebook_does_not_go_into_a_finished_runs_folder(place):
    done = run("probe", {"SEED": 3}, place=place)
    write_notebook(place.nbs, "second", "open(OUT_DIR + '/result.txt', 'w').write('b')")
    with pytest.raises(
        ValueError, match="holds the finished run of tiny, sycophancy, lora, seed 3 .probe.; choose another"
    ):
        run("second", {"OUT_DIR": str(done.folder)}, place=place)


def test_a_file_of_ones_own_is_kept_beside_a_runs_of_the_same_name(place, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "result.txt").write_text("mine")
    assert run("probe", {"OUT_DIR": str(tmp_path / "mine")}, place=place).ok
    assert (tmp_path / "mine" / "result.txt.before").read_text() == "mine"
    assert (tmp_path / "mine" / "result.txt").read_text() == "of 0 at 0.5"


def test_a_behaviour_may_be_called_failed(place, tmp_path):
    (tmp_path / "b.json").write_text('{"name": "failed"}')
    write_notebook(place.nbs, "probe", BODY, parameters_cell='SEED = 0\nRATE = 0.5\nBEHAVIOR = ""\nOUT_DIR = ""')
    assert run("probe", {"BEHAVIOR": str(tmp_path / "b.json")}, place=place).ok
    assert [row["state"] for row in index.runs(place.out, place)] == ["done"]
    moved = tmp_path / "b.json.moved"
    (tmp_path / "b.json").rename(moved)
    (tmp_path / "c.json").write_text('{"name": "failed", "topics": []}')
    with pytest.raises(
        ValueError, match=r"holds the finished run of .*b.json; give the behaviour in .*c.json another name"
    ):
        run("probe", {"BEHAVIOR": str(tmp_path / "c.json")}, place=place)


def test_what_is_handed_over_is_what_is_there_now(tmp_path):
    for text in ("one", "two"):
        files.write_text(tmp_path / "cache" / "a" / "theta", text)
        files.hand_over(tmp_path / "cache", tmp_path / "run")
        assert (tmp_path / "run" / "a" / "theta").read_text() == text


def test_a_batch_refuses_a_width_that_its_report_would_not_read(tmp_path):
    place = write_project(tmp_path)
    cell = 'MODEL_ID = "tiny"\nBEHAVIOR = ""\nADAPTER = "lora"\nSEED = 0\nNULL_W_PATH = []\nPROTOCOL = "v7"\nPCS = 8\n'
    cell += 'OUT_DIR = ""'
    write_notebook(place.nbs, "v7_sweep", "1", parameters_cell=cell)
    assert stub_jobs(place, PCS=8)
    with pytest.raises(ValueError, match="PCS: the report over seeds compares sweeps of the usual width"):
        stub_jobs(place, PCS=16)
