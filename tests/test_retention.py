"""Retention: identities, the linear attribution against finite differences, controls of equal energy, planted carriers."""

from dataclasses import replace
from inspect import unwrap

import numpy as np
import pytest
import torch

import ws
from ws.causal import controls
from ws.causal.controls import draw
from ws.causal.ground import check_count
from ws.causal.passes import Items, Passes
from ws.causal.retention import against, check_names, retention
from ws.causal.spans import Span, probe_sets, second_moments, slopes, writer_spans
from ws.causal.variants import check_bases, drop, full_drop, gains, keep, rescaled, writers
from ws.diff import LowRank
from ws.stability.blind import haar
from ws.steer.effect import asked as asked_of
from ws.steer.effect import effects
from ws.subspaces.protocol import load_protocol

LAYERS = (3, 4)
CLAIMS = 6  # of the behaviour, so that a pass takes a moment


@pytest.fixture(scope="module")
def lm():
    return ws.load_lm("tiny")


@pytest.fixture(scope="module")
def behavior():
    whole = ws.load_behavior("sycophancy")
    return replace(whole, claims=(), negations=(), true_claims=(), topics=whole.topics[:20], n_train_topics=20 - CLAIMS)


@pytest.fixture(scope="module")
def given(lm, behavior, tmp_path_factory):
    return slopes(lm, behavior, LAYERS, 2, tmp_path_factory.mktemp("cache"), progress=False)


def names_of(lm, roles=("o", "down"), layers=LAYERS):
    return [lm.decoder.param_name(l, role) for l in layers for role in roles]


def random_diff(lm, rank=4, size=0.05, seed=0, roles=("o", "down")):
    g, shapes = torch.Generator().manual_seed(seed), dict(lm.model.named_parameters())
    entries = {}
    for name in names_of(lm, roles):
        out, width = shapes[name].shape
        B, A = torch.randn(out, rank, generator=g), torch.randn(rank, width, generator=g)
        entries[name] = LowRank(size * B / (out * rank) ** 0.5, A / width**0.5)
    return ws.WeightDiff(entries)


def orth(d, r, seed):
    return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q


def bases_of(d, r=4, seed=0):
    return {l: orth(d, r, 10 * seed + l) for l in LAYERS}


def test_slopes_are_what_a_small_step_does_and_are_read_back(lm, behavior, given, tmp_path, monkeypatch):
    w, bases = random_diff(lm, size=3.0), bases_of(lm.decoder.d)
    spans = writer_spans(lm, w, probe_sets(lm, behavior, load_protocol("v7b")), given, progress=False)
    for variant, B in ((writers(w), None), (keep(w, bases), bases)):
        want = 2 * sum(span.slope(B and B[l]) for l, span in spans.items())
        step = 0.3
        found = effects(lm, behavior, variant.scale(step), 2).mean() / step
        assert found == pytest.approx(want, rel=2e-3), B is None
        by_hand = sum(float((variant[lm.decoder.param_name(*one)] * g).sum()) for one, g in given.items())
        assert want == pytest.approx(2 * by_hand, rel=1e-5)
    first = slopes(lm, behavior, LAYERS, 2, tmp_path, progress=False)
    monkeypatch.setattr("ws.causal.spans.weighted_gradients", None)
    again = slopes(lm, behavior, LAYERS, 2, tmp_path, progress=False)
    assert all(torch.equal(first[one], again[one]) and torch.equal(first[one], given[one]) for one in given)


def test_second_moments_are_those_of_every_position(lm, behavior):
    sets = probe_sets(lm, behavior, load_protocol("v7b"))
    module, eye = lm.decoder.linear(3, "down"), torch.eye(lm.decoder.weight(3, "down").shape[1])
    found = second_moments(lm, sets, {(3, "down"): eye}, batch=3, progress=False)[3, "down"]
    seen, hook = [], module.register_forward_hook(lambda m, x, y: seen.append(x[0][0].double()))
    try:
        for one in sets:
            for text in one.texts:  # one by one: no padding
                ids = lm.tokenizer(text, add_special_tokens=one.special, return_tensors="pt")["input_ids"]
                with torch.no_grad():
                    lm.model(input_ids=ids)
    finally:
        hook.remove()
    X = torch.cat(seen)
    assert float((found - X.T @ X / len(X)).norm() / found.norm()) < 1e-5


