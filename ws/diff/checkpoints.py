"""Weight differences of two full checkpoints, held tensor by tensor, so memory is the difference. (method section 2)"""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn

from ws.cache.given import first_line, shards_of
from ws.diff.core import WeightDiff, check_entries, dims, same_names
from ws.diff.factor import factorised
from ws.diff.io import FLOATS, INTEGERS, opened, shapes_in


def shards(path: Path) -> dict[str, Path]:
    """Tensor name -> file, of a checkpoint folder (single or sharded) or one safetensors file."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = shards_of(index)
        return {name: path / file for name, file in files.items()}
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no model.safetensors and no model.safetensors.index.json")
    with opened(file) as handle:
        return dict.fromkeys(handle.keys(), file)


def _differences(pos: Path, neg: Path) -> Iterator[tuple[str, Tensor]]:
    plus, minus = shards(pos), shards(neg)
    same_names(plus, minus, f"{pos} and {neg}")
    handles = {file: opened(file) for file in {*plus.values(), *minus.values()}}
    for file, handle in handles.items():
        shapes_in(handle, file, FLOATS + INTEGERS)
    for name in plus:
        try:
            a, b = (handles[file].get_tensor(name) for file in (plus[name], minus[name]))
        except SafetensorError as error:
            raise ValueError(f"{pos} and {neg}: {name} is not where the index says: {first_line(error)}") from error
        if a.shape != b.shape:
            raise ValueError(f"{name}: {pos} has {dims(a.shape)}, {neg} has {dims(b.shape)}")
        change = a.float() - b.float()
        if change.any():
            check_entries({name: change}, f"{pos} and {neg}")
            yield name, change


def from_checkpoints(pos: Path | str, neg: Path | str) -> WeightDiff:
    """`theta_pos - theta_neg` of two full checkpoints in float32, read tensor by tensor. pos, neg: folders with
    `model.safetensors` (sharded or not) or single files. Equal tensors are left out. Raises ValueError naming the
    tensor that is missing, differs in shape or holds NaN; also when nothing differs."""
    pos, neg = Path(pos), Path(neg)
    entries, about = factorised(_differences(pos, neg))
    if not entries:
        raise ValueError(f"{pos} and {neg}: the two checkpoints are equal, there is no difference")
    return WeightDiff(entries, {"base_model": pos.name, "adapter": "full", "form": "dense (checkpoints)", **about})


def from_base(path: Path | str, model: nn.Module) -> WeightDiff:
    """`theta - theta_base` of a full checkpoint (folder or file) and its base in memory, in float32, tensor by tensor. Equal
    tensors are left out, and of tied ones the second. A checkpoint in half precision brings its rounding along, at full rank.
    ValueError naming a parameter that it lacks or has in another shape; also when nothing differs."""
    path = Path(path)
    files, own = shards(path), dict(model.named_parameters())
    if lacks := [name for name in own if name not in files]:
        raise ValueError(f"{path}: {lacks[0]} is missing; it is no checkpoint of this {type(model).__name__}")

    def moved() -> Iterator[tuple[str, Tensor]]:
        handles = {file: opened(file) for file in set(files.values())}
        for name, base in own.items():
            theta = handles[files[name]].get_tensor(name).float()
            if theta.shape != base.shape:
                raise ValueError(f"{path}: {name}: checkpoint has {dims(theta.shape)}, model has {dims(base.shape)}")
            if (change := theta - base.detach().cpu().float()).any():
                check_entries({name: change}, str(path))
                yield name, change

    entries, about = factorised(moved())
    if not entries:
        raise ValueError(f"{path}: equal to its base model, there is no difference")
    return WeightDiff(entries, {"adapter": "full", "form": "dense (checkpoint)", **about})
