"""Texts as a model reads them: chat templates, token ids with a mask, the last real token, positions. (method section 1)"""

from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from ws.cache.given import first_line
from ws.cache.syntax import digest

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}User: {{ m['content'] }}\n{% else %}Assistant: {{ m['content'] }}{{ eos_token }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def chat_text(tokenizer, user: str, system: str | None = None, assistant: str | None = None) -> str:
    """One conversation rendered by the tokenizer's chat template, special tokens included.

    With `assistant=None` the text ends with the generation prompt; otherwise with the assistant's finished turn.
    Thinking is switched off where the template knows `enable_thinking`. A template that rejects a system role gets the
    system text put before the user's. A tokenizer without a template is a ValueError. (docs/method.md section 1)
    """
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "the tokenizer")
        raise ValueError(
            f"{name}: no chat template; use an instruction-tuned model, or for a base model CHAT_TEMPLATE plain"
            f" (User: ..., Assistant: ...; load_lm(..., chat_template='plain'))"
        )
    reply = [] if assistant is None else [{"role": "assistant", "content": assistant}]
    turns = [{"role": "user", "content": user}, *reply]

    options = {"tokenize": False, "add_generation_prompt": assistant is None, "enable_thinking": False}
    render = partial(tokenizer.apply_chat_template, **options)
    if not system:
        return render(turns)
    try:
        text = render([{"role": "system", "content": system}, *turns])
    except Exception as error:  # jinja2's TemplateError, or whatever a template's raise_exception maps to
        if "TemplateError" not in {c.__name__ for c in type(error).__mro__}:
            raise
        text = ""
    if system.strip() not in text:
        text = render([{"role": "user", "content": f"{system}\n\n{user}"}, *reply])
    return text


def answer_frame(tokenizer) -> tuple[str, str]:
    """What the chat template puts between the prompt and an answer (a blank, usually nothing) and after an answer, blanks
    stripped (`<|im_end|>`, or the EOS token where it puts nothing). Without a template: nothing, and EOS."""
    if not getattr(tokenizer, "chat_template", None):
        return "", tokenizer.eos_token or ""
    question, answer = _marker(tokenizer, "question"), _marker(tokenizer, "answer")
    prompt, whole = chat_text(tokenizer, question), chat_text(tokenizer, question, assistant=answer)
    if answer not in whole:
        raise ValueError("the chat template leaves out or changes the answer's text; give another as CHAT_TEMPLATE")
    start = whole.rindex(answer)
    lead = whole[len(prompt) : start] if whole.startswith(prompt) else ""
    return lead, whole[start + len(answer) :].strip() or tokenizer.eos_token or ""


def _marker(tokenizer, word: str) -> str:
    """A text that the chat template cannot hold, as it has digits of the template's own hash; no filter for upper or lower
    case leaves it as it is."""
    return f"a{word.title()}{digest(str(tokenizer.chat_template).encode())}"


def check_template(tokenizer, where: str) -> None:
    """ValueError that begins with `where` for a chat template that cannot be rendered, or does not show what is said."""
    user, answer = _marker(tokenizer, "question"), _marker(tokenizer, "answer")
    try:
        chat_text(tokenizer, user, "a system prompt")
        asked, answered = chat_text(tokenizer, user), chat_text(tokenizer, user, assistant=answer)
    except Exception as error:  # whatever a stranger's template ends with
        line = f"line {error.lineno}: " if getattr(error, "lineno", None) else ""
        raise ValueError(f"{where}: no Jinja template that renders: {line}{first_line(error)}") from error
    for whose, text, shown in (("user", user, asked), ("assistant", answer, answered)):
        if text not in shown:
            raise ValueError(f"{where}: leaves out or changes the {whose}'s text; it must show each message's content")


def default_system(tokenizer) -> str:
    """The system prompt that a chat template puts where none is given; "" where it puts none."""
    user, system = _marker(tokenizer, "question"), _marker(tokenizer, "system")
    asked, bare = chat_text(tokenizer, user, system), chat_text(tokenizer, user)
    before, _, after = asked.partition(system)
    between = after[: after.index(user)] if user in after else ""
    if not between or not before or not bare.startswith(before) or between not in bare[len(before) :]:
        return ""
    return bare[len(before) : bare.rindex(between)].strip()


def earlier_turn(tokenizer) -> str:
    """What a chat template puts before a question where that holds an answered turn of its own; "" where it does not."""
    question = _marker(tokenizer, "question")
    before, _, after = chat_text(tokenizer, question).partition(question)
    return before.strip() if after.strip() and after in before else ""


def template_note(tokenizer, given: str = "") -> str:
    """In words, what a reader must know of a chat template: that it was given, and that it puts a system prompt or an
    answered turn where none is asked for. "" otherwise. given: which one was, in words; "" for the tokenizer's own."""
    if not getattr(tokenizer, "chat_template", None):
        return "none: texts are read raw"
    more = ""
    if turn := earlier_turn(tokenizer):
        more = f"an answered turn stands before each question: {' '.join(turn.split())}"
    elif system := default_system(tokenizer):
        more = f"where no system prompt is given it puts: {system}"
    return "; ".join(filter(None, (given or (more and "its own"), more)))


def encode(
    tokenizer, texts: list[str], add_special_tokens: bool, max_length: int = 256, padding_side: str = "right"
) -> tuple[Int[Tensor, "n T"], Int[Tensor, "n T"]]:
    """Token ids and attention mask `(n, T)`, padded to the longest, truncated at `max_length` tokens."""
    rows = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"] if texts else []
    rows = [row[:max_length] for row in rows]
    if not rows or min(map(len, rows)) == 0:
        raise ValueError("no text to encode, or a text without a single token")
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        span = slice(0, len(row)) if padding_side == "right" else slice(width - len(row), width)
        ids[i, span] = torch.tensor(row)
        mask[i, span] = 1
    return ids, mask


def last_index(mask: Int[Tensor, "n T"]) -> Int[Tensor, " n"]:
    """Index of each row's last non-zero mask entry; the same token for left and right padding."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)


def position_ids(mask: Int[Tensor, "n T"]) -> Int[Tensor, "n T"]:
    """Positions that count from each row's first real token, so that padding on the left moves nothing."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
