"""The behaviour score under every wording of the probe: does w steer whatever the words, and are answers given in them at all?
(docs/method.md section 2)
"""

import polars as pl

from ws.data import Behavior
from ws.diff import WeightDiff
from ws.model.lm import LM
from ws.show.bars import tqdm
from ws.steer.evaluate import probe_answers
from ws.steer.statements import MIN_PMASS
from ws.steer.weights import weight_steer


def wording_sweep(
    lm: LM, behavior: Behavior, w: WeightDiff, alphas: list[float], progress: bool = True
) -> pl.DataFrame:
    """The held-out false claims under every wording of the probe. Per wording (0: the sweep's own) and alpha: mean_logratio
    (nats), mean_pmass, n, and `low_pmass` where it is under 0.5. No rows for a behaviour of one wording or of statements."""
    claims, rows = behavior.heldout_claims, []
    asked = range(0 if behavior.answers or len(behavior.templates) < 2 else len(behavior.templates))
    for alpha in tqdm(alphas, "wordings", disable=not progress or not asked):
        with weight_steer(lm.model, w, alpha):
            answers = [probe_answers(lm, behavior, claims, template=a) for a in asked]
        rows += [
            (a, alpha, float(x.logratio.mean()), float(x.pmass.mean()), len(claims)) for a, x in enumerate(answers)
        ]
    kinds = {"wording": int, "alpha": float, "mean_logratio": float, "mean_pmass": float, "n": int}
    table = pl.DataFrame(rows, orient="row", schema=kinds).sort("wording", "alpha")
    return table.with_columns(low_pmass=pl.col("mean_pmass") < MIN_PMASS)


def wording_text(behavior: Behavior, table: pl.DataFrame) -> str:
    """What `wording_sweep` shows, in words: every wording's spread, and under which the answer words keep their probability at
    every alpha. "" without rows."""
    if not len(table):
        return ""
    ends = table.group_by("wording", maintain_order=True).agg(
        spread=pl.col("mean_logratio").last() - pl.col("mean_logratio").first(), least=pl.col("mean_pmass").min()
    )
    said = ", ".join(f"{spread:+.2f} nats (least pmass {least:.2f})" for _, spread, least in ends.rows())
    kept = ends.filter(pl.col("least") >= MIN_PMASS)["wording"].to_list()
    words = "; ".join(f'"{behavior.templates[a].strip()}"' for a in kept)
    where = f"pmass is at least {MIN_PMASS} at every alpha under: {words}" if kept else "under none is pmass kept"
    return f" Between the extreme alphas the {len(ends)} wordings of the probe move by {said}; {where}."
