"""ws.runs.html: a page that opens offline and reads well, and an index of all runs."""

import base64
import re
import time
from html.parser import HTMLParser

import nbformat
import pytest

from ws.cache import keys, made
from ws.runs import html as report
from ws.runs import index as index_of

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
LOADING = {"script", "link", "img", "iframe", "embed", "source", "video", "audio", "object"}


class Loads(HTMLParser):
    """Collects what a browser would fetch, and unbalanced tags."""

    def __init__(self):
        super().__init__()
        self.remote, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        for key in ("src", "href", "data"):
            if tag in LOADING and values.get(key) and not values[key].startswith("data:"):
                self.remote.append((tag, values[key]))


def notebook(*cells):
    content = nbformat.v4.new_notebook(cells=list(cells))
    content.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return content


def code(source: str, *outputs, tags=()):
    made = [nbformat.v4.new_output(kind, **content) for kind, content in outputs]
    return nbformat.v4.new_code_cell(source, outputs=made, execution_count=1, metadata={"tags": list(tags)})


@pytest.fixture
def page(tmp_path):
    """A rendered notebook that holds one of everything, remote scripts and images included."""
    (tmp_path / "plot.png").write_bytes(PIXEL)
    png = base64.b64encode(PIXEL).decode()
    cells = [
        nbformat.v4.new_markdown_cell(
            "# Which *subspace*?\n\nInline $\\alpha \\le \\frac{1}{2}$, costs 3\\$.\n\n$$R = \\frac{f}{r/d}$$\n\n"
            "| a | b |\n|---|---|\n| `x` | 1 |\n\n![beside](plot.png) ![far](https://example.org/far.png)\n\n"
            "Bad $x^$ formula. [A paper](https://arxiv.org/abs/2511.05408)\n\n## One\n\ntext\n\n## Two\n"
        ),
        code("SEED = 3", tags=["injected-parameters"]),
        code(
            "print('hidden source')",
            ("stream", {"name": "stdout", "text": "\x1b[31mred\x1b[0m <b>\n 10%\r 99%\r100%\n"}),
        ),
        code("x", ("stream", {"name": "stderr", "text": "noise of a bar"})),
        code("x", ("display_data", {"data": {"image/png": png, "text/plain": "<Figure>"}})),
        code(
            "x",
            (
                "display_data",
                {
                    "data": {
                        "text/html": "<table><tr><td>cell</td></tr></table><script src='https://cdn.org/a.js'></script>"
                    }
                },
            ),
        ),
        code("x", ("display_data", {"data": {"text/markdown": "A **verdict** with $x^2$"}})),
        code("x", ("display_data", {"data": {"application/javascript": "require(['x'])", "text/plain": "js"}})),
        code("x", ("error", {"ename": "ValueError", "evalue": "bad", "traceback": ["\x1b[31mValueError: bad\x1b[0m"]})),
    ]
    nbformat.write(notebook(*cells), tmp_path / "run.ipynb")
    return report.render(tmp_path / "run.ipynb", tmp_path / "run.html").read_text(encoding="utf-8")


def test_nothing_is_fetched(page):
    loads = Loads()
    loads.feed(page)
    assert loads.remote == [] and "script" not in loads.tags
    assert not re.search(r"cdn|@import|url\(\s*['\"]?http", page, flags=re.IGNORECASE)
    assert 'href="https://arxiv.org/abs/2511.05408"' in page  # a link a reader may follow stays


def test_the_page_reads_as_a_report(page):
    assert "<title>Which subspace?</title>" in page
    assert page.count("<math") == 3 and "<mfrac>" in page and "$$" not in page and "costs 3$" in page
    assert "<code>x^</code>" in page  # what is no formula stays readable
    assert "<th>a</th>" in page and "<td>cell</td>" in page and "<strong>verdict</strong>" in page
    assert page.count('src="data:image/png;base64,') == 2
    assert '<a href="#part-1">One</a>' in page and '<h2 id="part-2">Two</h2>' in page


def test_code_and_logs_are_folded_and_bars_show_their_end(page):
    folded = re.findall(r"<details.*?</details>", page, flags=re.DOTALL)
    assert any("parameters of this run" in part and "SEED" in part for part in folded)
    assert any("noise of a bar" in part for part in folded)
    outside = re.sub(r"<details.*?</details>", "", page, flags=re.DOTALL)
    assert "hidden source" not in outside and "noise of a bar" not in outside
    assert "100%" in outside and "10%\r" not in page and " 99%" not in page
    assert "&lt;b&gt;" in outside and "\x1b" not in page and "ValueError: bad" in outside


def test_index_lists_every_run_with_its_state(tmp_path):
    out = tmp_path / "out"
    for seed in (0, 1):
        folder = out / "tiny" / "sycophancy" / "lora" / f"seed_{seed}" / "v7"
        folder.mkdir(parents=True)
        nbformat.write(notebook(nbformat.v4.new_markdown_cell("# Sweep")), folder / "v7_sweep.ipynb")
        run = {"model": "tiny", "behavior": "sycophancy", "adapter": "lora", "seed": seed}
        key = keys.stage_key({"seed": seed})
        if seed == 0:
            made.mark_made(
                folder / "v7_sweep.ipynb", key, {"notebook": "v7_sweep", "run": run, "seconds": 12.5, "outputs": {}}
            )
    failed = out / "tiny" / "delta_svd" / "failed" / "20261128-083000"
    failed.mkdir(parents=True)
    nbformat.write(notebook(), failed / "delta_svd.ipynb")
    (failed / "failure.json").write_text('{"notebook": "delta_svd", "reason": "ValueError: planted", "at": 0}')
    checkpoints = out / "tiny" / ".ipynb_checkpoints"
    checkpoints.mkdir()
    nbformat.write(notebook(), checkpoints / "old.ipynb")

    rows = {(r["notebook"], str(r["seed"])): r["state"] for r in index_of.runs(out)}
    assert rows == {("delta_svd", ""): "failed", ("v7_sweep", "0"): "done", ("v7_sweep", "1"): "unfinished"}
    index = index_of.report(out).read_text(encoding="utf-8")
    assert (out / "tiny/sycophancy/lora/seed_0/v7/v7_sweep.html").is_file()  # rendered, for it was missing
    links = re.findall(r'href="([^"]+)"', index)
    assert "tiny/sycophancy/lora/seed_0/v7/v7_sweep.html" in links and all((out / link).exists() for link in links)
    assert "ValueError: planted" in index and "12.5" in index and 'class="state-failed"' in index
    loads = Loads()
    loads.feed(index)
    assert loads.remote == []


def test_index_of_nothing_says_so(tmp_path):
    assert "No run yet" in index_of.report(tmp_path / "out").read_text(encoding="utf-8")


def test_rendering_is_quick(tmp_path):
    nbformat.write(notebook(nbformat.v4.new_markdown_cell("# Quick\n\n$x$")), tmp_path / "a.ipynb")
    report.render(tmp_path / "a.ipynb", tmp_path / "a.html")
    start = time.monotonic()
    report.render(tmp_path / "a.ipynb", tmp_path / "a.html")
    assert time.monotonic() - start < 2
