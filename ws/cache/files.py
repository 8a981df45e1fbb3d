"""Files that appear whole, and locks that end with their owner.

A file or folder is written under a temporary name beside its own, flushed to disk and renamed: a reader sees the old one
or the new one. A temporary name carries its owner's host, process and start time, so that what a killed process left is
recognised and removed.
"""

import ctypes
import errno
import glob
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import psutil

HIDDEN = (".tmp-", ".was-", ".made", ".lock")  # temporary files, sidecars and locks: never part of a content key
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


def _temporary(path: Path, kind: str = "tmp") -> Path:
    """A fresh temporary name beside `path` with the same suffix (some writers read the format from it)."""
    pid = os.getpid()
    return path.with_name(f".{kind}-{_host()}-{pid}-{_stat(pid)[1]}-{next(_COUNTER)}.{path.name}")


def settled(path: Path) -> Path:
    """The name under which what `path` holds will appear: `path` itself unless it is a temporary name."""
    return path.with_name(re.sub(r"^\.(tmp|was)-\w+-\d+-\d+-\d+\.", "", path.name))


def _dead(left: Path) -> bool:
    """Whether the temporary `left` belongs to a process of this host that has ended."""
    match = re.fullmatch(r"\.(?:tmp|was)-(\w+)-(\d+)-(\d+)-\d+\..*", left.name, flags=re.DOTALL)
    if not match or match[1] != _host():
        return False
    state, started = _stat(int(match[2]))
    return not psutil.pid_exists(int(match[2])) or state in ("Z", "X") or int(match[3]) not in (0, started)


def sweep(folder: Path | str, name: str = "*", below: bool = True) -> list[Path]:
    """Remove the temporary files and folders of `name` that dead processes of this host left in `folder` (and below);
    returns them. A folder that was set aside and never replaced gets its name back."""
    kinds = [f".{kind}-*.{name}" if name != "*" else f".{kind}-*" for kind in ("was", "tmp")]
    left = [p for kind in kinds for p in Path(folder).glob(f"**/{kind}" if below else kind) if _dead(p)]
    for path in left:
        if path.name.startswith(".was-") and not settled(path).exists():
            os.rename(path, settled(path))
        _remove(path)
    for path in Path(folder).glob("**/.lock*") if below else ():
        with suppress(Locked), lock(path.parent, 0, path.name):
            pass  # nobody holds it: it goes when it is let go
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
    sweep(path.parent, glob.escape(path.name), below=False)
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
    with scratch(path) as temporary:
        temporary.mkdir()
        yield temporary
        publish_dir(temporary, path)


def publish_dir(temporary: Path, path: Path | str) -> Path:
    """Give a finished temporary folder its own name, its content safely on disk first, in one rename: a reader finds the
    old folder or the new one. Where the system cannot exchange two names, the old one is set aside for a moment under a
    name from which `sweep` restores it."""
    path = Path(path)
    for file in (f for f in temporary.rglob("*") if f.is_file() or f.is_dir()):
        _flush(file)
    _flush(temporary)
    if not path.exists():
        os.rename(temporary, path)
    elif exchange(temporary, path):
        _remove(temporary)
    else:
        aside = _temporary(path, "was")
        os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(aside, path)
            raise
        _remove(aside)
    _flush(path.parent)
    return path


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot (Linux 3.15 and most of its local
    file systems can)."""
    system = ctypes.CDLL(None, use_errno=True)
    if not hasattr(system, "renameat2"):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if system.renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


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


def link(file: Path, to: Path) -> None:
    """Have a file under another name too, as the same file where the file system can; it replaces what is there."""
    with scratch(to) as temporary:
        try:
            os.link(file, temporary, follow_symlinks=False)
        except OSError:
            shutil.copy2(file, temporary, follow_symlinks=False)
        os.replace(temporary, to)


def hand_over(source: Path, target: Path) -> None:
    """Have all files below a folder of the cache in a folder of results too."""
    for name, file in files_in(source).items():
        link(file, target / name)


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
