"""The B-side: what w does to a behaviour's probes, and what the ceilings alone are built from.

Differences are `H(w, +1) - H(w, -1)`, cumulative and block by block. (docs/method.md sections 3 and 7)
"""

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from ws.cache.keys import stage_key
from ws.cache.made import kept, read_safetensors
from ws.data import Behavior
from ws.diff import WeightDiff
from ws.model.lm import LM, Decoder
from ws.steer.weights import weight_steer
from ws.subspaces.algebra import Basis
from ws.subspaces.candidate import Candidate
from ws.subspaces.captures import TextSet, probe_set, probes
from ws.subspaces.check import as_basis
from ws.subspaces.materials import check_widths, output_gain
from ws.subspaces.protocol import Protocol
from ws.subspaces.reading import read_texts


@dataclass(frozen=True)
class SteeredDiffs:
    """B-side differences `H(w, +1) - H(w, -1)`: on EVAL (`eval`), on FIT (`fit`), and what each block adds to them."""

    eval: Float[Tensor, "L n d"]
    fit: Float[Tensor, "L m d"]
    eval_block: Float[Tensor, "L n d"]


def capture_steered(
    lm: LM, behavior: Behavior, w: WeightDiff, protocol: Protocol, batch_size: int = 16, cache: Path | None = None
) -> SteeredDiffs:
    """The B-side: EVAL and FIT probes at alpha +1 and -1, four forward passes.

    Kept in the folder `cache` under the model, w's content and the token ids: protocols that split and render the
    probes alike share them.
    """
    split = probes(behavior, protocol)
    sets = [probe_set(lm, behavior, getattr(split, name), protocol, name) for name in ("eval", "fit")]

    def make(path: Path) -> None:
        save_file({n: x.contiguous() for n, x in vars(_steer(lm, w, *sets, batch_size)).items()}, path)

    if cache is None or not lm.fingerprint:
        return _steer(lm, w, *sets, batch_size)
    params = {"model": lm.fingerprint, "w": w.fingerprint, "tokens": [s.content(lm) for s in sets]}
    key = stage_key(params, code=["ws.subspaces.steered._steer"])
    path = cache / "captures" / f"steered_{key.params[:8]}.safetensors"
    return kept(path, key, make, lambda target: SteeredDiffs(**read_safetensors(target)[0]))


def _steer(lm: LM, w: WeightDiff, on_eval: TextSet, on_fit: TextSet, batch_size: int) -> SteeredDiffs:
    runs = {}
    for sign in (1.0, -1.0):
        with weight_steer(lm.model, w, sign):
            for name, texts in (("eval", on_eval), ("fit", on_fit)):
                label = f"{name} at alpha {sign:+.0f}"
                runs[name, sign] = read_texts(lm, list(texts.texts), texts.special, False, batch_size, label=label)
    plus, minus = runs["eval", 1.0], runs["eval", -1.0]
    return SteeredDiffs(
        eval=plus.resid - minus.resid,
        fit=runs["fit", 1.0].resid - runs["fit", -1.0].resid,
        eval_block=plus.block - minus.block,
    )


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
