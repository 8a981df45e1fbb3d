"""How far a block's effective rank depends on the passages that were read: a bootstrap that never decomposes anew.

Passages are drawn with replacement; draw w weights their Grams, `G_w = sum_p w_p delta_p^T delta_p`. With `Q` an
orthonormal basis of (nearly) the top m directions, the eigenvalues of `Q^T G_w Q` are followed one by one. What lies
outside Q is followed by three numbers: its energy (exact), its entropy in the full sample (so that equal weights give
the full result back exactly), and its participation ratio `tr(A_w)^2 / tr(A_w^2)`, A the Grams outside Q, whose
logarithm carries the entropy from draw to draw. (docs/method.md section 9)
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ws.delta.spectrum import Spectrum, entropy

SKETCH = 128  # directions followed one by one
PROBES = 16  # random vectors that estimate tr(A_p A_q)


class Interval(NamedTuple):
    """Both ends of a 95 % interval; NaN where there is none."""

    low: float
    high: float


UNKNOWN = Interval(float("nan"), float("nan"))


class Parts(NamedTuple):
    """What the bootstrap needs of P groups of passages, float64 on the CPU; sums over batches are sums of the fields.
    grams `(P, m, m)`: `(delta_p Q)^T (delta_p Q)`. energy `(P,)`: `|delta_p|_F^2`. images `(P, d, s)`: `A_p z` for s
    random sign vectors z, `A_p` the group's Gram outside Q; s = 0 where nothing lies outside."""

    grams: Float[Tensor, "P m m"]
    energy: Float[Tensor, " P"]
    images: Float[Tensor, "P d s"]

    def plus(self, other: "Parts") -> "Parts":
        return Parts(*map(torch.add, self, other))


def sketch_basis(delta: Float[Tensor, "N d"], size: int = SKETCH) -> Float[Tensor, "d m"]:
    """Orthonormal basis of nearly the top `size` right singular directions of `delta`, or of all where there are fewer.
    Seeded random start and two rounds of `delta^T delta`, in float32 products alone."""
    n, d = delta.shape
    size = min(size, n, d)
    start = torch.randn(d, size, generator=torch.Generator().manual_seed(0)).to(delta)
    for _ in range(2):
        start = torch.linalg.qr(delta.T @ (delta @ start))[0]
    return start


def group_parts(
    delta: Float[Tensor, "N d"], basis: Float[Tensor, "d m"], group: Int[Tensor, " N"], count: int, outside: bool
) -> Parts:
    """`Parts` of these rows, computed on their device. outside: whether anything lies outside the basis."""
    d = delta.shape[1]
    group = group.to(delta.device)
    signs = torch.randint(0, 2, (d, PROBES if outside else 0), generator=torch.Generator().manual_seed(1))
    probes = _outside(signs.to(delta) * 2 - 1, basis)
    coordinates, seen = delta @ basis, delta @ probes
    grams, images = [], []
    for p in range(count):
        rows = (group == p).nonzero()[:, 0]
        mine = coordinates[rows].double()
        grams.append((mine.T @ mine).cpu())
        images.append(_outside(delta[rows].T @ seen[rows], basis).double().cpu())
    energy = torch.bincount(group.cpu(), weights=delta.double().square().sum(dim=1).cpu(), minlength=count)
    return Parts(torch.stack(grams), energy, torch.stack(images))


def _outside(vectors: Float[Tensor, "d s"], basis: Float[Tensor, "d m"]) -> Float[Tensor, "d s"]:
    return vectors - basis @ (basis.T @ vectors)


def bootstrap_weights(count: int, draws: int, seed: int) -> Float[np.ndarray, "b P"]:
    """How often each of `count` groups is drawn, `draws` times over; groups are drawn with replacement."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def bootstrap(full: Spectrum, parts: Parts, weights: Float[np.ndarray, "b P"]) -> tuple[Interval, Interval]:
    """95 % intervals of eff_rank and of top1_frac over passages; unknown for fewer than two groups or draws. A passage
    drawn twice narrows a spectrum, so the draws are centred on the estimate (eff_rank in logs): the interval is of the
    value at this much text, not of the limit of endless text."""
    groups = len(parts.energy)
    if groups < 2 or len(weights) < 2 or full.energy.sum() <= 0:
        return UNKNOWN, UNKNOWN
    everything = np.concatenate([np.ones((1, groups)), weights])
    total = np.maximum(everything @ parts.energy.numpy(), 1e-300)
    chunks = torch.from_numpy(everything).tensor_split(max(1, len(everything) // 32))
    grams = (torch.einsum("bp,pij->bij", chunk, parts.grams).numpy() for chunk in chunks)
    shares = np.concatenate([np.linalg.eigvalsh(gram)[:, ::-1] for gram in grams])
    shares = np.maximum(shares, 0.0) / total[:, None]
    rest = np.clip(1.0 - shares.sum(axis=1), 0.0, 1.0)
    nats = entropy(shares)
    target = float(entropy(full.shares))
    if rest[0] > 1e-9 and parts.images.shape[2]:
        pairs = torch.einsum("pds,qds->pq", parts.images, parts.images).numpy() / parts.images.shape[2]
        purity = np.einsum("bp,pq,bq->b", everything, pairs, everything)
        width = 2 * np.log(np.maximum(rest * total, 1e-300)) - np.log(np.maximum(purity, 1e-300))
        rest_nats = -rest * np.log(np.maximum(rest, 1e-300))
        shape = (target - nats[0] - rest_nats[0]) / rest[0]
        nats = nats + rest_nats + rest * (shape + width - width[0])
    rank, top = (
        here + np.quantile(draws - draws.mean(), [0.025, 0.975])
        for here, draws in ((target, nats[1:]), (full.shares[0], shares[1:, 0]))
    )
    return Interval(*np.exp(rank).tolist()), Interval(*top.clip(0.0, 1.0).tolist())
