"""What a mistake costs: a command line, typed in a process that has already loaded everything.

`type_in` runs in a child of multiprocessing's fork server, which has imported this module: the seconds it tells are those of
the mistake itself, beyond loading.
"""

import contextlib
import importlib
import io
import json
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOADED = (
    "torch transformers peft polars scipy papermill nbclient nbconvert jinja2 tabulate jupytext yaml distributed"
    " ws.cli ws.demo ws.ready ws.lab ws.runs.engine ws.runs.index ws.runs.results ws.runs.execute"
    " transformers.models.qwen3.modeling_qwen3 transformers.models.llama.modeling_llama"
    " ipykernel.kernelapp scipy.stats scipy.optimize ws.explanation.explain ws.causal.check ws.stability.compare"
    " ws.use.benchmark ws.train.difference ws.theta.fitted ws.delta.measure"
).split()

if "pytest" not in sys.modules:  # in the fork server
    with contextlib.redirect_stderr(
        io.StringIO()
    ):  # warnings; which of them are silenced by whom stays as they left it
        for name in LOADED:
            importlib.import_module(name)


@dataclass(frozen=True)
class Told:
    """How a command ended. cpu: processor time in seconds, children included; wall: seconds; code: None where it was killed;
    err, out: what it said."""

    code: int | None
    cpu: float
    wall: float
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """The lines of the message, without bars: of stderr, or of stdout where it says nothing there."""
        sides = ([x for x in side.splitlines() if x.strip() and "%|" not in x] for side in (self.err, self.out))
        return next(filter(None, sides), [])


def cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def type_in(words: list[str], cwd: str, env: dict[str, str], base: str) -> None:
    """Call `ws` with `words`, seen from `cwd`; what it said goes to base.out, base.err, how it ended to base.json."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    for name in ("WS_OUT", "WS_TYPED_IN", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ.update(env)
    os.chdir(cwd)
    for fd, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{base}.{end}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    before, start, code = cpu(), time.monotonic(), None
    try:
        from ws.cli import main

        main(words)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    Path(f"{base}.json").write_text(json.dumps({"code": code, "cpu": cpu() - before, "wall": time.monotonic() - start}))
    os._exit(0)


def fork_server() -> ForkServerContext:
    """Processes of it have loaded everything. It starts when it is first asked for, once in a process."""
    context, before = get_context("forkserver"), os.environ.get("PYTHONPATH")
    context.set_forkserver_preload(["clumsy"])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests"), str(ROOT), before]))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


class Typing:
    """Processes that type commands; `folder` takes what they say."""

    def __init__(self, folder: Path):
        self.folder, self.n = folder, 0
        self.context = fork_server()

    def start(self, words: list[str], cwd: Path, env: dict[str, str]):
        self.n += 1
        base = self.folder / str(self.n)
        process = self.context.Process(target=type_in, args=(words, str(cwd), env, str(base)))
        process.start()
        return process, base

    def end(self, process, base: Path, timeout: float = 1200) -> Told:
        process.join(timeout)
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        ended = Path(f"{base}.json")
        about = json.loads(ended.read_text()) if ended.is_file() else {"code": None, "cpu": 0.0, "wall": 0.0}
        out, err = (Path(f"{base}.{end}").read_text(errors="replace") for end in ("out", "err"))
        return Told(**about, out=out, err=err)

    def __call__(self, words: list[str], cwd: Path, env: dict[str, str], timeout: float = 1200) -> Told:
        return self.end(*self.start(words, cwd, env), timeout)
