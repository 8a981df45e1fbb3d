"""JSON records that tell whether they are what was written: each carries a seal, the hash of the rest of it."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from ws.cache.files import read_json, write_json
from ws.cache.syntax import digest

SEAL = "seal"


def write_record(path: Path, value: dict) -> Path:
    """Write a record whole, sealed."""
    return write_json(path, {**value, SEAL: _seal(value)})


def read_record(path: Path) -> dict:
    """A record without its seal; {} where there is none, or not what was written. One without a seal is as it is."""
    value = read_json(path)
    return value if value.pop(SEAL, None) in (None, _seal(value)) else {}


def broken(path: Path) -> bool:
    """Whether a record is there that cannot be read, or is not what was written."""
    return path.exists() and not read_record(path)


def tell(text: str) -> None:
    """Say what was found and done about it where a reader sees it: in the terminal, and in a notebook's report and log."""
    tqdm.write(text, file=sys.stderr)


def _seal(value: dict) -> str:
    plain = json.loads(json.dumps(value))  # as it is read back: texts for keys, lists for tuples
    return digest(json.dumps(plain, sort_keys=True).encode())
