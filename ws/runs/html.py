"""Executed notebooks as HTML that opens offline, and `out/index.html` over all runs.

A page loads nothing: styles and images are inside it, formulas are MathML, code and logs are folded away.
"""

import base64
import html
import mimetypes
import re
import time
from functools import lru_cache
from pathlib import Path

from ws.cache import made as store
from ws.cache.places import OUT

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{nav}<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light; --line: #d9dde3; --soft: #f6f7f9; --ink: #1d2430; --dim: #5b6675; --link: #1b5fa8; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.5rem 6rem; }
nav { max-width: 62rem; margin: 0 auto; padding: 1rem 1.5rem 0; font-size: .85rem; color: var(--dim); }
nav a { margin-right: 1rem; white-space: nowrap; }
a { color: var(--link); }
h1, h2, h3 { line-height: 1.25; margin: 1.8em 0 .6em; }
h1 { font-size: 1.9rem; margin-top: .5em; } h2 { font-size: 1.4rem; border-bottom: 1px solid var(--line); }
pre, code { font: .84rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { overflow-x: auto; margin: .6rem 0; } p code, li code, td code { background: var(--soft); padding: .1em .3em; }
table { border-collapse: collapse; font-size: .84rem; display: block; overflow-x: auto; margin: .8rem 0;
  width: max-content; max-width: max(100%, calc(50vw + 29rem)); }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; } thead th { border-bottom: 2px solid var(--dim); }
