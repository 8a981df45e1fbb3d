"""Every candidate's basis at every layer, scored on what w does to activations and to weights: one row each.

(docs/method.md sections 5 to 7)
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ws.diff import WeightDiff
from ws.explanation.scores import (
    NAN,
    ZERO,
    Target,
    activation_target,
    monte_carlo_null,
    null_sd,
    oracle_basis,
    oracle_fraction,
    score,
    span_score,
    specific,
    topic_terms,
    weight_targets,
    without,
)
from ws.subspaces.algebra import Basis, left_svd, principal_cos
from ws.subspaces.candidate import Candidate
from ws.subspaces.steered import CeilingMaterials

WEIGHTS = ("oproj", "downproj", "combined")
SKETCH = 64
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerTargets:
    """What is scored at one layer: activation difference (cumulative, block-local, without the clean PCA) and weights."""

    act: Target
    block: Target
    beyond_clean: Target
    weights: dict[str, Target | None]
    dw_left: Float[Tensor, "d r"]


def layer_targets(ceiling: CeilingMaterials, clean: list[Basis]) -> list[LayerTargets]:
    """Targets of every layer. `clean` are the bases of layer_clean_resid_pca. Missing weight tensors are logged once."""
    targets, missing = [], []
    for l in range(ceiling.n_layers):
        F_o, F_down = ceiling.left_factor(l, "o"), ceiling.left_factor(l, "down")
        if (F_o is None) != (F_down is None):
            missing.append(f"layer {l}: {'o_proj' if F_o is None else 'down_proj'}")
        factors = [F for F in (F_o, F_down) if F is not None]
        dw = left_svd(torch.cat(factors, dim=1), ceiling.k).B if factors else torch.zeros(ceiling.d, 0)
        X = ceiling.steered.eval[l]
        targets.append(
            LayerTargets(
                act=activation_target(X),
                block=activation_target(ceiling.steered.eval_block[l]),
                beyond_clean=without(X, clean[l]),
                weights=weight_targets(F_o, F_down),
                dw_left=dw,
            )
        )
    if missing:
        log.warning(
            "the weight diff lacks one of the two residual writers at %s: scores there are NaN", "; ".join(missing)
        )
    return targets


def lora_layers(w: WeightDiff, n_layers: int, given: list[int] | None = None) -> list[int]:
    """Layers the summary averages over: those w touches, unless given.

    ValueError where there are none, where the model lacks one, or where w touches none of those given.
    """
    layers = sorted(set(given)) if given else w.layers()
    if not layers:
        raise ValueError("the weight diff names no layer; give LORA_LAYERS")
    beyond = [l for l in layers if not 0 <= l < n_layers]
    if beyond:
        raise ValueError(f"LORA_LAYERS: the model has layers 0 to {n_layers - 1}, asked for were {beyond}")
    if w.layers() and not set(layers) & set(w.layers()):
        raise ValueError(f"LORA_LAYERS {layers}: the weight diff touches none of them, but {w.layers()}")
    return layers


def _row(l: int, c: Candidate, basis: Basis, t: LayerTargets) -> dict:
    act = score(t.act, basis.B, ZERO)
    row = {
        "layer": l,
        "subspace": c.name,
        "family": c.family,
        "axis_kind": c.axis_kind,
        "source": c.source,
        "kind": c.kind,
        "rank": basis.rank,
        "conc_act": act.conc,
        "z_act": act.z,
        "energy_frac_act": act.energy_frac,
    }
    for name in WEIGHTS:
        s = score(t.weights[name], basis.B)
        row |= {f"conc_w_{name}": s.conc, f"z_w_{name}": s.z, f"energy_frac_w_{name}": s.energy_frac}
    row["cos_with_dW"] = principal_cos(basis.B, t.dw_left)
    block = score(t.block, basis.B, ZERO)
    row |= {"conc_block": block.conc, "z_block": block.z, "energy_frac_block": block.energy_frac}
    row["pct_oracle_act"] = oracle_fraction(t.act, basis.B, rows=True)
    row["pct_oracle_block"] = oracle_fraction(t.block, basis.B, rows=True)
    for name in WEIGHTS:
        row[f"pct_oracle_{name}"] = oracle_fraction(t.weights[name], basis.B)
        row[f"span_score_{name}"] = span_score(t.weights[name], basis.B)
    return row | {"gap": basis.gap, "ill_conditioned": basis.ill_conditioned, "note": basis.note}


def per_layer(candidates: list[Candidate], bases: dict[str, list[Basis]], targets: list[LayerTargets]) -> pl.DataFrame:
    """One row per layer and candidate: the columns of docs/method.md section 6, then block, oracle, span, gap columns."""
    rows = [_row(l, c, bases[c.name][l], t) for l, t in enumerate(targets) for c in candidates]
    return pl.DataFrame(rows, infer_schema_length=None)


def with_null_diff(
    table: pl.DataFrame, candidates: list[Candidate], bases: dict[str, list[Basis]], null: list[LayerTargets]
) -> pl.DataFrame:
    """The table with every candidate's scores on the null diff's targets and the ratios to them.

    Adds conc_act_null, conc_w_combined_null, R_act_vs_null_diff, R_w_vs_null_diff (NaN where the null score is 0 or
    undefined). (docs/method.md section 7)
    """
    rows = [
        {
            "layer": l,
            "subspace": c.name,
            "conc_act_null": score(t.act, bases[c.name][l].B, ZERO).conc,
            "conc_w_combined_null": score(t.weights["combined"], bases[c.name][l].B).conc,
        }
        for l, t in enumerate(null)
        for c in candidates
    ]

    def ratio(value: str, reference: str) -> pl.Expr:
        return pl.when(pl.col(reference) > 0).then(pl.col(value) / pl.col(reference)).otherwise(NAN)

    joined = table.join(pl.DataFrame(rows), on=["layer", "subspace"], how="left", maintain_order="left")
    return joined.with_columns(
        R_act_vs_null_diff=ratio("conc_act", "conc_act_null"),
        R_w_vs_null_diff=ratio("conc_w_combined", "conc_w_combined_null"),
    )


def specific_per_layer(
    candidates: list[Candidate], bases: dict[str, list[Basis]], targets: list[LayerTargets]
) -> pl.DataFrame:
    """What each candidate explains beyond the clean states' own top directions, per layer. (section 6, specificity)"""
    rows = []
    for l, t in enumerate(targets):
        clean = bases["layer_clean_resid_pca"][l]
        for c in candidates:
            s, rank = specific(t.beyond_clean, bases[c.name][l], clean)
            rows.append(
                {
                    "layer": l,
                    "subspace": c.name,
                    "family": c.family,
                    "source": c.source,
                    "kind": c.kind,
                    "specific_conc_act": s.conc,
                    "specific_z_act": s.z,
                    "specific_energy_frac_act": s.energy_frac,
                    "specific_rank": rank,
                    "gap": bases[c.name][l].gap,
                    "ill_conditioned": bases[c.name][l].ill_conditioned,
                }
            )
    return pl.DataFrame(rows, infer_schema_length=None)


