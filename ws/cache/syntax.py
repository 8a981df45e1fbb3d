"""Source text as what it binds and what it uses: the parts of syntax trees that a key is made of.

Comments, layout, docstrings, reprs, what errors say and the metadata of `@candidate` are left out.
"""

import ast
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ws.cache.places import PACKAGE

REPRS = ("__repr__", "_repr_html_", "_repr_markdown_")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
Imports = dict[str, tuple[str, str]]  # name -> (module, attribute or "")


@dataclass(frozen=True)
class Scope:
    """What a source's top level binds: `defs` name -> its statements, and `imports`."""

    module: str
    defs: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: Imports = field(default_factory=dict)


@dataclass(frozen=True)
class Used:
    """A statement's hash, the dotted names it loads, its text literals, and what it imports inside."""

    hash: str
    names: tuple[str, ...]
    strings: frozenset[str]
    imports: Imports


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def module_file(name: str) -> Path | None:
    """Source of a module of this package, None when there is no such module."""
    if name.split(".")[0] != PACKAGE.name:
        return None
    stem = os.path.join(PACKAGE, *name.split(".")[1:])
    return next((Path(f) for f in (f"{stem}.py", os.path.join(stem, "__init__.py")) if os.path.isfile(f)), None)


def _absolute(tree: ast.Module, module: str, package: bool) -> ast.Module:
    """The tree with relative imports, wherever they stand, as seen from outside of `module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            parents = module.split(".")[: len(module.split(".")) - node.level + package]
            node.module, node.level = ".".join(parents + ([node.module] if node.module else [])), 0
    return tree


def imported(nodes: Iterable[ast.AST]) -> Imports:
    """What the import statements among `nodes` bind."""
    found: Imports = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                found[name] = (alias.name if alias.asname else name, "")
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
    return found


def _bound(node: ast.stmt) -> set[str]:
    """Names that a top-level statement binds, those inside an `if` or `try` included."""
    if isinstance(node, FUNCTIONS):
        return {node.name}
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names | {n.name for n in ast.walk(node) if isinstance(n, FUNCTIONS)}


def scope_of(text: str, module: str = "", package: bool = False) -> Scope:
    """The scope of a source text. A front door that binds names when they are used says so in `EXPORTS`."""
    tree = ast.parse(text)
    top = (_absolute(tree, module, package) if re.search(r"\bfrom[\s\\]*\.", text) else tree).body
    nested = [n for s in top if isinstance(s, ast.If | ast.Try | ast.With) for n in ast.walk(s)]
    scope = Scope(module, imports=imported([*top, *nested]))
    for node in top:
        for name in _bound(node):
            scope.defs.setdefault(name, []).append(node)
        if package and isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EXPORTS":
            scope.imports.update({name: (home, name) for name, home in ast.literal_eval(node.value).items()})
    return scope


@lru_cache(maxsize=1024)
def _read(module: str, path: Path, written: tuple[int, int]) -> Scope:
    return scope_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


def read_scope(module: str) -> Scope:
    """The scope of a module of this package as its file is now. ValueError where there is none."""
    path = module_file(module)
    if path is None:
        raise ValueError(f"{module}: not a module of the package {PACKAGE.name}")
    stat = path.stat()
    return _read(module, path, (stat.st_mtime_ns, stat.st_size))  # two edits may share a tick of the clock


def _counts(node: ast.AST, name: str, value: object) -> object:
    """A field of a node without what does not count."""
    if name in ("ctx", "type_comment", "kind") or isinstance(node, ast.Raise):  # what an error says decides nothing
        return None
    if isinstance(node, FUNCTIONS) and name == "body":
        value = value[1:] if ast.get_docstring(node) is not None else value
        return [n for n in value if getattr(n, "name", "") not in REPRS] if isinstance(node, ast.ClassDef) else value
    if isinstance(node, FUNCTIONS) and name == "decorator_list":
        return [d for d in value if not is_candidate(d)]
    return value


def is_candidate(decorator: ast.expr) -> bool:
    called = getattr(decorator, "func", decorator)
    return getattr(called, "attr", getattr(called, "id", "")) == "candidate"


SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _local(node: ast.AST) -> set[str]:
    """Names that a function, lambda or comprehension binds itself: arguments and what it assigns, not deeper scopes."""
    found: set[str] = set()
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        found |= {a.arg for a in ast.iter_child_nodes(node.args) if isinstance(a, ast.arg)}
    todo = list(ast.iter_child_nodes(node))
    while todo:
        inner = todo.pop()
        if isinstance(inner, ast.Global):
            return set()  # rare: then nothing is taken for local
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            found.add(inner.id)
        if isinstance(inner, FUNCTIONS):
            found.add(inner.name)
        elif not isinstance(inner, SCOPES):
            todo += ast.iter_child_nodes(inner)
    return found


@lru_cache(maxsize=16384)
def used(node: ast.AST) -> Used:
    """What a statement is and uses."""
    out: list[str] = []
    names: set[str] = set()
    strings: set[str] = set()
    inside: list[ast.AST] = []

    def visit(thing: object, local: frozenset[str], outer: bool = True) -> None:
        if isinstance(thing, list):
            out.append("[")
            for item in thing:
                visit(item, local)
            out.append("]")
        elif isinstance(thing, ast.AST):
            out.append(type(thing).__name__)
            inside.append(thing)
            if outer and isinstance(thing, ast.Attribute | ast.Name):
                dotted = _dotted(thing)
                if dotted.split(".")[0] not in local:
                    names.add(dotted)
            if isinstance(thing, ast.Constant) and isinstance(thing.value, str):
                strings.add(thing.value)
            within = local | _local(thing) if isinstance(thing, SCOPES) else local
            for name, value in ast.iter_fields(thing):
                value = _counts(thing, name, value)
                if value is not None and value != []:  # an empty field may be unknown to another release of Python
                    out.append(name)
                    around = name in ("decorator_list", "returns", "args")  # annotations and defaults are seen outside
                    visit(value, local if around else within, not isinstance(thing, ast.Attribute))
        else:
            out.append(repr(thing))

    visit(node, frozenset())
    names.discard("")
    return Used(digest(" ".join(out).encode()), tuple(sorted(names)), frozenset(strings), imported(inside))


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of attributes, `` when it does not start at a name."""
    chain: list[str] = []
    while isinstance(node, ast.Attribute):
        chain.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(chain)]) if isinstance(node, ast.Name) else ""
