"""The rooms of docs/architecture.md: what may know what, and how large a module may be."""

import ast
import importlib
import re

import pytest

from ws.cache.places import PACKAGE

ROOT = PACKAGE.parent
FILES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in ROOT.glob("ws/**/*.py")
}
# From the top; a room uses those after it. Rooms of one line do not use each other.
FLOORS = [
    {"cli", "demo"},
    {"lab"},
    {"ready"},
    {"use"},
    {"causal"},
    {"stability"},
    {"explanation"},
    {"gradient"},
    {"subspaces", "theta"},
    {"train", "steer"},
    {"diff", "delta", "runs"},
    {"model", "data"},
    {"show", "behavior_file"},
    {"cache"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
PEERS = {("demo", "cli"), ("cli", "demo"), ("train", "steer")}


def imports(module: str) -> set[str]:
    """Modules of ws that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ws":
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in FILES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "ws"}
    return found


def room(module: str) -> str:
    return (module.split(".") + [""])[1]


def reached(module: str) -> set[str]:
    seen, todo = set(), [module]
    while todo:
        new = imports(todo.pop()) & set(FILES) - seen
        seen |= new
        todo += new
    return seen


def test_every_room_has_a_floor_and_uses_only_those_below():
    rooms = {room(m) for m in FILES} - {"", "__main__"}
    assert rooms == set(FLOOR) and len(rooms) <= 21
    up = []
    for module in FILES:
        for other in imports(module):
            a, b = room(module), room(other)
            if a in FLOOR and b in FLOOR and a != b and (a, b) not in PEERS and FLOOR[b] <= FLOOR[a]:
                up.append(f"{module} -> {other}")
    assert not up


def test_no_module_is_in_a_circle():
    left = {module: imports(module) & set(FILES) for module in FILES}
    while free := [module for module, others in left.items() if not others & set(left)]:
        for module in free:
            del left[module]
    assert not left


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("runs", "model data diff steer train subspaces explanation stability theta delta"),
        ("theta", "diff subspaces explanation stability train"),
        ("delta", "diff subspaces explanation stability steer train theta"),
        ("show", "model data diff steer train subspaces explanation stability theta delta runs"),
        ("diff", "model data steer train subspaces explanation"),
    ],
)
def test_a_room_does_not_reach(name, forbidden):
    for module in (m for m in FILES if room(m) == name):
        assert not {room(m) for m in reached(module)} & set(forbidden.split()), module


@pytest.mark.parametrize("module", ["from_weights", "from_activations", "from_gradients", "compound", "materials"])
def test_a_candidate_cannot_see_w(module):
    assert not [m for m in reached(f"ws.subspaces.{module}") if room(m) in ("diff", "steer", "train")]
    names = {n.id for n in ast.walk(ast.parse(FILES[f"ws.subspaces.{module}"].read_text())) if isinstance(n, ast.Name)}
    assert not names & {"CeilingMaterials", "WeightDiff", "SteeredDiffs"}


def test_there_is_one_score_path():
    """Captures under w, targets and rows meet in `explain` alone: notebooks, benches and other rooms go through it."""
    inner = ("capture_steered", "layer_targets", "per_layer", "CeilingMaterials", "specific_per_layer")
    users = {}
    for path in [*FILES.values(), *(ROOT / "nbs").glob("*.py"), *(ROOT / "bench").glob("*.py")]:
        tree = ast.parse(path.read_text())
        used = {getattr(n.func, "id", "") for n in ast.walk(tree) if isinstance(n, ast.Call)} & set(inner)
        if used:
            users[path.relative_to(ROOT).as_posix()] = used
    assert set(users) == {"ws/explanation/explain.py"}, users


def test_every_room_and_module_stands_in_the_table():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("## Rooms of `ws/`")[2].partition("## One cache")[0]
    rows = {m[1]: m[0] for m in re.findall(r"^(\| `(\w+)`.*)$", table, flags=re.MULTILINE)}
    assert set(rows) | {"demo"} >= set(FLOOR)
    for module in FILES:
        name = module.rpartition(".")[2]
        if room(module) in ("", "runs", "__main__") or module.count(".") < 2:
            continue
        assert f"`{name}`" in rows[room(module)], module


def test_sizes_stay_small():
    lines = {m: len(p.read_text().splitlines()) for m, p in FILES.items()}
    assert not {m: n for m, n in lines.items() if n > 300}
    assert sum(lines.values()) <= 31_320
    for path in (ROOT / "nbs").glob("*.py"):
        cells = [c for c in path.read_text().split("\n# %%")[1:] if not c.startswith(" [markdown]")]
        code = [x for c in cells for x in c.splitlines()[1:] if x.strip() and not x.strip().startswith("#")]
        assert len(code) <= 120, f"{path.name}: {len(code)} lines of code"


@pytest.mark.parametrize("file", sorted((ROOT / "bench").glob("*.py")), ids=lambda file: file.name)
def test_what_a_bench_imports_is_there(file):
    """Benches run by hand."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ws":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.import_module(f"{node.module}.{name}"), name
