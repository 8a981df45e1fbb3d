"""Calibration texts of the delta SVD: reading them, and turning them into tokens that remember their passage.

`stream`: passages joined by blank lines into one sequence of at most `max_length` tokens. `documents`: a sequence per
passage.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ws.cache.given import MOST_LINES, MOST_TEXT, fits, parsed, read_given
from ws.cache.places import ASSETS

SHIPPED = ASSETS / "calibration.json"
SEPARATOR = "\n\n"


def load_calibration(path: str | Path = "") -> list[str]:
    """Passages of a calibration file, in its order; an empty path is the set this project ships. `.txt`: passages
    separated by blank lines. `.json`: a list of strings or of objects with `text`. `.jsonl`: one such entry per line.
    Blank passages are left out. A passage has at most 100,000 characters, a file 100,000 passages and 64 MB. Raises
    FileNotFoundError, or ValueError naming the file and the entry."""
    path = Path(path).expanduser() if str(path) else SHIPPED
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such calibration file")
    raw = read_given(path)
    if path.suffix == ".txt":
        texts = re.split(r"\n\s*\n", "\n".join(["", "", *raw.splitlines(), "", ""]))
    elif path.suffix == ".json":
        entries = parsed(raw, path) if raw.strip() else []
        if not isinstance(entries, list):
            raise ValueError(f"{path}: expected a JSON list of passages, found {type(entries).__name__}")
        texts = [_text(entry, f"{path}: entry {i}") for i, entry in enumerate(entries)]
    elif path.suffix == ".jsonl":
        lines = [(i, line) for i, line in enumerate(raw.split("\n"), 1) if line.strip()]
        texts = [_text(parsed(line, f"{path}: line {i}"), f"{path}: line {i}") for i, line in lines]
    else:
        raise ValueError(f"{path}: calibration files end in .txt, .json or .jsonl, not {path.suffix!r}")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path}: the calibration file is empty")
    if len(texts) > MOST_LINES:
        raise ValueError(f"{path}: holds {len(texts):,} passages, at most {MOST_LINES:,} are read")
    return [fits(text, f"{path}: passage {i}", 10 * MOST_TEXT) for i, text in enumerate(texts)]


def _text(entry, where: str) -> str:
    text = entry.get("text") if isinstance(entry, dict) else entry
    if isinstance(text, str):
        return text
    raise ValueError(f"{where}: expected a string, or an object with a string `text`")


@dataclass(frozen=True)
class Sequence:
    """One token sequence `ids (T,)`, the passage that each token comes from, and how many tokens were cut off."""

    ids: Int[Tensor, " T"]
    passage: Int[Tensor, " T"]
    cut: int


def as_stream(tokenizer, texts: list[str], max_length: int) -> list[Sequence]:
    """All texts joined by blank lines as one sequence of at most `max_length` tokens, special tokens by default. A
    blank line belongs to the text before it. Without character offsets, passage borders come from the token counts of
    the texts' prefixes. (docs/method.md section 9)"""
    joined = SEPARATOR.join(texts)
    if tokenizer.is_fast:
        ends = np.cumsum([len(text) + len(SEPARATOR) for text in texts])
        encoded = tokenizer(joined, return_offsets_mapping=True)
        ids, place = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
    else:
        ids = tokenizer(joined)["input_ids"]
        ends = [len(tokenizer(SEPARATOR.join(texts[: i + 1]) + SEPARATOR)["input_ids"]) for i in range(len(texts))]
        place = np.arange(len(ids))
    passage = np.searchsorted(ends, place, side="right").clip(max=len(texts) - 1)
    return [_sequence(ids, passage, max_length)]


def as_documents(tokenizer, texts: list[str], max_length: int) -> list[Sequence]:
    """Every text as its own sequence of at most `max_length` tokens, special tokens by the tokenizer's default."""
    rows = tokenizer(list(texts))["input_ids"]
    return [_sequence(row, np.full(len(row), i), max_length) for i, row in enumerate(rows) if row]


def _sequence(ids: list[int], passage: np.ndarray, max_length: int) -> Sequence:
    kept, passage = (torch.tensor(values[:max_length], dtype=torch.long) for values in (ids, passage))
    return Sequence(kept, passage, max(0, len(ids) - max_length))


def padded(batch: list[Sequence]) -> tuple[Int[Tensor, "n T"], Int[Tensor, "n T"], Int[Tensor, "n T"]]:
    """Token ids, attention mask and passages `(n, T)` of a batch, padded on the right under a mask of 0."""
    rows = zip(*((s.ids, torch.ones_like(s.ids), s.passage) for s in batch), strict=True)
    ids, mask, passage = (torch.nn.utils.rnn.pad_sequence(row, batch_first=True) for row in rows)
    return ids, mask, passage


def bootstrap_groups(
    sequences: list[Sequence], most: int = 32, fewest: int = 8, blocks: int = 16
) -> tuple[list[Sequence], str]:
    """The same sequences with passages renumbered into the units of the bootstrap, and what a unit is, in words. More
    than `most` passages are dealt into `most` groups (bounded memory); fewer than `fewest` say too little about spread,
    so the tokens are cut into `blocks` contiguous runs instead."""
    present = torch.unique(torch.cat([s.passage for s in sequences]))
    total = sum(len(s.ids) for s in sequences)
    if len(present) < fewest:
        count = min(blocks, max(1, total // 4))
        groups = ((torch.arange(total) * count) // total).split([len(s.ids) for s in sequences])
        unit = f"{count} contiguous runs of tokens"
    else:
        groups = [torch.searchsorted(present, s.passage) % most for s in sequences]
        many = f"{most} groups of passages ({len(present)} passages)"
        unit = many if len(present) > most else f"{len(present)} passages"
    return [replace(s, passage=group) for s, group in zip(sequences, groups, strict=True)], unit
