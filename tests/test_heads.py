"""Theta heads: the stated draws, the identities of docs/method.md section 11.6."""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import DATA
from ws.theta import heads as H

NAMES = ["cvh", "unconditional", "svd_cvh", "svd_unconditional", "lm_head_cvh", "lm_head_svd", "lm_head_random"]
HIDDEN = NAMES[:4]


@pytest.fixture(scope="module")
def reference():
    return load_file(DATA / "parity" / "theta" / "theta.safetensors")


@pytest.fixture(scope="module")
def setting():
    gen = torch.Generator().manual_seed(5)
    W = torch.randn(90, 24, generator=gen)
    h = torch.randn(3, 7, 24, generator=gen)
    theta = torch.randn(8, generator=gen)
    return W, h, theta, H.all_heads(W, D=8, alpha=0.3)


def test_seeded_bases_equal_the_stated_draw(reference):
    head, shift = H.cvh(48, 8), H.unconditional(48, 8)
    assert torch.equal(head.A, reference["A"]) and torch.equal(head.B, reference["B"])
    assert torch.equal(shift.U, reference["U"])
    assert not torch.equal(H.cvh(48, 8, seed=43).A, reference["A"])


@pytest.mark.parametrize("key,make", [
    ("cvh_out", lambda W: H.cvh(48, 8)),
    ("uncond_out", lambda W: H.unconditional(48, 8)),
    ("svd_cvh_out", lambda W: H.all_heads(W, 8)["svd_cvh"]),
])  # fmt: skip
def test_outputs_equal_the_reference(reference, key, make):
    out = make(reference["lm_head_weight"]).apply(reference["h0"], reference["theta_probe"])
    assert (out - reference[key]).abs().max() <= 1e-5


def test_all_seven_heads_are_there_and_keep_the_protocol(setting):
    *_, heads = setting
    assert list(heads) == NAMES
    assert all(isinstance(head, H.Head) and head.name == name and head.D == 8 for name, head in heads.items())


@pytest.mark.parametrize("name", NAMES)
def test_theta_zero_is_the_identity(setting, name):
    W, h, theta, heads = setting
    assert torch.equal(heads[name].apply(h, torch.zeros(8)), h)
    assert torch.count_nonzero(heads[name].logit_delta(h, torch.zeros(8), W)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_effect_is_linear_in_theta(setting, name):
    W, h, theta, heads = setting
    other = torch.randn(8, generator=torch.Generator().manual_seed(1))

    def effect(t):
        return heads[name].logit_delta(h, t, W)

    assert torch.allclose(effect(2 * theta - 3 * other), 2 * effect(theta) - 3 * effect(other), atol=1e-4)
    assert effect(theta).abs().max() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_any_leading_shape(setting, name):
    W, h, theta, heads = setting
    for x in (h, h[0, 0]):
        flat = x.reshape(-1, 24)
        assert torch.allclose(heads[name].apply(x, theta), heads[name].apply(flat, theta).reshape(x.shape), atol=1e-6)
        delta = heads[name].logit_delta(x, theta, W)
        assert delta.shape == (*x.shape[:-1], 90)
        assert torch.allclose(delta.reshape(-1, 90), heads[name].logit_delta(flat, theta, W), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_device_are_kept_and_the_arithmetic_is_float32_or_better(setting, name, dtype):
    W, h, theta, heads = setting
    x = h.to(dtype)
    out = heads[name].apply(x, theta)
    assert out.dtype == dtype and out.device == h.device and heads[name].logit_delta(x, theta, W).dtype == dtype
    exact = heads[name].apply(x.double(), theta.double())
    ulp = torch.finfo(dtype).eps / 2 * exact.abs().max() if dtype != torch.float64 else 1e-12
    assert (out.double() - exact).abs().max() <= ulp * 1.01


@pytest.mark.parametrize("name", HIDDEN)
def test_logit_delta_is_what_the_edited_hidden_state_does(setting, name):
    W, h, theta, heads = setting
    steered = heads[name].apply(h, theta) @ W.T
    delta = heads[name].logit_delta(h, theta, W)
    assert torch.allclose(delta, steered - h @ W.T, atol=1e-4)
    gamma, base = 0.3, h @ W.T
    assert torch.allclose(base + gamma * delta, (1 - gamma) * base + gamma * steered, atol=1e-4)


def test_lm_head_updates_equal_the_heads_they_come_from(setting):
    W, h, theta, heads = setting
    for update, source in (("lm_head_cvh", "cvh"), ("lm_head_svd", "svd_cvh")):
        got, want = heads[update].logit_delta(h, theta, W), heads[source].logit_delta(h, theta, W)
        assert torch.allclose(got, want, atol=1e-5)
    head, gamma = heads["lm_head_random"], 0.7
    updated = W + gamma * head.alpha * head.C @ torch.diag(theta) @ head.A
    assert torch.allclose(h @ updated.T, h @ W.T + gamma * head.logit_delta(h, theta, W), atol=1e-4)


def test_unconditional_shift_is_the_same_for_every_token_and_cvh_is_not(setting):
    W, h, theta, heads = setting
    flat = h.reshape(-1, 24)
    shift = heads["unconditional"].apply(flat, theta) - flat
    assert (shift - shift[0]).abs().max() <= 1e-6 and shift.abs().max() > 0.01
    gated = heads["cvh"].apply(flat, theta) - flat
    assert (gated - gated[0]).abs().max() > 0.01


def test_svd_basis_equals_the_full_svd_and_follows_the_sign_convention():
    gen = torch.Generator().manual_seed(2)
    W = (
        torch.randn(400, 32, generator=gen)
        @ torch.diag(torch.linspace(3, 0.5, 32))
        @ torch.linalg.qr(torch.randn(32, 32, generator=gen))[0]
    )
    V = H.svd_basis(W, 6)
    _, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    assert ((V.double() * Vh[:6].T).sum(0).abs() - 1).abs().max() < 1e-6
    top = V.gather(0, V.abs().argmax(0, keepdim=True))
    assert (top > 0).all()
    update = H.all_heads(W, 6)["lm_head_svd"]
    assert torch.allclose(update.C.norm(dim=0).double(), S[:6], rtol=1e-4) and torch.equal(update.A, V.T)
    with pytest.raises(ValueError, match="D = 33 .* width 32"):
        H.svd_basis(W, 33)


def test_random_bases_have_the_stated_scale():
    """`E |B diag(theta) A h|^2 = |theta|^2 |h|^2 / D` times d/d: rows of A have norm about 1, B's entries 1/sqrt(D)."""
    d, D = 2000, 64
    head, gen = H.cvh(d, D, alpha=1.0), torch.Generator().manual_seed(3)
    h, theta = torch.randn(d, generator=gen), torch.randn(D, generator=gen)
    size = (head.apply(h, theta) - h).square().sum()
    assert torch.isclose(size, theta.square().sum() * h.square().sum() / D, rtol=0.5)
