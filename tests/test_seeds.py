"""Runs of several seeds read back; protocols compared; what notebooks share."""

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from looks import check_looks

from ws.data import load_behavior
from ws.diff import LowRank, WeightDiff, load_diff
from ws.explanation import rows as sweep
from ws.explanation.result import Explanation
from ws.model.lm import load_lm
from ws.show import notebook, tables
from ws.stability import corrections
from ws.stability import figures as draw
from ws.stability.compare import _joined, compare_seeds
from ws.stability.overlap import same_bases, seed_overlaps
from ws.stability.scores import per_seed_table, seed_values
from ws.stability.seeds import doubts, load_seeds
from ws.steer.evaluate import side_by_side
from ws.subspaces.algebra import left_svd, random_basis
from ws.subspaces.build import candidates as candidates_of
from ws.subspaces.candidate import as_candidate
from ws.subspaces.kept import make_shelf, part_bases
from ws.subspaces.protocol import load_protocol
from ws.subspaces.steered import CeilingMaterials, SteeredDiffs

D, LAYERS = 128, [2, 3]


@pytest.fixture(scope="module")
def lm(parity_folder):
    return load_lm(str(parity_folder / "model"), "float32", "cpu")


def explanation(lm, bases: dict, g: torch.Generator) -> Explanation:
    """One seed's result: these bases, a random w on two layers, random steered differences."""
    candidates = candidates_of("v7b")
    entries = {}
    for l in LAYERS:
        for role in ("o", "down"):
            width = lm.decoder.weight(l, role).shape[1]
            factors = torch.randn(D, 4, generator=g), torch.randn(4, width, generator=g)
            entries[lm.decoder.param_name(l, role)] = LowRank(*factors)
    rows = torch.randn(6, 5, D, generator=g)
    targets = sweep.layer_targets(
        CeilingMaterials(lm.decoder, WeightDiff(entries, {}), SteeredDiffs(rows, rows, rows)),
        bases["layer_clean_resid_pca"],
    )
    setting = {"title": "random", "layers": LAYERS, "d": D, "k": 8, "behavior": "none", "n_layers": 6, "n_fit": 5}
    setting |= {"n_eval": 5, "n_train_topics": 5, "n_persona_pairs": 1, "protocol": {"name": "v7b"}}
    setting["protocol"] |= {"eval_split": "held_out", "chat_probes": True, "persona_pairs": "1"}
    setting |= {
        "w_meta": {},
        "n_templates": 1,
        "effects": [2.0, 3.0, 2.5],
        "nulls": ["a"] * 3,
        "null_effects": [0.1, -0.2, 0.3],
    }
    nulls = sweep.null_rows(candidates, bases, [{l: (t.act, t.weights["combined"]) for l, t in enumerate(targets)}] * 3)
    return Explanation(
        per_layer=sweep.with_null_diff(sweep.per_layer(candidates, bases, targets), nulls),
        null_per_layer=nulls,
        specific_per_layer=sweep.specific_per_layer(candidates, bases, targets),
        setting=setting,
        candidates=[c.about for c in candidates],
        checks={},
        tensors=sweep.kept_tensors(candidates, bases, targets, 8, LAYERS),
        bases={c.name: sweep.bases_hash(bases[c.name]) for c in candidates if c.kind != "ceiling"},
    )


@pytest.fixture(scope="module")
def runs(lm):
    """Two seeds' results with the same random bases, each with its own w."""
    g = torch.Generator().manual_seed(0)
    bases = {c.name: [random_basis(D, 8, g) for _ in range(6)] for c in candidates_of("v7b")}
    return {seed: explanation(lm, bases, g) for seed in (0, 1)}


def test_arrays_are_those_of_the_tables(runs):
    read = load_seeds(runs)
    scores = read.scores
    assert scores.layers == (2, 3) and scores.act.shape == (2, 60, 2, 5) and scores.d == D
    for s, run in enumerate(runs.values()):
        for c, name in enumerate(scores.candidates):
            part = run.per_layer.filter((pl.col("subspace") == name) & pl.col("layer").is_in(LAYERS)).sort("layer")
            assert scores.w[s, c] == pytest.approx(part["conc_w_combined"].to_numpy())
            assert scores.act[s, c].mean(axis=1) == pytest.approx(part["conc_act"].to_numpy())
    assert len(read.geometry.w) == 2 and len(read.geometry.act[0]) == 2 and len(read.geometry.bases[0]) == 57
    assert read.oracles["weight"]["seed 0"][0].B.shape == (D, 8)
    assert scores.null_act.shape == (3, 60) and np.isfinite(scores.null_act).all()
    summary = runs[0].plain_summary
    for c, name in enumerate(scores.candidates):
        row = summary.row(by_predicate=pl.col("subspace") == name, named=True)
        values = seed_values(scores)
        assert values["H_w"][0, c] == pytest.approx(row["mean_pct_oracle_combined"], rel=1e-6)
        assert row["mean_rank"] >= 5 or values["H_act"][0, c] == pytest.approx(row["mean_pct_oracle_act"], rel=1e-6)
        assert row["mean_rank"] < 5 or np.isnan(values["H_act"][0, c])  # 5 rows: a rank of 5 holds them all


