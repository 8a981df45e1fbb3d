"""Eigenpairs of symmetric matrices: those that are asked for, and no others (docs/method.md section 4). Several such
problems take less time side by side with one thread each than one after the other."""

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np
import scipy
import torch
from jaxtyping import Float
from scipy.linalg import LinAlgError, cython_lapack, eigh, eigh_tridiagonal
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor

from ws.subspaces.chebyshev import Bound, leading

SMALL = 96  # up to this many rows or columns a direct SVD is as cheap as a Gram
MOST = 4  # problems at a time
ONE = Lock()  # the threads of a library are those of the whole process


@cache
def libraries() -> list[list[Callable]]:
    """What tells and what sets the threads of the OpenBLAS of numpy and of scipy, where they bring one."""
    files = [f for p in (np, scipy) for f in Path(p.__file__).parents[1].glob(f"{p.__name__}.libs/*openblas*")]
    names = ["scipy_openblas_{}_num_threads" + "64_" * ("64_" in file.name) for file in files]
    held = [(ctypes.CDLL(str(file)), name) for file, name in zip(files, names, strict=True)]
    return [[getattr(x, n.format(do)) for do in ("get", "set")] for x, n in held if hasattr(x, n.format("set"))]


@contextmanager
def side_by_side() -> Iterator[Callable]:
    """`map` by several threads, each with one thread for linear algebra; the usual one where there is one thread, or where a
    library does not tell its threads."""
    threads = torch.get_num_threads()
    if threads < 2 or len(libraries()) < 2:
        yield map
        return
    with ONE, ThreadPoolExecutor(min(threads, MOST), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        before = [(put, tell()) for tell, put in libraries()]
        try:
            for put, _ in before:
                put(1)
            yield pool.map
        finally:
            torch.set_num_threads(threads)
            for put, n in before:
                put(n)


def eigenpairs(G: Tensor, first: int, last: int, every: bool = False) -> tuple[Tensor, Tensor]:
    """Eigenpairs number first..last (ascending, inclusive) in float64; on the CPU only these are computed. every:
    the values of all, which cost little beside these."""
    if G.device.type == "cpu" and G.shape[0] > SMALL:
        return tuple(map(torch.from_numpy, _tridiagonal(G.numpy(), first, last, every)))
    values, vectors = torch.linalg.eigh(G)
    return values if every else values[first : last + 1], vectors[:, first : last + 1]


@cache
def _lapack(name: str):
    """A routine of LAPACK as scipy has it, called without the interpreter's lock: other threads go on meanwhile."""
    held, api, of = cython_lapack.__pyx_capi__[name], ctypes.pythonapi, ctypes.py_object
    known = ctypes.PYFUNCTYPE(ctypes.c_char_p, of)(("PyCapsule_GetName", api))(held)
    where = ctypes.PYFUNCTYPE(ctypes.c_void_p, of, ctypes.c_char_p)(("PyCapsule_GetPointer", api))(held, known)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (known.count(b",") + 1))(where)


def _tridiagonal(G: np.ndarray, first: int, last: int, every: bool) -> tuple[np.ndarray, np.ndarray]:
    """Some eigenvalues or all, and some eigenvectors, of a symmetric float64 matrix from one `Q T Q^T`, T tridiagonal."""
    n = len(G)
    reflectors, size = np.array(G, order="C"), 64 * n  # the upper triangle is LAPACK's lower one
    diagonal, beside, scale, work = (np.empty(m) for m in (n, n - 1, n - 1, size))
    whole = np.array([n, size, 0], dtype=np.intc)
    at, it = whole.ctypes.data, reflectors.ctypes.data
    more = at + whole.itemsize, at + 2 * whole.itemsize
    arrays = [x.ctypes.data for x in (diagonal, beside, scale, work)]
    _lapack("dsytrd")(b"L", at, it, at, *arrays, *more)
    try:
        values, vectors = eigh_tridiagonal(diagonal, beside, select="i", select_range=(first, last))
        vectors, columns = np.asfortranarray(vectors), np.array([vectors.shape[1]], dtype=np.intc)
        here, to = columns.ctypes.data, vectors.ctypes.data
        _lapack("dormtr")(b"L", b"L", b"N", at, here, it, at, arrays[2], to, at, arrays[3], *more)
    except LinAlgError:  # values that are all but equal
        values, vectors = eigh(G, subset_by_index=[first, last])
    if every:
        values = _lapack("dsterf")(at, *arrays[:2], more[1]) or diagonal
    return np.linalg.eigvalsh(G) if whole[2] else values, vectors


def top_eigh(
    G: Float[Tensor, "d d"], k: int, every: bool = False, bound: Bound | None = None
) -> tuple[Float[Tensor, " q"], Float[Tensor, "d p"]]:
    """Leading eigenpairs of a symmetric matrix in float64: `min(k + 1, d)` values, `min(k, d)` vectors, largest first. every:
    all d values. bound: by how many rad the vectors may be off, given the values, where that takes less time (`leading`)."""
    d, G = len(G), G.double()
    if bound and (found := leading(G, k, bound, every)):
        return found
    values, vectors = eigenpairs(G, max(d - k - 1, 0), d - 1, every)
    return values.flip(0), vectors.flip(1)[:, : min(k, d)]


def gram(M: Float[Tensor, "a b"]) -> Float[Tensor, "a a"]:
    """`M M^T`; on the CPU numpy's product of a matrix with its own transpose does half the work."""
    return torch.from_numpy(M.numpy() @ M.numpy().T) if M.device.type == "cpu" else M @ M.T


def spectral_norm(M: Float[Tensor, "a b"]) -> float:
    """Largest singular value in float32's precision, from the smaller Gram."""
    return largest(gram(M.double() if M.shape[0] <= M.shape[1] else M.double().T)) ** 0.5


def largest(G: Float[Tensor, "d d"]) -> float:
    """Largest eigenvalue of a positive semidefinite matrix in float32's precision (Lanczos)."""
    size = float(G.diagonal().max()) if len(G) else 0.0
    if size > 0 and G.device.type == "cpu" and len(G) > SMALL:
        start = np.random.default_rng(0).standard_normal(len(G)).astype(np.float32)
        with suppress(ArpackError):
            found = eigsh((G / size).float().numpy(), k=1, v0=start, tol=1e-5, return_eigenvectors=False)
            return size * max(float(found[0]), 0.0)
    return max(float(torch.linalg.eigvalsh(G)[-1]), 0.0) if size > 0 else 0.0
