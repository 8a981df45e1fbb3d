"""Bases: planted subspaces come back, identities hold, doubts are flagged."""

import math

import pytest
import torch
from torch import Tensor

from ws.subspaces import algebra as S
from ws.subspaces.check import check_basis
from ws.subspaces.eigen import eigenpairs, spectral_norm


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(d: int, m: int, values: list[float], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix with known singular vectors U (d, k), V (m, k) and values."""
    g = generator(seed)
    U = torch.linalg.qr(torch.randn(d, len(values), generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(m, len(values), generator=g, dtype=torch.float64)).Q
    return (U * torch.tensor(values, dtype=torch.float64)) @ V.T, U, V


def same_span(A: Tensor, B: Tensor) -> float:
    """Largest sine of the principal angles."""
    A, B = A.double(), B.double()
    return float(torch.linalg.matrix_norm(A - B @ (B.T @ A), ord=2))


def test_types_and_shapes_are_checked_in_every_test():
    """What tests/checked.py is for: of each argument, between arguments, and of what is returned."""
    with pytest.raises(TypeError, match="random_basis"):
        S.random_basis("8", 2, generator())
    for other in (torch.eye(4), torch.zeros(3), torch.eye(3, dtype=torch.int64)):
        with pytest.raises(TypeError, match="overlap"):
            S.overlap(torch.eye(3), other)


@pytest.mark.parametrize(("d", "m"), [(40, 300), (300, 40), (150, 400), (400, 150), (130, 130)])
def test_left_and_right_svd_find_planted_vectors_by_every_route(d, m):
    values = [9.0, 7, 5, 4, 3, 2.5, 2, 1.5, 0.5, 0.2]
    M, U, V = planted(d, m, values)
    M = M.float()
    left, right = S.left_svd(M, 8), S.left_svd(M.T, 8)
    assert same_span(left.B, U[:, :8]) < 1e-4
    assert same_span(right.B, V[:, :8]) < 1e-4
    assert torch.allclose(left.s.double(), torch.tensor(values[:8], dtype=torch.float64), rtol=1e-4)
    assert left.gap == pytest.approx(1 - 0.5 / 1.5, rel=1e-3)
    assert not left.ill_conditioned and not right.ill_conditioned


def test_left_svd_equals_full_float32_svd_on_a_random_wide_matrix():
    M = torch.randn(160, 900, generator=generator(1))
    U = torch.linalg.svd(M, full_matrices=False)[0][:, :8]
    assert same_span(S.left_svd(M, 8).B, U) < 1e-3


@pytest.mark.parametrize("shape", [(200, 120), (120, 200), (60, 30)])
def test_beyond_the_rank_directions_are_orthonormal_and_flagged(shape):
    M, U, _ = planted(*shape, [3.0, 2.0, 1.0])
    basis = S.left_svd(M, 8)
    check_basis(basis, shape[0], "planted")
    assert basis.rank == 8 and basis.ill_conditioned
    assert "rank 3" in basis.note
    assert same_span(U, basis.B) < 1e-5
    cut = S.cut_at_rank(basis)
    assert cut.rank == 3 and not cut.ill_conditioned and same_span(U, cut.B) < 1e-5


def test_pca_centres_and_uncentred_keeps_the_mean():
    g = generator(2)
    mean = torch.zeros(50)
    mean[0] = 100.0
    X = mean + torch.randn(30, 50, generator=g)
    assert float(S.pca(X, 8).B[0].norm()) < 0.9
    assert float(S.uncentred(X, 1).B[0].abs()) > 0.99
    shifted = S.pca(X + 1000 * torch.randn(50, generator=g), 8)
    assert same_span(S.pca(X, 8).B, shifted.B) < 1e-3


def test_pca_sizes():
    assert S.pca(torch.randn(1, 20), 8).rank == 0
    assert S.pca(torch.randn(0, 20), 8).rank == 0
    assert S.pca(torch.randn(5, 20), 8).rank == 5
    zero = S.pca(torch.zeros(12, 20), 8)
    check_basis(zero, 20, "zeros")
    assert zero.rank == 8 and zero.ill_conditioned
    assert S.uncentred(torch.zeros(4, 20), 8).rank == 0


def test_the_bottom_of_a_gram_finds_the_least_amplified_directions():
    values = [float(v) for v in range(10, 0, -1)]
    M, U, _ = planted(10, 64, values)
    assert same_span(S.gram_basis(M @ M.T, 3, bottom=True).B, U[:, 7:]) < 1e-5
    big, U, _ = planted(120, 200, [float(v) for v in range(120, 0, -1)])
    basis = S.gram_basis(big @ big.T, 8, bottom=True)
    assert same_span(basis.B, U[:, 112:]) < 1e-4
    assert basis.s.tolist() == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8], rel=1e-3)
    assert basis.gap == pytest.approx(1 / 9, rel=1e-2)


def test_a_tie_at_the_cut_is_flagged():
    G = torch.diag(torch.tensor([4.0, 3.0, 1.0, 1.0, 0.5], dtype=torch.float64))
    assert S.gram_basis(G, 3).ill_conditioned
    assert not S.gram_basis(G, 2).ill_conditioned


def test_orthonormalize_drops_dependent_columns():
    a, b = torch.eye(6)[:, 0], torch.eye(6)[:, 1]
    Q = S.orthonormalize(torch.stack([a, 2 * a, b], dim=1))
    assert Q.shape == (6, 2)
    assert torch.allclose(Q.T @ Q, torch.eye(2), atol=1e-6)
    assert float(Q[:, 0] @ a) ** 2 == pytest.approx(1)
    assert S.orthonormalize(torch.zeros(6, 0)).shape == (6, 0)


def test_project_away_and_write_away_leave_nothing_of_F():
    g = generator(3)
    F, B = S.random_basis(60, 10, g), S.random_basis(60, 8, g)
    away = S.project_away(B, F)
    assert float((F.B.T @ away.B).abs().max()) < 1e-5
    M = torch.randn(60, 90, generator=g)
    reference = S.left_svd(M - F.B @ (F.B.T @ M), 8)
    got = S.write_away(M @ M.T, F, 8)
    assert float((F.B.T @ got.B).abs().max()) < 1e-5
    assert same_span(got.B, reference.B) < 1e-3
    assert S.project_away(F, F).rank == 0


def test_union_and_bisector():
    e = torch.eye(12)
    A, B = S.Basis(e[:, :3]), S.Basis(e[:, 3:5])
    assert S.union(A, B).rank == 5
    theta = 0.3
    tilted = S.Basis(torch.stack([math.cos(theta) * e[:, 0] + math.sin(theta) * e[:, 5]], dim=1))
    middle = S.bisector(S.Basis(e[:, :1]), tilted, 8)
    expected = math.cos(theta / 2) * e[:, 0] + math.sin(theta / 2) * e[:, 5]
    assert middle.rank == 1
    assert abs(float(middle.B[:, 0] @ expected)) == pytest.approx(1, abs=1e-6)
    assert S.bisector(A, S.empty(12, "why"), 8).rank == 0


def test_complement_is_orthonormal_orthogonal_and_repeatable():
    F = S.random_basis(40, 6, generator(4)).B
    E = S.complement(F, 5)
    assert float((F.double().T @ E).abs().max()) < 1e-6
    assert torch.allclose(E.T @ E, torch.eye(5, dtype=torch.float64), atol=1e-10)
    assert torch.equal(E, S.complement(F, 5))
    with pytest.raises(ValueError, match="rank-6 subspace of R\\^40"):
        S.complement(F, 35)


def test_principal_cos_and_overlap():
    e = torch.eye(10)
    assert S.principal_cos(e[:, :2], e[:, 1:3]) == pytest.approx(0.5)
    assert S.overlap(e[:, :2], e[:, 1:3]) == pytest.approx(0.5)
    assert math.isnan(S.principal_cos(e[:, :0], e)) and math.isnan(S.overlap(e, e[:, :0]))
    g = generator(5)
    draws = [S.principal_cos(S.random_basis(1024, 8, g).B, S.random_basis(1024, 8, g).B) for _ in range(40)]
    assert sum(draws) / 40 == pytest.approx(0.073, abs=0.004)


def test_random_overlap_is_r_over_d():
    g = generator(6)
    draws = [S.overlap(S.random_basis(64, 8, g).B, S.random_basis(64, 8, g).B) for _ in range(300)]
    assert sum(draws) / 300 == pytest.approx(8 / 64, rel=0.05)


def test_check_basis_names_what_is_wrong():
    check_basis(S.Basis(torch.eye(5)[:, :2]), 5, "fine")
    with pytest.raises(ValueError, match="cand at layer 3: basis is 5 wide, the model 6"):
        check_basis(S.Basis(torch.eye(5)[:, :2]), 6, "cand at layer 3")
    with pytest.raises(ValueError, match="cand at layer 3: basis is not orthonormal"):
        check_basis(S.Basis(2 * torch.eye(5)[:, :2]), 5, "cand at layer 3")
    with pytest.raises(ValueError, match="NaN"):
        check_basis(S.Basis(torch.full((5, 1), float("nan"))), 5, "cand")


@pytest.mark.parametrize("d", [8, 97, 200])
def test_all_eigenvalues_and_some_eigenvectors_come_from_one_tridiagonal_form(d):
    M = torch.randn(d, 3 * d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    G = M @ M.T
    expected, Q = torch.linalg.eigh(G)
    for first, last in ((d - 5, d - 1), (0, 3)):
        values, vectors = eigenpairs(G, first, last, every=True)
        assert torch.allclose(values, expected, rtol=1e-11)
        assert (vectors.T @ Q[:, first : last + 1]).abs().diagonal().min() > 1 - 1e-9
        assert (G @ vectors - vectors * values[first : last + 1]).abs().max() < 1e-10 * values[-1]
        few, same = eigenpairs(G, first, last)
        assert torch.allclose(few, values[first : last + 1]) and (same.T @ vectors).abs().diagonal().min() > 1 - 1e-9
    norm = float(torch.linalg.matrix_norm(M, ord=2))
    assert all(abs(spectral_norm(X) / norm - 1) < 1e-5 for X in (M.float(), M.T.float()))


def test_eigenvalues_that_are_all_but_equal_and_matrices_of_zeros_and_extremes():
    Q = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    for G in (
        Q @ Q.T,
        torch.eye(130, dtype=torch.float64),
        torch.ones(128, 128, dtype=torch.float64),
        torch.zeros(120, 120).double(),
    ):
        d = len(G)
        values, vectors = eigenpairs(G, d - 9, d - 1, every=True)
        assert torch.allclose(values, torch.linalg.eigvalsh(G), atol=1e-9)
        assert torch.allclose(vectors.T @ vectors, torch.eye(9, dtype=torch.float64), atol=1e-9)
        assert (G @ vectors - vectors * values[d - 9 :]).abs().max() < 1e-9
    assert spectral_norm(torch.zeros(300, 200)) == spectral_norm(torch.zeros(0, 5)) == 0.0
    M = torch.randn(150, 300, generator=torch.Generator().manual_seed(1))
    for scale in (1e-30, 1e-12, 1.0, 1e12, 1e30):
        expected = float(torch.linalg.matrix_norm(M.double(), ord=2)) * scale
        assert abs(spectral_norm((M.double() * scale).float()) / expected - 1) < 1e-5
