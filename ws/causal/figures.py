"""Figures of the causal check: excess, energy, where w acts, ceilings by rank, the designed cloud. (docs/method.md section
8)"""

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from ws.causal.retention import TIED
from ws.explanation.figures import CHANCE, family_styles, name_beside
from ws.show.figures import PALETTE, TEXT, beside, legend_below, plain, styled

MOST = 40  # candidates that a forest shows
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
NAMED = 8


@styled
def forest(table: pl.DataFrame, most: int = MOST) -> Figure:
    """Excess of so many candidates in nats, the highest first: 95 % interval over claims, filled where max-T over all is under
    .05; grey bar: the 95 % range of its own controls; hollow diamond: by forward passes. Grey names are in no ranking: controls,
    and what holds the score's own slope."""
    rows = (
        table[2:].filter(pl.col("excess").is_not_nan() & pl.col("excess").is_not_null()).sort("excess", descending=True)
    )
    shown = rows.head(most)
    figure = Figure(figsize=(TEXT, 1.1 + 0.16 * max(len(shown), 3)), layout="constrained")
    axis = figure.subplots()
    for y, row in enumerate(shown.iter_rows(named=True)):
        low, high = row["control_low"] - row["control"], row["control_high"] - row["control"]
        axis.plot([low, high], [y, y], color="0.85", lw=5, solid_capstyle="butt", zorder=1)
        sure = row["p_max"] is not None and row["p_max"] < 0.05
        axis.plot([row["excess_low"], row["excess_high"]], [y, y], color=PALETTE[0], zorder=2)
        axis.plot(row["excess"], y, "o", color=PALETTE[0], mfc=PALETTE[0] if sure else "white", ms=4.5, zorder=3)
        if np.isfinite(row["excess_forward"] if row["excess_forward"] is not None else np.nan):
            axis.plot(row["excess_forward"], y, "D", color=PALETTE[1], mfc="none", ms=3.5, zorder=4)
    axis.axvline(0, **CHANCE)
    out = [
        row["kind"] == "control" or (row["slope"] or 0) > TIED
        for row in shown.select("kind", "slope").iter_rows(named=True)
    ]
    axis.set_yticks(range(len(shown)), [plain(name) for name in shown["subspace"]])
    for label, unranked in zip(axis.get_yticklabels(), out, strict=True):
        label.set_color("0.5" if unranked else "black")
    axis.invert_yaxis()
    axis.set_xlabel("excess over controls of equal energy (nats); filled: max-T p < .05; diamond: by forward passes")
    more = f", the {most} highest of {len(rows)}" if len(rows) > most else ""
    more += "\n(grey names are in no ranking: controls, the score's own slope)" if any(out) else ""
    axis.set_title(f"Effect beyond what the captured energy explains{more}")
    axis.grid(True, axis="x", alpha=0.2)
    return figure


@styled
def energy_scatter(table: pl.DataFrame, whole: float) -> Figure:
    """Retention against captured input-weighted energy; the line from each point ends at the mean of its controls."""
    rows = table[2:].filter(pl.col("energy").is_not_nan() & pl.col("retention").is_not_nan())
    figure = Figure(figsize=(TEXT, 4.8), layout="constrained")
    axis = figure.subplots()
    styles = family_styles(sorted(set(rows["family"].drop_nulls())))
    for (family,), part in rows.group_by("family", maintain_order=True):
        axis.scatter(
            part["energy"], part["retention"], s=26, edgecolors="white", linewidths=0.4, zorder=3, **styles[family]
        )
    for row in rows.iter_rows(named=True):
        if row["control"] is not None and np.isfinite(row["control"]) and whole:
            axis.plot([row["energy"]] * 2, [row["retention"], row["control"] / whole], color="0.8", lw=0.8, zorder=1)
            axis.plot(row["energy"], row["control"] / whole, "_", color="0.4", ms=6, zorder=2)
    name_beside(axis, rows.sort("retention", descending=True).head(NAMED).select("subspace", "energy", "retention"))
    axis.set(
        xlabel="captured share of the writers' input-weighted energy",
        ylabel="retention: effect of P w over that of w's writers",
    )
    axis.set_title("Effect kept against energy kept (bar: controls of equal energy)")
    legend_below(figure, axis)
    axis.grid(True, alpha=0.2)
    return figure


