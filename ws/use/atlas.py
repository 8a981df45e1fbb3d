"""The atlas of a library: the cosine of every two weight differences, as tables and a heat map, and what one means beside
null diffs. (docs/method.md section 13)

Of two runs that share their LoRA seed the cosine shows what they share by that too, so behaviours are compared over *other*
seeds. A pair of groups (behaviour and adapter) is held against its null band: with c the cosines of either's null diffs with
the other's w, of other seeds, whose mean is 0 by design, and J the different seeds of these null diffs, the cosine of one
more null diff with one w lies in `-+ t_J rms(c)` with probability .95."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure
from scipy import stats
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from ws.cache.files import write_text
from ws.cache.places import out_folder
from ws.diff.algebra import cosines, grams
from ws.show.figures import TEXT, plain, save, styled
from ws.show.tables import literal, write_table
from ws.use.bands import random_cosines
from ws.use.library import Known, read_library

NAMES = ("behavior", "adapter", "seed", "null")
SPREAD = {"cos": np.mean, "low": np.min, "high": np.max}
MEANS = dict.fromkeys(("behavior", "adapter", "other", "other_adapter"), pl.String) | {"pairs": pl.Int64}
MEANS |= dict.fromkeys((*SPREAD, "null_band"), pl.Float64) | {
    "outside": pl.Int64,
    "null_seeds": pl.Int64,
    "same_seed": pl.Float64,
}
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

    def _groups(self) -> dict[tuple[str, str], list[int]]:
        """Places of w by behaviour and adapter."""
        groups: dict[tuple[str, str], list[int]] = {}
        for i, e in enumerate(self.entries):
            if not e.null:
                groups.setdefault((e.behavior, e.adapter), []).append(i)
        return groups

    def _nulled(self, one: tuple[str, str], other: tuple[str, str]) -> list[tuple[int, int, float]]:
        """Seed of a null diff of a group, seed of a w of the other, their cosine; and the other way round."""
        found = []
        for of, beside in {(one, other), (other, one)}:
            nulls = [i for i, e in enumerate(self.entries) if e.null and (e.behavior, e.adapter) == of]
            pairs = [(i, j) for i in nulls for j in self._groups().get(beside, [])]
            found += [(self.entries[i].seed, self.entries[j].seed, float(self.cos[i, j])) for i, j in pairs]
        return [row for row in found if np.isfinite(row[2])]

    def null_band(self, one: tuple[str, str], other: tuple[str, str]) -> tuple[float, int]:
        """Half width of the null band of two groups, and the number of null diffs' seeds; NaN with fewer than two."""
        found = [(a, c) for a, b, c in self._nulled(one, other) if a != b]
        seeds = len({a for a, _ in found})
        rms = np.sqrt(np.mean(np.square([c for _, c in found]))) if found else np.nan
        return float(stats.t.ppf(0.975, seeds) * rms) if seeds > 1 else float("nan"), seeds

    @property
    def means(self) -> pl.DataFrame:
        """A row per two groups of w (behaviour and adapter), and per group with itself: cosines over other seeds (pairs, cos,
        low, high), half width of the null band, how many of the pairs lie `outside` of it, its null diffs' seeds; and the
        mean cosine over the same seed."""
        rows = []
        for (one, a), (other, b) in combinations_with_replacement(self._groups().items(), 2):
            both = [*combinations(a, 2)] if one == other else [(i, j) for i in a for j in b]
            alike, apart = [], []
            for i, j in both:
                (alike if self.entries[i].seed == self.entries[j].seed else apart).append(self.cos[i, j])
            apart, (band, seeds) = [c for c in apart if np.isfinite(c)], self.null_band(one, other)
            rows.append({
                "behavior": one[0], "adapter": one[1], "other": other[0], "other_adapter": other[1], "pairs": len(apart),
                **{name: float(f(apart)) if apart else np.nan for name, f in SPREAD.items()},
                "null_band": band, "outside": sum(abs(c) > band for c in apart) if np.isfinite(band) else None,
                "null_seeds": seeds, "same_seed": float(np.mean(alike)) if alike else np.nan,
            })  # fmt: skip
        return pl.DataFrame(rows, schema=MEANS)

    def text(self) -> str:
        """What the cosines mean beside null diffs and random differences (Markdown)."""
        table, same_behavior = self.means, pl.col("behavior") == pl.col("other")
        of_one = same_behavior & (pl.col("adapter") == pl.col("other_adapter"))
        parts = {"seeds of one behaviour": of_one, "adapters of one behaviour": same_behavior & ~of_one}
        parts["behaviours"] = ~same_behavior
        lines, banded = [], table.filter(pl.col("null_band").is_finite() & (pl.col("pairs") > 0))
        for name, which in parts.items():
            part, known = table.filter(which & (pl.col("pairs") > 0)), banded.filter(which)
            if len(part):
                mean, pairs = np.average(part["cos"], weights=part["pairs"]), part["pairs"].sum()
                told = f"of {known['pairs'].sum()} with a null band {known['outside'].sum()} lie outside"
                told = told if len(known) else "**none has a null band**"
                ends = f"{mean:+.3f} ({part['low'].min():+.3f} to {part['high'].max():+.3f}, {pairs} pairs; {told})"
                lines.append(f"- between {name}, other seeds: {ends}")
        shared = table.filter(~same_behavior)["same_seed"].drop_nans()
        if len(shared):
            lines.append(f"- between behaviours of one seed: {shared.mean():+.3f}; they share initialisation and order")
        own = [c for g in self._groups() for a, b, c in self._nulled(g, g) if a == b]
        if own:
            lines.append(
                f"- between a null diff and the w of its own seed: {min(own):+.3f} to {max(own):+.3f}, not counted"
            )
        said = ["Mean cosines:", "\n".join(lines)]
        if len(banded):
            low, high = banded["null_band"].min(), banded["null_band"].max()
            said.append(
                f"The null bands, where one more null diff lies with probability .95, reach from -+{low:.2g} to -+{high:.2g}. A"
                " cosine inside says no more than shuffled labels do; one outside says that two trainings share more than that,"
                " be it the behaviour or what their texts have in common. They are not corrected for the number of pairs."
            )
        if len(banded) < (left := len(table.filter(pl.col("pairs") > 0))):
            said.append(
                f"{left - len(banded)} of {left} rows have no null band, which takes null diffs of 2 seeds of either behaviour"
                " (`ws batch --nulls 3`): there a cosine is not told apart from what any training gives."
            )
        if np.isfinite(wide := self._random()):
            said.append(
                f"Random differences of the same spectra reach {wide:.1g}: no yardstick, as any training moves alike."
            )
        return (
            "\n\n".join([*said, *(f"left out: {literal(f)}: {literal(why)}" for f, why in self.skipped.items())]) + "\n"
        )

    def _random(self, draws: int = 200) -> float:
        """The largest 97.5 % quantile over groups, of the first w of each as a random difference, with the next group's
        first."""
        firsts = list({(e.behavior, e.adapter): e.w for e in reversed(self.entries) if not e.null}.values())
        ends = []
        for u, w in zip(firsts, firsts[1:] + firsts[:1], strict=True):
            names = [name for name in u if name in w and len(u.shape(name)) < 3]
            if u is not w and names:
                ends.append(float(np.quantile(np.abs(random_cosines(u, [w], names, draws, 0)), 0.95)))
        return max(ends, default=float("nan"))

    @styled
    def figure(self) -> Figure:
        """A heat map, its colours by the root of |cosine|, the diagonal grey; lines part behaviours, a thick one null
        diffs."""
        n, recipes = len(self.entries), len({e.adapter for e in self.entries}) > 1
        figure = Figure(figsize=(max(TEXT, 0.16 * n + 2.6), max(TEXT, 0.16 * n + 2.6) - 0.8), layout="constrained")
        axes, grid = figure.subplots(), np.where(np.eye(n, dtype=bool), np.nan, self.cos)
        top = max(np.nan_to_num(np.abs(grid)).max(), 1e-6)
        image = axes.imshow(grid, cmap="RdBu_r", norm=FuncNorm(ROOT, -top, top), interpolation="nearest")
        axes.set_facecolor("0.8")
        labels = [f"{e.behavior} {f'{e.adapter} ' * recipes}{e.seed}{' null' * e.null}" for e in self.entries]
        axes.set_xticks(range(n), [plain(x) for x in labels], rotation=90)
        axes.set_yticks(range(n), [plain(x) for x in labels])
        for i, (a, b) in enumerate(zip(self.entries, self.entries[1:], strict=False)):
            if (a.null, a.behavior) != (b.null, b.behavior):
                for line in (axes.axhline, axes.axvline):
                    line(i + 0.5, c="k", lw=1.6 if a.null != b.null else 0.5)
        axes.set_title(f"Cosines between weight differences of {plain(self.model)}")
        ticks = [s * top * f for s in (-1, 1) for f in (1, 0.25, 0.05)]
        figure.colorbar(image, ax=axes, label="cosine", shrink=0.8, ticks=[*ticks, 0], format="{x:.2g}")
        return figure

    def save(self, folder: Path | str) -> Path:
        """Write `atlas.tsv`, `atlas_means.tsv`, `atlas.md`, `atlas.png`, `atlas.pdf` into `folder`. Returns the folder."""
        write_table(self.table, Path(folder) / "atlas.tsv")
        write_table(self.means, Path(folder) / "atlas_means.tsv")
        write_text(Path(folder) / "atlas.md", self.text())
        save(self.figure(), Path(folder) / "atlas")
        return Path(folder)


