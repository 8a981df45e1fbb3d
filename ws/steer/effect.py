"""Does w steer at all? Its effect on the behaviour score, held against null diffs. (docs/method.md sections 2 and 7)

`effect = log-ratio at alpha +1 - at -1`, nats, on the held-out false claims; of statements the margin of the matching answer in
its place (`ws.steer.statements`). With `m, s` the mean and sd over J null diffs, a score is above their spread where it exceeds
`m + t_{J-1} s sqrt(1 + 1/J)`, the upper end of the 95 % prediction interval of one more null diff. An effect changes sign with
w, and a null diff with all its coins turned is the same one with the opposite sign and as likely: its mean is known to be 0, so
that the end is `t_J sqrt(sum e^2 / J)`. One null diff has no spread: nothing is above it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy import stats

from ws.data import Behavior
from ws.diff import WeightDiff
from ws.diff.algebra import cosines, grams
from ws.model.lm import LM
from ws.steer.answers import ENDS, Known, answers_of
from ws.steer.statements import MOST_ASKED, halves

LEVEL = 0.95
SAME = 1 - 1e-6  # a cosine from which on two differences are one, up to their scale


def check_null_diffs(nulls: Sequence[tuple[str, WeightDiff]]) -> None:
    """What `upper_effect` takes for granted of null diffs, each with its file or name: they are independent, and their mean is 0.
    ValueError naming two that are one up to sign and scale; a warning naming each whose metadata do not say `null: true`."""
    if len(nulls) > 1:
        diffs = [w for _, w in nulls]
        cos = cosines(grams(diffs, sorted({name for w in diffs for name in w}))).abs()
        for (i, (a, _)), (j, (b, _)) in combinations(enumerate(nulls), 2):
            if cos[i, j] >= SAME:
                raise ValueError(f"{a} and {b} are one null diff, up to sign and scale: give one of them")
    for name, w in nulls:
        if w.meta.get("null") is not True:
            told = "its metadata do not say null: true. A null diff's mean is known to be 0 for shuffled labels alone"
            warnings.warn(f"{name}: {told}; train one: just nb weight_diff -p NULL_DIFF true", stacklevel=3)


def asked(behavior: Behavior) -> tuple[list[str], Float[np.ndarray, " n"]]:
    """What the effect asks about, and +1 or -1 for each: the held-out false claims (+1); of statements the first MOST_ASKED
    held-out ones, those where the yes-word matches (+1) before the others (-1)."""
    by_half = halves(behavior, MOST_ASKED) if behavior.answers else {"yes": behavior.heldout_claims}
    claims = [claim for half in by_half.values() for claim in half]
    return claims, np.repeat([1.0, -1.0][: len(by_half)], [*map(len, by_half.values())])


def effects(
    lm: LM,
    behavior: Behavior,
    w: WeightDiff,
    templates: int = 1,
    cache: Path | None = None,
    known: Known | None = None,
) -> Float[np.ndarray, " n"]:
    """The effect on every held-out false claim, nats, mean over the first `templates` wordings of the probe; of statements on
    the first MOST_ASKED held-out ones, those where the yes-word matches before the others. cache and errors as in
    `ws.steer.answers.kept_answers`, known as in `answers_of`."""
    claims, sides = asked(behavior)
    by_wording = [[behavior.probe_text(claim, a) for claim in claims] for a in range(templates)]
    up, down = answers_of(lm, behavior, by_wording, w, list(ENDS), cache, known)[:, :, 0].mean(axis=1)
    return (up - down) * sides


def upper_effect(nulls: Sequence[float], level: float = LEVEL) -> float:
    """Upper end of the prediction interval of one more null diff's effect, whose mean is 0; NaN for fewer than two."""
    J = len(nulls)
    return float(stats.t.ppf((1 + level) / 2, J) * np.sqrt(np.mean(np.square(nulls)))) if J > 1 else float("nan")


def upper_end(nulls: Float[np.ndarray, "J C"], level: float = LEVEL) -> Float[np.ndarray, " C"]:
    """Upper end of the prediction interval of one more null diff; NaN for fewer than two."""
    J = len(nulls)
    if J < 2:
        return np.full(nulls.shape[1], np.nan)
    wide = stats.t.ppf(0.5 + level / 2, J - 1) * np.sqrt(1 + 1 / J)
    return nulls.mean(axis=0) + wide * nulls.std(axis=0, ddof=1)