tbody tr:hover { background: var(--soft); }
img, svg { max-width: 100%; height: auto; }
blockquote { margin: .8rem 0; padding: .1rem 1rem; border-left: 3px solid var(--line); color: var(--dim); }
details { margin: .3rem 0; } details > summary { cursor: pointer; color: var(--dim); font-size: .78rem; }
details > pre, details > div { background: var(--soft); border: 1px solid var(--line); padding: .5rem .8rem; }
.output_error pre { background: #fff1f0; padding: .6rem; }
.state-done { color: #1a7f37; } .state-failed { color: #b42318; font-weight: 600; }
math[display="block"] { margin: .8rem 0; overflow-x: auto; }
"""

TEMPLATE = """{%- extends 'basic/index.html.j2' -%}
{% block in_prompt %}{% endblock %}
{% block output_area_prompt %}{% endblock %}
{% block empty_in_prompt %}{% endblock %}
{% block input_group %}
{%- set tags = cell.metadata.get('tags', []) -%}
<details class="code"><summary>
{%- if 'injected-parameters' in tags %}parameters of this run{% elif 'parameters' in tags %}default parameters
{%- else %}code{% endif -%}
</summary><div>{{ cell.source | highlight_code(metadata=cell.metadata) }}</div></details>
{% endblock input_group %}
{% block stream_stdout %}<pre>{{ output.text | last_of_line | ansi2html }}</pre>{% endblock %}
{% block stream_stderr %}
<details class="log"><summary>log</summary><pre>{{ output.text | last_of_line | ansi2html }}</pre></details>
{% endblock %}
{% block data_javascript %}{% endblock %}
{% block data_widget_view %}{% endblock %}
"""


# --- one notebook ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _markdown():
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


def markdown_html(text: str) -> str:
    """Markdown with tables, HTML and formulas as HTML."""
    return _markdown().render(text)


def last_of_line(text: str) -> str:
    """What a terminal would show: of each line what follows its last carriage return; of escape codes the colours."""
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return re.sub(r"\x1b\[[0-9;]*[A-HJKSTfhl]", "", "\n".join(lines))


def _inline_images(body: str, folder: Path) -> str:
    """Images that lie beside the notebook, as data URIs."""

    def replace(match: re.Match) -> str:
        file = folder / html.unescape(match[2])
        if re.match(r"[a-z]+:", match[2]) or not file.is_file():
            return match[0]
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        return f"{match[1]}data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}{match[3]}"

    return re.sub(r"""(<img\b[^>]*?\bsrc=["'])([^"']+)(["'])""", replace, body)


def _without_remote(body: str) -> str:
    """Without scripts, and without tags that would fetch something from the network."""
    body = re.sub(r"<script\b.*?</script\s*>", "", body, flags=re.DOTALL | re.IGNORECASE)
    body = re.sub(r"@import[^;]*;", "", body)
    return re.sub(
        r"""<(link|img|iframe|embed|source|video|audio)\b[^>]*\b(src|href)\s*=\s*["']?(https?:)?//[^>]*>""",
        "<em>(not shown: it lies on the network)</em>",
        body,
        flags=re.IGNORECASE,
    )


def _with_anchors(body: str) -> tuple[str, str]:
    """Give second-level headings an anchor; returns the body and links to them."""
    links = []

    def replace(match: re.Match) -> str:
        links.append(f'<a href="#part-{len(links) + 1}">{re.sub("<[^>]+>", "", match[1])}</a>')
        return f'<h2 id="part-{len(links)}">{match[1]}</h2>'

    body = re.sub(r"<h2>(.*?)</h2>", replace, body, flags=re.DOTALL)
    return body, f"<nav>{' '.join(links)}</nav>\n" if len(links) > 1 else ""


def render(notebook: Path | str, target: Path | str, title: str = "") -> Path:
    """An executed notebook as one HTML file that needs no network. The title is its first heading, else `title`."""
    import nbformat
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    notebook, target = Path(notebook), Path(target)
    content = nbformat.read(notebook, as_version=4)
    exporter = HTMLExporter(
        template_name="basic", extra_loaders=[DictLoader({"report.j2": TEMPLATE})], template_file="report.j2"
    )
    exporter.register_filter("markdown2html", markdown_html)
    exporter.register_filter("last_of_line", last_of_line)
    body, _ = exporter.from_notebook_node(content)
    body = _inline_images(_without_remote(body), target.parent)
    body, nav = _with_anchors(body)
    heading = re.search(r"<h1[^>]*>(.*?)</h1>", body, flags=re.DOTALL)
    name = re.sub(r"<[^>]+>", "", heading[1]).strip() if heading else html.escape(title or target.stem)
    style = STYLE + HtmlFormatter(style="default").get_style_defs(".highlight")
    return store.write_text(target, PAGE.format(title=name, style=style, nav=nav, body=body))


# --- all runs --------------------------------------------------------------------------------------------------------


MODEL_LEVEL = ("delta_svd", "theta_fit")  # notebooks that know no behaviour, adapter or LoRA seed
ALL_SEEDS = ("v7b_stability",)


def runs(out: Path = OUT) -> list[dict]:
    """One row per notebook run below `out`: model, behavior, adapter, seed, notebook, variant (protocol of a sweep, null
    diff), state, finished, seconds, folder.

    The state is what the run's own folder says: done, failed, or unfinished (a notebook without its record).
    """
    found = []
    for notebook in sorted(out.rglob("*.ipynb")):
        if notebook.name.startswith(".") or ".ipynb_checkpoints" in notebook.parts:
            continue
        failed = notebook.name.endswith(".failed.ipynb")
        name = notebook.name.removesuffix(".failed.ipynb" if failed else ".ipynb")
        record = store.read_sidecar(notebook)
        about, run = record.get("about", {}), record.get("about", {}).get("run", {})
        parts = [*notebook.parent.relative_to(out).parts, "", "", "", ""]
        at = record.get("made_at", notebook.stat().st_mtime)
        about_model = name in MODEL_LEVEL
        seed = "" if about_model else "all" if name in ALL_SEEDS else run.get("seed", parts[3].removeprefix("seed_"))
        found.append(
            {
                "model": run.get("model", parts[0]),
                "behavior": "" if about_model else run.get("behavior", parts[1]),
                "adapter": "" if about_model else run.get("adapter", parts[2]),
                "seed": seed,
                "notebook": name,
                "variant": "null diff" if "null_diff" in parts else parts[4] if name == "v7_sweep" else "",
                "state": "failed" if failed else "done" if about else "unfinished",
                "finished": time.strftime("%Y-%m-%d %H:%M", time.localtime(at)),
                "seconds": about.get("seconds", ""),
                "folder": notebook.parent.relative_to(out).as_posix(),
                "file": notebook.name,
            }
        )
    return found


def index(out: Path = OUT) -> Path:
    """Write `out/index.html`: every run found below `out`, with links to its report, notebook and files."""

    def link(path: str, text: str) -> str:
        return f'<a href="{html.escape(path)}">{html.escape(text)}</a>' if (out / path).exists() else ""

    columns = ("model", "behavior", "adapter", "seed", "notebook", "variant", "state", "finished", "seconds")
    lines = []
    for row in runs(out):
        cells = "".join(
            f'<td class="state-{row[c]}">{row[c]}</td>' if c == "state" else f"<td>{html.escape(str(row[c]))}</td>"
            for c in columns
        )
        base = row["folder"]
        links = [
            link(f"{base}/{row['notebook']}.html", "report") if row["state"] != "failed" else "",
            link(f"{base}/{row['file']}", "notebook"),
            link(f"{base}/params.json", "parameters") if row["state"] != "failed" else "",
            link(base, "files"),
        ]
        lines.append(f"<tr>{cells}<td>{' '.join(x for x in links if x)}</td></tr>")
    head = "".join(f"<th>{c}</th>" for c in (*columns, "links"))
    body = f"<h1>Runs</h1>\n<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"
    if not lines:
        body = "<h1>Runs</h1>\n<p>No run yet: <code>just demo</code> makes the first.</p>"
    return store.write_text(out / "index.html", PAGE.format(title="Runs", style=STYLE, nav="", body=body))


def report(out: Path = OUT) -> Path:
    """Render every finished notebook below `out` whose rendering is missing, remove leftovers, write the index."""
    store.sweep(out)
    for row in runs(out):
        notebook = out / row["folder"] / row["file"]
        page = notebook.with_suffix(".html")
        if row["state"] == "done" and not page.is_file():
            render(notebook, page, title=row["notebook"])
    return index(out)
