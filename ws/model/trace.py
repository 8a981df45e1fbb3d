"""Recording and editing what modules compute, by forward hooks. `TraceDict` is baukit's where baukit's file of it
loads, else the class below; `trace_in_use` says which. `recorded` is what every capture runs through."""

import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor, nn


class OwnTraceDict(OrderedDict):
    """Hooks on named submodules for the span of a `with` block; `traces[name].output` afterwards.

    Of baukit's class what captures use. module: the root. layers: dotted names of submodules. retain_output: whether
    outputs are kept. edit_output: its value replaces the module's output; it is given `output`, `layer` (the name) and
    `inputs` (positional arguments). Raises LookupError for a name that the root does not have.
    """

    def __init__(
        self, module: nn.Module, layers: Iterable[str], retain_output: bool = True, edit_output: Callable | None = None
    ):
        super().__init__((name, SimpleNamespace(output=None)) for name in layers)
        modules, self._handles = _modules(module, self), []
        for name, trace in self.items():

            def hook(_module, inputs, output, name=name, trace=trace):
                if edit_output is not None:
                    output = edit_output(output=output, layer=name, inputs=inputs)
                trace.output = output if retain_output else None
                return output

            self._handles.append(modules[name].register_forward_hook(hook))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        while self._handles:
            self._handles.pop().remove()


def _modules(root: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    modules = dict(root.named_modules())
    if unknown := [name for name in names if name not in modules]:
        raise LookupError(unknown[0])
    return modules


def find_trace_dict() -> tuple[type, str]:
    """baukit's TraceDict, or the own one where that is not to be had, and a line that says which and why. Only the package's
    `nethook.py` is run: its `__init__` imports torchvision, which fails beside another torch than it was built for."""
    try:
        package = importlib.util.find_spec("baukit")
        if package is None:
            return OwnTraceDict, "own TraceDict (baukit is not installed)"
        file = Path(package.submodule_search_locations[0]) / "nethook.py"
        spec = importlib.util.spec_from_file_location("_ws_baukit_nethook", file)
        nethook = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nethook)
        root = nn.Identity()
        # older ones know no `inputs`
        with nethook.TraceDict(root, [""], retain_output=False, edit_output=lambda output, layer, inputs: output):
            root(None)
    except Exception as error:  # whatever a foreign file raises: the own class serves as well
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return OwnTraceDict, f"own TraceDict (baukit failed to load: {reason})"
    return nethook.TraceDict, "baukit's TraceDict"


TraceDict, _IN_USE = find_trace_dict()


def trace_in_use() -> str:
    """One line: whose TraceDict records, and why."""
    return _IN_USE


def recorded(model: nn.Module, at: dict[str, Callable]):
    """`at[name](output, inputs)` whenever a named module has run, inside the `with` block; outputs pass unchanged.

    inputs: the positional arguments. Nothing is kept but what the functions keep, so each can reduce its layer when the
    pass reaches it. Their errors reach the caller; all hooks come off on exit. Raises LookupError for an unknown name.
    """
    _modules(model, at)  # baukit's would leave the hooks that it had set before it met the unknown name

    def edit(output, layer, inputs):
        at[layer](output, inputs)
        return output

    return TraceDict(model, list(at), retain_output=False, edit_output=edit)


def hidden(output) -> Tensor:
    """The hidden states of a block's output: the tensor itself, or the first entry of an older release's tuple."""
    return output[0] if isinstance(output, tuple) else output
