"""Blind copies: overlaps stay, relations to w go; the null has its known moments; p of blind candidates is uniform."""

import numpy as np
import pytest
import torch

from bench.calibration import independent_null, orth, plain_scores, simulated, type_one, world
from ws.explanation.scores import null_sd, score, specific, weight_target, without
from ws.stability.blind import Geometry, GramFactor, blind_scores, combined_factor, haar, thin
from ws.stability.significance import blind_p, blind_values, discoveries, mean_log
from ws.subspaces.algebra import Basis


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_rotation_is_haar_distributed():
    """Orthogonal, and its entries have mean 0, variance 1/d and no preferred sign, on the diagonal too."""
    g, d = generator(), 12
    drawn = torch.stack([haar(d, g) for _ in range(4000)])
    assert (drawn[0].T @ drawn[0] - torch.eye(d)).abs().max() < 1e-5
    assert drawn.mean(dim=0).abs().max() < 4.5 / np.sqrt(4000 * d)
    assert drawn.square().mean(dim=0) == pytest.approx(1 / d * np.ones((d, d)), rel=0.12)
    assert float(torch.linalg.det(drawn).mean()) == pytest.approx(0, abs=0.06)  # rotations and reflections alike


@pytest.mark.parametrize("d, r, rank", [(96, 8, 12), (40, 16, 4), (24, 20, 6)])
def test_null_has_mean_one_and_the_closed_form_sd(d, r, rank):
    """For one seed and one layer section 6 has both in closed form; specific in the dimensions that are left."""
    g = generator()
    F, X, Q = torch.randn(d, rank, generator=g), torch.randn(5, d, generator=g), orth(torch.randn(d, 3, generator=g))
    w, beyond = weight_target(F), without(X, Basis(Q))
    geometry = Geometry([[orth(torch.randn(d, r, generator=g))]], [[thin(w.F, 0.0)]], [[thin(w.F, 0.0)]],
                        [[thin(beyond.F, 0.0)]], [Q], {n: np.full((1, 1, 1), 2.0) for n in ("w", "act")})  # fmt: skip
    found = blind_scores(geometry, 10_000, seed=1)
    for name, target in (("R_w", w), ("specific", beyond)):
        R, sd = found[name][:, 0, 0], null_sd(target, r)
        assert R.mean() == pytest.approx(1, abs=4 * sd / 100 + 1e-6)
        if name == "R_w" or r < d - 3:
            assert R.std() == pytest.approx(sd, rel=0.04)
    assert found["H_w"] == pytest.approx(found["R_w"] / 2, rel=1e-5)


def test_copies_are_scored_as_their_turned_bases_are():
    """Two known rotations in: the same numbers as from turned bases, target by target."""
    from ws.stability import blind as room

    w = simulated(32, 2, 3, 7)
    g = generator(3)
    first, second = haar(32, g), haar(32, g)
    turns = iter((first, second))
    original, room.haar = room.haar, lambda d, g: next(turns)
    try:
        copy = blind_scores(w.geometry, 1, seed=0)
    finally:
        room.haar = original
    plain = plain_scores(w, (first @ second).double())
    for name in ("R_w", "R_act", "specific"):
        assert copy[name][0] == pytest.approx(plain[name], rel=2e-2), name  # thin factors leave out a thousandth
    exact = [[GramFactor(F.float(), 0.0) for F in of_seed] for of_seed in w.w]
    turns = iter((first, second))
    room.haar = lambda d, g: next(turns)
    try:
        copy = blind_scores(Geometry(**{**vars(w.geometry), "w": exact}), 1, seed=0)
    finally:
        room.haar = original
    assert copy["R_w"][0] == pytest.approx(plain["R_w"], rel=1e-5)


def test_copies_of_rounded_factors_are_the_copies(monkeypatch):
    """Score by score the rounding is a small part of what copies differ by, and it takes no side."""
    from ws.stability import blind as room

    w, x = simulated(room.ROUNDED, 2, 1, 5), torch.randn(300, 300, generator=generator())
    square = x @ x
    rounded = blind_scores(w.geometry, 400, seed=3)
    monkeypatch.setattr(room, "ROUNDED", room.ROUNDED + 1)
    whole = blind_scores(w.geometry, 400, seed=3)
    assert torch.equal(x @ x, square)  # other products are whole
    for name, values in whole.items():
        off, spread = np.log(rounded[name]) - np.log(values), np.log(values).std(axis=0)
        assert 0 < np.abs(off).max() and (off.std(axis=0) < 5e-3 * spread).all(), name
        assert (np.abs(off.mean(axis=0)) < 1e-3 * spread).all(), name


def test_a_candidate_that_holds_nearly_all_is_scored_as_before():
    """What it holds beyond the clean PCA is too little for rounded products."""
    from ws.stability import blind as room

    d, w = room.ROUNDED, simulated(room.ROUNDED, 1, 1, 2)
    frame = orth(torch.randn(d, d, generator=generator(2)))
    bases = [[*w.geometry.bases[0], frame[:, : d - 8], frame]]
    best = {name: np.ones((1, 4, 1)) for name in ("w", "act")}
    geometry = Geometry(**{**vars(w.geometry), "bases": bases, "best": best})
    found = blind_scores(geometry, 9, seed=0)
    assert all(np.isfinite(values).all() for values in found.values())
    assert found["specific"][:, 0, 3] == pytest.approx((d - w.geometry.clean[0].shape[1]) / d, rel=2e-2)
    few = blind_scores(w.geometry, 9, seed=0)
    assert found["R_w"][:, 0, :2] == pytest.approx(few["R_w"][:, 0], rel=2e-2)


