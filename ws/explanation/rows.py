"""Every candidate's basis at every layer, scored on what w does: one row each. (docs/method.md sections 5 to 7)"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.diff import WeightDiff
from ws.explanation import scores as sc
from ws.subspaces.algebra import Basis, principal_cos
from ws.subspaces.candidate import Candidate
from ws.subspaces.check import skew
from ws.subspaces.eigen import side_by_side
from ws.subspaces.steered import CeilingMaterials

CLEAN = "layer_clean_resid_pca"  # what specificity projects out
LARGEST = 3  # coordinates of the residual stream without which R_act is told too
WEIGHTS = ("oproj", "downproj", "combined")
NULL_ROWS = {"null": pl.Int64, "layer": pl.Int64, "subspace": pl.String}
NULL_ROWS |= {"conc_act": pl.Float64, "conc_w_combined": pl.Float64}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerTargets:
    """What is scored at one layer: activation difference (cumulative, block-local, without the clean PCA) and weights.

    largest, without_largest: the LARGEST coordinates that hold most of the activation difference, and it without them;
    largest_share: what they hold. more: the cumulative difference otherwise: `act_varying` (rows minus their mean), and
    where the protocol reads the claim's tokens `act_claim`, `act_claim_varying`."""

    act: sc.Target
    block: sc.Target
    beyond_clean: sc.Target
    weights: dict[str, sc.Target | None]
    dw_left: Float[Tensor, "d r"]
    more: dict[str, sc.Target]
    largest: Basis
    largest_share: float
    without_largest: sc.Target


Targets = list[LayerTargets]
# by layer: of R_act, and of R_w where both writers are there
PlainTargets = dict[int, tuple[sc.Target, sc.Target | None]]
Bases = dict[str, list[Basis]]  # by candidate, one per layer


def layer_targets(ceiling: CeilingMaterials, clean: list[Basis]) -> Targets:
    """Targets of every layer. `clean` are the bases of layer_clean_resid_pca. Missing weight tensors are logged once."""
    targets, missing = [], []
    for l in range(ceiling.n_layers):
        weights = ceiling.of_w("weight targets", l, sc.weight_targets)
        if (weights["oproj"] is None) != (weights["downproj"] is None):
            missing.append(f"layer {l}: {'o_proj' if weights['oproj'] is None else 'down_proj'}")
        dw, steered = ceiling.dw_left(l).B, ceiling.steered
        X, block = steered.eval[l], sc.activation_target(steered.eval_block[l])
        more = {"act_varying": sc.activation_target(X - X.mean(dim=0))}
        if steered.claim is not None:
            Y = steered.claim[l]
            more |= {"act_claim": sc.activation_target(Y), "act_claim_varying": sc.activation_target(Y - Y.mean(dim=0))}
        act = sc.activation_target(X)
        largest, share = sc.largest_coordinates(act, LARGEST)
        beyond, rest = sc.without(X, clean[l]), sc.without(X, largest)
        targets.append(LayerTargets(act, block, beyond, weights, dw, more, largest, share, rest))
    if missing:
        where = "; ".join(missing)
        log.warning("the weight diff lacks one of the two residual writers at %s: scores there are NaN", where)
    return targets


def plain_targets(ceiling: CeilingMaterials, layers: Iterable[int]) -> PlainTargets:
    """What R_act and R_w are scored on, at some layers."""
    weights = {l: ceiling.of_w("weight targets", l, sc.weight_targets) for l in layers}
    return {l: (sc.activation_target(ceiling.steered.eval[l]), w["combined"]) for l, w in weights.items()}


def lora_layers(w: WeightDiff, n_layers: int, given: list[int] | None = None) -> list[int]:
    """Layers the summary averages over: those w touches, unless given. ValueError where there are none, where the model
    lacks one, or where w touches none of those given."""
    layers = sorted(set(given)) if given else w.layers()
    if not layers:
        raise ValueError("the weight diff names no layer; give LORA_LAYERS")
    beyond = [l for l in layers if not 0 <= l < n_layers]
    if beyond:
        raise ValueError(f"LORA_LAYERS: the model has layers 0 to {n_layers - 1}, asked for were {beyond}")
    if w.layers() and not set(layers) & set(w.layers()):
        raise ValueError(f"LORA_LAYERS {layers}: the weight diff touches none of them, but {w.layers()}")
    return layers


def _keys(l: int, c: Candidate, *facts: str) -> dict:
    return {"layer": l, "subspace": c.name} | {fact: getattr(c, fact) for fact in facts}


def _columns(s: sc.Score, target: str, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}{name}_{target}": value for name, value in vars(s).items()}


