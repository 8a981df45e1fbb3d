"""Intervals of a score over LoRA seeds: crossed bootstrap and t. (docs/method.md section 7; coverage: `bench/calibration.py`)

EVAL rows are templates x topics, template by template, the same for every seed. With `a[s, l, t]` what seed s scores at
layer l on row t and `o[s, l, t]` what the best subspace of that rank does, a score is
`T = mean_s log mean_l (sum_t a / sum_t o)` (`o = 1` for R). A bootstrap draw resamples seeds, templates and topics, the two
last once for all seeds. At S = 3 the percentiles of such draws are far too narrow: `T +- t_{S-1} sd / sqrt(S)` is the
honest interval there for *these* rows, and `crossed_t_interval` the one for new templates and topics as well.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy import stats

Interval = tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]  # lower and upper end per candidate
Part = tuple[Float[np.ndarray, " C"], int]  # a standard error per candidate, and its degrees of freedom
Rows = Float[np.ndarray, "S C L n"]
BOOT = 20_000
CHUNK = 256  # bootstrap draws held in memory at once


def resample_counts(n: int, draws: int, generator: np.random.Generator) -> Float[np.ndarray, "draws n"]:
    """How often each of n units enters each of `draws` resamples with replacement; rows sum to n."""
    return generator.multinomial(n, np.full(n, 1.0 / n), size=draws).astype(np.float64)


def crossed_bootstrap(
    act: Rows, best: Rows, w: dict[str, Float[np.ndarray, "S C"]], templates: int, seed: int, boot: int = BOOT
) -> dict[str, Float[np.ndarray, "boot C"]]:
    """Bootstrap draws of the mean over seeds of the logs of R_act, R_w, joint and honest, for all candidates at once.

    act: R of every EVAL row; best: that of the best subspace of the same rank. w: "R_w" and "H_w" per seed, which have no
    rows. One draw of seeds, templates and topics serves every candidate and score; layers are kept whole. Columns are NaN
    where a score is undefined, and -inf where a draw holds only rows without any energy. (docs/method.md section 7)
    """
    if boot < 1:
        raise ValueError(f"BOOT = {boot}: at least one bootstrap draw is needed")
    S, C, L, n = act.shape
    generator = np.random.default_rng(seed)
    seeds = resample_counts(S, boot, generator) / S
    topics = resample_counts(n // templates, boot, generator) / (n // templates)
    drawn = resample_counts(templates, boot, generator) / templates
    flat, top = (x.reshape(-1, n).T.copy() for x in (act, best))
    logs = {name: np.zeros((boot, C)) for name in ("R_act", "H_act")}
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, boot, CHUNK):
            part = slice(start, min(start + CHUNK, boot))
            rows = (drawn[part, :, None] * topics[part, None, :]).reshape(-1, n)
            mean = (rows @ flat).reshape(-1, S, C, L)
            share = mean / (rows @ top).reshape(mean.shape)
            for name, value in (("R_act", mean), ("H_act", share)):
                log = np.log(value.mean(axis=3))
                for s in range(S):  # a seed that was not drawn must not turn 0 * -inf into NaN
                    weight = seeds[part, s : s + 1]
                    logs[name][part] += np.where(weight > 0, weight * log[:, s], 0.0)
        log_w = {name: seeds @ np.log(value) for name, value in w.items()}
    for name, rows in (("R_act", act), ("H_act", act / best)):
        logs[name][:, np.isnan(rows).any(axis=(0, 2, 3))] = np.nan
    joint, honest = ((logs[a] + log_w[b]) / 2 for a, b in (("R_act", "R_w"), ("H_act", "H_w")))
    return {"R_act": logs["R_act"], "R_w": log_w["R_w"], "joint": joint, "honest": honest}


def percentile_interval(draws: Float[np.ndarray, "boot C"], level: float = 0.95) -> Interval:
    """Percentiles of bootstrap draws; NaN columns stay NaN."""
    tail = (1 - level) / 2
    lower = np.quantile(draws, tail, axis=0, method="lower")
    return lower, np.quantile(draws, 1 - tail, axis=0, method="higher")


def t_interval(values: Float[np.ndarray, "S C"], level: float = 0.95) -> Interval:
    """`mean +- t_{S-1} sd / sqrt(S)` over the first axis (seeds); NaN for a single seed, which has no spread."""
    return _around(values, [mean_part(values)], level)


def row_influence(act: Rows, best: Rows | None = None) -> Float[np.ndarray, "C n"]:
    """First-order effect of each row's weight on `mean_s log mean_l (sum_t a / sum_t o)`, times n; its mean is 0. The best
    subspace stays where it is: at its maximum its own turning has no first-order effect."""
    mean = act.mean(axis=3, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        if best is None:
            moved, share = act - mean, mean
        else:
            top = best.mean(axis=3, keepdims=True)
            share = mean / top
            moved = act / top - share * best / top
        return (moved.mean(axis=2) / share.mean(axis=2)).mean(axis=0)


def crossed_parts(
    values: Float[np.ndarray, "S C"], influence: Float[np.ndarray, "C n"], templates: int = 1
) -> list[Part]:
    """Standard errors of a crossed design: seeds, templates, topics, each with its degrees of freedom. A factor of one
    level has no part: its spread is unknown."""
    grid = influence.reshape(len(influence), templates, influence.shape[1] // templates)
    return [mean_part(x) for x in (values, grid.mean(axis=2).T, grid.mean(axis=1).T) if len(x) > 1 or x is values]


def crossed_t_interval(
    values: Float[np.ndarray, "S C"], influence: Float[np.ndarray, "C n"], templates: int = 1, level: float = 0.95
) -> Interval:
    """`mean +- sqrt(sum_k (t_k se_k)^2)` over seeds, templates and topics: a t interval for new ones of each.

    The standard errors of a crossed design, each with its own t quantile, added in quadrature (the MOVER rule); noise of
    single cells is counted in several parts. Both err on the wide side. `influence`: `row_influence` (or a difference of
    two). NaN with one seed, one template or one topic, whose spread is unknown. Never narrower than `t_interval`.
    """
    parts = crossed_parts(values, influence, templates)
    if len(parts) < 3:
        parts = [(np.full_like(parts[0][0], np.nan), 1)]
    return _around(values, parts, level)


def mean_part(values: Float[np.ndarray, "n C"]) -> Part:
    """Standard error of the mean over n units, NaN for one, and its degrees of freedom."""
    n = len(values)
    return (values.std(axis=0, ddof=1) / np.sqrt(n), n - 1) if n > 1 else (np.full(values.shape[1], np.nan), 1)


def half_width(parts: list[Part], level: float = 0.95) -> Float[np.ndarray, " C"]:
    """`sqrt(sum_k (t_k se_k)^2)`."""
    return np.sqrt(sum((stats.t.ppf(0.5 + level / 2, df) * se) ** 2 for se, df in parts))


def _around(values: Float[np.ndarray, "S C"], parts: list[Part], level: float) -> Interval:
    half, mean = half_width(parts, level), values.mean(axis=0)
    return mean - half, mean + half


def told_probability(parts: list[Part], size: Float[np.ndarray, " C"], level: float = 0.95) -> Float[np.ndarray, " C"]:
    """Probability that the interval of `parts` lies above 0 where the true mean is `size`, at these standard errors: from the
    noncentral t. NaN where a standard error is unknown, 1 where it is 0."""
    var, half = sum(se**2 for se, _ in parts), half_width(parts, level)
    with np.errstate(divide="ignore", invalid="ignore"):
        se, df = np.sqrt(var), np.where(var > 0, var**2 / sum(part**4 / n for part, n in parts), 1.0)  # Satterthwaite
        told = stats.nct.sf(half / se, df, size / se)
    return np.where(se == 0, (size > 0) * 1.0, np.where(np.isnan(told) & ~np.isnan(se), (size > half) * 1.0, told))


def detectable(
    parts: list[Part], seen: Float[np.ndarray, " C"], power: float = 0.8, level: float = 0.95
) -> tuple[Float[np.ndarray, " C"], float]:
    """The lead over each rival whose interval would lie above 0 with probability `power`, at these standard errors; and the
    lead over the closest rival (the others as far behind that one as they are `seen`) with which all of them would at once,
    their noise taken as independent. NaN where a standard error is unknown."""
    if not len(seen) or np.isnan(parts[0][0]).any():
        return np.full(len(seen), np.nan), float("nan")
    half = half_width(parts, level)

    def least(reached: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray) -> np.ndarray:
        for _ in range(40):
            middle = (low + high) / 2
            enough = reached(middle)
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return high

    def all_at_once(lead: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(told_probability(parts, lead + seen - seen.min(), level)).sum(keepdims=True) >= np.log(power)

    each = least(lambda size: told_probability(parts, size, level) >= power, np.zeros(len(half)), 10 * half + 1e-12)
    return each, float(least(all_at_once, np.zeros(1), np.full(1, 10 * half.max() + 1e-12))[0])
