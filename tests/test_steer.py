"""Weight steering: W + alpha w inside, every bit back outside, refusal before touching, no dead zone in bfloat16."""

import copy

import pytest
import torch
from conftest import random_model
from torch import nn

from ws.diff import LowRank, WeightDiff
from ws.steer.weights import weight_steer


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def clean(model):
    """No hook and no mark is left behind."""
    marks = [m for m in model.modules() if m._forward_hooks or hasattr(m, "_ws_live")]
    return not marks and not any(hasattr(p, "_ws_open") for p in model.parameters())


def diff_for(model, relative, seed=0, roles=("q_proj", "o_proj", "up_proj", "down_proj"), rank=4):
    """A random low-rank diff with |w| / |W| = relative per matrix."""
    generator = torch.Generator().manual_seed(seed)
    entries = {}
    for name, p in model.named_parameters():
        if p.ndim == 2 and any(role in name for role in roles):
            B, A = (
                torch.randn(p.shape[0], rank, generator=generator),
                torch.randn(rank, p.shape[1], generator=generator),
            )
            entries[name] = LowRank(B * (relative * p.float().norm() / (B @ A).norm()).item(), A)
    return WeightDiff(entries)


def ids(n=6, T=20, seed=1):
    return torch.randint(3, 600, (n, T), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float()


def added(model, w, alpha):
    """The textbook way: a copy with alpha w added to its float32 weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name in w.names:
            model.get_parameter(name).add_(alpha * w.dense(name))
    return model


@pytest.fixture(params=["float32", "bfloat16"])
def model(request):
    return random_model("llama").to(getattr(torch, request.param))


def test_float32_equals_weights_added():
    model = random_model("qwen3")
    w, tokens, before = diff_for(model, 0.3), ids(), bits(model)
    base = logits(model, tokens)
    with weight_steer(model, w, -1.5) as inside:
        assert inside is model
        steered = logits(model, tokens)
    torch.testing.assert_close(steered, logits(added(model, w, -1.5), tokens), rtol=0, atol=1e-5)
    assert (steered - base).abs().max() > 0.1
    assert same(model, before) and clean(model) and torch.equal(logits(model, tokens), base)


def test_zero_changes_nothing(model):
    w, tokens, before = diff_for(model, 0.3), ids(), bits(model)
    base = logits(model, tokens)
    with weight_steer(model, w, 0):
        assert torch.equal(logits(model, tokens), base) and same(model, before) and clean(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_restored_after_exception(model, error):
    w, before, base = diff_for(model, 0.3), bits(model), logits(model, ids())
    with pytest.raises(error), weight_steer(model, w, 1.0):
        raise error
    assert same(model, before) and clean(model) and torch.equal(logits(model, ids()), base)


@pytest.mark.parametrize("at", [0, 3, 7])
def test_restored_after_interrupt_while_entering(model, at, monkeypatch):
    import ws.steer.weights as steer

    w, before = diff_for(model, 0.3), bits(model)
    calls = []
    kind = steer._InPlace if model.dtype == torch.float32 else steer._Hooked
    enter = kind.enter

    def interrupted(self):
        enter(self)
        calls.append(self)
        if len(calls) > at:
            raise KeyboardInterrupt

    monkeypatch.setattr(kind, "enter", interrupted)
    with pytest.raises(KeyboardInterrupt), weight_steer(model, w, 1.0):
        pass
    assert len(calls) == at + 1 and same(model, before) and clean(model)


def test_nested_on_overlapping_parameters(model):
    w, v, tokens, before = (
        diff_for(model, 0.3),
        diff_for(model, 0.2, seed=9, roles=("o_proj", "gate_proj")),
        ids(),
        bits(model),
    )
    base = logits(model, tokens)
    with weight_steer(model, w, 1.0):
        outer, middle = logits(model, tokens), bits(model)
        with weight_steer(model, v, 1.0):
            both = logits(model, tokens)
        assert same(model, middle) and torch.equal(logits(model, tokens), outer)
    assert same(model, before) and clean(model) and torch.equal(logits(model, tokens), base)
    wide = random_model("llama").to(model.dtype).float()
    truth = logits(added(added(wide, w, 1.0), v, 1.0), tokens)
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1 * (truth - base).abs().max().item()
    torch.testing.assert_close(both, truth, rtol=0, atol=tolerance)


def test_contexts_left_out_of_order(model):
    w, v, tokens, before = diff_for(model, 0.3), diff_for(model, 0.2, seed=9), ids(), bits(model)
    with weight_steer(model, v, 1.0):
        only = logits(model, tokens)
    first, second = weight_steer(model, w, 1.0), weight_steer(model, v, 1.0)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits(model, tokens), only)
    second.__exit__(None, None, None)
    assert same(model, before) and clean(model)


def test_refused_before_anything_is_touched(model):
    good = diff_for(model, 0.3)
    name = "model.layers.1.mlp.down_proj.weight"
    cases = {
        "model.layers.9.mlp.up_proj.weight: no such parameter": {"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)},
        f"{name}: diff is 48x97, model has 48x96": {name: torch.ones(48, 97)},
    }
    before = bits(model)
    for message, entries in cases.items():
        with (
            pytest.raises(ValueError, match=message),
            weight_steer(model, WeightDiff({**good.entries, **entries}), 1.0),
        ):
            pytest.fail("entered")
        assert same(model, before) and clean(model)
    with pytest.raises(ValueError, match="alpha is nan"), weight_steer(model, good, float("nan")):
        pass


def test_offloaded_parameter_is_named():
    model = random_model("llama")
    w = diff_for(model, 0.1)
    model.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj.weight: not in memory"), weight_steer(model, w, 1.0):
        pass


def effect_ratio(wide, narrow, w, tokens):
    """Mean effect of the narrow model along the float32 effect, per unit of it."""
    truth = (logits_of(wide, w, tokens, 1.0) - logits_of(wide, w, tokens, -1.0)).double()
    seen = (logits_of(narrow, w, tokens, 1.0) - logits_of(narrow, w, tokens, -1.0)).double()
    return float((truth * seen).sum() / (truth * truth).sum())


def logits_of(model, w, tokens, alpha):
    with weight_steer(model, w, alpha):
        return logits(model, tokens)


def test_bfloat16_keeps_a_small_diff():
    """|w| / |W| = 1e-3: within 2 % of float32, where rounding it into the weights would lose much of it."""
    narrow = random_model("llama", d=96).bfloat16()
    wide = copy.deepcopy(narrow).float()
    w, tokens, before = diff_for(narrow, 1e-3), ids(64, 64), bits(narrow)
    assert effect_ratio(wide, narrow, w, tokens) == pytest.approx(1, abs=0.02)
    assert same(narrow, before) and clean(narrow)
    x = torch.randn(4000, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    name = "model.layers.1.self_attn.q_proj.weight"
    layer = narrow.model.layers[1].self_attn.q_proj
    truth = x.float() @ w.dense(name).T
    with torch.no_grad():
        plain = layer(x).float()
        with weight_steer(narrow, w, 1.0):
            steered = layer(x).float() - plain
        rounded = plain.bfloat16() + truth.bfloat16()
        naive = rounded.float() - plain
        into_weights = x.float() @ ((layer.weight + w.dense(name).bfloat16()).float() - layer.weight.float()).T

    def slope(effect):
        return float((effect * truth).sum() / (truth * truth).sum())

    assert slope(steered) == pytest.approx(1, abs=0.02)
    # rounded once: the nearest bfloat16 to the exact value, but for ties of the summation order
    exact = (x.float() @ (layer.weight.float() + w.dense(name)).T).bfloat16().float().detach()
    assert (steered + plain == exact).float().mean() > 0.99
    assert (naive + plain == exact).float().mean() < 0.97
    # what the hook avoids: both short cuts lose much of the effect in the dead zone
    assert slope(naive) < 0.9 and slope(into_weights.detach()) < 0.9


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_bfloat16_tied_embedding_and_norm_and_dense(family):
    """Embedding (tied), a norm and a dense matrix in bfloat16 against float32."""
    narrow = random_model(family, tie_word_embeddings=True).bfloat16()
    wide = copy.deepcopy(narrow).float()
    generator = torch.Generator().manual_seed(2)
    embed = narrow.get_parameter("model.embed_tokens.weight")
    size = 0.05 * embed.float().norm() / (600 * 48) ** 0.5
    parts = {
        "embedding": {
            "model.embed_tokens.weight": LowRank(size * torch.randn(600, 3, generator=generator), torch.randn(3, 48))
        },
        "norm": {"model.layers.1.input_layernorm.weight": 0.2 * torch.randn(48, generator=generator)},
        "dense": {"model.layers.1.mlp.down_proj.weight": 0.05 * torch.randn(48, 96, generator=generator)},
    }
    for entries in parts.values():
        w = WeightDiff(entries)
        torch.testing.assert_close(effect_ratio(wide, narrow, w, ids(32, 24)), 1.0, rtol=0, atol=0.03)
        assert clean(narrow)
    # both uses of the tied matrix are steered
    w = WeightDiff(parts["embedding"])
    hidden = torch.randn(5, 48, generator=generator).bfloat16()
    with torch.no_grad(), weight_steer(narrow, w, 1.0):
        out, rows = narrow.lm_head(hidden).float(), narrow.model.embed_tokens(torch.arange(600)).float()
    changed = embed.float() + w.dense("model.embed_tokens.weight")
    torch.testing.assert_close(out, (hidden.float() @ changed.T).bfloat16().float().detach(), rtol=0.01, atol=0.02)
    scale = float(getattr(narrow.model.embed_tokens, "embed_scale", torch.tensor(1.0)).bfloat16())
    torch.testing.assert_close(rows, (changed * scale).bfloat16().float().detach(), rtol=0.01, atol=1e-3)


def test_biases_in_bfloat16():
    narrow = random_model("qwen2").bfloat16()
    wide = copy.deepcopy(narrow).float()
    q, v = (f"model.layers.1.self_attn.{role}_proj.bias" for role in "qv")
    w = WeightDiff({q: torch.randn(48, generator=torch.Generator().manual_seed(0)), v: torch.ones(24)})
    assert effect_ratio(wide, narrow, w, ids(16, 16)) == pytest.approx(1, abs=0.03)


def test_two_names_of_one_parameter():
    model = random_model("qwen3")
    a = torch.randn(600, 48)
    w = WeightDiff({"model.embed_tokens.weight": a, "lm_head.weight": a.clone()})
    before = bits(model)
    with weight_steer(model, w, 1.0):
        torch.testing.assert_close(model.lm_head.weight.detach(), before["model.embed_tokens.weight"] + a)
    assert same(model, before)
    with pytest.raises(ValueError, match="lm_head.weight are one tied parameter"):
        with weight_steer(model, WeightDiff({**w.entries, "lm_head.weight": 2 * a}), 1.0):
            pass


def test_what_cannot_be_steered_in_low_precision_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))

    model = nn.ModuleDict({"odd": Odd()})
    w = WeightDiff({"odd.weight": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="odd.weight: what a Odd does"), weight_steer(model, w, 1.0):
        pass


def test_peft_wrapped_model(model):
    from peft import LoraConfig, get_peft_model

    w, tokens, before = diff_for(model, 0.3), ids(), bits(model)
    with weight_steer(model, w, 1.0):
        truth = logits(model, tokens)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config).eval()
    frozen = bits(wrapped)
    head = WeightDiff({"lm_head.weight": torch.full((600, 48), 0.1)})
    base = logits(wrapped, tokens)
    with weight_steer(wrapped, w, 1.0):
        torch.testing.assert_close(logits(wrapped, tokens), truth, rtol=0, atol=1e-5)
    with weight_steer(wrapped, head, 1.0):
        assert (logits(wrapped, tokens) - base).abs().max() > 0.1
    assert same(wrapped, frozen) and clean(wrapped)
    assert all(torch.equal(p, before[n]) for n, p in wrapped.unload().named_parameters() if n in before)


def test_device_map_model(model, tmp_path):
    from accelerate import dispatch_model

    w, tokens, before = diff_for(model, 0.3), ids(), bits(model)
    with weight_steer(model, w, 1.0):
        truth = logits(model, tokens)
    names = {
        "model.embed_tokens": "cpu",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    spread = dispatch_model(model, device_map=names, force_hooks=True)
    with weight_steer(spread, w, 1.0):
        assert torch.equal(logits(spread, tokens), truth)
    assert same(spread, before)


def test_a_compiled_model_in_half_precision_is_refused():
    """Code that was compiled before the hooks were set would run without them."""
    model = random_model("llama", layers=1).to(torch.bfloat16)
    name = "model.layers.0.mlp.down_proj.weight"
    w = WeightDiff({name: torch.ones(model.get_parameter(name).shape)})
    compiled = torch.compile(model, backend="eager")
    with (
        pytest.raises(ValueError, match="compiled model in half precision does not see w"),
        weight_steer(compiled, w, 1.0),
    ):
        pass
    with weight_steer(torch.compile(random_model("llama", layers=1), backend="eager"), w, 1.0):
        pass
