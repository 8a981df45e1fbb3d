"""Phases of depth, and what the layers of one phase have in common, beside what chance would give.

Between layers: `|v_l . v_m|` of the top-1 directions. Within a phase: `capture_l = |B^T v_l|^2`, `B` = top 8 left
singular vectors of the phase's top-8 directions side by side. `v_l` itself went into `B`, so chance is far above 8/d
for a small phase; leaving layer l out of `B` makes it 8/d. (docs/method.md section 9)
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

RANK = 8
NAN = float("nan")
LAYERS_64 = {"A": range(7), "B": range(7, 10), "C": range(10, 32), "D": range(32, 47), "E": range(47, 59)}
FRACTIONS = {"A": 0.11, "B": 0.15, "C": 0.5, "D": 0.75, "E": 0.92}
PHASES = ("A", "B", "C", "D", "E", "tail")


def phase_of(l: int, n_layers: int) -> str:
    """Phase of layer `l`: a fixed table for 64 layers, else by `l / n_layers`. (docs/method.md section 9)"""
    if not 0 <= l < n_layers:
        raise ValueError(f"layer {l} of a model with {n_layers} layers")
    if n_layers == 64:
        return next((name for name, layers in LAYERS_64.items() if l in layers), "tail")
    return next((name for name, end in FRACTIONS.items() if l / n_layers < end), "tail")


def phase_layers(n_layers: int) -> dict[str, list[int]]:
    """Layers of each phase that has any, in the order of depth."""
    named = [phase_of(l, n_layers) for l in range(n_layers)]
    return {name: [l for l, p in enumerate(named) if p == name] for name in PHASES if name in named}


def expected_cos(d: int) -> float:
    """`E|cos| = sqrt(2 / (pi d))` of two random directions in R^d."""
    return float(np.sqrt(2 / (np.pi * d)))


def capture_of(vectors: Float[Tensor, "j d"], directions: Float[Tensor, "n k d"]) -> Float[Tensor, " j"]:
    """`|B^T v|^2` per row v, `B` = top 8 left singular vectors of the layers' first 8 directions side by side. Through
    the Gram of the directions: `B = D U S^-1`. Where they span fewer than 8 dimensions, `B` is that span."""
    rows = directions[:, :RANK].reshape(-1, directions.shape[2]).double()
    values, inner = torch.linalg.eigh(rows @ rows.T)
    values, inner = values.flip(0)[:RANK], inner.flip(1)[:, :RANK]
    kept = values > 1e-10 * values[0].clamp_min(1e-300)
    coordinates = (vectors.double() @ rows.T) @ inner[:, kept] / values[kept].sqrt()
    return coordinates.square().sum(dim=1)


class Capture(NamedTuple):
    """Shared-subspace numbers of one layer of a phase: with itself in `B`, and left out of it."""

    layer: int
    capture: float
    left_out: float


class Phase(NamedTuple):
    """One phase: its layers, mean |cos| inside (1 for a single layer) and to the outside (NaN without one), captures.
    `outside`: mean capture of the other phases' top-1 directions by this phase's `B`. `chance` / `chance_high`: mean
    and 95 % quantile of the phase's mean capture for random directions, `left_out_high` the same quantile for the
    leave-one-out value, whose mean is 8/d."""

    name: str
    layers: tuple[int, ...] = ()
    intra: float = NAN
    cross: float = NAN
    captures: tuple[Capture, ...] = ()
    outside: float = NAN
    chance: float = NAN
    chance_high: float = NAN
    left_out_high: float = NAN

    @property
    def capture(self) -> float:
        return _mean([c.capture for c in self.captures])

    @property
    def left_out(self) -> float:
        return _mean([c.left_out for c in self.captures])


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if len(values) else NAN


def simulate_capture(d: int, n: int, draws: int = 50, seed: int = 0) -> Float[np.ndarray, "b n"]:
    """Captures of `n` layers whose top-8 directions are random orthonormal frames of R^d, `draws` times."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(draws):
        frames = torch.linalg.qr(torch.randn(n, d, min(RANK, d), generator=generator))[0].transpose(1, 2)
        rows.append(capture_of(frames[:, 0], frames))
    return torch.stack(rows).numpy()


def left_out_quantile(d: int, n: int, q: float = 0.95, draws: int = 20_000, seed: int = 0) -> float:
    """Quantile of the mean of `n` leave-one-out captures under chance; each is Beta(4, (d - 8) / 2), mean 8/d."""
    if d <= RANK:
        return 1.0
    draw = np.random.default_rng(seed).beta(RANK / 2, (d - RANK) / 2, size=(draws, n))
    return float(np.quantile(draw.mean(axis=1), q))


def top1_cos(directions: Float[Tensor, "L k d"]) -> Float[Tensor, "L L"]:
    """Signed cosines between the layers' top-1 directions, float64; signs as `fix_signs` states."""
    top = directions[:, 0].double()
    return top @ top.T


