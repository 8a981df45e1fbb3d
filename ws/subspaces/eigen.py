"""Eigenpairs of symmetric matrices: those that are asked for, and no others (docs/method.md section 4). Several such
problems take less time side by side than one after the other: on the CPU with one thread each, on a GPU as one batch."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from threading import Condition, Lock, local
from types import SimpleNamespace

import numpy as np
import scipy
import torch
from jaxtyping import Float
from scipy.linalg import LinAlgError, cython_lapack, eigh, eigh_tridiagonal
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor

SMALL = 96  # up to this many rows or columns a direct SVD is as cheap as a Gram
MOST = 4  # problems at a time
CPU = torch.device("cpu")
ONE = Lock()  # the threads of a library are those of the whole process
BATCH = 2 << 30  # bytes of a GPU's memory for what is at work at a time, with some six matrices each
PATIENCE = 0.02  # seconds: who waits for a lock, as long as others wait for him, does not bring his matrix meanwhile
OF_THREAD = local()  # its `batch`


@cache
def libraries() -> list[list[Callable]]:
    """What tells and what sets the threads of the OpenBLAS of numpy and of scipy, where they bring one."""
    files = [f for p in (np, scipy) for f in Path(p.__file__).parents[1].glob(f"{p.__name__}.libs/*openblas*")]
    names = ["scipy_openblas_{}_num_threads" + "64_" * ("64_" in file.name) for file in files]
    held = [(ctypes.CDLL(str(file)), name) for file, name in zip(files, names, strict=True)]
    return [[getattr(x, n.format(do)) for do in ("get", "set")] for x, n in held if hasattr(x, n.format("set"))]


@contextmanager
def side_by_side(where: torch.device = CPU, d: int = 1) -> Iterator[Callable]:
    """`map` by several threads for what works on `d x d` matrices there: on the CPU each with one thread for linear algebra, and
    the usual one where there is one thread, or where a library does not tell its threads; on a GPU `in_batches`."""
    if where.type != "cpu":
        torch.linalg.eigvalsh(torch.eye(2, device=where))  # its library is loaded once, by one thread
        yield partial(in_batches, at_once=max(1, BATCH // (50 * d * d)))
        return
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


class Batch:
    """Matrices of several threads, whose eigenpairs are found together: once every thread that is at work has brought one, or
    when none has come for a while. Of one size as one batch."""

    def __init__(self, threads: int):
        self.at_work, self.brought, self.turn = threads, [], Condition()

    def eigh(self, G: Float[Tensor, "d d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
        """`torch.linalg.eigh`, in the turn of all."""
        mine = SimpleNamespace(G=G, found=None)
        with self.turn:
            self.brought.append(mine)
            while mine.found is None and len(self.brought) < self.at_work and self.turn.wait(PATIENCE):
                pass
            if mine.found is None:
                self._solve()
            return mine.found or torch.linalg.eigh(G)  # whose matrix it is that cannot be solved, its own thread tells

    def run(self, do: Callable, thing: object) -> object:
        """What a thread does, which brings nothing more after it."""
        try:
            return do(thing)
        finally:
            with self.turn:
                self.at_work -= 1
                self.turn.notify_all()

    def _solve(self) -> None:
        alike: dict[tuple, list[SimpleNamespace]] = {}
        for one in self.brought:
            alike.setdefault((one.G.shape, one.G.dtype, one.G.device), []).append(one)
        self.brought = []
        for some in alike.values():
            try:
                values, vectors = torch.linalg.eigh(torch.stack([one.G for one in some]))
                found = list(zip(values, vectors, strict=True))
            except RuntimeError:  # torch's LinAlgError, OutOfMemoryError: one after the other
                found = [()] * len(some)
            for one, pair in zip(some, found, strict=True):
                one.found = pair
        self.turn.notify_all()


def in_batches(do: Callable, things: Sequence, at_once: int) -> list:
    """`map` by a thread for each of so many things at a time, whose eigenproblems on a GPU are solved together."""
    found = []
    for some in (things[start : start + at_once] for start in range(0, len(things), at_once)):
        batch = Batch(len(some))
        with ThreadPoolExecutor(len(some), initializer=setattr, initargs=(OF_THREAD, "batch", batch)) as pool:
            found += pool.map(partial(batch.run, do), some)
    return found


def eigenpairs(G: Tensor, first: int, last: int, every: bool = False) -> tuple[Tensor, Tensor]:
    """Eigenpairs number first..last (ascending, inclusive) in the matrix' precision; on the CPU only these are computed. every:
    the values of all, which cost little beside these."""
    if G.device.type == "cpu" and G.shape[0] > SMALL:
        return tuple(map(torch.from_numpy, _tridiagonal(G.numpy(), first, last, every)))
    batch = getattr(OF_THREAD, "batch", None)
    values, vectors = batch.eigh(G) if batch else torch.linalg.eigh(G)
    return values if every else values[first : last + 1], vectors[:, first : last + 1]


@cache
def _lapack(name: str):
    """A routine of LAPACK as scipy has it, called without the interpreter's lock: other threads go on meanwhile."""
    held, api, of = cython_lapack.__pyx_capi__[name], ctypes.pythonapi, ctypes.py_object
    known = ctypes.PYFUNCTYPE(ctypes.c_char_p, of)(("PyCapsule_GetName", api))(held)
    where = ctypes.PYFUNCTYPE(ctypes.c_void_p, of, ctypes.c_char_p)(("PyCapsule_GetPointer", api))(held, known)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (known.count(b",") + 1))(where)


