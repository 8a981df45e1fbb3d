"""Captures: what a hook records is what the model computes; padding and batches change nothing; seven passes for v7."""

from dataclasses import replace

import pytest
import torch

from ws.data import load_behavior
from ws.diff import load_diff
from ws.model.lm import load_lm
from ws.model.text import chat_text, encode
from ws.subspaces import captures as A
from ws.subspaces import reading as R
from ws.subspaces.protocol import Protocol, load_protocol
from ws.subspaces.steered import capture_steered

TEXTS = ["short", "a somewhat longer text", "and one that is a good deal longer than both of the others were"]


@pytest.fixture(scope="module")
def lm(parity_folder):
    return load_lm(str(parity_folder / "model"), "float32", "cpu")


@pytest.fixture(scope="module")
def behavior(parity_folder):
    return load_behavior(parity_folder / "behavior.json")


def test_records_what_the_model_returns(lm):
    acts = R.read_texts(lm, TEXTS, True, detail=True)
    assert acts.resid.shape == (6, 3, 128) and acts.up_in.shape == (6, 3, 128)
    for i, text in enumerate(TEXTS):
        ids, mask = encode(lm.tokenizer, [text], True)
        with torch.no_grad(), R.eager_attention(lm.model):
            out = lm.model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
        n = ids.shape[1]
        for l in range(5):  # hidden_states[-1] is after the final norm
            assert torch.allclose(acts.resid[l, i], out.hidden_states[l + 1][0, -1], atol=1e-5)
            assert torch.allclose(acts.tokens[l, i, -n:], out.hidden_states[l + 1][0], atol=1e-5)
        assert torch.allclose(lm.decoder.final_norm(acts.resid[5, i]), out.hidden_states[6][0, -1], atol=1e-5)
        assert torch.allclose(acts.attn[3, i, -n:], out.attentions[3][0, :, -1].mean(dim=0), atol=1e-6)
        assert acts.tokens[0, i, :-n].abs().sum() == 0 if n < acts.tokens.shape[2] else True
        assert torch.allclose(acts.embed[i], out.hidden_states[0][0, -1])
        assert acts.ids[i] == tuple(ids[0].tolist())
    assert torch.allclose(acts.attn.sum(dim=2), torch.ones(6, 3), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_padding_side_and_batch_size_change_nothing(lm, side, batch):
    reference = R.read_texts(lm, TEXTS, True, detail=True)
    other = R.read_texts(lm, TEXTS, True, detail=True, batch_size=batch, padding_side=side)
    for name in ("resid", "embed", "up_in", "tokens", "attn"):
        a, b = getattr(reference, name), getattr(other, name)
        assert a.shape == b.shape and torch.allclose(a, b, atol=2e-5), name
    assert reference.ids == other.ids


def test_blocks_add_up_to_the_residual(lm):
    acts = R.read_texts(lm, TEXTS, True)
    assert torch.allclose(acts.embed + acts.block.sum(dim=0), acts.resid[-1], atol=1e-4)


def test_seven_forward_passes_for_v7(lm, behavior, parity_folder):
    w = load_diff(parity_folder / "w.pt")
    rows = []
    handle = lm.model.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
    try:
        A.capture_base(lm, behavior, Protocol())
        capture_steered(lm, behavior, w, Protocol())
    finally:
        handle.remove()
    assert rows == [16] * 7


def test_splits(behavior):
    half, held = A.probes(behavior, Protocol()), A.probes(behavior, Protocol(eval_split="held_out"))
    assert (len(half.fit), len(half.eval)) == (16, 16) and (len(held.fit), len(held.eval)) == (20, 12)
    assert half.fit + half.eval == held.fit + held.eval == tuple(t.claim for t in behavior.topics)
    with pytest.raises(ValueError, match="EVAL_SPLIT 'third' is unknown"):
        Protocol(eval_split="third")
    with pytest.raises(ValueError, match="at least 2 and 1 are needed"):
        A.probes(replace(behavior, topics=behavior.topics[:3], n_train_topics=1), Protocol(eval_split="held_out"))


def test_v7_norms_the_last_layers_tokens_and_v7b_does_not(lm, behavior):
    raw = A.capture_base(lm, behavior, Protocol(raw_last=True))
    normed = A.capture_base(lm, behavior, Protocol())
    assert torch.allclose(lm.decoder.final_norm(raw.pos.tokens[-1]), normed.pos.tokens[-1], atol=1e-4)
    assert torch.equal(raw.pos.tokens[-2], normed.pos.tokens[-2])
    assert torch.allclose(raw.pos.tokens[-1][:, -1], raw.pos.resid[-1], atol=1e-5)


def test_all_persona_pairs_stack_pair_after_pair(lm, behavior):
    base = A.capture_base(lm, behavior, Protocol(persona_pairs="all"))
    assert base.n_pairs == 2
    assert base.pos.resid.shape[1] == base.neg.resid.shape[1] == 32 and base.clean.resid.shape[1] == 16
    first = A.capture_base(lm, behavior, Protocol())
    assert torch.allclose(base.pos.resid[:, :16], first.pos.resid, atol=1e-5)


def test_chat_probes_put_clean_text_in_the_template_once(lm, behavior):
    base = A.capture_base(lm, behavior, Protocol(chat_probes=True))
    claim = A.probes(behavior, Protocol()).fit[0]
    expected = chat_text(lm.tokenizer, behavior.probe_text(claim))
    assert lm.tokenizer.decode(base.clean.ids[0]) == expected


def test_a_bos_adding_tokenizer_doubles_it_in_v7_only(lm, behavior):
    """v7 keeps the defect (personas are tokenised with special tokens although the template has them), v7b mends it."""
    import copy

    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.chat_template = "<|endoftext|>" + tokenizer.chat_template
    other = replace(lm, tokenizer=tokenizer)
    assert A.capture_base(other, behavior, Protocol()).pos.ids[0][:2] == (0, 0)
    sound = A.capture_base(other, behavior, load_protocol("v7b"))
    assert sound.pos.ids[0][0] == 0 and sound.pos.ids[0][1] != 0
    assert sound.clean.ids[0][0] == 0 and sound.clean.ids[0][1] != 0


def test_steered_differences_are_plus_minus_minus_and_zero_below_the_adapter(lm, behavior, parity_folder):
    w = load_diff(parity_folder / "w.pt")
    steered = capture_steered(lm, behavior, w, Protocol())
    assert steered.eval.shape == (6, 16, 128) and steered.fit.shape == (6, 16, 128)
    assert steered.eval[:2].abs().max() == 0 and steered.eval_block[:2].abs().max() == 0
    assert torch.allclose(steered.eval_block[2:].sum(dim=0), steered.eval[-1], atol=1e-4)
    again = capture_steered(lm, behavior, w.scale(-1.0), Protocol())
    assert torch.allclose(again.eval, -steered.eval, atol=1e-5)


def test_attention_implementation_comes_back(lm):
    before = lm.model.config._attn_implementation
    R.read_texts(lm, TEXTS, True, detail=True)
    assert lm.model.config._attn_implementation == before
