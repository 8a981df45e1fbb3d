"""Notebook pairs nbs/NAME.py <-> nbs/NAME.ipynb: in step, without outputs, with the tag that papermill needs.

`python .ci/pairs.py` checks all of nbs/ and names what is wrong; `--strip` takes outputs and execution counts out.
"""

import json
import sys
from pathlib import Path

from ws.cache.files import write_text
from ws.cache.places import notebooks_folder
from ws.runs import parameters
from ws.runs.pairing import check_pair


def faults(folder: Path) -> list[str]:
    """What is wrong with the notebooks of a folder, one line each."""
    found = []
    for name in sorted({p.stem for p in (*folder.glob("*.py"), *folder.glob("*.ipynb"))}):
        script, notebook = folder / f"{name}.py", folder / f"{name}.ipynb"
        if missing := [p.name for p in (script, notebook) if not p.is_file()]:
            found.append(f"{missing[0]} is missing: run `just sync`")
            continue
        try:
            content = parameters.read_notebook(notebook)
            parameters.defaults(content, notebook.name)
            check_pair(notebook)
        except ValueError as error:
            found.append(str(error))
            continue
        if not content["metadata"].get("kernelspec", {}).get("name"):
            found.append(f"{notebook.name}: no kernelspec, papermill would find no kernel")
        if strip(content):
            found.append(f"{notebook.name}: has outputs or execution counts: run `just sync`")
    return found


def strip(notebook: dict) -> bool:
    """Take outputs and execution counts out of a notebook's JSON; whether there were any."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    had = any(cell["outputs"] or cell["execution_count"] is not None for cell in code)
    for cell in code:
        cell |= {"outputs": [], "execution_count": None}
    return had


def main(args: list[str], folder: Path | None = None) -> int:
    """Exit code 0 when all is well, 1 otherwise."""
    folder = folder or notebooks_folder()
    if args == ["--strip"]:
        for path in sorted(folder.glob("*.ipynb")):
            content = parameters.read_notebook(path)
            if strip(content):
                write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
                print(f"{path.name}: outputs taken out")
        return 0
    found = faults(folder)
    for line in found:
        print(line, file=sys.stderr)
    print(f"notebooks: {len(list(folder.glob('*.ipynb')))} checked, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
