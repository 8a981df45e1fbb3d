"""The candidate subspaces: one registry, filled by importing the four modules that define them."""

from collections.abc import Iterator

from tqdm import tqdm

from ws.subspaces import ceilings, compound, from_activations, from_weights  # noqa: F401  (importing registers)
from ws.subspaces.algebra import Basis, check_basis
from ws.subspaces.candidate import Candidate, get, registered
from ws.subspaces.materials import CeilingMaterials, Materials

__all__ = ["Candidate", "CeilingMaterials", "Materials", "build", "get", "registered"]


def build(
    materials: Materials | CeilingMaterials, candidates: list[Candidate], progress: bool = True
) -> dict[str, list[Basis]]:
    """Bases of the candidates by name, one per layer, each checked as it is made (`ws.subspaces.algebra.check_basis`).

    Layers are the outer loop, so that a layer's weights and Grams are read once. Raises ValueError naming candidate and
    layer when a basis is malformed.
    """
    bases: dict[str, list[Basis]] = {c.name: [] for c in candidates}
    for name, l, basis in _built(materials, candidates, progress):
        check_basis(basis, materials.d, f"{name} at layer {l}")
        bases[name].append(basis)
    return bases


def _built(materials, candidates: list[Candidate], progress: bool) -> Iterator[tuple[str, int, Basis]]:
    shared = {
        c.name: c.build(materials)
        for c in tqdm([c for c in candidates if c.shared], "shared bases", disable=not progress)
    }
    for l in tqdm(range(materials.n_layers), "bases by layer", disable=not progress):
        for c in candidates:
            yield (
                c.name,
                l,
                shared[c.name]
                if c.shared
                else materials.of(c.name, l)
                if isinstance(materials, Materials)
                else c.build(materials, l),
            )
