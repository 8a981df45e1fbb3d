"""Run a notebook with papermill, once: a run whose parameters, inputs and sources are unchanged is not run again.

The executed notebook appears as OUT_DIR/NAME.ipynb only when it ended well; one that raised is kept beside it as
NAME.failed.ipynb.
"""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ws.cache.files import lock, publish, scratch, sweep, write_json
from ws.cache.keys import Key
from ws.cache.made import mark_failed, mark_made, sidecar
from ws.cache.places import CLONE
from ws.runs import html, need
from ws.runs.execute import Hear, execute, terminable
from ws.runs.identity import outputs, products, run_key, run_state
from ws.runs.notebooks import Params, Place, notebook_of, run_id
from ws.runs.pairing import check_pair
from ws.runs.parameters import read_notebook, resolve

VERSIONS = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy", "polars", "papermill")


@dataclass(frozen=True)
class Ending:
    """How a run ended. state: "done" (nothing to do), "ran", "failed", "skipped"; found: what was found before, "done" or
    why it ran."""

    state: str
    found: str = ""
    seconds: float = 0.0
    error: str = ""
    folder: Path | None = None

    @property
    def ok(self) -> bool:
        return self.state in ("done", "ran")


@dataclass(frozen=True)
class Job:
    """One run of one notebook: its complete parameters, its folder, the names of the jobs it needs."""

    name: str
    notebook: str
    values: dict[str, object]
    folder: Path
    needs: tuple[str, ...] = ()

    @property
    def target(self) -> Path:
        return self.folder / f"{self.notebook}.ipynb"

    def key(self, place: Place, content: dict | None = None) -> Key:
        """Its key now; `content` is the notebook's where it was read before: it may be edited while it runs."""
        content = content or read_notebook(place.notebook(self.notebook))
        return run_key(self.notebook, content, self.values, place.out)


