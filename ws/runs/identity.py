"""A notebook run's identity: what it depends on, whether it is done.

done = the notebook ended, without exception, its outputs are there, and its key is that of now
"""

import os
from functools import lru_cache
from pathlib import Path

from ws.cache import syntax
from ws.cache.files import HIDDEN, files_in
from ws.cache.keys import Key, file_key, stage_key
from ws.cache.made import read_sidecar, sidecar, state
from ws.cache.models import hub_id
from ws.cache.places import out_folder
from ws.cache.records import broken
from ws.cache.sources import code_key, text_key
from ws.runs import parameters
from ws.runs.failed import FAILED, tries
from ws.runs.folders import seed_folder
from ws.runs.notebooks import MAYBE_PATHS, notebook_of, path_names, paths_in


def hub_revision(model_id: str, revision: str = "main") -> str:
    """The commit that the local hub cache holds for a model, `revision` itself where it holds none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    ref = Path(HF_HUB_CACHE) / f"models--{model_id.replace('/', '--')}" / "refs" / revision
    return ref.read_text().strip() if ref.is_file() else revision


def run_key(notebook: str, content: dict, params: dict, out: Path) -> Key:
    """Key of a run. Paths count by what lies there, not by where it lies; a hub model counts by its commit."""
    entry = notebook_of(notebook)
    located = {key for key in (*path_names(), *MAYBE_PATHS) if paths_in(params, key)}
    # where results go and whether to train anew are no part of what is asked for; a null diff counts as a file alone, so
    # that the first one too is an input that changed
    unasked = ("OUT_DIR", "RETRAIN", "NULL_W_PATH")
    counted = {k: v for k, v in params.items() if k not in located and k not in unasked}
    model = str(params.get("MODEL_ID", ""))
    if model and (hub := hub_id(model)):
        counted["hub commit"] = hub_revision(hub, str(params.get("REVISION") or "main"))
    package = tuple((str(p), (s := p.stat()).st_mtime_ns, s.st_size) for p in sorted(syntax.PACKAGE.rglob("*.py")))
    sources = _sources(parameters.code_of(content), tuple(entry.roots(params)), package)
    return stage_key(counted, entry.run_inputs(params, out), sources=sources)


@lru_cache(maxsize=64)
def _sources(cells: str, roots: tuple[str, ...], package: tuple) -> str:
    """Hash of a notebook's cells, the further code behind its run and what both use; once per state of the package."""
    return syntax.digest(f"{text_key(cells)} {code_key(*roots, strict=False)}".encode())


def record_of(notebook: str, folder: Path) -> dict:
    """What is recorded of the finished run of a notebook in a folder; {} where there is none."""
    return read_sidecar(folder / f"{notebook}.ipynb").get("about", {})


def own_files(notebook: str, folder: Path) -> set[str]:
    """Names of the files in a folder that belong to its finished run of a notebook."""
    made = record_of(notebook, folder).get("outputs", {})
    written = (f"{notebook}.ipynb", f"{notebook}.html")
    return {*made, *written, "params.json", *(sidecar(Path(name)).name for name in written)}


def outputs(folder: Path) -> dict[str, str]:
    """`{relative name: hash}` of the files a run left in its folder, but for what may be written anew (rendering,
    params.json) and the notebook itself."""
    found = {name: file for name, file in files_in(folder).items() if not name.endswith((".html", ".ipynb"))}
    return {name: file_key(file) for name, file in found.items() if name != "params.json"}


def products(notebook: str, folder: Path, params: dict, out: Path) -> dict[str, str]:
    """`{name relative to the run's folder: hash}` of what a run made for others, outside its folder."""
    made = notebook_of(notebook).products(params, out)
    return {os.path.relpath(path, folder): file_key(path) for path in made if path.exists()}


def missing_output(notebook: str, folder: Path) -> str:
    """The first file of a finished run that is gone or is not what it was when the run ended, '' when all are whole. A run
    without a record has none of its files: its notebook is named, or the record where that is what is damaged."""
    target = folder / f"{notebook}.ipynb"
    if broken(sidecar(target)):
        return str(sidecar(target))
    about = record_of(notebook, folder)
    if not isinstance(about.get("outputs"), dict) or not target.is_file():
        return str(target)
    for name, known in {**about["outputs"], **about.get("products", {})}.items():
        if not (folder / name).exists() or file_key(folder / name) != known:
            return os.path.normpath(folder / name)
        if name in about.get("products", {}) and broken(sidecar(folder / name)):
            return os.path.normpath(sidecar(folder / name))
    return ""


def run_state(notebook: str, folder: Path, key: Key) -> str:
    """One of ws.cache.made.STATES for the run in `folder`."""
    found = state(folder / f"{notebook}.ipynb", key)
    if found == "new" and tries(folder, notebook):
        return "failed before"
    return "damaged" if found == "done" and missing_output(notebook, folder) else found


def told_why(notebook: str, folder: Path, found: str, values: dict, inputs: dict[str, str]) -> str:
    """A state for a reader: which parameter or input changed, which file is damaged, how the last try failed. inputs:
    `input_keys` of now."""
    about, told = record_of(notebook, folder), []
    if found == "changed parameters" and "parameters" in about:
        told = parameters.changes(about["parameters"], values)
    elif found == "changed inputs" and "inputs" in about:
        before = about["inputs"]
        told = [shown(name) for name in sorted({*before, *inputs}) if before.get(name) != inputs.get(name)]
    elif found == "damaged":
        told = [shown(missing_output(notebook, folder) or str(folder / f"{notebook}.ipynb"))]
    elif found == "failed before":
        told = [one["reason"] for one in tries(folder, notebook)[-1:]]
    return f"{found}: {', '.join(told)}" if told else found


def shown(name: str) -> str:
    """A path in few words: below the results where it lies there."""
    path = Path(name)
    return path.relative_to(out_folder()).as_posix() if path.is_relative_to(out_folder()) else path.name


def input_keys(notebook: str, params: dict, out: Path) -> dict[str, str]:
    """`{file or folder: hash}` of what a run reads."""
    return {str(path): file_key(path) for path in notebook_of(notebook).run_inputs(params, out)}


def outdated(notebook: str, folder: Path, *files: Path) -> bool:
    """Whether the finished run of a notebook in a folder read one of these files as it no longer is."""
    read = record_of(notebook, folder).get("inputs", {}).values()
    return any(file.exists() and file_key(file) not in read for file in files)


def others(notebook: str, folder: Path) -> list[str]:
    """Names of the files in a run's folder that are not of its notebook: they stay when the folder is replaced."""
    if not folder.is_dir():
        return []
    gone = own_files(notebook, folder)
    tried = tuple(f"{FAILED}/{one['folder'].name}/" for one in tries(folder, notebook))
    hidden = tuple(kind for kind in HIDDEN if kind != ".made")
    found = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() or p.is_symlink()]
    kept = [n for n in found if n not in gone and not any(part.startswith(hidden) for part in n.split("/"))]
    return [n for n in kept if not tried or not n.startswith(tried)]


def stale_adapters(notebook: str, params: dict, out: Path) -> list[Path]:
    """Adapter folders of a run whose training code changed since. It uses them as they are unless told to train anew."""
    trains = notebook_of(notebook).trains
    if not trains or params.get("W_PATH") or params.get("POS_ADAPTER"):
        return []
    found = {side: read_sidecar(side).get("key", {}) for side in seed_folder(params, out).glob("adapters/*")}
    now = code_key(trains, strict=False) if any(found.values()) else ""
    return [side for side, key in sorted(found.items()) if key and key["sources"] != now]
