"""ws.runs.slurm: what is refused, lost or cancelled; drills on a real Slurm of one node where slurmctld is installed.

The drills need slurmctld, slurmd, munged (Debian: apt-get install slurm-wlm munge), root and dask_jobqueue.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from stubs import HOME, alive, copy_project, counts, end, start_driver, stub_jobs, tables, wait_for, write_project

from ws import cli
from ws.cache.places import root
from ws.runs import engine, slurm
from ws.runs.slurm import NoJobLeft, Slurm, make_slurm

NEEDED = ["slurmctld", "slurmd", "munged", "sbatch"]
ABSENT = [name for name in NEEDED if not shutil.which(name)]
ABSENT += ["dask_jobqueue"] * (importlib.util.find_spec("dask_jobqueue") is None) + ["root"] * (os.geteuid() != 0)
real = pytest.mark.skipif(bool(ABSENT), reason=f"no {', '.join(ABSENT)}")


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Slurm's commands, played: jobs are numbered, `squeue` tells `states`, `refuse` is what sbatch says from then on."""
    played = {"states": {}, "refuse": "", "scripts": [], "cancelled": [], "told": []}

    def call(*command, script=None):
        if command[0] == "sbatch":
            if played["refuse"]:
                raise ValueError(played["refuse"])
            played["scripts"].append(script)
            return f"{len(played['scripts'])};cluster"
        if command[0] == "scancel":
            played["cancelled"].append(command[1])
            return ""
        if played["states"] is None:
            raise ValueError("slurm_load_jobs error: Unable to contact slurm controller")
        states = {str(i + 1): "RUNNING|n1|None" for i in range(len(played["scripts"]))} | played["states"]
        return "\n".join(f"{job}|{state}" for job, state in states.items())

    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    monkeypatch.setattr(slurm, "call", call)
    monkeypatch.setattr(slurm, "POLL", 0.0)
    monkeypatch.setattr(slurm, "say", played["told"].append)
    return played


def test_a_job_asks_for_what_was_named():
    assert make_slurm({}).gpus == 0
    chosen = make_slurm({"partition": "gpu", "walltime": "08:00:00", "cores": "6", "gpus": "2", "replacements": "3"})
    assert chosen == Slurm("gpu", "", "08:00:00", "32GB", 6, 2, 3)
    for given, told in [
        ({"queue": "gpu"}, "--slurm-set queue: known are partition"),
        ({"cores": "0"}, "--slurm-set cores 0: at least 1"),
        ({"gpus": "-1"}, "--slurm-set gpus -1: at least 0"),
        ({"memory": "much"}, "--slurm-set memory much: a number and a unit"),
        ({"replacements": "many"}, "replacements: expects"),
    ]:
        with pytest.raises(ValueError, match=told):
            make_slurm(given)


def test_the_job_script_carries_tls_and_what_a_worker_needs(tmp_path):
    pytest.importorskip("dask_jobqueue")
    (tmp_path / "out put").mkdir()
    shared = tmp_path / "out put" / "lock"
    security = slurm.certificate(tmp_path / "out put" / "tls")
    wanted = make_slurm({"partition": "gpu", "walltime": "08:00:00", "cores": "6", "gpus": "1"})
    with slurm.slurm_cluster(wanted, security, shared) as cluster:
        lines = slurm.job_script(cluster).splitlines()
        assert cluster.scheduler_address.startswith("tls://") and not cluster.workers
    for line in ("-p gpu", "-t 08:00:00", "--cpus-per-task=6", "--gres=gpu:1", "-n 1"):
        assert f"#SBATCH {line}" in lines
    assert not any("-A" in line.split() for line in lines)
    assert {"export HF_HUB_OFFLINE=1", "export OMP_NUM_THREADS=6", f"cd {root()}"} <= set(lines)
    command = lines[-1]
    assert command.startswith(sys.executable) and "--nthreads 1" in command and "--no-dashboard" in command
    assert " tls://" in command and "--name slurm-$SLURM_JOB_ID" in command and "BEGIN" not in "\n".join(lines)
    script = "\n".join([*lines[:-1], "echo " + command])
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert told.returncode == 1 and f"does not see {shared.parent}: workers and driver need" in told.stderr
    shared.touch()
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout.rstrip()
    for name, option in {"cert": "--tls-cert", "key": "--tls-key"}.items():
        file = tmp_path / "out put" / "tls" / name
        assert file.stat().st_mode & 0o777 == 0o600 and f"{option} {file}" in told  # one word to the shell
    assert file.parent.stat().st_mode & 0o777 == 0o700
    with slurm.slurm_cluster(Slurm(), security, shared) as cluster:
        assert "gres" not in slurm.job_script(cluster)


