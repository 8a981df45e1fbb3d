"""How things look in a notebook and its report: the run's log, figures as PNG bytes, Markdown below a section."""

import logging
import re
from io import BytesIO
from pathlib import Path

import polars as pl
from IPython.display import Image, Markdown
from matplotlib.figure import Figure

from ws.cache.places import LOGS


def start_log(notebook: str, folder: Path) -> logging.Logger:
    """A verbose log of one run under logs/, named after the notebook and its folder; warnings of ws go there too."""
    folder.mkdir(parents=True, exist_ok=True)
    LOGS.mkdir(exist_ok=True)
    name = "_".join((notebook, *folder.resolve().parts[1:][-4:]))
    log = logging.getLogger("ws")
    log.setLevel(logging.INFO)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(LOGS / f"{name}.log", mode="a", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return log


def show(figure: Figure) -> Image:
    """A figure as a notebook displays it: a PNG at twice the resolution, no plotting backend involved."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=170, metadata={"Software": None})
    width = int(figure.get_figwidth() * 85)
    return Image(buffer.getvalue(), format="png", width=width)


def embedded(text: str) -> Markdown:
    """A Markdown file as part of a report: its headings two levels deeper, below the section that shows it."""
    return Markdown(re.sub(r"^(#+) ", r"##\1 ", text, flags=re.MULTILINE))


SPECIFIC = {
    "subspace": "subspace",
    "family": "family",
    "mean_specific_conc_act": "R_act beyond clean",
    "mean_specific_z_act": "z",
    "mean_specific_energy_frac_act": "energy fraction",
    "mean_specific_rank": "rank",
}


def renamed(table: pl.DataFrame, columns: dict[str, str]) -> pl.DataFrame:
    """The named columns under the names that a reader sees."""
    return table.select([pl.col(old).alias(new) for old, new in columns.items()])
