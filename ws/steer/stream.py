"""Activation steering: `h_l + alpha v` at every position, h_l what block l gives to the residual stream. (docs/method.md
section 8)"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from ws.model.guard import mark
from ws.model.lm import LM


@contextmanager
def pushed(lm: LM, l: int, v: Float[Tensor, " d"], alpha: float) -> Iterator[None]:
    """A context in which block l's output is `h + alpha v` at every position, in generation too; computed in float32 and
    rounded once. On exit, by any road, the hook is gone. ValueError for a layer that is none and a vector that is not finite.
    """
    if not 0 <= l < lm.decoder.n_layers:
        raise ValueError(f"layer {l}: {lm.name} has layers 0 to {lm.decoder.n_layers - 1}")
    if not bool(torch.isfinite(v).all()):
        raise ValueError(f"the vector for layer {l} is not finite")
    block, step = lm.decoder.blocks[l], alpha * v.float()

    def add(_module, _inputs, output):
        h, *rest = output if isinstance(output, tuple) else (output,)
        moved = (h.float() + step.to(h.device)).to(h.dtype)
        return (moved, *rest) if isinstance(output, tuple) else moved

    handle = block.register_forward_hook(add)
    mark(block, +1)
    try:
        yield
    finally:
        handle.remove()
        mark(block, -1)
