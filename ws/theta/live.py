"""A theta head on a live model: the unembedding's input or output is edited, so generation and sweeps run with it.

    logits = base + gamma delta,    delta = W (h' - h), or alpha C (theta * A h) for an update of the unembedding

docs/method.md section 10.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ws.model.guard import mark
from ws.theta.heads import Head, LMHeadUpdate, Unconditional, at_least_float32, to_device


def check_plain_logits(model: nn.Module) -> nn.Module:
    """The unembedding module of a model whose logits are `W h + b` and nothing more. Raises ValueError when the model
    has no unembedding, caps its logits (Gemma 2) or rescales them (Cohere, Granite): there the logits are no affine
    function of theta, or of another size, and neither fit nor head means what it says."""
    name = type(model).__name__
    module = model.get_output_embeddings()
    if module is None:
        raise ValueError(f"{name}: no unembedding (output embeddings); theta heads need a causal LM")
    config = model.config.get_text_config()
    for does, field in ("caps", "final_logit_softcapping"), ("rescales", "logit_scale"), ("rescales", "logits_scaling"):
        value = getattr(config, field, None)
        if value is not None and not (does == "rescales" and value == 1):
            raise ValueError(f"{name}: it {does} its logits ({field} = {value}); theta heads need plain logits W h + b")
    return module


@contextmanager
def wear(model: nn.Module, head: Head, theta: Float[Tensor, "*rows D"], gamma: float = 1.0) -> Iterator[nn.Module]:
    """A head on a live model: inside, the logits are `base + gamma delta`, in every forward pass and in generation. theta:
    one, or one for each text of the batches that will be run. A
    hidden-state head edits the unembedding's input (`h + gamma (h' - h)`), an LM-head update its output. `theta = 0`
    hooks nothing, so it is bit-identical to no head; on exit, also by exception, the hook is gone. Computed in float32
    or better and rounded once. Raises ValueError when theta or the model's width does not fit the head, when theta is
    not finite, or when the model's logits are not `W h + b`."""
    module = check_plain_logits(model)
    V, d = module.weight.shape
    if theta.ndim not in (1, 2) or theta.shape[-1] != head.D:
        raise ValueError(
            f"head {head.name}: theta has shape {tuple(theta.shape)}, expected ({head.D},) or (texts, {head.D})"
        )
    if not bool(torch.isfinite(theta).all()):
        raise ValueError(f"head {head.name}: theta is not finite")
    width = head.U.shape[0] if isinstance(head, Unconditional) else head.A.shape[1]
    if width != d:
        raise ValueError(f"head {head.name}: made for hidden states of width {width}, the model's is {d}")
    if isinstance(head, LMHeadUpdate) and head.C.shape[0] != V:
        raise ValueError(f"head {head.name}: made for a vocabulary of {head.C.shape[0]}, the model has {V}")
    if gamma == 0 or not bool(theta.any()):
        yield model
        return
    placed = replace(to_device(head, module.weight.device), alpha=head.alpha * gamma)
    at = theta.to(module.weight.device)
    at = at[:, None] if at.ndim == 2 else at

    def edit_input(_module, args):
        _as_many(args[0])
        return (placed.apply(args[0], at), *args[1:])

    def _as_many(h: Tensor) -> None:
        if at.ndim == 3 and len(h) != len(at):
            raise ValueError(
                f"head {head.name}: {len(at)} thetas for a batch of {len(h)} texts; one for each is needed"
            )

    def edit_output(_module, args, output):
        _as_many(args[0])
        delta = placed.logit_delta(at_least_float32(args[0]), at, module.weight)
        return (at_least_float32(output) + delta).to(output.dtype)

    out = isinstance(head, LMHeadUpdate)
    handle = module.register_forward_hook(edit_output) if out else module.register_forward_pre_hook(edit_input)
    mark(module, +1)
    try:
        yield model
    finally:
        handle.remove()
        mark(module, -1)
