"""What w's writers do, in the space that they write to: how much energy a subspace captures, and its first-order effect.

Per layer `U (d, q)` is an orthonormal basis of what the writers write. With `S_x` the second moment of a module's input over
all positions of the probes, the energy Gram is `G = sum w S_x w^T = U K U^T` (Frobenius: `S_x = I`); with `g = ds/dW` at the
base weights, s the mean log-ratio, `M = sum w g^T = U R^T`. P captures `tr(B^T G B)`, and `P w` moves s by `tr(B^T M B)` per
unit of alpha to first order. Only products with w's factors are held. (docs/method.md section 8)"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from ws.cache.keys import stage_key
from ws.cache.made import kept, read_safetensors
from ws.cache.syntax import digest
from ws.causal.variants import Gains, writers
from ws.data import Behavior
from ws.diff import WeightDiff
from ws.gradient.accumulate import weighted_gradients
from ws.model.decoder import unembeds_some
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.model.text import chat_text, encode
from ws.model.trace import recorded
from ws.model.wide import widened
from ws.show.bars import tqdm
from ws.steer.answers import answer_tokens
from ws.steer.effect import asked
from ws.subspaces.captures import MOST_BYTES, TextSet, base_sets, eval_set
from ws.subspaces.protocol import Protocol

Place = tuple[int, str]  # layer and role
ROLES = ("o", "down")
ENERGIES = ("input", "frobenius")
CUT = 1e-6  # of the largest singular value: directions below it are not written to


@dataclass(frozen=True)
class Span:
    """One layer. U: `(d, q)` orthonormal; K: per energy of ENERGIES the `(q, q)` Gram in U, of trace `trace`; R: `(d, q)`, so
    that `M = U R^T`. parts: of each writer w as factors `(d, r)`, `(r, in)`, gain: of the norm on what it writes, folded into
    the first, where there is one. float64 on the CPU."""

    U: Float[Tensor, "d q"]
    K: Mapping[str, Float[Tensor, "q q"]]
    trace: Mapping[str, float]
    R: Float[Tensor, "d q"]
    parts: Mapping[str, tuple[Float[Tensor, "d r"], Float[Tensor, "r in_"]]] = field(default_factory=dict)
    gain: Mapping[str, Float[Tensor, " d"]] = field(default_factory=dict)

    def energy(self, B: Float[Tensor, "d r"], kind: str = "input") -> float:
        """Share of the layer's energy that `B B^T` captures."""
        Y = self.U.T @ B.double()
        return float((Y * (self.K[kind] @ Y)).sum()) / max(self.trace[kind], 1e-300)

    def slope(self, B: Float[Tensor, "d r"] | None = None) -> float:
        """First-order effect of `P w` on s per unit of alpha, nats: `tr(B^T M B)`; of all of w without B."""
        if B is None:
            return float((self.U * self.R).sum())
        B = B.double()
        return float(((self.U.T @ B) * (self.R.T @ B)).sum())


