"""Scores over LoRA seeds: which ranking survives a new seed.

The unit is a table of per-topic activation scores `act[s, c, l, t] = (|B^T x_t|^2 / |x_t|^2) / (r/d)` and weight scores
`w[s, c, l]` (conc_w_combined) over seeds s, candidates c, LoRA layers l and EVAL topics t:

    R_act[s, c] = mean_{l,t} act,   R_w[s, c] = mean_l w,
    joint[s, c] = sqrt(R_act R_w),  joint[c] = mean_s log joint[s, c].

Undefined scores (no residual tensor in w, an empty basis) are NaN with their reason beside them: they sort last and
hold no rank. (docs/method.md section 7, 'Stability over seeds')
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import polars as pl
from jaxtyping import Bool, Float
from scipy import stats

from ws.stability.intervals import BOOT, crossed_bootstrap, percentile_interval, t_interval

SCORES = ("R_act", "R_w", "joint")
TOP = 5


@dataclass(frozen=True)
class SeedScores:
    """Scores of one (model, behaviour, adapter) over its seeds.

    act: (S, C, L, n) per-topic activation concentration. w: (S, C, L) weight concentration. Both on the LoRA layers
    named by `layers`. ranks: (C, L) basis ranks. kinds: "A-hypothesis", "ceiling" or "control". axis_kinds: read,
    write, mixed, ceiling. null_act, null_w: (C,) R_act and R_w of the same candidates on the null diff, NaN where not
    run.
    """

    candidates: tuple[str, ...]
    seeds: tuple[int, ...]
    layers: tuple[int, ...]
    act: Float[np.ndarray, "S C L n"]
    w: Float[np.ndarray, "S C L"]
    ranks: Float[np.ndarray, "C L"]
    kinds: tuple[str, ...]
    axis_kinds: tuple[str, ...]
    d: int
    null_act: Float[np.ndarray, " C"]
    null_w: Float[np.ndarray, " C"]

    @property
    def ranked(self) -> Bool[np.ndarray, " C"]:
        """Candidates that take part in the ranking: the A-hypotheses (ceilings saw w, controls are no hypotheses)."""
        return np.array([kind == "A-hypothesis" for kind in self.kinds])

    @property
    def contenders(self) -> Bool[np.ndarray, " C"]:
        """Candidates that may be named the winner: A-hypotheses that write (axis kind write or mixed), as in v7."""
        return self.ranked & np.array([axis in ("write", "mixed") for axis in self.axis_kinds])


def make_scores(
    candidates: Sequence[str],
    seeds: Sequence[int],
    act: Float[np.ndarray, "S C L n"],
    w: Float[np.ndarray, "S C L"],
    ranks: Float[np.ndarray, "C L"],
    d: int,
    layers: Sequence[int] | None = None,
    kinds: Sequence[str] | None = None,
    axis_kinds: Sequence[str] | None = None,
    null_act: Float[np.ndarray, " C"] | None = None,
    null_w: Float[np.ndarray, " C"] | None = None,
) -> SeedScores:
    """A checked `SeedScores`; without metadata every candidate is an A-hypothesis that writes.

    Raises ValueError naming the axis whose length disagrees, a repeated seed or candidate, or a negative score.
    """
    C = len(candidates)
    expected = {"seeds": (act.shape[0], len(seeds)), "candidates": (act.shape[1], C)}
    if layers is not None:
        expected["layers"] = (act.shape[2], len(layers))
    for name, (have, want) in expected.items():
        if have != want:
            raise ValueError(f"act: {have} {name}, {want} were named")
    if w.shape != act.shape[:3]:
        raise ValueError(f"w: shape {w.shape}, act has seeds x candidates x layers {act.shape[:3]}")
    for name, values in {"seeds": seeds, "candidates": candidates}.items():
        if len(set(values)) != len(values):
            raise ValueError(f"{name}: repeated entries in {list(values)}")
    for name, values in {"act": act, "w": w}.items():
        if (values < 0).any():
            raise ValueError(f"{name}: negative score of {candidates[int(np.argwhere(values < 0)[0][1])]}")
    return SeedScores(
        candidates=tuple(candidates),
        seeds=tuple(seeds),
        layers=tuple(range(act.shape[2]) if layers is None else layers),
        act=act.astype(np.float64),
        w=w.astype(np.float64),
        ranks=ranks,
        kinds=tuple(["A-hypothesis"] * C if kinds is None else kinds),
        axis_kinds=tuple(["write"] * C if axis_kinds is None else axis_kinds),
        d=d,
        null_act=np.full(C, np.nan) if null_act is None else null_act.astype(np.float64),
        null_w=np.full(C, np.nan) if null_w is None else null_w.astype(np.float64),
    )


def seed_values(scores: SeedScores) -> dict[str, Float[np.ndarray, "S C"]]:
    """R_act, R_w and joint of every seed and candidate; NaN where any LoRA layer is undefined. (section 7)"""
    r_act = scores.act.mean(axis=(2, 3))
    r_w = scores.w.mean(axis=2)
    return {"R_act": r_act, "R_w": r_w, "joint": np.sqrt(r_act * r_w)}


def log_values(scores: SeedScores) -> dict[str, Float[np.ndarray, "S C"]]:
    """Natural logs of `seed_values`; a score of 0 has no logarithm and is NaN."""
    with np.errstate(divide="ignore"):
        logs = {name: np.log(value) for name, value in seed_values(scores).items()}
    return {name: np.where(np.isneginf(value), np.nan, value) for name, value in logs.items()}


def undefined_reason(scores: SeedScores) -> list[list[str]]:
    """Per seed and candidate, why its joint score is undefined; empty text where it is defined."""
    r_act = scores.act.mean(axis=(2, 3))
    bad_act, bad_w = np.isnan(scores.act).any(axis=3).sum(axis=2), np.isnan(scores.w).sum(axis=2)
    L = len(scores.layers)

    def reason(s: int, c: int) -> str:
        found = []
        if (scores.ranks[c] == 0).any():
            found.append(f"rank 0 at {int((scores.ranks[c] == 0).sum())} of {L} layers")
        if bad_act[s, c]:
            found.append(f"R_act undefined at {bad_act[s, c]} of {L} layers")
        elif r_act[s, c] == 0:
            found.append("R_act is 0")
        if bad_w[s, c]:
            found.append(f"R_w undefined at {bad_w[s, c]} of {L} layers")
        elif scores.w[s, c].mean() == 0:
            found.append("R_w is 0")
        return "; ".join(found)

    return [[reason(s, c) for c in range(len(scores.candidates))] for s in range(len(scores.seeds))]


def ranks_per_seed(scores: SeedScores) -> Float[np.ndarray, "S C"]:
    """Rank by joint score within each seed, 1 = highest, ties share their mean; NaN where it takes no part."""
    logs = log_values(scores)["joint"]
    ranks = np.full(logs.shape, np.nan)
    for s, row in enumerate(logs):
        taking_part = scores.ranked & ~np.isnan(row)
        ranks[s, taking_part] = stats.rankdata(-row[taking_part])
    return ranks


def per_seed_table(scores: SeedScores) -> pl.DataFrame:
    """`v7b_per_seed`: one row per seed and candidate.

    Columns: seed, candidate, kind, axis_kind, mean_rank (of the basis), R_act, R_w, joint_score, rank_in_seed (place by
    joint score among the A-hypotheses, null where it takes no part), R_act_vs_null_diff, R_w_vs_null_diff, undefined
    (reason, or empty).
    """
    values, places, reasons = seed_values(scores), ranks_per_seed(scores), undefined_reason(scores)
    rows = []
    for s, seed in enumerate(scores.seeds):
        for c, candidate in enumerate(scores.candidates):
            rows.append(
                {
                    "seed": seed,
                    "candidate": candidate,
                    "kind": scores.kinds[c],
                    "axis_kind": scores.axis_kinds[c],
                    "mean_rank": float(scores.ranks[c].mean()),
                    "R_act": float(values["R_act"][s, c]),
                    "R_w": float(values["R_w"][s, c]),
                    "joint_score": float(values["joint"][s, c]),
                    "rank_in_seed": None if np.isnan(places[s, c]) else float(places[s, c]),
                    "R_act_vs_null_diff": float(values["R_act"][s, c] / scores.null_act[c]),
                    "R_w_vs_null_diff": float(values["R_w"][s, c] / scores.null_w[c]),
                    "undefined": reasons[s][c],
                }
            )
    return pl.DataFrame(rows, infer_schema_length=None)


def sign_agreement(logs: Float[np.ndarray, "S C"]) -> Float[np.ndarray, " C"]:
    """Share of seeds on the majority's side of R = 1 (log R = 0); between 1/2 and 1, NaN where a seed is undefined."""
    above, below = (logs > 0).sum(axis=0), (logs < 0).sum(axis=0)
    return np.where(np.isnan(logs).any(axis=0), np.nan, np.maximum(above, below) / len(logs))


def summary_table(scores: SeedScores, seed: int, boot: int = BOOT, level: float = 0.95) -> pl.DataFrame:
    """`v7b_summary`: one row per candidate, highest mean log joint first, undefined last.

    Columns: candidate, kind, axis_kind, mean_rank, S, mean_log_joint (natural log); for each score X in R_act, R_w,
    joint: X_geomean, X_median, X_iqr, X_mean, X_sd (over seeds), X_sign_agree, X_boot_lo, X_boot_hi (crossed bootstrap
    percentiles) and X_t_lo, X_t_hi (t over seeds), both for the geometric mean, in units of R; rank_median, rank_best,
    rank_worst, top5_count (seeds in whose top 5 it is), top5_chance (the same for a random order), joint_seed_<k>,
    R_act_null_diff, R_w_null_diff, R_act_vs_null_diff, R_w_vs_null_diff (geometric mean over seeds / null diff),
    undefined. seed: of the bootstrap's generator.
    """
    S, C = len(scores.seeds), len(scores.candidates)
    values, logs, places = seed_values(scores), log_values(scores), ranks_per_seed(scores)
    draws = crossed_bootstrap(scores.act.mean(axis=2), values["R_w"], seed, boot)
    reasons = undefined_reason(scores)
    columns = {
        "candidate": list(scores.candidates),
        "kind": list(scores.kinds),
        "axis_kind": list(scores.axis_kinds),
        "mean_rank": scores.ranks.mean(axis=1),
        "S": [S] * C,
        "mean_log_joint": logs["joint"].mean(axis=0),
    }
    for name in SCORES:
        value, log = values[name], logs[name]
        q25, median, q75 = np.quantile(value, [0.25, 0.5, 0.75], axis=0)
        undefined = np.isnan(log).any(axis=0)
        boot_lo, boot_hi = (np.where(undefined, np.nan, end) for end in percentile_interval(draws[name], level))
        t_lo, t_hi = t_interval(log, level)
        with np.errstate(over="ignore"):  # exp of a t bound may pass the largest float at S = 2
            columns |= {
                f"{name}_geomean": np.exp(log.mean(axis=0)),
                f"{name}_median": median,
                f"{name}_iqr": q75 - q25,
                f"{name}_mean": value.mean(axis=0),
                f"{name}_sd": value.std(axis=0, ddof=1) if S > 1 else np.full(C, np.nan),
                f"{name}_sign_agree": sign_agreement(log),
                f"{name}_boot_lo": np.exp(boot_lo),
                f"{name}_boot_hi": np.exp(boot_hi),
                f"{name}_t_lo": np.exp(t_lo),
                f"{name}_t_hi": np.exp(t_hi),
            }
    in_rank = ~np.isnan(places).any(axis=0)
    taking_part = max(int(in_rank.sum()), 1)
    columns |= {
        "rank_median": np.where(in_rank, np.median(places, axis=0), np.nan),
        "rank_best": np.where(in_rank, places.min(axis=0), np.nan),
        "rank_worst": np.where(in_rank, places.max(axis=0), np.nan),
        "top5_count": (places <= TOP).sum(axis=0),
        "top5_chance": np.where(in_rank, S * min(TOP / taking_part, 1.0), np.nan),
    }
    columns |= {f"joint_seed_{k}": values["joint"][s] for s, k in enumerate(scores.seeds)}
    columns |= {"R_act_null_diff": scores.null_act, "R_w_null_diff": scores.null_w}
    columns["R_act_vs_null_diff"] = columns["R_act_geomean"] / scores.null_act
    columns["R_w_vs_null_diff"] = columns["R_w_geomean"] / scores.null_w
    columns["undefined"] = [next((row[c] for row in reasons if row[c]), "") for c in range(C)]
    frame = pl.DataFrame(columns)
    key = pl.col("mean_log_joint").fill_nan(None)
    return frame.sort(key, "candidate", descending=[True, False], nulls_last=True)


