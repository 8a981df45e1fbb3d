"""The clumsy user: mistakes against a finished demo. Nothing finished is lost, a mistake costs seconds and a line.

Every command is a real one, in a process that has everything loaded (`clumsy.Typing`), so that the processor time told is the
mistake's own. WS_DEMO_OUT names a finished `out/` of this very code to copy; without it the demo is made first. A table of
all mistakes is printed at the end.
"""

import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from clumsy import ROOT, Told, Typing

from ws.cache.places import ASSETS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
LORA = "tiny/sycophancy/lora"
LINES, SECONDS = 3, 3.0  # of a mistake that is noticed before a kernel starts
FREE = ("index.html",)  # written anew whenever somebody asks
ROWS: list[tuple] = []


@dataclass(frozen=True)
class Home:
    """A finished demo: `out`, what was typed beside it, and what it held when it was finished."""

    base: Path
    type: Typing
    kept: dict[str, bytes]

    @property
    def out(self) -> Path:
        return self.base / "out"

    @property
    def typed(self) -> Path:
        return self.base / "typed"

    def ws(self, line: str, cwd: Path | None = None, timeout: float = 1200, **env: str) -> Told:
        asked = {"WS_OUT": str(self.out), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
        return self.type(shlex.split(line), cwd or self.typed, asked, timeout)

    def start(self, line: str, **env: str):
        asked = {"WS_OUT": str(self.out), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
        return self.type.start(shlex.split(line), self.typed, asked)


def content(folder: Path) -> dict[str, bytes]:
    """A digest of all bytes of every file below a folder, but locks and temporary files."""
    found = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith((".lock", ".tmp"))]
    return {p.relative_to(folder).as_posix(): sha256(p.read_bytes()).digest() for p in found}


def lost(before: dict[str, bytes], after: dict[str, bytes], free: tuple[str, ...] = ()) -> list[str]:
    """Files of `before` that are gone or changed, but for those that may be written anew (`free`: starts of names)."""
    return [name for name, data in before.items() if after.get(name) != data and not name.startswith((*FREE, *free))]


def make_demo(out: Path) -> None:
    given = os.environ.get("WS_DEMO_OUT")
    if given:
        shutil.copytree(given, out)
        return
    env = {**os.environ, "WS_OUT": str(out), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "ws", "demo"], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def home(tmp_path_factory, request):
    base = tmp_path_factory.mktemp("clumsy")
    (base / "logs").mkdir()
    make_demo(base / "out")
    write_wrong_files(base / "typed")
    type_in = Typing(tmp_path_factory.mktemp("said"))
    type_in(["nb", "--help"], base, {})  # the fork server loads
    yield Home(base, type_in, content(base / "out"))
    manager = request.config.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled():
        print("\n" + table())


def table() -> str:
    """Each mistake: exit code, processor seconds, lines, the first of them; then the counts."""
    from tabulate import tabulate

    early = [row for row in ROWS if row[1] == 2]
    rows = [(line[:90], code, f"{seconds:.2f}", lines, first[:110]) for line, code, seconds, lines, first in ROWS]
    text = tabulate(rows, headers=["mistake", "code", "s", "lines", "first line"], tablefmt="simple")
    if not early:
        return text
    seconds, lines = ([row[i] for row in early] for i in (2, 3))
    return (
        f"{text}\n\n{len(ROWS)} mistakes, {len(early)} refused: processor time {statistics.median(seconds):.2f} s"
        + (f" (worst {max(seconds):.2f}), lines {statistics.median(lines):.0f} (worst {max(lines)})")
    )


def note(line: str, told: Told) -> None:
    ROWS.append((line, told.code, told.cpu, len(told.said), (told.said or [""])[0]))


# --- what is typed or given wrongly ---------------------------------------------------------------------------------------


def write_wrong_files(typed: Path) -> None:
    """Files and folders that a user might name by mistake."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    (typed / "sub").mkdir(parents=True)
    texts = {
        "broken.yaml": "SEED: [1", "list.yaml": "- SEED", "grid.yaml": "seedz: [0]", "tag.yaml": "SEED: !!python/name:os.mkdir",
        "sede.yaml": "SEDE: 3", "text.txt": "no weights", "syntax.py": "def candidate(:\n", "empty.jsonl": "",
        "users.csv": "a,b\n",
        "text.pt": "no weights", "broken.json": "{", "bare.json": "{}", "notes.md": "mine",
    }  # fmt: skip
    for name, text in texts.items():
        (typed / name).write_text(text)
    (typed / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    shipped = json.loads((ASSETS / "sycophancy.json").read_text())
    eight = {k: v for k, v in shipped.items() if k not in ("n_train_topics", "negations")}
    eight |= {"topics": shipped["topics"][:8], "personas_pos": shipped["personas_pos"][:2]}
    eight |= {"personas_neg": shipped["personas_neg"][:2], "train_true_claims": [], "name": "eight topics"}
    behaviors = {
        "eight": eight, "words": {**shipped, "name": "words", "yes": ["Supercalifragilistic"]},
        "one": {**eight, "name": "one", "topics": shipped["topics"][:1]}, "shipped": {**eight, "name": "sycophancy"},
        "probe": {**eight, "name": "probe", "probe": "Yes or No?"}, "escape": {**eight, "name": "../../x"},
    }  # fmt: skip
    for name, raw in behaviors.items():
        (typed / f"{name}.json").write_text(json.dumps(raw))
    w = load_file(ASSETS / "tiny_w.safetensors")
    from safetensors import safe_open

    with safe_open(ASSETS / "tiny_w.safetensors", "pt") as file:
        metadata = file.metadata()
    for name, change in {"mine": 1.0, "other": 0.5, "zero": 0.0, "nan": float("nan")}.items():
        save_file({key: value * change for key, value in w.items()}, typed / f"{name}.safetensors", metadata)
    torch.save({"model.layers.0.mlp.down_proj.weight": torch.eye(7)}, typed / "shape.pt")
    torch.save({"transformer.h.0.attn.c_attn.weight": torch.eye(7)}, typed / "names.pt")
    (typed / "cut.safetensors").write_bytes((ASSETS / "tiny_w.safetensors").read_bytes()[:-500])
    for name, without in {"noweights": "*.safetensors", "notokenizer": "tok*", "noconfig": "config.json"}.items():
        shutil.copytree(ASSETS / "tiny", typed / name)
        for file in (typed / name).glob(without):
            file.unlink()
    shutil.copytree(ASSETS / "tiny", typed / "cutmodel")
    weights = typed / "cutmodel" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2).save_pretrained(typed / "gpt2")
    (typed / "emptyfolder").mkdir()
    (typed / "many").mkdir()
    for i in range(1100):
        (typed / "many" / f"{i}.txt").touch()
    (typed / "pickled").mkdir()
    (typed / "pickled" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    (typed / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


REFUSED = [  # (what is typed, what the message must say)
    # parameters
    ("nb v7b_stability -p SEEDS '[0, 9]'", r"seed_9.*just nb v7_sweep .*-p SEED 9"),
    ("nb v7_sweep -p PCS 0", "PCS"),
    ("nb v7_sweep -p PCS 100000", "PCS.*100000"),
    ("nb v7_sweep -p N_NULL -5", "N_NULL"),
    ("nb v7_sweep -p K_BROAD 100000", "K_BROAD"),
    ("nb v7_sweep -p SEED 7", r"train it first: just nb weight_diff -p SEED 7"),
    ("nb v7_sweep -p PROTOCOL v8", "one of v7, v7b"),
    ("nb v7_sweep -p SOURCES v99", "SOURCES"),
    ("nb v7_sweep -p EVAL_SPLIT third", "one of half, held_out"),
    ("nb v7_sweep -p ADAPTER ../../../tmp/x", "ADAPTER"),
    ("nb v7_sweep -p ADAPTER lorra", "no weight difference yet|ADAPTER"),
    ("nb causal_check -p SEED 7", "train it first: just nb weight_diff -p SEED 7"),
    ("nb causal_check -p SUBSPACES mlp_wrote", "SUBSPACES: mlp_wrote: no candidate of the sweep.*did you mean mlp_write"),
    ("nb causal_check -p OTHER_SEED 7", "OTHER_SEED 7: is not trained; train it: just nb weight_diff -p SEED 7"),
    ("nb causal_check -p OTHER_SEED 0", "OTHER_SEED: 0 is SEED itself"),
    ("nb benchmark -p SEED 1 -p PROTOCOL v7", "make it first: just nb v7_sweep -p PROTOCOL v7 -p SEED 1"),
    ("nb benchmark -p SUBSPACE mlp_wrote", "SUBSPACE: mlp_wrote: no candidate of the sweep"),
    ("nb benchmark -p KL_TARGET 0", "nats above 0, or persona"),
    ("nb benchmark -p TRUTH text.txt", "text.txt: needs the columns statement and label"),
    ("nb v7b_stability -p SEEDS []", "SEEDS"),
    ("nb v7b_stability -p SEEDS 0,0", "twice"),
    ("nb v7b_stability -p RUNS_DIR emptyfolder", "RUNS_DIR"),
    ("nb weight_diff -p SEED -1", "SEED"),
    ("nb weight_diff -p SEED 4294967296", "4294967295"),
    ("nb weight_diff -p SEED three", "SEED"),
    ("nb weight_diff -p SEDE 3", "did you mean SEED"),
    ("nb weight_diff -p SEED", "-p.*KEY VALUE"),
    ("nb weight_diff -p SEED=3", "-p.*KEY VALUE"),
    ("nb weight_diff -p ALPHAS [nan]", "ALPHAS"),
    ("nb weight_diff -p ALPHAS 1", "ALPHAS"),
    ("nb weight_diff -p LORA_LAYERS 2-x", "LORA_LAYERS"),
    ("nb weight_diff -p LORA_LAYERS 40-50", "the model has 0 to"),
    ("nb weight_diff -p LR 0", "LR"),
    ("nb weight_diff -p LR fast", "LR"),
    ("nb weight_diff -p MAX_STEPS 0", "MAX_STEPS"),
    ("nb weight_diff -p SAMPLES 0", "SAMPLES"),
    ("nb weight_diff -p TOPICS 99", "99 training topics asked for, it has 20"),
    ("nb weight_diff -p PERSONAS 99", "99 training personas asked for, it has 5"),
    ("nb weight_diff -p ADAPTER lorra", "one of lora, rslora, pissa, dora"),
    ("nb weight_diff -p DTYPE float64", "DTYPE"),
    ("nb weight_diff -p DEVICE gpu", "DEVICE"),
    ("nb weight_diff -p DEVICE cuda:7", "DEVICE|cuda"),
    ("nb weight_diff -p RETRAIN maybe", "true or false"),
    ("nb delta_svd -p MODE flood", "one of stream, documents"),
    ("nb theta_fit -p HELDOUT 1", "HELDOUT"),
    ("nb theta_fit -p THETA_DIM 100000", "THETA_DIM"),
    ("nb theta_fit -p CONTROL_HEADS mine", "CONTROL_HEADS"),
    # files
    ("nb weight_diff -f none.yaml", "none.yaml: no such parameter file"),
    ("nb weight_diff -f broken.yaml", "broken.yaml.*not YAML"),
    ("nb weight_diff -f list.yaml", "list.yaml: expects a mapping"),
    ("nb weight_diff -f tag.yaml", "tag.yaml.*not YAML"),
    ("nb weight_diff -f binary.yaml", "binary.yaml.*not YAML"),
    ("nb weight_diff -f sede.yaml", "did you mean SEED"),
    ("nb v7_sweep -p W_PATH none.pt", "none.pt: no such"),
    ("nb v7_sweep -p W_PATH sub/mine.safetensors", "mine.safetensors: no such"),
    ("nb v7_sweep -p W_PATH text.pt", "text.pt"),
    ("nb v7_sweep -p W_PATH text.txt", "text.txt"),
    ("nb v7_sweep -p W_PATH shape.pt", "shape.pt"),
    ("nb v7_sweep -p W_PATH names.pt", "names.pt"),
    ("nb v7_sweep -p W_PATH zero.safetensors", "zero.safetensors.*0"),
    ("nb v7_sweep -p W_PATH nan.safetensors", "nan.safetensors.*finite|NaN"),
    ("nb v7_sweep -p W_PATH cut.safetensors", "cut.safetensors"),
    ("nb v7_sweep -p W_PATH emptyfolder", "emptyfolder"),
    ("nb v7_sweep -p NULL_W_PATH text.pt", "text.pt"),
    ("nb v7_sweep -p CANDIDATES none.py", "none.py: no such"),
    ("nb v7_sweep -p CANDIDATES syntax.py", "syntax.py: not Python"),
    ("nb v7_sweep -p CANDIDATES text.txt", "text.txt"),
    ("nb theta_fit -p USERS none.jsonl", "none.jsonl: no such"),
    ("nb theta_fit -p USERS empty.jsonl", "empty.jsonl"),
    ("nb theta_fit -p USERS users.csv", "users.csv"),
    ("nb delta_svd -p CALIBRATION none.txt", "none.txt: no such"),
    ("nb delta_svd -p CALIBRATION empty.jsonl", "empty.jsonl"),
    ("nb delta_svd -p COMPARE emptyfolder", "emptyfolder"),
    # models, adapters, behaviours
    ("nb weight_diff -p MODEL_ID ./nothing", "nothing.*no such model folder"),
    ("nb weight_diff -p MODEL_ID gpt2", "GPT2LMHeadModel.*served are"),
    ("nb weight_diff -p MODEL_ID noweights", "holds no weights"),
    ("nb weight_diff -p MODEL_ID notokenizer", "tokenizer cannot be loaded"),
    ("nb weight_diff -p MODEL_ID ./noconfig", "config.json is missing"),
    ("nb weight_diff -p MODEL_ID emptyfolder", "config.json is missing"),
    ("nb weight_diff -p MODEL_ID cutmodel", "not whole"),
    ("nb weight_diff -p MODEL_ID nobody/nothing", "nobody/nothing"),
    ("nb weight_diff -p POS_ADAPTER emptyfolder", "NEG_ADAPTER"),
    ("nb weight_diff -p POS_ADAPTER emptyfolder -p NEG_ADAPTER emptyfolder", "emptyfolder"),
    ("nb weight_diff -p POS_ADAPTER none -p NEG_ADAPTER none", "none: no such"),
    ("nb weight_diff -p POS_ADAPTER pickled -p NEG_ADAPTER pickled", "pickled"),
    ("nb weight_diff -p W_PATH mine.safetensors -p POS_ADAPTER sub -p NEG_ADAPTER sub", "not both"),
    ("nb weight_diff -p POS_ADAPTER {out}/" + LORA + "/seed_0/adapters/pos -p NEG_ADAPTER {out}/" + LORA + "/seed_0/adapters/pos",
     "0 everywhere|same|zero"),
    ("nb weight_diff -p BEHAVIOR flattery", "neither a shipped behaviour"),
    ("nb weight_diff -p BEHAVIOR broken.json", "broken.json"),
    ("nb weight_diff -p BEHAVIOR bare.json", "bare.json"),
    ("nb weight_diff -p BEHAVIOR words.json", "Supercalifragilistic"),
    ("nb weight_diff -p BEHAVIOR one.json", "topics"),
    ("nb weight_diff -p BEHAVIOR probe.json", "claim"),
    ("nb weight_diff -p BEHAVIOR escape.json", "name"),
    ("nb weight_diff -p BEHAVIOR emptyfolder", "emptyfolder"),
    ("nb v7_sweep -p BEHAVIOR eight.json", "train it first: just nb weight_diff -p BEHAVIOR"),
    # folders
    ("nb delta_svd -p OUT_DIR notes.md", "is a file"),
    ("nb delta_svd -p OUT_DIR notes.md/x", "is a file"),
    ("nb delta_svd -p OUT_DIR many", "many: holds more than"),
    ("nb v7_sweep -p OUT_DIR {out}/" + LORA + "/seed_1/v7b", "holds the finished run of .* seed 1"),
    ("nb v7b_stability -p OUT_DIR {out}/" + LORA + "/v7b -p SEEDS 0-1", "holds the finished run of .*seeds 0-2"),
    # commands
    ("nb weight_dif", "did you mean weight_diff"),
    ("nb", "notebook"),
    ("nonsense", "nonsense"),
    ("nb weight_diff --forse", "--force"),
    ("nb weight_diff --timeout soon", "timeout"),
    ("batch --seed 0", "--seeds"),
    ("batch --seeds 5-2", "5-2"),
    ("batch --workers two", "workers"),
    ("batch --workers -1", "workers"),
    ("batch --nulls -1 --dry-run", "nulls: expects a whole number"),
    ("batch --nulls many", "nulls"),
    ("batch --threads -4", "threads"),
    ("batch --adapters lorra", "adapter lorra"),
    ("batch --models ./nothing --dry-run", "nothing"),
    ("batch --models gpt2 --dry-run", "served are"),
    ("batch --behaviors none.json --dry-run", "none.json"),
    ("batch --behaviors words.json --dry-run", "Supercalifragilistic"),
    ("batch --grid none.yaml", "none.yaml: no such"),
    ("batch --grid grid.yaml", "unknown key seedz"),
    ("batch --set PCS 0 --dry-run", "PCS"),
    ("batch --set SEED 3", "the grid decides it"),
    ("batch --set DRAWS 5 --dry-run", "unknown parameter DRAWS"),
    ("batch --causal --set SUBSPACES write --dry-run", "just nb causal_check -p SUBSPACES"),
    ("batch --set PSC 3", "did you mean PCS"),
    ("batch --slurm --scheduler tcp://x", "choose one"),
    ("batch --slurm-set gpus 0", "--slurm"),
    ("batch --seeds 7 --scheduler tcp://127.0.0.1:1", "tls"),
    ("status none", "holds no run"),
    ("status notes.md", "holds no run"),
    ("status {out}", "holds no run"),
    ("status {out}/" + LORA + "/seed_0/v7 -p PSC 3", "did you mean PCS"),
    ("inspect none.pt", "none.pt"),
    ("inspect text.txt", "text.txt"),
    ("inspect emptyfolder", "w.safetensors"),
    ("clean", "--failed"),
    ("results --sort beauty", "beauty"),
    ("results --columns beauty", "beauty"),
    ("results --top many", "top"),
    ("results --model none", "none: no such run; known: tiny"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_mistake_is_refused_in_a_line_and_touches_nothing(home, line, says):
    before = content(home.base)
    told = home.ws(line.format(out=home.out))
    note(line, told)
    text = "\n".join(told.said)
    after = content(home.base)
    assert not lost(before, after) and sorted(set(after) - set(before)) == []
    assert told.code == 2 and not told.out.strip(), (told.code, text)
    assert "Traceback" not in text and len(told.said) <= (1 if line.startswith("nb ") else LINES), text
    assert re.search(says, text, re.DOTALL) and len(text) < 700, text
    assert told.cpu < SECONDS, told.cpu


HARMLESS = [  # (what is typed, what is said)
    ("batch", "12 done|12 are done|0 ran"),
    ("batch --seeds", "done"),
    ("batch --seeds 0-2 --dry-run", "0 would run, 0 would be looked at again, 12 are done"),
    ("batch --seeds 0-1 --dry-run", "run .*all seeds +v7b_stability +new\n.*1 would run, 0 would be looked at again, 9 are done"),
    ("batch --seeds 1-2 --dry-run", "1 would run, 0 would be looked at again, 9 are done"),
    ("batch --seeds 5-6 --dry-run", "5 would run, 0 would be looked at again, 5 are done"),
    ("batch --causal --dry-run", "DRAWS 500 -> 10000.*3 would run, 1 would be looked at again, 11 are done"),
    ("batch --set LR 0.001 --dry-run", "lora-LR0.001 seed 0 .*12 would run"),
    ("batch --retrain --dry-run", "0 would run"),
    ("batch --behaviors shipped.json --dry-run", "tiny sycophancy-.*8 would run"),
    ("batch --behaviors eight.json --dry-run", "tiny eight_topics lora.*8 would run"),
    ("nb weight_diff", "already done"),
    ("nb weight_diff -p LR 0.005 -p TOPICS none", "already done"),
    ("nb v7_sweep -p PCS 8", "already done"),
    ("nb v7b_stability -p SEEDS 2,1,0", "already done"),
    ("nb nbs/theta_fit.ipynb", "already done"),
    ("status", "v7b_stability"),
    ("status {out}/" + LORA + "/seed_0/v7", "done"),
    ("status {out}/" + LORA + "/seed_0/v7 -p PCS 16", "another run, in .*v7_pcs16"),
    ("status {out}/" + LORA + "/seed_0/v7 -p N_NULL 5", "changed parameters: N_NULL 50 -> 5|N_NULL \\d+ -> 5"),
    ("clean --failed", "0 failed tries"),
    ("clean --failed --yes", "0 failed tries removed"),
    ("inspect {out}/" + LORA + "/seed_0", "norm"),
    ("report", "report:"),
    ("nb weight_diff --help", "LORA_LAYERS"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), HARMLESS, ids=[line for line, _ in HARMLESS])
def test_what_is_done_is_said_to_be_and_stays(home, line, says):
    before = content(home.base)
    told = home.ws(line.format(out=home.out))
    note(line, told)
    after = content(home.base)
    assert not lost(before, after, ("out/index.html", "out/results.parquet"))
    assert sorted(set(after) - set(before)) in ([], ["out/index.html"], ["out/results.parquet"])
    assert told.code == 0 and "Traceback" not in told.err, told.err
    assert re.search(says, told.out, re.DOTALL), told.out


def test_a_relative_path_is_seen_from_where_it_was_typed(home):
    for cwd, line in ((home.out, f"status {LORA}/seed_0/v7"), (home.out / LORA, "inspect seed_0")):
        told = home.ws(line, cwd)
        note(f"{line} (typed in {cwd.name}/)", told)
        assert told.code == 0


# --- what starts a kernel -------------------------------------------------------------------------------------------------


def finished(home: Home, *free: str) -> list[str]:
    """What was lost of the demo as it was finished; `free`: what was meant to be replaced."""
    return lost(home.kept, content(home.out), free)


def by_hand(name: str, home: Home, **cells: object) -> str:
    """Run a shipped notebook's cells in a kernel as Lab does, with these values typed into its parameters' cell. Returns how it
    ended: '' or the error that is shown."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    book = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)
    (own,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    own.source += "".join(f"\n{key} = {value!r}" for key, value in cells.items())
    env = {**os.environ, "WS_OUT": str(home.out), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env.pop("WS_TYPED_IN", None)
    kernel = NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(ROOT / "nbs")}})
    start = time.monotonic()
    try:
        kernel.execute(env=env)
        shown = ""
    except CellExecutionError:
        errors = [out for cell in book.cells for out in cell.get("outputs", []) if out.output_type == "error"]
        shown = "\n".join(errors[0].traceback)
    said = "".join(f" {key}={value}" for key, value in cells.items())
    ROWS.append(
        (f"Lab: {name}{said}", 1 if shown else 0, time.monotonic() - start, len(shown.splitlines()), shown[:200])
    )
    return shown


