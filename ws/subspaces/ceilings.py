"""The only candidates that see w: what a rank-8 subspace could explain if the answer were known. (sections 5 and 7)"""

from ws.subspaces.algebra import Basis, pca, uncentred
from ws.subspaces.candidate import candidate
from ws.subspaces.steered import CeilingMaterials


@candidate(name="TaskDiff_lora_ceiling", family="ceiling", source="B-side", sees=("w",))
def task_diff_lora(m: CeilingMaterials, l: int) -> Basis:
    """PCA of H(w, +1) - H(w, -1) on the FIT probes."""
    return pca(m.steered.fit[l], m.k)


@candidate(name="dW_left_basis_ceiling", family="ceiling", source="B-side", sees=("w",))
def dw_left_basis(m: CeilingMaterials, l: int) -> Basis:
    """Top 8 left singular vectors of [w_o|w_down], side by side as they are; empty where w has neither."""
    return m.dw_left(l)


@candidate(name="TaskDiff_lora_uncentred_ceiling", family="ceiling", source="v7b", sees=("w",))
def task_diff_lora_uncentred(m: CeilingMaterials, l: int) -> Basis:
    """Top 8 directions of the row-normalised H(w, +1) - H(w, -1) on the FIT probes, not centred. Mends
    TaskDiff_lora_ceiling, whose centring removes the mean difference."""
    return uncentred(m.steered.fit[l], m.k)
