"""Against null diffs: is a score more than what training on shuffled labels gives? (docs/method.md section 7)

A score is above the null diffs' spread where its geometric mean over seeds exceeds the upper end of the prediction interval
of one more null diff (`ws.steer.effect.null_end`, in the logit of the share of energy).
"""

import numpy as np
import polars as pl

from ws.stability.scores import SeedScores, log_values
from ws.steer.effect import null_end


def null_table(scores: SeedScores) -> pl.DataFrame:
    """Per candidate and score X of R_act, R_w: X_null_hi, the upper end in units of R, and X_above_null, whether the
    geometric mean over seeds lies above it."""
    logs, columns = log_values(scores), {"candidate": scores.candidates}
    for name, null in scores.nulls.items():
        end = null_end(null, scores.ranks.mean(axis=1), scores.d)
        with np.errstate(invalid="ignore"):
            columns |= {f"{name}_null_hi": end, f"{name}_above_null": np.exp(logs[name].mean(axis=0)) > end}
    return pl.DataFrame(columns)


def null_counts(scores: SeedScores) -> pl.DataFrame:
    """Per score: nulls (J), candidates (A-hypotheses), above (how many lie above the null diffs' spread), and what each
    null diff scores when it is held against the others: above_mean, above_most."""
    table, rows, ranks = null_table(scores), [], scores.ranks.mean(axis=1)
    for name, null in scores.nulls.items():
        known = np.isfinite(log_values(scores)[name].mean(axis=0)) & np.isfinite(null).all(axis=0)
        use, J = scores.ranked & known, len(null)
        apart = []
        for j in range(J if J > 2 else 0):
            end = null_end(np.delete(null, j, axis=0)[:, use], ranks[use], scores.d)
            apart.append(int((null[j, use] > end).sum()))
        chance = (float(np.mean(apart)), float(max(apart))) if apart else (float("nan"), float("nan"))
        rows.append((name, J, int(use.sum()), int(table[f"{name}_above_null"].to_numpy()[use].sum()), *chance))
    return pl.DataFrame(rows, ["score", "nulls", "candidates", "above", "above_mean", "above_most"], orient="row")
