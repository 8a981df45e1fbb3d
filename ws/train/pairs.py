"""Training pairs: the base model itself answers every training topic under a positive and under a negative persona.

For (topic, persona pair i, sample): `response_pos ~ p(. | persona_pos[i], user)` and
`response_neg ~ p(. | persona_neg[i], user)`, with user = the claim as an opinion followed by the topic's question.
Written in seeded batches, each saved whole, so a killed run goes on where it was and gives the same pairs.
(docs/method.md section 1)
"""

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ws.cache.files import lock, write_json, write_text
from ws.data import Behavior
from ws.model.lm import LM
from ws.model.text import chat_text, encode


@dataclass(frozen=True)
class PairConfig:
    """How pairs are written. `topics` and `personas`: how many, from the first on (None: all that may train)."""

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
    """One user turn with the two answers; topic, persona and sample are indices."""

    topic: int
    persona: int
    sample: int
    user: str
    response_pos: str
    response_neg: str


@dataclass(frozen=True)
class Pairs:
    """The kept pairs, and how many were written and dropped."""

    rows: tuple[Pair, ...]
    written: int
    empty: int
    identical: int


def pairs_key(lm: LM, behavior: Behavior, cfg: PairConfig) -> str:
    """Eight hex digits over all that the pairs depend on: model, template, topics, personas, sampling."""
    content = {
        "model": lm.fingerprint or lm.name,
        "template": lm.tokenizer.chat_template,
        "turns": [
            (behavior.opinion_text(t), behavior.personas_pos, behavior.personas_neg) for t in behavior.train_topics
        ],
        "config": asdict(cfg),
    }
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def make_pairs(lm: LM, behavior: Behavior, cfg: PairConfig, cache: Path, progress: bool = True) -> Pairs:
    """Write the pairs, or read those that an earlier call with the same inputs has written.

    cache: a folder (of this model); pairs go to `<cache>/pairs/<behavior>_<key>/pairs.jsonl`. Raises ValueError when
    more topics or personas are asked for than there are, and when every pair was dropped (with the likely cause).
    """
    topics, personas = _counts(behavior, cfg)
    folder = cache / "pairs" / f"{behavior.name}_{pairs_key(lm, behavior, cfg)}"
    done = folder / "pairs.jsonl"
    if done.is_file():
        return read_pairs(done)
    # several seeds may start at once; the first writes, the others read
    with lock(folder):
        if done.is_file():
            return read_pairs(done)
        rows = _write_all(lm, behavior, cfg, folder, (topics, personas), progress)
        pairs = drop_useless(rows)
        write_pairs(pairs, done)
        for chunk in folder.glob("chunk_*.json"):
            chunk.unlink()
    return pairs


def _write_all(
    lm: LM, behavior: Behavior, cfg: PairConfig, folder: Path, counts: tuple[int, int], progress: bool
) -> list[Pair]:
    topics, personas = counts
    grid = [(t, p, s) for t in range(topics) for p in range(personas) for s in range(cfg.samples)]
    answers: list[tuple[str, str]] = []
    starts = range(0, len(grid), cfg.batch)
    with _restored(lm.model):
        for start in tqdm(starts, desc="training pairs", disable=not progress):
            chunk = folder / f"chunk_{start:06d}.json"
            if not chunk.is_file():
                written = _write_chunk(lm, behavior, cfg, grid[start : start + cfg.batch], start)
                write_json(chunk, written)
            answers += [tuple(pair) for pair in json.loads(chunk.read_text(encoding="utf-8"))]
    users = [behavior.opinion_text(topic) for topic in behavior.train_topics]
    return [Pair(t, p, s, users[t], a, b) for (t, p, s), (a, b) in zip(grid, answers, strict=True)]


