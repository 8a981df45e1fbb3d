"""Recording and editing what modules compute, by forward hooks.

`TraceDict` is baukit's where baukit is installed; otherwise the class below, which serves the same few arguments.
`hooked` runs plain functions at modules and always takes them off again.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import contextmanager

from torch import Tensor, nn


class LocalTrace:
    """What one module saw: `.input` (its first positional argument), `.output`."""

    def __init__(self):
        self.input = None
        self.output = None


class LocalTraceDict(OrderedDict):
    """Hooks on named submodules for the span of a `with` block; `traces[name].output` afterwards.

    module: the root. layers: dotted names of submodules. retain_input / retain_output: what to keep. edit_output:
    `f(output, layer)` whose value replaces the module's output. detach: keep tensors off the graph.
    Raises LookupError for a name that the root does not have.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Iterable[str] = (),
        retain_output: bool = True,
        retain_input: bool = False,
        edit_output: Callable | None = None,
        detach: bool = False,
    ):
        super().__init__()
        self._handles = []
        modules = dict(module.named_modules())
        for name in layers:
            if name not in modules:
                raise LookupError(name)
        for name in layers:
            trace = self[name] = LocalTrace()

            def hook(_module, args, output, name=name, trace=trace):
                if retain_input:
                    trace.input = _kept(args[0] if len(args) == 1 else args, detach)
                if edit_output is not None:
                    output = edit_output(output, name)
                if retain_output:
                    trace.output = _kept(output, detach)
                return output

            self._handles.append(modules[name].register_forward_hook(hook))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        while self._handles:
            self._handles.pop().remove()


def _kept(value, detach: bool):
    if isinstance(value, Tensor):
        return value.detach() if detach else value
    if isinstance(value, (tuple, list)):
        return type(value)(_kept(v, detach) for v in value)
    return value


try:
    from baukit import TraceDict
except ImportError:  # not on the package index; docs/architecture.md says how to install it
    TraceDict = LocalTraceDict


def hidden(output) -> Tensor:
    """The hidden states of a block's output: the tensor itself, or the first entry of an older release's tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable]], before: bool = False):
    """Run `f(module, args, output)` after (or `f(module, args)` before) each module's forward, inside the block.

    A value that `f` returns replaces the output (or the arguments); None leaves it. All hooks come off on exit, also
    when an error or an interrupt ends the block.
    """
    handles = []
    try:
        for module, function in hooks:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            handles.append(register(function))
        yield
    finally:
        for handle in handles:
            handle.remove()