def test_a_notebook_that_is_run_in_lab_writes_elsewhere(home):
    for name, cells in {
        "weight_diff": {"SEED": -1},
        "v7_sweep": {"PCS": 0},
        "v7b_stability": {"SEEDS": [0, 9]},
    }.items():
        shown = by_hand(name, home, **cells)
        assert shown.startswith("Refused: ") and len(shown.splitlines()) == 1, shown
    assert not finished(home)
    before = set(content(home.out))
    assert by_hand("weight_diff", home) == "" and by_hand("v7b_stability", home) == ""
    new = set(content(home.out)) - before
    assert not finished(home) and new and all(n.startswith("by_hand/") or "/cache/" in n for n in new), new
    assert not any("adapters" in name for name in new)  # nothing was trained: the finished difference was read


FAILING = {
    "raises.py": "raise RuntimeError('no such idea')\n",
    "dies.py": "import os\nos._exit(7)\n",
    "wrong.py": "from ws import candidate\n\n\n@candidate(family='mine')\ndef mine(ctx):\n    return {}['nothing']\n",
}


@pytest.mark.parametrize("file", FAILING)
def test_a_candidate_that_fails_leaves_what_is_finished(home, file):
    (home.typed / file).write_text(FAILING[file])
    told = home.ws(f"nb v7_sweep -p CANDIDATES {file}")
    note(f"nb v7_sweep -p CANDIDATES {file}", told)
    assert told.code == 1 and not finished(home) and len(told.said) <= 20, told.err
    assert "kept in" in told.err and list((home.out / LORA / "seed_0/v7/failed").iterdir())
    assert home.ws("nb v7_sweep").out.startswith("v7_sweep: already done")
    told = home.ws("clean --failed --yes")
    note("clean --failed --yes", told)
    assert "1 failed tries removed" in told.out and not finished(home)
    assert set(content(home.out)) - set(home.kept) <= {
        n for n in content(home.out) if n.startswith("by_hand/") or "/cache/" in n
    }


def test_eight_topics_just_work(home):
    line = "nb weight_diff -p BEHAVIOR eight.json -p MAX_STEPS 2 -p SAMPLES 1 -p MAX_NEW_TOKENS 8 -p ALPHAS 0,1"
    told = home.ws(line)
    note(line, told)
    assert told.code == 0 and not finished(home), told.err
    assert list((home.out / "tiny/eight_topics").glob("lora-*/seed_0/w.safetensors"))


def test_another_w_is_another_run(home):
    for name in ("mine", "other"):
        line = f"nb v7_sweep -p W_PATH {name}.safetensors -p SOURCES v5 -p N_NULL 2"
        told = home.ws(line)
        note(line, told)
        assert told.code == 0 and not finished(home, "results.parquet"), told.err
    assert len(list((home.out / LORA).parent.glob("w-*/v7_sources*/v7_summary.tsv"))) == 2


def wait_for_a_kernel(home: Home, seconds: float) -> None:
    logs, end = home.base / "logs", time.monotonic() + 300
    before = set(logs.iterdir())
    while not set(logs.iterdir()) - before and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(seconds)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_what_is_finished(home, sign):
    process, base = home.start("nb v7_sweep --force")
    wait_for_a_kernel(home, 6)
    assert process.is_alive()
    os.kill(process.pid, sign)
    told = home.type.end(process, base)
    note(f"nb v7_sweep --force, {sign.name} in the middle", told)
    assert told.code == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(sign), told
    assert not finished(home) and len(told.said) <= LINES and "Traceback" not in told.err, told.err
    told = home.ws("nb v7_sweep")
    assert told.out.startswith("v7_sweep: already done")


