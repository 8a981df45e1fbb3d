"""Figures of the sweep: activation against weight recovery, recovery by layer. (docs/method.md section 6)"""

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ws.show.figures import MARKERS, PALETTE, TEXT, legend_below, plain, plain_log_ticks, styled

ACT, W = "mean_conc_act", "mean_conc_w_combined"
NAMES = 24  # lines of names beside a panel
CHANCE = {"ls": "--", "c": "0.5", "lw": 1}


def family_styles(families: list[str]) -> dict[str, dict[str, str]]:
    """A colour and a marker per family, in order of first appearance."""
    n, m = len(PALETTE), len(MARKERS)
    unique = enumerate(dict.fromkeys(families))
    return {f: {"c": PALETTE[i % n], "marker": MARKERS[(i // n + i) % m], "label": plain(f)} for i, f in unique}


def spread_labels(ys: list[float], low: float, high: float, gap: float) -> list[float]:
    """Positions near `ys` (any order) that keep `gap` between neighbours and stay within low..high."""
    order = np.argsort(ys)
    placed = np.array(ys, dtype=float)[order]
    for _ in range(200):
        shift = np.diff(placed)
        close = np.where(shift < gap)[0]
        if len(close) == 0:
            break
        for i in close:
            push = (gap - (placed[i + 1] - placed[i])) / 2 + 1e-6
            placed[i] -= push
            placed[i + 1] += push
        placed = np.clip(placed, low, high)
    return placed[np.argsort(order)].tolist()


@styled
def joint_scatter(summary: pl.DataFrame, title: str = "") -> Figure:
    """Activation recovery against weight recovery, write and mixed candidates above, read ones below. summary:
    `ws.explanation.summary.summarise`. The ten best by joint score of each panel are named, ceilings are in both. A
    candidate with an undefined or non-positive score is not drawn and counted."""
    x, y = pl.col(ACT), pl.col(W)
    shown = summary.filter((x > 0) & (y > 0) & y.is_not_nan() & x.is_not_nan())
    ceilings = shown.filter(pl.col("kind") == "ceiling")
    rest = shown.filter(pl.col("kind") != "ceiling")
    styles = family_styles(sorted(rest["family"]))
    sides = [("write and mixed", ["write", "mixed"]), ("read", ["read"])]
    sides = [side for side in sides if rest["axis_kind"].is_in(side[1]).any()] or sides[:1]
    figure = Figure(figsize=(TEXT, 1.4 + 3.4 * len(sides)), layout="constrained")
    axes = figure.subplots(len(sides), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for column, setter in ((ACT, axes[0].set_xlim), (W, axes[0].set_ylim)):
        if len(shown):  # the limits hold every point and the chance lines
            setter(min(float(shown[column].min()), 1.0) / 1.25, max(float(shown[column].max()), 1.0) * 1.25)
    for axis, (name, kinds) in zip(axes, sides, strict=True):
        part = rest.filter(pl.col("axis_kind").is_in(kinds)).sort("joint_score", descending=True)
        for (family,), of in part.group_by("family", maintain_order=True):
            axis.scatter(of[ACT], of[W], s=26, edgecolors="white", linewidths=0.4, zorder=3, **styles[family])
        axis.scatter(ceilings[ACT], ceilings[W], c="black", marker="*", s=80, label="ceiling", zorder=4)
        axis.axhline(1, zorder=1, **CHANCE)
        axis.axvline(1, zorder=1, **CHANCE)
        axis.set(xscale="log", yscale="log", title=f"{name} ({len(part)} candidates)")
        plain_log_ticks(axis.xaxis)
        plain_log_ticks(axis.yaxis)
        name_beside(axis, pl.concat([part.head(10), ceilings]).select("subspace", ACT, W))
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("activation recovery R_act (1 = chance)")
        axis.set_ylabel("weight recovery R_w, o_proj and down_proj (1 = chance)")
        axis.grid(True, which="major", alpha=0.2)
    named = {label: drawn for axis in axes for drawn, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend([*named.values()], [*named], loc="outside lower center", ncols=4)
    hidden = len(summary) - len(shown)
    note = f"; {hidden} with an undefined score not drawn" if hidden else ""
    figure.suptitle((plain(title) or "What each subspace recovers, mean over the LoRA layers") + note)
    return figure


def name_beside(axis: Axes, points: pl.DataFrame, most: int = NAMES) -> None:
    """Names (first column) of points (x, y) in a column right of the panel, which has room for `most` of them, with a thin
    line to each."""
    if points.is_empty():
        return
    scale = (np.log, np.exp) if axis.get_yscale() == "log" else (np.asarray, np.asarray)
    low, high = scale[0](axis.get_ylim())
    placed = spread_labels(list(scale[0](points.to_series(2).to_numpy())), low, high, (high - low) / most)
    line = {"arrowstyle": "-", "color": "0.75", "lw": 0.5, "shrinkA": 0, "shrinkB": 3}
    where = {"xycoords": "data", "textcoords": axis.get_yaxis_transform(), "annotation_clip": False}
    for (name, x, y), at in zip(points.rows(), scale[1](placed), strict=True):
        axis.annotate(plain(name), (x, y), (1.02, at), va="center", zorder=2, arrowprops=line, **where)


@styled
def recovery_by_layer(table: pl.DataFrame, names: list[str], layers: list[int]) -> Figure:
    """R_act and R_w (combined) of the named candidates by layer; LoRA layers shaded, chance dashed."""
    figure = Figure(figsize=(TEXT, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    columns = (("conc_act", "activation recovery R_act"), ("conc_w_combined", "weight recovery R_w"))
    for axis, (column, label) in zip(axes, columns, strict=True):
        for i, name in enumerate(names):
            part = table.filter(pl.col("subspace") == name).sort("layer")
            style = {"c": "black", "ls": ":"} if part["kind"][0] == "ceiling" else {"c": PALETTE[i % len(PALETTE)]}
            values = np.where(part[column] > 0, part[column], np.nan)
            axis.plot(part["layer"], values, marker=MARKERS[i % len(MARKERS)], ms=3, label=plain(name), **style)
        if layers:
            axis.axvspan(min(layers) - 0.5, max(layers) + 0.5, color="0.93", zorder=0)
        axis.axhline(1, **CHANCE)
        axis.set(xlabel="layer (shaded: LoRA layers)", ylabel=f"{label} (1 = chance)", yscale="log")
        plain_log_ticks(axis.yaxis)
        axis.xaxis.get_major_locator().set_params(integer=True)
    legend_below(figure, axes[0], 3)
    return figure
