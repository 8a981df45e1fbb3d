"""The computed verdict over seeds: a winner, or "no winner" with the set that cannot be told apart. (method section 7)

The leader (highest mean log joint among the stable contenders) is named only if its corrected t interval over seeds lies
above 0 against **every** rival, also with the topics' spread added (`crossed_t_interval`), and if its R_w > 1 is
significant where p-values were computed. Seeds share the EVAL topics and the bases: a lucky draw of either looks the
same on every seed, which the seeds alone cannot see.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from jaxtyping import Float

from ws.stability.intervals import crossed_t_interval, t_interval, topic_influence
from ws.stability.scores import SeedScores, log_values

ALPHA = 0.05
RIVALS = {"rival": pl.String} | dict.fromkeys(("log_ratio", "t_lo", "t_hi", "crossed_lo", "crossed_hi"), pl.Float64)
RIVALS |= {"told_apart": pl.Boolean}


@dataclass(frozen=True)
class Verdict:
    """winner: the named candidate, or None. leader: the best stable contender. tied: leader and the rivals not told
    apart from it (empty with a winner). reasons: why there is none. undefined: contenders without a joint score.
    rivals: one row per rival (see `verdict`), empty without a leader. detectable: ratio of joint scores that the median
    pair needed to be told apart.
    """

    S: int
    n_topics: int
    n_contenders: int
    undefined: tuple[str, ...]
    reasons: tuple[str, ...]
    winner: str | None = None
    leader: str | None = None
    tied: tuple[str, ...] = ()
    rivals: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=RIVALS))
    detectable: float = float("nan")


def false_winner_bound(n_contenders: int) -> float:
    """Largest probability of naming a winner when no contender is better than another; 0 for fewer than two. Each of
    the C (C - 1) ordered pairs passes with probability at most .05 / (2 (C - 1)), and a winner passes C - 1."""
    return 0.0 if n_contenders < 2 else n_contenders / (n_contenders - 1) * ALPHA / 2


def verdict(scores: SeedScores, unstable: Sequence[str] = (), q_w: Float[np.ndarray, " C"] | None = None) -> Verdict:
    """Name a winner among the contenders (A-hypotheses of axis kind write or mixed), or say why there is none.

    unstable: candidates flagged by A-side stability; they cannot win, but must be beaten. q_w: Benjamini-Hochberg
    adjusted p of R_w > 1 in the order of `scores`. `rivals`, closest first: log_ratio of joint, leader over rival
    (natural log), with its t interval over seeds and the crossed one over seeds and topics, both Bonferroni-corrected
    over the rivals. With one EVAL topic the crossed interval is undefined and only seeds count.
    """
    names, logs = scores.candidates, log_values(scores)["joint"]
    defined = ~np.isnan(logs).any(axis=0)
    pool = np.flatnonzero(scores.contenders & defined)
    undefined = tuple(names[c] for c in np.flatnonzero(scores.contenders & ~defined))
    setting = len(scores.seeds), scores.act.shape[3], len(pool), undefined
    stable = [c for c in pool if names[c] not in unstable]
    if not stable:
        why = "every contender is unstable" if len(pool) else "no contender has a defined score"
        return Verdict(*setting, (why,))
    leader = max(stable, key=lambda c: (logs[:, c].mean(), -c))
    others = pool[pool != leader]
    level = 1 - ALPHA / max(len(others), 1)
    difference = logs[:, [leader]] - logs[:, others]
    influence = 0.5 * topic_influence(scores.act.mean(axis=2)[:, pool])
    spread = influence[pool == leader] - influence[pool != leader]
    t_ends, crossed_ends = t_interval(difference, level), crossed_t_interval(difference, spread, level)
    told = (t_ends[0] > 0) & ((crossed_ends[0] > 0) | np.isnan(crossed_ends[0]))
    columns = [[names[c] for c in others], difference.mean(axis=0), *t_ends, *crossed_ends, told]
    rivals = pl.DataFrame(columns, RIVALS).sort("log_ratio", maintain_order=True)
    copies = not np.ptp(logs[:, pool], axis=0).any()
    reasons = _reasons(setting[0], copies, rivals, unstable, None if q_w is None else float(q_w[leader]))
    winner = None if reasons else names[leader]
    tied = () if winner else (names[leader], *rivals.filter(~pl.col("told_apart"))["rival"].to_list())
    half = np.where(np.isnan(crossed_ends[0]), np.diff(t_ends, axis=0), np.diff(crossed_ends, axis=0)) / 2
    with np.errstate(over="ignore"):
        detectable = float(np.exp(np.median(half))) if half.size else float("nan")
    return Verdict(*setting, reasons, winner, names[leader], tied, rivals, detectable)


def _reasons(S: int, copies: bool, rivals: pl.DataFrame, unstable: Sequence[str], q: float | None) -> tuple[str, ...]:
    """Why the leader is not named; empty when it is."""
    if S < 2:
        return ("one seed has no spread to compare with",)
    if copies:
        return (f"the {S} seeds have identical scores: they are copies of one run",)
    found = [] if rivals.height else ["there is no rival to compare with"]
    above = rivals.filter(pl.col("rival").is_in(list(unstable)) & (pl.col("log_ratio") < 0))["rival"].to_list()
    if above:
        found.append(f"{', '.join(above)} scored higher but cannot win: unstable")
    close = rivals.filter(~pl.col("told_apart"))
    by_seed = close.filter(pl.col("t_lo") <= 0).height
    if by_seed:
        found.append(f"over {S} seeds the corrected t interval against {by_seed} of {rivals.height} rivals holds 0")
    if close.height > by_seed:
        found.append(f"against {close.height - by_seed} more it holds 0 once the draw of topics counts")
    if q is not None and not q <= ALPHA:
        found.append(f"its R_w > 1 is not significant (adjusted p = {q:.3g})")
    return tuple(found)
