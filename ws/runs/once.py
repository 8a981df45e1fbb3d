"""Run a notebook with papermill, once: a run whose parameters, inputs and sources are unchanged is not run again.

A run is made in a scratch folder beside its own and appears in one rename when it ended well. One that raised is kept in
`failed/<time>/` of the run's folder, the last few; what is finished stays as it is.
"""

import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ws.cache.files import link, lock, publish_dir, scratch, write_json
from ws.cache.keys import Key, file_key
from ws.cache.made import mark_made
from ws.cache.names import RunId
from ws.cache.places import CLONE
from ws.runs import need
from ws.runs.execute import Hear, execute, terminable
from ws.runs.failed import keep_failed
from ws.runs.folders import Params, null_diffs, run_id
from ws.runs.html import headline_of
from ws.runs.identity import input_keys, others, outputs, products, record_of, run_key, run_state, told_why
from ws.runs.mend import damaged_input, mend, rendering
from ws.runs.notebooks import Place, notebook_of
from ws.runs.pairing import check_pair
from ws.runs.parameters import read_notebook, read_set, resolve

SHARED = 1000  # files of others that a run's folder may hold: they are carried over when the folder is replaced
VERSIONS = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy", "polars", "papermill")


@dataclass(frozen=True)
class Ending:
    """How a run ended. state: "done" (nothing to do), "ran", "failed", "skipped"; found: what was found before;
    why: the same with what changed; kept: where a failed try lies; unrendered: why the finished notebook has no page;
    next: the command that uses what was made, where that is not the usual one."""

    state: str
    found: str = ""
    seconds: float = 0.0
    error: str = ""
    folder: Path | None = None
    why: str = ""
    kept: Path | None = None
    unrendered: str = ""
    next: str = ""

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
    given: dict[str, object] = field(default_factory=dict)  # what was asked for; the rest are defaults

    @property
    def target(self) -> Path:
        return self.folder / f"{self.notebook}.ipynb"

    @property
    def identity(self) -> RunId:
        return run_id(self.values, notebook_of(self.notebook).dtype)

    @property
    def title(self) -> str:
        """Whose run it is, in words."""
        return notebook_of(self.notebook).title_of(self.values)

    @property
    def next(self) -> str:
        """How the weight difference is swept that was not trained in the usual way; '' for the usual one."""
        if not notebook_of(self.notebook).trains or self.values.get("W_PATH") or self.values.get("NULL_DIFF"):
            return ""
        usual = {"MODEL_ID": "tiny", "BEHAVIOR": "sycophancy", "ADAPTER": self.values.get("ADAPTER"), "SEED": 0}
        values = {**self.values, "ADAPTER": self.identity.adapter}
        words = [f"-p {key} {values[key]}" for key in usual if key in values and values[key] != usual[key]]
        return " ".join(["just nb v7_sweep", *words]) if values["ADAPTER"] != usual["ADAPTER"] else ""

    def key(self, place: Place, content: dict | None = None) -> Key:
        """Its key now; `content` is the notebook's where it was read before: it may be edited while it runs."""
        content = content or read_notebook(place.notebook(self.notebook))
        return run_key(self.notebook, content, self.values, place.out)

    def why(self, found: str, place: Place) -> str:
        """A state of this run for a reader, with what changed."""
        inputs = input_keys(self.notebook, self.values, place.out) if found == "changed inputs" else {}
        return told_why(self.notebook, self.folder, found, self.values, inputs)


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
    if "NULL_W_PATH" in values and not values["NULL_W_PATH"]:
        values["NULL_W_PATH"] = [str(path) for path in null_diffs(values, place.out).values()]
    folder = notebook_of(notebook).run_folder(values, place.out)
    asked = {key for layer in (params, *map(read_set, files)) for key in layer}
    given = {key: value for key, value in values.items() if key in asked}
    return Job(notebook, notebook, values | {"OUT_DIR": str(folder)}, folder, given=given)


