"""Exports: a LoRA and a checkpoint that act as `weight_steer` does, in a process that does not know this project; errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli import call

import ws
from ws.cache.places import ASSETS
from ws.causal.variants import gains, keep, writers
from ws.diff import LowRank, WeightDiff, from_adapters, save_diff
from ws.model.lm import check_model
from ws.use.export import export
from ws.use.restrict import own_bases, parse_layers, restricted, spans, truncated
from ws.use.run import read_run

IDS = torch.arange(3, 43).reshape(2, 20)
ALONE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, out = torch.arange(3, 43).reshape(2, 20), {}
def logits(model):
    with torch.no_grad():
        return model.eval()(ids).logits
for name, job in json.load(open(sys.argv[1])).items():
    if job["kind"] == "merged":
        out[name] = logits(AutoModelForCausalLM.from_pretrained(job["folder"]))
        assert AutoTokenizer.from_pretrained(job["folder"]).chat_template
        continue
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job["base"]), job["folder"])
    out[name] = logits(model)
    touched = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    out[name + " touched"] = sorted(touched)
    if "pair" in job:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job["base"]), job["pair"][0], "pos")
        model.load_adapter(job["pair"][1], "neg")
        model.add_weighted_adapter(["pos", "neg"], [1.0, -1.0], "w", combination_type="cat")
        model.set_adapter("w")
        out[name + " cat"] = logits(model)
assert "ws" not in sys.modules
torch.save(out, sys.argv[2])
"""


