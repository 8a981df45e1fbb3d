"""Adam on problems with an expansion over the vocabulary, which is checked where Adam ends. docs/method.md section 10."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ws.theta.fit import Fit, FitConfig, Problem, evaluate, fit_adam, per_user

ANCHORED = 1e-3  # of the gradient at theta = 0: what Adam's last gradient may be off by, of an expansion at an anchor
ANCHORS = 3  # tried before every step goes over the whole vocabulary
FAR = 1.0  # nats of KL per token: a fit that went so far anywhere on its way is not one for an expansion


def anchored(problem: Problem, thetas: Float[Tensor, "users D"], cfg: FitConfig) -> tuple[Problem, float]:
    """The problem with its expansion anchored where these thetas are; and how far the gradient was off there, of its norm
    at theta = 0, the largest of all users."""
    thetas = thetas.to(problem.phi)
    whole, X = replace(problem, quick=None), cfg.gamma * problem.alpha * thetas[problem.owner] * problem.phi
    lse, mean = whole.sums(X)
    off = cfg.gamma * problem.alpha * (1 + cfg.beta) * per_user(problem, problem.phi * (problem.quick(X)[1] - mean))
    start = evaluate(problem, torch.zeros_like(thetas), cfg).grad
    wrong = float((off.norm(dim=1) / problem.n / start.norm(dim=1).clamp(min=1e-30)).max())
    return replace(problem, quick=problem.quick.anchored(X, lse, mean)), wrong


def near_fits(problem: Problem, cfg: FitConfig) -> list[Fit]:
    """`fit_adam` by an expansion. ValueError where an exponential overflows, or where a fit goes FAR from the base."""
    fits = fit_adam(problem, cfg)
    if (most := max(float(fit.trace["kl"].max()) for fit in fits)) > FAR:
        raise ValueError(f"head {problem.name}: {most:.2g} nats of KL per token are too far for an expansion")
    return fits


def adam(problem: Problem, cfg: FitConfig) -> tuple[list[Fit], Problem]:
    """`fit_adam`; where the problem has an expansion, by it: fitted, anchored at what was found, fitted again, until the
    gradient there is within ANCHORED of that over the whole vocabulary. Else, and where it goes FAR, every step goes over the
    whole. With the fits the problem, anchored where they are."""
    if problem.quick is None:
        return fit_adam(problem, cfg), problem
    near = problem
    for _ in range(ANCHORS):
        try:
            fits = near_fits(near, cfg)
        except ValueError:
            break
        near, off = anchored(near, torch.stack([fit.theta for fit in fits]), cfg)
        if off <= ANCHORED:
            return fits, near
    return fit_adam(replace(problem, quick=None), cfg), problem
