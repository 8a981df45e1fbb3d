"""Candidates by protocol, and their bases built layer by layer."""

import ctypes
import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import cache, partial

from ws.show.bars import tqdm
from ws.subspaces.algebra import Basis, empty
from ws.subspaces.candidate import Candidate, registered
from ws.subspaces.eigen import side_by_side
from ws.subspaces.materials import Materials, TooEarly
from ws.subspaces.protocol import Protocol, load_protocol
from ws.subspaces.steered import CeilingMaterials

# in the order of docs/method.md sections 5 and 12
MODULES = ("from_weights", "from_activations", "compound", "from_gradients", "ceilings")


def candidates(protocol: str | Protocol = "v7b") -> list[Candidate]:
    """The candidate subspaces of a protocol in the order of docs/method.md section 5; ValueError for an unknown one.

    Examples:
        >>> import ws
        >>> len(ws.candidates("v7")), ws.candidates("v7")[0].name
        (44, 'lm_head_read')
    """
    modules = [importlib.import_module(f"ws.subspaces.{name}").__name__ for name in MODULES]
    protocol = load_protocol(protocol) if isinstance(protocol, str) else protocol
    found = registered(protocol.sources)
    ours = [c for module in modules for c in found if c.build.__module__ == module]
    return ours + [c for c in found if c.build.__module__ not in modules and c.source != "own"]


def build(
    materials: Materials | CeilingMaterials,
    chosen: Sequence[Candidate],
    progress: bool = True,
    layers: Sequence[int] = (),
) -> dict[str, list[Basis]]:
    """Bases of the candidates by name, one per layer, each checked as it is made. Layers are the outer loop, so that a
    layer's weights and Grams are read once: when the pass that adds up all layers is at one, what can be built there is built;
    what needs the sum waits. layers: those that are asked about, default all; elsewhere a basis is empty, but for one that all
    layers share. Raises ValueError naming candidate and layer when a basis is malformed."""
    bases: dict[str, dict[int, Basis]] = {c.name: {} for c in chosen}
    whole = isinstance(materials, Materials)

    def at(l: int, last: bool) -> bool:
        """Builds what is missing at a layer; whether something has to wait."""

        def one(c: Candidate) -> None:
            with suppress(TooEarly):
                bases[c.name][l] = materials.build(c, l)
                bar.update()

        def missing() -> list[Candidate]:
            return [c for c in chosen if l not in bases[c.name] and (last or not c.shared)]

        if layers and l not in layers:
            for c in (c for c in chosen if not c.shared):
                bases[c.name][l] = empty(materials.d, "not asked about at this layer")
        for c in (c for c in missing() if c.shared):
            one(c)
        if whole and (ours := [c for c in missing() if c.shipped]):
            there = materials.decoder.embed_tokens.weight.device
            with side_by_side() if there.type == "cpu" else nullcontext(map) as each:
                materials.closed = True
                list(each(one, ours))
                materials.closed = False
        for c in missing():
            one(c)
        if whole:
            materials.forget(l)
            _malloc_trim()(0)
        return bool(missing())

    with tqdm(
        total=len(layers or range(materials.n_layers)) * len(chosen), desc="bases", disable=not (progress and chosen)
    ) as bar:
        try:
            if whole:
                materials.visit = partial(at, last=False)
            for l in range(materials.n_layers):
                at(l, last=True)
        finally:
            if whole:
                materials.visit, materials.closed = None, False
    return {name: [by_layer[l] for l in range(materials.n_layers)] for name, by_layer in bases.items()}


@cache
def _malloc_trim() -> Callable[[int], int]:
    """glibc's, which gives back what threads have freed and it kept (.5 GiB at d 1024); elsewhere nothing."""
    with suppress(OSError, AttributeError, TypeError):
        return ctypes.CDLL(None).malloc_trim
    return lambda _: 0
