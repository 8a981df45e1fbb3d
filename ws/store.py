"""What is already made: keys over parameters, inputs and sources. One mechanism for adapters, captures, bases and runs.

A stage's key is `(hash(parameters), hash(inputs), hash(sources))`: the three parts stay apart in the sidecar, so that a
stage whose key differs can say why. A target and its sidecar agree only when the target was finished under that key:

    done  <=>  sidecar.key == key  and  the target on disk is the one the sidecar describes
"""

import ast
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from ws.files import HIDDEN, Locked, atomic_dir, atomic_file, lock, publish, scratch, sweep, write_json, write_text

__all__ = [
    "HIDDEN",
    "STATES",
    "Key",
    "Locked",
    "atomic_dir",
    "atomic_file",
    "describe",
    "file_key",
    "imported_modules",
    "intact",
    "lock",
    "made",
    "mark_failed",
    "mark_made",
    "publish",
    "read_failure",
    "read_sidecar",
    "scratch",
    "sidecar",
    "source_key",
    "source_modules",
    "stage_key",
    "state",
    "sweep",
    "write_json",
    "write_text",
]
PACKAGE = Path(__file__).resolve().parent
LARGE = 64 << 20  # bytes; above this a file is identified by its size, its head and samples of its content
STATES = ("done", "new", "failed before", "damaged", "changed parameters", "changed inputs", "changed code")


