"""ws.runs.html: a page that opens offline and reads well, and an index of all runs."""

import base64
import re
import time
from html.parser import HTMLParser

import nbformat
import pytest
from browser import CHROMIUM, open_page

from ws.cache import keys, made
from ws.cache.places import PACKAGE
from ws.runs import html as report
from ws.runs import index as index_of
from ws.show.figures import TYPE
from ws.show.notebook import PIXELS

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
    assert loads.remote == [] and loads.tags.count("script") == 1  # page.js
    assert not re.search(r"cdn|@import|url\(\s*['\"]?http", page, flags=re.IGNORECASE)
    assert 'href="https://arxiv.org/abs/2511.05408"' in page  # a link a reader may follow stays


def test_the_page_reads_as_a_report(page):
    assert "<title>Which subspace?</title>" in page
    assert page.count("<math") == 3 and "<mfrac>" in page and "$$" not in page and "costs 3$" in page
    assert "<code>x^</code>" in page  # what is no formula stays readable
    assert "<th>a</th>" in page and "<td>cell</td>" in page and "<strong>verdict</strong>" in page
    assert page.count('src="data:image/png;base64,') == 2 and page.count('alt="') >= 2
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
    assert loads.remote == []  # no figure: these runs have none


def test_index_of_nothing_says_so(tmp_path):
    assert "No run yet" in index_of.report(tmp_path / "out").read_text(encoding="utf-8")


def test_rendering_is_quick(tmp_path):
    nbformat.write(notebook(nbformat.v4.new_markdown_cell("# Quick\n\n$x$")), tmp_path / "a.ipynb")
    report.render(tmp_path / "a.ipynb", tmp_path / "a.html")
    start = time.monotonic()
    report.render(tmp_path / "a.ipynb", tmp_path / "a.html")
    assert time.monotonic() - start < 2


def test_a_page_opens_with_whose_run_it_is_its_headline_and_its_key_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("WS_OUT", str(tmp_path))
    png = base64.b64encode(PIXEL).decode()
    told = {"text/markdown": {"headline": True}}
    figure = {"image/png": {"alt": "R_w 1 to 4 & more", "key_figure": "key.png", "width": 5}}
    content = notebook(
        nbformat.v4.new_markdown_cell("# Which?\n\nIntroduction.\n\n## One\n\n## Two"),
        code("x", ("display_data", {"data": {"image/png": png}, "metadata": figure})),
        code("y", ("display_data", {"data": {"text/markdown": "**`a` wins** <script>"}, "metadata": told})),
    )
    content.metadata["papermill"] = {"end_time": "2026-11-29T10:11:12+00:00"}
    folder = tmp_path / "tiny" / "v7"
    folder.mkdir(parents=True)
    nbformat.write(content, folder / "run.ipynb")
    page = report.render(folder / "run.ipynb", folder / "run.html", title="tiny, seed 0").read_text(encoding="utf-8")
    main = page[page.index("<main>") :]
    order = ["Which?", "tiny, seed 0, 2026-11-29", "wins</strong>", 'alt="R_w 1 to 4 &amp; more"', "Introduction."]
    places = [main.index(text) for text in order]
    assert places == sorted(places) and main.count("wins</strong>") == 1  # said once, at the head
    assert '<a class="home" href="../../index.html">' in page and "<script>" not in main.partition("</main>")[0]
    bare = report.render(folder / "run.ipynb", folder / "bare.html").read_text(encoding="utf-8")
    assert bare.count("wins</strong>") == 1  # without a title, too
    assert report.headline_of(content) == ("**`a` wins** <script>", "key.png")


def test_the_index_groups_runs_and_shows_what_they_say(tmp_path):
    out = tmp_path / "out"
    for i, (model, variant) in enumerate(
        (("tiny", "weight_diff"), ("tiny", "null_diff/weight_diff"), ("other", "weight_diff"))
    ):
        folder = out / model / "sycophancy" / "lora" / "seed_0" / variant
        folder.mkdir(parents=True)
        nbformat.write(notebook(nbformat.v4.new_markdown_cell("# W")), folder / "weight_diff.ipynb")
        (folder / "alpha_sweep.png").write_bytes(PIXEL)
        run = {"model": model, "behavior": "sycophancy", "adapter": "lora", "seed": 0}
        about = {"notebook": "weight_diff", "run": run, "seconds": 3, "outputs": {}, "figure": "alpha_sweep.png"}
        made.mark_made(
            folder / "weight_diff.ipynb", keys.stage_key({"i": i}), about | {"headline": f"moves **{i}** <b onclick=x>"}
        )
    index = index_of.report(out).read_text(encoding="utf-8")
    assert index.count('<section class="group">') == 2 and index.count("data-find=") == 3
    assert "1 run of null diffs" in index and "<strong>0</strong>" in index and "onclick" not in index
    images = re.findall(r'<img loading="lazy" src="([^"]+)" alt="[^"]+"', index)
    assert len(images) == 3 and all((out / image).is_file() for image in images)
    assert 'id="filter"' in index and '<label for="filter">' in index


