"""ws.runs.identity: where a run goes and what it depends on."""

from pathlib import Path

from ws.cache import made as store
from ws.runs.html import runs


def test_folders_of_runs(tmp_path):
    behavior = tmp_path / "behavior.json"
    behavior.write_text('{"name": "my tastes"}')
    params = {"MODEL_ID": "org/model", "BEHAVIOR": str(behavior), "ADAPTER": "dora", "SEED": 2}
    base = tmp_path / "org__model"
    expected = {
        "weight_diff": "my_tastes/dora/seed_2/weight_diff",
        "v7_sweep": "my_tastes/dora/seed_2/v7",
        "v7b_stability": "my_tastes/dora/v7b",
        "causal_check": "my_tastes/dora/causal",
        "delta_svd": "delta_svd",
        "theta_fit": "theta_fit",
    }
    for name, folder in expected.items():
        assert runs.run_folder(name, params, tmp_path) == base / folder
    assert runs.run_folder("v7_sweep", {**params, "PROTOCOL": "v7b"}, tmp_path).name == "v7b"
    assert runs.run_folder("v7_sweep", {**params, "OUT_DIR": "/x/y"}, tmp_path) == Path("/x/y")
    null = runs.run_folder("weight_diff", {**params, "NULL_DIFF": True}, tmp_path)
    assert null == base / "my_tastes/dora/seed_2/null_diff/weight_diff"


def test_a_run_of_v7_depends_on_the_w_of_its_seed(tmp_path):
    params = {"MODEL_ID": "org/model", "SEED": 1}
    content = {"cells": [{"cell_type": "code", "metadata": {}, "source": "import ws.cache.places"}]}
    before = runs.run_key("v7_sweep", content, params, tmp_path)
    w = runs.run_id(params).folder(tmp_path) / "w.safetensors"
    store.write_text(w, "weights")
    after = runs.run_key("v7_sweep", content, params, tmp_path)
    assert before.differs(after) == "changed inputs"
    assert runs.run_key("weight_diff", content, params, tmp_path).inputs == before.inputs
