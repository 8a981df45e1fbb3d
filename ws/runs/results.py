"""`out/results.parquet`: the sweeps of all runs in one table; one row per run, seed and candidate.

Columns: model, behavior, adapter, seed, protocol, then those of `v7_summary.tsv`. It holds nothing that is not in the
runs' own folders and is written anew, whole, by every batch. (docs/method.md section 7)
"""

import re
from pathlib import Path

import polars as pl

from ws.cache.files import atomic_file
from ws.cache.made import read_sidecar
from ws.cache.places import out_folder
from ws.runs.notebooks import TABLE
from ws.runs.parameters import suggest
from ws.show.tables import as_text, read_table, sort_nan_last

KEYS = ["model", "behavior", "adapter", "seed", "protocol"]
SHOWN = [*KEYS, "subspace", "kind", "mean_conc_act", "mean_conc_w_combined", "joint_score", "ill_conditioned"]


def collect(out: Path) -> pl.DataFrame:
    """The summary rows of every finished sweep below `out`, in the order of KEYS; empty when there is none."""
    parts = []
    scored = [
        (path, e.scores) for e in TABLE.values() if e.scores for path in out.glob(f"*/*/*/seed_*/*/{e.name}.ipynb")
    ]
    for notebook, scores in sorted(scored):
        folder = notebook.parent
        if not read_sidecar(notebook) or not (folder / scores).is_file():
            continue  # it is being run again
        model, behavior, adapter, seed, protocol = folder.relative_to(out).parts
        values = (model, behavior, adapter, int(seed.removeprefix("seed_")), protocol)
        keys = [pl.lit(value).alias(key) for key, value in zip(KEYS, values, strict=True)]
        table = read_table(folder / scores)
        parts.append(table.with_columns(keys).select([*KEYS, *table.columns]))
    if not parts:
        return pl.DataFrame(schema={key: pl.Int32 if key == "seed" else pl.String for key in KEYS})
    return pl.concat(parts, how="diagonal_relaxed").sort(KEYS, maintain_order=True)


def write_results(out: Path | None = None) -> Path:
    """Write `out/results.parquet` from all finished sweeps."""
    out = out or out_folder()
    path = out / "results.parquet"
    with atomic_file(path) as tmp:
        collect(out).write_parquet(tmp)
    return path


def select(table: pl.DataFrame, filters: dict[str, tuple[str, ...]], sort: str, top: int) -> pl.DataFrame:
    """Rows whose columns have one of the given values (`*` stands for anything), sorted.

    A text column sorts from A to Z, a number from the highest, NaN last; ties keep their order. top: at most so many
    rows, 0 for all. Raises ValueError for an unknown column or a value that occurs nowhere.
    """
    for column, values in filters.items():
        if not values:
            continue
        texts = pl.col(column).cast(pl.String)
        known = table[column].cast(pl.String).unique().sort().to_list()
        matched = pl.lit(False)
        for value in values:
            pattern = "^" + ".*".join(re.escape(part) for part in value.split("*")) + "$"
            if not any(pl.Series(known, dtype=pl.String).str.contains(pattern)):
                raise ValueError(f"{column} {value}: no such run{suggest(value, known)}")
            matched = matched | texts.str.contains(pattern)
        table = table.filter(matched)
    if sort:
        if sort not in table.columns:
            raise ValueError(f"cannot sort by {sort}{suggest(sort, table.columns)}")
        number = table.schema[sort].is_float()
        table = sort_nan_last(table, sort) if number else table.sort(sort, maintain_order=True)
    return table.head(top) if top else table


def results_text(table: pl.DataFrame, columns: list[str] | None = None) -> str:
    """The table as text: the columns of SHOWN that it has, or those asked for."""
    for column in columns or []:
        if column not in table.columns:
            raise ValueError(f"no column {column}{suggest(column, table.columns)}")
    return as_text(table, columns or [c for c in SHOWN if c in table.columns], style="simple")
