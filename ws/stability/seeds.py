"""The sweeps of several LoRA seeds as the arrays that statistics over seeds start from. (docs/method.md section 7)"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float
from torch import Tensor

from ws.explanation.result import Explanation
from ws.explanation.scores import target, topic_terms, weight_targets
from ws.explanation.summary import DOUBTS
from ws.stability.blind import Geometry, combined_factor, thin
from ws.stability.scores import SeedScores
from ws.steer.effect import Steering, steering
from ws.subspaces.algebra import Basis
from ws.subspaces.candidate import race_of


@dataclass(frozen=True)
class SeedRuns:
    """scores: what `ws.stability.scores` works on. geometry: what blind copies are drawn of, its candidates those of
    `scores.tested`. oracles: per side ("act", "weight") and seed, one basis per LoRA layer. steering: whether w steers.
    families: of the candidates, by name."""

    scores: SeedScores
    geometry: Geometry
    oracles: dict[str, dict[str, list[Basis]]]
    steering: Steering
    families: dict[str, str]


def load_seeds(found: Mapping[int, Explanation], depend: Collection[str] = ()) -> SeedRuns:
    """The sweeps of several seeds as arrays, over the summary's layers at which every seed's w has both residual writers.
    depend: candidates whose bases depend on the seed: of kind `seed-dependent`. Raises ValueError where candidates, model,
    layers, null diffs or EVAL probes differ, or there is no such layer."""
    check_seeds(found)
    every, layers, writers = list(found.values()), layers_of(found), _writers
    some, names, d = every[0], [c["name"] for c in every[0].candidates], every[0].setting["d"]
    grids = [_grid(run.per_layer, names, layers, ("conc_w_combined", "rank")) for run in every]
    beyond = [_grid(run.specific_per_layer, names, layers, ("specific_conc_act",)) for run in every]
    act = np.stack([run.tensors["act_topics"].numpy()[:, layers] for run in every])
    ranks = grids[0]["rank"]
    kinds = ["seed-dependent" if c["name"] in depend else c["kind"] for c in some.candidates]
    best = [[_best(run.tensors[f"act_factor/{l}"], ranks[:, i]) for i, l in enumerate(layers)] for run in every]
    best_w = [[_best_w(writers(run, l), ranks[:, i]) for i, l in enumerate(layers)] for run in every]
    nulls = [some.nulls.filter(subspace=name).sort("null").select("R_act", "R_w").to_numpy() for name in names]
    scores = SeedScores(
        names, list(found), act, np.stack([grid["conc_w_combined"] for grid in grids]), ranks, d, layers, kinds,
        [c["axis_kind"] for c in some.candidates], [race_of(c["sees"]) for c in some.candidates], some.setting["n_templates"],
        np.array(best).transpose(0, 2, 1, 3), np.array(best_w).transpose(0, 2, 1),
        np.stack([grid["specific_conc_act"] for grid in beyond]),
        *(np.stack(nulls, axis=1).transpose(2, 0, 1) if len(some.nulls) else (None, None)),
    )  # fmt: skip
    tested = np.flatnonzero(scores.tested)
    geometry = Geometry(
        bases=[[some.tensors[f"basis/{names[c]}/{l}"] for c in tested] for l in layers],
        w=[[combined_factor(writers(r, l), f"seed {s}, layer {l}") for l in layers] for s, r in found.items()],
        act=[[thin(r.tensors[f"act_factor/{l}"]) for l in layers] for r in every],
        specific=[[thin(r.tensors[f"beyond_factor/{l}"]) for l in layers] for r in every],
        clean=[some.tensors[f"clean/{l}"] for l in layers],
        best={"act": scores.best_act.mean(axis=3)[:, tested], "w": scores.best_w[:, tested]},
    )
    oracles = {
        side: {f"seed {s}": [Basis(r.tensors[f"{side}_oracle/{l}"].float()) for l in layers] for s, r in found.items()}
        for side in ("act", "weight")
    }
    effects = [run.setting["effects"] for run in every]
    steers = steering(effects, some.setting["null_effects"], some.setting.get("score", "log-ratio"))
    return SeedRuns(scores, geometry, oracles, steers, {c["name"]: c["family"] for c in some.candidates})


def layers_of(found: Mapping[int, Explanation]) -> list[int]:
    """The summary's layers at which every seed's w has both residual writers; ValueError where there is none."""
    some = next(iter(found.values()), None)
    layers = [l for l in some.layers if all(len(_writers(run, l)) == 2 for run in found.values())] if some else []
    if some and not layers:
        raise ValueError("no layer of w has both residual writers (o_proj and down_proj) in every seed")
    return layers


def _writers(run: Explanation, l: int) -> list[Tensor]:
    named = (f"weight_factor/{l}/{t}" for t in ("oproj", "downproj"))
    return [run.tensors[name] for name in named if name in run.tensors]


def check_seeds(found: Mapping[int, Explanation]) -> None:
    """ValueError where the runs are not of the same things."""
    if not found:
        raise ValueError("no seeds to compare")
    first, some = next(iter(found.items()))
    names = [c["name"] for c in some.candidates]
    for seed, run in found.items():
        mine = [c["name"] for c in run.candidates]
        if run.setting["d"] != some.setting["d"]:
            raise ValueError(f"seeds {first} and {seed} were swept with another model")
        if mine != names:
            apart = sorted({*mine} ^ {*names})
            said = f", as {', '.join(apart[:3])}" if apart else " in another order"
            both = run.setting, some.setting
            told = (of.get("gradients", "") for of in both if not of.get("gradient_pairs"))  # why there are none
            why = next(filter(None, told), "")
            raise ValueError(
                f"seeds {first} and {seed} were swept with other candidates{said}{f' ({why})' if why else ''}; sweep both alike"
            )
        for what in ("fingerprint", "behavior", "protocol", "k", "k_broad", "layers"):
            if run.setting.get(what) != some.setting.get(what):
                raise ValueError(f"seeds {first} and {seed} were swept with another {what}")
        if run.setting["nulls"] != some.setting["nulls"]:
            raise ValueError(f"seeds {first} and {seed} were swept with other null diffs; sweep both with the same")
    shapes = {seed: tuple(run.tensors["act_topics"].shape) for seed, run in found.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"runs differ in layers or EVAL probes: {shapes}")


def _best(F: Float[Tensor, "d n"], ranks: Float[np.ndarray, " C"]) -> Float[np.ndarray, "C n"]:
    """R of every EVAL row in the best subspace of each candidate's rank; NaN for an empty basis, and where the rank is not
    under the number of rows. F: the activation target's factor."""
    rows, n = target(F), F.shape[1]
    known = {r: topic_terms(rows, rows.axes[:, :r]).numpy() for r in {int(r) for r in ranks} if 0 < r < n}
    return np.stack([known.get(int(r), np.full(n, np.nan)) for r in ranks])


