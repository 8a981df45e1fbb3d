"""Where w acts at all, before any subspace: w restricted to modules and layers, read subspaces, doses. (docs/method.md section 8)"""

from collections.abc import Mapping

import polars as pl
from torch import Tensor

from ws.causal.ground import Ground
from ws.causal.retention import spread
from ws.causal.variants import READERS, drop_read, input_gains, keep_read, readers
from ws.diff import WeightDiff
from ws.diff.core import layer_of
from ws.model.decoder import ROLES

DOSES = (0.25, 0.5, 1.0)
GAINED = "_gain"  # how candidates end whose bases are of what enters a norm


def share(part: WeightDiff, w: WeightDiff) -> float:
    """`|part|^2 / |w|^2`."""
    return part.total_norm() ** 2 / w.total_norm() ** 2


def where_parts(w: WeightDiff) -> dict[str, WeightDiff]:
    """w restricted to each role, to what writes and what reads, to each layer, and to all but each layer."""
    ends = {role: f".{path.rpartition('.')[2]}.weight" for role, path in ROLES.items()}
    groups = {"writers": (ends["o"], ends["down"]), "readers": READERS, **{role: (end,) for role, end in ends.items()}}
    found = {"w": w} | {name: w.select(lambda n, e=end: n.endswith(e)) for name, end in groups.items()}
    for l in w.layers():
        found[f"layer {l}"] = w.select(lambda n, l=l: layer_of(n) == l)
        found[f"all but layer {l}"] = w.select(lambda n, l=l: layer_of(n) != l)
    return {name: part for name, part in found.items() if len(part)}


def where_table(ground: Ground) -> pl.DataFrame:
    """One row per part of w: part, share of `|w|^2`, effect with its 95 % t interval over claims, retention (of w's effect), kl,
    pmass, saturated."""
    parts = where_parts(ground.w)
    moved = ground.passes(parts, label="where w acts")
    rows, whole = [], float(moved["w"].effect.mean())
    for name, one in moved.items():
        row = {"part": name, "share": share(parts[name], ground.w), **spread(one.effect, "effect")}
        row["retention"] = row["effect"] / whole if whole else float("nan")
        rows.append(row | {"kl": one.mean_kl, "pmass": one.least_pmass, "saturated": one.saturated})
    return pl.DataFrame(rows)


def read_table(ground: Ground, bases: Mapping[str, Mapping[int, Tensor]]) -> pl.DataFrame:
    """Read candidates, on what reads the stream: subspace, rank, share of `|w_read|^2`, effect of `w_read P` with its interval, drop,
    full_drop (all of w but `w_read P`), retention of w_read's effect. Names that end in `_gain` are put before the norm, the others
    after it. Energy-matched controls are of what writes; here there are none. Empty where w reads nothing."""
    w = ground.w
    names = {"subspace": pl.String, **dict.fromkeys("rank share effect effect_low effect_high drop full_drop retention".split(), pl.Float64)}
    if not bases or not any(name.endswith(READERS) for name in w):
        return pl.DataFrame(schema=names)
    whole, gains = readers(w), input_gains(ground.lm.decoder, w)
    kept = {"w_read": whole}
    left, without = {}, {}
    for name, of in bases.items():
        g = gains if name.endswith(GAINED) else None
        kept[name], left[name] = keep_read(w, of, g), drop_read(w, of, g)
        without[name] = WeightDiff({**w.entries, **left[name].entries}, w.meta)
    moved = ground.passes(kept, label="keep, read")
    drops = ground.passes(left, label="drop, read"), ground.passes(without, label="full_drop, read")
    base, rows = float(moved["w_read"].effect.mean()), []
    for name, one in moved.items():
        row = {"subspace": name, **spread(one.effect, "effect"), "share": share(kept[name], whole)}
        row["retention"] = row["effect"] / base if base else float("nan")
        for column, of in zip(("drop", "full_drop"), drops, strict=True):
            row[column] = float(of[name].effect.mean()) if name in of else float("nan")
        row["rank"] = sum(B.shape[1] for B in bases[name].values()) / len(bases[name]) if name in bases else float("nan")
        rows.append(row)
    return pl.DataFrame(rows).select(*names)


def dose_table(ground: Ground, bases: Mapping[str, Mapping[int, Tensor]], keep_of) -> pl.DataFrame:
    """Effect of w, w_res and some candidates at a quarter, a half and all of alpha: subspace, dose, effect with its interval, plus and
    minus (what either end moves the score by), kl, saturated. An effect that adds up grows with the dose. keep_of: what makes a
    variant of bases."""
    variants, rows = {"w": ground.w, "w_res": ground.res} | {n: keep_of(of) for n, of in bases.items()}, []
    for dose in DOSES:
        for name, one in ground.passes(variants, dose, f"dose {dose:g}").items():
            plus, minus = one.ends
            row = {"subspace": name, "dose": dose, **spread(one.effect, "effect"), "plus": plus, "minus": minus}
            rows.append(row | {"kl": one.mean_kl, "saturated": one.saturated})
    return pl.DataFrame(rows)
