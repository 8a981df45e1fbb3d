"""Further controls, and the ceilings at several ranks. (docs/method.md section 8)

A direction that knows nothing of w but its sizes (`mag_only`), bases inside w's own span, the leading directions of null
diffs, the direction of the unembedding that tells yes from no, a contrast of personas of one side, a candidate's basis at
another layer. Ceilings see a weight difference: that of *another* LoRA seed, since w's own keeps what it is cut from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ws.causal.ground import Ground
from ws.causal.retention import linear_of
from ws.causal.variants import Bases, keep, rescaled, writers
from ws.diff import WeightDiff
from ws.diff.algebra import random_as
from ws.diff.core import layer_of
from ws.steer.answers import answer_tokens
from ws.subspaces.algebra import left_svd, pca
from ws.subspaces.kept import make_shelf

MAGNITUDES, IN_SPAN = 5, 10  # draws
OWN, OTHER = "w's own", "another seed's"


def left_factors(w: WeightDiff, l: int) -> list[Tensor]:
    """`U S` of each residual writer of w at a layer, each over its own norm."""
    names = [name for name in writers(w) if layer_of(name) == l]
    found = [U * s for U, s, _ in map(w.svd, names)]
    return [F / F.norm() for F in found if float(F.norm())]


def weight_bases(ground: Ground, w: WeightDiff, rank: int) -> Bases:
    """The leading `rank` left directions of a weight difference's writers, per layer of ground's w: the weight ceiling."""
    w = rescaled(writers(w), ground.gains)
    found = {}
    for l in ground.layers:
        factors = left_factors(w, l) if l in w.layers() else []
        found[l] = (
            left_svd(torch.cat(factors, dim=1), rank).B.double()
            if factors
            else torch.zeros(ground.lm.decoder.d, 0).double()
        )
    return found


def act_bases(ground: Ground, factors: Mapping[int, Tensor], rank: int) -> Bases:
    """The leading left directions of activation differences `(d, n)` per layer: the activation ceiling."""
    return {l: left_svd(factors[l].double(), rank).B.double() for l in ground.layers}


def rank_table(
    ground: Ground,
    ranks: Sequence[int],
    other: WeightDiff | None,
    act: Mapping[int, Tensor],
    act_other: Mapping[int, Tensor],
) -> pl.DataFrame:
    """Ceilings at several ranks: of (weights or activations), whose (w's own, another seed's), rank, effect with its
    interval, retention, energy, linear. act: the activation differences of the EVAL probes per layer, {} for none."""
    sources = {("weights", OWN): lambda r: weight_bases(ground, ground.w, r)}
    if other is not None:
        sources["weights", OTHER] = lambda r: weight_bases(ground, other, r)
    for whose, factors in ((OWN, act), (OTHER, act_other)):
        if factors:
            sources["activations", whose] = lambda r, factors=factors: act_bases(ground, factors, r)
    bases = {(of, whose, r): make(r) for (of, whose), make in sources.items() for r in sorted(set(ranks))}
    moved = ground.passes({str(key): keep(ground.w, of, ground.gains) for key, of in bases.items()}, label="ceilings")
    rows, whole = [], ground.effects["w_res"]
    for (of, whose, rank), each in bases.items():
        effect = moved[str((of, whose, rank))].spread()
        row = {
            "of": of,
            "whose": whose,
            "rank": rank,
            **effect,
            "retention": effect["effect"] / whole if whole else float("nan"),
        }
        rows.append(row | {k: v for k, v in linear_of(ground.spans, each).items() if k in ("energy", "linear")})
    return pl.DataFrame(rows)


def other_controls(
    ground: Ground, k: int, nulls: Sequence[WeightDiff] = (), cache: Path | None = None, seed: int = 0
) -> pl.DataFrame:
    """One row per kind of control: control, draws, rank, effect (mean of the draws), low and high (of the draws), retention,
    energy (mean). k: the rank of a basis; nulls: null diffs of this adapter."""
    d, g = ground.lm.decoder.d, torch.Generator().manual_seed(seed)
    drawn = [random_as(ground.res, seed + i) for i in range(MAGNITUDES)]
    groups: dict[str, list[tuple[Bases | None, WeightDiff]]] = {
        "random direction, w's norms (mag_only)": [(None, w) for w in drawn]
    }
    bases = {
        "random, inside w's span": [_in_span(ground, k, g) for _ in range(IN_SPAN)],
        "null diffs' leading directions": [weight_bases(ground, null, k) for null in nulls if len(writers_of(null))],
        "yes minus no of the unembedding": [dict.fromkeys(ground.layers, yes_no(ground)[:, None])],
        "two personas of one side, contrasted": same_side_personas(ground, k, cache),
    }
    groups |= {name: [(of, keep(ground.w, of, ground.gains)) for of in some] for name, some in bases.items() if some}
    variants = {f"{name}/{i}": w for name, some in groups.items() for i, (_, w) in enumerate(some)}
    moved, rows, whole = ground.passes(variants, label="further controls"), [], ground.effects["w_res"]
    for name, some in groups.items():
        effects = [float(moved[f"{name}/{i}"].effect.mean()) for i in range(len(some))]
        held = [linear_of(ground.spans, of)["energy"] for of, _ in some if of]
        rank = np.mean([B.shape[1] for B in some[0][0].values()]) if some[0][0] else d
        row = {"control": name, "draws": len(some), "rank": float(rank), "effect": float(np.mean(effects))}
        row |= {
            "low": min(effects),
            "high": max(effects),
            "retention": float(np.mean(effects)) / whole if whole else float("nan"),
        }
        rows.append(row | {"energy": float(np.mean(held)) if held else float("nan")})
    return pl.DataFrame(rows)


def writers_of(w: WeightDiff) -> WeightDiff:
    """The residual writers of w, also none."""
    try:
        return writers(w)
    except ValueError:
        return w.select(lambda _: False)


def _in_span(ground: Ground, k: int, g: torch.Generator) -> Bases:
    found = {}
    for l, span in ground.spans.items():
        q = span.U.shape[1]
        found[l] = span.U @ torch.linalg.qr(torch.randn(q, min(k, q), generator=g, dtype=torch.float64)).Q
    return found


def yes_no(ground: Ground) -> Tensor:
    """The direction `(d,)` of the unembedding that tells the yes-words from the no-words, through the final norm's gain."""
    lm = ground.lm
    yes, no = answer_tokens(lm.tokenizer, ground.behavior)
    with torch.no_grad():
        gain = (
            lm.decoder.final_norm(torch.ones(1, lm.decoder.d, device=lm.decoder.final_norm.weight.device))[0]
            .float()
            .cpu()
        )
    U = lm.decoder.unembed().cpu()
    u = ((U[yes].mean(dim=0) - U[no].mean(dim=0)) * gain).double()
    return u / u.norm()


