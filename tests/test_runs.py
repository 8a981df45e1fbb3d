"""ws.runs.notebooks, identity: one table says where a run goes and what it depends on; what changes its key."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_batch import write_notebook

from ws.cache import places, syntax
from ws.cache.files import write_text
from ws.runs import identity, index, notebooks, once, parameters
from ws.runs.notebooks import Notebook, Place, notebook_of


def test_folders_of_runs(tmp_path):
    behavior = tmp_path / "behavior.json"
    behavior.write_text('{"name": "my tastes"}')
    params = {"MODEL_ID": "org/model", "BEHAVIOR": str(behavior), "ADAPTER": "dora", "SEED": 2}
    base = tmp_path / "org__model"
    expected = {
        "weight_diff": "my_tastes/dora/seed_2/weight_diff",
        "v7_sweep": "my_tastes/dora/seed_2/v7",
        "v7b_stability": "my_tastes/dora/v7b",
        "delta_svd": "delta_svd_seed2",
        "theta_fit": "theta_fit_seed2",
        "of_a_user": "my_tastes/dora/seed_2/of_a_user",
    }
    for name, folder in expected.items():
        assert notebook_of(name).run_folder(params, tmp_path) == base / folder
    sweep = notebook_of("v7_sweep")
    assert sweep.run_folder({**params, "PROTOCOL": "v7b"}, tmp_path).name == "v7b"
    assert sweep.run_folder({**params, "OUT_DIR": "/x/y"}, tmp_path) == Path("/x/y")
    null = notebook_of("weight_diff").run_folder({**params, "NULL_DIFF": True}, tmp_path)
    assert null == base / "my_tastes/dora/seed_2/null_diff/weight_diff"


def cells(code: str) -> dict:
    return {"cells": [{"cell_type": "code", "metadata": {}, "source": code}]}


def test_a_run_of_v7_depends_on_the_w_of_its_seed(tmp_path):
    params, content = {"MODEL_ID": "org/model", "SEED": 1, "PROTOCOL": "v7"}, cells("import ws.cache.places")
    before = identity.run_key("v7_sweep", content, params, tmp_path)
    write_text(notebooks.run_id(params).folder(tmp_path) / "w.safetensors", "weights")
    assert before.differs(identity.run_key("v7_sweep", content, params, tmp_path)) == "changed inputs"
    assert identity.run_key("weight_diff", content, params, tmp_path).inputs == before.inputs


def test_a_folder_of_runs_counts_by_the_seeds_that_are_compared(tmp_path):
    """Not as a whole: results may go into it."""
    params, content = {"MODEL_ID": "org/model", "SEEDS": [1], "PROTOCOL": "v7b", "RUNS_DIR": str(tmp_path)}, cells("")
    table = tmp_path / "seed_1" / "v7b" / "v7_per_layer.csv"
    write_text(table, "1")

    def key():
        return identity.run_key("v7b_stability", content, params, tmp_path / "out")

    first = key()
    write_text(tmp_path / "v7b" / "verdict.md", "x")
    write_text(tmp_path / "seed_2" / "v7b" / "v7_per_layer.csv", "2")
    assert key() == first
    write_text(table, "2")
    assert first.differs(key()) == "changed inputs"


def test_a_file_of_candidates_is_an_input_wherever_it_lies(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("x = 1\n")
    assert {"CANDIDATES", "PAIRS", "W_PATH", "OUT_DIR", "RUNS_DIR"} <= set(notebooks.path_names())
    for default, text in (([], "mine.py"), ([], "mine.py,mine.py"), ("", "mine.py")):
        content = cells("")
        content["cells"].insert(0, {"cell_type": "code", "metadata": {"tags": ["parameters"]}})
        content["cells"][0]["source"] = f"CANDIDATES = {default!r}\nPROTOCOL = 'v7'\nMODEL_ID = 'org/model'"
        values = parameters.resolve("v7_sweep", content, {"CANDIDATES": text}, folder=tmp_path)
        assert notebooks.paths_in(values, "CANDIDATES")[0] == file
        first = identity.run_key("v7_sweep", content, values, tmp_path)
        file.write_text(file.read_text() + "# more\n")
        assert first.differs(identity.run_key("v7_sweep", content, values, tmp_path)) == "changed inputs"
    assert parameters.parse("CANDIDATES", "mine.py", []) == ["mine.py"]


def test_a_sixth_notebook_is_one_entry(tmp_path, monkeypatch):
    entry = Notebook(
        "probe", "What a stub says", ("EXTRA",), "adapter", "probed", inputs=lambda params, out: [out / "beside"]
    )
    monkeypatch.setitem(notebooks.TABLE, "probe", entry)
    place = Place(tmp_path / "nbs", tmp_path / "out")
    own = 'MODEL_ID = "org/model"\nADAPTER = "lora"\nEXTRA = ""\nOUT_DIR = ""'
    body = "import os; from pathlib import Path; from ws.cache.places import out_folder\n"
    body += "(Path(OUT_DIR) / 'where').write_text(f'{out_folder()} {Path(EXTRA).read_text()}')"
    write_notebook(place.nbs, "probe", body, parameters_cell=own)
    (tmp_path / "extra.txt").write_text("one")

    def ask():
        return once.run_notebook("probe", {"EXTRA": "extra.txt"}, cwd=tmp_path, place=place, quiet=True)

    done = ask()
    assert done.ok and done.folder == place.out / "org__model" / "sycophancy" / "lora" / "probed", done.error
    assert (done.folder / "where").read_text() == f"{place.out} one"  # the kernel writes where its caller said
    assert ask().found == "done"
    write_text(place.out / "beside", "x")
    assert ask().found == "changed inputs"
    (tmp_path / "extra.txt").write_text("two")
    assert ask().found == "changed inputs"
    (done.folder / "where").write_text(f"{place.out} owt")
    assert ask().found == "damaged"  # as long, but other bytes
    row = index.runs(place.out)[0]
    assert (row["notebook"], row["seed"], row["state"]) == ("probe", "all", "done")
    assert "What a stub says" in index.report(place.out).read_text()


def test_results_go_where_ws_out_says_when_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("WS_OUT", str(tmp_path / "elsewhere"))
    write_notebook(tmp_path / "nbs", "probe", "open(OUT_DIR + '/x', 'w').write('x')")
    done = once.run_notebook("probe", place=Place(tmp_path / "nbs"), quiet=True)
    assert done.ok and done.folder.is_relative_to(tmp_path / "elsewhere"), done.error
    assert list((tmp_path / "logs").glob("*_probe_*.log")) and index.report() == tmp_path / "elsewhere" / "index.html"


# --- keys follow the functions that make a run -------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package that a test may edit, with a candidate more of v5 and one of v7b."""
    root = tmp_path / "ws"
    shutil.copytree(syntax.PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__", "assets", "nbs"))
    file = root / "subspaces" / "from_weights.py"
    text = file.read_text() + "\n# a remark\n"
    for source in ("v5", "v7b"):
        text += f'\n@candidate(family="W:write", source="{source}")\ndef fake_{source}(m, l):\n    return 1\n'
    file.write_text(text.replace("def fake_v5(m, l):\n", 'def fake_v5(m, l):\n    "A fake of v5."\n'))
    monkeypatch.setattr(syntax, "PACKAGE", root)
    return root


def keys(out: Path) -> dict[str, str]:
    """Sources of the runs of every notebook of the table, v7_sweep with the v7 protocol."""
    found = {}
    for name in notebooks.TABLE:
        content = parameters.read_notebook(places.notebooks_folder() / f"{name}.ipynb")
        values = parameters.defaults(content, name)
        found[name] = identity.run_key(name, content, values, out).sources
    return found


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def test_only_what_a_run_is_made_by_makes_it_changed_code(package, tmp_path):
    first = keys(tmp_path)

    def changed(room: str, old: str, new: str) -> list[str]:
        edit(package / room, old, new)
        now = keys(tmp_path)
        edit(package / room, new, old)
        return [name for name in first if now[name] != first[name]]

    weights = "subspaces/from_weights.py"
    assert changed(weights, "# a remark", "# another remark") == []
    assert changed(weights, '    "A fake of v5."', '    "In other words."') == []
    assert changed(weights, "def fake_v7b(m, l):\n    return 1", "def fake_v7b(m, l):\n    return 2") == [
        "v7b_stability"
    ]
    swept = changed(weights, 'v5."\n    return 1', 'v5."\n    return 2')
    assert swept == ["v7_sweep", "v7b_stability"]
    figures = [package / room / "figures.py" for room in ("diff", "explanation", "stability", "delta", "theta")]
    for file in figures:
        edit(file, "return figure", "return None or figure")
    assert keys(tmp_path) == first


def test_candidates_of_a_run_are_those_of_its_protocol(package):
    def fakes(**params) -> list[str]:
        return [n.rpartition(".")[2] for n in notebook_of("v7_sweep").roots(params) if ".fake_" in n]

    assert fakes(PROTOCOL="v7") == fakes(PROTOCOL="v7", SOURCES=[]) == ["fake_v5"]
    assert fakes(PROTOCOL="v7b") == fakes() == ["fake_v5", "fake_v7b"]
    assert fakes(PROTOCOL="v7", SOURCES=["v7b"]) == ["fake_v7b"]


LOADED = """
import importlib, pkgutil
from ws.runs.notebooks import candidate_code
from ws.cache.sources import code_key
roots = [*candidate_code(None), "ws.train.lora.train_adapter", "ws.delta.measure.delta_svd", "ws.theta.users.fit_users"]
before = code_key(*roots, strict=False)
for room in "model diff delta train subspaces theta".split():
    for found in pkgutil.iter_modules(importlib.import_module(f"ws.{room}").__path__):
        importlib.import_module(f"ws.{room}.{found.name}")
print(code_key(*roots, strict=False) == before)
"""


def test_keys_are_the_same_whatever_a_process_has_loaded():
    done = subprocess.run(
        [sys.executable, "-c", LOADED], cwd=places.PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


# --- without the extras ------------------------------------------------------------------------------------------------

BLOCKED = "jupyterlab ipykernel IPython jupytext papermill nbconvert nbformat nbclient jupyter_client mdit_py_plugins"
BLOCKED += " latex2mathml dask distributed dask_jobqueue beartype pytest"
BARE = """
import importlib, os, pkgutil, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}.split():
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
import ws, ws.cli
for room in "data model diff delta steer train subspaces explanation stability theta".split():
    package = importlib.import_module(f"ws.{{room}}")
    for found in pkgutil.iter_modules(getattr(package, "__path__", [])):
        importlib.import_module(f"ws.{{room}}.{{found.name}}")
for i, last in enumerate({lasts!r}):
    if (child := os.fork()) == 0:
        for stream, name in enumerate(("out", "err"), 1):
            os.dup2(os.open(f"{said}/{{i}}.{{name}}", os.O_CREAT | os.O_WRONLY), stream)
        exec(last)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def bare(lasts: list[str], cwd: Path, said: Path) -> list[tuple[int, str, str]]:
    """All of the science where nothing of the extras can be imported, then each of some lines in a process of its own: its
    exit code and what it said."""
    code = BARE.format(blocked=BLOCKED, lasts=lasts, said=said)
    environment = {**os.environ, "PYTHONPATH": str(places.PACKAGE.parent), "WS_OUT": str(cwd / "out")}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = [[(said / f"{i}.{name}").read_text() for name in ("out", "err")] for i in range(len(lasts))]
    return [(int(code), *text) for code, text in zip(done.stdout.split(), texts, strict=True)]


def test_the_science_needs_no_extra_and_a_missing_one_is_named(tmp_path, tmp_path_factory, parity_folder):
    connects = "from ws.runs.engine import Settings, connect; connect(Settings(), 1, 'x', None).__enter__()"
    lasts = [f"ws.cli.main(['inspect', {str(parity_folder / 'w.pt')!r}])", "ws.cli.main(['nb', 'delta_svd'])", connects]
    (fine, told, _), (refused, _, why), (_, _, batch) = bare(lasts, tmp_path, tmp_path_factory.mktemp("said"))
    assert fine == 0 and "norm" in told
    assert refused == 2 and len(why.splitlines()) == 1, why
    assert "is missing: pip install 'weight-steering[notebooks]'" in why
    assert "distributed is missing: pip install 'weight-steering[batch]'" in batch, batch
    assert not any(tmp_path.iterdir())
