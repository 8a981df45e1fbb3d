"""How things look in a notebook and its report: the run's log, tables, figures as PNG bytes, Markdown below a section."""

import logging
import re
from io import BytesIO
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure

from ws.cache.files import settled
from ws.cache.places import logs_folder
from ws.show import FOLDED, HEADLINE, KEY
from ws.show.figures import described, laid_out, save
from ws.show.tables import as_text

PIXELS = 135  # of a screen, an inch of a figure: both columns of a page fill a report


def start_log(notebook: str, folder: Path) -> logging.Logger:
    """A verbose log of one run under logs/, named after the notebook and its folder; warnings of ws go there too."""
    folder.mkdir(parents=True, exist_ok=True)
    logs = logs_folder()
    logs.mkdir(parents=True, exist_ok=True)
    name = "_".join((notebook, *settled(folder.resolve()).parts[1:][-4:]))
    log = logging.getLogger("ws")
    log.setLevel(logging.INFO)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(logs / f"{name}.log", mode="a", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return log


def show(figure: Figure, stem: Path | None = None, key: bool = False, folded: str = ""):
    """A figure as a notebook displays it: a PNG at twice the resolution of a screen, no plotting backend involved, with its
    description as alternative text. stem: where it is saved too (`ws.show.figures.save`). key: it stands beside the headline
    of the report, and for the run in the index. folded: what a report says instead, until one opens it."""
    from IPython.display import Image

    buffer = BytesIO()
    with laid_out(figure):
        if stem is not None:
            save(figure, stem)
        figure.savefig(buffer, format="png", dpi=2 * PIXELS, metadata={"Software": None})
    told = {KEY: f"{stem.name}.png"} if key and stem is not None else {}
    told |= {FOLDED: folded} if folded else {}
    width = int(figure.get_figwidth() * PIXELS)
    return Image(buffer.getvalue(), format="png", width=width, alt=described(figure), metadata=told)


def headline(text: str):
    """What a run says in one or two sentences (Markdown): its report opens with it, and the index shows it."""
    from IPython.display import Markdown

    return Markdown(text, metadata={HEADLINE: True})


def show_table(table: pl.DataFrame, columns: list[str] | dict[str, str] | None = None, rows: int | None = None):
    """A table as a notebook displays it; `columns` may rename: `{column: what a reader sees}`."""
    from IPython.display import HTML

    if isinstance(columns, dict):
        table, columns = table.select(pl.col(old).alias(new) for old, new in columns.items()), None
    return HTML(as_text(table, columns, rows, "html"))


def embedded(text: str):
    """A Markdown file as part of a report: its headings two levels deeper, below the section that shows it."""
    from IPython.display import Markdown

    return Markdown(re.sub(r"^(#+) ", r"##\1 ", text, flags=re.MULTILINE))
