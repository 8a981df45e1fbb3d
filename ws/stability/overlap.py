"""Do two estimates of a subspace agree? Between LoRA seeds (B-side), between halves of the data (A-side).

`overlap = |A^T B|_F^2 / min(a, b)` (chance `max(a, b) / d`), the smallest principal cosine, and the energy-weighted
overlap: a low-rank signal filled up with noise directions still counts as stable there. A-side bases do not depend on
the seed at all, which is asserted. (docs/method.md section 7)
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.explanation.result import Explanation
from ws.explanation.rows import bases_hash
from ws.subspaces.algebra import Basis, overlap

UNSTABLE = 0.5  # energy-weighted overlap below which a candidate cannot win
WHY = "an A-side basis must not depend on the LoRA seed"
SAME = 1e-6  # overlap of a basis with itself, recomputed: at least 1 - SAME
SCHEMA = dict.fromkeys(("side", "object", "compared", "layer", "a", "b"), pl.String)
SCHEMA |= dict.fromkeys(("layer", "rank_a", "rank_b"), pl.Int64)
SCHEMA |= dict.fromkeys(("overlap", "smallest_cos", "energy_overlap", "chance", "chance_sd"), pl.Float64)


def smallest_cos(A: Float[Tensor, "d a"], B: Float[Tensor, "d b"]) -> float:
    """Cosine of the largest principal angle, in [0, 1]; NaN when either basis is empty."""
    if A.shape[1] == 0 or B.shape[1] == 0:
        return float("nan")
    return float(torch.linalg.svdvals(A.double().T @ B.double())[-1].clamp(0.0, 1.0))


def energy_overlap(A: Float[Tensor, "d a"], B: Float[Tensor, "d b"], s: Float[Tensor, " q"]) -> float:
    """`sum_i s_i^2 |A^T b_i|^2 / sum_i s_i^2`, in [0, 1]; NaN where either is empty or B carries no energy. s: singular
    values of B's columns. A composed basis has none (`q = 0`): its columns then count alike. Raises ValueError when
    there are values but not one per column."""
    if A.shape[1] == 0 or B.shape[1] == 0:
        return float("nan")
    if len(s) not in (0, B.shape[1]):
        raise ValueError(f"energy overlap: {len(s)} singular values for {B.shape[1]} columns")
    weight = s.double().square() if len(s) else torch.ones(B.shape[1], dtype=torch.float64)
    if float(weight.sum()) == 0:
        return float("nan")
    inside = (A.double().T @ B.double()).square().sum(dim=0)
    return float(((weight * inside).sum() / weight.sum()).clamp(0.0, 1.0))


def chance_overlap(a: int, b: int, d: int) -> tuple[float, float]:
    """Mean `max(a, b) / d` and sd of `overlap` for two unrelated random subspaces: method section 6 with G = P_B."""
    if min(a, b) == 0:
        return float("nan"), float("nan")
    if max(a, b) == d:
        return 1.0, 0.0
    variance = 2 * a * (d - a) / (d**2 * (d - 1) * (d + 2)) * (d / b - 1)
    return max(a, b) / d, float(np.sqrt(variance) * b / min(a, b))


def compare_parts(
    side: str, name: str, compared: str, parts: Mapping[str, Sequence[Basis]], layers: Sequence[int]
) -> pl.DataFrame:
    """Rows of `v7b_subspace_stability`: every pair of `parts` (label -> one basis per layer) at every layer.

    side "B" with compared "seeds" for the activation and weight oracles, side "A" with compared "FIT halves" or
    "persona pairs" for a candidate. energy_overlap is the mean of both directions; chance and chance_sd are those of
    overlap. An empty basis gives NaN. Raises ValueError naming the part whose number of layers differs.
    """
    for label, bases in parts.items():
        if len(bases) != len(layers):
            raise ValueError(f"{name}, {compared} {label}: {len(bases)} bases, {len(layers)} layers")
    rows = []
    for a, b in combinations(parts, 2):
        for layer, A, B in zip(layers, parts[a], parts[b], strict=True):
            energy = (energy_overlap(A.B, B.B, B.s) + energy_overlap(B.B, A.B, A.s)) / 2
            found = overlap(A.B, B.B), smallest_cos(A.B, B.B), energy, *chance_overlap(A.rank, B.rank, A.d)
            rows.append((side, name, compared, layer, a, b, A.rank, B.rank, *found))
    return pl.DataFrame(rows, SCHEMA, orient="row")


def a_side_stability(table: pl.DataFrame) -> pl.DataFrame:
    """Per candidate, the weaker of its mean energy-weighted overlaps over layers and pairs, and the flag it leads to.

    table: rows of `compare_parts`; the A-side ones are used. stability: the minimum over "FIT halves" and "persona
    pairs", of which `weakest` is the one; unstable: under 0.5, or undefined at a layer. Candidates without
    rows do not depend on these data: they are stable.
    """
    order = pl.col("stability").fill_nan(-1.0)  # undefined is the weakest of all
    return (
        table.filter(pl.col("side") == "A")
        .group_by(candidate="object", weakest="compared", maintain_order=True)
        .agg(stability=pl.col("energy_overlap").mean(), stability_chance=pl.col("chance").mean())
        .sort("candidate", order, maintain_order=True)
        .unique("candidate", keep="first", maintain_order=True)
        .select("candidate", "stability", "weakest", "stability_chance", unstable=order < UNSTABLE)
    )


def assert_same_bases(by_seed: Mapping[int, Sequence[Basis]], candidate: str) -> tuple[bool, float]:
    """Assert that an A-side candidate has the same bases for every seed: equal hashes, else overlap >= 1 - 1e-6.
    Returns (all hashes equal, smallest overlap with the first seed). Raises ValueError naming candidate, seed and layer
    where rank or subspace differ."""
    if len({bases_hash(bases) for bases in by_seed.values()}) == 1:
        return True, 1.0
    first, *others = by_seed
    smallest, own = 1.0, by_seed[first]
    for seed in others:
        if len(by_seed[seed]) != len(own):
            raise ValueError(f"{candidate}: {len(own)} layers at seed {first}, {len(by_seed[seed])} at {seed}")
        for layer, (A, B) in enumerate(zip(own, by_seed[seed], strict=True)):
            where = f"{candidate}, layer {layer}"
            if A.rank != B.rank:
                raise ValueError(f"{where}: rank {A.rank} at seed {first}, {B.rank} at seed {seed}; {WHY}")
            value = overlap(A.B, B.B) if A.rank else 1.0
            if not value >= 1 - SAME:
                raise ValueError(f"{where}: overlap {value:.8f} between seeds {first} and {seed}; {WHY}")
            smallest = min(smallest, value)
    return False, smallest


def same_bases(found: Mapping[int, Explanation]) -> str:
    """Assert that every seed's sweep used the same A-side bases, and say so.

    Equal hashes pass at once; otherwise the sketches `B^T S` are compared, whose row spaces agree exactly where the bases
    do (overlap >= 1 - 1e-6). A basis that its data do not determine (`ill_conditioned`) is named instead. Raises
    ValueError naming candidate, seed and layer where others differ.
    """
    first = next(iter(found.values()))
    differ = [name for name in first.bases if len({run.bases.get(name) for run in found.values()}) > 1]
    if not differ:
        return f"All {len(found)} seeds used the same A-side bases."
    doubtful = set(first.per_layer.filter("ill_conditioned")["subspace"])
    least = 1.0
    for name in differ:
        if name not in doubtful:
            spans = {seed: _spans(run.tensors[f"sketch/{name}"]) for seed, run in found.items()}
            least = min(least, assert_same_bases(spans, name)[1])
    text = f"The A-side bases of {len(found)} seeds differ in bytes but not in span: least overlap {least:.9f}."
    odd = ", ".join(name for name in differ if name in doubtful)
    return text + (f" Not determined by their data and so not compared: {odd}." if odd else "")


def _spans(sketch: Float[Tensor, "L r m"]) -> list[Basis]:
    rows = [C[C.abs().sum(dim=1) > 0] for C in sketch.double()]
    return [Basis(torch.linalg.qr(C.T).Q.float() if len(C) else torch.zeros(C.shape[1], 0)) for C in rows]
