"""Simulated coverage of the t, the crossed-bootstrap and the crossed t interval at S = 3, 5, 10, as a Markdown table.

.venv/bin/python bench/coverage.py
"""

import time

import numpy as np
import polars as pl
from jaxtyping import Float

from ws.stability.intervals import (
    crossed_bootstrap,
    crossed_t_interval,
    percentile_interval,
    t_interval,
    topic_influence,
)

INTERVALS = ("t", "boot", "crossed_t")
COLUMNS = [f"{interval}_{what}" for what in ("these_topics", "all_topics", "width") for interval in INTERVALS]


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


def main() -> None:
    start = time.perf_counter()
    table = coverage_table()
    titles = [
        f"{i}, {what}" for what in ("these topics", "all topics", "width") for i in ("t", "bootstrap", "crossed t")
    ]
    print(f"| noise (sd of seed, topic, crossing; nats) | S | {' | '.join(titles)} |")
    print("|---" * (2 + len(titles)) + "|")
    for row in table.iter_rows(named=True):
        noise = f"{row['noise']} ({row['seed_sd']:g}, {row['topic_sd']:g}, {row['cross_sd']:g})"
        print(f"| {noise} | {row['S']} | " + " | ".join(f"{row[name]:.3f}" for name in COLUMNS) + " |")
    print(f"\nnominal 0.95; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
