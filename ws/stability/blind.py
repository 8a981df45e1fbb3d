"""Blind copies: what scores would be if the candidates knew nothing of w. (docs/method.md section 7)

A blind copy of all candidates is `O B_l`, one Haar-random rotation `O` of R^d for every layer, seed and candidate: every
overlap among bases, layers and seeds stays, every relation to w and to what it does is lost. p-values and the chance level
of every count over candidates and seeds come from such copies.

`N` copies are `O_i V_j` of about sqrt(N) rotations `O_i` and as many `V_j`. A product of independent Haar rotations is Haar,
and any two of these products are independent, so that a share of them that exceeds something has the mean and the variance
of N independent draws; rotating targets by the one and bases by the other costs sqrt(N) rotations instead of N.

From ROUNDED dimensions on both factors of `(F^T O_i)(V_j B)` are rounded to bfloat16 (`ws.model.rounded`), which moves a score by
some thousandths of what copies differ by; not where a candidate and the clean PCA hold more than half of all directions
together, since what is left of the one beyond the other is then small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ws.model.rounded import fast_products, rounded
from ws.show.bars import tqdm

TAIL = 1e-3  # relative change of the null's variance that a thinner factor may cost
ROUNDED = 256  # dimensions
SCORES = ("R_w", "R_act", "H_w", "H_act", "specific")


@dataclass(frozen=True)
class GramFactor:
    """`G ~ F F^T` plus `rest` spread evenly over all directions: F (d, k) float32, rest a part of the trace."""

    F: Float[Tensor, "d k"]
    rest: float


def thin(F: Float[Tensor, "d q"], tail: float = TAIL) -> GramFactor:
    """The factor without its small singular values, whose mean effect `rest` keeps.

    As long as that changes the variance of `tr(B^T G B)` over random bases, which section 6 gives as proportional to
    `d tr(G^2) - tr(G)^2`, by at most the share `tail`; its mean does not change.
    """
    U, s, _ = torch.linalg.svd(F.double(), full_matrices=False)
    energy, fourth = (s.pow(k).flip(0).cumsum(0).flip(0) for k in (2, 4))  # of column i and all after it
    d, trace = len(F), float(energy[0]) if len(s) else 0.0
    if trace == 0:
        return GramFactor(torch.zeros(d, 1), 0.0)
    change = 2 * trace * energy + d * fourth  # bounds |change| when columns i and after are dropped
    keep = max(int((change > tail * (d * float(fourth[0]) - trace**2)).sum()), 1)
    return GramFactor((U[:, :keep] * s[:keep]).float(), float(s[keep:].square().sum()))


def combined_factor(factors: Sequence[Float[Tensor, "d _"]], label: str, tail: float = TAIL) -> GramFactor:
    """Factor of `[w_o / |w_o| | w_down / |w_down|] / sqrt 2`, from each tensor's left factor. ValueError naming `label` for
    a zero or absent tensor."""
    if not factors or any(float(F.norm()) == 0 for F in factors):
        raise ValueError(f"{label}: no weight difference to compare with (tensor absent or zero)")
    return thin(torch.cat([F.double() / F.double().norm() for F in factors], dim=1) / len(factors) ** 0.5, tail)


@dataclass(frozen=True)
class Geometry:
    """What blind copies are drawn of, over the LoRA layers.

    bases: per layer and candidate `(d, r)`, of rank 1 or more. w, act: factors per [seed][layer] of the weight and of the
    activation target; specific: of the activation target without `clean`, the clean PCA per layer `(d, c)`. best: per
    target ("w", "act") the R of the best subspace of each candidate's rank, `(S, C, L)`.
    """

    bases: Sequence[Sequence[Float[Tensor, "d _"]]]
    w: Sequence[Sequence[GramFactor]]
    act: Sequence[Sequence[GramFactor]]
    specific: Sequence[Sequence[GramFactor]]
    clean: Sequence[Float[Tensor, "d _"]]
    best: Mapping[str, Float[np.ndarray, "S C L"]]


def haar(d: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Float[Tensor, "d d"]:
    """A uniformly random rotation or reflection of R^d, on the generator's device."""
    Q, R = torch.linalg.qr(torch.randn(d, d, generator=generator, device=generator.device, dtype=dtype))
    return Q * R.diagonal().sign()  # without the signs, Q depends on how the routine chose them


