"""Do two estimates of a subspace agree? Between LoRA seeds (B-side), between halves of the data (A-side).

`overlap = |A^T B|_F^2 / min(a, b)` (chance `max(a, b) / d`), the smallest principal cosine, and the energy-weighted
overlap: a low-rank signal filled up with noise directions still counts as stable there. A-side bases do not depend on
the seed at all, which is checked: one that does is named, and no hypothesis. (docs/method.md section 7)
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.explanation.result import Explanation
from ws.subspaces.algebra import Basis, overlap

UNSTABLE = 0.5  # energy-weighted overlap below which a candidate cannot win
WHY = "an A-side basis must not depend on the LoRA seed"
SAME = 1e-6  # overlap of a basis with itself, recomputed: at least 1 - SAME
SHARED = {"candidate": pl.String, "seed_overlap": pl.Float64, "depends_on_seed": pl.Boolean}
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


def inherited(a_side: pl.DataFrame, compounds: Mapping[str, Sequence[str]]) -> pl.DataFrame:
    """The table of `a_side_stability` with the flags of a candidate's parts: what is composed of an unstable one is unstable,
    however much its other parts hold."""
    flagged = set(a_side.filter("unstable")["candidate"])
    through = {name: next((part for part in parts if part in flagged), "") for name, parts in compounds.items()}
    part = pl.col("candidate").replace_strict({n: p for n, p in through.items() if p and n not in flagged}, default="")
    if not any(through.values()):
        return a_side
    return a_side.with_columns(
        unstable=pl.col("unstable") | (part != ""),
        weakest=pl.when(part != "").then("its part " + part).otherwise("weakest"),
    )


def seed_overlaps(found: Mapping[int, Explanation], layers: Sequence[int]) -> pl.DataFrame:
    """One row per A-side candidate: do its bases span the same on every seed?

    seed_overlap: least `|A^T B|_F^2 / max(a, b)` of the first seed's basis with another's over `layers`, 1 where their
    hashes agree. depends_on_seed: it is under 1 - 1e-6 at a layer where neither basis is `ill_conditioned`: rounding does
    not explain it, so the candidate saw what differs between the seeds.
    """
    first = next(iter(found.values()))
    doubts = [set(r.per_layer.filter("ill_conditioned").select("layer", "subspace").rows()) for r in found.values()]
    rows = []
    for name in first.bases:
        least, depends = 1.0, False
        if len({run.bases.get(name) for run in found.values()}) > 1:
            spans = [[run.tensors[f"basis/{name}/{l}"].double() for l in layers] for run in found.values()]
            for span, doubt in zip(spans[1:], doubts[1:], strict=True):
                for l, A, B in zip(layers, spans[0], span, strict=True):
                    least = min(least, value := same_span(A, B))
                    depends |= value < 1 - SAME and (l, name) not in doubts[0] | doubt
        rows.append((name, least, depends))
    return pl.DataFrame(rows, SHARED, orient="row")


def same_span(A: Float[Tensor, "d a"], B: Float[Tensor, "d b"]) -> float:
    """`|A^T B|_F^2 / max(a, b)` of orthonormal columns: 1 only where both span the same; as `1 - |(I - A A^T) B|^2 / b`
    for equal ranks, which is exact near 1."""
    if A.shape[1] == B.shape[1]:
        return 1.0 - float((B - A @ (A.T @ B)).square().sum()) / max(B.shape[1], 1)
    return float((A.T @ B).square().sum()) / max(A.shape[1], B.shape[1])


def same_bases(found: Mapping[int, Explanation], table: pl.DataFrame) -> str:
    """What `seed_overlaps` found, in words: the same, the same span, or which differ and what follows."""
    S, moved = len(found), table.filter(pl.col("seed_overlap") < 1 - SAME)
    if len({tuple(sorted(run.bases.items())) for run in found.values()}) == 1:
        return f"All {S} seeds used the same A-side bases."
    rest = table.filter(pl.col("seed_overlap") >= 1 - SAME)["seed_overlap"].min()
    text = f"The A-side bases of {S} seeds differ in bytes but not in span: least overlap {1 if rest is None else rest:.9f}"
    turned, depend = (", ".join(_named(moved, which)) for which in (False, True))
    text += ", but for those named here." if turned or depend else "."
    if turned:
        text += f" Not determined by their data, other on other seeds, and so no winner: {turned}."
    if depend:
        text += f" **Depend on the LoRA seed** though {WHY}, and so out of ranking and verdict: {depend}."
    return text


def _named(moved: pl.DataFrame, depends: bool) -> list[str]:
    part = moved.filter(pl.col("depends_on_seed") == depends)
    return [f"{name} (least overlap {value:.3f})" for name, value in part.select("candidate", "seed_overlap").rows()]
