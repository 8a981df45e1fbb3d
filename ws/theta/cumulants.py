"""A token's log-partition function over a large vocabulary, from its likeliest words and two cumulants of the others.

What a theta fit asks of the vocabulary is `lse_t(x) = log sum_v p_tv e^(x.C_v)` and its gradient, `x = c theta * phi_t` being
D numbers (`ws.theta.fit`). With the LIKELIEST words L_t of each token exact, and the others a normal distribution of mass
`e_t`, mean `mu_t`, covariance `S_t`,

    e^lse_t(x) ~ sum_{v in L_t} p_tv e^(x.C_v) + e_t e^(x.mu_t + x^T S_t x/2)

a step costs `T D (LIKELIEST + D)` instead of `T D V`, and many fits of the same tokens share one product per token. What is left
out is of third order in x. `anchored` takes most of it in: where the exact value and gradient are known at some x_a, their
differences from the above are added, as `s^3` and `s^2` times themselves, `s = x.x_a / |x_a|^2`. docs/method.md section 10.
"""

import mmap
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ws.model.rounded import fast_products, rounded

LARGE = 16384  # words; smaller vocabularies are summed whole
LIKELIEST = 128  # words of a token that are summed one by one
MOST = 1 << 20  # of them for all tokens together; more tokens have fewer words each, at least LEAST
LEAST = 32
TOKENS = 512  # per block of the moments (so much of a base on disk is in memory at a time), and words
WORDS = 2048
TOGETHER = 8  # blocks of tokens whose part of the base is gone through once for each block of words
BLOCK = 128  # tokens per block where each has a matrix
PLACES, MOST_ROWS = 6400, 512  # of a step's blocks: tokens times fits, and tokens
MAPPED = WeakTensorKeyDictionary()  # base on disk -> its map


