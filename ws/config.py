"""Where a run's files go: `out/<model>/<behavior>/<adapter>/seed_<k>/`. Nothing else in the package knows paths."""

import zlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(__file__).resolve().parent / "assets"
OUT = ROOT / "out"
LOGS = ROOT / "logs"


def folder_hash(folder: Path) -> str:
    """8 hex digits over a model folder's config.json and the names, sizes and first MiB of its weight files.

    FileNotFoundError when the folder has no config.json.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder}: not a model folder, config.json is missing")
    crc = zlib.crc32(config.read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        crc = zlib.crc32(f"{file.name} {file.stat().st_size}".encode(), crc)
        with file.open("rb") as handle:
            crc = zlib.crc32(handle.read(1 << 20), crc)
    return f"{crc:08x}"


def model_slug(model_id: str) -> str:
    """Folder-safe name of a model: `tiny`, a hub id with `/` as `__`, or a local folder's name plus `folder_hash`, so
    that two folders of the same name do not share results."""
    folder = Path(model_id).expanduser()
    if model_id == "tiny":
        return "tiny"
    if not folder.is_dir():
        return model_id.replace("/", "__")
    folder = folder.resolve()
    return f"{folder.name}-{folder_hash(folder)}"


@dataclass(frozen=True)
class RunId:
    """Identity of one run: a model slug, a behaviour, an adapter kind, a LoRA seed."""

    model: str
    behavior: str
    adapter: str
    seed: int

    def adapter_folder(self, out: Path = OUT) -> Path:
        return out / self.model / self.behavior / self.adapter

    def folder(self, out: Path = OUT) -> Path:
        return self.adapter_folder(out) / f"seed_{self.seed}"


def model_folder(model: str, out: Path = OUT) -> Path:
    """Folder of everything that belongs to one model slug."""
    return out / model


def cache_folder(model: str, out: Path = OUT) -> Path:
    """Folder of a model's reusable intermediate files: generated pairs, A-side bases."""
    return model_folder(model, out) / "cache"
