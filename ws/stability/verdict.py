"""The computed verdict over seeds: a winner, or "no winner" with the set that cannot be told apart. (method section 7)

The leader (highest mean log of the rank-honest joint score among the stable contenders) is named only if its paired 95 % t
interval over seeds lies above 0 against **every** rival, also with the spread of templates and topics added
(`crossed_t_interval`), if its R_w > 1 is significant, and if w steers. "Better than every rival" is an intersection-union
claim: it is wrong with at most 5 % where one rival is as good, however many there are, and needs no correction. Seeds share
the EVAL rows and the bases: a lucky draw of either looks the same on every seed, which the seeds alone cannot see.

A share of the best subspace of the same rank grows when random directions are added to a basis. Against a rival of another
rank the leader must therefore also lead in the shares beyond chance, `(R - 1) / (R_best - 1)`, which such padding lowers.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import polars as pl
from jaxtyping import Float

from ws.stability.intervals import Part, crossed_parts, crossed_t_interval, detectable, row_influence, t_interval
from ws.stability.scores import SeedScores, log_values
from ws.stability.significance import benjamini_hochberg
from ws.steer.effect import Steering
from ws.subspaces.candidate import RACES

ALPHA = 0.05
WITHOUT = "without gradients"
POWER = 0.8
RIVALS = {"rival": pl.String}
RIVALS |= dict.fromkeys(("log_ratio", "t_lo", "t_hi", "crossed_lo", "crossed_hi"), pl.Float64)
RIVALS |= {"mean_rank": pl.Float64, "told_apart": pl.Boolean}


@dataclass(frozen=True, eq=False)
class Verdict:
    """winner: the named candidate, or None. leader: the best stable contender (None where w is not seen to steer), rank: its mean
    rank. tied: leader and the rivals not told apart from it (empty with a winner). reasons: why there is none. undefined:
    contenders without a score. rivals: one row per rival (see `verdict`), empty without a leader; parts: their standard errors
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
    rank: float = float("nan")
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
    unseen: Sequence[str] = (),
) -> Verdict:
    """Name a winner among the contenders (A-hypotheses of axis kind write or mixed), or say why there is none.

    unstable: candidates flagged by A-side stability; they cannot win, but must be beaten. unseen: those of which nobody looked
    whether their data determine them; they cannot be named. q_w: Benjamini-Hochberg adjusted p of R_w > 1 in the order of
    `scores`. steers: whether w does at all; None: not asked. `rivals`, closest first: log_ratio of the honest joint, leader over
    rival (natural log), with its 95 % t interval over seeds and the crossed one over seeds, templates and topics, which one
    template or one topic leaves undefined. A contender that is undefined on some seeds only must be beaten on the others.
    """
    names, logs = scores.candidates, log_values(scores)["honest"]
    defined = ~np.isnan(logs).any(axis=0)
    pool = np.flatnonzero(scores.contenders & defined)
    undefined = tuple(names[c] for c in np.flatnonzero(scores.contenders & ~defined))
    m = scores.templates
    plain = Verdict(len(scores.seeds), m, scores.act.shape[3] // m, len(pool), undefined, (), steering=steers)
    if steers is not None and steers.seen is False:
        return replace(plain, reasons=("w is not seen to steer towards the behaviour, so nothing here carries it",))
    stable = [c for c in pool if names[c] not in unstable]
    if not stable:
        why = "every contender is unstable" if len(pool) else "no contender has a defined score"
        return replace(plain, reasons=(why,))
    leader = int(max(stable, key=lambda c: (logs[:, c].mean(), -c)))
    others, ranks = pool[pool != leader], scores.ranks.mean(axis=1)
    difference, spread = _paired(logs, scores.act, scores.best_act, leader, others)
    t_ends, crossed_ends = t_interval(difference), crossed_t_interval(difference, spread, m)
    told = (t_ends[0] > 0) & (crossed_ends[0] > 0)
    beyond = _beyond_chance(scores)
    for i, c in enumerate(others):
        if ranks[c] != ranks[leader] and not np.isnan(beyond[:, c]).any():  # a rival no better than chance is beaten
            gap, drawn = _paired(beyond, scores.act - 1, scores.best_act - 1, leader, np.array([c]))
            told[i] &= bool(t_interval(gap)[0][0] > 0) and bool(crossed_t_interval(gap, drawn, m)[0][0] > 0)
    mean = difference.mean(axis=0)
    order = np.argsort(mean, kind="stable")
    columns = [np.array([names[c] for c in others], dtype=object), mean, *t_ends, *crossed_ends, ranks[others], told]
    rivals = pl.DataFrame([list(column[order]) for column in columns], RIVALS)
    parts = [(se[order], df) for se, df in crossed_parts(difference, spread, m)]
    partly = [c for c in np.flatnonzero(scores.contenders & ~defined) if (~np.isnan(logs[:, c])).any()]
    ahead = [names[c] for c in partly if np.nanmean(logs[:, c] - logs[:, leader]) > 0]
    copies = not np.ptp(logs[:, pool], axis=0).any()
    reasons = _reasons(plain, copies, rivals, unstable, None if q_w is None else float(q_w[leader]))
    reasons += [f"{', '.join(ahead)}: undefined on some seeds, and ahead on the others"] if ahead else []
    if names[leader] in unseen:
        reasons += ["nobody looked whether its data determine it: compare the seeds with their model"]
    if steers is not None and steers.seen is None:
        reasons += ["fewer than two null diffs: w is not shown to do more than any training on these texts"]
    winner = None if reasons else names[leader]
    tied = () if winner else (names[leader], *rivals.filter(~pl.col("told_apart"))["rival"].to_list())
    found = {"leader": names[leader], "rank": float(ranks[leader]), "rivals": rivals, "parts": parts}
    return replace(plain, reasons=tuple(reasons), winner=winner, tied=tied, **found)


def races(
    scores: SeedScores,
    gradients: Collection[str],
    unstable: Sequence[str] = (),
    p_w: Float[np.ndarray, " C"] | None = None,
    steers: Steering | None = None,
    unseen: Sequence[str] = (),
) -> dict[str, Verdict]:
    """The verdict within each race, as if there were no others: what sees training texts does not run against what sees base
    weights. p_w: p of R_w > 1, adjusted within the race. Keys: WITHOUT, of those that see no pairs and are not of source
    gradient, where there are `gradients`; then what candidates see, those of RACES that have contenders. Each is at level
    ALPHA by itself."""
    found = {}
    plain = [
        name not in gradients and "pairs" not in sees for name, sees in zip(scores.candidates, scores.sees, strict=True)
    ]
    for name in (*[WITHOUT] * bool(gradients), *RACES):
        inside = plain if name == WITHOUT else [sees == name for sees in scores.sees]
        kinds = [kind if among else "other race" for kind, among in zip(scores.kinds, inside, strict=True)]
        if (part := replace(scores, kinds=kinds)).contenders.any():
            q_w = None if p_w is None else benjamini_hochberg(np.where(part.ranked, p_w, np.nan))
            found[name] = verdict(part, unstable, q_w, steers, unseen)
    return found


def _paired(
    logs: Float[np.ndarray, "S C"], act: np.ndarray, best: np.ndarray, leader: int, others: np.ndarray
) -> tuple[Float[np.ndarray, "S R"], Float[np.ndarray, "R n"]]:
    """Log ratios of the leader over others, per seed, and the influence of every EVAL row on their means."""
    influence = 0.5 * row_influence(act[:, [leader, *others]], best[:, [leader, *others]])
    return logs[:, [leader]] - logs[:, others], influence[:1] - influence[1:]


def _beyond_chance(scores: SeedScores) -> Float[np.ndarray, "S C"]:
    """Log of the geometric mean of both shares beyond chance, `mean_l (R - 1) / (R_best - 1)`; NaN where one is not above 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        act = ((scores.act.mean(axis=3) - 1) / (scores.best_act.mean(axis=3) - 1)).mean(axis=2)
        w = ((scores.w - 1) / (scores.best_w - 1)).mean(axis=2)
        return np.where((act > 0) & (w > 0), 0.5 * np.log(np.abs(act) * np.abs(w)), np.nan)


def _reasons(v: Verdict, copies: bool, rivals: pl.DataFrame, unstable: Sequence[str], q: float | None) -> list[str]:
    """Why the leader is not named; empty when it is."""
    if v.S < 2:
        return ["one seed has no spread to compare with"]
    if copies:
        return [f"the {v.S} seeds have identical scores: they are copies of one run"]
    found = [] if rivals.height else ["there is no rival to compare with"]
    above = rivals.filter(pl.col("rival").is_in(list(unstable)) & (pl.col("log_ratio") < 0))["rival"].to_list()
    if above:
        found.append(f"{', '.join(above)} scored higher but cannot win: unstable")
    close = rivals.filter(~pl.col("told_apart"))
    by_seed = close.filter(pl.col("t_lo") <= 0).height
    if by_seed:
        found.append(f"over {v.S} seeds the t interval against {by_seed} of {rivals.height} rivals holds 0")
    if v.n_templates < 2 or v.n_topics < 2:
        lacks = "one wording of the probe (give several as `probes`)" if v.n_templates < 2 else "one EVAL topic"
        found.append(f"{lacks}: what another would change is not known")
        return found
    by_row = close.filter((pl.col("t_lo") > 0) & ~(pl.col("crossed_lo") > 0)).height
    if by_row:
        found.append(f"against {by_row} more it holds 0 once the draw of templates and topics counts")
    if by_rank := close.height - by_seed - by_row:
        found.append(f"against {by_rank} of another rank it does not lead in the shares beyond chance")
    if q is not None and not q <= ALPHA:
        found.append(f"its R_w > 1 is not significant (adjusted p = {q:.3g})")
    return found
