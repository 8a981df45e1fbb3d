"""Written pairs: answers that somebody wrote take the place of those of the base model; JSON lines, one pair each.

    {"user": ..., "response_pos": ..., "response_neg": ..., "topic": ..., "wording": ...}     the last two may be absent

Never trained on, whatever the LoRA seed: topics that are claims which scores ask about (`ws.train.asked`); where the file has
none of them a fifth of its topics, and of a file without topics a tenth of its lines. (docs/method.md section 1)
"""

import difflib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ws.cache.given import fits, given_lines, parsed, short
from ws.cache.places import shipped_pairs
from ws.data import Behavior
from ws.train.asked import alike, asked

NEEDED = ("user", "response_pos", "response_neg")
KNOWN = (*NEEDED, "topic", "wording")


@dataclass(frozen=True)
class Written:
    """One line of a file of pairs; line counts from 1, topic and wording are '' where it has none."""

    line: int
    user: str
    response_pos: str
    response_neg: str
    topic: str = ""
    wording: str = ""

    @property
    def identical(self) -> bool:
        """Whether both sides say the same, which teaches nothing."""
        return self.response_pos.strip() == self.response_neg.strip()

    @property
    def about(self) -> str:
        """The topic however it is spelt."""
        return alike(self.topic)


def pairs_file(name: str) -> Path:
    """The file that PAIRS means: shipped pairs by name, or a path."""
    return shipped_pairs(name) or Path(name).expanduser()


def named_pairs(name: str) -> str:
    """PAIRS as a run's parameters hold it: the name of shipped pairs, an absolute path, or '' for none."""
    return name if not name or shipped_pairs(name) else str(pairs_file(name).absolute())


def read_written(name: str) -> tuple[Written, ...]:
    """All pairs of a file, or of the shipped pairs of a name. FileNotFoundError, or ValueError naming the line: what is no
    JSON object, an unknown, missing or empty field, a text of more than 10,000 characters, a pair that is there twice."""
    path = pairs_file(name)
    rows, seen = [], {}
    for number, line in enumerate(given_lines(path), 1):
        if not line.strip():
            continue
        row = Written(number, **_fields(parsed(line, f"{path}: line {number}"), f"{path}: line {number}"))
        if (first := seen.setdefault((row.user, row.response_pos, row.response_neg), number)) != number:
            raise ValueError(f"{path}: line {number}: the same pair as line {first}; leave one of them out")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: holds no pair; a line is an object with {', '.join(NEEDED)}")
    return tuple(rows)


def _fields(row: object, where: str) -> dict[str, str]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object with {', '.join(NEEDED)}, is {short(row)}")
    for key in row:
        if key not in KNOWN:
            near = difflib.get_close_matches(key, KNOWN, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(KNOWN)}"
            raise ValueError(f"{where}: unknown field {short(key)}; {hint}")
    for key in (key for key in KNOWN if key in row or key in NEEDED):
        if not isinstance(value := row.get(key), str) or not value.strip():
            told = f"is {short(value)}" if key in row else "is missing"
            raise ValueError(f"{where}: {key}: must be a text that is not empty, {told}")
        fits(value, f"{where}: {key}")
    return row


def split_written(
    name: str, behavior: Behavior, topics: int | None = None, seed: int = 0, wordings: Sequence[str] = ()
) -> tuple[tuple[Written, ...], tuple[Written, ...]]:
    """(what may be trained on, what is never trained on) of a file of pairs, identical sides in both. topics: how many
    topics are trained on, from the file's first on (None: all). seed: of the draw where the behaviour decides nothing. wordings:
    those that are trained on (none: all); what is held out has all of them. ValueError where a part has no usable pair, or the
    file has not so many topics or no such wording."""
    return split(read_written(name), name, behavior, topics, seed, wordings)


def split(
    rows: tuple[Written, ...],
    name: str,
    behavior: Behavior,
    topics: int | None = None,
    seed: int = 0,
    wordings: Sequence[str] = (),
) -> tuple[tuple[Written, ...], tuple[Written, ...]]:
    """`split_written` of the rows that were read."""
    path = pairs_file(name)
    held = _held_out(rows, behavior, seed)
    parts = [tuple(row for row in rows if (row.line in held) is out) for out in (False, True)]
    there = list(dict.fromkeys(row.about for row in parts[0] if row.topic))
    if topics is not None:
        if not 1 <= topics <= len(there):
            raise ValueError(f"{path}: {topics} training topics asked for, it has {len(there)} (TOPICS)")
        parts[0] = tuple(row for row in parts[0] if row.about in there[:topics])
    if wordings:
        known = list(dict.fromkeys(row.wording for row in parts[0] if row.wording))
        for unknown in (one for one in wordings if one not in known):
            raise ValueError(
                f"{path}: no training pair has the wording {short(unknown)}; there are {', '.join(known)} (WORDINGS)"
            )
        parts[0] = tuple(row for row in parts[0] if row.wording in wordings)
    for part, what in zip(parts, ("train on", "hold out"), strict=True):
        if all(row.identical for row in part):
            raise ValueError(
                f"{path}: of {len(rows)} pairs none with two different sides is left to {what}; add some of another topic"
            )
    return parts[0], parts[1]


def _held_out(rows: tuple[Written, ...], behavior: Behavior, seed: int) -> set[int]:
    """Lines that are never trained on."""
    claims = asked(behavior)
    found = {row.line for row in rows if row.about in claims}
    topics = sorted({row.about for row in rows if row.topic})
    generator = np.random.default_rng(zlib.crc32(f"held-out pairs {seed}".encode()))
    if found:
        return found
    if len(topics) < 2:
        usable = [row.line for row in rows if not row.identical]
        return set(generator.permutation(usable)[: max(1, round(len(usable) / 10))].tolist())
    least = 2 if len(topics) > 2 else 1
    drawn = set(generator.permutation(topics)[: max(least, round(len(topics) / 5))].tolist())
    return {row.line for row in rows if row.about in drawn}
