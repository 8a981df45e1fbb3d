"""The optimum of a theta fit, by Newton's method in float64: the reference that Adam is compared with.

The loss of `ws.theta.fit` is convex in theta (logits are affine in it) and has D unknowns, so its Hessian is small:

    H = c^2 (1 + beta)/N [ sum_t phi_t phi_t^T * (C^T diag(p_t) C) - sum_t (phi_t * m_t)(phi_t * m_t)^T ] + 2 lam I

with `c = gamma alpha`, `m_t = C^T p_t`, `*` elementwise. Each step minimises the quadratic model, exactly, over all of
R^D or over the ball `|theta| <= R` (then through the secular equation of its multiplier mu), followed by a backtracking
line search. A Hessian is kept while it serves: it is formed again only when the gradient shrinks by less than a factor
of ten. docs/method.md section 10.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ws.theta.fit import FitConfig, Problem, evaluate, lse_and_mean

HESSIAN_TOKENS = 512  # tokens x vocabulary entries per block of the Hessian
HESSIAN_WORDS = 2048
ALL_WORDS = 16384  # vocabularies larger than this are cut: beyond the words that hold all but RARE of the probability, a token's
RARE = 0.02  # probabilities are taken as its own rest times the words' shares of all rests
TOLERANCE = 1e-7  # gradient norm relative to that at theta = 0
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


def as_float64(problem: Problem) -> Problem:
    """The same problem with all arithmetic in float64 (its recorded base stays as stored)."""
    if problem.phi.dtype == torch.float64:
        return problem
    phi, C = problem.phi.double(), problem.C.double()
    lse0, m0 = lse_and_mean(problem.base.logp, torch.zeros_like(phi), C)
    ce0 = problem.ce0.double() - problem.lse0.double() + lse0
    return replace(problem, phi=phi, C=C, Cy=C[problem.base.y], m0=m0, lse0=lse0, ce0=ce0)


def hessian(
    problem: Problem, theta: Float[Tensor, "users D"], cfg: FitConfig, user: int, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "D D"]:
    """Hessian of one user's loss at theta, formed in `dtype`, returned in float64. The solver forms it in float32: it
    only steers the steps, the gradient that decides where they end is float64. `sum_tv p_tv (phi_t phi_t^T) * (C_v
    C_v^T)` is one product per block: `P^T F` with the upper-triangle products `F_t = phi_ti phi_tj`, weighted by `C_vi
    C_vj`; half the work of a `D x D` product per token, and no `(T, V)` array. Of a large vocabulary only the words that hold
    98 % of the probability are summed token by token."""
    c, D = cfg.gamma * problem.alpha, problem.D
    C = (problem.C - problem.C.mean(dim=0)).to(dtype)  # logits are free up to a constant; centred columns cancel less
    i, j = torch.triu_indices(D, D, device=C.device)
    upper, spread = C.new_zeros(len(i)), C.new_zeros(D, D)
    mine = (problem.owner == user).nonzero()[:, 0]
    parts, norms, mass = mine.split(HESSIAN_TOKENS), [], C.new_zeros(len(C))

    def block(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        phi = problem.phi[rows].to(dtype)
        return phi, problem.base.logp[rows.to(problem.base.logp.device)], c * theta[user].to(phi) * phi

    for rows in parts:
        phi, logp, X = block(rows)
        lse, m = lse_and_mean(logp, X, C)
        gated = phi * m
        spread += gated.T @ gated
        norms.append(lse)
        for v in range(0, len(C) if len(C) > ALL_WORDS else 0, HESSIAN_WORDS):
            mass[v : v + HESSIAN_WORDS] += _chances(logp, X, lse, C, slice(v, v + HESSIAN_WORDS)).sum(dim=0)
    common, rare = _common(mass) if len(C) > ALL_WORDS else (torch.arange(len(C), device=C.device), None)
    for rows, lse in zip(parts, norms, strict=True):
        phi, logp, X = block(rows)
        products, said = phi[:, i] * phi[:, j], torch.zeros_like(lse)
        for words in common.split(HESSIAN_WORDS):
            p, part = _chances(logp, X, lse, C, words), C[words]
            upper += ((p.T @ products) * (part[:, i] * part[:, j])).sum(0)
            said += p.sum(dim=1)
        if rare is not None:
            weight = (mass[rare] / mass[rare].sum()).sqrt()[:, None] * C[rare]
            left = (1 - said).clamp(min=0)[:, None] * phi
            upper += ((left.T @ phi) * (weight.T @ weight))[i, j]
    H = torch.zeros_like(spread)
    H[i, j] = upper
    H = H + H.T - torch.diag(H.diagonal())
    curvature = c**2 * (1 + cfg.beta) / len(mine) * (H - spread).double()
    return curvature + 2 * cfg.lam * torch.eye(D, dtype=torch.float64, device=H.device)


def _chances(logp: Tensor, X: Tensor, lse: Tensor, C: Tensor, words: Tensor | slice) -> Float[Tensor, "T words"]:
    """Probabilities of some words at every token."""
    there = words if isinstance(words, slice) else words.to(logp.device)
    return torch.exp(torch.addmm(logp[:, there].to(X), X, C[words].T) - lse[:, None])


def _common(mass: Float[Tensor, " V"]) -> tuple[Tensor, Tensor]:
    """The fewest words that hold all but RARE of the probability, and the others."""
    ordered, words = mass.sort(descending=True)
    n = int((ordered.double().cumsum(0) < (1 - RARE) * float(mass.double().sum())).sum()) + 1
    return words[:n].sort().values, words[n:]


def _eigen(H: Tensor) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues kept off zero, eigenvectors, condition number."""
    values, vectors = torch.linalg.eigh(H)
    condition = float(values[-1] / values[0].clamp(min=1e-300))
    return values.clamp(min=float(values[-1]) * 1e-14), vectors, condition


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


