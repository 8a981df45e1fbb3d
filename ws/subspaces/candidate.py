"""What a candidate subspace is: a function, and a decorator that holds what is known of it.

A function takes the `Materials` (and the layer, unless it is `shared` by all layers) and returns a `Basis` or a `(d, r)`
tensor. Its docstring is the definition that the reports print. Registering a name again replaces it, so that a cell can
be run twice. Only ceilings are given the weight diff. (docs/method.md section 5)
"""

import difflib
import hashlib
import importlib.util
import inspect
import linecache
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

AXES = {"ceiling": "ceiling"} | dict.fromkeys(("W:read", "W:unembed"), "read")
AXES |= dict.fromkeys(("W:write", "W:write-not-read", "W:OV", "W:MLP"), "write")
AXES |= {"grad:read": "read"} | dict.fromkeys(("grad:contrast", "grad:probe", "grad:control"), "write")
SEES = ("weights", "prompts", "pairs", "other pairs", "personas", "w")
RACES = ("weights", "prompts", "other pairs", "pairs")  # from what knows least of the training on

_REGISTRY: dict[str, "Candidate"] = {}


def race_of(sees: Sequence[str]) -> str:
    """What of `sees` is nearest to the training."""
    return next((one for one in ("w", *reversed(RACES)) if one in sees), "unknown")


@dataclass(frozen=True)
class Candidate:
    """name, family and source as in docs/method.md section 5; shared: one basis for all layers; sees: what the basis
    depends on besides the widths, of `weights`, `prompts`, `pairs`, `other pairs` (and `w`, for ceilings), and `personas` where
    it is left out for a behaviour that has none; build: its function."""

    name: str
    family: str
    source: str
    shared: bool
    sees: tuple[str, ...]
    build: Callable

    @property
    def kind(self) -> str:
        """ceiling (sees w), control (a reference that is not ranked) or A-hypothesis."""
        last = self.family.rpartition(":")[2]
        return last if last in ("ceiling", "control") else "A-hypothesis"

    @property
    def race(self) -> str:
        """What it sees that is nearest to the training: one of RACES, `w`, or `unknown`. Candidates of one race compete."""
        return race_of(self.sees)

    @property
    def axis_kind(self) -> str:
        """read, write, mixed or ceiling: which side of a weight matrix the family speaks of. (section 6)"""
        return AXES.get(self.family, "mixed")

    @property
    def definition(self) -> str:
        return " ".join((inspect.getdoc(self.build) or "").split())

    @property
    def about(self) -> dict:
        """What the tables and files of a run say of it."""
        own = {f: getattr(self, f) for f in ("name", "family", "axis_kind", "source", "kind", "shared", "definition")}
        return own | {"sees": list(self.sees)}

    def works(self, personas: bool) -> bool:
        """Whether it can be built for a behaviour: one that needs personas cannot where there are none."""
        return personas or "personas" not in self.sees

    @property
    def shipped(self) -> bool:
        """Whether it is one of this package's."""
        return (getattr(self.build, "__module__", "") or "").split(".")[0] == __name__.split(".")[0]

    @property
    def file(self) -> Path | None:
        """The file that a candidate was loaded from (`load_candidates`); None for all others."""
        path = Path(getattr(getattr(self.build, "__code__", None), "co_filename", ""))
        loaded = (getattr(self.build, "__module__", "") or "").startswith("candidates_")  # a script is not run again
        return path if loaded and path.is_file() else None


