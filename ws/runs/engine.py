"""Many runs on Dask distributed, one code path: a local cluster, a running one, or Slurm.

A Dask task (`work`) is one job of `grid` in a process of its own (`job`); when its worker dies, another gets it. What is
finished is known from the files alone, so that a batch can be killed anywhere and the same command goes on from there.

    threads of a run = cores of the machine // workers on it       (results repeat byte for byte under the same number)
"""

import asyncio
import logging
import os
import queue
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from ws.cache.files import lock, scratch, sweep
from ws.runs import need, slurm
from ws.runs.execute import TEMPORARY, temporary_folder, terminable
from ws.runs.grid import Job, Step, plan
from ws.runs.mend import mend
from ws.runs.notebooks import Place
from ws.runs.once import Ending
from ws.runs.progress import Board, costs_of, plan_line, summary_text
from ws.runs.results import write_results
from ws.runs.slurm import Slurm
from ws.runs.work import command_of, end_runs, work

LOCK = ".lock.batch"


@dataclass(frozen=True)
class Settings:
    """Where runs are computed. workers: 0 chooses by the machine; threads: 0 chooses by workers; wait: for another
    batch on the same folder, instead of refusing; timeout: seconds one cell may take; tls, insecure: see `join`; pace: seconds
    per unit of `ws.runs.progress.COSTS`, where they are known."""

    workers: int = 0
    threads: int = 0
    scheduler: str = ""
    slurm: Slurm | None = None
    wait: bool = False
    timeout: int | None = None
    tls: tuple[Path, Path, Path] | None = None
    insecure: bool = False
    pace: float = 0.0

    def __post_init__(self) -> None:
        for name, least in {"workers": 0, "threads": 0, "timeout": 1}.items():
            if (given := getattr(self, name)) is not None and given < least:
                raise ValueError(f"--{name} {given}: expects a whole number, {least} or more")


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them; what is hidden there stays hidden."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu and gpu != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i, line in enumerate(x for x in listed.splitlines() if x.startswith("GPU "))]


