"""What the report of a causal check opens with. (docs/method.md section 8)"""

import numpy as np
import polars as pl

from ws.causal.retention import TIED
from ws.causal.words import around, exceeds, held, unconfirmed
from ws.show.tables import code


def headline(found) -> str:
    """A `CausalCheck` in a sentence or two, for the head of its report."""
    by = {row["part"]: row for row in found.where.iter_rows(named=True)}
    said = f"`w` moves the score by {by['w']['effect']:+.2f} nats between both ends"
    if "writers" in by:
        one = by["writers"]
        share = f" ({one['retention']:.0%})" if np.isfinite(one["retention"]) and one["effect"] > 0 else ""
        said += f"; its residual writers, which candidates are cut from, do {one['effect']:+.2f} alone{share}"
    rows = held(found)
    if rows.is_empty():
        return f"{said}. No candidate was held against controls."
    if (ranked := rows.filter(~pl.col("saturated"))).is_empty():
        mass = found.setting.get("pmass", float("nan"))
        return (
            f"{said}. **No candidate is ranked**: the answer words hold less than half of the probability (pmass {mass:.2f}"
            " in the base model), or the log-ratio is beyond 12 nats."
        )
    rows = ranked.filter(pl.col("slope") <= TIED)
    if rows.is_empty():
        return f"{said}. What is ranked holds the score's own slope, so that it carries the behaviour by construction."
    sure = rows.filter(exceeds() & ~unconfirmed()).sort("excess", descending=True)
    open_ = rows.filter(pl.col("p_max").is_nan()).height
    most = [f"{code(r['subspace'])} {around(r, 'excess')}" for r in sure.head(2).iter_rows(named=True)]
    led = f", most of all {' and '.join(most)} nats (95 % over claims)" if most else ""
    tied = [code(name) for name in ranked.filter(pl.col("slope") > TIED)["subspace"]]
    out = f"; {' and '.join(tied)} left out, which hold{'s' * (len(tied) == 1)} the score's own slope" if tied else ""
    return (
        f"{said}. **{len(sure)} of {len(rows)} candidates carry more of the behaviour than subspaces of equal energy**"
        f" (max-T, p < .05{f'; {open_} undecided' if open_ else ''}{out}){led}. One seed; the report over"
        " seeds has the interval for others."
    )
