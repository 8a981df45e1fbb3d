"""Scores over LoRA seeds: which ranking survives a new seed. (docs/method.md section 7, 'Stability over seeds')

Per seed s and candidate c, `R_act` and `R_w` are means over LoRA layers (and EVAL topics), `joint = sqrt(R_act R_w)`,
and over seeds the mean of log joint counts. Undefined scores (no residual tensor in w, an empty basis) are NaN with
their reason beside them: they sort last and hold no rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import polars as pl
from jaxtyping import Bool, Float
from scipy import stats

from ws.show.tables import sort_nan_last
from ws.stability.intervals import BOOT, crossed_bootstrap, percentile_interval, t_interval

SCORES = ("R_act", "R_w", "joint")
TOP = 5


@dataclass(frozen=True)
class SeedScores:
    """Scores of one (model, behaviour, adapter) over its seeds, checked when they are made.

    act: per-topic activation concentration; w: weight concentration; both on the LoRA layers named by `layers`. ranks:
    of the bases. kinds: "A-hypothesis" (default), "ceiling", "control" or
    "seed-dependent" (in no ranking). axis_kinds: read, write (default), mixed,
    ceiling. null_act, null_w: R_act and R_w of the same candidates on the null diff, NaN where not run. Raises
    ValueError naming the axis whose length disagrees, a repeated seed or candidate, or a negative score.
    """

    candidates: Sequence[str]
    seeds: Sequence[int]
    act: Float[np.ndarray, "S C L n"]
    w: Float[np.ndarray, "S C L"]
    ranks: Float[np.ndarray, "C L"]
    d: int
    layers: Sequence[int] | None = None
    kinds: Sequence[str] | None = None
    axis_kinds: Sequence[str] | None = None
    null_act: Float[np.ndarray, " C"] | None = None
    null_w: Float[np.ndarray, " C"] | None = None

    def __post_init__(self):
        C, layers = len(self.candidates), range(self.act.shape[2]) if self.layers is None else self.layers
        named = {"seeds": self.seeds, "candidates": self.candidates, "layers": layers}
        for have, (name, values) in zip(self.act.shape, named.items(), strict=False):
            if have != len(values):
                raise ValueError(f"act: {have} {name}, {len(values)} were named")
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: repeated entries in {list(values)}")
        if self.w.shape != self.act.shape[:3]:
            raise ValueError(f"w: shape {self.w.shape}, act has seeds x candidates x layers {self.act.shape[:3]}")
        for name, values in {"act": self.act, "w": self.w}.items():
            if (values < 0).any():
                raise ValueError(f"{name}: negative score of {self.candidates[np.argwhere(values < 0)[0][1]]}")
        named |= {"kinds": self.kinds or ["A-hypothesis"] * C, "axis_kinds": self.axis_kinds or ["write"] * C}
        arrays = {name: getattr(self, name) for name in ("act", "w", "null_act", "null_w")}
        facts = {name: np.full(C, np.nan) if x is None else x.astype(np.float64) for name, x in arrays.items()}
        for name, value in (facts | {name: tuple(values) for name, values in named.items()}).items():
            object.__setattr__(self, name, value)  # frozen from here on

    @property
    def ranked(self) -> Bool[np.ndarray, " C"]:
        """Candidates that take part in the ranking: the A-hypotheses (ceilings saw w, controls are no hypotheses)."""
        return np.array([kind == "A-hypothesis" for kind in self.kinds])

    @property
    def contenders(self) -> Bool[np.ndarray, " C"]:
        """Candidates that may be named the winner: A-hypotheses that write (axis kind write or mixed), as in v7."""
        return self.ranked & np.array([axis in ("write", "mixed") for axis in self.axis_kinds])

    @property
    def about(self) -> dict[str, Sequence | np.ndarray]:
        """The leading columns of the tables over candidates; mean_rank is that of the basis over layers."""
        names = {"candidate": self.candidates, "kind": self.kinds, "axis_kind": self.axis_kinds}
        return names | {"mean_rank": self.ranks.mean(axis=1)}

    @property
    def nulls(self) -> dict[str, Float[np.ndarray, " C"]]:
        return {"R_act": self.null_act, "R_w": self.null_w}


make_scores = SeedScores


def seed_values(scores: SeedScores) -> dict[str, Float[np.ndarray, "S C"]]:
    """R_act, R_w and joint of every seed and candidate; NaN where any LoRA layer is undefined."""
    r_act, r_w = scores.act.mean(axis=(2, 3)), scores.w.mean(axis=2)
    return {"R_act": r_act, "R_w": r_w, "joint": np.sqrt(r_act * r_w)}


def log_values(scores: SeedScores) -> dict[str, Float[np.ndarray, "S C"]]:
    """Natural logs of `seed_values`; a score of 0 has no logarithm and is NaN."""
    return {name: np.log(np.where(value == 0, np.nan, value)) for name, value in seed_values(scores).items()}


def undefined_reason(scores: SeedScores) -> list[list[str]]:
    """Per seed and candidate, why its joint score is undefined; empty text where it is defined."""
    empty, L = (scores.ranks == 0).sum(axis=1), len(scores.layers)
    bad = {"R_act": np.isnan(scores.act).any(axis=3).sum(axis=2), "R_w": np.isnan(scores.w).sum(axis=2)}
    values = seed_values(scores)

    def reason(s: int, c: int) -> str:
        found = [f"rank 0 at {empty[c]} of {L} layers"] if empty[c] else []
        for name, layers in bad.items():
            if layers[s, c]:
                found.append(f"{name} undefined at {layers[s, c]} of {L} layers")
            elif values[name][s, c] == 0:
                found.append(f"{name} is 0")
        return "; ".join(found)

    return [[reason(s, c) for c in range(len(scores.candidates))] for s in range(len(scores.seeds))]


def ranks_per_seed(scores: SeedScores) -> Float[np.ndarray, "S C"]:
    """Rank by joint score within each seed, 1 = highest, ties share their mean; NaN where it takes no part."""
    logs = np.where(scores.ranked, log_values(scores)["joint"], np.nan)
    return stats.rankdata(-logs, axis=1, nan_policy="omit")


def per_seed_table(scores: SeedScores) -> pl.DataFrame:
    """`v7b_per_seed`: one row per seed and candidate. rank_in_seed: place by joint score among the A-hypotheses, null
    where it takes no part. undefined: reason, or empty."""
    values, places, reasons = seed_values(scores), ranks_per_seed(scores), undefined_reason(scores)
    parts = []
    for s, seed in enumerate(scores.seeds):
        columns = {"seed": [seed] * len(scores.candidates), **scores.about}
        columns |= {"R_act": values["R_act"][s], "R_w": values["R_w"][s], "joint_score": values["joint"][s]}
        columns["rank_in_seed"] = places[s]
        columns |= {f"{name}_vs_null_diff": values[name][s] / null for name, null in scores.nulls.items()}
        parts.append(pl.DataFrame(columns | {"undefined": reasons[s]}))
    return pl.concat(parts).with_columns(pl.col("rank_in_seed").fill_nan(None))


def sign_agreement(logs: Float[np.ndarray, "S C"]) -> Float[np.ndarray, " C"]:
    """Share of seeds on the majority's side of R = 1 (log R = 0); between 1/2 and 1, NaN where a seed is undefined."""
    above, below = (logs > 0).sum(axis=0), (logs < 0).sum(axis=0)
    return np.where(np.isnan(logs).any(axis=0), np.nan, np.maximum(above, below) / len(logs))


