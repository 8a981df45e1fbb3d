"""Eigenpairs of symmetric matrices in float64: those that are asked for, and no others. (docs/method.md section 4)"""

import ctypes
from contextlib import suppress
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import LinAlgError, cython_lapack, eigh, eigh_tridiagonal, lapack
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor

SMALL = 96  # up to this many rows or columns a direct SVD is as cheap as a Gram


def eigenpairs(G: Tensor, first: int, last: int, every: bool = False) -> tuple[Tensor, Tensor]:
    """Eigenpairs number first..last (ascending, inclusive) in float64; on the CPU only these are computed. every: the values of
    all, which cost little beside these."""
    if G.device.type == "cpu" and G.shape[0] > SMALL:
        values, vectors = map(torch.from_numpy, _tridiagonal(G.numpy(), first, last, every))
        return values, vectors
    values, vectors = torch.linalg.eigh(G)
    return values if every else values[first : last + 1], vectors[:, first : last + 1]


@cache
def _lapack(name: str):
    """A routine of LAPACK as scipy has it, called without the interpreter's lock: other threads go on meanwhile."""
    held, api = cython_lapack.__pyx_capi__[name], ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    known = api.PyCapsule_GetName(held)
    kinds = [ctypes.c_char_p if b"char" in part else ctypes.c_void_p for part in known.split(b",")]
    return ctypes.CFUNCTYPE(None, *kinds)(api.PyCapsule_GetPointer(held, known))


def _tridiagonal(G: np.ndarray, first: int, last: int, every: bool) -> tuple[np.ndarray, np.ndarray]:
    """Some eigenvalues or all, and some eigenvectors, of a symmetric matrix from one `Q T Q^T`, T tridiagonal."""
    n = len(G)
    reflectors, size = np.array(G, order="C"), 64 * n  # the upper triangle is LAPACK's lower one
    diagonal, beside, scale, work = (np.empty(m) for m in (n, n - 1, n - 1, size))
    whole = np.array([n, size, 0], dtype=np.intc)
    at = whole.ctypes.data
    arrays = [x.ctypes.data for x in (diagonal, beside, scale, work)]
    _lapack("dsytrd")(b"L", at, reflectors.ctypes.data, at, *arrays, at + whole.itemsize, at + 2 * whole.itemsize)
    try:
        values, vectors = eigh_tridiagonal(diagonal, beside, select="i", select_range=(first, last))
        below = np.asfortranarray(reflectors.T[1:, : n - 1])
        vectors[1:], _, _ = lapack.dormqr("L", "N", below, scale, vectors[1:], size)
    except LinAlgError:  # values that are all but equal
        values, vectors = eigh(G, subset_by_index=[first, last])
    if every:
        values = diagonal
        _lapack("dsterf")(at, *arrays[:2], at + 2 * whole.itemsize)
    return np.linalg.eigvalsh(G) if whole[2] else values, vectors


def top_eigh(G: Float[Tensor, "d d"], k: int, every: bool = False) -> tuple[Float[Tensor, " q"], Float[Tensor, "d p"]]:
    """Leading eigenpairs of a symmetric matrix in float64: `min(k + 1, d)` values, `min(k, d)` vectors, largest first. every:
    all d values."""
    d = G.shape[0]
    values, vectors = eigenpairs(G.double(), max(d - k - 1, 0), d - 1, every)
    return values.flip(0), vectors.flip(1)[:, : min(k, d)]


def gram(M: Float[Tensor, "a b"]) -> Float[Tensor, "a a"]:
    """`M M^T`; on the CPU numpy's product of a matrix with its own transpose does half the work."""
    return torch.from_numpy(M.numpy() @ M.numpy().T) if M.device.type == "cpu" else M @ M.T


def spectral_norm(M: Float[Tensor, "a b"]) -> float:
    """Largest singular value in float32's precision, from the smaller Gram."""
    size = float(M.abs().max()) if M.numel() else 0.0
    if size == 0:
        return 0.0
    M = M / size  # squares of very small or large numbers leave float32
    return size * largest(gram(M if M.shape[0] <= M.shape[1] else M.T)) ** 0.5


def largest(G: Float[Tensor, "d d"]) -> float:
    """Largest eigenvalue of a positive semidefinite matrix in float32's precision (Lanczos)."""
    size = float(G.diagonal().max())
    if size > 0 and G.device.type == "cpu" and len(G) > SMALL:
        start = np.random.default_rng(0).standard_normal(len(G)).astype(np.float32)
        with suppress(ArpackError):
            found = eigsh((G / size).float().numpy(), k=1, v0=start, tol=1e-5, return_eigenvectors=False)
            return size * max(float(found[0]), 0.0)
    return max(float(torch.linalg.eigvalsh(G)[-1]), 0.0)
