"""Hooks record, edit and always come off; the local TraceDict does what baukit's does."""

import pytest
import torch

from ws.model.trace import LocalTraceDict, hidden, hooked


@pytest.fixture
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))


def hooks_on(net) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def run(trace_dict, net, x):
    with trace_dict(net, ["0", "2"], retain_input=True) as traces:
        out = net(x)
    return out, {n: (traces[n].input, traces[n].output) for n in ("0", "2")}


def test_records_inputs_and_outputs(net):
    x = torch.randn(3, 4)
    out, seen = run(LocalTraceDict, net, x)
    assert torch.equal(seen["0"][0], x) and torch.equal(seen["2"][1], out)
    assert torch.equal(seen["2"][0], net[1](seen["0"][1]))
    assert hooks_on(net) == 0


def test_edits_outputs_and_detaches(net):
    x = torch.randn(3, 4)
    with LocalTraceDict(net, ["0"], edit_output=lambda out, layer: out * 0, detach=True) as traces:
        out = net(x)
    assert torch.equal(out, net[2](torch.zeros(3, 4)))
    assert not traces["0"].output.requires_grad


def test_unknown_layer_names_it_and_leaves_no_hook(net):
    with pytest.raises(LookupError, match="nowhere"):
        LocalTraceDict(net, ["0", "nowhere"])
    assert hooks_on(net) == 0


def test_hooks_come_off_after_an_error(net):
    with pytest.raises(KeyboardInterrupt), hooked([(net[0], lambda m, a, o: o)]):
        assert hooks_on(net) == 1
        raise KeyboardInterrupt
    assert hooks_on(net) == 0
    with hooked([(net[0], lambda m, a: (a[0] * 0,))], before=True):
        assert torch.equal(net(torch.randn(2, 4))[0], net(torch.randn(2, 4))[1])


def test_hidden_takes_a_tensor_or_the_head_of_a_tuple():
    x = torch.randn(2, 3, 4)
    assert hidden(x) is x and hidden((x, None)) is x


def test_the_same_as_baukit(net):
    baukit = pytest.importorskip("baukit")
    x = torch.randn(3, 4)
    mine, theirs = run(LocalTraceDict, net, x), run(baukit.TraceDict, net, x)
    assert torch.equal(mine[0], theirs[0])
    for name in ("0", "2"):
        assert all(torch.equal(a, b) for a, b in zip(mine[1][name], theirs[1][name], strict=True))
