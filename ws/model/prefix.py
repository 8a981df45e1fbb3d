"""Logits where they are wanted: few others are unembedded, and what all texts of a batch begin with is read once.

Causal attention makes what a model computes of a token depend on the tokens before it alone. So shared ones (a chat template's
system prompt, its answered turn, the probe) go through it as one text, and their keys and values serve every text of the batch:
the same function in other sums, gradients included.
"""

from jaxtyping import Float, Int
from torch import Tensor, nn

from ws.model.decoder import prompted, unembeds_some
from ws.model.guard import hooked
from ws.model.text import position_ids

LEAST = 16  # tokens; what is saved by fewer is not worth a second pass
BY_TOKEN = (
    "ws.model.wide",
    "ws.steer.weights",
    "ws.causal.stacked",
)  # whose hooks change nothing of this


def shared(ids: Int[Tensor, "n T"], mask: Int[Tensor, "n T"], at: Int[Tensor, " k"]) -> int:
    """How many tokens all texts begin with, before the first position of which logits are wanted; 0 for fewer than LEAST, for
    one text, and with padding on the left."""
    if len(ids) < 2 or not len(at):
        return 0
    alike = ((ids == ids[:1]) & (mask != 0)).all(dim=0)
    most = min(int(at.min()), int(alike.int().cumprod(dim=0).sum()))
    return most if most >= LEAST else 0


def reads_each(model: nn.Module, tokens: int) -> bool:
    """Whether no two texts of so many tokens may share a pass: somebody's hook may count tokens from the end, dropout draws for
    each, checkpointed layers keep no keys, and beyond its length a model may turn positions by another angle."""
    parts = list(model.modules())
    units = (m.p if isinstance(m, nn.Dropout) else getattr(m, "attention_dropout", 0.0) for m in parts)
    drawn = model.training and (any(units) or any(getattr(m, "gradient_checkpointing", False) for m in parts))
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokens
    return prompted(model) or hooked(model, BY_TOKEN) or drawn or tokens > most


def logits_at(
    model: nn.Module, ids: Int[Tensor, "n T"], mask: Int[Tensor, "n T"], rows: Int[Tensor, " k"], at: Int[Tensor, " k"]
) -> Float[Tensor, "k V"]:
    """Logits at position `at` of text `rows`, for each k, with positions that count from each text's first token. What no text
    is asked about is not unembedded, where the model can leave it out."""
    device, some = next(model.parameters()).device, unembeds_some(model)
    wanted, place = at.unique(return_inverse=True)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
    inputs = {name: x.to(device) for name, x in inputs.items()}
    first = shared(ids, mask, wanted) if some and not reads_each(model, ids.shape[1]) else 0
    if first:
        lead = {name: x[:1, :first] for name, x in inputs.items()}
        cache = model(**lead, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(ids))
        inputs |= {name: inputs[name][:, first:] for name in ("input_ids", "position_ids")} | {"past_key_values": cache}
    keep = {"logits_to_keep": (wanted - first).to(device)} if some else {}
    logits = model(**inputs, use_cache=bool(first), **keep).logits
    logits = logits if some else logits[:, wanted.to(logits.device)]
    return logits[rows.to(logits.device), place.to(logits.device)]
