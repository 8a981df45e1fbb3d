"""The table of rooms in docs/architecture.md: what may know what."""

import ast
from collections import defaultdict

import pytest

from ws.cache.places import ROOT

FILES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in ROOT.glob("ws/**/*.py")
}


def imports(module: str) -> set[str]:
    """Modules of ws that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ws":
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in FILES else node.module for name in names}
    return found


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def uses() -> dict[str, set[str]]:
    """Rooms that each room imports."""
    graph = defaultdict(set)
    for module in FILES:
        graph[room(module)] |= {room(other) for other in imports(module)} - {room(module), "ws"}
    return graph


def reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        new = graph[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def test_rooms_know_each_other_one_way_only():
    graph = uses()
    assert len(graph) > 25 and graph["ws.explanation.rows"] >= {"ws.subspaces.build", "ws.explanation.scores"}
    assert not [name for name in list(graph) if name in reached(name, graph)]


@pytest.mark.parametrize(
    "name, forbidden",
    [
        ("ws.subspaces.algebra", {"ws.model.lm", "ws.diff", "ws.cache.files", "ws.subspaces.build"}),
        ("ws.explanation.scores", {"ws.model.lm", "ws.diff", "ws.subspaces.build", "ws.subspaces.captures"}),
        ("ws.diff", {"ws.model.lm", "ws.data", "ws.subspaces.build"}),
        ("ws.runs", {"ws.model.lm", "ws.train", "ws.explanation.rows", "ws.subspaces.build"}),
        ("ws.delta", {"ws.diff", "ws.subspaces.build", "ws.steer.weights"}),
    ],
)
def test_a_room_does_not_reach(name, forbidden):
    assert not reached(name, uses()) & forbidden


def test_only_ceilings_see_w():
    """Candidates built without w cannot import what holds it."""
    for module in ("weights", "activations", "compound"):
        assert not {m for m in imports(f"ws.subspaces.build.{module}") if m.startswith(("ws.diff", "ws.steer.weights"))}
        names = {
            n.id
            for n in ast.walk(ast.parse(FILES[f"ws.subspaces.build.{module}"].read_text()))
            if isinstance(n, ast.Name)
        }
        assert "Materials" in names and "CeilingMaterials" not in names


def test_every_room_stands_in_the_table():
    table = (
        (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms of `ws/`")[2].partition("## Decisions")[0]
    )
    rooms = {room(module).removeprefix("ws.") for module in FILES} - {"ws", "__main__"}
    missing = [name for name in sorted(rooms) if f"`{name}`" not in table and f"`{name}/`" not in table]
    assert not missing