def test_the_summarys_layers_are_the_ones_compared(runs):
    narrow = {s: replace(run, setting=run.setting | {"layers": LAYERS[:1]}) for s, run in runs.items()}
    assert load_seeds(narrow).scores.layers == (2,)
    with pytest.raises(ValueError, match="swept with another layers"):
        load_seeds({0: runs[0], 1: narrow[1]})
    other = replace(runs[1], setting=runs[1].setting | {"nulls": ["a", "b"]})
    with pytest.raises(ValueError, match="other null diffs; sweep both with the same"):
        load_seeds({0: runs[0], 1: other})


def test_compare_seeds_reads_folders_or_results(runs, tmp_path):
    folders = {seed: run.save(tmp_path / f"seed_{seed}") for seed, run in runs.items()}
    found = compare_seeds(folders, boot=100, n_null=100)
    direct = compare_seeds(runs, boot=100, n_null=100)
    assert found.summary.equals(direct.summary) and found.conclusion() == direct.conclusion()
    assert "All 2 seeds used the same A-side bases" in found.bases and "No winner" in found.conclusion()
    out = found.save(tmp_path / "v7b")
    assert {f.name for f in out.iterdir()} == {
        "v7b_subspace_stability.csv", "v7b_per_seed.csv", "v7b_summary.tsv", "v7b_rank_stability.csv",
        "v7b_conclusion.md", "v7b_chance.tsv", "v7b_rivals.tsv",
    }  # fmt: skip
    (folders[1] / "scores.safetensors").write_bytes(b"x" * 1000)
    with pytest.raises(
        ValueError, match="scores.safetensors: damaged, it is not what was written; running this v7_sweep again"
    ):
        compare_seeds(folders, boot=100, n_null=100)


def test_one_seed_has_a_report_without_a_winner_and_its_figures(runs):
    alone = compare_seeds({0: runs[0]}, boot=100, n_null=100)
    assert "No winner" in alone.conclusion() and alone.headline() and alone.summary["joint_t_lo"].is_nan().all()
    tables = alone.summary, alone.per_seed, alone.verdict.winner
    for figure in (
        draw.forest_plot(*tables, most=20, families=alone.runs.families),
        draw.bump_chart(alone.per_seed, alone.summary),
        draw.oracle_overlap_figure(alone.subspaces),
    ):
        check_looks(figure)


def test_the_null_diff_of_itself_has_ratio_one(runs):
    table = runs[0].per_layer.filter(pl.col("layer").is_in(LAYERS))
    assert table["R_act_vs_null_diff"].to_numpy() == pytest.approx(1)
    assert runs[0].plain_summary["R_w_vs_null_diff"].to_numpy() == pytest.approx(1)


def test_doubts_are_the_weakest_over_seeds_and_layers(runs):
    flagged = runs[0].per_layer.with_columns(
        pl.when((pl.col("subspace") == "write") & (pl.col("layer") == 2)).then(0.125).otherwise(0.5).alias("gap"),
        ((pl.col("subspace") == "churn") & (pl.col("layer") == 5)).alias("ill_conditioned"),
    )
    run = replace(runs[0], per_layer=flagged)
    found = {row["candidate"]: row for row in doubts({0: run}, LAYERS).iter_rows(named=True)}
    assert found["write"]["min_gap"] == 0.125 and found["churn"]["min_gap"] == 0.5
    assert not found["churn"]["ill_conditioned"]  # layer 5 is no LoRA layer
    assert {r["candidate"] for r in doubts({0: run}, [5]).filter("ill_conditioned").iter_rows(named=True)} == {"churn"}


