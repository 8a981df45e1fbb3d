"""Scores: the identities of docs/method.md section 11, the closed-form null against draws, planted answers."""

import math

import pytest
import torch

from ws.explanation import scores as sc
from ws.subspaces.algebra import Basis, empty, project_away, random_basis


def matrix(d: int, m: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(d, m, generator=g, dtype=torch.float64) * torch.logspace(0, -2, m, dtype=torch.float64)


def test_own_top_8_is_the_best_basis_of_rank_8_and_has_the_stated_score():
    d = 48
    M = matrix(d, 30)
    U, s, _ = torch.linalg.svd(M, full_matrices=False)
    t = sc.weight_targets(M, None)["oproj"]
    own = sc.score(t, U[:, :8]).conc
    assert own == pytest.approx(float(s[:8].square().sum() / s.square().sum()) * d / 8)
    assert d / len(s) <= own <= d / 8
    g = torch.Generator().manual_seed(1)
    for _ in range(200):
        near = torch.linalg.qr(U[:, :8] + 0.1 * torch.randn(d, 8, generator=g, dtype=torch.float64)).Q
        assert sc.score(t, near).conc <= own + 1e-9
    assert sc.oracle_fraction(t, U[:, :8]) == pytest.approx(1)
    assert torch.allclose(sc.oracle_basis(t, 8).abs(), U[:, :8].abs(), atol=1e-8)


def test_identity_basis_gives_one_and_complements_add_up():
    d = 24
    t = sc.activation_target(matrix(10, d))
    assert sc.score(t, torch.eye(d)).conc == pytest.approx(1)
    assert sc.score(t, torch.eye(d)).z == 0
    Q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    assert sc.energy(t, Q[:, :7]) + sc.energy(t, Q[:, 7:]) == pytest.approx(1)


def test_scores_do_not_see_scale_or_rotation_of_the_basis():
    d = 32
    M, B = matrix(d, 20), random_basis(d, 8, torch.Generator().manual_seed(2)).B
    a = sc.score(sc.weight_targets(M, None)["oproj"], B)
    b = sc.score(sc.weight_targets(1e-3 * M, None)["oproj"], B)
    O = torch.linalg.qr(torch.randn(8, 8)).Q
    c = sc.score(sc.weight_targets(M, None)["oproj"], B @ O)
    assert a.conc == pytest.approx(b.conc, rel=1e-5) and a.conc == pytest.approx(c.conc, rel=1e-5)
    assert a.z == pytest.approx(b.z, rel=1e-5)


def test_combined_is_the_mean_of_both_however_unequal():
    d = 32
    F_o, F_d = 1e3 * matrix(d, 10, 3), 1e-3 * matrix(d, 14, 4)
    t = sc.weight_targets(F_o, F_d)
    B = random_basis(d, 8, torch.Generator().manual_seed(5)).B
    both = [sc.score(t[n], B).conc for n in ("oproj", "downproj")]
    assert sc.score(t["combined"], B).conc == pytest.approx(sum(both) / 2, rel=1e-6)


def test_missing_tensor_empty_basis_and_zero_difference():
    d = 16
    t = sc.weight_targets(matrix(d, 4), None)
    B = torch.eye(d)[:, :8]
    assert t["downproj"] is None and t["combined"] is None
    assert math.isnan(sc.score(t["downproj"], B).conc) and math.isnan(sc.score(t["oproj"], B[:, :0]).z)
    silent = sc.activation_target(torch.zeros(5, d))
    assert sc.score(silent, B, sc.ZERO) == sc.Score(0.0, 0.0, 0.0)
    assert sc.score(sc.activation_target(matrix(5, d)), B[:, :0], sc.ZERO) == sc.ZERO


@pytest.mark.parametrize("r", [1, 8, 16])
def test_closed_form_null_equals_random_subspaces(r):
    t = sc.activation_target(matrix(12, 40, 6))
    draws = sc.monte_carlo_null(t, r, 4000, "null", 0)
    assert float(draws.mean()) == pytest.approx(1, abs=4 * sc.null_sd(t, r) / math.sqrt(4000))
    assert float(draws.std()) == pytest.approx(sc.null_sd(t, r), rel=0.06)


def test_monte_carlo_seed_is_stable_and_depends_on_the_label():
    t = sc.activation_target(matrix(6, 20, 7))
    a, b = sc.monte_carlo_null(t, 4, 5, "x"), sc.monte_carlo_null(t, 4, 5, "x")
    assert torch.equal(a, b)
    assert not torch.equal(a, sc.monte_carlo_null(t, 4, 5, "y"))


def test_planted_subspace_scores_d_over_r_and_topics_average_to_the_score():
    d, r = 60, 6
    B = random_basis(d, r, torch.Generator().manual_seed(8)).B.double()
    X = torch.randn(9, r, dtype=torch.float64) @ B.T
    t = sc.activation_target(X)
    assert sc.score(t, B).conc == pytest.approx(d / r, rel=1e-6)
    other = random_basis(d, 8, torch.Generator().manual_seed(9)).B
    terms = sc.topic_terms(t, other)
    assert terms.shape == (9,)
    assert float(terms.mean()) == pytest.approx(sc.score(t, other).conc)


def test_activation_oracle_is_undefined_for_as_many_directions_as_rows():
    t = sc.activation_target(matrix(6, 30))
    B = random_basis(30, 6, torch.Generator().manual_seed(0)).B
    assert math.isnan(sc.oracle_fraction(t, B, rows=True))
    assert 0 < sc.oracle_fraction(t, B[:, :5], rows=True) < 1


def test_span_score_is_one_for_a_random_part_of_the_span_on_average():
    d, q = 64, 16
    g = torch.Generator().manual_seed(10)
    L = torch.linalg.qr(torch.randn(d, q, generator=g, dtype=torch.float64)).Q
    t = sc.target(L * torch.linspace(1, 0.3, q, dtype=torch.float64))
    values = []
    for _ in range(400):
        inside = torch.linalg.qr(torch.randn(q, 4, generator=g, dtype=torch.float64)).Q
        values.append(sc.span_score(t, L @ inside) / t.trace)
    assert sum(values) / len(values) == pytest.approx(1, abs=0.03)
    assert math.isnan(sc.span_score(sc.target(torch.eye(8)), torch.eye(8)[:, :2]))


def test_specificity_ignores_what_the_clean_basis_explains():
    d = 40
    C = random_basis(d, 8, torch.Generator().manual_seed(11))
    X = torch.randn(10, 8, dtype=torch.float64) @ C.B.double().T
    X[:, 0] += 1.0
    t = sc.without(X, C)
    assert t.dim == d - 8
    assert sc.specific(t, C, C) == (sc.ZERO, 0)
    extra = torch.zeros(d, 1)
    extra[0] = 1.0
    score, rank = sc.specific(t, Basis(extra), C)
    assert rank == 1
    assert score.conc == pytest.approx(d - 8, rel=1e-6)


def test_rows_that_nearly_vanish_do_not_move_z():
    """Half the rows carry nothing (1e-9 of the others): R is per row as defined, z is that of the rows that are left."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(6, 40, generator=g, dtype=torch.float64)
    B = random_basis(40, 4, g).B
    whole, half = sc.activation_target(X), sc.activation_target(torch.cat([X, 1e-9 * X]))
    assert half.trace == pytest.approx(0.5, abs=1e-3)
    assert sc.score(half, B).conc == pytest.approx(sc.score(whole, B).conc / 2, rel=1e-3)
    assert sc.score(half, B).z == pytest.approx(sc.score(whole, B).z, rel=1e-3)


def test_a_massive_coordinate_is_found_and_what_is_left_is_scored_without_it():
    d = 24
    X = matrix(10, d).clone()
    X[:, 5] += 50.0
    t = sc.activation_target(X)
    largest, share = sc.largest_coordinates(t, 1)
    assert largest.B[5, 0] == 1 and share > 0.9
    assert share == pytest.approx(sc.score(t, largest.B).energy_frac)
    axis = Basis(torch.eye(d)[:, 5:6])  # it scores by that coordinate alone
    assert sc.score(t, axis.B).conc > 0.9 * d
    rest = sc.without(X, largest)
    assert sc.specific(rest, axis, largest)[0].conc == 0
    other = Basis(torch.linalg.svd(X[:, [i for i in range(d) if i != 5]], full_matrices=False)[2][:2].T.float())
    B = torch.zeros(d, 2)
    B[[i for i in range(d) if i != 5]] = other.B
    right = sc.score(sc.activation_target(X[:, [i for i in range(d) if i != 5]]), other.B).conc
    assert sc.specific(rest, Basis(B), largest)[0].conc == pytest.approx(right, rel=1e-5)


def test_many_bases_hold_what_each_of_them_holds():
    t = sc.activation_target(matrix(7, 30))
    g = torch.Generator().manual_seed(3)
    bases = [random_basis(30, r, g) if r else empty(30, "nothing") for r in (4, 0, 1, 9)]
    assert sc.shares(bases, t) == pytest.approx([sc.energy(t, b.B) for b in bases])
    for basis, f in zip(bases, sc.shares(bases, t), strict=True):
        assert vars(sc.score(t, basis, sc.ZERO, f)) == pytest.approx(vars(sc.score(t, basis, sc.ZERO)))
    for basis, f, inside in zip(bases, sc.shares(bases, t), sc.shares(bases, t.span), strict=True):
        alone = sc.span_score(t, basis.B)
        assert sc.span_score(t, basis.B, f, inside) == pytest.approx(alone, nan_ok=True)
        assert math.isnan(alone) == (basis.rank == 0)


@pytest.mark.parametrize("near", [1.0, 0.05, 5e-3, 1e-4, 3e-6])
def test_specificity_of_columns_that_are_nearly_held_is_that_of_the_projected_basis(near):
    """From columns that stand out to those that are dropped: score and rank as by `project_away`."""
    d, g = 40, torch.Generator().manual_seed(12)
    Q = torch.linalg.qr(torch.randn(d, 14, generator=g, dtype=torch.float64)).Q
    C, tilted = Basis(Q[:, :6].float()), Q[:, 6:12].clone()
    tilted[:, 2] = (1 - near**2) ** 0.5 * Q[:, 1] + near * Q[:, 12]
    basis, t = Basis(tilted.float()), sc.without(torch.randn(9, d, generator=g), C)
    left = project_away(basis, C)
    score, rank = sc.specific(t, basis, C)
    assert rank == left.rank == (6 if near > 1e-5 else 5)
    assert vars(score) == pytest.approx(vars(sc.score(t, left)), rel=2e-5, abs=1e-6)
