"""Executed notebooks as HTML that opens offline, and `out/index.html` over all runs.

A page loads nothing: styles and images are inside it, formulas are MathML, code and logs are folded away. Nor does it
run anything: what notebooks show passes `ws.runs.clean`, and the page's Content-Security-Policy allows no script.
"""

import base64
import html
import mimetypes
import os
import re
import time
from functools import lru_cache
from pathlib import Path

from ws.cache.files import sweep, write_text
from ws.cache.made import read_sidecar
from ws.cache.places import ASSETS, out_folder
from ws.runs import need
from ws.runs.notebooks import notebook_of

PARTS = ASSETS / "report"  # a page, its style, and what a notebook's cells look like in it


class NotRendered(RuntimeError):
    """A notebook that did not become a page; one line names the notebook and why."""


def _page(title: str, body: str, nav: str = "", style: str = "") -> str:
    page, css = ((PARTS / name).read_text(encoding="utf-8") for name in ("page.html", "page.css"))
    return page.format(title=title, style=css + style, nav=nav, body=body)


@lru_cache(maxsize=1)
def _markdown():
    """A reader of Markdown with tables, HTML and formulas."""
    from markdown_it import MarkdownIt
    from mdit_py_plugins.amsmath import amsmath_plugin
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    parser = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
    parser.use(dollarmath_plugin, renderer=lambda tex, options: mathml(tex, options["display_mode"]))
    return parser.use(amsmath_plugin, renderer=lambda tex: mathml(tex, True))


def mathml(tex: str, block: bool) -> str:
    """LaTeX as MathML, which browsers show by themselves; what cannot be converted stays readable as code."""
    from latex2mathml import exceptions
    from latex2mathml.converter import convert

    refusals = tuple(x for x in vars(exceptions).values() if isinstance(x, type) and issubclass(x, Exception))
    try:
        return convert(tex, display="block" if block else "inline")
    except (*refusals, IndexError, KeyError):
        return f"<code>{html.escape(tex)}</code>"


def last_of_line(text: str) -> str:
    """What a terminal would show: of each line what follows its last carriage return; of escape codes the colours."""
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return re.sub(r"\x1b\[[0-9;]*[A-HJKSTfhl]", "", "\n".join(lines))


def _inline_images(body: str, folder: Path) -> str:
    """Images that lie beside the notebook, as data URIs."""

    def replace(match: re.Match) -> str:
        file = folder / html.unescape(match[2])
        kind = mimetypes.guess_type(file.name)[0] or ""
        if not (kind.startswith("image/") and os.path.isfile(file) and file.resolve().is_relative_to(folder.resolve())):
            return match[0]
        return f"{match[1]}data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}{match[3]}"

    return re.sub(r"""(<img\b[^>]*?\bsrc=["'])([^"']+)(["'])""", replace, body)


def _without_remote(body: str) -> str:
    """A note instead of what would be fetched from the network."""
    remote = r"""(?i)<(link|img|iframe|embed|source|video|audio)\b[^>]*\b(src|href)\s*=\s*["']?(https?:)?//[^>]*>"""
    return re.sub(remote, "<em>(not shown: it lies on the network)</em>", body)


def _with_anchors(body: str) -> tuple[str, str]:
    """Give second-level headings an anchor; returns the body and links to them."""
    from ws.runs.clean import text_of

    links = []

    def replace(match: re.Match) -> str:
        links.append(f'<a href="#part-{len(links) + 1}">{text_of(match[1])}</a>')
        return f'<h2 id="part-{len(links)}">{match[1]}</h2>'

    body = re.sub(r"<h2>(.*?)</h2>", replace, body, flags=re.DOTALL)
    return body, f"<nav>{' '.join(links)}</nav>\n" if len(links) > 1 else ""


def render(notebook: Path | str, target: Path | str, title: str = "") -> Path:
    """An executed notebook as one HTML file that needs no network. The title is its first heading, else `title`. Raises
    NotRendered for whatever goes wrong: an unreadable notebook, a package that is missing or does not fit, a full disk."""
    try:
        need("nbconvert", "notebooks")
        return write_text(Path(target), _rendered(Path(notebook), Path(target), title))
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise NotRendered(f"{notebook}: not rendered as HTML: {said[:300]}") from error


