"""Figures of the stability report: forest plot, bump chart of ranks, oracle overlap by layer. One function each.

Each takes a table of `ws.stability` and returns the Figure; nothing is computed here beyond what is drawn.
(docs/method.md section 7, 'Outputs')
"""

import numpy as np
import polars as pl
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

AXIS_COLOURS = {"write": "#0b6e99", "mixed": "#c8641e", "read": "#5a7d2a", "ceiling": "#222222"}
OTHER = "#777777"
GRID = {"color": "#e4e4e4", "linewidth": 0.6, "zorder": 0}
HIGHLIGHTS = (
    "#0b6e99",
    "#c8641e",
    "#5a7d2a",
    "#8a3b8f",
    "#b3212c",
    "#2b2f77",
    "#947600",
    "#00796b",
    "#a04a78",
    "#4d4d4d",
)


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def _ratio(value: float, _position: int = 0) -> str:
    return f"{value:.3g}"


def _forest_panel(axes: Axes, rows: pl.DataFrame, score: str, seeds: pl.DataFrame, clip: float) -> None:
    """One score: seeds as ticks, bootstrap interval thick, t interval thin, geometric mean as a dot."""
    places = {name: len(rows) - 1 - i for i, name in enumerate(rows["candidate"])}
    drawn = rows.filter(pl.col(f"{score}_geomean").is_not_nan() & (pl.col(f"{score}_geomean") > 0))
    for name in set(rows["candidate"]) - set(drawn["candidate"]):
        axes.text(0.99, places[name], "undefined", transform=axes.get_yaxis_transform(), ha="right", va="center",
                  fontsize=6.5, color=OTHER, style="italic")  # fmt: skip
    if drawn.height == 0:
        return
    values = seeds.filter(pl.col(score).is_not_nan() & (pl.col(score) > 0))
    core = np.concatenate([values[score].to_numpy(), drawn[f"{score}_geomean"].to_numpy(), [1.0]])
    limits = core.min() / clip, core.max() * clip
    axes.set_xscale("log", base=2)
    axes.set_xlim(*limits)
    axes.axvline(1.0, color="#444444", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    for row in drawn.iter_rows(named=True):
        y, colour = places[row["candidate"]], AXIS_COLOURS.get(row["axis_kind"], OTHER)
        lo, hi = row[f"{score}_t_lo"], row[f"{score}_t_hi"]
        if lo == lo:
            axes.plot([max(lo, limits[0]), min(hi, limits[1])], [y, y], color=colour, linewidth=0.9, zorder=2)
            for end, marker, beyond in ((limits[0], "<", lo < limits[0]), (limits[1], ">", hi > limits[1])):
                if beyond:
                    axes.plot(end, y, marker=marker, color=colour, markersize=3.5, clip_on=False, zorder=3)
        low, high = row[f"{score}_boot_lo"], row[f"{score}_boot_hi"]
        axes.hlines(y, max(low, limits[0]), min(high, limits[1]), color=colour, linewidth=3.4, alpha=0.35, zorder=2)
        mark = "*" if row["kind"] == "ceiling" else "o"
        axes.plot(row[f"{score}_geomean"], y, marker=mark, color=colour, markersize=8 if mark == "*" else 4.5, zorder=4)
        null = row.get(f"{score}_null_diff", float("nan"))
        if null == null and limits[0] < null < limits[1]:
            axes.plot(
                null,
                y,
                marker="D",
                color="white",
                markeredgecolor=colour,
                markeredgewidth=0.7,
                markersize=3.2,
                zorder=3,
            )
    ys = [places[name] for name in values["candidate"]]
    axes.plot(values[score], ys, "|", color="#333333", markersize=4, markeredgewidth=0.6, zorder=5)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_ratio))
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def forest_plot(summary: pl.DataFrame, per_seed: pl.DataFrame, winner: str | None = None, clip: float = 1.5) -> Figure:
    """R_act and R_w of every candidate with both intervals, in the order of `summary`; dashed line at 1 (chance).

    Dot (star: ceiling): geometric mean over seeds; ticks: the seeds; thick band: crossed bootstrap; thin line: t over
    seeds, cut with an arrowhead where it leaves the panel, which spans the data times `clip`; hollow diamond: null
    diff.
    """
    count = summary.height
    figure = Figure(figsize=(10.5, 1.9 + 0.185 * count), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    S = int(summary["S"][0])
    for panel, score, title in zip(axes, ("R_act", "R_w"), ("R_act: activation", "R_w: weights"), strict=True):
        for y in range(0, count, 2):  # bands lead the eye from a name to its far interval
            panel.axhspan(count - 1 - y - 0.5, count - 1 - y + 0.5, color="#f5f5f5", zorder=0, linewidth=0)
        _forest_panel(panel, summary, score, per_seed, clip)
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel("concentration (1 = random subspace)", fontsize=8.5)
        panel.tick_params(axis="x", labelsize=8)
        _plain(panel)
    names = summary["candidate"].to_list()
    axes[0].set_yticks(range(count - 1, -1, -1), names, fontsize=7.5)
    for label in axes[0].get_yticklabels():
        row = summary.row(names.index(label.get_text()), named=True)
        label.set_color(AXIS_COLOURS.get(row["axis_kind"], OTHER))
        label.set_fontweight("bold" if label.get_text() == winner else "normal")
    axes[0].set_ylim(-0.6, count - 0.4)
    kinds = [kind for kind in AXIS_COLOURS if kind in set(summary["axis_kind"])]
    handles = [axes[0].plot([], [], "o", color=AXIS_COLOURS[kind], markersize=4.5)[0] for kind in kinds]
    handles += [
        axes[0].plot([], [], color="#555555", linewidth=3.4, alpha=0.35)[0],
        axes[0].plot([], [], color="#555555", linewidth=0.9)[0],
        axes[0].plot([], [], "|", color="#333333", markersize=5)[0],
        axes[0].plot([], [], "D", color="white", markeredgecolor="#555555", markersize=3.5)[0],
    ]
    labels = [*kinds, "95 % crossed bootstrap", f"95 % t over {S} seeds", "one seed", "null diff"]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    said = f"winner: {winner}" if winner else "no winner"
    figure.suptitle(f"Concentration over {S} seeds, sorted by joint score ({said})", fontsize=11, x=0.01, ha="left")
    return figure


def _spread(places: list[float], gap: float) -> list[float]:
    """Label heights near `places` (sorted downwards in rank) that keep at least `gap` between neighbours."""
    order = np.argsort(places, kind="stable")
    out = np.array(places, dtype=float)
    for before, after in zip(order[:-1], order[1:], strict=True):
        out[after] = max(out[after], out[before] + gap)
    return out.tolist()


def bump_chart(per_seed: pl.DataFrame, summary: pl.DataFrame, top: int = 10) -> Figure:
    """Rank by joint score on each seed, one line per A-hypothesis; the `top` of the summary in colour, all others named
    in grey.

    Rank 1 is at the top. Names stand at both ends, moved apart where ranks are shared.
    """
    ranked = per_seed.filter(pl.col("rank_in_seed").is_not_null())
    seeds = ranked["seed"].unique(maintain_order=True).to_list()
    everywhere = ranked.group_by("candidate").len().filter(pl.col("len") == len(seeds))["candidate"]
    order = [name for name in summary["candidate"] if name in set(everywhere)]
    count = max(len(order), 1)
    figure = Figure(figsize=(6.2 + 0.75 * len(seeds), 1.4 + 0.175 * count), layout="constrained")
    axes = figure.subplots()
    ranks = {
        name: dict(part.select("seed", "rank_in_seed").iter_rows()) for (name,), part in ranked.group_by("candidate")
    }
    x = np.arange(len(seeds))
    for place, name in reversed(list(enumerate(order))):
        shown = place < min(top, len(HIGHLIGHTS))
        colour = HIGHLIGHTS[place] if shown else "#c4c4c4"
        style = {"color": colour, "linewidth": 1.8 if shown else 0.8, "zorder": 3 if shown else 2}
        axes.plot(x, [ranks[name][k] for k in seeds], marker="o", markersize=4.5 if shown else 2.5, **style)
    for at, seed, side in ((0, seeds[0] if seeds else 0, "right"), (len(seeds) - 1, seeds[-1] if seeds else 0, "left")):
        heights = _spread([ranks[name][seed] for name in order], 0.95)
        for place, (name, y) in enumerate(zip(order, heights, strict=True)):
            shown = place < min(top, len(HIGHLIGHTS))
            place_text = {"xytext": (-7 if side == "right" else 7, 0), "textcoords": "offset points", "ha": side}
            colour = HIGHLIGHTS[place] if shown else "#6d6d6d"
            axes.annotate(name, (at, y), va="center", fontsize=7, color=colour, annotation_clip=False, **place_text)
    axes.set_xticks(x, [f"seed {k}" for k in seeds], fontsize=9)
    axes.set_xlim(-0.15, max(len(seeds) - 1, 0) + 0.15)
    axes.set_ylim(count + 0.8, 0.2)
    axes.set_yticks([])
    axes.grid(axis="x", **GRID)
    for side in ("left", "bottom", "top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(f"Rank by joint score on each seed ({len(order)} candidates, 1 at the top)", fontsize=10, loc="left")
    return figure


def oracle_overlap_figure(subspace: pl.DataFrame) -> Figure:
    """Overlap of the activation and weight oracles between seeds, by layer, with the band of unrelated subspaces.

    Line: mean over pairs of seeds; shade: smallest to largest pair; dotted: mean smallest principal cosine; grey dashes
    and band: chance `max(r) / d` +- 2 sd.
    """
    table = subspace.filter(pl.col("side") == "B")
    objects = table["object"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(4.6 * max(len(objects), 1) + 0.4, 3.7), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, max(len(objects), 1), sharey=True))
    for panel, name in zip(panels, objects, strict=False):
        rows = (
            table.filter((pl.col("object") == name) & pl.col("overlap").is_not_nan())
            .group_by("layer")
            .agg(
                pl.col("overlap").mean().alias("mean"),
                pl.col("overlap").min().alias("low"),
                pl.col("overlap").max().alias("high"),
                pl.col("smallest_cos").mean().alias("cos"),
                pl.col("chance").mean(),
                pl.col("chance_sd").mean(),
            )
            .sort("layer")
        )
        x = rows["layer"].to_numpy()
        chance, sd = rows["chance"].to_numpy(), rows["chance_sd"].to_numpy()
        panel.fill_between(x, np.clip(chance - 2 * sd, 0, 1), chance + 2 * sd, color="#bbbbbb", alpha=0.6, linewidth=0,
                           label="chance +- 2 sd")  # fmt: skip
        panel.plot(x, chance, color="#666666", linewidth=1, linestyle="--")
        panel.fill_between(
            x, rows["low"], rows["high"], color="#0b6e99", alpha=0.2, linewidth=0, label="range over seed pairs"
        )
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
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure
