"""Half-precision models are read in float32: the same tensors come back, and a small w is seen through the rounding."""

import copy
import signal
from dataclasses import replace

import pytest
import torch
from conftest import random_model
from test_steer import diff_for

from ws.data import load_behavior
from ws.model import wide
from ws.model.decoder import Decoder
from ws.model.guard import Guarded
from ws.model.lm import load_lm
from ws.model.wide import widened
from ws.steer.weights import weight_steer
from ws.subspaces.captures import base_sets, capture_base
from ws.subspaces.protocol import load_protocol
from ws.subspaces.reading import read_texts
from ws.subspaces.steered import capture_steered


def tensors(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_is_its_exact_value_and_the_very_tensors_come_back(family, dtype):
    model = random_model(family, layers=2).to(dtype)
    model.register_buffer("extra", torch.ones(3, dtype=dtype))
    before = [(x, x.data_ptr(), x.dtype, x.detach().clone()) for x in tensors(model)]
    wide = copy.deepcopy(model).float()
    with widened(model) as inside:
        assert inside is model and model.dtype == torch.float32
        assert all(x.dtype == torch.float32 for x in tensors(model))
        assert all(torch.equal(x, y) for x, y in zip(tensors(model), tensors(wide), strict=True))
        with widened(model), torch.no_grad():
            ids = torch.arange(3, 20)[None]
            assert torch.equal(model(ids).logits, wide(ids).logits)
    for x, (y, place, kind, bits) in zip(tensors(model), before, strict=True):
        assert x is y and x.data_ptr() == place and x.dtype == kind and torch.equal(x, bits)


def test_float32_and_offloaded_models_stay_as_they_are():
    model = random_model("llama", layers=1)
    places = [x.data_ptr() for x in tensors(model)]
    with widened(model):
        assert [x.data_ptr() for x in tensors(model)] == places
    model.bfloat16().model.layers[0].mlp.to("meta")
    with widened(model):
        assert model.dtype == torch.bfloat16


class Interrupting(Guarded):
    def start(self):
        self.undo.append(lambda: signal.raise_signal(signal.SIGINT))


@pytest.mark.usefixtures("pythons_own_handler")
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupts_and_errors_leave_the_very_tensors(error, monkeypatch):
    model = random_model("llama", layers=1).bfloat16()
    places = [x.data_ptr() for x in tensors(model)]

    def same():
        return [x.data_ptr() for x in tensors(model)] == places and model.dtype == torch.bfloat16

    with pytest.raises(error), widened(model), weight_steer(model, diff_for(model, 0.1), 1.0):
        raise error
    assert same()
    with pytest.raises(KeyboardInterrupt), widened(model), Interrupting(None):
        assert not same()
    assert same()
    widen, calls = torch.Tensor.float, []

    def fails(x):
        calls.append(x)
        if len(calls) == 5:
            raise error
        return widen(x)

    monkeypatch.setattr(torch.Tensor, "float", fails)
    with pytest.raises(error), widened(model):
        pytest.fail("entered")
    monkeypatch.undo()
    assert len(calls) == 5 and same()


@pytest.fixture(scope="module")
def half():
    return load_lm("tiny", "bfloat16", "cpu")


@pytest.fixture(scope="module")
def full(half):
    """The same weights in float32."""
    model = copy.deepcopy(half.model).float()
    return replace(half, model=model, decoder=Decoder(model), fingerprint="")


def noise(found, truth) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize(("size", "narrow_noise"), [(1e-2, 0.3), (1e-3, 3.0)])
def test_steered_differences_of_a_small_w_are_not_drowned(half, full, size, narrow_noise):
    behavior, v7 = load_behavior("sycophancy"), load_protocol("v7")
    w = diff_for(half.model, size, roles=("q_proj", "o_proj", "down_proj"), rank=8)
    found, truth = (capture_steered(lm, behavior, w, v7) for lm in (half, full))
    for name in ("eval", "fit", "eval_block"):
        off = noise(getattr(found, name), getattr(truth, name))
        print(f"|w|/|W| {size:g} {name}: noise {off:.2g} of the signal")
        assert off < 1e-2 * 1e-2 / size
    texts = [behavior.probe_text(t.claim) for t in behavior.topics[:16]]
    sides = []
    for alpha in (1.0, -1.0):
        with weight_steer(half.model, w, alpha):
            sides.append(read_texts(half, texts, True).resid)
    drowned = noise(sides[0] - sides[1], truth.fit)  # what reading it in bfloat16 would give
    print(f"|w|/|W| {size:g}, read in bfloat16: noise {drowned:.2g} of the signal")
    assert drowned > narrow_noise


def test_base_captures_of_a_half_precision_model_are_those_of_its_weights_in_float32(half, full):
    behavior = load_behavior("sycophancy")
    for protocol in ("v7", "v7b"):
        found, truth = (capture_base(lm, behavior, load_protocol(protocol)) for lm in (half, full))
        for side in ("clean", "pos", "neg"):
            for what in ("resid", "tokens", "up_in", "attn", "embed"):
                a, b = (getattr(getattr(x, side), what) for x in (found, truth))
                a, b = (a.dense(), b.dense()) if what == "tokens" else (a, b)
                assert noise(a, b) < 1e-5, (protocol, side, what)
    assert half.model.dtype == torch.bfloat16
    clean = base_sets(half, behavior, load_protocol("v7b"))[0]
    assert noise(read_texts(half, list(clean.texts), clean.special).resid, truth.clean.resid) > 1e-3  # in bfloat16


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "olmo2"])
@pytest.mark.parametrize("steered", [False, True])
def test_block_by_block_gives_the_same_numbers_and_one_block_at_a_time(family, steered):
    model = random_model(family, layers=3).bfloat16()
    decoder, ids = Decoder(model), torch.arange(3, 20)[None]
    before = [(x, x.data_ptr(), x.detach().clone()) for x in tensors(model)]
    w = diff_for(model, 0.05)
    alpha, seen = 0.5 if steered else 0.0, []

    def look(block, _):
        wide = [b for b in decoder.blocks if any(x.dtype == torch.float32 for x in b.mlp.parameters())]
        seen.append(wide == [block])

    with torch.no_grad():
        with widened(model), weight_steer(model, w, alpha):
            whole = model(ids).logits
        with widened(model, by_block=True), weight_steer(model, w, alpha):
            handles = [block.register_forward_pre_hook(look) for block in decoder.blocks]
            turns = model(ids).logits
            assert all(x.dtype == torch.bfloat16 for block in decoder.blocks for x in block.parameters())
            for handle in handles:
                handle.remove()
    assert seen == [True] * 3 and turns.dtype == torch.float32
    assert torch.equal(whole, turns) if not steered else (whole - turns).abs().max() < 2e-5 * whole.abs().max()
    for x, (y, place, bits) in zip(tensors(model), before, strict=True):
        assert x is y and x.data_ptr() == place and torch.equal(x, bits)


