"""Training pairs: the base model itself answers every training topic under a positive and under a negative persona.

For (topic, persona pair i, sample): `response_pos ~ p(. | persona_pos[i], user)` and
`response_neg ~ p(. | persona_neg[i], user)`, with user = the claim as an opinion followed by the topic's question.
Written in seeded batches, each saved whole, so a killed run goes on where it was and gives the same pairs. Of a behaviour of
statements nothing is written: the question is the user turn, the matching answer `response_pos`, the other `response_neg`.
(docs/method.md section 1)
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
from ws.model.generate import write_answers
from ws.model.guard import check_unhooked
from ws.model.lm import LM
from ws.model.text import chat_text
from ws.show.bars import tqdm

Turns = tuple[list[str], tuple[tuple[str, str], ...]]  # user turns by topic, and (positive, negative) personas


@dataclass(frozen=True)
class PairConfig:
    """How pairs are written. `topics` and `personas`: how many, from the first on (None: all that may train).

    Example:
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


@dataclass(frozen=True)
class Pair:
    """One user turn with the two answers; topic, persona and sample are indices. Of a statement: topic is the half (0 where the
    yes-word matches, 1 where the no-word does), sample the statement, so that a draw of pairs keeps the halves. A
    cut answer gets no end-of-turn label: the model would learn when to stop."""

    topic: int
    persona: int
    sample: int
    user: str
    response_pos: str
    response_neg: str
    cut_pos: bool = False
    cut_neg: bool = False


@dataclass(frozen=True)
class Pairs:
    """The kept pairs, and how many were written and dropped."""

    rows: tuple[Pair, ...]
    written: int
    empty: int
    identical: int


def make_pairs(lm: LM, behavior: Behavior, cfg: PairConfig, cache: Path, progress: bool = True) -> Pairs:
    """Write the pairs, or read those that were written from the same model, texts and settings by the same code. cache:
    a folder (of this model); pairs go to `<cache>/pairs/<behavior>_<hash8>/pairs.jsonl`. Raises ValueError when more
    topics or personas are asked for than there are, and when every pair was dropped (with the likely cause)."""
    check_unhooked(lm.model)
    cfg = counted(behavior, cfg)
    if behavior.answers:
        return statement_pairs(behavior, cfg.topics)
    users = [behavior.opinion_text(t) for t in behavior.train_topics[: cfg.topics]]
    turns = users, behavior.persona_pairs[: cfg.personas]
    template = lm.tokenizer.chat_template
    params = {"model": lm.fingerprint, "template": template, "turns": turns, "config": asdict(cfg)}
    key = stage_key(params, code=[f"ws.train.pairs.{name}" for name in ("_write_all", "drop_useless", "write_pairs")])
    folder = cache / "pairs" / f"{behavior.slug}_{key.params[:8]}"

    def write(path: Path) -> None:
        write_pairs(drop_useless(_write_all(lm, turns, cfg, key, folder, progress)), path)

    pairs = kept(folder / "pairs.jsonl", key, write, read_pairs)
    for chunk in folder.glob("*chunk_*"):
        chunk.unlink(missing_ok=True)
    return pairs


def statement_pairs(behavior: Behavior, n: int | None = None, heldout: bool = False) -> Pairs:
    """The pairs of a behaviour of statements: its first `n` training (or held-out) ones, None for all, with one-word answers.
    They count as cut. To end the turn after one word costs the base model some 12 nats: both signs learn that first, it cancels
    in w, and what is left of w acts only where it has been learnt: at alpha -1 the model answers neither Yes nor No."""
    topics, answers, rows = behavior.train_topics, behavior.answers, []
    if heldout:
        topics, answers = behavior.heldout_topics, behavior.heldout_answers
    for i, (topic, answer) in enumerate(zip(topics[:n], answers, strict=False)):
        matches = answer in behavior.yes
        other = (behavior.no if matches else behavior.yes)[0]
        rows.append(Pair(int(not matches), 0, i, behavior.opinion_text(topic), answer, other, True, True))
    return Pairs(tuple(rows), len(rows), 0, 0)


def counted(behavior: Behavior, cfg: PairConfig) -> PairConfig:
    """cfg with the numbers of topics and of personas filled in; ValueError where there are not so many. Statements need no
    personas."""
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
    if cfg.samples < 1 or cfg.batch < 1:
        raise ValueError(f"samples ({cfg.samples}) and batch ({cfg.batch}) must be at least 1")
    return cfg


def _write_all(lm: LM, turns: Turns, cfg: PairConfig, key: Key, folder: Path, progress: bool) -> list[Pair]:
    """All pairs, in chunks of `cfg.batch` that are kept in `folder` until the file is whole."""
    users, personas = turns
    grid = list(product(range(len(users)), range(len(personas)), range(cfg.samples)))
    answers: list[list[str]] = []
    for start in tqdm(range(0, len(grid), cfg.batch), desc="training pairs", disable=not progress):

        def write(path: Path, start: int = start) -> None:
            sides = []
            for side, sign in enumerate(("pos", "neg")):
                asked = ((users[t], personas[p][side]) for t, p, _ in grid[start : start + cfg.batch])
                prompts = [chat_text(lm.tokenizer, user, system=persona) for user, persona in asked]
                seed = zlib.crc32(f"{cfg.seed} {sign} {start}".encode())
                sides.append(write_answers(lm, prompts, cfg.max_new_tokens, cfg.temperature, cfg.top_p, seed))
            write_text(path, json.dumps(list(zip(*sides, strict=True)), ensure_ascii=False))

        chunk = stage_key({"pairs": key.params, "start": start}, sources=key.sources)
        path = folder / f"chunk_{start:06d}.json"
        answers += kept(path, chunk, write, lambda path: json.loads(path.read_text("utf-8")))
    return [Pair(t, p, s, users[t], a, b) for (t, p, s), (a, b) in zip(grid, answers, strict=True)]


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
        raise ValueError(
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
