"""ws.runs.rules: the schema of each notebook agrees with its cell and with the code that uses the values."""

import json
import subprocess
import sys
from itertools import product
from math import inf, nan

import pytest

from ws.cache.places import PACKAGE, notebooks_folder
from ws.runs import parameters, rules
from ws.runs.rules import RULES, check, faults, read, rule_of


def defaults(name: str) -> dict[str, object]:
    return parameters.defaults(parameters.read_notebook(notebooks_folder() / f"{name}.ipynb"), name)


@pytest.mark.parametrize("name", sorted(p.stem for p in notebooks_folder().glob("*.ipynb")))
def test_every_parameter_has_a_rule_and_its_default_keeps_it(name):
    known = defaults(name)
    assert set(known) == set(RULES[name])
    check(name, known)
    for key, value in known.items():  # read as the same value of the same type: Lab and a command agree
        assert repr(read(RULES[name][key], value)) == repr(value), key
        if isinstance(value, list | int | float):
            assert repr(read(RULES[name][key], json.dumps(value))) == repr(value), key


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("weight_diff", {"SEED": -1}, "SEED: expects a whole number from 0 to 4294967295, got -1"),
        ("weight_diff", {"SEED": 2**32}, "got 4294967296"),
        ("weight_diff", {"SEED": True}, "SEED: expects a whole number"),
        ("weight_diff", {"SEED": 1.0}, "SEED: expects a whole number"),
        ("weight_diff", {"SEED": "3"}, "SEED: expects a whole number"),  # in a cell a text is a text
        ("weight_diff", {"LORA_LAYERS": "2-5"}, "LORA_LAYERS: expects whole numbers such as [2, 3, 4, 5], got '2-5'"),
        ("weight_diff", {"LORA_LAYERS": [2, -3]}, "LORA_LAYERS: expects whole numbers"),
        ("weight_diff", {"ALPHAS": [nan]}, "ALPHAS: expects two or more different numbers"),
        ("weight_diff", {"ALPHAS": [1.0, inf]}, "ALPHAS"),
        ("weight_diff", {"ALPHAS": [1.0, 1.0]}, "ALPHAS"),
        ("weight_diff", {"ALPHAS": []}, "ALPHAS"),
        ("weight_diff", {"ADAPTER": "lorra"}, "ADAPTER: expects one of lora, rslora, pissa, dora, got 'lorra'"),
        ("weight_diff", {"LR": 0}, "LR: expects a number above 0, got 0"),
        ("weight_diff", {"LR": nan}, "LR"),
        ("weight_diff", {"LR": "fast"}, "LR"),
        ("weight_diff", {"SAMPLES": 0}, "SAMPLES: expects a whole number, 1 or more"),
        ("weight_diff", {"RESAMPLE_PAIRS": 3}, "RESAMPLE_PAIRS: expects true, false, or none"),
        ("weight_diff", {"R": None}, "R: expects a whole number, 1 or more, got None"),
        ("weight_diff", {"NULL_DIFF": 1}, "NULL_DIFF: expects true or false"),
        ("weight_diff", {"MAX_STEPS": 0}, "MAX_STEPS: no step would be trained"),
        ("weight_diff", {"MAX_STEPS": -1, "EPOCHS": 0.0}, "MAX_STEPS: no step would be trained"),
        ("weight_diff", {"POS_ADAPTER": "a"}, "POS_ADAPTER: goes together with NEG_ADAPTER, which is not given"),
        ("weight_diff", {"NEG_ADAPTER": "a"}, "NEG_ADAPTER: goes together with POS_ADAPTER"),
        ("weight_diff", {"W_PATH": "w.pt", "POS_ADAPTER": "a", "NEG_ADAPTER": "b"}, "W_PATH: goes without POS_ADAPTER and"),
        ("weight_diff", {"MODEL_ID": ""}, "MODEL_ID: expects a hub id"),
        ("weight_diff", {"BEHAVIOR": "a\0b"}, "BEHAVIOR"),
        ("v7_sweep", {"PROTOCOL": "v8"}, "PROTOCOL: expects one of v7, v7b, got 'v8'"),
        ("v7_sweep", {"EVAL_SPLIT": "third"}, "EVAL_SPLIT: expects one of half, held_out (empty: not given)"),
        ("v7_sweep", {"CHAT_PROBES": "maybe"}, "CHAT_PROBES"),
        ("v7_sweep", {"PERSONA_PAIRS": 2}, "PERSONA_PAIRS: expects one of 1, all"),
        ("v7_sweep", {"TEMPLATES": "2"}, "TEMPLATES: expects one of 1, all"),
        ("v7_sweep", {"POSITIONS": "first"}, "POSITIONS: expects one of last, all"),
        ("v7_sweep", {"MAX_LENGTH": 0}, "MAX_LENGTH: expects a whole number, 1 or more"),
        ("v7_sweep", {"PCS": 0, "K_BROAD": 1}, "PCS: expects a whole number, 1 or more, got 0"),
        ("v7_sweep", {"N_NULL": -5}, "N_NULL: expects a whole number, 0 or more, got -5"),
        ("v7_sweep", {"SOURCES": ["v5", "v99"]}, "SOURCES: expects some of v5"),
        ("v7_sweep", {"CANDIDATES": [""]}, "CANDIDATES: expects files such as"),
        ("causal_check", {"OTHER_SEED": -1}, "OTHER_SEED: expects a whole number from 0 to 4294967295"),
        ("causal_check", {"SEED": 3, "OTHER_SEED": 3}, "OTHER_SEED: 3 is SEED itself; name another one, or none"),
        ("causal_check", {"SUBSPACES": ["write", "write"]}, "SUBSPACES: write stands there twice"),
        ("causal_check", {"ALPHA": 0}, "ALPHA: expects a number above 0"),
        ("causal_check", {"DRAWS": 0}, "DRAWS: expects a whole number, 1 or more"),
        ("causal_check", {"RANKS": []}, "RANKS: expects ranks such as [1, 8, 32]"),
        ("causal_check", {"CLOUD": -1}, "CLOUD: expects a whole number, 0 or more"),
        ("benchmark", {"KL_TARGET": []}, "KL_TARGET: expects nats above 0, or persona"),
        ("benchmark", {"KL_TARGET": [0.1, 0]}, "KL_TARGET: expects nats above 0, or persona"),
        ("benchmark", {"KL_TARGET": [inf]}, "KL_TARGET: expects nats above 0, or persona"),
        ("benchmark", {"KL_TARGET": ["person"]}, "KL_TARGET: expects nats above 0, or persona"),
        ("benchmark", {"ALONG": "text"}, "ALONG: expects one of texts, continuation"),
        ("benchmark", {"SIZE": "small"}, "SIZE: expects one of full, quick"),
        ("v7b_stability", {"SEEDS": []}, "SEEDS: expects one or more different whole numbers"),
        ("v7b_stability", {"SEEDS": [3, 0, 3]}, "SEEDS: 3 stands there twice"),
        ("v7b_stability", {"SEEDS": [2**32]}, "SEEDS"),
        ("v7b_stability", {"BOOT": 0}, "BOOT"),
        ("v7b_stability", {"N_NULL": 0}, "N_NULL"),
        ("delta_svd", {"MODE": "flood"}, "MODE: expects one of stream, documents, got 'flood'"),
        ("delta_svd", {"DTYPE": "float8"}, "DTYPE: expects one of auto, float32, bfloat16, float16"),
        ("delta_svd", {"DEVICE": "gpu"}, "DEVICE: expects auto, cpu, cuda"),
        ("theta_fit", {"HELDOUT": 1.0}, "HELDOUT: expects a number between 0 and 1, got 1.0"),
        ("theta_fit", {"HELDOUT": 0}, "HELDOUT"),
        ("theta_fit", {"GAMMAS": [-0.1]}, "GAMMAS"),
        ("theta_fit", {"CONTROL_HEADS": ["lm_head_cvh"]}, "CONTROL_HEADS: expects some of cvh"),
    ],
)  # fmt: skip
def test_what_is_refused(name, given, told):
    with pytest.raises(ValueError) as refused:
        check(name, given)
    message = str(refused.value)
    assert message.startswith(f"{name}: ") and told in message and "\n" not in message


