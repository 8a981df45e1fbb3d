"""What training and theta keep: a comment, a docstring or a figure changes nothing; an edit of what makes it does."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import Trainer

import ws.train.difference
from ws.cache import syntax
from ws.cache.made import made
from ws.data import load_behavior
from ws.diff import WeightDiff
from ws.model.lm import load_lm
from ws.theta import users
from ws.theta.fit import FitConfig
from ws.theta.heads import all_heads
from ws.theta.recorded import Recorded
from ws.theta.states import States, UserText, record_states
from ws.train.difference import train_diff
from ws.train.lora import TrainConfig, train_adapter
from ws.train.pairs import Pair, PairConfig, make_pairs

SMALL = PairConfig(topics=2, personas=1, samples=1, max_new_tokens=4)
CFG = TrainConfig(pairs=SMALL, r=4, lr=1e-2, max_steps=2, batch=2, accumulation=1)
ROWS = tuple(Pair(t, 0, 0, "is it so?", f"Yes, {t}.", f"No, {t}.") for t in range(4))


@pytest.fixture(scope="module")
def lm(model_folder):
    return load_lm(str(model_folder("qwen3")), dtype="float32", device="cpu")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package whose sources count instead of its own: `package(file, old, new)` edits one."""
    copy = shutil.copytree(syntax.PACKAGE, tmp_path / "ws", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    monkeypatch.setattr(syntax, "PACKAGE", copy)

    def edit(file: str, old: str, new: str) -> None:
        path, text = copy / file, (copy / file).read_text()
        stat = path.stat()
        assert text.count(old) >= 1
        path.write_text(text.replace(old, new))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))  # not after this process began

    return edit


@pytest.fixture
def kinds(lm, parity_folder, tmp_path, monkeypatch):
    """Per kind, a function that asks for it and says what was done: 'made', or why not."""
    behavior, out, calls, folders = load_behavior(parity_folder / "behavior.json"), tmp_path / "out", [], []
    monkeypatch.setenv("WS_OUT", str(out))
    generate, body = lm.model.generate, lm.model.get_decoder().forward
    monkeypatch.setattr(lm.model, "generate", lambda **options: calls.append("made") or generate(**options))
    monkeypatch.setattr(lm.model.get_decoder(), "forward", lambda **options: calls.append("made") or body(**options))

    def pairs():
        make_pairs(lm, behavior, SMALL, out, progress=False)

    def states():
        texts = [UserText("ann", "Why?", "Because I say so."), UserText("ann", "", "No.")]
        record_states(lm, texts, path=out / "states.safetensors", progress=False)

    def noted(*args, **options):
        calls.append(made(*args, **options))
        return calls[-1]

    def adapters():
        make = lambda lm, rows, sign, seed, cfg, folder, progress: (folder / "a").write_text(sign)  # noqa: E731
        monkeypatch.setattr(ws.train.difference, "make_pairs", lambda *_: ws.train.pairs.Pairs(ROWS, 4, 0, 0))
        monkeypatch.setattr(ws.train.difference, "train_adapter", make)
        monkeypatch.setattr(ws.train.difference, "_join", lambda *_: WeightDiff({}, {}))
        monkeypatch.setattr(ws.train.difference, "made", noted)
        train_diff(lm, behavior, config=CFG, progress=False)

    def checkpoints():
        def train(trainer, **_):
            if trainer.args.output_dir not in folders:
                calls.append("new folder")
            folders.append(trainer.args.output_dir)
            raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "train", train)
        with pytest.raises(KeyboardInterrupt):
            cfg = replace(CFG, heldout=0, checkpoint_steps=1)
            train_adapter(lm, ROWS, "pos", 0, cfg, out / "pos", progress=False)

    def fits():
        gen = torch.Generator().manual_seed(0)
        W, h = torch.randn(30, 8, generator=gen), torch.randn(40, 8, generator=gen)
        record = States(h, torch.arange(40) % 30, torch.arange(40) // 10)
        monkeypatch.setattr(users, "made", noted)
        heads = {"svd_cvh": all_heads(W, 4)["svd_cvh"]}
        users.fit_users(Recorded({"ann": record}, W), heads, FitConfig(steps=3), out / "fits", progress=False)

    def ask(kind):
        del calls[:]
        kind()
        return sorted(set(calls))

    return {f.__name__: lambda f=f: ask(f) for f in (pairs, states, adapters, checkpoints, fits)}


KINDS = {
    "pairs": (["made"], [], "model/generate.py", "skip_special_tokens=True", "skip_special_tokens=False", ["made"]),
    "states": (["made"], [], "theta/states.py", ".float().cpu()", ".cpu().float()", ["made"]),
    "adapters": (["new"], ["done"], "train/lora.py", '"adamw_torch"', '"adamw_torch_fused"', ["stale"]),
    "checkpoints": (["new folder"], [], "train/lora.py", '"adamw_torch"', '"adamw_torch_fused"', ["new folder"]),
    "fits": (["new"], [], "theta/heads.py", "x @ self.A.to(x).T", "x @ self.A.T.to(x)", ["changed code"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_makes_a_thing_makes_it_anew(package, kinds, kind):
    first, again, file, old, new, after = KINDS[kind]
    assert kinds[kind]() == first and kinds[kind]() == again
    for module in ("train/lora.py", "train/pairs.py", "model/generate.py", "theta/states.py", "theta/fit.py"):
        package(module, "\nimport ", "\n# a remark\n\nimport ")
    package("theta/figures.py", "scale of the heads", "scale of all heads")
    package("theta/verdict.py", "beats each of", "wins against each of")
    package("train/difference.py", "How w came about", "What w came from")
    package("theta/states.py", "A user's training texts", "The training texts of a user")
    assert kinds[kind]() == again
    package(file, old, new)
    assert kinds[kind]() == after
