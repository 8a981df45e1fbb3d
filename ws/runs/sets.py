"""Files of parameters: sets that a command names, and `nbs/params/models.yaml`, what is a model's own."""

from contextlib import suppress
from pathlib import Path

from ws.cache.models import model_slug
from ws.cache.places import notebooks_folder, shipped_pairs

LARGEST = 1 << 20  # bytes of a parameter file
Params = dict[str, object]


def read_set(path: Path) -> dict[str, object]:
    """A YAML (or JSON) file of parameters."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such parameter file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: larger than {LARGEST} bytes, so no file of parameters")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        why = getattr(error, "problem", None) or type(error).__name__
        raise ValueError(f"{path}{line}: not YAML: {' '.join(why.split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expects a mapping of parameters, got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def models() -> dict[str, dict[str, Params]]:
    """nbs/params/models.yaml: per model (`default` for all) and notebook the parameters that are the model's own."""
    file = notebooks_folder() / "params" / "models.yaml"
    found = {model: of or {} for model, of in (read_set(file) if file.is_file() else {}).items()}
    for model, of in found.items():
        if not (isinstance(of, dict) and all(isinstance(values, dict) for values in of.values())):
            raise ValueError(f"{file}: {model}: expects notebooks, and below each its parameters")
    return found


def own_set(model_id: str, behavior: str = "") -> dict[str, Params]:
    """What is a model's own, by notebook: over `default` what stands under its id or its folder's name. Shipped pairs are a
    model's own for the behaviour they were written for, by whose name they go."""
    known, names, found = models(), ["default", model_id], {}
    with suppress(FileNotFoundError):  # a folder that is no model (any more) has no name
        names.append(model_slug(model_id))
    for of in (known.get(name, {}) for name in names):
        found |= {notebook: found.get(notebook, {}) | values for notebook, values in of.items()}
    for values in found.values():
        if shipped_pairs(str(values.get("PAIRS") or "")) and values["PAIRS"] != behavior:
            values["PAIRS"] = ""
    return found
