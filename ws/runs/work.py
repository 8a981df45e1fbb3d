"""What a Dask worker does: one run at a time, each in a process of its own, and ending those of a batch on request."""

import json
import os
import socket
import subprocess
import sys
import tempfile

import psutil

from ws.cache.places import root
from ws.runs.job import MARK
from ws.runs.once import Ending

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_environment(worker: object, threads: int, gpus: list[str]) -> dict[str, str]:
    """Environment of a run: the threads asked for (0: as the worker has it), the worker's own GPU of this machine."""
    environment = dict(os.environ)
    if threads:
        environment |= {name: str(threads) for name in THREADS}
    if gpus and isinstance(worker, int):
        environment["CUDA_VISIBLE_DEVICES"] = gpus[worker % len(gpus)]
    return environment


def work(spec: dict, batch: str, environment: dict, *needs: tuple[str, Ending]) -> tuple[str, Ending]:
    """The Dask task: one run, in a process of its own. Returns the run's name and how it ended."""
    from distributed import get_worker

    name, out = spec["name"], spec["place"][1]
    if lost := [need for need, ending in needs if not ending.ok]:
        return name, Ending("skipped", error=f"needs {lost[0]}")
    worker = get_worker()
    if not os.path.isdir(out):  # one that came after the batch had begun
        return name, Ending("failed", error=f"worker {worker.name} on {socket.gethostname()} does not see {out}")
    ended = None
    with tempfile.TemporaryFile("w+") as noise:
        process = subprocess.Popen(
            [sys.executable, "-m", "ws.runs.job", batch, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            cwd=root(),
            env=run_environment(worker.name, **environment) | {"WS_OUT": out},
            start_new_session=True,  # a Ctrl-C in the driver's terminal is the driver's to handle
        )
        try:
            process.stdin.write(json.dumps(spec, default=str))
            process.stdin.close()
            for line in process.stdout:
                told = json.loads(line.removeprefix(MARK)) if line.startswith(MARK) else {}
                if "state" in told:
                    ended = Ending(**told)
                elif "stage" in told or line.startswith("waiting for "):
                    worker.log_event(batch, (name, told.get("stage") or line.strip()))
        except BrokenPipeError:
            pass  # it died before it read what to do
        finally:
            if ended is None:
                process.terminate()
            code = process.wait()
        noise.seek(0)
        last = noise.read()[-4000:].strip()
    return name, ended or Ending("failed", error=f"{last}\nthe run's process ended with code {code}".strip())


def end_runs(batch: str) -> int:
    """On a worker: end the runs of a batch, kernels first; returns how many there were."""
    found = [child for child in psutil.Process().children() if batch in command_of(child)]
    for process in found:
        process.terminate()
    for process in psutil.wait_procs(found, timeout=10)[1]:
        process.kill()  # its kernel sees that and ends itself
    return len(found)


def command_of(process) -> list[str]:
    """A process's command line, [] when it is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []
