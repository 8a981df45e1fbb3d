"""ws.runs.parameters: values by their rule, who wins, a model's own defaults, where paths are seen from, what changed."""

import json
from math import inf, isnan, nan

import pytest
from test_batch import PARAMETERS, write_notebook

from ws.cache.places import notebooks_folder
from ws.runs import parameters, sets
from ws.runs.grid import Grid, make_jobs, read_options
from ws.runs.parameters import changes, filled, model_defaults
from ws.runs.rules import RULES, check

PARAMS = notebooks_folder() / "params"


def resolve(name: str, explicit: dict | None = None, files=(), folder=None) -> dict:
    notebook = parameters.read_notebook(notebooks_folder() / f"{name}.ipynb")
    return parameters.resolve(name, notebook, explicit or {}, files, folder)


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


def test_a_models_own_stand_between_the_cell_and_what_is_asked_for(tmp_path):
    def lr(explicit=None, files=()):
        values = resolve("weight_diff", explicit, files)
        return values["LR"], values["SAMPLES"]

    mine = tmp_path / "mine.yaml"
    mine.write_text("LR: 1e-3\nSAMPLES: none\n")  # YAML reads 1e-3 as a text
    assert lr() == lr({"LR": "none"}) == lr({}, [PARAMS / "tiny.yaml"]) == (5e-3, 4)
    assert lr({"MODEL_ID": "Qwen/Qwen3-0.6B"}) == (2e-4, 10)
    assert lr({}, [mine]) == (1e-3, 4) and lr({"LR": "0.5", "SAMPLES": "7"}, [mine]) == (0.5, 7)
    values = resolve("weight_diff")
    assert values["TOPICS"] is None and values["PERSONAS"] is None
    may = ("TOPICS", "PERSONAS", "RESAMPLE_PAIRS", "N_HELDOUT")
    assert None not in (value for key, value in values.items() if key not in may)
    assert resolve("theta_fit")["LR"] == 0.05  # another thing of the same name
    assert model_defaults("weight_diff", {"LR": None, "MODEL_ID": "tiny"}) == {"LR": 5e-3}
    assert model_defaults("weight_diff", {"LR": 1.0, "MODEL_ID": "tiny"}) == {} == model_defaults("mine", {"LR": None})


def test_models_yaml_holds_what_the_cells_leave_open(monkeypatch, tmp_path):
    known = sets.models()
    assert set(known) == {"default", "tiny", "smollm2", "gemma3-270m"}
    open_ = {name: {k for k, r in rules.items() if r.none == parameters.MODELS_OWN} for name, rules in RULES.items()}
    assert {name: set(values) for name, values in known["default"].items()} == {n: k for n, k in open_.items() if k}
    for of in known.values():
        for name, values in of.items():
            check(name, values)
            assert set(values) <= open_[name]
    cell = (notebooks_folder() / "weight_diff.py").read_text()
    for key, told in (("LR", 2e-4), ("SAMPLES", 10)):  # the cell's comments say what the file says
        line = next(line for line in cell.splitlines() if line.startswith(f"{key} = None  # "))
        assert float(line.partition("(")[2].split()[0]) == told == known["default"]["weight_diff"][key]
    (tmp_path / "params").mkdir()
    monkeypatch.setattr(sets, "notebooks_folder", lambda: tmp_path)
    for text, told in (
        ("default: {weight_diff: {LR: -1, SAMPLES: 1}}", "LR: expects a number above 0, got -1"),
        ("tiny: {weight_diff: {LR: 1.0e-3}}", "SAMPLES: nbs/params/models.yaml has no value for it; give one"),
        ("tiny: [LR]", "tiny: expects notebooks, and below each its parameters"),
    ):
        (tmp_path / "params" / "models.yaml").write_text(text)
        with pytest.raises(ValueError, match=told):
            filled("weight_diff", {"LR": None, "SAMPLES": None, "MODEL_ID": "tiny"})


def test_the_demo_and_a_batch_ask_for_the_same():
    from ws.demo import DEMO, show_jobs

    demo = {job.name: job.values for job in show_jobs(DEMO)}
    axes = {"models": ("tiny",), "behaviors": (), "adapters": (), "seeds": ("0-2",)}
    batch = {job.name: job.values for job in make_jobs(read_options(axes, {}, None, PARAMS))}
    assert batch and {name: demo[name] for name in batch} == batch
    assert {v["LR"] for n, v in batch.items() if n.endswith("weight_diff")} == {5e-3}
    two = {job.name: job.values for job in make_jobs(Grid(seeds=(0, 1)))}
    assert all(demo[name] == values for name, values in two.items() if "all seeds" not in name)