def drop_useless(rows: list[Pair]) -> Pairs:
    """Drop and count pairs with an empty side or two identical ones. ValueError (likely cause) if none is left."""
    kept, empty, identical = [], 0, 0
    for row in rows:
        pos, neg = row.response_pos.strip(), row.response_neg.strip()
        if not pos or not neg:
            empty += 1
        elif pos == neg:
            identical += 1
        else:
            kept.append(row)
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
    """Read what `write_pairs` wrote. ValueError naming the file and line where it cannot be read."""
    head, rows = {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            content = json.loads(line)
            if "written" in content:
                head = content
            else:
                rows.append(Pair(**content))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is not a training pair: {error}") from error
    return Pairs(tuple(rows), head.get("written", len(rows)), head.get("empty", 0), head.get("identical", 0))


def _counts(behavior: Behavior, cfg: PairConfig) -> tuple[int, int]:
    if len(behavior.personas_pos) != len(behavior.personas_neg):
        raise ValueError(
            f"{behavior.name}: personas are paired by index, but there are {len(behavior.personas_pos)} positive and"
            f" {len(behavior.personas_neg)} negative ones"
        )
    counts = []
    for what, asked, have in (
        ("topics", cfg.topics, len(behavior.train_topics)),
        ("personas", cfg.personas, len(behavior.personas_pos)),
    ):
        if asked is not None and not 1 <= asked <= have:
            raise ValueError(f"{behavior.name}: {asked} training {what} asked for, it has {have}")
        counts.append(have if asked is None else asked)
    if cfg.samples < 1 or cfg.batch < 1:
        raise ValueError(f"samples ({cfg.samples}) and batch ({cfg.batch}) must be at least 1")
    return counts[0], counts[1]


def _write_chunk(lm: LM, behavior: Behavior, cfg: PairConfig, rows: list[tuple], start: int) -> list[tuple[str, str]]:
    sides = []
    for sign, personas in (("pos", behavior.personas_pos), ("neg", behavior.personas_neg)):
        users = [behavior.opinion_text(behavior.train_topics[t]) for t, _, _ in rows]
        prompts = [
            chat_text(lm.tokenizer, user, system=personas[p]) for user, (_, p, _) in zip(users, rows, strict=True)
        ]
        seed = zlib.crc32(f"{cfg.seed} {sign} {start}".encode())
        sides.append(write_answers(lm, prompts, cfg, seed))
    return list(zip(*sides, strict=True))


def turn_end(tokenizer) -> str:
    """What the chat template puts after an answer (`<|im_end|>`), or the EOS token where it puts nothing."""
    marker = "answer"
    text = chat_text(tokenizer, "question", assistant=marker)
    return text[text.rindex(marker) + len(marker) :].strip() or tokenizer.eos_token or ""


def write_answers(lm: LM, prompts: list[str], cfg: PairConfig, seed: int) -> list[str]:
    """Sampled answers to rendered prompts, one batch padded on the left, seeded; special tokens and blanks stripped."""
    from transformers import GenerationConfig

    ids, mask = encode(lm.tokenizer, prompts, False, max_length=1 << 20, padding_side="left")
    stops = {lm.tokenizer.eos_token_id}
    known = getattr(lm.model.generation_config, "eos_token_id", None)
    stops |= set(known) if isinstance(known, (list, tuple)) else {known}
    ending = lm.tokenizer(turn_end(lm.tokenizer), add_special_tokens=False)["input_ids"]
    if len(ending) == 1:
        stops.add(ending[0])
    stops = sorted(stop for stop in stops if stop is not None)
    pad = next((t for t in (lm.tokenizer.pad_token_id, *stops) if t is not None), 0)
    settings = GenerationConfig(
        do_sample=cfg.temperature > 0,
        temperature=cfg.temperature if cfg.temperature > 0 else None,
        top_p=cfg.top_p if cfg.temperature > 0 else None,
        top_k=0 if cfg.temperature > 0 else None,
        max_new_tokens=cfg.max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        torch.manual_seed(seed)
        output = lm.model.generate(
            input_ids=ids.to(lm.device), attention_mask=mask.to(lm.device), generation_config=settings
        )
    new = output[:, ids.shape[1] :].tolist()
    cut = [row[: next((i for i, t in enumerate(row) if t in stops), len(row))] for row in new]
    return [text.strip() for text in lm.tokenizer.batch_decode(cut, skip_special_tokens=True)]


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the former mode afterwards."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