STYLE = (report.PARTS / "page.css").read_text(encoding="utf-8")


def ratio(a: str, b: str) -> float:
    """Contrast of two colours as WCAG 2 counts it."""

    def light(colour: str) -> float:
        whole = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
        parts = [int(whole[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_both_modes(dark):
    light, _, rest = STYLE.partition("prefers-color-scheme: dark")
    found = dict(re.findall(r"--(\w+): (#\w+);", rest if dark else light))
    assert {"back", "ink", "dim", "link", "good", "bad", "soft", "wrong"} <= set(found)
    for ground, inks in {
        "back": ("ink", "dim", "link", "good", "bad"),
        "soft": ("ink", "dim", "link"),
        "wrong": ("ink",),
    }.items():
        for ink in inks:
            assert ratio(found[ink], found[ground]) >= 4.5, (ink, ground)


@pytest.mark.parametrize("page", sorted((PACKAGE.parent / "docs" / "reports").rglob("*.html")), ids=lambda p: p.stem)
def test_the_reports_that_are_shown_open_with_their_verdict_and_can_be_read_by_all(page):
    text = page.read_text(encoding="utf-8")
    main = text[text.index("<main>") : text.rindex("</main>")]
    assert '<html lang="en">' in text and '<div class="opening">' in main.partition("<h2")[0]
    images = re.findall(r"<img\b[^>]*>", re.sub(r'src="data:[^"]+"', "", main))
    assert images and all(len((re.search(r'alt="([^"]*)"', one) or [0, ""])[1]) > 20 for one in images)
    assert "No description has been provided" not in main
    levels = [int(level) for level in re.findall(r"<h([1-6])", main)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert not re.search(r"<t[dh][^>]*>\s*(nan|NaN|None|True|False)\s*</t", main)
    assert not re.search(r"<th[^>]*>\s*</th>", main)  # a column without a name says nothing to a screen reader
    shown = re.sub(r"<[^>]+>", " ", re.sub(r"<(details|pre)\b.*?</\1>", "", main, flags=re.DOTALL))
    assert "/cache/" not in shown
    loads = Loads()
    loads.feed(text)
    assert loads.remote == []


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_tables_sort_and_the_index_filters_in_a_browser(tmp_path):
    rows = "".join(
        f"<tr><td>{name}</td><td>{value}</td></tr>"
        for name, value in (("b10", "2.5"), ("a", "-"), ("b9", "+11 (9 to 13)"), ("d", "-3 [-4, -2]"))
    )
    table = f"<table><thead><tr><th>name</th><th>score</th></tr></thead><tbody>{rows}</tbody></table>"
    entries = "".join(
        f'<div class="entry" data-find="{words}">{words}</div>'
        for words in ("tiny seed 1 done", "smollm2 seed 10 failed 2026-11-01")
    )
    body = f'<input id="filter"><span id="seen"></span><section class="group">{entries}</section>{table}'
    (tmp_path / "page.html").write_text(report.page("T", body))
    order = "[...document.querySelectorAll('tbody tr')].map(r => r.cells[0].textContent).join()"
    with open_page(tmp_path / "profile") as page:
        page.open((tmp_path / "page.html").as_uri())
        press = "document.querySelectorAll('.sort')[{}].click()"
        page.js(press.format(1))
        assert page.js(order) == "b9,b10,d,a"  # numbers from the highest, what is none last
        page.js(press.format(1))
        assert page.js(order) == "d,b10,b9,a"
        page.js(press.format(0))
        assert (
            page.js(order) == "a,b9,b10,d"
            and page.js("document.querySelectorAll('th')[0].getAttribute('aria-sort')") == "ascending"
        )
        page.js(
            "(f => { f.value = 'smollm2 failed'; f.dispatchEvent(new Event('input')); })(document.getElementById('filter'))"
        )
        assert page.js("[...document.querySelectorAll('.entry')].map(e => e.hidden).join()") == "true,false"
        assert page.js("document.getElementById('seen').textContent") == "1 of 2"
        page.js(
            "(f => { f.value = 'seed 1'; f.dispatchEvent(new Event('input')); })(document.getElementById('filter'))"
        )
        assert page.js("[...document.querySelectorAll('.entry')].map(e => e.hidden).join()") == "false,true"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
@pytest.mark.parametrize("name", ["v7_sweep", "v7b_stability", "causal_check"])
def test_letters_of_figures_are_nine_pixels_and_more_on_a_screen_of_1280(name, tmp_path):
    inch = 2 * PIXELS  # of the PNG
    with open_page(tmp_path / "profile") as page:
        page.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
        page.open((PACKAGE.parent / "docs" / "reports" / f"{name}.html").as_uri())
        page.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        scales = page.js("[...document.images].map(i => i.getBoundingClientRect().width / i.naturalWidth)")
        assert scales and all(TYPE / 72 * inch * scale >= 9 for scale in scales), scales
        assert page.js("document.documentElement.scrollWidth") <= 1280