def phases(directions: Float[Tensor, "L k d"], seed: int = 0) -> list[Phase]:
    """All phases of a model from its layers' top directions, chance levels simulated for this d and phase size."""
    n_layers, _, d = directions.shape
    cos = top1_cos(directions).abs()
    found = []
    for name, layers in phase_layers(n_layers).items():
        others, n = [l for l in range(n_layers) if l not in layers], len(layers)
        inside = cos[layers][:, layers][*torch.triu_indices(n, n, 1)]
        cross = float(cos[layers][:, others].mean())  # NaN without others
        phase = Phase(name, tuple(layers), _mean(inside.tolist() or [1.0]), cross)
        if n > 1:
            mine = directions[layers]
            left = [float(capture_of(mine[i : i + 1, 0], torch.cat([mine[:i], mine[i + 1 :]]))[0]) for i in range(n)]
            chance = simulate_capture(d, n, seed=seed).mean(axis=1)
            phase = phase._replace(
                captures=tuple(map(Capture, layers, capture_of(mine[:, 0], mine).tolist(), left)),
                outside=_mean(capture_of(directions[others, 0], mine).tolist()),
                chance=float(chance.mean()),
                chance_high=float(np.quantile(chance, 0.95)),
                left_out_high=left_out_quantile(d, n, seed=seed),
            )
        found.append(phase)
    return found


def verdict(found: list[Phase], eff_ranks: list[float], d: int) -> dict[str, str]:
    """Both hypotheses judged by the numbers: `shared_C` and `specialised_E`, each a sentence with its chance levels.
    Phase C shares one broad subspace: *supported* if the mean leave-one-out capture is at least 1/2 and above the 95 %
    quantile of chance and the phase's space holds less of the layers outside; *in part* if only above chance; else *not
    supported*. Phase E is specialised: *supported* if its leave-one-out capture is within chance, *in part* if above
    chance but under phase C's, else *not supported*. A phase of fewer than two layers cannot be tested."""
    by_name = {name: Phase(name) for name in PHASES} | {p.name: p for p in found}
    c, e = by_name["C"], by_name["E"]
    return {"shared_C": _shared(c, eff_ranks, d), "specialised_E": _specialised(e, c, eff_ranks, d)}


def _untestable(phase: Phase) -> str:
    layers = f"{len(phase.layers)} layer{'' if len(phase.layers) == 1 else 's'}"
    return f"cannot be tested: phase {phase.name} has {layers} in this model, and two are needed."


def _numbers(p: Phase, eff_ranks: list[float], d: int) -> str:
    rest = [r for l, r in enumerate(eff_ranks) if l not in p.layers]
    beside = f" against {np.mean(rest):.1f} in the other layers" if rest else ""
    chance = f"chance {min(RANK, d) / d:.3f}, 95 % of chance under {p.left_out_high:.3f}"
    return (
        f"({len(p.layers)} layers). Leave-one-out capture {p.left_out:.3f} ({chance});"
        f" capture with the layer itself {p.capture:.3f} (simulated chance {p.chance:.3f});"
        f" |cos| of top-1 directions {p.intra:.3f} inside, {p.cross:.3f} to the other phases"
        f" (chance {expected_cos(d):.3f});"
        f" mean effective rank {np.mean([eff_ranks[l] for l in p.layers]):.1f}{beside}."
    )


def _shared(c: Phase, eff_ranks: list[float], d: int) -> str:
    if len(c.layers) < 2:
        return _untestable(c)
    if c.left_out <= c.left_out_high:
        said = "not supported: the layers' top directions lie in each other's space no more than random ones do"
    elif c.left_out < 0.5:
        said = "supported in part: a common part above chance, under half of a left-out layer's top direction"
        said += ", and the space holds the layers outside the phase at least as well" * (c.outside >= c.left_out)
    elif c.outside >= c.left_out:
        said = "supported in part: the space is shared, but it holds the layers outside the phase at least as well"
    else:
        said = "supported: most of a left-out layer's top direction lies in the space of the others"
    outside = f" The phase's space holds {c.outside:.3f} of the outside layers' top directions."
    return f"{said} {_numbers(c, eff_ranks, d)}{'' if np.isnan(c.outside) else outside}"


def _specialised(e: Phase, c: Phase, eff_ranks: list[float], d: int) -> str:
    if len(e.layers) < 2:
        return _untestable(e)
    lies = "a layer's top direction lies in the space of the others"
    if e.left_out <= e.left_out_high:
        said = f"supported: {lies} no more than a random one does"
    elif e.left_out < c.left_out:
        said = "supported in part: above chance, yet less shared than phase C"
    else:
        said = f"not supported: {lies} above chance"
        said += ", and no less so than in phase C" if c.captures else ""
    beside = f" Phase C's leave-one-out capture: {c.left_out:.3f}." if c.captures else ""
    return f"{said} {_numbers(e, eff_ranks, d)}{beside}"


def bands(n_layers: int) -> list[tuple[str, int, int]]:
    """(phase, first layer, last layer) in order of depth, for figures."""
    return [(name, layers[0], layers[-1]) for name, layers in phase_layers(n_layers).items()]
