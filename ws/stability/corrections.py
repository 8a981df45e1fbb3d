"""What each correction of the sound protocol moves, one at a time, on the same seeds.

Corrections of capture change a parameter: v7 is run again with one of them, then with all. Corrections of a basis add a
candidate beside the one it mends: both are scored in the same run. (docs/method.md section 7)
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from scipy.stats import spearmanr
from tqdm import tqdm

from ws.data import Behavior
from ws.diff import WeightDiff
from ws.explanation.explain import explain
from ws.model.lm import LM
from ws.subspaces.protocol import V7, Protocol, load_protocol

CAPTURE = ("eval_split", "chat_probes", "persona_pairs", "raw_last", "fold_gain")
MENDED = {  # v7 candidate -> its v7b form
    "TaskDiff_contrast": "TaskDiff_uncentred",
    "up_proj_input_contrast": "up_proj_input_uncentred",
    "up_proj_output_written_contrast": "up_written_uncentred",
    "TaskDiff_lora_ceiling": "TaskDiff_lora_uncentred_ceiling",
    "attn_ov_write": "attn_ov_heads",
    "qk_circuit": "qk_heads",
    "attn_min_taskdiff": "attn_min_common",
    "attn_max_taskdiff": "attn_max_common",
    "attn_diff_taskdiff": "attn_diff_common",
    "chars_clusters": "chars_clusters_cut",
    "attention_sink": "attention_sink_cut",
    "rotation_contrast": "rotation_cut",
    "mlp_up_read": "mlp_up_read_gain",
    "attn_qkv_read": "attn_qkv_read_gain",
    "input_super": "input_super_gain",
}


def variants() -> dict[str, Protocol]:
    """v7; v7 with one correction of capture each; all of them together: name -> protocol, all with v7's candidates."""
    v7, sound = load_protocol("v7"), load_protocol("v7b")
    out = {"v7": v7}
    for name in CAPTURE:
        if getattr(v7, name) != getattr(sound, name):
            out[f"v7 + {name.upper()}"] = replace(v7, **{name: getattr(sound, name)})
    out["all of them"] = replace(sound, sources=V7)
    return out


def joint_scores(
    lm: LM, behavior: Behavior, diffs: dict[int, WeightDiff], protocol: Protocol, cache: Path | None = None
) -> pl.DataFrame:
    """R_act, R_w and joint score of every candidate and seed under one protocol: columns seed, subspace, ..."""
    columns = {"mean_conc_act": "R_act", "mean_conc_w_combined": "R_w", "joint_score": "joint_score"}
    return pl.concat(
        explain(lm, w, behavior, protocol=protocol, cache=cache, progress=False).plain_summary.select(
            pl.lit(seed).alias("seed"), "subspace", "kind", *(pl.col(old).alias(new) for old, new in columns.items())
        )
        for seed, w in diffs.items()
    )


def capture_corrections(
    lm: LM, behavior: Behavior, diffs: dict[int, WeightDiff], cache: Path | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Every variant on the same seeds: a summary row per variant, and the scores behind it.

    Summary columns: variant, spearman_joint (order of the A-hypotheses by mean log joint score against v7's),
    median_abs_log2_act and max_abs_log2_act (change of R_act), moved_most, log2_change, top5_kept.
    """
    tables = {
        name: joint_scores(lm, behavior, diffs, protocol, cache)
        for name, protocol in tqdm(variants().items(), "corrections of capture")
    }
    logs = {name: _mean_logs(table) for name, table in tables.items()}
    reference = logs["v7"]
    rows = []
    for name, mean in logs.items():
        both = reference.join(mean, on="subspace", suffix="_new").drop_nans()
        shift = (both["log2_act_new"] - both["log2_act"]).to_numpy()
        most = int(np.abs(shift).argmax())
        rho = spearmanr(both["log_joint"].to_numpy(), both["log_joint_new"].to_numpy()).statistic
        top = [set(part.sort(column, descending=True)["subspace"][:5]) for part, column in
               ((both, "log_joint"), (both, "log_joint_new"))]  # fmt: skip
        rows.append(
            {
                "variant": name,
                "spearman_joint": float(rho),
                "median_abs_log2_act": float(np.median(np.abs(shift))),
                "max_abs_log2_act": float(np.abs(shift).max()),
                "moved_most": both["subspace"][most] if name != "v7" else "",
                "log2_change": float(shift[most]),
                "top5_kept": len(top[0] & top[1]),
            }
        )
    scores = pl.concat([t.with_columns(pl.lit(name).alias("variant")) for name, t in tables.items()])
    return pl.DataFrame(rows), scores


def _mean_logs(table: pl.DataFrame) -> pl.DataFrame:
    """Mean over seeds of log joint and log2 R_act of the A-hypotheses; NaN where a score is 0 or undefined."""
    part = table.filter(pl.col("kind") == "A-hypothesis")
    logs = part.select(
        "subspace",
        pl.when(pl.col("joint_score") > 0).then(pl.col("joint_score").log()).otherwise(float("nan")).alias("log_joint"),
        pl.when(pl.col("R_act") > 0).then(pl.col("R_act").log(2)).otherwise(float("nan")).alias("log2_act"),
    )
    return logs.group_by("subspace", maintain_order=True).mean()


def basis_corrections(per_seed: pl.DataFrame) -> pl.DataFrame:
    """Each v7 candidate beside the form that mends it, in the same v7b runs.

    per_seed: `ws.stability.scores.per_seed_table`. Columns: v7, v7b, and for R_act and R_w the geometric means over seeds and
    the log2 ratio (v7b over v7).
    """
    rows = []
    for old, new in MENDED.items():
        row = {"v7": old, "v7b": new}
        for column in ("R_act", "R_w"):
            means = []
            for name in (old, new):
                values = per_seed.filter(pl.col("candidate") == name)[column].to_numpy().astype(float)
                with np.errstate(divide="ignore", invalid="ignore"):
                    means.append(float(np.exp(np.log(values).mean())) if len(values) else float("nan"))
            row |= {f"{column}_v7": means[0], f"{column}_v7b": means[1]}
            ratio = means[1] / means[0] if means[0] > 0 and means[1] > 0 else float("nan")
            row[f"{column}_log2_change"] = float(np.log2(ratio))
        rows.append(row)
    return pl.DataFrame(rows)
