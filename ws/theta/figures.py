"""Figures of the theta fits: one function each, returning the Figure; `ws.show.figures.save` writes them."""

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ws.show.figures import MARKERS, PALETTE, TEXT, TYPE, legend_below, plain, styled
from ws.theta.fitted import ThetaFits


@styled
def fit_traces(found: ThetaFits, heads: list[str]) -> Figure:
    """Adam's traces of the fitted heads: training loss minus its start, KL to the base, |theta|; mean over users.
    heads: all heads of the report in their order, so that a head has one colour in all its figures."""
    figure = Figure(figsize=(TEXT, 2.7), layout="constrained")
    axes = figure.subplots(1, 3)
    loss, kl, norm = (
        "training loss minus its start\n(nats per token)",
        "KL to the base\n(nats per token)",
        "|theta| (no unit)",
    )
    for axis, quantity, label in zip(axes, ("loss", "kl", "theta_norm"), (loss, kl, norm), strict=True):
        for head in found.heads:
            i, fits = heads.index(head), [found.fits[user, head] for user in found.users]
            runs = torch.stack([fit.adam.trace[quantity] for fit in fits])
            mean = (runs - runs[:, :1] if quantity == "loss" else runs).mean(0)
            style = {"color": PALETTE[i], "marker": MARKERS[i], "markevery": (i % 5, 5), "ms": 3}
            dashes = "--" if head.startswith("lm_head") else "-"  # two of them are other heads' functions
            axis.plot(mean, ls=dashes, label=head, **style)
            if quantity == "loss":
                best = [fit.clipped.loss - float(fit.adam.trace["loss"][0]) for fit in fits]
                axis.axhline(float(np.mean(best)), color=PALETTE[i], lw=0.8, ls=":")
        axis.set(xlabel="Adam step", ylabel=label)
    axes[0].set_title("dotted: the optimum within the norm clip", fontsize=TYPE)
    figure.suptitle(f"Adam at the {found.scale} scale of the heads, mean over users")
    legend_below(figure, axes[0])
    return figure


@styled
def heldout_gain(summary: pl.DataFrame, control: pl.DataFrame | None = None) -> Figure:
    """Held-out gain of each head: bars = mean over users (Adam), dots = users, diamonds = the free optimum's mean. control:
    `ws.theta.verdict.control_table`: a dash, at the matched scale, for what thetas of texts dealt to random users gain."""
    scales = summary["scale"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(TEXT, 2.9), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(scales)))
    colours = {head: PALETTE[i] for i, head in enumerate(summary["head"].unique(maintain_order=True))}
    for axis, scale in zip(axes, scales, strict=True):
        dealt = ", line: texts dealt at random" if control is not None and scale == "matched" else ""
        part = summary.filter(pl.col("scale") == scale)
        heads = part["head"].unique(maintain_order=True).to_list()
        for i, head in enumerate(heads):
            own = part.filter((pl.col("head") == head) & (pl.col("solver") == "adam"))["gain"].to_numpy()
            free = part.filter((pl.col("head") == head) & (pl.col("solver") == "optimum"))["gain"].mean()
            axis.bar(i, own.mean(), color=colours[head], alpha=0.5)
            axis.plot(np.full(len(own), i) + np.linspace(-0.2, 0.2, len(own)), own, ".", color="black", ms=3)
            axis.plot(i, free, "D", color=colours[head], mec="black", ms=4)
            for gain in [] if control is None or scale != "matched" else control.filter(head=head)["permuted_gain"]:
                axis.plot([i - 0.4, i + 0.4], [gain, gain], color="black", lw=1.6)
        axis.axhline(0, color="black", lw=0.6)
        axis.set_xticks(range(len(heads)), heads, rotation=30, ha="right")
        axis.set_ylabel("held-out gain (nats per token)")
        axis.set_title(f"{scale} scale (bar: Adam, dots: users,\ndiamond: free optimum{dealt})")
    return figure


