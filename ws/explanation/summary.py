"""Rows -> polars -> summaries -> files and text. (docs/method.md section 6)

Summaries are means over the LoRA layers. `joint_score = sqrt(mean_conc_act mean_conc_w_combined)`. A layer where w lacks
a tensor counts for no candidate; a candidate that is empty at a layer is NaN there, stays NaN in the mean, sorts last.
"""

import polars as pl

from ws.show.tables import sort_nan_last

KEYS = ["subspace", "family", "axis_kind", "source", "kind"]
WEIGHTS = ("oproj", "downproj", "combined")
EXTRA = [
    "conc_block",
    "energy_frac_block",
    "pct_oracle_act",
    "pct_oracle_block",
    "conc_act_null",
    "conc_w_combined_null",
] + [f"{c}_{t}" for t in WEIGHTS for c in ("pct_oracle", "span_score")]


def _mean(column: str, missing: dict[str, list[int]], alias: str | None = None) -> pl.Expr:
    """Mean over the layers where the column's weight target exists."""
    target = next((t for t in WEIGHTS if column.endswith(f"_{t}")), None)
    value = pl.col(column)
    if column == "cos_with_dW":
        target = "any"
    if target:
        value = value.filter(~pl.col("layer").is_in(missing[target]))
    return value.mean().fill_null(float("nan")).alias(alias or f"mean_{column}")


def missing_layers(table: pl.DataFrame) -> dict[str, list[int]]:
    """Layers at which a weight target does not exist (no candidate has a score), by target; `any`: neither exists."""
    out = {}
    for t in WEIGHTS:
        column = pl.col(f"energy_frac_w_{t}").is_nan().all()
        out[t] = table.group_by("layer").agg(column.alias("x")).filter("x")["layer"].sort().to_list()
    out["any"] = [l for l in out["oproj"] if l in out["downproj"]]
    return out


def summarise(table: pl.DataFrame, layers: list[int]) -> pl.DataFrame:
    """`v7_summary.tsv`: one row per candidate, sorted by joint_score (an undefined one last).

    Raises ValueError when none of `layers` is in the table.
    """
    part = table.filter(pl.col("layer").is_in(layers))
    if part.is_empty():
        raise ValueError(f"LORA_LAYERS {layers} are not among the model's layers 0..{table['layer'].max()}")
    missing = missing_layers(part)
    aggregates = [_mean(c, missing) for c in ("conc_act", "z_act", "energy_frac_act")]
    aggregates += [_mean(f"conc_w_{t}", missing) for t in WEIGHTS]
    aggregates += [_mean(f"z_w_{t}", missing) for t in WEIGHTS]
    aggregates += [_mean("cos_with_dW", missing, "mean_cos_dW"), pl.col("rank").mean().alias("mean_rank")]
    extra = [_mean(c, missing) for c in EXTRA if c in table.columns]
    doubts = [pl.col("gap").min().alias("min_gap"), pl.col("ill_conditioned").any()]
    summary = part.group_by(KEYS, maintain_order=True).agg(aggregates + extra + doubts)
    act, w = pl.col("mean_conc_act"), pl.col("mean_conc_w_combined")
    summary = summary.with_columns(joint_score=(act * w).sqrt(), act_w_gap_log2=act.log(2) - w.log(2))
    ratios = {}
    if "mean_conc_act_null" in summary.columns:
        ratios = {
            "R_act_vs_null_diff": act / pl.col("mean_conc_act_null"),
            "R_w_vs_null_diff": w / pl.col("mean_conc_w_combined_null"),
        }
    summary = summary.with_columns(**ratios)
    head = [c for c in summary.columns if c.startswith("mean_") and c.removeprefix("mean_") not in EXTRA]
    tail = [c for c in summary.columns if c.removeprefix("mean_") in EXTRA] + [*ratios, "min_gap", "ill_conditioned"]
    summary = summary.select(KEYS + head + ["joint_score", "act_w_gap_log2"] + tail)
    return sort_nan_last(summary, "joint_score")


def with_percentages(summary: pl.DataFrame) -> pl.DataFrame:
    """`v7_summary_pct.tsv`: percent of the activation ceiling and of the weight ceiling, target by target."""

    def of(name: str, column: str) -> float:
        values = summary.filter(pl.col("subspace") == name)[column]
        return float(values[0]) if len(values) else float("nan")

    columns = {
        "pct_act_ceiling": 100 * pl.col("mean_conc_act") / of("TaskDiff_lora_ceiling", "mean_conc_act"),
    }
    for t in ("combined", "oproj", "downproj"):
        ceiling = of("dW_left_basis_ceiling", f"mean_conc_w_{t}")
        columns[f"pct_w_oracle_{t}"] = 100 * pl.col(f"mean_conc_w_{t}") / ceiling
    return summary.with_columns(**columns)


def summarise_specific(table: pl.DataFrame, layers: list[int]) -> pl.DataFrame:
    """`v7_specific_summary.tsv`: means over the layers, sorted by mean_specific_conc_act, highest first."""
    names = ["specific_conc_act", "specific_z_act", "specific_energy_frac_act", "specific_rank"]
    part = table.filter(pl.col("layer").is_in(layers))
    keys = ["subspace", "family", "source", "kind"]
    doubts = [pl.col("gap").min().alias("min_gap"), pl.col("ill_conditioned").any()]
    aggregates = [pl.col(c).mean().alias(f"mean_{c}") for c in names]
    means = part.group_by(keys, maintain_order=True).agg(aggregates + doubts)
    return sort_nan_last(means, "mean_specific_conc_act")
