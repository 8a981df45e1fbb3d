"""One forward pass that hands out what each block adds to the residual stream, block by block."""

from collections.abc import Callable

import torch
from torch import Tensor

from ws.delta.calibration import Sequence, padded
from ws.model.lm import LM
from ws.model.trace import hidden, recorded

Visit = Callable[[int, Tensor, Tensor, Tensor], None]


def read_deltas(lm: LM, batch: list[Sequence], final_norm: bool, visit: Visit) -> None:
    """One pass; `visit(l, delta (N, d), h (N, d), group (N,))` at every block, float32, on the block's own device."""
    decoder = lm.decoder
    ids, mask, group = padded(batch)
    keep = mask.bool()
    keep[:, 0] = False

    def at_block(l: int):
        def record(output, inputs):
            after = hidden(output)
            if not inputs:
                raise ValueError(f"{decoder.prefix}.{l}: the block was not given its hidden states as first argument")
            if final_norm and l == decoder.n_layers - 1:
                after = decoder.final_norm(after)
            kept = keep.to(after.device)
            h = inputs[0].to(after.device)[kept].float()
            delta = after[kept].float() - h
            if not torch.isfinite(delta).all():
                dtype = str(after.dtype).removeprefix("torch.")
                raise ValueError(f"{decoder.prefix}.{l}: hidden states are not finite in {dtype}; try DTYPE float32")
            visit(l, delta, h, group[keep])

        return record

    # The decoder without its unembedding: logits of T x V would be the largest tensor of the pass.
    body = lm.model.get_submodule(decoder.prefix.rpartition(".")[0])
    at = {f"{decoder.prefix}.{l}": at_block(l) for l in range(decoder.n_layers)}
    with torch.no_grad(), recorded(lm.model, at):
        body(input_ids=ids.to(lm.device), attention_mask=mask.to(lm.device), use_cache=False)
