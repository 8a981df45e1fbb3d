"""Training pairs: the base model itself answers every training topic under a positive and under a negative persona, or
they are read from a file (`ws.train.written`).

For (topic, persona pair i, sample): `response_pos ~ p(. | persona_pos[i], user)` and
`response_neg ~ p(. | persona_neg[i], user)`, with user = the claim as an opinion followed by the topic's question.
Written in seeded batches, each saved whole, so a killed run goes on where it was and gives the same pairs. Of statements nothing
is written: the question is the user turn, the matching answer `response_pos`, the other `response_neg`. (method section 1)
"""

import json
import zlib
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from ws.cache.files import write_text
from ws.cache.given import first_line, parsed, read_given
from ws.cache.keys import Key, stage_key
from ws.cache.made import kept
from ws.data import Behavior
from ws.model.generate import answers_and_cuts
from ws.model.guard import check_unhooked
from ws.model.lm import LM
from ws.model.text import chat_text
from ws.show.bars import tqdm
from ws.steer.statements import MOST_ASKED
from ws.train.written import Written, read_written, split, split_written

Turns = tuple[list[str], tuple[tuple[str, str], ...]]  # user turns by topic, and (positive, negative) personas


@dataclass(frozen=True)
class PairConfig:
    """How pairs are written. `topics` and `personas`: how many, from the first on (None: all that may train). file: written
    pairs, a path or the name of shipped ones, in place of what the base model would write; then `topics` and `wordings` alone
    count. wordings: the file's that are trained on; none for all.

    Examples:
        >>> import ws
        >>> ws.PairConfig(topics=4).samples
        10
    """

    topics: int | None = None
    personas: int | None = None
    samples: int = 10
    temperature: float | int = 0.7
    top_p: float | int = 0.8
    max_new_tokens: int = 128
    batch: int = 64
    seed: int = 0
    file: str = ""
    wordings: tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.wordings, str):
            raise ValueError(f"wordings={self.wordings!r}: give several, as ({self.wordings!r},)")


@dataclass(frozen=True)
class Pair:
    """One user turn with the two answers; topic, persona and sample are indices: of written pairs topic, wording and line, of
    statements the half (0 where the yes-word matches, 1 where the no-word does), 0, and the statement. cut_pos, cut_neg:
    whether the token limit ended an answer, so that it says nothing of where answers end."""

    topic: int
    persona: int
    sample: int
    user: str
    response_pos: str
    response_neg: str
    cut_pos: bool = False
    cut_neg: bool = False

    def answer(self, sign: str) -> tuple[str, bool]:
        """The text of one side, and whether it says nothing of where answers end."""
        return (self.response_pos, self.cut_pos) if sign == "pos" else (self.response_neg, self.cut_neg)

    def limited(self, sign: str) -> bool:
        """Whether the token limit ended a side while it was written."""
        return self.answer(sign)[1]


@dataclass(frozen=True)
class WrittenPair(Pair):
    """A pair that the base model did not write: what counts as cut is an answer of one word."""

    def limited(self, sign: str) -> bool:
        return False


@dataclass(frozen=True)
class StatementPair(WrittenPair):
    """A pair of a behaviour of statements, whose topic is its half."""


@dataclass(frozen=True)
class Pairs:
    """The kept pairs, and how many were written and dropped. heldout: those of a file that are never trained on."""

    rows: tuple[Pair, ...]
    written: int
    empty: int
    identical: int
    heldout: tuple[Pair, ...] = ()


class NoPairs(ValueError):
    """Every pair that the base model wrote was dropped."""


def make_pairs(lm: LM, behavior: Behavior, cfg: PairConfig, cache: Path, progress: bool = True) -> Pairs:
    """Write the pairs, or read those that were written from the same model, texts and settings by the same code. cache:
    a folder (of this model); pairs go to `<cache>/pairs/<behavior>_<hash8>/pairs.jsonl`. Raises ValueError when more
    topics or personas are asked for than there are, and when every pair was dropped (with the likely cause). With `cfg.file`
    the pairs are those of the file, and nothing is written."""
    cfg = counted(behavior, cfg)
    if cfg.file:
        return from_file(behavior, cfg)
    if behavior.answers:
        return statement_pairs(behavior, cfg.topics)
    users = [behavior.opinion_text(t) for t in behavior.train_topics[: cfg.topics]]
    return _kept_pairs(lm, behavior, (users, behavior.persona_pairs[: cfg.personas]), cfg, cache / "pairs", progress)


def heldout_pairs(
    lm: LM, behavior: Behavior, cfg: PairConfig, cache: Path, progress: bool = True, n_heldout: int | None = None
) -> tuple[tuple[Pair, ...], str]:
    """Pairs that no adapter is trained on, and why there are none: those held out of `cfg.file`; without it the base model
    writes one for each held-out topic and persona pair, kept like the pairs of `make_pairs`. Of statements the first `n_heldout`,
    at most MOST_ASKED."""
    if cfg.file:
        return from_file(behavior, cfg).heldout, ""
    if behavior.answers:
        return statement_pairs(behavior, min(n_heldout or MOST_ASKED, MOST_ASKED), heldout=True).rows, ""
    topics, personas = behavior.heldout_topics, behavior.persona_pairs
    cfg = replace(cfg, topics=len(topics), personas=len(personas), samples=1)
    try:
        turns = [behavior.opinion_text(t) for t in topics], personas
        return _kept_pairs(lm, behavior, turns, cfg, cache / "pairs_held_out", progress).rows, ""
    except NoPairs as error:
        return (), str(error)


def most_pairs(behavior: Behavior, cfg: PairConfig) -> int:
    """How many pairs there can be to train on; errors as in `counted`."""
    cfg = counted(behavior, cfg)
    if cfg.file:
        return len(from_file(behavior, cfg).rows)
    return cfg.topics if behavior.answers else cfg.topics * cfg.personas * cfg.samples


def trained_claims(behavior: Behavior, cfg: PairConfig) -> list[str]:
    """What training pairs are about: topics of `cfg.file`, or the behaviour's own."""
    if cfg.file:
        train = split_written(cfg.file, behavior, cfg.topics, cfg.seed, cfg.wordings)[0]
        return list(dict.fromkeys(row.about for row in train if row.topic))
    return [topic.claim for topic in behavior.train_topics[: cfg.topics]]


def from_file(behavior: Behavior, cfg: PairConfig) -> Pairs:
    """The pairs of `cfg.file` as training has them: `topic` and `persona` number the file's topics and wordings in the
    order in which they are there first, so that a draw stays within both; `sample` is the line. An answer of `one_word` counts
    as cut. (docs/method.md section 1)"""
    everything = read_written(cfg.file)
    topics, wordings = (
        {text: i for i, text in enumerate(dict.fromkeys(texts))}
        for texts in ([row.about for row in everything], [row.wording for row in everything])
    )

    def pair(row: Written) -> Pair:
        sides = row.response_pos, row.response_neg
        return WrittenPair(topics[row.about], wordings[row.wording], row.line, row.user, *sides, *map(one_word, sides))

    parts = split(everything, cfg.file, behavior, cfg.topics, cfg.seed, cfg.wordings)
    train, held = (tuple(pair(row) for row in part if not row.identical) for part in parts)
    used = sum(map(len, parts))
    return Pairs(train, used, 0, used - len(train) - len(held), held)


def one_word(answer: str) -> bool:
    """Whether an answer is one word, whose end of turn is no label. To end the turn after one word is new to a base model: both
    signs learn it, it cancels in w, and what is left of w acts only beside it (docs/journal.md, 2026-11-28)."""
    return len(answer.split()) == 1


def _kept_pairs(lm: LM, behavior: Behavior, turns: Turns, cfg: PairConfig, place: Path, progress: bool) -> Pairs:
    """What the base model writes in these turns, made once."""
    check_unhooked(lm.model)
    written = asdict(cfg)
    del written["file"], written["wordings"]
    template = lm.tokenizer.chat_template
    params = {"model": lm.fingerprint, "template": template, "turns": turns, "config": written}
    key = stage_key(params, code=[f"ws.train.pairs.{name}" for name in ("_write_all", "drop_useless", "write_pairs")])
    folder = place / f"{behavior.slug}_{key.params[:8]}"

    def write(path: Path) -> None:
        write_pairs(drop_useless(_write_all(lm, turns, cfg, key, folder, progress)), path)

    pairs = kept(folder / "pairs.jsonl", key, write, read_pairs)
    for chunk in folder.glob("*chunk_*"):
        chunk.unlink(missing_ok=True)
    return pairs


def statement_pairs(behavior: Behavior, n: int | None = None, heldout: bool = False) -> Pairs:
    """The pairs of a behaviour of statements: its first `n` training (or held-out) ones, None for all, with one-word answers.
    They count as cut, as every answer of `one_word`."""
    topics, answers, rows = behavior.train_topics, behavior.answers, []
    if heldout:
        topics, answers = behavior.heldout_topics, behavior.heldout_answers
    for i, (topic, answer) in enumerate(zip(topics[:n], answers, strict=False)):
        matches = answer in behavior.yes
        other = (behavior.no if matches else behavior.yes)[0]
        rows.append(StatementPair(int(not matches), 0, i, behavior.opinion_text(topic), answer, other, True, True))
    return Pairs(tuple(rows), len(rows), 0, 0)


def counted(behavior: Behavior, cfg: PairConfig) -> PairConfig:
    """cfg with the numbers of topics and of personas filled in; ValueError where there are not so many, and for a file of
    pairs that cannot be used. Statements need no personas."""
    if cfg.file:
        split_written(cfg.file, behavior, cfg.topics, cfg.seed, cfg.wordings)
        return cfg
    if cfg.wordings:
        raise ValueError(f"WORDINGS {', '.join(cfg.wordings)}: only pairs from a file have wordings; give PAIRS")
    pos, neg = len(behavior.personas_pos), len(behavior.personas_neg)
    if pos != neg:
        raise ValueError(
            f"{behavior.name}: personas are paired by index, but there are {pos} positive and {neg} negative ones"
        )
    personas = {} if behavior.answers else {"personas": pos}
    for what, have in {"topics": len(behavior.train_topics), **personas}.items():
        asked = getattr(cfg, what)
        if asked is not None and not 1 <= asked <= have:
            raise ValueError(f"{behavior.name}: {asked} training {what} asked for, it has {have}")
        cfg = replace(cfg, **{what: have if asked is None else asked})
    if min(cfg.samples, cfg.batch) < 1:
        raise ValueError(f"samples ({cfg.samples}) and batch ({cfg.batch}) must be at least 1")
    return cfg


def _write_all(lm: LM, turns: Turns, cfg: PairConfig, key: Key, folder: Path, progress: bool) -> list[Pair]:
    """All pairs, in chunks of `cfg.batch` that are kept in `folder` until the file is whole."""
    users, personas = turns
    grid = list(product(range(len(users)), range(len(personas)), range(cfg.samples)))
    answers: list[list] = []
    for start in tqdm(range(0, len(grid), cfg.batch), desc="training pairs", disable=not progress):

        def write(path: Path, start: int = start) -> None:
            sides = []
            for side, sign in enumerate(("pos", "neg")):
                asked = ((users[t], personas[p][side]) for t, p, _ in grid[start : start + cfg.batch])
                prompts = [chat_text(lm.tokenizer, user, system=persona) for user, persona in asked]
                seed = zlib.crc32(f"{cfg.seed} {sign} {start}".encode())
                sides.append(answers_and_cuts(lm, prompts, cfg.max_new_tokens, cfg.temperature, cfg.top_p, seed))
            both = [(a, b, cut_a, cut_b) for (a, cut_a), (b, cut_b) in zip(*sides, strict=True)]
            write_text(path, json.dumps(both, ensure_ascii=False))

        chunk = stage_key({"pairs": key.params, "start": start}, sources=key.sources)
        path = folder / f"chunk_{start:06d}.json"
        answers += kept(path, chunk, write, lambda path: json.loads(path.read_text("utf-8")))
    return [Pair(t, p, s, users[t], *answer) for (t, p, s), answer in zip(grid, answers, strict=True)]


def drop_useless(rows: list[Pair]) -> Pairs:
    """Drop and count pairs with an empty side or two identical ones. ValueError (likely cause) if none is left."""
    full = [row for row in rows if row.response_pos.strip() and row.response_neg.strip()]
    kept = [row for row in full if row.response_pos.strip() != row.response_neg.strip()]
    empty, identical = len(rows) - len(full), len(full) - len(kept)
    if not kept:
        cause = (
            "the model ends its turn at once: is it instruction-tuned, and does its chat template fit?"
            if empty >= identical
            else "the personas do not change what the model writes: does its chat template show the system prompt, and"
            " do the personas of a pair differ?"
        )
        raise NoPairs(
            f"no usable training pair: of {len(rows)}, {empty} have an empty side and {identical} two identical"
            f" ones; likely cause: {cause}"
        )
    return Pairs(tuple(kept), len(rows), empty, identical)


def write_pairs(pairs: Pairs, path: Path) -> None:
    """One JSON line of counts, then one per pair; written whole."""
    head = {"written": pairs.written, "empty": pairs.empty, "identical": pairs.identical}
    lines = [json.dumps(row, ensure_ascii=False) for row in (head, *map(asdict, pairs.rows))]
    write_text(path, "\n".join(lines) + "\n")


def read_pairs(path: Path) -> Pairs:
    """Read what `write_pairs` wrote. ValueError naming the file where it cannot be read."""
    try:
        # not splitlines: an answer may hold a separator that JSON leaves as it is
        lines = read_given(path, 1 << 30).rstrip("\n").split("\n")
        head, *rows = (parsed(line, f"line {i}") for i, line in enumerate(lines, 1))
        return Pairs(tuple(Pair(**row) for row in rows), **head)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a file of training pairs: {first_line(error)}") from error
