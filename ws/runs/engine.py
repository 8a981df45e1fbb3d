"""Many runs on Dask distributed, one code path: a local cluster, a running one, or Slurm.

A Dask task (`work`) is one job of `grid` in a process of its own (`job`); when its worker dies, another gets it. What is
finished is known from the files alone, so that a batch can be killed anywhere and the same command goes on from there.

    threads of a run = cores of the machine // workers on it       (results repeat byte for byte under the same number)
"""

import logging
import os
import queue
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import psutil

from ws.cache.files import lock, sweep
from ws.cache.places import logs_folder, root
from ws.runs import need
from ws.runs.execute import terminable
from ws.runs.grid import Job, Step, plan
from ws.runs.mend import mend
from ws.runs.notebooks import Place
from ws.runs.once import Ending
from ws.runs.parameters import parse
from ws.runs.progress import Board, summary_text
from ws.runs.results import write_results
from ws.runs.work import THREADS, command_of, end_runs, work

LOCK = ".lock.batch"


@dataclass(frozen=True)
class Slurm:
    """What a Slurm job of one worker asks for; docs/scaling.md."""

    partition: str = ""
    account: str = ""
    walltime: str = "24:00:00"
    memory: str = "32GB"
    cores: int = 4
    gpus: int = 1


def make_slurm(given: dict[str, str]) -> Slurm:
    """A Slurm job's request from texts. Raises ValueError for an unknown key or a number that is none."""
    known = asdict(Slurm())
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"--slurm-set {unknown[0]}: known are {', '.join(known)}")
    return Slurm(**{key: parse(key, text, known[key]) for key, text in given.items()})


@dataclass(frozen=True)
class Settings:
    """Where runs are computed. workers: 0 chooses by the machine; threads: 0 chooses by workers; wait: for another
    batch on the same folder, instead of refusing; timeout: seconds one cell may take."""

    workers: int = 0
    threads: int = 0
    scheduler: str = ""
    slurm: Slurm | None = None
    wait: bool = False
    timeout: int | None = None


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


def slurm_cluster(slurm: Slurm):
    """A SLURMCluster without jobs yet: one worker per job, which computes one run at a time."""
    need("dask_jobqueue", "cluster")
    from dask_jobqueue import SLURMCluster

    # Compute nodes often have no network; the models come from the hub cache.
    exports = ["export HF_HUB_OFFLINE=1", *(f"export {name}={slurm.cores}" for name in THREADS)]
    return SLURMCluster(
        queue=slurm.partition or None,
        account=slurm.account or None,
        walltime=slurm.walltime,
        memory=slurm.memory,
        cores=1,
        processes=1,
        job_cpu=slurm.cores,
        job_extra_directives=[f"--gres=gpu:{slurm.gpus}"] if slurm.gpus else [],
        job_script_prologue=[f"cd {root()}", *exports],
        worker_extra_args=["--no-dashboard"],
        scheduler_options={"dashboard": False},
        log_directory=str(logs_folder()),
        python=sys.executable,
        n_workers=0,
    )


@contextmanager
def connect(settings: Settings, jobs: int) -> Iterator[tuple[object, dict]]:
    """A client of the cluster that `settings` name, and the environment of its runs: threads, GPUs to share out."""
    need("distributed", "batch")
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster

    threads, gpus = settings.threads, []
    if settings.scheduler:
        opened = nullcontext(settings.scheduler)
    elif settings.slurm:
        opened = slurm_cluster(settings.slurm)
    else:
        gpus = visible_gpus()
        workers, threads = local_size(settings, len(gpus), CPU_COUNT)
        plain = {"processes": True, "dashboard_address": None, "memory_limit": 0, "silence_logs": logging.CRITICAL}
        opened = LocalCluster(n_workers=min(workers, jobs), threads_per_worker=1, **plain)
    with opened as cluster, Client(cluster, timeout=30, set_as_default=False) as client:
        if settings.scheduler:
            client.wait_for_workers(1, timeout=60)
        elif settings.slurm:
            cluster.scale(jobs=min(settings.workers or jobs, jobs))
        yield client, {"threads": threads, "gpus": gpus}


def spec_of(step: Step, needs: list[Step], place: Place, settings: Settings) -> dict:
    """What `ws.runs.job` has to know of a step."""
    params = step.job.values | ({"RETRAIN": True} if step.retrain else {})
    return {
        "name": step.job.name,
        "run": {"name": step.job.notebook, "params": params, "force": step.retrain, "timeout": settings.timeout},
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
    with connect(settings, len(todo)) as (client, environment):
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


def run_jobs(jobs: list[Job], place: Place, settings: Settings, retrain: bool = False) -> tuple[dict[str, Ending], str]:
    """A whole batch: plan, run, results.parquet. Returns how each job ended and the summary. Raises
    ws.cache.files.Locked when another batch works on the same folder."""
    with terminable(), lock(place.out, None if settings.wait else 0, LOCK):
        sweep(place.out)
        steps = plan(jobs, retrain, place)
        started = time.monotonic()
        board = Board([step.job.name for step in steps if step.run], len(steps))
        try:
            endings = run_steps(steps, place, settings, board)
        finally:
            board.close()
            sweep(place.out)  # a worker that was killed cannot have tidied up
        write_results(place.out)
        for job in (step.job for step in steps if not step.run):
            mend(job.notebook, job.folder)
        after = plan(jobs, False, place)
        return endings, summary_text(after, endings, board.restarts, time.monotonic() - started)
