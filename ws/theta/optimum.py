"""The optimum of a theta fit, by Newton's method in float64: the reference that Adam is compared with.

The loss of `ws.theta.fit` is convex in theta (logits are affine in it) and has D unknowns, so its Hessian is small:

    H = c^2 (1 + beta)/N [ sum_t phi_t phi_t^T * (C^T diag(p_t) C) - sum_t (phi_t * m_t)(phi_t * m_t)^T ] + 2 lam I

with `c = gamma alpha`, `m_t = C^T p_t`, `*` elementwise. Each step minimises the quadratic model, exactly, over all of
R^D or over the ball `|theta| <= R` (then through the secular equation of its multiplier mu), followed by a backtracking
line search. A Hessian is kept while it serves: it is formed again only when the gradient shrinks by less than a factor
of ten. docs/method.md section 10.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ws.theta.adam import anchored
from ws.theta.fit import FitConfig, Problem, Terms, evaluate, lse_and_mean

HESSIAN_TOKENS = 512  # tokens x vocabulary entries per block of the Hessian
HESSIAN_WORDS = 2048
TOLERANCE = 1e-7  # gradient norm relative to that at theta = 0
# the same of an expansion, which is solved at little cost, and anchored anew until so much is expected of what comes next
NEAR = TOLERANCE / 3
FIRST = 1e-3  # that of the first expansion at most, of which nothing is known
STALLED = 1e-4  # under this, what no longer falls by half is rounding
ROUNDS = 8  # of anchoring at most
ROUNDING = 1e-10  # of the loss: a change below this is none
MAX_ITERATIONS = 60
KEEP_HESSIAN = 0.1  # a stale Hessian stays while it shrinks the gradient at least this much per step


@dataclass(frozen=True, eq=False)
class Optimum:
    """One user's optimum. theta `(D,)` float64; loss, ce, kl per token (nats); gradient_ratio = |gradient + mu theta|
    over |gradient at theta = 0|; iterations (steps taken) and hessians (formed); condition = largest over smallest
    eigenvalue of the last Hessian formed; mu = the multiplier of the norm bound (0 where the bound does not bind, or
    where there is none)."""

    theta: Float[Tensor, " D"]
    loss: float
    ce: float
    kl: float
    gradient_ratio: float
    iterations: int
    hessians: int
    condition: float
    mu: float


def as_float64(problem: Problem, start: tuple[Tensor, Tensor] | None = None) -> Problem:
    """The same problem with all arithmetic in float64, over the whole vocabulary (its recorded base stays as stored). start: its
    lse0 and m0 where they are known."""
    if problem.phi.dtype == torch.float64:
        return replace(problem, quick=None)
    phi, C = problem.phi.double(), problem.C.double()
    lse0, m0 = start or lse_and_mean(problem.base.logp, torch.zeros_like(phi), C)
    ce0 = problem.ce0.double() - problem.lse0.double() + lse0
    return replace(problem, phi=phi, C=C, Cy=C[problem.base.y], m0=m0, lse0=lse0, ce0=ce0, quick=None)


def hessian(
    problem: Problem, theta: Float[Tensor, "users D"], cfg: FitConfig, user: int, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "D D"]:
    """Hessian of one user's loss at theta, formed in `dtype`, returned in float64. The solver forms it in float32: it
    only steers the steps, the gradient that decides where they end is float64. `sum_tv p_tv (phi_t phi_t^T) * (C_v
    C_v^T)` is one product per block: `P^T F` with the upper-triangle products `F_t = phi_ti phi_tj`, weighted by `C_vi
    C_vj`; half the work of a `D x D` product per token, and no `(T, V)` array."""
    c, D = cfg.gamma * problem.alpha, problem.D
    C = (problem.C - problem.C.mean(dim=0)).to(dtype)  # logits are free up to a constant; centred columns cancel less
    i, j = torch.triu_indices(D, D, device=C.device)
    upper, spread = C.new_zeros(len(i)), C.new_zeros(D, D)
    mine = (problem.owner == user).nonzero()[:, 0]
    for rows in mine.split(HESSIAN_TOKENS):
        phi = problem.phi[rows].to(dtype)
        logp, X = problem.base.logp[rows.to(problem.base.logp.device)], c * theta[user].to(phi) * phi
        lse, m = lse_and_mean(logp, X, C)
        gated, products = phi * m, phi[:, i] * phi[:, j]
        spread += gated.T @ gated
        for part, words in zip(C.split(HESSIAN_WORDS), logp.split(HESSIAN_WORDS, dim=1), strict=True):
            p = torch.exp(torch.addmm(words.to(X), X, part.T) - lse[:, None])
            upper += ((p.T @ products) * (part[:, i] * part[:, j])).sum(0)
    H = torch.zeros_like(spread)
    H[i, j] = upper
    H = H + H.T - torch.diag(H.diagonal())
    return _of_loss((H - spread).double() / len(mine), c, cfg)


def quick_hessians(problem: Problem, theta: Float[Tensor, "users D"], cfg: FitConfig) -> Float[Tensor, "users D D"]:
    """Hessians of all users' losses at theta by the problem's expansion, in float64."""
    c = cfg.gamma * problem.alpha
    X = c * theta.to(problem.phi)[problem.owner] * problem.phi
    H = problem.quick.curvature(X, problem.phi, problem.owner, problem.users)
    return _of_loss(H / problem.n[:, None, None], c, cfg)


def _of_loss(curvature: Float[Tensor, "*users D D"], c: float, cfg: FitConfig) -> Float[Tensor, "*users D D"]:
    identity = torch.eye(curvature.shape[-1], dtype=torch.float64, device=curvature.device)
    return c**2 * (1 + cfg.beta) * curvature + 2 * cfg.lam * identity


def _eigen(H: Tensor) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues kept off zero, eigenvectors, condition number."""
    values, vectors = torch.linalg.eigh(H)
    condition = float(values[-1] / values[0].clamp(min=1e-300))
    return values.clamp(min=float(values[-1]) * 1e-14), vectors, condition


