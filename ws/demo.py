"""The demo: everything on the shipped tiny model, as one batch.

Three LoRA seeds and the null diffs, the sweep under both protocols, the stability report, the delta SVD, the theta fit.
"""

from dataclasses import replace

from ws.cache.names import RunId
from ws.runs.grid import Grid, Job, make_jobs
from ws.runs.once import prepare

SEEDS = (0, 1, 2)


def demo_jobs() -> list[Job]:
    """The batch of the shipped model, as `ws batch` makes it, and the notebooks beside it."""
    batch = make_jobs(Grid(seeds=SEEDS))
    alone = [replace(prepare(n, {"MODEL_ID": "tiny"}), name=f"tiny: {n}") for n in ("theta_fit", "delta_svd")]
    v7 = prepare("v7_sweep", {"MODEL_ID": "tiny", "SEED": 0, "PROTOCOL": "v7"})
    trained = next(job.needs for job in batch if job.notebook == "v7_sweep")  # the first seed's w, all null diffs
    # the order is the priority: what others wait for, then what stands alone, then the rest
    return [batch[0], *alone, *batch[1:-1], replace(v7, name="tiny: v7_sweep v7", needs=trained), batch[-1]]


def demo_run() -> RunId:
    """The run whose table the demo prints."""
    return RunId("tiny", "sycophancy", "lora", SEEDS[0])


def demo_report() -> str:
    """The top of the v7 table and the verdict over seeds."""
    from ws.explanation.words import top_table
    from ws.show.tables import read_table

    top = top_table(read_table(demo_run().folder() / "v7" / "v7_summary_pct.tsv"), 12, "simple")
    verdict = (demo_run().adapter_folder() / "v7b" / "v7b_conclusion.md").read_text(encoding="utf-8")
    lines = verdict.partition("## Verdict")[2].partition("##")[0].strip()
    seeds = ", ".join(map(str, SEEDS))
    return f"v7, seed {SEEDS[0]}, best joint scores:\n\n{top}\n\nv7b over seeds {seeds}:\n{lines}"
