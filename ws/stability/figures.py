"""Figures of the stability report: forest plot, bump chart of ranks, oracle overlap by layer. (section 7, 'Outputs')"""

import numpy as np
import polars as pl
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ws.show.figures import plain

AXIS_COLOURS = {"write": "#0b6e99", "mixed": "#c8641e", "read": "#5a7d2a", "ceiling": "#222222"}
OTHER = "#777777"
GRID = {"color": "#e4e4e4", "linewidth": 0.6, "zorder": 0}
HIGHLIGHTS = "#0b6e99 #c8641e #5a7d2a #8a3b8f #b3212c #2b2f77 #947600 #00796b #a04a78 #4d4d4d".split()
CLIP = 1.5  # a panel of the forest plot spans the data times this
BAND = {"linewidth": 3.4, "alpha": 0.35}  # crossed bootstrap
DIAMOND = {"marker": "D", "color": "white", "linestyle": ""}  # null diff


def _plain(axes: Axes, *hidden: str) -> None:
    for side in ("top", "right", *hidden):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def _legend_below(figure: Figure, handles: list, labels: list[str]) -> None:
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)


def _forest_panel(axes: Axes, rows: pl.DataFrame, score: str, seeds: pl.DataFrame) -> None:
    """One score: seeds as ticks, bootstrap interval thick, t interval thin, geometric mean as a dot."""
    places = {name: len(rows) - 1 - i for i, name in enumerate(rows["candidate"])}
    defined = pl.col(f"{score}_geomean").is_not_nan() & (pl.col(f"{score}_geomean") > 0)
    for name in rows.filter(~defined)["candidate"]:
        axes.text(0.99, places[name], "undefined", transform=axes.get_yaxis_transform(), ha="right", va="center",
                  fontsize=6.5, color=OTHER, style="italic")  # fmt: skip
    drawn = rows.filter(defined)
    if drawn.height == 0:
        return
    values = seeds.filter(pl.col(score).is_not_nan() & (pl.col(score) > 0))
    core = np.concatenate([values[score].to_numpy(), drawn[f"{score}_geomean"].to_numpy(), [1.0]])
    left, right = core.min() / CLIP, core.max() * CLIP
    axes.set_xscale("log", base=2)
    axes.set_xlim(left, right)
    axes.axvline(1.0, color="#444444", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    for row in drawn.iter_rows(named=True):
        y, colour = places[row["candidate"]], AXIS_COLOURS.get(row["axis_kind"], OTHER)
        lo, hi = row[f"{score}_t_lo"], row[f"{score}_t_hi"]
        if lo == lo:
            axes.plot([max(lo, left), min(hi, right)], [y, y], color=colour, linewidth=0.9, zorder=2)
            for end, marker, beyond in ((left, "<", lo < left), (right, ">", hi > right)):
                if beyond:
                    axes.plot(end, y, marker=marker, color=colour, markersize=3.5, clip_on=False, zorder=3)
        low, high = max(row[f"{score}_boot_lo"], left), min(row[f"{score}_boot_hi"], right)
        axes.hlines(y, low, high, color=colour, zorder=2, **BAND)
        mark, size = ("*", 8) if row["kind"] == "ceiling" else ("o", 4.5)
        axes.plot(row[f"{score}_geomean"], y, marker=mark, color=colour, markersize=size, zorder=4)
        null = row.get(f"{score}_null_diff", float("nan"))
        if left < null < right:
            axes.plot(null, y, markeredgecolor=colour, markeredgewidth=0.7, markersize=3.2, zorder=3, **DIAMOND)
    ys = [places[name] for name in values["candidate"]]
    axes.plot(values[score], ys, "|", color="#333333", markersize=4, markeredgewidth=0.6, zorder=5)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def forest_plot(
    summary: pl.DataFrame, per_seed: pl.DataFrame, winner: str | None = None, most: int | None = None
) -> Figure:
    """R_act and R_w of every candidate with both intervals, in the order of `summary` (most: the first so many that are no
    controls); dashed line at 1 (chance). Dot
    (star: ceiling): geometric mean over seeds; ticks: the seeds; thick band: crossed bootstrap; thin line: t over
    seeds, cut with an arrowhead where it leaves the panel; hollow diamond: geometric mean over null diffs."""
    whole, S = summary.height, summary["S"][0]
    if most is not None:
        summary = summary.filter(pl.col("kind") != "control").head(most)
        per_seed = per_seed.filter(pl.col("candidate").is_in(summary["candidate"].to_list()))
    count = summary.height
    figure = Figure(figsize=(10.5, 1.9 + 0.185 * count), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for panel, score, title in zip(axes, ("R_act", "R_w"), ("R_act: activation", "R_w: weights"), strict=True):
        for y in range(count - 1, -1, -2):  # bands lead the eye from a name to its far interval
            panel.axhspan(y - 0.5, y + 0.5, color="#f5f5f5", zorder=0, linewidth=0)
        _forest_panel(panel, summary, score, per_seed)
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel("concentration (1 = random subspace)", fontsize=8.5)
        panel.tick_params(axis="x", labelsize=8)
        _plain(panel)
    first = axes[0]
    first.set_yticks(range(count - 1, -1, -1), list(map(plain, summary["candidate"])), fontsize=7.5)
    for label, name, axis_kind in zip(first.get_yticklabels(), *summary["candidate", "axis_kind"], strict=True):
        label.set_color(AXIS_COLOURS.get(axis_kind, OTHER))
        label.set_fontweight("bold" if name == winner else "normal")
    first.set_ylim(-0.6, count - 0.4)
    kinds = [kind for kind in AXIS_COLOURS if kind in set(summary["axis_kind"])]
    styles = {kind: {"color": AXIS_COLOURS[kind], "marker": "o", "markersize": 4.5, "linestyle": ""} for kind in kinds}
    styles |= {
        "95 % crossed bootstrap": {"color": "#555555", **BAND},
        f"95 % t over {S} seeds": {"color": "#555555", "linewidth": 0.9},
        "one seed": {"color": "#333333", "marker": "|", "markersize": 5, "linestyle": ""},
        "null diffs, mean": {"markeredgecolor": "#555555", "markersize": 3.5, **DIAMOND},
    }
    _legend_below(figure, [first.plot([], [], **style)[0] for style in styles.values()], list(styles))
    said = f"winner: {plain(winner)}" if winner else "no winner"
    said += f"; the first {count} of {whole}" if count < whole else ""
    figure.suptitle(
        f"Concentration over {S} seeds, sorted by the rank-honest joint score ({said})", fontsize=11, x=0.01, ha="left"
    )
    return figure


def _spread(places: list[float], gap: float) -> list[float]:
    """Label heights near `places` (sorted downwards in rank) that keep at least `gap` between neighbours."""
    order = np.argsort(places, kind="stable")
    out = np.array(places, dtype=float)
    for before, after in zip(order[:-1], order[1:], strict=True):
        out[after] = max(out[after], out[before] + gap)
    return out.tolist()


def bump_chart(per_seed: pl.DataFrame, summary: pl.DataFrame, top: int = 10) -> Figure:
    """Rank by the rank-honest joint score on each seed, one line per A-hypothesis; the `top` of the summary in colour, others
    grey. Names stand at both ends, moved apart where ranks are shared."""
    ranked = per_seed.filter(pl.col("rank_in_seed").is_not_null())
    seeds = ranked["seed"].unique(maintain_order=True).to_list()
    of = {name: ranked.filter(pl.col("candidate") == name)["rank_in_seed"].to_list() for name in summary["candidate"]}
    ranks = {name: places for name, places in of.items() if len(places) == len(seeds) > 0}
    count = max(len(ranks), 1)
    figure = Figure(figsize=(6.2 + 0.75 * len(seeds), 1.4 + 0.175 * count), layout="constrained")
    axes = figure.subplots()
    coloured = HIGHLIGHTS[:top]
    x, last = np.arange(len(seeds)), max(len(seeds) - 1, 0)
    for place, places in reversed(list(enumerate(ranks.values()))):
        style = {"color": "#c4c4c4", "linewidth": 0.8, "markersize": 2.5, "zorder": 2}
        if place < len(coloured):
            style = {"color": coloured[place], "linewidth": 1.8, "markersize": 4.5, "zorder": 3}
        axes.plot(x, places, marker="o", **style)
    for at, shift, side in ((0, -7, "right"), (last, 7, "left")):
        heights = _spread([places[at] for places in ranks.values()], 0.95)
        for place, (name, y) in enumerate(zip(ranks, heights, strict=True)):
            colour = coloured[place] if place < len(coloured) else "#6d6d6d"
            style = {"color": colour, "fontsize": 7, "ha": side, "va": "center", "annotation_clip": False}
            axes.annotate(plain(name), (at, y), (shift, 0), textcoords="offset points", **style)
    axes.set_xticks(x, [f"seed {k}" for k in seeds], fontsize=9)
    axes.set_xlim(-0.15, last + 0.15)
    axes.set_ylim(count + 0.8, 0.2)
    axes.set_yticks([])
    axes.grid(axis="x", **GRID)
    _plain(axes, "left", "bottom")
    axes.set_title(
        f"Rank by the rank-honest joint score on each seed ({len(ranks)} candidates, 1 at the top)",
        fontsize=10,
        loc="left",
    )
    return figure


def oracle_overlap_figure(subspace: pl.DataFrame) -> Figure:
    """Overlap of the activation and weight oracles between seeds, by layer, with the band of unrelated subspaces. Line:
    mean over pairs of seeds; shade: smallest to largest pair; dotted: mean smallest principal cosine; grey dashes and
    band: chance `max(r) / d` +- 2 sd."""
    table = subspace.filter(pl.col("side") == "B")
    objects = table["object"].unique(maintain_order=True).to_list()
    count = max(len(objects), 1)
    figure = Figure(figsize=(4.6 * count + 0.4, 3.7), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    value = pl.col("overlap")
    columns = {"mean": value.mean(), "low": value.min(), "high": value.max(), "cos": pl.col("smallest_cos").mean()}
    for panel, name in zip(panels, objects, strict=False):
        part = table.filter((pl.col("object") == name) & value.is_not_nan())
        rows = part.group_by("layer").agg(pl.col("chance", "chance_sd").mean(), **columns).sort("layer")
        x, chance, spread = rows["layer"].to_numpy(), rows["chance"].to_numpy(), 2 * rows["chance_sd"].to_numpy()
        grey = {"color": "#bbbbbb", "alpha": 0.6, "linewidth": 0, "label": "chance +- 2 sd"}
        panel.fill_between(x, np.clip(chance - spread, 0, 1), chance + spread, **grey)
        panel.plot(x, chance, color="#666666", linewidth=1, linestyle="--")
        blue = {"color": "#0b6e99", "alpha": 0.2, "linewidth": 0, "label": "range over seed pairs"}
        panel.fill_between(x, rows["low"], rows["high"], **blue)
        panel.plot(x, rows["mean"], color="#0b6e99", marker="o", markersize=4, linewidth=1.6, label="mean overlap")
        panel.plot(x, rows["cos"], color="#c8641e", linestyle=":", linewidth=1.4, label="smallest principal cosine")
        panel.set_title(name, fontsize=10, loc="left")
        panel.set_xlabel("layer", fontsize=9)
        panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        panel.grid(axis="y", **GRID)
        panel.tick_params(labelsize=8)
        _plain(panel)
    panels[0].set_ylim(0, 1.03)
    panels[0].set_ylabel("overlap between seeds", fontsize=9)
    _legend_below(figure, *panels[0].get_legend_handles_labels())
    return figure
