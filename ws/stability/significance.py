"""Is a candidate's weight concentration above that of a random subspace? Monte-Carlo p-values and Benjamini-Hochberg.

`R_w = (d / r) tr(Q^T G Q) / tr G` of Haar-random Q, `T = mean_{s,l} log R_w[s, l]`, `p = (1 + #{T_null >= T}) / (1 + N)`.
One draw of Q serves every seed, because an A-side basis does not know the seed: a random basis that is lucky on one
seed is lucky on all, and only repeating it keeps p honest. Columns of Q are nested, so one set of draws gives the null
of every rank. (docs/method.md section 7)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control
from torch import Tensor

from ws.stability.scores import SeedScores

TAIL = 1e-4  # relative change of the null's variance that a thinner factor may cost
BLOCK = 200  # random bases held in memory at once


@dataclass(frozen=True)
class GramFactor:
    """`G / tr G ~ F F^T` plus isotropic rest: F (d, k) float32, `rest` the share of the trace not in F."""

    F: Float[Tensor, "d k"]
    rest: float


Grams = Sequence[Sequence[GramFactor]]  # [seed][layer]


def combined_factor(factors: Sequence[Float[Tensor, "d _"]], label: str, tail: float = TAIL) -> GramFactor:
    """Factor of `[w_o / |w_o| | w_down / |w_down|]`, from each tensor's left factor.

    Small singular values are replaced by their mean effect (`rest`) as long as that changes the null's variance, which
    section 6 gives as proportional to `d tr(G^2) - 1` at tr G = 1, by at most the share `tail`; its mean stays 1.
    Raises ValueError naming `label` for a zero or absent tensor.
    """
    if not factors or any(float(F.norm()) == 0 for F in factors):
        raise ValueError(f"{label}: no weight difference to compare with (tensor absent or zero)")
    joined = torch.cat([F.double() / F.double().norm() for F in factors], dim=1) / len(factors) ** 0.5
    U, s, _ = torch.linalg.svd(joined, full_matrices=False)
    energy, fourth = (s.pow(k).flip(0).cumsum(0).flip(0) for k in (2, 4))  # of column i and all after it
    d = len(joined)
    change = 2 * energy + d * fourth  # bounds |change of d tr(G^2) - 1| when columns i and after are dropped
    keep = max(int((change > tail * (d * float(fourth[0]) - 1)).sum()), 1)
    return GramFactor((U[:, :keep] * s[:keep]).float(), float(s[keep:].square().sum()))


def random_log_concentration(
    factors: Grams, ranks: Sequence[int], n_draws: int, seed: int, device: str = "cpu"
) -> Float[Tensor, "N L q"]:
    """Mean over seeds of log R_w of random bases: entry [i, l, j] is draw i of rank `ranks[j]` at layer l, float64. The
    same draw i stands at every layer and for every rank; same seed, same draws on one device type. Raises ValueError
    for a rank outside 1..d."""
    S, L, d, most = len(factors), len(factors[0]), len(factors[0][0].F), max(ranks)
    if min(ranks) < 1 or most > d:
        raise ValueError(f"ranks {sorted(ranks)}: random bases of R^{d} have rank 1 to {d}")
    picks = torch.tensor(ranks, device=device) - 1
    scale = d / torch.tensor(ranks, dtype=torch.float64, device=device)
    layers = list(zip(*factors, strict=True))  # the seeds' factors of each layer
    wide = [torch.cat([f.F for f in row], dim=1).to(device) for row in layers]
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(n_draws, L, len(ranks), dtype=torch.float64)
    for start in range(0, n_draws, BLOCK):
        size = min(BLOCK, n_draws - start)
        X = torch.randn(size, most, d, generator=generator, device=device)
        if most * 4 <= d:  # Gram-Schmidt by Cholesky: X^T = Q R with R = chol(X X^T)^T, well conditioned for thin X
            Q = torch.linalg.solve_triangular(torch.linalg.cholesky(X @ X.mT), X, upper=False)
        else:
            Q = torch.linalg.qr(X.double().mT).Q.mT.float()
        for l, row in enumerate(layers):
            squared = (Q.reshape(size * most, d) @ wide[l]).square_()
            total = torch.zeros(size, len(ranks), dtype=torch.float64, device=device)
            for f, part in zip(row, squared.split([f.F.shape[1] for f in row], dim=1), strict=True):
                energy = part.sum(dim=1).reshape(size, most).double().cumsum(dim=1)[:, picks]
                total += (energy * scale + f.rest).log()
            out[start : start + size, l] = (total / S).cpu()
    return out


def null_statistics(
    draws: Float[Tensor, "N L q"], ranks: Sequence[int], layer_ranks: Sequence[int], one_basis: bool
) -> Float[np.ndarray, " N"]:
    """N null values of `T = mean_l log R_w`, for a candidate with basis rank `layer_ranks[l]` at layer l, sorted.
    one_basis: the same random basis at every layer; else an independent one at each, taken as draw `i + l (N // L)`
    (mod N) at layer l, so that no draw meets itself."""
    N, L, _ = draws.shape
    step = 0 if one_basis else N // L
    total = sum(torch.roll(draws[:, l, list(ranks).index(r)], -step * l) for l, r in enumerate(layer_ranks))
    return np.sort((total / L).numpy())


def monte_carlo_p(observed: float, null: Float[np.ndarray, " N"]) -> float:
    """`(1 + #{null >= observed}) / (1 + N)` against a sorted null; NaN for an undefined observation."""
    above = len(null) - np.searchsorted(null, observed, side="left")
    return float("nan") if np.isnan(observed) else float((1 + above) / (1 + len(null)))


def benjamini_hochberg(p: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Adjusted p-values: `q_(i) = min_{j >= i} m p_(j) / j`, capped at 1; NaN entries are no tests and stay NaN."""
    q = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        q[tested] = false_discovery_control(p[tested])
    return q


