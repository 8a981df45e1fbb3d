"""Scores over LoRA seeds: which ranking survives a new seed. (docs/method.md section 7, 'Stability over seeds')

Per seed s and candidate c, `R_act` and `R_w` are means over LoRA layers (and EVAL rows), `joint = sqrt(R_act R_w)`, and over
seeds the mean of log joint counts. R falls with the rank of a basis, so candidates are ordered by `honest = sqrt(H_act
H_w)`, H the share of what the best subspace of the same rank holds. Undefined scores (no residual tensor in w, an empty
basis) are NaN with their reason beside them: they sort last and hold no rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import polars as pl
from jaxtyping import Bool, Float
from scipy import stats

from ws.show.tables import sort_nan_last
from ws.stability.intervals import (
    BOOT,
    crossed_bootstrap,
    crossed_t_interval,
    percentile_interval,
    row_influence,
    t_interval,
)
from ws.steer.effect import null_mean

SCORES = ("R_act", "R_w", "joint", "honest")
TOP = 5


@dataclass(frozen=True)
class SeedScores:
    """Scores of one (model, behaviour, adapter) over its seeds, checked when they are made.

    act: activation concentration of every EVAL row, template by template; w: weight concentration; both on the LoRA layers
    named by `layers`. ranks: of the bases. best_act, best_w: what the best subspace of each candidate's rank scores there,
    in the same units; left out, H is R. kinds: "A-hypothesis" (default), "ceiling", "control" or "seed-dependent" (in no
    ranking). axis_kinds: read, write (default), mixed, ceiling. sees: `Candidate.race`, default weights. specific: R_act
    beyond the clean PCA. null_act, null_w: R_act and R_w of the same candidates on J null diffs. Raises ValueError naming the
    axis whose length disagrees, a repeated seed or candidate, or a negative score.
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
    sees: Sequence[str] | None = None
    templates: int = 1
    best_act: Float[np.ndarray, "S C L n"] | None = None
    best_w: Float[np.ndarray, "S C L"] | None = None
    specific: Float[np.ndarray, "S C L"] | None = None
    null_act: Float[np.ndarray, "J C"] | None = None
    null_w: Float[np.ndarray, "J C"] | None = None

    def __post_init__(self):
        C, layers = len(self.candidates), range(self.act.shape[2]) if self.layers is None else self.layers
        named = {"seeds": self.seeds, "candidates": self.candidates, "layers": layers}
        for have, (name, values) in zip(self.act.shape, named.items(), strict=False):
            if have != len(values):
                raise ValueError(f"act: {have} {name}, {len(values)} were named")
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: repeated entries in {list(values)}")
        if self.act.shape[3] % self.templates:
            raise ValueError(f"act: {self.act.shape[3]} EVAL rows are no multiple of {self.templates} templates")
        if self.w.shape != self.act.shape[:3]:
            raise ValueError(f"w: shape {self.w.shape}, act has seeds x candidates x layers {self.act.shape[:3]}")
        for name, values in {"act": self.act, "w": self.w}.items():
            if (values < 0).any():
                raise ValueError(f"{name}: negative score of {self.candidates[np.argwhere(values < 0)[0][1]]}")
        named |= {"kinds": self.kinds or ["A-hypothesis"] * C, "axis_kinds": self.axis_kinds or ["write"] * C}
        named |= {"sees": self.sees or ["weights"] * C}
        usual = {"best_act": np.ones_like(self.act), "best_w": np.ones_like(self.w)}
        usual |= {"specific": np.full(self.w.shape, np.nan)} | dict.fromkeys(("null_act", "null_w"), np.empty((0, C)))
        facts = {name: x if getattr(self, name) is None else getattr(self, name) for name, x in usual.items()}
        facts |= {"act": self.act, "w": self.w}
        facts = {name: np.asarray(x, dtype=np.float64) for name, x in facts.items()}
        for name, value in (facts | {name: tuple(values) for name, values in named.items()}).items():
            object.__setattr__(self, name, value)  # frozen from here on

    @property
    def ranked(self) -> Bool[np.ndarray, " C"]:
        """Candidates that take part in the ranking: the A-hypotheses (ceilings saw w, controls are no hypotheses)."""
        return np.array([kind == "A-hypothesis" for kind in self.kinds])

    @property
    def tested(self) -> Bool[np.ndarray, " C"]:
        """Candidates that a blind copy makes sense of: built without w, the same for every seed, empty at no layer."""
        blind = np.array([kind in ("A-hypothesis", "control") for kind in self.kinds])
        return blind & (self.ranks > 0).all(axis=1)

    @property
    def contenders(self) -> Bool[np.ndarray, " C"]:
        """Candidates that may be named the winner: A-hypotheses that write (axis kind write or mixed), as in v7."""
        return self.ranked & np.array([axis in ("write", "mixed") for axis in self.axis_kinds])

    @property
    def about(self) -> dict[str, Sequence | np.ndarray]:
        """The leading columns of the tables over candidates; mean_rank is that of the basis over layers."""
        names = {"candidate": self.candidates, "kind": self.kinds, "axis_kind": self.axis_kinds, "sees": self.sees}
        return names | {"mean_rank": self.ranks.mean(axis=1)}

    @property
    def nulls(self) -> dict[str, Float[np.ndarray, "J C"]]:
        return {"R_act": self.null_act, "R_w": self.null_w}


