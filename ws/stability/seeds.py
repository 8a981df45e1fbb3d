"""The sweeps of several LoRA seeds as the arrays that statistics over seeds start from. (docs/method.md section 7)"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from torch import Tensor

from ws.explanation.result import Explanation
from ws.explanation.summary import DOUBTS
from ws.stability.scores import SeedScores
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
    """The sweeps of several seeds as arrays, over the layers at which every seed's w has both residual writers. Raises
    ValueError where candidates, model or EVAL probes differ, or there is no such layer."""
    if not found:
        raise ValueError("no seeds to compare")
    first, some = next(iter(found.items()))
    names, d = [c["name"] for c in some.candidates], some.setting["d"]
    for seed, run in found.items():
        if [c["name"] for c in run.candidates] != names or run.setting["d"] != d:
            raise ValueError(f"seeds {first} and {seed} were swept with other candidates or another model")
        for what in ("fingerprint", "behavior", "protocol", "k", "k_broad"):
            if run.setting.get(what) != some.setting.get(what):
                raise ValueError(f"seeds {first} and {seed} were swept with another {what}")
    shapes = {seed: run.tensors["act_topics"].shape for seed, run in found.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"runs differ in layers or EVAL probes: {shapes}")

    def writers(run: Explanation, l: int) -> list[Tensor]:
        named = (f"weight_factor/{l}/{t}" for t in ("oproj", "downproj"))
        return [run.tensors[name] for name in named if name in run.tensors]

    layers = [l for l in range(shapes[first][1]) if all(len(writers(run, l)) == 2 for run in found.values())]
    if not layers:
        raise ValueError("no layer of w has both residual writers (o_proj and down_proj) in every seed")
    grids = [_grid(run.per_layer, names, layers) for run in found.values()]
    act = np.stack([run.tensors["act_topics"].numpy()[:, layers] for run in found.values()])
    w = np.stack([grid["conc_w_combined"] for grid in grids])
    kinds = ([c[kind] for c in some.candidates] for kind in ("kind", "axis_kind"))
    nulls = (grids[0][c].mean(axis=1) if c in grids[0] else None for c in ("conc_act_null", "conc_w_combined_null"))
    scores = SeedScores(names, list(found), act, w, grids[0]["rank"], d, layers, *kinds, *nulls)
    factors = [[combined_factor(writers(run, l), f"seed {s}, layer {l}") for l in layers] for s, run in found.items()]
    oracles = {
        side: {f"seed {s}": [Basis(r.tensors[f"{side}_oracle/{l}"].float()) for l in layers] for s, r in found.items()}
        for side in ("act", "weight")
    }
    return SeedRuns(scores, factors, oracles, np.array([c["shared"] for c in some.candidates]))


def _grid(table: pl.DataFrame, names: list[str], layers: list[int]) -> dict[str, np.ndarray]:
    """Columns of a per-layer table as `(C, L)` arrays over the given layers."""
    order = pl.DataFrame({"subspace": names, "place": range(len(names))})
    part = table.filter(pl.col("layer").is_in(layers)).join(order, on="subspace").sort("place", "layer")
    columns = [c for c in ("conc_w_combined", "rank", "conc_act_null", "conc_w_combined_null") if c in part.columns]
    return {c: part[c].cast(pl.Float64).to_numpy().reshape(len(names), len(layers)) for c in columns}


def doubts(found: Mapping[int, Explanation], layers: Sequence[int]) -> pl.DataFrame:
    """Per candidate, over seeds and LoRA layers: min_gap, and ill_conditioned where any basis is. (section 7)"""
    every = pl.concat(run.per_layer.select("layer", "subspace", "gap", "ill_conditioned") for run in found.values())
    part = every.filter(pl.col("layer").is_in(layers))
    return part.group_by(candidate="subspace", maintain_order=True).agg(DOUBTS)
