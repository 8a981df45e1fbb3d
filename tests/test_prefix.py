"""What all texts of a batch begin with is read once, and nothing else changes."""

import pytest
import torch
from torch import nn

from tests.conftest import FAMILIES, random_model
from ws.model.prefix import LEAST, logits_at, shared

LEAD = list(range(20, 20 + LEAST + 5))
ROWS = [[7, 8, 9], [7, 11], [12, 13, 14, 15, 16]]


def batch(lead=LEAD, rows=ROWS, left=False):
    texts = [lead + row for row in rows]
    width = max(map(len, texts))
    pad = [[0] * (width - len(text)) for text in texts]
    ids = torch.tensor([p + t if left else t + p for p, t in zip(pad, texts, strict=True)])
    real = [
        [0] * len(p) + [1] * len(t) if left else [1] * len(t) + [0] * len(p) for p, t in zip(pad, texts, strict=True)
    ]
    return ids, torch.tensor(real)


def read(model):
    """The tokens that go through the embedding from now on."""
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].numel()))
    return seen


@pytest.mark.parametrize(
    ("family", "window"), [*((f, None) for f in FAMILIES), ("mistral", 8), ("gemma2", 8), ("gemma3", 8)]
)
def test_logits_and_gradients_are_those_of_each_text_alone(family, window, monkeypatch):
    model = random_model(family, **({"sliding_window": window} if window else {}))
    monkeypatch.setattr("ws.model.prefix.hooked", lambda *_: False)  # the counter below is a hook
    seen, (ids, mask) = read(model), batch()
    rows, at = torch.tensor([0, 0, 1, 2]), torch.tensor([len(LEAD), len(LEAD) + 2, len(LEAD) + 1, len(LEAD) + 4])
    together = logits_at(model, ids, mask, rows, at)
    assert sum(seen) == len(LEAD) + 3 * 5, "the lead was read once"
    weight = model.model.layers[0].mlp.up_proj.weight
    grad = torch.autograd.grad(together.square().mean(), weight)[0]
    alone = [model(torch.tensor([LEAD + row])).logits[0] for row in ROWS]
    alone = torch.stack([alone[row][place] for row, place in zip(rows.tolist(), at.tolist(), strict=True)])
    assert torch.allclose(together, alone, atol=2e-5 * float(alone.detach().abs().max()))
    plain = torch.autograd.grad(alone.square().mean(), weight)[0]
    assert float((grad - plain).norm() / plain.norm()) < 1e-5


def test_what_is_shared():
    ids, mask = batch()
    at = torch.tensor([len(LEAD) + 1])
    assert shared(ids, mask, at) == len(LEAD)  # two of three go on alike
    assert shared(ids[:2], mask[:2], at) == len(LEAD) + 1
    assert shared(ids, mask, torch.tensor([LEAST])) == LEAST
    assert shared(ids[:1], mask[:1], at) == 0
    assert shared(*batch(LEAD[: LEAST - 1]), at) == 0
    assert shared(*batch(left=True), at) == 0
    ids, mask = batch(rows=[[7], [7], []])  # the last text ends with the lead
    assert shared(ids, mask, torch.tensor([len(LEAD) - 1])) == len(LEAD) - 1


@pytest.mark.parametrize("why", ["hook", "dropout", "checkpointing", "long"])
def test_each_text_is_read_alone_where_it_must_be(why):
    model = random_model("qwen3")
    if why == "hook":
        model.model.layers[0].register_forward_hook(lambda _m, _i, out: out)
    elif why == "dropout":
        model.train().add_module("drop", nn.Dropout(0.1))
    elif why == "checkpointing":
        model.train().gradient_checkpointing_enable()
    else:
        model.config.max_position_embeddings = 20
    ids, mask = batch()
    calls = []
    forward = model.model.forward
    model.model.forward = lambda *a, **k: calls.append(1) or forward(*a, **k)
    logits_at(model, ids, mask, torch.tensor([0]), torch.tensor([len(LEAD)]))
    assert calls == [1]


def test_positions_nobody_asks_about_are_not_unembedded():
    model, seen = random_model("gemma2"), []
    model.lm_head.register_forward_hook(lambda _m, inputs, _o: seen.append(tuple(inputs[0].shape)))
    ids, mask = batch()
    got = logits_at(model, ids, mask, torch.tensor([2, 0, 1]), torch.tensor([24, 3, 3]))
    assert seen == [(3, 2, 48)]
    assert torch.allclose(got[1], model(ids[:1], attention_mask=mask[:1]).logits[0, 3], atol=1e-5)


def test_a_hook_on_the_unembedding_sees_texts_as_rows():
    """Somebody's edit of the last logits is the last of each text, not of what was gathered."""
    model, (ids, mask) = random_model("llama"), batch(rows=[[7, 8], [9, 10], [11, 12]])

    def edit(_module, _inputs, out):
        out = out.clone()
        out[:, -1] += 1
        return out

    plain = torch.stack([model(ids[i : i + 1]).logits[0, -1] for i in range(3)])
    model.lm_head.register_forward_hook(edit)
    got = logits_at(model, ids, mask, torch.arange(3), torch.full((3,), ids.shape[1] - 1))
    assert torch.allclose(got, plain + 1, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_unembeds_everything_gives_the_same(wrapped, monkeypatch):
    model, (ids, mask) = random_model("qwen3"), batch()
    some = logits_at(model, ids, mask, torch.arange(3), mask.sum(dim=1) - 1)
    if wrapped:
        model = nn.DataParallel(model)
    else:
        monkeypatch.setattr("ws.model.prefix.unembeds_some", lambda _: False)
    every = logits_at(model, ids, mask, torch.arange(3), mask.sum(dim=1) - 1)
    assert torch.allclose(some, every, atol=1e-5)
