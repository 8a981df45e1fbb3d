"""Leading eigenpairs of a large positive semidefinite matrix by subspace iteration with a Chebyshev filter (Zhou, Saad, Tiago,
Chelikowsky 2006): products with a few columns in place of a reduction of the whole matrix. Filters are of float32 as long as that
gets nearer; what is found is looked at in float64, and comes with how far it may be from the eigenvectors. (docs/method.md
section 4)"""

from collections.abc import Callable
from contextlib import suppress
from math import log, sqrt

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import betaincinv
from torch import Tensor

MORE = 24  # columns beside those that are asked for
ROUNDS = {torch.float32: 9, torch.float64: 6}  # looks at what is found, with a filter between two
# of the first column over others by one filter: they are not lost beside it
GROWTH = {torch.float32: 2e5, torch.float64: 1e10}
FEW, LONGEST = 4, 24  # products of a filter
NEAR = 1e-3  # rad: bounds are not asked for before
GRID = 128  # quantiles of what is not looked at
LEAST = 1e-290  # largest entry of a matrix that is looked at

Bound = Callable[[Float[Tensor, " q"]], float]


def orthonormal(V: Float[Tensor, "d b"]) -> Float[Tensor, "d b"]:
    """An orthonormal basis of the columns' span: twice by Cholesky, by QR where that fails."""
    for _ in range(2):
        C = (V.T @ V).double().cpu()
        size = C.diagonal().rsqrt()
        L, failed = torch.linalg.cholesky_ex(C * size[:, None] * size)
        if failed or not bool(size.isfinite().all()):
            return torch.linalg.qr(V).Q
        V = V @ torch.linalg.solve_triangular(L, size.diag(), upper=False).T.to(V)
    return V


