"""Runs of several seeds read back; protocols compared; what notebooks share."""

import json
import math

import numpy as np
import polars as pl
import pytest
import torch

from ws.data import load_behavior
from ws.diff import LowRank, WeightDiff, load_diff
from ws.explanation import rows as sweep
from ws.model.lm import load_lm
from ws.show import notebook, tables
from ws.stability import corrections
from ws.stability.scores import per_seed_table
from ws.stability.seeds import doubts, load_seeds, seed_folders
from ws.subspaces.algebra import random_basis
from ws.subspaces.candidate import registered
from ws.subspaces.captures import SteeredDiffs
from ws.subspaces.kept import part_bases, save_bases
from ws.subspaces.materials import CeilingMaterials
from ws.subspaces.protocol import load_protocol

D, LAYERS = 128, [2, 3]


@pytest.fixture(scope="module")
def lm(parity_folder):
    return load_lm(str(parity_folder / "model"), "float32", "cpu")


@pytest.fixture(scope="module")
def runs(lm, tmp_path_factory):
    """Two seeds' run folders with random bases (the same ones), differences and null columns."""
    root = tmp_path_factory.mktemp("runs")
    g = torch.Generator().manual_seed(0)
    candidates = registered()
    bases = {c.name: [random_basis(D, 8, g) for _ in range(6)] for c in candidates}
    save_bases({n: b for n, b in bases.items()}, root / "bases.safetensors")
    folders = {}
    for seed in (0, 1):
        entries = {}
        for l in LAYERS:
            for role in ("o", "down"):
                width = lm.decoder.weight(l, role).shape[1]
                factors = torch.randn(D, 4, generator=g), torch.randn(4, width, generator=g)
                entries[lm.decoder.param_name(l, role)] = LowRank(*factors)
        w = WeightDiff(entries, {})
        rows = torch.randn(6, 5, D, generator=g)
        b_side = CeilingMaterials(lm.decoder, w, SteeredDiffs(rows, rows, rows))
        targets = sweep.layer_targets(b_side, bases["layer_clean_resid_pca"])
        table = sweep.with_null_diff(sweep.per_layer(candidates, bases, targets), candidates, bases, targets)
        folder = root / f"seed_{seed}"
        folder.mkdir()
        tables.write_table(table, folder / "v7_per_layer.csv")
        notebook.save_scores(folder / "scores.safetensors", candidates, bases, targets, 8)
        (folder / "bases.json").write_text(json.dumps(notebook.bases_record(root / "bases.safetensors")))
        folders[seed] = folder
    return folders


def test_arrays_are_those_of_the_tables(runs):
    read = load_seeds(runs)
    scores = read.scores
    assert scores.layers == (2, 3) and scores.act.shape == (2, 60, 2, 5) and scores.d == D
    for s, folder in enumerate(runs.values()):
        table = tables.read_table(folder / "v7_per_layer.csv")
        for c, name in enumerate(scores.candidates):
            part = table.filter((pl.col("subspace") == name) & pl.col("layer").is_in(LAYERS)).sort("layer")
            assert scores.w[s, c] == pytest.approx(part["conc_w_combined"].to_numpy())
            assert scores.act[s, c].mean(axis=1) == pytest.approx(part["conc_act"].to_numpy())
    assert len(read.factors) == 2 and len(read.factors[0]) == 2
    assert read.oracles["weight"]["seed 0"][0].B.shape == (D, 8)
    assert read.one_basis.sum() == sum(c.shared for c in registered())
    assert np.isfinite(scores.null_act).all()


def test_the_null_diff_of_itself_has_ratio_one(runs):
    table = tables.read_table(runs[0] / "v7_per_layer.csv").filter(pl.col("layer").is_in(LAYERS))
    assert table["R_act_vs_null_diff"].to_numpy() == pytest.approx(1)
    summary = tables.summarise(table, LAYERS)
    assert summary["R_w_vs_null_diff"].to_numpy() == pytest.approx(1)


