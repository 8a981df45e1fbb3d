"""Energy-matched controls: random subspaces that capture as much of w's energy as a candidate does. (docs/method.md section 8)

A control of a candidate with bases `B_l` is `orth((I + k_l G_l)^(+-1/2) O B_l)`: O is one Haar rotation for all layers and all
candidates, `k_l >= 0` the root at which the control's energy is the candidate's. It keeps rank and overlaps between layers and
loses the direction. Energy grows with k for `+` and falls for `-`. In the eigenbasis `G = U diag(v) U^T`, with `Y = U^T O B`,

    +: energy = sum_i (a_i + k b_i) / (1 + k a_i),   Y^T v Y = E a E^T,  b = diag(E^T Y^T v^2 Y E)
    -: energy = tr(D^-1 N),  D = I - Y^T Y + Y^T / (1 + kv) Y,  N = Y^T v / (1 + kv) Y

so that no more than `r x r` matrices are solved. `N` draws are products of about sqrt(N) rotations by as many (see
`ws.stability.blind`): each is Haar and any two are independent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ws.causal.spans import Span
from ws.show.bars import tqdm
from ws.stability.blind import haar

STEPS = 100  # of the search for k; a dozen suffice
MOST = 1 << 24  # numbers held at once in the search
CLOSE = 1e-9  # of the layer's energy
LOG_K = (-30.0, 45.0)  # of k in units of 1 / the largest eigenvalue
Energy = Callable[[Float[Tensor, " n"]], tuple[Float[Tensor, " n"], Float[Tensor, " n"]]]  # and its derivative


@dataclass(frozen=True)
class Drawn:
    """Controls of C candidates over N joint draws. effect: `(N, C)` first-order effects between alpha -1 and +1, nats, NaN
    where a layer's energy is out of reach; off: `(N, C)` largest distance from the candidate's share of a layer's energy;
    out: `(C,)` share of draws with a layer out of reach."""

    effect: Float[np.ndarray, "N C"]
    off: Float[np.ndarray, "N C"]

    @property
    def out(self) -> Float[np.ndarray, " C"]:
        return np.isnan(self.effect).mean(axis=0)


@dataclass(frozen=True)
class _Layer:
    """A span in the eigenbasis of one of its energies, whose trace is 1: `M = U R^T`, `R = U H^T + beyond`."""

    U: Float[Tensor, "d q"]
    v: Float[Tensor, " q"]
    H: Float[Tensor, "q q"]
    beyond: Float[Tensor, "d q"]

    @classmethod
    def of(cls, span: Span, kind: str) -> "_Layer":
        v, V = torch.linalg.eigh(span.K[kind])
        U, R = span.U @ V, span.R @ V
        H = R.T @ U
        return cls(U, v.clamp(min=0) / max(span.trace[kind], 1e-300), H, R - U @ H.T)

    def outside(self, Y: Float[Tensor, "n q r"]) -> Float[Tensor, "n r r"]:
        """`I - Y^T Y`: what of rotated bases lies outside U."""
        found = torch.eye(Y.shape[2], dtype=Y.dtype) - Y.mT @ Y
        return found if self.U.shape[1] < len(self.U) else torch.zeros_like(found)  # rounding, where U is all of R^d

    @property
    def targets(self) -> Float[Tensor, "t d"]:
        """What rotated bases are multiplied by."""
        return torch.cat([self.U, self.beyond], dim=1).T


def draw(
    spans: Mapping[int, Span],
    bases: Sequence[Mapping[int, Float[Tensor, "d _"]]],
    n_draws: int = 10_000,
    kind: str = "input",
    seed: int = 0,
    progress: bool = True,
) -> Drawn:
    """The controls of candidates, matched in the energy `kind` (`input` or `frobenius`) layer by layer. bases: per candidate,
    layer -> orthonormal `(d, r)`. The same seed gives the same rotations whatever the candidates. Memory: about
    `2 sqrt(N) d^2` numbers of 4 bytes. ValueError for fewer than one draw."""
    if n_draws < 1:
        raise ValueError(f"n_draws = {n_draws}: at least one control is needed")
    d, I = len(next(iter(spans.values())).U), ceil(sqrt(n_draws))
    generator = torch.Generator().manual_seed(seed)
    turns = [haar(d, generator, torch.float64).float() for _ in range(2 * I)]
    effect, off = torch.zeros(n_draws, len(bases), dtype=torch.float64), torch.zeros(n_draws, len(bases))
    starts = range(0, n_draws, I)
    with tqdm(total=len(spans) * len(starts), desc=f"controls of equal {kind} energy", disable=not progress) as bar:
        for l, span in spans.items():
            layer = _Layer.of(span, kind)
            targets = torch.stack([layer.targets.float() @ O for O in turns[:I]])
            share = torch.tensor([span.energy(of_layer[l], kind) for of_layer in bases], dtype=torch.float64)
            by_rank: dict[int, list[int]] = {}
            for c, of_layer in enumerate(bases):
                by_rank.setdefault(of_layer[l].shape[1], []).append(c)
            for start, V in zip(starts, turns[I:], strict=False):
                size = min(I, n_draws - start)
                for rank, those in by_rank.items():
                    if rank:
                        B = torch.cat([bases[c][l].float() for c in those], dim=1)
                        Y = (targets[:size] @ (V @ B)).double().unflatten(2, (len(those), rank)).transpose(1, 2)
                        few = max(1, MOST // (len(layer.v) * rank**2))
                        parts = zip(Y.flatten(0, 1).split(few), share[those].repeat(size).split(few), strict=True)
                        slope, far = (
                            torch.cat(each) for each in zip(*(_matched(layer, *p) for p in parts), strict=True)
                        )
                        at = slice(start, start + size), those
                        effect[at] += 2 * slope.reshape(size, -1)
                        off[at] = torch.maximum(off[at], far.reshape(size, -1).float())
                bar.update()
    return Drawn(effect.numpy(), off.numpy())


def _matched(layer: _Layer, Y: Float[Tensor, "n t r"], want: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """First-order effect of the control of each rotated basis at the energy that it is to have, NaN where that is out of reach;
    and by how much its energy differs."""
    q, slope, far = len(layer.v), torch.full_like(want, torch.nan), torch.zeros_like(want)
    inside, beyond = Y[:, :q], Y[:, q:]
    more = (inside.square() * layer.v[:, None]).sum((1, 2)) < want
    for up in (True, False):
        some = (more == up).nonzero()[:, 0]
        if not len(some):
            continue
        y = inside[some]
        rest = layer.outside(y)
        energy = _rising(layer.v, y) if up else _falling(layer.v, y, rest)
        log_k, found = root(energy, want[some], *(end - float(layer.v.max().log()) for end in LOG_K))
        k = log_k.exp()
        grow = (1 + k[:, None] * layer.v) ** (0.5 if up else -0.5)
        Z = grow[:, :, None] * y
        value = _trace(torch.linalg.solve(rest + Z.mT @ Z, Z.mT @ (layer.H @ Z + beyond[some])))
        slope[some], far[some] = value.where(found, torch.nan), (energy(log_k)[0] - want[some]).abs().where(found, 0.0)
    return slope, far


def _rising(v: Float[Tensor, " q"], Y: Float[Tensor, "n q r"]) -> Energy:
    """Energy of `orth((I + kG)^(1/2) O B)` as a function of log k, and its derivative."""
    a, E = torch.linalg.eigh(Y.mT @ (v[:, None] * Y))
    b, a = ((v[:, None] * (Y @ E)).square()).sum(1), a.clamp(min=0)

    def energy(log_k: Tensor) -> tuple[Tensor, Tensor]:
        k = log_k.exp()[:, None]
        under = 1 + k * a
        return ((a + k * b) / under).sum(1), (k * (b - a.square()) / under.square()).sum(1)

    return energy


def _falling(v: Float[Tensor, " q"], Y: Float[Tensor, "n q r"], rest: Float[Tensor, "n r r"]) -> Energy:
    """The same of `orth((I + kG)^(-1/2) O B)`."""
    r = Y.shape[2]
    pairs = (Y[:, :, :, None] * Y[:, :, None, :]).flatten(2)

    def energy(log_k: Tensor) -> tuple[Tensor, Tensor]:
        kv = log_k.exp()[:, None] * v
        part = 1 / (1 + kv)
        turn = -kv * part.square()
        rows = torch.stack([part, part * v, turn, turn * v], dim=1)
        D, N, dD, dN = (rows @ pairs).unflatten(2, (r, r)).unbind(1)
        N, dD, dN = torch.linalg.solve(rest + D, torch.cat([N, dD, dN], dim=2)).split(r, dim=2)
        return _trace(N), _trace(dN) - (dD * N.mT).sum((1, 2))

    return energy


def _trace(M: Float[Tensor, "n r r"]) -> Float[Tensor, " n"]:
    return M.diagonal(dim1=1, dim2=2).sum(1)


def root(energy: Energy, want: Float[Tensor, " n"], low: float, high: float) -> tuple[Tensor, Bool[Tensor, " n"]]:
    """Where a monotone function reaches `want`, between two ends, for many at once; and whether it does. Bisection, and Newton's
    step in its place wherever that stays inside the bracket."""
    ends = [torch.full_like(want, end) for end in (low, high)]
    (first, slope), (last, _) = map(energy, ends)
    up = last > first
    found = ((first - want) * (last - want) <= 0) | ((first - want).abs() <= CLOSE)
    below, above = ends
    best, error = below.clone(), (first - want).abs()
    guess = low + ((want - first) / slope).clamp(min=1.0).log()  # as if it went on as it begins
    for _ in range(STEPS):
        if bool((error <= CLOSE)[found].all()):
            break
        guess = guess.where((guess > below) & (guess < above), (below + above) / 2)
        value, slope = energy(guess)
        better = (value - want).abs() < error
        best, error = guess.where(better, best), (value - want).abs().where(better, error)
        short = (value < want) == up
        below, above = guess.where(short, below), above.where(short, guess)
        guess = guess + (want - value) / slope
    return best, found & (error <= 100 * CLOSE)
