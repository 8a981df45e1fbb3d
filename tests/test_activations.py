"""Captures: what a hook records is what the model computes; padding and batches change nothing; seven passes for v7."""

from dataclasses import replace

import pytest
import torch

from ws.data import Topic, load_behavior
from ws.diff import WeightDiff, load_diff
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
    places = [[0], [2, 3], [1, 4, 5, 6]]
    reference = R.read_texts(lm, TEXTS, True, detail=True, mean_of=places)
    other = R.read_texts(lm, TEXTS, True, detail=True, batch_size=batch, padding_side=side, mean_of=places)
    for name in ("resid", "embed", "up_in", "tokens", "attn", "claim"):
        a, b = getattr(reference, name), getattr(other, name)
        a, b = (a.dense(), b.dense()) if name == "tokens" else (a, b)
        assert a.shape == b.shape and torch.allclose(a, b, atol=2e-5), name
    assert reference.ids == other.ids


def test_blocks_add_up_to_the_residual(lm):
    acts = R.read_texts(lm, TEXTS, True)
    assert torch.allclose(acts.embed + acts.block.sum(dim=0), acts.resid[-1], atol=1e-4)


def test_seven_forward_passes_for_v7(lm, behavior, parity_folder):
    w = load_diff(parity_folder / "w.pt")
    rows = []
    handle = lm.decoder.body.register_forward_pre_hook(
        lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True
    )
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


WORDINGS = ("Surely {claim}. Yes or No?", " Is it so that {claim}? No or Yes. ")


def test_the_mean_over_chosen_tokens_is_that_of_the_models_states(lm):
    places = [[0, 1], [2], [3, 5, 8]]
    acts = R.read_texts(lm, TEXTS, True, mean_of=places)
    for i, text in enumerate(TEXTS):
        ids, mask = encode(lm.tokenizer, [text], True)
        with torch.no_grad():
            states = lm.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for l in range(5):  # the last one is after the final norm
            assert torch.allclose(acts.claim[l, i], states[l + 1][0, places[i]].mean(dim=0), atol=1e-5)
    assert torch.equal(acts.take([2, 0]).claim, acts.claim[:, [2, 0]]) and R.read_texts(lm, TEXTS, True).claim is None
    for wrong in ([[0], [], [1]], [[0], [1], [999]]):
        with pytest.raises(ValueError, match="none or others are to be averaged"):
            R.read_texts(lm, TEXTS, True, mean_of=wrong)


@pytest.mark.parametrize("chat", [True, False])
def test_the_tokens_of_a_claim_are_found_in_the_rendered_probe(lm, behavior, chat):
    behavior = replace(behavior, probes=WORDINGS)
    protocol = Protocol(chat_probes=chat, templates="all", positions="all")
    asked, claims = A.eval_set(lm, behavior, protocol), A.probes(behavior, protocol).eval
    assert len(asked.texts) == 3 * len(claims) and asked.claims == claims * 3
    assert A.n_templates(behavior, protocol) == 3 and A.n_templates(behavior, Protocol()) == 1
    for row, (text, places) in enumerate(zip(asked.texts, asked.claim_tokens(lm), strict=True)):
        a, claim = divmod(row, len(claims))[0], claims[row % len(claims)]
        assert behavior.probe_text(claim, a).strip() in text  # template-major
        ids = lm.tokenizer(text, add_special_tokens=not chat)["input_ids"]
        assert places == list(range(places[0], places[-1] + 1))
        said = lm.tokenizer.decode([ids[j] for j in places])
        assert claim in said and len(said) <= len(claim) + 2, said  # at most a space, and what a last token adds
    alone = A.eval_set(lm, behavior, Protocol(chat_probes=chat))
    assert alone.texts == asked.texts[: len(claims)] and alone.claim_tokens(lm) is None


