"""A causal language model's decoder read by role, whatever its family.

A decoder block adds to the residual stream: `h_{l+1} = h_l + o(attn(q, k, v)) + down(act(gate x) * (up x))`. `Decoder`
names the seven linear maps of that sum (`q k v o gate up down`), the norms around them and the unembedding, for every
architecture that keeps them as separate modules.
"""

from inspect import signature

import torch
from jaxtyping import Float
from torch import Tensor, nn

ROLES = {role: f"self_attn.{role}_proj" for role in "qkvo"} | {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}
FAMILIES = "Qwen2, Qwen3, Llama, Mistral, Gemma 1/2/3, OLMo 2"
SERVED = f"{FAMILIES} and others with separate q/k/v/o and gate/up/down projections"


def unembeds_some(model: nn.Module) -> bool:
    """Whether a model can be asked for the logits of some positions alone."""
    return "logits_to_keep" in signature(model.forward).parameters


def prompted(model: nn.Module) -> bool:
    """Whether learned tokens stand before every text, which the whole model alone puts there (peft)."""
    adapters = (getattr(model, "peft_config", None) or {}).values()
    return any(getattr(one, "is_prompt_learning", False) for one in adapters)


class Decoder:
    """A read-only view of a causal LM's decoder by role. Attributes: `n_layers` (L), `d` (d_model), `n_heads` (H), `n_kv` (K),
    `head_dim` (e), `vocab` (V), `body` (all but the unembedding), `blocks` (the ModuleList), `final_norm`, `embed_tokens`, `act`
    (the MLP's activation function). Raises ValueError naming the missing module when the architecture is not served."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.prefix, self.blocks = _find_blocks(model)
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self.body = body = model.get_submodule(self.prefix.rpartition(".")[0])
        self.n_layers, self.embed_tokens = len(self.blocks), model.get_input_embeddings()
        self.final_norm = getattr(body, "norm", None)
        if self.final_norm is None:
            raise ValueError(f"{type(model).__name__}: no final norm beside {self.prefix}; served are {SERVED}")
        self.d = self.embed_tokens.weight.shape[1]
        self.vocab = self.logits_module().weight.shape[0]
        self.n_heads = config.num_attention_heads
        self.n_kv = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.head_dim = self.linear(0, "o").weight.shape[1] // self.n_heads
        self.act = self.blocks[0].mlp.act_fn

    def linear(self, l: int, role: str) -> nn.Module:
        """The linear module of `role` in block `l`."""
        return self.blocks[l].get_submodule(ROLES[role])

    def param_name(self, l: int, role: str) -> str:
        """The weight's name in `model.named_parameters()`."""
        return f"{self.prefix}.{l}.{ROLES[role]}.weight"

    def weight(self, l: int, role: str) -> Float[Tensor, "out in_"]:
        """Weight of `role` in block `l`, float32, on its own device."""
        return self.linear(l, role).weight.detach().float()

    def logits_module(self) -> nn.Module:
        """The unembedding module (last hidden state after the final norm -> logits)."""
        module = self.model.get_output_embeddings()
        if module is None:
            raise ValueError(f"{type(self.model).__name__}: no unembedding (output embeddings); is it a causal LM?")
        return module

    def unembed(self) -> Float[Tensor, "V d"]:
        """The unembedding matrix, float32."""
        return self.logits_module().weight.detach().float()

    def unembed_bias(self) -> Tensor | None:
        """The unembedding's bias `(V,)`, float32, or None."""
        bias = getattr(self.logits_module(), "bias", None)
        return None if bias is None else bias.detach().float()

    def norm_gain(self, l: int, where: str) -> Float[Tensor, " d"]:
        """Effective gain of a block norm, float32; ones where the block has no such norm. `where`: `attn_in`, `mlp_in`
        (norm before the part), `attn_out`, `mlp_out` (norm of the part's output, Gemma 2/3 and OLMo 2). Read off the
        module itself: an RMS norm maps the all-ones vector to its gain, which is `1 + g` in Gemma, `g` elsewhere."""
        block = self.blocks[l]
        names = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm", "attn_out": "", "mlp_out": ""}
        if hasattr(block, "post_feedforward_layernorm"):
            names |= {"mlp_in": "pre_feedforward_layernorm", "mlp_out": "post_feedforward_layernorm"}
            names |= {"attn_out": "post_attention_layernorm"}
        norm = getattr(block, names[where], None)
        if norm is None:
            return torch.ones(self.d)
        with torch.no_grad():
            return norm(torch.ones(1, self.d, device=norm.weight.device))[0].float().cpu()

    def sink_token(self, tokenizer) -> int:
        """Token whose embedding stands for the attention sink: BOS, or EOS where there is no BOS."""
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError("the tokenizer has neither a BOS nor an EOS token")


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    found = [(n, m) for n, m in lists if all(hasattr(b, "self_attn") and hasattr(b, "mlp") for b in m)]
    missing = []
    for name, blocks in found:
        lacks = [path for path in ROLES.values() if not _has(blocks[0], path)]
        if not lacks and hasattr(blocks[0].mlp, "act_fn"):
            return name, blocks
        missing.append(f"{name}.0 lacks {', '.join(lacks) or 'mlp.act_fn'}")
    detail = "; ".join(missing) or "no list of blocks with self_attn and mlp was found"
    raise ValueError(f"{type(model).__name__}: {detail}; served are {SERVED}")


def _has(module: nn.Module, path: str) -> bool:
    try:
        return isinstance(getattr(module.get_submodule(path), "weight", None), Tensor)
    except AttributeError:
        return False
