"""Run a notebook with papermill, once: a run whose parameters, inputs and sources are unchanged is not run again.

The executed notebook appears as OUT_DIR/NAME.ipynb only when it ended well; one that raised is kept beside it as
NAME.failed.ipynb.
"""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TextIO

from ws import parameters, store
from ws.config import LOGS, OUT, ROOT
from ws.pairing import check_pair
from ws.runs import outputs, run_folder, run_id, run_key, run_state

NBS = ROOT / "nbs"
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


class _Tee:
    """A text stream that papermill writes to, passed on to several."""

    def __init__(self, *streams: TextIO):
        self.streams = streams

    def write(self, text: str) -> None:
        for stream in self.streams:
            stream.write(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the kernel is ended too; only a main thread may do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _kernel_config() -> Iterator[object]:
    """Kernels over IPC sockets in a folder of their own: parallel kernels cannot race for ports.

    A socket's path is limited to about 100 characters; where the temporary folder is too deep, TCP serves.
    """
    from traitlets.config import Config

    with tempfile.TemporaryDirectory(prefix="ws-", ignore_cleanup_errors=True) as folder:
        path = f"{folder}/kernel.json"
        if os.name == "posix" and len(path) < 80:
            yield Config(KernelManager={"transport": "ipc", "connection_file": path})
        else:
            yield Config()


def revision() -> str:
    """The source revision (git), '+' appended when tracked files differ from it; 'unknown' outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        return (git("rev-parse", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "-uno") else "")
    except FileNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of Python, this package and what the numbers depend on."""
    from ws import __version__

    found = {"python": platform.python_version(), "ws": __version__}
    for package in VERSIONS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def run_notebook(
    name: str,
    params: dict[str, object] | None = None,
    out_dir: Path | str | None = None,
    timeout: int | None = None,
    *,
    files: list[Path] | tuple[Path, ...] = (),
    force: bool = False,
    cwd: Path | None = None,
    nbs: Path = NBS,
    out: Path = OUT,
    logs: Path = LOGS,
    quiet: bool = False,
) -> Run:
    """Run nbs/NAME.ipynb with `params` (texts are parsed), unless that very run is done; `force` runs it anyway.

    `files` are parameter files (explicit `params` win), `cwd` is where relative paths were typed, `timeout` the
    seconds one cell may take. A notebook that raises gives `ok=False` with its traceback in `error`; wrong parameters
    raise ValueError / FileNotFoundError. An interrupt ends the kernel and leaves the run unfinished.
    """
    notebook = nbs / f"{name}.ipynb"
    content = parameters.read_notebook(notebook)
    explicit = dict(params or {})
    if out_dir is not None:
        explicit["OUT_DIR"] = str(out_dir)
    values = parameters.resolve(name, content, explicit, files, cwd)
    if "OUT_DIR" not in values:
        raise ValueError(f"{name}: the notebook defines no parameter OUT_DIR, so nobody can say where its run goes")
    script = notebook.with_suffix(".py")
    newer = script.is_file() and script.stat().st_mtime > notebook.stat().st_mtime
    if newer:
        check_pair(notebook)
    folder = run_folder(name, values, out)
    values["OUT_DIR"] = str(folder)

    key = run_key(name, content, values, out)
    found = run_state(name, folder, key)
    if found == "done" and not force:
        if not (folder / f"{name}.html").is_file():
            from ws.report import render

            render(folder / f"{name}.ipynb", folder / f"{name}.html", title=name)
        return Run(name, folder, found, True, 0.0)
    if not newer:
        check_pair(notebook)
    target = folder / f"{name}.ipynb"
    with store.lock(folder, name=f".lock.{name}"):
        found = run_state(name, folder, key)  # another process may have run it while this one waited
        if found == "done" and not force:
            return Run(name, folder, found, True, 0.0)
        store.sweep(folder)
        store.sidecar(target).unlink(missing_ok=True)  # its outputs are about to change
        run = _execute(name, notebook, values, folder, found, timeout, logs, quiet)
        if not run.ok:
            store.mark_failed(target, key, run.error)
            return run
        key = run_key(name, content, values, out)  # the run itself may have fetched a hub model
        about = {"notebook": name, "run": asdict(run_id(values)), "seconds": run.seconds}
        store.mark_made(target, key, {**about, "outputs": outputs(name, folder)})
    return run


def _execute(
    name: str,
    notebook: Path,
    values: dict[str, object],
    folder: Path,
    found: str,
    timeout: int | None,
    logs: Path,
    quiet: bool,
) -> Run:
    """Run the notebook under a temporary name; publish it, its rendering and params.json, or the failed notebook."""
    from ws.report import render

    target, failed = folder / f"{name}.ipynb", folder / f"{name}.failed.ipynb"
    logs.mkdir(parents=True, exist_ok=True)
    started = time.time()
    log_path = logs / f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}_{name}_{os.getpid()}.log"
    with log_path.open("w", encoding="utf-8") as log, store.scratch(target) as temporary:
        log.write(f"{name} in {folder}\nwhy: {found}\n{json.dumps(values, indent=2, default=str)}\n\n")
        error = _papermill(name, notebook, temporary, values, timeout, log, quiet)
        seconds = round(time.time() - started, 1)
        log.write(f"\n{error or 'ended well'} after {seconds} s\n")
        if error:
            if not temporary.is_file():  # it died before its first cell
                temporary.write_bytes(notebook.read_bytes())
            store.publish(temporary, failed)
            for old in (target, folder / f"{name}.html"):
                old.unlink(missing_ok=True)  # they tell of results that this run may have replaced
            return Run(name, folder, found, False, seconds, error)
        _settle_paths(temporary, notebook, target)
        render(temporary, folder / f"{name}.html", title=name)
        timing = {"started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)), "seconds": seconds}
        about = {"notebook": name, "parameters": values, "source_revision": revision(), "versions": versions()}
        store.write_json(folder / "params.json", {**about, "timings": {**timing, "cells": _cell_seconds(temporary)}})
        failed.unlink(missing_ok=True)
        store.publish(temporary, target)
    return Run(name, folder, found, True, seconds)


def _papermill(
    name: str, notebook: Path, temporary: Path, values: dict[str, object], timeout: int | None, log: TextIO, quiet: bool
) -> str:
    """Execute; '' when the notebook ended well, else the traceback. Interrupts pass through, the kernel ended."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    # Kernels inherit it: a library's request for progress widgets, which a report could not show.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    try:
        with _terminable(), _kernel_config() as config:
            papermill.execute_notebook(
                str(notebook),
                str(temporary),
                parameters=values,
                progress_bar=False if quiet else {"desc": name, "mininterval": 1.0},
                stdout_file=_Tee(log),
                stderr_file=_Tee(log) if quiet else _Tee(log, sys.stderr),
                cwd=str(ROOT),
                execution_timeout=timeout,
                config=config,
                coalesce_streams=True,
            )
    except PapermillExecutionError as raised:
        return _plain("\n".join(raised.traceback)) or f"{raised.ename}: {raised.evalue}"
    except (RuntimeError, TimeoutError) as raised:  # a kernel that died, a cell over its time
        return f"{type(raised).__name__}: {raised}"
    return ""


def _plain(text: str) -> str:
    """Text without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).strip()


def _settle_paths(temporary: Path, notebook: Path, target: Path) -> None:
    """papermill notes the temporary name it wrote to; the finished notebook names itself."""
    content = json.loads(temporary.read_text(encoding="utf-8"))
    content["metadata"]["papermill"].update(input_path=notebook.name, output_path=target.name)
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _cell_seconds(notebook: Path) -> list[float]:
    """Seconds that each code cell took."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    timed = [c["metadata"].get("papermill", {}).get("duration") for c in cells if c["cell_type"] == "code"]
    return [round(t or 0.0, 3) for t in timed]
