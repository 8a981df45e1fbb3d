"""Which code makes a thing: hashes of syntax trees, followed from function to function.

`code_key(root)` covers the function at `root` and every function, class and constant that its names lead to, inside
this package and in the caller's own files and notebook cells. What only shows, describes or stores a result does not make
it: figures, words, the registry of candidates, the rooms `show` and `cache`. This package is read as text, so that a key
costs no import; a name that holds another object than its source says (a function replaced in a notebook) counts as what
it holds. The caller's objects are looked up as they are. Methods are followed through annotations: a parameter
`m: Materials` counts the whole class.
"""

import ast
import builtins
import importlib.util
import inspect
import pickle
import sys
import sysconfig
import textwrap
import time
import types
from contextlib import suppress
from functools import partial
from pathlib import Path

from ws.cache.places import PACKAGE
from ws.cache.syntax import FUNCTIONS, Imports, Scope, digest, imported, module_file, read_scope, scope_of, used

STARTED = time.time()
SILENT = ("figures", "words", "candidate")  # modules of any room that only show or describe
# rooms that decide how things look, where they lie and when they run
BESIDE = tuple(f"{PACKAGE.name}.{room}" for room in ("show", "cache", "runs", "lab"))
_KINDS = ("stdlib", "platstdlib", "purelib", "platlib")
FOREIGN = tuple({str(Path(sysconfig.get_paths()[kind]).resolve()) for kind in _KINDS})


class Unkeyed(ValueError):
    """A function depends on a value that has no content hash."""


