"""Where w acts at all, before any subspace: w restricted to modules and layers, read subspaces, doses, one KL.
(docs/method.md section 8)"""

from collections.abc import Mapping

import polars as pl
from torch import Tensor

from ws.causal.ground import Ground
from ws.causal.variants import READERS, drop_read, input_gains, keep_read, readers
from ws.diff import WeightDiff
from ws.diff.algebra import random_as
from ws.diff.core import layer_of
from ws.model.decoder import ROLES
from ws.steer.calibrate import met, probe_rows
from ws.steer.kl import Unreached, as_steering, token_kls
from ws.steer.neutral import passage_rows

DOSES = (0.25, 0.5, 1.0)
RANDOM = "mag_only"  # a random direction of w_res's norms
MATCHED = ("alpha", "kl", "effect", "effect_low", "effect_high", "retention")
BLOCKS = 8  # of layers at most, each alone and left out
GAINED = "_gain"  # how candidates end whose bases are of what enters a norm


def share(part: WeightDiff, w: WeightDiff) -> float:
    """`|part|^2 / |w|^2`."""
    return part.total_norm() ** 2 / w.total_norm() ** 2


def where_parts(w: WeightDiff) -> dict[str, WeightDiff]:
    """w restricted to each role, to what writes and what reads, to each layer, and to all but each layer; of many layers to
    blocks of neighbours."""
    ends = {role: f".{path.rpartition('.')[2]}.weight" for role, path in ROLES.items()}
    groups = {"writers": (ends["o"], ends["down"]), "readers": READERS, **{role: (end,) for role, end in ends.items()}}
    found = {"w": w} | {name: w.select(lambda n, e=end: n.endswith(e)) for name, end in groups.items()}
    layers = w.layers()
    few = -(-len(layers) // BLOCKS)
    for some in (layers[i : i + few] for i in range(0, len(layers), few)):
        named = f"layer {some[0]}" if len(some) == 1 else f"layers {some[0]}-{some[-1]}"
        found[named] = w.select(lambda n, some=some: layer_of(n) in some)
        found[f"all but {named}"] = w.select(lambda n, some=some: layer_of(n) not in some)
    return {name: part for name, part in found.items() if len(part)}


def where_table(ground: Ground, whole: bool = True) -> pl.DataFrame:
    """One row per part of w: part, share of `|w|^2`, effect with its 95 % t interval over claims, retention (of w's effect),
    kl, pmass, saturated. whole: False for w, what writes and what reads alone."""
    parts = where_parts(ground.w)
    parts = parts if whole else {name: of for name, of in parts.items() if name in ("w", "writers", "readers")}
    moved = ground.passes(parts, label="where w acts")
    rows, most = [], float(moved["w"].effect.mean())
    for name, one in moved.items():
        row = {"part": name, "share": share(parts[name], ground.w), **one.spread()}
        row["retention"] = row["effect"] / most if most else float("nan")
        rows.append(row | {"kl": one.mean_kl, "pmass": one.least_pmass, "saturated": one.saturated})
    return pl.DataFrame(rows)


READ = ("subspace", "rank", "share", "effect", "effect_low", "effect_high", "retention", "drop", "full_drop")


def read_table(ground: Ground, bases: Mapping[str, Mapping[int, Tensor]], drops: int | None = None) -> pl.DataFrame:
    """Read candidates, on what reads the stream, one row each: READ. share: of `|w_read|^2`; effect: of `w_read P` with its
    interval, nats; retention: of w_read's effect; drop: `w_read (I - P)`; full_drop: all of w but `w_read P`, both for the
    `drops` largest effects, None for all. Names that end in `_gain` are put before the norm, the others after it.
    Energy-matched controls are of what writes; here there are none. Empty where w reads nothing."""
    w, schema = ground.w, {name: pl.String if name == "subspace" else pl.Float64 for name in READ}
    if not bases or not any(name.endswith(READERS) for name in w):
        return pl.DataFrame(schema=schema)
    whole, gains = readers(w), input_gains(ground.lm.decoder, w)
    side = {name: gains if name.endswith(GAINED) else None for name in bases}
    kept = {"w_read": whole} | {name: keep_read(w, of, side[name]) for name, of in bases.items()}
    moved = ground.passes(kept, label="keep, read")
    led = sorted(bases, key=lambda name: -moved[name].effect.mean())[:drops]
    left = {name: drop_read(w, bases[name], side[name]) for name in led}
    without = {name: WeightDiff({**w.entries, **of.entries}, w.meta) for name, of in left.items()}
    lost = {
        "drop": ground.passes(left, label="drop, read"),
        "full_drop": ground.passes(without, label="full_drop, read"),
    }
    base, rows = float(moved["w_read"].effect.mean()), []
    for name, one in moved.items():
        row = {"subspace": name, **one.spread(), "share": share(kept[name], whole)}
        row |= {column: float(of[name].effect.mean()) for column, of in lost.items() if name in of}
        row["rank"] = sum(B.shape[1] for B in bases[name].values()) / len(bases[name]) if name in bases else None
        rows.append(row | {"retention": row["effect"] / base if base else None})
    rows = [{name: row.get(name) for name in READ} for row in rows]
    return pl.DataFrame(rows, schema=schema).with_columns(pl.col(pl.Float64).fill_null(float("nan")))


def dose_table(ground: Ground, kept: Mapping[str, WeightDiff]) -> pl.DataFrame:
    """Effect of w, w_res and some candidates at a quarter, a half and all of alpha: subspace, dose, effect with its interval,
    plus and minus (what either end moves the score by), kl, saturated. An effect that adds up grows with the dose. kept:
    their variants."""
    variants, rows = {"w": ground.w, "w_res": ground.res, **kept}, []
    for dose in DOSES:
        for name, one in ground.passes(variants, dose, f"dose {dose:g}").items():
            plus, minus = one.ends
            row = {"subspace": name, "dose": dose, **one.spread(), "plus": plus, "minus": minus}
            rows.append(row | {"kl": one.mean_kl, "saturated": one.saturated})
    return pl.DataFrame(rows)


def matched_table(
    ground: Ground, kept: Mapping[str, WeightDiff], target: float, alpha: float = 1.0, seed: int = 0
) -> pl.DataFrame:
    """The same variants, and a random direction of w_res's norms (RANDOM), where each moves the model by as much: at the alpha
    at which the 95 % quantile of KL(steered || base) over the texts of `ws.calibrate` is `target` nats, at the end that moves
    it more. subspace, MATCHED, saturated, why; retention: of w_res at its own alpha; NaN, and why, where no alpha is found.
    alpha: that ground's w is scaled by. Intervals are over claims, at the alpha found: other texts give another alpha."""
    lm, rows = ground.lm, []
    measure = token_kls(lm, probe_rows(lm, ground.behavior) + passage_rows(lm)[0])
    for name, w in {"w": ground.w, "w_res": ground.res, **kept, RANDOM: random_as(ground.res, seed)}.items():
        row = {"subspace": name, **dict.fromkeys(MATCHED, float("nan")), "saturated": None, "why": ""}
        try:
            found = met(measure, as_steering(lm, w), target)
            one = ground.passes({name: w}, found.alpha, f"{name} at {target:g} nats")[name]
            row |= {"alpha": found.alpha * alpha, "kl": found.kl, "saturated": one.saturated, **one.spread()}
        except Unreached as error:
            row["why"] = str(error)
        rows.append(row)
    whole = rows[1]["effect"]
    return pl.DataFrame([row | {"retention": row["effect"] / whole if whole else float("nan")} for row in rows])
