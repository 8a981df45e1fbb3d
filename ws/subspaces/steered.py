"""The B-side: what w does to a behaviour's probes, and what the ceilings alone are built from. (sections 3 and 7)"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from ws.cache.keys import stage_key
from ws.cache.made import kept, read_safetensors
from ws.data import Behavior
from ws.diff import WeightDiff
from ws.model.decoder import Decoder, unembeds_some
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.model.together import Once
from ws.model.wide import widened
from ws.steer.answers import ENDS, Known, answer_tokens, into
from ws.steer.weights import untouched, weight_steer
from ws.subspaces.algebra import Basis, empty, left_svd
from ws.subspaces.candidate import Candidate
from ws.subspaces.captures import TextSet, count_cut, eval_set, probe_set, probes
from ws.subspaces.check import as_basis
from ws.subspaces.grams import has_output_gains, output_gain
from ws.subspaces.materials import check_widths
from ws.subspaces.protocol import Protocol
from ws.subspaces.reading import TextActs, read_texts


@dataclass(frozen=True)
class SteeredDiffs:
    """B-side differences `H(w, +1) - H(w, -1)`: on EVAL at the last token (`eval`, `n` = wordings x topics, wording after
    wording) and in the mean over the claim's tokens (`claim`, where the protocol reads them), on FIT (`fit`, None where it
    was not asked for), and what each block adds at the last token. answers: log-ratio and pmass of
    each EVAL probe at both ENDS, None where the probes are not asked as questions are."""

    eval: Float[Tensor, "L n d"]
    fit: Float[Tensor, "L m d"] | None
    eval_block: Float[Tensor, "L n d"]
    claim: Float[Tensor, "L n d"] | None = None
    answers: Float[Tensor, "2 2 n"] | None = None


def capture_steered(
    lm: LM, behavior: Behavior, w: WeightDiff, protocol: Protocol, cache: Path | None = None, fit: bool = True
) -> SteeredDiffs:
    """The B-side: EVAL and FIT probes at alpha +1 and -1. fit: whether FIT is read too, which only ceilings need. Kept in
    the folder `cache` under the model, w's content, the token ids and the places of the claims: protocols that split and
    render the probes alike share them. ValueError naming a claim whose text is cut or whose tokens cannot be found."""
    check_plain(lm.model)
    sets = [eval_set(lm, behavior, protocol)]
    sets += [probe_set(lm, behavior, probes(behavior, protocol).fit, protocol, "fit")] if fit else []
    whole, words = not count_cut(lm, sets, protocol), None
    if whole and protocol.chat_probes and unembeds_some(lm.model):
        with suppress(ValueError):  # is for those who ask for answers
            words = answer_tokens(lm.tokenizer, behavior)

    def make(path: Path) -> None:
        found = vars(_steer(lm, w, words, *sets))
        save_file({n: x.contiguous() for n, x in found.items() if x is not None}, path)

    def read(path: Path) -> SteeredDiffs:
        return SteeredDiffs(**{"fit": None} | read_safetensors(path)[0])

    if cache is None or not (model := lm.fingerprint):
        return _steer(lm, w, words, *sets)
    params = {"model": model, "w": w.fingerprint, "tokens": [s.content(lm) for s in sets]}
    params |= {"claims": sets[0].claim_tokens(lm), "words": words}
    key = stage_key(params, code=["ws.subspaces.steered._steer"])
    path = cache / "captures" / f"steered_{key.params[:8]}.safetensors"
    return kept(path, key, make, read)


def _steer(lm: LM, w: WeightDiff, words: tuple[list[int], list[int]] | None, *sets: TextSet) -> SteeredDiffs:
    once = Once(lm.model, untouched(w, lm.decoder.n_layers))
    answers = torch.zeros(len(ENDS), 2, len(sets[0].texts)) if words else None

    def read(end: int) -> list[TextActs]:
        found, alpha = [], ENDS[end]
        with weight_steer(lm.model, w, alpha), once:
            for s in sets:
                more = {"max_length": s.max_length, "mean_of": s.claim_tokens(lm)}
                more |= {"answers": into(answers[end], *words)} if words and s is sets[0] else {}
                found.append(read_texts(lm, list(s.texts), s.special, label=f"{s.label} at alpha {alpha:+.0f}", **more))
        return found

    with widened(lm.model, by_block=w.in_blocks):
        (plus, *plus_fit), (minus, *minus_fit) = read(0), read(1)
    return SteeredDiffs(
        eval=plus.resid - minus.resid,
        fit=plus_fit[0].resid - minus_fit[0].resid if plus_fit else None,
        eval_block=plus.block - minus.block,
        claim=None if plus.claim is None else plus.claim - minus.claim,
        answers=answers,
    )


def known_answers(lm: LM, behavior: Behavior, protocol: Protocol, steered: SteeredDiffs) -> Known:
    """The answers of the EVAL probes, as `ws.steer.effect.effects` takes them."""
    if steered.answers is None:
        return {}
    texts, ends = eval_set(lm, behavior, protocol).texts, steered.answers.mT.tolist()
    return {alpha: dict(zip(texts, end, strict=True)) for alpha, end in zip(ENDS, ends, strict=True)}


class CeilingMaterials:
    """What only the ceilings may see: the weight diff and the steered differences."""

    def __init__(self, decoder: Decoder, w: WeightDiff, steered: SteeredDiffs, k: int = 8, fold_gain: bool = False):
        check_widths(k, 1, decoder.d)
        self.decoder, self.w, self.steered, self.k = decoder, w, steered, k
        self.d, self.n_layers = decoder.d, decoder.n_layers
        self._fold, self._own = fold_gain and has_output_gains(decoder), {}

    def __repr__(self) -> str:
        return f"CeilingMaterials({self.n_layers} layers, d {self.d}, k {self.k}; w and what it does)"

    def left_factor(self, l: int, role: str) -> Float[Tensor, "d r"] | None:
        """`F = U S` with `F F^T = M M^T` for w's matrix of `role` (`o` or `down`), float64; None where w has none."""
        name = self.decoder.param_name(l, role)
        if name not in self.w.entries:
            return None
        U, s, _ = self.w.svd(name)
        F = U * s
        return output_gain(self.decoder, l, role).double()[:, None] * F if self._fold else F

    def of_w(self, what: str, l: int, make: Callable[[Tensor | None, Tensor | None], object]) -> object:
        """What is made of w's left factors of both writers at a layer, once for each w (and model, where gains are folded in)."""
        held, key = self._own if self._fold else self.w.derived, (what, l, self.k)
        if key not in held:
            held[key] = make(self.left_factor(l, "o"), self.left_factor(l, "down"))
        return held[key]

    def dw_left(self, l: int) -> Basis:
        """Top k left singular vectors of w's matrices of both writers, side by side as they are."""

        def make(*factors: Tensor | None) -> Basis:
            some = [F for F in factors if F is not None]
            nothing = empty(self.d, "w has no residual writer at this layer")
            return left_svd(torch.cat(some, dim=1), self.k) if some else nothing

        return self.of_w("dw_left", l, make)

    def build(self, entry: Candidate, l: int) -> Basis:
        """A ceiling's basis at layer l."""
        return as_basis(entry.build(self, l), self.d, f"{entry.name} at layer {l}")