def rank_stability_table(scores: SeedScores) -> pl.DataFrame:
    """`v7b_rank_stability`: agreement of two seeds' orders of the A-hypotheses, one row per score and pair of seeds.

    Columns: score, seed_a, seed_b, n_candidates (defined in both), kendall_tau, spearman, chance_tau_sd and
    chance_spearman_sd (of unrelated orders, whose mean is 0), top5_shared, chance_top5_shared (`25 / n_candidates`).
    Candidates share data, so even the chance columns call agreement of *families* agreement of candidates.
    """
    logs, rows = log_values(scores), []
    for name in SCORES:
        for a, b in combinations(range(len(scores.seeds)), 2):
            x, y = logs[name][a], logs[name][b]
            both = scores.ranked & ~np.isnan(x) & ~np.isnan(y)
            x, y, m = x[both], y[both], int(both.sum())
            top = min(TOP, m)
            shared = len(set(np.argsort(-x, kind="stable")[:top]) & set(np.argsort(-y, kind="stable")[:top]))
            enough = m > 2 and np.ptp(x) > 0 and np.ptp(y) > 0  # an order without differences has no correlation
            rows.append(
                {
                    "score": name,
                    "seed_a": scores.seeds[a],
                    "seed_b": scores.seeds[b],
                    "n_candidates": m,
                    "kendall_tau": float(stats.kendalltau(x, y).statistic) if enough else float("nan"),
                    "spearman": float(stats.spearmanr(x, y).statistic) if enough else float("nan"),
                    "chance_tau_sd": float(np.sqrt(2 * (2 * m + 5) / (9 * m * (m - 1)))) if m > 2 else float("nan"),
                    "chance_spearman_sd": float(1 / np.sqrt(m - 1)) if m > 2 else float("nan"),
                    "top5_shared": shared,
                    "chance_top5_shared": top * top / m if m else float("nan"),
                }
            )
    schema = {
        "score": pl.String,
        "seed_a": pl.Int64,
        "seed_b": pl.Int64,
        "n_candidates": pl.Int64,
        "kendall_tau": pl.Float64,
    }
    schema |= {"spearman": pl.Float64, "chance_tau_sd": pl.Float64, "chance_spearman_sd": pl.Float64}
    schema |= {"top5_shared": pl.Int64, "chance_top5_shared": pl.Float64}
    return pl.DataFrame(rows, schema=schema)
