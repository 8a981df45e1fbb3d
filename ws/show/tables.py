"""Tables of results: written whole, read back, shown as text. polars sorts NaN first: `sort_nan_last` does not.

Text from outside (names, claims, file names, model ids) enters Markdown through `literal` or `code`; `as_text` escapes
what it puts into HTML.
"""

import re
from html import escape
from math import isnan
from pathlib import Path

import polars as pl

from ws.cache.files import atomic_file

SEPARATORS = {".csv": ",", ".tsv": "\t"}
STYLES = {"latex": "latex_booktabs", "csv": "csv", "markdown": "github", "text": "simple"}


def _line(value: object) -> str:
    return " ".join(str(value).encode("utf-8", "replace").decode().split())


def literal(value: object) -> str:
    """Text as Markdown shows it character for character: in one line, in a table's cell too, no HTML, no formula."""
    text = re.sub("&(?=[#a-zA-Z])", "&amp;", _line(value)).replace("<", "&lt;")
    text = re.sub(r"[\\`*\[\]|$~#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    return re.sub(r"^([-+=>]|\d+(?=[.)]))", lambda m: m[0] + "\\" if m[0].isdigit() else "\\" + m[0], text)


def code(value: object) -> str:
    """The same as a code span; not for a table's cell, which a bar in the text would end."""
    text = _line(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def sort_nan_last(table: pl.DataFrame, column: str) -> pl.DataFrame:
    """Highest first; NaN last (polars alone would put it first); ties keep their order."""
    key = pl.col(column).fill_nan(None)
    return table.sort(key, descending=True, nulls_last=True, maintain_order=True)


def sorted_by(table: pl.DataFrame, column: str) -> pl.DataFrame:
    """By a column: numbers from the highest with NaN last, words from the first."""
    if table[column].dtype.is_float():
        return sort_nan_last(table, column)
    return table.sort(column, descending=table[column].dtype.is_integer(), nulls_last=True, maintain_order=True)


def facts(title: str, rows: dict[str, object]) -> str:
    """What an object shows of itself in a notebook, as HTML."""
    told = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(str(_cell(value, 4)))}</td></tr>" for key, value in rows.items()
    )
    return f"<p><b>{escape(title)}</b></p><table>{told}</table>"


class Told:
    """Of results with a `headline()`: they are shown by it, in a terminal and in a notebook."""

    def headline(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {re.sub(r'[*`]', '', self.headline())}"

    def _repr_markdown_(self) -> str:
        return f"**{type(self).__name__}.** {self.headline()}"


def write_table(table: pl.DataFrame, path: Path) -> Path:
    """Write a .csv (comma) or .tsv (tab) whole; NaN is written as `NaN`."""
    if path.suffix not in SEPARATORS:
        raise ValueError(f"{path}: a table is written as .csv or .tsv")
    with atomic_file(path) as tmp:
        table.write_csv(tmp, separator=SEPARATORS[path.suffix])
    return path


def read_table(path: Path) -> pl.DataFrame:
    """Read a table that `write_table` wrote."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table")
    try:
        return pl.read_csv(path, separator=SEPARATORS.get(path.suffix, ","), infer_schema_length=None)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path}: no table: {str(error).splitlines()[0]}") from None


def as_text(
    table: pl.DataFrame,
    columns: list[str] | None = None,
    rows: int | None = None,
    style: str = "github",
    digits: int = 3,
    of: int | None = None,
) -> str:
    """The table as text: numbers to 3 significant digits, `-` for what is not defined. style: `csv` or a tabulate format, such
    as `html` for notebooks, where it is said below how many of the rows are shown. of: rows of the whole, default the table's."""
    from tabulate import tabulate

    part = table.select(columns) if columns else table
    part = part.head(rows) if rows else part
    shown = [[_cell(v, digits) for v in row] for row in part.rows()]
    if style == "github":
        shown = [[v.replace("|", "\\|") if isinstance(v, str) else v for v in row] for row in shown]
    if style == "csv":
        shown = [["NaN" if v == "-" else v for v in row] for row in shown]
        return pl.DataFrame([list(map(str, row)) for row in shown], part.columns, orient="row").write_csv().rstrip()
    ends = (
        ["right" if kind.is_numeric() else "left" for kind in part.dtypes]
        if style.startswith("latex") and shown
        else None
    )
    whole = of or len(table)
    more = f"\n<p>{len(part):,} of {whole:,} rows</p>" if style == "html" and len(part) < whole else ""
    return tabulate(shown, headers=part.columns, tablefmt=style, disable_numparse=True, colalign=ends) + more


def _cell(value: object, digits: int) -> object:
    """A value as a reader sees it: so many significant digits, yes and no, a dash for what is not defined."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float) and isnan(value)):
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else value
