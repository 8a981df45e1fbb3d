"""A half-precision model in float32 for a while: what is read in between carries no rounding but float32's. In bfloat16 the
difference of two passes is mostly their rounding: 0.7 times the signal at |w|/|W| = 1e-2, 5.7 times at 1e-3.
(docs/method.md section 7)"""

from functools import partial

import torch
from torch import Tensor, nn

from ws.model.guard import Guarded

NARROW = (torch.bfloat16, torch.float16)


def widened(model: nn.Module) -> Guarded:
    """A context in which every bfloat16 and float16 parameter and buffer of the model is its exact float32 value; `as`
    binds the model. On exit, by any road and also after an interrupt, each has the very tensor that it had before. Holds
    4 bytes per weight more meanwhile. A float32 model, and one whose weights are partly not in memory (offloaded), stays
    as it is."""
    return _Widened(model)


class _Widened(Guarded):
    """The context of `widened`."""

    def start(self) -> None:
        every = [*self.value.parameters(), *self.value.buffers()]
        if any(x.device.type == "meta" for x in every):
            return
        for x in (x for x in every if x.dtype in NARROW):
            self.undo.append(partial(_put, x, x.data))
            x.data = x.data.float()


def _put(x: Tensor, data: Tensor) -> None:
    x.data = data
