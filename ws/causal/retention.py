"""Does a subspace carry the effect, and more of it than its energy explains? (docs/method.md section 8)

`retention = effect(P w_res) / effect(w_res)`, effects by forward passes between -alpha and +alpha, nats, on held-out claims.
The *excess* of a candidate is its first-order effect minus the mean first-order effect of its energy-matched controls
(`ws.causal.controls`), and p the share of joint draws with at least its effect, `(1 + k) / (1 + n)`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float
from torch import Tensor

from ws.causal.controls import Drawn, draw
from ws.causal.ground import Ground, check_count, prepare
from ws.causal.passes import spread
from ws.causal.spans import ENERGIES, Place, Span
from ws.causal.variants import Bases, drop, full_drop, keep
from ws.data import Behavior
from ws.diff import WeightDiff
from ws.model.lm import LM
from ws.stability.significance import benjamini_hochberg
from ws.steer.effect import LEVEL
from ws.subspaces.protocol import Protocol

TIE = 1e-5  # of an effect: controls that differ by rounding reach it
WHOLE = ("w", "w_res")  # rows that are no candidates
TIED = 0.9  # of the score's own slope: what holds that much keeps the effect whatever w is
TOLD = 0.1  # of the effect of w_res, from which on true claims are asked as well
LESS = 10  # times fewer draws at equal Frobenius energy, which is the sensitivity analysis
SENSITIVITY = ("excess", "p", "out_of_reach")
COLUMNS = (
    "subspace", "rank", "slope", "effect", "effect_low", "effect_high", "retention", "energy", "energy_frobenius", "linear",
    "gap", "control", "control_low", "control_high", "excess", "p", "out_of_reach",
    *(f"{name}_frobenius" for name in SENSITIVITY), "sure", "excess_low", "excess_high", "p_max", "q",
    "drop", "keep_plus_drop", "full_drop", "kl", "pmass", "contrast", "plus", "minus", "saturated",
)  # fmt: skip
TYPES = {"subspace": pl.String, "sure": pl.Boolean, "saturated": pl.Boolean}


@dataclass(frozen=True, eq=False)
class Carried:
    """table: COLUMNS, one row for w, for w_res and for each candidate; excess: `(C, claims)` first-order excess on every
    held-out claim, nats; drawn: the joint controls; linear: `(C,)`; names: of the candidates."""

    table: pl.DataFrame
    names: tuple[str, ...]
    linear: Float[np.ndarray, " C"]
    excess: Float[np.ndarray, "C claims"]
    drawn: Drawn | None


def retention(
    lm: LM,
    w: WeightDiff | Path | str,
    candidates: Mapping[str, Mapping[int, Tensor]],
    behavior: Behavior | Path | str = "sycophancy",
    *,
    protocol: Protocol | str = "v7b",
    alpha: float = 1.0,
    templates: int = 4,
    n_draws: int = 10_000,
    seed: int = 0,
    given: Mapping[Place, Tensor] | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> pl.DataFrame:
    """One row for w, for its residual writers w_res, and for each candidate, layer -> orthonormal `(d, r)` for every layer
    that w has a writer in (rank 0 where there is none).

    slope: the share of the slope's energy `|g|^2` that the bases hold; where it is nearly all, the first-order effect is kept
    whatever w is, so that retention and p say nothing of w. effect, effect_low, effect_high: of `P w_res` by forward passes
    between -alpha and +alpha, nats, mean over the held-out claims and the first `templates` wordings, with its 95 % t
    interval over claims; plus, minus: what either end moves the score by; retention: effect over that of w_res; energy,
    energy_frobenius: captured share of w_res, input-weighted and not; linear: first-order effect, nats; gap: linear minus
    effect. drop: effect of `(I - P) w_res`, full_drop: of `w - P w_res`; keep_plus_drop: what the two halves of w_res have of
    its effect together, 1 where effects add up. kl: `KL(steered || base)` of the answer's first token, mean of both ends;
    pmass: at the worse end; contrast: effect minus that on true claims, of what has a tenth of the effect of w_res or more;
    saturated: beyond 12 nats or with pmass under one half, left out of verdicts. From `n_draws` controls of equal input-
    weighted energy: control, control_low, control_high (mean and 95 % range of their linear effect), excess with its 95 % t
    interval over claims, p, p_max (max-T over all candidates), q (Benjamini-Hochberg), out_of_reach (share of draws in which
    a layer's energy cannot be had: these count against the candidate in p, and not in the mean); excess_frobenius,
    p_frobenius, out_of_reach_frobenius the same at equal Frobenius energy, of a tenth of the draws. 0 draws: NaN. p speaks of
    the first-order effect: where the gap is larger than the excess, `sure` is false. given: what `ws.causal.spans.slopes`
    returned. ValueError for what does not fit, naming it.
    (docs/method.md section 8)

    Examples:
        >>> import torch, ws
        >>> lm, w = ws.load_lm("tiny"), ws.load_diff("tiny")
        >>> axes = {l: torch.eye(lm.decoder.d)[:, :8] for l in w.layers()}
        >>> found = ws.retention(lm, w, {"first axes": axes}, templates=1, n_draws=10, progress=False)
        >>> found["subspace"].to_list()
        ['w', 'w_res', 'first axes']
    """
    check_names(candidates)
    check_count("n_draws", n_draws)
    check_count("seed", seed)
    options = {"protocol": protocol, "alpha": alpha, "templates": templates, "given": given, "cache": cache}
    ground = prepare(lm, w, behavior, progress=progress, **options)
    return carried(ground, {name: ground.checked(name, of) for name, of in candidates.items()}, n_draws, seed).table


def check_names(candidates: Mapping[str, object]) -> None:
    """ValueError for what is no mapping of names to bases, and for a candidate called as a row of the table is."""
    if not isinstance(candidates, Mapping):
        raise ValueError(f"candidates: a {type(candidates).__name__}; expected a dict, name -> bases by layer")
    if taken := sorted(set(WHOLE) & set(candidates)):
        raise ValueError(f"candidate {taken[0]}: this name is a row of its own; give it another")


def carried(
    ground: Ground,
    bases: Mapping[str, Bases],
    n_draws: int,
    seed: int = 0,
    forward: int | None = None,
    drops: int | None = None,
) -> Carried:
    """The table of `retention` for checked bases. forward, drops: keep, and drop with full_drop, are run forward for so many
    candidates of the largest first-order effects (those that hold the score's own slope last), None for all; else NaN."""
    w, norms = ground.w, ground.gains
    first = {name: linear_of(ground.spans, of) for name, of in bases.items()}
    slope = {name: slope_share(ground.given, of) for name, of in bases.items()}
    order = sorted(bases, key=lambda name: (slope[name] > TIED, -first[name]["linear"]))
    run, dropped = order[:forward], order[:drops]
    kept = {"w": w, "w_res": ground.res} | {name: keep(w, bases[name], norms) for name in bases if name in run}
    moved, more = ground.passes(kept, label="keep"), {}
    least = TOLD * abs(float(moved["w_res"].effect.mean()))
    told = {name: of for name, of in kept.items() if name in WHOLE or abs(float(moved[name].effect.mean())) >= least}
    true = ground.on_true(told, label="keep, true claims") if ground.tells_apart else {}
    for what, part in (("drop", drop), ("full_drop", full_drop)):
        more[what] = ground.passes({name: part(w, bases[name], norms) for name in dropped}, label=what)
    rows = []
    for name in ("w", "w_res", *bases):
        row = {"subspace": name} | (first.get(name) or (linear_of(ground.spans, None) if name == "w_res" else {}))
        if one := moved.get(name):
            row |= {
                **one.spread(),
                "kl": one.mean_kl,
                "pmass": one.least_pmass,
                "contrast": float(one.effect.mean() - true[name].effect.mean()) if name in true else float("nan"),
            }
            row |= {"saturated": one.saturated} | dict(zip(("plus", "minus"), one.ends, strict=True))
        row |= {"slope": slope[name]} if name in bases else {}
        rows.append(row | {what: float(of[name].effect.mean()) for what, of in more.items() if name in of})
    whole, unknown = rows[1]["effect"], float("nan")
    for row in rows:
        effect = row.get("effect", unknown)
        row["retention"] = effect / whole if whole else unknown
        row["keep_plus_drop"] = (effect + row.get("drop", unknown)) / whole if whole else unknown
        row["gap"] = row.get("linear", unknown) - effect
    linear, excess, drawn = np.array([row["linear"] for row in rows[2:]]), np.zeros((len(bases), 0)), None
    if n_draws and bases:
        drawn, excess = _against_controls(ground, bases, rows[2:], linear, n_draws, seed)
    table = [{name: row.get(name) for name in COLUMNS} for row in rows]
    schema = {name: TYPES.get(name, pl.Float64) for name in COLUMNS}
    found = pl.DataFrame(table, schema=schema).with_columns(pl.col(pl.Float64).fill_null(float("nan")))
    return Carried(found, tuple(bases), linear, excess, drawn)


def _against_controls(
    ground: Ground,
    bases: Mapping[str, Bases],
    rows: list[dict],
    linear: Float[np.ndarray, " C"],
    n_draws: int,
    seed: int,
) -> tuple[Drawn, Float[np.ndarray, "C claims"]]:
    """Fill in what the controls say; the joint draws and the excess on every claim."""
    of, progress = list(bases.values()), ground.progress
    drawn = {kind: draw(ground.spans, of, n, kind, seed, progress)
             for kind, n in zip(ENERGIES, (n_draws, max(n_draws // LESS, min(n_draws, 100))), strict=True)}  # fmt: skip
    texts = ground.by_text(bases)
    excess = ground.over_claims(texts.value - texts.control(drawn["input"].share))
    for kind, one in drawn.items():
        more = "" if kind == "input" else f"_{kind}"
        for row, found in zip(rows, against(one, linear), strict=True):
            row |= {f"{name}{more}": value for name, value in found.items() if not more or name in SENSITIVITY}
    p = np.array([row["p"] for row in rows])
    p_max, q = adjusted(linear, drawn["input"].effect, p), benjamini_hochberg(p)
    for row, by_claim, most, each in zip(rows, excess, p_max, q, strict=True):
        row |= {"excess_low": float("nan"), "excess_high": float("nan")}
        if (
            np.isfinite(row["excess"]) and np.isfinite(by_claim).all()
        ):  # the mean over mirrored controls, which scatters less
            row |= spread(by_claim, "excess", ground.items.sides)
            row["control"] = row["linear"] - row["excess"]
        row |= {"p_max": float(most), "q": float(each)}
        row["sure"] = None if np.isnan(row["gap"]) else abs(row["gap"]) <= abs(row["excess"])
    return drawn["input"], excess


def adjusted(
    value: Float[np.ndarray, " C"], drawn: Float[np.ndarray, "N C"], p: Float[np.ndarray, " C"]
) -> Float[np.ndarray, " C"]:
    """max-T: the share of joint draws whose largest standardised effect over all candidates reaches the candidate's, or in
    which its own energy is out of reach; never under its own p. NaN where no draw is matched."""
    lost = np.isnan(drawn)
    some = (~lost).sum(axis=0) > 1
    mean, sd = np.full(len(value), np.nan), np.ones(len(value))
    mean[some], sd[some] = np.nanmean(drawn[:, some], axis=0), np.nanstd(drawn[:, some], axis=0)
    flat = sd <= TIE * np.abs(value)  # bases of all that there is: nothing to tell apart
    z, t = (drawn - mean) / np.where(flat, np.inf, sd), (value - mean) / np.where(flat, np.inf, sd)
    most = np.where(np.isnan(z), -np.inf, z).max(axis=1, initial=-np.inf)
    hits = (most[:, None] >= t - TIE * np.abs(t)) | lost
    return np.where(some, np.maximum((1 + hits.sum(axis=0)) / (1 + len(drawn)), p), np.nan)


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


def slope_share(given: Mapping[Place, Tensor], bases: Mapping[int, Tensor]) -> float:
    """`|P g|^2 / |g|^2` over the writers of the bases' layers."""
    there = [(bases[l].float(), g.float()) for (l, _), g in given.items() if l in bases]
    return sum(float((B.T @ g).square().sum()) for B, g in there) / sum(float(g.square().sum()) for _, g in there)


def linear_of(spans: Mapping[int, Span], bases: Mapping[int, Tensor] | None) -> dict[str, float]:
    """First-order effect and captured energy, over all layers; of all of w_res without bases."""
    if bases is None:
        slope = sum(span.slope() for span in spans.values())
        return {"linear": 2 * slope, "energy": 1.0, "energy_frobenius": 1.0, "rank": float("nan")}
    found = {"linear": 2 * sum(span.slope(bases[l]) for l, span in spans.items())}
    for kind, name in zip(ENERGIES, ("energy", "energy_frobenius"), strict=True):
        whole = sum(span.trace[kind] for span in spans.values())
        found[name] = sum(span.energy(bases[l], kind) * span.trace[kind] for l, span in spans.items()) / whole
    return found | {"rank": float(np.mean([B.shape[1] for B in bases.values()]))}
