"""What is computed between weight diffs, or between a diff and subspaces of the residual stream.

`<B1 A1, B2 A2> = sum (B1^T B2) * (A1 A2^T)`; `keep = P w` and `drop = (I - P) w` with `P = B_l B_l^T` act on the
residual writers (`o_proj`, `down_proj`) from the left, and `keep + drop = w` there. (docs/method.md sections 2 and 8)
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ws.diff.core import Entry, LowRank, WeightDiff, layer_of

WRITERS = ("o_proj", "down_proj")


def combine(a: Entry, b: Entry, sign: float = 1.0) -> Entry:
    """`a + sign * b` in float32, low-rank where both are."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return LowRank(torch.cat([a.B.float(), sign * b.B.float()], 1), torch.cat([a.A.float(), b.A.float()], 0))
    first, second = (e.dense() if isinstance(e, LowRank) else e.float() for e in (a, b))
    return first + sign * second


def add(a: WeightDiff, b: WeightDiff, sign: float = 1.0) -> WeightDiff:
    """`a + sign * b` over the union of their names; low-rank where both are (ranks add). Metadata of `a`.

    Raises ValueError naming the parameter where the shapes differ.
    """
    entries = dict(a.entries)
    for name, entry in b.entries.items():
        if name not in entries:
            zero = LowRank(entry.B[:, :0], entry.A[:0]) if isinstance(entry, LowRank) else torch.zeros_like(entry)
            entries[name] = combine(zero, entry, sign)
            continue
        if a.shape(name) != b.shape(name):
            raise ValueError(f"{name}: shapes differ, {a.shape(name)} and {b.shape(name)}")
        entries[name] = combine(entries[name], entry, sign)
    return WeightDiff(entries, dict(a.meta))


def dot(a: WeightDiff, b: WeightDiff) -> float:
    """Inner product over all parameters, in float64; names that only one of them has count as zero."""
    total = 0.0
    for name in a.names:
        if name in b.entries:
            total += _entry_dot(a.entries[name], b.entries[name])
    return total


def _entry_dot(a: Entry, b: Entry) -> float:
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return float(((a.B.double().T @ b.B.double()) * (a.A.double() @ b.A.double().T)).sum())
    if isinstance(a, LowRank):
        return _entry_dot(b, a)
    if isinstance(b, LowRank):
        return float(((b.B.double().T @ a.double()) * b.A.double()).sum())
    return float((a.double() * b.double()).sum())


def is_writer(name: str, writers: tuple[str, ...] = WRITERS) -> bool:
    """Whether the parameter is the weight of a module that writes to the residual stream."""
    return any(name.endswith(f".{w}.weight") for w in writers)


def writers_only(w: WeightDiff, writers: tuple[str, ...] = WRITERS) -> WeightDiff:
    """`w_res`: the residual writers of w."""
    return w.select(lambda name: is_writer(name, writers))


def project(
    w: WeightDiff, bases: Mapping[int, Tensor], drop: bool = False, writers: tuple[str, ...] = WRITERS
) -> WeightDiff:
    """`P w` (or `(I - P) w` with `drop`) on the residual writers; every other parameter is left out.

    bases: layer -> `(d, r)` with orthonormal columns. Factors stay factors: only `B` is projected.
    Raises ValueError naming the parameter when its layer has no basis or the sizes differ. (docs/method.md section 8)
    """

    def change(name: str, entry: Entry) -> Entry:
        basis = bases.get(layer_of(name))
        if basis is None:
            raise ValueError(f"{name}: no basis for layer {layer_of(name)}")
        left = entry.B if isinstance(entry, LowRank) else entry
        if basis.ndim != 2 or basis.shape[0] != left.shape[0]:
            raise ValueError(f"{name}: basis is {tuple(basis.shape)}, the matrix has {left.shape[0]} rows")
        basis = basis.to(left.device, torch.float32)
        kept = basis @ (basis.T @ left.float())
        kept = left.float() - kept if drop else kept
        return LowRank(kept, entry.A.float()) if isinstance(entry, LowRank) else kept

    return writers_only(w, writers).map(change)


def geometry(pos: WeightDiff, neg: WeightDiff) -> dict[str, float]:
    """Diagnostics of a contrastive pair from its two task vectors `t+` and `t-` (`theta_sign - theta_base`).

    Returns norm_pos, norm_neg, norm_w; asymmetry `|t+|/|t-|`; cos_opposition `cos(t+, -t-)` (1: they are mirror
    images); drift_ratio `|(t+ + t-)/2| / |(t+ - t-)/2|` (0: nothing in common is learnt); cos_w_drift
    `|cos(w, t+ + t-)|`. NaN where a norm is zero. (docs/method.md section 2)
    """
    pp, nn_, pn = dot(pos, pos), dot(neg, neg), dot(pos, neg)
    w2, s2 = max(pp + nn_ - 2 * pn, 0.0), max(pp + nn_ + 2 * pn, 0.0)

    def ratio(a: float, b: float) -> float:
        return a / b if b > 0 else float("nan")

    return {
        "norm_pos": pp**0.5,
        "norm_neg": nn_**0.5,
        "norm_w": w2**0.5,
        "asymmetry": ratio(pp**0.5, nn_**0.5),
        "cos_opposition": ratio(-pn, (pp * nn_) ** 0.5),
        "drift_ratio": ratio(s2**0.5, w2**0.5),
        "cos_w_drift": ratio(abs(pp - nn_), (w2 * s2) ** 0.5),
    }
