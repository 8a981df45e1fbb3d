"""p-values, adjustments and chance levels by hand."""

import numpy as np
import pytest

from ws.stability import chance
from ws.stability.scores import make_scores
from ws.stability.significance import (
    benjamini_hochberg,
    blind_p,
    blind_values,
    discoveries,
    max_t_p,
    own_p,
    significance_table,
)


def blind_of(rng, N, S, C, common=0.3):
    """Copies whose candidates and seeds hang together: raw scores as `blind_scores` gives them."""
    raw = {}
    for name in ("R_w", "R_act", "H_w", "H_act", "specific"):
        luck = common * rng.standard_normal((N, 1, C)) + 0.2 * rng.standard_normal((N, 1, 1))
        raw[name] = np.exp(luck + 0.05 * rng.standard_normal((N, S, C)))
    return blind_values(raw)


def scores_of(values, S, **more):
    """A table with R_w = R_act = values on every seed, up to a little noise."""
    rng, C = np.random.default_rng(1), len(values)
    noise = np.exp(0.02 * rng.standard_normal((S, C, 1)))
    w = np.asarray(values)[None, :, None] * noise
    names = [f"c{i}" for i in range(C)]
    return make_scores(names, range(S), w[..., None], w, np.full((C, 1), 8.0), 64, specific=w, **more)


def test_benjamini_hochberg_by_hand():
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005, 0.8])
    # sorted .005 .01 .03 .04 .8, times 5/i: .025 .025 .05 .05 .8
    np.testing.assert_allclose(benjamini_hochberg(p), [0.025, 0.05, np.nan, 0.05, 0.025, 0.8])
    assert np.isnan(benjamini_hochberg(np.full(3, np.nan))).all()
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.9, 0.95])), [0.95, 0.95])


def test_discoveries_are_those_of_the_adjusted_p():
    rows = np.random.default_rng(0).beta(0.5, 2, (200, 9))
    want = [(benjamini_hochberg(row) <= 0.05).sum() for row in rows]
    assert discoveries(rows, 0.05).tolist() == want and 0 < max(want) and min(want) == 0


def test_p_counts_ties_and_cannot_be_zero():
    null = np.array([[0.0], [1.0], [1.0], [2.0]])
    assert blind_p(np.array([1.0]), null)[0] == pytest.approx(4 / 5)
    assert blind_p(np.array([5.0]), null)[0] == pytest.approx(1 / 5)
    assert blind_p(np.array([-np.inf]), null)[0] == 1 and np.isnan(blind_p(np.array([np.nan]), null)[0])
    assert own_p(null[:, [0]])[:, 0].tolist() == [1.0, 0.75, 0.5, 0.25]


def test_max_t_asks_for_the_best_of_all():
    rng = np.random.default_rng(0)
    null = rng.standard_normal((4000, 20)) * np.arange(1, 21)
    seen = np.r_[3.4, np.zeros(19)]
    assert max_t_p(seen, null)[0] == pytest.approx(1 - 0.99966**20, abs=0.006)  # independent: Sidak
    assert max_t_p(np.r_[np.nan, seen[1:]], null)[1] > 0.9 and np.isnan(max_t_p(np.r_[np.nan, seen[1:]], null)[0])
    same = np.repeat(rng.standard_normal((4000, 1)), 20, axis=1)
    assert max_t_p(np.r_[1.645, np.zeros(19)], same)[0] == pytest.approx(0.05, abs=0.012)  # one test, twenty times


def test_the_table_tests_what_is_blind_and_leaves_out_the_rest():
    S, N = 3, 2000
    values = np.array([6.0, 1.0, 5.0, 5.0, np.nan, 1.0])
    kinds = ["A-hypothesis", "A-hypothesis", "ceiling", "control", "A-hypothesis", "A-hypothesis"]
    scores = scores_of(values, S, kinds=kinds)
    blind = blind_of(np.random.default_rng(0), N, S, int(scores.tested.sum()))
    table = significance_table(scores, blind)
    p, q = table["p_R_w"].to_numpy(), table["q_R_w"].to_numpy()
    assert p[0] == pytest.approx(1 / (N + 1)) and p[3] == pytest.approx(1 / (N + 1)) and 0.2 < p[1] < 0.8
    assert np.isnan(p[[2, 4]]).all() and np.isnan(q[[2, 3, 4]]).all() and q[0] == pytest.approx(3 / (N + 1))
    assert table["p_max_joint"][0] <= 0.01 < table["p_max_joint"][1] and table["n_blind"][0] == N
    assert table["R_w_blind_q95"][0] == pytest.approx(np.exp(1.645 * np.hypot(0.36, 0.03)), rel=0.06)
    assert {f"{a}_{b}" for a in ("p", "q", "p_max") for b in ("R_w", "R_act", "joint", "specific")} <= set(
        table.columns
    )


def test_counts_by_hand():
    logs = np.array(
        [[[1.0, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]], [[1.0, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1]]]
    )
    assert chance.pair_tau(logs) == pytest.approx([1, -1]) and chance.pair_rho(logs) == pytest.approx([1, -1])
    assert chance.pair_top(logs).tolist() == [5, 3] and chance.top_on_all(logs).tolist() == [5, 3]
    sides = np.array([[[1.0, -1.0, 1.0], [2.0, -3.0, -1.0], [1.5, -2.0, 1.0]]])
    assert chance.one_side(sides).tolist() == [2] and chance.t_above(sides).tolist() == [1]
    assert np.isnan(chance.pair_tau(logs[:, :1])).all()


def test_chance_levels_are_those_of_copies_that_hang_together():
    """Seeds share the luck of a copy: tau and signs agree by chance, and the table says by how much."""
    S, C = 3, 12
    scores = scores_of(np.full(C, 1.3), S)
    blind = blind_of(np.random.default_rng(0), 1500, S, C)
    table = chance.chance_table(scores, blind)
    tau = table.filter(what="Kendall's tau between seeds", score="R_w").row(0, named=True)
    assert tau["blind_mean"] == pytest.approx(chance.pair_tau(np.log(blind["R_w"][:1000])).mean())
    assert 0.8 < tau["blind_mean"] < 0.95 and tau["blind_lo"] < tau["blind_mean"] < tau["blind_hi"]
    sides = table.filter(what="Candidates on one side of 1 on every seed", score="R_act").row(0, named=True)
    assert sides["observed"] == 12 and 9 < sides["blind_mean"] < 12 and sides["candidates"] == 12
    raw = table.filter(what="Uncorrected p <= 0.05", score="R_w").row(0, named=True)
    assert raw["blind_mean"] == pytest.approx(12 * 0.05, abs=0.05)
    found = table.filter(what="Found at a false discovery rate of 0.05", score="R_w").row(0, named=True)
    assert 0.01 < found["blind_mean"] < 0.3
    top = chance.top_chance(scores, blind)
    assert top.sum() == pytest.approx(5 * S) and (top < S).all()


def test_one_seed_has_no_agreement_to_report():
    table = chance.chance_table(scores_of(np.full(8, 1.3), 1), blind_of(np.random.default_rng(0), 200, 1, 8))
    row = table.filter(what="Kendall's tau between seeds", score="joint").row(0, named=True)
    assert np.isnan(row["observed"]) and np.isnan(row["p"])