def summary_table(scores: SeedScores, seed: int, boot: int = BOOT) -> pl.DataFrame:
    """`v7b_summary`: one row per candidate, highest mean log joint (natural log) first, undefined last.

    For each score X: X_sd over seeds, and two intervals of X_geomean in units of R, X_boot (crossed bootstrap
    percentiles, whose generator has `seed`) and X_t (over seeds). top5_count: seeds in whose top 5 it is; top5_chance:
    the same for a random order. R_*_vs_null_diff: geometric mean over seeds / null diff.
    """
    S, C = len(scores.seeds), len(scores.candidates)
    values, logs, places = seed_values(scores), log_values(scores), ranks_per_seed(scores)
    draws = crossed_bootstrap(scores.act.mean(axis=2), values["R_w"], seed, boot)
    columns = {**scores.about, "S": [S] * C, "mean_log_joint": logs["joint"].mean(axis=0)}
    for name in SCORES:
        value, log = values[name], logs[name]
        q25, median, q75 = np.quantile(value, [0.25, 0.5, 0.75], axis=0)
        boot_ends = np.where(np.isnan(log).any(axis=0), np.nan, percentile_interval(draws[name]))
        with np.errstate(over="ignore"):  # exp of a t bound may pass the largest float at S = 2
            (boot_lo, boot_hi), (t_lo, t_hi) = np.exp(boot_ends), np.exp(t_interval(log))
        columns |= {
            f"{name}_geomean": np.exp(log.mean(axis=0)),
            f"{name}_median": median,
            f"{name}_iqr": q75 - q25,
            f"{name}_mean": value.mean(axis=0),
            f"{name}_sd": value.std(axis=0, ddof=1) if S > 1 else np.full(C, np.nan),
            f"{name}_sign_agree": sign_agreement(log),
            f"{name}_boot_lo": boot_lo,
            f"{name}_boot_hi": boot_hi,
            f"{name}_t_lo": t_lo,
            f"{name}_t_hi": t_hi,
        }
    in_rank = ~np.isnan(places).any(axis=0)
    chance = S * min(TOP / max(int(in_rank.sum()), 1), 1.0)
    columns |= {"rank_median": np.median(places, axis=0), "rank_best": places.min(axis=0)}
    columns |= {"rank_worst": places.max(axis=0), "top5_count": (places <= TOP).sum(axis=0)}
    columns["top5_chance"] = np.where(in_rank, chance, np.nan)
    columns |= {f"joint_seed_{k}": values["joint"][s] for s, k in enumerate(scores.seeds)}
    columns |= {f"{name}_null_diff": null for name, null in scores.nulls.items()}
    columns |= {f"{name}_vs_null_diff": columns[f"{name}_geomean"] / null for name, null in scores.nulls.items()}
    columns["undefined"] = [next(filter(None, reasons), "") for reasons in zip(*undefined_reason(scores), strict=True)]
    return sort_nan_last(pl.DataFrame(columns).sort("candidate"), "mean_log_joint")


