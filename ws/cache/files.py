"""Files that appear whole, and locks that end with their owner.

A file or folder is written under a temporary name beside its own, flushed to disk and renamed: a reader sees the old one
or the new one. A temporary name carries its owner's host, process and start time, so that what a killed process left is
recognised and removed.
"""

import glob
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psutil

HIDDEN = (".tmp-", ".made", ".lock")  # names of temporary files, sidecars and locks: never part of a content key
_COUNTER = count()
os.umask(UMASK := os.umask(0o077))  # the process's file mode mask: the system tells it only by setting it


class Locked(RuntimeError):
    """Another live process holds the lock; the message names its pid and host."""


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", socket.gethostname()) or "host"


def _stat(pid: int) -> tuple[str, int]:
    """State of a process ("Z": ended, its parent has not asked yet) and its start in clock ticks since boot, which
    guards against reused pids; ("", 0) where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])


def _temporary(path: Path) -> Path:
    """A fresh temporary name beside `path` with the same suffix (some writers read the format from it)."""
    pid = os.getpid()
    return path.with_name(f".tmp-{_host()}-{pid}-{_stat(pid)[1]}-{next(_COUNTER)}.{path.name}")


def _dead(left: Path) -> bool:
    """Whether the temporary `left` belongs to a process of this host that has ended."""
    match = re.fullmatch(r"\.tmp-(\w+)-(\d+)-(\d+)-\d+\..*", left.name, flags=re.DOTALL)
    if not match or match[1] != _host():
        return False
    state, started = _stat(int(match[2]))
    return not psutil.pid_exists(int(match[2])) or state in ("Z", "X") or int(match[3]) not in (0, started)


def sweep(folder: Path | str, pattern: str = "**/.tmp-*") -> list[Path]:
    """Remove every temporary file and folder below `folder` that a dead process of this host left; returns them."""
    left = [path for path in Path(folder).glob(pattern) if _dead(path)]
    for path in left:
        _remove(path)
    return left


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Force a file's or folder's content to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def scratch(path: Path | str) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what is still there under it when the block ends is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, f".tmp-*.{glob.escape(path.name)}")
    temporary = _temporary(path)
    try:
        yield temporary
    finally:
        _remove(temporary)


def publish(temporary: Path, path: Path | str) -> Path:
    """Give a finished temporary file its own name, its content safely on disk first."""
    if not temporary.is_file():
        raise FileNotFoundError(f"{path}: nothing was written to its temporary file")
    _flush(temporary)
    temporary.chmod(0o666 & ~UMASK)  # some writers make files that only their owner can read
    os.replace(temporary, path)
    _flush(Path(path).parent)
    return Path(path)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path to write; it replaces `path` when the block ends, and is removed if the block raises."""
    with scratch(path) as temporary:
        yield temporary
        publish(temporary, path)


@contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces `path` when the block ends, and is removed if the block raises."""
    path = Path(path)
    with scratch(path) as temporary, scratch(path) as previous:
        temporary.mkdir()
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            _flush(file)
        _flush(temporary)
        try:
            if path.exists():
                os.rename(path, previous)
            os.rename(temporary, path)
            _flush(path.parent)
        finally:
            if not path.exists() and previous.exists():
                os.rename(previous, path)


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file whole (UTF-8, newlines as given)."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
    return Path(path)


def write_json(path: Path | str, value: object) -> Path:
    """Write JSON whole, indented, keys in the order given; a value JSON does not know is an error."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """The mapping in a JSON file, {} where nothing readable is."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, not JSON, not UTF-8
        return {}
    return found if isinstance(found, dict) else {}


def files_in(folder: Path) -> dict[str, Path]:
    """`{relative name: file}` of a folder's files in order; hidden files and folders are left out."""
    named = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {n: file for n, file in named.items() if not any(part.startswith(HIDDEN) for part in n.split("/"))}


@contextmanager
def lock(folder: Path | str, wait_s: float | int | None = None, name: str = ".lock") -> Iterator[Path]:
    """Hold `folder/name` alone. Waits for ever by default, at most `wait_s` seconds otherwise (0: refuse at once). The
    system itself drops the lock when its owner ends, however it ends, so a dead owner never blocks; the file only says
    who owns it. Raises Locked with the owner's host and pid. Not re-entrant."""
    from filelock import FileLock, Timeout

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name

    def owner() -> str:
        told = path.read_text(errors="replace").strip() if path.is_file() else ""
        return f"{folder}: in use by {told or 'another process'}"

    held = FileLock(path)
    try:
        held.acquire(timeout=0)
    except Timeout:
        if wait_s == 0:
            raise Locked(owner()) from None
        print(f"waiting for {owner()}", flush=True)
        try:
            held.acquire(timeout=-1 if wait_s is None else wait_s, poll_interval=0.2)
        except Timeout:
            raise Locked(owner()) from None
    try:
        path.write_text(f"pid {os.getpid()} on {socket.gethostname()}")
        yield path
    finally:
        path.unlink(missing_ok=True)  # before the release: who then gets the lock of a removed file tries again
        held.release()
