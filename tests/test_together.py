"""Texts read together are as read alone, and blocks that two readings have in common run once."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

import ws
from tests.conftest import FAMILIES
from ws.diff.algebra import random_as
from ws.model.prefix import reads_each
from ws.model.text import chat_text, encode, last_index
from ws.model.together import Once, passes, read_last, together
from ws.steer.answers import answer_scores, answers_of, kept_answers
from ws.steer.effect import effects
from ws.steer.weights import untouched, weight_steer
from ws.subspaces.protocol import load_protocol
from ws.subspaces.reading import read_texts
from ws.subspaces.steered import capture_steered, known_answers

TEXTS = (
    "cats can fly",
    "the moon is made of green cheese and rats",
    "two and two are four",
    "ice is hot",
    "ice is not hot",
)


def turns(lm):
    return [chat_text(lm.tokenizer, f"I think that {text}. Am I right?") for text in TEXTS] + ["Is ice hot?", "Is ice?"]


def read(lm, share=True):
    ids, mask = encode(lm.tokenizer, turns(lm), False)
    found, seen = {}, [0]
    count = lm.decoder.embed_tokens.register_forward_pre_hook(lambda _m, x: seen.append(x[0].numel()))
    try:
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("ws.model.together.reads_each", lambda *_: False)  # the counter is a hook
            read_last(
                lm,
                ids,
                mask,
                lambda n, _T, _first: n <= 3,
                lambda x, at: found.update(zip(at, x[0], strict=True)),
                1,
                share,
            )
    finally:
        count.remove()
    assert sorted(found) == list(range(len(ids)))
    return torch.stack([found[i] for i in range(len(ids))]), sum(seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_read_together_are_as_read_alone(model_folder, family, monkeypatch):
    lm = ws.load_lm(str(model_folder(family)))
    monkeypatch.setattr("ws.model.together.PASS", 8)
    (shared, few), (each, many) = read(lm), read(lm, share=False)
    assert few < many and torch.allclose(shared, each, atol=2e-5 * float(each.abs().max()))
    for row, text in zip(shared, turns(lm), strict=True):
        with torch.no_grad():
            alone = lm.model(torch.tensor([lm.tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0, -1]
        assert torch.allclose(row, alone.float(), atol=2e-5 * float(alone.abs().max()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_below_w_run_once(model_folder, family):
    lm = ws.load_lm(str(model_folder(family)))
    n = lm.decoder.n_layers - 1
    w = random_as(
        ws.WeightDiff({name: lm.model.get_parameter(name).detach() for name in [lm.decoder.param_name(n, "o")]}), 0
    )
    assert untouched(w, lm.decoder.n_layers) == n and untouched(ws.WeightDiff({}), 3) == 3
    assert untouched(ws.WeightDiff({"model.norm.weight": torch.ones(lm.decoder.d)}), 3) == 0
    ran, once = [], Once(lm.model, n)
    block = lm.decoder.blocks[0]
    handle = block.mlp.register_forward_hook(lambda *_: ran.append(1))
    for alpha in (1.0, -1.0):
        with weight_steer(lm.model, w, alpha):
            want, _ = read(lm)
            before = len(ran)
            with once("these texts"):
                found, _ = read(lm)
        assert torch.equal(found, want) and "forward" not in block.__dict__
        assert len(ran) == before if alpha < 0 else len(ran) == 2 * before
    handle.remove()
    assert list(once.given) == ["these texts"]


def test_somebodys_hook_has_each_text_alone():
    lm = ws.load_lm("tiny")
    assert not reads_each(lm.model, 10)
    with weight_steer(lm.model, ws.load_diff("tiny"), 1.0):
        assert not reads_each(lm.model, 10)
    handle = lm.decoder.blocks[0].register_forward_hook(lambda *_: None)
    assert reads_each(lm.model, 10)
    handle.remove()


def test_answers_of_several_sets_are_those_of_each_and_kept_ones_are_not_read(tmp_path, monkeypatch):
    lm, b, w = ws.load_lm("tiny"), ws.load_behavior("sycophancy"), ws.load_diff("tiny")
    sets, ends = [[b.probe_text(claim, a) for claim in b.heldout_claims[:6]] for a in range(3)], [1.0, -1.0]
    want = np.array([[kept_answers(lm, b, texts, w, alpha, None) for texts in sets] for alpha in ends])
    kept_answers(lm, b, sets[1], w, -1.0, tmp_path)  # so that the ends are not read alike
    for folder in (tmp_path, None):
        assert np.allclose(answers_of(lm, b, sets, w, ends, folder), want, atol=1e-4)
    assert len(list((tmp_path / "answers").glob("sycophancy_*.json"))) == 6
    monkeypatch.setattr("ws.steer.answers.weight_steer", None)  # a pass that is not kept fails
    assert np.allclose(answers_of(lm, b, sets, w, ends, tmp_path), want, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_of_eval_probes_come_with_their_states_and_are_not_read_again(tmp_path, monkeypatch, dtype):
    lm, b, w = ws.load_lm("tiny", dtype), ws.load_behavior("sycophancy"), ws.load_diff("tiny")
    v7, v7b = load_protocol("v7"), load_protocol("v7b")
    assert capture_steered(lm, b, w, v7, fit=False).answers is None  # raw text is no question
    unheard = replace(b, yes=("Unheardofbyanybody",))  # which is an error where answers are asked for, and no sooner
    assert capture_steered(lm, unheard, w, v7b, fit=False).answers is None
    made = capture_steered(lm, b, w, v7b, tmp_path, fit=False)
    known = known_answers(lm, b, v7b, capture_steered(lm, b, w, v7b, tmp_path, fit=False))
    assert known == known_answers(lm, b, v7b, made) and set(known) == {1.0, -1.0}
    want, each = effects(lm, b, w, 4), {t.claim: t for t in b.heldout_topics}
    for alpha, answers in known.items():
        asked = [b.probe_text(claim, a) for a in range(4) for claim in each]
        alone = kept_answers(lm, b, asked, w, alpha, None).T
        assert len(answers) == len(asked) == 48
        for text, one in zip(asked, alone, strict=True):
            assert answers[chat_text(lm.tokenizer, text)] == pytest.approx(one, abs=1e-4)
    read, whole = [], answer_scores

    def scores(lm, texts, *more):
        read.extend(texts)
        return whole(lm, texts, *more)

    monkeypatch.setattr("ws.steer.answers.answer_scores", scores)
    assert effects(lm, b, w, 4, None, known) == pytest.approx(want, abs=2e-4)
    assert len(read) == 2 * 4 * (len(b.heldout_claims) - len(each)) and not set(read) & set(known[1.0])
    monkeypatch.undo()
    moved = effects(lm, b, w, 4, tmp_path, known)
    monkeypatch.setattr("ws.steer.answers.weight_steer", None)  # a pass that is not kept fails
    assert (effects(lm, b, w, 4, tmp_path) == moved).all()


def test_padding_is_cut_where_it_costs_most():
    lengths = [3] * 20 + [50] * 20
    mask = (torch.arange(50)[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.arange(40)[:, None] * 1000 + torch.arange(50)[None]
    got = passes(ids, mask, together(ids, mask), lambda *_: True)
    assert [one.ids.shape for one in got] == [(20, 50), (20, 3)] and int(last_index(got[1].mask)[0]) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_captures_of_texts_that_begin_alike_are_those_of_each(model_folder, family, monkeypatch):
    lm = ws.load_lm(str(model_folder(family)))
    monkeypatch.setattr("ws.model.together.PASS", 8)
    places = [[1, len(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) - 1] for text in turns(lm)]
    more = {"detail": True, "mean_of": places}
    shared = read_texts(lm, turns(lm), False, **more)
    monkeypatch.setattr("ws.model.together.reads_each", lambda *_: True)
    each = read_texts(lm, turns(lm), False, **more)
    assert shared.tokens.states.shape[1] < each.tokens.states.shape[1] == sum(map(len, each.ids))
    for name in ("resid", "embed", "up_in", "attn", "claim", "tokens"):
        a, b = getattr(shared, name), getattr(each, name)
        a, b = (a.dense(), b.dense()) if name == "tokens" else (a, b)
        assert a.shape == b.shape and torch.allclose(a, b, atol=2e-5 * float(b.abs().max())), name
    some = shared.take([2, 0])
    assert torch.equal(some.tokens[1], shared.tokens[1][[2, 0]]) and some.tokens.shape[1] == 2


def test_nothing_of_a_beginning_is_left_when_its_texts_are_read(monkeypatch):
    monkeypatch.setattr("ws.model.together.PASS", 8)
    lm = ws.load_lm("tiny")
    ids, mask = encode(lm.tokenizer, turns(lm), False)
    every = passes(ids, mask, together(ids, mask), lambda *_: True)
    gc.disable()
    try:
        with torch.no_grad():
            for one in every:
                one.run(lm.body, lm.device)
        left = [weakref.ref(layer.keys) for one in every if one.leads for layer in one.cache.layers]
        assert len(left) == lm.decoder.n_layers
        del one, every
        assert not any(ref() is not None for ref in left)
    finally:
        gc.enable()
