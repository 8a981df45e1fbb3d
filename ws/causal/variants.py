"""w restricted to subspaces of the residual stream, on what writes to it. (docs/method.md section 8)

`w_res` holds the writers (`o_proj`, `down_proj`) of w; with `P = B_l B_l^T` per layer `keep = P w_res`, `drop = (I - P)
w_res`, `full_drop = w - P w_res`. Where a block norms its output, with gain D, and bases are of what leaves that norm, `keep`
is `D^-1 P D w_res`. Bases that read are put on the right of what reads the stream (q, k, v, gate, up): `w_read P`."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ws.diff import WeightDiff
from ws.diff.algebra import WRITERS, project
from ws.diff.core import Entry, LowRank, layer_of
from ws.model.decoder import Decoder
from ws.subspaces.grams import output_gain

READERS = (".q_proj.weight", ".k_proj.weight", ".v_proj.weight", ".gate_proj.weight", ".up_proj.weight")
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
    if not isinstance(bases, Mapping):
        raise ValueError(f"{name}: a {type(bases).__name__}; expected a dict, layer -> orthonormal ({d}, rank)")
    found = {}
    for l in writers(w).layers():
        if l not in bases:
            raise ValueError(
                f"{name}: no basis for layer {l}, where w has a writer; give one, of rank 0 if it is empty"
            )
        if not isinstance(bases[l], Tensor) or bases[l].is_complex() or bases[l].layout != torch.strided:
            raise ValueError(
                f"{name} at layer {l}: a {type(bases[l]).__name__}; expected a real, dense torch tensor ({d}, rank)"
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


def readers(w: WeightDiff) -> WeightDiff:
    """What of w reads the residual stream. ValueError where it has none."""
    found = w.select(lambda name: name.endswith(READERS))
    if not len(found):
        raise ValueError("w changes none of q, k, v, gate, up: nothing of it reads the residual stream; train these")
    return found


def keep_read(w: WeightDiff, bases: Bases, gains: Gains | None = None) -> WeightDiff:
    """`w_read P`, on what a module is given; with the gain g of the norm before it `w diag(g) P diag(g)^-1`, for bases of
    what enters that norm. ValueError naming a parameter of a layer without a basis."""

    def change(name: str, entry: Entry) -> Entry:
        if (B := bases.get(layer_of(name))) is None:
            raise ValueError(f"{name}: no basis for layer {layer_of(name)}")
        g = (gains or {}).get(name)
        right = (entry.A if isinstance(entry, LowRank) else entry).float()
        B = B.to(right.device, torch.float32)
        right = (right if g is None else right * g) @ B @ B.T
        right = right if g is None else right / g
        return LowRank(entry.B.float(), right) if isinstance(entry, LowRank) else right

    return readers(w).map(change)


def drop_read(w: WeightDiff, bases: Bases, gains: Gains | None = None) -> WeightDiff:
    """`w_read (I - P)`: what `keep_read` leaves."""
    kept = keep_read(w, bases, gains)
    return readers(w).map(
        lambda name, entry: (
            LowRank(entry.B.float(), entry.A.float() - kept.entries[name].A)
            if isinstance(entry, LowRank)
            else entry.float() - kept.entries[name]
        )
    )


def input_gains(decoder: Decoder, w: WeightDiff) -> dict[str, Float[Tensor, " d"]]:
    """Per reader of w, the gain of the norm before it. ValueError for a gain that holds a zero."""
    found = {}
    for l in w.layers():
        for role in ("q", "k", "v", "gate", "up"):
            if (name := decoder.param_name(l, role)) in w:
                found[name] = decoder.norm_gain(l, "attn_in" if role in "qkv" else "mlp_in")
                if not bool((found[name] != 0).all()):
                    raise ValueError(f"{name}: the norm before it has a gain of 0, `w D P D^-1` is undefined")
    return found
