"""The atlas of a library: the cosine of every two weight differences, as a table and a heat map. (docs/method.md section 13)"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from ws.cache.places import out_folder
from ws.diff.algebra import cosines, grams
from ws.show.figures import plain, save
from ws.show.tables import write_table
from ws.use.library import Known, read_library

NAMES = ("behavior", "adapter", "seed", "null")
ROOT = (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x))


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
        rows = [
            {**{n: getattr(a, n) for n in NAMES}, **{f"other_{n}": getattr(b, n) for n in NAMES}, "cos": self.cos[i, j]}
            for (i, a), (j, b) in combinations(enumerate(self.entries), 2)
        ]
        return pl.DataFrame(rows)

    def figure(self) -> Figure:
        """A heat map, its colours by the root of |cosine|, the diagonal grey; lines part behaviours, a thick one null diffs."""
        n, recipes = len(self.entries), len({e.adapter for e in self.entries}) > 1
        figure = Figure(figsize=(0.21 * n + 4, 0.21 * n + 2.4), layout="constrained")
        axes, grid = figure.subplots(), np.where(np.eye(n, dtype=bool), np.nan, self.cos)
        top = max(np.nan_to_num(np.abs(grid)).max(), 1e-6)
        image = axes.imshow(grid, cmap="RdBu_r", norm=FuncNorm(ROOT, -top, top), interpolation="nearest")
        axes.set_facecolor("0.8")
        labels = [f"{e.behavior} {f'{e.adapter} ' * recipes}{e.seed}{' null' * e.null}" for e in self.entries]
        axes.set_xticks(range(n), [plain(x) for x in labels], rotation=90, fontsize=8)
        axes.set_yticks(range(n), [plain(x) for x in labels], fontsize=8)
        for i, (a, b) in enumerate(zip(self.entries, self.entries[1:], strict=False)):
            if (a.null, a.behavior) != (b.null, b.behavior):
                for line in (axes.axhline, axes.axvline):
                    line(i + 0.5, c="k", lw=1.6 if a.null != b.null else 0.5)
        axes.set_title(f"Cosines between weight differences of {plain(self.model)}", fontsize=10)
        ticks = [s * top * f for s in (-1, 1) for f in (1, 0.25, 0.05)]
        figure.colorbar(image, ax=axes, label="cosine", shrink=0.8, ticks=[*ticks, 0], format="{x:.2g}")
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
    cos = cosines(grams([e.w for e in entries], sorted({name for e in entries for name in e.w}))).numpy()
    rank = {behavior: i for i, behavior in enumerate(_order(entries, cos))}
    key = [(e.null, rank.get(e.behavior, len(rank)), e.behavior, e.adapter, e.seed) for e in entries]
    at = sorted(range(len(entries)), key=key.__getitem__)
    base = str(entries[0].w.meta.get("base_model"))
    return Atlas(base, [entries[i] for i in at], cos[np.ix_(at, at)], skipped)


def _order(entries: list[Known], cos: Float[np.ndarray, "N N"]) -> list[str]:
    """Behaviours that have a w, by average linkage of their w's mean cosines."""
    names = sorted({e.behavior for e in entries if not e.null})
    where = [[i for i, e in enumerate(entries) if e.behavior == name and not e.null] for name in names]
    if len(names) < 3:
        return names
    far = 1 - np.array([[np.nan_to_num(cos[np.ix_(a, b)]).mean() for b in where] for a in where])
    np.fill_diagonal(far, 0)
    return [names[i] for i in leaves_list(linkage(squareform(far, checks=False), "average", optimal_ordering=True))]
