"""Against null diffs: is a score more than what training on shuffled labels gives? (docs/method.md section 7)

A score is above the null diffs' spread where its geometric mean over seeds exceeds the upper end of the prediction interval
of one more null diff (`ws.steer.effect.upper_end`, in log R).
"""

import numpy as np
import polars as pl
from jaxtyping import Float

from ws.stability.scores import SeedScores, log_values, null_mean
from ws.steer.effect import upper_end


def null_table(scores: SeedScores) -> pl.DataFrame:
    """Per candidate and score X of R_act, R_w: X_null_hi, the upper end in units of R, and X_above_null, whether the
    geometric mean over seeds lies above it."""
    logs, columns = log_values(scores), {"candidate": scores.candidates}
    for name, null in scores.nulls.items():
        end = upper_end(_logs(null))
        columns |= {f"{name}_null_hi": np.exp(end), f"{name}_above_null": logs[name].mean(axis=0) > end}
    return pl.DataFrame(columns)


def null_counts(scores: SeedScores) -> pl.DataFrame:
    """Per score: nulls (J), candidates (A-hypotheses), above (how many lie above the null diffs' spread), and what each
    null diff scores when it is held against the others: above_mean, above_most."""
    table, rows = null_table(scores), []
    for name, null in scores.nulls.items():
        use = scores.ranked & np.isfinite(log_values(scores)[name].mean(axis=0)) & np.isfinite(np.log(null_mean(null)))
        logs = _logs(null)[:, use]
        apart = (
            [(logs[j] > upper_end(np.delete(logs, j, axis=0))).sum() for j in range(len(logs))] if len(logs) > 2 else []
        )
        chance = (float(np.mean(apart)), float(max(apart))) if apart else (float("nan"), float("nan"))
        rows.append((name, len(null), int(use.sum()), int(table[f"{name}_above_null"].to_numpy()[use].sum()), *chance))
    return pl.DataFrame(rows, ["score", "nulls", "candidates", "above", "above_mean", "above_most"], orient="row")


def _logs(null: Float[np.ndarray, "J C"]) -> Float[np.ndarray, "J C"]:
    with np.errstate(divide="ignore"):
        return np.log(null)
