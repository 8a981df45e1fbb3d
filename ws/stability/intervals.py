"""Intervals of a score over LoRA seeds, and how often they really cover: crossed bootstrap and t.

A score of one seed is a mean over EVAL topics, `R_s = (1/n) sum_t a[s, t]`; over seeds the statistic is a mean of logs,
`T = (1/S) sum_s log R_s`. The topics are the same for every seed, so the two factors are *crossed*: one bootstrap draw
resamples the seeds (weights `k_s`) and, once for all seeds, the topics (weights `m_t`),

    T* = (1/S) sum_s k_s log((1/n) sum_t m_t a[s, t]).

At S = 3 the percentiles of such draws are far too narrow (three seeds have 10 distinct resamples); the t interval
`T +- t_{S-1} sd / sqrt(S)` is the honest one there, for *these* topics; for new topics as well, `crossed_t_interval`.
(docs/method.md section 7)
"""

import numpy as np
import polars as pl
from jaxtyping import Float
from scipy import stats

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


def percentile_interval(
    draws: Float[np.ndarray, "boot C"], level: float = 0.95
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """Lower and upper percentile of bootstrap draws, per candidate; NaN columns stay NaN."""
    tail = (1 - level) / 2
    ordered = np.sort(draws, axis=0)  # NaN sorts last, so a NaN in the last row marks an undefined column
    last = len(draws) - 1
    lo, hi = ordered[int(np.floor(tail * last))], ordered[int(np.ceil((1 - tail) * last))]
    undefined = np.isnan(ordered[-1])
    return np.where(undefined, np.nan, lo), np.where(undefined, np.nan, hi)


def t_interval(
    values: Float[np.ndarray, "S C"], level: float = 0.95
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
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
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
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


def simulated_tables(
    reps: int, S: int, n: int, seed_sd: float, topic_sd: float, cross_sd: float, seed: int
) -> tuple[Float[np.ndarray, "S reps n"], Float[np.ndarray, "1 reps"]]:
    """Score tables whose truth is known: `log a[s, t] = seed_s + topic_t + cross_st - (topic_sd^2 + cross_sd^2) / 2`.

    Each of the `reps` columns is a data set of its own. Returns the scores and, per column, the target for *these*
    topics, `E_s log R_s` given the topic effects (computed with many seeds' worth of crossing noise averaged out); the
    target for the population of topics is 0.
    """
    generator = np.random.default_rng(seed)
    seeds = seed_sd * generator.standard_normal((S, reps, 1))
    topics = topic_sd * generator.standard_normal((1, reps, n))
    crossed = cross_sd * generator.standard_normal((S, reps, n))
    scores = np.exp(seeds + topics + crossed - (topic_sd**2 + cross_sd**2) / 2)
    many = 400  # E log mean_t exp(topic + cross) has no closed form
    target = np.zeros((1, reps))
    for _ in range(many if cross_sd > 0 else 1):
        noise = cross_sd * generator.standard_normal((1, reps, n))
        target += np.log(np.exp(topics + noise - (topic_sd**2 + cross_sd**2) / 2).mean(axis=2))
    return scores, target / (many if cross_sd > 0 else 1)


def coverage(
    S: int,
    n: int,
    seed_sd: float,
    topic_sd: float,
    cross_sd: float,
    reps: int,
    boot: int,
    seed: int,
    level: float = 0.95,
) -> dict[str, float]:
    """Share of simulated data sets whose interval of mean log R_act holds the truth.

    For each of t, boot and crossed_t the keys `X_these_topics` and `X_all_topics` (the target is the mean over seeds
    for the topics at hand, or for the population they came from) and `X_width`, the mean width in nats.
    """
    scores, these = simulated_tables(reps, S, n, seed_sd, topic_sd, cross_sd, seed)
    logs = np.log(scores.mean(axis=2))
    draws = crossed_bootstrap(scores, np.ones((S, reps)), seed + 1, boot)["R_act"]
    found = {}
    intervals = {
        "t": t_interval(logs, level),
        "boot": percentile_interval(draws, level),
        "crossed_t": crossed_t_interval(logs, topic_influence(scores), level),
    }
    for name, (lo, hi) in intervals.items():
        found[f"{name}_these_topics"] = float(((lo <= these[0]) & (these[0] <= hi)).mean())
        found[f"{name}_all_topics"] = float(((lo <= 0) & (0 <= hi)).mean())
        found[f"{name}_width"] = float((hi - lo).mean())
    return found


def coverage_table(
    seeds: tuple[int, ...] = (3, 5, 10), n: int = 12, reps: int = 2000, boot: int = 2000, seed: int = 0
) -> pl.DataFrame:
    """Coverage of both intervals at several S, for three shares of seed, topic and crossing noise (sd in nats).

    Columns: S, n, seed_sd, topic_sd, cross_sd, and those of `coverage`. The Monte-Carlo error of a share near .95 is
    `sqrt(.95 * .05 / reps)`. (docs/method.md section 7)
    """
    cases = {"seeds only": (0.3, 0.0, 0.0), "seeds and topics": (0.3, 0.6, 0.3), "topics only": (0.02, 0.6, 0.0)}
    rows = []
    for case, (seed_sd, topic_sd, cross_sd) in cases.items():
        for S in seeds:
            numbers = coverage(S, n, seed_sd, topic_sd, cross_sd, reps, boot, seed)
            design = {"noise": case, "S": S, "n": n, "seed_sd": seed_sd, "topic_sd": topic_sd, "cross_sd": cross_sd}
            rows.append(design | numbers)
    return pl.DataFrame(rows)
