"""A library, the weight differences and null diffs of one base model below a folder, and a stranger. (method section 13)"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ws.cache.given import first_line
from ws.cache.made import verified
from ws.cache.names import BY_HAND
from ws.diff import WeightDiff, load_diff, read_diff, task_vectors
from ws.diff.adapters import read_adapter
from ws.diff.check import check_shapes
from ws.diff.checkpoints import from_base
from ws.diff.core import dims
from ws.diff.io import read_meta
from ws.model.lm import LM

Source = WeightDiff | Path | str | tuple | list
MERGED = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True, eq=False)
class Known:
    """An entry of a library. adapter: its kind and recipe, as its folder says them; folder: where the two adapters of w lie,
    None where they are not known."""

    behavior: str
    adapter: str
    seed: int
    null: bool
    w: WeightDiff
    folder: Path | None = None

    @property
    def label(self) -> str:
        """Its file, or what it is."""
        kind = (
            f"null diff of {self.behavior}, seed {self.seed}"
            if self.null
            else f"w of {self.behavior}, seed {self.seed}"
        )
        return str(self.folder.parent / "w.safetensors") if self.folder else kind

    def read(self, one_side: bool, model: nn.Module) -> list[WeightDiff]:
        """w; beside a stranger that is one side t+ and t- as well. FileNotFoundError / ValueError where they are not
        there."""
        if one_side and self.folder is None:
            raise FileNotFoundError(f"{self.behavior}, seed {self.seed}: its adapters are not known")
        return [self.w, *(task_vectors(self.folder / "pos", self.folder / "neg", model) if one_side else ())]


def read_library(
    folder: Path | str, models: Collection[str] = (), model: nn.Module | None = None
) -> tuple[list[Known], dict[str, str]]:
    """All `w.safetensors` below `folder` whose base is one of `models` (none given: the only one there is), sorted by path;
    and what was left out, file -> why: damaged, of another shape than `model`, no behaviour, there twice. ValueError where
    several base models are there and none is given, or nothing is left."""
    folder, found, skipped, seen, shapes = Path(folder).expanduser().resolve(), [], {}, {}, {}
    below = {path: path.relative_to(folder).parts for path in sorted(folder.rglob("w.safetensors"))}
    files = [path for path, parts in below.items() if parts[0] != BY_HAND and not any(p[0] == "." for p in parts)]
    metas = {path: read_meta(path) for path in files}
    bases = sorted({str(meta["base_model"]) for meta in metas.values() if meta.get("base_model")})
    if not models and len(bases) > 1:
        raise ValueError(f"{folder}: holds weight differences of {', '.join(bases)}; choose one: --model {bases[0]}")
    for path, meta in metas.items():
        if meta and models and str(meta.get("base_model")) not in models:
            continue
        try:
            w = read_diff(verified(path))
            if not isinstance(meta.get("behavior"), str) or type(meta.get("seed")) is not int:
                raise ValueError("its metadata name no behaviour or no seed")
            if path.parent.name == "null_diff" and meta.get("null") is not True:
                raise ValueError("lies in null_diff/, but its metadata do not say null: true; train it again")
            if model is not None:
                check_shapes({name: w.shape(name) for name in w}, model, path)
            if odd := [name for name in w if shapes.setdefault(name, w.shape(name)) != w.shape(name)]:
                raise ValueError(f"{odd[0]} is {dims(w.shape(odd[0]))}, in other files {dims(shapes[odd[0]])}")
            if (first := seen.setdefault(w.fingerprint, path)) != path:
                raise ValueError(f"the same as {first}")
        except (ValueError, FileNotFoundError) as error:
            skipped[str(path)] = first_line(error).removeprefix(f"{path}: ")
            continue
        names = (meta["behavior"], _adapter(path, meta), meta["seed"], bool(meta.get("null")))
        if first := next((e.folder for e in found if (e.behavior, e.adapter, e.seed, e.null) == names), None):
            skipped[str(path)] = f"another of behaviour, adapter and seed of {first.parent / 'w.safetensors'}"
            continue
        found.append(Known(*names, w, path.parent / "adapters"))
    if all(entry.null for entry in found):
        of, asked = ("", "") if not models else (f" of {(name := min(models, key=len))}", f" --models {name}")
        why = "".join(f"; {path}: {error}" for path, error in [*skipped.items()][:2])
        raise ValueError(f"{folder}: holds no weight difference{of}{why}; make some: ws batch{asked}")
    return found, skipped


def _adapter(path: Path, meta: dict) -> str:
    """`out/<model>/<behavior>/<adapter>/seed_<k>/[null_diff/]w.safetensors` -> adapter; with the model's folder where that
    says more than the model (a chat template, a dtype). Elsewhere what the metadata say."""
    home = path.parent.parent if path.parent.name == "null_diff" else path.parent
    if (
        not home.name.startswith("seed_")
        or len(home.parents) < 4
        or home.parent.name.split("-")[0] != meta.get("adapter")
    ):
        return str(meta.get("adapter") or "unknown")
    model = home.parents[2].name
    return home.parent.name + (f" ({model})" if model != meta.get("base_model") else "")


@dataclass(frozen=True, eq=False)
class Stranger:
    """name: of its file or folder. u: its weights. one_side: whether u is a task vector, `theta - theta_base`, and no
    difference of two sides. note: what is to be told of it."""

    name: str
    u: WeightDiff
    one_side: bool
    note: str = ""


def read_stranger(source: Source, lm: LM) -> Stranger:
    """A PEFT folder or a merged checkpoint as its task vector, all else as `load_diff` reads it. FileNotFoundError /
    ValueError, one line, naming the file, or the parameter that the model lacks or has in another shape; also where all is
    0."""
    path = Path("the weight difference" if isinstance(source, (WeightDiff, tuple, list)) else source).expanduser()
    path = path.parent if path.name == "adapter_model.safetensors" else path
    adapter = (path / "adapter_config.json").is_file()
    merged = not adapter and any((path / file).is_file() for file in MERGED)
    if adapter:
        u, said = task_vectors(path, path, lm.model)[0], read_adapter(path).config.get("base_model_name_or_path")
    elif merged:
        u, said = from_base(path, lm.model), None
    elif source != "tiny" and path.is_dir() and not (path / "w.safetensors").is_file():
        raise FileNotFoundError(f"{path}: holds none of adapter_config.json, {', '.join(MERGED)}, w.safetensors")
    else:
        u = load_diff(source, lm.model)
        said = u.meta.get("base_model")
    check_shapes({name: u.shape(name) for name in u}, lm.model, path)
    if not u.total_norm():
        raise ValueError(f"{path}: changes nothing, all of it is 0")
    known = {lm.slug, lm.name, Path(str(lm.model.config._name_or_path)).name}
    told = f"it names {said!r} as its base model: the shapes are those of {lm.name}, the weights may not be"
    alike = not said or {str(said).replace("/", "__"), Path(str(said)).name} & known
    return Stranger(path.name, u, adapter or merged, "" if alike else told)
