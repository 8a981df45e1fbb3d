"""Is a candidate's score above that of its blind copies? p-values, Benjamini-Hochberg, max-T. (docs/method.md section 7)

`T = mean_s log X[s]` of a score X, observed and on N blind copies (`ws.stability.blind`), `p = (1 + #{T_blind >= T}) /
(1 + N)`. Copies are joint over candidates, so that max-T over their standardised T keeps the error of any discovery however
much candidates overlap.
"""

import numpy as np
import polars as pl
from jaxtyping import Float
from scipy.stats import false_discovery_control

from ws.stability.scores import SeedScores, seed_values

TESTED = ("R_w", "R_act", "joint", "specific")
Blind = dict[str, Float[np.ndarray, "N S tested"]]


def blind_values(raw: Blind) -> Blind:
    """What `seed_values` gives, for each copy: joint and honest beside the raw scores."""
    joint, honest = (np.sqrt(raw[a] * raw[b]) for a, b in (("R_act", "R_w"), ("H_act", "H_w")))
    return {**raw, "joint": joint, "honest": honest}


def mean_log(values: Float[np.ndarray, "*N S C"]) -> Float[np.ndarray, "*N C"]:
    """`T`: the mean over seeds of the log; a score of 0 is -inf, an undefined one NaN."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(values, dtype=np.float64)).mean(axis=-2)


def blind_p(observed: Float[np.ndarray, " C"], null: Float[np.ndarray, "N C"]) -> Float[np.ndarray, " C"]:
    """`(1 + #{null >= observed}) / (1 + N)`; NaN for an undefined observation."""
    p = (1 + (null >= observed).sum(axis=0)) / (1 + len(null))
    return np.where(np.isnan(observed), np.nan, p)


def own_p(null: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
    """The p-value of every copy among all of them."""
    below = np.argsort(np.argsort(null, axis=0, kind="stable"), axis=0, kind="stable")
    return (len(null) - below) / len(null)


def max_t_p(observed: Float[np.ndarray, " C"], null: Float[np.ndarray, "N C"]) -> Float[np.ndarray, " C"]:
    """p adjusted for all candidates at once: the share of copies whose largest standardised T reaches the candidate's."""
    known = ~np.isnan(observed)
    adjusted = np.full(observed.shape, np.nan)
    if known.any():
        mean, sd = null[:, known].mean(axis=0), null[:, known].std(axis=0)
        sd[sd == 0] = np.inf
        most = ((null[:, known] - mean) / sd).max(axis=1)
        adjusted[known] = (1 + (most[:, None] >= (observed[known] - mean) / sd).sum(axis=0)) / (1 + len(null))
    return adjusted


def benjamini_hochberg(p: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Adjusted p-values: `q_(i) = min_{j >= i} m p_(j) / j`, capped at 1; NaN entries are no tests and stay NaN."""
    q = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        q[tested] = false_discovery_control(p[tested])
    return q


def discoveries(p: Float[np.ndarray, "N m"], level: float) -> Float[np.ndarray, " N"]:
    """How many of each row Benjamini-Hochberg finds at a false discovery rate: the largest k with `p_(k) <= k level / m`."""
    m = p.shape[1]
    below = np.sort(p, axis=1) <= level * np.arange(1, m + 1) / m
    return np.where(below.any(axis=1), m - below[:, ::-1].argmax(axis=1), 0).astype(np.float64)


def significance_table(scores: SeedScores, blind: Blind) -> pl.DataFrame:
    """One row per candidate, in the order of `scores`; NaN for an undefined score and for what `scores.tested` leaves out.

    blind: `blind_values`, whose candidates are the tested ones. For each score X of R_w, R_act, joint and specific: p_X,
    q_X (Benjamini-Hochberg over the A-hypotheses), p_max_X (max-T over them), and X_blind_q95, the 95 % quantile of the
    geometric mean over seeds on blind copies."""
    values, tested, C = seed_values(scores), scores.tested, len(scores.candidates)
    columns: dict[str, object] = {"candidate": scores.candidates}
    for name in TESTED:
        observed, null = mean_log(values[name])[tested], mean_log(blind[name])
        found = np.full((4, C), np.nan)
        among = scores.ranked[tested]
        p = blind_p(observed, null)
        adjusted = np.full((2, len(p)), np.nan)
        adjusted[:, among] = benjamini_hochberg(p[among]), max_t_p(observed[among], null[:, among])
        found[:, tested] = p, *adjusted, np.exp(np.quantile(null, 0.95, axis=0)) if null.size else np.nan
        columns |= dict(zip((f"p_{name}", f"q_{name}", f"p_max_{name}", f"{name}_blind_q95"), found, strict=True))
    return pl.DataFrame(columns | {"n_blind": [len(next(iter(blind.values())))] * C})
