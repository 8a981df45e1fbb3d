"""What w does at other strengths, as a figure. (docs/method.md section 2)"""

import polars as pl
from matplotlib.figure import Figure

SETS = {"false": ("#D55E00", "o"), "negated": ("#0072B2", "s"), "true": ("#009E73", "^")}
SETS |= {"yes": ("#D55E00", "o"), "no": ("#0072B2", "s"), "both": ("0.3", "D")}
KINDS = {"yes": "half", "no": "half", "both": "halves"}


def margin_curve(margins: pl.DataFrame, sweep: pl.DataFrame) -> Figure:
    """Mean answer margin (bars: its 95 % t interval) and, beside it, the score of the sweep's first claim set."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    low, high = margins["mean_margin"] - margins["low"], margins["high"] - margins["mean_margin"]
    left.errorbar(margins["alpha"], margins["mean_margin"], yerr=[low.fill_nan(0), high.fill_nan(0)], c="#0072B2",
                  marker="o", ms=5, capsize=2, lw=1.4)  # fmt: skip
    left.set(xlabel="alpha", ylabel="answer margin, nats per token (bars: 95 %)")
    name, score = sweep["set"][0], "margin" if "mean_margin" in sweep.columns else "logratio"
    what = "log P(matching) - log P(other), nats" if score == "margin" else "log-ratio, nats"
    part = sweep.filter(pl.col("set") == name).sort("alpha")
    right.plot(part["alpha"], part[f"mean_{score}"], c="#D55E00", marker="o", ms=5, lw=1.4)
    right.set(xlabel="alpha", ylabel=f"{what} ({name} {KINDS.get(name, 'claims')})")
    for axes in (left, right):
        axes.axhline(0, ls="--", c="0.5", lw=1)
    return figure


def alpha_curves(sweep: pl.DataFrame) -> Figure:
    """Mean logratio (with sd over claims), of statements the mean margin, and pmass against alpha, one line per claim set."""
    score = "margin" if "mean_margin" in sweep.columns else "logratio"
    what = "log P(matching) - log P(other)" if score == "margin" else "log P(yes) - log P(no)"
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in sweep["set"].unique(maintain_order=True):
        part = sweep.filter(pl.col("set") == name).sort("alpha")
        colour, marker = SETS.get(name, ("0.4", "x"))
        n = part["n"][0]
        left.errorbar(part["alpha"], part[f"mean_{score}"], yerr=part[f"sd_{score}"], c=colour, marker=marker, ms=5,
                      capsize=2, lw=1.4, label=f"{name} {KINDS.get(name, 'claims')} (n = {n})")  # fmt: skip
        right.plot(part["alpha"], part["mean_pmass"], c=colour, marker=marker, ms=5, lw=1.4)
    left.axhline(0, ls="--", c="0.5", lw=1)
    unit = "statements" if score == "margin" else "claims"
    left.set(xlabel="alpha", ylabel=f"{what}\nnats (bars: sd over {unit})")
    left.legend(fontsize=8)
    right.axhline(0.5, ls="--", c="0.5", lw=1)
    right.set(xlabel="alpha", ylabel="P(yes) + P(no)", ylim=(0, 1.03))
    return figure
