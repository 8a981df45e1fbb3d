"""Names of models and runs, and their folders: `out/<model>/<behavior>/<adapter>/seed_<k>/`."""

import re
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from ws.cache.given import parsed, read_given
from ws.cache.places import out_folder
from ws.cache.syntax import digest

RESERVED = ("cache", "delta_svd", "theta_fit", "cross_behaviours")  # folders of a model that belong to no behaviour
BY_HAND = "by_hand"  # what is made by hand where something else is finished: out/by_hand/, in the same order of folders


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