def revision() -> str:
    """The source revision (git), '+' appended when tracked files differ from it; 'unknown' where this is no clone."""
    words = "git describe --always --exclude=* --abbrev=40 --dirty=+".split()
    if not CLONE or not shutil.which("git"):
        return "unknown"
    done = subprocess.run(words, cwd=CLONE, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def versions() -> dict[str, str]:
    """Versions of Python, this package and what the numbers depend on."""
    from ws import __version__

    installed = {name: metadata.version(name) if find_spec(name) else "absent" for name in VERSIONS}
    return {"python": platform.python_version(), "ws": __version__, **installed}


def threads() -> int:
    """How many threads a kernel computes with: results repeat byte for byte only under the same number."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(asked) if asked.isdigit() and int(asked) > 0 else len(os.sched_getaffinity(0))


def prepare(
    notebook: str, params: Params, files: Sequence[Path] = (), cwd: Path | None = None, place: Place | None = None
) -> Job:
    """A run's complete parameters and its folder; nothing is run. Wrong ones raise ValueError / FileNotFoundError."""
    place = place or Place()
    values = resolve(notebook, read_notebook(place.notebook(notebook)), params, files, cwd)
    if "OUT_DIR" not in values:
        raise ValueError(f"{notebook}: the notebook defines no parameter OUT_DIR, so nobody can say where its run goes")
    folder = notebook_of(notebook).run_folder(values, place.out)
    return Job(notebook, notebook, values | {"OUT_DIR": str(folder)}, folder)


def run_notebook(
    name: str,
    params: Params | None = None,
    *,
    files: Sequence[Path] = (),
    cwd: Path | None = None,
    place: Place | None = None,
    force: bool = False,
    timeout: int | None = None,
    quiet: bool = False,
    on_stage: Hear = None,
) -> Ending:
    """Run nbs/NAME.ipynb with `params` (texts are parsed), unless that very run is done; `force` runs it anyway. files:
    of parameters, `params` win. cwd: where relative paths were typed. timeout: seconds that one cell may take.
    on_stage: hears which part of the notebook runs. A notebook that raises ends as "failed", its traceback in `error`;
    wrong parameters raise ValueError / FileNotFoundError; an interrupt ends the kernel, the run stays unfinished."""
    place = place or Place()
    job = prepare(name, params or {}, files, cwd, place)
    target, page = job.target, job.target.with_suffix(".html")
    check_pair(place.notebook(name), edited=True)
    found = run_state(name, job.folder, job.key(place))
    if found == "done" and not force:
        if not page.is_file():
            html.render(target, page, title=name)
        return Ending("done", found, folder=job.folder)
    need("papermill", "notebooks")
    check_pair(place.notebook(name))
    with terminable(), lock(job.folder, name=f".lock.{name}"):
        content = read_notebook(place.notebook(name))
        key = job.key(place, content)
        found = run_state(name, job.folder, key)  # another process may have run it while this one waited
        if found == "done" and not force:
            return Ending("done", found, folder=job.folder)
        sweep(job.folder)
        sidecar(target).unlink(missing_ok=True)  # its outputs are about to change
        run = _execute(job, found, place, timeout, quiet, on_stage)
        if not run.ok:
            mark_failed(target, key, run.error)
            return run
        # The run itself may have fetched a hub model; inputs and sources count as they were when it started.
        key = replace(key, params=job.key(place, content).params)
        about = {"notebook": name, "run": asdict(run_id(job.values)), "seconds": run.seconds}
        made = {"outputs": outputs(name, job.folder), "products": products(name, job.folder, job.values, place.out)}
        mark_made(target, key, {**about, **made})
    return run


def _execute(job: Job, found: str, place: Place, timeout: int | None, quiet: bool, on_stage: Hear) -> Ending:
    """Run the notebook under a temporary name; publish it, its rendering and params.json, or the failed notebook."""
    name, values, folder, target = job.notebook, job.values, job.folder, job.target
    notebook, page, failed = place.notebook(name), target.with_suffix(".html"), folder / f"{name}.failed.ipynb"
    place.logs.mkdir(parents=True, exist_ok=True)
    started = time.time()
    log_path = place.logs / f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}_{name}_{os.getpid()}.log"
    with log_path.open("w", buffering=1, encoding="utf-8") as log, scratch(target) as temporary:
        log.write(f"{name} in {folder}\nwhy: {found}\n{json.dumps(values, indent=2, default=str)}\n\n")
        error = execute(notebook, values, temporary, place.out, log, timeout, quiet, on_stage)
        seconds = round(time.time() - started, 1)
        log.write(f"\n{error or 'ended well'} after {seconds} s\n")
        if error:
            if not temporary.is_file():  # it died before its first cell
                temporary.write_bytes(notebook.read_bytes())
            publish(temporary, failed)
            for old in (target, page):
                old.unlink(missing_ok=True)  # they tell of results that this run may have replaced
            return Ending("failed", found, seconds, error, folder)
        cells = _settle(temporary, notebook, target)
        html.render(temporary, page, title=name)
        timing = {"started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)), "seconds": seconds}
        about = {"notebook": name, "parameters": values, "source_revision": revision(), "versions": versions()}
        about["environment"] = {"threads": threads(), "cuda_devices": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
        write_json(folder / "params.json", {**about, "timings": {**timing, "cells": cells}})
        failed.unlink(missing_ok=True)
        publish(temporary, target)
    return Ending("ran", found, seconds, folder=folder)


def _settle(temporary: Path, notebook: Path, target: Path) -> list[float]:
    """Make the finished notebook name itself instead of papermill's temporary file; the seconds of its code cells."""
    content = read_notebook(temporary)
    content["metadata"]["papermill"].update(input_path=notebook.name, output_path=target.name)
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    timed = [c["metadata"].get("papermill", {}).get("duration") for c in content["cells"] if c["cell_type"] == "code"]
    return [round(t or 0.0, 3) for t in timed]
