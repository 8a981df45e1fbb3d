"""Is a weight difference specific to its behaviour, or does it answer by something that all share? The cross matrix.

w of behaviour i, at alpha, on the held-out statements of behaviour j. `margin = log P(matching answer) - log P(other)`; with
`y, n` what the margin of the Yes half and of the No half moves by between alpha -a and +a:

    behaviour part  b_ij = (y + n) / 2          bias part  c_ij = (y - n) / 2

w is specific where b_ii is above every b_ij. Intervals are for new LoRA seeds and new statements: t intervals of seeds and of
each half's statements, added in quadrature (`ws.stability.intervals`). (docs/method.md sections 1 and 7)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float

from ws.cache.files import write_text
from ws.cache.names import cache_folder
from ws.data import Behavior
from ws.diff import WeightDiff, dot, load_diff
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.show.bars import tqdm
from ws.show.tables import Told, write_table
from ws.stability.cross_words import conclusion, headline
from ws.stability.intervals import Part, half_width, mean_part
from ws.steer.answers import kept_answers
from ws.steer.evaluate import check_alphas
from ws.steer.statements import BOTH, HALVES, halves
from ws.steer.weights import check_fits

BASE = "none"  # what alpha 0 is a w of
Diffs = Mapping[str, Mapping[int, WeightDiff | Path | str]]  # behaviour -> seed -> w
Halves = dict[str, Float[np.ndarray, "S n"]]  # per half, by seed and statement


@dataclass(frozen=True, eq=False, repr=False)
class Cross(Told):
    """The cross matrix. rows: one per w, seed, statements, alpha, half and statement. matrix: per w, statements, alpha and set
    (yes, no, both) margin, accuracy and pmass with intervals. moves: per w and statements, what moves between the extreme
    alphas: its behaviour part, its bias part, each half, and by how much less than on its own statements. cosines: between
    every two w's."""

    rows: pl.DataFrame
    matrix: pl.DataFrame
    moves: pl.DataFrame
    cosines: pl.DataFrame

    def conclusion(self) -> str:
        """What the matrix shows, in words (Markdown)."""
        return conclusion(self.matrix, self.moves, self.cosines)

    def headline(self) -> str:
        """How many w are specific, in a sentence."""
        return headline(self.moves)

    def save(self, folder: Path | str) -> Path:
        """Write `cross_*` tables and the conclusion into `folder`, each whole. Returns the folder."""
        folder = Path(folder)
        write_table(self.rows, folder / "cross_statements.csv")
        for name in ("matrix", "moves", "cosines"):
            write_table(getattr(self, name), folder / f"cross_{name}.tsv")
        write_text(folder / "cross_conclusion.md", self.conclusion())
        return folder


def cross_behaviors(
    lm: LM,
    behaviors: Sequence[Behavior],
    diffs: Diffs,
    *,
    alphas: Sequence[float] = (-1.0, 0.0, 1.0),
    n_heldout: int | None = 100,
    cache: Path | None = None,
    progress: bool = True,
) -> Cross:
    """The cross matrix of behaviours of statements.

    diffs: per behaviour's name and LoRA seed its weight difference. alphas: two or more strengths; 0 is the base model and
    asked once. n_heldout: how many held-out statements of each behaviour are asked, its first ones (None: all). Each cell
    (one w, one strength, one behaviour's statements) is kept in `cache` (default `out/<model>/cache`) as soon as it is
    made, so that a stopped run goes on. The model is the same before and after. ValueError for fewer than two behaviours,
    one without answers, one without a w, a w that does not fit.
    """
    check_plain(lm.model)
    names = [b.name for b in behaviors]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"a cross matrix needs two or more different behaviours, given are {', '.join(names) or 'none'}"
        )
    for behavior in behaviors:
        if not behavior.answers:
            raise ValueError(f"{behavior.name}: is no behaviour of statements with answers, so its margin is not known")
        if not diffs.get(behavior.name):
            raise ValueError(f"{behavior.name}: no weight difference is given for it")
    strengths = check_alphas(list(alphas))
    found = {name: {s: load_diff(w) for s, w in diffs[name].items()} for name in names}
    for by_seed in found.values():
        for w in by_seed.values():
            check_fits(lm.model, w)
    todo = [(BASE, -1, None, 0.0)] if 0.0 in strengths else []
    steered = [alpha for alpha in strengths if alpha]
    # seed by seed, so that a stopped run has whole matrices of the first seeds
    seeds = sorted({seed for by_seed in found.values() for seed in by_seed})
    todo += [(n, s, found[n][s], a) for s in seeds for n in names if s in found[n] for a in steered]
    rows = []
    cells = [(*one, behavior) for one in todo for behavior in behaviors]
    for name, seed, w, alpha, behavior in tqdm(cells, "cross matrix", disable=not progress):
        part = _cell(lm, behavior, w, alpha, n_heldout, cache or cache_folder(lm.name))
        rows += [(name, seed, behavior.name, alpha, *row) for row in part]
    schema = "w seed statements alpha set claim margin pmass".split()
    table = pl.DataFrame(rows, schema, orient="row")
    return Cross(table, matrix_of(table, names), moves_of(table, names), cosines_of(found))


def _cell(
    lm: LM, behavior: Behavior, w: WeightDiff | None, alpha: float, n_heldout: int | None, cache: Path
) -> list[tuple[str, str, float, float]]:
    """Half, claim, margin and pmass of each statement asked, from the cache where it is kept."""
    asked = [(half, claim) for half, claims in halves(behavior, n_heldout).items() for claim in claims]
    texts = [behavior.probe_text(claim) for _, claim in asked]
    ratio, mass = kept_answers(lm, behavior, texts, w, alpha, cache).tolist()
    return [(*one, r if one[0] == "yes" else -r, m) for one, r, m in zip(asked, ratio, mass, strict=True)]


