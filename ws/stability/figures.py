"""Figures of the stability report: forest plot, bump chart of ranks, oracle overlap by layer. (section 7, 'Outputs')"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ws.show.figures import TEXT, legend_below, plain, styled

AXIS_COLOURS = {"write": "#0b6e99", "mixed": "#c8641e", "read": "#5a7d2a", "ceiling": "#222222"}
OTHER = "#777777"
GRID = {"color": "#e4e4e4", "linewidth": 0.6, "zorder": 0}
HIGHLIGHTS = "#8a3b8f #b3212c #2b2f77 #947600 #00796b #d0589a #4d4d4d #00a3b4 #a67c52".split()  # none of the above
CLIP = 1.5  # a panel of the forest plot spans the data times this
BAND = {"linewidth": 2.6, "alpha": 0.35}  # crossed bootstrap
DIAMOND = {"marker": "D", "color": "white", "linestyle": ""}  # null diff
OLDER = {"markerfacecolor": "white", "markeredgewidth": 0.8}  # the v7 form of a candidate that v7b mends
TWIN, LABEL = 0.19, 1.1  # of a line, from its middle to either form; ranks between two names


def _plain(axes: Axes, *hidden: str) -> None:
    for side in ("top", "right", *hidden):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def lines_of(names: Sequence[str], families: Mapping[str, str], twins: Mapping[str, str]) -> dict[str, list[list[str]]]:
    """Candidates as lines of a figure: family -> lines, each `[name]` or `[v7b form, v7 form]`, in the order of `names`: a
    family stands where its first line does, a line where the first of its forms does. families: candidate -> family, ""
    for what is in none; twins: v7 form -> v7b form."""
    mended, found, seen = {new: old for old, new in twins.items()}, {}, set()
    for name in names:
        if name in seen:
            continue
        pair = [twins.get(name, name), name if name in twins else mended.get(name, name)]
        line = pair if pair[0] != pair[1] and set(pair) <= set(names) else [name]
        seen.update(line)
        found.setdefault(families.get(name, ""), []).append(line)
    return found


def _forest_panel(
    axes: Axes, rows: pl.DataFrame, score: str, seeds: pl.DataFrame, places: dict[str, float], older: set[str]
) -> None:
    """One score: seeds as ticks, bootstrap interval thick, t interval thin, geometric mean as a dot. places: heights;
    older: of these a hollow dot and the t interval alone."""
    defined = pl.col(f"{score}_geomean").is_not_nan() & (pl.col(f"{score}_geomean") > 0)
    for name in rows.filter(~defined)["candidate"]:
        axes.text(0.99, places[name], "undefined", transform=axes.get_yaxis_transform(), ha="right", va="center",
                  color=OTHER, style="italic")  # fmt: skip
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
        y, colour, mended = (
            places[row["candidate"]],
            AXIS_COLOURS.get(row["axis_kind"], OTHER),
            row["candidate"] not in older,
        )
        lo, hi = row[f"{score}_t_lo"], row[f"{score}_t_hi"]
        if lo == lo:
            axes.plot([max(lo, left), min(hi, right)], [y, y], color=colour, linewidth=0.8, zorder=2)
            for end, marker, beyond in ((left, "<", lo < left), (right, ">", hi > right)):
                if beyond:
                    axes.plot(end, y, marker=marker, color=colour, markersize=2.5, clip_on=False, zorder=3)
        if mended:
            low, high = max(row[f"{score}_boot_lo"], left), min(row[f"{score}_boot_hi"], right)
            axes.hlines(y, low, high, color=colour, zorder=2, **BAND)
        mark, size = ("*", 6) if row["kind"] == "ceiling" else ("o", 3.5)
        style = {} if mended else OLDER
        axes.plot(row[f"{score}_geomean"], y, marker=mark, color=colour, markersize=size, zorder=4, **style)
        null = row.get(f"{score}_null_diff", float("nan"))
        if mended and left < null < right:
            axes.plot(null, y, markeredgecolor=colour, markeredgewidth=0.7, markersize=2.6, zorder=3, **DIAMOND)
    ticks = values.filter(~pl.col("candidate").is_in(older))
    ys = [places[name] for name in ticks["candidate"]]
    axes.plot(ticks[score], ys, "|", color="#333333", markersize=3, markeredgewidth=0.6, zorder=5)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())


@styled
def forest_plot(
    summary: pl.DataFrame,
    per_seed: pl.DataFrame,
    winner: str | None = None,
    most: int | None = None,
    families: Mapping[str, str] | None = None,
    twins: Mapping[str, str] | None = None,
) -> Figure:
    """R_act and R_w of every candidate with both intervals; dashed line at 1 (chance). Families stand together, named on the
    right, the one with the first candidate of `summary` at the top; of a v7b form and the v7 form it mends (twins: v7 ->
    v7b) one line, the latter hollow and with its t interval alone. most: the first so many lines that are no controls. Dot
    (star: ceiling): geometric mean over seeds; ticks: the seeds; thick band: crossed bootstrap; thin line: t over
    seeds, cut with an arrowhead where it leaves the panel; hollow diamond: geometric mean over null diffs."""
    families, S = families or {}, summary["S"][0]
    names = (
        summary["candidate"].to_list()
        if most is None
        else summary.filter(pl.col("kind") != "control")["candidate"].to_list()
    )
    flat = [line for lines in lines_of(names, {}, twins or {}).values() for line in lines][:most]
    whole = sum(map(len, lines_of(names, {}, twins or {}).values()))
    shown = [name for line in flat for name in line]
    groups = lines_of([name for name in names if name in shown], families, twins or {})
    lines = [line for group in groups.values() for line in group]
    summary, per_seed = (table.filter(pl.col("candidate").is_in(shown)) for table in (summary, per_seed))
    count, axis_kind = len(lines), dict(summary.select("candidate", "axis_kind").rows())
    places = {name: count - 1 - i + shift for i, line in enumerate(lines)
              for name, shift in zip(line, (-TWIN, TWIN) if len(line) > 1 else (0.0,), strict=True)}  # fmt: skip
    older = {line[1] for line in lines if len(line) > 1}
    figure = Figure(figsize=(TEXT, 1.5 + 0.165 * count), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    ends = np.cumsum([len(group) for group in groups.values()])
    for panel, score, title in zip(axes, ("R_act", "R_w"), ("R_act: activation", "R_w: weights"), strict=True):
        for i in range(0, len(ends), 2):  # bands hold families together
            first = ends[i - 1] if i else 0
            panel.axhspan(count - ends[i] - 0.5, count - first - 0.5, color="#f3f3f3", zorder=0, linewidth=0)
        _forest_panel(panel, summary, score, per_seed, places, older)
        panel.set_title(title, loc="left")
        panel.set_xlabel("1 = random subspace")
        _plain(panel)
    first, last = axes
    label = {line[0]: winner if winner in line else line[0] for line in lines}
    first.set_yticks(range(count - 1, -1, -1), [plain(label[line[0]]) + " ○" * (len(line) > 1) for line in lines])
    for text, line in zip(first.get_yticklabels(), lines, strict=True):
        text.set_color(AXIS_COLOURS.get(axis_kind[line[0]], OTHER))
        text.set_fontweight("bold" if winner in line else "normal")
    for family, end, group in zip(groups, ends, groups.values(), strict=True):
        where = {"transform": last.get_yaxis_transform(), "va": "center", "color": OTHER}
        last.text(1.02, count - end + (len(group) - 1) / 2, plain(family), **where)
    first.set_ylim(-0.6, count - 0.4)
    kinds = [kind for kind in AXIS_COLOURS if kind in set(summary["axis_kind"])]
    styles = {kind: {"color": AXIS_COLOURS[kind], "marker": "o", "markersize": 3.5, "linestyle": ""} for kind in kinds}
    styles |= {
        "95 % crossed bootstrap": {"color": "#555555", **BAND},
        f"95 % t over {S} seeds": {"color": "#555555", "linewidth": 0.8},
        "one seed": {"color": "#333333", "marker": "|", "markersize": 4, "linestyle": ""},
        "null diffs, mean": {"markeredgecolor": "#555555", "markersize": 3, **DIAMOND},
    }
    if older:
        styles["its v7 form"] = {"color": "#555555", "marker": "o", "markersize": 3.5, "linestyle": "", **OLDER}
    handles = [first.plot([], [], **style)[0] for style in styles.values()]
    figure.legend(handles, list(styles), loc="outside lower center", ncols=4)
    said = f"winner: {plain(winner)}" if winner else "no winner"
    said += f"; the first {count} of {whole} lines" if count < whole else ""
    figure.suptitle(
        f"Concentration over {S} seeds, families by their best member's rank-honest joint score\n({said})",
        x=0.01,
        ha="left",
    )
    return figure


def _spread(places: list[float], gap: float) -> list[float]:
    """Label heights near `places` (sorted downwards in rank) that keep at least `gap` between neighbours."""
    order = np.argsort(places, kind="stable")
    out = np.array(places, dtype=float)
    for before, after in zip(order[:-1], order[1:], strict=True):
        out[after] = max(out[after], out[before] + gap)
    return out.tolist()


@styled
def bump_chart(
    per_seed: pl.DataFrame,
    summary: pl.DataFrame,
    top: int = 10,
    families: Mapping[str, str] | None = None,
    twins: Mapping[str, str] | None = None,
) -> Figure:
    """Rank by the rank-honest joint score on each seed, one line per A-hypothesis. A v7b form and the v7 form it mends (twins:
    v7 -> v7b) are one line, which ranks as the better of them does, hollow where that is the v7 form. The first `top` of the
    summary have their names at both ends and a colour per family, all others are grey and have none."""
    ranked, families = per_seed.filter(pl.col("rank_in_seed").is_not_null()), families or {}
    seeds = ranked["seed"].unique(maintain_order=True).to_list()
    of = {name: ranked.filter(pl.col("candidate") == name)["rank_in_seed"].to_list() for name in summary["candidate"]}
    whole = {name: places for name, places in of.items() if len(places) == len(seeds) > 0}
    lines = [line for group in lines_of([*whole], {}, twins or {}).values() for line in group]
    best = np.array([np.min([whole[name] for name in line], axis=0) for line in lines]).reshape(len(lines), len(seeds))
    ranks, count = stats.rankdata(best, axis=0) if len(lines) else best, max(len(lines), 1)
    of_line = [families.get(line[0], line[0]) for line in lines]
    colours = dict(zip(dict.fromkeys(of_line[:top]), itertools.cycle(HIGHLIGHTS), strict=False))
    figure = Figure(figsize=(TEXT, 1.2 + 0.12 * max(count, top)), layout="constrained")
    axes = figure.subplots()
    x, last, named = np.arange(len(seeds)), max(len(seeds) - 1, 0), min(top, len(lines))
    for i in reversed(range(len(lines))):
        leads = i < named
        style = {"color": colours[of_line[i]] if leads else "#c9c9c9", "zorder": 3 if leads else 2}
        axes.plot(x, ranks[i], linewidth=1.5 if leads else 0.7, **style)
        older = best[i] < whole[lines[i][0]]  # where the v7 form ranks higher
        for some, face in ((~older, style["color"]), (older, "white")):
            axes.plot(x[some], ranks[i][some], "o", markersize=4 if leads else 2.2, markerfacecolor=face, **style)
    for at, shift, side in ((0, -0.02, "right"), (last, 1.02, "left")):
        heights = _spread([ranks[i][at] for i in range(named)], LABEL)
        for i, y in enumerate(heights):
            style = {"color": colours[of_line[i]], "ha": side, "va": "center", "annotation_clip": False}
            style["arrowprops"] = {
                "arrowstyle": "-",
                "color": colours[of_line[i]],
                "lw": 0.5,
                "shrinkA": 0,
                "shrinkB": 3,
            }
            text = plain(lines[i][0]) + " ○" * (len(lines[i]) > 1)
            axes.annotate(text, (at, ranks[i][at]), (shift, y), textcoords=axes.get_yaxis_transform(), **style)
    axes.set_xticks(x, [f"seed {k}" for k in seeds])
    axes.set_xlim(-0.15, last + 0.15)
    axes.set_ylim(count + 0.8, 0.2)
    axes.set_yticks([])
    axes.grid(axis="x", **GRID)
    _plain(axes, "left", "bottom")
    more = f", {count - named} without a name" if count > named else ""
    forms = "; ○: both forms, hollow where v7's is ahead" if any(len(line) > 1 for line in lines) else ""
    axes.set_title(
        f"Rank by the rank-honest joint score on each seed, 1 at the top\n({len(lines)} lines{more}{forms})", loc="left"
    )
    return figure


@styled
def oracle_overlap_figure(subspace: pl.DataFrame) -> Figure:
    """Overlap of the activation and weight oracles between seeds, by layer, with the band of unrelated subspaces. Line:
    mean over pairs of seeds; shade: smallest to largest pair; dotted: mean smallest principal cosine; grey dashes and
    band: chance `max(r) / d` +- 2 sd."""
    table = subspace.filter(pl.col("side") == "B")
    objects = table["object"].unique(maintain_order=True).to_list()
    count = max(len(objects), 1)
    figure = Figure(figsize=(TEXT, 2.7), layout="constrained")
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
        panel.plot(x, rows["mean"], color="#0b6e99", marker="o", markersize=3, label="mean overlap")
        panel.plot(x, rows["cos"], color="#c8641e", linestyle=":", label="smallest principal cosine")
        panel.set_title(name, loc="left")
        panel.set_xlabel("layer")
        panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        panel.grid(axis="y", **GRID)
        _plain(panel)
    panels[0].set_ylim(0, 1.03)
    panels[0].set_ylabel("overlap between seeds")
    legend_below(figure, panels[0])
    return figure
