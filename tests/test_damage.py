"""Damage drills: one kind of file after another is changed by a bit, cut or emptied, and the command that reads it given.

The real notebooks on the shipped model, small: a batch of two seeds, own adapters, two delta SVDs, a theta fit. Each case
must name the file, show no traceback, and end, after the same command (twice at most, what a refusal names in between),
with exit code 0 and every finished file as it was, byte for byte (notebooks, pages and params.json aside: they hold
times). docs/reliability.md has the figures. `WS_DRILL`: a folder to keep the undamaged results in for the next drill.
"""

import os
import re
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import harm
import pytest
from drills import stand_in, ws_command

from ws.cache import keys, made
from ws.runs.failed import FAILED
from ws.runs.index import runs
from ws.runs.mend import page_is_whole

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL = "TOPICS 3 PERSONAS 1 SAMPLES 2 MAX_NEW_TOKENS 12 MAX_STEPS 2 CHECKPOINT_STEPS 1 ALPHAS [0.0,1.0]"
LORA, SEED = "tiny/sycophancy/lora-T*", "tiny/sycophancy/lora-T*/seed_0"
SWEEP, OWN = f"{SEED}/v7b", "tiny/sycophancy/lora-own-*"
THETA = "STEPS 2 PERMUTATIONS 1 SAMPLE_TOKENS 2 THETA_DIM 8 GAMMAS [1.0] BETAS [0.0]"


def options(flag: str, text: str) -> list[str]:
    words = text.split()
    return [w for pair in zip(words[::2], words[1::2], strict=True) for w in (flag, *pair)]


def words_of(command: str, out: Path) -> list[str]:
    """A drill's command as typed."""
    lora, seed = (str(next(iter(out.glob(where)), "")) for where in (LORA, SEED))
    batch = [
        "batch",
        "--seeds",
        "0-1",
        "--nulls",
        "1",
        *options("--set", f"{SMALL} N_NULL 5 BOOT 20 CORRECTIONS False"),
    ]
    sides = f"POS_ADAPTER {seed}/adapters/pos NEG_ADAPTER {seed}/adapters/neg ALPHAS [0.0,1.0]"
    stable = f"SEEDS 0,1 ADAPTER {Path(lora).name or 'lora'} N_NULL 5 BOOT 20 CORRECTIONS False"
    return {
        "batch": batch,
        "dry run": [*batch, "--dry-run"],
        "weight_diff, own adapters": ["nb", "weight_diff", *options("-p", sides)],
        "v7b_stability": ["nb", "v7b_stability", *options("-p", stable)],
        "delta_svd, other": ["nb", "delta_svd", *options("-p", "BOOT 5 SEED 1")],
        "delta_svd, COMPARE": ["nb", "delta_svd", *options("-p", f"BOOT 5 COMPARE {out}/tiny/delta_svd_seed1")],
        "theta_fit": ["nb", "theta_fit", *options("-p", THETA)],
        "fails": ["nb", "delta_svd", *options("-p", f"CALIBRATION {out.parent}/short.txt")],
        "results": ["results"],
        "report": ["report"],
        "status": ["status"],
    }[command]


@dataclass(frozen=True)
class Case:
    """file: below the results. undone: runs that are not finished yet, so that the file is read. before: what else is not."""

    kind: str
    file: str
    harm: str
    command: str = "batch"
    undone: tuple[str, ...] = ()
    before: str = ""
    silent: bool = False  # nothing reads the file: it is written anew each time

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.harm}, {self.command}"


def cases(kind: str, file: str, harms: str, *args, **more) -> list[Case]:
    return [Case(kind, file, harm, *args, **more) for harm in harms.split()]


