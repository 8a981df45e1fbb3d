"""Exact weight differences from two PEFT adapter folders. (docs/method.md section 2)

LoRA and rsLoRA: `w = s (B+ A+ - B- A-)`, `s = alpha / r` or `alpha / sqrt(r)`, as factors in float32. PiSSA and other
initialisations that move part of W into the adapter: both signs start from the same residual, so w is the same
difference of products, written as `[s (B+ - B-), s B-] [A+; A+ - A-]`, because `B+ A+` and `B- A-` both hold the large
part of W and would cancel. All other types: each side is merged in float32, and the merged weights are subtracted.
"""

import copy
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ws.cache.given import first_line
from ws.diff.adapters import PATTERNS, Adapter, bounded, matcher, read_adapter, read_factors, strip
from ws.diff.algebra import combine
from ws.diff.core import Entry, LowRank, WeightDiff, check_entries, dims, same_names
from ws.diff.factor import factorised
from ws.show.bars import plain

NOT_REPEATABLE = ("pissa_niter", "corda", "loftq", "lora_ga")  # initialisations that depend on a random draw or on data

Base = nn.Module | Path | str | None


def check_pair(pos: Adapter, neg: Adapter, where: str) -> None:
    """ValueError where two adapters do not sit on the same weights."""
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
    check_pair(a, b, where)
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
    by_number = {n: [(int(p), "") if p.isdecimal() else (-1, p) for p in n.split(".")] for n in entries}
    entries = {name: entries[name] for name in sorted(entries, key=by_number.get)}
    form = "low-rank" if plain else "dense (float32 merge)"
    info = {"base_model": str(a.config.get("base_model_name_or_path") or ""), "adapter": a.kind, "form": form}
    r, alpha = a.config.get("r"), a.config.get("lora_alpha")
    info |= {"r": r} if r else {}
    info |= {"scale": a.scaling(alpha, r)} if r and alpha else {}
    return WeightDiff(entries, {**info, **about, **(meta or {})})


def _factored(a: Adapter, b: Adapter, where: str) -> dict[str, Entry]:
    (plus, whole_plus), (minus, whole_minus) = read_factors(a), read_factors(b)
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


@plain()
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


def _without_patterns(adapter: Adapter, model: nn.Module):
    """The settings for peft, with every pattern replaced by the names that it matches: peft would match without a limit."""
    from peft import PeftConfig

    config, where = PeftConfig.from_pretrained(str(adapter.folder)), adapter.folder / "adapter_config.json"
    names, match = [name for name, _ in model.named_modules()], bounded(where)
    for key in ("target_modules", "exclude_modules"):
        value = getattr(config, key, None)
        if isinstance(value, str) and value != "all-linear":
            setattr(config, key, {name for name in names if match(rf"(?:{value})$", name)} or None)
    if targets := getattr(config, "target_modules", None):
        ends = tuple(f".{target}" for target in targets)
        tuned = [name for name in names if f".{name}".endswith(ends)] if not isinstance(targets, str) else names
        for key in PATTERNS:
            value_of = matcher(getattr(config, key, None), f"{where}: {key}")
            found = {name: value_of(name, None) for name in tuned if getattr(config, key, None)}
            setattr(config, key, {name: value for name, value in found.items() if value is not None})
    for pattern in [p for p in [getattr(config, "layers_pattern", None)] if isinstance(p, str)]:
        if not re.fullmatch(r"[\w.]*", pattern):
            raise ValueError(f"{where}: layers_pattern {pattern[:60]!r}: only a plain name is read")
    return config


def _merged(adapter: Adapter, base: Base) -> dict[str, Tensor]:
    """The touched parameters of base + adapter in float32, by the base's own names."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    model = _base_copy(base, adapter)
    own = {id(p): n for n, p in model.named_parameters()}
    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter.folder), config=_without_patterns(adapter, model))
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{adapter.folder}: peft cannot load this {adapter.kind}: {first_line(error)}") from error
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
            touched[own.get(id(parameter), f"{strip(name)}.{leaf}")] = parameter.detach()
    return touched


def task_vectors(pos: Path | str, neg: Path | str, base: Base = None) -> tuple[WeightDiff, WeightDiff]:
    """`t+ = theta_pos - theta_base` and `t-`, for `ws.diff.geometry`. Factors for LoRA and rsLoRA; dense float32 where
    a base is needed (DoRA, PiSSA, others)."""
    sides = []
    for adapter in (read_adapter(pos), read_adapter(neg)):
        if adapter.plain and not adapter.moves_base and not read_factors(adapter)[1]:
            entries: dict[str, Entry] = {n: LowRank(s * B, A) for n, (B, A, s) in read_factors(adapter)[0].items()}
        else:
            before = dict(_base_copy(base, adapter).named_parameters(remove_duplicate=False))
            entries = {name: tensor - before[name].detach() for name, tensor in _merged(adapter, base).items()}
        if isinstance(base, nn.Module):
            entries = _fit_names(entries, base, str(adapter.folder))
        sides.append(WeightDiff(entries, {"adapter": adapter.kind}))
    return tuple(sides)


def balanced_diff(pos: Path | str, neg: Path | str, base: Base = None, meta: dict | None = None) -> WeightDiff:
    """`c+ t+ - c- t-` with `c = sqrt(|t+| |t-|) / |t|` for each side: both sides count alike where one learnt more than the
    other, `|t+|` and `|t-|` being Frobenius norms over all parameters. Arguments as in `from_adapters`. ValueError where a
    side is 0."""
    plus, minus = task_vectors(pos, neg, base)
    norms = {"norm_pos": plus.total_norm(), "norm_neg": minus.total_norm()}
    for (key, norm), folder in zip(norms.items(), (pos, neg), strict=True):
        if not norm:
            raise ValueError(f"{folder}: the adapter changes nothing ({key} is 0), so the two signs cannot be balanced")
    mean = (norms["norm_pos"] * norms["norm_neg"]) ** 0.5
    plus, minus = plus.scale(mean / norms["norm_pos"]), minus.scale(-mean / norms["norm_neg"])
    same_names(plus.entries, minus.entries, f"{pos} and {neg}")
    entries = {name: combine(entry, minus.entries[name]) for name, entry in plus.entries.items()}
    base_model = str(read_adapter(pos).config.get("base_model_name_or_path") or "")
    return WeightDiff(entries, {"base_model": base_model, "balanced": True, **norms, **(meta or {})})
