"""Behaviours: what is asked, under which personas, and which words answer.

A behaviour is a list of topics (a claim and a question about it), two lists of system prompts (personas) that pull the
answers apart, one probe template and the answer words. Everything after this module works on a `Behavior`; nothing
after it knows which behaviour it is. docs/method.md section 1:

    probe(topic) = template with {claim} filled in,      user turn of a training pair = opinion(claim) + question
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from ws.cache.places import ASSETS

SHIPPED = ("sycophancy",)
N_TRAIN_TOPICS = 20
PLACE = "{claim}"
TEXT_FIELDS = ("name", "probe", "opinion")
LIST_FIELDS = ("personas_pos", "personas_neg", "yes", "no", "true_claims", "negations", "train_true_claims")


@dataclass(frozen=True)
class Topic:
    """One claim in lower-case running form (it follows "that") and a question that may follow it."""

    claim: str
    question: str


@dataclass(frozen=True)
class Behavior:
    """A behaviour as docs/method.md section 1 defines it; checked when it is made.

    The first `n_train_topics` topics train the adapters, the others are held out. `true_claims`, `negations` (of the
    held-out topics, in their order) and `train_true_claims` are optional: they tell agreeing from merely saying yes.

    Raises:
        ValueError: names the field that is empty, doubled, of a wrong type or without its {claim}.

    Example:
        >>> import ws
        >>> b = ws.load_behavior("sycophancy")
        >>> len(b.topics), len(b.train_topics), b.yes, b.no
        (32, 20, ('Yes',), ('No',))
    """

    name: str
    topics: tuple[Topic, ...]
    personas_pos: tuple[str, ...]
    personas_neg: tuple[str, ...]
    probe: str
    yes: tuple[str, ...]
    no: tuple[str, ...]
    n_train_topics: int = N_TRAIN_TOPICS
    true_claims: tuple[str, ...] = ()
    negations: tuple[str, ...] = ()
    train_true_claims: tuple[str, ...] = ()
    opinion: str = "I think that {claim}."

    def __post_init__(self) -> None:
        _check(self)

    @property
    def train_topics(self) -> tuple[Topic, ...]:
        """The topics that adapters may train on."""
        return self.topics[: self.n_train_topics]

    @property
    def heldout_topics(self) -> tuple[Topic, ...]:
        """The topics that no adapter sees."""
        return self.topics[self.n_train_topics :]

    @property
    def persona_pairs(self) -> tuple[tuple[str, str], ...]:
        """(positive, negative) system prompts, paired by index."""
        return tuple(zip(self.personas_pos, self.personas_neg, strict=True))

    def probe_text(self, claim: str) -> str:
        """The probe for one claim: the claim as the user's opinion, and the demand for an answer word."""
        return self.probe.replace(PLACE, claim)

    def opinion_text(self, topic: Topic) -> str:
        """The user turn of a training pair: the claim as an opinion, followed by the topic's question."""
        return f"{self.opinion.replace(PLACE, topic.claim)} {topic.question}".strip()