def check_target(job: Job, place: Place) -> None:
    """ValueError where a run's folder cannot be written, or holds what must not be replaced by it."""
    folder = job.folder.resolve()
    above = next(p for p in (folder, *folder.parents) if p.exists() or p.is_symlink())
    advice = "choose another folder with -p OUT_DIR" + ("" if folder.is_relative_to(place.out) else " or WS_OUT")
    if not above.is_dir():
        raise ValueError(f"{job.notebook}: {above} is a file, no folder; {advice}")
    for needed in {above, above if above != folder else folder.parent}:
        try:
            with tempfile.TemporaryFile(dir=needed):
                pass
        except OSError as error:
            raise ValueError(f"{job.notebook}: {needed} cannot be written ({error.strerror}); {advice}") from None
    logs = next(p for p in (place.logs, *place.logs.parents) if p.exists())
    if not logs.is_dir() or not os.access(logs, os.W_OK | os.X_OK):
        raise ValueError(f"{job.notebook}: {logs}, the folder of logs, cannot be written; change that, or WS_OUT")
    if not folder.is_dir():
        return
    record = record_of(job.notebook, folder)
    if (title := record.get("title", job.title)) != job.title:
        raise ValueError(f"{folder}: holds the finished run of {title}, not of {job.title}; {advice}")
    for other in folder.glob(".made.*.ipynb.json"):  # another notebook's run, in its own place
        name = other.name.removeprefix(".made.").removesuffix(".ipynb.json")
        its = record_of(name, folder)
        if (
            name != job.notebook
            and folder == notebook_of(name).own_folder(its.get("parameters", {}), place.out).resolve()
        ):
            raise ValueError(f"{folder}: holds the finished run of {its.get('title', name)} ({name}); {advice}")
    theirs, own = (str(values.get("BEHAVIOR", "")) for values in (record.get("parameters", {}), job.values))
    if (
        theirs != own
        and Path(theirs).is_absolute()
        and record.get("inputs", {}).get(theirs) != (Path(own).is_file() and file_key(own))
    ):
        raise ValueError(f"{folder}: holds the finished run of {theirs}; give the behaviour in {own} another name")
    if len(others(job.notebook, folder)) > SHARED:
        raise ValueError(f"{folder}: holds more than {SHARED} files of others; give the run a folder of its own")


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
    check: Callable[[Job, Place], None] | None = None,
    given: Params | None = None,
) -> Ending:
    """Run nbs/NAME.ipynb with `params` (texts are parsed), unless that very run is done; `force` runs it anyway. files:
    of parameters, `params` win. cwd: where relative paths were typed. timeout: seconds that one cell may take.
    on_stage: hears which part of the notebook runs. check: looks at what the run will read and raises. given: which of
    `params` somebody asked for. A notebook that raises ends as "failed", its traceback in `error`, what was finished
    stays; wrong parameters raise ValueError / FileNotFoundError; an interrupt ends the kernel, the run stays
    unfinished."""
    place = place or Place()
    job = prepare(name, params or {}, files, cwd, place)
    job = job if given is None else replace(job, given=given)
    check_pair(place.notebook(name), edited=True)
    if not force and (done := _done(job, place, run_state(name, job.folder, job.key(place)))):
        return done
    need("papermill", "notebooks")
    check_pair(place.notebook(name))
    check_target(job, place)
    if damaged := damaged_input(name, job.values, place.out):
        raise ValueError(damaged)
    if check:
        check(job, place)
    with terminable(), lock(job.folder.parent, name=f".lock.{job.folder.name}"):
        content = read_notebook(place.notebook(name))
        key = job.key(place, content)
        found = run_state(name, job.folder, key)  # another process may have run it while this one waited
        if not force and (done := _done(job, place, found)):
            return done
        return _execute(job, found, key, content, place, timeout, quiet, on_stage)


def _done(job: Job, place: Place, found: str) -> Ending | None:
    """How a run ended that need not run: what can be made from its notebook and its record is made where it is missing."""
    if found != "done":
        return None
    unrendered = mend(job.notebook, job.folder)
    return Ending("done", found, folder=job.folder, unrendered=unrendered, next=job.next)


def _execute(
    job: Job, found: str, key: Key, content: dict, place: Place, timeout: int | None, quiet: bool, on_stage: Hear
) -> Ending:
    """Run the notebook in a scratch folder; publish that, or keep it as a failed try."""
    name, values, folder = job.notebook, job.values, job.folder
    notebook, why = place.notebook(name), job.why(found, place)
    place.logs.mkdir(parents=True, exist_ok=True)
    started = time.time()
    log_path = place.logs / f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}_{name}_{os.getpid()}.log"
    with log_path.open("w", buffering=1, encoding="utf-8") as log, scratch(folder) as work:
        work.mkdir()
        target = work / f"{name}.ipynb"
        log.write(f"{name} in {folder}\nwhy: {why}\n{json.dumps(values, indent=2, default=str)}\n\n")
        error = execute(notebook, values | {"OUT_DIR": str(work)}, target, place.out, log, timeout, quiet, on_stage)
        seconds = round(time.time() - started, 1)
        log.write(f"\n{error or 'ended well'} after {seconds} s\n")
        if not target.is_file():  # it died before its first cell
            target.write_bytes(notebook.read_bytes())
        cells, headline, figure = _settle(target, notebook, work, folder)
        timing = {"started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)), "seconds": seconds}
        about = {"notebook": name, "parameters": values, "source_revision": revision(), "versions": versions()}
        about["environment"] = {"threads": threads(), "cuda_devices": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
        told = {**about, "timings": {**timing, "cells": cells}}
        write_json(work / "params.json", told)
        if error:
            return Ending("failed", found, seconds, error, folder, why, keep_failed(name, values, folder, work, error))
        unrendered = rendering(target, job.title)
        # The run itself may have fetched a hub model; inputs and sources count as they were when it started.
        key = replace(key, params=job.key(place, content).params)
        record = {
            "notebook": name,
            "run": asdict(job.identity),
            "title": job.title,
            "seconds": seconds,
            "headline": headline,
            "figure": figure,
            "parameters": values,
        }
        record |= {"given": job.given, "told": told}
        record |= {"inputs": input_keys(name, values, place.out), "outputs": outputs(work)}
        mark_made(target, key, {**record, "products": products(name, folder, values, place.out)})
        for other in others(job.notebook, folder):
            clash = (work / other).exists()  # a file of somebody's own under a name of this run's
            link(folder / other, work / (f"{other}.before" if clash else other))
        publish_dir(work, folder)
    return Ending("ran", found, seconds, folder=folder, why=why, unrendered=unrendered, next=job.next)


def _settle(target: Path, notebook: Path, work: Path, folder: Path) -> tuple[list[float], str, str]:
    """Make the executed notebook name itself and its own folder instead of temporary ones; the seconds of its code
    cells, its headline and the file of its key figure."""
    content = read_notebook(target)
    content["metadata"].get("papermill", {}).update(input_path=notebook.name, output_path=target.name)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    for old, new in ((str(work), str(folder)), (work.name, folder.name)):
        text = text.replace(json.dumps(old, ensure_ascii=False)[1:-1], json.dumps(new, ensure_ascii=False)[1:-1])
    target.write_text(text, encoding="utf-8")
    timed = [c["metadata"].get("papermill", {}).get("duration") for c in content["cells"] if c["cell_type"] == "code"]
    return [round(t or 0.0, 3) for t in timed], *headline_of(content)
