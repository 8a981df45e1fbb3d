"""Files that users give: read within limits, every fault one line that names the file."""

import json
import math
from pathlib import Path
from reprlib import Repr

MOST_BYTES = 64 << 20  # of a text file
MOST_TEXT = 10_000  # characters of one text
MOST_LINES = 100_000  # of a file with an entry per line
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 90


def short(value: object) -> str:
    """A value as an error message can show it, whatever its size or depth."""
    return " ".join(_SHORT.repr(value).split())


def first_line(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def read_given(path: Path, most: int = MOST_BYTES) -> str:
    """A text file's content, without a byte order mark. FileNotFoundError, or ValueError where it is larger than `most` bytes or
    not UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path}: has {size / 1e6:,.1f} MB, at most {most / 1e6:,.1f} MB are read; make it shorter")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def given_lines(path: Path) -> list[str]:
    """A text file's lines, within `read_given`'s limit and MOST_LINES. Only a newline ends one: JSON leaves other
    separators as they are."""
    lines = read_given(path).split("\n")
    if len(lines) > MOST_LINES:
        raise ValueError(f"{path}: has {len(lines):,} lines, at most {MOST_LINES:,} are read")
    return lines


def parsed(text: str | bytes, where: object) -> object:
    """The value of a JSON text; ValueError naming `where` when it is not JSON or is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: not JSON that can be read: nested too deep") from None
    except ValueError as error:  # not JSON, not UTF-8, a number of more than 4300 digits
        raise ValueError(f"{where}: not JSON: {first_line(error)}") from None


def fits(text: str, where: str, most: int = MOST_TEXT) -> str:
    """`text` as it is; ValueError where it is longer than `most` characters, or holds a lone surrogate, which is no text."""
    if len(text) > most:
        raise ValueError(f"{where}: has {len(text):,} characters, at most {most:,} are read; shorten or split it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{where}: {half} is half of a surrogate pair, no character; write the whole one") from None
    return text


def finite(value: object) -> bool:
    """Whether a value of a file is a finite number (true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shards_of(index: Path) -> dict[str, str]:
    """`{tensor: file}` of a `*.safetensors.index.json`, the files beside it; ValueError / FileNotFoundError otherwise."""
    content = parsed(read_given(index), index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index}: holds no weight_map")
    for file in sorted(set(map(str, files.values()))):
        if Path(file).name != file:
            raise ValueError(f"{index}: {short(file)}: a shard must lie beside its index")
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index.parent / file}: this part of the weights is missing")
    return files