def blind_scores(
    geometry: Geometry, n_draws: int, seed: int, device: str = "cpu", progress: bool = False
) -> dict[str, Float[np.ndarray, "N S C"]]:
    """Scores of N blind copies of all candidates on every seed, means over layers: `R_w`, `R_act`, `specific` (R beyond
    the clean PCA) and the rank-honest `H_w`, `H_act` (share of the best subspace of that rank). float32; the same seed
    gives the same copies on one device type. ValueError for fewer than one draw."""
    if n_draws < 1:
        raise ValueError(f"N_NULL = {n_draws}: at least one blind copy is needed")
    generator = torch.Generator(device).manual_seed(seed)
    layers = [_Layer(geometry, l, device) for l in range(len(geometry.bases))]
    d, (S, C) = layers[0].d, layers[0].shape
    I = ceil(sqrt(n_draws))
    turned: list[list[Tensor]] = [[] for _ in layers]
    for _ in range(I):
        O = haar(d, generator)
        for rows, layer in zip(turned, layers, strict=True):
            rows.append(layer.rounded(layer.targets @ O))
    targets = [torch.stack(rows) for rows in turned]
    out = np.empty((len(SCORES), n_draws, S, C), dtype=np.float32)
    for start in tqdm(range(0, n_draws, I), "blind copies", disable=not progress):
        V, size = haar(d, generator), min(I, n_draws - start)
        found = sum(layer.score(rows[:size], V) for layer, rows in zip(layers, targets, strict=True))
        out[:, start : start + size] = (found / len(layers)).cpu().numpy()
    return dict(zip(SCORES, out, strict=True))


class _Layer:
    """One layer's targets and bases, laid out for products: rows of targets are groups of equal size, one per seed."""

    def __init__(self, g: Geometry, l: int, device: str):
        parts = {name: [of_seed[l] for of_seed in getattr(g, name)] for name in ("w", "act", "specific")}
        self.d, S, C = len(g.bases[l][0]), len(g.w), len(g.bases[l])
        self.shape, self.width, rows = (S, C), {}, []
        for name, factors in parts.items():
            self.width[name] = max(f.F.shape[1] for f in factors)
            for f in factors:
                padded = torch.zeros(self.width[name], self.d)
                padded[: f.F.shape[1]] = f.F.T
                rows.append(padded)
        clean = g.clean[l]
        self.clean = clean.shape[1]
        self.targets = torch.cat([*rows, clean.float().T]).to(device)
        self.ranks = torch.tensor([B.shape[1] for B in g.bases[l]], device=device)
        self.fast = self.d >= ROUNDED and 2 * (int(self.ranks.max()) + self.clean) <= self.d
        self.rounded = rounded if self.fast else Tensor.float
        order = torch.argsort(self.ranks, stable=True).tolist()  # candidates of one rank lie side by side
        self.order = torch.tensor(order, device=device)
        self.bases = torch.cat([g.bases[l][c].float() for c in order], dim=1).to(device)
        owner = torch.repeat_interleave(torch.arange(C, device=device), self.ranks[self.order])
        self.member = torch.nn.functional.one_hot(owner, C).float()
        self.rest = {n: torch.tensor([f.rest for f in factors], device=device)[:, None] for n, factors in parts.items()}
        self.best = {n: torch.tensor(g.best[n][:, order, l], dtype=torch.float32, device=device) for n in ("w", "act")}

    def score(self, targets: Float[Tensor, "I q d"], V: Float[Tensor, "d d"]) -> Float[Tensor, "5 I S C"]:
        """Scores at this layer of the copies `O_i V`, in the order of SCORES."""
        turned, at, parts = self.rounded(V @ self.bases), 0, {}
        with fast_products(self.fast):
            Z = targets @ turned
        for name, width in self.width.items():
            stop = at + self.shape[0] * width
            parts[name] = Z[:, at:stop].unflatten(1, (self.shape[0], width))
            at = stop
        r, found = self.ranks[self.order].float(), []
        energy = {n: parts[n].square().sum(2) @ self.member + self.rest[n] * r / self.d for n in ("w", "act")}
        found += [energy[n] * self.d / r for n in ("w", "act")]
        found += [of / self.best[n] for n, of in zip(("w", "act"), found, strict=True)]
        found.append(self._specific(parts["specific"], Z[:, at:]))
        return torch.stack(found)[..., torch.argsort(self.order)]

    def _specific(self, X: Float[Tensor, "I S q m"], E: Float[Tensor, "I c m"]) -> Float[Tensor, "I S C"]:
        """R of what the copies hold beyond the clean PCA: with `B' = L^-T B` of `L L^T = I - E^T E`, E the copy's part in
        the clean PCA, `B'` without that part is orthonormal."""
        left, found, at = self.d - self.clean, [], 0
        for r, many in zip(*(x.tolist() for x in torch.unique(self.ranks, return_counts=True)), strict=True):
            part = slice(at, at + r * many)
            inside = E[..., part].unflatten(-1, (many, r)).permute(0, 2, 1, 3)  # I, many, c, r
            eye = torch.eye(r, device=E.device)
            root = torch.linalg.cholesky(eye * (1 + 1e-6) - inside.mT @ inside)
            of = X[..., part].unflatten(-1, (many, r)).permute(0, 3, 4, 1, 2).flatten(3)  # I, many, r, S q
            whole = torch.linalg.solve_triangular(root, of, upper=False).square().sum(2)
            energy = whole.unflatten(-1, X.shape[1:3]).sum(-1).mT  # I, S, many
            found.append(energy * left / r + self.rest["specific"])
            at = part.stop
        return torch.cat(found, dim=-1)
