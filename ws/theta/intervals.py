"""The interval of a mean over users of what was measured on a few texts of each.

User u has k_u texts with n_i tokens and a value x_i per token; `r_u = sum n_i x_i / sum n_i` is the user's mean per token
and `r = (1/U) sum r_u` gives every user the same weight. Texts are the sample, users are fixed:

    v_u = k_u/(k_u - 1) sum_i n_i^2 (x_i - r_u)^2 / (sum_i n_i)^2        variance of r_u, a ratio, linearised
    r +- t_df sqrt(sum_u v_u) / U,    df = (sum_u v_u)^2 / sum_u v_u^2/(k_u - 1)        (Satterthwaite 1946)

Percentiles of texts that are drawn anew within each user hold the truth far too seldom: with k texts their spread is
that of `k/(k-1)` smaller variances, and no t quantile makes up for it. Coverage of both, and of a studentised
bootstrap: `bench/theta_coverage.py`. docs/method.md section 10.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean over users, the ends of its interval, its degrees of freedom. alone: indices of the users with one text,
    whose spread nobody knows: with one of them the ends and df are NaN, and nothing may be claimed."""

    mean: float
    low: float
    high: float
    df: float
    alone: tuple[int, ...] = ()


def user_variances(
    values: Float[np.ndarray, " texts"], tokens: Int[np.ndarray, " texts"], user: Int[np.ndarray, " texts"]
) -> tuple[Float[np.ndarray, " users"], Float[np.ndarray, " users"], Int[np.ndarray, " users"]]:
    """Per user: mean per token r_u, its variance v_u (NaN with one text), number of texts k_u."""
    total, texts = np.bincount(user, weights=tokens), np.bincount(user)
    means = np.bincount(user, weights=tokens * values) / total
    squares = np.bincount(user, weights=np.square(tokens * (values - means[user]))) / np.square(total)
    with np.errstate(divide="ignore", invalid="ignore"):
        return means, np.where(texts > 1, squares * texts / (texts - 1), np.nan), texts


def t_interval(
    values: Float[np.ndarray, " texts"],
    tokens: Int[np.ndarray, " texts"],
    user: Int[np.ndarray, " texts"],
    level: float = 0.95,
) -> Interval:
    """Mean over users of a quantity per token that is known text by text, with its t interval over texts. user: index
    of each text's user, 0.. users-1, each with a text. Given what was fitted: the interval says nothing of other
    training texts, and nothing of other users. Values that are all the same have the interval [mean, mean]."""
    means, variances, texts = user_variances(values, tokens, user)
    mean, alone = float(means.mean()), tuple(np.flatnonzero(texts == 1).tolist())
    if alone:
        return Interval(mean, float("nan"), float("nan"), float("nan"), alone)
    total, spread = variances.sum(), (np.square(variances) / (texts - 1)).sum()
    if spread == 0:
        return Interval(mean, mean, mean, float((texts - 1).sum()))
    df = float(total**2 / spread)
    half = float(stats.t.ppf(0.5 + level / 2, df) * np.sqrt(total) / len(means))
    return Interval(mean, mean - half, mean + half, df)
