"""Theta fit: reference numbers, the gradient, the optimum, a planted theta, and what the recording leaves out."""

import json
import tempfile

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.conftest import DATA
from ws.model.lm import load_lm
from ws.theta import base as base_of
from ws.theta import fit as T
from ws.theta import heads as H
from ws.theta import optimum
from ws.theta.optimum import as_float64, fit_optimum, hessian
from ws.theta.states import load_users, record_states


@pytest.fixture(scope="module")
def reference():
    tensors = load_file(DATA / "parity" / "theta" / "theta.safetensors")
    return tensors, json.loads((DATA / "parity" / "theta" / "expected.json").read_text())


def small(seed=0, tokens=60, V=90, d=24, D=8, alpha=2.0, bias=True, head="cvh"):
    gen = torch.Generator().manual_seed(seed)
    W = torch.randn(V, d, generator=gen) / d**0.5
    h, y = 2 * torch.randn(tokens, d, generator=gen), torch.randint(V, (tokens,), generator=gen)
    b = torch.randn(V, generator=gen) if bias else None
    return h, y, W, b, H.all_heads(W, D=D, alpha=alpha)[head]


def textbook_loss(h, y, W, b, head, theta, cfg):
    """The loss as its formula reads, by log-softmax over the whole vocabulary; for autograd."""
    base = F.linear(h, W, b)
    phi = head.features(h)
    steered = base + cfg.gamma * head.alpha * (theta * phi) @ head.readout(W).T.to(phi)
    log_base, log_steered = base.log_softmax(-1), steered.log_softmax(-1)
    ce = F.nll_loss(log_steered, y, reduction="sum")
    kl = (log_base.exp() * (log_base - log_steered)).sum()
    return (ce + cfg.beta * kl) / len(y) + cfg.lam * theta.square().sum(), ce / len(y), kl / len(y)


# ---- reference numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key,fitted,alpha,biased,steps", [
    ("alpha0_1_bias_30steps", "fitted_alpha0_1_bias", 0.1, True, 30),
    ("alpha2_nobias_60steps", "fitted_alpha2_nobias_60steps", 2.0, False, 60),
])  # fmt: skip
@pytest.mark.parametrize("update", [False, True])
def test_fits_and_traces_equal_the_reference(reference, key, fitted, alpha, biased, steps, update):
    """As the CVH head, and as the LM-head update with C = W B that the reference used."""
    t, expected = reference
    W, b = t["lm_head_weight"], t["lm_head_bias"] if biased else None
    head = H.cvh(48, 8, alpha)
    head = H.lm_head_from_cvh(head, W) if update else head
    base = base_of.record_base(torch.cat([t["h0"], t["h1"]]), torch.cat([t["y0"], t["y1"]]), W, b)
    fit = T.fit_adam(T.make_problem(base, head, W), T.FitConfig(steps=steps))[0]
    assert torch.allclose(fit.theta, t[fitted], rtol=1e-4, atol=1e-5)
    assert len(fit.trace["loss"]) == steps == len(expected[key])
    for name in ("loss", "ce", "kl", "theta_norm"):
        want = torch.tensor([row[name] for row in expected[key]], dtype=torch.float64)
        # the reference's own KL at theta = 0, where it is exactly 0, reads -1e-8: hence the floor
        assert ((fit.trace[name] - want).abs() <= 1e-4 * want.abs().clamp(min=1e-3)).all(), name


# ---- loss and gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head", ["cvh", "unconditional", "svd_cvh", "svd_unconditional", "lm_head_svd", "lm_head_random"]
)
@pytest.mark.parametrize("bias", [False, True])
def test_terms_and_gradient_equal_autograd_and_finite_differences(head, bias):
    h, y, W, b, head = small(bias=bias, head=head)
    cfg = T.FitConfig(beta=0.3, lam=0.01)
    theta = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem = T.make_problem(base_of.record_base(h, y, W, b), head, W, dtype=torch.float64)
    terms = T.evaluate(problem, theta[None], cfg)
    t = theta.clone().requires_grad_()
    b64 = None if b is None else b.double()
    loss, ce, kl = textbook_loss(h.double(), y, W.double(), b64, head, t, cfg)
    loss.backward()
    assert torch.allclose(terms.grad[0], t.grad, rtol=1e-4, atol=1e-6)
    for got, want in ((terms.loss, loss), (terms.ce, ce), (terms.kl, kl)):
        assert torch.isclose(got[0], want.detach(), rtol=1e-5)
    eps, numeric = 1e-5, torch.zeros(8, dtype=torch.float64)
    for i in range(8):
        step = torch.zeros(8, dtype=torch.float64)
        step[i] = eps
        up, down = (T.evaluate(problem, (theta + s)[None], cfg).loss[0] for s in (step, -step))
        numeric[i] = (up - down) / (2 * eps)
    assert torch.allclose(terms.grad[0], numeric, rtol=1e-6, atol=1e-9)