def kept_tensors(
    candidates: list[Candidate], bases: dict[str, list[Basis]], targets: list[LayerTargets], k: int
) -> dict[str, Tensor]:
    """What statistics over seeds start from.

    `act_topics (C, L, n)` float64: R_act of every EVAL row by itself. Per layer l: `act_oracle/<l>`, `weight_oracle/<l>`:
    top-k oracles `(d, <= k)`; `act_factor/<l> (d, n)` and `weight_factor/<l>/{oproj,downproj} (d, r)`: scaled factors.
    Per candidate `sketch/<name> (L, r, 64)`: `B^T S` with one random S, enough to tell whether two runs' bases agree.
    """
    rows = [torch.stack([topic_terms(t.act, bases[c.name][l].B) for l, t in enumerate(targets)]) for c in candidates]
    tensors = {"act_topics": torch.stack(rows)}
    for l, t in enumerate(targets):
        both = t.weights["combined"]
        tensors[f"act_factor/{l}"] = t.act.F
        tensors[f"act_oracle/{l}"] = oracle_basis(t.act, k)
        tensors[f"weight_oracle/{l}"] = oracle_basis(both, k) if both else torch.zeros(len(t.dw_left), 0)
        for name in ("oproj", "downproj"):
            if t.weights[name] is not None:
                tensors[f"weight_factor/{l}/{name}"] = t.weights[name].F
    d = len(targets[0].dw_left)
    S = torch.randn(d, SKETCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for c in candidates:
        rows = [bases[c.name][l].B.double().T @ S for l in range(len(targets))]
        widest = max(len(C) for C in rows)
        tensors[f"sketch/{c.name}"] = torch.stack([pad(C, (0, 0, 0, widest - len(C))) for C in rows]).float()
    return {name: x.contiguous() for name, x in tensors.items()}


def bases_hash(rows: Sequence[Basis]) -> str:
    """SHA-256 over the bytes and shapes of one candidate's bases."""
    digest = hashlib.sha256()
    for basis in rows:
        digest.update(repr(tuple(basis.B.shape)).encode())
        digest.update(basis.B.contiguous().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def self_checks(table: pl.DataFrame, layers: list[int]) -> dict[str, float]:
    """The run's own assertions, with their values: AssertionError (naming the check) where one fails.

    ceiling_r_w: mean R_w of dW_left_basis_ceiling over `layers`, must exceed 1. combined_minus_mean: largest
    |R_combined - (R_o + R_down)/2|. act_z_at_ceiling is reported only.
    """
    ceiling = table.filter((pl.col("subspace") == "dW_left_basis_ceiling") & pl.col("layer").is_in(layers))
    r_w = ceiling["conc_w_combined"].drop_nans()
    defined = table.drop_nans(["conc_w_combined", "conc_w_oproj", "conc_w_downproj"])
    mean = (defined["conc_w_oproj"] + defined["conc_w_downproj"]) / 2
    values = {
        "ceiling_r_w": float(r_w.mean()) if len(r_w) else NAN,
        "combined_minus_mean": float((defined["conc_w_combined"] - mean).abs().max()) if len(defined) else NAN,
    }
    if len(r_w) and not values["ceiling_r_w"] > 1:
        raise AssertionError(f"the weight ceiling explains no more than chance: R_w = {values['ceiling_r_w']:.3f}")
    if len(defined) and not values["combined_minus_mean"] < 1e-6 * max(1.0, float(defined["conc_w_combined"].max())):
        raise AssertionError(f"R_combined differs from the mean of its parts by {values['combined_minus_mean']:.2g}")
    return values


def null_check(targets: dict[int, dict[str, Target | None]], r: int, draws: int, seed: int = 0) -> pl.DataFrame:
    """The closed-form null beside a Monte-Carlo one: per layer and target, mean and sd of R over `draws` random subspaces.

    Columns: layer, target, mc_mean (expected 1), mc_sd, closed_sd, sd_ratio (its own sampling error is about
    1/sqrt(2 draws), more where the null is skewed).
    """
    rows = []
    for l, by_name in targets.items():
        for name, t in by_name.items():
            if t is None or t.trace <= 0:
                continue
            values = monte_carlo_null(t, r, draws, f"layer {l}/{name}", seed)
            sd, closed = float(values.std()), null_sd(t, r)
            mean = float(values.mean())
            rows.append(
                {"layer": l, "target": name, "mc_mean": mean, "mc_sd": sd, "closed_sd": closed, "sd_ratio": sd / closed}
            )
    return pl.DataFrame(rows)


def null_summary(null: pl.DataFrame) -> pl.DataFrame:
    """Per target, over layers: mean of the drawn means (expected 1) and of the ratio of drawn to closed-form sd."""
    return null.group_by("target", maintain_order=True).agg(
        pl.col("mc_mean").mean().alias("mean of R (expected 1)"),
        pl.col("sd_ratio").mean().alias("drawn sd / closed form"),
        pl.col("sd_ratio").min().alias("least over layers"),
        pl.col("sd_ratio").max().alias("most over layers"),
    )


def largest_deviation(bases: dict[str, list[Basis]]) -> float:
    """`max |B^T B - I|` over all bases: the orthonormality check's value."""
    worst = 0.0
    for rows in bases.values():
        for b in rows:
            if b.rank:
                worst = max(worst, float((b.B.T @ b.B - torch.eye(b.rank)).abs().max()))
    return worst
