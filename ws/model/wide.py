"""A half-precision model in float32 for a while: what is read in between carries no rounding but float32's. In bfloat16 the
difference of two passes is mostly their rounding: 0.7 times the signal at |w|/|W| = 1e-2, 5.7 times at 1e-3.
(docs/method.md section 7)"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ws.model.decoder import Decoder
from ws.model.guard import Guarded, compiled

NARROW = (torch.bfloat16, torch.float16)
ROWS = 16384  # of an unembedding that are wide at a time


def widened(model: nn.Module, by_block: bool = False) -> Guarded:
    """A context in which every bfloat16 and float16 parameter and buffer of the model is its exact float32 value; `as`
    binds the model. On exit, by any road and also after an interrupt, each has the very tensor that it had before. Holds
    4 bytes per weight more meanwhile. A float32 model, and one whose weights are partly not in memory (offloaded), stays
    as it is. by_block: for passes without gradients, a decoder's block is wide only while it runs, and of what
    embeds and unembeds the rows that are asked for, so that little of it is held at a time; the numbers are the same."""
    return _Widened(model, by_block)


class _Widened(Guarded):
    """The context of `widened`."""

    def __init__(self, model: nn.Module, by_block: bool):
        super().__init__(model)
        self.by_block = by_block

    def start(self) -> None:
        every = [*self.value.parameters(), *self.value.buffers()]
        if any(x.device.type == "meta" for x in every) or not any(x.dtype in NARROW for x in every):
            return
        later = self._turn_by_turn() if self.by_block and not compiled(self.value) else set()
        for x in (x for x in every if x.dtype in NARROW and id(x) not in later):
            self.undo.append(partial(_put, x, x.data))
            x.data = x.data.float()

    def _turn_by_turn(self) -> set[int]:
        """Hooks on what is wide only while it runs; the ids of its tensors."""
        decoder = Decoder(self.value)
        embeds, unembeds, parts = decoder.embed_tokens, decoder.logits_module(), [*decoder.blocks]
        if type(unembeds).forward is nn.Linear.forward and "forward" not in vars(unembeds):  # some rows after others
            self.undo.append(partial(vars(unembeds).pop, "forward", None))
            unembeds.forward = partial(_some_rows_at_a_time, unembeds)
        else:
            parts.append(unembeds)
        if type(embeds).forward is nn.Embedding.forward:  # what it looks up is widened, not all rows
            self.undo.append(embeds.register_forward_hook(lambda _module, _inputs, output: output.float()).remove)
        else:
            parts.append(embeds)
        for part in parts:
            turn = _Turn(part)
            self.undo.append(turn.over)
            self.undo.append(part.register_forward_pre_hook(turn.begin).remove)
            self.undo.append(part.register_forward_hook(turn.over, always_call=True).remove)
        return {id(x) for part in (*parts, embeds, unembeds) for x in (*part.parameters(), *part.buffers())}


def _some_rows_at_a_time(linear: nn.Linear, x: Tensor) -> Tensor:
    """What a linear map gives in float32, ROWS of its outputs after another."""
    rows = linear.weight.split(ROWS)
    biases = [None] * len(rows) if linear.bias is None else [b.float() for b in linear.bias.split(ROWS)]
    return torch.cat([F.linear(x.float(), W.float(), b) for W, b in zip(rows, biases, strict=True)], dim=-1)


class _Turn:
    """Widens a module when it begins to run and puts its tensors back when it is over; what is wide already stays."""

    def __init__(self, module: nn.Module):
        self.every = [*module.parameters(), *module.buffers()]
        self.before: list[tuple[Tensor, Tensor]] = []

    def begin(self, *_) -> None:
        for x in self.every:
            if x.dtype in NARROW:
                self.before.append((x, x.data))
                x.data = x.data.float()

    def over(self, *_) -> None:
        while self.before:
            x, data = self.before[-1]
            x.data = data
            self.before.pop()


def _put(x: Tensor, data: Tensor) -> None:
    x.data = data