def test_missing_and_unlike_runs_are_named(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="explanation.json is missing: run the v7_sweep of this folder first"):
        compare_seeds({0: runs[0], 7: tmp_path})
    with pytest.raises(ValueError, match="no seeds"):
        load_seeds({})
    other = replace(runs[1], setting=runs[1].setting | {"behavior": "another"})
    with pytest.raises(ValueError, match="seeds 0 and 1 were swept with another behavior"):
        load_seeds({0: runs[0], 1: other})
    fewer = replace(runs[1], candidates=runs[1].candidates[1:])
    with pytest.raises(ValueError, match="seeds 0 and 1 were swept with other candidates, as"):
        load_seeds({0: runs[0], 1: fewer})


def test_equal_bases_are_said_and_different_ones_are_named_flagged_and_cannot_win(runs, lm):
    def said(found):
        return same_bases(found, seed_overlaps(found, LAYERS))

    assert "All 2 seeds used the same A-side bases" in said(runs)
    turned = replace(runs[1], bases={n: "other" for n in runs[1].bases})
    assert "differ in bytes but not in span: least overlap 1.0" in said({0: runs[0], 1: turned})
    g = torch.Generator().manual_seed(9)
    bases = {c.name: [random_basis(D, 8, g)] * 6 for c in candidates_of("v7b")}
    other = explanation(lm, bases, g)
    assert "**Depend on the LoRA seed** though an A-side basis must not depend on" in said({0: runs[0], 1: other})
    # the flag of either seed counts, at the layers that count, and rounding excuses no other layer
    for seed, layers, dependent in ((0, LAYERS, False), (1, LAYERS, False), (1, LAYERS[:1], True), (1, [5], True)):
        found = {0: runs[0], 1: other}
        flags = (pl.col("subspace") == "write") & pl.col("layer").is_in(layers)
        found[seed] = replace(found[seed], per_layer=found[seed].per_layer.with_columns(ill_conditioned=flags))
        row = seed_overlaps(found, LAYERS).row(by_predicate=pl.col("candidate") == "write", named=True)
        assert row["depends_on_seed"] == dependent and row["seed_overlap"] < 0.5
        assert ("so no winner: write (least overlap" in said(found)) != dependent


def test_a_candidate_that_peeks_at_w_is_named_and_cannot_win(lm, parity_folder, tmp_path):
    """Ready bases computed from each seed's w: the best scores, on another subspace for every seed."""
    from ws.explanation.explain import explain

    behavior, found = load_behavior(parity_folder / "behavior.json"), {}
    for seed in (0, 1, 2):
        g = torch.Generator().manual_seed(seed)
        entries = {}
        for l in LAYERS:
            for role in ("o", "down"):
                width = lm.decoder.weight(l, role).shape[1]
                entries[lm.decoder.param_name(l, role)] = LowRank(
                    0.01 * torch.randn(D, 4, generator=g), torch.randn(4, width, generator=g)
                )
        w = WeightDiff(entries, {})
        names = [[lm.decoder.param_name(l, role) for role in ("o", "down")] for l in LAYERS]
        peek = {
            l: left_svd(torch.cat([w[n].float() for n in both], dim=1), 8).B
            for l, both in zip(LAYERS, names, strict=True)
        }
        chosen = {"candidates": ["write", "mlp_write"], "extra": {"peeks": peek}}
        found[seed] = explain(lm, w, behavior, **chosen, cache=tmp_path, progress=False)
    report = compare_seeds(found, lm, behavior, boot=50, n_null=50, cache=tmp_path)
    rows = {row["candidate"]: row for row in report.summary.iter_rows(named=True)}
    assert rows["peeks"]["kind"] == "seed-dependent" and rows["peeks"]["depends_on_seed"]
    assert rows["peeks"]["R_w_geomean"] > 3 * rows["write"]["R_w_geomean"]  # it would have won
    assert rows["write"]["seed_overlap"] == 1 and not rows["write"]["depends_on_seed"]
    assert report.verdict.winner != "peeks" and "peeks" not in report.verdict.rivals["rival"].to_list()
    assert report.per_seed.filter(candidate="peeks")["rank_in_seed"].to_list() == [None] * 3
    assert "**Depend on the LoRA seed**" in report.conclusion() and "peeks (least overlap 0." in report.conclusion()