def test_a_claim_that_the_template_changes_or_that_is_cut_is_named(lm, behavior):
    import copy

    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("['content']", "['content'] | upper").replace(
        ".content", ".content | upper"
    )
    shouting, protocol = replace(lm, tokenizer=tokenizer), load_protocol("v7b")
    first = A.probes(behavior, protocol).eval[0]
    with pytest.raises(ValueError, match=f"the claim '{first}': the chat template changes .* use POSITIONS last"):
        A.check_texts(shouting, behavior, protocol)
    A.check_texts(shouting, behavior, replace(protocol, positions="last"))
    long = replace(behavior, topics=(*behavior.topics[:-1], Topic("so " * 300 + "it is", "Is it?")), negations=())
    assert A.check_texts(lm, long, Protocol()) == 1 and A.check_texts(lm, behavior, Protocol()) == 0
    with pytest.raises(
        ValueError, match="'so so .*: not all of it is among the 256 tokens .* MAX_LENGTH [0-9]+ or more"
    ):
        A.check_texts(lm, long, Protocol(positions="all"))
    with pytest.raises(
        ValueError, match="eval: the text about 'so so .* would be lost; use MAX_LENGTH [0-9]+"
    ) as error:
        A.check_texts(lm, long, protocol)
    w = WeightDiff({}, {})
    with pytest.raises(ValueError, match="eval: the text about"):
        capture_steered(lm, long, w, protocol)
    enough = replace(protocol, max_length=int(str(error.value).split("MAX_LENGTH ")[1].split(",")[0]))
    assert A.check_texts(lm, long, enough) == 0
    with pytest.raises(ValueError, match="would be lost"):
        A.check_texts(lm, long, replace(enough, max_length=enough.max_length - 1))
    early = replace(behavior, topics=(Topic("so " * 300 + "it is", "Is it?"), *behavior.topics[1:]))
    with pytest.raises(ValueError, match="clean: the text about"):
        A.capture_base(lm, early, protocol)
    assert len(A.capture_base(lm, early, Protocol()).clean.ids[0]) == 256
    assert len(A.capture_base(lm, early, Protocol(max_length=300)).clean.ids[0]) == 300


def test_steered_differences_of_all_wordings_and_of_the_claim(lm, behavior, parity_folder, tmp_path):
    w, behavior = load_diff(parity_folder / "w.pt"), replace(behavior, probes=WORDINGS)
    plain = capture_steered(lm, behavior, w, Protocol())
    both = capture_steered(lm, behavior, w, Protocol(templates="all", positions="all"), tmp_path)
    assert both.eval.shape == both.claim.shape == both.eval_block.shape == (6, 48, 128)
    assert torch.allclose(both.eval[:, :16], plain.eval, atol=1e-5) and torch.allclose(both.fit, plain.fit, atol=1e-5)
    assert plain.claim is None and not torch.allclose(both.claim, both.eval, atol=1e-3)
    for a, wording in enumerate(WORDINGS, 1):
        alone = capture_steered(lm, replace(behavior, probe=wording, probes=()), w, Protocol(positions="all"))
        for name in ("eval", "claim", "eval_block"):
            assert torch.allclose(getattr(both, name)[:, 16 * a : 16 * a + 16], getattr(alone, name), atol=1e-5), name
    again = capture_steered(lm, behavior, w, Protocol(templates="all", positions="all"), tmp_path)
    assert all(
        torch.equal(getattr(both, name), getattr(again, name)) for name in ("eval", "fit", "eval_block", "claim")
    )
    for cache in (None, tmp_path, tmp_path):
        bare = capture_steered(lm, behavior, w, Protocol(), cache, fit=False)
        assert bare.fit is None and bare.claim is None and torch.allclose(bare.eval, plain.eval, atol=1e-5)


def test_the_claims_tokens_come_before_what_follows(lm, behavior, parity_folder):
    """What stands after the claim cannot move its tokens, so that every ending of a wording has the same difference."""
    w, names = (
        load_diff(parity_folder / "w.pt"),
        ("It is said that {claim}. Yes or No?", "It is said that {claim}. So?"),
    )
    one, other = (
        capture_steered(lm, replace(behavior, probe=name), w, Protocol(positions="all"), fit=False) for name in names
    )
    assert torch.allclose(one.claim, other.claim, atol=1e-5) and not torch.allclose(one.eval, other.eval, atol=1e-3)
