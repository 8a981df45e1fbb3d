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
    """Every file below a folder, byte for byte, but locks and temporary files."""
    found = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith((".lock", ".tmp"))]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


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
    return f"{text}\n\n{len(ROWS)} mistakes, {len(early)} refused: processor time {statistics.median(seconds):.2f} s" + (
        f" (worst {max(seconds):.2f}), lines {statistics.median(lines):.0f} (worst {max(lines)})"
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
        "sede.yaml": "SEDE: 3", "text.txt": "no weights", "syntax.py": "def candidate(:\n", "empty.jsonl": "", "users.csv": "a,b\n",
        "text.pt": "no weights", "broken.json": "{", "bare.json": "{}", "notes.md": "mine",
        "raises.py": "raise RuntimeError('no such idea')\n",
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
    ("nb v7b_stability -p SEEDS []", "SEEDS"),
    ("nb v7b_stability -p SEEDS 0,0", "twice"),
    ("nb v7b_stability -p RUNS_DIR emptyfolder", "RUNS_DIR"),
    ("nb weight_diff -p SEED -1", "SEED"),
    ("nb weight_diff -p SEED 4294967296", "4294967295"),
    ("nb weight_diff -p SEED three", "SEED"),
    ("nb weight_diff -p SEDE 3", "did you mean SEED"),
    ("nb weight_diff -p SEED", "-p"),
    ("nb weight_diff -p SEED=3", "-p"),
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
    ("nb v7_sweep -p W_PATH none.pt", "none.pt: no such file"),
    ("nb v7_sweep -p W_PATH sub/mine.safetensors", "mine.safetensors: no such file"),
    ("nb v7_sweep -p W_PATH text.pt", "text.pt"),
    ("nb v7_sweep -p W_PATH text.txt", "text.txt"),
    ("nb v7_sweep -p W_PATH shape.pt", "shape.pt"),
    ("nb v7_sweep -p W_PATH names.pt", "names.pt"),
    ("nb v7_sweep -p W_PATH zero.safetensors", "zero.safetensors.*0"),
    ("nb v7_sweep -p W_PATH nan.safetensors", "nan.safetensors.*finite|NaN"),
    ("nb v7_sweep -p W_PATH cut.safetensors", "cut.safetensors"),
    ("nb v7_sweep -p W_PATH emptyfolder", "emptyfolder"),
    ("nb v7_sweep -p NULL_W_PATH text.pt", "text.pt"),
    ("nb v7_sweep -p CANDIDATES none.py", "none.py: no such file"),
    ("nb v7_sweep -p CANDIDATES syntax.py", "syntax.py: not Python"),
    ("nb v7_sweep -p CANDIDATES text.txt", "text.txt"),
    ("nb theta_fit -p USERS none.jsonl", "none.jsonl: no such file"),
    ("nb theta_fit -p USERS empty.jsonl", "empty.jsonl"),
    ("nb theta_fit -p USERS users.csv", "users.csv"),
    ("nb delta_svd -p CALIBRATION none.txt", "none.txt: no such file"),
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
    ("batch --seeds", "seeds"),
    ("batch --workers two", "workers"),
    ("batch --workers -1", "workers"),
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
    ("batch --set PSC 3", "did you mean PCS"),
    ("batch --slurm --scheduler tcp://x", "choose one"),
    ("batch --slurm-set gpus 0", "--slurm"),
    ("batch --scheduler tcp://127.0.0.1:1", "tls"),
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
