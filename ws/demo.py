"""The demo and the real run: everything on one model, as one batch.

LoRA seeds and null diffs, the sweep under both protocols, the stability report, the delta SVD, the theta fit.
"""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from ws.cache.models import model_slug
from ws.cache.names import RunId
from ws.runs.grid import Grid, Job, make_jobs
from ws.runs.notebooks import Place
from ws.runs.once import prepare


@dataclass(frozen=True)
class Show:
    """What is run of a model. seeds, nulls: LoRA seeds and null diffs; set: parameters of the notebooks that are not the
    usual; alone: notebooks that need no w, with theirs; v7: whether the first seed is swept under v7 too. workers, threads:
    how many runs at a time, and the threads of each, 0 for all cores among them."""

    model: str
    seeds: tuple[int, ...] = (0, 1, 2)
    nulls: int = 5
    set: dict[str, object] = field(default_factory=dict)
    alone: dict[str, dict] = field(default_factory=lambda: {"theta_fit": {}, "delta_svd": {}})
    v7: bool = True
    workers: int = 2
    threads: int = 1

    @property
    def run(self) -> RunId:
        """The run whose table is printed."""
        return RunId(model_slug(self.model), "sycophancy", "lora", self.seeds[0])


# a causal check of what is run forward where it matters, and of few draws: the whole one takes some ten minutes a seed
LIGHT = {"DRAWS": 300, "CHECKED": 10, "FORWARD": 8, "DROPS": 2, "RANKS": [8], "SECTIONS": ["where", "ranks"]}
DEMO = Show("tiny", set=LIGHT, alone={"theta_fit": {"PERMUTATIONS": 99}, "delta_svd": {}})  # too small for two threads
SHORT = {"CORRECTIONS": False} | LIGHT | {"SECTIONS": ["ranks"]}  # a row takes ten seconds here
REAL = Show(
    "smollm2",
    (0, 1, 2),
    3,
    SHORT,
    {"theta_fit": {"PERMUTATIONS": 5, "CONTROL_HEADS": ["unconditional"], "BETAS": [0.0, 0.25]}, "delta_svd": {}},
    threads=0,
)
QUICK = Show("smollm2", (0,), 0, SHORT, {"delta_svd": {}}, v7=False, workers=1, threads=0)


MEASURED = 0.024  # seconds that the products of `slowness` took on those cores


def read_lines(file: Path) -> list[dict]:
    return [
        json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line
    ]  # texts hold other line ends


def show_jobs(show: Show) -> list[Job]:
    """The batch of a model, as `ws batch` makes it, and the notebooks beside it."""
    grid = Grid(models=(show.model,), seeds=show.seeds, nulls=show.nulls, set=show.set, causal=True)
    batch = make_jobs(grid)
    own, named = {"MODEL_ID": show.model}, model_slug(show.model)
    alone = [replace(prepare(n, own | more), name=f"{named}: {n}") for n, more in show.alone.items()]
    trained = next(job.needs for job in batch if job.notebook == "v7_sweep")  # the first seed's w, all null diffs
    v7 = prepare("v7_sweep", own | {"SEED": show.seeds[0], "PROTOCOL": "v7"})
    more = [replace(v7, name=f"{named}: v7_sweep v7", needs=trained)] if show.v7 else []
    checked = tuple(job.name for job in batch if job.notebook == "causal_check")  # the benchmark reads all of them
    beside = prepare("benchmark", own | {"SEED": show.seeds[0], "KL_TARGET": [0.3], "SIZE": "quick"})
    more += [replace(beside, name=f"{named}: benchmark", needs=checked)] if checked else []
    over = [batch[-1]] if len(show.seeds) > 1 else []  # one seed has nothing to be compared with
    # the order is the priority: what others wait for, then what stands alone, then the rest
    return [batch[0], *alone, *batch[1:-1], *more, *over]


def play(show: Show) -> int:
    """Run what is not done and print the summary, steered text and the report; 1 where a run failed, else 0."""
    from ws.runs.engine import Settings, run_jobs

    pace = 12.5 * slowness() if show == DEMO else 0.0
    size = Settings(workers=min(show.workers, os.cpu_count() or 1), threads=show.threads, pace=pace)
    endings, summary = run_jobs(show_jobs(show), Place(), size)
    print(f"\n{summary}\n", flush=True)
    if not all(ending.ok for ending in endings.values()):
        return 1
    print(f"{steered_text(show)}\n\n{show_report(show)}\n", flush=True)
    return 0


def slowness() -> float:
    """How many times longer than on the machine on which the costs were measured small products take here."""
    import time

    import numpy as np

    A, took = np.random.default_rng(0).standard_normal((192, 192)).astype(np.float32), []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(200):
            A @ A
        took.append(time.perf_counter() - started)
    return min(max(0.2, min(took) / MEASURED), 3.0)  # a busy moment is no slow machine


def steered_text(show: Show, prompts: int = 1) -> str:
    """The first held-out prompts and what the first seed's model says at the least alpha, at 0 and at the largest: from the
    files of its run."""
    folder = show.run.folder() / "weight_diff"
    said, key = (
        {row["id"]: row for row in read_lines(folder / name)} for name in ("completions.jsonl", "completions_key.jsonl")
    )
    rows = sorted(({**row, **key[i]} for i, row in said.items()), key=lambda row: (row["topic"], row["alpha"]))
    lines = []
    for topic in sorted({row["topic"] for row in rows})[:prompts]:
        some = [row for row in rows if row["topic"] == topic]
        lines.append(f"{show.model}, seed {show.seeds[0]}, held out: {_shown(some[0]['prompt'])}")
        lines += [f"  alpha {_signed(row['alpha'])}: {_shown(row['completion'])}" for row in some]
    return "\n".join(lines)


def _signed(alpha: float) -> str:
    return f"{alpha:+g}" if alpha else " 0"


def _shown(text: str) -> str:
    """A model's text as a terminal may see it: in one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def show_report(show: Show) -> str:
    """The top of the first seed's table, and the verdict over seeds; of one seed what its sweep says."""
    from ws.explanation.words import top_table
    from ws.show.tables import read_table

    folder, protocol = show.run.folder(), "v7" if show.v7 else "v7b"
    top = top_table(read_table(folder / protocol / "v7_summary_pct.tsv"), 12, "simple")
    many = len(show.seeds) > 1
    page = show.run.adapter_folder() / "v7b" / "v7b_conclusion.md" if many else folder / protocol / "v7_conclusion.md"
    verdict = page.read_text(encoding="utf-8").partition("## Verdict" if many else "## Does w steer?")[2]
    lines = verdict.partition("##" if many else "## Against null diffs")[0].strip()
    seeds = (
        f"v7b over seeds {', '.join(map(str, show.seeds))}" if many else "One seed, of which no ranking is established"
    )
    return f"{protocol}, seed {show.seeds[0]}, best joint scores:\n\n{top}\n\n{seeds}:\n{lines}"
