"""Keys: what a stage depends on, as hashes of its parameters, its inputs and the code that makes it."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from ws.cache.files import files_in
from ws.cache.places import out_folder
from ws.cache.records import broken, read_record, tell, write_record
from ws.cache.sources import code_key
from ws.cache.syntax import digest

LARGE = 64 << 20  # bytes; the hash of a larger file is remembered on disk, by the file's identity


@dataclass(frozen=True)
class Key:
    """Hashes of what a stage depends on, kept apart so that a difference can be told."""

    params: str
    inputs: str
    sources: str

    def __str__(self) -> str:
        return digest(json.dumps(asdict(self)).encode())

    @property
    def short(self) -> str:
        """Eight digits, for names of files."""
        return str(self)[:8]

    def differs(self, other: "Key") -> str:
        """'' when equal, else the first reason: 'changed parameters', 'changed inputs' or 'changed code'."""
        told = {"params": "changed parameters", "inputs": "changed inputs", "sources": "changed code"}
        return next((why for part, why in told.items() if getattr(self, part) != getattr(other, part)), "")


def file_key(path: Path | str) -> str:
    """Hash of all bytes of a file, or of a folder's files with their relative names (hidden files left out). Read once
    per identity of a file (place, size, times, inode): a disk that changes bits by itself shows none of these, so what is
    read as an input is verified from its bytes (`ws.cache.made.verified`). Raises FileNotFoundError when there is nothing
    at `path`."""
    path = Path(path)
    if path.is_dir():
        return digest("\n".join(f"{name} {file_key(file)}" for name, file in files_in(path).items()).encode())
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such input file or folder")
    path = path.resolve()
    return _file_key(path, _identity(path))


def _identity(path: Path) -> tuple[int, ...]:
    """What tells that a file was written since; size first."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@lru_cache(maxsize=16384)
def _file_key(path: Path, identity: tuple[int, ...]) -> str:
    if identity[0] <= LARGE:
        return read_hash(path)
    note = _note(path)
    if broken(note):
        tell(f"damaged: {note} is not what was written; {path} is read again")
    known = read_record(note)
    if known.get("identity") == list(identity) and "hash" in known:
        return known["hash"]
    found = read_hash(path)
    if os.access(note.parent if note.parent.is_dir() else out_folder(), os.W_OK):
        write_record(note, {"file": str(path), "identity": list(identity), "hash": found})
    return found


def _note(path: Path) -> Path:
    return out_folder() / ".hashes" / f"{digest(str(path).encode())}.json"


def forget(path: Path) -> None:
    """Remember nothing of a file, or of a folder's files: what is on disk is not what it was, whatever its times say."""
    _file_key.cache_clear()
    for file in files_in(path).values() if path.is_dir() else [path]:
        _note(file.resolve()).unlink(missing_ok=True)


def read_hash(path: Path) -> str:
    """Hash of a file's bytes as they are now."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def stage_key(params: dict, inputs: Sequence[Path] = (), code: Sequence[object] = (), sources: str = "") -> Key:
    """Key of a stage: its parameters (anything JSON writes, in any order), what its input files hold, what makes it.
    code: roots for `ws.cache.sources.code_key`, or `sources`, a hash of code taken already."""
    return Key(
        params=digest(json.dumps(params, sort_keys=True, default=str).encode()),
        inputs=digest("\n".join(file_key(path) for path in inputs).encode()),
        sources=sources or code_key(*code),
    )
