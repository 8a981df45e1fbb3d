"""Monte-Carlo p of R_w > 1: the null has its known moments, lucky bases are not significant, planted ones are."""

import numpy as np
import pytest
import torch

from ws.stability.scores import make_scores
from ws.stability.significance import (
    benjamini_hochberg,
    combined_factor,
    monte_carlo_p,
    null_statistics,
    random_log_concentration,
    significance_table,
)


def left_factor(M) -> torch.Tensor:
    """F with `F F^T = M M^T`."""
    M = M[0] @ M[1] if isinstance(M, tuple) else M
    U, s, _ = torch.linalg.svd(M.double(), full_matrices=False)
    return U * s


def residual_diffs(d, S, L, rank, seed, shared=0.8, planted=None):
    """Weight differences [seed][layer] -> (w_o, w_down), factors (B, A): a part common to seeds plus each one's own."""
    g = torch.Generator().manual_seed(seed)

    def one(columns):
        B = torch.randn(d, rank, generator=g) / torch.arange(1, rank + 1)
        return B if planted is None else B + 3 * planted @ torch.randn(planted.shape[1], rank, generator=g) / columns

    common = [[(one(1), torch.randn(rank, 2 * d, generator=g)) for _ in range(2)] for _ in range(L)]
    own = (1 - shared**2) ** 0.5
    return [
        [[(shared * B + own * torch.randn(B.shape, generator=g) * B.std(), A) for B, A in layer] for layer in common]
        for _ in range(S)
    ]


def factors_of(diffs):
    return [[combined_factor([left_factor(M) for M in layer], "layer") for layer in seed] for seed in diffs]


def concentration(B, diffs):
    """R_w (S, L) of a basis by the definition: dense, both tensors normalised."""
    d, r = B.shape
    out = [
        [
            np.mean([float((B.T @ Bm @ Am).square().sum() / (Bm @ Am).square().sum()) for Bm, Am in layer])
            for layer in seed
        ]
        for seed in diffs
    ]
    return np.array(out) * d / r


@pytest.mark.parametrize("d, r, rank", [(96, 8, 12), (40, 16, 4), (24, 20, 6)])
def test_null_has_mean_one_and_the_closed_form_sd(d, r, rank):
    """`Var f = 2 r (d-r) / (d^2 (d-1)(d+2)) (d tr(G^2)/tr(G)^2 - 1)` for one seed and one layer (method section 6)."""
    factors = factors_of(residual_diffs(d, 1, 1, rank, seed=0))
    R = random_log_concentration(factors, [r], 20_000, seed=1)[:, 0, 0].exp().numpy()
    F = factors[0][0].F.double()
    spread = float((F.T @ F).square().sum())
    sd = np.sqrt(2 * r * (d - r) / (d**2 * (d - 1) * (d + 2)) * (d * spread - 1)) * d / r
    assert R.mean() == pytest.approx(1, abs=4 * sd / np.sqrt(len(R)) + 1e-6)
    assert R.std() == pytest.approx(sd, rel=0.03)


def test_nested_columns_are_random_bases_of_every_rank_and_agree_with_plain_qr():
    d = 30
    diffs = residual_diffs(d, 2, 1, 5, seed=3)
    draws = random_log_concentration(factors_of(diffs), [2, 7], 6000, seed=0)
    g = torch.Generator().manual_seed(5)
    for j, r in enumerate((2, 7)):
        plain = [
            np.log(concentration(torch.linalg.qr(torch.randn(d, r, generator=g)).Q, diffs)).mean() for _ in range(1500)
        ]
        assert draws[:, 0, j].mean().item() == pytest.approx(np.mean(plain), abs=5 * np.std(plain) / np.sqrt(1500))
        assert draws[:, 0, j].std().item() == pytest.approx(np.std(plain), rel=0.08)


def test_truncating_the_tail_changes_the_null_by_less_than_it_promises():
    diffs = residual_diffs(64, 2, 1, 16, seed=1)
    exact = [[combined_factor([left_factor(M) for M in layer], "x", tail=0.0) for layer in seed] for seed in diffs]
    short = [[combined_factor([left_factor(M) for M in layer], "x", tail=0.02) for layer in seed] for seed in diffs]
    assert short[0][0].F.shape[1] < exact[0][0].F.shape[1] and short[0][0].rest > 0
    a, b = (random_log_concentration(f, [8], 4000, seed=0).exp().std().item() for f in (exact, short))
    assert b == pytest.approx(a, rel=0.01) and b != a


