"""`ws generate` and `ws chat`: what is said is what the steered model says, and a conversation is rendered as one."""

import io

import pytest
import torch
from test_cli import call

import ws
from ws.model.generate import write_answers
from ws.model.text import chat_text
from ws.use.talk import Chat, Writing, answers, beside, conversation, numbers, talk

ASKED = "Is it true that the earth is flat?"


@pytest.fixture(scope="module")
def lm():
    return ws.load_lm("tiny")


@pytest.fixture(scope="module")
def w():
    return ws.load_diff("tiny")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_those_of_the_steered_model(w, dtype):
    lm = ws.load_lm("tiny", dtype=dtype)
    bits = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    rows = answers(lm, w, [ASKED, "Hello"], [-1.0, 0.0, 1.0], writing=Writing(12))
    for column, alpha in enumerate((-1.0, 0.0, 1.0)):
        with ws.weight_steer(lm.model, w, alpha):
            wanted = write_answers(lm, [chat_text(lm.tokenizer, text) for text in (ASKED, "Hello")], 12)
        assert [row[column] for row in rows] == wanted
    assert rows[0][0] != rows[0][2]
    assert all(torch.equal(p, bits[name]) for name, p in lm.model.named_parameters())


def test_samples_follow_their_seed(lm, w):
    def drawn(seed):
        return answers(lm, w, [ASKED], [0.0, 1.0], writing=Writing(12, True, 1.5, 1.0, seed))

    assert drawn(0) == drawn(0) and any(drawn(0) != drawn(seed) for seed in (1, 2, 3))


def test_columns_fill_the_width_and_blocks_need_none():
    texts = ["one two three four five six seven", "short", "a\n\nb"]
    wide = beside(texts, [-1.0, 0.0, 1.0], 80).splitlines()
    assert [cell.strip() for cell in wide[0].split(" | ")] == ["alpha -1", "alpha 0 (base model)", "alpha +1"]
    assert set(wide[1]) == set("- |") and all(len(line) <= 80 for line in wide) and len(wide) == 5
    assert [cell.strip() for cell in wide[2].split("|")] == ["one two three four five", "short", "a"]
    for width in (0, 40):
        assert beside(texts, [-1.0, 0.0, 1.0], width).startswith(
            "[alpha -1]\none two three four five six seven\n\n[alpha 0 (base"
        )


def test_a_conversation_is_rendered_by_the_chat_template(lm, tokenizer):
    for tok in (lm.tokenizer, tokenizer):
        turn = [{"role": "user", "content": "a"}]
        for system in ("", "Be brief."):
            assert conversation(tok, turn, system) == chat_text(tok, "a", system or None)
        longer = [*turn, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
        text = conversation(tok, longer, "Be brief.")
        assert [text.index(part) for part in ("Be brief.", "a", "b", "c")] and text.count("Be brief.") == 1
        assert text.startswith(chat_text(tok, "a", "Be brief.", assistant="b").rstrip()) and text.endswith(
            chat_text(tok, "c")[-5:]
        )
    assert longer[0] == {"role": "user", "content": "a"}
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" \
        "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"  # fmt: skip
    assert conversation(tokenizer, longer, "S") == "<user>S\n\na<assistant>b<user>c<answer>"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        conversation(tokenizer, turn)


def test_a_chat_keeps_and_forgets_what_was_said(lm, w):
    chat, said = Chat(lm, w, 1.0, writing=Writing(8)), []
    talk(
        chat,
        ["Hello", "", ASKED, "/alpha -1", ASKED, "/nonsense", "/alpha x", "/reset", "Hello", "/quit", "never"],
        said.append,
    )
    with ws.weight_steer(lm.model, w, 1.0):
        first = write_answers(lm, [chat_text(lm.tokenizer, "Hello")], 8)[0]
    assert said[0] == first and said[2] == "alpha is -1 from here on" and len(said) == 8
    turns = [("user", "Hello"), ("assistant", said[0]), ("user", ASKED)]
    prompt = conversation(lm.tokenizer, [{"role": role, "content": text} for role, text in turns])
    with ws.weight_steer(lm.model, w, 1.0):
        assert said[1] == write_answers(lm, [prompt], 8)[0]
    assert said[4].startswith("error: '/nonsense': no command; /alpha X") and "alpha 'x': expected a finite" in said[5]
    assert len(chat.turns) == 2 and chat.alpha == -1


def test_a_conversation_that_grows_too_long_forgets_its_oldest_turns(lm, w):
    chat, said = Chat(lm, w, 1.0, writing=Writing(4)), []
    long = "word " * 1100
    talk(chat, [long, long, "Hello", "word " * 3000], said.append)
    assert said.count("(the oldest turns no longer fit and are forgotten)") >= 1
    assert said[-1].startswith("error: the prompt has 3,0") and "--max-new-tokens" in said[-1]
    assert chat.turns[-2]["content"] == "Hello"


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WS_TYPED_IN", str(tmp_path))
    short = ("--max-new-tokens", "8")
    assert call("generate", "tiny", "--alpha", "-1,0,1", ASKED, *short) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"> {ASKED}\n\n[alpha -1]\n") and "[alpha 0 (base model)]" in told and "[alpha +1]" in told
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ASKED}\n"))
    assert call("generate", "tiny", "-", "--alpha=-1,0,1", *short) == 0 and capsys.readouterr().out == told
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ASKED}\n/alpha -1\n{ASKED}"))
    assert call("chat", "tiny", "--alpha", "1", *short) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] in told and lines[1] == "alpha is -1 from here on" and len(lines) == 3
    for line, said in {
        "generate tiny": "a prompt and an alpha are needed",
        "generate tiny x --alpha a": "alpha 'a': expected a finite number, such as -1 or 0.5",
        "generate tiny x --max-new-tokens 0": "--max-new-tokens 0: must be 1 or more",
        "generate tiny x --sample --top-p 2": "--top-p 2.0: must be above 0, at most 1",
        "generate nothing x": "nothing: no such run",
        "chat tiny --alpha inf": "alpha 'inf': expected a finite number",
        "chat tiny --alpha 1e39": "alpha '1e+39': expected a finite number",
        "chat tiny --dtype half": "DTYPE 'half' is unknown",
    }.items():
        assert call(*line.split()) == 2 and said in capsys.readouterr().err, line
    assert numbers("-1, 0,.5") == [-1.0, 0.0, 0.5]
