"""A benchmark as a figure. (docs/method.md section 8)"""

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from ws.show.figures import MARKERS, PALETTE, TEXT, plain, styled

PANELS = {"effect": "effect, nats (bars: 95 %)", "surgical": "surgical informedness (bars: 95 %)"}


@styled
def effects_figure(table: pl.DataFrame) -> Figure:
    """One row per method, one mark per dose: the effect and, beside it, surgical informedness, with their intervals over
    items. What a method could not meet is not drawn."""
    names = table["method"].unique(maintain_order=True).to_list()
    doses = table["dose"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(TEXT, 1.2 + 0.28 * len(names)), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        for i, dose in enumerate(doses):
            part = table.filter(pl.col("dose") == dose, pl.col("refused") == "")
            mine = [
                table.filter(method=name, refused="")["dose"].to_list() for name in part["method"]
            ]  # the doses of a row
            at = np.array([names.index(name) for name in part["method"]], dtype=float)
            at += [0.16 * (some.index(dose) - (len(some) - 1) / 2) for some in mine]
            value = part[column].to_numpy()
            low, high = (np.nan_to_num(np.abs(part[f"{column}_{end}"].to_numpy() - value)) for end in ("low", "high"))
            nats = table.filter(pl.col("dose") == dose)["target"][0]
            said = dose if np.isnan(nats) else f"{nats:.3g} nats{' (as the persona)' * (dose == 'persona')}"
            style = {"fmt": MARKERS[i % len(MARKERS)], "c": PALETTE[i % len(PALETTE)], "ms": 3.5, "lw": 1}
            axes.errorbar(value, at, xerr=[low, high], label=said, **style)
        axes.axvline(0, ls="--", c="0.5", lw=1)
        axes.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
        axes.margins(x=0.08)  # a mark at the most that can be reached is no frame
        axes.set_yticks(range(len(names)), map(plain, names))
        axes.grid(axis="y", c="0.92")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="KL per token", loc="outside lower center", ncols=len(doses))
    return figure
