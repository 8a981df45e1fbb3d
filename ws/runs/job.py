"""One run in a process of its own: `python -m ws.runs.job BATCH PARENT`, the run as JSON on its standard input.

A process per run, so that a batch always runs the code that is on disk, that its threads and its GPU are set before
anything loads, and that it can be ended at any moment: SIGTERM ends the kernel first. When the parent (a worker) is
gone, however it went, the process ends itself in the same way. It reports on its standard output, a line of JSON each.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

MARK = "ws.runs.job "  # begins the lines that are reports; kernels may print to the same stream


@dataclass(frozen=True)
class Ending:
    """How a run ended. state: "done" (nothing to do), "ran", "failed", "skipped", "stopped"; found: why it ran."""

    state: str
    found: str = ""
    seconds: float = 0.0
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.state in ("done", "ran")


def report(what: dict) -> None:
    """One line to whoever started this process; nobody may be listening any more."""
    try:
        sys.stdout.write(f"{MARK}{json.dumps(what)}\n")
        sys.stdout.flush()
    except OSError:
        pass


def follow(parent: int, every_s: float = 0.5, grace_s: float = 15.0) -> None:
    """End this process once `parent` is no longer its parent; the hard way when the orderly one takes too long."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every_s)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(spec: dict) -> Ending:
    """Check what the run needs, then run its notebook. spec: see `ws.runs.engine.spec_of`."""
    from ws.runs.identity import missing_output
    from ws.runs.notebooks import Place
    from ws.runs.once import run_notebook

    for notebook, folder in spec["needs"]:
        if lost := missing_output(notebook, Path(folder)):
            return Ending("failed", error=f"{lost}: is not what {notebook} made; run the same command again")
    told: list[str] = []

    def stage(heading: str) -> None:
        if told[-1:] != [heading]:
            told.append(heading)
            report({"stage": heading})

    try:
        done = run_notebook(
            spec["notebook"],
            spec["values"],
            timeout=spec["timeout"],
            force=spec["force"],
            quiet=True,
            on_stage=stage,
            place=Place(Path(spec["nbs"]), Path(spec["out"])),
        )
    except (ValueError, FileNotFoundError) as error:
        return Ending("failed", error=f"{type(error).__name__}: {error}")
    if not done.ok:
        return Ending("failed", done.found, done.seconds, done.error)
    return Ending("done" if done.seconds == 0 else "ran", done.found, done.seconds)


def main() -> None:
    # jsonschema compiles a grammar for a text format that no notebook uses: seconds of every run's start.
    sys.modules.setdefault("rfc3987_syntax", None)
    spec = json.load(sys.stdin)
    follow(int(sys.argv[2]))
    report({"stage": "starting"})
    ending = run(spec)
    report(asdict(ending))


if __name__ == "__main__":
    main()
