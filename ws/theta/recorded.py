"""Users' states side by side, and what their fits share: the base, the likeliest words, the moments of the others.

All of it is made when it is first asked for, so that a run whose fits are kept makes none of it. docs/method.md section 10.
"""

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ws.theta.base import Base, record_base
from ws.theta.cumulants import LARGE, Cumulants, likeliest, moments
from ws.theta.fit import Problem, Readout, lse_and_mean, make_problem
from ws.theta.heads import Head
from ws.theta.optimum import as_float64
from ws.theta.states import States


def content_hash(*parts: Tensor | None) -> str:
    """Content of tensors."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if part is not None:
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


@dataclass(frozen=True, eq=False)
class Recorded:
    """Recorded states by user, the unembedding W and its bias. expand: whether sums over a LARGE vocabulary may be those of
    an expansion. readouts: heads' readouts, which do not depend on states: `replace(recorded, states=...)` shares them."""

    states: dict[str, States]
    W: Float[Tensor, "V d"]
    bias: Float[Tensor, " V"] | None = None
    expand: bool = True
    readouts: dict = field(default_factory=dict, repr=False)

    @property
    def large(self) -> bool:
        """Whether problems have an expansion."""
        return self.expand and len(self.W) > LARGE

    @cached_property
    def base(self) -> Base:
        """The base of all users' tokens, one user after the other."""
        h, y = (torch.cat([getattr(s, part) for s in self.states.values()]) for part in ("h", "y"))
        return record_base(h, y, self.W, self.bias)

    @cached_property
    def owner(self) -> Int[Tensor, " T"]:
        """Each token's user."""
        return torch.repeat_interleave(torch.tensor([len(s.y) for s in self.states.values()]))

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Content of every user's states."""
        return {user: content_hash(s.h, s.y, s.text) for user, s in self.states.items()}

    @cached_property
    def unembedding(self) -> str:
        """Content of the unembedding and its bias."""
        return content_hash(self.W, self.bias)

    def problem(self, head: Head, owner: Int[Tensor, " T"] | None = None, expand: bool = True) -> Problem:
        """The fit of a head to these tokens, each of its user or of another owner. expand: by an expansion where the vocabulary
        is LARGE."""
        owner, (content, C) = self.owner if owner is None else owner, self._readout(head)
        quick = self._expansion(content, C) if expand and self.large else None
        if content not in self._known:
            zero = C.new_zeros(len(self.base.y), C.shape[1])
            self._known[content] = quick(zero) if quick else lse_and_mean(self.base.logp, zero, C)
        return make_problem(self.base, head, self.W, owner, read=Readout(C, *self._known[content], quick))

    def exact(self, problem: Problem) -> Problem:
        """The problem in float64, over the whole vocabulary."""
        key = content_hash(problem.C) + ", float64"
        if key not in self._known:
            whole = as_float64(problem)
            self._known[key] = whole.lse0, whole.m0
        return as_float64(problem, self._known[key])

    def lse(self, head: Head, X: Float[Tensor, "T D"]) -> Float[Tensor, " T"]:
        """`lse(logp + X C^T)` of every token over all words, C the head's readout; the same is summed once."""
        content, C = self._readout(head)
        key = f"{content}, {content_hash(X)}"
        if key not in self._known:
            self._known[key] = lse_and_mean(self.base.logp, X, C, mean_too=False)[0]
        return self._known[key]

    @cached_property
    def _known(self) -> dict:
        return {}

    def _readout(self, head: Head) -> tuple[str, Float[Tensor, "V D"]]:
        """The head's readout and its content. Over a LARGE vocabulary without its mean over the words, which no chance depends
        on, but the rounding of sums does."""
        B, W = head.B, self.W
        if (kind := (type(head), id(B), id(W))) not in self.readouts:
            C = head.readout(W)
            C = (C - C.mean(dim=0) if len(C) > LARGE else C).contiguous()
            self.readouts[kind] = content_hash(C), C, B, W  # B and W are kept, so that no other matrix gets their ids
        return self.readouts[kind][:2]

    @cached_property
    def _likeliest(self) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
        p, words = likeliest(self.base.logp)
        return p.to(self.W.device), words.to(self.W.device)

    def _expansion(self, content: str, C: Float[Tensor, "V D"]) -> Cumulants:
        """Moments are taken once for all heads of the same readout; the words' readouts are put together anew: they are large,
        and few are at work."""
        (p, words), key = self._likeliest, f"{content}, moments"
        if key not in self._known:
            self._known[key] = moments(self.base.logp, words, C)
        return Cumulants(p, C[words], *self._known[key])


def at_once(tokens: int) -> int:
    """How many problems of so many tokens `dealt` puts together."""
    return max(1, min(50, (1 << 18) // tokens))


def dealt(problem: Problem, owners: Int[Tensor, "n T"], users: int) -> Problem:
    """n problems of the same tokens with other owners, of `users` each, as one, for an expansion: user u of the i-th is user
    `u + i users`."""
    n, owners = len(owners), owners.to(problem.owner.device)
    owner = (owners + users * torch.arange(n, device=owners.device)[:, None]).flatten()
    return replace(problem, owner=owner, n=torch.bincount(owner, minlength=n * users))