def test_one_basis_for_all_layers_is_wider_where_layers_share_the_weights():
    """Repeating the basis adds no averaging over layers; independent bases per layer shrink the sd by sqrt(L)."""
    diffs = residual_diffs(48, 2, 1, 6, seed=2)
    factors = [seed * 4 for seed in factors_of(diffs)]  # four layers with the same difference
    draws = random_log_concentration(factors, [8], 4000, seed=0)
    single = draws[:, 0, 0].std().item()
    together, apart = (null_statistics(draws, [8], [8] * 4, one).std() for one in (True, False))
    assert together == pytest.approx(single, rel=1e-3) and apart == pytest.approx(single / 2, rel=0.04)


def test_benjamini_hochberg_by_hand():
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005, 0.8])
    # sorted .005 .01 .03 .04 .8, times 5/i: .025 .025 .05 .05 .8
    np.testing.assert_allclose(benjamini_hochberg(p), [0.025, 0.05, np.nan, 0.05, 0.025, 0.8])
    assert np.isnan(benjamini_hochberg(np.full(3, np.nan))).all()
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.9, 0.95])), [0.95, 0.95])


def test_p_counts_ties_and_cannot_be_zero():
    null = np.array([0.0, 1.0, 1.0, 2.0])
    assert monte_carlo_p(1.0, null) == pytest.approx(4 / 5)
    assert monte_carlo_p(5.0, null) == pytest.approx(1 / 5)
    assert np.isnan(monte_carlo_p(float("nan"), null))


def test_random_bases_get_uniform_p_and_the_planted_one_the_smallest():
    """Bases repeated over seeds that share most of w: p stays uniform although every seed repeats the luck."""
    d, r, S, L = 48, 4, 3, 2
    g = torch.Generator().manual_seed(0)
    planted = torch.linalg.qr(torch.randn(d, r, generator=g)).Q
    noise = residual_diffs(d, S, L, 6, seed=4)
    bases = [[torch.linalg.qr(torch.randn(d, r, generator=g)).Q for _ in range(L)] for _ in range(300)]
    for one in (False, True):
        w = np.stack(
            [
                np.stack(
                    [concentration(B[0 if one else layer], [[s[layer]] for s in noise])[:, 0] for layer in range(L)],
                    axis=1,
                )
                for B in bases
            ],
            axis=1,
        )
        names = [f"random{i}" for i in range(300)]
        scores = make_scores(names, range(S), np.ones((S, 300, L, 1)), w, np.full((300, L), float(r)), d)
        table = significance_table(scores, factors_of(noise), np.full(300, one), seed=1, n_draws=10_000)
        p = np.sort(table["p_R_w"].to_numpy())
        gap = np.abs(p - (np.arange(300) + 0.5) / 300).max()
        assert gap < 1.63 / np.sqrt(300) + 1 / 600  # Kolmogorov-Smirnov, 1 %
        assert (table["q_R_w"] < 0.05).sum() == 0
    signal = residual_diffs(d, S, L, 6, seed=4, planted=planted)
    w = np.stack([concentration(planted, signal), concentration(bases[0][0], signal)], axis=1)
    scores = make_scores(["planted", "random"], range(S), np.ones((S, 2, L, 1)), w, np.full((2, L), float(r)), d)
    table = significance_table(scores, factors_of(signal), np.array([True, True]), seed=1, n_draws=10_000)
    assert table["p_R_w"][0] == pytest.approx(1 / 10_001) and table["p_R_w"][1] > 0.01


def test_table_skips_ceilings_and_undefined_and_repeats_itself():
    d, S, L = 32, 2, 3
    diffs = residual_diffs(d, S, L, 4, seed=0)
    w = np.random.default_rng(0).uniform(0.5, 2, (S, 4, L))
    w[0, 1, 1] = np.nan
    ranks = np.array([[4.0, 8, 4]] * 4)
    kinds = ["A-hypothesis", "A-hypothesis", "ceiling", "control"]
    scores = make_scores(list("abcd"), [0, 1], np.ones((S, 4, L, 2)), w, ranks, d, kinds=kinds)
    tables = [significance_table(scores, factors_of(diffs), np.zeros(4, bool), seed=2, n_draws=500) for _ in range(2)]
    assert tables[0].equals(tables[1], null_equal=True)
    p, q = tables[0]["p_R_w"].to_numpy(), tables[0]["q_R_w"].to_numpy()
    assert np.isnan(p[[1, 2]]).all() and not np.isnan(p[[0, 3]]).any()
    assert q[0] == pytest.approx(p[0]) and np.isnan(q[3])
    with pytest.raises(ValueError, match="factors: 1 seeds"):
        significance_table(scores, factors_of(diffs)[:1], np.zeros(4, bool), seed=2, n_draws=500)
    with pytest.raises(ValueError, match="N_NULL = 0"):
        significance_table(scores, factors_of(diffs), np.zeros(4, bool), seed=2, n_draws=0)
