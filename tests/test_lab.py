"""`just lab`: what is done in JupyterLab reaches both halves of a pair, keeps its outputs, and shows nothing red."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import pytest
from browser import CHROMIUM, open_page
from stubs import wait_for

from ws.cache.places import CLONE
from ws.runs.html import last_of_line, render
from ws.runs.pairing import cells_of
from ws.show import bars

NAME = "delta_svd"
TOKEN = "planted"
JUST = shutil.which("just", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


class Lab:
    """A running `just lab`: its project, where it says it listens, and its contents as the browser gets them."""

    def __init__(self, project: Path, told: dict):
        self.project, self.url = project, told["url"]
        self.nbs = (project / "nbs").relative_to(told["root_dir"]).as_posix().removeprefix(".")

    def path(self, name: str) -> str:
        return f"{self.nbs}/{name}".lstrip("/")

    def ask(self, path: str, model: dict | None = None) -> dict:
        """GET a notebook, or save one."""
        head = {"Authorization": f"token {TOKEN}", "Content-Type": "application/json"}
        body = json.dumps(model | {"type": "notebook", "format": "json"}).encode() if model else None
        url = f"{self.url}api/contents/{path}?type=notebook&content=1"
        asked = urllib.request.Request(url, body, head, method="PUT" if model else "GET")
        with urllib.request.urlopen(asked) as answer:
            return json.load(answer)

    def cells(self) -> list[tuple[str, str, bool]]:
        """Of the notebook's .py, which must say what its .ipynb says."""
        script, notebook = (cells_of(self.project / "nbs" / f"{NAME}.{end}") for end in ("py", "ipynb"))
        assert script == notebook
        return script

    def outputs(self, source: str) -> str:
        """What the cell with this source printed, as the .ipynb on disk has it."""
        found = nbformat.read(self.project / "nbs" / f"{NAME}.ipynb", 4)
        return "".join(o.get("text", "") for c in found.cells if c.source == source for o in c.outputs)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """`just lab`'s very command, in a copy of the project, with settings of its own and without a browser."""
    if not (JUST and CLONE):
        pytest.skip("just is not installed, or this is no clone")
    tmp_path = tmp_path_factory.mktemp("lab")
    project = tmp_path / "clone"
    for name in ("nbs", "ws"):
        shutil.copytree(CLONE / name, project / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb*"))
    for name in ("justfile", "pyproject.toml"):
        shutil.copy(CLONE / name, project / name)
    (project / ".venv").symlink_to(sys.prefix)
    homes = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "RUNTIME", "DATA")}
    environment = os.environ | homes | {"IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(project)}
    words = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}"]
    command = [JUST, "--no-deps", "lab", *words, f"--port={free_port()}", "--LabApp.expose_app_in_browser=True"]
    log = tmp_path / "lab.log"
    with log.open("w") as noise:
        quiet = {"stdout": noise, "stderr": noise, "start_new_session": True}
        server = subprocess.Popen(command, cwd=project, env=environment, **quiet)
    try:
        wait_for(lambda: "is running at" in log.read_text() or server.poll() is not None, what="the server")
        assert server.poll() is None, log.read_text()
        found = json.loads(next((tmp_path / "runtime").glob("jpserver-*.json")).read_text())
        wait_for(lambda: answers(found["port"]), what="the server's port")  # it says that it runs before it listens
        yield Lab(project, found)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def printed(text: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_output("stream", name="stdout", text=text)


def test_what_is_saved_reaches_both_halves_and_outputs_stay(lab):
    script, notebook = (lab.project / "nbs" / f"{NAME}.{end}" for end in ("py", "ipynb"))
    before = script.read_bytes(), notebook.read_bytes()
    content = lab.ask(lab.path(notebook.name))["content"]
    lab.ask(lab.path(notebook.name), {"content": content})
    assert (script.read_bytes(), notebook.read_bytes()) == before  # opening and saving alone changes nothing

    content["cells"].append(nbformat.v4.new_code_cell("print(6 * 7)", outputs=[printed("42\n")], execution_count=1))
    lab.ask(lab.path(notebook.name), {"content": content})
    assert lab.cells()[-1] == ("code", "print(6 * 7)", False) and lab.outputs("print(6 * 7)") == "42\n"

    content = lab.ask(lab.path(script.name))["content"]  # the .py, opened as a notebook
    assert content["cells"][-1]["outputs"][0]["text"] == "42\n"
    content["cells"][-1] |= {"source": "print(6 * 8)", "outputs": [printed("48\n")]}
    lab.ask(lab.path(script.name), {"content": content})
    assert lab.cells()[-1] == ("code", "print(6 * 8)", False) and lab.outputs("print(6 * 8)") == "48\n"
    assert sum(tagged for _, _, tagged in lab.cells()) == 1  # the parameters, for papermill
    assert lab.ask(lab.path(notebook.name))["content"]["cells"][-1]["outputs"][0]["text"] == "48\n"


def test_what_a_run_wrote_is_not_paired(lab):
    """An executed notebook of a run may be opened and saved without a .py appearing beside the results."""
    assert lab.nbs, "the server shows nothing but nbs/"
    folder = lab.project / "out" / "run"
    folder.mkdir(parents=True)
    shutil.copy(lab.project / "nbs" / f"{NAME}.ipynb", folder)
    content = lab.ask(f"out/run/{NAME}.ipynb")["content"]
    lab.ask(f"out/run/{NAME}.ipynb", {"content": content})
    assert [p.name for p in folder.glob("*.*") if p.is_file()] == [f"{NAME}.ipynb"]


@pytest.mark.parametrize("root", ["", "nbs"])
def test_pairing_does_not_depend_on_the_servers_root(root, tmp_path):
    """Also for who starts JupyterLab by hand in nbs/."""
    jupytext = pytest.importorskip("jupytext")
    shutil.copytree(CLONE / "nbs", tmp_path / "nbs")
    manager = jupytext.TextFileContentsManager()
    manager.root_dir = str(tmp_path / root)
    path = f"{'' if root else 'nbs/'}{NAME}.ipynb"
    model = manager.get(path)
    model["content"]["cells"].append(nbformat.v4.new_code_cell("print(6 * 7)", outputs=[printed("42\n")]))
    manager.save(model, path)
    assert cells_of(tmp_path / "nbs" / f"{NAME}.py")[-1][1] == "print(6 * 7)"
    assert manager.get(path.replace(".ipynb", ".py"), type="notebook")["content"].cells[-1].outputs


BARS = "from ws.show.bars import tqdm"
FIRST = ".jp-Notebook .jp-Cell"


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: apt-get install chromium")
def test_in_a_browser_both_halves_are_edited_run_saved_and_opened_again(lab, tmp_path):
    first, second = f"{BARS}; [print(6 * i) for i in tqdm([7])]", "; print(6 * 8)"
    with open_page(tmp_path / "profile") as page:

        def opened(end: str) -> None:
            page.open(f"{lab.url}lab/tree/nbs?token={TOKEN}&reset")
            page.wait("window.jupyterapp")
            page.js("window.jupyterapp.restored.then(() => true)")
            asked = json.dumps({"path": lab.path(f"{NAME}.{end}"), "factory": "Notebook"})
            page.js(
                f"window.jupyterapp.commands.execute('docmanager:open', {asked}).then(w => void (window.opened = w))"
            )
            page.wait(f"document.querySelector('{FIRST}') && !document.querySelector('.jp-NotebookPanel .jp-Spinner')")
            page.wait("window.opened.sessionContext.session?.kernel?.status == 'idle'")

        def shows(text: str) -> str:
            return f"[...document.querySelectorAll('.jp-OutputArea-output')].some(o => o.innerText.includes('{text}'))"

        def save() -> None:
            page.press("s", "ctrl")
            page.wait("!window.opened.context.model.dirty")

        opened("ipynb")
        page.click(f"{FIRST} .jp-InputPrompt")
        page.press("Escape")
        page.press("a")  # a cell above the first
        page.press("Enter")
        page.type(first)
        page.press("Enter", "shift")
        page.wait(shows("42"))
        save()
        assert lab.cells()[0] == ("code", first, False) and "42\n" in lab.outputs(first)
        assert page.js("document.querySelectorAll('[data-mime-type=\"application/vnd.jupyter.stderr\"]').length") == 0

        opened("py")
        page.wait(shows("42"))  # a .py has its outputs
        page.click(f"{FIRST} .jp-InputPrompt")
        page.press("Enter")
        page.press("End", "ctrl")
        page.type(second)
        page.press("Enter", "shift")
        page.wait(shows("48"))
        save()
        assert lab.cells()[0] == ("code", first + second, False) and "48\n" in lab.outputs(first + second)

        for end in ("ipynb", "py"):
            opened(end)
            page.wait(shows("48"))
            assert page.js(f"document.querySelector('{FIRST} .cm-content').innerText") == first + second


def test_a_bar_is_plain_in_a_notebook_and_usual_elsewhere(monkeypatch, capsys):
    list(bars.tqdm(range(2), "outer"))
    shown = capsys.readouterr()
    assert not shown.out and "outer: 100%" in shown.err
    monkeypatch.setattr(bars, "in_kernel", lambda: True)
    for _ in bars.tqdm(range(2), "outer"):
        list(bars.tqdm(range(2), "inner", leave=False))
    with bars.plain():
        print("of a library", file=sys.stderr)
    shown = capsys.readouterr()
    assert not shown.err and shown.out.endswith("\nof a library\n")
    assert "inner:   0%" in shown.out and "\x1b" not in shown.out and shown.out.count("\n") == 2
    assert last_of_line(shown.out).startswith("outer: 100%")


def test_a_report_folds_bars_away_and_shows_what_is_printed(tmp_path):
    text = "\rbases by layer:  50%|##  | 4/8\rbases by layer: 100%|####| 8/8\nthe answer is 42\n"
    text += "waiting for /x/cache: in use by pid 1 on a\nbases: 42 built, 0 kept\n"
    cell = nbformat.v4.new_code_cell("x", outputs=[printed(text)])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "run.ipynb")
    page = render(tmp_path / "run.ipynb", tmp_path / "run.html").read_text()
    folded, outside = re.findall(r"(?s)<details.*?</details>", page), re.sub(r"(?s)<details.*?</details>", "", page)
    assert any("100%|####| 8/8" in part for part in folded) and " 50%" not in page
    assert "the answer is 42" in outside and not re.search("8/8|pid 1|42 built", outside)
