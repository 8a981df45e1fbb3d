"""ws.runs.engine, work, job, progress: many runs on Dask, what is done stays done, one failure is one failure."""

import io
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import polars as pl
import psutil
import pytest
from stubs import LORA, RUN, copy_project, counts, running_cluster, stub_jobs, tables, write_project

from ws import cli, lab
from ws.cache import files
from ws.runs import engine, grid, progress, work
from ws.runs.engine import Settings, run_jobs
from ws.runs.once import Ending, prepare

TWO = Settings(workers=2, threads=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A project whose batch has run once, and what came of it."""
    base = tmp_path_factory.mktemp("whole")
    place = write_project(base)
    endings, summary = run_jobs(stub_jobs(place), place, TWO)
    return base, place, endings, summary


def test_a_batch_runs_everything_in_order_and_writes_the_results(whole):
    base, place, endings, summary = whole
    assert {ending.state for ending in endings.values()} == {"ran"}, summary
    assert counts(base) == dict.fromkeys(
        ("null-0", "v7_sweep-0", "v7_sweep-1", "v7b_stability", "weight_diff-0", "weight_diff-1"), 1
    )
    lora = place.out / LORA
    about = json.loads((lora / "seed_1" / "v7b" / "params.json").read_text())
    assert about["environment"]["threads"] == 1
    assert about["parameters"]["NULL_W_PATH"] == [str(lora / "seed_0" / "null_diff" / "w.safetensors")]
    table = pl.read_parquet(place.out / "results.parquet")
    assert table["seed"].to_list() == [0, 0, 0, 1, 1, 1] and set(table["protocol"]) == {"v7b"}
    w = json.loads((lora / "seed_1" / "w.safetensors").read_text())
    assert table["joint_score"][3] == sum(w[0::3]) / 7
    assert "6 ran in" in summary and not list(place.out.rglob(".tmp-*")) and not list(place.out.rglob(".lock*"))


def test_the_same_command_again_starts_nothing(whole, monkeypatch):
    base, place, _, _ = whole
    before = tables(place)
    monkeypatch.setattr(engine, "connect", lambda *args: pytest.fail("a cluster was started"))
    endings, summary = run_jobs(stub_jobs(place), place, TWO)
    assert {ending.state for ending in endings.values()} == {"done"} and "6 done in 00:0" in summary
    assert tables(place) == before and set(counts(base).values()) == {1}


def test_one_seed_that_raises_fails_alone(whole, tmp_path):
    place = copy_project(whole[0], tmp_path, "seed_1/v7b")
    (tmp_path / "traps" / "raise-v7_sweep-1").touch()
    endings, summary = run_jobs(stub_jobs(place), place, TWO)
    states = {name.removeprefix(f"{RUN} "): ending.state for name, ending in endings.items()}
    assert states["seed 0: v7_sweep"] == "done" and states["seed 1: v7_sweep"] == "failed"
    assert states["all seeds: v7b_stability"] == "skipped" and states["seed 1: weight_diff"] == "done"
    assert "RuntimeError: planted in v7_sweep-1" in summary and f"needs {RUN} seed 1: v7_sweep" in summary
    assert str(place.out / LORA / "seed_1/v7b/failed") in summary
    assert counts(tmp_path) == {"v7_sweep-1": 1}


def test_a_running_scheduler_serves_a_batch(whole, tmp_path):
    place = copy_project(whole[0], tmp_path, "seed_0/v7b", "seed_1/v7b")
    with running_cluster(tmp_path) as (at, started):
        assert outsider(at["scheduler"]) == ["refused"] * 2
        endings, summary = run_jobs(stub_jobs(place), place, Settings(**at))
        assert [ending.state for ending in endings.values()] == ["done"] * 3 + ["ran"] * 2 + ["done"], summary
        about = json.loads((place.out / LORA / "seed_1/v7b/params.json").read_text())
        assert about["environment"]["threads"] == 1  # what the worker was started with
        assert all(process.poll() is None for process in started)  # they are not ours to end
    assert tables(place) == tables(whole[1])


def test_a_second_batch_is_refused_with_the_owners_pid(tmp_path, monkeypatch, capsys):
    place = write_project(tmp_path)
    with files.lock(place.out, 0, engine.LOCK):
        with pytest.raises(files.Locked, match=f"in use by pid {os.getpid()} "):
            run_jobs(stub_jobs(place), place, TWO)
        monkeypatch.setattr("ws.runs.notebooks.Place", lambda: place)
        monkeypatch.setattr(grid, "make_jobs", lambda *args: stub_jobs(place))
        with pytest.raises(SystemExit) as ended:
            cli.main(["batch"])
        assert ended.value.code == 3 and f"pid {os.getpid()}" in capsys.readouterr().err
    assert not any(place.out.rglob("*.ipynb"))
    with files.lock(place.out, 0, engine.LOCK):
        pass  # the lock is gone with its owner


def test_workers_share_the_cores_and_see_one_gpu_each(monkeypatch):
    assert engine.local_size(Settings(), 0, 2) == (1, 2) and engine.local_size(Settings(), 0, 1) == (1, 1)
    assert engine.local_size(Settings(), 0, 8) == (4, 2) and engine.local_size(Settings(), 2, 16) == (2, 8)
    assert engine.local_size(Settings(workers=3, threads=5), 2, 16) == (3, 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-b")
    gpus = engine.visible_gpus()
    assert gpus == ["2", "GPU-b"]
    assert work.run_environment(1, 3, gpus)["CUDA_VISIBLE_DEVICES"] == "GPU-b"
    assert {work.run_environment(0, 3, gpus)[name] for name in work.THREADS} == {"3"}
    assert (
        work.run_environment("tcp://elsewhere", 0, gpus)["CUDA_VISIBLE_DEVICES"] == "2,GPU-b"
    )  # not ours to share out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert engine.visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(engine.shutil, "which", lambda name: None)
    assert engine.visible_gpus() == []


OUTSIDER = """
import asyncio, json, sys
from distributed.core import rpc
from distributed.security import Security

async def ask(address, arguments):
    async with rpc(address, connection_args=arguments, timeout=2) as there:
        return await there.identity()

strange = Security.temporary().get_connection_args("client")
for address in json.loads(sys.argv[1]):
    for address, arguments in [("tcp:" + address[4:], None), ("tls:" + address[4:], strange)]:
        try:
            print("let in:", asyncio.run(ask(address, arguments))["type"])
        except OSError:
            print("refused")
"""


def outsider(*addresses: str) -> list[str]:
    """What a process without the certificate hears, plain and with a certificate of its own, per address."""
    command = [sys.executable, "-c", OUTSIDER, json.dumps(addresses)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()


def test_nobody_without_the_certificate_reaches_a_batchs_scheduler_or_workers(tmp_path):
    with engine.connect(Settings(workers=1, threads=1), 1, "ws-b", tmp_path) as (client, _, _):
        address = client.scheduler.address
        workers = [
            *client.scheduler_info()["workers"],
            *(i["nanny"] for i in client.scheduler_info()["workers"].values()),
        ]
        assert {a.partition("://")[0] for a in (address, *workers)} == {"tls"}
        assert outsider(address, *workers) == ["refused"] * 6
        # every port of the batch: those of Dask speak TLS, what is left of its web server tells nothing
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        ports = {c.laddr for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        known = {int(a.rpartition(":")[2]) for a in (address, *workers)}
        assert known <= {at.port for at in ports} and {at.ip for at in ports} == {"127.0.0.1"}
        for at in (at for at in ports if at.port not in known):
            for page in ("info/main/workers.html", "info/logs", "health", "metrics", "json/counts.json"):
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    urllib.request.urlopen(f"http://127.0.0.1:{at.port}/{page}", timeout=5)
        assert client.submit(sum, [1, 2]).result() == 3
    assert not list(tmp_path.iterdir())


def test_a_scheduler_without_tls_needs_consent(tmp_path):
    for address in ("tcp://127.0.0.1:9", "127.0.0.1:9"):
        with pytest.raises(ValueError, match="without TLS whoever reaches it runs code as you.*--insecure"):
            engine.join(address, None, False)
    with pytest.raises(FileNotFoundError, match="--tls .*nowhere: no such file"):
        engine.join("tls://127.0.0.1:9", (tmp_path / "nowhere",) * 3, False)
    with pytest.raises(ValueError, match="tls://127.0.0.1:9: no certificate: give --tls"):
        engine.join("tls://127.0.0.1:9", None, False)
    with pytest.raises(ValueError, match="--scheduler nowhere: no connection: [^\\n]*$"):
        engine.join("nowhere", None, True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_line_per_run_and_a_bar(stream):
    board = progress.Board({"a: x": 1.0, "b: x": 3.0}, 3, stream)
    for name in ("a: x", "b: x"):
        board.stage(name, "starting")
    board.stage("a: x", "Training")
    board.stage("a: x", "Training")
    board.tick()
    board.stage("b: x", "starting")
    board.end("b: x", "failed")
    board.end("a: x", "ran")
    board.close()
    told = stream.getvalue()
    assert ("a: x: Training" in told) == stream.isatty()  # elsewhere a line for each run that ended
    assert stream.isatty() or len(told.splitlines()) == 3
    assert "[2/3] failed" in told and "[3/3] ran" in told
    assert board.restarts == {"b: x": 1} and "begun anew: b: x" in told
    assert ("3/3 runs" in told) == stream.isatty() and "min left" in told


def test_the_plan_and_the_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    board = progress.Board({"a: x": 1.0, "b: x": 3.0, "c: x": 4.0}, 3, io.StringIO())
    board.stage("a: x", "starting")
    now[0] = 60.0
    board.end("a: x", "ran")
    assert board.left() == "some 7 min left"  # 7 units of cost, a minute each
    board.stage("b: x", "starting")
    assert board.left() == "some 2 min left"  # of what runs half is taken as done: 5.5 of 8 in a minute
    jobs = [prepare(name, {"MODEL_ID": "tiny"}) for name in ("theta_fit", "delta_svd")]
    plan = progress.plan_line([grid.Step(replace(job, name=job.notebook), "new", "", True) for job in jobs], 2, 10.0)
    assert plan == "plan: 2 runs, 2 at a time (1 theta_fit, 1 delta_svd); some 1 min on this machine"
    assert progress.plan_line([], 1) == "plan: all runs are done (0)"


def test_the_command_hands_everything_over_and_exits_1_on_a_failure(monkeypatch, tmp_path, capsys):
    place = write_project(tmp_path)
    asked, answer = [], {"a": Ending("ran")}

    def run_jobs(jobs, place, settings, retrain, check):
        asked.append((jobs, settings, retrain))
        assert check is lab.check_steps
        return answer, "THE SUMMARY"

    monkeypatch.setattr(engine, "run_jobs", run_jobs)
    drawn = []
    monkeypatch.setattr(cli, "atlases", drawn.append)
    monkeypatch.setattr(grid, "make_jobs", lambda chosen, here: (chosen, here))
    monkeypatch.setenv("WS_TYPED_IN", str(tmp_path))
    words = "--seeds 0-1 5 --adapters lora dora --set SCALE 3 --retrain --workers 2 --scheduler tcp://h:1 --insecure"
    words += " --tls ca cert key --timeout 9"
    for state, code in [("done", 0), ("failed", 1), ("skipped", 1)]:
        answer["b"] = Ending(state)
        with pytest.raises(SystemExit) as ended:
            cli.main(["batch", *words.split()])
        assert ended.value.code == code and "THE SUMMARY" in capsys.readouterr().out
    (chosen, here), settings, retrain = asked[0]
    assert drawn == [jobs for jobs, *_ in asked]
    assert chosen == grid.Grid(("tiny",), ("sycophancy",), ("lora", "dora"), (0, 1, 5), {"SCALE": "3"})
    assert here == tmp_path and retrain is True
    files = (tmp_path / "ca", tmp_path / "cert", tmp_path / "key")
    assert settings == Settings(2, 0, "tcp://h:1", None, False, 9, files, True)
    monkeypatch.setattr(grid, "make_jobs", lambda chosen, here: stub_jobs(place))
    monkeypatch.setattr(grid, "plan", lambda jobs, retrain: [grid.Step(jobs[0], "new", "new", True)])
    with pytest.raises(SystemExit) as ended:
        cli.main(["batch", "--dry-run"])
    assert (
        ended.value.code == 2 and "stub.json: missing fields" in capsys.readouterr().err
    )  # looked at before anything runs
    monkeypatch.setattr(lab, "check_steps", lambda steps, place: None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["batch", "--dry-run"])
    assert ended.value.code == 0 and "1 would run" in capsys.readouterr().out and len(asked) == 3


def test_results_are_printed_and_filtered(whole, monkeypatch, capsys):
    from ws.runs import results

    path = whole[1].out / "results.parquet"
    monkeypatch.setattr(results, "write_results", lambda: path)
    with pytest.raises(SystemExit) as ended:
        cli.main("results --seed 1 --candidate candidate_* --sort joint_score --columns subspace joint_score".split())
    told = capsys.readouterr().out
    assert ended.value.code == 0 and "3 of 6 rows" in told
    scores = [float(line.split()[1]) for line in told.splitlines()[2:5]]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(SystemExit) as ended:
        cli.main(["results", "--model", "tinny"])
    assert ended.value.code == 2 and "model tinny: no such run" in capsys.readouterr().err
    assert Path(path).is_file()