@styled
def cosine_heatmap(thetas: dict[str, Float[Tensor, "users D"]], users: list[str]) -> Figure:
    """Cosines between the users' thetas, a panel per head."""
    panels = {name: torch.nn.functional.normalize(t.float(), dim=1) for name, t in thetas.items()}
    matrices = {name: (t @ t.T).numpy() for name, t in panels.items()}
    figure = _matrices(matrices, users, "theta of", "theta of", "cosine", "RdBu_r", (-1.0, 1.0))
    figure.suptitle("Cosines between the users' thetas")
    return figure


@styled
def cross_heatmap(cross: pl.DataFrame, heads: list[str], users: list[str]) -> Figure:
    """Gain on the texts of each user (column) under each theta (row), a panel per head; a column's best framed."""
    gains = {head: cross.filter(pl.col("head") == head)["gain"].to_numpy() for head in heads}
    matrices = {head: gain.reshape(len(users), len(users)) for head, gain in gains.items()}
    most = max(float(np.abs(m).max()) for m in matrices.values()) or 1.0
    unit = "gain (nats per token)"
    figure = _matrices(matrices, users, "held-out texts of", "theta of", unit, "PuOr_r", (-most, most))
    for axis, matrix in zip(figure.axes, matrices.values(), strict=False):
        for j, i in enumerate(matrix.argmax(axis=0)):
            axis.add_patch(Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, fill=False, ec="black", lw=1))
    scale = cross["scale"][0]
    figure.suptitle(f"Whose theta on whose texts, {scale} scale\n(framed: the best of its column)")
    return figure


def _matrices(matrices: dict, users: list[str], x: str, y: str, unit: str, colours: str, limits: tuple) -> Figure:
    """One panel per matrix, two beside each other: the numbers in the cells are to be read."""
    columns, users = min(2, len(matrices)), list(map(plain, users))
    rows = -(-len(matrices) // columns)
    figure = Figure(figsize=(TEXT if columns > 1 else 4.2, 3.2 * rows), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(matrices))]
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow(matrix, cmap=colours, vmin=limits[0], vmax=limits[1])
        axis.set_xticks(range(len(users)), users, rotation=40, ha="right")
        axis.set_yticks(range(len(users)), users)
        for i, j in np.ndindex(matrix.shape):
            colour = "white" if abs(matrix[i, j]) > 0.6 * limits[1] else "black"
            axis.text(j, i, f"{round(matrix[i, j], 2) + 0.0:.2f}", ha="center", va="center", color=colour)
        axis.set_title(name)
        axis.set(xlabel=x, ylabel=y)
    figure.colorbar(image, ax=axes, label=unit, shrink=0.8 / rows)
    return figure


@styled
def sweep_curves(sweep: pl.DataFrame, x: str, fitted: float, heads: list[str]) -> Figure:
    """Held-out gain (left) and KL to the base (right) against `x` (gamma or beta); dashed: the value of the fit. heads:
    all heads of the report in their order, so that a head has one colour in all its figures."""
    figure = Figure(figsize=(TEXT, 2.7), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = (("gain", "held-out gain (nats per token)"), ("kl", "KL to the base (nats per token)"))
    for axis, (column, label) in zip(axes, panels, strict=True):
        for head in sweep["head"].unique(maintain_order=True):
            i = heads.index(head)
            at, values = sweep.filter(pl.col("head") == head).sort(x).select(x, column).to_numpy().T
            axis.plot(at, values, color=PALETTE[i], marker=MARKERS[i], ms=3, label=head)
        axis.axvline(fitted, color="black", lw=0.8, ls="--")
        axis.axhline(0, color="black", lw=0.5)
        axis.set(xlabel=f"{x} (no unit)", ylabel=label)
        if x == "beta":
            axis.set_xscale("symlog", linthresh=0.01)
            axis.set_xlim(left=0)
    legend_below(figure, axes[0])
    return figure
