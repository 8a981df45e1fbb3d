"""`import ws`: what it offers, that it costs nothing until used, that every example runs, and the author's notebook."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ws
from ws.cache.places import PACKAGE

# What the researcher reaches for; more may be offered, never less.
NAMES = {
    "load_lm", "load_behavior", "load_diff", "WeightDiff", "train_diff", "weight_steer", "alpha_sweep", "candidate",
    "candidates", "Basis", "pca", "left_svd", "score", "explain", "Explanation", "compare_seeds", "delta_svd",
    "fit_theta",
}  # fmt: skip


def test_the_front_door_is_small_and_complete():
    assert set(ws.__all__) >= NAMES and len(ws.__all__) <= 28
    assert set(ws.__all__) <= set(dir(ws))
    with pytest.raises(AttributeError, match="module 'ws' has no attribute 'explian'"):
        ws.explian  # noqa: B018


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, time; start = time.perf_counter(); import ws; took = time.perf_counter() - start\n"
        "heavy = [m for m in ('torch', 'numpy', 'transformers', 'polars', 'matplotlib') if m in sys.modules]\n"
        "assert not heavy, heavy\nassert took < 0.3, took\nws.pca\nassert 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(ws.__all__))
def test_every_name_has_an_example_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WS_OUT", str(tmp_path))
    found = getattr(ws, name)
    examples = doctest.DocTestParser().get_doctest(found.__doc__ or "", {}, f"ws.{name}", None, None)
    assert examples.examples, f"ws.{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=said.append)
    assert not said, "".join(said)


def test_the_authors_notebook_runs_against_this_package(parity_folder):
    """The import lines and the uses of docs/method.md section 12, on a plain transformers model."""
    from transformers import AutoModelForCausalLM

    from ws.data import SYCOPHANCY_NEG_PERSONAS, SYCOPHANCY_POS_PERSONAS, SYCOPHANCY_TOPICS
    from ws.diff import load_diff
    from ws.steer import weight_steer

    claims = [claim for claim, question in SYCOPHANCY_TOPICS]
    assert len(claims) == len(set(claims)) == 32 and all(isinstance(q, str) and q for _, q in SYCOPHANCY_TOPICS)
    assert isinstance(SYCOPHANCY_POS_PERSONAS[0], str) and SYCOPHANCY_POS_PERSONAS[0] != SYCOPHANCY_NEG_PERSONAS[0]
    assert len(SYCOPHANCY_POS_PERSONAS) == len(SYCOPHANCY_NEG_PERSONAS) == 5
    w = load_diff(Path(parity_folder) / "w.pt")
    model = AutoModelForCausalLM.from_pretrained(parity_folder / "model", dtype=torch.float32).eval()
    name = "model.layers.2.self_attn.o_proj.weight"
    assert len(w) == 21 and name in w and "model.layers.0.self_attn.o_proj.weight" not in w
    writers = torch.cat([w[name].float().cpu(), w[name.replace("self_attn.o_proj", "mlp.down_proj")].float().cpu()], 1)
    assert writers.shape[0] == 128 and w[name].shape == model.get_parameter(name).shape
    stored = torch.load(Path(parity_folder) / "w.pt", weights_only=True)[name]
    assert torch.equal(w[name].float().cpu(), stored.float())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True).hidden_states
        with weight_steer(model, w, 1.0):
            plus = model(ids, output_hidden_states=True).hidden_states
        with weight_steer(model, w, -1.0):
            minus = model(ids, output_hidden_states=True).hidden_states
        after = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(plus[2], minus[2]) and not torch.equal(plus[4], minus[4])
    assert all(torch.equal(a, b) for a, b in zip(plain, after, strict=True))
    with pytest.raises(KeyError, match="o_proj"):
        w["model.layers.0.self_attn.o_proj.weight"]


def test_objects_are_shown_in_a_line_or_two_and_in_a_notebook_as_a_table(lm_and_w):
    lm, w = lm_and_w
    behavior = ws.load_behavior("sycophancy")
    for one in (lm, w, behavior, ws.Basis(torch.eye(128)[:, :8])):
        assert len(repr(one)) < 300, repr(one)
    for one in (lm, w, behavior):
        assert one._repr_html_().count("<tr>") >= 3 and len(one._repr_html_()) < 3000
    assert (
        "32 topics (20 train), 48 held-out claims" in repr(behavior) and "28 (28 low-rank, 0 dense)" in w._repr_html_()
    )
    found = ws.explain(lm, w, candidates=["write"], progress=False)
    assert len(repr(found)) < 300 and "Of 1 write and mixed candidates the highest" in found.headline()


@pytest.fixture(scope="module")
def lm_and_w():
    return ws.load_lm("tiny"), ws.load_diff("tiny")
