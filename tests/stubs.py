"""The notebooks of a batch and of the demo in small: no model, planted numbers, and traps that a test can set and take away.

A trap is a file in `traps/`: `hang-NAME` keeps a run's kernel waiting (its pid is in `pids/NAME`), `raise-NAME` makes it
raise. NAME is `weight_diff-1`, `null-0`, `v7_sweep-1`, `causal_check-1`, `benchmark-0`, `v7b_stability`. `counts/NAME`
grows by one letter per run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from test_batch import write_notebook

from ws.runs.grid import Grid, Job, make_jobs
from ws.runs.notebooks import Place
from ws.runs.slurm import certificate

HOME = Path(__file__).parents[1]
LORA = "org__stub/stub/lora"  # of no model that the package ships: nothing here depends on one
RUN = "org__stub stub lora"
START = """
import json, os, time
from pathlib import Path
from ws.cache.files import write_text
folder = Path(OUT_DIR)
BASE = next(p for p in folder.parents if (p / "traps").is_dir())  # a project may be copied
with (BASE / "counts" / name).open("a") as count:
    count.write("x")
if (BASE / "traps" / f"hang-{name}").exists():
    write_text(BASE / "pids" / name, str(os.getpid()))
    while (BASE / "traps" / f"hang-{name}").exists():
        time.sleep(0.05)
if (BASE / "traps" / f"raise-{name}").exists():
    raise RuntimeError(f"planted in {name}")
"""
WEIGHT_DIFF = """
w = [(7 * SEED + 3 * i + SCALE) % 11 / (1 + NULL_DIFF) for i in range(500)]
write_text(folder.parent / "w.safetensors", json.dumps(w))
write_text(folder / "w.txt", f"{sum(w)}\\n")
"""
SWEEP = """
w, null = json.loads((folder.parent / "w.safetensors").read_text()), json.loads(Path(NULL_W_PATH[0]).read_text())
rows = [f"candidate_{c}\\twrite\\t{sum(w[c::3]) / 7!r}\\t{sum(w[c::3]) / sum(null[c::3])!r}" for c in range(3)]
write_text(folder / "v7_summary.tsv", "\\n".join(["subspace\\tkind\\tjoint_score\\tR_w_vs_null_diff", *rows]) + "\\n")
write_text(folder / "v7_per_layer.csv", f"layer,conc_act\\n0,{sum(w)}\\n")
write_text(folder / "explanation.json", json.dumps({"w": sum(w)}))
"""
CAUSAL = """
seeds = sorted(int(p.parent.name[5:]) for p in folder.parent.parent.glob("seed_*/w.safetensors"))
other = next((s for s in seeds if s != SEED), None) if OTHER_SEED is None else OTHER_SEED
swept = {s: folder.parent.parent / f"seed_{s}" / PROTOCOL / "explanation.json" for s in (SEED, other) if s is not None}
own, *others = (json.loads(path.read_text())["w"] for path in swept.values())  # both sweeps must be there
columns = "subspace effect retention energy linear excess excess_low excess_high p p_max excess_forward p_forward saturated"
rows = [f"candidate_{c}" + f"\\t{own + c}" * 12 for c in range(2)]  # of two of three candidates
write_text(folder / "causal_candidates.tsv", "\\n".join([columns.replace(" ", "\\t"), *rows]) + "\\n")
write_text(folder / "causal.json", json.dumps({"w": own, "other": others, "draws": DRAWS}))
"""
BENCHMARK = """
checks = sorted(p.parent.parent.name for p in folder.parent.parent.glob("seed_*/causal/causal.json"))
write_text(folder / "benchmark.tsv", "size\\tchecks\\n" + f"{SIZE}\\t{' '.join(checks)}\\n")
"""
STABILITY = """
means = []
for seed in SEEDS:
    rows = (folder.parent / f"seed_{seed}" / "v7b" / "v7_summary.tsv").read_text().splitlines()[1:]
    means.append(sum(float(row.split("\\t")[2]) for row in rows) / 3)
