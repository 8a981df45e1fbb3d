"""Every notebook, run headless as a user runs it, on a small model; what it writes is what it promises.

Kernels are forked (tests/forked.py); tests/test_wheel.py runs one whole, from the command.
"""

import json
import re
import shutil

import polars as pl
import pytest
import torch
from forked import forked

from ws.cache.places import ASSETS, notebooks_folder, out_folder
from ws.causal.found import CausalCheck
from ws.diff import LowRank, WeightDiff, load_diff, save_diff
from ws.model.lm import load_lm
from ws.runs.once import run_notebook
from ws.show.tables import read_table

pytestmark = pytest.mark.timeout(900)  # trainings and sweeps of a module stand before its first test
CHECKED = (  # more than a first figure shows, and one that reads
    "write mlp_write attn_write global_write churn suppressed amplified TaskDiff_contrast mine global_clean_resid_pca"
    " layer_clean_resid_pca rotation_contrast attn_ov_write mlp_roundtrip_write write_not_lm_head_read attn_qkv_read"
).split()
OWN = """
import ws

@ws.candidate(family="act:persona", sees=("prompts",))
def mine(m, l):
    "Persona contrast plus clean states."
    return ws.pca(m.base.pos.resid[l] + m.base.clean.resid[l], m.k)
"""


def run(name: str, folder, files=(), **params):
    sets = [notebooks_folder() / "params" / f for f in files]
    done = run_notebook(name, {**params, "OUT_DIR": str(folder)}, files=sets, quiet=True)
    assert done.ok, done.error
    assert not noise(done.folder / f"{name}.ipynb")
    return done


