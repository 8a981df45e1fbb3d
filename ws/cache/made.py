"""The one cache: what is kept is made once under a key, whole or not at all, and verified whenever it is asked for.

A stage's key is `(hash(parameters), hash(inputs), hash(code))`, kept apart in a sidecar, so that a difference can be told:

    done  <=>  sidecar.key == key  and  the target on disk has the content that the sidecar describes
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from ws.cache.files import atomic_dir, atomic_file, files_in, lock, read_json, write_json
from ws.cache.keys import Key, file_key

STATES = ("done", "new", "failed before", "damaged", "changed parameters", "changed inputs", "changed code")
T = TypeVar("T")
Make = Callable[[Path], object]


def sidecar(target: Path | str) -> Path:
    """The file that says under which key `target` was made: inside a folder, beside a file."""
    target = Path(target)
    return target / ".made.json" if target.is_dir() else target.with_name(f".made.{target.name}.json")


def _failure(target: Path) -> Path:
    return target.with_name(f".made.{target.name}.failed.json")


def describe(target: Path) -> dict:
    """What lets a later look tell that a target is the one that was finished: its content hash, file by file."""
    if target.is_dir():
        return {"files": {name: file_key(file) for name, file in files_in(target).items()}}
    return {"size": target.stat().st_size, "hash": file_key(target)}


def intact(target: Path, about: dict) -> bool:
    """Whether `target` still is what `describe` saw."""
    try:
        if target.is_dir():
            return all(file_key(target / name) == known for name, known in about["files"].items())
        return target.stat().st_size == about["size"] and file_key(target) == about["hash"]
    except (OSError, KeyError, AttributeError):
        return False


def read_sidecar(target: Path | str) -> dict:
    """What is recorded of a target; {} when nothing readable is."""
    return read_json(sidecar(target))


def read_failure(target: Path | str) -> dict:
    """What `mark_failed` recorded, {} when nothing."""
    return read_json(_failure(Path(target)))


def state(target: Path | str, key: Key) -> str:
    """One of STATES: whether `target` is whole and was made under `key`, and if not, why it must be made."""
    target = Path(target)
    record = read_sidecar(target) if target.exists() else {}
    known = record.get("key")
    if not isinstance(known, dict) or set(known) != {"params", "inputs", "sources"}:
        return "failed before" if _failure(target).exists() else "new"
    if not intact(target, record):
        return "damaged"
    return key.differs(Key(**known)) or "done"


def mark_made(target: Path | str, key: Key, about: dict, where: Path | None = None) -> None:
    """Record that `target` was made under `key`. `where` is its content when it still has a temporary name."""
    target = Path(target)
    content = where or target
    record = {"key": asdict(key), **describe(content), "about": about, "made_at": time.time()}
    write_json(sidecar(content) if content.is_dir() else sidecar(target), record)
    _failure(target).unlink(missing_ok=True)


def mark_failed(target: Path | str, key: Key, error: str) -> None:
    """Record that making `target` under `key` ended with `error`."""
    target = Path(target)
    write_json(_failure(target), {"key": asdict(key), "error": error, "failed_at": time.time()})


def made(
    target: Path | str, key: Key, make: Make, *, folder: bool = False, keep_stale: bool = False, remake: bool = False
) -> str:
    """Have `target` made under `key`, whole or not at all, once even when several processes ask. `make(path)` writes a
    file at `path`, or fills the folder `path` (`folder=True`). Returns what was found before: "done" (nothing was run),
    another of STATES (it was made now), or "stale": the target is whole, only code changed and `keep_stale` forbids to
    remake it. `remake` makes it in any case. An exception of `make` is recorded ("failed before") and raised; the
    target stays as it was."""
    target = Path(target)
    found = state(target, key)
    if found == "done" and not remake:
        return found
    with lock(target.parent, name=f".lock.{target.name}"):
        found = state(target, key)  # another process may have made it while this one waited
        if found == "done" and not remake:
            return found
        if found == "changed code" and keep_stale and not remake:
            return "stale"
        opened = atomic_dir(target) if folder else atomic_file(target)
        try:
            with opened as temporary:
                make(temporary)
                # The sidecar goes first: until the rename it describes something else than what is there.
                mark_made(target, key, {}, temporary)
        except Exception as error:
            mark_failed(target, key, f"{type(error).__name__}: {error}")
            raise
    return found


def kept(target: Path | str, key: Key, make: Make, read: Callable[[Path], T], *, folder: bool = False) -> T:
    """`read(target)` of what is made under `key`, made first where it is absent, damaged or another's."""
    made(target, key, make, folder=folder)
    return read(Path(target))


def read_safetensors(path: Path) -> tuple[dict, dict[str, str]]:
    """Tensors and header texts of a kept file. Read whole: nothing stays mapped to a file that may be replaced."""
    from safetensors.torch import load

    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data), header.get("__metadata__", {})
