"""Rows -> polars -> summaries -> files and text. (docs/method.md section 6) Summaries are means over the LoRA layers.
`joint_score = sqrt(mean_conc_act mean_conc_w_combined)`. A layer where w lacks a tensor counts for no candidate; a
candidate that is empty at a layer is NaN there, stays NaN in the mean, sorts last."""

import polars as pl

from ws.show.tables import sort_nan_last
from ws.steer.effect import null_end, null_mean

KEYS = ["subspace", "family", "axis_kind", "source", "kind"]
WEIGHTS = ("oproj", "downproj", "combined")
MAIN = ["conc_act", "z_act", "energy_frac_act"] + [f"{c}_w_{t}" for c in ("conc", "z") for t in WEIGHTS]
EXTRA = "conc_block energy_frac_block pct_oracle_act pct_oracle_block conc_act_null conc_w_combined_null".split()
EXTRA += "conc_act_varying conc_act_claim conc_act_claim_varying conc_act_without_largest largest_share_act".split()
EXTRA += [f"{c}_{t}" for t in WEIGHTS for c in ("pct_oracle", "span_score")]
SPECIFIC = ["specific_conc_act", "specific_z_act", "specific_energy_frac_act", "specific_rank"]
DOUBTS = [pl.col("gap").min().alias("min_gap"), pl.col("ill_conditioned").any()]


def _last(part: pl.DataFrame) -> list[pl.Expr]:
    """What stands behind the means: doubts, and what a candidate sees where the table says it."""
    return [*DOUBTS, *[pl.col("sees").first()] * ("sees" in part.columns)]


def _mean(column: str, missing: dict[str, list[int]], alias: str | None = None) -> pl.Expr:
    """Mean over the layers where the column's weight target exists."""
    target = "any" if column == "cos_with_dW" else next((t for t in WEIGHTS if column.endswith(f"_{t}")), None)
    value = pl.col(column)
    if target:
        value = value.filter(~pl.col("layer").is_in(missing[target]))
    return value.mean().fill_null(float("nan")).alias(alias or f"mean_{column}")


def missing_layers(table: pl.DataFrame) -> dict[str, list[int]]:
    """Layers at which a weight target does not exist (no candidate has a score), by target; `any`: neither exists."""
    gone = table.group_by("layer").agg(pl.col(f"energy_frac_w_{t}").is_nan().all().alias(t) for t in WEIGHTS)
    gone = gone.sort("layer").with_columns(any=pl.col("oproj") & pl.col("downproj"))
    return {t: gone.filter(t)["layer"].to_list() for t in (*WEIGHTS, "any")}


def summarise(table: pl.DataFrame, layers: list[int]) -> pl.DataFrame:
    """`v7_summary.tsv`: one row per candidate, sorted by joint_score (an undefined one last). Raises ValueError when
    none of `layers` is in the table."""
    part = table.filter(pl.col("layer").is_in(layers))
    if part.is_empty():
        raise ValueError(f"LORA_LAYERS {layers} are not among the model's layers 0..{table['layer'].max()}")
    missing = missing_layers(part)
    act, w = _mean("conc_act", missing), _mean("conc_w_combined", missing)
    means = [_mean(c, missing) for c in MAIN]
    means += [_mean("cos_with_dW", missing, "mean_cos_dW"), pl.col("rank").mean().alias("mean_rank")]
    means += [(act * w).sqrt().alias("joint_score"), (act.log(2) - w.log(2)).alias("act_w_gap_log2")]
    means += [_mean(c, missing) for c in EXTRA if c in part.columns]
    if "pct_oracle_act" in part.columns:
        honest = (_mean("pct_oracle_act", missing) * _mean("pct_oracle_combined", missing)).sqrt()
        means += [honest.alias("honest_joint")]
    return sort_nan_last(part.group_by(KEYS, maintain_order=True).agg([*means, *_last(part)]), "joint_score")


def null_summary(nulls: pl.DataFrame, layers: list[int]) -> pl.DataFrame:
    """Per null diff and candidate, means over the layers: null, subspace, R_act, R_w. nulls: `ws.explanation.rows.null_rows`."""
    part = nulls.filter(pl.col("layer").is_in(layers))
    gone = part.group_by("null", "layer").agg(pl.col("conc_w_combined").is_nan().all().alias("gone"))
    part = part.join(gone, on=["null", "layer"], maintain_order="left")
    w = pl.col("conc_w_combined").filter(~pl.col("gone")).mean().fill_null(float("nan"))
    return part.group_by("null", "subspace", maintain_order=True).agg(R_act=pl.col("conc_act").mean(), R_w=w)


def against_nulls(summary: pl.DataFrame, nulls: pl.DataFrame, d: int) -> pl.DataFrame:
    """The summary beside its null diffs (`null_summary`): R_X_null, their geometric mean, R_X_null_hi, the upper end of the
    prediction interval of one more (`ws.steer.effect.null_end`), R_X_vs_null_diff, the ratio to the mean (NaN where that is
    0). d: width of the model."""
    known = summary.select("subspace", "mean_rank")
    for name, column in (("R_act", "mean_conc_act"), ("R_w", "mean_conc_w_combined")):
        scores = known.join(nulls.pivot("null", index="subspace", values=name), on="subspace", maintain_order="left")
        values = scores.drop("subspace", "mean_rank").to_numpy().T
        found = {
            f"{name}_null": null_mean(values),
            f"{name}_null_hi": null_end(values, scores["mean_rank"].to_numpy(), d),
        }
        summary = summary.with_columns(**found)
        summary = summary.with_columns((pl.col(column) / pl.col(f"{name}_null")).alias(f"{name}_vs_null_diff"))
    return summary


def with_percentages(summary: pl.DataFrame) -> pl.DataFrame:
    """`v7_summary_pct.tsv`: percent of the activation ceiling and of the weight ceiling, target by target."""

    def of(name: str, column: str) -> float:
        values = summary.filter(pl.col("subspace") == name)[column]
        return float(values[0]) if len(values) else float("nan")

    columns = {"pct_act_ceiling": 100 * pl.col("mean_conc_act") / of("TaskDiff_lora_ceiling", "mean_conc_act")}
    for t in ("combined", "oproj", "downproj"):
        ceiling = of("dW_left_basis_ceiling", f"mean_conc_w_{t}")
        columns[f"pct_w_oracle_{t}"] = 100 * pl.col(f"mean_conc_w_{t}") / ceiling
    return summary.with_columns(**columns)


def summarise_specific(table: pl.DataFrame, layers: list[int]) -> pl.DataFrame:
    """`v7_specific_summary.tsv`: means over the layers, sorted by mean_specific_conc_act, highest first."""
    part = table.filter(pl.col("layer").is_in(layers))
    by_name = part.group_by("subspace", "family", "source", "kind", maintain_order=True)
    means = by_name.agg(pl.col(SPECIFIC).mean().name.prefix("mean_"), *_last(part))
    return sort_nan_last(means, "mean_specific_conc_act")


def folded(table: pl.DataFrame, name: str = "subspace") -> pl.DataFrame:
    """The table with the shuffles of one control (`grad_null_1`, ...) as one row, their mean; NaN where one is undefined."""
    whole = pl.coalesce(pl.col(name).str.extract(r"^(grad_null)_\d+$"), pl.col(name))
    numbers = [column for column, kind in table.schema.items() if kind.is_numeric()]
    parts = [
        pl.col(column).mean() if column in numbers else pl.col(column).first()
        for column in table.columns
        if column != name
    ]
    return table.group_by(whole, maintain_order=True).agg(parts).select(table.columns)
