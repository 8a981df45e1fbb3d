"""Is any overlap score worth looking at? A designed cloud of blind subspaces. (docs/method.md section 8)

Over the candidates themselves the question has no answer: recovery of w *is* captured energy up to weighting. So blind
subspaces `orth(T_l O E)` are drawn, O one Haar rotation for all layers, E fixed; `T_l = prod_j (I + k_j G_l^j)^(+-1/2)` pulls
each towards or away from where w's energy lies, where the input-weighted energy lies, and where activations differ, by
strengths k_j drawn independently. The effect is regressed on the three scores. The strengths are
independent, the scores are not: what holds of one energy nearly holds of the other."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.causal.ground import Ground
from ws.causal.retention import linear_of
from ws.causal.variants import Bases
from ws.show.bars import tqdm
from ws.stability.blind import haar

SCORES = ("energy_frobenius", "energy", "R_act")
LEAST = 20  # subspaces
NEAR = 40  # of the cloud, nearest in expected effect, that a candidate is compared with
MOST_VIF = 10.0  # of a score that the others nearly say: no slope of its own is told
PULL = 6.0  # of log k: how far a pull may go
FOLDS = 10


@dataclass(frozen=True, eq=False)
class Cloud:
    """points: one row per blind subspace: SCORES, linear (first-order effect, nats). fit: one row per set of scores: scores,
    r2 and r2_out (of held-out folds). slopes: one row per score: its correlation with the effect, its variance inflation
    factor, and nats per standard deviation, the other scores held, with the 95 % interval of `boot` resamples, NaN where the
    others nearly say the score (VIF above 10). beyond: one row per candidate: linear, expected (of all three scores),
    residual, and z: how far the residual lies from those of the NEAR blind subspaces of most like expected effect, in their
    standard deviations; NaN for another rank than theirs, and where they expect no such effect. z describes; it tests
    nothing: blind subspaces that are pulled one way alone lie off the regression, too."""

    points: pl.DataFrame
    fit: pl.DataFrame
    slopes: pl.DataFrame
    beyond: pl.DataFrame


def cloud(
    ground: Ground,
    bases: Mapping[str, Bases],
    act: Mapping[int, Tensor],
    k: int,
    n: int = 300,
    boot: int = 2000,
    seed: int = 0,
) -> Cloud:
    """act: activation differences `(d, n_probes)` of the EVAL probes, per layer, rows of norm 1 over their number. ValueError
    for fewer than 20 subspaces."""
    if n < LEAST:
        raise ValueError(f"CLOUD = {n}: a regression on three scores needs at least {LEAST} subspaces (0: none)")
    d, g, rows = ground.lm.decoder.d, torch.Generator().manual_seed(seed), []
    parts = {l: _grams(ground, act, l) for l in ground.layers}
    for _ in tqdm(range(n), desc="designed cloud", disable=not ground.progress):
        O = haar(d, g, torch.float64)[:, :k]
        pulls = torch.rand(3, generator=g, dtype=torch.float64) * 2 - 1
        of = {}
        for l, grams in parts.items():
            B = O
            for (v, V), pull in zip(grams, pulls, strict=True):
                grow = (1 + torch.expm1(PULL * pull.abs()) * v / v.max()).pow(0.5 * float(pull.sign()))
                B = B + V @ ((grow - 1)[:, None] * (V.T @ B))
            of[l] = torch.linalg.qr(B).Q
        rows.append(_scores(ground, of, act))
    points = pl.DataFrame(rows)
    X, y = points.select(SCORES).to_numpy(), points["linear"].to_numpy()
    sets = {"energy_frobenius": [0], "energy": [1], "R_act": [2], "both energies": [0, 1], "all three": [0, 1, 2]}
    order = np.random.default_rng(seed).permutation(n)
    fit = [
        {"scores": name, "r2": _r2(X[:, c], y, X[:, c], y), "r2_out": _out(X[:, c], y, order)}
        for name, c in sets.items()
    ]
    coef = _ols(X, y)
    fitted, beyond = _at(coef, X), []
    for name, of in bases.items():
        one = _scores(ground, of, act)
        expected = float(_at(coef, np.array([[one[s] for s in SCORES]]))[0])
        near = np.argsort(np.abs(fitted - expected))[:NEAR]
        off, left = (y - fitted)[near], one["linear"] - expected
        inside = fitted.min() <= expected <= fitted.max() and {B.shape[1] for B in of.values()} == {k}
        z = (left - off.mean()) / off.std(ddof=1) if inside else float("nan")
        beyond.append({"subspace": name, **one, "expected": expected, "residual": left, "z": float(z)})
    schema = {"subspace": pl.String, **dict.fromkeys([*SCORES, "linear", "expected", "residual", "z"], pl.Float64)}
    return Cloud(points, pl.DataFrame(fit), _slopes(X, y, boot, seed), pl.DataFrame(beyond, schema=schema))


def _grams(ground: Ground, act: Mapping[int, Tensor], l: int) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues and eigenvectors of both energies' Grams and of the activation differences'."""
    span, found = ground.spans[l], []
    for kind in ("frobenius", "input"):
        v, V = torch.linalg.eigh(span.K[kind])
        found.append((v.clamp(min=0), span.U @ V))
    U, s, _ = torch.linalg.svd(act[l].double(), full_matrices=False)
    return [*found, (s.square(), U)]


