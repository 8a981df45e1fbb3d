"""Intervals of a score over LoRA seeds: crossed bootstrap and t. (docs/method.md section 7; coverage: `bench/coverage.py`)

With `a[s, t]` the score of seed s on EVAL topic t and `T = (1/S) sum_s log((1/n) sum_t a[s, t])`, one bootstrap draw
resamples the seeds and, once for all seeds, the topics: they are the same for every seed. At S = 3 the percentiles of
such draws are far too narrow; `T +- t_{S-1} sd / sqrt(S)` is the honest interval there for *these* topics, and
`crossed_t_interval` the one for new topics as well.
"""

import numpy as np
from jaxtyping import Float
from scipy import stats

Interval = tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]  # lower and upper end per candidate
BOOT = 20_000
CHUNK = 512  # bootstrap draws held in memory at once


def resample_counts(n: int, draws: int, generator: np.random.Generator) -> Float[np.ndarray, "draws n"]:
    """How often each of n units enters each of `draws` resamples with replacement; rows sum to n."""
    return generator.multinomial(n, np.full(n, 1.0 / n), size=draws).astype(np.float64)


def crossed_bootstrap(
    topic_scores: Float[np.ndarray, "S C n"], w_scores: Float[np.ndarray, "S C"], seed: int, boot: int = BOOT
) -> dict[str, Float[np.ndarray, "boot C"]]:
    """Bootstrap draws of the mean over seeds of log R_act, log R_w and log joint, for all candidates at once.

    topic_scores: per seed, candidate and topic, already averaged over the LoRA layers (layers are kept whole); their
    mean over topics is R_act. w_scores: R_w, which has no topics. One draw of seeds and one of topics serve every
    candidate and both scores. Returns natural logs under "R_act", "R_w", "joint"; columns are NaN where a score is
    undefined, and -inf where a draw holds only topics without any energy. (docs/method.md section 7)
    """
    if boot < 1:
        raise ValueError(f"BOOT = {boot}: at least one bootstrap draw is needed")
    S, C, n = topic_scores.shape
    generator = np.random.default_rng(seed)
    seed_weights = resample_counts(S, boot, generator) / S
    topic_weights = resample_counts(n, boot, generator) / n
    by_topic = np.ascontiguousarray(topic_scores.transpose(2, 0, 1).reshape(n, S * C))
    log_act = np.zeros((boot, C))
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, boot, CHUNK):
            part = slice(start, min(start + CHUNK, boot))
            log_r = np.log((topic_weights[part] @ by_topic).reshape(-1, S, C))
            for s in range(S):  # a seed that was not drawn must not turn 0 * -inf into NaN
                weight = seed_weights[part, s : s + 1]
                log_act[part] += np.where(weight > 0, weight * log_r[:, s], 0.0)
        log_w = seed_weights @ np.log(w_scores)
    log_act[:, np.isnan(topic_scores).any(axis=(0, 2))] = np.nan
    return {"R_act": log_act, "R_w": log_w, "joint": 0.5 * (log_act + log_w)}


def percentile_interval(draws: Float[np.ndarray, "boot C"], level: float = 0.95) -> Interval:
    """Percentiles of bootstrap draws; NaN columns stay NaN."""
    tail = (1 - level) / 2
    lower = np.quantile(draws, tail, axis=0, method="lower")
    return lower, np.quantile(draws, 1 - tail, axis=0, method="higher")


def t_interval(values: Float[np.ndarray, "S C"], level: float = 0.95) -> Interval:
    """`mean +- t_{S-1} sd / sqrt(S)` over the first axis (seeds); NaN for a single seed, which has no spread."""
    S = len(values)
    if S < 2:
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    half = stats.t.ppf(0.5 + level / 2, S - 1) * values.std(axis=0, ddof=1) / np.sqrt(S)
    mean = values.mean(axis=0)
    return mean - half, mean + half


def topic_influence(topic_scores: Float[np.ndarray, "S C n"]) -> Float[np.ndarray, "C n"]:
    """First-order share of each topic in `T = mean_s log R_s`: `mean_s a[s, t] / R_s`, whose mean over topics is 1."""
    return (topic_scores / topic_scores.mean(axis=2, keepdims=True)).mean(axis=0)


def crossed_t_interval(
    values: Float[np.ndarray, "S C"], influence: Float[np.ndarray, "C n"], level: float = 0.95
) -> Interval:
    """`mean +- sqrt((t_{S-1} se_seeds)^2 + (t_{n-1} se_topics)^2)`: a t interval for new seeds *and* new topics.

    The two standard errors of a crossed design, each with its own t quantile, added in quadrature (the MOVER rule;
    noise of single seed-topic cells is counted in both, which errs on the wide side). `influence` is that of
    `topic_influence` (or a difference of two); only its spread over topics matters. With one topic its spread is
    unknown: NaN, as with one seed. Never narrower than `t_interval`.
    """
    n = influence.shape[1]
    lo, hi = t_interval(values, level)
    if n < 2:
        return np.full_like(lo, np.nan), np.full_like(hi, np.nan)
    topics = stats.t.ppf(0.5 + level / 2, n - 1) * influence.std(axis=1, ddof=1) / np.sqrt(n)
    half = np.hypot((hi - lo) / 2, topics)
    mean = values.mean(axis=0)
    return mean - half, mean + half
