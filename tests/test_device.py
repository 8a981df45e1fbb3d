"""Every stage on a device that is not the CPU: no operation mixes devices, and the numbers are the CPU's. (tests/elsewhere.py)"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from unittest.mock import patch

import pytest
import torch
from elsewhere import There, elsewhere, move

import ws
from ws.causal.passes import Items, Passes
from ws.data import load_behavior
from ws.gradient.capture import pair_gradients
from ws.model.lm import LM
from ws.subspaces import eigen
from ws.subspaces.build import build, candidates
from ws.subspaces.materials import Materials
from ws.subspaces.protocol import load_protocol
from ws.theta import base, recorded
from ws.theta.states import load_users
from ws.train.lora import TrainConfig, train_adapter
from ws.train.pairs import Pair


def model(far: bool) -> LM:
    lm = replace(ws.load_lm("tiny"), fingerprint="")  # nothing is kept
    return replace(lm, model=move(lm.model)) if far else lm


def explained(lm: LM, folder: Path) -> list[float]:
    few = replace(load_protocol("v7b"), templates="1", persona_pairs="1")  # all candidates, from a fifth of the texts
    found = ws.explain(lm, ws.load_diff("tiny"), protocol=few, progress=False).per_layer
    return found.filter(~found["ill_conditioned"])["conc_act"].fill_nan(0).to_list()


def stretched(lm: LM, folder: Path) -> list[float]:
    return [layer.eff_rank for layer in ws.delta_svd(lm, boot=3, progress=False).layers]


def fitted(lm: LM, folder: Path) -> list[float]:
    users = dict(list(load_users().items())[:2])
    found = ws.fit_theta(lm, users, heads=["cvh", "svd_cvh"], dim=16, folder=folder, progress=False)
    return [*found.theta("mara", "cvh").tolist(), *found.theta("mara", "svd_cvh").tolist()]


def fitted_large(lm: LM, folder: Path) -> list[float]:
    """Where the vocabulary counts as a large one, and its base lies on disk."""
    with patch.object(recorded, "LARGE", 300), patch.object(base, "BASE_MB", 0):
        return fitted(lm, folder)


def stacks(lm: LM, folder: Path) -> list[float]:
    behavior = load_behavior("sycophancy")
    passes = Passes(lm, behavior, Items.of(lm, behavior, 1), None, False)
    return passes({"w": ws.load_diff("tiny")})["w"].effect.tolist()


def retained(lm: LM, folder: Path) -> list[float]:
    w, g = ws.load_diff("tiny"), torch.Generator().manual_seed(0)
    blind = {l: torch.linalg.qr(torch.randn(lm.decoder.d, 8, generator=g, dtype=torch.float64)).Q for l in w.layers()}
    return ws.retention(lm, w, {"blind": blind}, n_draws=10, templates=1, progress=False)["effect"].to_list()


def rows(n: int) -> tuple[Pair, ...]:
    behavior = load_behavior("sycophancy")
    each = enumerate(behavior.topics[:n])
    return tuple(Pair(i, 0, 0, behavior.probe_text(t.claim), "Yes, it is.", "No, it is not.") for i, t in each)


def gradients(lm: LM, folder: Path) -> list[float]:
    return list(pair_gradients(lm, rows(6), [3, 4], progress=False).norms.values())


def trained(lm: LM, folder: Path) -> list[float]:
    config = TrainConfig(max_steps=3, checkpoint_steps=0)
    return train_adapter(lm, rows(6), "pos", 0, config, folder / "adapter", False)["loss_trace"]


@pytest.mark.parametrize("stage", [explained, stretched, fitted, fitted_large, stacks, retained, gradients, trained])
def test_a_stage_on_another_device_gives_the_numbers_of_the_cpu(stage, tmp_path):
    found = []
    for far in (False, True):
        folder = tmp_path / str(far)
        folder.mkdir()
        lm = model(far)
        assert (lm.device.type == "other") == far
        with elsewhere() if far else nullcontext():
            found.append(torch.tensor(stage(lm, folder), dtype=torch.float64))
    near, there = found
    assert len(near) > 2 and near.isfinite().all() and near.norm() > 0
    assert float((near - there).norm() / near.norm()) < 1e-5


def test_eigenproblems_of_a_layer_are_solved_together(monkeypatch):
    """On another device: most of a layer's matrices in a few batches, and bases as one after the other."""
    sizes, solve = [], torch.linalg.eigh

    def eigh(G):
        sizes.append(G.shape[0] if G.ndim == 3 else 1)
        return solve(G)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    monkeypatch.setattr(eigen, "PATIENCE", 0.3)
    lm, chosen = model(True), [c for c in candidates("v7") if c.sees == ("weights",)]
    with elsewhere():
        at_once = build(Materials(lm.decoder, None, 0), chosen, progress=False)
        batches = list(sizes)
        sizes.clear()
        monkeypatch.setattr(eigen, "in_batches", lambda do, things, at_once: list(map(do, things)))
        apart = build(Materials(lm.decoder, None, 0), chosen, progress=False)
    assert set(sizes) == {1} and max(batches) > 8 and len(batches) < len(sizes) / 2
    for name, layers in at_once.items():
        for a, b in zip(layers, apart[name], strict=True):
            assert a.rank == b.rank and torch.allclose(a.B @ a.B.T, b.B @ b.B.T, atol=1e-5), name


def test_what_is_brought_together_is_solved_together(monkeypatch):
    """By size, as many at a time as memory allows; who has nothing more to bring is not waited for; a bad matrix fails alone."""
    shapes, solve, all_here = [], torch.linalg.eigh, Barrier(3)
    monkeypatch.setattr(eigen, "PATIENCE", 60.0)

    def eigh(G):
        shapes.append(tuple(G.shape))
        return solve(G)

    def solved(G):
        if G is None:
            return None
        all_here.wait(60)
        try:
            return eigen.eigenpairs(G, 0, len(G) - 1)[0].tolist()
        except RuntimeError as error:
            return type(error).__name__

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    two, three, bad = torch.eye(2), torch.eye(3), torch.full((3, 3), torch.nan)
    ones, twos = [1.0, 1.0], [2.0, 2.0, 2.0]
    assert eigen.in_batches(solved, [two, None, 2 * three, two], 4) == [ones, None, twos, ones]
    assert sorted(shapes) == [(1, 3, 3), (2, 2, 2)]
    assert eigen.in_batches(solved, [three, bad, 2 * three, two, two, two], 3)[1:3] == ["_LinAlgError", twos]
    assert sorted(shapes[2:]) == [(3, 2, 2)] + [(3, 3)] * 3 + [(3, 3, 3)]


def test_the_other_device_refuses_what_a_gpu_refuses():
    with elsewhere() as device:
        x = torch.arange(6.0, device=device).reshape(2, 3)
        assert isinstance(x, There) and x.device.type == "other" and isinstance(x @ x.T, There)
        with pytest.raises(RuntimeError, match="tensors on two devices"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="tensors on two devices"):
            x @ torch.ones(3, 2)
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()
        assert torch.equal((x * 2.0).cpu(), torch.arange(0.0, 12, 2).reshape(2, 3)) and float(x.sum()) == 15
        assert torch.equal(x[:, [2, 0]].cpu(), torch.tensor([[2.0, 0.0], [5.0, 3.0]]))
        x[0] = 7.0
        assert x.tolist() == [[7.0, 7.0, 7.0], [3.0, 4.0, 5.0]]