def _best_w(writers: list[Tensor], ranks: Float[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
    """R_w of the best subspace of each candidate's rank; NaN for an empty basis."""
    both = weight_targets(*writers)["combined"]
    inside = [float(both.energies[: int(r)].sum()) for r in ranks]
    return np.array([f * both.dim / r if r else np.nan for f, r in zip(inside, ranks, strict=True)])


def _grid(table: pl.DataFrame, names: list[str], layers: list[int], columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Columns of a per-layer table as `(C, L)` arrays over the given layers."""
    order = pl.DataFrame({"subspace": names, "place": range(len(names))})
    part = table.filter(pl.col("layer").is_in(layers)).join(order, on="subspace").sort("place", "layer")
    return {c: part[c].cast(pl.Float64).to_numpy().reshape(len(names), len(layers)) for c in columns}


def doubts(found: Mapping[int, Explanation], layers: Sequence[int]) -> pl.DataFrame:
    """Per candidate, over seeds and LoRA layers: min_gap, and ill_conditioned where any basis is. (section 7)"""
    every = pl.concat(run.per_layer.select("layer", "subspace", "gap", "ill_conditioned") for run in found.values())
    part = every.filter(pl.col("layer").is_in(layers))
    return part.group_by(candidate="subspace", maintain_order=True).agg(DOUBTS)


POSITIONS = {"mean_conc_act_varying": "R_act_varying", "mean_conc_act_claim": "R_act_claim"}
POSITIONS |= {"mean_conc_act_claim_varying": "R_act_claim_varying"}


def positions(found: Mapping[int, Explanation]) -> pl.DataFrame:
    """Per seed and candidate: R_act of the EVAL rows minus their mean (R_act_varying) and, where the protocol reads them, of
    the claim's tokens (R_act_claim, R_act_claim_varying). The rows of one probe are nearly one vector: R_act is mostly
    that of their mean. (section 7)"""
    parts = []
    for seed, run in found.items():
        known = {old: new for old, new in POSITIONS.items() if old in run.plain_summary.columns}
        parts.append(run.plain_summary.select(pl.lit(seed).alias("seed"), pl.col("subspace").alias("candidate"), **{
            new: pl.col(old) for old, new in known.items()
        }))  # fmt: skip
    return pl.concat(parts).with_columns(pl.col("seed").cast(pl.Int64))
