"""Workers as Slurm jobs: submitted, watched, replaced when they are lost, cancelled at the end.

dask_jobqueue holds the scheduler and writes the job script (a site's `jobqueue.yaml` counts). It would neither tell that
sbatch refused a job nor notice that one was lost, so the commands of Slurm are called here.
"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote

from ws.cache.places import logs_folder, root
from ws.runs import need
from ws.runs.parameters import parse
from ws.runs.work import THREADS

POLL = 10.0  # seconds between two looks at squeue
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")
HOPELESS = "PartitionConfig PartitionNodeLimit PartitionTimeLimit BadConstraints InvalidAccount InvalidQOS".split()


class NoJobLeft(RuntimeError):
    """All Slurm jobs of a batch were lost, and so were those that replaced them."""


@dataclass(frozen=True)
class Slurm:
    """What a Slurm job of one worker asks for, and how many lost jobs are replaced in all; docs/scaling.md."""

    partition: str = ""
    account: str = ""
    walltime: str = "24:00:00"
    memory: str = "32GB"
    cores: int = 4
    gpus: int = 0
    replacements: int = 10


def make_slurm(given: dict[str, str]) -> Slurm:
    """A Slurm job's request from texts. Raises ValueError for an unknown key or a number that is none."""
    known = asdict(Slurm())
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"--slurm-set {unknown[0]}: known are {', '.join(known)}")
    slurm = Slurm(**{key: parse(key, text, known[key]) for key, text in given.items()})
    for key, least in {"cores": 1, "gpus": 0, "replacements": 0}.items():
        if getattr(slurm, key) < least:
            raise ValueError(f"--slurm-set {key} {getattr(slurm, key)}: at least {least}")
    if not re.fullmatch(r"\d+(\.\d+)? *[KMGT]i?B?", slurm.memory, re.IGNORECASE):
        raise ValueError(f"--slurm-set memory {slurm.memory}: a number and a unit, as in 32GB")
    return slurm


def certificate(folder: Path):
    """A new certificate and key as dask's Security, in files below the new `folder` that only their owner can read."""
    from distributed.security import Security

    made = Security.temporary()
    folder.mkdir(mode=0o700)
    for name, text in {"cert": made.tls_ca_file, "key": made.tls_client_key}.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_text(text)
    files = {
        f"tls_{role}_{name}": str(folder / name)
        for role in ("client", "scheduler", "worker")
        for name in ("cert", "key")
    }
    return Security(require_encryption=True, tls_ca_file=str(folder / "cert"), **files)


