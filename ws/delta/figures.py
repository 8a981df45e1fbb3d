"""Figures of the delta SVD: one function each, returning the Figure; phases are bands. (docs/method.md section 9)"""

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ws.delta.phases import RANK, bands, expected_cos
from ws.show.figures import COLUMN, PALETTE, TEXT, plain, plain_log_ticks, styled

BAND = {"A": "#56B4E9", "B": "#E69F00", "C": "#009E73", "D": "#CC79A7", "E": "#D55E00", "tail": "#7F7F7F"}


def _axes(y: str, width: float = TEXT, height: float = 2.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot(xlabel="layer", ylabel=y)


def _finished(figure: Figure, ax: Axes, n_layers: int, title: str | None = None) -> Figure:
    """With bands of phases, and the legend beside the axes: inside them it would hide some layer's point."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), title=title)
    named = dict(transform=ax.get_xaxis_transform(), ha="center", va="bottom")
    for name, first, last in bands(n_layers):
        ax.axvspan(first - 0.5, last + 0.5, color=BAND[name], alpha=0.13, linewidth=0)
        ax.text((first + last) / 2, 1.01, name, **named)
    ax.set_xlim(-0.5, n_layers - 0.5)
    ax.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _log_scale(ax: Axes) -> None:
    ax.set_yscale("log")
    plain_log_ticks(ax.yaxis)
    ax.set_ylabel(f"{ax.get_ylabel()}, log scale")


@styled
def rel_step(layers: pl.DataFrame) -> Figure:
    """Mean relative step per layer, with one standard deviation over tokens."""
    figure, ax = _axes("relative step |delta| / |h|")
    x, mean, std = (layers[c].to_numpy() for c in ("L", "rel_step_mean", "rel_step_std"))
    style = dict(color=PALETTE[0], alpha=0.2, linewidth=0, label="±1 sd over tokens")
    ax.fill_between(x, np.maximum(mean - std, 0), mean + std, **style)
    ax.plot(x, mean, "o-", color=PALETTE[0], markersize=4, label="mean")
    if mean.max() > 10 * np.median(mean):  # a first block on small embeddings would flatten all the others
        _log_scale(ax)
        ax.set_ylim(bottom=mean[mean > 0].min() / 3)
    else:
        ax.set_ylim(bottom=0)
    return _finished(figure, ax, len(layers))


@styled
def eff_rank(layers: pl.DataFrame) -> Figure:
    """Effective rank of each layer's update, with the 95 % interval over passages where there is one."""
    figure, ax = _axes("effective rank (directions)")
    _with_interval(ax, layers["L"].to_numpy(), layers, "eff_rank", PALETTE[1], "effective rank")
    _log_scale(ax)
    return _finished(figure, ax, len(layers))


def _with_interval(ax: Axes, x: np.ndarray, table: pl.DataFrame, column: str, color: str, label: str) -> None:
    y, low, high = (table[c].cast(pl.Float64).to_numpy() for c in (column, f"{column}_low", f"{column}_high"))
    if np.isfinite(low).any():
        ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        label += "\n(95 % over passages)"
    ax.plot(x, y, "o-", color=color, markersize=4, label=label)


@styled
def top_spectrum(layers: pl.DataFrame) -> Figure:
    """Share of the update's energy in each of the top singular directions, per layer: `s_i^2 / |delta|_F^2`."""
    figure, ax = _axes("share of the energy")
    columns = [c for c in layers.columns if c[0] == "s" and c[1:].isdigit()]
    for i, column in enumerate(columns):
        share = (layers[column].cast(pl.Float64) ** 2 / layers["frob"].clip(lower_bound=1e-300) ** 2).to_numpy()
        shade = 0.1 + 0.65 * i / max(1, len(columns) - 1)
        ax.plot(layers["L"], share, "o-", color=str(shade), markersize=3, linewidth=1, label=f"s{i + 1}")
    _log_scale(ax)
    return _finished(figure, ax, len(layers), "singular value")


@styled
def parallel(layers: pl.DataFrame, d: int) -> Figure:
    """Part of the update along the stream itself: mean |cos(delta, h)| and mean cos, beside chance."""
    figure, ax = _axes("cosine of update and stream")
    ax.axhline(0, color="0.6", linewidth=0.8)
    chance = expected_cos(d)
    ax.axhline(chance, color="0.3", linestyle="--", linewidth=0.9, label=f"|cos| by chance ({chance:.3f})")
    ax.plot(layers["L"], layers["parallel_frac"], "o-", color=PALETTE[2], markersize=4, label="mean |cos(delta, h)|")
    ax.plot(layers["L"], layers["cos_delta_h_mean"], "s-", color=PALETTE[3], markersize=4, label="mean cos(delta, h)")
    return _finished(figure, ax, len(layers))


@styled
def cos_heatmap(cos: np.ndarray, d: int) -> Figure:
    """|cos| between the layers' top-1 directions; lines part the phases."""
    figure, ax = _axes("layer", COLUMN, 2.7)
    n_layers = len(cos)
    image = ax.imshow(np.abs(cos), vmin=0, vmax=1, cmap="viridis", origin="lower")
    for name, first, last in bands(n_layers):
        if first:
            ax.axhline(first - 0.5, color="white", linewidth=0.8)
            ax.axvline(first - 0.5, color="white", linewidth=0.8)
        ax.text((first + last) / 2, n_layers - 0.4, name, ha="center", va="bottom")
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=ax, label=f"|cos| of top-1 directions (chance {expected_cos(d):.3f})")
    return figure


@styled
def capture(captures: pl.DataFrame, phase_rows: pl.DataFrame, n_layers: int, d: int) -> Figure:
    """Share of each layer's top-1 direction in its phase's rank-8 space, itself in it and left out, and by chance."""
    figure, ax = _axes("share of top-1 direction in\nthe phase's rank-8 space")
    ax.axhline(min(RANK, d) / d, color=PALETTE[1], linestyle="--", linewidth=0.9, label="chance, left out (8/d)")
    label = "chance, itself included (simulated)"
    for row in phase_rows.iter_rows(named=True):
        if not np.isnan(row["chance_capture"]):
            first, last = (int(x) for x in row["layers"].split("-"))
            style = dict(color=PALETTE[0], linestyle="--", linewidth=0.9, label=label)
            ax.hlines(row["chance_capture"], first - 0.5, last + 0.5, **style)
            label = None
    ax.plot(captures["layer"], captures["capture"], "o", color=PALETTE[0], markersize=4, label="itself included")
    ax.plot(captures["layer"], captures["left_out"], "s", color=PALETTE[1], markersize=4, label="left out")
    ax.set_ylim(0, 1.02)
    return _finished(figure, ax, n_layers)


@styled
def comparison(table: pl.DataFrame) -> Figure:
    """rel_step and eff_rank of several models against relative depth, with the intervals of eff_rank."""
    figure = Figure(figsize=(TEXT, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, model in enumerate(table["model"].unique(maintain_order=True)):
        part, color = table.filter(pl.col("model") == model), PALETTE[i % len(PALETTE)]
        depth = part["depth"].to_numpy()
        left.plot(depth, part["rel_step_mean"], "o-", color=color, markersize=3, label=plain(model))
        _with_interval(right, depth, part, "eff_rank", color, plain(model))
    for ax, label in (left, "relative step |delta| / |h|"), (right, "effective rank (directions)"):
        _log_scale(ax)
        ax.set(xlabel="relative depth (layer / layers)", xlim=(0, 1), ylabel=label)
        ax.legend()
    return figure