def adapters(base: Path, to: Path, r: int = 3) -> tuple[Path, Path]:
    """Two random PEFT adapters on some of the modules, in some of the layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for i, side in enumerate(("pos", "neg")):
        config = LoraConfig(
            r=r, lora_alpha=2 * r, target_modules=r".*layers\.[12]\.(self_attn\.[qv]_proj|mlp\.down_proj)"
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        g = torch.Generator().manual_seed(i)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = 0.1 * torch.randn(p.shape, generator=g)
        model.save_pretrained(to / side)
    return to / "pos", to / "neg"


@pytest.fixture(scope="module")
def alone(model_folder, tmp_path_factory):
    """Exports of several families and what another process, without this project, makes of them."""
    at, jobs, wanted = tmp_path_factory.mktemp("exports"), {}, {}
    for family in ("qwen3", "gemma2"):
        base = model_folder(family)
        pair = adapters(base, at / family)
        lm, w = ws.load_lm(str(base)), from_adapters(*pair)
        for name, kind, alpha, part in (
            ("whole", "peft", 1.0, {}),
            ("against", "peft", -1.7, {}),
            ("subspace", "peft", 2.0, {"keep": "dW:2"}),
            ("some", "peft", 1.0, {"roles": ["v", "down"], "layers": [2], "rank": 2}),
            ("merged", "merged", -0.8, {}),
        ):
            done = export(w, at / family / name, str(base), alpha, kind, **part, shard="100KB")
            key = f"{family} {name}"
            jobs[key] = {"kind": kind, "folder": str(done.folder), "base": str(base)}
            jobs[key] |= {"pair": [*map(str, pair)]} if name == "whole" else {}
            with torch.no_grad(), ws.weight_steer(lm.model, done.w, alpha):
                wanted[key] = done, lm.model(IDS).logits
            with torch.no_grad():
                assert (lm.model(IDS).logits - wanted[key][1]).abs().max() > 0.01
    (at / "jobs.json").write_text(json.dumps(jobs))
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, at / "jobs.json", at / "out.pt"],
        cwd=at,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return wanted, torch.load(at / "out.pt")


def test_exports_act_as_steering_does_without_this_project(alone):
    wanted, found = alone
    for key, (done, logits) in wanted.items():
        torch.testing.assert_close(found[key], logits, rtol=0, atol=1e-5)
        if f"{key} touched" in found:
            assert found[f"{key} touched"] == sorted(name.removesuffix(".weight") for name in done.w), key
    for family in ("qwen3", "gemma2"):
        torch.testing.assert_close(found[f"{family} whole"], found[f"{family} whole cat"], rtol=0, atol=1e-5)


def test_an_adapter_holds_no_more_than_its_part(alone):
    wanted, _ = alone
    ranks = {key: {done.w.rank(name) for name in done.w} for key, (done, _) in wanted.items()}
    assert ranks["qwen3 whole"] == {6} and ranks["qwen3 subspace"] == {2} and ranks["qwen3 some"] == {2}
    assert {n.split(".")[-2] for n in wanted["qwen3 subspace"][0].w} == {"down_proj"}
    folder = wanted["qwen3 against"][0].folder
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["task_type"]) == (6, 6, "LORA", "CAUSAL_LM")
    assert not config["modules_to_save"] and Path(config["base_model_name_or_path"]).is_dir()
    card = (folder / "README.md").read_text()
    assert "alpha: -1.7, folded in" in card and "library_name: peft" in card and "100.00% of |w|^2" in card
    w = wanted["qwen3 against"][0].w  # balanced: both factors carry as much
    assert all(torch.allclose(e.B.norm(), e.A.norm(), rtol=1e-4) for e in w.entries.values())


def test_a_checkpoint_is_whole(alone, model_folder):
    wanted, _ = alone
    done = wanted["qwen3 merged"][0]
    names = {file.name for file in done.folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {n for n in names if n.startswith("model-")} and len(names) > 6
    assert "lm_head.weight" not in index["weight_map"]  # tied, stored once
    theirs, mine = (json.loads((f / "config.json").read_text()) for f in (model_folder("qwen3"), done.folder))
    assert {k: v for k, v in mine.items() if k != "transformers_version"}.items() >= {
        k: v for k, v in theirs.items() if k != "transformers_version"
    }.items()


def logits_of(folder):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


def test_a_checkpoint_takes_what_no_adapter_can(model_folder, tmp_path):
    """A change of the tied embedding acts on both of its uses, under either name; norms and biases; and dense matrices."""
    base = model_folder("qwen3")
    lm, g = ws.load_lm(str(base)), torch.Generator().manual_seed(0)
    own = dict(lm.model.named_parameters(remove_duplicate=False))
    down = "model.layers.1.mlp.down_proj.weight"
    for tied in ("model.embed_tokens.weight", "lm_head.weight"):
        names = (tied, "model.norm.weight", down)
        w = WeightDiff({name: 0.1 * torch.randn(own[name].shape, generator=g) for name in names})
        done = export(w, tmp_path / tied, str(base), 0.5, "merged")
        with torch.no_grad(), ws.weight_steer(lm.model, w, 0.5):
            assert torch.equal(logits_of(done.folder), lm.model(IDS).logits)
        for name, said in zip(names, ("an embedding", "of a Qwen3RMSNorm", "is dense and of full rank"), strict=True):
            with pytest.raises(ValueError, match=rf"{name}: {said}.*--as merged"):
                export(WeightDiff({name: w[name]}), tmp_path / "no", str(base))
    both = WeightDiff(
        {n: torch.randn(own[n].shape, generator=g) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    )
    with pytest.raises(ValueError, match=r"lm_head.weight: tied to .*two changes"):
        export(both, tmp_path / "no", str(base), kind="merged")
    dense = WeightDiff({down: w[down]})
    done = export(dense, tmp_path / "cut", str(base), rank=5)
    s = dense.singular_values(down).square()
    assert done.w.rank(down) == 5 and f"{float(s[:5].sum() / s.sum()):.2%} of |w|^2" in done.text
    low = torch.randn(48, 2, generator=g) @ torch.randn(2, 96, generator=g)
    assert export(WeightDiff({down: low}), tmp_path / "low", str(base)).w.rank(down) == 2
    assert not (tmp_path / "no").exists()


def test_a_model_in_memory_is_merged_as_it_is(model_folder, tmp_path):
    lm = ws.load_lm(str(model_folder("llama")), dtype="bfloat16")
    name, g = "model.layers.1.self_attn.o_proj.weight", torch.Generator().manual_seed(0)
    before = lm.model.get_parameter(name).detach().clone()
    w = WeightDiff({name: LowRank(0.3 * torch.randn(48, 2, generator=g), torch.randn(2, 48, generator=g))})
    done = export(w, tmp_path / "half", lm, kind="merged")
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(lm.model.get_parameter(name), before)
    stored = ws.load_lm(str(done.folder)).model.get_parameter(name)
    assert stored.dtype == torch.bfloat16 and torch.equal(stored, (before.float() + w[name]).bfloat16())
    error = (stored.float() - before.float() - w[name]).norm() / w[name].norm()
    assert f"rounding to bfloat16 changes what is added by {error:.1%} of its size" in done.text
    with ws.weight_steer(lm.model, w, 1.0), pytest.raises(ValueError, match="steer"):
        export(w, tmp_path / "no", lm, kind="merged")
    with pytest.raises(ValueError, match=r"is not finite in torch.bfloat16"):
        export(w, tmp_path / "no", lm, 3e38, kind="merged")
    with pytest.raises(ValueError, match=f"{name} contains NaN or inf"):
        export(w.scale(float("nan")), tmp_path / "no", lm)
    assert not (tmp_path / "no").exists()


HUB = """
import json, sys, ws
from ws.use.export import export
w = ws.load_diff("tiny")
for kind in ("peft", "merged"):
    assert sys.argv[2] in export(w, sys.argv[1] + "/" + kind, "some/model", kind=kind, revision="old").text
