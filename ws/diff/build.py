"""Exact weight differences from two PEFT adapter folders. (docs/method.md section 2)

LoRA and rsLoRA: `w = s (B+ A+ - B- A-)`, `s = alpha / r` or `alpha / sqrt(r)`, as factors in float32. PiSSA and other
initialisations that move part of W into the adapter: both signs start from the same residual, so w is the same
difference of products, written as `[s (B+ - B-), s B-] [A+; A+ - A-]`, because `B+ A+` and `B- A-` both hold the large
part of W and would cancel. All other types: each side is merged in float32, and the merged weights are subtracted.
"""

import copy
import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ws.cache.made import verified
from ws.diff.algebra import combine
from ws.diff.core import Entry, LowRank, WeightDiff, check_entries, dims, same_names
from ws.diff.factor import factorised
from ws.diff.io import read_tensors

MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")  # initialisations that change the base weights
NOT_REPEATABLE = ("pissa_niter", "corda", "loftq", "lora_ga")  # of those, what depends on a random draw or on data
NOT_PLAIN = (
    "use_dora", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "alora_invocation_tokens",
    "target_parameters", "layer_replication", "trainable_token_indices",
)  # fmt: skip
"""Options of peft's LoRA with which the products of factors do not say all."""

Base = nn.Module | Path | str | None


@dataclass(frozen=True)
class Adapter:
    """One PEFT folder as read from disk."""

    folder: Path
    config: dict
    tensors: dict[str, Tensor]

    @property
    def init(self) -> str:
        return str(self.config.get("init_lora_weights", True)).lower()

    @property
    def moves_base(self) -> bool:
        return self.init.startswith(MOVES_BASE)

    @property
    def kind(self) -> str:
        """`lora`, its variants joined by `+`, or the peft type."""
        c = self.config
        if c.get("peft_type") != "LORA":
            return str(c.get("peft_type")).lower()
        words = [] if self.init in ("true", "false") else [self.init]
        return "+".join(words + [word for word in ("rslora", "dora") if c.get(f"use_{word}")]) or "lora"

    def scaling(self, alpha: float | int, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def plain(self) -> bool:
        """Whether products of factors say all: LoRA without magnitudes, replicated layers or targeted parameters."""
        c = self.config
        return c.get("peft_type") == "LORA" and not any(c.get(key) for key in NOT_PLAIN)


def read_adapter(folder: Path | str) -> Adapter:
    """Config and tensors of a PEFT folder. FileNotFoundError / ValueError naming the file that is missing or broken."""
    folder = verified(folder)
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder}: not a PEFT adapter folder, adapter_config.json is missing")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise ValueError(f"{config_file}: not JSON: {error}") from error
    weights = folder / "adapter_model.safetensors"
    if weights.is_file():
        tensors, _ = read_tensors(weights)
    elif (folder / "adapter_model.bin").is_file():
        tensors = torch.load(folder / "adapter_model.bin", weights_only=True, map_location="cpu")
    else:
        raise FileNotFoundError(f"{folder}: adapter_model.safetensors is missing")
    broken = next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if broken:
        raise ValueError(f"{folder}: {broken} contains NaN or inf")
    return Adapter(folder, config, tensors)


def _strip(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".base_layer", "")


def _scaling(adapter: Adapter, module: str, rank: int) -> float:
    def matched(patterns: dict | None, default: float | int) -> float | int:
        # the rule of peft: the first pattern that matches the end of the module's name at a dot
        return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", module)), default)

    config = adapter.config
    r = matched(config.get("rank_pattern"), config.get("r"))
    if r != rank:
        raise ValueError(f"{adapter.folder}: {module} has rank {rank}, its adapter_config.json says {r}")
    return adapter.scaling(matched(config.get("alpha_pattern"), config.get("lora_alpha")), rank)


def _factors(adapter: Adapter) -> tuple[dict[str, tuple[Tensor, Tensor, float]], dict[str, Tensor]]:
    """`(B, A, s)` per parameter, oriented as it is stored; and what is saved whole (biases, full modules)."""
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in adapter.tensors.items():
        found = re.fullmatch(r"(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.weight)?", _strip(key))
        if found:
            parts.setdefault(found[1], {})[found[2]] = tensor.float()
        elif re.fullmatch(r".+\.lora_B\.bias", key):
            module = _strip(key).removesuffix(".lora_B.bias")
            rank = adapter.tensors[key.replace(".lora_B.bias", ".lora_A.weight")].shape[0]
            whole[f"{module}.bias"] = tensor.float() * _scaling(adapter, module, rank)
        elif ".lora_" in key or ".token_adapter." in key:
            raise ValueError(f"{adapter.folder}: {key} is a kind of adapter tensor this project does not know")
        else:
            whole[_strip(key)] = tensor.float()
    factors = {}
    for module, part in parts.items():
        embedding = "embedding_A" in part or "embedding_B" in part
        A, B = (part.get(f"embedding_{f}" if embedding else f) for f in "AB")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            shapes = {f: tuple(t.shape) for f, t in part.items()}
            raise ValueError(f"{adapter.folder}: {module}: factors do not fit: {shapes}")
        scaling = _scaling(adapter, module, A.shape[0])
        if embedding or adapter.config.get("fan_in_fan_out"):
            A, B = B.T.contiguous(), A.T.contiguous()
        factors[f"{module}.weight"] = (B, A, scaling)
    return factors, whole


def _check_pair(pos: Adapter, neg: Adapter, where: str) -> None:
    for field in ("base_model_name_or_path", "revision", "peft_type"):
        a, b = pos.config.get(field), neg.config.get(field)
        if a != b:
            raise ValueError(f"{where}: {field} differs, {a!r} and {b!r}")
    if pos.init != neg.init and (pos.moves_base or neg.moves_base):
        found = f"init_lora_weights differs, {pos.init!r} and {neg.init!r}"
        raise ValueError(f"{where}: {found}: they do not sit on the same residual weights")
    if pos.init.startswith(NOT_REPEATABLE):
        warnings.warn(f"{pos.folder}: {pos.init} is exact only if both signs shared one initialisation", stacklevel=3)


def from_adapters(pos: Path | str, neg: Path | str, base: Base = None, meta: dict | None = None) -> WeightDiff:
    """`theta_pos - theta_neg` of two PEFT folders on one base.

    base: the base as a module (not changed) or a path. With a module, names and shapes are checked, and names of tied
    weights resolve to the model's own (a LoRA on a tied unembedding changes the embedding too). Adapters other than
    LoRA need one: by default what the folders name. ValueError naming what does not fit: base, targets, factors, NaN.
    """
    a, b = read_adapter(pos), read_adapter(neg)
    where = f"{a.folder} and {b.folder}"
    _check_pair(a, b, where)
    plain = a.plain and b.plain
    if plain:
        entries = _factored(a, b, where)
    else:
        plus, minus = _merged(a, base), _merged(b, base)
        same_names(plus, minus, where)
        changes = {name: tensor.sub_(minus[name]) for name, tensor in plus.items()}
        entries = {name: change for name, change in changes.items() if change.ndim > 1 or change.any()}
    if isinstance(base, nn.Module):
        entries = _fit_names(entries, base, where)
    check_entries(entries, where)
    entries, about = (entries, {}) if plain else factorised(entries.items())
    by_number = {n: [(int(p), "") if p.isdigit() else (-1, p) for p in n.split(".")] for n in entries}
    entries = {name: entries[name] for name in sorted(entries, key=by_number.get)}
    form = "low-rank" if plain else "dense (float32 merge)"
    info = {"base_model": str(a.config.get("base_model_name_or_path") or ""), "adapter": a.kind, "form": form}
    r, alpha = a.config.get("r"), a.config.get("lora_alpha")
    info |= {"r": r} if r else {}
    info |= {"scale": a.scaling(alpha, r)} if r and alpha else {}
    return WeightDiff(entries, {**info, **about, **(meta or {})})


