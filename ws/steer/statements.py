"""The score of statements with answers: does the model give the answer that shows the behaviour, on both halves?

`margin = log P(matching answer) - log P(other answer)` at the answer position: the log-ratio, with its sign turned where the
no-word matches. With `y, n` what the margin of the Yes half and of the No half moves by, a mere yes-bias has `y = -n`; the
behaviour is what they have in common. (docs/method.md section 1)
"""

import numpy as np
import polars as pl
from jaxtyping import Float
from scipy import stats

from ws.data import Behavior

HALVES = ("yes", "no")
BOTH = "both"
MIN_PMASS = 0.5
MOST_ASKED = 100  # held-out statements, where nothing else is said
ONE_SIDED = 0.25  # of the larger movement, under which the smaller one counts as none
Move = tuple[float, float, float]  # a movement and the ends of its 95 % interval


def halves(behavior: Behavior, n: int | None = None) -> dict[str, tuple[str, ...]]:
    """The claims of the first `n` held-out statements (None: all), by the answer that matches. ValueError where `n` leaves
    fewer than two of a half."""
    held = list(zip(behavior.heldout_topics, behavior.heldout_answers, strict=True))[:n]
    yes, no = (tuple(t.claim for t, answer in held if answer in words) for words in (behavior.yes, behavior.no))
    if min(len(yes), len(no)) < 2:
        least = f"{len(yes)} statements match yes and {len(no)} no, two of each are needed"
        raise ValueError(f"{behavior.name}: of the first {len(held)} held-out ones {least}; use N_HELDOUT 4 or more")
    return {"yes": yes, "no": no}


def with_margin(sweep: pl.DataFrame) -> pl.DataFrame:
    """A sweep with the column `margin`: the log-ratio, its sign turned in the No half."""
    sign = pl.when(pl.col("set") == "no").then(-1.0).otherwise(1.0)
    return sweep.with_columns(margin=pl.col("logratio") * sign)


def half_interval(values: Float[np.ndarray, " n"], level: float = 0.95) -> float:
    """Half width of a t interval of the mean over statements; NaN for one."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def summarise(sweep: pl.DataFrame) -> pl.DataFrame:
    """Per half and alpha, and for `both`: mean_margin with its 95 % t interval over statements (lo, hi), sd_margin (n-1),
    accuracy (share with a margin above 0), mean_logratio, sd_logratio, mean_pmass, n, low_pmass where that is under 0.5; `moved`,
    by how much the margin is above that at the lowest alpha, statement by statement, with its interval (moved_lo, moved_hi).
    `both` counts the halves alike, whatever their sizes."""
    rows, first = [], {name: _margins(sweep, name, sweep["alpha"].min()) for name in HALVES}
    for alpha in sorted(set(sweep["alpha"])):
        found = []
        for name in HALVES:
            part = sweep.filter((pl.col("set") == name) & (pl.col("alpha") == alpha))
            margin, ratio = _margins(sweep, name, alpha), part["logratio"].to_numpy()
            found.append((
                float(margin.mean()), half_interval(margin), float(margin.std(ddof=1)), float((margin > 0).mean()),
                float(ratio.mean()), float(ratio.std(ddof=1)), float(part["pmass"].mean()), len(part),
                float((by := margin - first[name]).mean()), half_interval(by),
            ))  # fmt: skip
            rows.append((name, alpha, *found[-1]))
        a, b = (np.array(one) for one in found)
        mean, widths = (a + b) / 2, np.hypot(a, b) / 2
        sd = float(np.sqrt((a[2] ** 2 + b[2] ** 2) / 2))
        ratios = sweep.filter(pl.col("alpha") == alpha)["logratio"]
        n = int(a[7] + b[7])
        rows.append((BOTH, alpha, mean[0], widths[1], sd, *mean[3:5], ratios.std(), mean[6], n, mean[8], widths[9]))
    names = (
        "set alpha mean_margin half sd_margin accuracy mean_logratio sd_logratio mean_pmass n moved moved_half".split()
    )
    table = pl.DataFrame(rows, names, orient="row").with_columns(low_pmass=pl.col("mean_pmass") < MIN_PMASS)
    for column, mean, half in (
        ("", pl.col("mean_margin"), pl.col("half")),
        ("moved_", pl.col("moved"), pl.col("moved_half")),
    ):
        table = table.with_columns((mean - half).alias(f"{column}lo"), (mean + half).alias(f"{column}hi"))
    order = "set alpha mean_margin lo hi sd_margin accuracy mean_logratio sd_logratio mean_pmass low_pmass n"
    return table.select(f"{order} moved moved_lo moved_hi".split()).sort(["set", "alpha"], maintain_order=True)


def _margins(sweep: pl.DataFrame, half: str, alpha: float) -> Float[np.ndarray, " n"]:
    return sweep.filter((pl.col("set") == half) & (pl.col("alpha") == alpha)).sort("claim")["margin"].to_numpy()


def together(yes: Move, no: Move) -> tuple[bool, str]:
    """Whether the movements of the halves (nats, with their intervals) are the behaviour's, and in words what they are."""
    seen = [name for name, (_, low, high) in (("Yes", yes), ("No", no)) if low > 0 or high < 0]
    if not seen:
        return False, "neither half is seen to move, both 95 % intervals hold 0"
    if len(seen) == 1:
        other = "the other's 95 % interval holds 0"
        return False, f"only the {seen[0]} half is seen to move, {other}: this is not told apart from a bias"
    small, large = sorted((abs(yes[0]), abs(no[0])))
    if small < ONE_SIDED * large:
        most = "Yes" if abs(yes[0]) > abs(no[0]) else "No"
        return False, f"nearly only the {most} half moves: this is not told apart from a bias"
    if yes[0] * no[0] < 0:
        word = "yes" if yes[0] > 0 else "no"
        return False, f"the halves move in opposite directions: a bias towards the {word}-word, not the behaviour"
    against = "" if yes[0] > 0 else ", against the behaviour"
    return True, f"both halves move together{against}, both 95 % intervals exclude 0: not a bias towards one word"


