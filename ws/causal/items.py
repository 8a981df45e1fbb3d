"""First-order effects text by text: what a subspace, and what its controls on average, do to each answer. (docs/method.md section 8)

With `R_i` the part of `M = U R^T` (see `ws.causal.spans`) that text i has, P moves its score by `tr(B^T U R_i^T B)` per unit of alpha.
A control `B'` is as likely as its mirror image in any eigenvector of the energy's Gram, which has the same energy: so
`E[B' B'^T]` is diagonal in these eigenvectors, and the controls' mean on text i is `sum_j E|B'^T u_j|^2 (U R_i^T)_jj`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ws.causal.controls import Layer
from ws.causal.passes import Items
from ws.causal.spans import ROLES, Place, Span, log_ratio
from ws.data import Behavior
from ws.gradient.accumulate import each_gradient
from ws.model.lm import LM
from ws.steer.answers import answer_tokens


@dataclass(frozen=True)
class ItemSlopes:
    """Per unit of alpha, nats: value: `(C, n)` of each candidate on each text; diagonal: layer -> `(q, n)`, of each eigenvector of
    the input-weighted energy's Gram."""

    value: Float[np.ndarray, "C n"]
    diagonal: Mapping[int, Float[np.ndarray, "q n"]]

    def control(self, share: Mapping[int, Float[np.ndarray, "C q"]]) -> Float[np.ndarray, "C n"]:
        """Mean over controls whose mean square overlaps with the eigenvectors are `share`."""
        return sum(share[l] @ of for l, of in self.diagonal.items())


def item_slopes(
    lm: LM,
    behavior: Behavior,
    items: Items,
    spans: Mapping[int, Span],
    bases: Sequence[Mapping[int, Float[Tensor, "d _"]]],
    progress: bool = True,
) -> ItemSlopes:
    """One backward pass over the texts. Errors as in `ws.gradient.accumulate.each_gradient`."""
    yes, no = answer_tokens(lm.tokenizer, behavior)
    ids = [list(row) for row in lm.tokenizer(list(items.turns), add_special_tokens=False)["input_ids"]]
    examples = [{"input_ids": [*row, yes[0]], "labels": [-100] * len(row) + [yes[0]]} for row in ids]
    layers = {l: Layer.of(span, "input") for l, span in spans.items()}
    wide = {l: [of[l].shape[1] for of in bases] for l in spans}
    all_ = {l: torch.cat([of[l].double() for of in bases], dim=1).float() if bases else None for l in spans}
    inside = {l: layers[l].U.float().T @ B for l, B in all_.items() if B is not None}
    value = torch.zeros(len(bases), len(ids), dtype=torch.float64)
    diagonal = {l: torch.zeros(len(one.v), len(ids), dtype=torch.float64) for l, one in layers.items()}

    def use(places: list[int], at: Place, x: Float[Tensor, "m T in_"], delta: Float[Tensor, "m T d"]) -> None:
        l, role = at
        span, one = spans[l], layers[l]
        left, read = (M.float() for M in span.parts[role])
        z = x.float().cpu() @ (one.U.T.float() @ left @ read).T  # what w's rows in the eigenbasis make of the input
        delta = delta.float().cpu()
        if span.gain.get(role) is not None:
            delta = delta / span.gain[role].float()
        diagonal[l][:, places] += torch.einsum("mtd,dq,mtq->qm", delta, one.U.float(), z).double()
        if bases:
            product = ((delta @ all_[l]) * (z @ inside[l])).sum(dim=1)  # (m, all columns)
            sums = torch.stack([part.sum(dim=1) for part in product.split(wide[l], dim=1)])
            value[:, places] += sums.double()

    targets = [(l, role) for l, span in spans.items() for role in ROLES if role in span.parts]
    each_gradient(lm, examples, targets, use, lambda logits, _: log_ratio(logits, yes, no), "slopes by text", progress)
    return ItemSlopes(value.numpy(), {l: of.numpy() for l, of in diagonal.items()})