def ritz(V: Float[Tensor, "d b"], GV: Float[Tensor, "d b"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ritz values (largest first) and vectors of G in the span of orthonormal columns, G times these, norms of residuals."""
    H = (V.T @ GV).double().cpu()
    values, Y = (x.flip(-1) for x in torch.linalg.eigh((H + H.T) / 2))
    V, GV = V @ Y.to(V), GV @ Y.to(V)
    return values, V, GV, (GV - V * values.to(V)).norm(dim=0).double().cpu()


def turned(values: Float[Tensor, " b"], off: Float[Tensor, " b"], k: int) -> float:
    """By how many rad the first k Ritz vectors are turned from eigenvectors, to second order, from the residuals of all b: what
    these leave out has eigenvalues under the last one (and its residual), and is reached by each through its residual alone.
    Residuals say nothing of an eigenvector that the random start missed altogether."""
    away = (values[:k] - values[-1] - off[-1]).clamp(min=1e-300)
    first = off[:k] / away
    among = first[:, None] * off[None, k:] / (values[:k, None] - values[None, k:]).clamp(min=1e-300)
    return float(first.norm() + among.norm())


def filtered(
    G: Float[Tensor, "d d"],
    size: float,
    V: Float[Tensor, "d b"],
    GV: Float[Tensor, "d b"],
    values: Float[Tensor, " b"],
    off: Float[Tensor, " b"],
    k: int,
    growth: float,
) -> Float[Tensor, "d b"]:
    """`T_m(2 G/(size b) - 1) V`, GV being `G V / size`: eigenvalues of `G / size` under b, the last of values, stay within
    [-1, 1], number k grows by `growth`, but the first by no more than the dtype can tell from the others. First ones that are
    large enough to be there already are kept out of it as far as that gets in the way, and multiplied by G."""
    half = max(float(values[-1]), 1e-6 * float(values[0])) / 2

    def products(value: Tensor, growth: float) -> float:
        x = max(float(value) / half - 1, 1 + 1e-6)
        return log(growth) / log(x + sqrt(x * x - 1))

    needed, there = min(products(values[k - 1], growth) + 1, LONGEST), off.square() < 0.02 * half * values
    out = next(
        i for i in range(k) if not there[i] or i == k - 1 or products(values[i], GROWTH[V.dtype]) >= min(needed, FEW)
    )
    loud, before, now = V[:, :out], V[:, out:], (GV / half - V)[:, out:]
    for _ in range(int(min(needed, products(values[out], GROWTH[V.dtype]))) - 1):
        before, now = now, torch.addmm(before, G, now, beta=-1, alpha=2 / half / size).sub_(now, alpha=2)
        now -= loud @ (loud.T @ now)
    return torch.cat([GV[:, :out], now], dim=1)


def nearer(
    G: Float[Tensor, "d d"], size: float, V: Float[Tensor, "d b"], k: int, bound: Bound
) -> tuple[Tensor, Tensor, bool]:
    """Ritz values of `G / size` and vectors in V's dtype, once the first k are turned by no more than the bound, or come no
    nearer; and which of these."""
    GV, last = G @ V / size, float("inf")
    for left in reversed(range(ROUNDS[V.dtype])):
        values, V, GV, off = ritz(V, GV)
        turn = turned(values, off, k)
        allowed = bound(values) if turn < NEAR else 0.0
        if turn <= allowed or turn > last / 2 or not left:
            break
        V = orthonormal(filtered(G, size, V, GV, values, off, k, 4 * turn / max(allowed, 1e-20)))
        GV, last = G @ V / size, turn
    return values, V, turn <= allowed


def every_value(values: Float[Tensor, " b"], d: int, trace: float, squares: float) -> Float[Tensor, " d"]:
    """The b largest of d eigenvalues and stand-ins for the others: a beta distribution up to the last one, with the sum and the
    sum of squares that they must have. These do not tell many values just under the last one."""
    n, last = d - len(values), float(values[-1])
    mean, square = (trace - float(values.sum())) / n, (squares - float(values.square().sum())) / n
    others, variance = np.full(n, min(max(mean, 0.0), last)), square - mean * mean
    if 0 < mean < last and variance > 1e-12 * mean * mean and (both := mean * (last - mean) / variance - 1) > 0:
        at = (np.arange(few := min(n, GRID)) + 0.5) / few
        found = np.interp(
            (np.arange(n) + 0.5) / n, at, last * betaincinv(mean / last * both, (1 - mean / last) * both, at)
        )
        others = found[::-1].copy() if np.isfinite(found).all() else others
    return torch.cat([values, torch.from_numpy(others)])


def leading(
    G: Float[Tensor, "d d"], k: int, bound: Bound, every: bool = False
) -> tuple[Float[Tensor, " q"], Float[Tensor, "d k"]] | None:
    """The first k eigenvectors of a positive semidefinite float64 matrix, and `k + 1` eigenvalues, largest first.

    bound: by how many rad the vectors may be turned from the exact ones, given the eigenvalues. every: d eigenvalues, those past
    the first `k + 24` stood in for (`every_value`). None where the bound is not reached, or where that is not worth a try."""
    d, b, found = len(G), k + MORE, None
    size = float(G.diagonal().max()) if d else 0.0
    if 4 * b > d or not LEAST < size < float("inf"):
        return None
    trace, squares = float(G.trace()) / size, (float(torch.linalg.vector_norm(G)) / size) ** 2
    if not squares <= 1.01 * d * d:  # no entry of a positive semidefinite matrix is larger than one of its diagonal's
        return None

    def asked(values: Float[Tensor, " b"]) -> Float[Tensor, " q"]:
        return size * (every_value(values, d, trace, squares) if every else values[: k + 1])

    def enough(values: Float[Tensor, " b"]) -> float:
        return bound(asked(values))

    with suppress(RuntimeError, ValueError):  # something did not converge
        narrow = (G / size).float()
        V = orthonormal(narrow @ torch.randn(d, b, generator=torch.Generator().manual_seed(0)).to(narrow))
        _, V, _ = nearer(narrow, 1.0, V, k, enough)
        values, V, near = nearer(G, size, orthonormal(V.double()), k, enough)
        found = (asked(values), V[:, :k]) if near else None
    return found
