"""The sweeps of several LoRA seeds as the arrays that statistics over seeds start from.

The LoRA layers are those at which every seed's w has both residual writers. (docs/method.md section 7)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ws.explanation.result import Explanation
from ws.stability.scores import SeedScores, make_scores
from ws.stability.significance import GramFactor, combined_factor
from ws.subspaces.algebra import Basis


@dataclass(frozen=True)
class SeedRuns:
    """scores: what `ws.stability.scores` works on. factors: w's combined left factors per [seed][layer]. oracles: per side
    ("act", "weight") and seed, one basis per LoRA layer. one_basis: candidates with one basis for all layers."""

    scores: SeedScores
    factors: list[list[GramFactor]]
    oracles: dict[str, dict[str, list[Basis]]]
    one_basis: np.ndarray


def seed_folders(seeds: Sequence[int], runs: Path) -> dict[int, Path]:
    """`runs/seed_<k>` of each seed. ValueError where there is no seed, or one is named twice (a copy is no new seed)."""
    if not seeds:
        raise ValueError("SEEDS is empty: no seeds to compare")
    twice = sorted({seed for seed in seeds if list(seeds).count(seed) > 1})
    if twice:
        raise ValueError(f"SEEDS {list(seeds)}: {', '.join(map(str, twice))} is named more than once")
    return {seed: runs / f"seed_{seed}" for seed in seeds}


def load_seeds(found: Mapping[int, Explanation]) -> SeedRuns:
    """The sweeps of several seeds as arrays.

    Raises ValueError where the runs do not fit together (other candidates, another model, other EVAL probes) or where no
    layer of w has both residual writers.
    """
    if not found:
        raise ValueError("no seeds to compare")
    first = next(iter(found))
    names = [c["name"] for c in found[first].candidates]
    d = found[first].setting["d"]
    for seed, run in found.items():
        if [c["name"] for c in run.candidates] != names or run.setting["d"] != d:
            raise ValueError(f"seeds {first} and {seed} were swept with other candidates or another model")
    shapes = {seed: run.tensors["act_topics"].shape for seed, run in found.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"runs differ in layers or EVAL probes: {shapes}")
    factors = {
        seed: [[run.tensors[n] for n in _writers(l) if n in run.tensors] for l in range(shapes[first][1])]
        for seed, run in found.items()
    }
    layers = [l for l in range(shapes[first][1]) if all(len(factors[seed][l]) == 2 for seed in found)]
    if not layers:
        raise ValueError("no layer of w has both residual writers (o_proj and down_proj) in every seed")
    grid = {seed: _grid(run.per_layer, names, layers) for seed, run in found.items()}
    some = grid[first]
    scores = make_scores(
        names,
        list(found),
        np.stack([run.tensors["act_topics"].numpy()[:, layers] for run in found.values()]),
        np.stack([g["conc_w_combined"] for g in grid.values()]),
        some["rank"],
        d,
        layers,
        [c["kind"] for c in found[first].candidates],
        [c["axis_kind"] for c in found[first].candidates],
        some["conc_act_null"].mean(axis=1) if "conc_act_null" in some else None,
        some["conc_w_combined_null"].mean(axis=1) if "conc_w_combined_null" in some else None,
    )
    return SeedRuns(
        scores,
        [[combined_factor(factors[seed][l], f"seed {seed}, layer {l}") for l in layers] for seed in found],
        {
            side: {
                f"seed {s}": [Basis(r.tensors[f"{side}_oracle/{l}"].float()) for l in layers] for s, r in found.items()
            }
            for side in ("act", "weight")
        },
        np.array([c["shared"] for c in found[first].candidates]),
    )


def _writers(l: int) -> list[str]:
    return [f"weight_factor/{l}/{t}" for t in ("oproj", "downproj")]


def _grid(table: pl.DataFrame, names: list[str], layers: list[int]) -> dict[str, np.ndarray]:
    """Columns of a per-layer table as `(C, L)` arrays over the given layers."""
    part = table.filter(pl.col("layer").is_in(layers))
    order = pl.DataFrame({"subspace": names, "place": range(len(names))})
    part = part.join(order, on="subspace").sort("place", "layer")
    columns = [c for c in ("conc_w_combined", "rank", "conc_act_null", "conc_w_combined_null") if c in part.columns]
    return {c: part[c].cast(pl.Float64).to_numpy().reshape(len(names), len(layers)) for c in columns}


def doubts(found: Mapping[int, Explanation], layers: Sequence[int]) -> pl.DataFrame:
    """Per candidate, over seeds and LoRA layers: min_gap, and ill_conditioned where any basis is. (section 7)"""
    part = pl.concat(run.per_layer.select("layer", "subspace", "gap", "ill_conditioned") for run in found.values())
    return (
        part.filter(pl.col("layer").is_in(layers))
        .group_by(pl.col("subspace").alias("candidate"), maintain_order=True)
        .agg(pl.col("gap").min().alias("min_gap"), pl.col("ill_conditioned").any())
    )