def rank_stability_table(scores: SeedScores) -> pl.DataFrame:
    """`v7b_rank_stability`: agreement of two seeds' orders of the A-hypotheses, one row per score and pair of seeds.
    n_candidates: those defined in both. chance_tau_sd, chance_spearman_sd: of unrelated orders, whose mean is 0.
    Candidates share data, so even the chance columns call agreement of *families* agreement of candidates."""
    logs, rows = log_values(scores), []
    for name in SCORES:
        for a, b in combinations(range(len(scores.seeds)), 2):
            both = scores.ranked & ~np.isnan(logs[name][[a, b]]).any(axis=0)
            (x, y), m = logs[name][[a, b]][:, both], int(both.sum())
            top = min(TOP, m)
            shared = len(set(np.argsort(-x, kind="stable")[:top]) & set(np.argsort(-y, kind="stable")[:top]))
            tau, rho, tau_sd, rho_sd = [float("nan")] * 4
            if m > 2:
                tau_sd, rho_sd = float(np.sqrt(2 * (2 * m + 5) / (9 * m * (m - 1)))), float(1 / np.sqrt(m - 1))
                if np.ptp(x) > 0 and np.ptp(y) > 0:  # an order without differences has no correlation
                    tau, rho = float(stats.kendalltau(x, y).statistic), float(stats.spearmanr(x, y).statistic)
            chance = top * top / m if m else float("nan")
            rows.append((name, scores.seeds[a], scores.seeds[b], m, tau, rho, tau_sd, rho_sd, shared, chance))
    schema = {"score": pl.String} | dict.fromkeys(("seed_a", "seed_b", "n_candidates"), pl.Int64)
    schema |= dict.fromkeys(("kendall_tau", "spearman", "chance_tau_sd", "chance_spearman_sd"), pl.Float64)
    return pl.DataFrame(rows, schema | {"top5_shared": pl.Int64, "chance_top5_shared": pl.Float64}, orient="row")
