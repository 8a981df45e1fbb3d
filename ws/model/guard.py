"""Changes to a model that no interrupt leaves half done, and what marks a model that is changed.

Python runs a signal's handler between any two steps of the main thread, also within `__enter__` and `__exit__`. While a
`Guarded` context is open, its own handler stands before the one that was there: a signal that comes within these two
methods is only noted, and given to that handler when every change is undone; any other signal reaches it at once.
"""

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import no_type_check

from torch import nn

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name))
LIBRARIES = ("torch", "transformers", "accelerate", "peft")  # whose hooks record, or place what is on other devices
MARKS = ("_ws_open", "_ws_live", "_ws_worn")  # attributes of parameters and modules that act otherwise for a while
Handler = Callable[[int, FrameType | None], object]

_open: list["Guarded"] = []  # those of the main thread
_standing: list["_Held"] = []
_noted: list[tuple[Handler, int]] = []


class _Held:
    """Stands before a signal's handler: within `Guarded.__enter__` and `__exit__` the signal is noted, not handled."""

    def __init__(self, number: int, before: Handler):
        self.number, self.before = number, before

    def __call__(self, number: int, frame: FrameType | None) -> object:
        at = frame
        while at is not None and at.f_code not in GUARDED:
            at = at.f_back
        if at is None:
            return self.before(number, frame)
        if (self.before, number) not in _noted:
            _noted.append((self.before, number))
        return None


@no_type_check  # a checker's wrapper would stand between the interpreter and the two methods, unguarded
class Guarded:
    """A context whose changes are all undone on exit, also after an error or an interrupt in the middle of either.

    A subclass gives `start`, which makes the changes; before each it appends what undoes it to `self.undo` (also half of
    it, also nothing), and `value`, what `as` binds. Every undoing runs, the last first, whatever another raises; the first
    error is raised when all have run, then signals that came meanwhile are handled (SIGINT, SIGTERM and SIGALRM where
    their handlers are Python's, contexts of the main thread). Contexts nest. RuntimeError when it is open already.
    """

    def __init__(self, value: object):
        self.value, self.undo = value, []

    def start(self) -> None:
        raise NotImplementedError

    def __enter__(self):
        if self.undo or self in _open:
            raise RuntimeError(f"this {type(self).__name__} is open already; make another")
        while True:
            try:
                _stand(self)
                self.start()
            except BaseException:
                _undo(self)
                raise
            if not (_noted and self in _open):
                return self.value
            _undo(self)  # the handler raises, or the context is entered anew

    def __exit__(self, *_):
        _undo(self)


GUARDED = (Guarded.__enter__.__code__, Guarded.__exit__.__code__)


def _undo(context: Guarded) -> None:
    """Undo all, take the handlers away with the last context, raise the first error, handle what was noted."""
    errors = []
    while context.undo:
        try:
            context.undo[-1]()
        except BaseException as error:  # kept: the other changes are undone first
            errors.append(error)
        context.undo.pop()
    mine = context in _open
    if mine:
        _open.remove(context)
    if mine and not _open and _main_thread():
        while _standing:
            held = _standing.pop()
            if signal.getsignal(held.number) is held:
                signal.signal(held.number, held.before)
    try:
        if errors:
            raise errors[0]
    finally:
        if mine and _main_thread():
            _handle()


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _stand(context: Guarded) -> None:
    """Stand before the handlers of this process; nothing outside the main thread, which is the one that signals reach."""
    if not _main_thread():
        return
    _open.append(context)
    for number in SIGNALS:
        before = signal.getsignal(number)
        if callable(before) and not isinstance(before, _Held):
            _standing.append(_Held(number, before))
            signal.signal(number, _standing[-1])


def _handle() -> None:
    """Give every noted signal to its handler, which may raise."""
    if _noted:
        before, number = _noted.pop(0)
        try:
            before(number, sys._getframe())
        finally:
            _handle()


def mark(module: nn.Module, by: int) -> None:
    """Count a change of what a module does, `by` +1 when it is made and -1 when it is taken back."""
    module.__dict__["_ws_worn"] = module.__dict__.get("_ws_worn", 0) + by
    if not module.__dict__["_ws_worn"]:
        del module.__dict__["_ws_worn"]


def hooked(model: nn.Module, but: tuple[str, ...] = ()) -> bool:
    """Whether somebody set a forward hook, which may change what the model computes; the libraries' own do not. but: modules
    whose hooks do not count."""
    hooks = (h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    whose = {getattr(getattr(h, "func", h), "__module__", "") for h in hooks}
    return any(name.split(".")[0] not in LIBRARIES for name in whose - set(but))


def compiled(model: nn.Module) -> bool:
    """Whether torch.compile wraps the model: code compiled before a hook was set runs without it."""
    return hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules())


def check_unhooked(model: nn.Module) -> None:
    """`check_plain`, and ValueError where somebody's forward hook is set: for what is kept whatever the fingerprint."""
    check_plain(model)
    if hooked(model):
        raise ValueError(
            "a forward hook is set on the model: remove it, what is written or trained would not be the model's"
        )


def check_plain(model: nn.Module) -> None:
    """ValueError inside an open `weight_steer` or `wear`: what is computed there is not the base model's."""
    for part in (*model.parameters(), *model.modules()):
        if any(name in part.__dict__ for name in MARKS):
            raise ValueError("the model is being steered: leave the `weight_steer` or `wear` context first")
