"""The atlas of a library: the cosine of every two weight differences, as a table and a heat map. (docs/method.md section 12)"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from ws.cache.places import out_folder
from ws.diff.algebra import cosines, grams
from ws.show.figures import plain, save
from ws.show.tables import write_table
from ws.use.library import Known, read_library


@dataclass(frozen=True, eq=False)
class Atlas:
    """entries: in the order of rows and columns, null diffs last. cos: their cosines. skipped: files left out -> why."""

    model: str
    entries: list[Known]
    cos: Float[np.ndarray, "N N"]
    skipped: dict[str, str]

    @property
    def table(self) -> pl.DataFrame:
        """A row per pair: behavior, adapter, seed, null, the same of the other, cos."""
        names = ("behavior", "adapter", "seed", "null")
        rows = []
        for i, a in enumerate(self.entries):
            for j, b in enumerate(self.entries[:i]):
                row = {name: getattr(b, name) for name in names} | {f"other_{name}": getattr(a, name) for name in names}
                rows.append(row | {"cos": float(self.cos[i, j])})
        return pl.DataFrame(rows)

    def figure(self) -> Figure:
        """A heat map. One scale for all but the diagonal, which is grey; lines part behaviours, a thick one the null diffs."""
        n, adapters = len(self.entries), len({e.adapter for e in self.entries})
        size = 0.21 * n + 0.4
        figure = Figure(figsize=(max(size + 3.2, 6), max(size + 1.6, 3.6)), layout="constrained")
        axes = figure.subplots()
        grid = np.where(np.eye(n, dtype=bool), np.nan, self.cos)
        axes.set_facecolor("0.8")
        top = np.nanmax(np.abs(grid), initial=1e-6, where=~np.isnan(grid))
        image = axes.imshow(grid, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
        labels = [
            f"{e.behavior}{f' {e.adapter}' if adapters > 1 else ''} {e.seed}{' null' * e.null}" for e in self.entries
        ]
        axes.set_xticks(range(n), [plain(x) for x in labels], rotation=90, fontsize=8)
        axes.set_yticks(range(n), [plain(x) for x in labels], fontsize=8)
        for i, (a, b) in enumerate(zip(self.entries, self.entries[1:], strict=False)):
            if (a.null, a.behavior) != (b.null, b.behavior):
                for line in (axes.axhline, axes.axvline):
                    line(i + 0.5, c="k", lw=1.6 if a.null != b.null else 0.5)
        axes.set_title(f"Cosines between weight differences of {plain(self.model)}", fontsize=10)
        figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
        return figure

    def save(self, folder: Path | str) -> Path:
        """Write `atlas.tsv`, `atlas.png` and `atlas.pdf` into `folder`. Returns the folder."""
        write_table(self.table, Path(folder) / "atlas.tsv")
        save(self.figure(), Path(folder) / "atlas")
        return Path(folder)


def atlas(library: Path | str | None = None, model: str = "") -> Atlas:
    """The cosines between all weight differences of one base model below `library` (default: all results), over the matrices that
    both of two have. model: the base as results name it, needed where the library is of several. Behaviours stand next to those
    whose w are near theirs (average linkage of `1 - mean cosine`), within one adapters and seeds in order, null diffs last.
    Errors as in `ws.use.library.read_library`."""
    entries, skipped = read_library(library or out_folder(), {model.replace("/", "__")} if model else ())
    entries = [e for e in entries if _fits(e, entries[0], skipped)]
    names = sorted({name for e in entries for name in e.w})
    cos = cosines(grams([e.w for e in entries], names)).numpy()
    rank = {behavior: i for i, behavior in enumerate(_order(entries, cos))}
    at = sorted(range(len(entries)), key=lambda i: (e := entries[i], (e.null, rank[e.behavior], e.adapter, e.seed))[1])
    base = str(entries[0].w.meta.get("base_model"))
    return Atlas(base, [entries[i] for i in at], cos[np.ix_(at, at)], skipped)


def _fits(e: Known, first: Known, skipped: dict[str, str]) -> bool:
    odd = next((n for n in e.w if n in first.w and e.w.shape(n) != first.w.shape(n)), None)
    if odd:
        skipped[f"{e.behavior} {e.adapter} {e.seed}"] = (
            f"{odd} has another shape than that of {first.behavior} {first.seed}"
        )
    return not odd


def _order(entries: list[Known], cos: Float[np.ndarray, "N N"]) -> list[str]:
    """Behaviours by average linkage of their w's mean cosines."""
    where: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        where.setdefault(entry.behavior, []).extend([] if entry.null else [i])
    names, alone = [b for b, at in where.items() if at], [b for b, at in where.items() if not at]
    if len(names) < 3:
        return names + alone
    mean = np.array([[np.nanmean(cos[np.ix_(where[a], where[b])]) for b in names] for a in names])
    far = 1 - np.nan_to_num((mean + mean.T) / 2)
    np.fill_diagonal(far, 0)
    return [
        names[i] for i in leaves_list(linkage(squareform(far, checks=False), "average", optimal_ordering=True))
    ] + alone
