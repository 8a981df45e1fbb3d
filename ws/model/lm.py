"""Loading a causal language model and reading it by role, whatever its family.

A decoder block adds to the residual stream: `h_{l+1} = h_l + o(attn(q, k, v)) + down(act(gate x) * (up x))`. `Decoder`
names the seven linear maps of that sum (`q k v o gate up down`), the norms around them and the unembedding, for every
architecture that keeps them as separate modules.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ws.cache.names import folder_hash, model_slug
from ws.cache.places import ASSETS
from ws.model.text import position_ids
from ws.show.bars import plain

ROLES = {role: f"self_attn.{role}_proj" for role in "qkvo"} | {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}
FAMILIES = "Qwen2, Qwen3, Llama, Mistral, Gemma 1/2/3, OLMo 2"
SERVED = f"{FAMILIES} and others with separate q/k/v/o and gate/up/down projections"


class Decoder:
    """A read-only view of a causal LM's decoder by role. Attributes: `n_layers` (L), `d` (d_model), `n_heads` (H),
    `n_kv` (K), `head_dim` (e), `vocab` (V), `blocks` (the ModuleList), `final_norm`, `embed_tokens`, `act` (the MLP's
    activation function). Raises ValueError naming the missing module when the architecture is not served."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.prefix, self.blocks = _find_blocks(model)
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        body = model.get_submodule(self.prefix.rpartition(".")[0])
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


@dataclass(frozen=True)
class LM:
    """A loaded causal LM with its tokenizer, its `Decoder` view, its folder-safe name, and a fingerprint of its weights
    and dtype (the hub's commit, or a folder's content) for keys of what is computed from it; "" keeps nothing on disk.

    Example:
        >>> import ws
        >>> lm = ws.load_lm("tiny")
        >>> lm, lm.decoder.param_name(3, "o")
        (LM(tiny: Qwen3ForCausalLM, 8 layers, d 128, torch.float32), 'model.layers.3.self_attn.o_proj.weight')
    """

    model: nn.Module
    tokenizer: object
    decoder: Decoder
    name: str
    fingerprint: str = ""

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    def run(self, ids: Int[Tensor, "n T"], mask: Int[Tensor, "n T"], **more):
        """The model's output on encoded texts, with positions that count from each text's first token."""
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
        return self.model(**{name: x.to(self.device) for name, x in inputs.items()}, use_cache=False, **more)

    def __repr__(self) -> str:
        d, kind = self.decoder, type(self.model).__name__
        return f"LM({self.name}: {kind}, {d.n_layers} layers, d {d.d}, {self.model.dtype})"


def _available(device: str) -> str:
    """`device` as it was given; ValueError where torch does not know it or this machine lacks it."""
    try:
        torch.zeros(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ", ".join(["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise ValueError(f"DEVICE {device!r} is not available here; choose among {here}") from error
    return device


@plain()
def load_lm(model_id: str, dtype: str = "auto", device: str = "auto", revision: str | None = None) -> LM:
    """Load a model and tokenizer for reading and steering, in eval mode.

    model_id: a hub id, a local folder, or `tiny` (the shipped model). dtype: `auto` (the checkpoint's own), `float32`,
    `bfloat16`, `float16`. device: `auto` (all GPUs through `device_map="auto"`, else CPU), `cpu`, `cuda`, `cuda:1`, ...
    revision: a hub revision to pin. Raises ValueError / FileNotFoundError naming what is wrong.

    Example:
        >>> import ws
        >>> ws.load_lm("tiny", dtype="bfloat16").model.dtype
        torch.bfloat16
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    dtypes = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"DTYPE {dtype!r} is unknown; one of {', '.join(dtypes)}")
    folder = ASSETS / "tiny" if model_id == "tiny" else Path(model_id).expanduser()
    source = str(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{source}: not a model folder, config.json is missing")
    if source.startswith((".", "/")) and not folder.is_dir():
        raise FileNotFoundError(f"{source}: no such model folder")
    placement = ("auto" if torch.cuda.is_available() else "cpu") if device == "auto" else _available(device)
    try:
        AutoConfig.from_pretrained(source, revision=revision)
    except OSError as error:
        at = f" at revision {revision}" if revision else ""
        where = "no local folder, and not to be had from the hub or its cache"
        raise FileNotFoundError(f"MODEL_ID {model_id!r}{at}: {where}\n{error}") from error
    device_map = None if placement == "cpu" else placement
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtypes[dtype], device_map=device_map, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    model.eval()
    commit = getattr(model.config, "_commit_hash", None) or revision
    content = folder_hash(folder) if folder.is_dir() else str(commit)
    return LM(model, tokenizer, Decoder(model), model_slug(model_id), f"{content}/{model.dtype}")