@dataclass(frozen=True, eq=False)
class Cumulants:
    """Of T tokens: p `(T, K)` chances of the likeliest words and their readouts C `(T, K, D)`; mass, mean and covariance of the
    other words' readouts. at, lift, turn: an anchor's x, and what is exact there beyond the expansion."""

    p: Float[Tensor, "T K"]
    C: Float[Tensor, "T K D"]
    mass: Float[Tensor, " T"]
    mean: Float[Tensor, "T D"]
    cov: Float[Tensor, "T D D"]
    at: Float[Tensor, "T D"] | None = None
    lift: Float[Tensor, " T"] | None = None
    turn: Float[Tensor, "T D"] | None = None

    def __call__(self, X: Float[Tensor, "T D"]) -> tuple[Float[Tensor, " T"], Float[Tensor, "T D"]]:
        """`lse` and its gradient in x."""
        lse, mean = torch.empty_like(X[:, 0]), torch.empty_like(X)
        for rows in _blocks(len(X), MOST_ROWS):
            found, means = self._block(rows, X[rows, :, None])
            lse[rows], mean[rows] = found[:, 0], means[..., 0]
        return lse, mean

    def rises(
        self,
        scaled: Float[Tensor, "users D"],
        phi: Float[Tensor, "T D"],
        owners: Int[Tensor, "n T"],
        lse0: Float[Tensor, " T"],
        m0: Float[Tensor, "T D"],
        summed: torch.dtype,
    ) -> tuple[Float[Tensor, " users"], Float[Tensor, "users D"]]:
        """For n fits of the T tokens, whose owners' `c theta` is `scaled`, each owner's sums over its tokens, in float64: of
        `lse - lse0`, and of `phi * (gradient - m0)`. summed: the dtype in which a block's tokens are added up."""
        rise = torch.zeros(len(scaled), dtype=torch.float64, device=phi.device)
        moved = torch.zeros(scaled.shape, dtype=torch.float64, device=phi.device)
        for rows in _blocks(len(phi), min(MOST_ROWS, max(1, PLACES // len(owners)))):
            f, own = phi[rows], owners[:, rows]
            lse, mean = self._block(rows, (scaled[own] * f).permute(1, 2, 0).contiguous())
            mean = mean.sub_(m0[rows, :, None]).mul_(f[..., None]).permute(2, 0, 1).reshape(-1, f.shape[1])
            rise.index_add_(0, own.flatten(), (lse - lse0[rows, None]).T.flatten().double())
            moved += scaled.new_zeros(scaled.shape, dtype=summed).index_add_(0, own.flatten(), mean.to(summed))
        return rise, moved

    def _block(self, rows: slice, x: Float[Tensor, "t D n"]) -> tuple[Float[Tensor, "t n"], Float[Tensor, "t D n"]]:
        """`lse` and its gradient at n places for each of some tokens."""
        e, rest, tilted, Z = self._parts(rows, x)
        lse, mean = Z.log(), torch.bmm(self.C[rows].mT, e).add_(tilted.mul_(rest[:, None])).div_(Z[:, None])
        if self.at is not None:
            at = self.at[rows]
            s = torch.bmm(at[:, None], x)[:, 0] / at.square().sum(1).clamp(min=1e-30)[:, None]
            lse += s**3 * self.lift[rows, None]
            mean += (s * s)[:, None] * self.turn[rows, :, None]
        return lse, mean

    def _parts(self, rows: slice, x: Float[Tensor, "t D n"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unnormalised chances of the likeliest words `(t, K, n)` and of the others together `(t, n)`, the others' mean
        readout `(t, D, n)`, and the sum of all chances."""
        e = torch.bmm(self.C[rows], x).exp_().mul_(self.p[rows, :, None])
        spread, mean = torch.bmm(self.cov[rows], x), self.mean[rows, :, None]
        rest = self.mass[rows, None] * (x * (mean + spread / 2)).sum(1).exp()
        return e, rest, spread.add_(mean), e.sum(1) + rest

    def variances(self) -> Float[Tensor, "T D"]:
        """Of the readouts of all words under the base: exact."""
        found = torch.empty_like(self.mean)
        for rows in _blocks(len(found), BLOCK):
            p, C, mean, mass = self.p[rows, None], self.C[rows], self.mean[rows], self.mass[rows, None]
            first = torch.bmm(p, C)[:, 0] + mass * mean
            second = torch.bmm(p, C.square())[:, 0] + mass * (self.cov[rows].diagonal(dim1=1, dim2=2) + mean.square())
            found[rows] = second - first.square()
        return found

    def anchored(self, X: Float[Tensor, "T D"], lse: Float[Tensor, " T"], mean: Float[Tensor, "T D"]) -> "Cumulants":
        """The same with the exact lse and gradient at X taken in."""
        plain = replace(self, at=None)
        had, was = plain(X)
        return replace(plain, at=X, lift=lse.to(had) - had, turn=mean.to(was) - was)

    def curvature(
        self, X: Float[Tensor, "T D"], phi: Float[Tensor, "T D"], owner: Int[Tensor, " T"], users: int
    ) -> Float[Tensor, "users D D"]:
        """Per user `sum_t phi_t phi_t^T * Cov_t`, Cov_t the covariance of the readouts under the chances at X (the anchor has
        no part in it), in float64."""
        T, D = phi.shape
        out = torch.zeros(users, D, D, dtype=torch.float64, device=phi.device)
        for rows in _blocks(T, BLOCK):
            e, rest, tilted, Z = (part[..., 0] for part in self._parts(rows, X[rows, :, None]))
            e, rest, f = e / Z[:, None], rest / Z, phi[rows]
            m = torch.bmm(self.C[rows].mT, e[..., None])[..., 0] + rest[:, None] * tilted
            own = (e.sqrt()[..., None] * self.C[rows]) * f[:, None]
            gated = rest.sqrt()[:, None] * tilted * f
            away = m * f
            sums = torch.bmm(own.mT, own) + rest[:, None, None] * self.cov[rows] * f[:, :, None] * f[:, None]
            sums += gated[:, :, None] * gated[:, None] - away[:, :, None] * away[:, None]
            out.index_add_(0, owner[rows], sums.double())
        return out


def _blocks(T: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]


def unmap(logp: Tensor) -> None:
    """Let pages of a memory-mapped base go: they stay in the file's cache, which is no memory of the process."""
    if (mapped := MAPPED.get(logp)) and hasattr(mapped, "madvise"):  # not on Windows
        mapped.madvise(mmap.MADV_DONTNEED)


def likeliest(logp: Float[Tensor, "T V"]) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """Chances and indices of each token's likeliest words."""
    K, found = max(LEAST, min(LIKELIEST, MOST // len(logp))), []
    for rows in _blocks(len(logp), 2 * BLOCK):
        found.append(logp[rows].topk(K, dim=1, sorted=False))
        unmap(logp)
    return torch.cat([top.values for top in found]).exp(), torch.cat([top.indices for top in found])


def moments(
    logp: Float[Tensor, "T V"], words: Int[Tensor, "T K"], C: Float[Tensor, "V D"]
) -> tuple[Float[Tensor, " T"], Float[Tensor, "T D"], Float[Tensor, "T D D"]]:
    """Mass, mean and covariance of the readouts of all words but `words`: one product of the chances with the upper triangle of
    each word's `C_v C_v^T`, both as bfloat16 holds them (`ws.model.rounded`), the diagonal from float32."""
    T, D = len(logp), C.shape[1]
    i, j = torch.triu_indices(D, D, device=C.device)
    mass, mean, cov, room = C.new_zeros(T), C.new_zeros(T, D), C.new_empty(T, D, D), C.new_empty(len(i) * WORDS)
    sums = C.new_empty(min(T, TOKENS), len(i))
    blocks = _blocks(T, TOKENS)
    for group in (blocks[at : at + TOGETHER] for at in range(0, len(blocks), TOGETHER)):
        upper = [(C.new_zeros(rows.stop - rows.start, len(i)), torch.zeros_like(mean[rows])) for rows in group]
        for some in _blocks(len(C), WORDS):
            c = C[some]
            products, squares = _products(c.T.contiguous(), room), c.square()
            products.copy_(rounded(products))
            for rows, (second, own) in zip(group, upper, strict=True):
                likely, p = words[rows], logp[rows, some].to(C.device).exp()
                t, k = ((likely >= some.start) & (likely < some.stop)).nonzero(as_tuple=True)
                p[t, likely[t, k] - some.start] = 0
                mass[rows] += p.sum(1)
                mean[rows].addmm_(p, c)
                own.addmm_(p, squares)
                with fast_products():
                    second += torch.mm(rounded(p), products.T, out=sums[: len(p)])
                unmap(logp)
        for rows, (second, own) in zip(group, upper, strict=True):
            second[:, i == j] = own
            left = mass[rows].clamp(min=1e-30)[:, None]
            first, second = mean[rows].div_(left), second.div_(left)
            cov[rows, i, j] = second
            cov[rows, j, i] = second
            cov[rows] -= first[:, :, None] * first[:, None]
    return mass, mean, cov


def _products(c: Float[Tensor, "D v"], room: Float[Tensor, " most"]) -> Float[Tensor, "q v"]:
    """In `room`, products of every two entries of each column, the upper triangle row by row."""
    (D, v), at = c.shape, 0
    out = room[: D * (D + 1) // 2 * v].view(-1, v)
    for i in range(D):
        torch.mul(c[i], c[i:], out=out[at : at + D - i])
        at += D - i
    return out
