"""Subspace agreement: identities, chance levels, a low-rank signal filled up with noise, bases that must be equal."""

import numpy as np
import pytest
import torch

from ws.stability.overlap import (
    a_side_stability,
    chance_overlap,
    compare_parts,
    energy_overlap,
    same_span,
    smallest_cos,
)
from ws.subspaces.algebra import empty, left_svd, overlap, random_basis


def test_identical_orthogonal_and_rotated_subspaces():
    eye = torch.eye(10)
    A, B = eye[:, :3], eye[:, 3:6]
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    assert overlap(A, A @ turn) == pytest.approx(1) and smallest_cos(A, A @ turn) == pytest.approx(1)
    assert overlap(A, B) == 0 and smallest_cos(A, B) == 0
    mixed = torch.stack([eye[:, 0], eye[:, 5], eye[:, 6]], dim=1)
    assert overlap(A, mixed) == pytest.approx(1 / 3)
    assert energy_overlap(A, mixed, torch.tensor([3.0, 1.0, 0.0])) == pytest.approx(0.9)
    assert energy_overlap(A, mixed, torch.zeros(0)) == pytest.approx(1 / 3)
    assert np.isnan(energy_overlap(A, mixed, torch.zeros(3))) and np.isnan(smallest_cos(A, torch.zeros(10, 0)))
    with pytest.raises(ValueError, match="2 singular values for 3 columns"):
        energy_overlap(A, mixed, torch.ones(2))


@pytest.mark.parametrize("a, b, d", [(8, 8, 64), (4, 10, 40), (16, 8, 24)])
def test_chance_levels_are_those_of_random_bases(a, b, d):
    g = torch.Generator().manual_seed(0)
    found = np.array([overlap(random_basis(d, a, g).B, random_basis(d, b, g).B) for _ in range(1500)])
    mean, sd = chance_overlap(a, b, d)
    assert found.mean() == pytest.approx(mean, abs=4 * sd / np.sqrt(1500)) and found.std() == pytest.approx(
        sd, rel=0.08
    )
    assert chance_overlap(d, 3, d) == (1.0, 0.0)


def halves(signal_rank, strength, seed=0, d=128, n=16):
    """Top-8 bases of two data halves that share `signal_rank` directions, in noise."""
    g = torch.Generator().manual_seed(seed)
    shared = random_basis(d, max(signal_rank, 1), g).B
    out = []
    for _ in range(2):
        X = (
            torch.randn(n, d, generator=g)
            + (signal_rank > 0) * strength * torch.randn(n, shared.shape[1], generator=g) @ shared.T
        )
        out.append(left_svd(X.T, 8))
    return out


def test_low_rank_signal_is_stable_by_energy_though_not_by_plain_overlap():
    a, b = halves(signal_rank=1, strength=60.0)
    table = compare_parts("A", "TaskDiff", "FIT halves", {"first": [a], "second": [b]}, [0])
    assert table["overlap"][0] < 0.5 < table["energy_overlap"][0]
    a, b = halves(signal_rank=0, strength=0.0)
    noise = compare_parts("A", "noise", "FIT halves", {"first": [a], "second": [b]}, [0])
    flags = a_side_stability(table.vstack(noise))
    assert dict(flags.select("candidate", "unstable").iter_rows()) == {"TaskDiff": False, "noise": True}
    assert flags.filter(candidate="noise")["stability_chance"][0] == pytest.approx(8 / 128)


def test_the_weaker_of_the_two_splits_decides_and_undefined_is_unstable():
    a, b = halves(1, 60.0)
    c, e = halves(0, 0.0)
    nothing = empty(128, "no data")
    table = compare_parts("A", "x", "FIT halves", {"first": [a], "second": [b]}, [0])
    table = table.vstack(compare_parts("A", "x", "persona pairs", {"0": [c], "1": [e]}, [0]))
    table = table.vstack(compare_parts("A", "y", "FIT halves", {"first": [nothing], "second": [a]}, [0]))
    table = table.vstack(compare_parts("B", "oracle", "seeds", {"0": [c], "1": [e]}, [0]))
    flags = {row["candidate"]: row for row in a_side_stability(table).iter_rows(named=True)}
    assert set(flags) == {"x", "y"}
    assert flags["x"]["weakest"] == "persona pairs" and flags["x"]["unstable"]
    assert np.isnan(flags["y"]["stability"]) and flags["y"]["unstable"]


def test_every_pair_at_every_layer_is_compared():
    g = torch.Generator().manual_seed(0)
    parts = {str(k): [random_basis(32, 4, g) for _ in range(3)] for k in range(4)}
    table = compare_parts("B", "weight oracle", "seeds", parts, [8, 9, 10])
    assert table.height == 6 * 3 and table["layer"].unique().sort().to_list() == [8, 9, 10]
    with pytest.raises(ValueError, match="weight oracle, seeds 0: 3 bases, 2 layers"):
        compare_parts("B", "weight oracle", "seeds", parts, [8, 9])


def test_the_overlap_of_spans_is_exact_near_one_and_counts_a_missing_direction():
    g = torch.Generator().manual_seed(0)
    A = random_basis(64, 8, g).B.double()
    A = torch.linalg.qr(A).Q
    turned = torch.linalg.qr(A + 1e-4 * torch.linalg.qr(torch.randn(64, 8, generator=g, dtype=torch.float64)).Q).Q
    assert same_span(A, -A.flip(1)) == pytest.approx(1, abs=1e-14)
    assert 1 - same_span(A, turned) == pytest.approx(1e-8, rel=0.3)
    assert same_span(A, A[:, :7]) == pytest.approx(7 / 8) and same_span(A[:, :0], A[:, :0]) == 1