def noise(notebook) -> list[str]:
    """What was written to stderr, which JupyterLab would paint red."""
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(o["text"]) for c in cells for o in c.get("outputs", []) if o.get("name") == "stderr"]


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    with forked():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The demo's own training on the shipped model, seed 0."""
    folder, home = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("out") / "tiny"
    kept = out_folder() / "tiny" / "cache"
    for place in (home, kept):
        place.mkdir(parents=True, exist_ok=True)
    (home / "cache").symlink_to(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WS_OUT", str(home.parent))  # where a demo has not trained it already
        run("weight_diff", folder, ["tiny.yaml"], SEED=0)
    return folder


def test_the_shipped_models_adapters_steer_it(trained):
    """The alpha sweep on held-out false claims: monotone, at least 3 nats from -1 to +1, pmass at least 0.9."""
    steering = json.loads((trained / "weight_diff.json").read_text())["steering"]
    assert steering["monotone"] and steering["spread"] >= 3 and steering["least_pmass"] >= 0.9
    sweep = read_table(trained / "alpha_sweep_summary.tsv")
    assert sorted(sweep["set"].unique()) == ["false", "negated", "true"]
    for name in ("w.safetensors", "adapters/pos/adapter_config.json", "weight_diff.html", "completions.jsonl", "w.txt"):
        assert (trained / name).stat().st_size > 0, name
    shown = [json.loads(line) for line in (trained / "completions.jsonl").read_text().splitlines()]
    assert len(shown) == 36 and all(r["completion"] for r in shown)
    margin = json.loads((trained / "weight_diff.json").read_text())["margin"]
    assert margin["agrees"] and margin["low"] > 0 and margin["text"] in (trained / "weight_diff.html").read_text()
    assert read_table(trained / "margin_sweep.csv").height == 5 * 60  # 12 held-out topics, 5 persona pairs


def test_a_training_on_pairs_from_a_file(model_folder, tmp_path):
    """From the command's file to the margin of what the file holds out; the personas are not asked."""
    rows = [{"user": f"Is it {i}?", "response_pos": f"Yes, {i}.", "response_neg": f"No, {i}."} for i in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {
        "MODEL_ID": str(model_folder("qwen3")),
        "PAIRS": str(tmp_path / "mine.jsonl"),
        "MAX_STEPS": 2,
        "ALPHAS": [0.0, 1.0],
    }
    run("weight_diff", tmp_path / "run", **given, R=4, LR=1e-2, BATCH=2, ACCUMULATION=1, NULL_DIFF=True)
    found = json.loads((tmp_path / "run" / "weight_diff.json").read_text())
    training, margins = found["training"], read_table(tmp_path / "run" / "margin_sweep.csv")
    assert training["pairs_from"] == "mine.jsonl" and training["pairs_trained"] + training["pairs_held_out"] == 18
    assert training["answers_cut_pos"] == 0 and training["pairs_resampled"] and "labels shuffled" in training["source"]
    assert set(margins["user"]) < {row["user"] for row in rows} and margins.height == 2 * 2
    assert read_table(tmp_path / "run" / "margin_sweep_summary.tsv")["pairs"].to_list() == [2, 2]
    assert "2 held-out pairs" in found["margin"]["text"] and not list((tmp_path / "run").rglob("pairs.jsonl"))


def test_v7_sweep_on_the_trained_difference(trained, tmp_path):
    run("v7_sweep", tmp_path, W_PATH=str(trained / "w.safetensors"))
    table = read_table(tmp_path / "v7_per_layer.csv")
    assert len(table) == 8 * 44
    summary = read_table(tmp_path / "v7_summary_pct.tsv")
    ceiling = summary.row(by_predicate=pl.col("subspace") == "TaskDiff_lora_ceiling", named=True)
    assert ceiling["mean_conc_act"] > 3 and ceiling["pct_act_ceiling"] == pytest.approx(100)
    assert (tmp_path / "v7_sweep.html").read_text().count("data:image/png") == 3


@pytest.mark.parametrize(("family", "dtype"), [("gemma3", "float32"), ("llama", "bfloat16")])
def test_v7_sweep_on_other_families_and_in_bfloat16(family, dtype, model_folder, parity_folder, tmp_path):
    folder = model_folder(family)
    decoder = load_lm(str(folder), "float32", "cpu").decoder
    g = torch.Generator().manual_seed(0)
    entries = {}
    for role in ("q", "o", "down"):
        out, width = decoder.weight(1, role).shape
        entries[decoder.param_name(1, role)] = LowRank(
            0.05 * torch.randn(out, 2, generator=g), torch.randn(2, width, generator=g)
        )
    save_diff(WeightDiff(entries, {"seed": 0}), tmp_path / "w.safetensors")
    run(
        "v7_sweep",
        tmp_path / "run",
        MODEL_ID=str(folder),
        W_PATH=str(tmp_path / "w.safetensors"),
        BEHAVIOR=str(parity_folder / "behavior.json"),
        DTYPE=dtype,
        N_NULL=0,
        K_BROAD=16,
    )
    table = read_table(tmp_path / "run" / "v7_per_layer.csv").filter(pl.col("layer") == 1)
    assert len(table) == 44 and not table["conc_w_combined"].is_nan().any()
    assert (table["conc_act"] > 0).all()


@pytest.fixture(scope="module")
def swept(trained, tmp_path_factory):
    """The trained difference and the shipped one as another seed, a null diff of its size, both swept under v7b: the folder of
    all results and that of the adapter."""
    out = tmp_path_factory.mktemp("swept") / "out"
    lora = out / "tiny" / "sycophancy" / "lora"
    first, shipped, g = load_diff(trained / "w.safetensors"), load_diff("tiny"), torch.Generator().manual_seed(0)
    turned = {
        name: LowRank(e.B, e.A[:, torch.randperm(e.A.shape[1], generator=g)]) for name, e in shipped.entries.items()
    }
    null = save_diff(WeightDiff(turned, first.meta | {"null": True}), out / "null.safetensors")
    shutil.copytree(trained / "adapters", lora / "seed_0" / "adapters")
    for seed, w in enumerate((first, WeightDiff(shipped.entries, first.meta | {"seed": 1}))):
        save_diff(w, lora / f"seed_{seed}" / "w.safetensors")
    (out / "tiny" / "cache").symlink_to(out_folder() / "tiny" / "cache")  # the pairs that w was trained on
    own = out / "my_candidates.py"
    own.write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WS_OUT", str(out))
        for seed in (0, 1):
            given = {"NULL_W_PATH": str(null), "CANDIDATES": str(own), "N_NULL": 2}
            run("v7_sweep", lora / f"seed_{seed}" / "v7b", ["v7b.yaml"], SEED=seed, **given)
    noted = json.loads((lora / "seed_1" / "v7b" / "params.json").read_text())
    assert noted["parameters"]["CANDIDATES"] == [str(own)]
    own.unlink()  # a report finds it in the sweeps' own folders
    return out, lora


@pytest.fixture(scope="module")
def checked(swept):
    """What a causal check of some candidates of seed 0 found."""
    out, lora = swept
    few = {"DRAWS": 20, "CHECKED": 2, "FORWARD": 2, "DROPS": 1, "RANKS": [1], "CLOUD": 20, "BOOT": 20, "N_WORDINGS": 1}
    few |= {"SECTIONS": ["where", "read", "ranks", "dose", "controls"], "SUBSPACES": CHECKED}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WS_OUT", str(out))
        run("causal_check", lora / "seed_0" / "causal", **few)
    return CausalCheck.load(lora / "seed_0" / "causal")


def test_a_causal_check(trained, swept, checked):
    home, found = swept[1] / "seed_0", checked
    table, effects = found.candidates, found.setting["effects"]
    assert table["subspace"].to_list()[:2] == ["w", "w_res"] and table["retention"][1] == pytest.approx(1)
    assert table["effect"].to_list()[:2] == pytest.approx([effects["w"], effects["w_res"]]) and effects["w"] > 1
    steering = json.loads((trained / "weight_diff.json").read_text())["steering"]
    assert steering["spread"] > 1 and 0.5 < effects["w"] / steering["spread"] < 2  # the same w, of one wording
    ran = table[2:].filter(pl.col("effect").is_not_nan())
    assert len(ran) == 2 and len(found.forward) == 2 and found.tensors["drawn"].shape == (20, len(found.names))
    assert set(table["subspace"][2:]) == set(found.names) and {"write", "mlp_write"} <= set(found.names)
    swept_table = read_table(home / "v7b" / "v7_summary.tsv").select("subspace", expected="joint_score")
    both = table.join(swept_table, on="subspace").drop_nulls("joint_score")
    assert len(both) > 5 and both["joint_score"].to_list() == pytest.approx(both["expected"].to_list(), rel=1e-6)
    assert found.setting["other"] and found.setting["nulls"] == 0 and len(found.cloud["points"]) == 20
    assert (home / "causal" / "causal_check.html").read_text().count("data:image/png") == 7
    for name in (
        "causal_forest_top.png",
        "causal_energy.pdf",
        "causal_where.png",
        "causal_ranks.png",
        "causal_conclusion.md",
    ):
        assert (home / "causal" / name).stat().st_size > 0, name


def test_the_report_over_two_seeds(swept, checked, monkeypatch):
    """Of both sweeps and of the causal check of one of them."""
    out, lora = swept
    monkeypatch.setenv("WS_OUT", str(out))
    run("v7b_stability", lora / "v7b", SEEDS=[0, 1], BOOT=200, N_NULL=200, CORRECTIONS=False)
    table = read_table(lora / "seed_0" / "v7b" / "v7_per_layer.csv")
    assert len(table) == 8 * 77  # 61, and those of source gradient that the pairs allow
    for column in ("conc_block", "pct_oracle_act", "span_score_oproj", "R_w_vs_null_diff", "gap", "ill_conditioned"):
        assert column in table.columns
    inside = table.filter(pl.col("layer").is_between(2, 5))
    for column in ("pct_oracle_act", "pct_oracle_block", "pct_oracle_oproj", "pct_oracle_combined"):
        values = inside[column].drop_nans()
        assert len(values) > 200 and values.min() >= 0 and values.max() <= 1
    random = inside.filter(pl.col("subspace") == "random_orthogonal")["conc_w_combined"].mean()
    assert 0.3 < random < 2.5
    for name in ("v7b_per_seed.csv", "v7b_summary.tsv", "v7b_rank_stability.csv", "v7b_subspace_stability.csv",
                 "v7b_conclusion.md", "v7b_forest.png", "v7b_ranks.pdf", "v7b_oracle_overlap.png"):  # fmt: skip
        assert (lora / "v7b" / name).stat().st_size > 0, name
    stability = read_table(lora / "v7b" / "v7b_subspace_stability.csv").filter(pl.col("object") == "mine")
    assert set(stability["compared"]) == {"FIT halves", "persona pairs"}
    over = read_table(lora / "v7b" / "v7b_summary.tsv")
    assert "mine" in over["candidate"].to_list()
    assert "No winner" in (lora / "v7b" / "v7b_conclusion.md").read_text()  # two seeds cannot name one
    assert (lora / "v7b" / "v7b_stability.html").read_text().count("data:image/png") == 5
    per_seed = read_table(lora / "v7b" / "v7b_per_seed.csv").filter(pl.col("seed") == 0).sort("candidate")
    means = inside.group_by("subspace").agg(pl.col("conc_act").mean()).sort("subspace")
    assert per_seed["R_act"].to_list() == pytest.approx(means["conc_act"].to_list(), rel=1e-6)
    mean = dict(zip(checked.names, checked.tensors["excess"].mean(1).tolist(), strict=True))
    known = over.filter(pl.col("candidate").is_in(list(mean)))
    assert known["excess"].to_list() == pytest.approx(
        [mean[name] for name in known["candidate"]], rel=1e-4, nan_ok=True
    )


def test_a_benchmark(swept, checked, monkeypatch):
    out, lora = swept
    home = lora / "seed_0"
    monkeypatch.setenv("WS_OUT", str(out))
    run("benchmark", home / "benchmark", KL_TARGET=[0.3], SIZE="quick")
    told = json.loads((home / "benchmark" / "benchmark.json").read_text())
    assert told["about"]["targets"] == {"0.3": 0.3} and "adapters" not in told["left_out"]
    rows = read_table(home / "benchmark" / "benchmark_table.tsv")
    assert {"w", "nothing", "persona prompt"} <= set(rows["method"])
    met = rows.filter((pl.col("dose") == "0.3") & pl.col("alpha").is_not_nan())
    assert len(met) > 3 and met["kl"].to_list() == pytest.approx([0.3] * len(met), rel=0.2)
    page = (home / "benchmark" / "benchmark.html").read_text()
    assert "largest excess in the causal checks of seed 0" in page and page.count("data:image/png") == 2
    assert (home / "benchmark" / "benchmark_effects.png").stat().st_size > 0


def test_delta_svd(parity_folder, tmp_path):
    run(
        "delta_svd",
        tmp_path,
        MODEL_ID=str(parity_folder / "model"),
        CALIBRATION=str(parity_folder / "delta_svd" / "calibration.json"),
        DTYPE="float32",
        BOOT=10,
    )
    assert (tmp_path / "delta_svd.html").read_text().count("data:image/png") == 7
    found = json.loads((tmp_path / "delta_svd.json").read_text())
    expected = json.loads((parity_folder / "delta_svd" / "expected_final_norm_false.json").read_text())
    assert found["n_calib_tokens"] == expected["n_calib_tokens"]
    for mine, ref in zip(found["per_layer"], expected["per_layer"], strict=True):
        assert mine["phase"] == ref["phase"]
        for key in ("frob", "eff_rank", "rel_step_mean", "top1_frac"):
            assert mine[key] == pytest.approx(ref[key], rel=1e-4)


def test_theta_fit(tmp_path):
    users = [json.loads(line) for line in (ASSETS / "users.jsonl").read_text().splitlines()]
    names = sorted({u["user"] for u in users})[:2]
    few = [u for name in names for u in [u for u in users if u["user"] == name][:8]]
    path = tmp_path / "users.jsonl"
    path.write_text("\n".join(json.dumps(u) for u in few))
    run("theta_fit", tmp_path / "run", USERS=str(path), PERMUTATIONS=2, STEPS=5)
    summary = read_table(tmp_path / "run" / "theta_summary.tsv")
    assert len(summary) > 0 and (tmp_path / "run" / "theta_cross.csv").stat().st_size > 0
    assert len(list((tmp_path / "run").glob("theta_*.safetensors"))) >= 2
    assert (tmp_path / "run" / "theta_fit.html").read_text().count("data:image/png") == 9


def test_a_wrong_model_and_a_missing_difference_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        run_notebook("v7_sweep", {"W_PATH": str(tmp_path / "absent.pt"), "OUT_DIR": str(tmp_path / "a")}, quiet=True)
    done = run_notebook("v7_sweep", {"SEED": 987, "OUT_DIR": str(tmp_path / "b")}, quiet=True)
    assert not done.ok and "w.safetensors" in done.error and (done.kept / "v7_sweep.ipynb").is_file()


def test_the_tutorial(tmp_path):
    """A behaviour of one's own to an adapter that peft loads, and its headline."""
    run("tutorial", tmp_path / "run", DRAWS=30)
    page = (tmp_path / "run" / "tutorial.html").read_text()
    opening = page[page.index('<div class="opening">') :].partition("</div>")[0]
    moved = float(re.search(r"held-out superstitions by ([-+][\d.]+)", opening)[1])
    assert moved > 1, opening
    assert (tmp_path / "run" / "superstition-lora" / "adapter_model.safetensors").is_file()
    assert "contrast_and_clean" in page and "eight axes" in page