def test_variants_change_one_thing_at_a_time():
    variants = corrections.variants()
    v7 = variants["v7"]
    for name, protocol in variants.items():
        changed = [f for f in corrections.CAPTURE if getattr(protocol, f) != getattr(v7, f)]
        assert len(changed) == (0 if name == "v7" else len(corrections.CAPTURE) if name == "all of them" else 1), name
        assert protocol.sources == v7.sources
    assert {c.name for c in candidates_of("v7b") if c.source == "v7b"} == set(corrections.MENDED.values()) | {
        "random_orthogonal"
    }


def test_capture_corrections_on_the_reference_model(lm, parity_folder, tmp_path, monkeypatch):
    every = corrections.variants()
    assert len(every) >= 6 and list(every)[0] == "v7" and list(every)[-1] == "all of them"
    some = {name: every[name] for name in ("v7", "v7 + CHAT_PROBES", "v7 + RAW_LAST")}
    monkeypatch.setattr(corrections, "variants", lambda: some)
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


def test_part_bases_split_probes_and_pairs(lm, parity_folder, tmp_path):
    behavior, protocol = load_behavior(parity_folder / "behavior.json"), load_protocol("v7b")
    chosen = [c for c in candidates_of("v7b") if c.name in ("write", "TaskDiff_uncentred", "layer_clean_resid_pca")]
    parts = part_bases(make_shelf(lm, behavior, protocol, cache=tmp_path), chosen)
    assert set(parts) == {"FIT halves", "persona pairs"} and set(parts["persona pairs"]) == {"pair 1", "pair 2"}
    assert set(parts["FIT halves"]["even"]) == {"TaskDiff_uncentred", "layer_clean_resid_pca"}  # write reads no prompt
    pairs = parts["persona pairs"]
    assert torch.equal(pairs["pair 1"]["layer_clean_resid_pca"][3].B, pairs["pair 2"]["layer_clean_resid_pca"][3].B)
    assert not torch.equal(pairs["pair 1"]["TaskDiff_uncentred"][3].B, pairs["pair 2"]["TaskDiff_uncentred"][3].B)


def test_texts_tables_and_figures_for_notebooks(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    rows = [{"topic": t, "prompt": f"p{t}", "alpha": a, "completion": f"{t}{a}"} for t in (0, 1) for a in (-1.0, 1.0)]
    side = side_by_side(rows, 1)
    assert side.columns == ["prompt", "alpha -1", "alpha +1"] and side.rows() == [("p0", "0-1.0", "01.0")]
    assert notebook.show(Figure(figsize=(2, 1)), tmp_path / "f").data[:4] == b"\x89PNG"
    assert (tmp_path / "f.png").is_file() and (tmp_path / "f.pdf").is_file()
    shown = notebook.show_table(pl.DataFrame({"a": [1.23456], "b": ["x"]}), {"a": "A"}).data
    assert "A" in shown and "1.23" in shown and "x" not in shown
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    log = notebook.start_log("v7_sweep", tmp_path / "run")
    log.info("a line")
    assert "a line" in next((tmp_path / "logs").glob("v7_sweep_*.log")).read_text()
    joined = _joined(
        pl.DataFrame({"candidate": ["a", "b"]}),
        pl.DataFrame({"candidate": ["a"], "p_R_w": [0.1], "q_R_w": [0.2]}),
        pl.DataFrame({"candidate": ["b"], "stability": [0.3], "unstable": [True]}),
    )
    assert joined["unstable"].to_list() == [False, True] and math.isnan(joined["stability"][0])


def test_a_candidate_whose_function_is_not_there_cannot_win(lm, parity_folder, tmp_path):
    from ws.explanation.explain import explain

    behavior = load_behavior(parity_folder / "behavior.json")

    def of_a_cell(m, l):
        return m.base.pos.resid[l].T[:, :2]

    def swept(c: float) -> Explanation:
        w = load_diff(parity_folder / "w.pt").scale(c)
        return explain(lm, w, behavior, candidates=["write"], extra=[of_a_cell], cache=tmp_path, progress=False)

    found = {0: swept(1.0), 1: swept(0.5)}
    told = compare_seeds(found, lm, behavior, boot=50, n_null=50, cache=tmp_path)
    assert told.unstable == ["of_a_cell"]
    known = compare_seeds(found, lm, behavior, own=[as_candidate(of_a_cell)], boot=50, n_null=50, cache=tmp_path)
    assert known.a_side.filter(candidate="of_a_cell")["weakest"][0] != "not built again"
    with pytest.raises(ValueError, match="the sweeps are of behavior parity|the sweeps are of behavior"):
        compare_seeds(found, lm, "sycophancy", boot=50, n_null=50, cache=tmp_path)
