"""A notebook's parameters: the literals in its cell tagged `parameters`, and the values a run gives them.

    value = default  <  parameter files, in order  <  KEY VALUE pairs

A text from the command line becomes the type of the default; a path is resolved against the folder it was typed in.
"""

import ast
import difflib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ws.cache.places import ASSETS
from ws.runs.notebooks import MAYBE_PATHS, Params, path_names

WORDS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
READERS = {
    bool: ("true or false", lambda text: WORDS[text.strip().lower()]),
    int: ("int", int),
    float: ("float", float),
}


def read_notebook(path: Path) -> dict:
    """A notebook file's JSON. Raises FileNotFoundError / ValueError that name the file."""
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.ipynb") if not p.stem.startswith("."))
        raise FileNotFoundError(f"{path.stem}: no such notebook in {path.parent.name}/{suggest(path.stem, known)}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, not UTF-8
        raise ValueError(f"{path.name}: not a notebook: {error}") from None


def source_of(cell: dict) -> str:
    """A cell's text; notebooks store it as one string or as a list of lines."""
    return "".join(cell["source"])


def is_tagged(cell: dict) -> bool:
    return cell["cell_type"] == "code" and "parameters" in cell.get("metadata", {}).get("tags", [])


def code_of(notebook: dict) -> str:
    """The code cells of a notebook as one source, without magics and without the parameters' own cell."""
    cells = [source_of(c) for c in notebook["cells"] if c["cell_type"] == "code" and not is_tagged(c)]
    return "\n".join(line for line in "\n\n".join(cells).split("\n") if not re.match(r"\s*[%!]", line))


def defaults(notebook: dict, name: str) -> dict[str, object]:
    """`{parameter: default}` of the cell tagged `parameters`. ValueError where not exactly one is (without the tag papermill
    would run the defaults, whatever was asked) or a value is not a literal."""
    cells = [cell for cell in notebook["cells"] if is_tagged(cell)]
    if len(cells) != 1:
        found = "no cell is" if not cells else f"{len(cells)} cells are"
        raise ValueError(
            f"{name}: {found} tagged 'parameters'; exactly one must be (run `just sync` after adding the tag)"
        )
    values: dict[str, object] = {}
    for node in ast.parse(source_of(cells[0])).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        assigned = isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if not assigned or len(targets) != 1 or not isinstance(targets[0], ast.Name):
            raise ValueError(f"{name}: parameters cell, line {node.lineno}: only `NAME = literal` may stand here")
        try:
            values[targets[0].id] = ast.literal_eval(node.value)
        except ValueError:
            raise ValueError(
                f"{name}: parameter {targets[0].id} is not a literal; derive it in the next cell"
            ) from None
    return values


def suggest(word: str, known: list[str]) -> str:
    """'; did you mean X? Known: ...' for an error message."""
    close = difflib.get_close_matches(word.upper(), {k.upper(): k for k in known}, n=1)
    best = next((k for k in known if close and k.upper() == close[0]), None)
    names = ", ".join(known) or "none"
    return f"; did you mean {best}? Known: {names}" if best else f"; known: {names}"


def parse(key: str, text: str, default: object) -> object:
    """The text of one parameter as the type of its default (None: JSON where it is JSON, else the text). Lists: JSON, or
    elements separated by commas. ValueError names the parameter and what it expects."""
    if isinstance(default, str):
        return text
    if isinstance(default, list | tuple):
        return _parse_list(key, text, default)
    if default is None and text.strip().lower() == "none":
        return None
    expected, read = READERS.get(type(default), (f"JSON ({type(default).__name__})", json.loads))
    try:
        value = read(text)
    except (KeyError, ValueError):
        if default is None:
            return text
        raise ValueError(f"{key}: expects {expected}, got {text!r}") from None
    return checked(key, value, default)


def _parse_list(key: str, text: str, default: list | tuple) -> object:
    with suppress(json.JSONDecodeError):
        if isinstance(value := json.loads(text), list):
            return checked(key, value, default)
    items = [item.strip() for item in text.strip().strip("[]()").split(",") if item.strip()]
    return checked(key, [parse(key, item, default[0] if default else None) for item in items], default)


def checked(key: str, value: object, default: object) -> object:
    """A typed value (of a file) against the default's type; ValueError names the parameter. An int passes for a float, one
    text for a list of it, and any single value where the default is an empty text, which means "not given"."""
    if default is None or value is None or (default == "" and isinstance(value, str | int | float)):
        return value
    if isinstance(default, list | tuple) and isinstance(value, list | tuple):
        return [checked(key, item, default[0]) for item in value] if default else list(value)
    if isinstance(default, list) and isinstance(value, str):
        return checked(key, [value], default)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"{key}: expects {type(default).__name__}, got {value!r}")
    return value


def read_set(path: Path) -> dict[str, object]:
    """A YAML (or JSON) file of parameters."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such parameter file")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expects a mapping of parameters, got {type(values).__name__}")
    return values


def located(key: str, value: object, folder: Path) -> object:
    """A path parameter (or a list of paths) as absolute, seen from `folder`; any other value as it is."""
    if isinstance(value, list | tuple):
        return [located(key, item, folder) for item in value]
    if not isinstance(value, str) or not value:
        return value
    path = folder / Path(value).expanduser()
    shipped = value == "tiny" if key == "MODEL_ID" else (ASSETS / f"{value}.json").is_file()
    if key in path_names() or (key in MAYBE_PATHS and not shipped and path.exists()):
        return str(path.resolve())
    return value


def resolve(
    name: str, notebook: dict, explicit: Params, files: Sequence[Path] = (), folder: Path | None = None
) -> Params:
    """All parameters of a run. Texts in `explicit` are parsed, paths in it are seen from `folder` (default: here).
    Paths in a parameter file are seen from that file. Raises ValueError for a parameter that the notebook does not
    define or a value of the wrong type."""
    known = defaults(notebook, name)
    given = [(file.parent, f", {file.name}", read_set(file)) for file in files]
    given.append((folder or Path.cwd(), "", explicit))
    values = dict(known)
    for seen_from, where, layer in given:
        for key, value in layer.items():
            if key not in known:
                raise ValueError(f"{name}{where}: unknown parameter {key}{suggest(key, list(known))}")
            parsed = parse(key, value, known[key]) if where == "" and isinstance(value, str) else value
            values[key] = located(key, checked(key, parsed, known[key]), seen_from)
    return values


def changes(old: dict, new: dict) -> list[str]:
    return [
        f"{k} {old.get(k)} -> {new.get(k)}" for k in new if k not in ("OUT_DIR", "RETRAIN") and old.get(k) != new.get(k)
    ]


def complete(name: str, values: Params) -> Params:
    """What a notebook's cells have set, with the model's own values filled in; checked."""
    return values
