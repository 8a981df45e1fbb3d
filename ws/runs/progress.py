"""What a batch shows: a line per run (state, stage, elapsed), an overall bar, a summary.

On a terminal the lines of what runs now are redrawn above the bar; in a log a line is printed when a run starts, moves
on to another part of its notebook, and ends.
"""

import sys
import time
from io import TextIOBase

from tabulate import tabulate
from tqdm import tqdm

from ws.runs.grid import Step
from ws.runs.job import Ending

SHOWN = 14  # lines of a traceback in the summary


def clock(seconds: float | int) -> str:
    """`m:ss`, or `h:mm:ss`."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}" if minutes >= 60 else f"{minutes}:{s:02d}"


class Board:
    """The progress of a batch on a terminal or in a log. `restarts`: how often each run was begun anew."""

    def __init__(self, names: list[str], total: int, stream: TextIOBase | None = None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.total, self.ended = total, total - len(names)
        self.stages: dict[str, str] = {}
        self.begun: dict[str, float] = {}
        self.restarts: dict[str, int] = {}
        self.lines: dict[str, tqdm] = {}
        self.bar = None
        if self.live:
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt} runs, {elapsed}"
            self.bar = tqdm(total=total, initial=self.ended, file=self.stream, bar_format=form, position=0)

    def tell(self, name: str, what: str, text: str) -> None:
        """A run reached a stage, or ended in a state."""
        if what == "ended":
            self.ended += 1
            took = time.monotonic() - self.begun.pop(name, time.monotonic())
            self.stages.pop(name, None)
            line = self.lines.pop(name, None)
            if line is not None:  # a tqdm without a total has no truth value
                line.close()
            if self.bar is not None:
                self.bar.update(1)
            self._print(f"[{self.ended}/{self.total}] {text:7} {clock(took):>7}  {name}")
            return
        if name in self.begun and text == "starting":
            self.restarts[name] = self.restarts.get(name, 0) + 1
            self._print(f"its worker ended, begun anew: {name}")
        self.begun.setdefault(name, time.monotonic())
        self.stages[name] = text
        if self.live:
            self.tick()
        else:
            self._print(f"running {clock(time.monotonic() - self.begun[name]):>7}  {name}: {text}")

    def tick(self) -> None:
        """Redraw what runs now."""
        if not self.live:
            return
        for name, stage in self.stages.items():
            if name not in self.lines:
                used = {-line.pos for line in self.lines.values()}
                free = next(i for i in range(1, len(used) + 2) if i not in used)
                self.lines[name] = tqdm(file=self.stream, bar_format="{desc}", position=free, leave=False)
            took = clock(time.monotonic() - self.begun[name])
            self.lines[name].set_description_str(f"running {took:>7}  {name}: {stage}")
        self.bar.refresh()

    def close(self) -> None:
        for line in self.lines.values():
            line.close()
        self.lines.clear()
        if self.bar is not None:
            self.bar.close()

    def _print(self, text: str) -> None:
        if self.live:
            tqdm.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)


def summary_text(steps: list[Step], endings: dict[str, Ending], restarts: dict[str, int], seconds: float) -> str:
    """How every run of a batch ended, as a table; the ends of tracebacks; what to do about it."""
    rows, failures = [], []
    for step in steps:
        ending = endings[step.job.name]
        run, notebook = step.job.name.split(": ")
        notes = [ending.found if ending.state != "done" else ""]
        notes.append(f"begun anew {restarts[step.job.name]} x" if step.job.name in restarts else "")
        notes.append("stale adapters kept" if step.stale else "")
        notes.append(ending.error if ending.state == "skipped" else "")
        took = clock(ending.seconds) if ending.seconds else ""
        rows.append([ending.state, run, notebook, took, "; ".join(note for note in notes if note)])
        if ending.state == "failed":
            kept = step.job.folder / f"{step.job.notebook}.failed.ipynb"
            lines = ending.error.splitlines()[-SHOWN:]
            text = "\n".join(f"  {line}" for line in lines)
            failures.append(f"{step.job.name} failed:\n{text}" + (f"\n  kept as {kept}" if kept.is_file() else ""))
    parts = [tabulate(rows, headers=["", "run", "notebook", "time", "why"], tablefmt="simple", disable_numparse=True)]
    parts += failures
    states = [ending.state for ending in endings.values()]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("ran", "done", "failed", "skipped") if s in states)
    parts.append(f"{counts} in {clock(seconds)}")
    if any(step.stale for step in steps):
        parts.append("stale adapters: their training code changed since; --retrain trains them anew")
    if any(not ending.ok for ending in endings.values()):
        parts.append("run the same command again to finish what failed; nothing that is done is done again")
    return "\n\n".join(parts)