@styled
def where_bars(where: pl.DataFrame) -> Figure:
    """Effect (with its 95 % interval) beside the share of `|w|^2`, by module role and by layer alone."""
    by = {row["part"]: row for row in where.iter_rows(named=True)}
    figure = Figure(figsize=(TEXT, 2.8), layout="constrained")
    groups = [["w", "writers", "readers", *(r for r in ROLES if r in by)], [n for n in by if n.startswith("layer")]]
    wide = [max(len(names), 4) for names in groups if names]
    axes = figure.subplots(1, len(wide), width_ratios=wide, squeeze=False)[0]
    whole = by["w"]["effect"]
    for axis, names, title in zip(axes, groups, ("by module", "each layer alone"), strict=False):
        names = [n for n in names if n in by]
        x = np.arange(len(names))
        e = np.array([by[n]["effect"] for n in names])
        err = e - np.array([by[n]["effect_low"] for n in names])
        axis.bar(x - 0.2, e, 0.4, yerr=err, color=PALETTE[0], label="effect (nats)", error_kw={"lw": 1})
        axis.bar(
            x + 0.2,
            [by[n]["share"] * whole for n in names],
            0.4,
            color="0.75",
            label="share of $|w|^2$, times w's effect",
        )
        axis.set_xticks(x, [n.removeprefix("layer ") for n in names], rotation=45 if len(names) > 9 else 0)
        axis.axhline(0, color="0.3", lw=0.8)
        axis.set_title(f"Where w acts, {title}")
    axes[0].set_ylabel("effect on held-out claims (nats)")
    legend_below(figure, axes[0])
    return figure


@styled
def rank_curves(ranks: pl.DataFrame) -> Figure:
    """Retention of the ceilings by rank: w's own directions, and those of another seed's weight difference."""
    figure = Figure(figsize=(TEXT, 2.9), layout="constrained")
    axis = figure.subplots()
    curves = [*ranks.group_by("of", "whose", maintain_order=True)]
    for i, ((of, whose), part) in enumerate(curves):
        axis.plot(
            beside(part["rank"], i, len(curves), log=True),
            part["retention"],
            "o-" if "own" in whose else "s--",
            color=PALETTE[i % len(PALETTE)],
            label=f"{of}, {whose}",
        )
    axis.set_xscale("log", base=2)
    ticks = sorted(set(ranks["rank"]))
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.set_xlim(ticks[0] / 1.6, ticks[-1] * 1.6)
    axis.axhline(1, **CHANCE)
    axis.set(xlabel="rank", ylabel="retention", title="What the ceilings keep of the writers' effect, by rank")
    legend_below(figure, axis, 2)
    axis.grid(True, alpha=0.2)
    return figure


@styled
def cloud_scatter(points: pl.DataFrame, beyond: pl.DataFrame) -> Figure:
    """First-order effect against what three overlap scores expect of it: the blind subspaces of the cloud, and the
    candidates."""
    X = points.select("energy_frobenius", "energy", "R_act").to_numpy()
    A = np.c_[np.ones(len(X)), X]
    fitted = A @ np.linalg.lstsq(A, points["linear"].to_numpy(), rcond=None)[0]
    figure = Figure(figsize=(TEXT, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.scatter(fitted, points["linear"], s=14, color="0.7", label="blind subspaces", zorder=2)
    axis.scatter(beyond["expected"], beyond["linear"], s=26, color=PALETTE[1], label="candidates", zorder=3)
    ends = [min(fitted.min(), beyond["expected"].min() or 0), max(fitted.max(), beyond["expected"].max() or 0)]
    axis.plot(ends, ends, zorder=1, **CHANCE)
    far = beyond.sort(pl.col("residual").abs(), descending=True).head(NAMED)
    name_beside(axis, far.select("subspace", "expected", "linear"))
    axis.set(xlabel="expected of energy, input-weighted energy and R_act (nats)", ylabel="first-order effect (nats)")
    axis.set_title("Do overlap scores say what a subspace does?")
    legend_below(figure, axis)
    axis.grid(True, alpha=0.2)
    return figure
