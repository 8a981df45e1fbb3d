"""Text from outside is shown and never run: in Markdown, in HTML, in rendered pages, in a browser."""

import base64
import dataclasses
import json
import re
import shutil
from hashlib import sha256
from html.parser import HTMLParser
from types import SimpleNamespace

import nbformat
import numpy as np
import papermill
import polars as pl
import pytest
import torch
from hostile import CHROMIUM, PAYLOADS, RUN, browser
from test_report import PIXEL, code, notebook
from test_verdict import planted

from ws.cache.places import ASSETS, notebooks_folder
from ws.delta import report as delta_report
from ws.explanation import words
from ws.runs import html as report
from ws.runs import index as index_of
from ws.show import tables
from ws.show.notebook import embedded, show_table
from ws.stability import words as stability_words
from ws.stability.chance import chance_table
from ws.stability.nulls import null_counts, null_table
from ws.stability.scores import summary_table
from ws.stability.significance import blind_values, significance_table
from ws.stability.verdict import verdict
from ws.steer.effect import steering
from ws.theta import verdict as theta_verdict
from ws.theta.compare import Heldout
from ws.theta.controls import Choice
from ws.train.difference import training_text

PLAIN = "plain"
VOID = {"img", "br", "hr", "meta", "input", "link", "base", "embed", "source", "col"}
BANNED = {"script", "iframe", "object", "embed", "form", "input", "button", "meta", "base", "link", "style", "svg"}
SCRIPT = (report.PARTS / "page.js").read_text(encoding="utf-8")  # the one script, allowed by its hash
HASH = base64.b64encode(sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; script-src 'sha256-{HASH}'; img-src data:;"


class Page(HTMLParser):
    """The elements of a page's main part, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page[page.index("<main>") :].rpartition("</main>")[0] or page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, tuple(sorted((k, v) for k, v in attrs if k not in ("id", "href")))))
        for name, value in attrs:
            assert not name.startswith("on") and tag not in BANNED, (tag, name)
            assert name not in ("srcdoc", "action", "formaction", "ping", "background"), (tag, name)
            if name in ("href", "src"):
                scheme = re.match(r"([a-z]+):", re.sub(r"[\x00-\x20]", "", value).lower())
                assert scheme is None or scheme[1] in (("data",) if tag == "img" else ("http", "https", "mailto"))
            assert name != "style" or "url" not in value
        assert tag not in BANNED, tag

    def handle_data(self, data):
        self.text += data


def line(text: str) -> str:
    return " ".join(text.split())


def rendered(tmp_path, *cells, name: str = "run") -> str:
    content = notebook(*cells)
    nbformat.write(content, tmp_path / f"{name}.ipynb")
    return report.render(tmp_path / f"{name}.ipynb", tmp_path / f"{name}.html").read_text(encoding="utf-8")


def shown(data: dict):
    return code("x", ("display_data", {"data": data}))


def as_shown(thing):
    """What a notebook keeps of a displayed object."""
    kind = "text/markdown" if type(thing).__name__ == "Markdown" else "text/html"
    return shown({kind: thing.data})


def bare(cls: type, **known):
    """An object of a dataclass of which only what is said of it is known."""
    made = object.__new__(cls)
    made.__dict__.update(known)
    return made


def explanation_facts(text: str) -> dict:
    protocol = {"name": text, "eval_split": text, "chat_probes": True, "persona_pairs": text}
    facts = {
        "title": f"{text}, seed 0",
        "behavior": text,
        "model": text,
        "protocol": protocol,
        "layers": [0, 1, 2],
        "d": 8,
    }
    facts |= {"n_layers": 3, "n_heads": 2, "n_kv": 1, "dtype": text, "n_topics": 3, "n_persona_pairs": 2, "n_fit": 2}
    facts |= {"n_templates": 4, "positions": text, "nulls": ["a", "b"]}
    return facts | {"n_eval": 2, "n_train_topics": 2, "w_matrices": 2, "w_norm": 1.0, "w_layers": [0, 1]}


def sweep_summary(text: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    names = [f"{text} {i}" for i in range(4)]
    pct = {
        "subspace": names,
        "family": f"{text} family",
        "kind": "A-hypothesis",
        "source": "own",
        "axis_kind": ["write", "mixed", "read", "write"],
        "sees": ["weights", "pairs", "weights", text],
    }
    numbers = (
        "joint_score",
        "mean_conc_act",
        "mean_conc_w_combined",
        "mean_z_act",
        "mean_z_w_combined",
        "pct_act_ceiling",
    )
    numbers += tuple(f"pct_w_oracle_{t}" for t in ("combined", "oproj", "downproj"))
    numbers += tuple(f"mean_pct_oracle_{t}" for t in ("act", "combined", "oproj", "downproj"))
    numbers += tuple(f"R_{t}_{of}" for t in ("act", "w") for of in ("null", "null_hi", "vs_null_diff"))
    pct = pl.DataFrame(pct | dict.fromkeys(numbers, 120.0)).with_columns(
        joint_score=pl.Series([4.0, 3.0, 2.0, float("nan")]), honest_joint=pl.Series([0.1, 0.9, 0.2, 0.3])
    )
    rows = {"layer": 0, "subspace": names, "ill_conditioned": True, "note": text, "conc_act": 1.0}
    return pct, pl.DataFrame(rows | {"pct_oracle_oproj": 1.0, "pct_oracle_downproj": 1.0})


def stability_text(text: str) -> str:
    scores = planted(3, 8.0, C=9)
    null = np.exp(np.random.default_rng(1).standard_normal((3, 9)))
    scores = dataclasses.replace(scores, null_act=null, null_w=null)
    object.__setattr__(scores, "candidates", [f"{text} {c}" for c in scores.candidates])
    raw = dict.fromkeys(("R_w", "R_act", "H_w", "H_act", "specific"), np.random.default_rng(0).random((50, 3, 9)) + 0.5)
    blind = blind_values(raw)
    summary = summary_table(scores, 0, 50).join(null_table(scores), on="candidate")
    tables_ = summary, chance_table(scores, blind), null_counts(scores), significance_table(scores, blind)
    wild = np.exp(4 * np.array([1.0, -1.0, 0.0]))[:, None, None]
    far = dataclasses.replace(scores, w=np.where(np.arange(9)[None, :, None] == 2, scores.w * wild / 9, scores.w))
    found, none = verdict(scores), verdict(scores, q_w=np.ones(9))
    many = found, none, verdict(scores, unstable=scores.candidates[2:4]), verdict(far)
    said = [stability_words.conclusion(v, *tables_, unstable=scores.candidates[:2]) for v in many]
    return "\n\n".join(said)


def theta_text(text: str) -> str:
    heads = ("cvh", "unconditional", "svd_cvh", "svd_unconditional")
    facts = dict(users=[text, "other"], tokens=torch.ones(4).int(), ce0=torch.ones(4))
    heldout = bare(Heldout, user=torch.tensor([0, 1, 1, 1]), **facts)  # a user's one text: the verdict names the user
    gain = {head: torch.rand(4, generator=torch.Generator().manual_seed(i)) for i, head in enumerate(heads)}
    own = {"scale": "matched", "head": "cvh", "own_theta_wins": 0, "users": 2, "not_for": f"{text}, other"}
    control = pl.DataFrame({c: pl.Series([], dtype=pl.Float64) for c in ("low", "p")})
    choice = Choice("cvh", pl.DataFrame(), "on other texts")
    said = theta_verdict.verdict(heldout, {s: gain for s in ("adam", "optimum")}, control, pl.DataFrame([own]), choice)
    assert "One text is held out of " in said
    return said


def delta_text(text: str) -> str:
    layers = tuple(bare(delta_report.LayerDelta, eff_rank=2.0, directions=row[None]) for row in torch.eye(8)[:6])
    facts = dict(n_calib_tokens=9, n_sequences=1, mode="stream", final_norm=False, n_cut_tokens=0, boot=0, hidden=4)
    run = bare(delta_report.DeltaRun, model=text, layers=layers, **facts)
    return run.conclusion() + "\n\n" + delta_report.setting(run, 3)


def everything(text: str) -> list:
    """Cells with what each notebook says, with a text from outside in every place that takes one."""
    pct, table = sweep_summary(text)
    facts = explanation_facts(text)
    candidate = dict.fromkeys(("name", "family", "axis_kind", "source", "kind", "definition"), text) | {"sees": [text]}
    frame = pl.DataFrame({text: [text, "a"], "first_text": [text, "b"], "n": [1.0, 2.0]})
    markdown = [
        training_text({"source": text, text: 1.0}),
        words.setting_table(facts),
        words.definitions([candidate]),
        stability_text(text),
        theta_text(text),
        delta_text(text),
    ]
    tabled = [show_table(frame), show_table(frame, {text: "x", "n": text})]
    tabled += [SimpleNamespace(data=words.top_table(pct, style="html"))]
    said = [embedded(words.conclusion(pct, table, facts, {}, steering([[1.0, 2.0, 1.5]], [0.1, 0.2])))]
    return [*map(as_shown, [*tabled, *said]), *(shown({"text/markdown": text_}) for text_ in markdown)]


@pytest.fixture(scope="module")
def plain_page(tmp_path_factory):
    return Page(rendered(tmp_path_factory.mktemp("plain"), *everything(PLAIN)))


@pytest.mark.parametrize("i", range(len(PAYLOADS)))
def test_text_from_outside_is_shown_letter_by_letter(i, plain_page, tmp_path):
    """With a payload everywhere a page has the same elements as with a plain word, and shows the payload as often."""
    payload = PAYLOADS[i]
    page = Page(rendered(tmp_path, *everything(payload)))
    assert page.elements == plain_page.elements
    zero = str.maketrans("", "", "\x00\ufffd")  # which of both shows for a zero byte does not matter
    assert line(page.text.translate(zero)).count(line(payload.translate(zero))) == plain_page.text.count(PLAIN)


@pytest.mark.parametrize(
    "text", [*PAYLOADS, "a_b __c__ *d* ~~e~~", "1. one", "- two", "# three #", "=", "> q", "\\", "`", "\udcff"]
)
def test_markdown_shows_a_literal_and_a_code_span_as_they_are(text):
    markdown = report._markdown().render
    seen = line(text).encode("utf-8", "replace").decode().replace("\x00", "\ufffd")
    for before, after, tags in (
        ("", "", ["p"]),
        ("# ", "", ["h1"]),
        ("- ", "", ["ul", "li"]),
        ("| |\n|---|\n| ", " |", ["table", "thead", "tr", "th", "tbody", "tr", "td"]),
    ):
        page = Page("<main>" + markdown(before + tables.literal(text) + after))
        assert ([tag for tag, _ in page.elements], line(page.text)) == (["main", *tags], seen)
    page = Page("<main>" + markdown(f"Behaviour {tables.code(text)}, all"))
    assert [tag for tag, _ in page.elements] == ["main", "p", "code"] and page.text.strip() == f"Behaviour {seen}, all"


def test_figures_show_dollar_signs():
    from matplotlib.figure import Figure

    from ws.explanation.figures import family_styles
    from ws.theta.figures import cosine_heatmap

    for text in (PAYLOADS[12], "$x^$", "a $ b $", "\\$", "$"):
        cosine_heatmap({"cvh": torch.eye(2)}, [text, "other"]).canvas.draw()
        figure = Figure()
        drawn = figure.text(0, 0, family_styles([text])[text]["label"])
        figure.canvas.draw()
        assert drawn._preprocess_math(drawn.get_text()) == (text, False)


def raw(payload: str, folder) -> str:
    """A page of a notebook that takes no care: the payload as it is in every kind of cell and output."""
    cells = [
        nbformat.v4.new_markdown_cell(f"# {payload}\n\n## {payload}\n\n{payload}\n\n## Two\n\n![a](x '{payload}')"),
        nbformat.v4.new_raw_cell(payload),
        shown({"text/html": payload}),
        shown({"text/html": f"<h2>{payload}</h2><h2>{payload}</h2>"}),
        shown({"text/markdown": f"| a |\n|---|\n| {payload} |"}),
        shown({"text/latex": payload}),
        shown({"image/svg+xml": f"<svg xmlns='http://www.w3.org/2000/svg'>{payload}</svg>"}),
        shown({"image/png": f'" onerror="{payload}'}),
        shown({"application/javascript": payload}),
        code(payload, ("stream", {"name": "stdout", "text": payload}), tags=["injected-parameters"]),
        code("x", ("stream", {"name": "stderr", "text": payload})),
        code("x", ("error", {"ename": payload, "evalue": payload, "traceback": [payload]})),
    ]
    return rendered(folder, *cells)


@pytest.mark.parametrize("i", range(len(PAYLOADS)))
def test_a_page_is_cleaned_of_what_was_not_escaped(i, tmp_path):
    page = raw(PAYLOADS[i], tmp_path)
    head = page[: page.index("<main>")]
    assert "<script" not in head.lower() and "<svg" not in head and POLICY in head and head.count("</title>") == 1
    assert head.index("Content-Security-Policy") < head.index("<title>")
    assert page.rpartition("</main>")[2].strip() == f"<script>{SCRIPT}</script>\n</body>\n</html>"
    assert "Two" in Page(page).text


def test_cleaning_keeps_what_reports_use(tmp_path):
    page = rendered(
        tmp_path,
        nbformat.v4.new_markdown_cell(
            "# T\n\n<details open><summary>s</summary>d</details>\n\n| a |\n|:-:|\n| b |\n\n[p](https://example.org/a) "
            "$\\frac{a}{b} \\left( \\begin{matrix} 1 & 2 \\end{matrix} \\right)$ <b style='color:red;position:fixed'>c</b>"
        ),
    )
    for part in (
        "<details open",
        "<summary>s",
        "<mfrac>",
        "<mtable>",
        'stretchy="true"',
        "color:red",
        "text-align:center",
    ):
        assert part in page, part
    assert 'href="https://example.org/a"' in page and "position" not in page[page.index("<main>") :]


def test_only_images_beside_the_notebook_enter_a_page(tmp_path):
    (tmp_path / "secret.png").write_bytes(PIXEL)
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("plot.png", "params.json"):
        (folder / name).write_bytes(PIXEL)
    sources = ("plot.png", "../secret.png", str(tmp_path / "secret.png"), "params.json", "a" * 5000, "a\x00b.png")
    page = rendered(folder, shown({"text/html": "".join(f"<img src='{s}'>" for s in sources)}))
    assert page.count(base64.b64encode(PIXEL).decode()) == 1 and page.count("src=") == 1


def test_an_index_escapes_names_and_its_links_stay_links(tmp_path):
    out = tmp_path / "out"
    names = [line(p).replace("/", "").replace("\x00", "")[:200] for p in PAYLOADS] + [
        "javascript:alert(1)",
        "a#b?c%41 d",
    ]
    for name in names:
        folder = out / name / "delta_svd"
        folder.mkdir(parents=True)
        nbformat.write(notebook(), folder / "delta_svd.ipynb")
    index = index_of.report(out).read_text(encoding="utf-8")
    assert POLICY.replace("data:", "data: file: 'self'") in index
    field = '<input id="filter" type="search" autocomplete="off">'
    assert index.count("<input") == index.count(field) == 1
    page = Page(index.replace(field, ""))
    assert {tag for tag, _ in page.elements} <= set("main h1 h2 h3 section div p label br span a".split())
    from urllib.parse import unquote

    for link in re.findall(r'href="([^"]+)"', index):
        assert not re.match(r"[a-z]+:", link) and not re.search(r"[?#]", link) and (out / unquote(link)).exists()


def test_what_cannot_be_rendered_is_named_in_one_line(tmp_path, monkeypatch):
    broken = tmp_path / "broken.ipynb"
    broken.write_text("{not\njson")
    with pytest.raises(report.NotRendered, match="broken.ipynb: not rendered as HTML: ") as found:
        report.render(broken, tmp_path / "broken.html")
    assert "\n" not in str(found.value) and not (tmp_path / "broken.html").exists()
    monkeypatch.setattr(report, "_markdown", lambda: 1 / 0)
    nbformat.write(notebook(), tmp_path / "a.ipynb")
    with pytest.raises(report.NotRendered, match="a.ipynb.*ZeroDivisionError"):
        report.render(tmp_path / "a.ipynb", tmp_path / "a.html")


OWN = f"""
import torch
import ws

@ws.candidate(family={PAYLOADS[4]!r}, name={PAYLOADS[0]!r})
def mine(m, l):
    {PAYLOADS[1]!r}
    return torch.eye(128)[:, :8]
"""


def hostile_inputs(folder) -> dict[str, dict]:
    """Parameters per notebook: a behaviour, a weight difference, calibration texts and users that hold the payloads."""
    folder.mkdir()
    shipped = json.loads((ASSETS / "sycophancy.json").read_text())
    topics = [
        [f"{t if isinstance(t, str) else t[0]} {p}", p] for t, p in zip(shipped["topics"], PAYLOADS * 2, strict=False)
    ]
    name = next(n for n in (PAYLOADS[0], "my behaviour") if accepted(shipped, n))
    shipped |= {"name": name, "topics": topics, "negations": [], "true_claims": [p for p in PAYLOADS[:8]]}
    for side in ("personas_pos", "personas_neg"):
        shipped[side] = [f"{persona} {p}" for persona, p in zip(shipped[side], PAYLOADS, strict=False)]
    (folder / "behaviour.json").write_text(json.dumps(shipped))
    from safetensors.torch import load_file, save_file

    w = folder / f"{line(PAYLOADS[2]).replace('/', '')}.safetensors"
    save_file(load_file(ASSETS / "tiny_w.safetensors"), w, metadata=w_metadata())
    rows = [
        {"user": PAYLOADS[i][:180], "prompt": PAYLOADS[-i], "text": f"{PAYLOADS[i]} said {j}."}
        for i in range(20)
        for j in range(2)
    ]
    (folder / "users.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "texts.txt").write_text("\n\n".join(line(p) * 3 for p in PAYLOADS))
    few = {
        "STEPS": 2,
        "PERMUTATIONS": 2,
        "GAMMAS": [0.5],
        "BETAS": [0.05],
        "SAMPLE_TOKENS": 2,
        "THETA_DIM": 4,
    }
    own = folder / "own.py"
    own.write_text(OWN)
    behavior = {"BEHAVIOR": str(folder / "behaviour.json"), "W_PATH": str(w)}
    return {
        "weight_diff": behavior | {"ALPHAS": [0.0, 1.0]},
        "v7_sweep": behavior | {"CANDIDATES": [str(own)], "N_NULL": 0},
        "theta_fit": {"USERS": str(folder / "users.jsonl")} | few,
        "delta_svd": {"CALIBRATION": str(folder / "texts.txt"), "BOOT": 0},
    }


def accepted(behavior: dict, name: str) -> bool:
    from ws.data import _from_dict

    try:
        _from_dict(behavior | {"name": name})
    except ValueError:
        return False
    return True


def w_metadata() -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(ASSETS / "tiny_w.safetensors", "pt") as file:
        known = file.metadata() or {}
    try:
        about = json.loads(next(iter(known.values())))
        about |= {"behavior": PAYLOADS[0], "adapter": PAYLOADS[1], "base_model": PAYLOADS[2]}
        return {next(iter(known)): json.dumps(about)}
    except (ValueError, StopIteration, AttributeError, TypeError):
        return known | {"behavior": PAYLOADS[0], "adapter": PAYLOADS[1]}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_no_payload_runs_in_a_browser(tmp_path, monkeypatch):
    """Real notebooks on hostile files, everything that is said with payloads in it, and cells that take no care: nothing
    runs, no error on the console, nothing is asked for. The same payloads in a page without protection do run."""
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    pages = []
    for name, params in hostile_inputs(tmp_path / "inputs").items():
        folder = tmp_path / "out" / "tiny" / name
        folder.mkdir(parents=True)
        run = folder / f"{name}.ipynb"
        params = params | {"OUT_DIR": str(folder)}
        papermill.execute_notebook(
            notebooks_folder() / f"{name}.ipynb", run, params, progress_bar=False, log_output=False
        )
        pages.append(report.render(run, run.with_suffix(".html")))
    for i, payload in enumerate(PAYLOADS):
        for kind, make in (("said", lambda p, f: rendered(f, *everything(p))), ("raw", raw)):
            folder = tmp_path / f"{kind}_{i}"
            folder.mkdir()
            make(payload, folder)
            pages.append(folder / "run.html")
    (tmp_path / "out" / f"javascript:{RUN}").mkdir()
    shutil.copytree(tmp_path / "out/tiny/delta_svd", tmp_path / "out" / PAYLOADS[0].replace("/", "") / "delta_svd")
    pages.append(index_of.report(tmp_path / "out"))
    with browser(tmp_path / "profile") as chromium:
        for page in pages:
            seen = chromium.visit(page)
            if page.parent.name.startswith("raw_"):  # its broken picture is data, and no URL
                seen["errors"] = [e for e in seen["errors"] if "ERR_INVALID_URL" not in e]
            assert seen == {"ran": False, "errors": [], "asked": []}, page
        control = []
        for i, payload in enumerate(PAYLOADS):
            page = tmp_path / f"control_{i}.html"
            page.write_text(f"<!DOCTYPE html><html><body><p>{payload}</p></body></html>")
            seen = chromium.visit(page, leaves=True)
            control.append(seen["ran"] or bool(seen["asked"]))
        assert sum(control) >= 17, control
        # without cleaning the policy alone still holds
        body = "".join(PAYLOADS[i] for i in (0, 1, 2, 4, 5, 6, 14, 16))
        (tmp_path / "policy.html").write_text(report.page("policy", body))
        assert not chromium.visit(tmp_path / "policy.html")["ran"]