def fit_optimum(
    problem: Problem, cfg: FitConfig, max_norm: float = math.inf, first: Float[Tensor, "users D D"] | None = None
) -> list[Optimum]:
    """The optimum of every user of the problem, over all theta or over `|theta| <= max_norm`. `first`: the Hessians at
    theta = 0 where they are known already. Raises ValueError when a value is not finite, or when a user has not come
    within TOLERANCE after MAX_ITERATIONS."""
    problem = as_float64(problem)
    users, D = problem.users, problem.D
    theta = problem.phi.new_zeros(users, D)
    terms = evaluate(problem, theta, cfg)
    start = terms.grad.norm(dim=1).clamp(min=1e-300)
    eigen: list[list[Tensor] | None] = [None] * users
    steps, formed, condition = [0] * users, [0] * users, [1.0] * users

    def ratios(theta: Tensor, grad: Tensor) -> list[float]:
        return [float(_residual(grad[u], theta[u], max_norm)[0].norm() / start[u]) for u in range(users)]

    ratio = ratios(theta, terms.grad)
    while active := [u for u in range(users) if ratio[u] > TOLERANCE and float(terms.grad[u].norm()) > 0]:
        if max(steps) == MAX_ITERATIONS:
            u = active[0]
            raise ValueError(
                f"head {problem.name}, user {u}: no optimum after {MAX_ITERATIONS} Newton steps, gradient norm"
                f" {ratio[u]:.1e} of that at theta = 0 (wanted {TOLERANCE:.0e}), condition number {condition[u]:.1e}"
            )
        goal = theta.clone()
        for u in active:
            if eigen[u] is None:
                known = first is not None and steps[u] == 0
                *eigen[u], condition[u] = _eigen(first[u] if known else hessian(problem, theta, cfg, u, torch.float32))
                formed[u] += 1
            goal[u] = _model_minimum(*eigen[u], terms.grad[u], theta[u], max_norm)
        # Backtracking from the full step, each user with a step size of its own, until the loss falls enough (Armijo)
        # or the gradient shrinks at the same loss: near the optimum the loss's change is below what float64 resolves.
        # A smaller gradient alone is no progress: far out, where the softmax is saturated, it is small as well.
        size = torch.ones_like(terms.loss)
        slope = (terms.grad * (goal - theta)).sum(1)
        for _ in range(40):
            trial = theta + size[:, None] * (goal - theta)
            new = evaluate(problem, trial, cfg)
            now = ratios(trial, new.grad)
            falls = new.loss <= terms.loss + 1e-4 * size * slope
            level = new.loss <= terms.loss + ROUNDING * terms.loss.abs()
            bad = [u for u in active if not falls[u] and not (level[u] and now[u] < ratio[u])]
            if not bad:
                break
            size[bad] /= 2
        else:
            raise ValueError(
                f"head {problem.name}, user {bad[0]}: the line search found no better theta"
                f" (slope {float(slope[bad[0]]):.1e})"
            )
        for u in active:
            steps[u] += 1
            if float(size[u]) < 1 or now[u] > KEEP_HESSIAN * ratio[u]:
                eigen[u] = None
        theta, terms, ratio = trial, new, now
    return [
        Optimum(
            theta[u].cpu(), float(terms.loss[u]), float(terms.ce[u]), float(terms.kl[u]), ratio[u], steps[u], formed[u],
            condition[u], _residual(terms.grad[u], theta[u], max_norm)[1],
        )
        for u in range(users)
    ]  # fmt: skip
