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
ONE_SIDED = 0.25  # of the larger movement, under which the smaller one counts as none


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
    accuracy (share with a margin above 0), mean_logratio, sd_logratio, mean_pmass, n, low_pmass where that is under 0.5.
    `both` counts the halves alike, whatever their sizes."""
    rows = []
    for alpha in sorted(set(sweep["alpha"])):
        found = []
        for name in HALVES:
            part = sweep.filter((pl.col("set") == name) & (pl.col("alpha") == alpha))
            margin, ratio = part["margin"].to_numpy(), part["logratio"].to_numpy()
            found.append((
                float(margin.mean()), half_interval(margin), float(margin.std(ddof=1)), float((margin > 0).mean()),
                float(ratio.mean()), float(ratio.std(ddof=1)), float(part["pmass"].mean()), len(part),
            ))  # fmt: skip
            rows.append((name, alpha, *found[-1]))
        a, b = (np.array(one) for one in found)
        mean, widths = (a + b) / 2, np.hypot(a, b) / 2
        sd = float(np.sqrt((a[2] ** 2 + b[2] ** 2) / 2))
        ratios = sweep.filter(pl.col("alpha") == alpha)["logratio"]
        rows.append((BOTH, alpha, mean[0], widths[1], sd, mean[3], mean[4], ratios.std(), mean[6], int(a[7] + b[7])))
    names = "set alpha mean_margin half sd_margin accuracy mean_logratio sd_logratio mean_pmass n".split()
    table = pl.DataFrame(rows, names, orient="row")
    mean, half = pl.col("mean_margin"), pl.col("half")
    table = table.with_columns(lo=mean - half, hi=mean + half, low_pmass=pl.col("mean_pmass") < MIN_PMASS).drop("half")
    order = "set alpha mean_margin lo hi sd_margin accuracy mean_logratio sd_logratio mean_pmass low_pmass n".split()
    return table.select(order).sort(["set", "alpha"], maintain_order=True)


def moved(summary: pl.DataFrame) -> dict[str, tuple[float, float]]:
    """Per set the mean margin at the lowest and at the highest alpha."""
    found = {}
    for name in (*HALVES, BOTH):
        part = summary.filter(set=name).sort("alpha")["mean_margin"]
        found[name] = part[0], part[-1]
    return found


def together(yes: float, no: float) -> tuple[bool, str]:
    """Whether two movements of the halves (nats) are the behaviour's, and in words what they are."""
    large, small = max(abs(yes), abs(no)), min(abs(yes), abs(no))
    if yes * no < 0 and small >= ONE_SIDED * large:
        word = "yes" if yes > 0 else "no"
        return False, f"the halves move in opposite directions: a bias towards the {word}-word, not the behaviour"
    if small < ONE_SIDED * large:
        return False, f"only the {'Yes' if abs(yes) > abs(no) else 'No'} half moves: this is not told apart from a bias"
    return True, "both halves move together: not a bias towards one word"


def verdict(summary: pl.DataFrame) -> dict:
    """What a sweep over statements shows, computed: as `ws.steer.evaluate.steering_verdict`, with `together` (whether both
    halves move alike) and the halves' movements `moved_yes` and `moved_no`, nats."""
    part, ends = summary.filter(set=BOTH).sort("alpha"), moved(summary)
    means, low, high = part["mean_margin"].to_list(), part["alpha"][0], part["alpha"][-1]
    monotone = all(a < b for a, b in zip(means, means[1:], strict=False))
    by_half = {name: ends[name][1] - ends[name][0] for name in HALVES}
    alike, said = together(by_half["yes"], by_half["no"])
    least = float(summary.filter(pl.col("set").is_in(HALVES))["mean_pmass"].min())
    first, last = part.row(0, named=True), part.row(-1, named=True)
    counts = {name: summary.filter(set=name)["n"][0] for name in HALVES}
    text = (
        f"On {part['n'][0]} held-out statements ({counts['yes']} where the yes-word matches, {counts['no']} where the no-word"
        f" does) the mean margin of the matching answer goes from {_with_ends(first)} at alpha {low:+g} to {_with_ends(last)}"
        f" at alpha {high:+g}, a spread of {means[-1] - means[0]:.2f} nats, and the accuracy from {first['accuracy']:.2f} to"
        f" {last['accuracy']:.2f}; {'every step of alpha raises it' if monotone else 'it is not monotone in alpha'}. The Yes"
        f" half moves by {by_half['yes']:+.2f} and the No half by {by_half['no']:+.2f} nats: {said}. The least mean pmass is"
        f" {least:.3f}{'' if least >= MIN_PMASS else ': the margin says little there'}."
    )
    spread = {"monotone": monotone, "spread": means[-1] - means[0], "least_pmass": least}
    return {**spread, "together": alike, "moved_yes": by_half["yes"], "moved_no": by_half["no"], "text": text}


def _with_ends(row: dict) -> str:
    return f"{row['mean_margin']:+.2f} ({row['lo']:+.2f} to {row['hi']:+.2f})"
