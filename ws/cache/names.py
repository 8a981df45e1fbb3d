"""Names of models and runs, and their folders: `out/<model>/<behavior>/<adapter>/seed_<k>/`."""

import re
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from ws.cache.given import parsed, read_given
from ws.cache.keys import file_key
from ws.cache.places import out_folder
from ws.cache.syntax import digest

RESERVED = ("cache", "delta_svd", "theta_fit", "cross_behaviours")  # folders of a model that belong to no behaviour
BY_HAND = "by_hand"  # what is made by hand where something else is finished: out/by_hand/, in the same order of folders


def model_slug(model_id: str) -> str:
    """Folder-safe name of a model: `tiny`, a hub id with `/` as `__`, or a local folder's name plus 8 digits of its
    content, so that two folders of the same name do not share results. FileNotFoundError when a local folder has no
    config.json, and for what is neither a folder nor can be a hub id."""
    if model_id == "tiny":
        return "tiny"
    folder = model_path(model_id)
    if folder is None:
        return model_id.replace("/", "__")
    return f"{slug(folder.resolve().name)}-{folder_hash(folder)[:8]}"


def model_path(model_id: str) -> Path | None:
    """The local folder that a model's name means, None for a hub id. FileNotFoundError for what can be neither."""
    try:
        folder = Path(model_id).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError, ValueError):  # too long, ~ of nobody, a NUL
        pass
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", model_id, re.ASCII):
        raise FileNotFoundError(f"MODEL_ID {model_id[:200]!r}: no such model folder, and no hub id (owner/name)")
    return None


def folder_hash(folder: Path) -> str:
    """Hash of a model folder's config, weights, tokenizer and chat template: all bytes, hashed once per file."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: not a model folder, config.json is missing")
    kinds = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt")
    files = sorted({file for kind in kinds for file in folder.glob(kind)})
    return digest("\n".join(f"{file.name} {file_key(file)}" for file in files).encode())


def slug(name: str) -> str:
    """A name as a folder can have it: the one rule for names of behaviours, users, candidates and local models.

    Spaces become `_`. Where anything else had to change (letters outside ASCII as well: they may look alike), and where
    the name is long or one of RESERVED, 8 digits of its hash follow, so that two names do not share a folder. A slug is
    its own slug."""
    spaced = name.replace(" ", "_")
    ascii_only = normalize("NFKD", spaced).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^\w.-]+", "_", ascii_only).strip("._")
    if plain and plain == spaced and len(plain) <= 80 and plain.lower() not in RESERVED:
        return plain
    return f"{plain[:60] or 'unnamed'}-{digest(name.encode('utf-8', 'surrogatepass'))[:8]}"


def behavior_name(behavior: str) -> str:
    """A behaviour's name before it is loaded: a shipped one's own, what a user's `.json` or `.jsonl` file says, or the
    file's name where it says nothing. ValueError for a file that is no JSON."""
    path = Path(behavior).expanduser()
    if not path.is_file():
        return behavior
    text = read_given(path)
    texts = filter(str.strip, text.split("\n")) if path.suffix == ".jsonl" else [text]
    rows = [parsed(row, path) for row in texts]
    found = [row.get("name") for row in rows if isinstance(row, dict)]
    return next((name for name in found if isinstance(name, str) and name), path.stem)


def check_part(what: str, name: str) -> str:
    """`name` as it is; ValueError where it cannot be one folder's name, so that no path made of it leaves its place."""
    if not re.fullmatch(r"\w[\w.-]{0,199}", name):
        raise ValueError(f"{what} {name[:60]!r} cannot name a folder: letters, digits, '_', '-' and '.' can")
    return name


def check_seed(seed: int) -> int:
    """`seed` as it is; ValueError unless it is a whole number from 0 to 2^32 - 1, what generators take."""
    if isinstance(seed, bool) or not 0 <= seed < 1 << 32:
        raise ValueError(f"SEED = {seed}: a seed is a whole number from 0 to {(1 << 32) - 1}")
    return seed


@dataclass(frozen=True)
class RunId:
    """Identity of one run: a model slug, a behaviour, an adapter kind, a LoRA seed. ValueError for a model or adapter
    that cannot name a folder, or a seed that no generator takes; a behaviour's name goes through `slug`."""

    model: str
    behavior: str
    adapter: str
    seed: int

    def __post_init__(self) -> None:
        check_part("model", self.model)
        check_part("ADAPTER", self.adapter)
        check_seed(self.seed)

    def adapter_folder(self, out: Path | None = None) -> Path:
        return (out or out_folder()) / self.model / slug(self.behavior) / self.adapter

    def folder(self, out: Path | None = None, null: bool = False) -> Path:
        """Folder of the seed; of its null diff with `null`."""
        return self.adapter_folder(out) / f"seed_{self.seed}" / ("null_diff" if null else "")


def model_folder(model: str, out: Path | None = None) -> Path:
    """Folder of everything that belongs to one model slug."""
    return (out or out_folder()) / check_part("model", model)


def cache_folder(model: str, out: Path | None = None) -> Path:
    """Folder of a model's reusable intermediate files: generated pairs, captures, A-side bases."""
    return model_folder(model, out) / "cache"
