"""Does a subspace carry the effect, and more of it than its energy explains? (docs/method.md section 8)

`retention = effect(P w_res) / effect(w_res)`, effects by forward passes between alpha -1 and +1, nats, on held-out claims. The
*excess* of a candidate is its first-order effect minus the mean first-order effect of its energy-matched controls
(`ws.causal.controls`), and p the share of joint draws with at least its effect, `(1 + k) / (1 + n)`.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from ws.cache.names import cache_folder
from ws.causal.controls import Drawn, draw
from ws.causal.spans import ENERGIES, Place, Span, probe_sets, slopes, writer_spans
from ws.causal.variants import check_bases, gains, keep, writers
from ws.data import Behavior, load_behavior
from ws.diff import WeightDiff, load_diff
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.show.bars import tqdm
from ws.steer.effect import LEVEL, effects
from ws.steer.weights import check_fits
from ws.subspaces.protocol import Protocol, load_protocol

TIE = 1e-6  # of an effect: controls that differ by rounding reach it
WHOLE = ("w", "w_res")  # rows that are no candidates


def retention(
    lm: LM,
    w: WeightDiff | Path | str,
    candidates: Mapping[str, Mapping[int, Tensor]],
    behavior: Behavior | Path | str = "sycophancy",
    *,
    protocol: Protocol | str = "v7b",
    templates: int = 4,
    n_draws: int = 10_000,
    seed: int = 0,
    given: Mapping[Place, Tensor] | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> pl.DataFrame:
    """One row for w, for its residual writers w_res, and for each candidate, layer -> orthonormal `(d, r)` for every layer that
    w has a writer in (rank 0 where there is none).

    slope: the share of the slope's energy `|g|^2` that the bases hold; where it is nearly all, the first-order effect is kept
    whatever w is, so that retention and p say nothing of w. effect, effect_low, effect_high: of `P w_res` by forward passes,
    nats, mean over the held-out claims and the first `templates` wordings, with its 95 % t interval over claims; retention:
    over that of w_res; energy, energy_frobenius: captured share of w_res, input-weighted and not; linear: first-order effect,
    nats; gap: linear minus effect. From `n_draws` controls of equal input-weighted energy: control, control_low, control_high
    (mean and 95 % range of their linear effect), excess, p, out_of_reach (share of draws in which a layer's energy cannot be
    had: these count against the candidate in p, and not in the mean); excess_frobenius, p_frobenius, out_of_reach_frobenius
    the same at equal Frobenius energy. 0 draws: NaN. p speaks of the first-order effect: where the gap is larger than the
    excess, `sure` is false. given: what `slopes` returned. ValueError for what does not fit, naming it.
    """
    behavior = behavior if isinstance(behavior, Behavior) else load_behavior(behavior)
    protocol = protocol if isinstance(protocol, Protocol) else load_protocol(protocol)
    w, cache = load_diff(w), cache or cache_folder(lm.name)
    if not 1 <= templates <= len(behavior.templates):
        raise ValueError(
            f"templates = {templates}: {behavior.name} has {len(behavior.templates)} wordings of the probe"
        )
    if taken := sorted(set(WHOLE) & set(candidates)):
        raise ValueError(f"candidate {taken[0]}: this name is a row of its own; give it another")
    check_fits(lm.model, w)
    check_plain(lm.model)
    res, norms = writers(w), gains(lm.decoder, w, protocol.fold_gain)
    bases = {name: check_bases(name, each, w, lm.decoder.d) for name, each in candidates.items()}
    given = given or slopes(lm, behavior, res.layers(), templates, cache, progress)
    spans = writer_spans(lm, w, probe_sets(lm, behavior, protocol), given, norms, progress)

    variants = {"w": w, "w_res": res} | {name: keep(w, each, norms) for name, each in bases.items()}
    rows = []
    for name, variant in tqdm(variants.items(), desc="effects by forward passes", disable=not progress):
        rows.append({"subspace": name, **_effect(effects(lm, behavior, variant, templates, cache))})
        rows[-1] |= _linear(spans, bases.get(name)) if name != "w" else {}
        rows[-1] |= {"slope": _slope(given, bases[name])} if name in bases else {}
    whole = rows[1]["effect"]
    for row in rows:
        row["retention"] = row["effect"] / whole if whole else float("nan")
        row["gap"] = row.get("linear", float("nan")) - row["effect"]
    if n_draws and bases:
        linear = np.array([row["linear"] for row in rows[2:]])
        for kind in ENERGIES:
            drawn = draw(spans, list(bases.values()), n_draws, kind, seed, progress)
            for row, found in zip(rows[2:], against(drawn, linear), strict=True):
                more = "" if kind == "input" else f"_{kind}"
                row |= {f"{name}{more}": value for name, value in found.items() if not more or name in SENSITIVITY}
                row["sure"] = abs(row["gap"]) <= abs(row["excess"])
    columns = {name: None for name in COLUMNS} | {"sure": None}
    return pl.DataFrame(
        [{**columns, **row} for row in rows], schema={n: TYPES.get(n, pl.Float64) for n in columns}
    ).with_columns(pl.col(pl.Float64).fill_null(float("nan")))


SENSITIVITY = ("excess", "p", "out_of_reach")
COLUMNS = (
    "subspace", "rank", "slope", "effect", "effect_low", "effect_high", "retention", "energy", "energy_frobenius", "linear",
    "gap", "control", "control_low", "control_high", "excess", "p", "out_of_reach",
    *(f"{name}_frobenius" for name in SENSITIVITY),
)  # fmt: skip
TYPES = {"subspace": pl.String, "sure": pl.Boolean}


def against(drawn: Drawn, linear: Float[np.ndarray, " C"]) -> list[dict[str, float]]:
    """What the controls say of each candidate's first-order effect. An unmatched draw counts as one that reaches it."""
    found, tail = [], (1 - LEVEL) / 2
    for value, column in zip(linear, drawn.effect.T, strict=True):
        had = column[~np.isnan(column)]
        low, high = np.quantile(had, [tail, 1 - tail]) if len(had) else (np.nan, np.nan)
        mean = had.mean() if len(had) else np.nan
        more = int((had >= value - TIE * abs(value)).sum()) + len(column) - len(had)
        found.append({
            "control": float(mean), "control_low": float(low), "control_high": float(high),
            "excess": float(value - mean), "p": (1 + more) / (1 + len(column)),
            "out_of_reach": 1 - len(had) / len(column),
        })  # fmt: skip
    return found