def _tridiagonal(G: np.ndarray, first: int, last: int, every: bool) -> tuple[np.ndarray, np.ndarray]:
    """Some eigenvalues or all, and some eigenvectors, of a symmetric matrix from one `Q T Q^T`, T tridiagonal, in its dtype."""
    n, letter = len(G), "s" if G.dtype == np.float32 else "d"
    reflectors, size = np.array(G, order="C"), 64 * n  # the upper triangle is LAPACK's lower one
    diagonal, beside, scale, work = (np.empty(m, G.dtype) for m in (n, n - 1, n - 1, size))
    whole = np.array([n, size, 0], dtype=np.intc)
    at, it = whole.ctypes.data, reflectors.ctypes.data
    more = at + whole.itemsize, at + 2 * whole.itemsize
    arrays = [x.ctypes.data for x in (diagonal, beside, scale, work)]
    _lapack(f"{letter}sytrd")(b"L", at, it, at, *arrays, *more)
    try:
        wide = diagonal.astype(float), beside.astype(float)
        values, vectors = eigh_tridiagonal(*wide, select="i", select_range=(first, last))
        vectors[np.abs(vectors) < 1e-20] = 0.0  # float32 is slow where it underflows
        vectors, columns = np.asfortranarray(vectors.astype(G.dtype)), np.array([vectors.shape[1]], dtype=np.intc)
        here, to = columns.ctypes.data, vectors.ctypes.data
        _lapack(f"{letter}ormtr")(b"L", b"L", b"N", at, here, it, at, arrays[2], to, at, arrays[3], *more)
    except LinAlgError:  # values that are all but equal
        values, vectors = eigh(G, subset_by_index=[first, last])
    if every:
        values = _lapack(f"{letter}sterf")(at, *arrays[:2], more[1]) or diagonal
    return np.linalg.eigvalsh(G) if whole[2] else values, vectors


def top_eigh(
    G: Float[Tensor, "d d"], k: int, every: bool = False, enough: Callable[[Tensor], bool] | None = None
) -> tuple[Float[Tensor, " q"], Float[Tensor, "d p"]]:
    """Leading eigenpairs of a symmetric matrix in float64: `min(k + 1, d)` values, `min(k, d)` vectors, largest first. every:
    all d values. enough: whether pairs with such values will do as float32 finds them, which is tried first."""
    d, size = G.shape[0], float(G.diagonal().max()) if enough else 0.0
    asked = max(d - k - 1, 0), d - 1, every
    if size > 0:
        with suppress(RuntimeError, ValueError):  # no convergence, or a number that float32 does not have
            values, V = (x.double().flip(-1) for x in eigenpairs((G / size).float(), *asked))
            if enough(values := values * size):
                V = V[:, :k]
                return values, 1.5 * V - V @ (V.T @ V) / 2  # orthonormal to 1e-12
    values, vectors = eigenpairs(G.double(), *asked)
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
