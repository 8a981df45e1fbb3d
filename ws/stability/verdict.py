"""The computed verdict over seeds: a winner, or "no winner" with the set that cannot be told apart. (method section 7)

The leader (highest mean log of the rank-honest joint score among the stable contenders) is named only if its paired 95 % t
interval over seeds lies above 0 against **every** rival, also with the spread of templates and topics added
(`crossed_t_interval`), if its R_w > 1 is significant, and if w steers. "Better than every rival" is an intersection-union
claim: it is wrong with at most 5 % where one rival is as good, however many there are, and needs no correction. Seeds share
the EVAL rows and the bases: a lucky draw of either looks the same on every seed, which the seeds alone cannot see.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import polars as pl
from jaxtyping import Float

from ws.stability.intervals import Part, crossed_parts, crossed_t_interval, detectable, row_influence, t_interval
from ws.stability.scores import SeedScores, log_values
from ws.steer.effect import Steering

ALPHA = 0.05
POWER = 0.8
RIVALS = {"rival": pl.String}
RIVALS |= dict.fromkeys(("log_ratio", "t_lo", "t_hi", "crossed_lo", "crossed_hi"), pl.Float64)
RIVALS |= {"told_apart": pl.Boolean}


@dataclass(frozen=True, eq=False)
class Verdict:
    """winner: the named candidate, or None. leader: the best stable contender (None where w does not steer). tied: leader
    and the rivals not told apart from it (empty with a winner). reasons: why there is none. undefined: contenders without
    a score. rivals: one row per rival (see `verdict`), empty without a leader; parts: their standard errors
    (`ws.stability.intervals.crossed_parts`).
    """

    S: int
    n_templates: int
    n_topics: int
    n_contenders: int
    undefined: tuple[str, ...]
    reasons: tuple[str, ...]
    winner: str | None = None
    leader: str | None = None
    tied: tuple[str, ...] = ()
    rivals: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=RIVALS))
    parts: list[Part] = field(default_factory=list, repr=False)
    steering: Steering | None = None

    @cached_property
    def power(self) -> tuple[Float[np.ndarray, " R"], float]:
        """`ws.stability.intervals.detectable` of the rivals, log ratios: the lead over each that has a probability of .8 to be
        told apart at this run's noise, and the lead over the closest one with which the leader is named."""
        return (
            detectable(self.parts, self.rivals["log_ratio"].to_numpy(), POWER) if self.parts else (np.empty(0), np.nan)
        )

    @property
    def establishable(self) -> float:
        """How many times better than the closest rival (the others as far behind that one as they are) a leader has to be to
        be named with probability .8 at this run's noise."""
        return float(np.exp(self.power[1]))

    @property
    def far(self) -> list[str]:
        """Rivals not told apart although they are further behind than the median rival has to be."""
        each = self.power[0]
        usual = np.median(each[~np.isnan(each)]) if (~np.isnan(each)).any() else np.inf
        return self.rivals.filter(~pl.col("told_apart") & (pl.col("log_ratio") > usual))["rival"].to_list()


def verdict(
    scores: SeedScores,
    unstable: Sequence[str] = (),
    q_w: Float[np.ndarray, " C"] | None = None,
    steers: Steering | None = None,
) -> Verdict:
    """Name a winner among the contenders (A-hypotheses of axis kind write or mixed), or say why there is none.

    unstable: candidates flagged by A-side stability; they cannot win, but must be beaten. q_w: Benjamini-Hochberg
    adjusted p of R_w > 1 in the order of `scores`. steers: whether w does at all; None: not asked. `rivals`, closest first:
    log_ratio of the honest joint, leader over rival (natural log), with its 95 % t interval over seeds and the crossed one
    over seeds, templates and topics. With one EVAL row the crossed interval is undefined and only seeds count.
    """
    names, logs = scores.candidates, log_values(scores)["honest"]
    defined = ~np.isnan(logs).any(axis=0)
    pool = np.flatnonzero(scores.contenders & defined)
    undefined = tuple(names[c] for c in np.flatnonzero(scores.contenders & ~defined))
    m = scores.templates
    plain = Verdict(len(scores.seeds), m, scores.act.shape[3] // m, len(pool), undefined, (), steering=steers)
    if steers is not None and not steers.seen:
        return replace(plain, reasons=("w is not shown to steer: where it does nothing, nothing carries what it does",))
    stable = [c for c in pool if names[c] not in unstable]
    if not stable:
        why = "every contender is unstable" if len(pool) else "no contender has a defined score"
        return replace(plain, reasons=(why,))
    leader = max(stable, key=lambda c: (logs[:, c].mean(), -c))
    others = pool[pool != leader]
    difference = logs[:, [leader]] - logs[:, others]
    influence = 0.5 * row_influence(scores.act[:, pool], scores.best_act[:, pool])
    spread = influence[pool == leader] - influence[pool != leader]
    t_ends, crossed_ends = t_interval(difference), crossed_t_interval(difference, spread, m)
    told = (t_ends[0] > 0) & ((crossed_ends[0] > 0) | np.isnan(crossed_ends[0]))
    mean = difference.mean(axis=0)
    order = np.argsort(mean, kind="stable")
    columns = [np.array([names[c] for c in others], dtype=object), mean, *t_ends, *crossed_ends, told]
    rivals = pl.DataFrame([list(column[order]) for column in columns], RIVALS)
    parts = [(se[order], df) for se, df in crossed_parts(difference, spread, m)]
    copies = not np.ptp(logs[:, pool], axis=0).any()
    reasons = _reasons(plain.S, copies, rivals, unstable, None if q_w is None else float(q_w[leader]))
    winner = None if reasons else names[leader]
    tied = () if winner else (names[leader], *rivals.filter(~pl.col("told_apart"))["rival"].to_list())
    return replace(
        plain,
        reasons=reasons,
        winner=winner,
        leader=names[leader],
        tied=tied,
        rivals=rivals,
        parts=parts,
    )


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
        found.append(f"over {S} seeds the t interval against {by_seed} of {rivals.height} rivals holds 0")
    if close.height > by_seed:
        found.append(f"against {close.height - by_seed} more it holds 0 once the draw of templates and topics counts")
    if q is not None and not q <= ALPHA:
        found.append(f"its R_w > 1 is not significant (adjusted p = {q:.3g})")
    return tuple(found)
