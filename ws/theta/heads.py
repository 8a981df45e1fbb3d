"""Theta heads: a small vector per user that edits the last hidden state, or the unembedding, of a frozen model.

With `h` the last hidden state before the unembedding `W`, and `theta` of `D` numbers, a head is

    CVH            h' = h + alpha B (theta * (A h))          conditional: what is written depends on what is read
    unconditional  h' = h + alpha U theta                    the same shift for every token
    LM-head update logits' = W h + alpha C (theta * (A h))   the unembedding itself: W' = W + alpha C diag(theta) A

All are linear in theta, so each one's effect on the logits is `alpha (theta * phi(h)) C^T` with `phi(h) = h A^T` (or
ones) and `C = W B` (or `W U`, or the update's own `C`): `features` and `readout` give these two factors, which is all
that `ws.theta.fit` needs. The bases are random (seeded) or the top right singular vectors of the unembedding.
docs/method.md section 10.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from scipy.linalg import eigh
from torch import Tensor

UNCONDITIONAL_SEED_SHIFT = 1000
GRAM_ROWS = 8192  # rows of the unembedding turned into float64 at a time


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Head:
    """What all heads share: `h' = h + alpha B (theta * phi(h))`, the logits affine in theta. `h` may have any leading
    shape; its dtype and device are kept, the arithmetic is float32 or better."""

    A: Float[Tensor, "D d"]
    B: Float[Tensor, "d D"]
    alpha: float
    name: str

    @property
    def D(self) -> int:
        return self.B.shape[1]

    def features(self, h: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead D"]:
        """`phi(h) = A h`: what theta gates, in float32 or better."""
        x = at_least_float32(h)
        return x @ self.A.to(x).T

    def readout(self, W: Float[Tensor, "V d"]) -> Float[Tensor, "V D"]:
        """`C = W B`: effect on the logits of each of theta's D gated features, in float32 or better."""
        W = at_least_float32(W)
        return W @ self.B.to(W)

    def apply(self, h: Float[Tensor, "*lead d"], theta: Float[Tensor, "*#lead D"]) -> Float[Tensor, "*lead d"]:
        """The edited hidden state `h'`; one theta, or one for each h."""
        x = at_least_float32(h)
        gated = theta.to(x) * self.features(x)
        return (x + self.alpha * (gated @ self.B.to(x).T)).to(h.dtype)

    def logit_delta(
        self, h: Float[Tensor, "*lead d"], theta: Float[Tensor, "*#lead D"], W: Float[Tensor, "V d"]
    ) -> Float[Tensor, "*lead V"]:
        """What the head adds to the logits, `alpha (theta * phi(h)) C^T` (the unembedding's bias cancels)."""
        phi = self.features(h)
        return (self.alpha * (theta.to(phi) * phi) @ self.readout(W).to(phi).T).to(h.dtype)


@dataclass(frozen=True, eq=False)
class CVH(Head):
    """Contextual-vector head: A reads, `(D, d)`; B writes, `(d, D)`."""

    A: Float[Tensor, "D d"]
    B: Float[Tensor, "d D"]
    alpha: float = 0.1
    name: str = "cvh"


@dataclass(frozen=True, eq=False)
class Unconditional(Head):
    """A bias on the last hidden state: `h' = h + alpha U theta`, `U` `(d, D)`; the same shift for every token."""

    U: Float[Tensor, "d D"]
    alpha: float = 0.1
    name: str = "unconditional"

    B = property(lambda self: self.U)

    def features(self, h: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead D"]:
        x = at_least_float32(h)
        if x.shape[-1] != len(self.U):
            raise ValueError(f"head {self.name}: hidden states of width {x.shape[-1]}, the head's is {len(self.U)}")
        return x.new_ones(*x.shape[:-1], self.D)


@dataclass(frozen=True, eq=False)
class LMHeadUpdate(Head):
    """An update of the unembedding: `W' = W + alpha C diag(theta) A`, `A` `(D, d)`, `C` `(V, D)`. The edit is not in
    the hidden state: `apply` returns h unchanged. W is only checked for its shape. With C = W B it equals what the CVH
    head of the same A and B does."""

    A: Float[Tensor, "D d"]
    C: Float[Tensor, "V D"]
    alpha: float = 0.1
    name: str = "lm_head"

    B = property(lambda self: self.C)

    def apply(self, h: Float[Tensor, "*lead d"], theta: Float[Tensor, "*#lead D"]) -> Float[Tensor, "*lead d"]:
        return h

    def readout(self, W: Float[Tensor, "V d"]) -> Float[Tensor, "V D"]:
        if len(W) != len(self.C):
            raise ValueError(f"head {self.name}: made for a vocabulary of {len(self.C)}, the model has {len(W)}")
        return at_least_float32(self.C.to(W.device))


def to_device(head: Head, device: torch.device | str) -> Head:
    """The same head with its matrices on `device`."""
    return replace(head, **{k: v.to(device) for k, v in vars(head).items() if isinstance(v, Tensor)})


# ---- how the bases are drawn -------------------------------------------------------------------------------------


def _normal(seed: int, *shapes: tuple[int, int, int]) -> list[Tensor]:
    """Matrices `(rows, columns)` of `N(0,1)/sqrt(n)` entries for every (rows, columns, n), drawn in turn."""
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=gen) / n**0.5 for rows, columns, n in shapes]