def test_a_refused_first_job_ends_the_batch_with_sbatchs_words(commands):
    commands["refuse"] = "sbatch: error: Invalid generic resource (gres) specification"
    with pytest.raises(ValueError, match="^sbatch: error: Invalid generic"), slurm.submitted("S", Slurm(), 2, "ws-b"):
        pytest.fail("the batch began")
    assert commands["scripts"] == []


def test_lost_jobs_are_replaced_up_to_the_stated_number(commands):
    with slurm.submitted("S", Slurm(replacements=2), 2, "ws-b") as keep:
        keep(9)
        assert len(commands["scripts"]) == 2 and commands["told"][-1] == "2 running"
        log = slurm.logs_folder() / "ws-b-1.log"
        log.write_text("a\nslurmstepd: error: *** JOB 1 CANCELLED ***\n\n")
        commands["states"]["1"] = "COMPLETING|n1|None"
        keep(9)
        assert len(commands["scripts"]) == 2  # what ended it is known in a moment
        commands["states"]["1"] = "CANCELLED|n1|None"
        keep(9)
        assert commands["scripts"] == ["S"] * 3
        assert "job 1 is lost (CANCELLED on n1); its log ends: slurmstepd: error: *** JOB 1" in commands["told"][-3]
        commands["states"] = None  # slurmctld restarts: nobody is lost
        keep(9)
        commands["states"] = {"1": "CANCELLED|n1|None", "2": "COMPLETED|n1|None"}
        keep(1)
        assert len(commands["scripts"]) == 3  # one run is left, and one worker
        commands["states"] |= {"3": "TIMEOUT|n1|None"}
        keep(1)
        assert len(commands["scripts"]) == 4 and "2 of 2 replacements" in commands["told"][-1]
        commands["states"] |= {"4": "NODE_FAIL|n2|None"}
        with pytest.raises(NoJobLeft, match=r"after 2 replacements, job 4 is lost \(NODE_FAIL on n2\); run the same"):
            keep(1)
    assert commands["cancelled"] == ["--name=ws-b"]


def test_a_batch_goes_on_with_the_jobs_it_has(commands, monkeypatch):
    with slurm.submitted("S", Slurm(replacements=1), 2, "ws-b") as keep:
        commands["refuse"] = "sbatch: error: QOSMaxSubmitJobPerUserLimit"
        commands["states"]["1"] = "NODE_FAIL|n1|None"
        keep(5)
        keep(5)
        assert "no replacement (1 of 1): sbatch: error: QOSMax" in "\n".join(commands["told"])
        commands["states"] = {"2": "PENDING||PartitionTimeLimit"}
        with pytest.raises(ValueError, match="^Slurm cannot start job 2: PartitionTimeLimit"):
            keep(5)
    commands["refuse"], accepted = "", len(commands["scripts"])
    real_call = slurm.call

    def once(*command, script=None):
        if command[0] == "sbatch" and len(commands["scripts"]) > accepted:
            commands["refuse"] = "sbatch: error: limit"
        return real_call(*command, script=script)

    monkeypatch.setattr(slurm, "call", once)
    with slurm.submitted("S", Slurm(), 3, "ws-c"):
        assert "1 of 3 jobs were accepted: sbatch: error: limit" in commands["told"]


def test_a_batch_without_jobs_ends_with_its_summary(monkeypatch, tmp_path, capsys):
    place = write_project(tmp_path)
    future = SimpleNamespace(add_done_callback=lambda call: None)
    client = SimpleNamespace(run=lambda *a: {}, subscribe_topic=lambda *a: None, submit=lambda *a, **options: future)

    @contextmanager
    def connect(*args):
        yield client, {}, keep

    def keep(runs):
        assert runs == 6
        raise NoJobLeft("no Slurm job is left after 10 replacements")

    monkeypatch.setattr(engine, "connect", connect)
    endings, summary = engine.run_jobs(stub_jobs(place), place, engine.Settings(slurm=Slurm()))
    assert {ending.state for ending in endings.values()} == {"skipped"} and len(endings) == 6
    assert "no Slurm job is left" in summary and "run the same command again" in summary
    assert "Slurm: no Slurm job is left after 10 replacements\n" in capsys.readouterr().err


