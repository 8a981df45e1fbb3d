"""The v7 sweep against the reference numbers, on the project's copy of them. (tests/data/parity/README.md)"""

import numpy as np
import polars as pl
import pytest

from ws.data import load_behavior
from ws.explanation.explain import explain
from ws.explanation.rows import self_checks
from ws.explanation.summary import summarise, summarise_specific, with_percentages
from ws.model.lm import load_lm
from ws.show.tables import read_table
from ws.subspaces.build import candidates
from ws.subspaces.kept import make_shelf
from ws.subspaces.protocol import load_protocol

LAYERS = [2, 3, 4]
ILL_CONDITIONED = {"chars_clusters", "qk_x_chars_clusters", "attention_sink", "rotation_contrast"}


@pytest.fixture(scope="module")
def swept(parity_folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    lm = load_lm(str(parity_folder / "model"), "float32", "cpu")
    behavior, protocol = load_behavior(parity_folder / "behavior.json"), load_protocol("v7")
    found = explain(lm, parity_folder / "w.pt", behavior, protocol=protocol, cache=cache, progress=False)
    a_side = [c for c in candidates(protocol) if c.kind != "ceiling"]
    bases = make_shelf(lm, behavior, protocol, cache=cache).bases(a_side, progress=False)
    return {"found": found, "table": found.per_layer, "specific": found.specific_per_layer, "bases": bases}


def reference(parity_folder, name: str) -> pl.DataFrame:
    return read_table(parity_folder / "v7" / name)


def well_defined() -> pl.Expr:
    churn = (pl.col("subspace") == "churn") & (pl.col("layer") == 5)
    return ~pl.col("subspace").is_in(ILL_CONDITIONED) & ~churn


def assert_close(mine: pl.DataFrame, ref: pl.DataFrame, keys: list[str], columns: list[str], rtol: float = 1e-3):
    joined = ref.join(mine, on=keys, suffix="_mine", how="left")
    assert len(joined) == len(ref) > 0
    for column in columns:
        expected = joined[column].cast(pl.Float64).to_numpy()
        got = joined[f"{column}_mine"].cast(pl.Float64).to_numpy()
        assert (np.isnan(expected) == np.isnan(got)).all(), column
        error = np.abs(got - expected) / np.maximum(np.abs(expected), 1.0)
        worst = int(np.nanargmax(error))
        where = joined.row(worst)[:2]
        assert np.nanmax(error) <= rtol, f"{column} at {where}: {got[worst]} for {expected[worst]}"


def test_42_candidates_and_2_ceilings(swept):
    kinds = swept["table"].filter(pl.col("layer") == 0)["kind"].value_counts()
    assert dict(kinds.rows()) == {"A-hypothesis": 42, "ceiling": 2}


def test_leading_columns_and_labels(swept, parity_folder):
    ref = reference(parity_folder, "v7_per_layer.csv")
    assert swept["table"].columns[: len(ref.columns)] == ref.columns
    labels = ["subspace", "family", "axis_kind", "source", "kind"]
    assert set(swept["table"].select(labels).rows()) == set(ref.select(labels).rows())


def test_every_score_of_every_well_defined_candidate(swept, parity_folder):
    ref = reference(parity_folder, "v7_per_layer.csv").filter(well_defined())
    columns = [c for c in ref.columns if c.startswith(("conc_", "energy_frac_", "cos_"))] + ["rank"]
    assert len(columns) == 10
    assert_close(swept["table"], ref, ["layer", "subspace"], columns)


def test_ranks_of_ill_conditioned_candidates_and_that_they_are_flagged(swept, parity_folder):
    ref = reference(parity_folder, "v7_per_layer.csv").filter(~well_defined())
    assert_close(swept["table"], ref, ["layer", "subspace"], ["rank"])
    doubtful = swept["table"].filter(pl.col("ill_conditioned") & pl.col("layer").is_in(LAYERS))["subspace"].unique()
    assert set(doubtful) == ILL_CONDITIONED


def test_what_an_ill_conditioned_candidate_explains_is_at_least_its_well_defined_part(swept, parity_folder):
    from ws.subspaces.algebra import cut_at_rank

    bases = swept["bases"]
    for name in ("chars_clusters", "attention_sink"):
        for l in LAYERS:
            part = cut_at_rank(bases[name][l])
            assert part.rank == bases[name][l].rank - 1
            # the determined directions lie inside the full basis, so their energy is a lower bound
            inside = bases[name][l].B.T @ part.B
            assert float(inside.square().sum()) == pytest.approx(part.rank, abs=1e-4)


def test_closed_form_z_agrees_with_the_monte_carlo_one(swept, parity_folder):
    ref = reference(parity_folder, "v7_per_layer.csv").filter(well_defined())
    joined = ref.join(swept["table"], on=["layer", "subspace"], suffix="_mine")
    cells = 0
    for column in ("z_act", "z_w_oproj", "z_w_downproj", "z_w_combined"):
        part = joined.filter(pl.col(column).is_not_nan() & (pl.col(column) != 0))
        mine, theirs = part[f"{column}_mine"].to_numpy(), part[column].to_numpy()
        assert (np.abs(mine - theirs) <= 0.3 + 0.2 * np.abs(mine)).all(), column
        cells += len(part)
    assert cells > 500


def test_specificity(swept, parity_folder):
    ref = reference(parity_folder, "v7_specific_per_layer.csv").filter(well_defined())
    columns = ["specific_conc_act", "specific_energy_frac_act", "specific_rank"]
    assert_close(swept["specific"], ref, ["layer", "subspace"], columns)
    beyond = summarise_specific(swept["specific"], LAYERS)
    ref = reference(parity_folder, "v7_specific_summary.tsv").filter(~pl.col("subspace").is_in(ILL_CONDITIONED))
    assert_close(beyond, ref, ["subspace", "family"], ["mean_specific_conc_act", "mean_specific_rank"])


def test_summary_percentages_and_order(swept, parity_folder):
    pct = with_percentages(summarise(swept["table"], LAYERS))
    ref = reference(parity_folder, "v7_summary_pct.tsv")
    sure = ~pl.col("subspace").is_in(ILL_CONDITIONED)
    columns = [c for c in ref.columns if c.startswith(("mean_conc", "mean_energy", "mean_cos", "mean_rank", "pct_"))]
    columns += ["joint_score", "act_w_gap_log2"]
    assert_close(pct, ref.filter(sure), ["subspace", "family"], columns)
    assert pct.columns[: len(ref.columns) - 4] == ref.columns[:-4]
    assert pct.filter(sure)["subspace"].to_list() == ref.filter(sure)["subspace"].to_list()


def test_self_checks_hold_and_are_reported(swept):
    checks = self_checks(swept["table"], LAYERS)
    assert checks["ceiling_r_w"] > 10
    assert checks["combined_minus_mean"] < 1e-6
    assert swept["found"].checks["orthonormality"] < 1e-5 and swept["found"].checks["ceiling_r_w"] > 10
