"""Every stage on a device that is not the CPU: no operation mixes devices, and the numbers are the CPU's. (tests/elsewhere.py)"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from elsewhere import There, elsewhere, move

import ws
from ws.causal.passes import Items, Passes
from ws.data import load_behavior
from ws.gradient.capture import pair_gradients
from ws.model.lm import LM
from ws.subspaces.algebra import left_svd
from ws.subspaces.chebyshev import leading
from ws.subspaces.noise import NARROW_TURN, Noise
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


def test_leading_eigenpairs_are_found_on_another_device():
    """By products there; what is small is worked out on the CPU."""
    M = torch.randn(300, 700, generator=torch.Generator().manual_seed(0)).double()
    plain = leading(M @ M.T, 8, lambda _: 1e-9, True)
    with elsewhere() as device:
        there = M.to(device)
        values, V = leading(there @ there.T, 8, lambda _: 1e-9, True)
        assert isinstance(V, There) and Noise().hides(V @ V.T, 8) and Noise().hides((V @ V.T).cpu(), 8) is None
        V = V.cpu()
        basis = left_svd(there[:, :280], 8, Noise(norm=1e-3, most=NARROW_TURN))
    assert torch.allclose(basis.B @ basis.B.T, left_svd(M[:, :280], 8, 1e-9).B @ basis.B.T, atol=1e-4)
    assert torch.allclose(values, plain[0], rtol=1e-9) and torch.allclose(V @ V.T, plain[1] @ plain[1].T, atol=1e-8)


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