def candidate(
    *, family: str, name: str = "", sees: Sequence[str] = ("weights",), shared: bool = False, source: str = "own"
) -> Callable[[Callable], Callable]:
    """Make the decorated function a candidate subspace; the function itself is returned unchanged.

    family: decides on which side it is ranked (`W:write...`, `W:OV`, `W:MLP` write; `W:read`, `W:unembed` read; all
    else mixed). name: default the function's. sees: what it may look at, of `weights` (the base model's), `prompts`
    (activations on the FIT probes: `m.base.clean`, `.pos`, `.neg`, row i of each the same probe), `pairs` (gradients of the base
    model on training pairs, `m.gradients("training pairs")`) and `other pairs`; with
    `personas` beside `prompts` it is left out for a behaviour without personas, which has no `.pos` and `.neg`. Its bases
    are made anew when that changes, its function does, or what the function calls. shared: one basis for all layers,
    `f(m)` instead of `f(m, l)`. source: the group it belongs to. Registering a name again replaces it. Raises ValueError
    for a missing docstring, an unknown `sees`, the name of a shipped candidate. (docs/method.md section 5)

    Examples:
        >>> import ws
        >>> @ws.candidate(family="act:persona", sees=("prompts",))
        ... def mine(m, l):
        ...     "Persona contrast plus clean states."
        ...     return ws.pca(m.base.pos.resid[l] + m.base.clean.resid[l], m.k)
        >>> mine.candidate.axis_kind
        'mixed'
    """

    def register(function: Callable) -> Callable:
        entry = Candidate(name or function.__name__, family, source, shared, tuple(sees), function)
        _check(entry)
        _REGISTRY[entry.name] = entry
        function.candidate = entry
        return function

    return register


def _check(entry: Candidate) -> None:
    if not entry.definition:
        raise ValueError(f"candidate {entry.name} has no definition (docstring)")
    unknown = [s for s in entry.sees if s not in SEES]
    if unknown:
        raise ValueError(f"candidate {entry.name}: sees {unknown[0]!r} is unknown; known are {', '.join(SEES[:-1])}")
    if entry.shipped:
        return
    if "w" in entry.sees or entry.family == "ceiling":
        raise ValueError(f"candidate {entry.name}: only the shipped ceilings see w")
    if entry.name in _REGISTRY and _REGISTRY[entry.name].shipped:
        raise ValueError(f"candidate {entry.name}: a shipped candidate has this name; choose another")


def as_candidate(thing: object) -> Candidate:
    """A candidate from itself, its name, a decorated function, or any callable `f(m, l)` (or `f(m)`: shared). A plain
    callable may see weights and prompts. Raises ValueError for an unknown name or what cannot be called."""
    if isinstance(thing, Candidate):
        return thing
    if isinstance(thing, str):
        return get(thing)
    if isinstance(getattr(thing, "candidate", None), Candidate):
        return thing.candidate
    if not callable(thing):
        raise ValueError(
            f"a {type(thing).__name__} is no candidate: give a function f(m, l), or bases as {{name: {{layer: tensor}}}}"
        )
    name = getattr(thing, "__name__", type(thing).__name__)
    shared = len(inspect.signature(thing).parameters) == 1
    return Candidate(name, "own", "own", shared, ("weights", "prompts"), thing)


def load_candidates(files: str | Path | Sequence[str | Path]) -> list[Candidate]:
    """The candidates that files of one's own define, in their order; [] for no file. Raises FileNotFoundError /
    ValueError naming the file: absent, not Python, without a decorated function."""
    found = []
    for file in filter(str, [files] if isinstance(files, str | Path) else files):
        path = Path(file).expanduser().resolve()
        if not path.is_file():
            raise FileNotFoundError(f"CANDIDATES: {path}: no such file")
        content = hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()
        spec = importlib.util.spec_from_file_location(f"candidates_{path.stem}_{content}", path)
        if spec is None:
            raise ValueError(f"CANDIDATES: {path}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # the key of a function looks its names up there
        linecache.checkcache(str(path))
        sys.path.insert(0, str(path.parent))  # modules beside it
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"CANDIDATES: {path}: {type(error).__name__}: {error}") from error
        finally:
            sys.path.remove(str(path.parent))
        made = (getattr(value, "candidate", None) for value in vars(module).values())
        mine = [c for c in made if isinstance(c, Candidate) and c.build.__module__ == spec.name]
        if not mine:
            raise ValueError(f"CANDIDATES: {path}: holds no function decorated with @ws.candidate(...)")
        found += mine
    return found


def registered(sources: tuple[str, ...] | None = None) -> list[Candidate]:
    """What is registered, all of it or the given sources, in the order of registration."""
    return [c for c in _REGISTRY.values() if sources is None or c.source in sources]


def get(name: str) -> Candidate:
    """One candidate by name; ValueError with the nearest names otherwise."""
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=3)
        raise ValueError(f"no candidate {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    return _REGISTRY[name]
