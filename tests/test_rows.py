"""The sweep's tables on a planted case, its summaries, its conclusion, its files."""

import math

import numpy as np
import polars as pl
import pytest
import torch

from ws.diff import LowRank, WeightDiff
from ws.explanation import rows as sweep
from ws.explanation import summary as S
from ws.explanation import words
from ws.model.lm import load_lm
from ws.show import tables
from ws.show.notebook import embedded
from ws.steer.effect import steering
from ws.subspaces.algebra import Basis, empty, random_basis
from ws.subspaces.build import candidates as candidates_of
from ws.subspaces.steered import CeilingMaterials, SteeredDiffs

D, LAYERS = 128, [2, 3]


@pytest.fixture(scope="module")
def lm(parity_folder):
    return load_lm(str(parity_folder / "model"), "float32", "cpu")


@pytest.fixture(scope="module")
def planted(lm):
    """w and the activation differences lie in the span of `write`'s basis (invented here), all else is random."""
    g = torch.Generator().manual_seed(0)
    U = random_basis(D, 8, g).B
    entries = {}
    for l in LAYERS:
        for role in ("o", "down"):
            width = lm.decoder.weight(l, role).shape[1]
            entries[lm.decoder.param_name(l, role)] = LowRank(U, torch.randn(8, width, generator=g))
    rows = torch.randn(6, 10, 8, generator=g) @ U.T
    b_side = CeilingMaterials(lm.decoder, WeightDiff(entries, {}), SteeredDiffs(rows, rows, rows))
    candidates = candidates_of("v7")
    bases = {c.name: [random_basis(D, 8, g) for _ in range(6)] for c in candidates}
    bases["write"] = [Basis(U)] * 6
    bases["churn"] = [empty(D, "planted hole") if l == 3 else random_basis(D, 8, g) for l in range(6)]
    targets = sweep.layer_targets(b_side, bases["layer_clean_resid_pca"])
    return candidates, bases, targets, sweep.per_layer(candidates, bases, targets)


def test_the_planted_candidate_wins_and_random_ones_score_one(planted):
    _, _, _, table = planted
    pct = S.with_percentages(S.summarise(table, LAYERS))
    assert words.leaders(pct, "joint_score", ("write", "mixed"))[0] == "write"
    best = pct.row(by_predicate=pl.col("subspace") == "write", named=True)
    assert best["mean_conc_act"] == pytest.approx(D / 8, rel=1e-5)
    assert best["mean_conc_w_combined"] == pytest.approx(D / 8, rel=1e-5)
    assert best["joint_score"] == pytest.approx(D / 8, rel=1e-5) and abs(best["act_w_gap_log2"]) < 1e-6
    assert best["mean_pct_oracle_combined"] == pytest.approx(1, rel=1e-5)
    rest = pct.filter((pl.col("kind") == "A-hypothesis") & ~pl.col("subspace").is_in(["write", "churn"]))
    assert rest["mean_conc_w_combined"].mean() == pytest.approx(1, abs=0.1)


def test_layers_without_w_are_nan_and_an_empty_basis_sorts_last(planted):
    _, _, _, table = planted
    outside = table.filter(~pl.col("layer").is_in(LAYERS))
    assert outside["conc_w_combined"].is_nan().all() and outside["cos_with_dW"].is_nan().all()
    summary = S.summarise(table, LAYERS)
    assert summary["subspace"][-1] == "churn" and math.isnan(summary["joint_score"][-1])
    hole = table.filter((pl.col("subspace") == "churn") & (pl.col("layer") == 3)).row(0, named=True)
    assert hole["rank"] == 0 and hole["conc_act"] == 0 and hole["note"] == "planted hole"
    with pytest.raises(ValueError, match="LORA_LAYERS \\[17\\] are not among the model's layers 0..5"):
        S.summarise(table, [17])


def test_a_layer_where_w_lacks_a_tensor_counts_for_nobody(planted):
    _, _, _, table = planted
    gone = pl.when(pl.col("layer") == 3).then(float("nan"))
    names = [c for c in table.columns if c.endswith(("_downproj", "_combined"))]
    holed = table.with_columns([gone.otherwise(pl.col(c)).alias(c) for c in names])
    summary = S.summarise(holed, LAYERS)
    only = table.filter(pl.col("layer") == 2)
    expected = only.filter(pl.col("subspace") == "attn_write")["conc_w_combined"][0]
    row = summary.row(by_predicate=pl.col("subspace") == "attn_write", named=True)
    assert row["mean_conc_w_combined"] == pytest.approx(expected)
    assert S.missing_layers(holed)["downproj"] == [0, 1, 3, 4, 5]