def slurm_cluster(slurm: Slurm, security, shared: Path):
    """A SLURMCluster without jobs. `shared`: a file that every node must see."""
    interrupt = signal.getsignal(signal.SIGINT)
    need("dask_jobqueue", "cluster")
    signal.signal(signal.SIGINT, interrupt)  # that import makes Ctrl-C end with exit code 0
    from dask_jobqueue import SLURMCluster

    blind = f"$(hostname) does not see {shared.parent}: workers and driver need a shared folder"
    return SLURMCluster(
        queue=slurm.partition or None,
        account=slurm.account or None,
        walltime=slurm.walltime,
        memory=slurm.memory,
        cores=1,
        processes=1,
        job_cpu=slurm.cores,
        job_extra_directives=[f"--gres=gpu:{slurm.gpus}"] if slurm.gpus else [],
        job_script_prologue=[
            f'[ -e {quote(str(shared))} ] || {{ echo "{blind}" >&2; exit 1; }}',
            f"cd {quote(str(root()))}",
            "export HF_HUB_OFFLINE=1",  # compute nodes often have no network; the models come from the hub cache
            "export DASK_DISTRIBUTED__WORKER__HTTP__ROUTES='[]'",  # its web pages ask nobody who he is
            *(f"export {name}={slurm.cores}" for name in THREADS),
        ],
        worker_extra_args=["--no-dashboard"],
        scheduler_options={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
        security=security,
        python=quote(sys.executable),
        n_workers=0,
    )


def job_script(cluster) -> str:
    """The script of every job of a started SLURMCluster; its worker is named after the job."""
    kind, options = cluster.new_spec["cls"], cluster.new_spec["options"]
    return kind(cluster.scheduler_address, name="slurm-$SLURM_JOB_ID", **options).job_script()


def call(*command: str, script: str | None = None) -> str:
    """What a command of Slurm prints. Raises ValueError with the command's own words."""
    try:
        done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        raise ValueError(f"{command[0]} was not found: --slurm runs on a login node of a Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} gave no answer in 120 s") from None
    if done.returncode:
        raise ValueError("; ".join(done.stderr.split("\n")).strip("; ") or f"{command[0]} ended with {done.returncode}")
    return done.stdout.strip()


def say(text: str) -> None:
    """A line above the bars of a batch."""
    from tqdm import tqdm

    tqdm.write(f"Slurm: {text}", file=sys.stderr)


@contextmanager
def submitted(script: str, slurm: Slurm, count: int, name: str) -> Iterator[Callable[[int], None]]:
    """`count` jobs under a job name that nothing else has. Yields what the batch calls with the number of unfinished
    runs: it replaces lost jobs and raises NoJobLeft when none is left. All are cancelled when the block ends. Raises
    ValueError with sbatch's words when it refuses the first job (with fewer than `count` the batch goes on), and where
    Slurm can start none."""
    logs = logs_folder()
    logs.mkdir(parents=True, exist_ok=True)
    sbatch = ("sbatch", "--parsable", "--no-requeue", f"--job-name={name}", f"--output={logs}/{name}-%j.log")
    jobs: list[str] = []
    ending: set[str] = set()  # COMPLETING when last seen: what ended them is known a little later
    due, told, spent, last = time.monotonic() + POLL, "", 0, ""

    def submit() -> str:
        """'' or why sbatch refused a job."""
        try:
            jobs.append(call(*sbatch, script=script).partition(";")[0])
        except ValueError as error:
            return str(error)
        return ""

    def loss(job: str, state: str, node: str) -> str:
        log = logs / f"{name}-{job}.log"
        lines = [x.strip() for x in log.read_text(errors="replace").split("\n") if x.strip()] if log.is_file() else []
        return f"job {job} is lost ({state}{node and ' on '}{node})" + (
            f"; its log ends: {lines[-1][:200]}" if lines else ""
        )

    def keep(runs: int) -> None:
        nonlocal due, told, spent, last
        if time.monotonic() < due:
            return
        due = time.monotonic() + POLL
        try:
            listed = call("squeue", "--noheader", "--states=all", f"--name={name}", "--format=%i|%T|%N|%r")
        except ValueError:
            return  # the controller does not answer: nothing is known
        seen = {job: tuple(rest) for job, *rest in (line.split("|", 3) for line in listed.splitlines())}
        for job in list(jobs):
            state, node, _ = seen.get(job, ("not listed any more", "", ""))
            if state == "COMPLETING" and job not in ending:
                ending.add(job)
            elif state not in ALIVE:
                jobs.remove(job)
                say(last := loss(job, state, node))
        if jobs and all(seen[job][2] in HOPELESS for job in jobs):
            raise ValueError(f"Slurm cannot start job {jobs[0]}: {seen[jobs[0]][2]}; see --slurm-set and `sinfo`")
        while len(jobs) < min(count, runs) and spent < slurm.replacements:
            spent += 1
            if no := submit():
                say(last := f"no replacement ({spent} of {slurm.replacements}): {no}")
                break
            say(f"job {jobs[-1]} was submitted in its place ({spent} of {slurm.replacements} replacements)")
        if not jobs and spent >= slurm.replacements:
            raise NoJobLeft(f"no Slurm job is left after {spent} replacements, {last}; run the same command again")
        states = [seen[job][0].lower() + f" ({seen[job][2]})" * (seen[job][2] != "None") for job in jobs if job in seen]
        now = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        if now and now != told:
            say(told := now)

    try:
        if last := submit():
            raise ValueError(last)
        while len(jobs) < count and not (last := submit()):
            pass
        if last:
            say(f"{len(jobs)} of {count} jobs were accepted: {last}")
        count = len(jobs)
        say(f"submitted {', '.join(jobs)}; logs: {logs}/{name}-*.log")
        yield keep
    finally:
        try:
            call("scancel", f"--name={name}")  # also one whose number did not come back
        except ValueError as error:
            if jobs:
                say(f"jobs may be left: scancel --name={name}: {error}")
