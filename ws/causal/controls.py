"""Energy-matched controls: random subspaces that capture as much of w's energy as a candidate does. (docs/method.md section
8)

A control of a candidate with bases `B_l` is `orth((I + k_l G_l)^(+-1/2) O B_l)`: O is one Haar rotation for all layers and
all candidates, `k_l >= 0` the root at which the control's energy is the candidate's. It keeps rank and overlaps between
layers and loses the direction. Energy grows with k for `+` and falls for `-`. In the eigenbasis `G = U diag(v) U^T`, with `Y
= U^T O B`,

    +: energy = sum_i (a_i + k b_i) / (1 + k a_i),   Y^T v Y = E a E^T,  b = diag(E^T Y^T v^2 Y E)
    -: energy = tr(D^-1 N),  D = I - Y^T Y + Y^T / (1 + kv) Y,  N = Y^T v / (1 + kv) Y

so that no more than `r x r` matrices are solved. `N` draws are products of about sqrt(N) rotations by as many (see
`ws.stability.blind`): each is Haar and any two are independent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import ceil, sqrt
from threading import Event

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ws.causal.spans import Span
from ws.show.bars import tqdm
from ws.stability.blind import haar

STEPS = 100  # of the search for k; a dozen suffice
MOST = 1 << 22  # numbers held at once in the search: fewer are slower, more leave the cache
MEMORY = 1 << 30  # bytes of rotated spans at once
CLOSE = 1e-7  # of the layer's energy
QUICK = 6  # Newton steps from where other draws of the candidate ended
FEW, ENOUGH = 10, 1000  # one chunk of draws in so many says where controls lie, of so many draws at least
LOG_K = (-30.0, 45.0)  # of k in units of 1 / the largest eigenvalue
Energy = Callable[[Float[Tensor, " n"]], tuple[Float[Tensor, " n"], Float[Tensor, " n"]]]  # and its derivative


@dataclass(frozen=True)
class Drawn:
    """Controls of C candidates over N joint draws. effect: `(N, C)` first-order effects between alpha -1 and +1, nats, NaN
    where a layer's energy is out of reach; off: `(N, C)` largest distance from the candidate's share of a layer's energy;
    out: `(C,)` share of draws with a layer out of reach; share: layer -> `(C, q)`, the controls' mean square overlap with
    each eigenvector of the energy's Gram, NaN where none is matched."""

    effect: Float[np.ndarray, "N C"]
    off: Float[np.ndarray, "N C"]
    share: Mapping[int, Float[np.ndarray, "C q"]] = field(default_factory=dict)

    @property
    def out(self) -> Float[np.ndarray, " C"]:
        return np.isnan(self.effect).mean(axis=0)


