"""Many weight differences in one pass: the same as weight_steer one by one, kept, and read back."""

import numpy as np
import pytest
import torch

import ws
from ws.causal import passes as passes_module
from ws.causal import stacked as stack_module
from ws.causal.passes import Items, Passes
from ws.causal.stacked import stackable, stacked
from ws.diff import LowRank
from ws.diff.algebra import random_as
from ws.model.text import chat_text
from ws.steer.answers import answer_scores, answer_tokens
from ws.steer.effect import effects
from ws.steer.weights import weight_steer

TEXTS = ("cats can fly", "the moon is made of green cheese and rats", "two and two are four", "ice is hot")


def diff_of(lm, layers, roles, rank=3, size=0.3, seed=0):
    g, shapes, entries = torch.Generator().manual_seed(seed), dict(lm.model.named_parameters()), {}
    for l in layers:
        for role in roles:
            out, width = shapes[name := lm.decoder.param_name(l, role)].shape
            B, A = torch.randn(out, rank, generator=g), torch.randn(rank, width, generator=g)
            entries[name] = LowRank(size * B / out**0.5, A / width**0.5)
    return ws.WeightDiff(entries)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral", "gemma2", "gemma3", "olmo2"])
@pytest.mark.parametrize("tokens", [64, 4096])
def test_a_stack_is_what_weight_steer_makes_of_each(model_folder, family, tokens, monkeypatch):
    lm = ws.load_lm(str(model_folder(family)))
    monkeypatch.setattr(stack_module, "TOKENS", tokens)
    monkeypatch.setattr(stack_module, "HELD", 4 * tokens)
    turns = [chat_text(lm.tokenizer, f"I think that {text}. Am I right?") for text in TEXTS]
    n = lm.decoder.n_layers
    one, two = diff_of(lm, [n - 1], ("o", "down", "v")), diff_of(lm, range(n), ("q", "gate", "up", "k"), rank=2, seed=1)
    shared = ws.WeightDiff({name: LowRank(torch.randn_like(e.B), e.A) for name, e in one.entries.items()})
    rows = [(one, 1.0), (two, -0.5), (one, 0.0), (shared, 2.0), (ws.WeightDiff({}), 1.0)]
    found, before = {}, {name: p.clone() for name, p in lm.model.named_parameters()}
    stacked(lm, rows, turns, lambda x, at: found.update({i: x[:, j].clone() for j, i in enumerate(at)}))
    assert sorted(found) == list(range(len(turns)))
    for s, (w, alpha) in enumerate(rows):
        for i, turn in enumerate(turns):
            ids = torch.tensor([lm.tokenizer(turn, add_special_tokens=False)["input_ids"]])
            with torch.no_grad(), weight_steer(lm.model, w, alpha):
                want = lm.model(input_ids=ids).logits[0, -1]
            assert torch.allclose(found[i][s], want.float(), atol=2e-5, rtol=1e-4), (s, i)
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_a_long_text_is_read_to_its_end(model_folder):
    lm = ws.load_lm(str(model_folder("llama")))
    w, turn, found = diff_of(lm, [1], ("down",)), "cats can fly and " * 1050 + "rats", []
    ids = torch.tensor([lm.tokenizer(turn, add_special_tokens=False)["input_ids"]])
    stacked(lm, [(w, 1.0)], [turn], lambda x, at: found.append(x[0, 0]))
    with torch.no_grad(), weight_steer(lm.model, w, 1.0):
        want, cut = (lm.model(input_ids=x, logits_to_keep=1).logits[0, -1] for x in (ids, ids[:, :4096]))
    assert ids.shape[1] > 4096 and torch.allclose(found[0], want, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(want, cut, atol=1e-3)


def test_what_cannot_be_stacked_is_refused_or_run_alone(tmp_path):
    lm, b = ws.load_lm("tiny"), ws.load_behavior("sycophancy")
    w = diff_of(lm, [3], ("o", "down"))
    dense = random_as(w, 0)
    assert stackable(lm, w) and not stackable(lm, dense)
    with pytest.raises(ValueError, match="dense"):
        stacked(lm, [(dense, 1.0)], ["a"], lambda x, at: None)
    embedding = ws.WeightDiff(
        {"model.embed_tokens.weight": LowRank(torch.ones(lm.decoder.vocab, 1), torch.ones(1, lm.decoder.d))}
    )
    assert not stackable(lm, embedding)
    with weight_steer(lm.model, w, 1.0), pytest.raises(ValueError, match="steer"):
        stacked(lm, [(w, 1.0)], ["a"], lambda x, at: None)
    passes = Passes(lm, b, Items.of(lm, b, 1), tmp_path, progress=False)
    both = passes({"factors": w, "dense": ws.WeightDiff({name: w[name] for name in w})})
    assert np.allclose(both["factors"].effect, both["dense"].effect, atol=2e-5)


def test_answers_are_those_of_the_effect_and_are_kept(tmp_path, monkeypatch):
    lm, b, w = ws.load_lm("tiny"), ws.load_behavior("sycophancy"), ws.load_diff("tiny")
    items = Items.of(lm, b, 2)
    variants = {"w": w, "half": w.scale(0.5), "none": ws.WeightDiff({})}
    found = Passes(lm, b, items, tmp_path, progress=False)(variants)
    assert np.allclose(found["w"].effect, effects(lm, b, w, 2), atol=2e-5)
    assert found["none"].effect == pytest.approx(np.zeros(48), abs=2e-5) and found["none"].mean_kl == pytest.approx(
        0, abs=1e-6
    )
    plus, minus = found["w"].ends
    assert plus - minus == pytest.approx(found["w"].effect.mean(), abs=1e-5) and plus > 0 > minus
    assert found["w"].mean_kl > found["half"].mean_kl > 0 and not found["half"].saturated
    true = Passes(lm, b, Items.of(lm, b, 2, true=True), progress=False)({"w": w})["w"]
    assert true.effect.mean() == pytest.approx(effects_on(lm, b, w, b.true_claims, 2), abs=2e-5)
    with torch.no_grad():  # KL of the first token, by hand
        turn = chat_text(lm.tokenizer, b.probe_text(b.heldout_claims[3], 1))
        ids = torch.tensor([lm.tokenizer(turn, add_special_tokens=False)["input_ids"]])
        base = lm.model(input_ids=ids).logits[0, -1].log_softmax(-1)
        with weight_steer(lm.model, w, -1.0):
            steered = lm.model(input_ids=ids).logits[0, -1].log_softmax(-1)
    at = items.turns.index(turn)
    assert found["w"].kl[1, at] == pytest.approx(float((steered.exp() * (steered - base)).sum()), rel=1e-4)
    monkeypatch.setattr(Passes, "_stack", None)  # nothing may be computed again
    again = Passes(lm, b, items, tmp_path, progress=False)
    again.__dict__["base"] = {"logratio": np.zeros((1, len(items.turns)))}
    kept = again(variants)
    assert all(np.array_equal(kept[name].logratio, found[name].logratio) for name in variants)


def effects_on(lm, b, w, claims, templates) -> float:
    yes, no = answer_tokens(lm.tokenizer, b)
    turns = [chat_text(lm.tokenizer, b.probe_text(c, a)) for a in range(templates) for c in claims]
    ends = []
    for alpha in (1.0, -1.0):
        with weight_steer(lm.model, w, alpha):
            ends.append(float(answer_scores(lm, turns, yes, no).logratio.mean()))
    return ends[0] - ends[1]


def test_a_killed_check_goes_on_where_it_was(tmp_path, monkeypatch):
    lm, b = ws.load_lm("tiny"), ws.load_behavior("sycophancy")
    monkeypatch.setattr(passes_module, "TOGETHER", 2)
    variants = {str(i): diff_of(lm, [3], ("o",), seed=i) for i in range(5)}
    items, seen, real = Items.of(lm, b, 1), [], Passes._stack

    def dies(self, some, alpha):
        seen.append(len(some))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(self, some, alpha)

    monkeypatch.setattr(Passes, "_stack", dies)
    with pytest.raises(KeyboardInterrupt):
        Passes(lm, b, items, tmp_path, progress=False)(variants)
    assert seen == [2, 2, 1]
    found = Passes(lm, b, items, tmp_path, progress=False)(variants)
    assert seen == [2, 2, 1, 1] and list(found) == list(variants)