def significance_table(
    scores: SeedScores, factors: Grams, one_basis: Bool[np.ndarray, " C"], seed: int, n_draws: int, device: str = "cpu"
) -> pl.DataFrame:
    """One row per candidate, in the order of `scores`; NaN for an undefined score and for ceilings, which saw w.
    one_basis: which candidates have one basis for all layers. T: mean log R_w over layers and seeds (natural log), of
    which null_mean, null_sd and null_q95 are. q_R_w: Benjamini-Hochberg over the A-hypotheses."""
    if n_draws < 1:
        raise ValueError(f"N_NULL = {n_draws}: at least one random subspace is needed")
    S, C, L = scores.w.shape
    lengths = [len(row) for row in factors]
    if lengths != [L] * S:
        raise ValueError(f"factors: {len(factors)} seeds x {lengths} layers, scores have {S} x {L}")
    observed = np.log(np.where(scores.w == 0, np.nan, scores.w)).mean(axis=(0, 2))
    tested = np.array([kind in ("A-hypothesis", "control") for kind in scores.kinds]) & ~np.isnan(observed)
    layer_ranks = scores.ranks.astype(int)
    ranks = np.unique(layer_ranks[tested]).tolist()
    draws = random_log_concentration(factors, ranks, n_draws, seed, device) if ranks else None
    null = cache(lambda one, of_layers: null_statistics(draws, ranks, of_layers, one))  # many candidates share one
    rows = np.full((C, 4), np.nan)  # null_mean, null_sd, null_q95, p_R_w
    for c in np.flatnonzero(tested):
        values = null(bool(one_basis[c]), tuple(layer_ranks[c].tolist()))
        rows[c] = values.mean(), values.std(), np.quantile(values, 0.95), monte_carlo_p(float(observed[c]), values)
    return pl.DataFrame(
        {
            "candidate": scores.candidates,
            "T": observed,
            **dict(zip(("null_mean", "null_sd", "null_q95", "p_R_w"), rows.T, strict=True)),
            "q_R_w": benjamini_hochberg(np.where(scores.ranked, rows[:, 3], np.nan)),
            "n_draws": [n_draws] * C,
            "basis": ["one for all layers" if one else "per layer" for one in one_basis],
        }
    )