def test_missing_writers_are_logged_once(lm, caplog):
    name = lm.decoder.param_name(2, "o")
    w = WeightDiff({name: LowRank(torch.randn(D, 2), torch.randn(2, lm.decoder.weight(2, "o").shape[1]))}, {})
    zero = torch.zeros(6, 4, D)
    clean = [random_basis(D, 8, torch.Generator().manual_seed(1))] * 6
    with caplog.at_level("WARNING", logger="ws.explanation.rows"):
        sweep.layer_targets(CeilingMaterials(lm.decoder, w, SteeredDiffs(zero, zero, zero)), clean)
    assert len(caplog.records) == 1 and "layer 2: down_proj" in caplog.text


def test_self_checks_fail_on_a_broken_run(planted):
    _, _, _, table = planted
    assert sweep.self_checks(table, LAYERS)["ceiling_r_w"] > 0.5
    with pytest.raises(AssertionError, match="R_combined differs"):
        sweep.self_checks(table.with_columns(conc_w_combined=pl.col("conc_w_combined") * 1.01), LAYERS)
    low = pl.when(pl.col("subspace") == "dW_left_basis_ceiling").then(0.5).otherwise(pl.col("conc_w_combined"))
    with pytest.raises(AssertionError, match="explains no more than chance"):
        sweep.self_checks(table.with_columns(conc_w_combined=low), LAYERS)


def test_lora_layers_come_from_w_unless_given():
    w = WeightDiff({"model.layers.4.mlp.up_proj.weight": torch.ones(2, 2)}, {})
    assert sweep.lora_layers(w, 6) == [4] and sweep.lora_layers(w, 6, [4, 1]) == [1, 4]
    with pytest.raises(ValueError, match=r"the model has layers 0 to 5, asked for were \[6\]"):
        sweep.lora_layers(w, 6, [4, 6])
    with pytest.raises(ValueError, match=r"LORA_LAYERS \[1, 3\]: the weight diff touches none of them, but \[4\]"):
        sweep.lora_layers(w, 6, [3, 1])
    with pytest.raises(ValueError, match="names no layer"):
        sweep.lora_layers(WeightDiff({"lm_head.weight": torch.ones(2, 2)}, {}), 6)


def test_tables_are_written_whole_with_nan_and_read_back(planted, tmp_path):
    _, _, _, table = planted
    path = tables.write_table(table, tmp_path / "t.csv")
    assert ",NaN," in path.read_text() and list(tmp_path.iterdir()) == [path]
    back = tables.read_table(path)
    assert back.columns == table.columns and back["conc_act"].to_list() == table["conc_act"].to_list()
    with pytest.raises(ValueError, match="written as .csv or .tsv"):
        tables.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(FileNotFoundError, match="no such table"):
        tables.read_table(tmp_path / "absent.csv")


def test_null_check_agrees_with_the_closed_form(planted):
    _, _, targets, _ = planted
    by_name = {l: {"act": targets[l].act, **targets[l].weights} for l in LAYERS}
    null = sweep.null_check(by_name, 8, 300)
    assert set(null["target"]) == {"act", "oproj", "downproj", "combined"} and len(null) == 8
    assert null["mc_mean"].to_numpy() == pytest.approx(1, abs=0.15)
    assert null["sd_ratio"].to_numpy() == pytest.approx(1, abs=0.25)
    assert len(sweep.null_summary(null)) == 4


def facts(title: str, **more) -> dict:
    protocol = {"name": "v7", "eval_split": "half", "chat_probes": False, "persona_pairs": "1"} | more.pop(
        "protocol", {}
    )
    counts = {"n_layers": 6, "n_fit": 16, "n_eval": 16, "d": D, "n_train_topics": 20, "n_persona_pairs": 2}
    counts |= {"n_templates": 1, "nulls": []}
    return {"title": title, "behavior": "parity", "protocol": protocol, "layers": LAYERS, **counts, **more}


STEERS = steering([[3.0, 4.0, 5.0]], [-0.2, 0.1, 0.3])


def test_conclusion_takes_every_number_from_the_tables(planted):
    candidates, bases, _, table = planted
    pct = S.with_percentages(S.summarise(table, LAYERS))
    here = facts("planted")
    text = words.conclusion(pct, table, here, {"ceiling_r_w": 16.0}, STEERS)
    assert "**write** (W:write)" in text and "joint score among" in text and "16.00" in text
    assert "4 of 16 EVAL probes are topics that the adapters may have been trained on" in text
    assert "One of 2 persona pairs is used" in text
    assert "Undefined joint score, sorted last: churn" in text
    assert "not told apart from a random" not in text and "Winner" not in text
    assert "w moves the log-ratio" in text.lower() and "**not above" not in text
    faint = pct.with_columns(mean_z_act=pl.lit(3.0), mean_z_w_combined=pl.lit(1.9))
    assert "**On weights it is not told apart from a random subspace**" in words.conclusion(
        faint, table, here, {}, STEERS
    )
    shown = embedded(text).data
    assert "### Conclusion: planted\n" in shown and "\n#### Leader of this seed\n" in shown and "\n# " not in shown
    assert "lose their end" not in text and "3 texts are longer than MAX_LENGTH" in words.conclusion(
        pct, table, here | {"n_cut": 3}, {}, STEERS
    )
    sound = facts("planted", n_fit=20, n_eval=12, protocol={"name": "v7b", "eval_split": "held_out"})
    assert "may have been trained on" not in words.conclusion(pct, table, sound, {}, STEERS)
    rows = words.definitions([c.about for c in candidates]).strip().splitlines()
    assert len(rows) == 4 + 44 and "| dW_left_basis_ceiling | ceiling |" in rows[-1]
    assert "write" in words.top_table(pct, 3)