make_scores = SeedScores


def seed_values(scores: SeedScores) -> dict[str, Float[np.ndarray, "S C"]]:
    """R_act, R_w, joint, H_act, H_w, honest and specific of every seed and candidate; NaN where any LoRA layer is undefined."""
    r_act, r_w = scores.act.mean(axis=(2, 3)), scores.w.mean(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        h_act = (scores.act.mean(axis=3) / scores.best_act.mean(axis=3)).mean(axis=2)
        h_w = (scores.w / scores.best_w).mean(axis=2)
    found = {"R_act": r_act, "R_w": r_w, "joint": np.sqrt(r_act * r_w)}
    return found | {
        "H_act": h_act,
        "H_w": h_w,
        "honest": np.sqrt(h_act * h_w),
        "specific": scores.specific.mean(axis=2),
    }


def log_values(scores: SeedScores) -> dict[str, Float[np.ndarray, "S C"]]:
    """Natural logs of `seed_values`; a score of 0 has no logarithm and is NaN."""
    return {name: np.log(np.where(value == 0, np.nan, value)) for name, value in seed_values(scores).items()}


def undefined_reason(scores: SeedScores) -> list[list[str]]:
    """Per seed and candidate, why its score is undefined; empty text where it is defined."""
    empty, (L, n) = (scores.ranks == 0).sum(axis=1), scores.act.shape[2:]
    bad = {"R_act": np.isnan(scores.act).any(axis=3).sum(axis=2), "R_w": np.isnan(scores.w).sum(axis=2)}
    values = seed_values(scores)

    def reason(s: int, c: int) -> str:
        found = [f"rank 0 at {empty[c]} of {L} layers"] if empty[c] else []
        for name, layers in bad.items():
            if layers[s, c]:
                found.append(f"{name} undefined at {layers[s, c]} of {L} layers")
            elif values[name][s, c] == 0:
                found.append(f"{name} is 0")
        if not found and np.isnan(values["honest"][s, c]):
            found.append(f"no best subspace of rank {scores.ranks[c].max():.0f} over {n} EVAL rows")
        return "; ".join(found)

    return [[reason(s, c) for c in range(len(scores.candidates))] for s in range(len(scores.seeds))]


def ranks_per_seed(scores: SeedScores) -> Float[np.ndarray, "S C"]:
    """Rank by the rank-honest joint score within each seed, 1 = highest, ties share their mean; NaN where it takes no part."""
    logs = np.where(scores.ranked, log_values(scores)["honest"], np.nan)
    return stats.rankdata(-logs, axis=1, nan_policy="omit")


def per_seed_table(scores: SeedScores) -> pl.DataFrame:
    """`v7b_per_seed`: one row per seed and candidate. rank_in_seed: place by honest_joint among the A-hypotheses, null
    where it takes no part. R_*_vs_null_diff: over the geometric mean of the null diffs. undefined: reason, or empty."""
    values, places, reasons = seed_values(scores), ranks_per_seed(scores), undefined_reason(scores)
    nulls = {name: null_mean(null) for name, null in scores.nulls.items()}
    named = {"R_act": "R_act", "R_w": "R_w", "joint_score": "joint", "pct_oracle_act": "H_act"}
    named |= {"pct_oracle_combined": "H_w", "honest_joint": "honest", "specific_R_act": "specific"}
    parts = []
    for s, seed in enumerate(scores.seeds):
        columns = {"seed": [seed] * len(scores.candidates), **scores.about}
        columns |= {column: values[name][s] for column, name in named.items()} | {"rank_in_seed": places[s]}
        columns |= {f"{name}_vs_null_diff": values[name][s] / null for name, null in nulls.items()}
        parts.append(pl.DataFrame(columns | {"undefined": reasons[s]}))
    return pl.concat(parts).with_columns(pl.col("rank_in_seed").fill_nan(None))


def sign_agreement(logs: Float[np.ndarray, "S C"]) -> Float[np.ndarray, " C"]:
    """Share of seeds on the majority's side of R = 1 (log R = 0); between 1/2 and 1, NaN where a seed is undefined."""
    above, below = (logs > 0).sum(axis=0), (logs < 0).sum(axis=0)
    return np.where(np.isnan(logs).any(axis=0), np.nan, np.maximum(above, below) / len(logs))


def summary_table(scores: SeedScores, seed: int, boot: int = BOOT) -> pl.DataFrame:
    """`v7b_summary`: one row per candidate, highest mean log honest joint (natural log) first, undefined last.

    For each score X: X_sd over seeds, and three intervals of X_geomean in units of R: X_t (over seeds), X_crossed (seeds,
    wordings and topics; NaN with one wording or topic) and X_boot (crossed bootstrap percentiles, whose generator has
    `seed`; too narrow). top5_count: seeds in whose top 5 it is by `honest`.
    R_*_vs_null_diff: geometric mean over seeds / that of the null diffs.
    """
    S, C = len(scores.seeds), len(scores.candidates)
    values, logs = seed_values(scores), log_values(scores)
    of_w = {name: values[name] for name in ("R_w", "H_w")}
    rows = {"R_act": row_influence(scores.act), "honest": 0.5 * row_influence(scores.act, scores.best_act)}
    rows |= {"joint": 0.5 * rows["R_act"], "R_w": np.zeros_like(rows["R_act"])}
    draws = crossed_bootstrap(scores.act, scores.best_act, of_w, scores.templates, seed, boot)
    columns = {**scores.about, "S": [S] * C} | {f"mean_log_{n}": logs[n].mean(axis=0) for n in ("joint", "honest")}
    for name in SCORES:
        value, log = values[name], logs[name]
        q25, median, q75 = np.quantile(value, [0.25, 0.5, 0.75], axis=0)
        boot_ends = np.where(np.isnan(log).any(axis=0), np.nan, percentile_interval(draws[name]))
        with np.errstate(over="ignore"):  # exp of a t bound may pass the largest float at S = 2
            (boot_lo, boot_hi), (t_lo, t_hi) = np.exp(boot_ends), np.exp(t_interval(log))
            crossed_lo, crossed_hi = np.exp(crossed_t_interval(log, rows[name], scores.templates))
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
            f"{name}_crossed_lo": crossed_lo,
            f"{name}_crossed_hi": crossed_hi,
        }
    del columns["honest_sign_agree"]  # a share has no side of 1
    columns |= {f"{name}_geomean": np.exp(logs[name].mean(axis=0)) for name in ("H_act", "H_w", "specific")}
    places = ranks_per_seed(scores)
    columns |= {"rank_median": np.median(places, axis=0), "rank_best": places.min(axis=0)}
    columns |= {"rank_worst": places.max(axis=0), "top5_count": (places <= TOP).sum(axis=0)}
    columns |= {f"{name}_null_diff": null_mean(null) for name, null in scores.nulls.items()}
    columns |= {f"{n}_vs_null_diff": columns[f"{n}_geomean"] / columns[f"{n}_null_diff"] for n in scores.nulls}
    columns |= {f"joint_seed_{k}": values["joint"][s] for s, k in enumerate(scores.seeds)}
    columns["undefined"] = [next(filter(None, reasons), "") for reasons in zip(*undefined_reason(scores), strict=True)]
    return sort_nan_last(pl.DataFrame(columns).sort("candidate"), "mean_log_honest")