def test_doubts_are_the_weakest_over_seeds_and_layers(runs):
    table = tables.read_table(runs[0] / "v7_per_layer.csv")
    flagged = table.with_columns(
        pl.when((pl.col("subspace") == "write") & (pl.col("layer") == 2)).then(0.125).otherwise(0.5).alias("gap"),
        ((pl.col("subspace") == "churn") & (pl.col("layer") == 5)).alias("ill_conditioned"),
    )
    folder = runs[0].parent / "doubtful"
    folder.mkdir()
    tables.write_table(flagged, folder / "v7_per_layer.csv")
    found = {row["candidate"]: row for row in doubts({0: folder}, LAYERS).iter_rows(named=True)}
    assert found["write"]["min_gap"] == 0.125 and found["churn"]["min_gap"] == 0.5
    assert not found["churn"]["ill_conditioned"]  # layer 5 is no LoRA layer
    assert {r["candidate"] for r in doubts({0: folder}, [5]).filter("ill_conditioned").iter_rows(named=True)} == {
        "churn"
    }


def test_missing_and_unlike_runs_are_named(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="seed 7: .*scores.safetensors is missing"):
        load_seeds({0: runs[0], 7: tmp_path})
    with pytest.raises(ValueError, match="no seeds"):
        load_seeds({})


def test_a_seed_is_named_once(tmp_path):
    assert seed_folders([2, 0], tmp_path) == {2: tmp_path / "seed_2", 0: tmp_path / "seed_0"}
    with pytest.raises(ValueError, match=r"SEEDS \[0, 1, 0\]: 0 is named more than once"):
        seed_folders([0, 1, 0], tmp_path)
    with pytest.raises(ValueError, match="SEEDS is empty"):
        seed_folders([], tmp_path)


def test_equal_bases_are_said_and_different_ones_refused(runs, tmp_path):
    root = runs[0].parent
    assert "All 2 seeds used the same A-side bases" in notebook.same_bases(runs, root)
    g = torch.Generator().manual_seed(9)
    save_bases({c.name: [random_basis(D, 8, g)] * 6 for c in registered()}, root / "other.safetensors")
    other = tmp_path / "seed_1"
    other.mkdir()
    (other / "bases.json").write_text(json.dumps(notebook.bases_record(root / "other.safetensors")))
    with pytest.raises(ValueError, match="must not depend on the LoRA seed"):
        notebook.same_bases({0: runs[0], 1: other}, root)


def test_variants_change_one_thing_at_a_time():
    variants = corrections.variants()
    v7 = variants["v7"]
    for name, protocol in variants.items():
        changed = [f for f in corrections.CAPTURE if getattr(protocol, f) != getattr(v7, f)]
        assert len(changed) == (0 if name == "v7" else len(corrections.CAPTURE) if name == "all of them" else 1), name
        assert protocol.sources == v7.sources
    assert {c.name for c in registered(("v7b",))} == set(corrections.MENDED.values()) | {"random_orthogonal"}


def test_capture_corrections_on_the_reference_model(lm, parity_folder, tmp_path):
    behavior = load_behavior(parity_folder / "behavior.json")
    moved, behind = corrections.capture_corrections(lm, behavior, {0: load_diff(parity_folder / "w.pt")}, tmp_path)
    first = moved.row(0, named=True)
    assert first["variant"] == "v7" and first["spearman_joint"] == pytest.approx(1) and first["max_abs_log2_act"] == 0
    chat = moved.row(by_predicate=pl.col("variant") == "v7 + CHAT_PROBES", named=True)
    assert chat["max_abs_log2_act"] > 0.1 and chat["moved_most"] in set(behind["subspace"])
    raw = moved.row(by_predicate=pl.col("variant") == "v7 + RAW_LAST", named=True)
    assert raw["max_abs_log2_act"] == 0  # the last layer is no LoRA layer here
    reference = tables.read_table(parity_folder / "v7" / "v7_summary.tsv")
    mine = behind.filter(pl.col("variant") == "v7").join(reference, on="subspace").filter(pl.col("subspace") == "write")
    assert mine["R_act"][0] == pytest.approx(mine["mean_conc_act"][0], rel=1e-4)