def test_a_first_cell_gets_what_a_command_gets():
    """What a notebook's own globals become, and what `ws nb` or a batch gives the same notebook."""
    for name in RULES:
        cell = parameters.defaults(parameters.read_notebook(notebooks_folder() / f"{name}.ipynb"), name)
        found = filled(name, {**cell, "__builtins__": {}, "In": []})
        assert {k: repr(v) for k, v in found.items()} == {k: repr(v) for k, v in resolve(name).items()}
    lab = {"EPOCHS": 1, "LORA_LAYERS": "2-5", "ALPHAS": (0, 1), "LR": None, "MODEL_ID": "tiny", "SEED": "3"}
    used = filled("weight_diff", lab)
    expected = {"EPOCHS": 1.0, "LORA_LAYERS": [2, 3, 4, 5], "ALPHAS": [0.0, 1.0], "LR": 5e-3, "SEED": 3}
    assert used == {**expected, "MODEL_ID": "tiny"} and repr(used["EPOCHS"]) == "1.0"
    with pytest.raises(ValueError, match="weight_diff: SEED: expects a whole number from 0 to 4294967295, got -1"):
        filled("weight_diff", {"SEED": -1})
    # a protocol by its name or with its switches spelled out is the same request
    assert resolve("v7_sweep", {"PROTOCOL": "v7b"}) == resolve("v7_sweep", {}, [PARAMS / "v7b.yaml"])
    assert resolve("v7_sweep", {"RAW_LAST": "true"})["RAW_LAST"] == "true"


def test_everything_wrong_is_told_at_once_and_a_path_that_is_none(tmp_path):
    (tmp_path / "set.yaml").write_text("SAMPLES: 2.5\nLR: .nan\n3: x\n")
    with pytest.raises(ValueError) as refused:
        resolve("weight_diff", {"SEDE": "3", "R": "x", "a\nb": "1"}, [tmp_path / "set.yaml"])
    lines = str(refused.value).splitlines()
    assert [line[: line.index(": ") + 2] for line in lines] == ["weight_diff, set.yaml: "] * 3 + ["weight_diff: "] * 3
    for line, told in zip(lines, ("SAMPLES: expects", "LR: expects", "parameter '3'", "did you mean SEED", "R: expects",
                                  "parameter 'a\\nb'"), strict=True):  # fmt: skip
        assert told in line
    (tmp_path / "folder").mkdir()
    (tmp_path / "w.pt").write_text("x")
    for given, told in (
        ({"MODEL_ID": "./none"}, "weight_diff: MODEL_ID: ./none: no such model folder"),
        ({"MODEL_ID": "a/b/c"}, "MODEL_ID: a/b/c: no such model folder"),
        ({"MODEL_ID": "tinny"}, "MODEL_ID: tinny: no model of this project.*did you mean tiny?"),
        ({"MODEL_ID": "SmolLM2"}, "did you mean smollm2?"),
        ({"MODEL_ID": "folder"}, "not a model folder, config.json is missing"),
        ({"MODEL_ID": "w.pt"}, "not a model folder"),
        ({"BEHAVIOR": "flattery"}, "BEHAVIOR: 'flattery' is neither a shipped behaviour"),
    ):
        with pytest.raises(ValueError, match=told):
            resolve("weight_diff", given, folder=tmp_path)