def test_at_theta_zero_kl_and_its_gradient_are_zero():
    h, y, W, b, head = small()
    problem = T.make_problem(base_of.record_base(h, y, W, b), head, W, dtype=torch.float64)
    zero = torch.zeros(1, 8, dtype=torch.float64)
    with_kl, without = (T.evaluate(problem, zero, T.FitConfig(beta=beta)) for beta in (5.0, 0.0))
    assert float(with_kl.kl) == 0.0
    assert (with_kl.grad - without.grad).abs().max() < 1e-13 and without.grad.norm() > 0.1


def test_blocks_large_exponents_and_a_base_on_disk_give_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    h, y, W, b, head = small()
    theta = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    cfg = T.FitConfig()
    want = T.evaluate(T.make_problem(base_of.record_base(h, y, W, b), head, W), theta, cfg)
    monkeypatch.setattr(T, "TOKENS", 7)
    monkeypatch.setattr(base_of, "TOKENS", 7)
    monkeypatch.setattr(T, "WORDS", 13)
    monkeypatch.setattr(T, "SAFE_EXPONENT", 0.0)  # always the running maximum
    monkeypatch.setattr(base_of, "BASE_MB", 0)
    base = base_of.record_base(h, y, W, b)
    assert not list(tmp_path.iterdir())  # the file has no name: nothing is left behind
    got = T.evaluate(T.make_problem(base, head, W), theta, cfg)
    for name in ("loss", "ce", "kl", "grad"):
        assert torch.allclose(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6), name
    far = T.evaluate(T.make_problem(base, head, W), 500 * theta, cfg)  # exponents in the thousands do not overflow
    loss, ce, _ = textbook_loss(h.double(), y, W.double(), b.double(), head, 500 * theta[0].double(), cfg)
    assert torch.isclose(far.ce[0], ce, rtol=1e-4)


def test_parameters_out_of_range_are_named():
    for name, value in {
        "steps": 0,
        "lr": 0.0,
        "theta_clip": -1.0,
        "gamma": -0.1,
        "beta": -1.0,
        "lam": float("nan"),
    }.items():
        with pytest.raises(ValueError, match=f"{name.upper()} = {value}: must"):
            T.FitConfig(**{name: value})


def test_clips_are_two_and_independent():
    h, y, W, b, head = small(alpha=200.0)
    problem = T.make_problem(base_of.record_base(h, y, W, b), head, W)
    assert T.evaluate(problem, torch.zeros(1, 8), T.FitConfig()).grad.norm() > 5
    loose = T.fit_adam(problem, T.FitConfig(steps=3, lr=4.0, theta_clip=1e9, grad_clip=1.0))[0]
    tight = T.fit_adam(problem, T.FitConfig(steps=3, lr=4.0, theta_clip=0.5, grad_clip=1.0))[0]
    assert loose.trace["theta_norm"].max() > 5 and tight.trace["theta_norm"].max() <= 0.5 + 1e-6
    g = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = g[0].clone()
    torch.nn.utils.clip_grad_norm_([p], 2.0)
    assert torch.allclose(T.clip_gradient(g, 2.0), torch.stack([p.grad, g[1]]))


