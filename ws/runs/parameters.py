"""A notebook's parameters: the literals in its cell tagged `parameters`, and the values a run gives them.

    value = default  <  the model's and the protocol's own  <  parameter files, in order  <  KEY VALUE pairs

A text becomes what its rule says (`ws.runs.rules`); a path is resolved against the folder it was typed in.
"""

import ast
import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ws.cache.models import near, shipped
from ws.cache.places import ASSETS, root, shipped_pairs
from ws.runs import rules
from ws.runs.notebooks import MAYBE_PATHS, Params, path_names, protocol_file
from ws.runs.rules import GRADIENTS, MODELS_OWN, RULES, rule_of, shown
from ws.runs.sets import own_set, read_set

UNNAMED = ("OUT_DIR", "RETRAIN")  # no part of what is asked for


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


def parse(key: str, given: object, default: object) -> object:
    """A value as the type of a default. ValueError names the key and what it expects."""
    try:
        return rules.read(rule_of(default), given)
    except ValueError as error:
        raise ValueError(f"{key}: {error}, got {shown(given)}") from None


def located(key: str, value: object, folder: Path) -> object:
    """A path parameter (or a list of paths) as absolute, seen from `folder`; any other value as it is."""
    if isinstance(value, list | tuple):
        return [located(key, item, folder) for item in value]
    if not isinstance(value, str) or not value:
        return value
    path = folder / Path(value).expanduser()
    known = {"MODEL_ID": shipped(value), "CHAT_TEMPLATE": value == "plain", "GRADIENTS": value in GRADIENTS}
    own = known.get(key, (ASSETS / f"{value}.json").is_file())
    if key in ("PAIRS", "GRADIENTS") and shipped_pairs(value):
        return value
    if key in path_names() or (key in MAYBE_PATHS and not own and os.path.exists(path)):
        return str(path.resolve())
    return value


def resolve(
    name: str, notebook: dict, explicit: Params, files: Sequence[Path] = (), folder: Path | None = None
) -> Params:
    """All parameters of a run. Paths in `explicit` are seen from `folder` (default: here), those in a parameter file from
    that file. Raises ValueError with all that is wrong, one line each: a parameter that the notebook does not define, a
    value that its rule refuses, a model or behaviour that is not there."""
    known = defaults(notebook, name)
    by_name = {key: RULES.get(name, {}).get(key) or rule_of(default) for key, default in known.items()}
    layers = [(file.parent, f", {file.name}", read_set(file)) for file in files]
    layers.append((folder or Path.cwd(), "", explicit))
    values, faults = dict(known), []
    for seen_from, where, layer in layers:
        for key, given in layer.items():
            if key not in known:
                key = key if key.isidentifier() else shown(key)
                faults.append(f"{name}{where}: unknown parameter {key}{suggest(key, list(known))}")
                continue
            # a file's text is one element, whatever it holds
            whole = where and by_name[key].item and by_name[key].item.kind not in ("whole", "number", "flag")
            try:
                value = rules.read(by_name[key], [given] if whole and isinstance(given, str) else given)
                values[key] = located(key, value, seen_from)
            except ValueError as error:
                faults.append(f"{name}{where}: {key}: {error}, got {shown(given)}")
    faults = faults or rules.faults(name, values)
    if name in RULES and not faults:
        faults = [f"{name}: {fault}" for fault in _absent(values)]
    if faults:
        raise ValueError("\n".join(faults))
    return values | filled(name, values)


def _absent(values: Params) -> list[str]:
    """What is wrong with a model or a behaviour that can only be a path, and with a behaviour that is nothing."""
    model, behavior = (str(values.get(key) or "") for key in MAYBE_PATHS[:2])
    path, found = Path(model), []
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        if not path.exists():
            found.append(f"MODEL_ID: {model}: no such model folder")
        elif path.is_file() and path.suffix.lower() != ".gguf":
            found.append(f"MODEL_ID: {model}: not a model folder, and no .gguf file")
        elif path.is_dir() and not (path / "config.json").is_file():
            found.append(f"MODEL_ID: {model}: not a model folder, config.json is missing")
    elif meant := near(model):
        found.append(
            f"MODEL_ID: {model}: no model of this project, no folder, no hub id owner/name; did you mean {meant}?"
        )
    if behavior and not (ASSETS / f"{behavior}.json").is_file() and not Path(behavior).is_file():
        found.append(f"BEHAVIOR: {shown(behavior)} is neither a shipped behaviour (sycophancy) nor a file")
    for key, others in (("PAIRS", ()), ("GRADIENTS", GRADIENTS)):
        pairs = str(values.get(key) or "")
        if pairs and pairs not in others and not shipped_pairs(pairs) and not Path(pairs).is_file():
            known = ", ".join(
                [*others, *sorted(p.name.removesuffix("_pairs.jsonl") for p in ASSETS.glob("*_pairs.jsonl"))]
            )
            found.append(
                f"{key}: {shown(pairs)} is neither {'one of ' if others else 'shipped pairs '}({known}) nor a file"
            )
    return found


