"""Comparisons between heads and between users: the matched scale, held-out scores and their intervals.

On held-out texts of user j, with theta of user i, `CE[i, j]`: the diagonal should be the least of its column. A gain is
`CE(base) - CE(theta)` in nats per token. Heads are compared at a matched scale, since alpha means something else in
each: to second order a theta of norm 1 in a random direction moves the base by

    kappa(alpha) = (gamma alpha)^2 / (2 D) mean_t sum_i phi_ti^2 Var_{v ~ p_t}(C_vi)     nats of KL per token,

and alpha is chosen so that kappa is the same for every head. docs/method.md section 10.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ws.theta.adam import anchored
from ws.theta.fit import FitConfig, Problem, ce_and_kl, evaluate, lse_and_mean
from ws.theta.heads import Head
from ws.theta.intervals import Interval, t_interval
from ws.theta.recorded import Recorded, at_once, dealt
from ws.theta.states import States

# ---- scale -------------------------------------------------------------------------------------------------------


def random_kl(problem: Problem, gamma: float) -> float:
    """`kappa`: KL to the base, nats per token to second order, of a theta of norm 1 in a random direction."""
    if problem.quick:
        variances = problem.quick.variances()
    else:
        _, square = lse_and_mean(problem.base.logp, torch.zeros_like(problem.phi), problem.C.square())
        variances = square - problem.m0.square()
    spread = (problem.phi.square() * variances.clamp(min=0)).sum(1)
    return float((gamma * problem.alpha) ** 2 / (2 * problem.D) * spread.double().mean())


def matched_heads(
    heads: dict[str, Head], train: Recorded, gamma: float, target: float
) -> tuple[dict[str, Head], dict[str, float]]:
    """The same heads with alpha such that `kappa` is `target` nats of KL per token; and kappa at the given alphas.
    ValueError for a target that is not above 0, and for a head that moves nothing (alpha or gamma is 0)."""
    if not target > 0:
        raise ValueError(f"MATCHED_KL = {target}: must be above 0")
    before = {name: random_kl(train.problem(head), gamma) for name, head in heads.items()}
    for name, kappa in before.items():
        if not kappa > 0:
            raise ValueError(f"head {name} moves nothing at ALPHA {heads[name].alpha:g} and GAMMA {gamma:g}")
    return {n: replace(h, alpha=h.alpha * (target / before[n]) ** 0.5) for n, h in heads.items()}, before


def distinct_functions(heads: dict[str, Head]) -> dict[str, Head]:
    """Without the LM-head updates that are the same function of h as another head: those of `cvh` and `svd_cvh`."""
    return {name: head for name, head in heads.items() if name not in ("lm_head_cvh", "lm_head_svd")}


# ---- held-out scores ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Heldout:
    """Held-out tokens of all users: their states, each token's text, each text's user, number of tokens, and cross-entropy per
    token under the base (nats)."""

    rest: Recorded
    text: Int[Tensor, " T"]
    user: Int[Tensor, " texts"]
    tokens: Int[Tensor, " texts"]
    ce0: Float[Tensor, " texts"]
    users: list[str]


def numbered_texts(states: dict[str, States]) -> tuple[Int[Tensor, " T"], Int[Tensor, " texts"]]:
    """Each token's text, numbered through all users in their order, and each text's user."""
    owner = torch.repeat_interleave(torch.tensor([len(s.y) for s in states.values()]))
    number = torch.stack([owner, torch.cat([s.text for s in states.values()])])
    texts, number = number.unique(dim=1, return_inverse=True)
    return number, texts[0]


def make_heldout(rest: Recorded) -> Heldout:
    """Held-out texts of every user in one problem, one 'owner' per text."""
    text, user = numbered_texts(rest.states)
    tokens = torch.bincount(text)
    ce0 = torch.bincount(text, weights=-rest.base.of_y.double().cpu()) / tokens
    return Heldout(rest, text, user, tokens, ce0, list(rest.states))


def score(
    heldout: Heldout, head: Head, thetas: Float[Tensor, "rows texts D"], cfg: FitConfig
) -> tuple[Float[Tensor, "rows texts"], Float[Tensor, "rows texts"]]:
    """CE and KL to the base per token (nats) of each held-out text under the theta that a row has for it, summed over the whole
    vocabulary."""
    problem, found = heldout.rest.problem(head, heldout.text, expand=False), []
    for row in thetas:
        X = cfg.gamma * problem.alpha * row.to(problem.phi)[problem.owner] * problem.phi
        lse = heldout.rest.lse(head, X) if X.any() else problem.lse0
        found.append(torch.stack(ce_and_kl(problem, X, lse)))
    ce, kl = torch.stack(found, dim=1).cpu()
    return ce, kl


def score_near(
    heldout: Heldout, head: Head, own: Float[Tensor, "texts D"], thetas: Float[Tensor, "rows texts D"], cfg: FitConfig
) -> Float[Tensor, "rows texts"]:
    """CE as `score` has it; over a large vocabulary by an expansion that is anchored at the `own` thetas."""
    if not heldout.rest.large:
        return score(heldout, head, thetas, cfg)[0]
    near, _ = anchored(heldout.rest.problem(head, heldout.text), own, cfg)
    found, texts = [], len(own)
    for some in thetas.split(at_once(len(heldout.text))):
        try:
            problem = dealt(near, heldout.text.expand(len(some), -1), texts)
            found.append(evaluate(problem, some.flatten(0, 1), cfg).ce.unflatten(0, (-1, texts)).cpu())
        except ValueError:  # an exponential that overflowed, far out
            found.append(score(heldout, head, some, cfg)[0])
    return torch.cat(found)


def by_user(heldout: Heldout, values: Float[Tensor, "*rows texts"]) -> Float[Tensor, "*rows users"]:
    """Mean per token over each user's texts, from per-text means."""
    n = heldout.tokens.to(values)
    member = torch.nn.functional.one_hot(heldout.user, len(heldout.users)).to(values)
    return (values * n) @ member / (n @ member)


def mean_interval(heldout: Heldout, per_text: Float[Tensor, " texts"], level: float = 0.95) -> Interval:
    """Mean over users of a per-text quantity (nats per token), with its t interval over each user's texts."""
    values, tokens, user = (x.cpu().numpy() for x in (per_text.double(), heldout.tokens, heldout.user))
    return t_interval(values, tokens, user, level)
