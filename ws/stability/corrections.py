"""What each correction of the sound protocol moves, one at a time, on the same seeds. Corrections of capture change a
parameter: v7 is run again with one of them, then with all. Corrections of a basis add a candidate beside the one it
mends: both are scored in the same run. (docs/method.md section 7)"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from scipy.stats import spearmanr

from ws.data import Behavior
from ws.diff import WeightDiff
from ws.explanation.explain import plain_scores
from ws.model.lm import LM
from ws.show.bars import tqdm
from ws.subspaces.protocol import V7, Protocol, load_protocol

MOVED = "variant spearman_joint median_abs_log2_act max_abs_log2_act moved_most log2_change top5_kept".split()
CAPTURE = ("eval_split", "chat_probes", "persona_pairs", "raw_last", "fold_gain", "templates")
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
    changed = {name: getattr(sound, name) for name in CAPTURE if getattr(sound, name) != getattr(v7, name)}
    single = {f"v7 + {name.upper()}": replace(v7, **{name: value}) for name, value in changed.items()}
    return {"v7": v7, **single, "all of them": replace(sound, sources=V7)}


def capture_corrections(
    lm: LM, behavior: Behavior, diffs: dict[int, WeightDiff], cache: Path | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Every variant on the same seeds (seed -> w): a summary row per variant, and the scores behind it. spearman_joint:
    order of the A-hypotheses by mean log joint score against v7's. *_abs_log2_act, log2_change: change of R_act, the
    latter of the candidate moved_most."""
    tables = {}
    for name, protocol in tqdm(variants().items(), "corrections of capture"):
        tables[name] = plain_scores(lm, list(diffs.values()), behavior, protocol, cache).select(
            pl.col("w").replace_strict(dict(enumerate(diffs))).alias("seed"), pl.exclude("w")
        )
    logs = {name: _mean_logs(table) for name, table in tables.items()}
    rows = []
    for name, mean in logs.items():
        both = logs["v7"].join(mean, on="subspace", suffix="_new").drop_nans()
        shift = (both["log2_act_new"] - both["log2_act"]).to_numpy()
        most = int(np.abs(shift).argmax())
        joint = ("log_joint", "log_joint_new")
        top = [set(both.sort(column, descending=True)["subspace"][:5]) for column in joint]
        rho = float(spearmanr(*(both[column].to_numpy() for column in joint)).statistic)
        sizes = float(np.median(np.abs(shift))), float(np.abs(shift).max())
        moved = both["subspace"][most] if shift[most] else "none"
        rows.append((name, rho, *sizes, moved, float(shift[most]), len(top[0] & top[1])))
    scores = pl.concat([t.with_columns(pl.lit(name).alias("variant")) for name, t in tables.items()])
    return pl.DataFrame(rows, MOVED, orient="row"), scores


def _mean_logs(table: pl.DataFrame) -> pl.DataFrame:
    """Mean over seeds of log joint and log2 R_act of the A-hypotheses; NaN where a score is 0 or undefined."""
    part = table.filter(pl.col("kind") == "A-hypothesis")
    joint, act = (pl.when(pl.col(c) > 0).then(pl.col(c)).otherwise(float("nan")) for c in ("joint_score", "R_act"))
    logs = part.select("subspace", log_joint=joint.log(), log2_act=act.log(2.0))
    return logs.group_by("subspace", maintain_order=True).mean()


def basis_corrections(per_seed: pl.DataFrame) -> pl.DataFrame:
    """Each v7 candidate beside the form that mends it, in the same v7b runs. per_seed: `ws.stability.scores.per_seed_table`. For
    R_act and R_w: geometric means over seeds and the log2 ratio (v7b over v7)."""

    def mean(name: str, column: str) -> float:
        values = per_seed.filter(pl.col("candidate") == name)[column].to_numpy()
        with np.errstate(divide="ignore"):
            return float(np.exp(np.log(values).mean())) if len(values) else float("nan")

    rows = []
    for old, new in MENDED.items():
        row = {"v7": old, "v7b": new}
        for column in ("R_act", "R_w"):
            before, after = mean(old, column), mean(new, column)
            change = float(np.log2(after / before)) if before > 0 and after > 0 else float("nan")
            row |= {f"{column}_v7": before, f"{column}_v7b": after, f"{column}_log2_change": change}
        rows.append(row)
    return pl.DataFrame(rows)
