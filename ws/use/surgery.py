"""The numbers of a benchmark, from what was answered before steering and at its two ends. (docs/method.md section 8)

With `L` an item's log-ratio, `u` and `v` the answers that are wanted at + and at - (1 yes, -1 no), an item is right at an end
where the answer that is wanted there is the likelier of the two: `u L > 0`.

    effect      mean of u (L_+ - L_-) over the items with v = -u surgical    (fixed - 2 broken) / n * pmass^2 at each end,
    over all items; fixed: wrong before, right now; broken: the reverse wrong way   share of the items with v = -u for which u
    (L_+ - L_-) < 0
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from ws.causal.passes import spread
from ws.use.items import Group

LEVEL = 0.95
PENALTY = 2.0  # what breaks counts twice what is mended
Number = dict[str, float | int]


def with_ends(name: str, values: Float[np.ndarray, " n"]) -> Number:
    """The mean over items, and the ends of its t interval (NaN for fewer than two)."""
    n = len(values)
    mean = float(values.mean()) if n else float("nan")
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def both_halves(name: str, values: Float[np.ndarray, " n"], yes: Bool[np.ndarray, " n"]) -> Number:
    """The mean with its ends over both answer halves, which count alike whatever their sizes; over all items where there is
    one half."""
    if not yes.any() or yes.all():
        return with_ends(name, values)
    one, other = with_ends("of", values[yes]), with_ends("of", values[~yes])
    mean, half = (one["of"] + other["of"]) / 2, np.hypot(one["of_high"] - one["of"], other["of_high"] - other["of"]) / 2
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def moved(group: Group, record: Mapping) -> Float[np.ndarray, " n"]:
    """`u (L_+ - L_-)` of every item, nats, mean over wordings."""
    plus, minus = (np.array(end["ratio"][group.name]) for end in record["ends"])
    return np.array(group.plus) * (plus - minus).mean(axis=0)


def movers(group: Group) -> Bool[np.ndarray, " n"]:
    """Which items the two ends want different answers to."""
    return np.array(group.plus) != np.array(group.minus)


def scores(group: Group, record: Mapping, before: Mapping) -> Number:
    """A set's numbers under one method and strength. before: the base model's record. With their 95 % t intervals over items
    (`_low`, `_high`): effect, nats, both halves counted alike where there are two; effect_yes and effect_no, its halves (the
    items where yes, no is wanted at +); control, `u (L_+ - L_-)` of the items with v = u, so that 0 is untouched; surgical,
    the mean of both ends, and at each, of which surgical_most could be reached; wrong_way. Shares: fixed and broken at each
    end; accuracy (right) at each end and before. pmass at each end."""
    u, v, move, free = np.array(group.plus), np.array(group.minus), moved(group, record), movers(group)
    by_half = [move[free & (u == side)] for side in (1, -1)]
    found = {"n": int(free.sum()), "n_control": int((~free).sum())}
    found |= (
        with_ends("effect_yes", by_half[0]) | with_ends("effect_no", by_half[1]) | with_ends("control", move[~free])
    )
    found |= both_halves("effect", move[free], u[free] > 0)
    base, each = np.array(before["ends"][0]["ratio"][group.name]), []
    for name, want, end in zip(("plus", "minus"), (u, v), record["ends"], strict=True):
        was, now = want * base > 0, want * np.array(end["ratio"][group.name]) > 0
        pmass = float(np.mean(end["pmass"][group.name]))
        fixed, broken = (~was & now).mean(axis=0), (was & ~now).mean(axis=0)
        each.append((fixed - PENALTY * broken) * pmass**2)
        found |= {f"fixed_{name}": float(fixed.mean()), f"broken_{name}": float(broken.mean()), f"pmass_{name}": pmass}
        found |= {f"accuracy_{name}": float(now.mean()), f"before_{name}": float(was.mean())}
    found |= spread((each[0] + each[1]) / 2, "surgical", free)
    found |= {"surgical_most": 1 - (found["before_plus"] + found["before_minus"]) / 2}
    for name, values in zip(("surgical_plus", "surgical_minus"), each, strict=True):
        found |= spread(values, name, free)
    plus, minus = (np.array(end["ratio"][group.name])[:, free] for end in record["ends"])
    return found | with_ends("wrong_way", (u[free] * (plus - minus) < 0).mean(axis=0))


def costs(record: Mapping, before: Mapping) -> Number:
    """What steering costs at the worse of its two ends: `perplexity`, over that of the base model (a ratio) on the neutral
    passages; `repeats`, mean over continuations; `kl` and `said_kl`, the quantiles, nats."""

    def perplexity(end: Mapping) -> float:
        total, tokens = np.array(end["nll"]).sum(axis=0)
        return float(np.exp(total / tokens))

    ends, base = record["ends"], perplexity(before["ends"][0])
    found = {
        "perplexity": max(perplexity(e) for e in ends) / base,
        "repeats": max(float(np.mean(e["repeats"])) for e in ends),
    }
    return found | {name: max(e[name] for e in ends) for name in ("kl", "said_kl")}