class Walk:
    """One walk from its roots: `seen` name -> hash, `strings` the text literals met in functions."""

    def __init__(self, strict: bool = True):
        self.seen: dict[str, str] = {}
        self.strings: set[str] = set()
        self.met: set[tuple[str, str]] = set()  # names that were followed, by module
        self.strict = strict
        self.hits = 0  # names that led to a definition

    # --- this package, as text ---------------------------------------------------------------------------------------

    def scope(self, module: str) -> Scope:
        scope = read_scope(module)
        if self.strict and module in sys.modules and module_file(module).stat().st_mtime > STARTED:
            raise ValueError(f"{module} was edited after this process loaded it: restart the kernel")
        return scope

    def path(self, dotted: str) -> None:
        """Follow an absolute dotted name of this package; others are no part of a key."""
        parts = dotted.split(".")
        for cut in range(len(parts), 0, -1):
            module = ".".join(parts[:cut])
            if module_file(module):
                if module.split(".")[-1] in SILENT or module.startswith(BESIDE):
                    return
                for name in parts[cut : cut + 1] or list(self.scope(module).defs):
                    self.name(self.scope(module), name, {})
                return

    def name(self, scope: Scope, dotted: str, local: Imports) -> None:
        """Follow a name as the source of `scope` uses it, where `local` imports hold."""
        first, *rest = dotted.split(".")
        live = getattr(sys.modules.get(scope.module), "__dict__", {}).get(first)
        if first in local or (first in scope.imports and first not in scope.defs):
            base, attribute = (scope.imports | local)[first]
            if first not in local and _replaced(live, base, attribute):
                self.value(f"{scope.module}.{first}", live)
            else:
                self.path(".".join([p for p in (base, attribute) if p] + rest))
        elif first in scope.defs:
            label = f"{scope.module}.{first}"
            self.hits += 1
            if label in self.seen:
                return
            self.seen[label] = ""
            nodes = scope.defs[first]
            if _replaced(live, scope.module, first) or _reset(live, nodes[-1]):
                self.value(f"replaced {label}", live)
            else:
                self.nodes(label, scope, nodes)

    def nodes(self, label: str, scope: Scope, nodes: list[ast.stmt]) -> None:
        for part in map(used, nodes):
            self.strings |= part.strings
            for name in part.names:
                local = name.partition(".")[0] in part.imports
                if local or (scope.module, name) not in self.met:
                    self.met |= set() if local else {(scope.module, name)}
                    self.name(scope, name, part.imports)
        self.seen[label] = " ".join(used(node).hash for node in nodes)

    # --- the caller's objects, as they are ---------------------------------------------------------------------------

    def note(self, label: str, found: str) -> None:
        """A value's hash; two values of one label both count."""
        self.seen[f"{label} {found}"] = found

    def value(self, label: str, value: object) -> None:
        """Follow an object; Unkeyed where nothing tells its content."""
        if isinstance(value, partial):
            self.value(label, [value.func, value.args, sorted((value.keywords or {}).items())])
        elif isinstance(value, types.MethodType):
            self.function(value.__func__)
            self.value(f"{label}.self", value.__self__)
        elif isinstance(value, list | tuple) and not _simple(value):
            for i, item in enumerate(value):
                self.value(f"{label}.{i}", item)
        elif isinstance(value, types.FunctionType | type) or hasattr(value, "__wrapped__"):
            self.function(value)
        elif isinstance(getattr(value, "fingerprint", None), str) and value.fingerprint:
            self.note(label, value.fingerprint)
        elif not isinstance(value, types.ModuleType):
            if _own(type(value)):
                self.function(type(value))
                if vars_of := getattr(value, "__dict__", None):
                    self.value(f"{label}.", [x for item in sorted(vars_of.items()) for x in item])
            try:
                self.note(label, digest(_pickled(value)))
            except Exception as error:
                why = f"{label} is a {type(value).__name__}, whose content cannot be hashed ({error})"
                raise Unkeyed(why) from error

    def function(self, function: object) -> None:
        """A function or class: of this package by its source, of the caller by what it is and what it refers to.

        The caller's function counts by its compiled code: a file may have been edited since it was loaded. Its source
        tells which names it uses.
        """
        module, name = getattr(function, "__module__", "") or "", getattr(function, "__qualname__", "")
        inner = getattr(function, "__wrapped__", None)
        if module_file(module) and not _replaced(function, module, name.split(".")[0]) and "<" not in name:
            self.name(self.scope(module), name.split(".")[0], {})
            return
        if inner is not None and not isinstance(function, types.FunctionType):
            return self.value(name, inner)  # a cache of functools
        label = f"{module}.{name}@{id(function)}"
        if label in self.seen or not (_own(function) or inner is not None):
            return
        self.seen[label] = ""
        code = getattr(function, "__code__", None)
        try:
            node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0] if name[-8:] != "<lambda>" else None
        except (OSError, TypeError, SyntaxError, IndexError):
            node = None
        if code is None and node is None:
            raise Unkeyed(f"{name}: its source cannot be read")
        own = used(node).hash if code is None else digest(repr(_compiled(code, function.__doc__)).encode())
        names = set(_names(code)) if code is not None else set()
        known = dict(getattr(function, "__globals__", None) or vars(sys.modules.get(module, builtins)))
        if node is not None:
            names |= set(used(node).names)
            self.strings |= used(node).strings
            for base, attribute in used(node).imports.values():
                self.path(".".join(filter(None, (base, attribute))))
                self.imported(base)
        elif code is not None:
            self.strings |= {c for c in code.co_consts if isinstance(c, str)}
        if code is not None:
            for name_inside, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
                with suppress(ValueError):  # nothing is in the cell yet
                    known[name_inside] = cell.cell_contents
            self.value(f"{name}()", [*(function.__defaults__ or ()), sorted((function.__kwdefaults__ or {}).items())])
        for dotted in sorted(names):
            self.live(dotted, known)
        self.note(name, own)

    def imported(self, module: str) -> None:
        """A module of the caller's that a function imports inside: all of it."""
        with suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(module) if module else None
            own = spec and spec.origin and not str(Path(spec.origin).resolve()).startswith((*FOREIGN, str(PACKAGE)))
            if own and Path(spec.origin).is_file():
                self.note(f"module {module}", digest(Path(spec.origin).read_bytes()))

    def live(self, dotted: str, known: dict) -> None:
        first, *rest = dotted.split(".")
        if first not in known:
            return
        value = known[first]
        while rest and isinstance(value, types.ModuleType) and not module_file(value.__name__):
            if not _own(value):
                return
            value = getattr(value, rest.pop(0), None)
        if isinstance(value, types.ModuleType):
            if module_file(value.__name__):
                self.path(".".join([value.__name__, *rest]))
            elif _own(value):
                self.note(f"module {value.__name__}", digest(Path(value.__file__).read_bytes()))
        elif _own(value) or not callable(value):
            self.value(f"{Path(str(known.get('__file__', ''))).name}:{first}", value)
        else:
            self.function(value)


