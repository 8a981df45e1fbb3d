"""Loading a causal language model and reading it by role, whatever its family.

A decoder block adds to the residual stream: `h_{l+1} = h_l + o(attn(q, k, v)) + down(act(gate x) * (up x))`. `Decoder`
names the seven linear maps of that sum (`q k v o gate up down`), the norms around them and the unembedding, for every
architecture that keeps them as separate modules.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ws.cache.given import first_line, shards_of
from ws.cache.names import folder_hash, model_path, model_slug
from ws.cache.places import ASSETS
from ws.model.contents import Fingerprint, checksum
from ws.model.text import position_ids
from ws.show.bars import plain

ROLES = {role: f"self_attn.{role}_proj" for role in "qkvo"} | {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}
FAMILIES = "Qwen2, Qwen3, Llama, Mistral, Gemma 1/2/3, OLMo 2"
SERVED = f"{FAMILIES} and others with separate q/k/v/o and gate/up/down projections"

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    and dtype for keys of what is computed from it: the hub's commit or a folder's content, and what changed in memory
    since (`ws.model.contents`); "" keeps nothing on disk.

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
    fingerprint: str = Fingerprint()

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


def check_model(
    model_id: str, dtype: str = "auto", device: str = "auto", revision: str | None = None, hub: bool = True
) -> LM:
    """The model as `load_lm` would load it, on the meta device: shapes and tokenizer without weights, in a second.

    Raises what `load_lm` raises: ValueError / FileNotFoundError, in one line, for a model that is nowhere, an
    architecture that is not served, weights that are missing or not whole, a tokenizer that does not load, an unknown
    dtype, an absent device. hub: whether the hub is asked for what its cache lacks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ValueError(f"DTYPE {dtype!r} is unknown; one of {', '.join(DTYPES)}")
    if device != "auto":
        _available(device)
    config, where = _config(model_id, revision, hub), f"MODEL_ID {model_id!r}"
    kind = next(iter(getattr(config, "architectures", None) or []), type(config).__name__)
    text = config.get_text_config()
    for name, most in {"num_hidden_layers": 1000, "hidden_size": 1 << 20, "vocab_size": 1 << 24}.items():
        if not isinstance(size := getattr(text, name, None), int) or not 0 < size <= most:
            raise ValueError(f"{where}: {kind} with {name} {size!r}; served are {SERVED}")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever its family's code does with a stranger's config
        if "Unrecognized configuration class" in str(error):
            raise ValueError(f"{where}: {kind} is no causal language model; served are {SERVED}") from None
        raise ValueError(f"{where}: its config.json describes no {kind}: {first_line(error)}") from error
    decoder = Decoder(model)
    _whole_weights(model_id, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(_source(model_id), revision=revision, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what a chat template alone becomes
            raise ValueError("it holds no vocabulary; fetch tokenizer.json again")
    except Exception as error:  # whatever the reader of a tokenizer's file does
        raise ValueError(f"{where}: its tokenizer cannot be loaded: {first_line(error)}") from error
    return LM(model, tokenizer, decoder, model_slug(model_id))


def _source(model_id: str) -> str:
    """What transformers is given: a folder's path, or a hub id."""
    folder = ASSETS / "tiny" if model_id == "tiny" else model_path(model_id)
    return str(folder) if folder else model_id


def _config(model_id: str, revision: str | None, hub: bool = True):
    """A model's config. A hub model that its cache lacks is asked for once, so that an absence is told in a moment."""
    from huggingface_hub import HfApi
    from transformers import AutoConfig

    source = _source(model_id)
    local = Path(source).is_dir()
    if local and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"{source}: not a model folder, config.json is missing")
    options = {"revision": revision, "trust_remote_code": False}
    try:
        try:
            return AutoConfig.from_pretrained(source, local_files_only=True, **options)
        except OSError:
            if local or not hub:
                raise
        HfApi().model_info(model_id, revision=revision, timeout=3)
        return AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # a stranger's config may end its reader with anything
        if local:
            raise ValueError(f"{source}/config.json: transformers cannot read it: {first_line(error)}") from error
        at = f" at revision {revision}" if revision else ""
        where = "no local folder, and not to be had from the hub or its cache"
        raise FileNotFoundError(f"MODEL_ID {model_id!r}{at}: {where}: {first_line(error)}") from error


def _whole_weights(model_id: str, revision: str | None) -> None:
    """ValueError / FileNotFoundError when weights on this machine are missing or cut; a hub model without is loaded."""
    from transformers.utils import cached_file

    def find(name: str) -> Path | None:
        options = {"revision": revision, "local_files_only": True, "_raise_exceptions_for_missing_entries": False}
        found = cached_file(_source(model_id), name, **options, _raise_exceptions_for_connection_errors=False)
        return Path(found) if found else None

    index, single = find("model.safetensors.index.json"), find("model.safetensors")
    if index is None and single is None:
        if Path(_source(model_id)).is_dir() and not any(Path(_source(model_id)).glob("pytorch_model*.bin")):
            raise FileNotFoundError(
                f"{_source(model_id)}: holds no weights (model.safetensors, or shards with an index)"
            )
        return
    shards = [single] if single else [index.parent / file for file in sorted(set(shards_of(index).values()))]
    for shard in shards:
        try:
            with safe_open(shard, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{shard}: not whole, fetch it again: {first_line(error)}") from error


@plain()
def load_lm(model_id: str, dtype: str = "auto", device: str = "auto", revision: str | None = None) -> LM:
    """Load a model and tokenizer for reading and steering, in eval mode.

    model_id: a hub id, a local folder, or `tiny` (the shipped model). dtype: `auto` (the checkpoint's own), `float32`,
    `bfloat16`, `float16`. device: `auto` (all GPUs through `device_map="auto"`, else CPU), `cpu`, `cuda`, `cuda:1`, ...
    revision: a hub revision to pin. Raises ValueError / FileNotFoundError naming what is wrong, before weights are read
    where it can be known (`check_model`).

    Example:
        >>> import ws
        >>> ws.load_lm("tiny", dtype="bfloat16").model.dtype
        torch.bfloat16
    """
    from transformers import AutoModelForCausalLM

    sketch, source = check_model(model_id, dtype, device, revision), _source(model_id)
    placement = ("auto" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    options = {"device_map": None if placement == "cpu" else placement, "revision": revision}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], trust_remote_code=False, output_loading_info=True, **options
        )
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"MODEL_ID {model_id!r}: its weights cannot be loaded: {first_line(error)}") from error
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(f"MODEL_ID {model_id!r}: its weights lack {lacking[0]} ({len(lacking)} such names)")
    model.eval()
    commit = getattr(model.config, "_commit_hash", None) or revision
    # a hub model's files may have been changed in its cache: what was read counts too
    content = folder_hash(Path(source)) if Path(source).is_dir() else f"{commit}-{checksum(model)[:8]}"
    return LM(model, sketch.tokenizer, Decoder(model), sketch.name, f"{content}/{model.dtype}")