def rank_stability_table(scores: SeedScores) -> pl.DataFrame:
    """`v7b_rank_stability`: agreement of two seeds' orders of the A-hypotheses, one row per score and pair of seeds.
    n_candidates: those defined in both. What unrelated candidates would reach stands in `ws.stability.chance`."""
    logs, rows = log_values(scores), []
    for name in SCORES:
        for a, b in combinations(range(len(scores.seeds)), 2):
            both = scores.ranked & ~np.isnan(logs[name][[a, b]]).any(axis=0)
            (x, y), m = logs[name][[a, b]][:, both], int(both.sum())
            top = min(TOP, m)
            shared = len(set(np.argsort(-x, kind="stable")[:top]) & set(np.argsort(-y, kind="stable")[:top]))
            tau = rho = float("nan")
            if m > 2 and np.ptp(x) > 0 and np.ptp(y) > 0:  # an order without differences has no correlation
                tau, rho = float(stats.kendalltau(x, y).statistic), float(stats.spearmanr(x, y).statistic)
            rows.append((name, scores.seeds[a], scores.seeds[b], m, tau, rho, shared))
    schema = {"score": pl.String} | dict.fromkeys(("seed_a", "seed_b", "n_candidates"), pl.Int64)
    schema |= dict.fromkeys(("kendall_tau", "spearman"), pl.Float64) | {"top5_shared": pl.Int64}
    return pl.DataFrame(rows, schema, orient="row")
