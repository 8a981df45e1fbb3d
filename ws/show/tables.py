"""Tables of results: written whole, read back, shown as text. polars sorts NaN first: `sort_nan_last` does not."""

from pathlib import Path

import polars as pl

from ws.cache.files import atomic_file

SEPARATORS = {".csv": ",", ".tsv": "\t"}


def sort_nan_last(table: pl.DataFrame, column: str) -> pl.DataFrame:
    """Highest first; NaN last (polars alone would put it first); ties keep their order."""
    key = pl.col(column).fill_nan(None)
    return table.sort(key, descending=True, nulls_last=True, maintain_order=True)


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
    return pl.read_csv(path, separator=SEPARATORS.get(path.suffix, ","), infer_schema_length=None)


def as_text(
    table: pl.DataFrame, columns: list[str] | None = None, rows: int | None = None, style: str = "github"
) -> str:
    """The table as text: numbers to 3 significant digits. style: a tabulate format, `html` for notebooks."""
    from tabulate import tabulate

    part = table.select(columns) if columns else table
    part = part.head(rows) if rows else part
    shown = [[f"{v:.3g}" if isinstance(v, float) else v for v in row] for row in part.rows()]
    return tabulate(shown, headers=part.columns, tablefmt=style, disable_numparse=True)