def test_energy_is_what_the_projection_adds_to_the_stream(lm, behavior, given):
    w, B = random_diff(lm), orth(lm.decoder.d, 4, 3)
    sets = probe_sets(lm, behavior, load_protocol("v7b"))
    span = writer_spans(lm, w, sets, given, progress=False)[4]
    eyes = {(4, role): torch.eye(lm.decoder.weight(4, role).shape[1]) for role in ("o", "down")}
    S = second_moments(lm, sets, eyes, progress=False)
    G = sum(w[n].double() @ S[4, r] @ w[n].double().T for r in ("o", "down") for n in [lm.decoder.param_name(4, r)])
    assert span.energy(B) == pytest.approx(float((B.T @ G @ B).trace() / G.trace()), rel=1e-5)
    F = sum(w[lm.decoder.param_name(4, r)].double() for r in ("o",))
    dense = torch.cat([F, w[lm.decoder.param_name(4, "down")].double()], dim=1)
    share = float((B.T @ dense).square().sum() / dense.square().sum())
    assert span.energy(B, "frobenius") == pytest.approx(share, rel=1e-5)


def test_keep_and_drop_add_up(lm):
    w, bases = random_diff(lm, roles=("o", "down", "v")), bases_of(lm.decoder.d)
    kept, left, without = keep(w, bases), drop(w, bases), full_drop(w, bases)
    assert set(kept) == set(left) == set(names_of(lm)) and set(without) == set(w)
    for name in kept:
        assert torch.allclose(kept[name] + left[name], w[name], atol=1e-7)
        assert torch.allclose(without[name], left[name])
        assert isinstance(kept.entries[name], LowRank)
    assert torch.equal(without[lm.decoder.param_name(3, "v")], w[lm.decoder.param_name(3, "v")])
    norms = {name: torch.rand(lm.decoder.d) + 0.5 for name in names_of(lm)}
    B, name = bases[3].float(), names_of(lm)[0]
    want = (B @ B.T @ (norms[name][:, None] * w[name])) / norms[name][:, None]
    assert torch.allclose(keep(w, bases, norms)[name], want, atol=1e-6)
    assert torch.allclose(keep(w, bases, norms)[name] + drop(w, bases, norms)[name], w[name], atol=1e-6)
    assert gains(lm.decoder, w) == {}


def test_gains_of_output_norms_are_folded_into_both_sides(model_folder):
    lm = ws.load_lm(str(model_folder("gemma2")))
    names, d = [lm.decoder.param_name(1, r) for r in ("o", "down")], lm.decoder.d
    shapes, g = dict(lm.model.named_parameters()), torch.Generator().manual_seed(0)
    w = ws.WeightDiff({n: 0.1 * torch.randn(shapes[n].shape, generator=g) for n in names})
    norms = gains(lm.decoder, w)
    assert set(norms) == set(names) and gains(lm.decoder, w, fold=False) == {}
    slope = {(1, r): torch.randn(shapes[n].shape, generator=g) for r, n in zip(("o", "down"), names, strict=True)}
    b = ws.load_behavior("sycophancy")
    span = writer_spans(lm, w, probe_sets(lm, b, load_protocol("v7b")), slope, norms, progress=False)[1]
    B = orth(d, 3, 0)
    kept = keep(w, {1: B}, norms)
    by_hand = sum(float((kept[n] * slope[1, r]).sum()) for r, n in zip(("o", "down"), names, strict=True))
    assert span.slope(B) == pytest.approx(by_hand, rel=1e-4)
    assert torch.allclose(rescaled(rescaled(w, norms), norms, -1)[names[0]], w[names[0]], atol=1e-6)


def test_all_of_the_stream_has_retention_one(lm, behavior, given, tmp_path):
    w, d = random_diff(lm, roles=("o", "down", "v"), size=0.5), lm.decoder.d
    candidates = {"all": {l: torch.eye(d) for l in LAYERS}, "none": {l: torch.zeros(d, 0) for l in LAYERS}}
    found = retention(lm, w, candidates, behavior, templates=2, n_draws=4, given=given, cache=tmp_path, progress=False)
    rows = {r["subspace"]: r for r in found.iter_rows(named=True)}
    assert list(rows) == ["w", "w_res", "all", "none"]
    for column in ("retention", "energy", "energy_frobenius", "p"):
        assert rows["all"][column] == pytest.approx(1, abs=1e-5), column
    assert rows["all"]["linear"] == pytest.approx(rows["w_res"]["linear"], rel=1e-6)
    assert rows["all"]["excess"] == pytest.approx(0, abs=1e-6 * abs(rows["all"]["linear"]))
    assert rows["all"]["slope"] == pytest.approx(1, rel=1e-5) and rows["none"]["slope"] == 0
    assert rows["none"]["effect"] == rows["none"]["energy"] == rows["none"]["linear"] == 0
    assert rows["w"]["effect"] == pytest.approx(effects(lm, behavior, w, 2).mean(), abs=5e-6)  # float32 of log-ratios
    assert np.isnan(rows["w"]["linear"]) and rows["w"]["effect"] != pytest.approx(rows["w_res"]["effect"], rel=1e-3)
    assert rows["w_res"]["effect_low"] < rows["w_res"]["effect"] < rows["w_res"]["effect_high"]


