"""Users' files, and recorded states: the right states, the right targets, the prompt left out, a record on disk."""

import json
from dataclasses import replace

import pytest
import torch

from tests.conftest import CHATML, random_model
from tests.harm import HARMS
from ws.cache.places import ASSETS
from ws.model.decoder import Decoder
from ws.model.lm import LM, load_lm
from ws.theta import states
from ws.theta.states import UserText, load_users, prompt_text, record_states, record_users, split_texts

ROWS = [
    {"user": "ann", "prompt": "How are you?", "text": "Fine, and the sea is calm."},
    {"user": "bob", "prompt": "", "text": "No."},
    {"user": "ann", "prompt": "Why?", "text": "It is a long story about rain."},
    {"user": "bob", "prompt": "What is 2 + 2?", "text": "Four it is, my friend, and never five."},
    {"user": "ann", "prompt": "Again?", "text": "Yes, again."},
]


def users_file(folder, rows=ROWS, extra=""):
    path = folder / "users.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n" + extra, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def lm(model_folder):
    return load_lm(str(model_folder("llama")), "float32", "cpu")


def test_users_keep_the_file_s_order_and_the_shipped_ones_suffice(tmp_path):
    users = load_users(users_file(tmp_path))
    assert list(users) == ["ann", "bob"] and [t.text for t in users["bob"]] == [ROWS[1]["text"], ROWS[3]["text"]]
    shipped = load_users()
    assert len(shipped) >= 6 and min(map(len, shipped.values())) >= 8 and (ASSETS / "users.jsonl").is_file()


@pytest.mark.parametrize("rows,extra,message", [
    (ROWS, "{broken", r"line 6: not JSON"),
    (ROWS, "[1]", r"line 6: expected an object with user, prompt, text, found list"),
    ([*ROWS, {"user": "ann", "text": "x"}], "", r"line 6: field 'prompt' is missing"),
    ([*ROWS, {"user": "ann", "prompt": 3, "text": "x"}], "", r"line 6: field 'prompt' is missing or not a text"),
    ([*ROWS, {"user": "ann", "prompt": "", "text": "x", "mood": "y"}], "", r"line 6: unknown field 'mood'"),
    ([*ROWS, {"user": "ann", "prompt": "", "text": " "}], "", r"line 6: field 'text' is empty"),
    ([ROWS[0], ROWS[2]], "", r"1 user\(s\); at least two"),
    (ROWS[:3], "", r"user 'bob' has one text"),
])  # fmt: skip
def test_what_is_wrong_with_a_users_file_is_named(tmp_path, rows, extra, message):
    with pytest.raises(ValueError, match=message):
        load_users(users_file(tmp_path, rows, extra))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_users(tmp_path / "nowhere.jsonl")


def test_split_holds_out_the_last_part_and_at_least_one(tmp_path):
    texts = [UserText("a", "", str(i)) for i in range(8)]
    assert split_texts(texts, 0.25) == (texts[:6], texts[6:])
    assert split_texts(texts[:2], 0.01) == (texts[:1], texts[1:2]) and split_texts(texts[:2], 0.9)[0] == texts[:1]
    with pytest.raises(ValueError, match="HELDOUT = 1"):
        split_texts(texts, 1.0)


