"""A GGUF file as a folder that transformers loads: read and dequantised once, kept as float32 safetensors.

transformers reads GGUF through the package `gguf` and refuses to save what it read; the weights go into a plain model of
the same config. A quantised weight is what it dequantises to: the base model is that model, not the one it was made from.
"""

import shutil
from pathlib import Path

from ws.cache.given import first_line
from ws.cache.keys import stage_key
from ws.cache.made import clear_failure, made
from ws.cache.names import cache_folder
from ws.cache.records import tell
from ws.model.decoder import Decoder
from ws.show.bars import plain

NEEDS = "reading GGUF needs the package gguf: pip install gguf"


def gguf_folder(parts: list[Path], model_id: str, name: str) -> Path:
    """`out/<name>/cache/model/`, made from a GGUF file (or its parts, in order) where it is not there. model_id: what errors
    name; name: the model's slug. ValueError for a file that is no GGUF or lacks weights, an architecture that transformers
    cannot dequantise or this project does not serve, or without the package gguf."""
    folder = cache_folder(name) / "model"

    def make(to: Path) -> None:
        _check(parts, f"MODEL_ID {model_id!r}")
        tell(f"{name}: {parts[0].name} is dequantised into {folder}, once; that takes a minute or two")
        convert(parts, to, f"MODEL_ID {model_id!r}")

    try:
        made(folder, stage_key({"model": name}, inputs=parts, code=["ws.model.gguf.convert"]), make, folder=True)
    finally:
        if not folder.exists():
            clear_failure(folder)
    return folder


def _check(parts: list[Path], where: str) -> None:
    """ValueError for what is known without reading a tensor."""
    with parts[0].open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ValueError(f"{where}: {parts[0]} is no GGUF file")
    try:
        import gguf  # noqa: F401  transformers imports it where it reads the file
    except ImportError as error:
        raise ValueError(f"{where}: {NEEDS}") from error


def check_loaded(info: dict, where: str) -> None:
    """ValueError for weights that were not in what was loaded, or of another shape there. info: the loading info of
    `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)`."""
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(f"{where}: its weights lack {lacking[0]} ({len(lacking)} such names)")
    if other := sorted(info["mismatched_keys"]):
        name, found, wanted = other[0]
        raise ValueError(f"{where}: {name} has shape {tuple(found)}, its config asks for {tuple(wanted)}")


@plain()
def convert(parts: list[Path], folder: Path, where: str) -> None:
    """Fill `folder` with config, float32 weights, tokenizer and chat template of a GGUF file. where: what an error begins
    with."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = parts[0] if len(parts) == 1 else folder / "whole.gguf"
    try:
        if len(parts) > 1:
            with whole.open("wb") as to:
                for part in parts:
                    with part.open("rb") as handle:
                        shutil.copyfileobj(handle, to, 1 << 24)
        source = {"pretrained_model_name_or_path": str(whole.parent), "gguf_file": whole.name}
        # the tokenizer's file says whether it was asked for offline: always, so that two conversions are the same bytes
        tokenizer = AutoTokenizer.from_pretrained(**source, local_files_only=True)
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        read, info = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **options)
    except Exception as error:  # whatever the readers of a stranger's file end with
        raise ValueError(f"{where}: {parts[0].name} cannot be dequantised: {first_line(error)}") from error
    finally:
        if len(parts) > 1:
            whole.unlink(missing_ok=True)
    try:
        Decoder(read)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    check_loaded(info, where)
    config = read.config
    del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