TRAINED, SWEPT = (f"{SEED}/weight_diff",), (SWEEP,)
FITTED = ("tiny/theta_fit*",)
CACHE, ADAPTER = "tiny/cache", f"{SEED}/adapters/pos"
PAIRS, BASIS = f"{CACHE}/pairs/*", f"{CACHE}/bases/TaskDiff_contrast_*.safetensors"
CASES = [
    *cases("pairs", f"{PAIRS}/pairs.jsonl", "bit high half empty", undone=TRAINED),
    *cases("record of pairs", f"{PAIRS}/.made.pairs.jsonl.json", "high", undone=TRAINED),
    *cases("chunk of pairs", f"{PAIRS}/chunk_000000.json", "bit half", undone=TRAINED, before="chunks"),
    *cases("checkpoint", f"{SEED}/adapters/checkpoints_*/checkpoint-1/optimizer.pt", "bit", before="checkpoint"),
    *cases("checkpoint", f"{SEED}/adapters/checkpoints_*/checkpoint-1/trainer_state.json", "high", before="checkpoint"),
    *cases("adapter_model.safetensors", f"{ADAPTER}/adapter_model.safetensors", "bit empty"),
    *cases("adapter_model.safetensors", f"{ADAPTER}/adapter_model.safetensors", "bit rot", "weight_diff, own adapters",
           undone=(f"{OWN}/seed_0",)),
    *cases("adapter_config.json", f"{ADAPTER}/adapter_config.json", "high"),
    *cases("training.json", f"{ADAPTER}/training.json", "half"),
    *cases("record of an adapter", f"{ADAPTER}/.made.json", "high"),
    *cases("w.safetensors", f"{SEED}/w.safetensors", "bit half empty"),
    *cases("w.safetensors", f"{SEED}/w.safetensors", "rot", undone=SWEPT),
    *cases("record of w", f"{SEED}/.made.w.safetensors.json", "bit high"),
    *cases("captures of the base", f"{CACHE}/captures/persona_pos_*.safetensors", "half", undone=SWEPT, before="bases"),
    *cases("captures under w", f"{CACHE}/captures/steered_*.safetensors", "bit empty rot", undone=SWEPT),
    *cases("record of captures", f"{CACHE}/captures/.made.steered_*.json", "high", undone=SWEPT),
    *cases("bases", BASIS, "bit empty rot", undone=SWEPT),
    *cases("record of bases", f"{CACHE}/bases/.made.TaskDiff_contrast_*.json", "half", undone=SWEPT),
    *cases("theta states", "tiny/cache/theta_fit/*/states.safetensors", "bit", "theta_fit", undone=FITTED),
    *cases("record of states", "tiny/cache/theta_fit/*/.made.states.safetensors.json", "high", "theta_fit", undone=FITTED),
    *cases("theta fit", "tiny/cache/theta_fit/*/fits/theta_*_cvh.safetensors", "bit half empty rot", "theta_fit", undone=FITTED),
    *cases("theta file of a run", "tiny/theta_fit*/theta_*_cvh.safetensors", "half", "theta_fit"),
    *cases("scores.safetensors", f"{SWEEP}/scores.safetensors", "bit"),
    *cases("scores.safetensors", f"{SWEEP}/scores.safetensors", "bit half empty rot", "v7b_stability", undone=(f"{LORA}/v7b*",)),
    *cases("v7_per_layer.csv", f"{SWEEP}/v7_per_layer.csv", "bit high empty", "v7b_stability", undone=(f"{LORA}/v7b*",)),
    *cases("explanation.json", f"{SWEEP}/explanation.json", "bit high", "v7b_stability", undone=(f"{LORA}/v7b*",)),
    *cases("v7_summary.tsv", f"{SWEEP}/v7_summary.tsv", "bit high empty", "results"),
    *cases("executed notebook", f"{SWEEP}/v7_sweep.ipynb", "bit high empty"),
    *cases("executed notebook", f"{SWEEP}/v7_sweep.ipynb", "high half", "status"),
    *cases("page", f"{SWEEP}/v7_sweep.html", "bit high empty", "report"),
    *cases("page", f"{SWEEP}/v7_sweep.html", "half"),
    *cases("params.json", f"{SWEEP}/params.json", "bit high empty"),
    *cases("record of a run", f"{SWEEP}/.made.v7_sweep.ipynb.json", "bit high empty"),
    *cases("record of a run", f"{SWEEP}/.made.v7_sweep.ipynb.json", "high", "status"),
    *cases("record of a run", f"{SWEEP}/.made.v7_sweep.ipynb.json", "high", "results"),
    *cases("record of a run", f"{SWEEP}/.made.v7_sweep.ipynb.json", "high", "dry run"),
    *cases("note of a hash", ".hashes/*.json", "bit high empty", undone=SWEPT),
    *cases("results.parquet", "results.parquet", "bit empty", "results", silent=True),
    *cases("index.html", "index.html", "high empty", "report", silent=True),
    *cases("failure.json", f"tiny/delta_svd_*/{FAILED}/*/failure.json", "bit high empty", "status"),
    *cases("delta_svd.json", "tiny/delta_svd_seed1/delta_svd.json", "bit", "delta_svd, COMPARE", undone=("tiny/delta_svd",)),
]  # fmt: skip
HARMS = {"bit": harm.flip, "rot": harm.flip, "high": harm.high, "half": harm.cut, "empty": harm.empty}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undamaged results, made once, and the folder that each case takes them to."""
    base = Path(os.environ.get("WS_DRILL") or tmp_path_factory.mktemp("drill"))
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        patch.setenv("WS_OUT", str(base / "out"))
        patch.setattr(keys, "LARGE", 1 << 16)  # so that hashes of this small project's files are noted, too
        if not (base / "whole").is_dir():
            base.mkdir(exist_ok=True)
            (base / "short.txt").write_text("a")
            for command in (
                "batch",
                "weight_diff, own adapters",
                "delta_svd, other",
                "delta_svd, COMPARE",
                "theta_fit",
            ):
                code, said = ws_command(*words_of(command, base / "out"))
                assert code == 0, said
            assert ws_command(*words_of("fails", base / "out"))[0] == 1
            for command in ("results", "report", "dry run"):
                assert ws_command(*words_of(command, base / "out"))[0] == 0
            shutil.copytree(base / "out", base / "whole")
        yield base


def finished(out: Path) -> dict[str, bytes]:
    """Every file that is read again, byte for byte."""
    files = {p.relative_to(out): p for p in sorted(out.rglob("*")) if p.is_file()}
    times = {n for n in files if n.suffix in (".ipynb", ".html") or n.name == "params.json" or FAILED in n.parts}
    return {str(n): p.read_bytes() for n, p in files.items() if not (n in times or any(x[0] == "." for x in n.parts))}


def prepare(case: Case, out: Path, whole: Path, monkeypatch) -> Path:
    """The results as they were, a little less of them, and the file damaged; returns it."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(whole, out)
    for run in (r for where in case.undone for r in out.glob(where)):
        shutil.rmtree(run)
    if case.before == "bases":
        min(
            out.glob(BASIS), key=lambda path: path.stat().st_mtime
        ).unlink()  # the sweep's, not those from half the prompts
    elif case.before:  # stopped where the last file of the stage was to appear
        first = {"chunks": f"{PAIRS}/pairs.jsonl", "checkpoint": ADAPTER}[case.before]
        (gone,) = out.glob(first)
        gone.unlink() if gone.is_file() else shutil.rmtree(gone)
        with monkeypatch.context() as patch:
            stop_at(case.before, patch)
            assert ws_command(*words_of("batch", out))[0] == 130
    if case.harm == "rot":  # the file changes and the system does not say so
        monkeypatch.setattr(keys, "_identity", lambda path: (path.stat().st_size, path.stat().st_mtime_ns))
        assert ws_command(*words_of("dry run", out))[0] == 0
    found = sorted(out.glob(case.file), key=lambda path: path.stat().st_mtime)  # of several, what was made first
    if case.kind == "note of a hash":
        found = [path for path in found if b"tiny/model.safe" in path.read_bytes()]
    HARMS[case.harm](found[0])
    return found[0]


