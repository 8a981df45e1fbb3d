"""Progress bars, plain everywhere: on a terminal where every program has them, in a notebook as lines of its output.

JupyterLab paints red what is written to stderr, and asks for widgets where a library wants them; so in a kernel all bars,
this package's and those of the libraries that load models, go to stdout.
"""

import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps

from tqdm import tqdm as _tqdm

# Of libraries that a notebook uses through this package, and nothing that its reader could change.
warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


_SHOWN = ContextVar("shown", default=True)


def in_kernel() -> bool:
    """Whether what is printed here lands in a notebook."""
    return type(sys.stdout).__module__.startswith("ipykernel")


class tqdm(_tqdm):
    """tqdm's plain bar; in a notebook on stdout, on one line also within another bar (a notebook cannot go up a line),
    and always of the same width, so that nothing of a longer one stays visible."""

    def __init__(self, *args, **options):
        plain = {"file": sys.stdout, "position": 0, "ncols": 90} if in_kernel() else {}
        hidden = {} if _SHOWN.get() else {"disable": True}
        super().__init__(*args, **plain | options | hidden)


def heard(function: Callable) -> Callable:
    """A function whose `progress=False` silences all bars of this package within it, whoever draws them."""

    usual = inspect.signature(function).parameters["progress"].default

    @wraps(function)
    def run(*args, progress: bool = usual, **options):
        before = _SHOWN.set(_SHOWN.get() and progress)
        try:
            return function(*args, progress=progress, **options)
        finally:
            _SHOWN.reset(before)

    return run


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within it, as a decorator too, other libraries' bars and notices go where this package's go."""
    with contextlib.redirect_stderr(sys.stdout) if in_kernel() else contextlib.nullcontext():
        yield