def test_true_claims_are_asked_of_what_has_an_effect(lm, behavior, given, tmp_path):
    told = ws.load_behavior("sycophancy").true_claims[:5]
    w, more = random_diff(lm, roles=("o", "down", "v"), size=0.5), replace(behavior, true_claims=told)
    candidates = {
        "all": {l: torch.eye(lm.decoder.d) for l in LAYERS},
        "none": {l: torch.zeros(lm.decoder.d, 0) for l in LAYERS},
    }
    found = retention(lm, w, candidates, more, templates=2, n_draws=0, given=given, cache=tmp_path, progress=False)
    rows = {r["subspace"]: r for r in found.iter_rows(named=True)}
    asked = Passes(lm, more, Items.of(lm, more, 2, true=True), None, False)({"w": w})["w"]
    assert len(asked.effect) == 5 and rows["w"]["contrast"] == pytest.approx(
        rows["w"]["effect"] - asked.effect.mean(), abs=5e-6
    )
    assert rows["all"]["contrast"] == pytest.approx(rows["w_res"]["contrast"], abs=5e-6)
    assert np.isnan(rows["none"]["contrast"]) and rows["none"]["effect"] == 0
    alike = replace(behavior, true_claims=tuple(asked_of(behavior)[0]))  # the base model does not tell them apart
    found = retention(lm, w, candidates, alike, templates=2, n_draws=0, given=given, cache=tmp_path, progress=False)
    assert found["contrast"].is_nan().all()


def synthetic(d, q, seed=0, layers=LAYERS, decay=3.0):
    """Spans of a w that no model has: energies that fall off, slopes of their own."""
    g, found = torch.Generator().manual_seed(seed), {}
    for l in layers:
        U = orth(d, q, 100 + l + 1000 * seed)
        V = torch.linalg.qr(torch.randn(q, q, dtype=torch.float64, generator=g)).Q
        K = {kind: V @ torch.diag(torch.logspace(0, -decay, q, dtype=torch.float64) * scale) @ V.T
             for kind, scale in (("input", 7.0), ("frobenius", 1.0))}  # fmt: skip
        R = torch.randn(d, q, dtype=torch.float64, generator=g) @ K["input"]
        found[l] = Span(U, K, {kind: float(G.trace()) for kind, G in K.items()}, R)
    return found