# --- keys ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """Hashes of what a stage depends on, kept apart so that a difference can be told."""

    params: str
    inputs: str
    sources: str

    def __str__(self) -> str:
        return _digest(json.dumps(asdict(self)).encode())

    def differs(self, other: "Key") -> str:
        """'' when equal, else the first reason: 'changed parameters', 'changed inputs' or 'changed code'."""
        if self.params != other.params:
            return "changed parameters"
        if self.inputs != other.inputs:
            return "changed inputs"
        return "changed code" if self.sources != other.sources else ""


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_key(path: Path | str) -> str:
    """Content hash of a file, or of a folder's files with their relative names (hidden files of this module left out).

    A file above 64 MB is identified by its size, its head (for .safetensors the whole header) and 16 samples spread
    over it. Raises FileNotFoundError when there is nothing at `path`.
    """
    path = Path(path)
    if path.is_dir():
        parts = [
            f"{file.relative_to(path).as_posix()} {file_key(file)}"
            for file in sorted(path.rglob("*"))
            if file.is_file() and not any(p.startswith(HIDDEN) for p in file.relative_to(path).parts)
        ]
        return _digest("\n".join(parts).encode())
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such input file or folder")
    stat = path.stat()
    return _file_key(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_key(path: Path, size: int, mtime_ns: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as handle:
        if size <= LARGE:
            while block := handle.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
        digest.update(str(size).encode())
        head = 1 << 16
        if path.suffix == ".safetensors":
            head = 8 + int.from_bytes(handle.read(8), "little")
            handle.seek(0)
        digest.update(handle.read(min(head, LARGE)))
        for i in range(16):
            handle.seek(size * i // 16)
            digest.update(handle.read(1 << 16))
    return digest.hexdigest()


def _module_file(name: str) -> Path | None:
    """Source of a module of this package, None when there is no such module."""
    stem = PACKAGE.parent.joinpath(*name.split("."))
    for file in (stem.with_suffix(".py"), stem / "__init__.py"):
        if file.is_file():
            return file
    return None


def _imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Dotted names inside this package that a source imports, names it may take from modules included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join(parents + ([base] if base else []))
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    root = PACKAGE.name
    return {name for name in found if name == root or name.startswith(root + ".")}


@lru_cache(maxsize=1024)
def _parsed(file: Path, mtime_ns: int, module: str) -> tuple[str, frozenset[str]]:
    """Hash of a source's syntax tree (layout and comments do not count) and what it imports from this package."""
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    return _digest(ast.dump(tree).encode()), frozenset(_imports(tree, module, file.name == "__init__.py"))


def source_modules(*names: str) -> list[str]:
    """The modules of this package that `names` import, transitively, themselves included, sorted."""
    return sorted(_sources(names))


def _sources(names: tuple[str, ...]) -> dict[str, str]:
    hashes: dict[str, str] = {}
    open_names = list(names)
    for name in names:
        if _module_file(name) is None:
            raise ValueError(f"{name}: not a module of the package {PACKAGE.name}")
    while open_names:
        name = open_names.pop()
        if name in hashes:
            continue
        file = _module_file(name)
        if file is None:  # a function or class taken from a module
            continue
        hashes[name], imported = _parsed(file, file.stat().st_mtime_ns, name)
        open_names.extend(imported)
        open_names.extend(name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1))  # parents run on import
    return hashes


def source_key(*modules: str) -> str:
    """Hash of the sources of these modules and of every module of this package that they import, transitively."""
    return _digest(json.dumps(sorted(_sources(modules).items())).encode())


def imported_modules(code: str) -> list[str]:
    """The modules of this package that a piece of code (a notebook's cells) imports directly."""
    return sorted(name for name in _imports(ast.parse(code), "", False) if _module_file(name) is not None)


def stage_key(
    params: dict, inputs: list[Path] | tuple[Path, ...] = (), modules: list[str] | tuple[str, ...] = (), code: str = ""
) -> Key:
    """Key of a stage: its parameters (anything JSON writes, in any order), input files, and sources.

    `code` is source text outside the package (a notebook's cells): itself and the modules it imports count. Where the
    inputs lie does not count, only what they hold.
    """
    texts = json.dumps(params, sort_keys=True, default=str)
    names = sorted({*modules, *(imported_modules(code) if code else ())})
    text = ast.dump(ast.parse(code)) if code else ""
    return Key(
        params=_digest(texts.encode()),
        inputs=_digest("\n".join(file_key(path) for path in inputs).encode()),
        sources=_digest(f"{source_key(*names)}\n{text}".encode()),
    )


# --- what is made ----------------------------------------------------------------------------------------------------


def sidecar(target: Path | str) -> Path:
    """The file that says under which key `target` was made: inside a folder, beside a file."""
    target = Path(target)
    return target / ".made.json" if target.is_dir() else target.with_name(f".made.{target.name}.json")


def _failure(target: Path) -> Path:
    return target.with_name(f".made.{target.name}.failed.json")


def describe(target: Path) -> dict:
    """What lets a later look tell that a target is the one that was finished: sizes, and for a file time and hash."""
    if target.is_dir():
        files = sorted(f for f in target.rglob("*") if f.is_file() and not f.name.startswith(HIDDEN))
        return {"files": {f.relative_to(target).as_posix(): f.stat().st_size for f in files}}
    stat = target.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "hash": file_key(target)}


def intact(target: Path, about: dict) -> bool:
    """Whether `target` still is what `describe` saw."""
    if target.is_dir():
        return all((target / f).is_file() and (target / f).stat().st_size == s for f, s in about["files"].items())
    stat = target.stat()
    if stat.st_size != about["size"]:
        return False
    return stat.st_mtime_ns == about["mtime_ns"] or file_key(target) == about["hash"]


def read_sidecar(target: Path | str) -> dict:
    """What is recorded of a target; {} when nothing readable is."""
    try:
        return json.loads(sidecar(target).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


def state(target: Path | str, key: Key) -> str:
    """One of STATES: whether `target` is whole and was made under `key`, and if not, why it must be made."""
    target = Path(target)
    record = read_sidecar(target) if target.exists() else {}
    if not record or "key" not in record:
        return "failed before" if _failure(target).exists() else "new"
    if not intact(target, record):
        return "damaged"
    return key.differs(Key(**record["key"])) or "done"


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


def read_failure(target: Path | str) -> dict:
    """What `mark_failed` recorded, {} when nothing."""
    try:
        return json.loads(_failure(Path(target)).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def made(
    target: Path | str,
    key: Key,
    make: Callable[[Path], object],
    *,
    folder: bool = False,
    keep_stale: bool = False,
    remake: bool = False,
    about: dict | None = None,
) -> str:
    """Have `target` made under `key`, whole or not at all, once even when several processes ask.

    `make(path)` writes a file at `path`, or fills the folder `path` (`folder=True`). Returns what was found before:
    "done" (nothing was run), another of STATES (it was made now), or "stale": the target is whole, only code changed
    and `keep_stale` forbids to remake it. `remake` makes it in any case. `about` is kept in the sidecar.
    An exception of `make` is recorded ("failed before") and raised; the target stays as it was.
    """
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
                mark_made(target, key, about or {}, temporary)
        except Exception as error:
            mark_failed(target, key, f"{type(error).__name__}: {error}")
            raise
    return found
