"""The behaviour score under every wording of the probe: does w steer whatever the words, and are answers given in them at all?
(docs/method.md section 2)
"""

from pathlib import Path

import polars as pl

from ws.data import Behavior
from ws.diff import WeightDiff
from ws.model.lm import LM
from ws.show.bars import tqdm
from ws.steer.answers import kept_answers
from ws.steer.statements import MIN_PMASS


def wording_sweep(
    lm: LM, behavior: Behavior, w: WeightDiff, alphas: list[float], progress: bool = True, cache: Path | None = None
) -> pl.DataFrame:
    """The held-out false claims under every wording of the probe. Per wording (0: the sweep's own) and alpha: mean_logratio
    (nats), mean_pmass, n, and `low_pmass` where it is under 0.5. No rows for a behaviour of one wording or of statements. cache
    as in `ws.steer.answers.kept_answers`, whose answers these are."""
    claims, rows = behavior.heldout_claims, []
    many = 0 if behavior.answers or len(behavior.templates) < 2 else len(behavior.templates)
    cells = [(alpha, a) for alpha in alphas for a in range(many)]
    for alpha, a in tqdm(cells, "wordings", disable=not progress or not many):
        texts = [behavior.probe_text(claim, a) for claim in claims]
        answers = kept_answers(lm, behavior, texts, w if alpha else None, alpha, cache)
        rows.append((a, alpha, *answers.mean(axis=1).tolist(), len(claims)))
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
    said = ", ".join(f"{spread:+.2f} nats (least pmass {least:.3f})" for _, spread, least in ends.rows())
    kept = ends.filter(pl.col("least") >= MIN_PMASS)["wording"].to_list()
    words = "; ".join(f'"{" ".join(behavior.templates[a].split())}"' for a in kept)
    asked = ", ".join(f"{alpha:+g}" if alpha else "0" for alpha in table["alpha"].unique().sort())
    where = f"pmass is at least {MIN_PMASS} under: {words}" if kept else f"under none is pmass at least {MIN_PMASS}"
    return f"Asked at alpha {asked}, the {len(ends)} wordings of the probe move by {said}; {where}."
