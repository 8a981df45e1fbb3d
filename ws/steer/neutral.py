"""Plain prose and plain questions that no behaviour is about: what steering costs is measured on them. (docs/method.md section 8)

The passages and the questions are this project's own and stand in no training text. A passage is read as the answer to a
request for it, so that a persona, which is a system prompt, can act on it as well.
"""

import json
from dataclasses import dataclass
from functools import cache

from ws.cache.places import ASSETS
from ws.model.lm import LM
from ws.model.text import chat_text


@dataclass(frozen=True)
class Neutral:
    """passages: (what it is about, the text); facts: (a question, whether yes is the answer), both answers equally often and
    taking turns."""

    passages: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, bool], ...]


@cache
def neutral() -> Neutral:
    """The shipped ones."""
    raw = json.loads((ASSETS / "neutral.json").read_text("utf-8"))
    return Neutral(*(tuple(map(tuple, raw[name])) for name in ("passages", "facts")))


def request(about: str) -> str:
    """The user turn that a passage answers."""
    return f"Write a short encyclopaedia entry about {about}."


def passage_rows(lm: LM, n: int | None = None, system: str | None = None) -> tuple[list[list[int]], list[int]]:
    """Token ids of the first n passages (None: all), each after the rendered request for it; and how long each request is."""
    rows, starts = [], []
    for about, text in neutral().passages[:n]:
        asked, own = (
            lm.tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (chat_text(lm.tokenizer, request(about), system), text)
        )
        rows.append([*asked, *own])
        starts.append(len(asked))
    return rows, starts