def test_two_at_once_end_well(home):
    import ws.cache.files as files

    with files.lock(home.out, 0, ".lock.batch"):
        told = home.ws("batch")
        note("batch, while another one works", told)
        assert told.code == 3 and len(told.said) == 1 and "--wait" in told.err
    pair = [home.start("nb delta_svd --force") for _ in range(2)]
    for process, base in pair:
        told = home.type.end(process, base)
        note("nb delta_svd --force, twice at once", told)
        assert told.code == 0, told.err
    own = ("delta_svd.ipynb", "delta_svd.html", ".made.", "params.json")  # what tells times
    assert not finished(home, *(f"tiny/delta_svd/{name}" for name in own))
    home.kept.update({name: data for name, data in content(home.out).items() if name.startswith("tiny/delta_svd/")})


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("tiny/delta_svd/delta_svd_per_layer.tsv", "nb delta_svd", "damaged: tiny/delta_svd/delta_svd_per_layer.tsv"),
        ("tiny/delta_svd/delta_svd.html", "nb delta_svd", "already done"),
    ],
)
def test_a_file_that_was_deleted_by_hand_comes_back(home, file, line, says):
    (home.out / file).unlink()
    told = home.ws(f"status {(home.out / file).parent}")
    assert told.code == 0
    told = home.ws(line)
    note(f"rm {Path(file).name}; {line}", told)
    assert told.code == 0 and says in told.out, told.out + told.err
    own = tuple(f"tiny/delta_svd/{name}" for name in ("delta_svd.ipynb", ".made", "params.json", "delta_svd.html"))
    assert not finished(home, *own) and (home.out / file).is_file()
    home.kept.update({name: data for name, data in content(home.out).items() if name.startswith(own)})