write_text(folder / "v7b_summary.tsv", "seed\\tmean\\n" + "".join(f"{s}\\t{m!r}\\n" for s, m in zip(SEEDS, means)))
checks = [s for s in SEEDS if (folder.parent / f"seed_{s}" / "causal" / "causal.json").is_file()]
write_text(folder / "checked.txt", json.dumps(checks))
"""
OWN = 'MODEL_ID = "tiny"\nBEHAVIOR = "sycophancy"\nADAPTER = "lora"\nOUT_DIR = ""\n'


def write_project(base: Path) -> Place:
    """Notebooks and folders of a small project below `base`."""
    for name in ("counts", "traps", "pids", "nbs/params"):
        (base / name).mkdir(parents=True)
    (base / "stub.json").write_text("{}")
    (base / "nbs" / "params" / "v7b.yaml").write_text("PROTOCOL: v7b\n")
    own = OWN + 'SEED = 0\nW_PATH = ""\n'
    trained = own + "NULL_DIFF = False\nRETRAIN = False\nSCALE = 1"
    checking = 'NULL_W_PATH = []\nPROTOCOL = "v7b"\nOTHER_SEED = None\nSUBSPACES = []\nALPHA = 1.0\nDRAWS = 10000'
    beside = 'PROTOCOL = "v7b"\nSUBSPACE = ""\nALONG = "texts"\nKL_TARGET = [0.1]\nSIZE = "full"'
    bodies = {
        "weight_diff": ('name = f"null-{SEED}" if NULL_DIFF else f"weight_diff-{SEED}"', WEIGHT_DIFF, trained),
        "v7_sweep": ('name = f"v7_sweep-{SEED}"', SWEEP, own + 'NULL_W_PATH = []\nPROTOCOL = "v7"\nCANDIDATES = []'),
        "causal_check": ('name = f"causal_check-{SEED}"', CAUSAL, own + checking),
        "benchmark": ('name = f"benchmark-{SEED}"', BENCHMARK, own + beside),
        "v7b_stability": ('name = "v7b_stability"', STABILITY, OWN + "SEEDS = [0, 1, 2]\nCANDIDATES = []"),
    }
    for notebook, (name, body, parameters) in bodies.items():
        write_notebook(base / "nbs", notebook, name + START, body, parameters_cell=parameters)
    return Place(nbs=base / "nbs", out=base / "out")


def copy_project(source: Path, base: Path, *without: str) -> Place:
    """A copy of a project, without some folders below its adapter's folder; its runs count from zero again."""
    shutil.copytree(source, base, dirs_exist_ok=True)
    for name in without:
        shutil.rmtree(base / "out" / LORA / name)
    for folder in ("counts", "traps", "pids"):
        for file in (base / folder).iterdir():
            file.unlink()
    return Place(nbs=base / "nbs", out=base / "out")


def stub_jobs(
    place: Place, seeds: tuple[int, ...] = (0, 1), nulls: int = 1, causal: bool = False, **extra: int
) -> list[Job]:
    behavior = str(place.nbs.parent / "stub.json")
    return make_jobs(Grid(("org/stub",), (behavior,), seeds=seeds, set=extra, nulls=nulls, causal=causal), None, place)


def counts(base: Path) -> dict[str, int]:
    """How often each stub began."""
    return {file.name: len(file.read_text()) for file in sorted((base / "counts").iterdir())}


def tables(place: Place) -> dict[str, bytes]:
    """Every table and weight difference of a project, byte for byte."""
    found = [p for end in ("tsv", "csv", "txt", "safetensors", "parquet") for p in place.out.rglob(f"*.{end}")]
    return {p.relative_to(place.out).as_posix(): p.read_bytes() for p in sorted(found)}


DRIVER = """
import sys
from pathlib import Path, PosixPath
sys.path.insert(0, {tests!r})
from stubs import Place, stub_jobs
from ws.runs.engine import Settings, run_jobs

if __name__ == "__main__":
    base = Path({base!r})
    place = Place(nbs=base / "nbs", out=base / "out")
    endings, summary = run_jobs(stub_jobs(place, {seeds!r}), place, Settings(workers=2, threads=1, **{settings!r}))
    print(summary)
    sys.exit(0 if all(ending.ok for ending in endings.values()) else 1)
"""


@contextmanager
def running_cluster(folder: Path) -> Iterator[tuple[dict, list[subprocess.Popen]]]:
    """A `dask scheduler` and two `dask worker` processes on loopback with TLS; the settings of a batch on it and the
    processes."""
    file = folder / "scheduler.json"
    environment = {**os.environ, "PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment, "cwd": folder}
    python = [sys.executable, "-m"]
    certificate(folder / "tls")
    tls = [str(folder / "tls" / name) for name in ("cert", "cert", "key")]
    secure = ["--tls-ca-file", tls[0], "--tls-cert", tls[1], "--tls-key", tls[2]]
    words = ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    started = [
        subprocess.Popen([*python, *words, *secure, "--protocol", "tls", "--scheduler-file", str(file)], **quiet)
    ]
    try:
        worker = ["distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard"]
        worker += ["--host", "127.0.0.1", "--local-directory", str(folder / "scratch")]
        started += [subprocess.Popen([*python, *worker, *secure], **quiet) for _ in range(2)]
        wait_for(lambda: file.is_file() and file.read_text().rstrip().endswith("}"), what="the scheduler")
        yield {"scheduler": json.loads(file.read_text())["address"], "tls": tuple(map(Path, tls))}, started
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(timeout=30)


def start_driver(base: Path, seeds: tuple[int, ...] = (0, 1), **settings: object) -> subprocess.Popen:
    """A batch in a process group of its own, as a terminal would start it; its output goes to `driver.log`."""
    script = base / "driver.py"
    tests = str(Path(__file__).parent)
    script.write_text(DRIVER.format(tests=tests, base=str(base), seeds=seeds, settings=settings))
    with (base / "driver.log").open("a") as log:
        command = [sys.executable, str(script)]
        environment = {**os.environ, "PYTHONPATH": str(HOME)}
        return subprocess.Popen(
            command, cwd=base, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )


def wait_for(condition, seconds: float = 60.0, what: str = "") -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s in vain for {what or condition}"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, kernels in their own sessions included."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def end(process: subprocess.Popen) -> None:
    """Make sure that a driver is gone."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