"""


def test_the_revision_of_a_hub_model_is_told_and_read(tmp_path):
    old, new = "1" * 40, "2" * 40
    for commit, name in ((old, "old"), (new, "main")):
        at = tmp_path / "hf" / "hub" / "models--some--model"
        shutil.copytree(ASSETS / "tiny", at / "snapshots" / commit)
        (at / "refs").mkdir(exist_ok=True)
        (at / "refs" / name).write_text(commit)
    (at / "snapshots" / new / "model.safetensors").write_bytes(b"another")
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "WS_OUT": str(tmp_path / "out")}
    asked = [sys.executable, "-c", HUB, str(tmp_path), old]
    ran = subprocess.run(asked, cwd=ASSETS.parents[1], env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/model", old)
    lm, w = ws.load_lm("tiny"), ws.load_diff("tiny")
    with torch.no_grad(), ws.weight_steer(lm.model, w, 1.0):
        assert torch.equal(logits_of(tmp_path / "merged"), lm.model(IDS).logits)


@pytest.fixture(scope="module")
def swept():
    return ws.explain(ws.load_lm("tiny"), ws.load_diff("tiny"), candidates=["write"], protocol="v7", progress=False)


def test_a_candidate_of_a_sweep_is_kept(swept, tmp_path):
    w, lm = ws.load_diff("tiny"), check_model("tiny")
    part, told = restricted(w, lm.decoder, "write", layers=[3, 4], sweep=swept)
    wanted = keep(
        w.select(lambda name: ".3." in name or ".4." in name), {l: swept.tensors[f"basis/write/{l}"] for l in (3, 4)}
    )
    assert set(part) == set(wanted) and len(part) == 4 and told.startswith("layers 3-4; in write")
    assert all(torch.allclose(part[name], wanted[name], atol=1e-6) for name in part)
    bases = own_bases(w, "dW:3", {})
    whole = torch.cat(
        [w["model.layers.2.self_attn.o_proj.weight"], w["model.layers.2.mlp.down_proj.weight"]], 1
    ).double()
    U = torch.linalg.svd(whole, full_matrices=False).U[:, :3]
    assert torch.linalg.matrix_norm(U.T @ bases[2].double(), 2) == pytest.approx(1, abs=1e-6)
    assert float((bases[2].double().T @ U).square().sum()) == pytest.approx(3, abs=1e-5)
    for name, said in {
        "wrte": "candidate 'wrte' is unknown; did you mean write?",
        "dW_left_basis_ceiling": "a ceiling's bases are not kept; dW:8",
        "dW:x": "are written dW:K, such as dW:8",
        "nothing like it": "the sweep has ",
    }.items():
        with pytest.raises(ValueError, match=said):
            export(w, tmp_path / "no", lm, keep=name, sweep=swept)
    with pytest.raises(ValueError, match="a candidate's bases come from a sweep"):
        export(w, tmp_path / "no", lm, keep="write")
    assert not (tmp_path / "no").exists()


def test_gains_of_output_norms_are_read_where_a_subspace_needs_them(model_folder, tmp_path):
    lm = ws.load_lm(str(model_folder("gemma2")))
    g, shape = torch.Generator().manual_seed(0), lm.decoder.weight(1, "down").shape
    w = WeightDiff(
        {
            lm.decoder.param_name(1, "down"): LowRank(
                torch.randn(48, 3, generator=g), torch.randn(3, shape[1], generator=g)
            )
        }
    )
    B = torch.linalg.qr(torch.randn(48, 2, generator=g)).Q
    done = export(w, tmp_path / "kept", str(model_folder("gemma2")), keep={1: B})
    wanted = keep(w, {1: B}, gains(lm.decoder, writers(w)))
    name = next(iter(w))
    assert torch.allclose(done.w[name], wanted[name], atol=1e-5) and not torch.allclose(
        keep(w, {1: B})[name], wanted[name], atol=1e-2
    )


def test_truncation_is_the_best_of_its_rank():
    g = torch.Generator().manual_seed(0)
    M = torch.randn(9, 7, generator=g)
    w = WeightDiff(
        {"a": M, "b": LowRank(torch.ones(4, 3), torch.ones(3, 5)), "c": torch.ones(4), "d": torch.zeros(3, 3)}
    )
    found = truncated(w, 2)
    U, s, Vh = torch.linalg.svd(M)
    assert torch.allclose(found["a"], U[:, :2] @ torch.diag(s[:2]) @ Vh[:2], atol=1e-5)
    assert (found.rank("b"), set(found)) == (1, {"a", "b", "c"}) and torch.allclose(found["b"], w["b"])
    assert spans([2, 3, 4, 8]) == "2-4, 8" and parse_layers("2-4, 8") == (2, 3, 4, 8) and parse_layers("") == ()


BAD = {
    "--as onnx": "invalid choice",
    "--alpha nan": "alpha is nan, expected a finite number",
    "--alpha 1e39": "alpha is 1e+39, expected a finite number",
    "--alpha 1e39 --as merged": "alpha is 1e+39, expected a finite number",
    "--alpha 0": "alpha is 0.0, expected a finite number other than 0",
    "--roles v,ups": "role 'ups' is unknown; did you mean up?",
    "--layers 3-9": "layer 6: w changes nothing there; it has layers 2-5",
    "--layers x": "layers 'x': expected a layer or a range",
    "--rank 0": "rank 0: a rank is a whole number",
    "--roles v --keep dW:2": "nothing of it writes to the residual stream",
    "--keep write": "no finished sweep lies beside this w",
    "--model ./none": "no such model folder",
    "--as merged --shard big": "shard 'big': expected a size such as 5GB",
}


@pytest.mark.parametrize("options", BAD)
def test_what_is_wrong_is_told_before_anything_is_written(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WS_TYPED_IN", str(tmp_path))
    assert call("export", "tiny", *options.split()) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and BAD[options] in told and not list(tmp_path.iterdir())


def test_a_run_is_exported_by_any_of_its_folders(swept, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WS_TYPED_IN", str(tmp_path))
    home = tmp_path / "seed_0"
    save_diff(
        WeightDiff(ws.load_diff("tiny").entries, {"base_model": "somebody__model", "seed": 0}), home / "w.safetensors"
    )
    (home / "weight_diff").mkdir()
    assert call("export", "seed_0") == 2
    assert "its base model cannot be had, give it: --model MODEL (MODEL_ID 'somebody/model'" in capsys.readouterr().err
    (home / "weight_diff" / "params.json").write_text(
        json.dumps({"parameters": {"MODEL_ID": "tiny", "BEHAVIOR": "sycophancy"}})
    )
    swept.save(home / "v7")
    for i, run in enumerate(("seed_0", "seed_0/weight_diff", "seed_0/v7", "seed_0/w.safetensors")):
        assert call("export", run, "--keep", "write", "--alpha", "-2", "--to", f"out{i}") == 0
        assert (tmp_path / f"out{i}" / "adapter_model.safetensors").read_bytes() == (
            tmp_path / "out0" / "adapter_model.safetensors"
        ).read_bytes()
    assert read_run("seed_0", tmp_path).behavior() == "sycophancy"
    assert call("export", "seed_0", "--roles", "o", "--as", "merged") == 0
    assert (tmp_path / "w-seed0-alpha1-part-merged" / "model.safetensors").is_file()
    capsys.readouterr()
    for run, said in {
        ".": "no w.safetensors in it or beside it; one lies in",
        "nowhere": "no such run; give a run's folder",
        "out0": "no w.safetensors in it or beside it",
    }.items():
        assert call("export", run) == 2 and said in capsys.readouterr().err
    assert call("export", "seed_0", "--to", "out0") == 2 and "is there already" in capsys.readouterr().err
    save_diff(ws.load_diff("tiny").scale(2), home / "w.safetensors")
    assert call("export", "seed_0", "--keep", "write", "--to", "x") == 2
    assert "was a sweep of another w than seed_0; run it again" in capsys.readouterr().err
