"""Weight steering: inside `with weight_steer(model, w, alpha)` every parameter named by w acts as `W + alpha w`.

float32 and wider: `alpha w` is added to the weights and, on exit, the saved copies are put back, so every bit returns. Lower
precision: the weights stay as they are. Adding to them, or to an already rounded `W x`, has a dead zone of half an ulp that
swallows a small w; a hook on the module computes `W x + b + alpha B (A x)` in float32 and rounds once. (docs/method.md section 2)
"""

import copy
import math
from dataclasses import dataclass, field
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ws.diff.core import Entry, LowRank, WeightDiff, dims, layer_of, parts
from ws.model.guard import Guarded, compiled
from ws.model.wide import NARROW

WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class _Slot:
    """Where one entry of w acts: a parameter and all modules that use it (several for tied weights)."""

    name: str
    parameter: nn.Parameter
    users: tuple[tuple[nn.Module, str], ...]
    entry: Entry


def weight_steer(model: nn.Module, w: WeightDiff, alpha: float | int) -> Guarded:
    """A context in which every parameter named in `w` acts as `W + alpha w`; `as` binds the model.

    On exit, by any road, every parameter is bit-identical to before; contexts nest, also on overlapping parameters. An
    interrupt (Ctrl-C, SIGTERM) while weights change is held back until all are as before, `ws.model.guard`.
    Everything is checked before anything is touched: ValueError names a parameter that the model lacks, a shape that
    differs (both shapes), a parameter that is not in memory (meta or offloaded), a dtype or a module type that cannot
    be steered. Works on a model that peft has wrapped (the diff acts on the base weights; the copies of
    `modules_to_save` are steered too) and on one spread over devices. A diff of a tied weight acts on both of its uses.

    Examples:
        >>> import torch, ws
        >>> lm, name = ws.load_lm("tiny"), "model.layers.3.mlp.down_proj.weight"
        >>> W = lm.model.get_parameter(name).detach()
        >>> before = W.clone()
        >>> with ws.weight_steer(lm.model, ws.WeightDiff({name: torch.ones(W.shape)}), 0.5):
        ...     print(round(float((W - before).mean()), 4))
        0.5
    """
    return _Steering(model, w, alpha)


def untouched(w: WeightDiff, n_layers: int) -> int:
    """How many of a decoder's first blocks w leaves as they are; 0 where it changes what embeds, or may."""
    layers = [layer_of(name) for name in w.names]
    return 0 if None in layers else min(layers, default=n_layers)


class _Steering(Guarded):
    """The context of `weight_steer`."""

    def __init__(self, model: nn.Module, w: WeightDiff, alpha: float | int):
        super().__init__(model)
        self.w, self.alpha = w, alpha

    def start(self) -> None:
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha is {self.alpha}, expected a finite number")
        slots = check_fits(self.value, self.w)
        if any(slot.parameter.dtype in NARROW for slot in slots) and compiled(self.value):
            raise ValueError(
                "a compiled model in half precision does not see w: steer it before torch.compile, or in float32"
            )
        for slot in slots if self.alpha != 0 else ():
            step = (_InPlace if slot.parameter.dtype in WIDE else _Hooked)(slot, self.alpha)
            self.undo.append(step.exit)
            step.enter()


def _plain_name(name: str) -> str:
    """A parameter's name in the base model, whatever peft or torch.compile put around it."""
    parts = name.replace("_orig_mod.", "").removeprefix("base_model.model.").replace(".base_layer.", ".").split(".")
    for wrapper, width in (("original_module", 1), ("modules_to_save", 2)):
        if wrapper in parts:
            at = parts.index(wrapper)
            parts = parts[:at] + parts[at + width :]
    return ".".join(parts)


