"""Spectrum of a block's update from its smaller Gram.

With `delta = U S V^T` (N x d): `delta delta^T = U S^2 U^T` (taken for N < d) and `delta^T delta = V S^2 V^T`, in
float64. All eigenvalues give `p = s^2 / sum s^2` and `eff_rank = exp(-sum_{p > 1e-12} p log p)`; eigenvectors are
computed for the top k alone. (docs/method.md section 9)
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg as sl
import torch
from jaxtyping import Float
from torch import Tensor

FLOOR = 1e-12  # shares of the energy at or under this do not enter the entropy


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of the Gram `(c,)`, falling, c = min(N, d); top right singular vectors as float32 rows on the CPU."""

    energy: np.ndarray
    directions: Float[Tensor, "k d"]

    @property
    def shares(self) -> np.ndarray:
        """`p = s^2 / sum s^2`; zeros where the block adds nothing."""
        total = self.energy.sum()
        return self.energy / total if total > 0 else np.zeros_like(self.energy)

    @property
    def singvals(self) -> np.ndarray:
        return np.sqrt(self.energy)


def entropy(shares: np.ndarray) -> np.ndarray:
    """`-sum_{p > 1e-12} p log p` over the last axis, in nats."""
    kept = np.where(shares > FLOOR, shares, 1.0)
    return np.asarray(-(kept * np.log(kept)).sum(axis=-1))


def eff_rank(shares: np.ndarray) -> float:
    """`exp(entropy)`: how many directions of equal energy would be as spread out; 0 where the block adds nothing."""
    return float(np.exp(entropy(shares))) if shares.sum() > 0 else 0.0


def spectrum(delta: Float[Tensor, "N d"], k: int) -> Spectrum:
    """Spectrum of the update rows `delta`, computed on their device; `k` directions or as many as there are."""
    n, d = delta.shape
    if n >= d:
        return spectrum_of_gram(right_gram(delta), delta.double().sum(dim=0), k)
    rows = delta.double()
    energy, left = eigen(_gram(rows), min(k, n))
    return Spectrum(energy, _directions(rows.T @ left, energy, rows.sum(dim=0)))


def spectrum_of_gram(gram: Float[Tensor, "d d"], total: Float[Tensor, " d"], k: int) -> Spectrum:
    """Spectrum from an accumulated `delta^T delta` and the sum of the rows of `delta` (for the signs)."""
    energy, right = eigen(gram, min(k, gram.shape[0]))
    singvals = torch.from_numpy(energy[: right.shape[1]] ** 0.5).to(right)
    return Spectrum(energy, _directions(right * singvals, energy, total))


def right_gram(delta: Float[Tensor, "N d"]) -> Float[Tensor, "d d"]:
    """`delta^T delta` in float64."""
    return _gram(delta.double().T)


def _gram(rows: Float[Tensor, "a b"]) -> Float[Tensor, "a a"]:
    if rows.device.type != "cpu":
        return rows @ rows.T
    # The row-major (a, b) array is a column-major (b, a) one, so X^T X of that view is rows rows^T without a copy;
    # the symmetric product does half the work of a general one.
    view = rows.numpy().T if rows.is_contiguous() else np.asfortranarray(rows.numpy().T)
    lower = sl.blas.dsyrk(1.0, view, trans=1, lower=1)
    return torch.from_numpy(np.tril(lower) + np.tril(lower, -1).T)


def _directions(scaled: Float[Tensor, "d k"], energy: np.ndarray, total: Float[Tensor, " d"]) -> Float[Tensor, "k d"]:
    """Unit rows out of `V S`, with fixed signs; a direction without energy is a row of zeros, not an arbitrary one."""
    lengths = torch.linalg.vector_norm(scaled, dim=0)
    real = lengths.square() > 1e-12 * energy.max(
        initial=0.0
    )  # below that a float64 Gram of float32 rows holds rounding alone
    unit = torch.where(real, scaled / lengths.clamp_min(1e-300), 0.0)
    return fix_signs(unit.T, total).float().cpu()