def local_size(settings: Settings, gpus: int, cores: int) -> tuple[int, int]:
    """(workers, threads of each) on this machine: a worker per GPU, or per two cores. Never fewer because few runs are
    left: the thread count must be that of the undisturbed batch."""
    workers = settings.workers or gpus or max(1, cores // 2)
    return workers, settings.threads or max(1, cores // workers)


def join(address: str, tls: tuple[Path, Path, Path] | None, insecure: bool):
    """A client of a running scheduler. tls: files of the authority, of a certificate and of its key (None: those of
    Dask's configuration). Raises ValueError for a plain address without consent, and where nobody answers."""
    from distributed import Client
    from distributed.comm import connect as comm_to
    from distributed.security import Security

    if not address.startswith("tls://") and not insecure:
        raise ValueError(
            f"--scheduler {address}: without TLS whoever reaches it runs code as you; start it with TLS (docs/scaling.md)"
            " and give tls://HOST:PORT, or add --insecure"
        )
    files = dict(zip(("tls_ca_file", "tls_client_cert", "tls_client_key"), map(str, tls or ()), strict=False))
    for file in files.values():
        if not Path(file).is_file():
            raise FileNotFoundError(f"--tls {file}: no such file")
    security = Security(require_encryption=not insecure, **files)

    async def knock() -> None:  # a Client that finds nobody keeps the process alive for a minute
        comm = await comm_to(address, timeout=15, **security.get_connection_args("client"))
        await comm.close()

    try:
        asyncio.run(knock())
    except TypeError:  # what dask says where there is no certificate at all
        raise ValueError(f"--scheduler {address}: no certificate: give --tls CA CERT KEY (docs/scaling.md)") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--scheduler {address}: no connection: {str(error).splitlines()[0]}") from None
    client = Client(address, security=security, timeout=30, set_as_default=False)
    try:
        client.wait_for_workers(1, timeout=60)
    except TimeoutError:
        client.close()
        raise ValueError(f"--scheduler {address}: no worker came in 60 s; start some (docs/scaling.md)") from None
    return client


@contextmanager
def connect(
    settings: Settings, jobs: int, name: str, out: Path
) -> Iterator[tuple[object, dict, Callable[[int], None]]]:
    """A client of the cluster that `settings` name, the environment of its runs (threads, GPUs to share out), and what
    has to be called with the number of unfinished runs from time to time. Scheduler and workers that are started here
    talk to those alone who hold this batch's certificate. `name`: the batch's own; `out`: folder of all results."""
    need("distributed", "batch")
    import dask
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster

    # web pages ask nobody who he is
    closed = {f"distributed.{who}.http.routes": [] for who in ("scheduler", "worker")}
    # runs take minutes: Dask's sampling of each worker, 50 to 100 times a second, is a fifteenth of a core
    closed |= {"distributed.worker.profile.enabled": False, "distributed.admin.tick.interval": "1s"}
    closed |= {"distributed.admin.system-monitor.interval": "5s"}
    threads, gpus, keep = settings.threads, [], lambda runs: None
    with ExitStack() as stack:
        if settings.scheduler:
            client = stack.enter_context(join(settings.scheduler, settings.tls, settings.insecure))
        else:
            need("cryptography", "batch")
            stack.enter_context(dask.config.set(closed))
            if settings.slurm:
                security = slurm.certificate(stack.enter_context(scratch(out / "tls")))
                cluster = slurm.slurm_cluster(settings.slurm, security, out / LOCK)
            else:
                gpus = visible_gpus()
                workers, threads = local_size(settings, len(gpus), CPU_COUNT)
                cluster = LocalCluster(
                    n_workers=min(workers, jobs),
                    threads_per_worker=1,
                    processes=True,
                    memory_limit=0,
                    security=True,
                    dashboard_address=None,
                    scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # else it warns that 8787 is in use
                    silence_logs=logging.CRITICAL,
                )
            stack.enter_context(cluster)
            client = stack.enter_context(Client(cluster, timeout=30, set_as_default=False))
        if settings.slurm:
            count = min(settings.workers or jobs, jobs)
            keep = stack.enter_context(slurm.submitted(slurm.job_script(cluster), settings.slurm, count, name))
        yield client, {"threads": threads, "gpus": gpus}, keep


@contextmanager
def _dask_folder() -> Iterator[None]:
    """A temporary folder for what Dask of this process and of the workers below it puts on disk: nothing of it stays."""
    from dask import config

    with temporary_folder() as folder, config.set({"temporary-directory": str(folder)}):
        yield


def spec_of(step: Step, needs: list[Step], place: Place, settings: Settings) -> dict:
    """What `ws.runs.job` has to know of a step."""
    params = step.job.values | ({"RETRAIN": True} if step.retrain else {})
    return {
        "name": step.job.name,
        "run": {
            "name": step.job.notebook,
            "params": params,
            "force": step.retrain,
            "timeout": settings.timeout,
            "given": step.job.given,
        },
        "needs": [(need.job.notebook, str(need.job.folder)) for need in needs],
        "place": [str(place.nbs), str(place.out)],
    }


def run_steps(steps: list[Step], place: Place, settings: Settings, board: Board) -> dict[str, Ending]:
    """Run what has to run; how each job ended, by name. The caller holds the lock of `place.out`. The board hears what
    runs and how it ends. An interrupt ends all runs and their kernels before it passes on."""
    by_name = {step.job.name: step for step in steps}
    endings = {step.job.name: Ending("done") for step in steps if not step.run}
    todo = [step for step in steps if step.run]
    if not todo:
        return endings
    batch = f"ws-batch-{uuid.uuid4().hex[:12]}"
    heard: queue.Queue[tuple[str, object]] = queue.Queue()
    opened = connect(settings, len(todo), batch, place.out)
    with _dask_folder(), opened as (client, environment, keep):
        blind = [who for who, ok in client.run(os.path.exists, str(place.out / LOCK)).items() if not ok]
        if blind:
            raise ValueError(f"worker {blind[0]} does not see {place.out}: workers and driver need a shared folder")
        client.subscribe_topic(batch, lambda event: heard.put(event[1]))
        futures = {}
        try:
            for i, step in enumerate(todo):
                needs = [by_name[name] for name in step.job.needs]
                before = [futures[need.job.name] for need in needs if need.run]
                options = {"key": f"{step.job.notebook}-{batch}-{i}", "pure": False, "priority": -i}
                spec = spec_of(step, needs, place, settings)
                futures[step.job.name] = client.submit(work, spec, batch, environment, *before, **options)
                futures[step.job.name].add_done_callback(lambda done, name=step.job.name: heard.put((name, done)))
            while len(endings) < len(steps):
                keep(len(steps) - len(endings))
                try:
                    name, told = heard.get(timeout=0.5)
                except queue.Empty:
                    board.tick()
                    continue
                if isinstance(told, str):
                    board.stage(name, told)
                else:
                    endings[name] = _ending(told)
                    board.end(name, endings[name].state)
        except slurm.NoJobLeft as lost:
            slurm.say(str(lost))
            for name in [step.job.name for step in todo if step.job.name not in endings]:
                begun = name in board.begun
                endings[name] = Ending(*(("failed", str(lost)) if begun else ("skipped", "no Slurm job is left")))
                board.end(name, endings[name].state)
        except BaseException:
            _stop(client, batch, list(futures.values()))
            raise
    return endings


def _ending(future) -> Ending:
    """What a finished future holds; one that Dask gave up on (its workers kept dying) has failed."""
    if future.status == "finished":
        return future.result()[1]
    error = future.exception() if future.status == "error" else future.status
    return Ending("failed", error=f"{type(error).__name__}: {error}")


def _stop(client, batch: str, futures: list) -> None:
    """Start nothing more and end what runs, on every worker, kernels included."""
    here = [p for p in psutil.Process().children(recursive=True) if batch in command_of(p)]
    client.cancel(futures, force=True)
    for _ in range(100):  # half a minute
        try:
            if not any(client.run(end_runs, batch, on_error="ignore").values()):
                break
        except (OSError, RuntimeError, TimeoutError):
            break  # no cluster any more: the runs see that their workers are gone, and end
        time.sleep(0.3)
    psutil.wait_procs(here, timeout=20)


def run_jobs(
    jobs: list[Job],
    place: Place,
    settings: Settings,
    retrain: bool = False,
    check: Callable[[list[Step], Place], None] | None = None,
) -> tuple[dict[str, Ending], str]:
    """A whole batch: plan, run, results.parquet. check: looks at the plan before anything runs, and raises. Returns how
    each job ended and the summary. Raises ws.cache.files.Locked when another batch works on the same folder."""
    with terminable(), lock(place.out, None if settings.wait else 0, LOCK):
        sweep(place.out)
        steps = plan(jobs, retrain, place)
        if check:
            check(steps, place)
        started = time.monotonic()
        if not (settings.scheduler or settings.slurm):
            todo = max(1, sum(step.run for step in steps))
            print(
                plan_line(
                    steps, min(todo, local_size(settings, len(visible_gpus()), os.cpu_count() or 1)[0]), settings.pace
                ),
                flush=True,
            )
        board = Board(costs_of(steps), len(steps))
        try:
            endings = run_steps(steps, place, settings, board)
        finally:
            board.close()
            sweep(place.out)  # a worker that was killed cannot have tidied up
            sweep(tempfile.gettempdir(), TEMPORARY, below=False)
        write_results(place.out)
        for job in (step.job for step in steps if not step.run):
            mend(job.notebook, job.folder)
        after = plan(jobs, False, place)
        return endings, summary_text(after, endings, board.restarts, time.monotonic() - started)
