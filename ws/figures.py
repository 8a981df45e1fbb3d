"""Figures of the sweep and of a weight diff: one function each, returning the Figure; `save` writes png and pdf whole.

Colours follow the Okabe-Ito palette, so that families stay apart in print and for colour-blind readers.
"""

from pathlib import Path

import matplotlib
import numpy as np
import polars as pl

matplotlib.use("Agg", force=False)
from matplotlib.figure import Figure  # noqa: E402

from ws.files import atomic_file  # noqa: E402

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B", "#BCBD22", "#17BECF"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
SETS = {"false": ("#D55E00", "o"), "negated": ("#0072B2", "s"), "true": ("#009E73", "^")}


def save(figure: Figure, stem: Path) -> list[Path]:
    """`stem.png` (150 dpi) and `stem.pdf`, without a creation date, so that the same data give the same bytes."""
    paths = []
    for suffix, meta in ((".png", {"Software": None}), (".pdf", {"CreationDate": None, "ModDate": None})):
        path = stem.with_name(stem.name + suffix)
        with atomic_file(path) as tmp:
            figure.savefig(tmp, format=suffix[1:], dpi=150, metadata=meta)
        paths.append(path)
    return paths


def family_styles(families: list[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker per family, in order of first appearance."""
    unique = list(dict.fromkeys(families))
    return {
        f: (PALETTE[i % len(PALETTE)], MARKERS[(i // len(PALETTE) + i) % len(MARKERS)]) for i, f in enumerate(unique)
    }


def _spread_labels(ys: list[float], low: float, high: float, gap: float) -> list[float]:
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
    out = np.empty_like(placed)
    out[order] = placed
    return out.tolist()


def joint_scatter(summary: pl.DataFrame, title: str = "") -> Figure:
    """Activation recovery against weight recovery, write and mixed candidates left, read ones right.

    summary: `ws.tables.summarise`. Log axes, dashed lines at 1 (chance), the ten best by joint score of each panel
    named, ceilings as black stars in both. A candidate with an undefined or non-positive score is not drawn and counted.
    """
    x, y = pl.col("mean_conc_act"), pl.col("mean_conc_w_combined")
    shown = summary.filter((x > 0) & (y > 0) & y.is_not_nan() & x.is_not_nan())
    ceilings = shown.filter(pl.col("kind") == "ceiling")
    rest = shown.filter(pl.col("kind") != "ceiling")
    styles = family_styles(sorted(rest["family"].to_list()))
    figure = Figure(figsize=(13.5, 6.4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    panels = (("write and mixed", ["write", "mixed"]), ("read", ["read"]))
    if len(shown):
        _limits(axes[0], shown)
    for axis, (name, kinds) in zip(axes, panels, strict=True):
        part = rest.filter(pl.col("axis_kind").is_in(kinds)).sort("joint_score", descending=True)
        for family in part["family"].unique(maintain_order=True):
            of = part.filter(pl.col("family") == family)
            colour, marker = styles[family]
            axis.scatter(of["mean_conc_act"], of["mean_conc_w_combined"], c=colour, marker=marker, s=42, label=family,
                         edgecolors="white", linewidths=0.5, zorder=3)  # fmt: skip
        axis.scatter(ceilings["mean_conc_act"], ceilings["mean_conc_w_combined"], c="black", marker="*", s=150,
                     label="ceiling", zorder=4)  # fmt: skip
        axis.axhline(1, ls="--", c="0.5", lw=1, zorder=1)
        axis.axvline(1, ls="--", c="0.5", lw=1, zorder=1)
        _name_points(axis, pl.concat([part.head(10), ceilings]))
        axis.set(xscale="log", yscale="log", title=f"{name} ({len(part)} candidates)")
        axis.set_xlabel("activation recovery R_act (1 = chance)")
        axis.legend(fontsize=7, loc="upper left", framealpha=0.9)
        axis.grid(True, which="major", alpha=0.2)
    axes[0].set_ylabel("weight recovery R_w, o_proj and down_proj (1 = chance)")
    hidden = len(summary) - len(shown)
    note = f"; {hidden} with an undefined score not drawn" if hidden else ""
    figure.suptitle((title or "What each subspace recovers, mean over the LoRA layers") + note)
    return figure


POINTS_SHARE = 0.66  # of the width of a panel; names stand in the rest


def _limits(axis, shown: pl.DataFrame) -> None:
    """Log limits that hold every point and the chance lines, with room for names on the right."""
    for column, setter, share in (
        ("mean_conc_act", axis.set_xlim, POINTS_SHARE),
        ("mean_conc_w_combined", axis.set_ylim, 0.96),
    ):
        low, high = min(float(shown[column].min()), 1.0) / 1.25, max(float(shown[column].max()), 1.0) * 1.1
        setter(low, low * (high / low) ** (1 / share))


def _name_points(axis, points: pl.DataFrame) -> None:
    """Names in a column right of all points, pushed apart vertically, with a thin line to the point."""
    if points.is_empty():
        return
    low, high = np.log(axis.get_ylim())
    ys = np.log(points["mean_conc_w_combined"].to_numpy())
    gap = (high - low) / 30
    placed = _spread_labels(ys.tolist(), low + gap, high - gap, gap)
    left, right = np.log(axis.get_xlim())
    column = float(np.exp(left + (POINTS_SHARE + 0.03) * (right - left)))
    for name, px, py, ly in zip(
        points["subspace"], points["mean_conc_act"], points["mean_conc_w_combined"], placed, strict=True
    ):
        line = {"arrowstyle": "-", "color": "0.75", "lw": 0.5, "shrinkA": 0, "shrinkB": 3}
        axis.annotate(name, (px, py), (column, float(np.exp(ly))), fontsize=7, va="center", zorder=2, arrowprops=line)


def recovery_by_layer(table: pl.DataFrame, names: list[str], layers: list[int]) -> Figure:
    """R_act and R_w (combined) of the named candidates by layer; LoRA layers shaded, chance dashed."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    columns = (("conc_act", "activation recovery R_act"), ("conc_w_combined", "weight recovery R_w"))
    for axis, (column, label) in zip(axes, columns, strict=True):
        for i, name in enumerate(names):
            part = table.filter(pl.col("subspace") == name).sort("layer")
            style = {"c": "black", "ls": ":"} if part["kind"][0] == "ceiling" else {"c": PALETTE[i % len(PALETTE)]}
            values = part[column].to_numpy().astype(float)
            values = np.where(values > 0, values, np.nan)
            axis.plot(part["layer"], values, marker=MARKERS[i % len(MARKERS)], ms=4, lw=1.3, label=name, **style)
        if layers:
            axis.axvspan(min(layers) - 0.5, max(layers) + 0.5, color="0.93", zorder=0)
        axis.axhline(1, ls="--", c="0.5", lw=1)
        axis.set(xlabel="layer (shaded: LoRA layers)", ylabel=f"{label} (1 = chance)", yscale="log")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def alpha_curves(sweep: pl.DataFrame) -> Figure:
    """Mean logratio (with sd over claims) and pmass against alpha, one line per claim set."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in sweep["set"].unique(maintain_order=True):
        part = sweep.filter(pl.col("set") == name).sort("alpha")
        colour, marker = SETS.get(name, ("0.4", "x"))
        n = part["n"][0]
        left.errorbar(part["alpha"], part["mean_logratio"], yerr=part["sd_logratio"], c=colour, marker=marker, ms=5,
                      capsize=2, lw=1.4, label=f"{name} claims (n = {n})")  # fmt: skip
        right.plot(part["alpha"], part["mean_pmass"], c=colour, marker=marker, ms=5, lw=1.4)
    left.axhline(0, ls="--", c="0.5", lw=1)
    left.set(xlabel="alpha", ylabel="log P(yes) - log P(no), nats (bars: sd over claims)")
    left.legend(fontsize=8)
    right.axhline(0.5, ls="--", c="0.5", lw=1)
    right.set(xlabel="alpha", ylabel="P(yes) + P(no)", ylim=(0, 1.03))
    return figure


def norm_map(norms: pl.DataFrame) -> Figure:
    """Heat map of |w|_F by layer and module. norms: columns layer, module, norm."""
    modules = norms["module"].unique(maintain_order=True).to_list()
    layers = norms["layer"].unique().sort().to_list()
    grid = np.full((len(modules), len(layers)), np.nan)
    for layer, module, norm in norms.select("layer", "module", "norm").rows():
        grid[modules.index(module), layers.index(layer)] = norm
    figure = Figure(figsize=(max(5.0, 0.5 * len(layers) + 2.5), 3.4), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid, aspect="auto", cmap="viridis")
    axis.set_yticks(range(len(modules)), modules)
    step = max(1, len(layers) // 16)
    axis.set_xticks(range(0, len(layers), step), layers[::step])
    axis.set(xlabel="layer", title="Frobenius norm of w by layer and module")
    figure.colorbar(image, ax=axis, label="|w|_F")
    return figure


def spectra(values: dict[str, list[np.ndarray]]) -> Figure:
    """Singular values of w, scaled to the largest of each matrix: median over layers and range, by module."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for i, (module, rows) in enumerate(values.items()):
        width = min(map(len, rows))
        scaled = np.stack([r[:width] / max(r[0], 1e-30) for r in rows])
        scaled = np.where(scaled > 1e-9, scaled, np.nan)
        index = np.arange(1, width + 1)
        axis.plot(index, np.nanmedian(scaled, axis=0), c=PALETTE[i % len(PALETTE)], lw=1.4, label=module)
        axis.fill_between(index, np.nanmin(scaled, axis=0), np.nanmax(scaled, axis=0), color=PALETTE[i % len(PALETTE)],
                          alpha=0.12, lw=0)  # fmt: skip
    axis.set(yscale="log", xlabel="index", ylabel="singular value / largest", title="Spectrum of w by module")
    axis.legend(fontsize=8, ncol=2)
    return figure
