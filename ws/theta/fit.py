"""Fit of theta: one small vector per user, on recorded hidden states, by Adam with an analytic gradient.

With base logits `z0 = W h + b`, a head's `phi(h)` and `C` (`ws.theta.heads`) and `c = gamma alpha`, the logits of token t
are `z_t = z0_t + c C (theta * phi_t)`, and

    loss = (CE + beta KL) / N + lam |theta|^2,    CE = sum_t lse(z_t) - z_t[y_t],    KL = sum_t KL(p_base || p_t)
    grad = c/N sum_t phi_t * C^T ((1 + beta) p_t - onehot(y_t) - beta p_base_t) + 2 lam theta

Only `lse(z_t)` and `C^T p_t` change with theta: base log-probabilities, `C[y_t]` and `C^T p_base_t` are computed once.
A step costs `T D V`, not `T d V`, and works through small blocks of tokens x vocabulary, so it never holds `T x V`
beside the recorded base; over a large vocabulary Adam's steps ask the likeliest words and the moments of the others
(`ws.theta.cumulants`). Tokens of several users stand in one problem, each with its own theta. docs/method.md section 10.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ws.theta.base import Base, check_finite
from ws.theta.cumulants import Cumulants, unmap
from ws.theta.heads import Head

TOKENS = 512  # tokens per block
WORDS = 1024  # vocabulary entries per block and thread, so that a block stays in its cache; threads meet once a block
SAFE_EXPONENT = 30.0  # |c C (theta * phi)| up to here: exponentials need no running maximum in float32


@dataclass(frozen=True)
class FitConfig:
    """Parameters of one fit; ValueError where one is out of range. The gradient is clipped before Adam's step, theta after."""

    gamma: float = 0.5
    beta: float = 0.05
    lam: float = 1e-4
    lr: float = 0.05
    steps: int = 30
    grad_clip: float = 5.0
    theta_clip: float = 5.0

    def __post_init__(self):
        for name, value in vars(self).items():
            may_be_0 = name in ("gamma", "beta", "lam")
            if not (value > 0 or may_be_0 and value == 0):
                raise ValueError(f"{name.upper()} = {value}: must {'not be under' if may_be_0 else 'be above'} 0")


@dataclass(frozen=True, eq=False)
class Readout:
    """What a head's effect on the logits is read out by, and what that says of the base: m0 = C^T p_base; lse0 of the stored
    logp (about 0); quick the expansion that stands for sums over the vocabulary, None where these are whole."""

    C: Float[Tensor, "V D"]
    lse0: Float[Tensor, " T"]
    m0: Float[Tensor, "T D"]
    quick: Cumulants | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """The fit of one head to the tokens of one or more users. C, lse0, m0, quick: its `Readout`; Cy = C[y]; ce0 the base's
    cross-entropy; owner the user's index of each token, for one fit of these tokens after the other; n the tokens of each user;
    alpha and name the head's."""

    base: Base
    phi: Float[Tensor, "T D"]
    C: Float[Tensor, "V D"]
    lse0: Float[Tensor, " T"]
    m0: Float[Tensor, "T D"]
    quick: Cumulants | None
    Cy: Float[Tensor, "T D"]
    ce0: Float[Tensor, " T"]
    owner: Int[Tensor, " owned"]
    n: Int[Tensor, " users"]
    alpha: float
    name: str

    def sums(self, X: Float[Tensor, "T D"]) -> tuple[Float[Tensor, " T"], Float[Tensor, "T D"]]:
        """`lse(logp + X C^T)` and `C^T softmax(logp + X C^T)` of each token, over all words; blocks whose X is 0 are known."""
        moved = X.any(dim=1)
        if moved.all():
            return lse_and_mean(self.base.logp, X, self.C)
        lse, mean = self.lse0.clone(), self.m0.clone()
        for start in range(0, len(X), TOKENS):
            rows = slice(start, start + TOKENS)
            if moved[rows].any():
                lse[rows], mean[rows] = lse_and_mean(self.base.logp[rows], X[rows], self.C)
                unmap(self.base.logp)
        return lse, mean

    def rises(
        self, scaled: Float[Tensor, "users D"], summed: torch.dtype
    ) -> tuple[Float[Tensor, " users"], Float[Tensor, "users D"]]:
        """Each user's sums over its tokens at `scaled = c theta`: of `lse - lse0` in float64, and of `phi * (mean - m0)`. summed:
        the dtype in which the latter are added up."""
        if not scaled.any():
            return self.n.new_zeros(self.users, dtype=torch.float64), torch.zeros_like(scaled)
        if self.quick:
            return self.quick.rises(scaled, self.phi, self.owner.view(-1, len(self.phi)), self.lse0, self.m0, summed)
        lse, mean = self.sums(scaled[self.owner] * self.phi)
        return per_user(self, (lse - self.lse0).double()), per_user(self, (self.phi * (mean - self.m0)).to(summed))

    @cached_property
    def constants(self) -> tuple[Float[Tensor, " users"], Float[Tensor, "users D"], Float[Tensor, "users D"]]:
        """Each user's sums over its tokens, in float64, of what no theta changes: ce0, `phi * m0`, `phi * (Cy - m0)`."""
        rows = torch.cat([self.ce0[:, None], self.phi * self.m0, self.phi * (self.Cy - self.m0)], dim=1).double()
        found = rows.new_zeros(self.users, rows.shape[1])
        for own in self.owner.view(-1, len(rows)):
            found.index_add_(0, own, rows)
        return found[:, 0], *found[:, 1:].chunk(2, dim=1)

    @property
    def users(self) -> int:
        return self.n.shape[0]

    @property
    def D(self) -> int:
        return self.phi.shape[1]