def _secant(H: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """H with the curvature along a step that the gradient's change over it tells (BFGS)."""
    along, there = H @ step, float(step @ change)
    if there <= 0:
        return H
    return H - torch.outer(along, along) / (step @ along) + torch.outer(change, change) / there


def _model_minimum(values: Tensor, vectors: Tensor, g: Tensor, theta: Tensor, radius: float) -> Tensor:
    """Minimiser over `|x| <= radius` of `g.(x - theta) + (x - theta)^T H (x - theta)/2`, H given by its eigenpairs."""
    b = vectors.T @ theta * values - vectors.T @ g
    mu = 0.0
    x = b / values
    for _ in range(100):  # Newton on the secular equation 1/radius = 1/|x(mu)|: monotone from the left
        norm = float(x.norm())
        if norm <= radius * (1 + 1e-14):
            break
        mu += norm**2 / float((x.square() / (values + mu)).sum()) * (norm - radius) / radius
        x = b / (values + mu)
    if mu > 0:
        x = x * (radius / x.norm())
    return vectors @ x


def _residual(g: Tensor, theta: Tensor, radius: float) -> tuple[Tensor, float]:
    """Gradient of the Lagrangian and the multiplier: `g + mu theta`, mu > 0 only on the ball's surface."""
    if not math.isfinite(radius) or float(theta.norm()) < radius * (1 - 1e-9):
        return g, 0.0
    mu = max(0.0, -float(g @ theta) / radius**2)
    return g + mu * theta, mu


@dataclass(eq=False)
class _Search:
    """Where the search for the users' optima stands, and what it has cost each of them."""

    theta: Float[Tensor, "users D"]
    steps: list[int]
    formed: list[int]
    condition: list[float]


def fit_optimum(
    problem: Problem,
    cfg: FitConfig,
    max_norm: float = math.inf,
    first: Float[Tensor, "users D D"] | None = None,
    exact: Problem | None = None,
) -> list[Optimum]:
    """The optimum of every user of the problem, over all theta or over `|theta| <= max_norm`. `first`: the Hessians at
    theta = 0 where they are known already; exact: the problem in float64 where it is. A problem with an expansion is solved
    by it first, anchored again at what is found; where the search ends is decided by the whole gradient in float64 either
    way. Raises ValueError when a value is not finite, or when a user has not come within TOLERANCE after MAX_ITERATIONS."""
    users, exact = problem.users, exact or as_float64(problem)
    at = _Search(exact.phi.new_zeros(users, problem.D), *([value] * users for value in (0, 0, 1.0)))
    if problem.quick:

        def curve(theta: Tensor, active: list[int]) -> Tensor:
            return quick_hessians(problem, theta, cfg)[active]

        with suppress(ValueError):  # an exponential that overflowed, far out: the search goes on from where it was
            near, off, expected = problem, 1.0, 1.0
            for _ in range(ROUNDS):
                start = replace(at)  # which counts on in the same lists
                enough = max(NEAR, min(FIRST, expected / 10))  # beyond it, what the expansion is off by counts for more
                at.theta = _newton(near, cfg, max_norm, start, curve, enough, near=True)[0].theta
                if expected <= NEAR:
                    break
                before = off
                near, off = anchored(near, at.theta, cfg)
                expected = off * off / before  # each time by the same factor less
    else:

        def curve(theta: Tensor, active: list[int]) -> list[Tensor]:
            if first is not None and not theta.any():
                return [first[u] for u in active]
            return [hessian(exact, theta, cfg, u, torch.float32) for u in active]

    at, terms, ratio, mu = _newton(exact, cfg, max_norm, at, curve, TOLERANCE, True, problem.quick is not None)
    return [
        Optimum(
            at.theta[u].cpu(), float(terms.loss[u]), float(terms.ce[u]), float(terms.kl[u]), ratio[u], at.steps[u],
            at.formed[u], at.condition[u], mu[u],
        )
        for u in range(users)
    ]  # fmt: skip


def _newton(
    problem: Problem,
    cfg: FitConfig,
    radius: float,
    at: _Search,
    curve: Callable,
    tolerance: float,
    last: bool = False,
    near: bool = False,
) -> tuple[_Search, Terms, list[float], list[float]]:
    """Newton's steps from where `at` stands until every user's gradient is within the tolerance: the search, the terms there,
    gradient ratios and multipliers. curve: Hessians of some users at theta; near: those of an expansion, which are corrected
    along the last step. Steps that lead no further end it, and raise where it is the last."""
    users, theta = problem.users, at.theta

    def look(theta: Tensor, known: Terms | None = None, asked: list[int] | None = None) -> Terms:
        """The terms at theta; asked: of these users only, who alone have moved, the others' being known."""
        still = torch.ones(users, dtype=torch.bool, device=theta.device)
        still[asked if asked is not None else slice(None)] = False
        theta = theta.masked_fill(still[:, None], 0.0)  # where nothing has to be summed
        terms = evaluate(problem, theta, cfg, torch.float64)
        if known is None:
            return terms
        pairs = ((getattr(known, k), getattr(terms, k)) for k in ("loss", "ce", "kl", "grad"))
        return Terms(*(torch.where(still.view(-1, *[1] * (new.ndim - 1)), old, new.to(old)) for old, new in pairs))

    start = look(torch.zeros_like(theta)).grad.norm(dim=1).clamp(min=1e-300)
    terms = look(theta)
    eigen: list[list[Tensor] | None] = [None] * users
    taken: dict[int, tuple[Tensor, Tensor]] = {}  # last step and what it did to the gradient

    def ratios(theta: Tensor, grad: Tensor) -> list[float]:
        return [float(_residual(grad[u], theta[u], radius)[0].norm() / start[u]) for u in range(users)]

    ratio, before = ratios(theta, terms.grad), max(at.steps)
    while active := [u for u in range(users) if ratio[u] > tolerance and float(terms.grad[u].norm()) > 0]:
        if max(at.steps) - before >= MAX_ITERATIONS:
            if not last:
                break
            u = active[0]
            raise ValueError(
                f"head {problem.name}, user {u}: no optimum after {MAX_ITERATIONS} Newton steps, gradient norm"
                f" {ratio[u]:.1e} of that at theta = 0 (wanted {TOLERANCE:.0e}), condition number {at.condition[u]:.1e}"
            )
        goal, late = theta.clone(), [u for u in active if eigen[u] is None]
        for u, H in zip(late, curve(theta, late) if late else [], strict=True):
            *eigen[u], at.condition[u] = _eigen(_secant(H, *taken[u]) if u in taken else H)
            at.formed[u] += 1
        for u in active:
            goal[u] = _model_minimum(*eigen[u], terms.grad[u], theta[u], radius)
        # Backtracking from the full step, each user with a step size of its own, until the loss falls enough (Armijo)
        # or the gradient shrinks at the same loss: near the optimum the loss's change is below what float64 resolves.
        # A smaller gradient alone is no progress: far out, where the softmax is saturated, it is small as well.
        size = torch.ones_like(terms.loss)
        slope = (terms.grad * (goal - theta)).sum(1)
        for _ in range(40 if last else 4):
            trial = theta + size[:, None] * (goal - theta)
            new = look(trial, terms, active)
            now = ratios(trial, new.grad)
            falls = new.loss <= terms.loss + 1e-4 * size * slope
            level = new.loss <= terms.loss + ROUNDING * terms.loss.abs()
            level |= not last  # an anchored expansion's gradient is not quite that of its loss
            bad = [u for u in active if not falls[u] and not (level[u] and now[u] < ratio[u])]
            if not bad:
                break
            size[bad] /= 2
        else:
            if not last:
                break
            raise ValueError(
                f"head {problem.name}, user {bad[0]}: the line search found no better theta"
                f" (slope {float(slope[bad[0]]):.1e})"
            )
        if near:
            taken = {u: (trial[u] - theta[u], new.grad[u] - terms.grad[u]) for u in active}
        for u in active:
            at.steps[u] += 1
            if float(size[u]) < 1 or now[u] > KEEP_HESSIAN * ratio[u]:
                eigen[u] = None
        stalled = not last and max(ratio) < STALLED and max(now) > max(ratio) / 2  # what is left is rounding
        theta, terms, ratio = trial, new, now
        if stalled:
            break
    at.theta = theta
    return at, terms, ratio, [_residual(terms.grad[u], theta[u], radius)[1] for u in range(users)]
