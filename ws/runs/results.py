"""`out/results.parquet`: the sweeps of all runs in one table; one row per run, seed and candidate.

Columns: model, behavior, adapter, seed, protocol, then those of `v7_summary.tsv`. It holds nothing that is not in the
runs' own folders and is written anew, whole, by every batch. (docs/method.md section 7)
"""

import re
from pathlib import Path

import polars as pl

from ws.cache.files import atomic_file
from ws.cache.made import Damaged, read_sidecar, verified
from ws.cache.places import out_folder
from ws.cache.records import tell
from ws.runs.here import SWEPT
from ws.runs.identity import outdated
from ws.runs.notebooks import CAUSAL, TABLE
from ws.runs.parameters import suggest
from ws.show.tables import as_text, read_table, sort_nan_last

KEYS = ["model", "behavior", "adapter", "seed", "protocol"]
CARRIED = (
    "effect retention energy linear excess excess_low excess_high p p_max excess_forward p_forward saturated".split()
)
SHOWN = [*KEYS, "subspace", "kind", "mean_conc_act", "mean_conc_w_combined", "joint_score", "ill_conditioned"]


def collect(out: Path) -> pl.DataFrame:
    """The summary rows of every finished sweep below `out`, in the order of KEYS; empty when there is none."""
    parts = []
    homes = ("*/*/*/seed_*/*", "*/*/w-*/*")  # of a seed, of a given w
    scored = [
        (e, path) for e in TABLE.values() if e.scores for home in homes for path in out.glob(f"{home}/{e.scores}")
    ]
    for entry, scores in sorted(scored, key=lambda found: found[1]):
        try:
            verified(scores)
        except Damaged as error:
            tell(f"left out of the results: {error}")
            continue
        if not read_sidecar(scores.with_name(f"{entry.name}.ipynb")):
            continue  # no finished run
        values: list = list(scores.parent.relative_to(out).parts)
        seed = values.pop(3) if len(values) == len(KEYS) else ""
        values.insert(KEYS.index("seed"), int(seed.removeprefix("seed_")) if seed else None)
        kinds = {"seed": pl.Int32}
        keys = [pl.lit(value, kinds.get(key, pl.String)).alias(key) for key, value in zip(KEYS, values, strict=True)]
        table = _with_causal(read_table(scores), scores.parent)
        parts.append(table.with_columns(keys).select([*KEYS, *table.columns]))
    if not parts:
        return pl.DataFrame(schema={key: pl.Int32 if key == "seed" else pl.String for key in KEYS})
    return pl.concat(parts, how="diagonal_relaxed").sort(KEYS, maintain_order=True)


def _with_causal(table: pl.DataFrame, sweep: Path) -> pl.DataFrame:
    """The summary with what the finished causal check beside it says of each candidate, if there is one of this very sweep."""
    path = sweep.with_name(CAUSAL) / "causal_candidates.tsv"
    if sweep.name != "v7b" or not path.is_file() or not read_sidecar(path.with_name("causal_check.ipynb")):
        return table
    if outdated("causal_check", path.parent, sweep / SWEPT):
        tell(
            f"left out of the results: {path}: is of an earlier sweep; run just nb causal_check, or just v7b --causal, again"
        )
        return table
    try:
        verified(path)
    except Damaged as error:
        tell(f"left out of the results: {error}")
        return table
    causal = read_table(path).select("subspace", *(pl.col(c).alias(f"causal_{c}") for c in CARRIED))
    return table.join(causal, on="subspace", how="left", maintain_order="left")


def write_results(out: Path | None = None) -> Path:
    """Write `out/results.parquet` from all finished sweeps."""
    out = out or out_folder()
    path = out / "results.parquet"
    with atomic_file(path) as tmp:
        collect(out).write_parquet(tmp)
    return path


def select(table: pl.DataFrame, filters: dict[str, tuple[str, ...]], sort: str, top: int) -> pl.DataFrame:
    """Rows whose columns have one of the given values (`*` stands for anything), sorted: texts from A to Z, numbers from
    the highest, NaN last, ties in order. At most `top`, 0 for all. ValueError for an unknown column or value."""
    for column, values in filters.items():
        known = table[column].cast(pl.String).unique().drop_nulls().sort().to_list()
        chosen: set[str] = set()
        for value in values:
            pattern = ".*".join(map(re.escape, value.split("*")))
            if not (matched := [text for text in known if re.fullmatch(pattern, text)]):
                raise ValueError(f"{column} {value}: no such run{suggest(value, known)}")
            chosen.update(matched)
        if values:
            table = table.filter(pl.col(column).cast(pl.String).is_in(list(chosen)))
    if sort:
        if sort not in table.columns:
            raise ValueError(f"cannot sort by {sort}{suggest(sort, table.columns)}")
        floats = table.schema[sort].is_float()
        table = sort_nan_last(table, sort) if floats else table.sort(sort, maintain_order=True)
    return table.head(top) if top else table


def results_text(table: pl.DataFrame, columns: list[str]) -> str:
    """The table as text: the columns asked for, else those of SHOWN that it has."""
    for column in columns:
        if column not in table.columns:
            raise ValueError(f"no column {column}{suggest(column, table.columns)}")
    return as_text(table, columns or [c for c in SHOWN if c in table.columns], style="simple")
