"""What all figures share: the Okabe-Ito palette (families stay apart in print and for colour-blind readers), files.

One function per figure, which takes tables and returns the Figure.
"""

from pathlib import Path

import matplotlib
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

matplotlib.use("Agg", force=False)
from matplotlib.figure import Figure  # noqa: E402

from ws.cache.files import atomic_file  # noqa: E402

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B", "#BCBD22", "#17BECF"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]


def save(figure: Figure, stem: Path) -> list[Path]:
    """`stem.png` (150 dpi) and `stem.pdf`, without a creation date, so that the same data give the same bytes."""
    paths = []
    for suffix, meta in ((".png", {"Software": None}), (".pdf", {"CreationDate": None, "ModDate": None})):
        path = stem.with_name(stem.name + suffix)
        with atomic_file(path) as tmp:
            figure.savefig(tmp, format=suffix[1:], dpi=150, metadata=meta)
        paths.append(path)
    return paths


def plain(text: str) -> str:
    """Text from outside as a figure shows it letter by letter: a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def plain_log_ticks(axis: Axis) -> None:
    """Names 1, 2, 5, 10, 20 and so on as plain numbers on an axis (`ax.xaxis`, `ax.yaxis`) of log scale."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
