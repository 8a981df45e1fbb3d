"""Failed tries of a run: `<its folder>/failed/<time>/`, beside what is finished, the last few of each notebook."""

import os
import shutil
import time
from itertools import count
from pathlib import Path

from ws.cache.files import read_json, write_json

FAILED = "failed"
KEPT = 3  # of a run


def tries(folder: Path, notebook: str = "") -> list[dict]:
    """The failed tries kept in a run's folder, oldest first: what `failure.json` says, and the `folder` of each."""
    found = [{**read_json(file), "folder": file.parent} for file in sorted(folder.glob(f"{FAILED}/*/failure.json"))]
    return [one for one in found if one.get("reason") and notebook in ("", one.get("notebook"))]


def keep_failed(notebook: str, values: dict, folder: Path, work: Path, error: str) -> Path:
    """Keep what a try left in `work`, with why it failed; of such tries the last few. Returns where it lies."""
    stamp, home = time.strftime("%Y%m%d-%H%M%S"), folder / FAILED
    kept = next(p for n in count() if not (p := home / (f"{stamp}-{n}" if n else stamp)).exists())
    reason = next((line.strip() for line in reversed(error.splitlines()) if line.strip()), "no word of why")
    about = {"notebook": notebook, "reason": reason[:300], "error": error, "parameters": values, "at": time.time()}
    write_json(work / "failure.json", about)
    home.mkdir(parents=True, exist_ok=True)
    os.rename(work, kept)
    for old in tries(folder, notebook)[:-KEPT]:
        shutil.rmtree(old["folder"], ignore_errors=True)
    return kept
