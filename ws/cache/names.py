"""Names of models and runs, and their folders: `out/<model>/<behavior>/<adapter>/seed_<k>/`."""

import re
from dataclasses import dataclass
from pathlib import Path

from ws.cache.keys import file_key
from ws.cache.places import out_folder
from ws.cache.syntax import digest


def model_slug(model_id: str) -> str:
    """Folder-safe name of a model: `tiny`, a hub id with `/` as `__`, or a local folder's name plus 8 digits of its
    content, so that two folders of the same name do not share results. FileNotFoundError when a local folder has no
    config.json."""
    folder = Path(model_id).expanduser()
    if model_id == "tiny":
        return "tiny"
    if not folder.is_dir():
        return model_id.replace("/", "__")
    return f"{folder.resolve().name}-{folder_hash(folder)[:8]}"


def folder_hash(folder: Path) -> str:
    """Hash of a model folder's config, weights, tokenizer and chat template: all bytes, hashed once per file."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: not a model folder, config.json is missing")
    kinds = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt")
    files = sorted({file for kind in kinds for file in folder.glob(kind)})
    return digest("\n".join(f"{file.name} {file_key(file)}" for file in files).encode())


def slug(name: str) -> str:
    """A name as a folder can have it."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "unnamed"


@dataclass(frozen=True)
class RunId:
    """Identity of one run: a model slug, a behaviour, an adapter kind, a LoRA seed."""

    model: str
    behavior: str
    adapter: str
    seed: int

    def adapter_folder(self, out: Path | None = None) -> Path:
        return (out or out_folder()) / self.model / slug(self.behavior) / self.adapter

    def folder(self, out: Path | None = None, null: bool = False) -> Path:
        """Folder of the seed; of its null diff with `null`."""
        return self.adapter_folder(out) / f"seed_{self.seed}" / ("null_diff" if null else "")


def model_folder(model: str, out: Path | None = None) -> Path:
    """Folder of everything that belongs to one model slug."""
    return (out or out_folder()) / model


def cache_folder(model: str, out: Path | None = None) -> Path:
    """Folder of a model's reusable intermediate files: generated pairs, captures, A-side bases."""
    return model_folder(model, out) / "cache"