def test_the_bench_scores_as_the_tables_do():
    """`plain_scores`, which judges the null, agrees with `ws.explanation.scores`."""
    w = simulated(40, 1, 1, 6)
    O = haar(40, generator(1)).double()
    plain = plain_scores(w, O)
    F, Q = w.w[0][0], w.geometry.clean[0]
    for c, B in enumerate(w.geometry.bases[0]):
        turned = orth(O @ B.double()).float()
        assert plain["R_w"][0, c] == pytest.approx(score(weight_target(F), turned).conc, rel=1e-5)
        rows = torch.randn(1, 40, dtype=torch.float64, generator=generator(5))
        one = world([[B]], [[[F, F]]], [[rows]], [Q])
        beyond, _ = specific(without(rows, Basis(Q.float())), Basis(turned), Basis(Q.float()))
        assert plain_scores(one, O)["specific"][0, 0] == pytest.approx(beyond.conc, rel=1e-4)


def test_thinning_changes_the_null_by_less_than_it_promises():
    g = generator()
    F = torch.randn(64, 32, generator=g) / torch.arange(1, 33) ** 0.7
    F = F / F.norm()
    B, short = [[orth(torch.randn(64, 8, generator=g))]], thin(F, 0.02)
    assert short.F.shape[1] < 32 and short.rest > 0
    assert float(short.F.square().sum()) + short.rest == pytest.approx(1, rel=1e-5)
    best = {n: np.ones((1, 1, 1)) for n in ("w", "act")}

    def sd(factor):
        geometry = Geometry(B, [[factor]], [[factor]], [[factor]], [torch.zeros(64, 0)], best)
        return blind_scores(geometry, 4000, 0)["R_w"].std()

    assert sd(short) == pytest.approx(sd(thin(F, 0.0)), rel=0.01)
    with pytest.raises(ValueError, match="seed 3, layer 2: no weight difference"):
        combined_factor([torch.zeros(4, 2), torch.ones(4, 2)], "seed 3, layer 2")


def test_layers_that_share_a_basis_do_not_average_out():
    """One basis for all layers of one w is as wide as a single layer; bases that have nothing in common are narrower."""
    d, L = 48, 4
    g = generator()
    F = thin(torch.randn(d, 6, generator=g) / torch.arange(1, 7))
    frame = orth(torch.randn(d, 8 * L, generator=g))
    best = {n: np.ones((1, 2, L)) for n in ("w", "act")}
    bases = [[frame[:, :8], frame[:, 8 * l : 8 * l + 8]] for l in range(L)]
    geometry = Geometry(bases, [[F] * L], [[F] * L], [[F] * L], [torch.zeros(d, 0)] * L, best)
    sd = np.log(blind_scores(geometry, 4000, 0)["R_w"][:, 0]).std(axis=0)
    single = Geometry([bases[0]], [[F]], [[F]], [[F]], [torch.zeros(d, 0)], {n: b[:, :, :1] for n, b in best.items()})
    assert sd[0] == pytest.approx(np.log(blind_scores(single, 4000, 0)["R_w"][:, 0, 0]).std(), rel=0.05)
    assert sd[1] < 0.6 * sd[0]


def test_draws_are_reproducible_whole_and_at_least_one():
    w = simulated(24, 2, 2, 5)
    first, again, more = (blind_scores(w.geometry, n, 4) for n in (7, 7, 10))
    assert all(np.array_equal(first[n], again[n]) for n in first) and first["R_w"].shape == (7, 2, 5)
    assert not np.array_equal(first["R_w"], blind_scores(w.geometry, 7, 5)["R_w"]) and len(more["R_w"]) == 10
    with pytest.raises(ValueError, match="N_NULL = 0: at least one blind copy"):
        blind_scores(w.geometry, 0, 0)


def test_blind_candidates_have_the_nominal_error_and_the_old_null_had_not():
    """300 blind copies, 24 candidates, 3 and 5 seeds. The error of one candidate has a Monte-Carlo sd of .013 at .05; the
    share of copies in which Benjamini-Hochberg finds anything one of .013 too."""
    w = simulated(48, 5, 4, 24)
    table = type_one(w, 300, 4000, (3, 5), progress=False)
    assert set(table["score"]) == {"R_w", "R_act", "joint", "specific"} and set(table["S"]) == {3, 5}
    for row in table.iter_rows(named=True):
        assert row["error at 0.05"] == pytest.approx(0.05, abs=0.02), row
        assert row["error at 0.01"] == pytest.approx(0.01, abs=0.008), row
        assert row["worst at 0.05"] < 0.05 + 4.5 * 0.0126 and row["P(any discovery)"] <= 0.05 + 3 * 0.0126, row
    old, g = independent_null(w, 3, 1500), generator(9)
    seen = [mean_log(plain_scores(w, haar(48, g).double())["R_w"][:3]) for _ in range(200)]
    p = np.stack([blind_p(one, old) for one in seen])
    assert (p <= 0.05).mean() > 0.07 and (discoveries(p, 0.05) > 0).mean() > 0.08


def test_a_candidate_that_holds_w_is_found_among_blind_ones():
    w = simulated(48, 3, 4, 12)
    planted = [torch.linalg.svd(w.w[0][l])[0][:, :8] for l in range(4)]
    bases = [[planted[l], *row[1:]] for l, row in enumerate(w.geometry.bases)]
    geometry = Geometry(**{**vars(w.geometry), "bases": bases})
    null = blind_values(blind_scores(geometry, 2000, 0))
    seen = plain_scores(type(w)(geometry, w.w, w.act, w.beyond), torch.eye(48, dtype=torch.float64))
    p = blind_p(mean_log(seen["R_w"]), mean_log(null["R_w"]))
    assert p[0] == pytest.approx(1 / 2001) and (p[1:] > 0.001).all()