def test_a_folder_of_runs_is_named_and_no_way_out():
    for name, text in product(
        ("v7_sweep", "v7b_stability"), ("", ".", "..", "../x", "a/b", "a\\b", ".x", "-x", "a..b", "x" * 101)
    ):
        assert faults(name, {"ADAPTER": text}), text
    for name, text in product(("v7_sweep", "v7b_stability"), ("lora", "lora-LR0.001", "dora_R=8,LR=1e-3", "rslora@2")):
        check(name, {"ADAPTER": text})


def test_what_is_taken():
    check(
        "weight_diff", {"LR": None, "TOPICS": None, "EPOCHS": 1, "ALPHAS": (0, 1), "MAX_STEPS": -1, "UNKNOWN": object()}
    )
    check("v7_sweep", {"CHAT_PROBES": True, "PERSONA_PAIRS": 1, "EVAL_SPLIT": "", "SOURCES": [], "REVISION": "main"})
    check("v7b_stability", {"SEEDS": [5]})  # one seed has a report, which says that it has no winner
    check("theta_fit", {"DEVICE": "cuda:1"})
    check("causal_check", {"SEED": 3, "OTHER_SEED": 3, "W_PATH": "w.safetensors"})  # of a given w any seed is another
    check("causal_check", {"OTHER_SEED": None})
    check("a_notebook_of_ones_own", {"SEED": -1})
    typed = {
        ("weight_diff", "LORA_LAYERS"): [("2-5", [2, 3, 4, 5]), ("[2, 3]", [2, 3]), ("2,4-5", [2, 4, 5]), ("", [])],
        ("weight_diff", "LR"): [("1e-3", 1e-3), ("none", None), ("1", 1.0)],
        ("weight_diff", "NULL_DIFF"): [("Yes", True), ("0", False)],
        ("weight_diff", "ALPHAS"): [("-1,1", [-1.0, 1.0]), ('["-1", 1]', [-1.0, 1.0])],
        ("weight_diff", "W_PATH"): [("none", "none"), ("a,b.pt", "a,b.pt"), ('it\'s "w"\n.pt', 'it\'s "w"\n.pt')],
        ("v7_sweep", "CHAT_PROBES"): [("TRUE", "true"), (False, "false"), ("", "")],
        ("v7_sweep", "CANDIDATES"): [("a.py,b.py", ["a.py", "b.py"]), (("a.py",), ["a.py"])],
        ("causal_check", "OTHER_SEED"): [("none", None), ("2", 2)],
        ("causal_check", "FORWARD"): [("none", None), ("12", 12)],
        ("benchmark", "KL_TARGET"): [("0.1,persona", [0.1, "persona"]), ("[1, 0.5]", [1.0, 0.5]), ("0.3", [0.3])],
        ("v7b_stability", "SEEDS"): [("0-2", [0, 1, 2]), ("7", [7])],
    }
    for (name, key), cases in typed.items():
        for given, value in cases:
            found = read(RULES[name][key], given)
            assert found == value and type(found) is type(value), (key, given, found)
    for text in ("5-2", "0-99999999999", "0-", "1-2-3", "x", "[" * 5000, "9" * 5000):
        with pytest.raises(ValueError):
            read(RULES["v7b_stability"]["SEEDS"], text)


