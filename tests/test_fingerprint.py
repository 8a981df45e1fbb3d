"""What is kept follows what the model holds: one changed number anywhere is another fingerprint, and a model that is
steered is not kept at all."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import random_model

import ws.model.contents as contents
from ws.data import load_behavior
from ws.delta.measure import delta_svd
from ws.diff import load_diff
from ws.model.contents import checksum
from ws.model.guard import check_plain
from ws.model.lm import load_lm
from ws.steer.weights import weight_steer
from ws.subspaces import kept
from ws.subspaces.build import candidates
from ws.subspaces.candidate import get
from ws.subspaces.captures import base_sets, capture_base
from ws.subspaces.kept import make_shelf, part_bases
from ws.subspaces.protocol import load_protocol
from ws.subspaces.steered import capture_steered
from ws.theta.heads import cvh
from ws.theta.live import wear
from ws.theta.states import load_users, record_states, record_users
from ws.train.lora import TrainConfig, train_adapter
from ws.train.pairs import Pair, PairConfig, make_pairs

NAMES = [f"model.layers.{l}.{role}.weight" for l, role in (
    (0, "self_attn.q_proj"), (1, "self_attn.k_proj"), (2, "self_attn.v_proj"), (3, "self_attn.o_proj"),
    (4, "mlp.gate_proj"), (5, "mlp.up_proj"), (7, "mlp.down_proj"), (6, "input_layernorm"),
)] + ["model.embed_tokens.weight", "model.norm.weight"]  # fmt: skip


@pytest.fixture(params=["float32", "bfloat16"])
def lm(request):
    return load_lm("tiny", request.param, "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_one_changed_number_is_another_fingerprint(lm, name):
    before, x = lm.fingerprint, lm.model.get_parameter(name).data
    flat = x.view(-1)
    for at in (0, len(flat) // 2, len(flat) - 1):
        old = flat[at].clone()
        flat[at] = torch.nextafter(old, old + 1)  # the least change there is
        assert lm.fingerprint.startswith(f"{before}+")
        flat[at] = old
        assert lm.fingerprint == before
    a, b = flat[:2].clone()
    assert a != b
    flat[0], flat[1] = b, a  # the same numbers in other places
    assert lm.fingerprint != before


def test_training_and_loading_in_memory_are_seen_and_names_differ(lm):
    before, start = lm.fingerprint, {n: x.clone() for n, x in lm.model.state_dict().items()}
    layer = lm.model.model.layers[5]
    step = torch.optim.SGD(layer.parameters(), lr=0.1)
    lm.model(torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([[1, 2, 3, 4]])).loss.backward()
    step.step()
    lm.model.zero_grad()
    trained = lm.fingerprint
    other = {n: x + 0.5 * (n == "model.layers.2.mlp.up_proj.weight") for n, x in start.items()}
    lm.model.load_state_dict(other)
    assert len({before, trained, lm.fingerprint}) == 3
    lm.model.load_state_dict(start)
    assert lm.fingerprint == before
    lm.model.to(torch.float64)
    assert lm.fingerprint != before


def test_a_copy_with_another_fingerprint_is_that_and_follows_the_weights_too(lm):
    other = replace(lm, fingerprint="another")
    assert other.fingerprint == "another" and replace(lm, fingerprint="").fingerprint == ""
    lm.model.model.norm.weight.data[3] += 1
    changed = lm.fingerprint
    assert other.fingerprint == "another+" + changed.partition("+")[2] and replace(lm, name="x").fingerprint == changed


def test_sums_are_those_of_the_definition_whatever_the_size_and_the_steps(monkeypatch):
    g = torch.Generator().manual_seed(1)
    factors = torch.randint(-(1 << 63), (1 << 63) - 1, (contents.BLOCK,), generator=g) | 1
    for n, dtype in (
        (1, torch.bfloat16),
        (7, torch.float32),
        (3 * contents.BLOCK * 2 + 10, torch.float32),
        (0, torch.int8),
    ):
        x = torch.randn(n, generator=g).to(dtype)
        words = torch.nn.functional.pad(x.view(torch.uint8), (0, -x.nbytes % 8)).view(torch.int64)
        expected = [int((part * factors[: len(part)]).sum()) for part in words.split(contents.BLOCK)] if n else []
        assert contents._sums(x, factors).tolist() == expected
        assert contents._sums(x.expand(2, -1).contiguous()[1], factors).tolist() == expected  # not where it begins
    model = random_model("llama", layers=1)
    assert (
        checksum(model)
        == checksum(random_model("llama", layers=1))
        != checksum(random_model("llama", layers=1, seed=1))
    )


def test_tied_and_absent_weights_are_read():
    tied = random_model("qwen3", layers=1)
    before = checksum(tied)
    tied.lm_head.weight.data[5, 5] += 1
    assert checksum(tied) != before
    tied.model.layers[0].mlp.to("meta")
    assert checksum(tied) != before


def test_a_byte_of_a_saved_folder_is_seen_whatever_its_times_say(tmp_path):
    source = random_model("llama", layers=2, d=192)
    source.save_pretrained(tmp_path / "m")
    from transformers import AutoTokenizer

    from ws.cache.places import ASSETS

    AutoTokenizer.from_pretrained(ASSETS / "tiny").save_pretrained(tmp_path / "m")
    first = load_lm(str(tmp_path / "m"), "float32", "cpu").fingerprint
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    assert load_lm(str(tmp_path / "copy"), "float32", "cpu").fingerprint == first
    file = tmp_path / "m" / "model.safetensors"
    stat, at = file.stat(), 1_500_001
    assert stat.st_size > at + 100_000
    with open(file, "r+b") as handle:
        handle.seek(at)
        byte = handle.read(1)
        handle.seek(at)
        handle.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size and file.stat().st_mtime_ns == stat.st_mtime_ns
    assert load_lm(str(tmp_path / "m"), "float32", "cpu").fingerprint != first


def test_bases_of_a_retrained_layer_are_built_anew_and_asking_costs_once(lm, tmp_path, monkeypatch):
    candidates("v7b")
    asked, summed = [], contents.checksum
    shelf = make_shelf(lm, load_behavior("sycophancy"), load_protocol("v7"), cache=tmp_path)
    chosen = [get(name) for name in ("write", "mlp_write", "attn_qkv_read", "global_write")]
    first = shelf.bases(chosen, False)
    monkeypatch.setattr(contents, "checksum", lambda model: asked.append(1) or summed(model))
    again = shelf.bases(chosen, False)
    assert len(asked) == 1 and all(
        torch.equal(a.B, b.B) for n in first for a, b in zip(first[n], again[n], strict=True)
    )
    down = lm.model.model.layers[3].mlp.down_proj.weight
    down.data += 0.1 * torch.randn(down.shape, generator=torch.Generator().manual_seed(0))
    built, build = [], kept.build
    monkeypatch.setattr(kept, "build", lambda m, c, *more: built.append(len(c)) or build(m, c, *more))
    second = shelf.bases(chosen, False)
    assert built == [4] and not torch.allclose(first["mlp_write"][3].B, second["mlp_write"][3].B, atol=1e-3)
    assert torch.equal(first["mlp_write"][2].B, second["mlp_write"][2].B)


PAIRS = tuple(Pair(0, 0, i, f"Is it so, {i}?", "Yes, it is so.", "No, it is not.") for i in range(2))
KEEPS = {
    "bases": lambda lm, b, w, at: make_shelf(lm, b, load_protocol("v7"), cache=at).bases([get("write")], False),
    "part_bases": lambda lm, b, w, at: part_bases(
        make_shelf(lm, b, load_protocol("v7"), cache=at), [get("TaskDiff_contrast")]
    ),
    "read": lambda lm, b, w, at: base_sets(lm, b, load_protocol("v7"))[0].read(lm, at),
    "capture_base": lambda lm, b, w, at: capture_base(lm, b, load_protocol("v7b"), at),
    "capture_steered": lambda lm, b, w, at: capture_steered(lm, b, w, load_protocol("v7"), at),
    "pairs": lambda lm, b, w, at: make_pairs(lm, b, PairConfig(1, 1, 1, max_new_tokens=2), at, False),
    "train": lambda lm, b, w, at: train_adapter(lm, PAIRS, "pos", 0, TrainConfig(max_steps=1), at / "pos", False),
    "delta": lambda lm, b, w, at: delta_svd(lm, ["The mill is near.", "So is the inn."], boot=0, progress=False),
    "states": lambda lm, b, w, at: record_states(lm, load_users()["mara"][:2], path=at / "h", progress=False),
    "users": lambda lm, b, w, at: record_users(lm, load_users(), path=at / "h", progress=False),
    "fingerprint": lambda lm, b, w, at: lm.fingerprint,
}


@pytest.mark.parametrize("changed", ["steered", "worn"])
@pytest.mark.parametrize("what", sorted(KEEPS))
def test_what_keeps_or_keys_refuses_a_steered_model(what, changed, lm, tmp_path):
    candidates("v7b")
    behavior, head = load_behavior("sycophancy"), cvh(128, 8)
    how = (
        weight_steer(lm.model, load_diff("tiny"), 1.0) if changed == "steered" else wear(lm.model, head, torch.ones(8))
    )
    with how, pytest.raises(ValueError, match="^the model is being steered: leave the .* context first$"):
        KEEPS[what](lm, behavior, load_diff("tiny"), tmp_path)
    assert not list(tmp_path.rglob("*"))
    check_plain(lm.model)
    assert "_ws_worn" not in lm.model.lm_head.__dict__


def test_a_model_without_a_fingerprint_refuses_too(lm, tmp_path):
    bare = replace(lm, fingerprint="")
    with weight_steer(lm.model, load_diff("tiny"), 1.0), pytest.raises(ValueError, match="is being steered"):
        KEEPS["capture_base"](bare, load_behavior("sycophancy"), None, tmp_path)
    with pytest.raises(ValueError, match="is being steered"):
        with wear(lm.model, cvh(128, 8), torch.ones(8)), wear(lm.model, cvh(128, 8), torch.ones(8)):
            delta_svd(bare, ["The mill is near.", "So is the inn."], boot=0, progress=False)
    check_plain(lm.model)


def test_under_a_foreign_hook_nothing_is_kept_and_a_buffer_that_is_not_saved_counts():
    lm = load_lm("tiny", "float32", "cpu")
    before = lm.fingerprint
    handle = lm.model.model.layers[2].register_forward_hook(lambda m, i, o: o)
    assert lm.fingerprint == ""  # activation steering by a hook: bases and captures are neither read nor kept
    handle.remove()
    assert lm.fingerprint == before
    lm.model.model.rotary_emb.inv_freq.mul_(1.5)
    assert lm.fingerprint != before


def test_nothing_is_written_or_trained_under_a_foreign_hook(tmp_path):
    from ws.train.pairs import PairConfig, make_pairs

    lm, behavior = load_lm("tiny", "float32", "cpu"), load_behavior("sycophancy")
    lm.model.model.layers[1].register_forward_hook(lambda m, i, o: o)
    with pytest.raises(ValueError, match="a forward hook is set on the model: remove it"):
        make_pairs(
            lm, behavior, PairConfig(topics=2, personas=1, samples=1, max_new_tokens=4), tmp_path, progress=False
        )
    assert not any(tmp_path.iterdir())


def test_a_model_at_rest_is_read_once_and_still_refuses_to_be_steered(monkeypatch):
    from ws.model import contents

    lm = load_lm("tiny")
    rest, read = lm.at_rest(), []
    monkeypatch.setattr(contents, "checksum", lambda model: read.append(1) or "other")
    assert rest.fingerprint == rest.fingerprint and not read and lm.fingerprint.endswith("+other") and len(read) == 1
    handle = rest.model.register_forward_hook(lambda *_: None)
    assert rest.fingerprint == ""
    handle.remove()
    with weight_steer(lm.model, load_diff("tiny"), 1.0), pytest.raises(ValueError, match="being steered"):
        rest.fingerprint  # noqa: B018
    assert replace(lm, fingerprint="").at_rest().fingerprint == ""
