"""Ways to steer a model, at equal cost: what each does to the behaviour, to what it should leave alone, and to plain text.

Every method with a strength is taken where the q-quantile of KL(steered || base) per token meets each target
(`ws.calibrate`), and asked the same items with the same score. (docs/method.md section 8)"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from torch import Tensor

from ws.cache.files import write_json, write_text
from ws.cache.names import cache_folder
from ws.data import Behavior, load_behavior
from ws.diff import WeightDiff, load_diff
from ws.gradient.capture import chosen
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.show.bars import tqdm
from ws.show.figures import save
from ws.show.tables import Told, write_table
from ws.steer.answers import check_words
from ws.steer.calibrate import ALONG, QUANTILE
from ws.steer.weights import check_fits
from ws.train.pairs import make_pairs
from ws.train.record import own_pairs
from ws.use.benchmark_figures import effects_figure
from ws.use.benchmark_words import conclusion, headline
from ws.use.items import FULL, QUICK, Group, Size, groups
from ws.use.methods import Method, methods
from ws.use.outcome import Task, measured
from ws.use.surgery import costs, moved, movers, scores

PERSONA, AS_IT_IS = "persona", "as it is"
TARGETS = (0.1, 0.5, PERSONA)
SHOWN = (
    "effect effect_low effect_high effect_yes effect_no control surgical surgical_low surgical_high surgical_most wrong_way"
).split()


@dataclass(frozen=True, eq=False, repr=False)
class Benchmark(Told):
    """about: model, behaviour, how KL was matched, what was asked. table: one row per dose and method on the behaviour's own
    held-out items: alpha, the KL reached (`kl`, along its own text `said_kl`), the numbers of `ws.use.surgery`, off_target
    (mean over other behaviours of |effect| on their statements) and off_bias (of what yes and no have against each other
    there), and the costs; a target that a method cannot meet has NaN and says why in `refused`. sets: the same numbers for
    every set of items. curves: what the calibrations tried. methods: what each is. left_out: what could not be had, and why.
    by_item: `u (L_+ - L_-)` of the own items that the behaviour is about, nats, per dose, method and item; wanted: u, 1 for
    yes."""

    about: dict[str, object]
    table: pl.DataFrame
    sets: pl.DataFrame
    curves: pl.DataFrame
    methods: dict[str, str]
    left_out: dict[str, str]
    by_item: pl.DataFrame

    def text(self) -> str:
        """What it shows, in computed words (Markdown)."""
        return conclusion(self.about, self.table, self.by_item, self.methods, self.left_out)

    def headline(self) -> str:
        """What moves the behaviour most at the first target, in a sentence or two."""
        return headline(self.about, self.table, self.by_item)

    def figure(self) -> Figure:
        """Effect and surgical informedness of every method at every dose."""
        return effects_figure(self.table)

    def save(self, folder: Path | str) -> Path:
        """Write `benchmark*` into `folder`, each file whole. Returns the folder."""
        folder = Path(folder)
        for name in ("table", "sets", "curves", "by_item"):
            write_table(getattr(self, name), folder / f"benchmark_{name}.tsv")
        write_text(folder / "benchmark.md", self.text())
        write_json(folder / "benchmark.json", {"about": self.about, "methods": self.methods, "left_out": self.left_out})
        save(self.figure(), folder / "benchmark")
        return folder


def benchmark(
    lm: LM,
    behavior: Behavior | Path | str,
    w: WeightDiff | Path | str,
    *,
    adapters: Path | tuple[Path, Path] | None = None,
    gradient: WeightDiff | Sequence | None = None,
    best: tuple[str, Mapping[int, Tensor]] | None = None,
    fold_gain: bool = True,
    more: Mapping[str, WeightDiff] | None = None,
    statements: Sequence[Path] = (),
    truth: Sequence[Path] = (),
    targets: Sequence[float | int | str] = TARGETS,
    along: str = "texts",
    q: float = QUANTILE,
    size: Size | str = FULL,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = True,
) -> Benchmark:
    """All methods of `ws.use.methods` at all targets. adapters: the folder with `pos` and `neg`, or both folders. gradient: D
    of the training pairs or the pairs. best: a candidate and its bases; fold_gain: whether its protocol folds the gain of a
    norm on what a block writes. more: further weight differences, by name. statements: files of other behaviours; truth: CSV
    files. targets: nats per token, and `persona`, what the persona prompt moves the model by. along, q: as in `ws.calibrate`.
    size: how much is asked (`ws.use.items.Size`), or `quick`. seed: of the random direction. cache: where each method and
    target is kept once it is measured, so that a killed benchmark goes on (default: the model's). The model is the same
    before and after. ValueError before anything is measured for what does not fit or is unknown."""
    behavior = behavior if isinstance(behavior, Behavior) else load_behavior(behavior)
    w, cache, size = load_diff(w), cache or cache_folder(lm.name), QUICK if size == "quick" else size
    if not isinstance(size, Size):
        raise ValueError(f"size {size!r}: quick, or a ws.use.items.Size")
    doses = _doses(targets, along, behavior)
    check_plain(lm.model)
    check_fits(lm.model, w)
    check_words(lm, behavior)
    sides = (Path(adapters) / "pos", Path(adapters) / "neg") if isinstance(adapters, (str, Path)) else adapters
    asked = groups(behavior, size, statements, truth)
    task = Task(lm, behavior, asked, size, along, q)
    least = min([t for t in doses if t != PERSONA], default=0.1)
    every, left = methods(
        lm, behavior, w, adapters=sides, gradient=gradient, best=best, fold_gain=fold_gain, more=more,
        personas=size.personas, layers=size.layers,
        target=least, seed=seed, cache=cache,
    )  # fmt: skip

    fixed = {m.name: measured(task, m, None, cache) for m in every if not m.free}
    kl = {dose: dose for dose in doses}
    if PERSONA in kl:
        kl[PERSONA] = costs(fixed["persona prompt"], fixed["nothing"])["kl" if along == "texts" else "said_kl"]
    records = [(AS_IT_IS, float("nan"), m, fixed[m.name]) for m in every if not m.free]
    cells = [(dose, m) for dose in doses for m in every if m.free]
    with tqdm(cells, "methods at equal KL", disable=not progress) as bar:
        for dose, m in bar:
            bar.set_postfix_str(f"{m.name} at {dose}")
            records.append((f"{dose}", kl[dose], m, measured(task, m, kl[dose], cache)))
    about = {
        "model": lm.name,
        "behavior": behavior.name,
        "q": q,
        "along": along,
        "targets": {f"{d}": kl[d] for d in doses},
    }
    about |= {"size": asdict(size), "sets": [g.name for g in asked], "seed": seed}
    return _gathered(about, asked, records, fixed["nothing"], {m.name: m.what for m in every}, left)


def trained_pairs(lm: LM, behavior: Behavior, w: WeightDiff, cache: Path | None = None) -> Sequence | None:
    """The pairs that w was trained on, a seeded draw of them; None where its metadata do not say which."""
    config = own_pairs(w.meta)
    return chosen(make_pairs(lm, behavior, config, cache or cache_folder(lm.name)).rows) if config else None


def _doses(targets: Sequence[float | int | str], along: str, behavior: Behavior) -> list[float | str]:
    if along not in ALONG:
        raise ValueError(f"along {along!r} is unknown; one of {', '.join(ALONG)}")
    targets = [float(t) if isinstance(t, str) and _number(t) else t for t in targets]
    for t in targets:
        if t != PERSONA and not (isinstance(t, (int, float)) and 0 < t < math.inf):
            raise ValueError(f"target {t!r}: a KL in nats above 0, or {PERSONA}")
    if not targets:
        raise ValueError("targets: is empty; give a KL in nats")
    each = dict.fromkeys(t if t == PERSONA else float(t) for t in targets)
    return [t for t in each if t != PERSONA or behavior.personas_pos]


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _gathered(
    about: dict,
    asked: Sequence[Group],
    records: Sequence[tuple[str, float, Method, dict]],
    before: dict,
    what: dict,
    left: dict,
) -> Benchmark:
    """The tables, from what was measured."""
    own, nan = asked[0], float("nan")
    rows, sets, curves, items = [], [], [], []
    for dose, target, method, record in records:
        key = {"dose": dose, "target": target, "method": method.name}
        if "refused" in record:
            rows.append(key | {"refused": record["refused"]})
            continue
        by_set = {g.name: scores(g, record, before) for g in asked}
        sets += [key | {"set": g.name, "role": g.role} | by_set[g.name] for g in asked]
        curves += [key | dict(zip(CURVE, row, strict=True)) for row in record["curve"] or []]
        mine, others = by_set[own.name], [by_set[g.name] for g in asked if g.role == "other"]
        facts = next(by_set[g.name] for g in asked if g.role == "fact")
        row = key | {"alpha": nan if record["alpha"] is None else record["alpha"]} | costs(record, before)
        row |= {name: mine[name] for name in (*SHOWN, "n", "n_control")}
        row |= {"pmass": min(mine["pmass_plus"], mine["pmass_minus"])}
        row |= {"off_target": _mean([abs(s["effect"]) for s in others])}
        row |= {"off_bias": _mean([abs(s["effect_yes"] - s["effect_no"]) / 2 for s in others])}
        worst = min(facts["accuracy_plus"], facts["accuracy_minus"])
        rows.append(row | {"facts": worst, "facts_before": facts["before_plus"], "refused": ""})
        free = movers(own)
        each = zip(np.array(own.plus)[free].tolist(), moved(own, record)[free].tolist(), strict=True)
        items += [key | {"item": i, "wanted": u, "moved": value} for i, (u, value) in enumerate(each)]
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "refused")) + ["refused"]
    types = {"dose": pl.String, "method": pl.String, "refused": pl.String}
    schema = {name: types.get(name, pl.Float64) for name in columns}
    table = pl.DataFrame([{name: row.get(name) for name in columns} for row in rows], schema)
    table = table.with_columns(pl.col(pl.Float64).fill_null(nan))
    curve = {"dose": pl.String, "target": pl.Float64, "method": pl.String} | dict.fromkeys(CURVE, pl.Float64)
    found = pl.DataFrame(sets, infer_schema_length=None), pl.DataFrame(curves, curve, strict=False)
    return Benchmark(about, table, *found, what, left, pl.DataFrame(items, infer_schema_length=None))


CURVE = ("alpha", "plus", "minus", "positions_plus", "positions_minus")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
