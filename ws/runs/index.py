"""All runs below a folder of results: the table behind `out/index.html` and `ws status`, and what clears failed tries."""

import shutil
import tempfile
import time
from dataclasses import replace
from html import unescape
from pathlib import Path

from tabulate import tabulate

from ws.cache.files import sweep, write_text
from ws.cache.made import read_sidecar
from ws.cache.names import BY_HAND
from ws.cache.places import out_folder
from ws.runs import html, parameters
from ws.runs.execute import TEMPORARY
from ws.runs.failed import FAILED, tries
from ws.runs.folders import Params
from ws.runs.identity import record_of, run_state, shown
from ws.runs.mend import damage, mend, page_is_whole
from ws.runs.notebooks import Place, notebook_of
from ws.runs.once import prepare

COLUMNS = ("model", "behavior", "adapter", "seed", "notebook", "variant", "state", "finished", "seconds", "note")


def homes(out: Path) -> list[tuple[Path, str]]:
    """Every (folder, notebook) below `out` that holds a run: finished, unfinished, or failed tries only."""
    found = set()
    for file in out.rglob("*.ipynb"):
        parts = file.relative_to(out).parts
        if any(part.startswith(".") for part in parts) or parts[0] == BY_HAND:
            continue
        failed = (file.parent / "failure.json").is_file()  # a folder may be called so by its owner
        found.add((file.parents[2] if failed else file.parent, file.name.removesuffix(".ipynb")))
    return sorted(found)


def runs(out: Path, place: Place | None = None) -> list[dict]:
    """One row per run below `out`: COLUMNS (variant: protocol of a sweep, null diff; note: what one should know), its
    folder, and links, `(path below out, text)` each. The state is what the folder says: done, failed (no try ended
    well), unfinished (a notebook without its record), damaged."""
    return [_row(folder, name, out, place or Place(out=out)) for folder, name in homes(out)]


def _row(folder: Path, name: str, out: Path, place: Place) -> dict:
    entry, file = notebook_of(name), folder / f"{name}.ipynb"
    about, failures = record_of(name, folder), tries(folder, name)
    run, below = about.get("run", {}), folder.relative_to(out)
    model, behavior, adapter, seed, variant = [*below.parts, *[""] * 5][:5]
    row = {"model": run.get("model", model), "notebook": name, "seconds": about.get("seconds", ""), "folder": folder}
    if entry.level != "model":
        row |= {"behavior": run.get("behavior", behavior), "adapter": run.get("adapter", adapter), "seed": "all"}
        row["variant"] = below.name if entry.level == "adapter" and below.name != entry.folder else ""
    if entry.level == "seed":
        given = not seed.startswith("seed_")  # a given w is of no seed
        row |= {"seed": "" if given else run.get("seed", seed.removeprefix("seed_"))}
        row["variant"] = (seed if given else variant) if entry.folder else ""
    if "null_diff" in below.parts:
        row["variant"] = "null diff"
    record, lost = read_sidecar(file), damage(name, folder)
    row["state"] = "damaged" if lost else "done" if about else "unfinished" if file.is_file() else "failed"
    at = record.get("made_at") or (failures[-1]["at"] if failures else file.stat().st_mtime)
    row["finished"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
    notes = [f"damaged: {shown(lost)}; the same command makes it anew"] if lost else []
    row["note"] = "; ".join(filter(None, [*notes, *_notes(name, about, failures, place), html_note(file, about, lost)]))
    named = {f"{name}.html": "report", "params.json": "parameters", file.name: "notebook", ".": "files"}
    named |= {f"{FAILED}/{one['folder'].name}/{name}.ipynb": "failed try" for one in failures[-1:]}
    row["title"] = entry.title or name
    row["headline"] = html.from_markdown(about.get("headline", ""))
    figure = about.get("figure") or ""
    row["figure"] = (below / figure).as_posix() if figure and (folder / figure).is_file() else ""
    row["links"] = [((below / at).as_posix(), text) for at, text in named.items() if (folder / at).exists()]
    return dict.fromkeys((*COLUMNS, "find"), "") | row


def html_note(notebook: Path, about: dict, lost: str) -> str:
    return "" if lost or not about or page_is_whole(notebook) else "its page could not be rendered"


def _notes(name: str, about: dict, failures: list[dict], place: Place) -> list[str]:
    """What a reader of the index should know of a run: how its last try failed, which parameters are other ones now."""
    told = []
    if failures:
        last, made = failures[-1], about.get("parameters")
        asked = parameters.changes(made, last.get("parameters", {})) if made else []
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last.get("at", 0)))
        told.append(f"a try failed {when}{' with ' + ', '.join(asked) if asked else ''}: {last['reason']}")
    if now := changed_defaults(name, about, place):
        told.append(f"other parameters are usual now: {', '.join(now)}")
    return told


