"""Dense matrices of low numerical rank as factors, each with a certificate. (docs/method.md section 2)

Blocks of a seeded random sketch, `Q_i = qr(R W_i)`, `R <- R - Q_i Q_i^T R` (Halko, Martinsson and Tropp 2011, SIAM
Review 53(2)). A matrix becomes `B A` only where `|M - B A|_F <= 1e-6 |M|_F` for the very float32 product that is used
afterwards, measured and not estimated; what was rounded to half precision has full rank and stays dense.
"""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ws.diff.core import Entry, LowRank

TOLERANCE = 1e-6
BLOCKS = (8, 32, 64, 128, 256)  # columns that the sketch grows by: 8, 40, 104, 232, 488 in all
MOST = 8  # matrices at a time, each held in float32 beside itself
ROWS = 256  # that are held in float64 at a time


def factorised(entries: Iterable[tuple[str, Entry]]) -> tuple[dict[str, Entry], dict]:
    """The entries with every matrix of low numerical rank as `LowRank`, and what goes into the metadata for it. The
    latter is `{"factorised": {matrices, of, largest_residual, tolerance}}`: how many of how many dense matrices, and
    the largest `|M - B A|_F / |M|_F` among them; empty where there was none. All else is passed on as it is."""
    out: dict[str, Entry] = {}
    matrices, residuals, threads = 0, [], torch.get_num_threads()
    workers = min(threads, MOST)
    waiting: deque[tuple[str, Entry, Future | None]] = deque()

    def settle() -> None:
        name, entry, made = waiting.popleft()
        found = made.result() if made else None
        out[name] = entry if found is None else found[0]
        residuals.extend([] if found is None else [found[1]])

    try:  # a matrix per thread: several threads bring little to one of them
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for name, entry in entries:
                dense = not isinstance(entry, LowRank) and entry.ndim == 2
                matrices += dense
                waiting.append((name, entry, pool.submit(factors, entry) if dense else None))
                del entry
                if len(waiting) > workers:
                    settle()
            while waiting:
                settle()
    finally:
        torch.set_num_threads(threads)
    about = {"of": matrices, "largest_residual": max(residuals, default=0.0), "tolerance": TOLERANCE}
    return out, {"factorised": {"matrices": len(residuals), **about}} if residuals else {}


@torch.no_grad()
def factors(M: Float[Tensor, "out in_"]) -> tuple[LowRank, float] | None:
    """float32 factors of M at its numerical rank and their relative residual; None where M has no such factors. The
    sketch stays under half the smaller dimension n. It ends where four more random directions take too little off
    `|R|^2` for it to reach 0 within n / 3 columns at that pace: a noise floor costs a few passes over the matrix."""
    norm, n = _norm(M), min(M.shape)  # in float64
    if norm == 0 and not M.any():
        return LowRank(torch.zeros(len(M), 0), torch.zeros(0, M.shape[1])), 0.0
    if not 1e-30 < norm < 1e30:  # float64 at the edge of what float32 holds
        return None
    R = M.float() / norm
    Q, P = R[:, :0], R[:0]
    generator = torch.Generator().manual_seed(0)
    for width in BLOCKS:
        if Q.shape[1] + width > n // 2:
            return None
        new = torch.linalg.qr(R @ torch.randn(M.shape[1], width, generator=generator)).Q
        new = torch.linalg.qr(new - Q @ (Q.T @ new)).Q
        part = new.T @ R
        R.addmm_(new, part, alpha=-1)
        Q, P, left = torch.cat([Q, new], 1), torch.cat([P, part]), _size(R)
        if left <= TOLERANCE:
            break
        more = torch.linalg.qr(R @ torch.randn(M.shape[1], 4, generator=generator)).Q
        if left**2 > _size(more.T @ R) ** 2 / 4 * (min(n // 3, sum(BLOCKS)) - Q.shape[1]):
            return None
    else:
        return None
    del R
    Z = torch.linalg.qr(P.T.double()).Q  # M (1 - Z Z^T) = R (1 - Z Z^T)
    U, s, Vh = torch.linalg.svd(torch.cat([m.double() @ Z for m in M.split(ROWS)]), full_matrices=False)
    left = norm**2 - s.square().cumsum(0)  # energy after column i
    keep = int((left > (0.9 * TOLERANCE * norm) ** 2).sum()) + 1
    found = balanced(U[:, :keep], s[:keep], Vh[:keep] @ Z.T)
    residual = _size(found.dense().sub_(M).div_(norm))
    return (found, residual) if residual <= TOLERANCE else None


def balanced(U: Float[Tensor, "out r"], s: Float[Tensor, " r"], Vh: Float[Tensor, "r in_"]) -> LowRank:
    """`B = U sqrt(S)`, `A = sqrt(S) Vh` in float32."""
    root = s.sqrt()
    return LowRank((U * root).float(), (root[:, None] * Vh).float())


def _norm(M: Tensor) -> float:
    """Frobenius norm."""
    m = (M.float() if M.dtype == torch.bfloat16 else M).numpy()
    return float(np.einsum("ij,ij->", m, m, dtype=np.float64)) ** 0.5


def _size(M: Tensor) -> float:
    """The same to 1e-7, of what is not far from 1."""
    return float(torch.linalg.vector_norm(M, dim=1).double().norm())
