"""ws.runs.pairing and .ci/pairs.py: notebook pairs say the same, keep their tag, hold no outputs."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from test_batch import PARAMETERS, write_notebook

from ws.runs import once, pairing
from ws.runs.notebooks import Place

SPEC = spec_from_file_location("pairs", Path(__file__).parents[1] / ".ci" / "pairs.py")
pairs = module_from_spec(SPEC)
SPEC.loader.exec_module(pairs)


@pytest.fixture
def place(tmp_path):
    """Folders of a small project: notebooks, results, logs."""
    return Place(tmp_path / "nbs", tmp_path / "out")


def test_a_script_that_says_something_else_is_refused(place):
    notebook = write_notebook(place.nbs, "probe", "print(1)")
    script = notebook.with_suffix(".py")
    text = f'# %% [markdown]\n# # Report of probe\n\n# %% tags=["parameters"]\n{PARAMETERS}\n\n# %%\nprint(1)\n'
    script.write_text(text)
    pairing.check_pair(notebook)
    script.write_text(text.replace("print(1)", "print(2)"))
    with pytest.raises(ValueError, match=r"probe\.py and probe\.ipynb differ: run `just sync`"):
        once.run_notebook("probe", {}, place=place, quiet=True)


def test_pairs_are_checked(tmp_path, capsys):
    notebook = write_notebook(tmp_path, "probe", "print(1)", parameters_cell="SEED = 0")
    script = tmp_path / "probe.py"
    good = '# %% [markdown]\n# # Report of probe\n\n# %% tags=["parameters"]\nSEED = 0\n\n# %%\nprint(1)\n'
    assert pairs.faults(tmp_path) == ["probe.py is missing: run `just sync`"]
    script.write_text(good)
    assert pairs.faults(tmp_path) == []
    script.write_text(good.replace(' tags=["parameters"]', ""))  # the tag alone is a difference
    assert "differ" in pairs.faults(tmp_path)[0]
    script.write_text(good)
    content = json.loads(notebook.read_text())
    content["cells"][2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1"}]
    content["metadata"].pop("kernelspec")
    notebook.write_text(json.dumps(content))
    found = pairs.faults(tmp_path)
    assert len(found) == 2 and "no kernelspec" in found[0] and "has outputs" in found[1]
    assert pairs.strip(content) and not pairs.strip(content)


def test_a_magic_says_the_same_commented_out_and_not(tmp_path):
    write_notebook(tmp_path, "probe", "%matplotlib inline\nprint(1)", parameters_cell="SEED = 0")
    script = tmp_path / "probe.py"
    text = '# %% [markdown]\n# # Report of probe\n\n# %% tags=["parameters"]\nSEED = 0\n\n# %%\n{}\nprint(1)\n'
    script.write_text(text.format("# %matplotlib inline"))
    assert pairs.faults(tmp_path) == []
    script.write_text(text.format("# %matplotlib agg"))
    assert "differ" in pairs.faults(tmp_path)[0]


def test_strip_and_exit_codes(tmp_path, monkeypatch, capsys):
    notebook = write_notebook(tmp_path, "probe", "print(1)")
    content = json.loads(notebook.read_text())
    content["cells"][2]["execution_count"] = 4
    notebook.write_text(json.dumps(content))
    assert pairs.main(["--strip"], tmp_path) == 0 and "outputs taken out" in capsys.readouterr().out
    assert json.loads(notebook.read_text())["cells"][2]["execution_count"] is None
    monkeypatch.setattr(pairs, "faults", lambda folder: ["probe.py is missing"])
    assert pairs.main([]) == 1 and "probe.py is missing" in capsys.readouterr().err