def test_basis_corrections_are_ratios_of_geometric_means(runs):
    per_seed = per_seed_table(load_seeds(runs).scores)
    mended = corrections.basis_corrections(per_seed)
    row = mended.row(by_predicate=pl.col("v7") == "attn_ov_write", named=True)
    old, new = (per_seed.filter(pl.col("candidate") == n)["R_w"].to_numpy() for n in ("attn_ov_write", "attn_ov_heads"))
    expected = np.log2(np.exp(np.log(new).mean()) / np.exp(np.log(old).mean()))
    assert row["R_w_log2_change"] == pytest.approx(expected)


def test_part_bases_split_probes_and_pairs(lm, parity_folder):
    behavior, protocol = load_behavior(parity_folder / "behavior.json"), load_protocol("v7b")
    chosen = [c for c in registered() if c.name in ("write", "TaskDiff_uncentred", "layer_clean_resid_pca")]
    parts = part_bases(lm, behavior, protocol, chosen)
    assert set(parts) == {"FIT halves", "persona pairs"} and set(parts["persona pairs"]) == {"pair 1", "pair 2"}
    assert set(parts["FIT halves"]["even"]) == {"TaskDiff_uncentred", "layer_clean_resid_pca"}  # write reads no prompt
    pairs = parts["persona pairs"]
    assert torch.equal(pairs["pair 1"]["layer_clean_resid_pca"][3].B, pairs["pair 2"]["layer_clean_resid_pca"][3].B)
    assert not torch.equal(pairs["pair 1"]["TaskDiff_uncentred"][3].B, pairs["pair 2"]["TaskDiff_uncentred"][3].B)


def test_texts_tables_and_figures_for_notebooks(lm, parity_folder, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    behavior, w = load_behavior(parity_folder / "behavior.json"), load_diff(parity_folder / "w.pt")
    text = notebook.setting(lm, behavior, load_protocol("v7"), w, [2, 3, 4])
    assert "16 FIT, 16 EVAL" in text and "layers 2, 3, 4" in text
    assert all(line.count("|") == 3 for line in text.splitlines())  # a stray bar would break the table
    norms = notebook.diff_norms(w)
    assert len(norms) == 21 and norms["norm"].sum() > 0
    by_module = notebook.norms_by_module(norms)
    assert set(by_module["module"]) == {f"{m}_proj" for m in ("q", "k", "v", "o", "gate", "up", "down")}
    assert len(notebook.diff_spectra(w)["o_proj"]) == 3
    rows = [{"topic": t, "prompt": f"p{t}", "alpha": a, "completion": f"{t}{a}"} for t in (0, 1) for a in (-1.0, 1.0)]
    side = notebook.side_by_side(rows, 1)
    assert side.columns == ["prompt", "alpha -1", "alpha +1"] and side.rows() == [("p0", "0-1.0", "01.0")]
    assert notebook.show(Figure(figsize=(2, 1))).data[:4] == b"\x89PNG"
    assert "| asymmetry | 1.5 |" in notebook.training_text({"asymmetry": 1.5})
    monkeypatch.setattr(notebook, "LOGS", tmp_path / "logs")
    log = notebook.start_log("v7_sweep", tmp_path / "run")
    log.info("a line")
    assert "a line" in next((tmp_path / "logs").glob("v7_sweep_*.log")).read_text()
    joined = notebook.join_summary(
        pl.DataFrame({"candidate": ["a", "b"]}),
        pl.DataFrame({"candidate": ["a"], "null_q95": [1.0], "p_R_w": [0.1], "q_R_w": [0.2], "basis": ["per layer"]}),
        pl.DataFrame({"candidate": ["b"], "stability": [0.3], "unstable": [True]}),
    )
    assert joined["unstable"].to_list() == [False, True] and math.isnan(joined["stability"][0])
