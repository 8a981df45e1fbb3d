"""Comparisons between heads and between users, and the verdict that rests on them.

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

from ws.theta.fit import Base, FitConfig, Problem, evaluate, fit_adam, lse_and_mean, make_problem, target_logp
from ws.theta.heads import Head
from ws.theta.states import States, joint_base

# ---- scale -------------------------------------------------------------------------------------------------------


def random_kl(problem: Problem, gamma: float) -> float:
    """`kappa`: KL to the base, nats per token to second order, of a theta of norm 1 in a random direction."""
    still = torch.zeros_like(problem.phi)
    _, square = lse_and_mean(problem.base.logp, still, problem.C.square())
    variance = (square - problem.m0.square()).clamp(min=0)
    return float(
        (gamma * problem.alpha) ** 2 / (2 * problem.D) * (problem.phi.square() * variance).sum(1).double().mean()
    )


def matched_heads(
    heads: dict[str, Head], base: Base, W: Float[Tensor, "V d"], gamma: float, target: float
) -> tuple[dict[str, Head], dict[str, float]]:
    """The same heads with alpha such that `kappa` is `target` nats of KL per token; and kappa at the given alphas.

    ValueError for a target that is not above 0, and for a head that moves nothing (alpha or gamma is 0).
    """
    if not target > 0:
        raise ValueError(f"MATCHED_KL = {target}: must be above 0")
    before = {name: random_kl(make_problem(base, head, W), gamma) for name, head in heads.items()}
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
    """Held-out tokens of all users: the base, its unembedding W and bias, each token's text, each text's user, number
    of tokens, and cross-entropy per token under the base (nats)."""

    base: Base
    W: Float[Tensor, "V d"]
    bias: Float[Tensor, " V"] | None
    text: Int[Tensor, " T"]
    user: Int[Tensor, " texts"]
    tokens: Int[Tensor, " texts"]
    ce0: Float[Tensor, " texts"]
    users: list[str]


def make_heldout(states: dict[str, States], W: Float[Tensor, "V d"], bias: Tensor | None) -> Heldout:
    """Held-out texts of every user in one problem, one 'owner' per text."""
    texts, user = [], []
    for u, s in enumerate(states.values()):
        for t in s.text.unique().tolist():
            texts.append(s.of_texts([t]))
            user.append(u)
    base, owner = joint_base(texts, W, bias)
    tokens = torch.bincount(owner)
    ce0 = -target_logp(base).double().cpu()
    per_text = torch.zeros(len(user), dtype=torch.float64).index_add_(0, owner.cpu(), ce0) / tokens
    return Heldout(base, W, bias, owner, torch.tensor(user), tokens, per_text, list(states))


@dataclass(frozen=True, eq=False)
class Scores:
    """CE and KL to the base per token (nats) of each held-out text under each theta `(thetas, texts)`."""

    ce: Float[Tensor, "thetas texts"]
    kl: Float[Tensor, "thetas texts"]


def score_thetas(heldout: Heldout, head: Head, thetas: Float[Tensor, "thetas D"], cfg: FitConfig) -> Scores:
    """Every theta on every held-out text."""
    problem = make_problem(heldout.base, head, heldout.W, heldout.text)
    terms = [evaluate(problem, theta.expand(len(heldout.user), -1), cfg) for theta in thetas]
    return Scores(torch.stack([t.ce.cpu() for t in terms]), torch.stack([t.kl.cpu() for t in terms]))


def score_own(heldout: Heldout, head: Head, thetas: Float[Tensor, "users D"], cfg: FitConfig) -> Scores:
    """Each held-out text under its own user's theta: one row."""
    problem = make_problem(heldout.base, head, heldout.W, heldout.text)
    terms = evaluate(problem, thetas[heldout.user], cfg)
    return Scores(terms.ce.cpu()[None], terms.kl.cpu()[None])


def by_user(heldout: Heldout, values: Float[Tensor, "*rows texts"]) -> Float[Tensor, "*rows users"]:
    """Mean per token over each user's texts, from per-text means."""
    n = heldout.tokens.to(values)
    member = torch.nn.functional.one_hot(heldout.user, len(heldout.users)).to(values)
    return (values * n) @ member / (n @ member)


# ---- controls ----------------------------------------------------------------------------------------------------


def permuted_thetas(
    states: dict[str, States],
    head: Head,
    W: Float[Tensor, "V d"],
    bias: Tensor | None,
    cfg: FitConfig,
    draws: int,
    seed: int,
) -> list[Float[Tensor, "users D"]]:
    """Control: training texts dealt to the users at random (each keeps its number of texts), fitted by Adam alike.

    What such thetas gain on held-out texts is what any user's texts would teach; only what a user's own theta gains
    beyond it is the user's.
    """
    base, owner = joint_base(list(states.values()), W, bias)
    numbers, start = [], 0
    for s in states.values():
        _, local = s.text.unique(return_inverse=True)
        numbers.append(local + start)
        start += int(local.max()) + 1
    number = torch.cat(numbers)
    home = torch.zeros(start, dtype=torch.long)
    home[number] = owner
    gen, out = torch.Generator().manual_seed(seed), []
    problem = make_problem(base, head, W, owner)
    for _ in range(draws):
        dealt = home[torch.randperm(start, generator=gen)]
        mixed = dealt[number].to(problem.owner.device)
        fits = fit_adam(replace(problem, owner=mixed, n=torch.bincount(mixed, minlength=len(states))), cfg)
        out.append(torch.stack([fit.theta for fit in fits]))
    return out


def bootstrap_users(
    heldout: Heldout, per_text: Float[Tensor, " texts"], draws: int, seed: int, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean over users of a per-text quantity, and its percentile interval over texts resampled within each user."""
    gen = torch.Generator().manual_seed(seed)
    total = torch.zeros(draws, dtype=torch.float64)
    for u in range(len(heldout.users)):
        mine = (heldout.user == u).nonzero()[:, 0]
        drawn = mine[torch.randint(len(mine), (draws, len(mine)), generator=gen)]
        n = heldout.tokens[drawn].double()
        total += (per_text.double()[drawn] * n).sum(1) / n.sum(1)
    total /= len(heldout.users)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = total.quantile(tails).tolist()
    return float(by_user(heldout, per_text.double()).mean()), low, high
