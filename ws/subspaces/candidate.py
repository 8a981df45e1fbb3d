"""The one list of candidate subspaces. A candidate's name, family, source and definition stand at its function.

A function takes the `Materials` (and the layer, unless it is `shared` by all layers) and returns a `Basis`. Its
docstring is the definition that the reports print. Only ceilings are given the weight diff.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

READ = ("W:read", "W:unembed")
WRITE = ("W:write", "W:write-not-read", "W:OV", "W:MLP")

MODULES = (
    "from_weights",
    "from_activations",
    "compound",
    "ceilings",
)  # their order is that of docs/method.md section 5

_REGISTRY: dict[str, "Candidate"] = {}


@dataclass(frozen=True)
class Candidate:
    """name, family and source as in docs/method.md section 5; shared: one basis for all layers; prompts: the basis
    depends on the FIT probes; build: its function."""

    name: str
    family: str
    source: str
    shared: bool
    prompts: bool
    build: Callable

    @property
    def kind(self) -> str:
        """ceiling (sees w), control (the random reference) or A-hypothesis."""
        return self.family if self.family in ("ceiling", "control") else "A-hypothesis"

    @property
    def axis_kind(self) -> str:
        """read, write, mixed or ceiling: which side of a weight matrix the family speaks of. (section 6)"""
        if self.family == "ceiling":
            return "ceiling"
        return "read" if self.family in READ else "write" if self.family in WRITE else "mixed"

    @property
    def definition(self) -> str:
        return " ".join(inspect.getdoc(self.build).split())


def candidate(name: str, family: str, source: str, shared: bool = False, prompts: bool = False):
    """Register the decorated function as a candidate; families `act:*` depend on the prompts in any case.

    A second candidate of the same name, or one without a docstring, is a ValueError.
    """

    def register(function: Callable) -> Callable:
        if name in _REGISTRY:
            raise ValueError(f"candidate {name} is registered twice")
        if not inspect.getdoc(function):
            raise ValueError(f"candidate {name} has no definition (docstring)")
        _REGISTRY[name] = Candidate(name, family, source, shared, prompts or family.startswith("act:"), function)
        return function

    return register


def registered(sources: tuple[str, ...] | None = None) -> list[Candidate]:
    """All candidates, or those of the given sources, in the order of the method: by module, then by definition."""

    def place(c: Candidate) -> int:
        module = c.build.__module__.rpartition(".")[2]
        return MODULES.index(module) if module in MODULES else len(MODULES)

    return sorted((c for c in _REGISTRY.values() if sources is None or c.source in sources), key=place)


def get(name: str) -> Candidate:
    """One candidate by name; ValueError with the nearest names otherwise."""
    if name not in _REGISTRY:
        import difflib

        near = difflib.get_close_matches(name, _REGISTRY, n=3)
        raise ValueError(f"no candidate {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    return _REGISTRY[name]
