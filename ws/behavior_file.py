"""A behaviour's file as one object, the fields of `ws.data.Behavior`. (docs/method.md section 1)

Three forms: JSON, one object; JSONL, a topic or some of the other fields a line; JSONL of statements with answers, the format
of the model-written persona evaluations. Of a statement `question`, `answer_matching_behavior`,
`answer_not_matching_behavior` and `statement` are read, other fields are not. The statements are brought into one order, the
same whenever the file is read: each half (by matching answer) is shuffled, and the halves interleaved in the pattern a b b a.
So every first part of them, every second one of them and what is held out hold both halves alike.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ws.cache.given import fits, parsed, read_given, short

MATCHING, OTHER = "answer_matching_behavior", "answer_not_matching_behavior"
NEEDED = ("question", MATCHING, OTHER)
# what other lines of such a file may give
SETTINGS = ("name", "n_train_topics", "personas_pos", "personas_neg", "probe", "probes")
LEAST = 8  # statements
MOST = 5_000  # topics, and entries of any other list
Rows = Sequence[tuple[str, object]]  # where a line stands, and what it holds


def read_raw(path: Path) -> object:
    """What a file gives, unchecked but for its form. ValueError naming the line."""
    content = read_given(path)
    if path.suffix != ".jsonl":
        return parsed(content, path)
    lines = {f"line {i}": line for i, line in enumerate(content.split("\n"), 1) if line.strip()}
    rows = [(where, parsed(line, f"{path}: {where}")) for where, line in lines.items()]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}: {where} is not an object")
    try:
        made_of_statements = any(MATCHING in row or OTHER in row for _, row in rows)
        return from_statements(rows, path.stem) if made_of_statements else from_lines(rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_lines(rows: Rows) -> dict:
    """Topics, one a line, and the fields of the other lines."""
    whole: dict = {"topics": []}
    for where, row in rows:
        if "claim" in row:
            row = {"topics": [row]}
        more = row.pop("topics", [])
        if not isinstance(more, list):
            raise ValueError(f"{where}: topics: must be a list of [claim, question]")
        whole["topics"] += more
        _add(whole, where, row)
    return whole


def from_statements(rows: Rows, name: str) -> dict:
    """Statements with answers, one a line; other lines may give SETTINGS, of which `probe` (or `probes`) words how a question,
    {claim} in it, is asked: by default as it is. `name`: the behaviour's where no line gives one. The claim of a statement is
    its `statement` where that stands in its question, else the whole question. The yes-word is Yes where that is one of the
    two answers, in whatever case, else the first of them in sorted order. ValueError naming the line: a field that is missing,
    empty, too long or of a wrong type, a third answer word, two equal answers, a question twice; fewer than 8 statements."""
    given, asked, seen, words = {}, [], {}, ()
    for where, row in rows:
        if not any(key in row for key in NEEDED):
            if unknown := [key for key in row if key not in SETTINGS]:
                raise ValueError(
                    f"{where}: unknown field {short(unknown[0])}, and no statement: needs {', '.join(NEEDED)}"
                )
            _add(given, where, row)
            continue
        question, matching, other = (_text(row, key, where) for key in NEEDED)
        statement = _text(row, "statement", where) if "statement" in row else question
        claim = statement if statement in question else question
        matching, other = matching.strip(), other.strip()
        if matching == other:
            raise ValueError(f"{where}: both answers are {short(matching)}")
        words = words or (where, matching, other)
        if {matching, other} != set(words[1:]):
            those = f"those of {words[0]} are {short(words[1])} and {short(words[2])}"
            raise ValueError(
                f"{where}: the answers are {short(matching)} and {short(other)}, {those}: a file has two words"
            )
        for text in {question, claim}:
            if text in seen:
                raise ValueError(f"{where}: {short(text)} stands in {seen[text]} already")
            seen[text] = where
        asked.append((claim, question, matching))
    if len(asked) < LEAST:
        raise ValueError(f"has {len(asked)} statements, {LEAST} or more are needed")
    yes, no = sorted(words[1:], key=lambda word: (word.lower() != "yes", word))
    asked = in_order(asked, [answer == yes for _, _, answer in asked])
    whole = (
        {"name": name}
        | given
        | {"topics": [[claim, question] for claim, question, _ in asked], "answers": [one[2] for one in asked]}
    )
    persons = {"personas_pos": [], "personas_neg": []}
    asked_as_it_is = {} if "probes" in whole else {"probe": "{claim}"}
    return persons | asked_as_it_is | whole | {"yes": [yes], "no": [no], "opinion": "{claim}"}


def in_order(items: Sequence, first: Sequence[bool]) -> list:
    """The items of both halves (`first` says of which each is), each half shuffled with a fixed seed, interleaved evenly, a b b
    a where the halves are equal."""
    found = []
    for side in (True, False):
        half = [item for item, one in zip(items, first, strict=True) if one is side]
        order = np.random.default_rng(zlib.crc32(f"statements {side}".encode())).permutation(len(half)).tolist()
        found += [((i + 0.5) / len(half), side ^ (i % 2 == 0), half[place]) for i, place in enumerate(order)]
    return [item for _, _, item in sorted(found, key=lambda one: one[:2])]


def _add(whole: dict, where: str, row: dict) -> None:
    for key, value in row.items():
        if key in whole:
            raise ValueError(f"{where} gives {key!r} again")
        whole[key] = value


def _text(row: dict, key: str, where: str) -> str:
    if key not in row:
        raise ValueError(f"{where}: {key} is missing")
    check_text(f"{where}: {key}", row[key])
    return row[key]


def check_text(key: str, value: object) -> None:
    """ValueError unless `value` is a text that is not empty and not too long."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: must be a text that is not empty, is {short(value)}")
    fits(value, key)


def check_count(value: object) -> None:
    """ValueError unless it can be the number of training topics."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"n_train_topics: must be a positive whole number, is {short(value)}")


def check_texts(key: str, values: object) -> Sequence[str]:
    """`values`; ValueError unless it is a list of texts, none of them empty."""
    if isinstance(values, str) or not isinstance(values, (tuple, list)):
        raise ValueError(f"{key}: must be a list of texts, is {short(values)}")
    if len(values) > MOST:
        raise ValueError(f"{key}: has {len(values):,} texts, at most {MOST:,} are read")
    for i, value in enumerate(values):
        check_text(f"{key}[{i}]", value)
    return values