def test_adam_is_torch_s_adam_on_the_textbook_loss():
    h, y, W, b, head = small()
    cfg = T.FitConfig(steps=12, theta_clip=0.8)
    fit = T.fit_adam(T.make_problem(base_of.record_base(h, y, W, b), head, W), cfg)[0]
    theta = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=cfg.lr)
    for step in range(cfg.steps):
        optimizer.zero_grad()
        loss, *_ = textbook_loss(h, y, W, b, head, theta, cfg)
        assert torch.isclose(fit.trace["loss"][step].float(), loss.detach(), rtol=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([theta], cfg.grad_clip)
        optimizer.step()
        with torch.no_grad():
            theta *= min(1.0, cfg.theta_clip / float(theta.norm()))
    assert torch.allclose(fit.theta, theta.detach(), atol=1e-5)


def test_users_fitted_together_equal_users_fitted_alone():
    h, y, W, b, head = small(tokens=90)
    owner = torch.tensor([0, 1, 1, 2, 1, 2] * 15)  # tokens interleaved, 15, 45 and 30 of them
    cfg = T.FitConfig(steps=10)
    together = T.make_problem(base_of.record_base(h, y, W, b), head, W, owner)
    fits, best = T.fit_adam(together, cfg), fit_optimum(together, cfg)
    for user in range(3):
        mine = owner == user
        alone = T.make_problem(base_of.record_base(h[mine], y[mine], W, b), head, W)
        one = T.fit_adam(alone, cfg)[0]
        assert torch.allclose(fits[user].theta, one.theta, atol=1e-5)
        assert torch.allclose(fits[user].trace["loss"], one.trace["loss"], rtol=1e-5)
        assert torch.allclose(best[user].theta, fit_optimum(alone, cfg)[0].theta, atol=1e-5)
    with pytest.raises(ValueError, match="user 1 of 3 has no tokens"):
        T.make_problem(base_of.record_base(h, y, W, b), head, W, owner * 0 + torch.tensor([0, 2, 0, 0, 2, 0] * 15))


def test_what_is_not_finite_or_outside_is_named():
    h, y, W, b, head = small()
    bad = h.clone()
    bad[41, 3] = torch.nan
    with pytest.raises(ValueError, match=r"base logits of tokens 0\.\.59: not finite \(90 of"):
        base_of.record_base(bad, y, W, b)
    with pytest.raises(ValueError, match="outside the vocabulary of 90"):
        base_of.record_base(h, y + 60, W, b)
    with pytest.raises(ValueError, match="no tokens to fit"):
        base_of.record_base(h[:0], y[:0], W, b)
    problem = T.make_problem(base_of.record_base(h, y, W, b), head, W)
    with pytest.raises(ValueError, match=r"Adam step \d+: head cvh, user 0: loss is not finite"):
        T.fit_adam(problem, T.FitConfig(lr=1e37, theta_clip=torch.inf))


# ---- the optimum -------------------------------------------------------------------------------------------------


def test_hessian_equals_autograd_s():
    h, y, W, b, head = small(V=50, tokens=30)
    cfg = T.FitConfig(beta=0.3, lam=0.01)
    theta = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem = T.make_problem(base_of.record_base(h, y, W, b), head, W, dtype=torch.float64)
    want = torch.autograd.functional.hessian(
        lambda t: textbook_loss(h.double(), y, W.double(), b.double(), head, t, cfg)[0], theta
    )
    assert torch.allclose(hessian(problem, theta[None], cfg, 0), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 2.0, 20.0])
@pytest.mark.parametrize("name", ["cvh", "unconditional"])
def test_the_optimum_is_not_beaten(alpha, name):
    """Not by 1,000 random perturbations of several sizes, not by 500 Adam steps without the norm clip."""
    h, y, W, b, head = small(alpha=alpha, tokens=120, head=name)
    cfg = T.FitConfig()
    problem = as_float64(T.make_problem(base_of.record_base(h, y, W, b), head, W))
    best = fit_optimum(problem, cfg)[0]
    assert best.gradient_ratio <= 1e-6 and best.condition >= 1 and best.iterations >= 1
    start = T.evaluate(problem, torch.zeros(1, 8), cfg)
    gradient = T.evaluate(problem, best.theta[None], cfg).grad.norm()
    assert float(gradient / start.grad.norm()) <= 1e-6
    gen = torch.Generator().manual_seed(9)
    size = 10 ** torch.empty(1000, 1, dtype=torch.float64).uniform_(-4, 1, generator=gen)
    trials = best.theta + size * F.normalize(torch.randn(1000, 8, generator=gen, dtype=torch.float64), dim=1)
    losses = torch.cat([T.evaluate(problem, trial[None], cfg).loss for trial in trials])
    assert (losses >= best.loss - 1e-13).all() and losses.max() > best.loss + 1e-3 * alpha**2
    adam = T.fit_adam(problem, T.FitConfig(steps=500, theta_clip=1e9))[0]
    assert adam.trace["loss"].min() >= best.loss - 1e-13
    assert adam.trace["loss"].min() - best.loss <= 0.5 * (adam.trace["loss"][0] - best.loss)


