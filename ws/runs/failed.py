"""Failed tries of a run: `<its folder>/failed/<time>/`, beside what is finished, the last few of each notebook."""

import os
import shutil
import time
from itertools import count
from pathlib import Path

from ws.cache.records import read_record, write_record

FAILED = "failed"
KEPT = 3  # of a run


def tries(folder: Path, notebook: str = "") -> list[dict]:
    """The failed tries kept in a run's folder, oldest first: what `failure.json` says, and the `folder` of each."""
    found = [{**_told(file), "folder": file.parent} for file in sorted(folder.glob(f"{FAILED}/*/failure.json"))]
    return [one for one in found if notebook in ("", one["notebook"])]


def _told(file: Path) -> dict:
    """What is recorded of a failed try, or that its record is damaged."""
    told, kinds = read_record(file), {"notebook": str, "reason": str, "at": int | float}
    if all(isinstance(told.get(name), kind) for name, kind in kinds.items()):
        return told
    notebook = next((path.stem for path in sorted(file.parent.glob("*.ipynb"))), "")
    return {"notebook": notebook, "reason": f"damaged: {file.name}", "at": file.stat().st_mtime}


def keep_failed(notebook: str, values: dict, folder: Path, work: Path, error: str) -> Path:
    """Keep what a try left in `work`, with why it failed; of such tries the last few. Returns where it lies."""
    stamp, home = time.strftime("%Y%m%d-%H%M%S"), folder / FAILED
    kept = next(p for n in count() if not (p := home / (f"{stamp}-{n}" if n else stamp)).exists())
    reason = next(
        (line.strip() for line in reversed(error.splitlines()) if any(map(str.isalpha, line))), "no word of why"
    )
    about = {"notebook": notebook, "reason": reason[:300], "error": error, "parameters": values, "at": time.time()}
    write_record(work / "failure.json", about)
    home.mkdir(parents=True, exist_ok=True)
    os.rename(work, kept)
    for old in tries(folder, notebook)[:-KEPT]:
        shutil.rmtree(old["folder"], ignore_errors=True)
    return kept
