"""Where things lie: results, logs, notebooks. Nothing else in the package knows paths.

Results go to the folder that WS_OUT names; without it to `out/` of a clone, or to `./out` of an installed package. It is
read when it is used.
"""

import os
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ASSETS = PACKAGE / "assets"
CLONE = PACKAGE.parent if (PACKAGE.parent / "nbs").is_dir() and (PACKAGE.parent / "pyproject.toml").is_file() else None


def root() -> Path:
    """Folder that relative results and logs are seen from: a clone's own, else the current one."""
    return CLONE or Path.cwd()


def out_folder() -> Path:
    """Folder of all results."""
    return Path(os.environ.get("WS_OUT") or root() / "out").expanduser().absolute()


def shipped_pairs(name: str) -> Path | None:
    """The shipped file of written pairs of a name, such as that of a behaviour; None where there is none."""
    path = ASSETS / f"{name}_pairs.jsonl"
    return path if re.fullmatch(r"\w{1,99}", name) and path.is_file() else None


def logs_folder() -> Path:
    """Folder of the runs' logs, beside the results."""
    return out_folder().parent / "logs"


def notebooks_folder() -> Path:
    """Folder of the notebooks and their parameter sets: `nbs/` of a clone, the package's data where it is installed."""
    return CLONE / "nbs" if CLONE else PACKAGE / "nbs"


def typed_in() -> Path:
    """The folder a command was typed in: `just` changes the working folder and says here where it came from."""
    return Path(os.environ.get("WS_TYPED_IN") or Path.cwd())