def _rendered(notebook: Path, target: Path, title: str) -> str:
    import nbformat
    from jinja2 import FileSystemLoader
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    from ws.runs.clean import clean, text_of

    content = nbformat.read(notebook, as_version=4)
    cells = FileSystemLoader(PARTS)
    exporter = HTMLExporter(template_name="basic", extra_loaders=[cells], template_file="notebook.html.j2")
    exporter.register_filter("markdown2html", _markdown().render)
    exporter.register_filter("last_of_line", last_of_line)
    body, _ = exporter.from_notebook_node(content)
    body = _inline_images(_without_remote(body), target.parent)
    body, nav = _with_anchors(body)
    body = clean(body)  # last: what is put into HTML by patterns is cleaned too
    heading = re.search(r"<h1[^>]*>(.*?)</h1>", body, flags=re.DOTALL)
    name = text_of(heading[1]).strip() if heading else html.escape(title or target.stem)
    style = HtmlFormatter(style="default").get_style_defs(".highlight")
    return _page(name, body, nav, style)


def rendered(page: Path) -> bool:
    """Whether a page is there and whole."""
    if not page.is_file():
        return False
    with page.open("rb") as file:
        file.seek(max(0, page.stat().st_size - 16))
        return file.read().rstrip().endswith(b"</html>")


COLUMNS = ("model", "behavior", "adapter", "seed", "notebook", "variant", "state", "finished", "seconds")


def runs(out: Path) -> list[dict]:
    """One row per notebook run below `out`: COLUMNS (variant: protocol of a sweep, null diff), the notebook's file, and
    links, `(path below out, text)` each. The state is what the run's own folder says: done, failed, or unfinished (a
    notebook without its record)."""
    found = []
    for file in sorted(out.rglob("*.ipynb")):
        if file.name.startswith(".") or ".ipynb_checkpoints" in file.parts:
            continue
        failed = file.name.endswith(".failed.ipynb")
        name = file.name.removesuffix(".failed.ipynb" if failed else ".ipynb")
        entry, record = notebook_of(name), read_sidecar(file)
        about, run = record.get("about", {}), record.get("about", {}).get("run", {})
        folder = file.parent.relative_to(out)
        model, behavior, adapter, seed, variant = [*folder.parts, *[""] * 5][:5]
        row = {"model": run.get("model", model), "notebook": name, "seconds": about.get("seconds", ""), "file": file}
        if entry.level != "model":
            row |= {"behavior": run.get("behavior", behavior), "adapter": run.get("adapter", adapter), "seed": "all"}
        if entry.level == "seed":
            row |= {"seed": run.get("seed", seed.removeprefix("seed_")), "variant": variant if entry.folder else ""}
        if "null_diff" in folder.parts:
            row["variant"] = "null diff"
        row["state"] = "failed" if failed else "done" if about else "unfinished"
        at = record.get("made_at", file.stat().st_mtime)
        row["finished"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
        of_run = {} if failed else {f"{name}.html": entry.title or "report", "params.json": "parameters"}
        named = {**of_run, file.name: "notebook", ".": "files"}
        row["links"] = [((folder / at).as_posix(), text) for at, text in named.items() if (file.parent / at).exists()]
        found.append(dict.fromkeys(COLUMNS, "") | row)
    return found


def report(out: Path | None = None) -> Path:
    """Write `out/index.html` over all runs below `out`, with links to each one's report, notebook and files. Leftovers
    are removed first, and renderings made that are missing."""
    from jinja2 import Environment, FileSystemLoader

    out = out or out_folder()
    sweep(out)
    for row in runs(out):
        page = row["file"].with_suffix(".html")
        if row["state"] == "done" and not page.is_file():
            render(row["file"], page, title=row["notebook"])
    look = Environment(loader=FileSystemLoader(PARTS), autoescape=True, trim_blocks=True)
    body = look.get_template("index.html.j2").render(columns=COLUMNS, rows=runs(out))
    return write_text(out / "index.html", _page("Runs", body))