def check_fits(model: nn.Module, w: WeightDiff) -> list[_Slot]:
    """Where w acts; ValueError naming its first parameter that the model lacks, has in another shape or cannot steer."""
    by_name: dict[str, dict[int, nn.Parameter]] = {}
    users: dict[int, dict[tuple[int, str], tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            by_name.setdefault(_plain_name(f"{path}.{leaf}" if path else leaf), {})[id(parameter)] = parameter
            users.setdefault(id(parameter), {})[id(module), leaf] = (module, leaf)
    slots: dict[int, _Slot] = {}
    for name, entry in w.entries.items():
        if name not in by_name:
            raise ValueError(f"{name}: no such parameter in {type(model).__name__}")
        for parameter in by_name[name].values():
            slot = _Slot(name, parameter, tuple(users[id(parameter)].values()), entry)
            _check(slot)
            first = slots.setdefault(id(parameter), slot)
            held, new = parts(first.entry), parts(entry)
            if first is not slot and (len(held) != len(new) or not all(map(torch.equal, held, new))):
                raise ValueError(
                    f"{first.name} and {name} are one tied parameter, but the diff holds two changes for it;"
                    " build the diff with its base model, which adds them up"
                )
    return list(slots.values())


def _check(slot: _Slot) -> None:
    name, parameter = slot.name, slot.parameter
    if tuple(slot.entry.shape) != tuple(parameter.shape):
        raise ValueError(f"{name}: diff is {dims(slot.entry.shape)}, model has {dims(parameter.shape)}")
    if parameter.device.type == "meta":
        where = "meta device, or offloaded to disk or CPU"
        raise ValueError(f"{name}: not in memory ({where}); load the model whole to steer it")
    if parameter.dtype not in WIDE + NARROW:
        kinds = "float32, bfloat16 or float16"
        raise ValueError(f"{name}: dtype {parameter.dtype} cannot be steered; load the model in {kinds}")
    if parameter.dtype in NARROW:
        for module, _ in slot.users:
            _kind(name, module)


def _kind(name: str, module: nn.Module) -> str:
    """How a module uses its parameters: `linear` (x W^T + b), `conv1d` (x W + b), `embedding`, or a small `leaf`."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if isinstance(module, nn.Embedding) and (forward is nn.Embedding.forward or hasattr(module, "embed_scale")):
        if module.max_norm is None:
            return "embedding"
    elif not any(True for _ in module.children()) and all(p.ndim < 2 for p in module.parameters()):
        return "leaf"
    what = f"what a {type(module).__name__} does with it"
    raise ValueError(f"{name}: {what} cannot be steered in low precision; use float32")


def _dense(entry: Entry, like: Tensor) -> Tensor:
    entry = entry.to(like.device)
    return (entry.dense() if isinstance(entry, LowRank) else entry).to(like.dtype)


class _InPlace:
    """Adds `alpha w` to a float32 parameter and puts the saved copy back."""

    def __init__(self, slot: _Slot, alpha: float | int):
        self.slot, self.alpha, self.saved = slot, alpha, None

    @torch.no_grad()
    def enter(self) -> None:
        parameter = self.slot.parameter
        change = _dense(self.slot.entry, parameter)
        self.saved = parameter.detach().clone()
        _stack(parameter).append(self)
        parameter.data.add_(change, alpha=self.alpha)

    @torch.no_grad()
    def exit(self) -> None:
        parameter, stack = self.slot.parameter, _stack(self.slot.parameter)
        if self in stack:
            at = stack.index(self)
            stack.remove(self)
            later, saved = stack[at:], self.saved
            # contexts left out of order: those still open act again, on top of what was there before this one. The next
            # takes over the saved copy before anything can fail, so that the last of all puts back the first bits
            if later:
                later[0].saved = saved
            else:
                parameter.data.copy_(saved)
            for other in later:
                if other is later[0]:
                    parameter.data.copy_(saved)
                else:
                    other.saved.copy_(parameter.data)
                parameter.data.add_(_dense(other.slot.entry, parameter), alpha=other.alpha)
        if not stack:
            del parameter._ws_open


def _stack(parameter: nn.Parameter) -> list:
    return parameter.__dict__.setdefault("_ws_open", [])


@dataclass
class _Live:
    """What steers one low-precision module now: its open changes per parameter, and the one hook that applies them."""

    kind: str
    changes: list[tuple[str, Entry, float, object]] = field(default_factory=list)
    handle: object = None
    twin: nn.Module | None = None


class _Hooked:
    """Steers the modules that use a low-precision parameter by a forward hook; the parameter is never written."""

    def __init__(self, slot: _Slot, alpha: float | int):
        self.slot, self.alpha = slot, alpha

    def enter(self) -> None:
        entry = self.slot.entry.to(self.slot.parameter.device, torch.float32)
        for module, leaf in self.slot.users:
            live = getattr(module, "_ws_live", None)
            if live is None:
                live = module._ws_live = _Live(_kind(self.slot.name, module))
                # first of all hooks, so that recorders see the steered output
                live.handle = module.register_forward_hook(_steered, with_kwargs=True, prepend=True)
            live.changes.append((leaf, entry, self.alpha, self))
            live.twin = None

    def exit(self) -> None:
        for module, _ in self.slot.users:
            live = getattr(module, "_ws_live", None)
            if live is None:
                continue
            live.changes, live.twin = [change for change in live.changes if change[3] is not self], None
            if not live.changes:
                if live.handle is not None:
                    live.handle.remove()
                del module._ws_live


def _steered(module: nn.Module, args: tuple, kwargs: dict, output):
    """The module's output recomputed in float32 with `W + sum alpha w`, rounded once to the output's dtype."""
    live = module._ws_live
    if live.kind == "leaf":
        return _leaf(module, live, args, kwargs, output)
    x = args[0] if args else next(iter(kwargs.values()))
    weight, bias = module.weight, getattr(module, "bias", None)
    x = x.to(weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        if live.kind == "embedding":
            y = F.embedding(x, weight).float()
            for _, entry, alpha, _ in live.changes:
                first, *rest = parts(entry)
                y = y + alpha * reduce(torch.matmul, rest, F.embedding(x, first))
            scale = getattr(module, "embed_scale", None)
            if scale is not None:
                y = y * torch.as_tensor(scale, device=y.device).to(weight.dtype).float()
        else:
            x = x.float()
            across = live.kind == "conv1d"
            if weight.dtype in WIDE and output.dtype in WIDE:  # widened while it runs: the output is whole
                y = output
            else:
                y = x @ (weight.float() if across else weight.float().T)
                if bias is not None:
                    y = y + bias.float()
            for leaf, entry, alpha, _ in live.changes:
                if leaf == "bias":
                    y = y + alpha * entry
                elif isinstance(entry, LowRank) and not across:
                    z = x.reshape(-1, x.shape[-1]) @ entry.A.T
                    into, rows = y.shape, y.reshape(-1, y.shape[-1])
                    add = rows.addmm if torch.is_grad_enabled() else rows.addmm_
                    y = add(z, entry.B.T, alpha=alpha).reshape(into)
                else:
                    factors = parts(entry) if across else [part.T for part in reversed(parts(entry))]
                    y = y + alpha * reduce(torch.matmul, factors, x)
    return y.to(output.device, output.dtype)


def _leaf(module: nn.Module, live: _Live, args: tuple, kwargs: dict, output: Tensor):
    """A norm or the like: a float32 twin with the changed parameters runs in its place."""
    if live.twin is None:
        twin = copy.copy(module)
        # a shallow copy shares the hooks and the parameter table; the twin gets its own
        twin.__dict__.update(_parameters={}, _forward_hooks={}, _forward_pre_hooks={})
        for leaf, parameter in module.named_parameters(recurse=False):
            value = parameter.detach().float().clone()
            for changed, entry, alpha, _ in live.changes:
                if changed == leaf:
                    value += alpha * _dense(entry, value)
            twin._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        live.twin = twin

    def widen(value):
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    with torch.autocast(output.device.type, enabled=False):
        y = type(module).forward(live.twin, *map(widen, args), **{key: widen(value) for key, value in kwargs.items()})
    return y.to(output.device, output.dtype)
