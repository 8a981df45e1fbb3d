"""Captures go through TraceDict, baukit's or the own one, with the same numbers; hooks always come off."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import ws.model.trace
from ws.delta.calibration import as_documents
from ws.delta.reading import read_deltas
from ws.model.lm import load_lm
from ws.model.trace import OwnTraceDict, find_trace_dict, hidden, recorded, trace_in_use
from ws.subspaces.reading import read_texts

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["short", "a somewhat longer text"]
BAUKITS = "baukit's TraceDict"
FINE = "from ws.model.trace import OwnTraceDict\nclass TraceDict(OwnTraceDict): pass\n"
WITHOUT_INPUTS = """
from ws.model.trace import OwnTraceDict
class TraceDict(OwnTraceDict):
    def __init__(self, *args, edit_output, **more):
        super().__init__(*args, edit_output=lambda output, layer: edit_output(output=output, layer=layer), **more)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with the package baukit, from the wheel that lies beside the repository."""
    wheels = sorted((ROOT.parent / "shared" / "baukit").glob("*.whl"))
    if not wheels:
        pytest.skip("no ../shared/baukit/*.whl beside the repository")
    folder = tmp_path_factory.mktemp("baukit")
    zipfile.ZipFile(wheels[-1]).extractall(folder)
    return folder


@pytest.fixture
def found_in(monkeypatch):
    """`found_in(folder)`: what is found where the package baukit lies in the folder."""

    def find(folder: Path):
        monkeypatch.delitem(sys.modules, "baukit", raising=False)
        monkeypatch.syspath_prepend(folder)
        return find_trace_dict()

    return find


@pytest.fixture(params=["own", "baukit"])
def trace_dict(request, found_in):
    if request.param == "own":
        return OwnTraceDict
    theirs, which = found_in(request.getfixturevalue("wheel"))
    assert which == BAUKITS and theirs is not OwnTraceDict
    return theirs


@pytest.fixture
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))


@pytest.fixture(scope="module")
def lm(parity_folder):
    lm = load_lm(str(parity_folder / "model"), "float32", "cpu")
    with torch.no_grad():  # transformers sets hooks of its own on the first such pass, and leaves them
        lm.model(torch.tensor([[1]]), output_hidden_states=True, output_attentions=True)
    return lm


def hooks_on(net) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def deltas(lm) -> list[torch.Tensor]:
    """What `read_deltas` hands out: delta, h and group of every block."""
    seen = []
    read_deltas(lm, as_documents(lm.tokenizer, TEXTS, 32), True, lambda l, *parts: seen.extend(parts))
    return seen


def captures(lm) -> list[torch.Tensor]:
    acts = read_texts(lm, TEXTS, True, detail=True)
    return [acts.resid, acts.embed, acts.up_in, acts.tokens.dense(), acts.attn, *deltas(lm)]


# --- both classes ----------------------------------------------------------------------------------------------------


def test_records_outputs(net, trace_dict):
    with trace_dict(net, ["0", "2"]) as traces:
        out = net(torch.randn(3, 4))
    assert list(traces) == ["0", "2"] and traces["2"].output is out
    assert torch.equal(out, net[2](net[1](traces["0"].output))) and traces["0"].output.requires_grad
    assert hooks_on(net) == 0


def test_edit_output_is_given_name_and_inputs(net, trace_dict):
    x, seen = torch.randn(3, 4), []

    def edit(layer, inputs, output):
        seen.append((layer, inputs[0]))
        return output * 0

    with trace_dict(net, ["0"], edit_output=edit):
        assert torch.equal(net(x), net[2](torch.zeros(3, 4)))
    assert seen[0][0] == "0" and seen[0][1] is x and len(seen) == 1


def test_an_edit_that_fails_reaches_the_caller_and_leaves_no_hook(net, trace_dict):
    def fail(output, layer, inputs):
        raise KeyboardInterrupt("in the middle")

    with pytest.raises(KeyboardInterrupt, match="in the middle"), trace_dict(net, ["0", "2"], edit_output=fail):
        assert hooks_on(net) == 2
        net(torch.randn(3, 4))
    assert hooks_on(net) == 0


def test_unknown_names_are_lookup_errors(net, trace_dict, monkeypatch):
    with pytest.raises(LookupError, match="nowhere"):
        trace_dict(net, ["nowhere"])
    monkeypatch.setattr(ws.model.trace, "TraceDict", trace_dict)
    with pytest.raises(LookupError, match="nowhere"):
        recorded(net, {"0": print, "nowhere": print})
    assert hooks_on(net) == 0


def test_captures_go_through_trace_dict_and_retain_nothing(lm, trace_dict, monkeypatch):
    made, before = [], hooks_on(lm.model)

    class Counting(trace_dict):
        def __init__(self, model, layers, **options):
            made.append((len(layers), options["retain_output"]))
            super().__init__(model, layers, **options)

    monkeypatch.setattr(ws.model.trace, "TraceDict", Counting)
    read_texts(lm, TEXTS, True, batch_size=1)
    assert made == [(6, False)] * 2
    read_texts(lm, TEXTS, True, detail=True)
    assert made[2:] == [(12, False)]
    deltas(lm)
    assert made[3:] == [(6, False)] and hooks_on(lm.model) == before


def test_captures_are_the_models_own_states(lm, trace_dict, monkeypatch):
    monkeypatch.setattr(ws.model.trace, "TraceDict", trace_dict)
    ids = torch.tensor([lm.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        states = lm.model(ids, output_hidden_states=True).hidden_states
    acts = read_texts(lm, TEXTS[:1], True)
    assert torch.equal(acts.embed, states[0][:, -1]) and torch.equal(acts.resid[:5], torch.stack(states[1:6])[:, :, -1])
    got = iter(deltas(lm))
    for before, after in zip(states, states[1:], strict=False):  # the last of them is after the final norm
        delta, h, group = next(got), next(got), next(got)
        here = group == 0
        assert torch.allclose(h[here], before[0, 1:], atol=1e-5)
        assert torch.allclose(delta[here], (after - before)[0, 1:], atol=1e-5)


def test_both_give_the_same_captures(lm, wheel, found_in, monkeypatch):
    own, theirs = [], []
    for seen, kind in ((own, OwnTraceDict), (theirs, found_in(wheel)[0])):
        monkeypatch.setattr(ws.model.trace, "TraceDict", kind)
        seen.extend(captures(lm))
    assert len(own) == len(theirs) == 5 + 3 * 6
    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))


def test_errors_of_a_recording_reach_the_caller(lm, trace_dict, monkeypatch):
    monkeypatch.setattr(ws.model.trace, "TraceDict", trace_dict)
    before = hooks_on(lm.model)

    def visit(l, *_):
        raise ValueError(f"enough at {l}")

    with pytest.raises(ValueError, match="^enough at 0$"):
        read_deltas(lm, as_documents(lm.tokenizer, TEXTS, 32), False, visit)
    assert hooks_on(lm.model) == before
    block = type(lm.decoder.blocks[0])
    call = block.__call__
    monkeypatch.setattr(block, "__call__", lambda self, states, **more: call(self, hidden_states=states, **more))
    with pytest.raises(ValueError, match="model.layers.0: the block was not given its hidden states as first argument"):
        deltas(lm)
    assert hooks_on(lm.model) == before


def test_hidden_takes_a_tensor_or_the_head_of_a_tuple():
    x = torch.randn(2, 3, 4)
    assert hidden(x) is x and hidden((x, None)) is x


# --- which is in use -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "init, nethook, which",
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", FINE, BAUKITS),
        ("", "raise RuntimeError('two\\nlines')", "own TraceDict (baukit failed to load: RuntimeError: two lines)"),
        ("", WITHOUT_INPUTS, "own TraceDict (baukit failed to load: TypeError: "),
        ("", "", "own TraceDict (baukit failed to load: AttributeError: "),
        ("", None, "own TraceDict (baukit failed to load: FileNotFoundError: "),
    ],
)
def test_only_nethook_of_baukit_has_to_load(tmp_path, found_in, init, nethook, which):
    (tmp_path / "baukit").mkdir()
    for name, text in (("__init__", init), ("nethook", nethook)):
        if text is not None:
            (tmp_path / "baukit" / f"{name}.py").write_text(text)
    found, line = found_in(tmp_path)
    assert line.startswith(which) and "\n" not in line
    assert (found is OwnTraceDict) == (which != BAUKITS) and "baukit" not in sys.modules


def test_without_baukit(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert find_trace_dict() == (OwnTraceDict, "own TraceDict (baukit is not installed)")


def test_the_line_is_about_the_class_in_use():
    assert (trace_in_use() == BAUKITS) == (ws.model.trace.TraceDict is not OwnTraceDict)


def test_parity_and_captures_with_baukit(wheel):
    """The suites that read a model, in a process that has baukit and says at its end what recorded."""
    reading = "reference or definition or starts_from or documents or dispatched or bfloat16 or finite"
    code = f"""
import sys
import pytest
code = pytest.main(["-p", "no:cacheprovider", "-n0", "tests/test_parity.py", "tests/test_activations.py",
                    "tests/test_delta.py", "-k", "test_parity or test_activations or {reading}"])
from ws.model.trace import trace_in_use
print("in use:", trace_in_use())
sys.exit(code)
"""
    path = os.pathsep.join(filter(None, [str(wheel), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"in use: {BAUKITS}" and " passed" in done.stdout