def _scores(ground: Ground, of: Bases, act: Mapping[int, Tensor]) -> dict[str, float]:
    found = linear_of(ground.spans, of)
    d = ground.lm.decoder.d
    recovered = [
        float((of[l].T @ act[l].double()).square().sum())
        / float(act[l].double().square().sum())
        * d
        / max(of[l].shape[1], 1)
        for l in of
    ]
    return {s: found[s] for s in SCORES[:2]} | {"R_act": float(np.mean(recovered)), "linear": found["linear"]}


def _ols(X: Float[np.ndarray, "n p"], y: Float[np.ndarray, " n"]) -> Float[np.ndarray, " q"]:
    return np.linalg.lstsq(np.c_[np.ones(len(X)), X], y, rcond=None)[0]


def _at(coef: Float[np.ndarray, " q"], X: Float[np.ndarray, "n p"]) -> Float[np.ndarray, " n"]:
    return np.c_[np.ones(len(X)), X] @ coef


def _r2(X, y, X_new, y_new) -> float:
    return float(1 - (y_new - _at(_ols(X, y), X_new)).var() / y_new.var())


def _out(X: Float[np.ndarray, "n p"], y: Float[np.ndarray, " n"], order: np.ndarray) -> float:
    """Share of the variance that is predicted on folds that were left out."""
    error = np.zeros(len(y))
    for fold in np.array_split(order, FOLDS):
        rest = np.setdiff1d(order, fold)
        error[fold] = y[fold] - _at(_ols(X[rest], y[rest]), X[fold])
    return float(1 - (error**2).mean() / y.var())


def _slopes(X: Float[np.ndarray, "n p"], y: Float[np.ndarray, " n"], boot: int, seed: int) -> pl.DataFrame:
    Z, generator = (X - X.mean(axis=0)) / X.std(axis=0), np.random.default_rng(seed)
    vif = np.array([1 / max(1 - _r2(np.delete(Z, c, 1), Z[:, c], np.delete(Z, c, 1), Z[:, c]), 1e-9) for c in range(3)])
    drawn = np.array([_ols(Z[i], y[i])[1:] for i in (generator.integers(0, len(y), len(y)) for _ in range(boot))])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    told = [np.where(vif > MOST_VIF, np.nan, x) for x in (_ols(Z, y)[1:], low, high)]
    alone = [float(np.corrcoef(Z[:, c], y)[0, 1]) for c in range(3)]
    return pl.DataFrame({"score": list(SCORES), "correlation": alone, "vif": vif}).with_columns(
        pl.Series(name, x) for name, x in zip(("nats_per_sd", "low", "high"), told, strict=True)
    )
