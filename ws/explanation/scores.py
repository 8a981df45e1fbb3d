"""How much of a target a subspace recovers, against the null of random subspaces.

A target is a `d x q` matrix F scaled so that `f(B) = |B^T F|_F^2` is the energy fraction a basis explains: the columns
are the normalised rows of an activation difference, or `U S` of a weight matrix. Concentration is `R = f d / r`, 1 in
expectation for a uniformly random subspace. (docs/method.md section 6)
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ws.subspaces.algebra import Basis, project_away
from ws.subspaces.eigen import gram

EPS = 1e-12
SPAN_TOLERANCE = 1e-2  # singular values of w above this fraction of the largest span it
FULL = 1e-2  # least part of a column that nothing else holds, from which on none is near being dropped
MOST_DRAWS = 64  # random subspaces that are held at a time
NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Target:
    """What a subspace is scored on: `F (d, q)` float64 with `G = F F^T`, living in `dim` dimensions. `trace = tr G`,
    `square = tr G^2`, `energies` = eigenvalues of G, largest first, with their eigenvectors `axes`."""

    F: Float[Tensor, "d q"]
    dim: int

    @cached_property
    def trace(self) -> float:
        return float(self.F.square().sum())

    @cached_property
    def square(self) -> float:
        return float(gram(self.F if self.F.shape[0] < self.F.shape[1] else self.F.T).square().sum())

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.svd(self.F, full_matrices=False)[:2]

    @property
    def energies(self) -> Float[Tensor, " p"]:
        return self._svd[1].square()

    @property
    def axes(self) -> Float[Tensor, "d p"]:
        return self._svd[0]

    @property
    def span(self) -> "Target | None":
        """`L / sqrt(rank L)`, L its axes of more than SPAN_TOLERANCE of the largest singular value; None where rank L > d/2."""
        wide = self.energies > SPAN_TOLERANCE**2 * self.energies[0]
        rank = int(wide.sum())
        return Target(self.axes[:, wide] / math.sqrt(rank), self.dim) if rank <= self.F.shape[0] / 2 else None


@dataclass(frozen=True)
class Score:
    """conc = R, z against the null, energy_frac = f."""

    conc: float
    z: float
    energy_frac: float


ZERO = Score(0.0, 0.0, 0.0)
UNDEFINED = Score(NAN, NAN, NAN)


def target(F: Float[Tensor, "d q"], dim: int | None = None) -> Target:
    """A target from its scaled factor; dim is d unless a subspace was projected out of everything."""
    return Target(F.double().cpu(), dim or F.shape[0])


def activation_target(X: Float[Tensor, "n d"], dim: int | None = None) -> Target:
    """Rows scaled to `x / sqrt(n (|x|^2 + 1e-12))`: f is the mean over rows of the fraction explained."""
    X = X.double()
    return target((X / (len(X) * (X.square().sum(dim=1, keepdim=True) + EPS)).sqrt()).T, dim)


def weight_target(M: Float[Tensor, "d m"]) -> Target:
    """`M / |M|_F`, from M itself or from its left factor `U S`."""
    return target(M.double() / math.sqrt(float(M.double().square().sum()) + EPS))


def weight_targets(F_o: Tensor | None, F_down: Tensor | None) -> dict[str, Target | None]:
    """Targets `oproj`, `downproj`, `combined` from left factors `U S (d, r)` of w_o and w_down; None where missing.
    `combined` is `[w_o/|w_o| | w_down/|w_down|]`, so its score is the mean of the two."""
    single = {n: None if F is None else weight_target(F) for n, F in (("oproj", F_o), ("downproj", F_down))}
    both = [t.F for t in single.values() if t is not None and t.trace > 0]
    return single | {"combined": target(torch.cat(both, dim=1) / math.sqrt(2.0 + EPS)) if len(both) == 2 else None}


def energy(target: Target, B: Float[Tensor, "d r"]) -> float:
    """`f(B) = |B^T F|_F^2`."""
    return float((B.double().T @ target.F).square().sum())


def null_sd(target: Target, r: int) -> float:
    """Closed-form sd of R over uniformly random rank-r subspaces, R = f d / r; 0 where G is isotropic.
    `Var f / tr(G)^2 = 2 r (d-r) / (d^2 (d-1)(d+2)) (d tr(G^2)/tr(G)^2 - 1)`"""
    d = target.dim
    if target.trace <= 0 or d <= 1:
        return 0.0
    spread = max(d * target.square / target.trace**2 - 1.0, 0.0)
    return math.sqrt(2.0 * r * (d - r) / (d * d * (d - 1.0) * (d + 2.0)) * spread) * d / r


def shares(bases: Sequence[Basis], target: Target) -> list[float]:
    """`energy` of many bases at once."""
    B, ranks = torch.cat([b.B for b in bases], dim=1).double(), torch.tensor([b.rank for b in bases])
    owner = torch.repeat_interleave(torch.arange(len(bases)), ranks)
    return B.new_zeros(len(bases)).index_add_(0, owner, (B.T @ target.F).square().sum(dim=1)).tolist()


def score(
    target: Target | Tensor | None, basis: Basis | Tensor, missing: Score = UNDEFINED, f: float | None = None
) -> Score:
    """How much of a target a subspace recovers: `conc` (R, 1 for a random subspace), `z`, `energy_frac`.

    target: a `Target` (`activation_target`, `weight_target`), or a `(d, m)` matrix that is taken as a weight difference.
    basis: `(d, r)` with orthonormal columns. `missing` where there is no target, no signal or r = 0. f: the energy fraction of
    a basis that was looked at before. Raises ValueError where the columns are not orthonormal or the sizes differ.
    (docs/method.md section 6)

    Examples:
        >>> import torch, ws
        >>> M = torch.eye(16)[:, :2] @ torch.randn(2, 40)
        >>> round(ws.score(M, torch.eye(16)[:, :2]).conc, 4), round(ws.score(M, torch.eye(16)[:, 8:]).conc, 4)
        (8.0, 0.0)
    """
    B = basis.B if isinstance(basis, Basis) else basis
    r = B.shape[1]
    if isinstance(target, Tensor):
        target = weight_target(target)
    if target is None or r == 0 or target.trace <= 0:
        return missing
    if f is None:
        if B.shape[0] != target.F.shape[0]:
            raise ValueError(f"the basis is {B.shape[0]} wide, the target {target.F.shape[0]}")
        off = float((B.T @ B - torch.eye(r, dtype=B.dtype, device=B.device)).abs().max())
        if not off <= 1e-3:
            hint = "ws.subspaces.algebra.orthonormalize"
            raise ValueError(f"the basis is not orthonormal: max |B^T B - I| = {off:.2g}; {hint}")
        f = energy(target, B)
    conc = f * target.dim / r
    sd = null_sd(target, r)
    # rows that nearly vanish leave a trace under 1: the null is that of what is left
    return Score(conc, (conc / target.trace - 1.0) / sd if sd > 0 else 0.0, f)


def topic_terms(target: Target, basis: Float[Tensor, "d r"]) -> Float[Tensor, " n"]:
    """R of every row by itself, `(|B^T x_i|^2 / |x_i|^2) d / r`; their mean is R. Zeros for an empty basis."""
    n, r = target.F.shape[1], basis.shape[1]
    return (basis.double().T @ target.F).square().sum(dim=0) * n * target.dim / max(r, 1)


def oracle_fraction(
    target: Target | None, basis: Float[Tensor, "d r"], rows: bool = False, f: float | None = None
) -> float:
    """`f(B) / f(best subspace of the same rank)` in [0, 1]; with `rows` (an activation target) NaN where r >= n. f: f(B), where
    it is known."""
    r = basis.shape[1]
    if target is None or r == 0 or target.trace <= 0 or (rows and r >= target.F.shape[1]):
        return NAN
    return min((energy(target, basis) if f is None else f) / float(target.energies[:r].sum()), 1.0)


def oracle_basis(target: Target, r: int) -> Float[Tensor, "d r"]:
    """Top-r left singular vectors of F: the best subspace of rank r (fewer where F has fewer)."""
    return target.axes[:, : min(r, int((target.energies > 0).sum()))]


def span_score(
    target: Target | None, basis: Float[Tensor, "d r"], f: float | None = None, inside: float | None = None
) -> float:
    """`f(B) / (|L^T B|_F^2 / rank L)`, L the span of the target (singular values above 1e-2 of the largest). 1 where B's share
    of the span explains as much as a random part of the span would. NaN if rank L > d/2, or where B has nothing in the span.
    f, inside: f(B) and `|L^T B|_F^2 / rank L`, where they are known."""
    if target is None or basis.shape[1] == 0 or target.trace <= 0:
        return NAN
    if inside is None:
        span = target.span
        inside = energy(span, basis) if span else NAN
    return (energy(target, basis) if f is None else f) / inside if inside >= EPS else NAN


def monte_carlo_null(target: Target, r: int, draws: int, label: str, seed: int = 0) -> Float[Tensor, " draws"]:
    """R of `draws` uniformly random rank-r subspaces; the seed is a stable hash of `label` and `seed`."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{label}/{r}/{seed}".encode()))
    d, values = target.F.shape[0], []
    for few in torch.arange(draws).split(MOST_DRAWS):
        X = torch.stack([torch.randn(d, r, generator=generator, dtype=torch.float64) for _ in few])
        B = torch.linalg.qr(X).Q.float().double()  # as `random_basis` has it
        values.append((B.mT @ target.F).square().sum(dim=(1, 2)) * target.dim / r)
    return torch.cat(values)