@dataclass(frozen=True, eq=False)
class Terms:
    """Per-user values at one theta, float64: loss, CE and KL per token (nats), the loss's gradient."""

    loss: Float[Tensor, " users"]
    ce: Float[Tensor, " users"]
    kl: Float[Tensor, " users"]
    grad: Float[Tensor, "users D"]


@dataclass(frozen=True, eq=False)
class Fit:
    """One user's theta and the trace of loss, ce, kl and theta_norm, every entry taken before that step's update."""

    theta: Float[Tensor, " D"]
    trace: dict[str, Float[Tensor, " steps"]]


def make_problem(
    base: Base,
    head: Head,
    W: Float[Tensor, "V d"],
    owner: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    read: Readout | None = None,
) -> Problem:
    """The fit of `head` on recorded tokens, all arithmetic in `dtype`. owner `(T,)`: each token's user, 0.. users-1. read: its
    readout where it is known."""
    owner = torch.zeros_like(base.y) if owner is None else owner.to(base.y.device)
    n = torch.bincount(owner)
    if int(n.min()) == 0:
        raise ValueError(f"user {int(n.argmin())} of {n.shape[0]} has no tokens")
    phi = torch.cat([head.features(part.to(dtype)) for part in base.h.split(TOKENS)])
    if read is None:
        C = head.readout(W.to(dtype)).to(dtype).contiguous()
        read = Readout(C, *lse_and_mean(base.logp, torch.zeros_like(phi), C))
    check_finite(phi, f"features of head {head.name}")
    check_finite(read.C, f"readout of head {head.name}")
    ce0 = read.lse0 - base.of_y.to(dtype)
    return Problem(base, phi, *vars(read).values(), read.C[base.y], ce0, owner, n, float(head.alpha), head.name)


def lse_and_mean(logp: Tensor, X: Tensor, C: Tensor, mean_too: bool = True) -> tuple[Tensor, Tensor]:
    """`lse(logp + X C^T)` `(T,)` and `C^T softmax(logp + X C^T)` `(T, D)`, without ever holding `(T, V)`. Per token the
    exponent is shifted by a bound of `|X C^T|` where that is large, so that nothing overflows; then the maximum is
    searched block by block (online softmax). Where the bound is small (|x||C_v| <= 30) no shift is needed: logp <= 0,
    and the sum is at least `e^-30`."""
    lse, mean = torch.empty_like(X[:, 0]), torch.empty_like(X)
    safe = float(X.norm(dim=1).max() * C.norm(dim=1).max()) <= SAFE_EXPONENT
    width = WORDS * min(8, torch.get_num_threads())
    room = X.new_empty(min(TOKENS, len(X)) * min(width, len(C)))
    for start in range(0, len(X), TOKENS):
        rows = slice(start, start + TOKENS)
        x, total, m = X[rows], torch.zeros_like(lse[rows]), torch.zeros_like(mean[rows])
        top = torch.zeros_like(total) if safe else torch.full_like(total, -torch.inf)
        for part, words in zip(C.split(width), logp[rows].split(width, dim=1), strict=True):
            z = room[: words.numel()].view(words.shape).copy_(words).addmm_(x, part.T)
            if not safe:
                new = torch.maximum(top, z.amax(dim=1))
                keep = torch.exp(top - new)
                total, m, top = total * keep, m * keep[:, None], new
                z -= top[:, None]
            z.exp_()
            total += z.sum(dim=1)
            if mean_too:
                m.addmm_(z, part)
        lse[rows] = top + total.log()
        mean[rows] = m / total[:, None]
        unmap(logp)
    return lse, mean