def atlas(library: Path | str | None = None, model: str = "") -> Atlas:
    """The cosines between all weight differences of one base model below `library` (default: all results), over the matrices
    that both of two have. model: the base as results name it, needed where the library is of several. Behaviours stand next
    to those whose w are near theirs (average linkage of `1 - mean cosine`), within one adapters and seeds in order, null
    diffs last. Errors as in `ws.use.library.read_library`."""
    entries, skipped = read_library(library or out_folder(), {model.replace("/", "__")} if model else ())
    return atlas_of(entries, str(entries[0].w.meta.get("base_model")), skipped)


def atlas_of(entries: Sequence[Known], model: str, skipped: Mapping[str, str] | None = None) -> Atlas:
    """The atlas of given entries, of which one at least is no null diff; otherwise as `atlas`. ValueError for none."""
    if all(e.null for e in entries):
        raise ValueError("an atlas needs a weight difference that is no null diff")
    cos = cosines(grams([e.w for e in entries], sorted({name for e in entries for name in e.w}))).numpy()
    rank = {behavior: i for i, behavior in enumerate(_order(entries, cos))}
    key = [(e.null, rank.get(e.behavior, len(rank)), e.behavior, e.adapter, e.seed) for e in entries]
    at = sorted(range(len(entries)), key=key.__getitem__)
    return Atlas(model, [entries[i] for i in at], cos[np.ix_(at, at)], dict(skipped or {}))


def _order(entries: list[Known], cos: Float[np.ndarray, "N N"]) -> list[str]:
    """Behaviours that have a w, by average linkage of their w's mean cosines."""
    names = sorted({e.behavior for e in entries if not e.null})
    where = [[i for i, e in enumerate(entries) if e.behavior == name and not e.null] for name in names]
    if len(names) < 3:
        return names
    far = 1 - np.array([[np.nan_to_num(cos[np.ix_(a, b)]).mean() for b in where] for a in where])
    np.fill_diagonal(far, 0)
    return [names[i] for i in leaves_list(linkage(squareform(far, checks=False), "average", optimal_ordering=True))]
