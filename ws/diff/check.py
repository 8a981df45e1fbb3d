"""A weight difference on disk, looked at before a run uses it: its names and shapes against a model, its numbers.

Headers come first and decide most; numbers are read for at most SECONDS, which is all of a low-rank difference."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ws.cache.places import ASSETS
from ws.diff.adapters import Adapter, read_adapter, read_factors, strip
from ws.diff.build import check_pair
from ws.diff.checkpoints import shards
from ws.diff.core import LowRank, check_entries, dims, same_names
from ws.diff.io import FLOATS, INTEGERS, opened, peek, shapes_in

SECONDS = 2.0  # of reading numbers


def located(source: Path | str | tuple | list) -> tuple[str, tuple[Path, ...]]:
    """What a weight difference is made from, `file`, `adapters` or `checkpoints`, and where it lies. FileNotFoundError /
    ValueError where it is none of them."""
    if source == "tiny":
        return "file", (ASSETS / "tiny_w.safetensors",)
    if isinstance(source, (tuple, list)):
        if len(source) != 2:
            raise ValueError(f"a pair (pos, neg) was expected, got {len(source)} paths")
        pos, neg = (Path(side).expanduser() for side in source)
        for side in (pos, neg):
            if not side.exists():
                raise FileNotFoundError(f"{side}: no such file or folder")
        adapters = [(side / "adapter_config.json").is_file() for side in (pos, neg)]
        if any(adapters) and not all(adapters):
            raise ValueError(f"{pos} and {neg}: one is a PEFT adapter folder, the other is not")
        return "adapters" if all(adapters) else "checkpoints", (pos, neg)
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise ValueError(f"{path}: one PEFT adapter; a diff needs the pair (pos, neg)")
        if not (path / "w.safetensors").is_file():
            raise FileNotFoundError(f"{path}: holds no w.safetensors")
        path = path / "w.safetensors"
    return "file", (path,)


def check_source(source: Path | str | tuple | list, model: nn.Module) -> None:
    """Whether a source of `load_diff` fits a model (weights are not needed: the meta device will do). FileNotFoundError /
    ValueError naming what is missing, unknown to the model, of another shape, not finite, or 0 everywhere."""
    kind, paths = located(source)
    {"file": check_file, "adapters": check_adapters, "checkpoints": check_checkpoints}[kind](*paths, model)


def check_file(path: Path, model: nn.Module) -> None:
    """`check_source` of one file."""
    shapes, tensors = peek(path)
    check_shapes(shapes, model, path)
    end, moved = time.monotonic() + SECONDS, False
    for name, parts in tensors:
        check_entries({name: LowRank(*parts) if len(parts) == 2 else parts[0]}, str(path))
        moved = moved or all(bool(part.any()) for part in parts)
        if time.monotonic() > end:
            return
    if not moved:
        raise ValueError(f"{path}: the weight difference is 0 everywhere; the two sides are the same")


def check_adapters(pos: Path, neg: Path, model: nn.Module) -> None:
    """`check_source` of two PEFT folders."""
    a, b = read_adapter(pos), read_adapter(neg)
    where = f"{pos} and {neg}"
    check_pair(a, b, where)
    plus, minus = _shapes(a), _shapes(b)
    same_names(plus, minus, where)
    for adapter, shapes in ((a, plus), (b, minus)):
        check_shapes(shapes, model, adapter.folder)
    if a.config == b.config and a.tensors.keys() == b.tensors.keys():
        if all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items()):
            raise ValueError(f"{where}: the two adapters are the same, the weight difference is 0 everywhere")


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...] | None]:
    """Shape of what a LoRA changes, None where only peft's merge tells; {} for adapters that are no LoRA."""
    if adapter.plain:
        factors, whole = read_factors(adapter)
        return {n: (len(B), A.shape[1]) for n, (B, A, _) in factors.items()} | {
            n: tuple(t.shape) for n, t in whole.items()
        }
    names = (strip(key).partition(".lora_") for key in adapter.tensors if adapter.config["peft_type"] == "LORA")
    special = adapter.config.get("target_parameters") or adapter.config.get("layer_replication")
    return {} if special else {f"{module}.weight": None for module, found, _ in names if found}


def check_checkpoints(pos: Path, neg: Path, model: nn.Module) -> None:
    """`check_source` of two full checkpoints, by their headers; equal ones are found when they are read."""
    sides = []
    for side in (pos, neg):
        sides.append({})
        for file in sorted(set(shards(side).values())):
            with opened(file) as handle:
                sides[-1] |= shapes_in(handle, file, FLOATS + INTEGERS)
    same_names(*sides, f"{pos} and {neg}")
    known = dict(model.named_parameters(remove_duplicate=False))
    for side, shapes in zip((pos, neg), sides, strict=True):
        check_shapes({name: shape for name, shape in shapes.items() if name in known}, model, side)
    if not set(known) & set(sides[0]):
        raise ValueError(f"{pos}: none of its tensors is a parameter of {type(model).__name__}")


def check_shapes(shapes: Mapping[str, Iterable[int] | None], model: nn.Module, where: object) -> None:
    """ValueError naming the first parameter that the model lacks or has in another shape."""
    known: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for name, shape in shapes.items():
        if name not in known:
            raise ValueError(f"{where}: {name}: no such parameter in {type(model).__name__}")
        if shape is not None and tuple(shape) != tuple(known[name].shape):
            raise ValueError(f"{where}: {name}: diff is {dims(shape)}, model has {dims(known[name].shape)}")
