"""The one cache: what is kept is made once under a key, whole or not at all, and verified whenever it is asked for.

A stage's key is `(hash(parameters), hash(inputs), hash(code))`, kept apart in a sidecar, so that a difference can be told:

    done  <=>  sidecar.key == key  and  the target on disk has the content that the sidecar describes

The content is hashed from the bytes on disk each time, whatever is remembered of the file. What is damaged is made anew
by whoever makes it (`made`, `kept`) and refused by whoever only reads it (`verified`).
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from ws.cache.files import atomic_dir, atomic_file, files_in, lock
from ws.cache.keys import Key, forget, read_hash
from ws.cache.records import broken, read_record, tell, write_record

STATES = ("done", "new", "failed before", "damaged", "changed parameters", "changed inputs", "changed code")
T = TypeVar("T")
Make = Callable[[Path], object]


class Damaged(ValueError):
    """A file that this project wrote is not what was written. A notebook shows the one line and no traceback."""

    def __init__(self, path: Path, again: str = "the command that made it"):
        super().__init__(path, again)

    def __str__(self) -> str:
        path, again = self.args
        return f"{path}: damaged, it is not what was written; {again} makes it anew"

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def sidecar(target: Path | str) -> Path:
    """The file that says under which key `target` was made: inside a folder, beside a file."""
    target = Path(target)
    return target / ".made.json" if target.is_dir() else target.with_name(f".made.{target.name}.json")


def _failure(target: Path) -> Path:
    return target.with_name(f".made.{target.name}.failed.json")


def describe(target: Path) -> dict:
    """What lets a later look tell that a target is the one that was finished: its content hash, file by file."""
    if target.is_dir():
        return {"files": {name: read_hash(file) for name, file in files_in(target).items()}}
    return {"size": target.stat().st_size, "hash": read_hash(target)}


def intact(target: Path, about: dict) -> bool:
    """Whether `target` still is what `describe` saw, by its bytes as they are now."""
    try:
        if target.is_dir():
            whole = all(read_hash(target / name) == known for name, known in about["files"].items())
        else:
            whole = target.stat().st_size == about["size"] and read_hash(target) == about["hash"]
    except (OSError, KeyError, AttributeError):
        whole = False
    if not whole:
        forget(target)
    return whole


def verified(path: Path | str) -> Path:
    """`path`, a file or folder that this project made, once its bytes are found to be those that were recorded: by its own
    sidecar, or by that of a target beside it (in it, for a folder) whose `about` lists it among its `outputs`. What nothing
    is recorded of is a caller's own. Raises Damaged, which names the file."""
    path = Path(path)
    own = sidecar(path)
    if broken(own):
        raise Damaged(own)
    if path.exists() and own.exists():
        if not intact(path, read_record(own)):
            raise Damaged(path)
        return path
    folder = path if path.is_dir() else path.parent
    for record in sorted(folder.glob(".made.*.ipynb.json")):
        if broken(record):
            raise Damaged(record)
        outputs = read_record(record).get("about", {}).get("outputs", {})
        for name, known in outputs.items() if path.is_dir() else [(path.name, outputs.get(path.name))]:
            file = folder / name
            if known and not (file.is_file() and read_hash(file) == known):
                forget(file)
                raise Damaged(file)
    return path


def read_sidecar(target: Path | str) -> dict:
    """What is recorded of a target; {} when nothing readable is."""
    return read_record(sidecar(target))


def state(target: Path | str, key: Key) -> str:
    """One of STATES: whether `target` is whole and was made under `key`, and if not, why it must be made."""
    target = Path(target)
    record = read_sidecar(target) if target.exists() else {}
    known = record.get("key")
    if not isinstance(known, dict) or set(known) != {"params", "inputs", "sources"}:
        if target.exists() and sidecar(target).exists():
            return "damaged"
        return "failed before" if _failure(target).exists() else "new"
    if not intact(target, record):
        return "damaged"
    return key.differs(Key(**known)) or "done"


def mark_made(target: Path | str, key: Key, about: dict, where: Path | None = None) -> None:
    """Record that `target` was made under `key`. `where` is its content when it still has a temporary name."""
    target = Path(target)
    content = where or target
    record = {"key": asdict(key), **describe(content), "about": about, "made_at": time.time()}
    write_record(sidecar(content) if content.is_dir() else sidecar(target), record)
    _failure(target).unlink(missing_ok=True)


def mark_failed(target: Path | str, key: Key, error: str) -> None:
    """Record that making `target` under `key` ended with `error`."""
    target = Path(target)
    write_record(_failure(target), {"key": asdict(key), "error": error, "failed_at": time.time()})


def clear_failure(target: Path) -> None:
    """Let nothing stay of a target that could not be made: neither the record of it nor the two folders above, where they
    hold nothing else."""
    _failure(target).unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        for folder in target.parents[:2]:
            folder.rmdir()


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
        if found == "damaged":
            tell(f"damaged: {target} is not what was written; it is made anew")
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
    """`read(target)` of what is made under `key`, made first where it is absent, damaged, another's or unreadable."""
    found = made(target, key, make, folder=folder)
    try:
        return read(Path(target))
    except Exception as error:
        if found != "done":
            raise  # it was made just now
        tell(f"unreadable: {target} ({type(error).__name__}: {error}); it is made anew")
    made(target, key, make, folder=folder, remake=True)
    return read(Path(target))


def read_safetensors(path: Path) -> tuple[dict, dict[str, str]]:
    """Tensors and header texts of a kept file. Read whole: nothing stays mapped to a file that may be replaced."""
    from safetensors.torch import load

    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data), header.get("__metadata__", {})
