"""Leading eigenpairs by products with a few columns: as exact as they say, or not at all."""

import pytest
import torch
from torch import Tensor

from ws.subspaces import algebra, chebyshev, eigen
from ws.subspaces.algebra import gram_basis, left_svd
from ws.subspaces.chebyshev import every_value, leading
from ws.subspaces.grams import left_gram
from ws.subspaces.noise import MOST_OFF, NARROW_TURN, SHARE, STORED, WIDE, WIDER, Noise
from ws.subspaces.tokens import Tokens

D, EPS = 300, 2.0**-7


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def frame(n: int, m: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(drawn(n, m, seed=seed)).Q


def falling(p: float) -> Tensor:
    return torch.arange(1, D + 1).double() ** -p


def matrices() -> dict[str, Tensor]:
    """`(D, m)`, with spectra as weights have them and as they do not."""
    some = {"random": drawn(D, 3 * D), "square": drawn(D, D), "product": drawn(D, 2 * D) @ drawn(2 * D, D, seed=2)}
    some |= {f"power {p}": frame(D, D) * falling(p) @ frame(2 * D, D, seed=2).T for p in (0.25, 1.0, 3.0)}
    peaks = torch.ones(D).double()
    peaks[:3] = torch.tensor([100.0, 30.0, 10.0])
    some["peaks"] = peaks * frame(D, D) @ drawn(D, 2 * D, seed=3)
    Q = frame(D, 40)
    some["projected"] = some["random"] - Q @ (Q.T @ some["random"])
    rows = torch.ones(D, 1).double()
    rows[7] = 300.0
    return some | {"one loud row": rows * some["random"]}


MATRICES = matrices()


def exact(G: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(G)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def off(V: Tensor, B: Tensor) -> float:
    """Sine of the angles between what B and V span, all together."""
    V, B = V.double(), B.double()
    return float((B - V @ (V.T @ B)).norm())


def rounding_of(M: Tensor) -> Noise:
    """That of bfloat16 weights."""
    return Noise(sigma=EPS * (float(M.square().sum(1).max()) / M.shape[1] / 12) ** 0.5, most=NARROW_TURN)


@pytest.mark.parametrize("k", [1, 8, 40])
@pytest.mark.parametrize("bound", [1e-9, 1e-4])
@pytest.mark.parametrize("name", MATRICES)
def test_what_is_found_is_within_the_bound(name, bound, k):
    G = MATRICES[name] @ MATRICES[name].T * 1e3
    values, V = exact(G)
    found = leading(G, k, lambda _: bound)
    if found is None:  # nothing to speak of is left at the cut
        assert name == "power 3.0" and values[k] < 1e-9 * values[0]
        return
    assert off(V[:, :k], found[1]) < bound and len(found[0]) == k + 1
    assert torch.allclose(found[0], values[: k + 1], rtol=0, atol=1e-4 * float(values[0]))
    assert torch.allclose(found[0][:k], values[:k], rtol=0, atol=max(1e-9, bound**2) * float(values[0]))
    assert torch.allclose(found[1].T @ found[1], torch.eye(k).double(), atol=1e-12)


def test_two_values_that_are_nearly_one_are_told_apart():
    """By the bound's second order: columns beside them reach both."""
    twins = falling(0.5)
    twins[7:9] = twins[7:9].mean() * torch.tensor([1 + 1e-8, 1 - 1e-8], dtype=torch.float64)
    U = frame(D, D)
    values, V = leading((U * twins) @ U.T, 8, lambda _: 1e-5)
    assert off(U[:, :8], V) < 1e-5 and values[7] > values[8]


def test_what_cannot_be_told_is_not_found():
    flat, few = torch.ones(D).double(), falling(0.5)
    few[5:] = 0
    U = frame(D, D)
    for s in (flat, few, torch.zeros(D).double(), falling(1.0) * float("nan"), falling(1.0) * float("inf")):
        assert leading((U * s) @ U.T, 8, lambda _: 1e-6) is None
    for value in (float("nan"), float("inf"), 1e200):  # off the diagonal
        G = (U * falling(1.0)) @ U.T
        G[3, 5] = G[5, 3] = value
        assert leading(G, 8, lambda _: 1e-6) is None
    assert leading((U * falling(1.0)) @ U.T * 1e-300, 8, lambda _: 1e-6) is None
    small = U[:100, :100] * falling(1.0)[:100] @ U[:100, :100].T
    assert leading(small, 8, lambda _: 1.0) is None  # of so few rows a quarter would be columns


def test_a_bound_that_is_said_to_be_kept_is_kept_by_what_it_is_computed_from():
    """Residuals bound the turn: of vectors that were disturbed on purpose as of those that were found."""
    for name in ("random", "product", "power 1.0", "projected"):
        G = MATRICES[name] @ MATRICES[name].T
        _, V = exact(G)
        for size in (1e-2, 1e-4, 1e-7):
            W = torch.linalg.qr(V[:, :32] + size * drawn(D, 32, seed=5) / D**0.5).Q
            values, W, _, residuals = chebyshev.ritz(W, G @ W)
            assert off(V[:, :8], W[:, :8]) < 1.1 * chebyshev.turned(values, residuals, 8)


@pytest.mark.parametrize("name", MATRICES)
def test_stand_ins_have_the_sums_and_turn_as_the_values_do(name):
    M = MATRICES[name]
    values, _ = exact(M @ M.T)
    stood = every_value(values[:32], D, float(values.sum()), float(values.square().sum()))
    assert len(stood) == D and torch.equal(stood[:32], values[:32])
    rest = values[32:]
    assert float(stood[32:].sum()) == pytest.approx(float(rest.sum()), rel=5e-3)
    assert float(stood[32:].square().sum()) == pytest.approx(float(rest.square().sum()), rel=2e-2)
    assert 0 <= float(stood[32:].min()) and float(stood[32:].max()) <= float(values[31])
    a, b = (rounding_of(M).turn(x.sqrt(), 8, D) for x in (stood, values))
    assert 0.96 < a / b < 1.01


def test_bases_are_those_of_all_eigenpairs_within_what_hides_it(monkeypatch):
    asked = []
    monkeypatch.setattr(eigen, "leading", lambda *a: asked.append(leading(*a)) or asked[-1])
    for name, M in MATRICES.items():
        noise, G = rounding_of(M), M @ M.T
        found = gram_basis(G, 8, noise=noise)
        monkeypatch.setattr(Noise, "hides", lambda *_: None)
        plain = gram_basis(G, 8, noise=noise)
        monkeypatch.undo()
        monkeypatch.setattr(eigen, "leading", lambda *a: asked.append(leading(*a)) or asked[-1])
        assert off(plain.B, found.B) < max(min(SHARE * plain.turn, MOST_OFF), 1e-6), name
        assert found.turn == pytest.approx(plain.turn, rel=0.04) and found.gap == pytest.approx(plain.gap, rel=1e-3), (
            name
        )
        assert torch.allclose(found.s, plain.s, rtol=1e-6)
    assert len(asked) == len(MATRICES) and all(asked)


def test_what_carries_no_noise_is_found_as_float32_stores_it():
    """From so many rows on that it takes less time; under these exactly, and so is what was computed from half precision."""
    narrow = Noise(sigma=1.0, most=NARROW_TURN)
    assert Noise().hides(torch.eye(WIDER - 1), 8) is None and narrow.hides(torch.eye(WIDE - 1), 8) is None
    assert Noise().hides(torch.eye(WIDER), 8)(torch.linspace(2, 1, 9)) == STORED
    assert narrow.hides(torch.eye(WIDE), 8)(torch.linspace(2, 1, WIDE)) == MOST_OFF
    M = drawn(WIDER, 2 * WIDER)
    G = M @ M.T
    assert off(exact(G)[1][:, :8], gram_basis(G, 8).B) < 1e-6  # rounded to float32
    assert off(exact(G)[1][:, :8], leading(G, 8, lambda _: STORED)[1]) < STORED


@pytest.mark.parametrize("name", MATRICES)
def test_products_in_float32_do_less_than_bfloat16_did(name):
    """Grams of weights in bfloat16, and singular vectors of products of them, also where one row or direction is loud."""
    M = MATRICES[name].bfloat16()
    wide = M.double()
    G, plain = left_gram(M), wide @ wide.T
    assert G.dtype == torch.float64 and 0 < float((G - plain).norm() / plain.norm()) < 2e-6
    for same in (left_gram(M, exact=True), left_gram(wide), left_gram(wide, wide) / 2):
        assert torch.allclose(same, plain, rtol=0, atol=1e-14 * float(plain.norm()))
    noise = rounding_of(wide)
    turn = noise.turn(exact(plain)[0].sqrt(), 8, D)
    assert off(exact(plain)[1][:, :8], exact(G)[1][:, :8]) < SHARE * turn
    N = drawn(M.shape[1], D, seed=9).bfloat16()
    both = (noise.sigma * float(torch.linalg.matrix_norm(N.double(), 2))) ** 2
    both += (rounding_of(N.double()).sigma * float(torch.linalg.matrix_norm(wide, 2))) ** 2
    noise = Noise(sigma=both**0.5, most=NARROW_TURN)  # as `Materials.product_noise` has it
    made = left_svd(M.float() @ N.float(), 8, noise)
    U, s, _ = torch.linalg.svd(wide @ N.double())
    assert off(U[:, :8], made.B) < 1e-6 + MOST_OFF + SHARE * noise.turn(s, 8, D)


def test_directions_past_the_rank_of_a_product_are_said_to_be_arbitrary():
    few = (drawn(D, 4) @ drawn(4, D, seed=2)).float()
    found = left_svd(few, 8, Noise(sigma=1e-3, most=NARROW_TURN))
    again = left_svd(
        few[:, torch.randperm(D, generator=torch.Generator().manual_seed(0))], 8, Noise(sigma=1e-3, most=NARROW_TURN)
    )
    assert found.ill_conditioned and "data of rank 4" in found.note and off(found.B, again.B) < 1e-4


def test_of_fewer_columns_than_rows_too(monkeypatch):
    """`left_svd` looks at the smaller Gram then."""
    M, said = drawn(2 * D, D), []
    monkeypatch.setattr(eigen, "leading", lambda *a: said.append(leading(*a)) or said[-1])
    found = left_svd(M, 8, Noise(norm=1e-3, most=NARROW_TURN))
    assert said[0] and off(torch.linalg.svd(M, full_matrices=False)[0][:, :8], found.B) < MOST_OFF


def test_one_thread_beside_others_leaves_the_process_setting_alone(monkeypatch):
    """Else what others multiply in float32 meanwhile would be rounded."""
    from ws.subspaces import grams

    said = []
    plain = grams.fast_products
    monkeypatch.setattr(grams, "fast_products", lambda on: said.append(on) or plain(on))
    M = drawn(8, 16).bfloat16()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    left_gram(M), left_gram(M.half()), left_gram(M.float()), left_gram(M, exact=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    left_gram(M)
    assert said == [True, False]


def test_what_does_not_converge_is_left_to_all_pairs(monkeypatch):
    def fails(*_):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(chebyshev, "ritz", fails)
    assert leading(MATRICES["random"] @ MATRICES["random"].T, 8, lambda _: 1e-4) is None


def test_tokens_are_counted_once_by_their_pairs_and_weigh_as_themselves():
    """Against all tokens one by one: padding, repeated pairs, one pair for all, weights of nothing."""
    gen = torch.Generator().manual_seed(0)
    for pairs, n, T in ((50, 6, 20), (3, 6, 20), (1, 2, 3), (120, 6, 20)):
        D_, which = drawn(pairs, 12), torch.randint(pairs, (n, T), generator=gen)
        weights = torch.rand(n, T, generator=gen).double() * (torch.rand(n, T, generator=gen) > 0.3) + 1e-12
        t = Tokens(D_, D_.norm(dim=1), which, weights, weights)
        every = (D_[which] * weights.sqrt()[:, :, None]).flatten(0, 1)
        for centred in (False, True):
            rows, plain = t.rows(weights, which, centred), every - every.mean(dim=0) * centred
            assert len(rows) <= pairs
            assert torch.allclose(rows.T @ rows, plain.T @ plain, rtol=0, atol=1e-12 * float(every.square().sum()))


def test_gram_basis_asks_for_all_pairs_where_none_are_found(monkeypatch):
    M = MATRICES["random"]
    monkeypatch.setattr(eigen, "leading", lambda *_: None)
    found = gram_basis(M @ M.T, 8, noise=rounding_of(M))
    assert algebra.top_eigh is eigen.top_eigh and off(exact(M @ M.T)[1][:, :8], found.B) < 1e-6