def test_a_parameter_file_is_data_and_its_faults_name_it(tmp_path):
    file, mark = tmp_path / "set.yaml", tmp_path / "executed"
    for text, told in (
        (f"SEED: !!python/object/apply:os.system ['touch {mark}']", "set.yaml, line 1: not YAML: .*tag"),
        (f"SEED: !!python/name:os.system\nLR: !!python/object/new:os.system ['touch {mark}']", "not YAML"),
        ("SEED: [1\n", "set.yaml, line 2: not YAML"),
        ("\tSEED: 1", "set.yaml, line 1: not YAML"),
        ("[" * 1000, "not YAML: RecursionError"),
        ("x: " + "y" * (1 << 20), "larger than 1048576 bytes"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=told) as refused:
            parameters.read_set(file)
        assert "\n" not in str(refused.value)
    file.write_bytes(b"SEED: \xff")
    with pytest.raises(ValueError, match="set.yaml: not YAML: UnicodeDecodeError"):
        parameters.read_set(file)
    assert not mark.exists()
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    file.write_text("\n".join(["a0: &a0 [x]", *levels, "ALPHAS: *a11"]))  # 10^11 elements, were they written out
    with pytest.raises(ValueError, match="ALPHAS: expects two or more"):
        resolve("weight_diff", {}, [file])


def test_values_reach_the_notebook_as_they_are(tmp_path):
    """Papermill writes them as Python; nothing in a value is executed."""
    from papermill.translators import PythonTranslator

    mark = tmp_path / "executed"
    texts = [
        "a\nb",
        "'\"\\",
        "{x}",
        "\u2028",
        f'"; open({str(mark)!r}, "w"); "',
        f"'''\nopen({str(mark)!r}, 'w')\n'''",
        "\r#",
    ]
    cell = "TEXT = 'x'\nTEXTS = ['x']\nRATE = 0.5\nANY = None\nOUT_DIR = ''"
    notebook = json.loads(write_notebook(tmp_path, "probe", parameters_cell=cell).read_text())
    for text in texts:
        given = {
            "TEXT": text,
            "TEXTS": json.dumps([text]),
            "RATE": "nan",
            "ANY": json.dumps({text: [text, None, True]}),
        }
        values = parameters.resolve("probe", notebook, given)
        space: dict = {}
        exec(PythonTranslator.codify(values), space)
        assert space["TEXT"] == text and space["TEXTS"] == [text] and isnan(space["RATE"])
        assert space["ANY"] == {text: [text, None, True]}
    assert not mark.exists()


def test_changes_name_what_differs_and_nothing_else(tmp_path):
    old = resolve("weight_diff", {"LR": "2e-4", "SAMPLES": "10"}) | {"OUT_DIR": "/a", "RETRAIN": True}
    new = resolve("weight_diff") | {"OUT_DIR": "/b"}
    assert (
        changes(new, old)[::-1]
        == ["LR 0.005 -> 0.0002", "SAMPLES 4 -> 10"]
        == changes(new, dict(reversed(old.items())))
    )
    assert changes(old, new) == ["SAMPLES 10 -> 4", "LR 0.0002 -> 0.005"]
    assert changes(new, new) == changes(json.loads(json.dumps(new)), new) == []
    (tmp_path / "link").symlink_to(tmp_path)
    same = {"LR": None, "SAMPLES": None, "EPOCHS": 1, "ALPHAS": tuple(new["ALPHAS"]), "R": 32.0}
    assert changes({**new, **same}, new) == [] == changes(new, {**new, **same})
    assert changes({"W_PATH": str(tmp_path / "x" / ".." / "w.pt")}, {"W_PATH": str(tmp_path / "link" / "w.pt")}) == []
    sweep = resolve("v7_sweep", {"PROTOCOL": "v7b"})
    empty = {"EVAL_SPLIT": "", "SOURCES": [], "CHAT_PROBES": True}
    assert changes({**sweep, **empty}, sweep) == []
    assert changes({**sweep, "PCS": 0, "GONE": 5}, {**sweep, "MORE": 5}) == [
        "PCS 0 -> 8",
        "MORE (new) -> 5",
        "GONE 5 -> (gone)",
    ]
    assert changes({"NULL_DIFF": False, "X": nan, "Y": 1}, {"NULL_DIFF": True, "X": nan, "Y": inf}) == [
        "NULL_DIFF False -> True", "Y 1 -> inf",
    ]  # fmt: skip
    assert changes({"TOPICS": None}, {"TOPICS": 6}) == ["TOPICS None -> 6"]
    far, lists = "/somewhere/" + "deep/" * 20, list(range(100))
    told = changes(
        {"W_PATH": far + "a.pt", "L": lists, "T": ""}, {"W_PATH": far + "b.pt", "L": [*lists, 7], "T": "a\nb"}
    )
    assert told[0].startswith("W_PATH ...") and told[0].endswith("deep/b.pt") and "deep/a.pt -> ..." in told[0]
    assert told[1].startswith("L [0, 1, 2,") and told[1].endswith("... (101)") and told[2] == r"T '' -> 'a\nb'"
    assert max(map(len, told)) < 100
    # where the difference is in what was left out, all of it is shown
    assert "7, 1]" in changes({"L": [*lists, 7]}, {"L": [*lists[:-1], 7, 1]})[0]
    assert (
        changes({"MODEL_ID": str(tmp_path), "LR": None}, {"MODEL_ID": "tiny", "LR": 2e-4})[1:] == []
    )  # no model any more