def changed_defaults(name: str, about: dict, place: Place) -> list[str]:
    """What a finished run's parameters are and what the same run would take now, where nothing was said of them."""
    before, given = about.get("parameters"), about.get("given")
    if not isinstance(before, dict) or not isinstance(given, dict):
        return []
    try:
        return parameters.changes(before, prepare(name, given, place=place).values)
    except (ValueError, FileNotFoundError) as error:
        return [str(error)]


def report(out: Path | None = None) -> Path:
    """Write `out/index.html` over all runs below `out`, with links to each one's report, notebook and files. Leftovers
    are removed first, and renderings made that are missing or broken."""
    from jinja2 import Environment, FileSystemLoader

    out = out or out_folder()
    sweep(out)
    sweep(tempfile.gettempdir(), TEMPORARY, below=False)
    for folder, name in homes(out):
        if record_of(name, folder) and not damage(name, folder):
            mend(name, folder)
    look = Environment(loader=FileSystemLoader(html.PARTS), autoescape=True, trim_blocks=True)
    body = look.get_template("index.html.j2").render(groups=_groups(runs(out)))
    return write_text(out / "index.html", html.page("Runs", body, images="data: file: 'self'"))


def _groups(rows: list[dict]) -> list[tuple[str, list[dict], list[dict]]]:
    """Runs by model and behaviour, the newest first, and those of null diffs apart."""
    from ws.runs.clean import text_of

    found: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["finished"], reverse=True):
        told = (row["title"], unescape(text_of(row["headline"])))
        row["find"] = " ".join([*(str(row[c]) for c in COLUMNS if row[c] != ""), *told]).lower()
        if row["seed"] not in ("", "all"):
            row["find"] += f" seed {row['seed']}"
        found.setdefault(", ".join(filter(None, (row["model"], row["behavior"]))), []).append(row)
    parted = {
        name: [[row for row in some if (row["variant"] == "null diff") == null] for null in (False, True)]
        for name, some in found.items()
    }
    return [(name, *halves) for name, halves in parted.items()]


def status(folder: Path, given: Params, cwd: Path, place: Place | None = None) -> str:
    """What is known of the runs in a folder: finished or not, what the same run with `given` would change, failed tries."""
    place = place or Place()
    here = [
        (home, name)
        for home, name in homes(place.out if place.out in folder.parents else folder.parent)
        if home == folder
    ]
    if not here:
        raise FileNotFoundError(f"{folder}: holds no run; `ws status` alone lists all")
    return "\n".join(_told(folder, name, given, cwd, place) for folder, name in here)


def _told(folder: Path, name: str, given: Params, cwd: Path, place: Place) -> str:
    about = record_of(name, folder)
    told = [f"{name}: {about.get('title', shown(str(folder)))}"]
    if about:
        asked = {**about.get("given", {}), **given}
        job = replace(prepare(name, asked, (), cwd, place), folder=folder)
        other = notebook_of(name).own_folder(job.values, place.out)
        if other != folder and not asked.get("OUT_DIR"):
            told.append(f"  finished; with these parameters it is another run, in {shown(str(other))}")
            told += [f"  {change}" for change in parameters.changes(about.get("parameters", {}), job.values)]
        else:
            told.append(f"  {job.why(run_state(name, folder, job.key(place)), place)}")
    else:
        told.append("  not finished")
    for one in tries(folder, name):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.get("at", 0)))
        asked = parameters.changes(about["parameters"], one.get("parameters", {})) if about.get("parameters") else []
        told.append(f"  failed {when}{' with ' + ', '.join(asked) if asked else ''}: {one['reason']}")
        told.append(f"    kept in {shown(str(one['folder']))}")
    return "\n".join(told)


def runs_text(rows: list[dict]) -> str:
    """All runs as a table for a terminal."""
    shown_columns = [c for c in COLUMNS if c not in ("seconds",)]
    return (
        tabulate([[row[c] for c in shown_columns] for row in rows], headers=shown_columns, tablefmt="simple")
        or "no run yet"
    )


def clear_failed(out: Path, really: bool = False) -> list[Path]:
    """Folders of failed tries below `out`; `really` removes them, and run folders that hold nothing else."""
    found = sorted(file.parent for file in out.rglob(f"{FAILED}/*/failure.json"))
    for folder in found if really else []:
        shutil.rmtree(folder)
        for above in (folder.parent, folder.parent.parent):
            if above.is_dir() and not any(above.iterdir()):
                above.rmdir()
    return found
