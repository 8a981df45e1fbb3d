"""A-side bases on disk: exact, reused, rebuilt when what they depend on changes."""

from dataclasses import replace

import pytest
import torch

from ws.data import load_behavior
from ws.model.lm import load_lm
from ws.subspaces import kept as module
from ws.subspaces.algebra import Basis, empty, random_basis
from ws.subspaces.candidate import registered
from ws.subspaces.kept import a_side_bases, load_bases, save_bases
from ws.subspaces.protocol import load_protocol


def test_round_trip(tmp_path):
    g = torch.Generator().manual_seed(0)
    one = replace(random_basis(10, 3, g), gap=0.5, ill_conditioned=True, note="because", s=torch.tensor([3.0, 2, 1]))
    bases = {"shared": [one] * 4, "layered": [random_basis(10, 2, g) for _ in range(3)] + [empty(10, "nothing")]}
    save_bases(bases, tmp_path / "b.safetensors")
    back = load_bases(tmp_path / "b.safetensors")
    assert list(back) == list(bases)
    for name, rows in bases.items():
        for a, b in zip(rows, back[name], strict=True):
            assert torch.equal(a.B, b.B) and torch.equal(a.s, b.s) and a.note == b.note
            assert a.ill_conditioned == b.ill_conditioned and (a.gap == b.gap or a.gap != a.gap)
    assert all(b is back["shared"][0] for b in back["shared"])


def test_built_once_then_reused_then_rebuilt_for_another_protocol(parity_folder, tmp_path, monkeypatch):
    lm = load_lm(str(parity_folder / "model"), "float32", "cpu")
    behavior = load_behavior(parity_folder / "behavior.json")
    chosen = [
        c for c in registered() if c.name in ("write", "TaskDiff_contrast", "global_write", "TaskDiff_lora_ceiling")
    ]
    calls = []
    capture = module.capture_base
    monkeypatch.setattr(module, "capture_base", lambda *a: calls.append(1) or capture(*a))
    first, path = a_side_bases(lm, behavior, load_protocol("v7"), chosen, cache=tmp_path)
    again, same = a_side_bases(lm, behavior, load_protocol("v7"), chosen, cache=tmp_path)
    assert path == same and len(calls) == 1
    assert set(first) == {"write", "TaskDiff_contrast", "global_write"}  # a ceiling is no A-side basis
    assert all(torch.equal(a.B, b.B) for n in first for a, b in zip(first[n], again[n], strict=True))
    other, path = a_side_bases(lm, behavior, load_protocol("v7b"), chosen, cache=tmp_path)
    assert path != same and len(calls) == 2
    assert not torch.equal(first["TaskDiff_contrast"][3].B, other["TaskDiff_contrast"][3].B)
    assert torch.equal(first["write"][3].B, other["write"][3].B)
    path.write_bytes(path.read_bytes()[:100])
    a_side_bases(lm, behavior, load_protocol("v7b"), chosen, cache=tmp_path)
    assert len(calls) == 3 and isinstance(load_bases(path)["write"][0], Basis)


@pytest.mark.parametrize("name", ["v7", "v7b"])
def test_protocol_sets_load(name):
    assert load_protocol(name).name == name


def test_explicit_parameters_win_and_mistakes_are_named():
    assert load_protocol("v7", EVAL_SPLIT="held_out").eval_split == "held_out"
    assert load_protocol("v7b", CHAT_PROBES=False).chat_probes is False
    assert load_protocol("v7", RAW_LAST="true", PERSONA_PAIRS="").raw_last is True
    with pytest.raises(ValueError, match="PROTOCOL 'v8' is unknown; one of v7, v7b"):
        load_protocol("v8")
    with pytest.raises(ValueError, match="RAW_LAST is true or false, not 'maybe'"):
        load_protocol("v7", RAW_LAST="maybe")
    with pytest.raises(ValueError, match="PERSONAS is no protocol parameter"):
        load_protocol("v7", PERSONAS="all")
