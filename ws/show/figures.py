"""What all figures share: the widths and the type of a two-column page, the Okabe-Ito palette (families stay apart in print
and for colour-blind readers), files.

One function per figure, which takes tables and returns the Figure.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import matplotlib
import numpy as np
import polars as pl
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PathCollection
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Transform

matplotlib.use("Agg", force=False)
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.layout_engine import PlaceHolderLayoutEngine  # noqa: E402

from ws.cache.files import atomic_file  # noqa: E402

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B", "#BCBD22", "#17BECF"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
COLUMN, TEXT = 3.25, 6.75  # inches: a column of two, and both; a figure is put into a paper as it is, not scaled
TYPE = 7.0  # points, of the smallest text
STYLE = {
    "font.size": TYPE, "axes.titlesize": 8, "axes.labelsize": 7.5, "xtick.labelsize": TYPE, "ytick.labelsize": TYPE,
    "legend.fontsize": TYPE, "legend.title_fontsize": TYPE, "figure.titlesize": 8.5, "axes.linewidth": 0.6,
    "lines.linewidth": 1.2, "lines.markersize": 4, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "legend.frameon": False, "legend.handlelength": 1.6,
}  # fmt: skip


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """A figure's function in the style of all; what a caller's own matplotlib is set to stays as it is."""

    @wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
        for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
            if "labelsize" not in axis.get_tick_params():  # ticks are made when they are drawn, out of this style
                axis.set_tick_params(labelsize=TYPE)
        return figure

    return drawn


def beside(x: pl.Series, i: int, n: int, log: bool = False) -> Float[np.ndarray, " k"]:
    """Places along x for the i-th of n series, a little apart, so that none hides another of the same values."""
    u = x.to_numpy().astype(float)
    u = np.log(u) if log else u
    u = u + 0.025 * (i - (n - 1) / 2) * (np.ptp(u) or 3.0)
    return np.exp(u) if log else u


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """One legend for all panels, under them, of what `axes` names."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


FORMATS = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "ModDate": None},
    "svg": {"Date": None, "Creator": None},
}  # and what is left out of each, so that the same data give the same bytes
DPI = 150
EMBEDDED = {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "ws"}  # TrueType, which venues take; outlines


@contextmanager
def laid_out(figure: Figure) -> Iterator[None]:
    """What is drawn within has one layout, that of DPI, instead of one for each file."""
    engine, dpi = figure.get_layout_engine(), figure.dpi
    if engine is None or isinstance(engine, PlaceHolderLayoutEngine):
        yield
        return
    figure.dpi = DPI
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    try:
        yield
    finally:
        figure.dpi = dpi
        figure.set_layout_engine(engine)


def save(figure: Figure, stem: Path) -> list[Path]:
    """`stem.png` (150 dpi), `stem.pdf` with embedded TrueType fonts and `stem.svg` with outlines, the same bytes for the same
    data."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in FORMATS]
    with laid_out(figure), matplotlib.rc_context(EMBEDDED):
        for path, (kind, left_out) in zip(paths, FORMATS.items(), strict=True):
            with atomic_file(path) as tmp:
                figure.savefig(tmp, format=kind, dpi=DPI, metadata=left_out)
    return paths


def described(figure: Figure) -> str:
    """What a figure shows, in words and numbers taken from what is drawn: its own label (`figure.set_label`) first, then each
    panel's title, axes with their units, and every named series with its range. The alternative text of a report."""
    parts = [figure.get_label(), figure.get_suptitle()]
    for ax in (ax for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>"):
        title = " ".join(filter(None, (ax.get_title(), ax.get_title("left"), ax.get_title("right"))))
        across, up = ax.get_xlabel(), ax.get_ylabel()
        about = f"{up or 'values'} against {across}" if across and up else across or up
        series = [f"{name} {_span(values)}".strip() for name, values in _series(ax)]
        more = f" and {len(series) - SERIES} more" if len(series) > SERIES else ""
        parts.append(
            ": ".join(filter(None, (title, about))) + (f" ({'; '.join(series[:SERIES])}{more})" if series else "")
        )
    return " ".join(
        re.sub(r"(?<!\\)\$", "", " ".join(part.split())).replace(r"\$", "$").rstrip(".") + "."
        for part in parts
        if part.strip()
    )


SERIES = 8  # named in a panel's description


def _series(ax: Axes) -> list[tuple[str, np.ndarray]]:
    """Named series of a panel: curves and points by their values upwards, bars by their length, an image by its cells, and
    rows of points by the names at their axis."""
    found = []
    for one in (*ax.lines, *ax.collections, *ax.containers):
        name = str(one.get_label())
        whole = isinstance(one, Artist) and not _placed(one).contains_branch(ax.transData)  # spans the panel: no data
        if name and not name.startswith("_") and not whole:
            found.append((name, _values(one)))
    found += [("cells", np.ma.filled(image.get_array().astype(float), np.nan)) for image in ax.images]
    names = [t.get_text() for t in ax.get_yticklabels()]
    if not found and any(c.isalpha() for name in names for c in name):
        rows = [name for name in names if name.strip()]
        found = [
            (
                f"{len(rows)} rows, {rows[0]} to {rows[-1]}",
                np.concatenate([_values(x, 0) for x in (*ax.lines, *ax.collections)] or [np.zeros(0)]),
            )
        ]
    return [(name, values[np.isfinite(values)]) for name, values in found]


def _placed(one: Artist) -> Transform:
    """What places a thing in its panel."""
    return one.get_offset_transform() if isinstance(one, PathCollection) else one.get_transform()


def _values(drawn: object, axis: int = 1) -> np.ndarray:
    """What is drawn, in data units along an axis: points, corners of bands and lines, lengths of bars."""
    drawn = drawn.lines[0] if getattr(drawn, "lines", None) else drawn  # of bars of errors the points
    if hasattr(drawn, "get_xydata"):
        return np.asarray(drawn.get_xydata(), dtype=float)[:, axis]
    if patches := getattr(drawn, "patches", None):
        across = getattr(drawn, "orientation", "") == "horizontal"
        return np.array([p.get_width() if across else p.get_height() for p in patches])
    if isinstance(drawn, PathCollection):
        return np.ma.filled(np.ma.asarray(drawn.get_offsets(), dtype=float), np.nan)[:, axis]
    if hasattr(drawn, "get_paths"):
        return np.concatenate([path.vertices[:, axis] for path in drawn.get_paths()] or [np.zeros(0)])
    return np.zeros(0)


def _span(values: np.ndarray) -> str:
    if not values.size:
        return ""
    low, high = values.min(), values.max()
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def plain(text: str) -> str:
    """Text from outside as a figure shows it letter by letter: a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def plain_log_ticks(axis: Axis) -> None:
    """Names 1, 2, 5, 10, 20 and so on as plain numbers on an axis (`ax.xaxis`, `ax.yaxis`) of log scale, with small ticks
    between them."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(LogLocator(subs=range(1, 10)))
    axis.set_minor_formatter(NullFormatter())
