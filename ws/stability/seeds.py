"""The runs of several LoRA seeds, read back as the arrays that statistics over seeds start from.

A run's folder holds `v7_per_layer.csv` and `scores.safetensors` (`ws.show.notebook.save_scores`). The LoRA layers are those at
which every seed's w has both residual writers. (docs/method.md section 7)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from safetensors import safe_open
from torch import Tensor

from ws.show.tables import read_table
from ws.stability.scores import SeedScores, make_scores
from ws.stability.significance import GramFactor, combined_factor
from ws.subspaces.algebra import Basis
from ws.subspaces.candidate import get


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


def load_seeds(folders: Mapping[int, Path]) -> SeedRuns:
    """Read the sweep of each seed. folders: seed -> run folder.

    Raises FileNotFoundError naming a run that is not there, ValueError where the runs do not fit together (other
    candidates, other layers, other EVAL probes) or where no layer of w has both residual writers.
    """
    if not folders:
        raise ValueError("no seeds to compare")
    tables, topics, factors, oracles, first = {}, {}, {}, {"act": {}, "weight": {}}, None
    for seed, folder in folders.items():
        path = folder / "scores.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"seed {seed}: {path} is missing; run the v7_sweep of that seed first")
        tables[seed] = read_table(folder / "v7_per_layer.csv")
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            first = first or (seed, about)
            if about["candidates"] != first[1]["candidates"] or about["d"] != first[1]["d"]:
                raise ValueError(f"seeds {first[0]} and {seed} were swept with other candidates or another model")
            topics[seed] = file.get_tensor("act_topics").numpy()
            n_layers = topics[seed].shape[1]
            factors[seed] = {l: _factors(file, l) for l in range(n_layers)}
            for side in oracles:
                oracles[side][f"seed {seed}"] = {l: file.get_tensor(f"{side}_oracle/{l}") for l in range(n_layers)}
    shapes = {seed: t.shape for seed, t in topics.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"runs differ in layers or EVAL probes: {shapes}")
    layers = [l for l in range(n_layers) if all(len(factors[seed][l]) == 2 for seed in folders)]
    if not layers:
        raise ValueError("no layer of w has both residual writers (o_proj and down_proj) in every seed")
    names = about["candidates"]
    candidates = [get(name) for name in names]
    grid = {seed: _grid(table, names, layers) for seed, table in tables.items()}
    some = grid[first[0]]
    scores = make_scores(
        names,
        list(folders),
        np.stack([t[:, layers] for t in topics.values()]),
        np.stack([g["conc_w_combined"] for g in grid.values()]),
        some["rank"],
        about["d"],
        layers,
        [c.kind for c in candidates],
        [c.axis_kind for c in candidates],
        some["conc_act_null"].mean(axis=1) if "conc_act_null" in some else None,
        some["conc_w_combined_null"].mean(axis=1) if "conc_w_combined_null" in some else None,
    )
    return SeedRuns(
        scores,
        [[combined_factor(factors[seed][l], f"seed {seed}, layer {l}") for l in layers] for seed in folders],
        {
            side: {seed: [Basis(rows[l].float()) for l in layers] for seed, rows in by_seed.items()}
            for side, by_seed in oracles.items()
        },
        np.array([c.shared for c in candidates]),
    )


def _factors(file, l: int) -> list[Tensor]:
    names = [f"weight_factor/{l}/{t}" for t in ("oproj", "downproj")]
    return [file.get_tensor(name) for name in names if name in file.keys()]  # noqa: SIM118  (not a mapping)


def _grid(table: pl.DataFrame, names: list[str], layers: list[int]) -> dict[str, np.ndarray]:
    """Columns of a per-layer table as `(C, L)` arrays over the given layers."""
    part = table.filter(pl.col("layer").is_in(layers))
    order = pl.DataFrame({"subspace": names, "place": range(len(names))})
    part = part.join(order, on="subspace").sort("place", "layer")
    columns = [c for c in ("conc_w_combined", "rank", "conc_act_null", "conc_w_combined_null") if c in part.columns]
    return {c: part[c].cast(pl.Float64).to_numpy().reshape(len(names), len(layers)) for c in columns}


def doubts(folders: Mapping[int, Path], layers: Sequence[int]) -> pl.DataFrame:
    """Per candidate, over seeds and LoRA layers: min_gap, and ill_conditioned where any basis is. (section 7)"""
    part = pl.concat(
        read_table(folder / "v7_per_layer.csv").select("layer", "subspace", "gap", "ill_conditioned")
        for folder in folders.values()
    ).filter(pl.col("layer").is_in(layers))
    return part.group_by(pl.col("subspace").alias("candidate"), maintain_order=True).agg(
        pl.col("gap").min().alias("min_gap"), pl.col("ill_conditioned").any()
    )