@pytest.mark.parametrize("q", [6, 48])
@pytest.mark.parametrize("tilt", [0.0, 0.2, -0.3])
def test_controls_have_the_candidates_energy(monkeypatch, q, tilt):
    """Against bases that are formed in full, whose energy and effect are computed from scratch."""
    d, n = 48, 9
    spans, seen = synthetic(d, q), []
    bases = []
    for c in range(2):
        some = {}
        for l, span in spans.items():
            G = span.U @ span.K["input"] @ span.U.T
            v, V = torch.linalg.eigh(G)
            some[l] = torch.linalg.qr(
                V @ torch.diag((v.clamp(min=0) / v.max() + 1e-3) ** tilt) @ V.T @ orth(d, 4, 7 + l + c)
            ).Q
        bases.append(some)
    root = controls.root
    monkeypatch.setattr(controls, "root", lambda *a: seen.append(root(*a)) or seen[-1])
    drawn = draw(spans, bases, n, progress=False)
    assert drawn.effect.shape == (n, 2) and drawn.off.max() < 1e-6 and not drawn.out.any() and seen
    g = torch.Generator().manual_seed(0)
    turns = [haar(d, g, torch.float64) for _ in range(6)]
    for draw_at, c in ((0, 0), (5, 1), (8, 0)):
        O, total = turns[draw_at % 3] @ turns[3 + draw_at // 3], 0.0
        for l, span in spans.items():
            G, want = span.U @ span.K["input"] @ span.U.T / span.trace["input"], span.energy(bases[c][l])
            v, V = torch.linalg.eigh(G)
            Y = O @ bases[c][l]
            power = 0.5 if float((Y.T @ G @ Y).trace()) < want else -0.5
            low, high = -30.0, 45.0  # log k by plain bisection
            for _ in range(80):
                k = np.exp((low + high) / 2)
                C = torch.linalg.qr(V @ torch.diag((1 + k * v.clamp(min=0)) ** power) @ V.T @ Y).Q
                short = (float((C.T @ G @ C).trace()) < want) == (power > 0)
                low, high = ((low + high) / 2, high) if short else (low, (low + high) / 2)
            assert span.energy(C) == pytest.approx(want, abs=1e-6)
            total += 2 * float((C.T @ (span.U @ span.R.T) @ C).trace())
        assert drawn.effect[draw_at, c] == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_energy_out_of_reach_is_reported(lm):
    spans = synthetic(48, 48)
    G = spans[3].U @ spans[3].K["input"] @ spans[3].U.T
    best = {l: torch.linalg.eigh(spans[l].U @ spans[l].K["input"] @ spans[l].U.T).eigenvectors[:, -4:] for l in LAYERS}
    drawn = draw(spans, [best, bases_of(48)], 16, progress=False)
    assert float((best[3].T @ G @ best[3]).trace() / G.trace()) == pytest.approx(spans[3].energy(best[3]))
    assert drawn.out.tolist() == [1.0, 0.0]
    first, second = against(drawn, np.array([1e9, 1e9]))
    assert first["p"] == 1.0 and np.isnan(first["excess"]) and first["out_of_reach"] == 1.0
    assert second["p"] == pytest.approx(1 / 17) and second["out_of_reach"] == 0.0
    drawn.effect[:, 1], drawn.effect[0, 1] = 2.0, np.nan
    assert against(drawn, np.array([0, 3.0]))[1]["p"] == pytest.approx(2 / 17)  # the unmatched draw counts against it


def test_a_draw_is_the_same_whoever_is_beside(lm):
    spans, one, two = synthetic(48, 12), bases_of(48, seed=1), bases_of(48, r=3, seed=2)
    both, alone = (draw(spans, each, 10, progress=False).effect for each in ([one, two], [one]))
    assert np.allclose(both[:, 0], alone[:, 0], rtol=1e-5)
    assert not np.allclose(alone, draw(spans, [one], 10, seed=1, progress=False).effect, rtol=1e-2)
    with pytest.raises(ValueError, match="n_draws = 0"):
        draw(spans, [one], 0)


@pytest.mark.parametrize("q", [6, 48])
def test_blind_candidates_have_the_nominal_error_rate(q):
    """O B of bases that know nothing of w: span/d = 1/8 and 1."""
    d, n = 48, 160
    g, ps, spans = torch.Generator().manual_seed(5), [], synthetic(d, q, seed=2)
    B = bases_of(d, r=3)
    blind = [{l: O @ B[l] for l in LAYERS} for O in (haar(d, g, torch.float64) for _ in range(n))]
    linear = np.array([2 * sum(span.slope(each[l]) for l, span in spans.items()) for each in blind])
    ps = np.array([row["p"] for row in against(draw(spans, blind, 256, seed=9, progress=False), linear)])
    assert 1 <= (ps <= 0.05).sum() <= 15  # 99.5 % of a binomial of 160 at .05 from either side
    assert abs(ps.mean() - 0.5) < 0.08 and 0.2 < (ps < 0.3).mean() < 0.4


def test_a_planted_carrier_is_found_and_a_bystander_is_not(lm, behavior, given, tmp_path):
    """Nearly all of the effect lies in a rank-2 space; as much energy where it has none, four times as much elsewhere."""
    carrier, idle, entries = {}, {}, {}
    g = torch.Generator().manual_seed(0)
    for l in LAYERS:
        both = torch.cat([given[l, r].double() / given[l, r].norm() for r in ("o", "down")], dim=1)
        U = torch.linalg.svd(both, full_matrices=False).U
        carrier[l], idle[l], elsewhere = U[:, :2], U[:, 20:22], U[:, 40:42]
        for role in ("o", "down"):
            slope = given[l, role].double()
            part = carrier[l] @ (carrier[l].T @ slope)
            mixed = torch.randn(2, 2, len(slope), generator=g, dtype=torch.float64) @ slope  # rows as inputs are
            more, most = idle[l] @ mixed[0], elsewhere @ mixed[1]
            away = idle[l].T @ slope  # no effect to first order
            more -= idle[l] @ away * float((idle[l].T @ more * away).sum() / away.square().sum())
            parts = 0.5 * part / part.norm() + 0.5 * more / more.norm() + most / most.norm()
            entries[lm.decoder.param_name(l, role)] = (0.3 * parts).float()
    found = retention(lm, ws.WeightDiff(entries), {"carrier": carrier, "idle": idle}, behavior, templates=2, n_draws=400,
                      given=given, cache=tmp_path, progress=False)  # fmt: skip
    rows = {r["subspace"]: r for r in found.iter_rows(named=True)}
    assert rows["carrier"]["retention"] > 0.7 and rows["carrier"]["excess"] > 0 and rows["carrier"]["p"] < 0.05
    assert rows["carrier"]["excess_frobenius"] > 0 and rows["carrier"]["p_frobenius"] < 0.05
    assert rows["idle"]["energy_frobenius"] > 0.1 and rows["idle"]["p"] > 0.2 and abs(rows["idle"]["retention"]) < 0.2
    whole = rows["w_res"]["effect"]
    assert abs(rows["carrier"]["drop"]) <= 0.1 * whole and rows["idle"]["drop"] > 0.8 * whole
    assert rows["idle"]["excess"] <= 0
    assert rows["carrier"]["sure"] and rows["carrier"]["gap"] == pytest.approx(
        rows["carrier"]["linear"] - rows["carrier"]["effect"]
    )


def test_what_is_of_another_type_is_named(lm):
    w, d = random_diff(lm), lm.decoder.d  # the tests check annotations, which no user does
    for bad, told in (
        ({l: [[1.0]] for l in LAYERS}, "mine at layer 3: a list; expected a real, dense torch tensor"),
        (torch.eye(d)[:, :2], "mine: a Tensor; expected a dict, layer ->"),
    ):
        with pytest.raises(ValueError, match=told):
            unwrap(check_bases)("mine", bad, w, d)
    with pytest.raises(ValueError, match="candidates: a list; expected a dict"):
        unwrap(check_names)([bases_of(d)])
    for bad in (10.0, True, "10", None):
        with pytest.raises(ValueError, match="n_draws: .*: expected a whole number, 0 or more"):
            check_count("n_draws", bad)


def test_bad_input_is_named(lm, behavior, given):
    w, d = random_diff(lm), lm.decoder.d

    def call(candidates, diff=w, **more):
        return retention(
            lm, diff, candidates, behavior, given=given, progress=False, **{"templates": 1, "n_draws": 0} | more
        )

    with pytest.raises(ValueError, match="mine: no basis for layer 4"):
        call({"mine": {3: torch.eye(d)[:, :2]}})
    with pytest.raises(ValueError, match="mine at layer 3: its columns are not orthonormal"):
        call({"mine": {l: 2 * torch.eye(d)[:, :2] for l in LAYERS}})
    with pytest.raises(ValueError, match=r"mine at layer 3: the basis is \(7, 2\)"):
        call({"mine": {l: torch.eye(7)[:, :2] for l in LAYERS}})
    with pytest.raises(ValueError, match="candidate w_res: this name is a row of its own"):
        call({"w_res": bases_of(d)})
    with pytest.raises(ValueError, match="n_draws: -1: expected a whole number"):
        call({"mine": bases_of(d)}, n_draws=-1)
    with pytest.raises(ValueError, match="templates = 9: sycophancy has 4 wordings"):
        call({"mine": bases_of(d)}, templates=9)
    with pytest.raises(ValueError, match="nothing of it writes to the residual stream"):
        call({}, random_diff(lm, roles=("v",)))
    zero = ws.WeightDiff(
        {n: torch.zeros(d, lm.decoder.weight(3, "down").shape[1]) for n in names_of(lm, ("down",), (3,))}
    )
    with pytest.raises(ValueError, match="layer 3: w is 0"):
        call({}, zero)
    with pytest.raises(ValueError, match="no slope is given for it"):
        writer_spans(lm, w, [], {}, progress=False)
    with ws.weight_steer(lm.model, w, 1.0), pytest.raises(ValueError, match="steer"):
        call({})
