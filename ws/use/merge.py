"""A checkpoint with `W + alpha w` in place of W, written tensor by tensor: one shard at a time is in memory. (docs/use.md)

The base model's tensors are read from its own files, in their dtype; those of a model in memory from there. The sum is taken
in float32 and rounded once.
"""

import copy
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ws.cache.files import write_json
from ws.diff import LowRank, WeightDiff
from ws.diff.checkpoints import shards
from ws.diff.core import parts
from ws.diff.io import opened
from ws.model.guard import check_plain
from ws.model.lm import LM, load_lm
from ws.model.wide import NARROW
from ws.show.bars import tqdm
from ws.steer.weights import WIDE


@dataclass(frozen=True)
class _Held:
    """A tensor of the checkpoint, read when it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def write_merged(w: WeightDiff, alpha: float | int, lm: LM, folder: Path, shard: str, commit: str | None) -> str:
    """Fill a folder with the checkpoint of `lm` plus `alpha w`: shards of at most `shard` ("5GB"), config, generation config,
    tokenizer; commit: of a hub model whose files are read. Returns what it is, in words, with what rounding to half precision
    took. ValueError for a quantised base, a tensor that the checkpoint lacks, two changes of one tied parameter."""
    from huggingface_hub import split_torch_state_dict_into_shards

    if getattr(lm.model.config, "quantization_config", None):
        raise ValueError(f"{lm.name}: its checkpoint is quantised, no sum can be written into it; export it as peft")
    held, tokenizer = tensors_of(lm, commit), lm.tokenizer
    if held is None:
        lm = load_lm(lm.model.config._name_or_path, revision=commit)
        held = tensors_of(lm, commit)
    changes = changes_of(w, lm.model, held)
    sketch = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in held.items()}
    try:
        plan = split_torch_state_dict_into_shards(
            sketch, filename_pattern="model{suffix}.safetensors", max_shard_size=shard
        )
    except ValueError as error:
        raise ValueError(f"shard {shard!r}: expected a size such as 5GB or 200MB") from error
    off = whole = 0.0
    for file, names in tqdm(plan.filename_to_tensors.items(), desc="shards", disable=len(plan.filename_to_tensors) < 2):
        made = {}
        for name in names:
            made[name] = base = held[name].read().detach().cpu().contiguous()
            if name in changes:
                change = dense(changes[name])
                made[name] = plus(base, change, alpha)
                if not torch.isfinite(made[name]).all():
                    raise ValueError(f"{name}: W + {alpha:g} w is not finite in {base.dtype}; choose a smaller alpha")
                if base.dtype in NARROW:
                    off += float((made[name].float() - base.float() - alpha * change).double().square().sum())
                    whole += float((alpha * change).double().square().sum())
        save_file(made, str(folder / file), metadata={"format": "pt"})
    if plan.is_sharded:
        write_json(
            folder / "model.safetensors.index.json", {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        )
    _write_rest(lm, tokenizer, folder, commit)
    size = sum(x.dtype.itemsize * torch.Size(x.shape).numel() for x in held.values())
    kinds = ", ".join(sorted({str(held[name].dtype).removeprefix("torch.") for name in changes}))
    lost = (off / whole) ** 0.5 if whole else 0.0
    rounded = f"; rounding to {kinds} changes what is added by {lost:.1%} of its size" if lost else ""
    files = len(plan.filename_to_tensors)
    many = f"{files} file{'s' * (files > 1)}, {len(changes)} tensors changed"
    return f"checkpoint of {size / 1e6:,.1f} MB in {many}, {kinds}{rounded}"


def commit_of(lm: LM, revision: str | None = None) -> str | None:
    """The commit of a hub model's revision (None: the main one); None for a model that lies on this machine."""
    from transformers.utils import cached_file

    source = lm.model.config._name_or_path
    if not source or Path(source).is_dir():
        return None
    try:
        found = re.search(
            r"/snapshots/([0-9a-f]{40})/", Path(cached_file(source, "config.json", revision=revision)).as_posix()
        )
    except OSError:  # neither kept nor to be had
        found = None
    return found[1] if found else revision


def tensors_of(lm: LM, commit: str | None = None) -> dict[str, _Held] | None:
    """Every tensor of the checkpoint, tied ones once where the model is in memory; None where a model that is not in memory
    has no safetensors."""
    if lm.device.type != "meta":
        check_plain(lm.model)
        first = {}
        for name, x in lm.model.state_dict().items():
            first.setdefault((x.data_ptr(), x.shape) if x.numel() else name, (name, x))
        return {name: _Held(tuple(x.shape), x.dtype, lambda x=x: x) for name, x in first.values()}
    source = lm.model.config._name_or_path
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(source, revision=commit, allow_patterns=["*.safetensors", "*.safetensors.index.json"])
        )
    with suppress(FileNotFoundError):
        files = shards(folder)
        handles = {file: opened(file) for file in set(files.values())}
        return {name: _in_file(handles[file], name) for name, file in files.items()}
    return None


def _in_file(handle, name: str) -> _Held:
    piece = handle.get_slice(name)
    shape = tuple(piece.get_shape())
    return _Held(shape, (piece[:0] if shape else handle.get_tensor(name)).dtype, lambda: handle.get_tensor(name))


def changes_of(w: WeightDiff, model: nn.Module, held: dict[str, _Held]) -> dict[str, LowRank | Tensor]:
    """Tensor of the checkpoint -> what w adds to it; of tied parameters under whichever name it is stored. ValueError for a
    parameter that is not stored, two changes of one parameter, or a dtype that holds no sum."""
    own = dict(model.named_parameters(remove_duplicate=False))
    same: dict[int, list[str]] = {}
    for name, parameter in own.items():
        same.setdefault(id(parameter), []).append(name)
    changes: dict[str, LowRank | Tensor] = {}
    for name, entry in w.entries.items():
        stored = [other for other in same[id(own[name])] if other in held]
        if not stored:
            raise ValueError(
                f"{name}: the checkpoint stores no tensor of that name; load the model and export from there"
            )
        for other in stored:
            if held[other].dtype not in WIDE + NARROW:
                raise ValueError(f"{other}: {held[other].dtype} in the checkpoint, no sum can be written into it")
            first = changes.setdefault(other, entry)
            if len(parts(first)) != len(parts(entry)) or not all(map(torch.equal, parts(first), parts(entry))):
                raise ValueError(f"{name}: tied to {other}, but w holds two changes for the one parameter")
    return changes


def dense(entry: LowRank | Tensor) -> Tensor:
    return (entry.dense() if isinstance(entry, LowRank) else entry.float()).cpu()


def plus(W: Tensor, change: Tensor, alpha: float | int) -> Tensor:
    """`W + alpha w` in W's dtype, summed in float32 or wider; of a float32 W bit for bit what `weight_steer` makes of it."""
    wide = W.to(torch.float64 if W.dtype == torch.float64 else torch.float32, copy=True)
    return wide.add_(change.to(wide.dtype), alpha=alpha).to(W.dtype)


def _write_rest(lm: LM, tokenizer, folder: Path, commit: str | None) -> None:
    """Config, generation config and tokenizer with its chat template."""
    from transformers import GenerationConfig

    config = copy.deepcopy(lm.model.config)
    config.architectures = [type(lm.model).__name__]
    if lm.device.type != "meta":
        config.dtype = lm.model.dtype
    config.save_pretrained(folder)
    found = lm.model.generation_config
    if lm.device.type == "meta":
        with suppress(OSError):
            found = GenerationConfig.from_pretrained(lm.model.config._name_or_path, revision=commit)
    found.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
