"""What `ws nb NAME --help` prints: a notebook's parameters, each with its default, its comment and what it may be.

All of it is read from the cell tagged `parameters`; a comment on a line of its own there is a heading.
"""

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from textwrap import wrap

from ws.runs import parameters, sets
from ws.runs.notebooks import Place
from ws.runs.rules import RULES, rule_of

WIDTH = 100
USAGE = """
usage: ws nb {name} [-p PARAMETER VALUE]... [-f FILE]... [--force] [--timeout SECONDS]

-p gives a parameter, -f a YAML file of parameters; both may be repeated, -p wins. A list is JSON or
separated by commas: [1, 2] or 1,2. OUT_DIR says where the run goes. What is done is not done again,
but for --force. Below: the default, what it is for, [what it may be].
"""


@dataclass(frozen=True)
class Entry:
    """One parameter as its cell shows it: the heading it stands under, its default as written, its comment."""

    heading: str
    name: str
    default: str
    comment: str


def entries(cell: str) -> list[Entry]:
    """The parameters of a cell, in order; a value may take several lines, with a comment on each."""
    tokens = tokenize.generate_tokens(io.StringIO(cell).readline)
    comments = {t.start[0]: t.string.lstrip("# ").rstrip() for t in tokens if t.type == tokenize.COMMENT}
    found, last, heading = [], 0, ""
    for node in ast.parse(cell).body:
        heading = " ".join(comments[i] for i in range(last + 1, node.lineno) if i in comments) or heading
        last = node.end_lineno or node.lineno
        target = getattr(node, "target", None) or next(iter(getattr(node, "targets", [])), None)
        if isinstance(target, ast.Name):
            comment = " ".join(comments[i] for i in range(node.lineno, last + 1) if i in comments)
            # a number as it was written (2e-4), anything longer than a line on one
            text = ast.get_source_segment(cell, node.value) or ""
            default = text if "\n" not in text and "#" not in text else ast.unparse(node.value)
            found.append(Entry(heading, target.id, default, comment))
    return found


def manual(name: str, place: Place | None = None) -> str:
    """The help of one notebook, at most WIDTH columns wide. Raises FileNotFoundError / ValueError as a run would."""
    place = place or Place()
    notebook = parameters.read_notebook(place.notebook(name))
    defaults = parameters.defaults(notebook, name)
    found = entries(next(parameters.source_of(cell) for cell in notebook["cells"] if parameters.is_tagged(cell)))
    title = re.search(r"^# +(.+)$", "\n".join(map(parameters.source_of, notebook["cells"])), re.MULTILINE)
    lines = [f"{name}: {title[1]}" if title else name, USAGE.rstrip().format(name=name)]
    wide, heading = max((len(entry.name) for entry in found), default=0), ""
    for entry in found:
        if entry.heading != heading:
            heading = entry.heading
            lines += ["", *wrap(heading, WIDTH)]
        lines += _lines(entry, _may_be(name, entry, defaults[entry.name]), wide)
    return "\n".join(lines)


def _may_be(name: str, entry: Entry, default: object) -> str:
    """What a value may be, as far as the comment does not say so; for None, what the models' own is."""
    rule = RULES.get(name, {}).get(entry.name) or rule_of(default)
    one = rule.item or rule
    said = (
        all(choice in entry.comment for choice in one.choices)
        if one.choices
        else one.kind in ("text", "scalar", "json")
    )
    own = sets.models() if default is None else {}
    values = {model: of.get(name, {}).get(entry.name) for model, of in own.items()}
    told = ", ".join(f"{model}: {value}" for model, value in values.items() if value is not None)
    return "; ".join(filter(None, ("" if said else rule.expects, told)))


def _lines(entry: Entry, may_be: str, wide: int) -> list[str]:
    text = f"{entry.comment} [{may_be}]" if may_be else entry.comment
    room = " " * (wide + 18)
    body = [room + line for line in wrap(text.strip(), WIDTH - len(room))]
    start = f"  {entry.name:<{wide}}  {entry.default}"
    if len(start) + 2 > len(room):  # a long default has lines of its own
        return [*wrap(start, WIDTH, subsequent_indent=room), *body]
    return [start + body[0][len(start) :], *body[1:]] if body else [start]
