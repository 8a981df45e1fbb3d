"""Which candidates keep their place when the behaviour changes? Ranks of the sweeps of several behaviours.

Per behaviour a candidate's score is the geometric mean over seeds of its rank-honest joint score. With m behaviours and n
candidates of all of them, Kendall's `W = 12 sum_c (R_c - mean R)^2 / (m^2 (n^3 - n))`, `R_c` the sum of a candidate's ranks: 1
where all orders are the same, 1/m expected of independent ones. (docs/method.md section 7)
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float
from scipy.stats import rankdata, spearmanr

from ws.explanation.result import Explanation
from ws.show.tables import literal

TOP = 5
PLACES = 3  # by which a candidate may move and keeps its place


def kendall_w(ranks: Float[np.ndarray, "m n"]) -> float:
    """Kendall's coefficient of concordance of m orders of n things; NaN for one order or one thing."""
    m, n = ranks.shape
    if m < 2 or n < 2:
        return float("nan")
    total = ranks.sum(axis=0)
    return float(12 * ((total - total.mean()) ** 2).sum() / (m**2 * (n**3 - n)))


def rank_table(sweeps: Mapping[str, Mapping[int, Path | Explanation]]) -> pl.DataFrame:
    """Candidates (write and mixed A-hypotheses that every sweep has) by mean rank over behaviours: `rank <behaviour>` each,
    mean_rank, moved (largest less smallest rank) and keeps (moved by at most PLACES). sweeps: behaviour -> seed -> finished
    sweep."""
    ranks: dict[str, dict[str, float]] = {}
    scores = {name: _scores(by_seed) for name, by_seed in sweeps.items()}
    common = [c for c in next(iter(scores.values()), {}) if all(c in found for found in scores.values())]
    for name, found in scores.items():
        order = rankdata([-found[c] for c in common])
        ranks[name] = dict(zip(common, order.tolist(), strict=True))
    rows = [{"candidate": c} | {f"rank {name}": ranks[name][c] for name in ranks} for c in common]
    table = pl.DataFrame(rows)
    if not rows:
        return table
    columns = [pl.col(f"rank {name}") for name in ranks]
    moved = pl.max_horizontal(columns) - pl.min_horizontal(columns)
    table = table.with_columns(mean_rank=pl.mean_horizontal(columns), moved=moved, keeps=moved <= PLACES)
    return table.sort("mean_rank")


def _scores(by_seed: Mapping[int, Path | Explanation]) -> dict[str, float]:
    """Geometric mean over seeds of the rank-honest joint score; candidates that are undefined or 0 somewhere are left out."""
    found: dict[str, list[float]] = {}
    for one in by_seed.values():
        run = one if isinstance(one, Explanation) else Explanation.load(one)
        kept = (pl.col("kind") == "A-hypothesis") & pl.col("axis_kind").is_in(["write", "mixed"])
        for name, score in run.plain_summary.filter(kept).select("subspace", "honest_joint").rows():
            found.setdefault(name, []).append(score)
    whole = {n: np.array(v) for n, v in found.items() if len(v) == len(by_seed) and all(x > 0 for x in v)}
    return {name: float(np.exp(np.log(values).mean())) for name, values in whole.items()}


def ranks_text(table: pl.DataFrame) -> str:
    """What a table of ranks says, in words."""
    names = [c.removeprefix("rank ") for c in table.columns if c.startswith("rank ")]
    if len(names) < 2 or not len(table):
        return "Sweeps of two or more behaviours are needed to see which candidates keep their place."
    ranks = table.select([f"rank {name}" for name in names]).to_numpy().T
    w, m, n = kendall_w(ranks), len(names), len(table)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    rho = {pair: float(spearmanr(*(table[f"rank {x}"].to_numpy() for x in pair)).statistic) for pair in pairs}
    said = ", ".join(f"{literal(a)} and {literal(b)} {value:.2f}" for (a, b), value in rho.items())
    top = table.filter(pl.all_horizontal([pl.col(f"rank {name}") <= TOP for name in names]))["candidate"].to_list()
    first = {name: table.sort(f"rank {name}")["candidate"][0] for name in names}
    led = ", ".join(f"{literal(name)}: {literal(c)}" for name, c in first.items())
    return (
        f"Over {m} behaviours the orders of {n} write and mixed candidates have Kendall's W = {w:.2f} (1: the same order;"
        f" independent orders give {1 / m:.2f}); Spearman of two behaviours: {said}. First is, per behaviour, {led}. In the top"
        f" {TOP} of all: {', '.join(map(literal, top)) or 'none'}. {int(table['keeps'].sum())} of {n} move by at most {PLACES}"
        " places. Bases overlap and all behaviours share one base model, so that candidates that know nothing of w agree too."
    )
