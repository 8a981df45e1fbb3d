"""Tables of a weight diff: norms by matrix and module, spectra."""

import numpy as np
import polars as pl

from ws.diff.core import WeightDiff, layer_of


def diff_norms(w: WeightDiff) -> pl.DataFrame:
    """Per matrix of w in a layer: the columns of `WeightDiff.table` without form and shape."""
    return w.table().drop("form", "shape").filter(pl.col("layer").is_not_null())


def norms_by_module(norms: pl.DataFrame) -> pl.DataFrame:
    """Means over layers by module."""
    columns = ["norm", "rank", "effective_rank", "top_singular_value"]
    return norms.group_by("module", maintain_order=True).agg([pl.col(c).mean().alias(f"mean {c}") for c in columns])


def diff_spectra(w: WeightDiff) -> dict[str, list[np.ndarray]]:
    """Singular values of every matrix by module, for `ws.diff.figures.spectra`."""
    values: dict[str, list[np.ndarray]] = {}
    for name in w.names:
        if layer_of(name) is not None:
            module = name.removesuffix(".weight").rpartition(".")[2]
            values.setdefault(module, []).append(w.singular_values(name).numpy())
    return values
