"""The cross matrix of behaviours as a heat map."""

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from ws.show.figures import TEXT, plain, styled

BESIDE = 5  # behaviours of which three panels stand beside each other


@styled
def heat_maps(matrix: pl.DataFrame, moves: pl.DataFrame) -> Figure:
    """What each w (rows) moves on each behaviour's statements (columns): behaviour part and bias part in nats, on one scale,
    and the accuracy at the highest alpha."""
    names = moves["w"].unique(maintain_order=True).to_list()
    high = matrix["alpha"].max()
    at = matrix.filter((pl.col("alpha") == high) & (pl.col("set") == "both") & pl.col("w").is_in(names))
    panels = [
        ("behaviour part, nats", moves, "behaviour", "RdBu_r"),
        ("bias part, nats", moves, "bias", "RdBu_r"),
        (f"accuracy at alpha {high:+g}", at, "accuracy", "viridis"),
    ]
    n, moved = len(names), np.abs(moves.select("behaviour", "bias").to_numpy())
    top = np.nanmax(moved) or 1.0  # one scale for both parts: what is dark in one is as large as in the other
    beside = n <= BESIDE  # the numbers in the cells are to be read
    figure = Figure(figsize=(TEXT, 1.3 + 0.36 * n if beside else 3 * (0.9 + 0.24 * n)), layout="constrained")
    shape = (1, 3) if beside else (3, 1)
    for axes, (title, table, column, colours) in zip(figure.subplots(*shape), panels, strict=True):
        value = {(w, asked): v for w, asked, v in table.select("w", "statements", column).rows()}
        grid = np.array([[value[w, asked] for asked in names] for w in names])
        limits = {"vmin": 0, "vmax": 1} if column == "accuracy" else {"vmin": -top, "vmax": top}
        axes.imshow(grid, cmap=colours, aspect="auto", **limits)
        for i in range(n):
            for j in range(n):
                dark = grid[i, j] < 0.6 if column == "accuracy" else abs(grid[i, j]) > 0.6 * top
                axes.text(j, i, f"{round(grid[i, j], 2) + 0.0:.2f}", ha="center", va="center", c="w" if dark else "k")
        axes.set_xticks(range(n), [plain(x) for x in names], rotation=30, ha="right")
        axes.set_yticks(range(n), [plain(x) for x in names] if axes.get_subplotspec().is_first_col() else [""] * n)
        axes.set(title=title, xlabel="held-out statements of")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("w of")
    return figure
