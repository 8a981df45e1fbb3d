"""Large vocabularies: the expansion over the likeliest words and the moments of the others, and what is fitted by it."""

import pickle
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ws.theta import adam as adam_module
from ws.theta import base as base_of
from ws.theta import controls, cumulants, recorded
from ws.theta.adam import adam, anchored
from ws.theta.compare import make_heldout, score
from ws.theta.cumulants import Cumulants, likeliest, moments
from ws.theta.fit import FitConfig, evaluate, fit_adam, lse_and_mean
from ws.theta.fitted import ThetaFits
from ws.theta.heads import all_heads
from ws.theta.optimum import as_float64, fit_optimum, hessian, quick_hessians
from ws.theta.recorded import Recorded, dealt
from ws.theta.states import States
from ws.theta.users import fit_users
from ws.theta.verdict import control_gains, control_table
from ws.theta.verdict import controls as controls_of

V, d, D, USERS = 700, 24, 8, ("ann", "bob", "cy")


@pytest.fixture
def large(monkeypatch):
    """A vocabulary of 700 words counts as a large one, of which a token has 48 likeliest."""
    monkeypatch.setattr(recorded, "LARGE", 600)
    monkeypatch.setattr(cumulants, "LIKELIEST", 48)


@pytest.fixture(scope="module")
def states():
    """Three users' words, drawn at thetas of their own: eight texts of 20 tokens each."""
    gen = torch.Generator().manual_seed(0)
    W = torch.randn(V, d, generator=gen) * torch.linspace(1.5, 0.3, V)[:, None]
    head, found = all_heads(W, D, 0.3)["unconditional"], {}
    for user in USERS:
        h, theta = 0.8 * torch.randn(160, d, generator=gen), 1.5 * torch.randn(D, generator=gen)
        p = (h @ W.T + 0.5 * head.logit_delta(h, theta, W)).softmax(-1)
        found[user] = States(h, torch.multinomial(p, 1, generator=gen)[:, 0], torch.arange(160) // 20)
    return W, found


def expansion(states, name="cvh", K=48):
    W, found = states
    whole = Recorded(found, W, expand=False).problem(all_heads(W, D, 0.3)[name])
    logp = whole.base.logp
    p, words = logp.topk(K, dim=1)
    return whole, Cumulants(p.exp(), whole.C[words], *moments(logp, words, whole.C))


def test_what_is_left_out_is_of_third_order_in_x_and_an_anchor_takes_it_in(states):
    whole, quick = expansion(states)
    X = 0.1 * torch.randn(len(whole.phi), D, generator=torch.Generator().manual_seed(1)) / whole.C.norm(dim=1).mean()

    def off(quick, X):
        lse, mean = lse_and_mean(whole.base.logp.double(), X.double(), whole.C.double())
        had, was = quick(X)
        return float((had - lse).norm()), float((was - mean).norm())

    (lse, mean), (half, half_mean) = off(quick, 4 * X), off(quick, 2 * X)
    assert 6 < lse / half < 11 and 3 < mean / half_mean < 5.5
    at = quick.anchored(4 * X, *lse_and_mean(whole.base.logp, 4 * X, whole.C))
    assert off(at, 4 * X)[0] < 1e-3 * lse and off(at, 4 * X)[1] < 1e-3 * mean
    assert off(at, 2 * X)[0] < 0.5 * half and off(at, 2 * X)[1] < 0.5 * half_mean
    assert torch.equal(at.anchored(4 * X, *lse_and_mean(whole.base.logp, 4 * X, whole.C)).turn, at.turn)
    zero = quick(torch.zeros_like(X))
    assert torch.allclose(zero[0], whole.lse0, atol=1e-6) and torch.allclose(zero[1], whole.m0, atol=1e-5)


def test_with_all_words_likeliest_it_is_exact(states):
    whole, quick = expansion(states, K=V)
    assert float(quick.mass.max()) < 1e-6
    theta, cfg = torch.randn(3, D, generator=torch.Generator().manual_seed(2)), FitConfig()
    found, want = evaluate(replace(whole, quick=quick), theta, cfg), evaluate(whole, theta, cfg)
    assert torch.allclose(found.loss, want.loss, atol=1e-6) and torch.allclose(found.grad, want.grad, atol=1e-6)
    H = quick_hessians(replace(whole, quick=quick), theta, cfg)
    exact = as_float64(whole)
    for user in range(3):
        assert torch.allclose(H[user], hessian(exact, theta, cfg, user), rtol=1e-4, atol=1e-6)


def test_the_curvature_is_that_of_the_expansion(states):
    """Against central differences of the expansion's own gradient, where the others' normal distribution counts."""
    whole, quick = expansion(states, "unconditional", K=8)
    problem, cfg = replace(whole, quick=quick), FitConfig()
    theta = torch.randn(3, D, generator=torch.Generator().manual_seed(3))
    H, step = quick_hessians(problem, theta, cfg), 0.02
    for i in range(D):
        ahead, behind = theta.clone(), theta.clone()
        ahead[:, i] += step
        behind[:, i] -= step
        slope = (evaluate(problem, ahead, cfg).grad - evaluate(problem, behind, cfg).grad) / (2 * step)
        assert torch.allclose(H[:, i], slope, rtol=2e-3, atol=1e-4 * float(H.abs().max()))


def test_many_fits_of_the_same_tokens_are_each_as_if_alone(states, large):
    W, found = states
    train = Recorded(found, W)
    problem = train.problem(all_heads(W, D, 0.3)["cvh"])
    gen = torch.Generator().manual_seed(4)
    owners = torch.stack([train.owner[torch.randperm(len(train.owner), generator=gen)] for _ in range(3)])
    cfg = FitConfig(steps=10)
    together = torch.stack([fit.theta for fit in fit_adam(dealt(problem, owners, 3), cfg)]).unflatten(0, (3, 3))
    for i, owner in enumerate(owners):
        n = torch.bincount(owner)
        alone = torch.stack([fit.theta for fit in fit_adam(replace(problem, owner=owner, n=n), cfg)])
        assert torch.allclose(together[i], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["cvh", "unconditional", "svd_cvh", "lm_head_random"])
def test_adam_is_near_the_whole_one_and_the_optimum_is_the_same(states, large, name):
    W, found = states
    head, cfg = all_heads(W, D, 0.3)[name], FitConfig()
    train = Recorded(found, W)
    problem = train.problem(head)
    assert problem.quick is not None and Recorded(found, W, expand=False).problem(head).quick is None
    whole = replace(problem, quick=None)
    fits, want = (torch.stack([f.theta for f in found]) for found in (adam(problem, cfg)[0], fit_adam(whole, cfg)))
    assert float((fits - want).norm() / want.norm()) < 5e-3
    assert anchored(problem, fits, cfg)[0].quick.at is not None
    for most in (float("inf"), 2.0):
        quick, slow = fit_optimum(problem, cfg, most, exact=train.exact(problem)), fit_optimum(whole, cfg, most)
        for a, b in zip(quick, slow, strict=True):
            assert a.gradient_ratio <= 1e-7 and a.loss == pytest.approx(b.loss, abs=1e-9)
            assert torch.allclose(a.theta, b.theta, atol=1e-5) and a.mu == pytest.approx(b.mu, rel=1e-3, abs=1e-7)


def test_where_the_expansion_is_off_every_step_goes_over_all_words(states, large, monkeypatch):
    """An expansion that does not come within the tolerance, and one whose exponentials overflow."""
    W, found = states
    cfg = FitConfig(steps=10)
    for alpha, most in ((0.3, 0.0), (300.0, 1e-3)):
        problem = Recorded(found, W).problem(all_heads(W, D, alpha)["cvh"])
        monkeypatch.setattr(adam_module, "ANCHORED", most)
        fits, want = adam(problem, cfg)[0], fit_adam(replace(problem, quick=None), cfg)
        assert all(torch.equal(a.theta, b.theta) for a, b in zip(fits, want, strict=True))
        best, slow = fit_optimum(problem, cfg), fit_optimum(replace(problem, quick=None), cfg)
        assert all(a.loss == pytest.approx(b.loss, abs=1e-7) for a, b in zip(best, slow, strict=True))


def test_fits_choice_and_deals_are_those_of_the_whole_vocabulary(states, large, tmp_path):
    W, found = states
    heads = {n: h for n, h in all_heads(W, D, 0.3).items() if n in ("cvh", "unconditional", "lm_head_cvh")}
    cfg, quick, whole = FitConfig(steps=20), Recorded(found, W), Recorded(found, W, expand=False)
    fits = [fit_users(r, heads, cfg, tmp_path / str(i), False) for i, r in enumerate((quick, whole))]
    for pair in fits[0]:
        a, b = (f[pair] for f in fits)
        assert float((a.adam.theta - b.adam.theta).norm() / b.adam.theta.norm()) < 5e-3
        assert torch.allclose(a.optimum.theta, b.optimum.theta, atol=1e-5)
    assert torch.equal(fits[0]["ann", "cvh"].adam.theta, fits[0]["ann", "lm_head_cvh"].adam.theta)
    assert fits[0]["ann", "lm_head_cvh"].head == "lm_head_cvh"
    choices = [controls.choose_head(r, heads, cfg) for r in (quick, whole)]
    assert choices[0].head == choices[1].head
    assert choices[0].gains["gain"].to_list() == pytest.approx(choices[1].gains["gain"].to_list(), abs=2e-4)
    deals = [controls.permuted_thetas(r, heads["cvh"], cfg, 4, 0) for r in (quick, whole)]
    assert float((deals[0] - deals[1]).norm() / deals[1].norm()) < 1e-2
    kept = [controls.permuted_thetas(quick, heads["cvh"], cfg, n, 0, tmp_path / "deals") for n in (4, 4)]
    assert torch.equal(kept[0], kept[1]) and torch.allclose(kept[0], deals[0], atol=1e-6)
    own, *same = controls.permuted_thetas(quick, heads["cvh"], cfg, 4, 0, own_too=True)
    assert torch.allclose(torch.stack(same), deals[0], atol=1e-5)
    fitted = torch.stack([fits[0][user, "cvh"].adam.theta for user in USERS])
    assert 0 < float((own - fitted).norm() / fitted.norm()) < 1e-2


def test_more_tokens_have_fewer_likeliest_words(states, monkeypatch):
    W, found = states
    logp = Recorded(found, W).base.logp
    p, words = likeliest(logp)
    assert p.shape == words.shape == (480, 128) and torch.equal(logp.gather(1, words).exp(), p)
    monkeypatch.setattr(cumulants, "MOST", 480 * 40)
    assert likeliest(logp)[0].shape == (480, 40)
    monkeypatch.setattr(cumulants, "MOST", 100)
    assert likeliest(logp)[0].shape == (480, cumulants.LEAST)


def test_permuted_gains_are_those_of_the_whole_vocabulary(states, large):
    """Scored by an expansion at the users' own thetas; the own ones over all words."""
    W, found = states
    head, cfg, gen = all_heads(W, D, 0.3)["cvh"], FitConfig(), torch.Generator().manual_seed(5)
    own = torch.randn(3, D, generator=gen)
    permuted = own.mean(0) + 0.5 * torch.randn(60, 3, D, generator=gen)
    got, want = (
        control_gains(make_heldout(Recorded(found, W, expand=e)), head, cfg, own, permuted) for e in (True, False)
    )
    assert torch.equal(got[0], want[0]) and got.shape == want.shape == (61, 24)
    assert float((got - want).mean(1).abs().max()) < 2e-3 * float(want.abs().mean())


@pytest.mark.parametrize("name,alpha", [("cvh", 30.0), ("unconditional", 20.0), ("cvh", 300.0)])
def test_far_from_the_base_fits_choice_and_deals_go_over_all_words(states, large, name, alpha):
    """There Adam's way is another by the expansion, though it may end where the gradient agrees; or exponentials overflow."""
    W, found = states
    heads, cfg = {name: all_heads(W, D, alpha)[name]}, FitConfig()
    quick, whole = Recorded(found, W), Recorded(found, W, expand=False)
    fits, want = adam(quick.problem(heads[name]), cfg)[0], fit_adam(whole.problem(heads[name]), cfg)
    for a, b in zip(fits, want, strict=True):
        assert float((a.theta - b.theta).norm() / b.theta.norm()) < 1e-3
    deals, exact = (controls.permuted_thetas(r, heads[name], cfg, 2, 0) for r in (quick, whole))
    assert float((deals - exact).norm() / exact.norm()) < 1e-3
    gains = [controls.choose_head(r, heads, cfg).gains["gain"][0] for r in (quick, whole)]
    assert gains[0] == pytest.approx(gains[1], abs=1e-4)
    rest = [make_heldout(Recorded(found, W, expand=e)) for e in (True, False)]
    got, sure = (control_gains(held, heads[name], cfg, exact[0], exact) for held in rest)
    assert torch.isfinite(sure).all() and torch.isfinite(got).all()


def test_a_deal_that_is_the_own_again_is_a_tie(states, large):
    """Two users of two texts each: six of 24 deals or so leave both users their own."""
    W, found = states
    two = {u: found[u].of_texts([0, 1]) for u in USERS[:2]}
    rest = {u: found[u].of_texts([6, 7]) for u in USERS[:2]}
    head, cfg, p = all_heads(W, D, 0.3)["unconditional"], FitConfig(), []
    for expand in (True, False):
        train, held = Recorded(two, W, expand=expand), make_heldout(Recorded(rest, W, expand=expand))
        fits = ThetaFits(fit_users(train, {"h": head}, cfg, Path(tempfile.mkdtemp()), False), {"h": head}, held, cfg)
        p.append(control_table(held, controls_of(train, fits, ["h"], 59, 3))["p"][0])
    assert p[0] == p[1] > 0.1


def test_keys_know_the_users_order_and_whether_it_is_an_expansion(states, large, tmp_path):
    W, found = states
    head, cfg = all_heads(W, D, 0.3)["cvh"], FitConfig(steps=5)
    ways = Recorded(found, W), Recorded(dict(reversed(found.items())), W), Recorded(found, W, expand=False)
    deals = [controls.permuted_thetas(r, head, cfg, 3, 0, tmp_path) for r in ways]
    assert all(torch.equal(a, controls.permuted_thetas(r, head, cfg, 3, 0)) for a, r in zip(deals, ways, strict=True))
    fits = [fit_users(r, {"cvh": head}, cfg, tmp_path, False)["ann", "cvh"].adam.theta for r in ways[::2]]
    assert not torch.equal(*fits)


def test_a_base_on_disk_is_copied_and_used_like_any_other(states, large, monkeypatch):
    W, found = states
    want = Recorded(found, W).problem(all_heads(W, D, 0.3)["cvh"])
    monkeypatch.setattr(base_of, "BASE_MB", 0)
    train = Recorded(found, W)
    base = pickle.loads(pickle.dumps(train.base))
    assert torch.equal(base.logp, train.base.logp) and train.base.logp in cumulants.MAPPED
    theta = torch.ones(3, D)
    assert torch.equal(evaluate(train.problem(all_heads(W, D, 0.3)["cvh"]), theta, FitConfig()).grad,
                       evaluate(want, theta, FitConfig()).grad)  # fmt: skip


def test_variances_under_the_base_are_those_over_all_words(states):
    whole, quick = expansion(states)
    p = whole.base.logp.double().exp()
    C = whole.C.double()
    expected = p @ C.square() - (p @ C).square()
    assert float((quick.variances().double() - expected).abs().max() / expected.max()) < 1e-5


def test_the_same_logits_are_summed_once(states, monkeypatch):
    """Scores of thetas that were scored before, also by a head that is the same function under another name."""
    W, found = states
    held, heads = make_heldout(Recorded(found, W, expand=False)), all_heads(W, D, 0.3)
    summed, plain = [], recorded.lse_and_mean
    monkeypatch.setattr(recorded, "lse_and_mean", lambda *args, **more: summed.append(1) or plain(*args, **more))
    thetas = torch.randn(2, len(held.user), D, generator=torch.Generator().manual_seed(5))
    first = score(held, heads["cvh"], thetas, FitConfig())
    some = len(summed)
    assert some == 3  # the base's readout, two rows
    again = score(held, heads["lm_head_cvh"], thetas, FitConfig())
    assert len(summed) == some and all(map(torch.equal, first, again))
    other = score(held, heads["cvh"], thetas, FitConfig(gamma=1.0))
    assert len(summed) == some + 2 and not torch.equal(other[0], first[0])


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_optima_of_few_tokens_are_as_exact_as_of_many(seed, large):
    """Where an expansion in float32 leads no further, the search over all words does, for every user."""
    gen, found = torch.Generator().manual_seed(seed), {}
    W = torch.randn(V, d, generator=gen) * torch.linspace(1.5, 0.3, V)[:, None]
    head = all_heads(W, D, 0.3)["unconditional"]
    for user in USERS:
        h, theta = 0.8 * torch.randn(6, d, generator=gen), 1.5 * torch.randn(D, generator=gen)
        p = (h @ W.T + 0.5 * head.logit_delta(h, theta, W)).softmax(-1)
        found[user] = States(h, torch.multinomial(p, 1, generator=gen)[:, 0], torch.arange(6) // 2)
    train = Recorded(found, W)
    problem = train.problem(head)
    best = fit_optimum(problem, FitConfig(), exact=train.exact(problem))
    assert problem.quick and max(one.gradient_ratio for one in best) <= 1e-7
    whole = fit_optimum(replace(problem, quick=None), FitConfig(), exact=train.exact(problem))
    assert max(abs(a.loss - b.loss) for a, b in zip(best, whole, strict=True)) < 1e-9