def test_a_type_alone_is_the_rule_of_ones_own_notebook():
    assert read(rule_of(0.5), "nan") != read(rule_of(0.5), "nan") and read(rule_of(0.5), inf) == inf
    assert read(rule_of(0), -7) == -7 and read(rule_of({}), '{"x": 1}') == {"x": 1} and read(rule_of(0), None) is None
    for default, given in ((0, 0.5), (0, True), (True, 1), ("a", 1), ([0], [0.5]), ({}, [1]), ("", [1])):
        with pytest.raises(ValueError, match="expects"):
            read(rule_of(default), given)


def test_all_that_is_wrong_is_told_one_line_each():
    with pytest.raises(ValueError) as refused:
        check("weight_diff", {"MODEL_ID": "\n" * 500, "SEED": -1, "ADAPTER": "a\nb", "LR": "x" * 10_000})
    lines = str(refused.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["MODEL_ID", "ADAPTER", "SEED", "LR"]
    assert max(map(len, lines)) < 200


def test_the_choices_are_those_of_the_code_that_uses_them():
    from ws.delta.measure import MODES
    from ws.subspaces.build import candidates
    from ws.subspaces.candidate import registered
    from ws.theta.compare import distinct_functions
    from ws.theta.heads import all_heads
    from ws.train.lora import ADAPTERS, TrainConfig

    assert rules.ADAPTERS == ADAPTERS and RULES["delta_svd"]["MODE"].choices == MODES
    candidates("v7b")
    shipped = {c.source for c in registered() if c.shipped}
    assert set(RULES["v7_sweep"]["SOURCES"].item.choices) == shipped - {
        "gradient"
    }  # which needs pairs: `ws.explain` alone
    known = {p.stem for p in (notebooks_folder() / "params").glob("v*.yaml")}
    assert set(RULES["v7_sweep"]["PROTOCOL"].choices) == known
    import torch

    heads = distinct_functions(all_heads(torch.randn(9, 4), 2))
    assert set(RULES["theta_fit"]["CONTROL_HEADS"].item.choices) == set(heads)
    names = {
        "R": "r",
        "BATCH": "batch",
        "ACCUMULATION": "accumulation",
        "LR": "lr",
        "EPOCHS": "epochs",
        "MAX_STEPS": "max_steps",
    }
    agree(names, "weight_diff", lambda **given: TrainConfig(**given), (-5, -1, 0, 1))


def test_the_ranges_are_those_of_the_code_that_uses_them():
    from ws.steer.evaluate import check_alphas
    from ws.subspaces.protocol import load_protocol
    from ws.theta.fit import FitConfig

    names = {name.upper(): name for name in ("gamma", "beta", "lam", "lr", "steps", "grad_clip", "theta_clip")}
    agree(names, "theta_fit", lambda **given: FitConfig(**given), (-1, 0, 1))
    agree({"ALPHAS": "alphas"}, "weight_diff", check_alphas, ([], [1.0], [1.0, 1.0], [nan, 1.0], [0, 1], [1.0, inf]))
    for key in (
        "EVAL_SPLIT",
        "CHAT_PROBES",
        "PERSONA_PAIRS",
        "RAW_LAST",
        "FOLD_GAIN",
        "TEMPLATES",
        "POSITIONS",
        "MAX_LENGTH",
    ):
        values = ("", 0, 1, 256, "last", "half", "held_out", "true", "false", "1", "all", True, False, "2", "True!")
        agree({key: key}, "v7_sweep", lambda **given: load_protocol("v7", **given), values)


def agree(names: dict[str, str], notebook: str, use, values) -> None:
    """What passes the rules the code uses without a complaint."""
    for (key, name), value in product(names.items(), values):
        if not faults(notebook, {**defaults(notebook), key: value}):
            use(**{name: read(RULES[notebook][key], value)})


def test_it_costs_no_time():
    code = (
        "import sys, time; start = time.process_time(); from ws.runs import rules; took = time.process_time() - start\n"
        "heavy = [m for m in ('torch', 'numpy', 'yaml', 'polars', 'papermill', 'tyro') if m in sys.modules]\n"
        "assert not heavy, heavy\nassert took < 0.5, took\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_seeds_are_a_set():
    from ws.runs.rules import RULES, read

    assert read(RULES["v7b_stability"]["SEEDS"], "2,0-1") == [0, 1, 2]
    assert read(RULES["theta_fit"]["CONTROL_HEADS"], "unconditional,cvh") == ["unconditional", "cvh"]
