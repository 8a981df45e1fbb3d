"""Damage of runs: what of a finished run is not what it was, what a run would read that is not, and what can be mended
without running anything: a page from its notebook, `params.json` from the run's record.
"""

import json
import os
import shlex
from pathlib import Path

from ws.cache.files import read_json, write_json
from ws.cache.keys import Key, stage_key
from ws.cache.made import Damaged, intact, mark_made, read_sidecar, sidecar, state, verified
from ws.cache.places import out_folder
from ws.cache.records import broken, read_record, tell
from ws.runs import Missing, html, parameters
from ws.runs.identity import missing_output, record_of
from ws.runs.notebooks import Place, notebook_of


def damage(name: str, folder: Path) -> str:
    """The first file of a finished run that is not what it was, '' when all are whole or the run never finished."""
    file = folder / f"{name}.ipynb"
    if broken(sidecar(file)):
        return str(sidecar(file))
    record = read_sidecar(file)
    if not record.get("about"):
        return ""
    return missing_output(name, folder) if intact(file, record) else str(file)


def damaged_input(notebook: str, params: dict, out: Path) -> str:
    """What a run would read that is not what this project wrote, in a line with the command that makes it anew; '' when
    all is whole. Bytes are read now, whatever is remembered of a file."""
    for path in notebook_of(notebook).run_inputs(params, out):
        try:
            verified(path)
        except Damaged as error:
            file, again = error.args
            return str(Damaged(file, maker(file) or again))
    return ""


def maker(path: Path) -> str:
    """The command of the finished run that made a file or folder, '' where none says so."""
    if path.name.startswith(".made.") and path.name != sidecar(path.parent).name:
        path = path.with_name(path.name.removeprefix(".made.").removesuffix(".json"))  # what it is the record of
    for record in (f for above in list(path.parents)[:3] for f in above.glob("**/.made.*.ipynb.json")):
        about = read_record(record).get("about", {})
        names = {
            os.path.normpath(record.parent / name) for key in ("outputs", "products") for name in about.get(key, {})
        }
        if {str(path), str(path.parent)} & names:
            return f"just nb {about['notebook']}{_typed(about, record.is_relative_to(out_folder()))}"
    return ""


def _typed(about: dict, at_home: bool) -> str:
    """The parameters of a finished run as they are typed, those that are not its notebook's own defaults."""
    name, given = about["notebook"], about.get("given", {})
    usual = parameters.defaults(parameters.read_notebook(Place().notebook(name)), name)
    words = {k: v for k, v in given.items() if v != usual.get(k) and not (k == "OUT_DIR" and at_home)}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in words.items()}
    return "".join(f" -p {k} {shlex.quote(text)}" for k, text in texts.items())


def mend(notebook: str, folder: Path) -> str:
    """Have the page and `params.json` of a finished run as they were, from its notebook and its record; '' when the page
    is there, else why it cannot be made."""
    about = record_of(notebook, folder)
    if (told := about.get("told")) and read_json(folder / "params.json") != told:
        tell(f"damaged: {folder / 'params.json'} is not what was written; it is written anew")
        write_json(folder / "params.json", told)
    return rendering(folder / f"{notebook}.ipynb", about.get("title", notebook))


def rendering(target: Path, title: str) -> str:
    """Have a finished notebook's page; '' when it is there, else why it cannot be made. The notebook is not touched."""
    page = target.with_suffix(".html")
    if (found := state(page, key := page_key(target))) != "done":
        if found == "damaged":
            tell(f"damaged: {page} is not what was written; it is rendered anew")
        try:
            html.render(target, page, title=title)
        except (html.NotRendered, Missing) as error:
            return f"{error}"
        mark_made(page, key, {})
    return ""


def page_key(target: Path) -> Key:
    """Key of an executed notebook's page: it belongs to that very notebook, whatever style it was rendered in."""
    return stage_key({}, [target], sources="page")


def page_is_whole(target: Path) -> bool:
    page = target.with_suffix(".html")
    return target.is_file() and state(page, page_key(target)) == "done"