def _pickled(value: object) -> bytes:
    """The content of a value; of a tensor its bytes, which pickle writes in another way in each process."""
    if type(value).__name__ == "Tensor" and hasattr(value, "numpy"):
        return repr((tuple(value.shape), str(value.dtype))).encode() + value.detach().cpu().float().numpy().tobytes()
    return repr(sorted(map(repr, value))).encode() if isinstance(value, set | frozenset) else pickle.dumps(value)


def _compiled(code: types.CodeType, doc: str | None) -> tuple:
    """What a function does, its docstring and places in a file left out."""
    consts = tuple(_compiled(c, None) if isinstance(c, types.CodeType) else c for c in code.co_consts if c != doc)
    return code.co_code, code.co_names, code.co_freevars, code.co_varnames, consts


def _names(code: types.CodeType) -> list[str]:
    """Names that a function and those inside it may look up."""
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _names(c)]
    return [*code.co_names, *code.co_freevars, *inner]


def _simple(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_simple, value))
    return value is None or isinstance(value, int | float | str | bool | bytes | complex)


def _replaced(live: object, module: str, name: str) -> bool:
    """Whether a loaded name holds another function or class than the source that binds it."""
    if live is None or not module_file(module):
        return False
    while name not in read_scope(module).defs:  # re-exported: go to where it is defined
        module, name = read_scope(module).imports.get(name, ("", ""))
        if not module_file(module):
            return False
    if not isinstance(read_scope(module).defs[name][-1], FUNCTIONS):  # assigned: it may hold what has another name
        return live is not getattr(sys.modules.get(module), name, live)
    if (getattr(live, "__module__", ""), getattr(live, "__qualname__", "")) != (module, name):
        return True
    code = getattr(live, "__code__", None)  # the caller's wrapper has the name of what it wraps, not its file
    return code is not None and not str(Path(code.co_filename).resolve()).startswith((str(PACKAGE), *FOREIGN))


def _reset(live: object, node: ast.stmt) -> bool:
    """Whether a loaded constant has another value than its source says."""
    named = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)  # not `a, b = 1, 2`
    with suppress(ValueError):
        return named and live is not None and _simple(live) and ast.literal_eval(node.value) != live
    return False


def _own(thing: object) -> bool:
    """Whether something was written by the caller: neither of this package nor installed nor built in."""
    module = thing if isinstance(thing, types.ModuleType) else sys.modules.get(getattr(thing, "__module__", "") or "")
    if module is None:
        return isinstance(thing, types.FunctionType | type)
    if module.__name__ == "builtins" or module_file(module.__name__):
        return module.__name__ != "builtins" and isinstance(thing, types.FunctionType)
    file = getattr(module, "__file__", None)
    if file is None:
        return module.__name__ == "__main__"
    return not str(Path(file).resolve()).startswith(FOREIGN)


def walk(*roots: object, strict: bool = True) -> Walk:
    """A walk from dotted names of this package (`ws.train.lora.train_adapter`) and from objects."""
    found = Walk(strict)
    for root in roots:
        if isinstance(root, str):
            before = found.hits
            found.path(root)
            if found.hits == before:
                raise ValueError(f"{root}: no such function of the package {PACKAGE.name}")
        else:
            found.value(getattr(root, "__qualname__", "root"), root)
    return found


def hashed(found: Walk) -> str:
    rows = sorted((k, v) for k, v in found.seen.items() if v)
    return digest(repr(rows).encode())


def code_key(*roots: object, strict: bool = True) -> str:
    """Hash of the code behind `roots`. strict: ValueError where a source was edited after this process loaded it.
    Raises Unkeyed for a caller's function that refers to a value without a content hash."""
    return hashed(walk(*roots, strict=strict))


def text_key(code: str) -> str:
    """Hash of a piece of code (a notebook's cells) and of what it uses of this package."""
    found, scope = Walk(strict=False), scope_of(code)
    tree = ast.parse(code)
    scope.imports.update(imported(ast.walk(tree)))
    scope.defs.clear()
    found.nodes("cells", scope, tree.body)
    return hashed(found)