def fix_signs(directions: Float[Tensor, "k d"], total: Float[Tensor, " d"]) -> Float[Tensor, "k d"]:
    """Rows turned so that the block moves the stream along `+v` on average: `v . sum_t delta_t >= 0`. Where that sum
    says nothing (under 1e-6 of its own length) the component of largest magnitude is made positive. This is the sign
    convention of every direction in the result files. (docs/method.md section 9)"""
    along = directions @ total.to(directions)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    decided = along.abs() > 1e-6 * torch.linalg.vector_norm(total).to(along)
    sign = torch.where(torch.where(decided, along, largest) < 0, -1.0, 1.0).to(directions)
    return directions * sign[:, None]


def eigen(gram: Float[Tensor, "n n"], k: int) -> tuple[np.ndarray, Float[Tensor, "n k"]]:
    """All eigenvalues (falling, none under 0) and the top `k` eigenvectors of a Gram in float64, on its device. On the
    CPU one reduction to tridiagonal form serves both (LAPACK sytrd, sterf, stemr). Elsewhere the eigenvalues come from
    the device's own solver and the vectors from block Krylov iteration: no full set of vectors is formed."""
    if gram.device.type != "cpu":
        return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).cpu().numpy(), krylov_top(gram, k)
    n = gram.shape[0]
    if n <= 64:
        values, vectors = np.linalg.eigh(gram.numpy())
        return values[::-1].clip(min=0.0), torch.from_numpy(vectors[:, ::-1][:, :k].copy())
    work = int(sl.lapack.dsytrd_lwork(n, lower=1)[0])
    reflectors, diagonal, off, tau, info = sl.lapack.dsytrd(np.asfortranarray(gram.numpy()), lower=1, lwork=work)
    if info != 0 or not np.isfinite(diagonal).all():
        raise ValueError(f"the {n} x {n} Gram matrix is not finite")
    values = sl.eigvalsh_tridiagonal(diagonal, off, lapack_driver="sterf")[::-1].clip(min=0.0)
    _, inner = sl.eigh_tridiagonal(diagonal, off, select="i", select_range=(n - k, n - 1))
    # Q of the reduction leaves the first coordinate alone; below it, its reflectors are stored like those of a QR.
    vectors = np.asfortranarray(inner[:, ::-1])
    inner = np.asfortranarray(vectors[1:])
    vectors[1:], _, info = sl.lapack.dormqr("L", "N", reflectors[1:, : n - 1], tau, inner, lwork=64 * n)
    return values, torch.from_numpy(np.ascontiguousarray(vectors))


def krylov_top(
    gram: Float[Tensor, "n n"], k: int, tolerance: float = 1e-10, restarts: int = 12
) -> Float[Tensor, "n k"]:
    """Top `k` eigenvectors of a positive semidefinite matrix by block Krylov iteration with restarts. Made of products
    alone. Stops when every residual `|G v - theta v|` is under `tolerance * theta_1`; falls back on a full
    decomposition where close eigenvalues keep it from that. The start is seeded."""
    n, width, depth = len(gram), k + 8, 10
    start = torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=gram.dtype).to(gram.device)
    for _ in range(restarts if width * depth < n else 0):
        block = torch.linalg.qr(start)[0]
        basis = [block]
        for _ in range(depth - 1):
            block = gram @ block
            for _ in range(2):  # twice is enough: the second pass removes what rounding left of the first
                for earlier in basis:
                    block = block - earlier @ (earlier.T @ block)
            block = torch.linalg.qr(block)[0]
            basis.append(block)
        space = torch.linalg.qr(torch.cat(basis, dim=1))[0]
        image = gram @ space
        inner = space.T @ image
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        start = space @ vectors.flip(1)[:, :width]
        residual = image @ vectors.flip(1)[:, :k] - start[:, :k] * values.flip(0)[:k]
        if torch.linalg.vector_norm(residual, dim=0).max() <= tolerance * values[-1].clamp_min(1e-300):
            return start[:, :k].contiguous()
    return torch.linalg.eigh(gram)[1].flip(1)[:, :k].contiguous()
