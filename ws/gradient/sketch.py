"""Per-text gradients as sketches that keep inner products: what sets of texts have in common, over any number of splits.

Of the gradient `sum_t delta_t x_t^T` of a matrix is kept `P (.) Q^T`, P and Q seeded with orthonormal rows and scaled so that
inner products are right in the mean (a random projection on both sides). Sums over any set of texts, shuffled labels and
splits by topic and wording then cost no pass through the model. (docs/method.md section 12)
"""

import zlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ws.diff import LowRank, WeightDiff
from ws.gradient.accumulate import Example, each_gradient
from ws.model.lm import LM

SIZE = 32  # rows of P and of Q
Target = tuple[int, str]


def projection(name: str, n: int, size: int = SIZE) -> Float[Tensor, "m n"]:
    """`min(size, n)` orthonormal rows times `sqrt(n / m)`, drawn with a seed that depends on the name alone."""
    m = min(size, n)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.linalg.qr(torch.randn(n, m, generator=generator)).Q.T * (n / m) ** 0.5


def text_sketches(
    lm: LM,
    examples: Sequence[Example],
    targets: Sequence[Target],
    also: Callable | None = None,
    label: str = "gradients",
    progress: bool = True,
) -> tuple[dict[Target, Float[Tensor, "n m"]], Float[Tensor, " n"]]:
    """The sketch of every text's gradient by target `(layer, role)`, flattened; and the texts' losses, summed over labels.
    also: what else is done with what `each_gradient` hands over."""
    found: dict[Target, Tensor] = {}

    def use(places: list[int], one: Target, x: Tensor, delta: Tensor) -> None:
        P, Q = _pair(one, delta.shape[-1], x.shape[-1])
        made = torch.einsum("ntp,ntq->npq", delta @ P.T.to(delta.device), x @ Q.T.to(x.device)).flatten(1).cpu()
        if one not in found:
            found[one] = torch.zeros(len(examples), made.shape[1])
        found[one][places] = made
        if also:
            also(places, one, x, delta)

    losses = each_gradient(lm, examples, targets, use, label=label, progress=progress)
    return found, losses


def diff_sketch(lm: LM, w: WeightDiff, targets: Sequence[Target]) -> dict[Target, Float[Tensor, " m"]]:
    """The same of a weight difference; zeros where it has no such matrix."""
    found = {}
    for one in targets:
        name = lm.decoder.param_name(*one)
        P, Q = _pair(one, *lm.decoder.linear(*one).weight.shape)
        entry = w.entries.get(name)
        if entry is None:
            found[one] = torch.zeros(len(P) * len(Q))
        elif isinstance(entry, LowRank):
            found[one] = ((P @ entry.B.float()) @ (entry.A.float() @ Q.T)).flatten()
        else:
            found[one] = (P @ entry.float() @ Q.T).flatten()
    return found


def _pair(one: Target, out: int, inner: int) -> tuple[Tensor, Tensor]:
    return projection(f"left {one}", out), projection(f"right {one}", inner)