@dataclass(frozen=True)
class Layer:
    """A span in the eigenbasis of one of its energies, whose trace is 1: `M = U R^T`, `R = U H^T + beyond`."""

    U: Float[Tensor, "d q"]
    v: Float[Tensor, " q"]
    H: Float[Tensor, "q q"]
    beyond: Float[Tensor, "d q"]

    @classmethod
    def of(cls, span: Span, kind: str) -> "Layer":
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
    layer -> orthonormal `(d, r)`. The same seed gives the same rotations whatever the candidates. Memory: some `2 sqrt(N)
    d^2` numbers of 4 bytes, and for each layer at work `2 sqrt(N) q d` more (as many as MEMORY allows). ValueError for fewer
    than one draw."""
    if n_draws < 1:
        raise ValueError(f"n_draws = {n_draws}: at least one control is needed")
    d, I = len(next(iter(spans.values())).U), ceil(sqrt(n_draws))
    generator = torch.Generator().manual_seed(seed)
    turns = [haar(d, generator, torch.float64).float() for _ in range(2 * I)]
    starts, step = range(0, n_draws, I), max(1, min(FEW, n_draws // ENOUGH))
    by_rank: dict[tuple[int, int], list[int]] = {}
    for c, of_layer in enumerate(bases):
        for l in spans:
            by_rank.setdefault((l, of_layer[l].shape[1]), []).append(c)
    stopped, threads = Event(), torch.get_num_threads()
    each = 4 * I * d * 2 * max(span.U.shape[1] for span in spans.values())
    workers = max(1, min(threads, MEMORY // each))
    effect, off, lies = torch.zeros(n_draws, len(bases), dtype=torch.float64), torch.zeros(n_draws, len(bases)), {}

    def at(l: int) -> tuple[Tensor, Tensor, np.ndarray]:
        layer = Layer.of(spans[l], kind)
        targets = torch.stack([layer.targets.float() @ O for O in turns[:I]])
        share = torch.tensor([spans[l].energy(of_layer[l], kind) for of_layer in bases], dtype=torch.float64)
        effect, off = torch.zeros(n_draws, len(bases), dtype=torch.float64), torch.zeros(n_draws, len(bases))
        overlap, matched = torch.zeros(len(bases), len(layer.v), dtype=torch.float64), torch.zeros(len(bases), 1)
        guess = torch.full((len(bases), 2), torch.nan, dtype=torch.float64)
        for i, (start, V) in enumerate(zip(starts, turns[I:], strict=False)):
            size, look = min(I, n_draws - start), i % step == 0
            for rank, those in ((r, some) for (of, r), some in by_rank.items() if of == l and not stopped.is_set()):
                if not rank:
                    matched[those] += size * look
                    continue
                B = torch.cat([bases[c][l].float() for c in those], dim=1)
                Y = (targets[:size] @ (V @ B)).double().unflatten(2, (len(those), rank)).transpose(1, 2).flatten(0, 1)
                few = max(1, MOST // (len(layer.v) * rank**2))
                given = (Y, share[those].repeat(size), guess[those].repeat(size, 1))
                got = [_matched(layer, *part, look) for part in zip(*(x.split(few) for x in given), strict=True)]
                slope, far, ends, over = (torch.cat(each).unflatten(0, (size, -1)) for each in zip(*got, strict=True))
                effect[start : start + size, those], off[start : start + size, those] = 2 * slope, far.float()
                if look:
                    guess[those] = ends.nanmedian(dim=0).values.where(guess[those].isnan(), guess[those])
                    overlap[those] += over.nansum(dim=0)
                    matched[those] += (~slope.isnan()).sum(dim=0)[:, None]
            bar.update()
        return effect, off, (overlap / matched).numpy()

    with (
        tqdm(total=len(spans) * len(starts), desc=f"controls of equal {kind} energy", disable=not progress) as bar,
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        try:  # layer by layer: the small problems of one are no work for several threads
            for l, (one, far, share) in zip(spans, pool.map(at, spans), strict=True):
                effect += one
                off, lies[l] = torch.maximum(off, far), share
        finally:
            stopped.set()
            torch.set_num_threads(threads)
    return Drawn(effect.numpy(), off.numpy(), lies)


def _matched(
    layer: Layer, Y: Float[Tensor, "n t r"], want: Float[Tensor, " n"], near: Float[Tensor, "n 2"], look: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First-order effect of the control of each rotated basis at the energy that it is to have, NaN where that is out of
    reach; by how much its energy differs; log k, in the column of its sign; and with `look` its square overlaps with the
    eigenvectors. near: log k of other draws, by sign, NaN where none is known."""
    q, slope, far = len(layer.v), torch.full_like(want, torch.nan), torch.zeros_like(want)
    over, ends = (
        torch.full((len(want), q if look else 0), torch.nan, dtype=want.dtype),
        torch.full_like(near, torch.nan),
    )
    inside, beyond = Y[:, :q], Y[:, q:]
    for sign, some, log_k, grow, found, off in _grown(layer, inside, want, near):
        Z, rest = grow[:, :, None] * inside[some], layer.outside(inside[some])
        write = layer.H @ Z + beyond[some]
        if look:
            back = torch.linalg.solve(rest + Z.mT @ Z, Z.mT)
            value = (back.mT * write).sum((1, 2))
            over[some] = (back.mT * Z).sum(2).where(found[:, None], torch.nan)
        else:
            value = _trace(torch.linalg.solve(rest + Z.mT @ Z, Z.mT @ write))
        slope[some], far[some] = value.where(found, torch.nan), off.where(found, 0.0)
        ends[some, sign] = log_k.where(found, torch.nan)
    return slope, far, ends, over


