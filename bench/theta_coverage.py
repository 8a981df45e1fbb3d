"""Simulated coverage of intervals of a mean over users with few held-out texts each, as a Markdown table.

    python bench/theta_coverage.py [--reps 2000] [--boot 1000]

Beside the t interval of `ws.theta.intervals` stand the textbook percentile bootstrap (texts drawn anew within each user),
a studentised bootstrap, and the t interval with Welch's correction of Satterthwaite's degrees of freedom. Data: a value
per text with a skew, users of unequal spread, texts of unequal length that are noisier the shorter they are.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ws.theta.intervals import t_interval, user_variances  # noqa: E402

TOKENS, SKEWED_BY = 25, 0.2  # a text's tokens: median, sd of their log (the shipped users': 25, 0.2)
SHAPES = {"normal": 0.0, "skewed": 1.0, "very skewed": 2.0}  # skewness of a text's value
Data = tuple[Float[np.ndarray, " texts"], Int[np.ndarray, " texts"], Int[np.ndarray, " texts"]]


def simulated(users: int, texts: int, skewness: float, generator: np.random.Generator) -> Data:
    """One data set with true mean 0: a value per text (a centred gamma of this skewness, plus noise of its tokens), the
    texts' tokens, their users. A user's spread is lognormal (sd of its log .5)."""
    user, count = np.repeat(np.arange(users), texts), users * texts
    tokens = np.maximum(3, np.round(TOKENS * np.exp(SKEWED_BY * generator.standard_normal(count)))).astype(np.int64)
    shape = 4 / skewness**2 if skewness else 0
    value = (generator.gamma(shape, size=count) - shape) / np.sqrt(shape) if shape else generator.standard_normal(count)
    spread = np.exp(0.5 * generator.standard_normal(users))[user]
    noise = generator.standard_normal(count) * np.sqrt(TOKENS / tokens)
    return spread * (value + noise) / np.sqrt(2), tokens, user


def drawn(data: Data, boot: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Means over users and their standard errors for texts drawn anew within each user; users have equally many."""
    values, tokens, user = data
    users = int(user[-1]) + 1
    x, n = values.reshape(users, -1), tokens.reshape(users, -1)
    k = x.shape[1]
    pick = generator.integers(k, size=(boot, users, k))
    x, n = (np.take_along_axis(np.broadcast_to(a, (boot, users, k)), pick, axis=2) for a in (x, n))
    total = n.sum(axis=2)
    r = (n * x).sum(axis=2) / total
    v = np.square(n * (x - r[..., None])).sum(axis=2) / np.square(total) * k / (k - 1)
    return r.mean(axis=1), np.sqrt(v.sum(axis=1)) / users


def percentile(data: Data, boot: int, generator: np.random.Generator, level: float = 0.95) -> tuple[float, float]:
    """The textbook percentile bootstrap."""
    low, high = np.quantile(drawn(data, boot, generator)[0], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def studentised(data: Data, boot: int, generator: np.random.Generator, level: float = 0.95) -> tuple[float, float]:
    """The bootstrap-t: quantiles of `(mean* - mean) / se*`, turned around. Draws whose se* is 0 count as infinite."""
    means, variances, _ = user_variances(*data)
    mean, se = means.mean(), np.sqrt(variances.sum()) / len(means)
    boots, errors = drawn(data, boot, generator)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(errors > 0, (boots - mean) / errors, np.sign(boots - mean) * np.inf)
    low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(mean - high * se), float(mean - low * se)


def satterthwaite(data: Data, *_) -> tuple[float, float]:
    """The project's own."""
    found = t_interval(*data)
    return found.low, found.high


def welch(data: Data, *_, level: float = 0.95) -> tuple[float, float]:
    """The same with `df = (sum v)^2 / sum v^2/(k + 1) - 2`, which is less biased where k is 2."""
    means, v, k = user_variances(*data)
    df = max(1.0, v.sum() ** 2 / (np.square(v) / (k + 1)).sum() - 2)
    half = stats.t.ppf(0.5 + level / 2, df) * np.sqrt(v.sum()) / len(means)
    return float(means.mean() - half), float(means.mean() + half)


INTERVALS: dict[str, Callable] = {
    "percentile": percentile,
    "studentised": studentised,
    "t, Welch": welch,
    "t": satterthwaite,
}


def coverage(
    users: int, texts: int, skewness: float, reps: int, boot: int, seed: int, names: tuple[str, ...] = tuple(INTERVALS)
) -> dict[str, tuple[float, float]]:
    """Per interval: the share of `reps` data sets whose interval holds 0, and its median width."""
    generator, found = np.random.default_rng(seed), {name: np.zeros((reps, 2)) for name in names}
    for i in range(reps):
        data = simulated(users, texts, skewness, generator)
        for name in names:
            found[name][i] = INTERVALS[name](data, boot, generator)
    held = {name: float(((ends[:, 0] <= 0) & (ends[:, 1] >= 0)).mean()) for name, ends in found.items()}
    return {name: (held[name], float(np.median(ends[:, 1] - ends[:, 0]))) for name, ends in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=2000)
    parser.add_argument("--boot", type=int, default=1000)
    args, start = parser.parse_args(), time.perf_counter()
    print(f"| users | texts each | value of a text | {' | '.join(f'{n}: held, width' for n in INTERVALS)} |")
    print("|---" * (3 + len(INTERVALS)) + "|")
    for users in (7, 2):
        for texts in (2, 3, 6, 12):
            for shape, skewness in SHAPES.items():
                cells = coverage(users, texts, skewness, args.reps, args.boot, seed=texts).values()
                print(f"| {users} | {texts} | {shape} | {' | '.join(f'{h:.3f}, {w:.2f}' for h, w in cells)} |")
    error = (0.95 * 0.05 / args.reps) ** 0.5
    print(f"\nnominal .95, Monte-Carlo error {error:.4f}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