def per_user(problem: Problem, values: Float[Tensor, " T *more"]) -> Float[Tensor, " users *more"]:
    """Sum of per-token values over each user's tokens."""
    out = values.new_zeros(problem.users, *values.shape[1:])
    return out.index_add_(0, problem.owner, values)


def ce_and_kl(problem: Problem, X: Float[Tensor, "T D"], lse: Float[Tensor, " T"]) -> tuple[Tensor, Tensor]:
    """CE and KL to the base, per token of each user, where `lse` is that of `logp + X C^T`."""
    rise, n = lse - problem.lse0, problem.n.double()
    ce = per_user(problem, (problem.ce0 + rise - (X * problem.Cy).sum(1)).double()) / n
    return ce, per_user(problem, (rise - (X * problem.m0).sum(1)).double()) / n


def evaluate(
    problem: Problem, theta: Float[Tensor, "users D"], cfg: FitConfig, summed: torch.dtype | None = None
) -> Terms:
    """Loss, CE, KL and the loss's gradient at theta, one row per user. summed: the dtype in which tokens' gradients are added
    up, default theirs. Raises ValueError naming the head, the user and the quantity when something is not finite."""
    theta = theta.to(problem.phi)
    c, n, (ce0, from_base, to_words) = cfg.gamma * problem.alpha, problem.n.double(), problem.constants
    scaled, wide = c * theta, theta.double()
    rise, moved = problem.rises(scaled, summed or theta.dtype)
    kl = (rise - (scaled.double() * from_base).sum(1)) / n
    ce = (ce0 - (scaled.double() * to_words).sum(1)) / n + kl
    grad = c * ((1 + cfg.beta) * moved.double() - to_words) / n[:, None] + 2 * cfg.lam * wide
    loss = ce + cfg.beta * kl + cfg.lam * wide.square().sum(1)
    for what, value in (("loss", loss[:, None]), ("gradient", grad)):
        for user in (~torch.isfinite(value)).any(1).nonzero()[:1, 0].tolist():
            norm = float(theta[user].norm())
            raise ValueError(f"head {problem.name}, user {user}: {what} is not finite at |theta| = {norm:.3g}")
    return Terms(loss, ce, kl, grad)


def clip_norm(x: Float[Tensor, "users D"], most: float) -> Float[Tensor, "users D"]:
    """Rows of x, those longer than `most` scaled down to that norm."""
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm > most, x * (most / norm.clamp(min=1e-30)), x)


def clip_gradient(grad: Float[Tensor, "users D"], most: float) -> Float[Tensor, "users D"]:
    """Each user's gradient clipped as `torch.nn.utils.clip_grad_norm_` does (1e-6 in the denominator)."""
    return grad * (most / (grad.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)


def fit_adam(problem: Problem, cfg: FitConfig) -> list[Fit]:
    """Adam from theta = 0; one Fit per user of the problem. (docs/method.md section 10) Per step: terms at theta
    (recorded in the trace), gradient clipped at norm `grad_clip`, torch's Adam with its default betas and eps, then
    theta clipped to norm `theta_clip`. Raises ValueError with the step's number when a value is not finite."""
    theta = problem.phi.new_zeros(problem.users, problem.D, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=cfg.lr)
    trace: list[Tensor] = []
    with torch.no_grad():
        for step in range(cfg.steps):
            try:
                terms = evaluate(problem, theta, cfg)
            except ValueError as error:
                raise ValueError(f"Adam step {step}: {error}") from error
            trace.append(torch.stack([terms.loss, terms.ce, terms.kl, theta.norm(dim=1)]).cpu())
            theta.grad = clip_gradient(terms.grad.to(theta), cfg.grad_clip)
            optimizer.step()
            theta.copy_(clip_norm(theta, cfg.theta_clip))
    fitted, runs = theta.detach().cpu(), torch.stack(trace, dim=-1).unbind(1)
    names = ("loss", "ce", "kl", "theta_norm")
    return [
        Fit(t.clone(), {k: v.clone() for k, v in zip(names, run, strict=True)})
        for t, run in zip(fitted, runs, strict=True)
    ]
