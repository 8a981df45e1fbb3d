"""Keys: what a stage depends on, as hashes of its parameters, its input files and the sources that it really imports.

The three parts stay apart, so that a difference can be told: `Key.differs`.
"""

import ast
import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from ws.files import HIDDEN

PACKAGE = Path(__file__).resolve().parent
LARGE = 64 << 20  # bytes; above this a file is identified by its size, its head and samples of its content


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