def _by_half(rows: pl.DataFrame, w: str, statements: str, alpha: float, column: str = "margin") -> Halves:
    """One cell's values, by half."""
    part = rows.filter((pl.col("w") == w) & (pl.col("statements") == statements) & (pl.col("alpha") == alpha))
    found = {}
    for half in HALVES:
        one = part.filter(set=half).pivot("seed", index="claim", values=column, maintain_order=True)
        found[half] = one.drop("claim").to_numpy().T.astype(float)
    return found


def spread(values: Halves, weights: Mapping[str, float]) -> tuple[float, list[Part]]:
    """`sum_h weight_h mean(values_h)` and its standard errors: over seeds (where there are several) and over the statements
    of each half."""
    mean = float(sum(weights[h] * values[h].mean() for h in weights))
    seeds = sum(weights[h] * values[h].mean(axis=1) for h in weights)
    parts = [mean_part(seeds[:, None])] if len(seeds) > 1 else []
    return mean, parts + [mean_part((weights[h] * values[h].mean(axis=0))[:, None]) for h in weights if weights[h]]


def interval(mean: float, parts: list[Part]) -> tuple[float, float, float]:
    """Mean, lower and upper end of the 95 % interval."""
    half = float(half_width(parts)[0])
    return mean, mean - half, mean + half


SETS = {"yes": {"yes": 1.0}, "no": {"no": 1.0}, BOTH: {"yes": 0.5, "no": 0.5}}
PARTS = {"behaviour": SETS[BOTH], "bias": {"yes": 0.5, "no": -0.5}, "yes": SETS["yes"], "no": SETS["no"]}


def matrix_of(rows: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """Per w, statements, alpha and set: margin and accuracy with 95 % intervals (lo, hi), mean pmass, seeds, statements."""
    found = []
    cells = rows.select("w", "statements", "alpha").unique(maintain_order=True).rows()
    order = {name: i for i, name in enumerate([BASE, *names])}
    for w, asked, alpha in sorted(cells, key=lambda one: (order[one[0]], order[one[1]], one[2])):
        margin, mass = (_by_half(rows, w, asked, alpha, column) for column in ("margin", "pmass"))
        right = {half: (values > 0).astype(float) for half, values in margin.items()}
        for name, weights in SETS.items():
            accuracy, low, high = interval(*spread(right, weights))
            found.append((
                w, asked, alpha, name, *interval(*spread(margin, weights)), accuracy, max(low, 0.0), min(high, 1.0),
                spread(mass, weights)[0], len(margin["yes"]), sum(margin[h].shape[1] for h in weights),
            ))  # fmt: skip
    columns = "w statements alpha set margin margin_lo margin_hi accuracy accuracy_lo accuracy_hi pmass seeds n".split()
    return pl.DataFrame(found, columns, orient="row")


def moves_of(rows: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """Per w and statements what moves between the lowest and the highest alpha, nats, with 95 % intervals: behaviour part,
    bias part, both halves, and `less`, by how much the behaviour part is under that on the w's own statements (NaN there);
    least_pmass of both halves at these alphas."""
    low, high = rows["alpha"].min(), rows["alpha"].max()
    found = []
    for w in names:
        ends = {asked: [_by_half(rows, w, asked, alpha) for alpha in (low, high)] for asked in names}
        moved = {asked: {half: b[half] - a[half] for half in HALVES} for asked, (a, b) in ends.items()}
        for asked in names:
            row = {"w": w, "statements": asked, "own": w == asked}
            for name, weights in PARTS.items():
                row |= dict(
                    zip((name, f"{name}_lo", f"{name}_hi"), interval(*spread(moved[asked], weights)), strict=True)
                )
            four = {
                f"{side} {half}": moved[one][half] for side, one in (("own", w), ("other", asked)) for half in HALVES
            }
            less = {key: 0.5 if key.startswith("own") else -0.5 for key in four}
            ends_of = interval(*spread(four, less)) if w != asked else (float("nan"),) * 3
            row |= dict(zip(("less", "less_lo", "less_hi"), ends_of, strict=True))
            here = rows.filter(
                (pl.col("w") == w) & (pl.col("statements") == asked) & pl.col("alpha").is_in([low, high])
            )
            found.append(
                row | {"least_pmass": here.group_by("alpha", "set").agg(pl.col("pmass").mean())["pmass"].min()}
            )
    return pl.DataFrame(found)


def cosines_of(found: Mapping[str, Mapping[int, WeightDiff]]) -> pl.DataFrame:
    """The cosine of every two weight differences over all parameters: w, seed, other, other_seed, cos."""
    every = [(name, seed, w) for name, by_seed in found.items() for seed, w in by_seed.items()]
    size = {(name, seed): dot(w, w) ** 0.5 for name, seed, w in every}
    rows = []
    for i, (name, seed, w) in enumerate(every):
        for other, other_seed, u in every[i + 1 :]:
            norm = size[name, seed] * size[other, other_seed]
            rows.append((name, seed, other, other_seed, dot(w, u) / norm if norm else float("nan")))
    schema = {"w": pl.String, "seed": pl.Int64, "other": pl.String, "other_seed": pl.Int64, "cos": pl.Float64}
    return pl.DataFrame(rows, schema, orient="row")