def _row(l: int, t: LayerTargets, c: Candidate, basis: Basis, f: dict[str, float]) -> dict:
    """A row; f: what the basis holds of every target, and of its span."""
    B = basis.B
    row = _keys(l, c, "family", "axis_kind", "source", "kind") | {"rank": basis.rank}
    row |= _columns(sc.score(t.act, B, sc.ZERO, f["act"]), "act")
    for name in WEIGHTS:
        row |= _columns(sc.score(t.weights[name], B, f=f.get(name)), f"w_{name}")
    row |= {"cos_with_dW": principal_cos(B, t.dw_left), **_columns(sc.score(t.block, B, sc.ZERO, f["block"]), "block")}
    for name, of in (("act", t.act), ("block", t.block)):
        row[f"pct_oracle_{name}"] = sc.oracle_fraction(of, B, True, f[name])
    for name in WEIGHTS:
        row[f"pct_oracle_{name}"] = sc.oracle_fraction(t.weights[name], B, f=f.get(name))
        row[f"span_score_{name}"] = sc.span_score(t.weights[name], B, f.get(name), f.get(f"span of {name}"))
    row |= {f"conc_{name}": sc.score(target, B, sc.ZERO, f[name]).conc for name, target in t.more.items()}
    row["conc_act_without_largest"] = sc.specific(t.without_largest, basis, t.largest)[0].conc
    row["largest_share_act"] = t.largest_share
    return row | {"gap": basis.gap, "ill_conditioned": basis.ill_conditioned, "note": basis.note, "sees": c.race}


def per_layer(candidates: list[Candidate], bases: Bases, targets: Targets) -> pl.DataFrame:
    """One row per layer and candidate: the columns of docs/method.md section 6, then block, oracle, span, gap columns."""
    rows = []
    for l, t in enumerate(targets):
        here = [bases[c.name][l] for c in candidates]
        weights = {name: w for name, w in t.weights.items() if w and w.trace > 0}
        spans = {f"span of {name}": span for name, w in weights.items() if (span := w.span)}
        known = {"act": t.act, "block": t.block, **t.more, **weights, **spans}
        held = {name: sc.shares(here, target) for name, target in known.items()}
        for i, (c, basis) in enumerate(zip(candidates, here, strict=True)):
            rows.append(_row(l, t, c, basis, {name: values[i] for name, values in held.items()}))
    return pl.DataFrame(rows, infer_schema_length=None)


def null_rows(candidates: list[Candidate], bases: Bases, nulls: Sequence[PlainTargets]) -> pl.DataFrame:
    """`v7_null_diffs.csv`: every candidate's scores on the targets of each null diff: null (from 0), layer, subspace,
    conc_act, conc_w_combined."""
    rows = []
    for number, (l, (act, w)) in ((i, one) for i, targets in enumerate(nulls) for one in targets.items()):
        here = [bases[c.name][l] for c in candidates]
        held = [sc.shares(here, act), sc.shares(here, w) if w else [None] * len(here)]
        for c, basis, f, f_w in zip(candidates, here, *held, strict=True):
            scores = sc.score(act, basis, sc.ZERO, f), sc.score(w, basis, f=f_w)
            rows.append((number, l, c.name, *(one.conc for one in scores)))
    return pl.DataFrame(rows, NULL_ROWS, orient="row")


def with_null_diff(table: pl.DataFrame, nulls: pl.DataFrame) -> pl.DataFrame:
    """The table with every candidate's geometric mean over null diffs (`null_rows`) and the ratios to it (section 7). A
    ratio is NaN where a null score is 0 or undefined."""

    def mean(value: str) -> pl.Expr:
        return pl.col(value).log().mean().exp().alias(f"{value}_null")

    def ratio(value: str) -> pl.Expr:
        null = pl.col(f"{value}_null")
        return pl.when(null > 0).then(pl.col(value) / null).otherwise(sc.NAN)

    means = nulls.group_by("layer", "subspace", maintain_order=True).agg(mean("conc_act"), mean("conc_w_combined"))
    joined = table.join(means, on=["layer", "subspace"], how="left", maintain_order="left")
    return joined.with_columns(R_act_vs_null_diff=ratio("conc_act"), R_w_vs_null_diff=ratio("conc_w_combined"))


def specific_per_layer(candidates: list[Candidate], bases: Bases, targets: Targets) -> pl.DataFrame:
    """What each candidate explains beyond the clean states' own top directions, per layer. (section 6, specificity)"""
    rows = []
    for l, c in product(range(len(targets)), candidates):
        basis = bases[c.name][l]
        s, rank = sc.specific(targets[l].beyond_clean, basis, bases[CLEAN][l])
        row = _keys(l, c, "family", "source", "kind") | _columns(s, "act", "specific_") | {"specific_rank": rank}
        rows.append(row | {"gap": basis.gap, "ill_conditioned": basis.ill_conditioned, "sees": c.race})
    return pl.DataFrame(rows, infer_schema_length=None)


