"""Candidates by protocol, and their bases built layer by layer."""

import importlib
from collections.abc import Sequence

from ws.show.bars import tqdm
from ws.subspaces.algebra import Basis
from ws.subspaces.candidate import Candidate, registered
from ws.subspaces.materials import Materials
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
    materials: Materials | CeilingMaterials, chosen: Sequence[Candidate], progress: bool = True
) -> dict[str, list[Basis]]:
    """Bases of the candidates by name, one per layer, each checked as it is made. Layers are the outer loop, so that a
    layer's weights and Grams are read once. Raises ValueError naming candidate and layer when a basis is malformed."""
    bases: dict[str, list[Basis]] = {c.name: [] for c in chosen}
    for l in tqdm(range(materials.n_layers), "bases by layer", disable=not (progress and chosen)):
        for c in chosen:
            bases[c.name].append(materials.build(c, l))
        if isinstance(materials, Materials):
            materials.forget(l)
    return bases
