"""ws.runs.parameters: values by the type of their default, who wins, where paths are seen from."""

import json

import pytest
from test_batch import PARAMETERS, write_notebook

from ws.runs import parameters


def test_parameters_are_parsed_by_the_type_of_the_default():
    parse = parameters.parse
    assert parse("A", "3", 0) == 3 and parse("A", "1e-4", 0.5) == 1e-4 and parse("A", "3", "text") == "3"
    assert parse("A", "0", True) is False and parse("A", "Yes", False) is True
    assert parse("A", "1,2", [0]) == [1, 2] and parse("A", "[1, 2]", [0.5]) == [1.0, 2.0]
    assert parse("A", "q,k", ["q"]) == ["q", "k"] and parse("A", '["q"]', ["q"]) == ["q"] and parse("A", "", [0]) == []
    assert parse("A", "none", None) is None and parse("A", "3", None) == 3 and parse("A", "tiny", None) == "tiny"
    assert parse("A", '{"x": 1}', {}) == {"x": 1}
    for text, default in (("1.5", 0), ("x", 0.5), ("a,b", [0]), ("{", {})):
        with pytest.raises(ValueError, match="A: expects"):
            parse("A", text, default)


def test_parameter_files_and_what_wins(tmp_path):
    cell = PARAMETERS + '\nSPLIT = ""'
    notebook = json.loads(write_notebook(tmp_path, "probe", parameters_cell=cell).read_text())
    base, mine = tmp_path / "base.yaml", tmp_path / "mine" / "set.yaml"
    mine.parent.mkdir()
    base.write_text("RATE: 2\nSEED: 7\nFLAG: true\nSPLIT: true\n")
    mine.write_text("SEED: 8\nW_PATH: w.pt\n")

    def resolve(explicit, files):
        return parameters.resolve("probe", notebook, explicit, files, tmp_path)

    assert resolve({}, [])["SPLIT"] == "" and resolve({}, [base])["SPLIT"] is True  # '' takes whatever is given
    values = resolve({"FLAG": "false"}, [base, mine])
    assert (values["RATE"], values["SEED"], values["FLAG"]) == (2.0, 8, False)
    assert values["W_PATH"] == str(mine.parent / "w.pt")  # seen from the file that says so
    mine.write_text("SEDE: 8\n")
    with pytest.raises(ValueError, match=r"set\.yaml: unknown parameter SEDE; did you mean SEED"):
        resolve({}, [mine])
    mine.write_text("SEED: eight\n")
    with pytest.raises(ValueError, match="SEED: expects int"):
        resolve({}, [mine])
    mine.write_text("- SEED\n")
    with pytest.raises(ValueError, match="expects a mapping"):
        resolve({}, [mine])
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        resolve({}, [tmp_path / "none.yaml"])


def test_paths_are_seen_from_where_they_were_typed(tmp_path):
    (tmp_path / "model").mkdir()
    located = parameters.located
    assert located("W_PATH", "../w.pt", tmp_path / "model") == str(tmp_path / "w.pt")
    assert located("MODEL_ID", "model", tmp_path) == str(tmp_path / "model")
    assert located("MODEL_ID", "Qwen/Qwen3-0.6B", tmp_path) == "Qwen/Qwen3-0.6B"
    (tmp_path / "tiny").mkdir()
    assert located("MODEL_ID", "tiny", tmp_path) == "tiny"
    assert located("BEHAVIOR", "sycophancy", tmp_path) == "sycophancy" and located("W_PATH", "", tmp_path) == ""
    assert located("ADAPTER", "model", tmp_path) == "model"
