"""Behaviours: what is asked, under which personas, and which words answer. (docs/method.md section 1) Topics (a claim and a
question), two lists of system prompts (personas) that pull the answers apart, wordings of a probe, the answer words; or
statements, each with the answer that shows the behaviour. Nothing after this module knows which behaviour it is."""

import difflib
from collections import Counter
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path

from ws.behavior_file import MOST, check_count, check_text, check_texts, read_raw
from ws.cache.given import fits, short
from ws.cache.names import slug
from ws.cache.places import ASSETS
from ws.show.tables import facts

SHIPPED = ("sycophancy",)
MOST_NAME = 200  # characters
PLACE = "{claim}"
TEXT_FIELDS = ("name", "probe", "opinion")
NEEDED = ("personas_pos", "personas_neg", "yes", "no")
ABOUT_CLAIMS = ("claims", "true_claims", "negations", "train_true_claims")
LIST_FIELDS = (*NEEDED, *ABOUT_CLAIMS, "probes", "answers")


@dataclass(frozen=True)
class Topic:
    """One claim in lower-case running form (it follows "that") and a question that may follow it."""

    claim: str
    question: str


@dataclass(frozen=True)
class Behavior:
    """A behaviour as docs/method.md section 1 defines it; checked when it is made.

    The first `n_train_topics` topics train the adapters, the others are held out; without that field three eighths of
    the topics are held out, at least two (12 of 32, 3 of 8, 2 of 4). `claims` are further held-out claims, which behaviour
    scores ask about beside the held-out topics and v7's probes do not. `claims`, `true_claims`, `negations` (of the
    held-out topics, or of them and the claims, in order) and `train_true_claims` are optional: they tell agreeing from
    merely saying yes. `probes` are further wordings of `probe`, each with {claim}, under all of which the yes-words agree
    with the claim. A text has at most 10,000 characters, the name 200; a list has at most 5,000 entries. ValueError naming
    the field that is empty, doubled, too long, of a wrong type or without its {claim}.

    `answers` makes it a behaviour of statements: per topic the answer, a yes-word or a no-word, that shows the behaviour. In a
    wording {claim} then stands for a topic's question, the claim is what of it the statement is, training pairs ask in the
    first wording, personas may be missing, three fifths of the topics train, and what tells claims apart stays empty.

    Examples:
        >>> import ws
        >>> b = ws.load_behavior("sycophancy")
        >>> len(b.topics), len(b.train_topics), len(b.heldout_claims), len(b.templates), b.yes, b.no
        (32, 20, 48, 4, ('Yes',), ('No',))
    """

    name: str
    topics: tuple[Topic, ...]
    personas_pos: tuple[str, ...]
    personas_neg: tuple[str, ...]
    probe: str
    yes: tuple[str, ...]
    no: tuple[str, ...]
    n_train_topics: int | None = None
    true_claims: tuple[str, ...] = ()
    negations: tuple[str, ...] = ()
    train_true_claims: tuple[str, ...] = ()
    opinion: str = "I think that {claim}."
    probes: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in TEXT_FIELDS:
            check_text(key, getattr(self, key))
        for key in LIST_FIELDS:
            check_texts(key, getattr(self, key))
        n, claims = len(self.topics), [t.claim for t in self.topics]
        if n > MOST:
            raise ValueError(f"topics: has {n:,}, at most {MOST:,} are read")
        if self.n_train_topics is None:
            held_out = 2 * n / 5 if self.answers else 3 * n / 8
            object.__setattr__(self, "n_train_topics", max(1, n - max(2, round(held_out))))
        check_count(self.n_train_topics)
        least = self.n_train_topics + 2
        for i, topic in enumerate(self.topics):
            fits(topic.claim, f"topics[{i}]: the claim")
            fits(topic.question, f"topics[{i}]: the question")
        pos, neg, denied, held = map(len, (self.personas_pos, self.personas_neg, self.negations, self.heldout_topics))
        allowed = f"{held} held-out topics" + (f", {held + len(self.claims)} with the claims" if self.claims else "")
        wordings = {f"wording {a + 1} of the probe": text for a, text in enumerate(self.templates) if a}
        templates = {"probe": self.probe, "opinion": self.opinion, **wordings}
        faults = [
            (self.name in (".", "..") or set(self.name) & set("/\\\0"), f"name: {self.name!r} cannot name a folder"),
            (len(self.name) > MOST_NAME, f"name: has {len(self.name):,} characters, at most {MOST_NAME} are allowed"),
            *((PLACE not in t, f"{k}: the template has no {PLACE}: {short(t)}") for k, t in templates.items()),
            *(
                (many > 1, f"probes: the wording {short(text)} is there twice")
                for text, many in Counter(map(str.strip, self.templates)).items()
            ),
            *((not getattr(self, key), f"{key}: is empty") for key in NEEDED[2 if self.answers else 0 :]),
            (pos != neg, f"personas_pos has {pos} and personas_neg {neg}: they are paired by index"),
            *((word in self.no, f"yes and no share the answer word {word!r}") for word in sorted(self.yes)),
            (n < least, f"topics: has {n}, needs n_train_topics + 2 = {least} or more, to hold two out"),
            *((not claim.strip(), f"topics[{i}]: the claim is empty") for i, claim in enumerate(claims)),
            *((many > 1, f"topics: the claim {short(c)} is there twice") for c, many in Counter(claims).items()),
            *((c in claims, f"claims: {short(c)} is a topic already") for c in self.claims),
            *((many > 1, f"claims: {short(c)} is there twice") for c, many in Counter(self.claims).items()),
            (
                denied not in (0, held, held + len(self.claims)),
                f"negations: has {denied}, there are {allowed}, to negate in order; n_train_topics sets them",
            ),
        ]
        for fault, message in [*faults, *self._statement_faults()]:
            if fault:
                raise ValueError(message)

    def __repr__(self) -> str:
        of = f"{len(self.topics)} topics ({len(self.train_topics)} train), {len(self.heldout_claims)} held-out claims"
        return f"Behavior({self.name}: {of}, {len(self.templates)} wordings; {'/'.join(self.yes)}, {'/'.join(self.no)})"

    def _repr_html_(self) -> str:
        return facts(repr(self), {"probe": self.probe, "opinion": self.opinion, "first topic": self.topics[0].claim})

    def _statement_faults(self) -> list[tuple[bool, str]]:
        """What is wrong with a behaviour of statements."""
        if not self.answers:
            return []
        n, held = len(self.topics), Counter(answer in self.yes for answer in self.heldout_answers)
        words = {True: self.yes, False: self.no}
        known = {*self.yes, *self.no}
        return [
            (len(self.answers) != n, f"answers: has {len(self.answers)}, there are {n} topics"),
            *((bool(getattr(self, key)), f"{key}: a behaviour with answers has none") for key in ABOUT_CLAIMS),
            *((a not in known, f"answers[{i}]: {short(a)} is no answer word") for i, a in enumerate(self.answers)),
            *(
                (t.claim not in t.question, f"topics[{i}]: the claim does not stand in its question")
                for i, t in enumerate(self.topics)
            ),
            *(
                (
                    held[side] < 2,
                    f"answers: {held[side]} of the {n - self.n_train_topics} statements that are held out match"
                    f" {words[side][0]!r}, 2 or more are needed; n_train_topics sets how many are held out",
                )
                for side in (True, False)
            ),
        ]

    @property
    def slug(self) -> str:
        """The name as folders have it."""
        return slug(self.name)

    @property
    def train_topics(self) -> tuple[Topic, ...]:
        """The topics that adapters may train on."""
        return self.topics[: self.n_train_topics]

    @property
    def heldout_topics(self) -> tuple[Topic, ...]:
        """The topics that no adapter sees."""
        return self.topics[self.n_train_topics :]

    @property
    def heldout_claims(self) -> tuple[str, ...]:
        """All claims that a behaviour score asks about: those of the held-out topics, then `claims`."""
        return (*(t.claim for t in self.heldout_topics), *self.claims)

    @property
    def heldout_answers(self) -> tuple[str, ...]:
        """The matching answers of the held-out topics; () where the behaviour is none of statements."""
        return self.answers[self.n_train_topics :]

    @cached_property
    def _by_claim(self) -> dict[str, Topic]:
        return {topic.claim: topic for topic in self.topics}

    @property
    def persona_pairs(self) -> tuple[tuple[str, str], ...]:
        """(positive, negative) system prompts, paired by index."""
        return tuple(zip(self.personas_pos, self.personas_neg, strict=True))

    @property
    def templates(self) -> tuple[str, ...]:
        """All wordings of the probe; the first is `probe`, which v7 uses alone."""
        return (self.probe, *self.probes)

    def probe_text(self, claim: str, template: int = 0) -> str:
        """The probe for one claim in one of the wordings: the claim, and the demand for an answer word. Of a statement: its
        question in that wording."""
        if self.answers:
            claim = self._by_claim[claim].question
        return self.templates[template].replace(PLACE, claim)

    def claim_span(self, claim: str, template: int = 0) -> tuple[int, int]:
        """Where the claim stands in `probe_text(claim, template)`: its first character and the one after it. Of a wording
        that has it twice, the first place."""
        start = self.templates[template].index(PLACE)
        if self.answers:
            start += self._by_claim[claim].question.index(claim)
        return start, start + len(claim)

    def opinion_text(self, topic: Topic) -> str:
        """The user turn of a training pair: the claim as an opinion, followed by the topic's question; of a statement its
        probe."""
        if self.answers:
            return self.probe_text(topic.claim)
        return f"{self.opinion.replace(PLACE, topic.claim)} {topic.question}".strip()