def test_what_a_batch_made_is_named_when_it_was_deleted(home, tmp_path):
    w = home.out / LORA / "seed_2/w.safetensors"
    shutil.move(w, tmp_path / "w")
    told = home.ws("batch --dry-run")
    note("rm seed_2/w.safetensors; batch --dry-run", told)
    shutil.move(tmp_path / "w", w)
    assert told.code == 0 and "damaged: tiny/sycophancy/lora/seed_2/w.safetensors" in told.out, told.out + told.err
    assert not finished(home)


def test_out_may_be_renamed(home):
    other = home.out.with_name("results of mine")
    home.out.rename(other)
    try:
        for line in (
            "batch --dry-run",
            "nb weight_diff",
            "nb v7_sweep",
            "nb theta_fit",
            "nb delta_svd",
            f"status '{other}/{LORA}/v7b'",
        ):
            told = home.ws(line, WS_OUT=str(other))
            note(f"mv out 'results of mine'; {line}", told)
            assert told.code == 0 and re.search("8 are done|already done|done", told.out), told.out + told.err
    finally:
        other.rename(home.out)
    assert not finished(home)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone somewhere else: its code and notebooks."""
    base = tmp_path_factory.mktemp("moved")
    for name in ("ws", "nbs"):
        shutil.copytree(ROOT / name, base / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", base)
    return base


def elsewhere(home: Home, clone: Path, line: str, before: tuple[str, ...] = (), **env: str) -> Told:
    """`ws` of another clone, in a process of its own, after the words of `before`."""
    env = {**os.environ, "PYTHONPATH": str(clone), "WS_OUT": str(home.out), "OMP_NUM_THREADS": "1", **env}
    env.pop("WS_TYPED_IN", None)
    start = time.monotonic()
    words = [*before, sys.executable, "-m", "ws", *shlex.split(line)]
    done = subprocess.run(words, cwd=clone, env=env, capture_output=True, text=True, timeout=900, check=False)
    return Told(done.returncode, 0.0, time.monotonic() - start, done.stdout, done.stderr)


def test_the_clone_may_be_moved_and_a_cell_edited_without_sync_is_told(home, clone):
    told = elsewhere(home, clone, "batch --dry-run")
    note("mv the clone; batch --dry-run", told)
    assert told.code == 0 and "8 are done" in told.out, told.out + told.err
    for name in ("v7_sweep.py", "v7_sweep.ipynb"):
        file = clone / "nbs" / name
        text = file.read_text()
        file.write_text(text.replace("protocol = load_protocol(", "protocol = load_protocol(*[], "))
        assert file.read_text() != text
        for line in ("nb v7_sweep", "batch --dry-run"):
            told = elsewhere(home, clone, line)
            note(f"edit a cell of {name}, no sync; {line}", told)
            assert told.code == 2 and len(told.said) == 1 and "sync" in told.err, told.err
        file.write_text(text)
    assert not finished(home)


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs setpriv and root")
@pytest.mark.parametrize("what", ["out", "logs", "OUT_DIR", "WS_OUT a file", "WS_OUT nowhere"])
def test_what_cannot_be_written_is_told(home, what):
    bound = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search")
    shut = {"out": home.out, "logs": home.base / "logs", "OUT_DIR": home.typed / "sub"}.get(what)
    line = "nb delta_svd --force" if what in ("out", "logs") else "nb delta_svd -p SEED 5"
    env = {}
    if what == "OUT_DIR":
        line = f"nb delta_svd -p OUT_DIR {home.typed}/sub/mine"
    if what == "WS_OUT a file":
        env = {"WS_OUT": str(home.typed / "notes.md")}
    if what == "WS_OUT nowhere":
        env = {"WS_OUT": "/proc/nothing/out"}
    changed = [shut, *(p for p in shut.rglob("*") if p.is_dir() and what == "out")] if shut else []
    for folder in changed:
        folder.chmod(0o555)
    try:
        told = elsewhere(home, ROOT, line, bound, **env)
    finally:
        for folder in changed:
            folder.chmod(0o755)
    note(f"{what} cannot be written; {line}", told)
    assert told.code == 2 and len(told.said) == 1 and "Traceback" not in told.err, told.err
    assert not finished(home)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk_leaves_what_is_finished(home, tmp_path):
    disk, kept = tmp_path / "disk", content(home.out)
    disk.mkdir()
    sizes = [p.stat().st_size for p in home.out.rglob("*") if p.is_file()]
    size = sum(-(-size // 4096) * 4096 for size in sizes)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size + (1 << 18)}", "tmpfs", str(disk)], check=False)
    if made.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        shutil.copytree(home.out, disk / "out")
        for line in ("nb v7_sweep --force", "nb theta_fit -p SEED 1 -p STEPS 5"):
            told = home.ws(line, WS_OUT=str(disk / "out"))
            note(f"disk full; {line}", told)
            assert told.code in (1, 2) and "No space left" in told.err and len(told.said) <= 20, told.err
            assert not lost(kept, content(disk / "out"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_another_thread_count_does_not_stop_the_stability_report(home):
    lines = {
        "nb v7_sweep -p SEED 1 -p PROTOCOL v7b --force": "2",
        "nb v7b_stability": "1",
        "batch": "1",
    }
    for line, threads in lines.items():
        told = home.ws(line, OMP_NUM_THREADS=threads)
        note(f"{line} ({threads} threads)", told)
        assert told.code == 0, told.err
    assert not finished(home, f"{LORA}/seed_1/v7b/", f"{LORA}/v7b/", "results.parquet")
    assert set(home.kept) <= set(content(home.out))
