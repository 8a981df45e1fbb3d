"""What a benchmark asks: questions whose answer is yes or no, and which answer is wanted at either end of the steering.

At the positive end the behaviour's answer is wanted. At the negative end its opposite, where the item is one that the
behaviour is about (a false claim, a statement), and the same answer as before where it is not (a true claim: honest is to
affirm it still; a plain fact: the truth at both ends). (docs/method.md section 8)
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ws.data import Behavior, load_behavior
from ws.steer.neutral import neutral
from ws.steer.statements import halves

TRUTH = "Is it true that {claim}? Reply {yes} or {no}."


@dataclass(frozen=True)
class Size:
    """How much is asked: held-out claims (as many true ones) or statements of the behaviour, under how many wordings;
    statements of each other behaviour; lines of each file of true and false sentences; plain facts; neutral passages; prompts
    that are gone on from, twice as many, and for how many tokens; topics whose probes the KL is taken on; persona pairs and
    layers that are tried on training topics."""

    claims: int = 48
    wordings: int = 4
    statements: int = 40
    truth: int = 40
    facts: int = 48
    passages: int = 24
    prompts: int = 6
    tokens: int = 64
    topics: int = 12
    personas: int = 5
    layers: int = 6


FULL, QUICK = Size(), Size(12, 2, 8, 12, 24, 4, 2, 24, 6, 2, 4)


@dataclass(frozen=True)
class Group:
    """One set of n items under A wordings. role: `own`, `other` (another behaviour), `truth`, `fact`. turns: `A` rows of n
    user turns. plus, minus: the answer that is wanted at either end, 1 for the yes-word and -1 for the no-word."""

    name: str
    role: str
    turns: tuple[tuple[str, ...], ...]
    plus: tuple[int, ...]
    minus: tuple[int, ...]
    words: Behavior  # whose answer words count


def groups(behavior: Behavior, size: Size, statements: Sequence[Path] = (), truth: Sequence[Path] = ()) -> list[Group]:
    """All sets. statements: files of other behaviours; truth: CSV files with `statement` and `label` (1 true). ValueError
    naming a file that is none, and the behaviour itself among the others."""
    found = [_own(behavior, size)]
    for path in statements:
        other = load_behavior(Path(path))
        if other.name == behavior.name or not other.answers:
            raise ValueError(
                f"{path}: {'the behaviour itself' if other.answers else 'no statements with answers'}; give another file"
            )
        found.append(_of_statements(other, size.statements, 1, "other"))
    about_truth = not behavior.answers  # agreeing with what is false is what the behaviour is
    for path in truth:
        claims, labels = _sentences(Path(path), size.truth)
        text = TRUTH.replace("{yes}", behavior.yes[0]).replace("{no}", behavior.no[0])
        true = tuple(1 if label else -1 for label in labels)
        turns = (tuple(text.replace("{claim}", claim) for claim in claims),)
        found.append(Group(Path(path).stem, "truth", turns, (1,) * len(true) if about_truth else true, true, behavior))
    asked = neutral().facts[: size.facts]
    true = tuple(1 if yes else -1 for _, yes in asked)
    turns = (tuple(f"{question} Reply {behavior.yes[0]} or {behavior.no[0]}." for question, _ in asked),)
    found = [*found, Group("plain facts", "fact", turns, true, true, behavior)]
    for name, many in Counter(group.name for group in found).items():
        if many > 1:
            raise ValueError(f"{name}: two sets of items have this name; rename a file")
    return found


def _own(behavior: Behavior, size: Size) -> Group:
    if behavior.answers:
        return _of_statements(behavior, size.claims, size.wordings, "own")
    false, true = behavior.heldout_claims[: size.claims], behavior.true_claims[: size.claims]
    turns = tuple(
        tuple(behavior.probe_text(c, a) for c in (*false, *true))
        for a in range(len(behavior.templates[: size.wordings]))
    )
    plus = (1,) * (len(false) + len(true))
    return Group("held-out claims", "own", turns, plus, (-1,) * len(false) + (1,) * len(true), behavior)


def _of_statements(behavior: Behavior, n: int, wordings: int, role: str) -> Group:
    by = halves(behavior, n)
    claims = (*by["yes"], *by["no"])
    plus = (1,) * len(by["yes"]) + (-1,) * len(by["no"])
    turns = tuple(tuple(behavior.probe_text(c, a) for c in claims) for a in range(len(behavior.templates[:wordings])))
    return Group(behavior.name, role, turns, plus, tuple(-x for x in plus), behavior)


def _sentences(path: Path, n: int) -> tuple[list[str], list[bool]]:
    """n sentences of a file as claims, half of them true, a seeded draw."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a CSV file with the columns statement and label")
    try:
        table = pl.read_csv(path)
        true, texts = [bool(int(x)) for x in table["label"]], [str(x) for x in table["statement"]]
    except (pl.exceptions.PolarsError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: needs the columns statement and label, 1 or 0: {str(error).splitlines()[0]}"
        ) from error
    order = np.random.default_rng(zlib.crc32(path.stem.encode())).permutation(len(texts)).tolist()
    some = [i for side in (True, False) for i in [i for i in order if true[i] is side][: n // 2]]
    if len({true[i] for i in some}) < 2:
        raise ValueError(f"{path}: needs true and false statements, has {len(texts)} of one kind")
    return [_running(texts[i]) for i in some], [true[i] for i in some]


def _running(sentence: str) -> str:
    """A sentence as it follows "that"."""
    first, _, rest = sentence.strip().rstrip(".").partition(" ")
    return f"{first.lower() if first in ('The', 'A', 'An') else first} {rest}"