def cvh(d: int, D: int = 64, alpha: float = 0.1, seed: int = 42) -> CVH:
    """Random CVH head: `A ~ N(0,1)/sqrt(d)` drawn first, then `B ~ N(0,1)/sqrt(D)`, one generator."""
    return CVH(*_normal(seed, (D, d, d), (d, D, D)), alpha, "cvh")


def unconditional(d: int, D: int = 64, alpha: float = 0.1, seed: int = 42) -> Unconditional:
    """Random unconditional head: `U ~ N(0,1)/sqrt(D)` from a generator seeded with `seed + 1000`."""
    return Unconditional(*_normal(seed + UNCONDITIONAL_SEED_SHIFT, (d, D, D)), alpha, "unconditional")


def lm_head_random(V: int, d: int, D: int = 64, alpha: float = 0.1, seed: int = 42) -> LMHeadUpdate:
    """Random LM-head update: `A ~ N(0,1)/sqrt(d)` drawn first, then `C ~ N(0,1)/sqrt(D)` `(V, D)`, one generator."""
    return LMHeadUpdate(*_normal(seed, (D, d, d), (V, D, D)), alpha, "lm_head_random")


def lm_head_from_cvh(head: CVH, W: Float[Tensor, "V d"], name: str = "lm_head_cvh") -> LMHeadUpdate:
    """The LM-head update that does exactly what a CVH head does to the logits: `C = W B`."""
    return LMHeadUpdate(head.A, head.readout(W), head.alpha, name)


def svd_basis(W: Float[Tensor, "V d"], D: int) -> Float[Tensor, "d D"]:
    """Top-D right singular vectors of the unembedding, float32, largest singular value first. Through the `d x d` Gram
    in float64, so the `V x d` SVD is never formed. Sign convention: the entry of largest magnitude of every vector is
    positive (an SVD leaves the sign open; SVD-CVH does not depend on it, the others only up to the sign of theta's
    entries). Raises ValueError when D > d."""
    d = W.shape[1]
    if D > d:
        raise ValueError(f"D = {D} singular vectors were asked of an unembedding of width {d}")
    gram = torch.zeros(d, d, dtype=torch.float64, device=W.device)
    for rows in W.split(GRAM_ROWS):
        rows = rows.double()
        gram += rows.T @ rows
    _, vectors = eigh(gram.cpu().numpy(), subset_by_index=[d - D, d - 1])
    V = torch.from_numpy(vectors.copy()).flip(1)
    V = V * V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
    return V.float().contiguous().to(W.device)


def all_heads(W: Float[Tensor, "V d"], D: int = 64, alpha: float = 0.1, seed: int = 42) -> dict[str, Head]:
    """Every head of section 10 for one unembedding, by name, on its device: hidden-state heads first. `svd_cvh` reads
    and writes along the unembedding's top singular directions (`A = V_D^T`, `B = V_D`), `svd_unconditional` shifts
    along them (`U = V_D`); `lm_head_svd` rescales the unembedding's own singular values (`A = V_D^T`, `C = U_D S_D = W
    V_D`), the same function of h as `svd_cvh`."""
    V, d = W.shape
    basis = svd_basis(W, D)
    random_cvh, svd_cvh = cvh(d, D, alpha, seed), CVH(basis.T.contiguous(), basis, alpha, "svd_cvh")
    heads = [
        random_cvh,
        unconditional(d, D, alpha, seed),
        svd_cvh,
        Unconditional(basis, alpha, "svd_unconditional"),
        lm_head_from_cvh(random_cvh, W),
        lm_head_from_cvh(svd_cvh, W, "lm_head_svd"),
        lm_head_random(V, d, D, alpha, seed),
    ]
    return {head.name: to_device(head, W.device) for head in heads}