def kept_tensors(
    candidates: list[Candidate], bases: Bases, targets: Targets, k: int, layers: Sequence[int]
) -> dict[str, Tensor]:
    """What statistics over seeds start from.

    `act_topics (C, L, n)` float64: R_act of every EVAL row by itself. Per layer l: `act_oracle/<l>`, `weight_oracle/<l>`:
    top-k oracles `(d, <= k)`; `act_factor/<l> (d, n)` and `weight_factor/<l>/{oproj,downproj} (d, r)`: scaled factors. At
    the summary's `layers`: `beyond_factor/<l> (d, n)`, of the differences without the clean PCA, `clean/<l> (d, c)`, and
    `basis/<name>/<l> (d, r)` of every candidate built without w.
    """
    rows = [torch.stack([sc.topic_terms(t.act, bases[c.name][l].B) for l, t in enumerate(targets)]) for c in candidates]
    tensors = {"act_topics": torch.stack(rows)}
    for l, t in enumerate(targets):
        both = t.weights["combined"]
        tensors |= {f"act_factor/{l}": t.act.F, f"act_oracle/{l}": sc.oracle_basis(t.act, k)}
        tensors[f"weight_oracle/{l}"] = sc.oracle_basis(both, k) if both else torch.zeros(len(t.dw_left), 0)
        known = {name: t.weights[name] for name in ("oproj", "downproj") if t.weights[name]}
        tensors |= {f"weight_factor/{l}/{name}": target.F for name, target in known.items()}
    for l in layers:
        tensors |= {f"beyond_factor/{l}": targets[l].beyond_clean.F, f"clean/{l}": bases[CLEAN][l].B}
        tensors |= {f"basis/{c.name}/{l}": bases[c.name][l].B for c in candidates if c.kind != "ceiling"}
    return {name: x.contiguous().clone() for name, x in tensors.items()}


def bases_hash(rows: Sequence[Basis]) -> str:
    """SHA-256 over the bytes and shapes of one candidate's bases."""
    digest = hashlib.sha256()
    for basis in rows:
        digest.update(repr(tuple(basis.B.shape)).encode())
        digest.update(basis.B.contiguous().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def self_checks(table: pl.DataFrame, layers: list[int]) -> dict[str, float]:
    """The run's own assertions, with their values: AssertionError (naming the check) where one fails. ceiling_r_w: mean R_w of
    dW_left_basis_ceiling over `layers`, must exceed 1. combined_minus_mean: largest |R_combined - (R_o + R_down)/2|."""
    ceiling = table.filter((pl.col("subspace") == "dW_left_basis_ceiling") & pl.col("layer").is_in(layers))
    r_w = ceiling["conc_w_combined"].drop_nans().mean()
    o, down, both = table.select(f"conc_w_{n}" for n in ("oproj", "downproj", "combined")).drop_nans().get_columns()
    off = (both - (o + down) / 2).abs().max()
    if r_w is not None and not r_w > 1:
        raise AssertionError(f"the weight ceiling explains no more than chance: R_w = {r_w:.3f}")
    if off is not None and not off < 1e-6 * max(1.0, both.max()):
        raise AssertionError(f"R_combined differs from the mean of its parts by {off:.2g}")
    return {"ceiling_r_w": sc.NAN if r_w is None else r_w, "combined_minus_mean": sc.NAN if off is None else off}


def null_check(targets: dict[int, dict[str, sc.Target | None]], r: int, draws: int, seed: int = 0) -> pl.DataFrame:
    """The closed-form null beside a Monte-Carlo one: mean (expected 1) and sd of R over `draws` random subspaces. sd_ratio:
    drawn over closed form, whose own sampling error is about 1/sqrt(2 draws), more where the null is skewed."""

    def row(one: tuple[int, str, sc.Target]) -> tuple:
        l, name, t = one
        values = sc.monte_carlo_null(t, r, draws, f"layer {l}/{name}", seed)
        return l, name, float(values.mean()), float(values.std()), sc.null_sd(t, r)

    every = [
        (l, name, t) for l, by_name in targets.items() for name, t in by_name.items() if t is not None and t.trace > 0
    ]
    with side_by_side() as each:
        rows = list(each(row, every))
    table = pl.DataFrame(rows, ["layer", "target", "mc_mean", "mc_sd", "closed_sd"], orient="row")
    return table.with_columns(sd_ratio=pl.col("mc_sd") / pl.col("closed_sd"))


def null_summary(null: pl.DataFrame) -> pl.DataFrame:
    """Per target, over layers: mean of the drawn means (expected 1) and of the ratio of drawn to closed-form sd."""
    ratio = pl.col("sd_ratio")
    return null.group_by("target", maintain_order=True).agg(
        pl.col("mc_mean").mean().alias("mean of R (expected 1)"),
        ratio.mean().alias("drawn sd / closed form"),
        ratio.min().alias("least over layers"),
        ratio.max().alias("most over layers"),
    )


def largest_deviation(bases: Bases) -> float:
    """`max |B^T B - I|` over all bases: the orthonormality check's value."""
    return max((skew(b.B) for rows in bases.values() for b in rows), default=0.0)