def _grown(
    layer: Layer, Y: Float[Tensor, "n q r"], want: Float[Tensor, " n"], near: Float[Tensor, "n 2"]
) -> Iterator[tuple]:
    """Those whose energy has to rise (0), then those whose has to fall (1): which, log k, `(1 + kv)^(+-1/2)`, whether k is
    found, and by how much the energy differs. Newton's steps from where other draws ended; what these do not bring home is
    searched for."""
    energies = (Y.square() * layer.v[:, None]).sum((1, 2))
    more, already = energies < want, (energies - want).abs()
    low, high = (end - float(layer.v.max().log()) for end in LOG_K)
    for sign, up in enumerate((True, False)):
        some = (more == up).nonzero()[:, 0]
        if not len(some):
            continue
        y, goal = Y[some], want[some]

        def energy_of(y: Tensor, up: bool = up) -> Energy:
            return _rising(layer.v, y) if up else _falling(layer.v, y, layer.outside(y))

        energy, log_k = energy_of(y), near[some, sign].clone()
        error = torch.full_like(log_k, torch.inf)
        log_k[already[some] <= CLOSE] = low
        for step in range(0 if log_k.isnan().any() else QUICK):
            value, slope = energy(log_k)
            error = (value - goal).abs()
            if bool((error <= CLOSE).all()) or step == QUICK - 1:
                break
            log_k = (log_k + ((goal - value) / slope).clamp(-2, 2).nan_to_num()).clamp(low, high)
        found = error <= CLOSE
        if len(far := (~found).nonzero()[:, 0]):
            again = energy_of(y[far])
            log_k[far], found[far] = root(again, goal[far], low, high)
            error[far] = (again(log_k[far])[0] - goal[far]).abs()
        grow = (1 + log_k.exp()[:, None] * layer.v) ** (0.5 if up else -0.5)
        yield sign, some, log_k, grow, found, error


def formed(
    spans: Mapping[int, Span], bases: Mapping[int, Float[Tensor, "d _"]], O: Float[Tensor, "d d"], kind: str = "input"
) -> dict[int, Float[Tensor, "d r"]] | None:
    """The bases of one control, whole: `orth((I + k_l G_l)^(+-1/2) O B_l)`; None where a layer's energy is out of reach."""
    found = {}
    for l, span in spans.items():
        layer, turned = Layer.of(span, kind), O.double() @ bases[l].double()
        if not turned.shape[1]:
            found[l] = turned
            continue
        inside = layer.U.T @ turned
        want = torch.tensor([span.energy(bases[l], kind)], dtype=torch.float64)
        unknown = torch.full((1, 2), torch.nan, dtype=torch.float64)
        ((_, _, _, grow, there, _),) = _grown(layer, inside[None], want, unknown)
        if not bool(there):
            return None
        found[l] = torch.linalg.qr(turned + layer.U @ ((grow[0][:, None] - 1) * inside)).Q
    return found


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
    i, j = torch.triu_indices(r, r)
    across = Y.mT.contiguous()
    pairs, whole = (across[:, i] * across[:, j]).mT, torch.zeros(r, r, dtype=torch.long)
    whole[i, j] = whole[j, i] = torch.arange(len(i))

    def energy(log_k: Tensor) -> tuple[Tensor, Tensor]:
        kv = log_k.exp()[:, None] * v
        part = 1 / (1 + kv)
        turn = -kv * part.square()
        rows = torch.stack([part, part * v, turn, turn * v], dim=1)
        D, N, dD, dN = (rows @ pairs)[:, :, whole].unbind(1)
        N, dD, dN = torch.linalg.solve(rest + D, torch.cat([N, dD, dN], dim=2)).split(r, dim=2)
        return _trace(N), _trace(dN) - (dD * N.mT).sum((1, 2))

    return energy


def _trace(M: Float[Tensor, "n r r"]) -> Float[Tensor, " n"]:
    return M.diagonal(dim1=1, dim2=2).sum(1)


def root(energy: Energy, want: Float[Tensor, " n"], low: float, high: float) -> tuple[Tensor, Bool[Tensor, " n"]]:
    """Where a monotone function reaches `want`, between two ends, for many at once; and whether it does. Bisection, and
    Newton's step in its place wherever that stays inside the bracket."""
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
    return best, found & (error <= 10 * CLOSE)