def test_what_slurms_commands_say(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="^sbatch was not found: --slurm runs on a login node of a Slurm cluster$"):
        slurm.call("sbatch")
    (tmp_path / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: one' >&2; echo 'sbatch: error: two' >&2; exit 1\n"
    )
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(ValueError, match="^sbatch: error: one; sbatch: error: two$"):
        slurm.call("sbatch")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--slurm --slurm-set queue gpu", "--slurm-set queue: known are"),
        ("--slurm-set gpus 1", "--slurm-set is for --slurm"),
        ("--slurm --scheduler tls://h:1", "choose one"),
        ("--insecure", "--tls and --insecure are for --scheduler"),
        ("--slurm --slurm-set cores four", "cores: expects"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_planned(words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["batch", "--dry-run", *words.split()])
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and told in error and error.startswith("error: ") and "\n" not in error


# Drills on a real Slurm

CONF = """
ClusterName=drill
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthInfo=socket={base}/munge.sock
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
"""
DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from stubs import Place, stub_jobs
from ws import cli
from ws.runs import grid, notebooks

if __name__ == "__main__":
    place = Place(nbs=Path({base!r}) / "nbs", out=Path({base!r}) / "out")
    notebooks.Place = lambda: place
    grid.make_jobs = lambda *args: stub_jobs(place)
    cli.main(["batch", "--workers", "2", "--slurm", *sys.argv[1:]])
"""
SMALL = "--slurm-set cores 1 --slurm-set memory 500MB"


@pytest.fixture(scope="module")
def daemons():
    """munged, slurmctld and slurmd of one node, with their own key, socket and ports; `daemons["slurmd"]()` restarts it."""
    base = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    base.chmod(0o755)
    (base / "munge.key").write_bytes(os.urandom(128))
    (base / "munge.key").chmod(0o400)
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1], two.getsockname()[1]]
    host = socket.gethostname().split(".")[0]
    conf = base / "slurm.conf"
    conf.write_text(CONF.format(base=base, host=host, ports=ports))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    munge = ["munged", "--foreground", "--force", f"--key-file={base}/munge.key", f"--socket={base}/munge.sock"]
    munge += [f"--{name}-file={base}/munged.{name}" for name in ("pid", "log", "seed")]
    commands = {"munged": munge, "slurmctld": ["slurmctld", "-D"], "slurmd": ["slurmd", "-D"]}
    running: dict[str, subprocess.Popen] = {}

    def start(name: str) -> None:
        if name in running:
            running[name].terminate()
            running[name].wait(timeout=30)
        log = (base / f"{name}.log").open("a")
        running[name] = subprocess.Popen(commands[name], stdout=log, stderr=log)

    try:
        start("munged")
        wait_for((base / "munge.sock").exists, what="munged")
        start("slurmctld")
        start("slurmd")
        wait_for(lambda: "idle" in asked("sinfo", "-h", "-o", "%T"), what=f"the node ({base})")
        yield {name: lambda name=name: start(name) for name in commands}
    finally:
        asked("scancel", "--user=root")
        wait_for(lambda: not asked("squeue", "-h"), 60, "the end of the jobs")
        for process in reversed(running.values()):
            process.terminate()
            process.wait(timeout=30)
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)
        shutil.rmtree(base)


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    base = tmp_path_factory.mktemp("whole")
    place = write_project(base)
    assert start_driver(base).wait(timeout=120) == 0, (base / "driver.log").read_text()
    return base, tables(place)


def start_slurm(base: Path, words: str = SMALL) -> subprocess.Popen:
    """`ws batch --slurm` on a project, in a process group of its own."""
    script = base / "slurm_driver.py"
    script.write_text(DRIVER.format(tests=str(Path(__file__).parent), base=str(base)))
    environment = {**os.environ, "PYTHONPATH": str(HOME), "WS_OUT": str(base / "out")}
    with (base / "driver.log").open("a") as log:
        said = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True, "env": environment}
        return subprocess.Popen([sys.executable, str(script), *words.split()], cwd=base, **said)


def told(base: Path) -> str:
    logs = "".join(f"\n== {log.name}\n{log.read_text()}" for log in sorted((base / "logs").glob("*.log")))
    return (base / "driver.log").read_text() + logs


def hung(base: Path, name: str) -> int:
    wait_for((base / "pids" / name).is_file, 120, f"the kernel of {name}")
    return int((base / "pids" / name).read_text())


def job_of(pid: int) -> str:
    return psutil.Process(pid).environ()["SLURM_JOB_ID"]


def alive_jobs() -> list[str]:
    return [line for line in asked("squeue", "-h", "-o", "%i %T").splitlines() if "COMPLETING" not in line]


def nothing_is_left(base: Path) -> None:
    assert not alive_jobs()
    left = [p for pattern in (".tmp-*", ".lock*", "failed") for p in (base / "out").rglob(pattern)]
    assert not left, left


@real
@pytest.mark.slow
def test_a_cancelled_job_and_a_restarted_slurmd(daemons, whole, tmp_path):
    """One job is cancelled under its run, then slurmd and slurmctld restart under another run: nothing is lost."""
    place = write_project(tmp_path)
    (tmp_path / "traps" / "hang-weight_diff-1").touch()
    (tmp_path / "traps" / "hang-v7_sweep-0").touch()
    driver = start_slurm(tmp_path)
    try:
        kernel = hung(tmp_path, "weight_diff-1")
        keys = list((tmp_path / "out").rglob("key"))
        assert len(keys) == 1 and keys[0].stat().st_mode & 0o777 == 0o600
        assert asked("scancel", job_of(kernel)) == ""
        wait_for(lambda: not alive(kernel), what="the end of the cancelled job's kernel")
        (tmp_path / "traps" / "hang-weight_diff-1").unlink()
        kernel = hung(tmp_path, "v7_sweep-0")
        daemons["slurmd"]()
        daemons["slurmctld"]()
        time.sleep(12)  # the batch asks squeue in the middle and after
        assert alive(kernel)
        (tmp_path / "traps" / "hang-v7_sweep-0").unlink()
        assert driver.wait(timeout=180) == 0, told(tmp_path)
    finally:
        end(driver)
    assert tables(place) == whole[1]
    assert counts(tmp_path) == {**counts(whole[0]), "weight_diff-1": 2}
    assert "is lost (CANCELLED on" in told(tmp_path) and "(1 of 10 replacements)" in told(tmp_path), told(tmp_path)
    nothing_is_left(tmp_path)


@real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--slurm-set gpus 1", "error: sbatch: error: Invalid generic resource (gres) specification"),
        ("--slurm-set partition nowhere", "Batch job submission failed: Invalid partition name specified"),
    ],
)
def test_a_refused_job_ends_the_batch(daemons, tmp_path, words, line):
    write_project(tmp_path)
    driver = start_slurm(tmp_path, f"{SMALL} {words}")
    try:
        assert driver.wait(timeout=60) == 2, told(tmp_path)
    finally:
        end(driver)
    said = (tmp_path / "driver.log").read_text().strip()
    assert line in said and len(said.splitlines()) == 1, said
    assert not counts(tmp_path)
    nothing_is_left(tmp_path)


@real
@pytest.mark.slow
def test_no_job_is_left(daemons, whole, tmp_path):
    """Both jobs are cancelled and none may be replaced: the batch ends, and the same command goes on from there."""
    place = write_project(tmp_path)
    trap = tmp_path / "traps" / "hang-weight_diff-1"
    trap.touch()
    driver = start_slurm(tmp_path, f"{SMALL} --slurm-set replacements 0")
    try:
        hung(tmp_path, "weight_diff-1")
        asked("scancel", "--user=root")
        assert driver.wait(timeout=60) == 1, told(tmp_path)
    finally:
        end(driver)
    assert "Slurm: no Slurm job is left after 0 replacements, job " in told(tmp_path), told(tmp_path)
    assert "run the same command again" in told(tmp_path) and "Traceback" not in told(tmp_path)
    nothing_is_left(tmp_path)
    trap.unlink()
    assert start_slurm(tmp_path).wait(timeout=180) == 0, told(tmp_path)
    assert tables(place) == whole[1] and counts(tmp_path)["weight_diff-1"] == 2
    nothing_is_left(tmp_path)


@real
@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "kill -9"])
def test_the_driver_is_stopped(daemons, whole, tmp_path, how):
    """Ctrl-C cancels the jobs; after kill -9 the workers miss their scheduler and end."""
    place = copy_project(whole[0], tmp_path, "seed_1", "v7b_seeds0-1")
    trap = tmp_path / "traps" / "hang-weight_diff-1"
    trap.touch()
    driver = start_slurm(tmp_path)
    try:
        kernel = hung(tmp_path, "weight_diff-1")
        began = time.monotonic()
        if how == "Ctrl-C":
            os.killpg(driver.pid, signal.SIGINT)
            assert driver.wait(timeout=60) == 130, told(tmp_path)
            assert not alive_jobs() and "Traceback" not in (tmp_path / "driver.log").read_text()
        else:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
        wait_for(lambda: not asked("squeue", "-h"), 120, "the end of the jobs")
        wait_for(lambda: not alive(kernel), 30, "the end of the kernel")
        print(json.dumps({how: round(time.monotonic() - began, 1)}))
    finally:
        end(driver)
    trap.unlink()
    assert start_slurm(tmp_path).wait(timeout=180) == 0, told(tmp_path)
    assert tables(place) == whole[1] and counts(tmp_path)["weight_diff-1"] == 2
    nothing_is_left(tmp_path)