def without(X: Float[Tensor, "n d"], C: Basis) -> Target:
    """The activation target of `X (I - C C^T)`, in `d - rank C` dimensions."""
    X, Q = X.double(), C.B.double()
    return activation_target(X - (X @ Q) @ Q.T, X.shape[1] - C.rank)


def largest_coordinates(target: Target, count: int) -> tuple[Basis, float]:
    """The coordinates of the residual stream that hold most of an activation target, as a basis `(d, count)`, and their share
    of its energy (chance: count / d). A few coordinates of a trained transformer are massive at every token."""
    energy = target.F.square().sum(dim=1)
    places = energy.topk(min(count, len(energy))).indices.sort().values
    share = float(energy[places].sum()) / target.trace if target.trace > 0 else NAN
    return Basis(torch.eye(len(energy))[:, places]), share


def specific(target: Target, basis: Basis, C: Basis) -> tuple[Score, int]:
    """Score and rank of what B adds to C: `project_away(B, C)` on the target of `without(X, C)`."""
    if basis.rank:
        X, Q = basis.B.double(), C.B.double()
        X = X - Q @ (Q.T @ X)
        root, off = torch.linalg.cholesky_ex(X.T @ X)  # R^T of X's QR
        if not off and float(root.diagonal().min()) > FULL:
            f = float(torch.linalg.solve_triangular(root, X.T @ target.F, upper=False).square().sum())
            return score(target, basis, ZERO, f), basis.rank
    left = project_away(basis, C)
    return score(target, left.B, ZERO), left.rank