def same_side_personas(ground: Ground, k: int, cache: Path | None = None) -> list[Bases]:
    """The PCA of what two personas of the *same* side differ by, probe by probe, both sides together: one per neighbouring
    two of the persona pairs. (A contrast whose two sides are dealt by a coin is no control: a PCA does not see the sign of a
    row.) [] with fewer than two pairs."""
    pairs = 1 if ground.protocol.persona_pairs == "1" else len(ground.behavior.personas_pos)
    if pairs < 2:
        return []
    base = make_shelf(ground.lm, ground.behavior, ground.protocol, k, cache=cache).base()
    sides = [side.resid.unflatten(1, (pairs, -1)).float() for side in (base.pos, base.neg)]
    found = []
    for a in range(pairs - 1):
        apart = torch.cat([side[:, a] - side[:, a + 1] for side in sides], dim=1)
        found.append({l: pca(apart[l], k).B.double() for l in ground.layers})
    return found


def other_layer(ground: Ground, bases: Mapping[str, Bases]) -> dict[str, float]:
    """First-order effect, nats, of each candidate with its bases of the next layer, those of the first at the last; NaN where
    the bases are the same, and where there is one layer."""
    layers = ground.layers
    if len(layers) < 2:
        return dict.fromkeys(bases, float("nan"))
    turned = dict(zip(layers, [*layers[1:], layers[0]], strict=True))
    found = {}
    for n, of in bases.items():
        same = all(of[l].shape == of[turned[l]].shape and torch.equal(of[l], of[turned[l]]) for l in layers)
        found[n] = float("nan") if same else 2 * sum(s.slope(of[turned[l]]) for l, s in ground.spans.items())
    return found
