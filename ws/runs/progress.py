"""What a batch shows: its plan, a line per run (state, stage, elapsed), an overall bar with the time left, a summary.

On a terminal the lines of what runs now are redrawn above the bar; in a log a line is printed when a run ends. The time left
is what is left of the runs' costs (COSTS) at the pace so far.
"""

import sys
import time
from collections import Counter
from functools import partial
from io import TextIOBase

from tabulate import tabulate
from tqdm import tqdm

from ws.runs.failed import tries
from ws.runs.grid import Step
from ws.runs.once import Ending

SHOWN = 14  # lines of a traceback in the summary
COSTS = {
    "weight_diff": 3.0,
    "v7_sweep": 2.5,
    "causal_check": 6.2,
    "benchmark": 3.6,
    "theta_fit": 14.4,
    "v7b_stability": 7.4,
    "delta_svd": 1.0,
    "cross_behaviours": 4.0,
}  # of a run beside those of other notebooks: tens of seconds of one core on the shipped model, as measured


def costs_of(steps: list[Step]) -> dict[str, float]:
    """What each run that has to run costs, by its name."""
    return {step.job.name: COSTS.get(step.job.notebook, 3.0) for step in steps if step.run}


def plan_line(steps: list[Step], at_once: int, pace: float = 0.0) -> str:
    """What a batch is about to do, in a line. pace: seconds per unit of cost on one core, where they are known."""
    todo = Counter(step.job.notebook for step in steps if step.run)
    done = sum(not step.run for step in steps)
    if not todo:
        return f"plan: all runs are done ({done})"
    counts = ", ".join(f"{n} {name}" for name, n in todo.items())
    beside = f"; {done} are done" if done else ""
    took = sum(costs_of(steps).values()) * pace / at_once
    expected = f"; some {max(1, round(took / 60))} min on this machine" if pace else ""
    n = sum(todo.values())
    return f"plan: {n} run{'s' if n > 1 else ''}, {at_once} at a time ({counts}){beside}{expected}"


class Board:
    """The progress of a batch on a terminal or in a log. costs: of the runs that have to run, by name. `restarts`: how often
    each run was begun anew."""

    def __init__(self, costs: dict[str, float], total: int, stream: TextIOBase | None = None):
        names, self.costs, self.spent = list(costs), costs, 0.0
        self.started = time.monotonic()
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.total, self.ended = total, total - len(names)
        self.begun: dict[str, float] = {}
        self.stages: dict[str, str] = {}
        self.restarts: Counter[str] = Counter()
        self.line = partial(tqdm, file=self.stream, disable=not self.live)
        self.lines: dict[str, tqdm] = {}
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} runs, {elapsed}{postfix}"
        self.bar = self.line(total=total, initial=self.ended, bar_format=form)

    def stage(self, name: str, text: str) -> None:
        """A run reached a stage; "starting" is the first of every process that computes it."""
        if name in self.begun and text == "starting":
            self.restarts[name] += 1
            self._print(f"its worker ended, begun anew: {name}")
        if self.stages.get(name) == text:
            return
        self.stages[name] = text
        self.begun.setdefault(name, time.monotonic())
        if name not in self.lines:
            self.lines[name] = self.line(desc=name, bar_format="running {elapsed:>7}  {desc}", leave=False)
        self.lines[name].set_description_str(f"{name}: {text}")

    def end(self, name: str, state: str) -> None:
        """A run ended in a state."""
        self.ended += 1
        if name in self.lines:
            self.lines.pop(name).close()
        cost = self.costs.pop(name, 0.0)
        self.spent += cost if state in ("ran", "done") else 0.0  # what failed says nothing of the pace
        self.bar.set_postfix_str(self.left(), refresh=False)
        self.bar.update(1)
        took = tqdm.format_interval(time.monotonic() - self.begun.pop(name, time.monotonic()))
        more = "" if self.live or not self.costs else f", {self.left()}"
        self._print(f"[{self.ended}/{self.total}] {state:7} {took:>7}  {name}{more}")

    def left(self) -> str:
        """How long what is left takes at the pace so far, what runs now counted by half."""
        if not self.costs:
            return ""
        half = sum(cost for name, cost in self.costs.items() if name in self.begun) / 2
        done, rest = self.spent + half, sum(self.costs.values()) - half
        if not done:
            return "time left unknown"
        return f"some {max(1, round((time.monotonic() - self.started) * rest / done / 60))} min left"

    def tick(self) -> None:
        """Redraw what runs now."""
        for line in (*self.lines.values(), self.bar):
            line.refresh()

    def close(self) -> None:
        for line in (*self.lines.values(), self.bar):
            line.close()

    def _print(self, text: str) -> None:
        tqdm.write(text, file=self.stream)


def summary_text(steps: list[Step], endings: dict[str, Ending], restarts: dict[str, int], seconds: float) -> str:
    """How every run of a batch ended, as a table; the ends of tracebacks; what to do about it."""
    rows, failures = [], []
    for step in steps:
        job, ending = step.job, endings[step.job.name]
        notes = [
            ending.why or ending.found if ending.state != "done" else "",
            f"begun anew {restarts[job.name]} x" if job.name in restarts else "",
            "stale adapters kept" if step.stale else "",
            ending.error if ending.state == "skipped" else "",
        ]
        took = tqdm.format_interval(ending.seconds) if ending.seconds else ""
        rows.append([ending.state, *job.name.split(": "), took, "; ".join(filter(None, notes))])
        if ending.state == "failed":
            failed = tries(job.folder, job.notebook)
            text = "".join(f"\n  {line}" for line in ending.error.splitlines()[-SHOWN:])
            failures.append(f"{job.name} failed:{text}" + (f"\n  kept in {failed[-1]['folder']}" if failed else ""))
    table = tabulate(rows, headers=["", "run", "notebook", "time", "why"], tablefmt="simple", disable_numparse=True)
    states = Counter(ending.state for ending in endings.values())
    counts = ", ".join(f"{states[s]} {s}" for s in ("ran", "done", "failed", "skipped") if s in states)
    parts = [table, *failures, f"{counts} in {tqdm.format_interval(seconds)}"]
    if any(step.stale for step in steps):
        parts.append("stale adapters: their training code changed since; --retrain trains them anew")
    if any(not ending.ok for ending in endings.values()):
        parts.append("run the same command again to finish what failed; nothing that is done is done again")
    return "\n\n".join(parts)