@pytest.mark.parametrize("batch", [1, 4])
def test_states_predict_the_user_s_own_words_and_nothing_else(lm, batch):
    """Against one text at a time, by hooks on the unembedding's input: same states, same targets, prompt left out."""
    items = [UserText(**row) for row in ROWS]
    states = record_states(lm, items, batch=batch, progress=False)
    seen, captured = [], []
    handle = lm.decoder.logits_module().register_forward_pre_hook(lambda _, args: captured.append(args[0][0]))
    for i, item in enumerate(items):
        before = lm.tokenizer(prompt_text(lm, item.prompt), add_special_tokens=False)["input_ids"]
        own = lm.tokenizer(item.text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            lm.model(torch.tensor([before + own]))
        mine = states.text == i
        assert states.y[mine].tolist() == own
        seen.append(captured[-1][len(before) - 1 : -1])
        assert torch.allclose(states.h[mine], seen[-1], atol=1e-5)
    handle.remove()
    assert len(states.h) == sum(map(len, seen))
    every = record_states(lm, items, mask_prompt=False, progress=False)
    assert len(every.y) > len(states.y) and lm.tokenizer.decode(every.y[every.text == 1]).endswith("No.")


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_a_prompt_that_several_answer_is_read_once(lm, monkeypatch, mask_prompt):
    """The states are those of each text by itself, in the texts' order, in fewer tokens."""
    prompt, answers = (
        "Tell me about the weather in the mountains, please.",
        ("It is mild.", "It", "Snow falls, I hear."),
    )
    items = [UserText("a", prompt, a) for a in answers] + [
        UserText("b", "Hi", "Hello."),
        UserText("b", prompt, "It snows."),
    ]
    read, body = [], lm.model.get_decoder()
    forward = body.forward
    monkeypatch.setattr(
        body, "forward", lambda *args, **more: read.append(more["input_ids"].numel()) or forward(*args, **more)
    )
    together = record_states(lm, items, mask_prompt=mask_prompt, progress=False)
    fewer = sum(read)
    alone = [record_states(lm, [item], mask_prompt=mask_prompt, progress=False) for item in items]
    assert torch.allclose(together.h, torch.cat([one.h for one in alone]), atol=1e-5)
    assert torch.equal(together.y, torch.cat([one.y for one in alone]))
    assert not mask_prompt or fewer < sum(read) - fewer - 20


@pytest.fixture
def passes(lm, monkeypatch):
    """One entry for every batch that goes through the model's body."""
    seen, body = [], lm.model.get_decoder()
    forward = body.forward  # no hook: under one, nothing is kept
    monkeypatch.setattr(body, "forward", lambda *args, **more: seen.append(1) or forward(*args, **more))
    return seen


def test_a_record_lies_on_disk_and_is_made_once(lm, tmp_path, passes):
    items = [UserText(**row) for row in ROWS]
    want, path = record_states(lm, items, progress=False), tmp_path / "states.safetensors"
    before = len(passes)
    got = record_states(lm, items, path=path, progress=False)
    assert len(passes) > before and torch.equal(got.h, want.h) and torch.equal(got.y, want.y)
    before, content = len(passes), path.read_bytes()
    assert torch.equal(record_states(lm, items, path=path, progress=False).h, want.h) and len(passes) == before
    other = record_states(lm, items[:3], path=path, progress=False)
    assert len(passes) > before and torch.equal(other.h, want.h[: len(other.h)]) and path.read_bytes() != content


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_record_is_made_anew(lm, tmp_path, harm):
    items, path = [UserText(**row) for row in ROWS], tmp_path / "states.safetensors"
    want = record_states(lm, items, path=path, progress=False).h.clone()
    harm(path)
    assert torch.equal(record_states(lm, items, path=path, progress=False).h, want)


def test_a_record_belongs_to_the_model_its_dtype_and_the_code(lm, tmp_path, passes, monkeypatch, model_folder):
    items, path = [UserText(**row) for row in ROWS], tmp_path / "states.safetensors"

    def makes(lm):
        before = len(passes)
        record_states(lm, items, path=path, progress=False)
        return len(passes) > before

    assert makes(lm) and not makes(lm) and makes(replace(lm, fingerprint="another")) and makes(lm) and not makes(lm)
    narrow = load_lm(str(model_folder("llama")), "bfloat16", "cpu")
    rounded = record_states(narrow, items, path=path, progress=False)
    assert torch.equal(rounded.h, rounded.h.bfloat16().float()) and makes(lm) and not makes(lm)
    monkeypatch.setattr(states, "_check_logits", lambda *_: None)
    assert makes(lm) and not makes(lm)


def test_record_users_divides_one_recording(lm, tmp_path):
    users = load_users(users_file(tmp_path))
    train, rest = record_users(lm, users, 0.4, progress=False)
    for user, items in users.items():
        whole = record_states(lm, items, progress=False)
        assert torch.equal(torch.cat([train[user].y, rest[user].y]), whole.y)
        assert torch.allclose(torch.cat([train[user].h, rest[user].h]), whole.h, atol=1e-5)
        assert rest[user].text.unique().numel() == 1


def test_refusals_and_a_tokenizer_without_a_template(lm, model_folder):
    with pytest.raises(ValueError, match="user 'ann': the prompt 'How are you.' alone fills 5 tokens"):
        record_states(lm, [UserText(**ROWS[0])], max_length=5, progress=False)
    capped = load_lm(str(model_folder("gemma2")), "float32", "cpu")
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        record_states(capped, [UserText(**ROWS[0])], progress=False)
    plain = load_lm(str(model_folder("llama")), "float32", "cpu")
    plain.tokenizer.chat_template = None
    assert prompt_text(plain, "Why?") == "Why?\n" and CHATML
    states = record_states(plain, [UserText("ann", "Why?", "No idea.")], progress=False)
    assert plain.tokenizer.decode(states.y) == "No idea."


def test_a_model_that_changes_its_logits_after_the_unembedding_is_refused(tokenizer):
    model = random_model("llama")

    class Scaled(type(model)):
        def forward(self, *args, **options):
            out = super().forward(*args, **options)
            out.logits = out.logits * 2
            return out

    model.__class__ = Scaled
    with pytest.raises(ValueError, match="Scaled: its logits are not the unembedding of its last hidden state"):
        record_states(LM(model, tokenizer, Decoder(model), "x"), [UserText(**ROWS[0])], progress=False)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (json.dumps({"user": "ann", "prompt": "", "text": "a" * 10_000_000}), "line 6: field 'text': has 10,000,000"),
        (json.dumps({"user": "a" * 201, "prompt": "", "text": "b"}), "line 6: field 'user': has 201 characters"),
        (json.dumps({"user": "ann", "prompt": "a" * 10_001, "text": "b"}), "line 6: field 'prompt': has 10,001"),
        ("[" * 100_000, "line 6: not JSON that can be read: nested too deep"),
        ("\n" * 100_001, "lines, at most 100,000 are read"),
        ("\x00" * (65 << 20), "at most 67.1 MB are read"),
    ],
    ids=range(6),
)
def test_a_users_file_has_limits(tmp_path, extra, message):
    with pytest.raises(ValueError, match=message) as error:
        load_users(users_file(tmp_path, extra=extra))
    assert "users.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_text_may_hold_any_separator(tmp_path):
    row = {"user": "bob", "prompt": "", "text": "one\u2028two\x85three"}
    users = load_users(users_file(tmp_path, extra=json.dumps(row, ensure_ascii=False)))
    assert users["bob"][-1].text == row["text"]