def test_an_error_inside_a_block_leaves_no_block_wide():
    model = random_model("qwen3", layers=2).bfloat16()
    before = [(x.data_ptr(), x.dtype) for x in tensors(model)]

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), widened(model, by_block=True):
        model(torch.arange(3, 20)[None])
    handle.remove()
    assert [(x.data_ptr(), x.dtype) for x in tensors(model)] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_contexts_of_both_kinds_nest_and_what_is_wide_already_stays():
    model, ids = random_model("qwen3", layers=2).bfloat16(), torch.arange(3, 20)[None]
    w = diff_for(model, 0.05)
    before = [(x.data_ptr(), x.dtype) for x in tensors(model)]
    with torch.no_grad():
        with widened(model), weight_steer(model, w, 1.0):
            expected = model(ids).logits
        with widened(model, by_block=True), widened(model), weight_steer(model, w, 1.0):
            assert torch.equal(model(ids).logits, expected)
        with widened(model), widened(model, by_block=True), weight_steer(model, w, 1.0):
            assert torch.equal(model(ids).logits, expected)
    assert [(x.data_ptr(), x.dtype) for x in tensors(model)] == before


def test_an_unembedding_is_wide_some_rows_at_a_time(monkeypatch):
    model = random_model("llama", layers=2).bfloat16()
    head, ids = model.get_output_embeddings(), torch.arange(3, 20)[None]
    own, rows = torch.nn.functional.linear, []
    monkeypatch.setattr(wide, "ROWS", 100)
    monkeypatch.setattr(wide.F, "linear", lambda x, W, b=None: rows.append((W.shape[0], W.dtype)) or own(x, W, b))
    with torch.no_grad():
        with widened(model):
            whole = model(ids).logits
        rows.clear()
        with widened(model, by_block=True):
            turns = model(ids).logits
            assert head.weight.dtype == torch.bfloat16
    assert head.weight.shape[0] == 600 and rows[-6:] == [(100, torch.float32)] * 6 and len(rows) == 2 * 7 + 6
    assert torch.allclose(whole, turns, rtol=1e-5, atol=1e-6) and "forward" not in vars(head)
