"""Execute one notebook in a kernel of its own with papermill: its log, its progress, its end.

An exception that leaves this module (an interrupt; SIGTERM within `terminable`) has ended the kernel; a kernel also ends
by itself when the process that started it is gone.
"""

import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

from ws.cache.files import scratch
from ws.cache.places import root
from ws.runs.notebooks import Params
from ws.runs.parameters import is_tagged, read_notebook, source_of

Hear = Callable[[str], None] | None
KERNEL = {  # environment of a kernel, where it says nothing else
    "GOMP_SPINCOUNT": "10000",  # waking a thread takes longer than small products; long spins stall others on shared cores
    "OPENBLAS_THREAD_TIMEOUT": "4",  # the same of numpy's and scipy's threads, which torch's take turns with
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),  # glibc: freed tensors are used again, not given back and asked for, page
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),  # by page, at every step
}
TEMPORARY = "ws"  # ends the names of folders in the system's temporary one


def _stream(*tell: Callable[[str], object]) -> SimpleNamespace:
    """What papermill and its progress bar write to: every text is handed on."""
    return SimpleNamespace(write=lambda text: [hear(text) for hear in tell], flush=lambda: None)


def _bars(text: str) -> None:
    """Of what a notebook prints, its progress bars on the terminal."""
    if "\r" in text or text == "\n":
        sys.stderr.write(text)


@contextmanager
def terminable() -> Iterator[None]:
    """Turn the first SIGTERM into an exception, so that the kernel is ended and temporary files are removed; later ones
    do not disturb that. Only a main thread may do so: elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of this process in the system's temporary one. What a killed process left there, the next one removes."""
    with scratch(Path(tempfile.gettempdir()) / TEMPORARY) as folder:
        folder.mkdir(mode=0o700)
        yield folder


@contextmanager
def _kernels(out: Path) -> Iterator[object]:
    """The configuration of kernels that take `out` for the folder of all results, with a temporary folder of their own.
    In it are the IPC sockets: parallel kernels cannot race for ports. A socket's path is limited to about 100
    characters; where the temporary folder is too deep, TCP serves."""
    from traitlets.config import Config

    before = {name: os.environ.get(name, "") for name in ("WS_OUT", "TMPDIR")}  # empty says the same as absent
    try:
        with temporary_folder() as folder:
            os.environ |= {"WS_OUT": str(out.absolute()), "TMPDIR": str(folder)}
            path = str(folder / "kernel.json")
            transport = "ipc" if os.name == "posix" and len(path) < 100 else "tcp"
            yield Config(KernelManager={"transport": transport, "connection_file": path})
    finally:
        os.environ |= before


def execute(
    path: Path, values: Params, target: Path, out: Path, log: TextIO, timeout: int | None, quiet: bool, on_stage: Hear
) -> str:
    """Run the notebook at `path` with `values`, write it to `target` after every cell. The kernel takes `out` for the
    folder of all results. '' when it ended well, else the traceback. Interrupts pass through, the kernel ended. `log`
    gets what the notebook prints, `timeout` is the seconds one cell may take, `on_stage` hears the heading of what
    runs."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    for name, value in KERNEL.items():
        os.environ.setdefault(name, value)
    bar: bool | dict = False if quiet else {"desc": path.stem, "mininterval": 1.0}
    if on_stage:
        headings = _headings(path)

        def heading(text: str) -> None:  # of the cell after those that are done
            if found := re.search(r"(\d+)/\d+", text):
                on_stage(headings[min(int(found[1]), len(headings) - 1)])

        bar = {"file": _stream(heading), "bar_format": "{n_fmt}/{total_fmt}", "mininterval": 0, "miniters": 1}
    try:
        with _kernels(out) as config:
            papermill.execute_notebook(
                path,
                target,
                parameters=values,
                progress_bar=bar,
                stdout_file=log if quiet else _stream(log.write, _bars),
                stderr_file=log if quiet else _stream(log.write, sys.stderr.write),
                cwd=root(),
                execution_timeout=timeout,
                config=config,
                coalesce_streams=True,
            )
    except PapermillExecutionError as raised:
        text = "\n".join(raised.traceback)
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).strip() or f"{raised.ename}: {raised.evalue}"
    except (RuntimeError, TimeoutError) as raised:  # a kernel that died, a cell over its time
        return f"{type(raised).__name__}: {raised}"
    return ""


def _headings(path: Path) -> list[str]:
    """Per cell of the executed notebook (papermill adds one after the parameters) the heading it stands under."""
    headings, last = [], "start"
    for cell in read_notebook(path)["cells"]:
        if cell["cell_type"] == "markdown" and (found := re.search(r"^#+ +(.+)$", source_of(cell), re.M)):
            last = found[1].strip()
        headings += [last] * (2 if is_tagged(cell) else 1)
    return headings
