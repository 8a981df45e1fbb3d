"""What is computed between weight diffs, or between a diff and subspaces of the residual stream. (sections 2 and 8)

`<B1 A1, B2 A2> = sum (B1^T B2) * (A1 A2^T)`; `keep = P w` and `drop = (I - P) w` with `P = B_l B_l^T` act on the
residual writers (`o_proj`, `down_proj`) from the left, and `keep + drop = w` there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ws.diff.core import Entry, LowRank, WeightDiff, layer_of

WRITERS = (".o_proj.weight", ".down_proj.weight")  # what writes to the residual stream


def combine(a: Entry, b: Entry) -> Entry:
    """`a + b` in float32, low-rank where both are (ranks add)."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return LowRank(torch.cat([a.B.float(), b.B.float()], 1), torch.cat([a.A.float(), b.A.float()], 0))
    first, second = (e.dense() if isinstance(e, LowRank) else e.float() for e in (a, b))
    return first + second


def dot(a: WeightDiff, b: WeightDiff) -> float:
    """Inner product over all parameters, in float64; names that only one of them has count as zero."""
    return sum((_entry_dot(entry, b.entries[name]) for name, entry in a.entries.items() if name in b), 0.0)


def _entry_dot(a: Entry, b: Entry) -> float:
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return float(((a.B.double().T @ b.B.double()) * (a.A.double() @ b.A.double().T)).sum())
    if isinstance(a, LowRank):
        return _entry_dot(b, a)
    if isinstance(b, LowRank):
        return float(((b.B.double().T @ a.double()) * b.A.double()).sum())
    return float((a.double() * b.double()).sum())


@torch.no_grad()
def grams(diffs: Sequence[WeightDiff], names: Sequence[str]) -> Float[Tensor, "P N N"]:
    """Inner products of every two of N diffs, one matrix per parameter of `names`, in float64; NaN where one of the two lacks
    the parameter. Low-rank factors lie side by side: `(B_i^T [B_1 .. B_N]) * (A_i [A_1; ..; A_N]^T)`, summed block by block."""
    found = torch.full((len(names), len(diffs), len(diffs)), float("nan"), dtype=torch.float64)
    for table, name in zip(found, names, strict=True):
        held = {i: w.entries[name] for i, w in enumerate(diffs) if name in w}
        low = {i: e.to(torch.float64) for i, e in held.items() if isinstance(e, LowRank)}
        if low:
            B, A = torch.cat([e.B for e in low.values()], 1), torch.cat([e.A for e in low.values()], 0)
            at = torch.tensor([*low])
            owner = torch.arange(len(low)).repeat_interleave(torch.tensor([e.rank for e in low.values()]))
            for i, e in low.items():
                products = ((e.B.T @ B) * (e.A @ A.T)).sum(0)
                table[i, at] = torch.zeros(len(low), dtype=torch.float64).index_add_(0, owner, products)
        for i in held.keys() - low.keys():
            for j, other in held.items():
                table[i, j] = table[j, i] = _entry_dot(held[i], other)
    return found


def cosines(found: Float[Tensor, "P N N"]) -> Float[Tensor, "N N"]:
    """The cosine of every two diffs over the parameters that both have, from their `grams`; NaN where there is none, or where
    one of them is 0."""
    both = ~found.isnan()
    squares = found.diagonal(dim1=1, dim2=2).nan_to_num()[:, :, None]  # |w_i|^2 where w_j has the parameter too
    square = (squares * both).sum(0)
    return found.nan_to_num().sum(0) / (square * square.T).sqrt().where(square * square.T > 0, torch.nan)


def scaled_as(u: WeightDiff, w: WeightDiff) -> WeightDiff:
    """u with w's Frobenius norm in every tensor; what w lacks is left out. ValueError naming a tensor where u is 0 and w is not,
    and where they share none."""
    if not any(name in w for name in u):
        raise ValueError("the two weight differences share no parameter")
    found = {}
    for name, entry in u.select(w.__contains__).entries.items():
        size = float(torch.linalg.vector_norm(entry.double())) if isinstance(entry, Tensor) else u.norm(name)
        if not size and w.norm(name):
            raise ValueError(f"{name}: is 0 and cannot be scaled to a norm of {w.norm(name):.3g}")
        c = w.norm(name) / (size or 1.0)
        found[name] = LowRank(entry.B * c, entry.A) if isinstance(entry, LowRank) else entry * c
    return replace(u, entries=found)


def random_as(w: WeightDiff, seed: int) -> WeightDiff:
    """A random direction with w's norm in every tensor: dense, independent normal entries, float32."""
    g = torch.Generator().manual_seed(seed)
    drawn = WeightDiff(
        {name: torch.randn(w.shape(name), generator=g) for name in w}, {"adapter": "random", "seed": seed}
    )
    return scaled_as(drawn, w)


def project(w: WeightDiff, bases: Mapping[int, Tensor], drop: bool = False) -> WeightDiff:
    """`P w` (or `(I - P) w` with `drop`) on the residual writers; every other parameter is left out. bases: layer ->
    `(d, r)` with orthonormal columns. Factors stay factors: only `B` is projected. ValueError naming the parameter when
    its layer has no basis or the sizes differ. (docs/method.md section 8)"""

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

    return w.select(lambda name: name.endswith(WRITERS)).map(change)


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

    norms = {"norm_pos": pp**0.5, "norm_neg": nn_**0.5, "norm_w": w2**0.5}
    return norms | {
        "asymmetry": ratio(pp**0.5, nn_**0.5),
        "cos_opposition": ratio(-pn, (pp * nn_) ** 0.5),
        "drift_ratio": ratio(s2**0.5, w2**0.5),
        "cos_w_drift": ratio(abs(pp - nn_), (w2 * s2) ** 0.5),
    }
