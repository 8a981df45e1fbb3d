"""Executed notebooks as HTML that opens offline.

A page loads nothing: styles and images are inside it, formulas are MathML, code and logs are folded away. Nor does it
run anything: what notebooks show passes `ws.runs.clean`, and the page's Content-Security-Policy allows no script.
"""

import base64
import html
import mimetypes
import os
import re
from functools import lru_cache
from pathlib import Path

from ws.cache.files import write_text
from ws.cache.places import ASSETS
from ws.runs import need

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
    """An executed notebook as one HTML file that needs no network. title: whose run it is, shown below the first heading.
    Raises NotRendered for whatever goes wrong: an unreadable notebook, a package that is missing or does not fit, a full
    disk."""
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
    name, run = text_of(heading[1]).strip() if heading else "", html.escape(title)
    if run and heading:
        body = f'{body[: heading.end()]}\n<p class="run">{run}</p>{body[heading.end() :]}'
    name = ": ".join(filter(None, (name, run))) or html.escape(target.stem)
    style = HtmlFormatter(style="default").get_style_defs(".highlight")
    return _page(name, body, nav, style)


def rendered(page: Path) -> bool:
    """Whether a page is there and whole."""
    if not page.is_file():
        return False
    with page.open("rb") as file:
        file.seek(max(0, page.stat().st_size - 16))
        return file.read().rstrip().endswith(b"</html>")