def told_order(means: list[float]) -> str:
    """How a score goes with ascending alpha, in words."""
    steps = np.sign(np.diff(means)).tolist()
    raised, lowered = (all(step == way for step in steps) for way in (1, -1))
    return (
        f"every step of alpha {'raises' if raised else 'lowers'} it"
        if raised or lowered
        else "it is not monotone in alpha"
    )


def verdict(summary: pl.DataFrame) -> dict:
    """What a sweep over statements shows, computed: as `ws.steer.evaluate.steering_verdict`, with `together` (whether both
    halves are seen to move alike) and the halves' movements `moved_yes` and `moved_no`, nats."""
    part = summary.filter(set=BOTH).sort("alpha")
    means, low, high = part["mean_margin"].to_list(), part["alpha"][0], part["alpha"][-1]
    monotone, order = all(a < b for a, b in zip(means, means[1:], strict=False)), told_order(means)
    columns = "moved", "moved_lo", "moved_hi"
    yes, no = (summary.filter(set=name).sort("alpha").select(columns).row(-1) for name in HALVES)
    alike, said = together(yes, no)
    least = float(summary.filter(pl.col("set").is_in(HALVES))["mean_pmass"].min())
    first, last = part.row(0, named=True), part.row(-1, named=True)
    ends = [with_ends(row["mean_margin"], row["lo"], row["hi"]) for row in (first, last)]
    counts = {name: summary.filter(set=name)["n"][0] for name in HALVES}
    text = (
        f"On {part['n'][0]} held-out statements ({counts['yes']} where the yes-word matches, {counts['no']} where the no-word"
        f" does) the mean margin of the matching answer goes from {ends[0]} at alpha {low:+g} to {ends[1]}"
        f" at alpha {high:+g}, a spread of {means[-1] - means[0]:.2f} nats, and the accuracy from {first['accuracy']:.2f} to"
        f" {last['accuracy']:.2f}; {order}. The Yes"
        f" half moves by {with_ends(*yes)} and the No half by {with_ends(*no)} nats: {said}. The least mean pmass is"
        f" {least:.3f}{'' if least >= MIN_PMASS else ': the margin says little there'}."
    )
    spread = {"monotone": monotone, "spread": means[-1] - means[0], "least_pmass": least}
    return {**spread, "together": alike, "moved_yes": yes[0], "moved_no": no[0], "said": said, "text": text}


def with_ends(mean: float, low: float, high: float) -> str:
    """A value and its interval, in words."""
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
