"""What w does at other strengths, as a figure. (docs/method.md section 2)"""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ws.show.figures import TEXT, beside, legend_below, styled

SETS = {"false": ("#D55E00", "o"), "negated": ("#0072B2", "s"), "true": ("#009E73", "^")}
SETS |= {"yes": ("#D55E00", "o"), "no": ("#0072B2", "s"), "both": ("0.3", "D")}
FEW = 9  # strengths, each with a tick of its own
KINDS = {"yes": "half", "no": "half", "both": "halves"}


@styled
def margin_curve(margins: pl.DataFrame, sweep: pl.DataFrame) -> Figure:
    """Mean answer margin (bars: its 95 % t interval) and, beside it, the score of the sweep's first claim set."""
    figure = Figure(figsize=(TEXT, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    low, high = margins["mean_margin"] - margins["low"], margins["high"] - margins["mean_margin"]
    left.errorbar(margins["alpha"], margins["mean_margin"], yerr=[low.fill_nan(0), high.fill_nan(0)], c="#0072B2",
                  marker="o", ms=4, capsize=2)  # fmt: skip
    left.set(xlabel="alpha", ylabel="answer margin\nnats per token (bars: 95 %)")
    name, score = sweep["set"][0], "margin" if "mean_margin" in sweep.columns else "logratio"
    what = "log P(matching) - log P(other), nats" if score == "margin" else "log-ratio, nats"
    part = sweep.filter(pl.col("set") == name).sort("alpha")
    right.plot(part["alpha"], part[f"mean_{score}"], c="#D55E00", marker="o", ms=4)
    right.set(xlabel="alpha", ylabel=f"{what} ({name} {KINDS.get(name, 'claims')})")
    for axes in (left, right):
        axes.axhline(0, ls="--", c="0.5", lw=1)
        _at_alphas(axes, margins["alpha"])
    return figure


@styled
def alpha_curves(sweep: pl.DataFrame) -> Figure:
    """Mean logratio (with sd over claims), of statements the mean margin, and pmass against alpha, one line per claim set."""
    score = "margin" if "mean_margin" in sweep.columns else "logratio"
    what = "log P(matching) - log P(other)" if score == "margin" else "log P(yes) - log P(no)"
    figure = Figure(figsize=(TEXT, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = sweep["set"].unique(maintain_order=True).to_list()
    for i, name in enumerate(names):
        part = sweep.filter(pl.col("set") == name).sort("alpha")
        at = beside(part["alpha"], i, len(names))
        colour, marker = SETS.get(name, ("0.4", "x"))
        n = part["n"][0]
        left.errorbar(at, part[f"mean_{score}"], yerr=part[f"sd_{score}"], c=colour, marker=marker, ms=4,
                      capsize=2, label=f"{name} {KINDS.get(name, 'claims')} (n = {n})")  # fmt: skip
        right.plot(at, part["mean_pmass"], c=colour, marker=marker, ms=4)
    left.axhline(0, ls="--", c="0.5", lw=1)
    unit = "statements" if score == "margin" else "claims"
    left.set(xlabel="alpha", ylabel=f"{what}\nnats (bars: sd over {unit})")
    legend_below(figure, left)
    right.axhline(0.5, ls="--", c="0.5", lw=1)
    right.set(xlabel="alpha", ylabel="P(yes) + P(no)", ylim=(0, 1.03))
    for axes in (left, right):
        _at_alphas(axes, sweep["alpha"])
    return figure


def _at_alphas(axes: Axes, alphas: pl.Series) -> None:
    """Ticks at the strengths that were measured, where there are few."""
    if (few := alphas.unique().sort().to_list()) and len(few) <= FEW:
        axes.set_xticks(few, [f"{a:g}" for a in few])