def stop_at(stage: str, patch) -> None:
    from transformers import Trainer

    step, opened = Trainer.training_step, made.atomic_file

    def stopped(*args, **kwargs):
        if args[0].state.global_step == 1:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    if stage == "checkpoint":
        patch.setattr(Trainer, "training_step", stopped)
    else:
        patch.setattr(made, "atomic_file", lambda path: opened(path) if path.name != "pairs.jsonl" else stopped_file())


class stopped_file:
    """In place of the file that a kill keeps from appearing: the block runs, nothing is published."""

    def __enter__(self):
        self.folder = Path(os.environ["WS_OUT"]) / ".stopped"
        return self.folder

    def __exit__(self, *_):
        self.folder.unlink(missing_ok=True)
        raise KeyboardInterrupt


def told(said: str, file: Path) -> list[str]:
    """The lines that call the file, or the folder it is whole with, damaged."""
    names = {file.name, file.name.removeprefix(".made.").removesuffix(".json"), file.parent.name}
    return [line for line in said.splitlines() if "damaged" in line and any(name in line for name in names)]


@pytest.fixture(scope="module")
def table(request):
    rows: list[str] = []
    yield rows
    head = "| kind | damage | command | noticed (lines) | recovered | commands | s |\n|---|---|---|---|---|---|---|"
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n".join(["", head, *rows, f"{len(rows)} cases"]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_is_noticed_and_the_same_command_recovers(case, whole, table, monkeypatch):
    out, started = whole / "out", time.monotonic()
    file = prepare(case, out, whole / "whole", monkeypatch)
    code, said = ws_command(*words_of(case.command, out))
    lines, tries = told(said, file), 1
    if code and (next_step := re.search(r"; just (nb .*) makes it anew", said)):
        assert ws_command(*shlex.split(next_step[1]))[0] == 0, next_step[1]
    again = "batch" if case.command in ("results", "status", "dry run") else case.command
    if code or again != case.command:
        tries += 1
        code, more = ws_command(*words_of(again, out))
        said += more
    for command in ("results", "report"):
        assert ws_command(*words_of(command, out))[0] == 0
    before, after = finished(whole / "whole"), finished(out)
    other = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
    states = {f"{r['folder']}: {r['note']}" for r in runs(out) if r["state"] != "done"} - {""}
    states = {s for s in states if FAILED not in s and "a try failed" not in s}
    recovered = code == 0 and not other and not states
    noticed = "made anew" if case.silent else f"{bool(lines)} ({len(lines)})"
    words = (case.kind, case.harm, case.command, noticed, recovered, tries, f"{time.monotonic() - started:.0f}")
    table.append(f"| {' | '.join(map(str, words))} |")
    print(table[-1], flush=True)
    assert "Traceback" not in said, said[-3000:]
    assert lines or case.silent, said[-3000:]
    assert len(lines) <= 8
    assert recovered, (code, other, states, said[-3000:])
    assert all(page_is_whole(r["folder"] / f"{r['notebook']}.ipynb") for r in runs(out) if r["state"] == "done")
    left = [p for kind in (".tmp-*", ".was-*", ".lock*") for p in out.rglob(kind)]
    assert not left
