"""Loading a causal language model: from the hub, a folder, a GGUF file, or under a name of this project's own."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ws.cache.given import first_line
from ws.cache.models import folder_hash, model_name, model_slug
from ws.cache.syntax import digest
from ws.model.contents import Fingerprint, checksum
from ws.model.decoder import SERVED, Decoder, prompted
from ws.model.gguf import check_loaded
from ws.model.source import available, read_config, read_tokenizer, source_of, template_text, whole_weights
from ws.model.text import position_ids, template_note
from ws.show.bars import plain
from ws.show.tables import facts

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LM:
    """A loaded causal LM with its tokenizer, its `Decoder` view, the name under which its results go (`model_name` of
    `ws.cache.models`), and a fingerprint of its weights and dtype for keys of what is computed from it: the hub's commit or
    a folder's content, and what changed in memory since (`ws.model.contents`); "" keeps nothing on disk. template: which
    chat template was given, in words; "" for none. slug: the name without revision and template, by which `nbs/params`
    knows the model.

    Examples:
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
    template: str = ""
    slug: str = ""

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    @property
    def chat(self) -> str:
        """In words, what a reader must know of the chat template; "" for nothing special."""
        return template_note(self.tokenizer, self.template)

    def at_rest(self) -> "LM":
        """The same model with its fingerprint taken once, for a computation during which nobody changes its weights."""
        found = replace(self, fingerprint="")
        found.__dict__["_fingerprint"] = self.fingerprint, None
        return found

    @property
    def body(self) -> nn.Module:
        """The decoder's body (no logits), or the whole model where only it puts learned tokens first."""
        return self.model if prompted(self.model) else self.decoder.body

    def run(self, ids: Int[Tensor, "n T"], mask: Int[Tensor, "n T"], **more):
        """The output of the body on encoded texts, with positions that count from each text's first token: for what hooks
        and `more` record."""
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
        return self.body(**{name: x.to(self.device) for name, x in inputs.items()}, use_cache=False, **more)

    def __repr__(self) -> str:
        d, kind = self.decoder, type(self.model).__name__
        return f"LM({self.name}: {kind}, {d.n_layers} layers, d {d.d}, {self.model.dtype})"

    def _repr_html_(self) -> str:
        d, kind = self.decoder, type(self.model).__name__
        heads = f"{d.n_heads} heads on {d.n_kv} kv heads"
        about = {"architecture": kind, "layers": d.n_layers, "d": d.d, "attention": heads, "dtype": self.model.dtype}
        return facts(
            f"LM {self.name}", about | {"device": self.device, "chat template": self.chat or "the tokenizer's own"}
        )


def check_choice(dtype: str, device: str, chat_template: str) -> None:
    """ValueError / FileNotFoundError for a dtype, a device or a chat template that is none."""
    if dtype not in DTYPES:
        raise ValueError(f"DTYPE {dtype!r} is unknown; one of {', '.join(DTYPES)}")
    if device != "auto":
        available(device)
    template_text(chat_template)


def check_model(
    model_id: str,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    chat_template: str = "",
    hub: bool = True,
) -> LM:
    """The model as `load_lm` would load it, on the meta device: shapes and tokenizer without weights, in a second.

    Raises what `load_lm` raises: ValueError / FileNotFoundError, in one line, for a model that is nowhere, an
    architecture that is not served, weights that are missing or not whole, a tokenizer that does not load, an unknown
    dtype, an absent device. hub: whether the hub is asked for what its cache lacks."""
    check_choice(dtype, device, chat_template)
    return _sketch(model_id, source_of(model_id), revision, chat_template, hub)


def _sketch(model_id: str, source: str, revision: str | None, chat_template: str, hub: bool = True) -> LM:
    """The model on the meta device, with its tokenizer."""
    from transformers import AutoModelForCausalLM

    where = f"MODEL_ID {model_id!r}"
    config = read_config(model_id, source, revision, hub)
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
    whole_weights(source, revision)
    tokenizer, told = read_tokenizer(model_id, source, revision, chat_template)
    name = model_name(model_id, revision or "", chat_template)
    return LM(model, tokenizer, decoder, name, template=told, slug=model_slug(model_id))


@plain()
def load_lm(
    model_id: str, dtype: str = "auto", device: str = "auto", revision: str | None = None, chat_template: str = ""
) -> LM:
    """Load a model and tokenizer for reading and steering, in eval mode.

    model_id: a hub id, a local folder, a `.gguf` file (dequantised once, into the model's cache), `tiny` (the shipped model),
    `smollm2` or `gemma3-270m` (`ws.cache.models`). dtype: `auto` (the checkpoint's own), `float32`, `bfloat16`, `float16`.
    device: `auto` (all GPUs through `device_map="auto"`, else CPU), `cpu`, `cuda`, `cuda:1`, ... revision: a hub revision to
    pin. chat_template: "" (the tokenizer's own), `plain` (`User: ...`, `Assistant: ...`, for a base model), or a file of a
    Jinja template. Raises ValueError / FileNotFoundError naming what is wrong, before weights are read where it can be known
    (`check_model`).

    Examples:
        >>> import ws
        >>> ws.load_lm("tiny", dtype="bfloat16").model.dtype
        torch.bfloat16
    """
    from transformers import AutoModelForCausalLM

    check_choice(dtype, device, chat_template)
    source = source_of(model_id)
    sketch = _sketch(model_id, source, revision, chat_template)
    placement = ("auto" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    options = {"device_map": None if placement == "cpu" else placement, "revision": revision}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], trust_remote_code=False, **options
        )
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"MODEL_ID {model_id!r}: its weights cannot be loaded: {first_line(error)}") from error
    check_loaded(info, f"MODEL_ID {model_id!r}")
    model.eval()
    commit = getattr(model.config, "_commit_hash", None) or revision
    # a hub model's files may have been changed in its cache: what was read counts too
    content = folder_hash(Path(source)) if Path(source).is_dir() else f"{commit}-{checksum(model)[:8]}"
    told = f"/template-{digest(sketch.tokenizer.chat_template.encode())[:8]}" if chat_template else ""
    fingerprint = f"{content}/{model.dtype}{told}"
    return replace(sketch, model=model, decoder=Decoder(model), fingerprint=fingerprint)