def load_behavior(name_or_path: str | Path) -> Behavior:
    """A shipped behaviour by name, or a user's from a file.

    A `.json` file is one object with the fields of `Behavior`; a topic is `[claim, question]` or
    `{"claim": ..., "question": ...}`; `probes` in place of `probe` lists several wordings, the first of which is the
    probe. In a `.jsonl` file a line with "claim" is a topic, and the fields of the other
    lines together make the rest of the object; or each line is a statement with `question`, `answer_matching_behavior` and
    `answer_not_matching_behavior` (`ws.behavior_file.from_statements`), named as the file. FileNotFoundError for a path that
    does not exist; ValueError for an unknown name, an unreadable file, a missing, unknown or empty field.

    Examples:
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
    raw = read_raw(path)
    try:
        return _from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _from_dict(raw: object) -> Behavior:
    if not isinstance(raw, dict):
        raise ValueError("a behaviour is one JSON object with named fields")
    known = [f.name for f in fields(Behavior)]
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"unknown field {short(key)}{hint}")
    raw = _with_probe(raw)
    missing = [f.name for f in fields(Behavior) if f.default is MISSING and f.name not in raw]
    if missing:
        raise ValueError(f"missing field{'s' * (len(missing) > 1)} {', '.join(missing)}")
    if not isinstance(raw["topics"], list):
        raise ValueError("topics: must be a list of [claim, question]")
    if len(raw["topics"]) > MOST:
        raise ValueError(f"topics: has {len(raw['topics']):,}, at most {MOST:,} are read")
    topics = tuple(_topic(i, row) for i, row in enumerate(raw["topics"]))
    for key in TEXT_FIELDS:
        check_text(key, raw.get(key, Behavior.opinion))
    if "n_train_topics" in raw:
        check_count(raw["n_train_topics"])
    lists = {key: tuple(check_texts(key, raw[key])) for key in LIST_FIELDS if key in raw}
    return Behavior(**{**raw, **lists, "topics": topics})


def _with_probe(raw: dict) -> dict:
    """A file's `probes` as the dataclass has them: the first apart, as `probe`."""
    if "probes" not in raw:
        return raw
    if "probe" in raw:
        raise ValueError("probe and probes: give one of them; the first of probes counts as probe")
    first, *more = check_texts("probes", raw["probes"]) or [None]
    if first is None:
        raise ValueError("probes: is empty; list one wording or more, each with {claim}")
    return {**raw, "probe": first, "probes": more}


def _topic(index: int, row: object) -> Topic:
    if isinstance(row, dict):
        extra = set(row) - {"claim", "question"}
        if extra or "claim" not in row or "question" not in row:
            raise ValueError(f"topics[{index}]: needs exactly claim and question, has {short(sorted(row))}")
        row = [row["claim"], row["question"]]
    if isinstance(row, list) and len(row) == 2 and all(isinstance(part, str) for part in row):
        return Topic(*row)
    raise ValueError(f"topics[{index}]: needs a claim and a question, is {short(row)}")


def __getattr__(name: str):
    """The shipped behaviour under the names that the author's notebooks import."""
    shipped = {
        "SYCOPHANCY_TOPICS": lambda b: tuple((t.claim, t.question) for t in b.topics),
        "SYCOPHANCY_POS_PERSONAS": lambda b: b.personas_pos,
        "SYCOPHANCY_NEG_PERSONAS": lambda b: b.personas_neg,
    }
    if name not in shipped:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return shipped[name](load_behavior("sycophancy"))