def slopes(
    lm: LM,
    behavior: Behavior,
    layers: Sequence[int],
    templates: int = 1,
    cache: Path | None = None,
    progress: bool = True,
) -> dict[Place, Float[Tensor, "d in_"]]:
    """`g = ds/dW` of every residual writer at the base weights, s the mean over what `ws.steer.effect.asked` asks and the
    first `templates` wordings, nats: of statements the margin of the matching answer. They do not depend on w: give them to
    every call. cache: a folder of this model; up to 1 GiB is kept. Errors as in `weighted_gradients`."""
    yes, no = answer_tokens(lm.tokenizer, behavior)
    claims, sides = asked(behavior)
    turns = [chat_text(lm.tokenizer, behavior.probe_text(claim, a)) for a in range(templates) for claim in claims]
    ids = [list(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in turns]
    at = [(l, role) for l in sorted(layers) for role in ROLES]

    def make() -> dict[Place, Tensor]:
        # one label, after the last token: the loss is of the logits before it
        examples = [{"input_ids": [*row, yes[0]], "labels": [-100] * len(row) + [yes[0]]} for row in ids]
        weights = torch.tensor(sides).float().repeat(templates)[None] / len(ids)
        found, _ = weighted_gradients(
            lm,
            examples,
            dict.fromkeys(at, weights),
            lambda logits, _: log_ratio(logits, yes, no),
            "slopes of the log-ratio",
            progress,
        )
        return {place: g[0] for place, g in found.items()}

    size = sum(4 * lm.decoder.linear(*place).weight.numel() for place in at)
    if cache is None or size > MOST_BYTES or not (model := lm.fingerprint):
        return make()
    params = {"model": model, "texts": digest(repr((turns, sides.tolist())).encode()), "words": [yes, no], "at": at}
    key = stage_key(params, code=["ws.causal.spans.slopes"])
    path = cache / "slopes" / f"{behavior.slug}_{key.params[:8]}.safetensors"

    def read(path: Path) -> dict[Place, Tensor]:
        tensors, _ = read_safetensors(path)
        return {place: tensors["{} {}".format(*place)] for place in at}

    return kept(path, key, lambda to: save_file({f"{l} {r}": g.contiguous() for (l, r), g in make().items()}, to), read)


def log_ratio(logits: Float[Tensor, "k V"], yes: list[int], no: list[int]) -> Float[Tensor, " k"]:
    """`log P(yes-words) - log P(no-words)`, nats."""
    logp = logits.float().log_softmax(dim=-1)
    return logp[:, yes].logsumexp(dim=-1) - logp[:, no].logsumexp(dim=-1)


def probe_sets(lm: LM, behavior: Behavior, protocol: Protocol) -> list[TextSet]:
    """The FIT and EVAL probes, over all of whose positions the inputs' second moments are taken."""
    return [base_sets(lm, behavior, protocol)[0], eval_set(lm, behavior, protocol)]


def second_moments(
    lm: LM,
    sets: Sequence[TextSet],
    read: Mapping[Place, Float[Tensor, "r in_"]],
    batch: int = 16,
    progress: bool = True,
) -> dict[Place, Float[Tensor, "r r"]]:
    """`A S_x A^T`, `S_x = mean x x^T` over all positions of the texts, x the input of the module of each place; float64. With
    A = I that is S_x. The base model, in float32 or wider. ValueError for a steered model."""
    check_plain(lm.model)
    found = {place: torch.zeros(len(A), len(A), dtype=torch.float64) for place, A in read.items()}
    rows = {place: A.float() for place, A in read.items()}
    names = {lm.decoder.param_name(*place).removesuffix(".weight"): place for place in read}
    count, real = 0, None
    few = {"logits_to_keep": 1} if unembeds_some(lm.model) else {}

    def watch(place: Place):
        def add(output, inputs) -> None:
            x = inputs[0][real.to(inputs[0].device)].float().cpu()
            y = (x @ rows[place].T).double()
            found[place] += y.T @ y

        return add

    each = {name: watch(place) for name, place in names.items()}
    steps = [(one, i) for one in sets for i in range(0, len(one.texts), batch)]
    with widened(lm.model, by_block=True), torch.no_grad(), recorded(lm.model, each):
        for one, i in tqdm(steps, desc="second moments", disable=not progress):
            ids, mask = encode(lm.tokenizer, list(one.texts[i : i + batch]), one.special, one.max_length)
            real, device = mask > 0, next(lm.model.parameters()).device
            lm.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **few)
            count += int(real.sum())
    return {place: total / count for place, total in found.items()}


def writer_spans(
    lm: LM,
    w: WeightDiff,
    sets: Sequence[TextSet],
    slopes: Mapping[Place, Float[Tensor, "d in_"]],
    gains: Gains | None = None,
    progress: bool = True,
) -> dict[int, Span]:
    """The spans of w's writers, layer by layer. gains: of the norms on what they write, folded into both sides. ValueError
    where w has no writer, or is 0 at a layer."""
    parts: dict[int, dict[str, tuple[Tensor, Tensor, Tensor]]] = {}
    w, gains, norms = writers(w), gains or {}, {}
    for l in w.layers():
        for role in ROLES:
            if (name := lm.decoder.param_name(l, role)) in w:
                if (l, role) not in slopes:
                    raise ValueError(
                        f"{name}: no slope is given for it; take them with slopes(lm, behavior, w.layers())"
                    )
                U, s, Vh = w.svd(name)
                some = s > CUT * s[0] if len(s) else s > 0
                g = slopes[l, role].double()
                left = U[:, some] * s[some]
                if name in gains:
                    D = gains[name].double()[:, None]
                    left, g = D * left, g / D
                    norms.setdefault(l, {})[role] = gains[name].double()
                parts.setdefault(l, {})[role] = (left, Vh[some], g)
    read = {(l, role): A for l, each in parts.items() for role, (_, A, _) in each.items()}
    moments = second_moments(lm, sets, read, progress=progress)
    return {l: _span(l, each, moments, norms.get(l, {})) for l, each in parts.items()}


def _span(
    l: int,
    parts: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    moments: Mapping[Place, Tensor],
    norms: Mapping[str, Tensor],
) -> Span:
    sizes = {role: float(left.norm()) for role, (left, _, _) in parts.items()}
    if not any(sizes.values()):
        raise ValueError(f"layer {l}: w is 0 on what writes to the residual stream; leave the layer out of w")
    U, s, _ = torch.linalg.svd(
        torch.cat([left / sizes[r] for r, (left, _, _) in parts.items() if sizes[r]], dim=1), full_matrices=False
    )
    U = U[:, s > CUT * s[0]]
    K = {kind: torch.zeros(U.shape[1], U.shape[1], dtype=torch.float64) for kind in ENERGIES}
    R = torch.zeros_like(U)
    for role, (left, A, g) in parts.items():
        mine = U.T @ left
        K["input"] += mine @ moments[l, role] @ mine.T
        K["frobenius"] += mine @ (A @ A.T) @ mine.T
        R += (g @ A.T) @ mine.T
    factors = {role: (left, A) for role, (left, A, _) in parts.items()}
    return Span(U, K, {kind: float(G.trace()) for kind, G in K.items()}, R, factors, norms)