def test_the_clipped_optimum_is_the_best_inside_the_ball():
    h, y, W, b, head = small(alpha=0.5, tokens=120)
    cfg = T.FitConfig()
    problem = as_float64(T.make_problem(base_of.record_base(h, y, W, b), head, W))
    free = fit_optimum(problem, cfg)[0]
    radius = 0.5 * float(free.theta.norm())
    best = fit_optimum(problem, cfg, max_norm=radius)[0]
    assert abs(float(best.theta.norm()) - radius) < 1e-9 and best.mu > 0 and best.loss > free.loss
    grad = T.evaluate(problem, best.theta[None], cfg).grad[0]
    assert float((grad + best.mu * best.theta).norm()) <= 1e-6 * float(
        T.evaluate(problem, torch.zeros(1, 8), cfg).grad.norm()
    )
    gen = torch.Generator().manual_seed(9)
    for scale in (1e-3, 1e-1, 1.0):
        trials = best.theta + scale * torch.randn(100, 8, generator=gen, dtype=torch.float64)
        inside = T.clip_norm(trials, radius)
        assert all(float(T.evaluate(problem, t[None], cfg).loss[0]) >= best.loss - 1e-13 for t in inside)
    scaled = free.theta * radius / free.theta.norm()  # scaling the free optimum down is not the same
    assert float(T.evaluate(problem, scaled[None], cfg).loss[0]) >= best.loss
    wide = fit_optimum(problem, cfg, max_norm=10 * radius)[0]
    assert wide.mu == 0 and torch.allclose(wide.theta, free.theta, atol=1e-6)


def test_no_optimum_in_time_is_an_error(monkeypatch):
    monkeypatch.setattr(optimum, "MAX_ITERATIONS", 1)
    h, y, W, b, head = small(alpha=20.0)
    problem = T.make_problem(base_of.record_base(h, y, W, b), head, W)
    with pytest.raises(ValueError, match="no optimum after 1 Newton steps"):
        fit_optimum(problem, T.FitConfig())


def test_one_short_text_at_a_strong_alpha_has_its_optimum_too():
    """From theta = 0 a full step leads where the softmax is saturated: its gradient is small there, and its loss is not.
    A step that only shrinks the gradient must not be taken, or the optimum is out of reach for good."""
    lm = load_lm("tiny", "float32", "cpu")
    states = record_states(lm, load_users()["pia"][:1], progress=False)
    W, bias = lm.decoder.unembed(), lm.decoder.unembed_bias()
    head, cfg = H.all_heads(W, 64, alpha=2.0)["lm_head_random"], T.FitConfig()
    problem = as_float64(T.make_problem(base_of.record_base(states.h, states.y, W, bias), head, W))
    best = fit_optimum(problem, cfg)[0]
    zero = torch.zeros(1, 64, dtype=torch.float64)
    assert best.gradient_ratio <= 1e-6 and best.loss < 0.75 * float(T.evaluate(problem, zero, cfg).loss)


# ---- planted -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """5,000 training and 2,000 held-out labels sampled at a known theta: d = 128, D = 64, V = 600, gamma .5."""

    def make(alpha):
        gen, cfg = torch.Generator().manual_seed(0), T.FitConfig()
        W = torch.randn(600, 128, generator=gen) / 128**0.5
        h = 2 * torch.randn(7000, 128, generator=gen)
        head = H.cvh(128, 64, alpha)
        theta = F.normalize(torch.randn(64, generator=gen), dim=0) * 4
        p = (h @ W.T + cfg.gamma * head.logit_delta(h, theta, W)).softmax(-1)
        y = torch.multinomial(p, 1, generator=gen)[:, 0]
        bases = [base_of.record_base(h[s], y[s], W) for s in (slice(0, 5000), slice(5000, 7000))]
        return theta, W, head, h, y, *[T.make_problem(base, head, W) for base in bases]

    return make


def test_a_planted_theta_is_recovered_at_alpha_2_and_not_at_alpha_01(planted):
    cfg = T.FitConfig()
    theta, *_, train, heldout = planted(2.0)
    best = fit_optimum(train, cfg)[0]
    assert F.cosine_similarity(best.theta.float(), theta, dim=0) >= 0.98
    gain = heldout.ce0.mean() - T.evaluate(heldout, best.theta[None], cfg).ce[0]
    assert gain > 0.1
    theta, *_, weak, _ = planted(0.1)
    assert F.cosine_similarity(fit_optimum(weak, cfg)[0].theta.float(), theta, dim=0) < 0.5


def test_the_permuted_control_shows_no_gain(planted):
    """Targets permuted over tokens: what the head could learn from them is gone, and held-out CE does not fall."""
    cfg = T.FitConfig()
    _, W, head, h, y, _, heldout = planted(2.0)
    permuted = y[:5000][torch.randperm(5000, generator=torch.Generator().manual_seed(3))]
    best = fit_optimum(T.make_problem(base_of.record_base(h[:5000], permuted, W), head, W), cfg)[0]
    gain = heldout.ce0.mean() - T.evaluate(heldout, best.theta[None], cfg).ce[0]
    assert gain <= 0