def _effect(by_claim: Float[np.ndarray, " n"]) -> dict[str, float]:
    mean, n = float(by_claim.mean()), len(by_claim)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * stats.sem(by_claim)) if n > 1 else float("nan")
    return {"effect": mean, "effect_low": mean - half, "effect_high": mean + half}


def _slope(given: Mapping[Place, Tensor], bases: Mapping[int, Tensor]) -> float:
    """`|P g|^2 / |g|^2` over the writers of the bases' layers."""
    there = [(bases[l].float(), g.float()) for (l, _), g in given.items() if l in bases]
    return sum(float((B.T @ g).square().sum()) for B, g in there) / sum(float(g.square().sum()) for _, g in there)


def _linear(spans: Mapping[int, Span], bases: Mapping[int, Tensor] | None) -> dict[str, float]:
    """First-order effect and captured energy, over all layers; of all of w_res without bases."""
    if bases is None:
        slope = sum(span.slope() for span in spans.values())
        return {"linear": 2 * slope, "energy": 1.0, "energy_frobenius": 1.0, "rank": float("nan")}
    found = {"linear": 2 * sum(span.slope(bases[l]) for l, span in spans.items())}
    for kind, name in zip(ENERGIES, ("energy", "energy_frobenius"), strict=True):
        whole = sum(span.trace[kind] for span in spans.values())
        found[name] = sum(span.energy(bases[l], kind) * span.trace[kind] for l, span in spans.items()) / whole
    return found | {"rank": float(np.mean([B.shape[1] for B in bases.values()]))}
