"""Damage that a cache must notice: a file changed in the middle, its size and times put back where they can be."""

import os
from pathlib import Path


def flip(path: Path) -> None:
    """One bit of the middle byte."""
    _write(path, lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])


def high(path: Path) -> None:
    """The high bit of the middle byte, or of the next one without: a text is no UTF-8 any more."""
    data = path.read_bytes()
    at = next(i for i in range(len(data) // 2, len(data)) if data[i] < 128)
    _write(path, lambda _: data[:at] + bytes([data[at] ^ 128]) + data[at + 1 :])


def cut(path: Path) -> None:
    """The second half gone; a text ends with a whole line."""
    _write(path, lambda data: data[: data.find(b"\n", len(data) // 2) + 1 or len(data) // 2])


def empty(path: Path) -> None:
    _write(path, lambda _: b"")


def _write(path: Path, change) -> None:
    stat, data = path.stat(), path.read_bytes()
    assert change(data) != data
    path.write_bytes(change(data))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


HARMS = [flip, cut, empty]
