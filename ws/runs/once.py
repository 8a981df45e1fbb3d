"""Run a notebook with papermill, once: a run whose parameters, inputs and sources are unchanged is not run again.

The executed notebook appears as OUT_DIR/NAME.ipynb only when it ended well; one that raised is kept beside it as
NAME.failed.ipynb.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ws.cache.files import lock, publish, scratch, sweep, write_json
from ws.cache.keys import Key
from ws.cache.made import mark_failed, mark_made, sidecar
from ws.cache.places import CLONE
from ws.runs import need, parameters
from ws.runs.execute import execute, terminable
from ws.runs.identity import outputs, products, run_key, run_state
from ws.runs.notebooks import Place, notebook_of, run_id
from ws.runs.pairing import check_pair

VERSIONS = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy", "polars", "papermill")


@dataclass(frozen=True)
class Run:
    """What came of asking for a run: where, what was found before ("done" or why it ran), and how it ended."""

    notebook: str
    folder: Path
    found: str
    ok: bool
    seconds: float
    error: str = ""

    @property
    def html(self) -> Path:
        return self.folder / f"{self.notebook}.html"


@dataclass(frozen=True)
class Ask:
    """A run that is asked for, its parameters complete: which notebook, with what, where it goes."""

    name: str
    path: Path
    content: dict
    values: dict[str, object]
    folder: Path

    def key(self, out: Path) -> Key:
        return run_key(self.name, self.content, self.values, out)


def revision() -> str:
    """The source revision (git), '+' appended when tracked files differ from it; 'unknown' where this is no clone."""
    words = "git describe --always --exclude=* --abbrev=40 --dirty=+".split()
    try:
        done = subprocess.run(words, cwd=CLONE, capture_output=True, text=True, check=False) if CLONE else None
    except FileNotFoundError:
        done = None
    return done.stdout.strip() if done and done.returncode == 0 else "unknown"


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
    name: str,
    params: dict[str, object],
    files: list[Path] | tuple[Path, ...] = (),
    cwd: Path | None = None,
    place: Place | None = None,
) -> Ask:
    """A run's complete parameters and its folder; nothing is run. Wrong ones raise ValueError / FileNotFoundError."""
    place = place or Place()
    path = place.nbs / f"{name}.ipynb"
    content = parameters.read_notebook(path)
    values = parameters.resolve(name, content, params, files, cwd)
    if "OUT_DIR" not in values:
        raise ValueError(f"{name}: the notebook defines no parameter OUT_DIR, so nobody can say where its run goes")
    folder = notebook_of(name).run_folder(values, place.out)
    values["OUT_DIR"] = str(folder)
    return Ask(name, path, content, values, folder)


def run_notebook(
    name: str,
    params: dict[str, object] | None = None,
    out_dir: Path | str | None = None,
    timeout: int | None = None,
    *,
    files: list[Path] | tuple[Path, ...] = (),
    force: bool = False,
    cwd: Path | None = None,
    place: Place | None = None,
    quiet: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> Run:
    """Run nbs/NAME.ipynb with `params` (texts are parsed), unless that very run is done; `force` runs it anyway.

    `files` are parameter files (explicit `params` win), `cwd` is where relative paths were typed, `timeout` the
    seconds one cell may take; `on_stage` hears which part of the notebook runs. A notebook that raises gives `ok=False`
    with its traceback in `error`; wrong parameters raise ValueError / FileNotFoundError. An interrupt ends the kernel
    and leaves the run unfinished.
    """
    explicit = dict(params or {})
    if out_dir is not None:
        explicit["OUT_DIR"] = str(out_dir)
    place = place or Place()
    ask = prepare(name, explicit, files, cwd, place)
    notebook, values, folder = ask.path, ask.values, ask.folder
    target = folder / f"{name}.ipynb"
    check_pair(notebook, edited=True)
    found = run_state(name, folder, ask.key(place.out))
    if found == "done" and not force:
        if not (folder / f"{name}.html").is_file():
            from ws.runs.html import render

            render(target, folder / f"{name}.html", title=name)
        return Run(name, folder, found, True, 0.0)
    need("papermill", "notebooks")
    check_pair(notebook)
    with terminable(), lock(folder, name=f".lock.{name}"):
        key = ask.key(place.out)
        found = run_state(name, folder, key)  # another process may have run it while this one waited
        if found == "done" and not force:
            return Run(name, folder, found, True, 0.0)
        sweep(folder)
        sidecar(target).unlink(missing_ok=True)  # its outputs are about to change
        run = _execute(ask, found, timeout, place, quiet, on_stage)
        if not run.ok:
            mark_failed(target, key, run.error)
            return run
        # The run itself may have fetched a hub model; inputs and sources count as they were when it started.
        key = replace(key, params=ask.key(place.out).params)
        about = {"notebook": name, "run": asdict(run_id(values)), "seconds": run.seconds}
        made = {"outputs": outputs(name, folder), "products": products(name, folder, values, place.out)}
        mark_made(target, key, {**about, **made})
    return run


def _execute(
    ask: Ask, found: str, timeout: int | None, place: Place, quiet: bool, on_stage: Callable[[str], None] | None
) -> Run:
    """Run the notebook under a temporary name; publish it, its rendering and params.json, or the failed notebook."""
    from ws.runs.html import render

    name, notebook, values, folder = ask.name, ask.path, ask.values, ask.folder
    target, failed = folder / f"{name}.ipynb", folder / f"{name}.failed.ipynb"
    place.logs.mkdir(parents=True, exist_ok=True)
    started = time.time()
    log_path = place.logs / f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}_{name}_{os.getpid()}.log"
    with log_path.open("w", buffering=1, encoding="utf-8") as log, scratch(target) as temporary:
        log.write(f"{name} in {folder}\nwhy: {found}\n{json.dumps(values, indent=2, default=str)}\n\n")
        error = execute(ask.path, ask.content, values, temporary, place.out, timeout, log, quiet, on_stage)
        seconds = round(time.time() - started, 1)
        log.write(f"\n{error or 'ended well'} after {seconds} s\n")
        if error:
            if not temporary.is_file():  # it died before its first cell
                temporary.write_bytes(notebook.read_bytes())
            publish(temporary, failed)
            for old in (target, folder / f"{name}.html"):
                old.unlink(missing_ok=True)  # they tell of results that this run may have replaced
            return Run(name, folder, found, False, seconds, error)
        cells = _settle(temporary, notebook, target)
        render(temporary, folder / f"{name}.html", title=name)
        timing = {"started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)), "seconds": seconds}
        about = {"notebook": name, "parameters": values, "source_revision": revision(), "versions": versions()}
        about["environment"] = {"threads": threads(), "cuda_devices": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
        write_json(folder / "params.json", {**about, "timings": {**timing, "cells": cells}})
        failed.unlink(missing_ok=True)
        publish(temporary, target)
    return Run(name, folder, found, True, seconds)


def _settle(temporary: Path, notebook: Path, target: Path) -> list[float]:
    """Make the finished notebook name itself instead of papermill's temporary file; the seconds of its code cells."""
    content = json.loads(temporary.read_text(encoding="utf-8"))
    content["metadata"]["papermill"].update(input_path=notebook.name, output_path=target.name)
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    timed = [c["metadata"].get("papermill", {}).get("duration") for c in content["cells"] if c["cell_type"] == "code"]
    return [round(t or 0.0, 3) for t in timed]
