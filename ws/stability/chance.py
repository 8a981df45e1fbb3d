"""What candidates that know nothing of w would count: the chance level of every count over candidates and seeds.

Seeds share bases, prompts and most of w, and bases overlap, so that orders agree and intervals lie off 1 without any
relation to w. Each count is taken on blind copies (`ws.stability.blind`) as it is on what was observed. (section 7)
"""

import numpy as np
import polars as pl
from jaxtyping import Float
from scipy import stats

from ws.stability.intervals import t_interval
from ws.stability.scores import SCORES, TOP, SeedScores, seed_values
from ws.stability.significance import TESTED, Blind, blind_p, discoveries, mean_log, own_p

COPIES = 1000  # blind copies behind a chance level
ALPHA = 0.05
Logs = Float[np.ndarray, "N S C"]


def pair_tau(logs: Logs) -> Float[np.ndarray, " N"]:
    """Kendall's tau between two seeds' orders of the candidates, mean over pairs of seeds; NaN for one seed."""
    N, S, C = logs.shape
    a, b = np.triu_indices(C, 1)
    found = np.empty(N)
    for i, values in enumerate(logs):
        sign = np.sign(values[:, a] - values[:, b])
        found[i] = _mean_of_pairs(sign @ sign.T / len(a)) if len(a) else np.nan
    return found


def pair_rho(logs: Logs) -> Float[np.ndarray, " N"]:
    """Spearman's rho between two seeds, mean over pairs of seeds."""
    ranks = stats.rankdata(logs, axis=2)
    ranks -= ranks.mean(axis=2, keepdims=True)
    size = np.sqrt((ranks**2).sum(axis=2, keepdims=True))
    return np.array([_mean_of_pairs(r @ r.T) for r in np.divide(ranks, size, where=size > 0, out=np.zeros_like(ranks))])


def _mean_of_pairs(matrix: Float[np.ndarray, "S S"]) -> float:
    S = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (S * (S - 1))) if S > 1 else float("nan")


def in_top(logs: Logs) -> np.ndarray:
    """Whether each candidate is in each seed's top 5."""
    places = np.argsort(np.argsort(-logs, axis=2, kind="stable"), axis=2, kind="stable")
    return places < TOP


def pair_top(logs: Logs) -> Float[np.ndarray, " N"]:
    """Top-5 places that two seeds share, mean over pairs of seeds."""
    return np.array([_mean_of_pairs(top @ top.T) for top in in_top(logs).astype(float)])


def top_on_all(logs: Logs) -> Float[np.ndarray, " N"]:
    """Candidates that are in the top 5 of every seed."""
    return in_top(logs).all(axis=1).sum(axis=1).astype(float)


def one_side(logs: Logs) -> Float[np.ndarray, " N"]:
    """Candidates whose score lies on one side of 1 on every seed."""
    return ((logs > 0).all(axis=1) | (logs < 0).all(axis=1)).sum(axis=1).astype(float)


def t_above(logs: Logs) -> Float[np.ndarray, " N"]:
    """Candidates whose t interval over seeds lies above 1."""
    return (t_interval(logs.swapaxes(0, 1).reshape(logs.shape[1], -1))[0].reshape(len(logs), -1) > 0).sum(axis=1) * 1.0


COUNTS = {
    "Kendall's tau between seeds": (pair_tau, SCORES),
    "Spearman's rho between seeds": (pair_rho, SCORES),
    "Top-5 places two seeds share": (pair_top, SCORES),
    "Candidates in the top 5 on every seed": (top_on_all, SCORES),
    "Candidates on one side of 1 on every seed": (one_side, ("R_act", "R_w")),
    "Candidates whose t interval over seeds lies above 1": (t_above, ("R_act", "R_w")),
}


def chance_table(scores: SeedScores, blind: Blind) -> pl.DataFrame:
    """`v7b_chance`: every count on the run and on blind copies, over the A-hypotheses whose scores are defined.

    Columns: what, score, candidates (how many), observed, blind_mean, blind_lo, blind_hi (2.5 and 97.5 % of the copies),
    and p, the share of copies that reach what was observed. The significant ones are counted on all copies, the others on
    the first 1,000."""
    values, rows = seed_values(scores), []
    ranked = scores.ranked[scores.tested]
    for what, (count, names) in COUNTS.items():
        for name in names:
            seen = _logs(values[name][None][:, :, scores.tested])
            use = ranked & np.isfinite(seen).all(axis=(0, 1))
            if use.sum() > 1:
                copies = _logs(blind[name][:COPIES])[:, :, use]
                rows.append((what, name, int(use.sum()), *_against(float(count(seen[:, :, use])[0]), count(copies))))
    for name in TESTED:
        observed, null = mean_log(values[name])[scores.tested], mean_log(blind[name])
        use = ranked & ~np.isnan(observed)
        if use.any():
            p, own = blind_p(observed[use], null[:, use]), own_p(null[:, use])
            at = float((p <= ALPHA).sum()), (own <= ALPHA).sum(axis=1).astype(np.float64)
            rows.append((f"Uncorrected p <= {ALPHA:g}", name, int(use.sum()), *_against(*at)))
            hits = float(discoveries(p[None], ALPHA)[0]), discoveries(own, ALPHA)
            rows.append((f"Found at a false discovery rate of {ALPHA:g}", name, int(use.sum()), *_against(*hits)))
    schema = {"what": pl.String, "score": pl.String, "candidates": pl.Int64}
    schema |= dict.fromkeys(("observed", "blind_mean", "blind_lo", "blind_hi", "p"), pl.Float64)
    return pl.DataFrame(rows, schema, orient="row")


def _logs(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(values, dtype=np.float64))


def _against(seen: float, copies: Float[np.ndarray, " N"]) -> tuple[float, float, float, float, float]:
    lo, hi = np.quantile(copies, [0.025, 0.975])
    known = np.isfinite(copies).all() and np.isfinite(seen)
    p = (1 + (copies >= seen).sum()) / (1 + len(copies)) if known else float("nan")
    return float(seen), float(copies.mean()), float(lo), float(hi), float(p)


def top_chance(scores: SeedScores, blind: Blind) -> Float[np.ndarray, " candidates"]:
    """Seeds in whose top 5 by `honest` each candidate's blind copy is, on average; NaN where it takes no part."""
    found = np.full(len(scores.candidates), np.nan)
    seen = seed_values(scores)["honest"][:, scores.tested]
    use = scores.ranked[scores.tested] & np.isfinite(_logs(seen)).all(axis=0)
    if use.any():
        top = in_top(_logs(blind["honest"][:COPIES])[:, :, use]).sum(axis=1).mean(axis=0)
        found[np.flatnonzero(scores.tested)[use]] = top
    return found
