"""The B-side: what w does to a behaviour's probes, and what the ceilings alone are built from. (sections 3 and 7)"""

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from ws.cache.keys import stage_key
from ws.cache.made import kept, read_safetensors
from ws.data import Behavior
from ws.diff import WeightDiff
from ws.model.guard import check_plain
from ws.model.lm import LM, Decoder
from ws.model.wide import widened
from ws.steer.weights import weight_steer
from ws.subspaces.algebra import Basis
from ws.subspaces.candidate import Candidate
from ws.subspaces.captures import TextSet, probe_set, probes
from ws.subspaces.check import as_basis
from ws.subspaces.materials import check_widths, output_gain
from ws.subspaces.protocol import Protocol
from ws.subspaces.reading import TextActs, read_texts


@dataclass(frozen=True)
class SteeredDiffs:
    """B-side differences `H(w, +1) - H(w, -1)`: on EVAL (`eval`), on FIT (`fit`), and what each block adds to them."""

    eval: Float[Tensor, "L n d"]
    fit: Float[Tensor, "L m d"]
    eval_block: Float[Tensor, "L n d"]


def capture_steered(
    lm: LM, behavior: Behavior, w: WeightDiff, protocol: Protocol, cache: Path | None = None
) -> SteeredDiffs:
    """The B-side: EVAL and FIT probes at alpha +1 and -1, four forward passes. Kept in the folder `cache` under the
    model, w's content and the token ids: protocols that split and render the probes alike share them."""
    check_plain(lm.model)
    split = probes(behavior, protocol)
    sets = [probe_set(lm, behavior, getattr(split, name), protocol, name) for name in ("eval", "fit")]

    def make(path: Path) -> None:
        save_file({n: x.contiguous() for n, x in vars(_steer(lm, w, *sets)).items()}, path)

    if cache is None or not (model := lm.fingerprint):
        return _steer(lm, w, *sets)
    params = {"model": model, "w": w.fingerprint, "tokens": [s.content(lm) for s in sets]}
    key = stage_key(params, code=["ws.subspaces.steered._steer"])
    path = cache / "captures" / f"steered_{key.params[:8]}.safetensors"
    return kept(path, key, make, lambda target: SteeredDiffs(**read_safetensors(target)[0]))


def _steer(lm: LM, w: WeightDiff, *sets: TextSet) -> SteeredDiffs:
    def read(sign: float) -> list[TextActs]:
        label = f"at alpha {sign:+.0f}"
        with weight_steer(lm.model, w, sign):
            return [read_texts(lm, list(s.texts), s.special, label=f"{s.label} {label}") for s in sets]

    with widened(lm.model):
        (plus, plus_fit), (minus, minus_fit) = read(1.0), read(-1.0)
    return SteeredDiffs(plus.resid - minus.resid, plus_fit.resid - minus_fit.resid, plus.block - minus.block)


class CeilingMaterials:
    """What only the ceilings may see: the weight diff and the steered differences."""

    def __init__(self, decoder: Decoder, w: WeightDiff, steered: SteeredDiffs, k: int = 8, fold_gain: bool = False):
        check_widths(k, 1, decoder.d)
        self.decoder, self.w, self.steered, self.k = decoder, w, steered, k
        self.d, self.n_layers = decoder.d, decoder.n_layers
        self._fold = fold_gain

    def left_factor(self, l: int, role: str) -> Float[Tensor, "d r"] | None:
        """`F = U S` with `F F^T = M M^T` for w's matrix of `role` (`o` or `down`), float64; None where w has none."""
        name = self.decoder.param_name(l, role)
        if name not in self.w.entries:
            return None
        U, s, _ = self.w.svd(name)
        F = U * s
        return output_gain(self.decoder, l, role).double()[:, None] * F if self._fold else F

    def build(self, entry: Candidate, l: int) -> Basis:
        """A ceiling's basis at layer l."""
        return as_basis(entry.build(self, l), self.d, f"{entry.name} at layer {l}")
