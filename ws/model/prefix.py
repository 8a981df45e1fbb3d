"""Logits where they are wanted: nothing else is unembedded, and what all texts of a batch begin with is read once.

Causal attention makes what a model computes of a token depend on the tokens before it alone. So shared ones (a chat template's
system prompt, its answered turn, the probe) go through it as one text, and their keys and values serve every text of the batch:
the same function in other sums, gradients included.
"""

from jaxtyping import Float, Int
from torch import Tensor, nn

from ws.model.guard import hooked
from ws.model.text import position_ids

LEAST = 16  # tokens; what is saved by fewer is not worth a second pass


def shared(ids: Int[Tensor, "n T"], mask: Int[Tensor, "n T"], at: Int[Tensor, " k"]) -> int:
    """How many tokens all texts begin with, before the first position of which logits are wanted; 0 for fewer than LEAST, for
    one text, and with padding on the left."""
    if len(ids) < 2 or not len(at):
        return 0
    alike = ((ids == ids[:1]) & (mask != 0)).all(dim=0)
    most = min(int(at.min()), int(alike.int().cumprod(dim=0).sum()))
    return most if most >= LEAST else 0


def reads_each(model: nn.Module) -> bool:
    """Whether no two texts may share a pass: somebody's hook may count tokens from the end, and dropout draws for each."""
    units = (m.p if isinstance(m, nn.Dropout) else getattr(m, "attention_dropout", 0.0) for m in model.modules())
    return hooked(model) or model.training and any(units)


def logits_at(
    model: nn.Module, ids: Int[Tensor, "n T"], mask: Int[Tensor, "n T"], rows: Int[Tensor, " k"], at: Int[Tensor, " k"]
) -> Float[Tensor, "k V"]:
    """Logits at position `at` of text `rows`, for each k, with positions that count from each text's first token."""
    device, first = next(model.parameters()).device, 0 if reads_each(model) else shared(ids, mask, at)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
    inputs = {name: x.to(device) for name, x in inputs.items()}
    if first:
        lead = {name: x[:1, :first] for name, x in inputs.items()}
        with _unembedding(model, at[:1] * 0, at[:1] * 0):
            cache = model(**lead, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(ids))
        inputs |= {name: inputs[name][:, first:] for name in ("input_ids", "position_ids")} | {"past_key_values": cache}
    with _unembedding(model, rows, at - first):
        return model(**inputs, use_cache=bool(first)).logits[0]


def _unembedding(model: nn.Module, rows: Tensor, at: Tensor):
    """A context in which the unembedding meets the states `(n, T, d)` of these places alone, as `(1, k, d)`."""
    head = model.get_output_embeddings()
    return head.register_forward_pre_hook(lambda _, states: (states[0][rows, at][None],))