def load_behavior(name_or_path: str | Path) -> Behavior:
    """A shipped behaviour by name, or a user's from a file.

    A `.json` file is one object with the fields of `Behavior`; a topic is `[claim, question]` or
    `{"claim": ..., "question": ...}`. In a `.jsonl` file a line with "claim" is a topic, and the fields of the other
    lines together make the rest of the object.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: an unknown name, an unreadable file, a missing, unknown or empty field.

    Example:
        >>> import ws
        >>> ws.load_behavior("sycophancy").name
        'sycophancy'
    """
    text = str(name_or_path)
    path = ASSETS / f"{text}.json" if text in SHIPPED else Path(name_or_path).expanduser()
    if not path.is_file():
        if isinstance(name_or_path, Path) or path.suffix in (".json", ".jsonl") or "/" in text:
            raise FileNotFoundError(f"behaviour file {path} does not exist")
        raise ValueError(
            f"unknown behaviour {text!r}: shipped are {', '.join(SHIPPED)}, or give a .json or .jsonl file"
        )
    try:
        raw = _read_jsonl(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as {path.suffix[1:] or 'json'}: {error}") from error
    try:
        return _from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_jsonl(path: Path) -> dict:
    whole: dict = {"topics": []}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is not an object")
        if "claim" in row:
            whole["topics"].append(row)
            continue
        for key, value in row.items():
            if key == "topics":
                whole["topics"].extend(value)
            elif key in whole:
                raise ValueError(f"{path}: line {number} gives {key!r} again")
            else:
                whole[key] = value
    return whole


def _from_dict(raw: object) -> Behavior:
    if not isinstance(raw, dict):
        raise ValueError("a behaviour is one JSON object with named fields")
    known = [f.name for f in fields(Behavior)]
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"unknown field {key!r}{hint}")
    missing = [f.name for f in fields(Behavior) if f.default is MISSING and f.name not in raw]
    if missing:
        raise ValueError(f"missing field{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    values = dict(raw)
    topics = values["topics"]
    if not isinstance(topics, list):
        raise ValueError("topics: must be a list of [claim, question]")
    values["topics"] = tuple(_topic(i, row) for i, row in enumerate(topics))
    for key, value in values.items():
        if key in TEXT_FIELDS and not isinstance(value, str):
            raise ValueError(f"{key}: must be a text that is not empty, is {value!r}")
        if key in LIST_FIELDS:
            values[key] = tuple(_texts(key, value))
    count = values.get("n_train_topics", N_TRAIN_TOPICS)
    if not isinstance(count, int) or isinstance(count, bool):
        raise ValueError(f"n_train_topics: must be a positive whole number, is {count!r}")
    return Behavior(**values)


def _topic(index: int, row: object) -> Topic:
    if isinstance(row, dict):
        extra = set(row) - {"claim", "question"}
        if extra or "claim" not in row or "question" not in row:
            raise ValueError(f"topics[{index}]: needs exactly claim and question, has {', '.join(sorted(row))}")
        row = [row["claim"], row["question"]]
    if isinstance(row, list) and len(row) == 2 and all(isinstance(part, str) for part in row):
        return Topic(*row)
    raise ValueError(f"topics[{index}]: needs a claim and a question, is {row!r}")


def _check(b: Behavior) -> None:
    for key in TEXT_FIELDS:
        value = getattr(b, key)
        if not value.strip():
            raise ValueError(f"{key}: must be a text that is not empty, is {value!r}")
    if b.name in (".", "..") or any(c in b.name for c in "/\\\0"):
        raise ValueError(f"name: {b.name!r} cannot name a folder")
    for key in ("probe", "opinion"):
        if PLACE not in getattr(b, key):
            raise ValueError(f"{key}: the template has no {PLACE}: {getattr(b, key)!r}")
    for key in LIST_FIELDS:
        if not _texts(key, getattr(b, key)) and key in ("personas_pos", "personas_neg", "yes", "no"):
            raise ValueError(f"{key}: is empty")
    if len(b.personas_pos) != len(b.personas_neg):
        raise ValueError(
            f"personas_pos has {len(b.personas_pos)} and personas_neg {len(b.personas_neg)}: they are paired by index"
        )
    both = set(b.yes) & set(b.no)
    if both:
        raise ValueError(f"yes and no share the answer word {sorted(both)[0]!r}")
    if b.n_train_topics < 1:
        raise ValueError(f"n_train_topics: must be a positive whole number, is {b.n_train_topics!r}")
    if len(b.topics) < b.n_train_topics + 2:
        raise ValueError(
            f"topics: has {len(b.topics)}, needs n_train_topics + 2 = {b.n_train_topics + 2} or more, to hold two out"
        )
    for i, topic in enumerate(b.topics):
        if not topic.claim.strip():
            raise ValueError(f"topics[{i}]: the claim is empty")
    claims = [t.claim for t in b.topics]
    doubled = [c for i, c in enumerate(claims) if c in claims[:i]]
    if doubled:
        raise ValueError(f"topics: the claim {doubled[0]!r} is there twice")
    if b.negations and len(b.negations) != len(b.heldout_topics):
        raise ValueError(
            f"negations: has {len(b.negations)}, there are {len(b.heldout_topics)} held-out topics to negate in order"
        )


def _texts(key: str, values: object) -> Sequence[str]:
    if isinstance(values, str) or not isinstance(values, (tuple, list)):
        raise ValueError(f"{key}: must be a list of texts, is {values!r}")
    for i, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{key}[{i}]: must be a text that is not empty, is {value!r}")
    return values


def __getattr__(name: str):
    """The shipped behaviour under the names that the author's notebooks import. (docs/method.md section 12)"""
    shipped = {
        "SYCOPHANCY_TOPICS": lambda b: tuple((t.claim, t.question) for t in b.topics),
        "SYCOPHANCY_POS_PERSONAS": lambda b: b.personas_pos,
        "SYCOPHANCY_NEG_PERSONAS": lambda b: b.personas_neg,
    }
    if name not in shipped:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return shipped[name](load_behavior("sycophancy"))