def model_defaults(notebook: str, values: Params) -> dict[str, object]:
    """The model's own values of those parameters that are None."""
    own = own_set(str(values.get("MODEL_ID") or "tiny"), str(values.get("BEHAVIOR") or "")).get(notebook, {})
    return {key: value for key, value in own.items() if key in values and values[key] is None}


def protocol_defaults(values: Params) -> dict[str, object]:
    """The protocol's values of those of its switches that are empty."""
    file = protocol_file(values)
    own = read_set(file) if "PROTOCOL" in values and file.is_file() else {}
    return {key: value for key, value in own.items() if key in values and values[key] in ("", [], ())}


def filled(notebook: str, values: Params) -> dict[str, object]:
    """All values that a notebook's rules know, as a run uses them: checked, each of its type (1 as 1.0, "2-5" as a list),
    None replaced by the model's own and an empty switch by the protocol's. For a first cell: `values` may be its globals.
    ValueError as `rules.check`; {} for a notebook without rules."""
    known = {key: rule for key, rule in RULES.get(notebook, {}).items() if key in values}
    if not known:
        return {}
    if found := rules.faults(notebook, values, typed=True):
        raise ValueError("\n".join(found))
    used = {key: rules.read(rule, values[key]) for key, rule in known.items()}
    used |= model_defaults(notebook, used) | protocol_defaults(used)
    lacks = [key for key, rule in known.items() if rule.none == MODELS_OWN and used[key] is None]
    found = [f"{notebook}: {key}: nbs/params/models.yaml has no value for it; give one" for key in lacks]
    if found := found or rules.faults(notebook, used, typed=True):
        raise ValueError("\n".join(found))
    return {key: rules.read(rule, used[key]) for key, rule in known.items()}


def changes(old: Params, new: Params) -> list[str]:
    """Which parameters differ, as "LR 0.002 -> 0.0002", in the order of `new`. What means the same is not named: a value and
    the None that stands for it, 1 and 1.0, a path written otherwise; nor are OUT_DIR and RETRAIN."""
    sides, found = (old, new), []
    meant = [_meant_all(side) for side in sides]
    for key in (key for key in dict.fromkeys((*new, *old)) if key not in UNNAMED):
        if not all(key in side for side in sides):
            before, after = (_short(side[key]) if key in side else "" for side in sides)
            found.append(f"{key} {before or '(new)'} -> {after or '(gone)'}")
        elif meant[0][key] != meant[1][key]:
            before, after = (_short(side[key]) for side in sides)
            if before == after:  # they differ in what was left out
                before, after = (_short(side[key], 2000) for side in sides)
            found.append(f"{key} {before} -> {after}")
    return found


def _meant_all(values: Params) -> dict[str, object]:
    """What values stand for, comparable: with the model's and the protocol's own, of which the notebook is not known here."""
    if model := str(values.get("MODEL_ID") or ""):
        for notebook in own_set(model) if None in values.values() else ():
            values = {**values, **model_defaults(notebook, values)}
    return {key: _meant(key, value) for key, value in {**values, **protocol_defaults(values)}.items()}


def _meant(key: str, value: object) -> object:
    if isinstance(value, list | tuple):
        return [_meant(key, item) for item in value]
    if isinstance(value, str) and value and key in (*path_names(), *MAYBE_PATHS):
        return os.path.realpath(root() / value)
    return str(value).lower() if isinstance(value, bool) or value != value else value


def _short(value: object, width: int = 40) -> str:
    """A value for a reader: on one line; a long path by its end, a long list by its first elements and its length."""
    if isinstance(value, str) and value.isprintable() and value.strip():
        return value if len(value) <= width else f"...{value[3 - width :]}"
    said = repr(list(value) if isinstance(value, tuple) else value)
    if len(said) <= width:
        return said
    return f"{said[: width - 12]}... ({len(value)})" if isinstance(value, list | tuple) else shown(value, width)