def test_no_winner_is_named_when_nothing_is_defined(planted):
    _, _, _, table = planted
    blank = table.with_columns(conc_w_combined=pl.lit(float("nan")))
    pct = S.with_percentages(S.summarise(blank, LAYERS))
    assert "None: no write or mixed candidate has a defined joint score" in words.conclusion(
        pct, table, facts("blank"), {}, STEERS
    )


def test_nobody_leads_where_w_does_not_steer(planted):
    """Two claims and a spread of .03 nats, or an effect inside what shuffled labels give: no leader is named."""
    _, _, _, table = planted
    pct = S.with_percentages(S.summarise(table, LAYERS))
    for still in (steering([[0.02, 0.04]], []), steering([[0.5, 0.7, 0.6]], [-0.5, 0.4, 0.6, -0.2, 0.1])):
        text = words.conclusion(pct, table, facts("still"), {}, still)
        assert not still.seen and "None is named: w is not seen to steer" in text and "**write**" not in text


def test_every_score_stands_beside_its_null_diffs(planted):
    """One null diff has no spread; of five, a score is above them where it exceeds their prediction interval."""
    candidates, bases, targets, table = planted
    rows = sweep.null_rows(candidates, bases, [{l: (t.act, t.weights["combined"]) for l, t in enumerate(targets)}] * 5)
    assert rows.columns == list(sweep.NULL_ROWS) and rows.height == 5 * 6 * 44
    with_null = sweep.with_null_diff(table, rows)
    kept = with_null.filter(pl.col("subspace") == "write", pl.col("layer") == LAYERS[0])
    assert kept["R_w_vs_null_diff"][0] == pytest.approx(1)
    faint = [0.2, 0.25, 0.3, 0.22, 0.28]
    scaled = rows.with_columns(pl.col("conc_act", "conc_w_combined") * pl.Series(faint).gather(rows["null"]))
    summary = S.against_nulls(S.summarise(with_null, LAYERS), S.null_summary(scaled, LAYERS), D)
    row = summary.row(by_predicate=pl.col("subspace") == "write", named=True)
    assert row["R_w_vs_null_diff"] == pytest.approx(1 / np.exp(np.log(faint).mean()))
    f = np.array(faint) * row["mean_conc_w_combined"] * 8 / D
    logits = np.log(f / (1 - f))
    end = logits.mean() + 2.7764 * logits.std(ddof=1) * np.sqrt(1.2)
    assert row["R_w_null_hi"] == pytest.approx(D / 8 / (1 + np.exp(-end)), rel=1e-3)
    pct = S.with_percentages(summary)
    text = words.conclusion(pct, with_null, facts("five", nulls=list("abcde")), {}, STEERS)
    assert (
        "on 5 null diffs (geometric mean)" in text
        and "lies above the null diffs' spread" in text
        and "has what such blind copies" in text
    )
    assert "on null" in words.top_table(pct, 3) and "% ceiling" not in words.top_table(pct, 3)
    one = S.against_nulls(S.summarise(with_null, LAYERS), S.null_summary(scaled.filter(null=0), LAYERS), D)
    text = words.conclusion(S.with_percentages(one), with_null, facts("one", nulls=["a"]), {}, STEERS)
    assert "One null diff has no spread: no score is shown to be above" in text


def test_kept_tensors_reproduce_the_table_and_tell_bases_apart(planted):
    candidates, bases, targets, table = planted
    kept = sweep.kept_tensors(candidates, bases, targets, 8, LAYERS)
    assert kept["weight_oracle/2"].shape == (D, 8) and kept["weight_oracle/0"].shape == (D, 0)
    assert kept["act_topics"].shape == (44, 6, 10) and kept[f"basis/write/{LAYERS[0]}"].shape == (D, 8)
    mean = kept["act_topics"].mean(dim=2)
    for i, c in enumerate(candidates):
        rows = table.filter(pl.col("subspace") == c.name).sort("layer")["conc_act"].to_list()
        assert mean[i].tolist() == pytest.approx(rows, rel=1e-9)
    assert {name for name in kept if name.startswith("basis/write/")} == {f"basis/write/{l}" for l in LAYERS}
    assert not any(
        name.startswith("basis/TaskDiff_lora") for name in kept
    )  # saw w: nobody asks what they would be blind
    beyond = kept[f"beyond_factor/{LAYERS[0]}"]
    assert (kept[f"clean/{LAYERS[0]}"].double().T @ beyond).abs().max() < 1e-6