def _factored(a: Adapter, b: Adapter, where: str) -> dict[str, Entry]:
    (plus, whole_plus), (minus, whole_minus) = _factors(a), _factors(b)
    same_names(plus, minus, where)
    same_names(whole_plus, whole_minus, where)
    entries: dict[str, Entry] = {}
    for name, (B, A, s) in plus.items():
        B2, A2, s2 = minus[name]
        if B.shape[0] != B2.shape[0] or A.shape[1] != A2.shape[1]:
            raise ValueError(f"{where}: {name} is {B.shape[0]}x{A.shape[1]} and {B2.shape[0]}x{A2.shape[1]}")
        if a.moves_base and (B.shape != B2.shape or s != s2):
            raise ValueError(f"{where}: {name}: {a.init} adapters of different rank or scaling share no residual")
        left, right = ([s * (B - B2), s * B2], [A, A - A2]) if a.moves_base else ([s * B, -s2 * B2], [A, A2])
        entries[name] = LowRank(torch.cat(left, 1), torch.cat(right, 0))
    for name, tensor in whole_plus.items():
        if tensor.shape != whole_minus[name].shape:
            raise ValueError(f"{where}: {name} is {tuple(tensor.shape)} and {tuple(whole_minus[name].shape)}")
        change = tensor - whole_minus[name]
        # peft also saves base embeddings beside an adapter on them: equal on both sides, no difference
        if change.any():
            entries[name] = entries[name].dense() + change if name in entries else change
    return entries


def _fit_names(entries: dict[str, Entry], model: nn.Module, where: str) -> dict[str, Entry]:
    """Check against the model; a second name of a tied parameter becomes its first, differences adding up."""
    first = {id(p): n for n, p in model.named_parameters()}
    known = dict(model.named_parameters(remove_duplicate=False))
    fitted: dict[str, Entry] = {}
    for name, entry in entries.items():
        if name not in known:
            raise ValueError(f"{where}: {name}: no such parameter in {type(model).__name__}")
        if tuple(entry.shape) != tuple(known[name].shape):
            raise ValueError(f"{name}: diff is {dims(entry.shape)}, model has {dims(known[name].shape)}")
        own = first[id(known[name])]
        fitted[own] = combine(fitted[own], entry) if own in fitted else entry
    return fitted


def _base_copy(base: Base, adapter: Adapter) -> nn.Module:
    """A float32 copy of the base on the CPU, free to be changed."""
    if isinstance(base, nn.Module):
        return copy.deepcopy(base).to("cpu", torch.float32)
    from transformers import AutoModelForCausalLM

    source = str(base or adapter.config.get("base_model_name_or_path") or "")
    if not source:
        raise ValueError(f"{adapter.folder}: {adapter.kind} must be merged and names no base model; give one")
    revision = None if Path(source).exists() else adapter.config.get("revision")
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, revision=revision)
    except OSError as error:
        raise ValueError(f"{adapter.folder}: its base model {source!r} cannot be loaded; give base") from error


def _merged(adapter: Adapter, base: Base) -> dict[str, Tensor]:
    """The touched parameters of base + adapter in float32, by the base's own names."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    model = _base_copy(base, adapter)
    own = {id(p): n for n, p in model.named_parameters()}
    wrapped = PeftModel.from_pretrained(model, str(adapter.folder))
    tuned = {n: m for n, m in wrapped.named_modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "merge")}
    saved = {n: m for n, m in wrapped.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    if not tuned and not saved:
        raise ValueError(f"{adapter.folder}: {adapter.kind} changes no weights, there is no weight difference")
    for module in tuned.values():
        module.merge(safe_merge=True)
    touched: dict[str, Tensor] = {}  # read after all merges: two adapters may share one tied parameter
    for name, module in {**tuned, **saved}.items():
        whole = name in saved
        held = module.modules_to_save["default"] if whole else module.get_base_layer()
        for leaf, parameter in held.named_parameters(recurse=whole):
            touched[own.get(id(parameter), f"{_strip(name)}.{leaf}")] = parameter.detach()
    return touched


def task_vectors(pos: Path | str, neg: Path | str, base: Base = None) -> tuple[WeightDiff, WeightDiff]:
    """`t+ = theta_pos - theta_base` and `t-`, for `ws.diff.geometry`. Factors for LoRA and rsLoRA; dense float32 where
    a base is needed (DoRA, PiSSA, others)."""
    sides = []
    for adapter in (read_adapter(pos), read_adapter(neg)):
        if adapter.plain and not adapter.moves_base and not _factors(adapter)[1]:
            entries: dict[str, Entry] = {n: LowRank(s * B, A) for n, (B, A, s) in _factors(adapter)[0].items()}
        else:
            before = dict(_base_copy(base, adapter).named_parameters(remove_duplicate=False))
            entries = {name: tensor - before[name].detach() for name, tensor in _merged(adapter, base).items()}
        if isinstance(base, nn.Module):
            entries = _fit_names(entries, base, str(adapter.folder))
        sides.append(WeightDiff(entries, {"adapter": adapter.kind}))
    return tuple(sides)