def null_mean(nulls: Float[np.ndarray, "J C"]) -> Float[np.ndarray, " C"]:
    """Geometric mean of scores over null diffs; NaN without any, and where one scores 0."""
    with np.errstate(divide="ignore"):
        logs = np.log(nulls).mean(axis=0) if len(nulls) else np.full(nulls.shape[1], np.nan)
    return np.exp(np.where(np.isinf(logs), np.nan, logs))


def null_end(nulls: Float[np.ndarray, "J C"], ranks: Float[np.ndarray, " C"], d: int) -> Float[np.ndarray, " C"]:
    """`upper_end` of scores R over null diffs, in units of R: taken in logit f, `f = R r / d`, so that it stays under what a
    score can reach, d / r. NaN for fewer than two null diffs, and where a score is undefined."""
    with np.errstate(invalid="ignore"):
        f = np.clip(nulls * ranks / d, 1e-6, 1 - 1e-6)
        return d / np.maximum(ranks, 1e-9) / (1 + np.exp(-upper_end(np.log(f / (1 - f)))))


@dataclass(frozen=True)
class Steering:
    """Does w steer? effects: per seed, mean over claims, nats; nulls: the same of the null diffs; seen: whether every seed's
    effect is above the null diffs' spread, None where there are too few of them to know; text: that in words."""

    effects: tuple[float, ...]
    nulls: tuple[float, ...]
    seen: bool | None
    text: str

    @property
    def short(self) -> str:
        """The same in a sentence."""
        beside = f", null diffs (shuffled labels) by {_range(self.nulls)}" if self.nulls else ""
        known = {
            True: "it steers",
            False: "that this is steering is **not shown**",
            None: "two null diffs would tell whether it steers",
        }
        moved = f"`w` moves the behaviour score by {_range(self.effects)} nats between alpha -1 and +1"
        return f"{moved}{beside}: {known[self.seen]}."


def steering(by_claim: Sequence[Sequence[float]], nulls: Sequence[float], score: str = "log-ratio") -> Steering:
    """by_claim: per seed, the effect on every held-out false claim (nats); score: its name. Against the spread of two or more
    null diffs. With fewer nothing is known where a t interval over the claims (three or more) lies above 0, as that of most
    null diffs does, and w is not seen to steer where it does not."""
    found, nulls = tuple(float(np.mean(row)) for row in by_claim), tuple(map(float, nulls))
    many = len(found) > 1
    said = f"w moves the {score} by {_range(found)} nats between alpha -1 and +1"
    if len(nulls) >= 2:
        end = upper_effect(nulls)
        seen = bool(min(found) > end)
        above = f"above their spread{' on every seed' if many else ''}"
        above += ", and against the behaviour" if not seen and max(found) < -end else ""
        held = f"{len(nulls)} null diffs by {_range(nulls)} (97.5 % of further ones stay under {end:+.2f})"
        return Steering(found, nulls, seen, f"{said}, {held}: {above if seen else f'**not {above}**'}.")
    had = f"with {len(nulls) or 'no'} null diff{'' if len(nulls) == 1 else 's'} (2 are needed for a spread)"
    few = min(len(row) for row in by_claim)
    if few < 3:
        return Steering(found, nulls, False, f"{said}; {had}, {few} held-out claims cannot show that this is steering.")
    lows = [stats.t.interval(LEVEL, len(r) - 1, np.mean(r), max(stats.sem(r), 1e-12))[0] for r in by_claim]
    seen = None if min(lows) > 0 else False
    lies = "lies above 0" if seen is None else "**does not lie above 0**"
    every = " on every seed" if many else ""
    return Steering(
        found, nulls, seen, f"{said}; {had}, the 95 % t interval over {few} claims {lies}{every}; without null"
        " diffs, steering is not told apart from what any training on these texts does.",
    )  # fmt: skip


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:+.2f}" if high - low < 0.005 else f"{low:+.2f} to {high:+.2f}"
