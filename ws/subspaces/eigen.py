"""Eigenpairs of symmetric matrices in float64: those that are asked for, and no others. (docs/method.md section 4)"""

from contextlib import suppress

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import LinAlgError, eigh, eigh_tridiagonal, lapack
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor

SMALL = 96  # up to this many rows or columns a direct SVD is as cheap as a Gram


def eigenpairs(G: Tensor, first: int, last: int, every: bool = False) -> tuple[Tensor, Tensor]:
    """Eigenpairs number first..last (ascending, inclusive) in float64; on the CPU only these are computed. every: the values of
    all, which cost little beside these."""
    if G.device.type == "cpu" and G.shape[0] > SMALL:
        found = _tridiagonal(G.numpy(), first, last) if every else eigh(G.numpy(), subset_by_index=[first, last])
        values, vectors = (torch.from_numpy(x.copy()) for x in found)
        return values, vectors
    values, vectors = torch.linalg.eigh(G)
    return values if every else values[first : last + 1], vectors[:, first : last + 1]


def _tridiagonal(G: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """All eigenvalues and some eigenvectors of a symmetric matrix from one `Q T Q^T`, T tridiagonal."""
    n = len(G)
    reflectors, diagonal, beside, scale, _ = lapack.dsytrd(G, lower=1, lwork=64 * n)
    values, failed = lapack.dsterf(diagonal, beside)
    if failed:
        return np.linalg.eigvalsh(G), eigh(G, subset_by_index=[first, last])[1]
    try:
        _, vectors = eigh_tridiagonal(diagonal, beside, select="i", select_range=(first, last))
    except LinAlgError:  # values that are all but equal
        return values, eigh(G, subset_by_index=[first, last])[1]
    below = np.asfortranarray(reflectors[1:, : n - 1])
    vectors[1:], _, _ = lapack.dormqr("L", "N", below, scale, vectors[1:], 64 * n)
    return values, vectors


def top_eigh(G: Float[Tensor, "d d"], k: int, every: bool = False) -> tuple[Float[Tensor, " q"], Float[Tensor, "d p"]]:
    """Leading eigenpairs of a symmetric matrix in float64: `min(k + 1, d)` values, `min(k, d)` vectors, largest first. every:
    all d values."""
    d = G.shape[0]
    values, vectors = eigenpairs(G.double(), max(d - k - 1, 0), d - 1, every)
    return values.flip(0), vectors.flip(1)[:, : min(k, d)]


def spectral_norm(M: Float[Tensor, "a b"]) -> float:
    """Largest singular value in float32's precision, from the smaller Gram's largest eigenvalue (Lanczos)."""
    size = float(M.abs().max()) if M.numel() else 0.0
    if size == 0:
        return 0.0
    M = M / size  # squares of very small or large numbers leave float32
    G = M @ M.T if M.shape[0] <= M.shape[1] else M.T @ M
    if G.device.type == "cpu" and len(G) > SMALL:
        start = np.random.default_rng(0).standard_normal(len(G)).astype(np.float32)
        with suppress(ArpackError):
            found = eigsh(G.float().numpy(), k=1, v0=start, tol=1e-5, return_eigenvectors=False)
            return size * float(max(found[0], 0.0)) ** 0.5
    return size * float(torch.linalg.eigvalsh(G)[-1].clamp(min=0).sqrt())
