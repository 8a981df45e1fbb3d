"""Persona contrasts token by token, each pair of states once: texts that begin alike have many pairs in common, and a weighted
sum over tokens is one over pairs. (docs/method.md section 5)"""

from itertools import takewhile
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ws.subspaces.algebra import Basis, left_svd
from ws.subspaces.materials import Materials
from ws.subspaces.reading import TokenStates

ONE = Lock()


class Tokens(NamedTuple):
    """A contrast token by token at a layer. D: `pos - neg`, `(p, d)`, each pair of states once; size: `sqrt(|pos|^2 + |neg|^2)`
    of these; which: `(n, T)`, the pair that a token has; a, b: attention rows of both sides, `(n, T)`, at the right edge."""

    D: Tensor
    size: Tensor
    which: Tensor
    a: Tensor
    b: Tensor

    def rows(self, weights: Tensor, which: Tensor, centred: bool) -> Tensor:
        """Rows with the Gram of `sqrt(w) D` over tokens (centred: less their mean), `(p, d)`: a pair's are one row, by the sum of
        its weights. Of N tokens the mean is `A^T c / N`, and `(1 - x c c^T)^2 = 1 - c c^T / N` for one x."""
        total = self.D.new_zeros(len(self.D)).index_add(0, which.flatten(), weights.flatten())
        A = self.D * total.sqrt()[:, None]
        if not centred:
            return A[which.unique()]
        c = (
            torch.zeros_like(total).index_add(0, which.flatten(), weights.sqrt().flatten())
            / total.clamp(min=1e-300).sqrt()
        )
        square = float(c @ c)
        return A.addr_(c, c @ A, alpha=(max(1 - square / which.numel(), 0.0) ** 0.5 - 1) / square)


def _pairs(m: Materials) -> tuple[Tensor, Tensor, Tensor]:
    """Which states the pairs of tokens consist of, each pair once, and which pair a token has, `(n, T)`."""
    sides = [acts.tokens for acts in (m.base.pos, m.base.neg)]
    longest = max(x.at.shape[1] for x in sides)
    pos, neg = (pad(x.at, (longest - x.at.shape[1], 0), value=x.states.shape[1]) for x in sides)
    base = sides[1].states.shape[1] + 1
    pairs, which = torch.unique(pos * base + neg, return_inverse=True)
    return pairs // base, pairs % base, which


def token_contrast(m: Materials, l: int) -> Tokens:
    """The contrast at layer l, made once while candidates look at that layer."""
    held, sides = vars(m.base), (m.base.pos, m.base.neg)
    with ONE:  # several candidates look at a layer, side by side or one after the other
        if "pairs" not in held:
            held["pairs"] = _pairs(m)
        if held.get("contrast", (None,))[0] != l:
            *states, which = held["pairs"]
            pos, neg = (
                TokenStates(acts.tokens.states, one[None])[l][0] for acts, one in zip(sides, states, strict=True)
            )
            rows = (pad(acts.attn[l].double(), (which.shape[1] - acts.attn.shape[2], 0)) for acts in sides)
            size = torch.hypot(*(torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) for x in (pos, neg)))
            held["contrast"] = l, Tokens(pos.double().sub_(neg), size, which, *rows)
        return held["contrast"][1]


def of_tokens(m: Materials, t: Tokens, weights: Tensor, which: Tensor, centred: bool) -> Basis:
    """Top directions of as many rows as there are tokens, however few pairs they are."""
    rows = t.rows(weights, which, centred)
    rows = pad(rows, (0, 0, 0, max(min(m.k, which.numel()) - len(rows), 0)))
    return left_svd(rows.T, m.k, m.rounding(t.size[which] * weights.sqrt()))


def common_suffix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Number of tokens at the right edge that two texts share."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(reversed(a), reversed(b), strict=False))))
