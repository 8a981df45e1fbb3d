"""Notebook pairs nbs/NAME.py <-> nbs/NAME.ipynb: a run takes the .ipynb, which must say what the .py says."""

from pathlib import Path

from ws.runs import need, parameters


def cells_of(path: Path) -> list[tuple[str, str, bool]]:
    """Cells of either half of a pair: kind, source, whether it carries the parameters tag."""
    cells = [c for c in need("jupytext", "notebooks").read(path)["cells"] if c["source"]]
    return [(c["cell_type"], c["source"].strip(), parameters.is_tagged(c)) for c in cells]


def check_pair(notebook: Path, edited: bool = False) -> None:
    """Refuse an .ipynb that does not say what its .py says: the edit would silently not run. edited: only look where
    the .py is the newer one."""
    script = notebook.with_suffix(".py")
    if not script.is_file() or (edited and script.stat().st_mtime <= notebook.stat().st_mtime):
        return
    if cells_of(script) != cells_of(notebook):
        raise ValueError(f"{script.name} and {notebook.name} differ: run `just sync`, or undo one of them")
