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
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from ws.runs.identity import missing_output
from ws.runs.notebooks import Place
from ws.runs.once import Ending, run_notebook

MARK = "ws.runs.job "  # begins the lines that are reports; kernels may print to the same stream


def report(what: dict) -> None:
    """One line to whoever started this process; nobody may be listening any more."""
    with suppress(OSError):
        print(f"{MARK}{json.dumps(what)}", flush=True)


def follow(parent: int) -> None:
    """End this process once `parent` is no longer its parent; the hard way when the orderly one takes too long."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(15)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(spec: dict) -> Ending:
    """Check what the run needs, then run its notebook. spec: see `ws.runs.engine.spec_of`."""
    for notebook, folder in spec["needs"]:
        if lost := missing_output(notebook, Path(folder)):
            return Ending("failed", error=f"{lost}: is not what {notebook} made; run the same command again")
    try:
        place = Place(*map(Path, spec["place"]))
        return run_notebook(**spec["run"], quiet=True, on_stage=lambda text: report({"stage": text}), place=place)
    except (ValueError, FileNotFoundError) as error:
        return Ending("failed", error=f"{type(error).__name__}: {error}")


def main() -> None:
    spec = json.load(sys.stdin)
    follow(int(sys.argv[2]))
    report({"stage": "starting"})
    report(asdict(run(spec)) | {"folder": None, "kept": None})  # whoever asked knows it


if __name__ == "__main__":
    main()
