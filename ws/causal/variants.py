"""w restricted to subspaces of the residual stream, on what writes to it. (docs/method.md section 8)

`w_res` holds the writers (`o_proj`, `down_proj`) of w; with `P = B_l B_l^T` per layer `keep = P w_res`, `drop = (I - P) w_res`,
`full_drop = w - P w_res`. Where a block norms its output, with gain D, and bases are of what leaves that norm, `keep` is
`D^-1 P D w_res`.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ws.diff import WeightDiff
from ws.diff.algebra import WRITERS, project
from ws.diff.core import Entry, LowRank
from ws.model.decoder import Decoder
from ws.subspaces.materials import output_gain

Gains = Mapping[str, Float[Tensor, " d"]]
Bases = Mapping[int, Float[Tensor, "d r"]]


def writers(w: WeightDiff) -> WeightDiff:
    """The residual writers of w. ValueError where it has none."""
    found = w.select(lambda name: name.endswith(WRITERS))
    if not len(found):
        raise ValueError(
            "w changes no o_proj and no down_proj: nothing of it writes to the residual stream; train these"
        )
    return found


def gains(decoder: Decoder, w: WeightDiff, fold: bool = True) -> dict[str, Float[Tensor, " d"]]:
    """Per writer of w, the gain of the norm on its output; {} where there is none, or without `fold`. ValueError for a gain
    that holds a zero."""
    found = {}
    for l in w.layers() if fold else []:
        for role in ("o", "down"):
            if (name := decoder.param_name(l, role)) in w:
                found[name] = output_gain(decoder, l, role)
                if not bool((found[name] != 0).all()):
                    raise ValueError(f"{name}: the norm on its output has a gain of 0, `D^-1 P D w` is undefined")
    return {} if all(bool((g == 1).all()) for g in found.values()) else found


def rescaled(w: WeightDiff, gains: Gains, power: int = 1) -> WeightDiff:
    """`D^power w` for the parameters that have a gain."""

    def change(name: str, entry: Entry) -> Entry:
        if name not in gains:
            return entry
        rows = gains[name].pow(power)[:, None]
        left = entry.B if isinstance(entry, LowRank) else entry
        left = rows.to(left.device) * left.float()
        return LowRank(left, entry.A.float()) if isinstance(entry, LowRank) else left

    return w.map(change)


def keep(w: WeightDiff, bases: Bases, gains: Gains | None = None) -> WeightDiff:
    """`P w_res`. bases: layer -> `(d, r)` with orthonormal columns, for every layer that w has a writer in. Errors as in
    `ws.diff.algebra.project`."""
    gains = gains or {}
    return rescaled(project(rescaled(writers(w), gains), bases), gains, -1)


def drop(w: WeightDiff, bases: Bases, gains: Gains | None = None) -> WeightDiff:
    """`(I - P) w_res`: what `keep` leaves, so that the two add up to w_res."""
    gains = gains or {}
    return rescaled(project(rescaled(writers(w), gains), bases, drop=True), gains, -1)


def full_drop(w: WeightDiff, bases: Bases, gains: Gains | None = None) -> WeightDiff:
    """`w - P w_res`: w without the candidate, all that does not write to the residual stream left in."""
    return replace(w, entries={**w.entries, **drop(w, bases, gains).entries})


def check_bases(name: str, bases: Mapping[int, Tensor], w: WeightDiff, d: int) -> dict[int, Float[Tensor, "d r"]]:
    """The bases of w's layers, float64 on the CPU. ValueError naming the candidate and the layer for one that is absent, has
    another width, is not finite or not orthonormal."""
    found = {}
    for l in writers(w).layers():
        if l not in bases:
            raise ValueError(
                f"{name}: no basis for layer {l}, where w has a writer; give one, of rank 0 if it is empty"
            )
        B = bases[l].detach().to("cpu", torch.float64)
        if B.ndim != 2 or len(B) != d:
            raise ValueError(f"{name} at layer {l}: the basis is {tuple(B.shape)}, expected ({d}, rank)")
        if not torch.isfinite(B).all() or float((B.T @ B - torch.eye(B.shape[1])).norm()) > 1e-4:
            raise ValueError(
                f"{name} at layer {l}: its columns are not orthonormal; use ws.subspaces.algebra.orthonormalize"
            )
        found[l] = B
    return found
