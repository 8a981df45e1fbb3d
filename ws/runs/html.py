"""Executed notebooks as HTML that opens offline.

A page loads nothing: styles and images are inside it, formulas are MathML, code and logs are folded away. It opens with whose
run it is, the run's headline and its key figure. What notebooks show passes `ws.runs.clean`, and the page's
Content-Security-Policy allows one script, by its hash: page.js, which sorts tables and filters the index.
"""

import base64
import hashlib
import html
import mimetypes
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ws.cache.files import write_text
from ws.cache.places import ASSETS, out_folder
from ws.runs import need
from ws.show import HEADLINE, KEY

if TYPE_CHECKING:
    from markupsafe import Markup

PARTS = ASSETS / "report"  # a page, its style, and what a notebook's cells look like in it


class NotRendered(RuntimeError):
    """A notebook that did not become a page; one line names the notebook and why."""


def page(title: str, body: str, nav: str = "", style: str = "", images: str = "data:") -> str:
    """images: where they may come from."""
    whole, css, script = ((PARTS / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return whole.format(
        title=title, style=css + style, nav=nav, body=body, script=script, allowed=f"'sha256-{allowed}'", images=images
    )


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
    return body, " ".join(links) if len(links) > 1 else ""


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
    opening = _opening(taken_out(content, HEADLINE), found_in(content, KEY))
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
    at = heading.end() if heading else 0
    about = f'<p class="run">{run}{_made(content)}</p>\n' if run else ""
    body = f"{body[:at]}\n{about}{opening}{body[at:]}"
    name = ": ".join(filter(None, (name, run))) or html.escape(target.stem)
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    return page(
        name, body, _home(target) + nav, f"{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}"
    )


def found_in(content: dict, mark: str) -> list[dict]:
    """Data and metadata of a notebook's outputs that carry a mark, in their order: `{kind: data, mark: what it says, ...}`."""
    outputs = [output for cell in content["cells"] for output in cell.get("outputs", [])]
    return [
        {**about, **output["data"]}
        for output in outputs
        for about in output.get("metadata", {}).values()
        if isinstance(about, dict) and about.get(mark)
    ]


def taken_out(content: dict, mark: str) -> list[dict]:
    """The same; they are no longer in the notebook then."""
    found = found_in(content, mark)
    for cell in content["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [one for one in cell["outputs"] if not found_in({"cells": [{"outputs": [one]}]}, mark)]
    return found


def _opening(said: list[dict], figures: list[dict]) -> str:
    """What a page begins with, below whose run it is: clean HTML."""
    from ws.runs.clean import clean

    parts = [_markdown().render(text_in(one["text/markdown"])) for one in said if "text/markdown" in one]
    for one in figures[:1]:
        image = text_in(one.get("image/png", "")).replace("\n", "")
        parts.append(f'<p><img alt="{html.escape(one.get("alt", ""))}" src="data:image/png;base64,{image}"></p>')
    return f'<div class="opening">{"".join(map(clean, parts))}</div>' if parts else ""


def headline_of(content: dict) -> tuple[str, str]:
    """An executed notebook's headline (Markdown), and the file of its key figure; "" for what it has not."""
    said = (text_in(one["text/markdown"]) for one in found_in(content, HEADLINE) if "text/markdown" in one)
    return "\n\n".join(said), next((str(one[KEY]) for one in found_in(content, KEY)), "")


def from_markdown(text: str) -> "Markup":
    """Markdown as clean HTML, for a template."""
    from markupsafe import Markup

    from ws.runs.clean import clean

    return Markup(clean(_markdown().render(text)))


def text_in(data: str | list[str]) -> str:
    """Text of a notebook's output, which may be kept as a list of lines."""
    return data if isinstance(data, str) else "".join(data)


def _made(content: dict) -> str:
    """When the run ended, where the notebook says so."""
    ended = str(content.get("metadata", {}).get("papermill", {}).get("end_time") or "")
    return f", {html.escape(ended[:10])}" if re.match(r"\d{4}-\d\d-\d\d", ended) else ""


def _home(target: Path) -> str:
    """A link to the index, for a page below the folder of results."""
    out, folder = out_folder().absolute(), target.absolute().parent
    return (
        f'<a class="home" href="{os.path.relpath(out / "index.html", folder)}">all runs</a>\n'
        if out in folder.parents
        else ""
    )
