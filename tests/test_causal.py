"""The causal check: identities, first-order effects text by text, planted answers, what it writes, several seeds."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from looks import check_looks

import ws
from ws.causal import parts
from ws.causal.check import SECTIONS, causal_check, run_forward, with_forward
from ws.causal.cloud import cloud
from ws.causal.controls import Drawn, draw, formed
from ws.causal.found import CausalCheck
from ws.causal.ground import prepare
from ws.causal.others import act_bases, rank_table, weight_bases, yes_no
from ws.causal.parts import matched_table, read_table, where_parts, where_table
from ws.causal.passes import Passes, spread
from ws.causal.retention import Carried, adjusted, carried
from ws.causal.seeds import best_candidate, finished, over_seeds
from ws.causal.variants import READERS, drop_read, full_drop, keep, keep_read, readers, writers
from ws.diff import LowRank
from ws.stability.blind import haar
from ws.steer import calibrate as calibration
from ws.steer.effect import effects
from ws.steer.neutral import passage_rows

LAYERS = (3, 4)


@pytest.fixture(scope="module")
def lm():
    return ws.load_lm("tiny")


@pytest.fixture(scope="module")
def behavior():
    whole = ws.load_behavior("sycophancy")
    return replace(whole, claims=(), negations=(), true_claims=(), topics=whole.topics[:20], n_train_topics=14)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ground(lm, behavior, cache):
    w = ws.load_diff("tiny").select(lambda name: any(f".{l}." in name for l in LAYERS))
    return prepare(lm, w, behavior, templates=2, cache=cache, progress=False)


def orth(d, r, seed):
    return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q


def bases_of(d, r=4, seed=0):
    return {l: orth(d, r, 10 * seed + l) for l in LAYERS}


def test_effects_text_by_text_add_up_to_the_whole(ground):
    d = ground.lm.decoder.d
    bases = {"a": bases_of(d), "b": bases_of(d, 2, 1), "none": bases_of(d, 0, 2)}
    texts = ground.by_text(bases)
    side, items = ground.items.side, ground.items
    for c, of in enumerate(bases.values()):
        want = sum(span.slope(of[l]) for l, span in ground.spans.items())
        assert (texts.value[c] * side).mean() == pytest.approx(want, abs=1e-6)
    whole = {l: np.ones((1, len(x))) for l, x in texts.diagonal.items()}  # overlap 1 with every direction: all of w_res
    assert (texts.control(whole)[0] * side).mean() == pytest.approx(
        sum(s.slope() for s in ground.spans.values()), rel=1e-4
    )
    one = ground.over_claims(texts.value)
    assert one.shape == (3, len(ground.behavior.heldout_claims)) and one[2] == pytest.approx(0)
    by_hand = 2 * np.mean([texts.value[0, i] for i in range(len(items.turns)) if items.claim[i] == 2])
    assert one[0, 2] == pytest.approx(by_hand)


def test_the_mirrored_mean_is_that_of_the_draws(ground):
    """The mean over controls from their overlaps with eigenvectors, against controls that are formed."""
    bases = {"a": bases_of(ground.lm.decoder.d)}
    drawn = draw(ground.spans, list(bases.values()), 900, progress=False)
    texts = ground.by_text(bases)
    mean = ground.over_claims(texts.control(drawn.share)).mean()
    se = drawn.effect.std() / 900**0.5
    assert abs(mean - drawn.effect.mean()) < 4 * se
    for l, span in ground.spans.items():  # P has rank 4, of which that much lies in w's span
        assert 0 < drawn.share[l].sum() <= 4 + 1e-6 and drawn.share[l].shape == (1, span.U.shape[1])
    O = haar(ground.lm.decoder.d, torch.Generator().manual_seed(3), torch.float64)
    control = formed(ground.spans, bases["a"], O)
    for l, span in ground.spans.items():
        assert span.energy(control[l]) == pytest.approx(span.energy(bases["a"][l]), abs=1e-6)
        assert torch.allclose(control[l].T @ control[l], torch.eye(4, dtype=torch.float64), atol=1e-8)


def test_keep_and_drop_are_exact_in_float64(lm):
    g, d, name = torch.Generator().manual_seed(0), lm.decoder.d, lm.decoder.param_name(3, "o")
    B, w = orth(d, 4, 0), torch.randn(d, 3, generator=g, dtype=torch.float64)
    kept = B @ (B.T @ w)
    assert torch.equal(kept + (w - kept), w) or float((kept + (w - kept) - w).abs().max()) <= 2e-16 * float(
        w.abs().max()
    )
    diff, eye = ws.load_diff("tiny"), {l: torch.eye(d) for l in range(lm.decoder.n_layers)}
    rest = full_drop(diff, eye)
    assert all(float(rest[n].abs().max()) < 1e-6 for n in writers(diff))
    assert all(torch.equal(rest[n], diff[n]) for n in diff if n not in writers(diff))
    assert float((keep(diff, eye)[name] - diff[name]).abs().max()) < 1e-6


def test_read_variants_add_up_and_follow_the_norms_gain(lm):
    w, d = ws.load_diff("tiny"), lm.decoder.d
    bases = {l: orth(d, 5, l) for l in w.layers()}
    gains = {name: torch.rand(d) + 0.5 for name in readers(w)}
    for norms in (None, gains):
        kept, left = keep_read(w, bases, norms), drop_read(w, bases, norms)
        assert set(kept) == set(left) == {name for name in w if name.endswith(READERS)}
        for name in kept:
            assert torch.allclose(kept[name] + left[name], w[name], atol=1e-6)
            assert isinstance(kept.entries[name], LowRank)
    name = next(iter(kept))
    B = bases[int(name.split(".")[2])].float()
    want = (w[name] * gains[name]) @ B @ B.T / gains[name]
    assert torch.allclose(kept[name], want, atol=1e-5)
    with pytest.raises(ValueError, match="layer 3"):
        keep_read(w, {l: B for l in w.layers() if l != 3})
    with pytest.raises(ValueError, match="none of q"):
        readers(writers(w))


def test_where_w_acts_takes_w_apart(ground):
    parts = where_parts(ground.w)
    assert set(parts["layer 3"]) | set(parts["layer 4"]) == set(ground.w) and set(parts["all but layer 3"]) == set(
        parts["layer 4"]
    )
    assert set(parts["writers"]) | set(parts["readers"]) == set(ground.w)
    table = where_table(ground)
    rows = {r["part"]: r for r in table.iter_rows(named=True)}
    roles = sum(rows[r]["share"] for r in ("q", "k", "v", "o", "gate", "up", "down"))
    assert roles == pytest.approx(1) and rows["w"]["retention"] == pytest.approx(1)
    want = effects(ground.lm, ground.behavior, parts["v"], 2).mean()
    assert rows["v"]["effect"] == pytest.approx(want, abs=1e-5)
    many = ws.WeightDiff({f"model.layers.{l}.mlp.up_proj.weight": torch.ones(2, 2) for l in range(30)})
    blocks = [name for name in where_parts(many) if name.startswith("layer")]
    assert len(blocks) == 8 and blocks[0] == "layers 0-3" and blocks[-1] == "layers 28-29"


def test_variants_are_compared_where_they_move_the_model_by_as_much(ground, monkeypatch):
    """What is half as long is given twice the alpha; what does nothing is out of reach."""
    for place in (parts, calibration):
        monkeypatch.setattr(place, "passage_rows", lambda lm: passage_rows(lm, 2))
    kept = {"half": ground.res.scale(0.5), "nothing": ground.res.scale(0.0)}
    by = {row["subspace"]: row for row in matched_table(ground, kept, 0.05).iter_rows(named=True)}
    assert list(by) == ["w", "w_res", "half", "nothing", "mag_only"]
    for name in ("w", "w_res", "half", "mag_only"):
        assert by[name]["kl"] == pytest.approx(0.05, rel=0.05), name
    assert by["half"]["alpha"] == pytest.approx(2 * by["w_res"]["alpha"], rel=0.05)
    assert by["half"]["effect"] == pytest.approx(by["w_res"]["effect"], rel=0.05) and by["w_res"]["effect"] > 0.1
    assert by["w_res"]["retention"] == pytest.approx(1) and by["w"]["alpha"] < by["w_res"]["alpha"]
    assert np.isnan([by["nothing"][n] for n in ("alpha", "kl", "effect", "retention")]).all() and by["nothing"]["why"]
    assert abs(by["mag_only"]["effect"]) < by["w_res"]["effect"] / 4 and by["w"]["why"] == ""
    met = ws.calibrate(ground.lm, ground.res, 0.05, ground.behavior)  # the same texts
    assert by["w_res"]["alpha"] == pytest.approx(met.alpha, rel=1e-3)
    twice = replace(ground, w=ground.w.scale(2), res=ground.res.scale(2))
    row = matched_table(twice, {}, 0.05, alpha=2.0).row(1, named=True)
    assert row["alpha"] == pytest.approx(met.alpha, rel=0.05)  # of w as it is, not as it is scaled


def test_read_candidates_at_full_rank_are_all_that_reads(ground):
    d = ground.lm.decoder.d
    found = read_table(
        ground, {"all": {l: torch.eye(d) for l in LAYERS}, "all_gain": {l: torch.eye(d) for l in LAYERS}}, drops=1
    )
    rows = {r["subspace"]: r for r in found.iter_rows(named=True)}
    for name in ("all", "all_gain"):
        assert rows[name]["retention"] == pytest.approx(1, abs=1e-4) and rows[name]["share"] == pytest.approx(
            1, abs=1e-4
        )
    dropped = [r for r in rows.values() if not np.isnan(r["drop"])]
    assert len(dropped) == 1 and dropped[0]["drop"] == pytest.approx(0, abs=1e-3)
    assert dropped[0]["full_drop"] == pytest.approx(ground.effects["w_res"], abs=1e-3)


def test_controls_that_are_run_forward_speak_of_their_own_candidate(ground):
    d = ground.lm.decoder.d
    bases = {"a": bases_of(d), "b": bases_of(d, 3, 5), "idle": bases_of(d, 2, 7)}
    found = carried(ground, bases, 60, forward=2)
    forward = run_forward(ground, found, bases, 12, seed=0)  # too few for two
    assert len(set(forward["of"])) == 1 and len(set(forward["linear"])) == 12
    assert np.corrcoef(forward["linear"], forward["effect"])[0, 1] > 0.99
    (own,) = set(forward["of"])
    for row in with_forward(found, forward, 0)[2:].iter_rows(named=True):
        assert row["excess_low"] < row["excess"] < row["excess_high"]
        assert row["control"] == pytest.approx(row["linear"] - row["excess"])
        if row["subspace"] != own:  # nothing is carried over, least of all to one that was not run itself
            assert np.isnan(row["excess_forward"]) and np.isnan(row["p_forward"])
            continue
        off = (forward["effect"] - forward["linear"]).mean()
        c = list(bases).index(own)
        assert row["excess_forward"] == pytest.approx(row["effect"] - found.drawn.effect[:, c].mean() - off)
        assert 1 / 61 <= row["p_forward"] <= 1
    both = run_forward(ground, found, bases, 20, seed=0)
    assert sorted(set(both["of"])) == sorted(
        n for n, e in found.table[2:].select("subspace", "effect").rows() if np.isfinite(e)
    )


@pytest.mark.parametrize("kind", ["linear", "saturating", "growing scatter"])
def test_blind_candidates_have_the_nominal_error_forward_too(kind):
    """Effects that are no straight line in the first-order ones: what is off is taken from the candidate's own controls."""
    g, n, hits = np.random.default_rng(0), 400, 0
    for _ in range(n):
        size = g.choice([0.05, 0.3, 2.0])
        linear = size * (1 + 0.2 * g.standard_normal(121))
        true = linear * (1 - 0.1 * linear / 2) if kind == "saturating" else linear
        true = true + (0.1 * np.abs(linear) if kind == "growing scatter" else 0.01 * size) * g.standard_normal(121)
        table = pl.DataFrame({"subspace": ["w", "w_res", "x"], "effect": [0.0, 0.0, float(true[0])]})
        drawn = Drawn(linear[21:, None], np.zeros((100, 1)))
        own = pl.DataFrame({"of": ["x"] * 20, "linear": linear[1:21], "effect": true[1:21]})
        hits += (
            with_forward(Carried(table, ("x",), linear[:1], np.zeros((1, 3)), drawn), own, 0)["p_forward"][2] <= 0.05
        )
    assert hits / n <= 0.085, hits / n  # 99.9 % of a binomial at .05


def test_max_t_counts_what_is_out_of_reach_against_the_candidate():
    g = np.random.default_rng(0)
    drawn, p = g.standard_normal((999, 3)), np.array([0.001, 0.5, 1.0])
    drawn[:10, 0], drawn[:, 2] = np.nan, np.nan
    found = adjusted(np.array([9.0, 0.0, 5.0]), drawn, p)
    assert found[0] == pytest.approx(11 / 1000) and found[1] >= 0.5 and np.isnan(found[2])
    same = adjusted(np.array([2.0]), np.full((9, 1), 2.0), np.array([1.0]))
    assert same[0] == 1.0  # bases of all that there is


def test_only_what_was_asked_for_is_run(ground):
    bases = {str(i): bases_of(ground.lm.decoder.d, 4, i) for i in range(4)}
    whole = {"all": {l: torch.eye(ground.lm.decoder.d) for l in LAYERS}}  # holds all of the slope: comes last
    table = carried(ground, whole | bases, 0, forward=2, drops=1).table
    assert np.isnan(table.filter(subspace="all")["effect"].item())
    table = table.filter(pl.col("subspace") != "all")
    assert table["effect"].is_not_nan().sum() == 4 and table["full_drop"].is_not_nan().sum() == 1
    led = table[2:].sort("linear", descending=True)
    assert led["effect"].is_not_nan().to_list() == [True, True, False, False] and led["full_drop"].is_not_nan()[0]


def test_ceilings_find_what_w_wrote(ground):
    other = ground.w.scale(-2)
    table = rank_table(ground, [1, 64], other, {}, {})
    rows = {(r["whose"], r["rank"]): r for r in table.iter_rows(named=True)}
    assert rows["w's own", 64]["retention"] == pytest.approx(1, abs=0.02)
    assert rows["another seed's", 64]["effect"] == pytest.approx(rows["w's own", 64]["effect"], abs=1e-4)
    assert rows["w's own", 1]["energy"] < rows["w's own", 64]["energy"]
    X = {l: orth(ground.lm.decoder.d, 6, l) * torch.tensor([9.0, 5, 1, 1, 1, 1]) for l in LAYERS}
    lead = act_bases(ground, X, 2)
    assert torch.allclose(
        lead[3] @ lead[3].T,
        X[3][:, :2] / X[3][:, :2].norm(dim=0) @ (X[3][:, :2] / X[3][:, :2].norm(dim=0)).T,
        atol=1e-5,
    )
    assert weight_bases(ground, ground.w, 3)[4].shape == (ground.lm.decoder.d, 3)
    u = yes_no(ground)
    assert float(u.norm()) == pytest.approx(1)


def test_a_cloud_knows_energy_and_finds_a_carrier_above_it(ground):
    """Effects that are energy by construction are predicted; a basis that follows the slope lies above them."""
    d = ground.lm.decoder.d
    flat = {}
    for l, span in ground.spans.items():  # M symmetric and equal to the energy's Gram: effect = energy
        R = span.U @ span.K["input"] / span.trace["input"]
        flat[l] = replace(span, R=R)
    act = {l: orth(d, 12, 50 + l) for l in LAYERS}
    same = replace(ground, spans=flat)
    found = cloud(same, {"x": bases_of(d)}, act, k=4, n=120, boot=50)
    fit = dict(found.fit.select("scores", "r2_out").rows())
    assert fit["energy"] > 0.99 and fit["R_act"] < 0.9 and len(found.points) == 120
    spread = found.points.select(pl.col("energy", "R_act").std()).row(0)
    assert min(spread) > 0.05  # the design moves both
    told = {r["score"]: r for r in found.slopes.iter_rows(named=True)}
    assert told["R_act"]["vif"] >= 1 and all((r["vif"] > 10) == np.isnan(r["nats_per_sd"]) for r in told.values())
    carrier = {}
    for l, span in ground.spans.items():
        M = span.U @ span.R.T
        carrier[l] = torch.linalg.eigh((M + M.T) / 2).eigenvectors[:, -4:]
    told = cloud(ground, {"carrier": carrier, "blind": bases_of(d, 4, 9)}, act, k=4, n=120, boot=50).beyond
    left = dict(told.select("subspace", "residual").rows())
    assert left["carrier"] > 3 * abs(left["blind"])
    with pytest.raises(ValueError, match="CLOUD = 3"):
        cloud(ground, {}, act, 4, n=3)


SMALL = dict(ranks=[1, 8], draws=30, checked=10, forward=3, drops=1, cloud=20, boot=20, templates=1, progress=False)


@pytest.fixture(scope="module")
def swept(lm, behavior, cache):
    w = ws.load_diff("tiny")
    return w, ws.explain(
        lm,
        w,
        behavior,
        protocol="v7b",
        candidates=["write", "mlp_write", "attn_qkv_read", "global_write"],
        cache=cache,
        progress=False,
    )


@pytest.fixture(scope="module")
def checked(lm, behavior, cache, swept):
    w, sweep = swept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "passage_rows", lambda lm: passage_rows(lm, 2))
        return causal_check(lm, w, sweep, behavior, other=w.scale(-1), nulls=[w.scale(0.1)], cache=cache, **SMALL)


def test_a_check_is_written_and_read_back(checked, tmp_path):
    folder = checked.save(tmp_path / "causal")
    again = CausalCheck.load(folder)
    for name in ("candidates", "where", "read", "ranks", "dose", "matched", "controls", "forward"):
        assert getattr(again, name).columns == getattr(checked, name).columns, name
    assert again.conclusion() == checked.conclusion() and again.names == checked.names
    assert np.array_equal(again.tensors["excess"], checked.tensors["excess"])
    text = checked.conclusion()
    for told in (
        "Where w acts",
        "carries more" if "carries more" in text else "Who carries",
        "mag_only",
        "another seed's",
        "One seed",
    ):
        assert told in text
    assert checked.read["subspace"].to_list()[:2] == ["w_read", "attn_qkv_read"]
    for figure in (
        checked.forest(),
        checked.energy_figure(),
        checked.where_figure(),
        checked.rank_figure(),
        checked.cloud_figure(),
    ):
        assert figure.axes and all(axis.get_title() for axis in figure.axes)
        check_looks(figure)
    with pytest.raises(FileNotFoundError, match="run the causal_check"):
        CausalCheck.load(tmp_path)
    (folder / "causal_where.tsv").write_text("part\n")
    with pytest.raises(ValueError, match="causal_where.tsv.*damaged"):
        CausalCheck.load(folder)


def test_words_leave_out_what_cannot_be_compared(checked):
    """Saturated rows at one KL; controls and what holds the score's own slope among what is needed."""
    text = checked.conclusion()
    assert "`w_res`" in text.split("## At one KL")[1].split("##")[0] and "FORWARD, DROPS" in text
    far = pl.when(pl.col("subspace") == "w_res").then(True).otherwise(pl.col("saturated")).alias("saturated")
    part = (
        replace(checked, matched=checked.matched.with_columns(far)).conclusion().split("## At one KL")[1].split("##")[0]
    )
    assert "Saturated there, not compared: `w_res`" in part and part.count("`w_res`") == 1
    assert "Of the 1 that were taken out" in text  # DROPS
    for column, value in (("kind", pl.lit("control")), ("slope", pl.lit(0.95))):
        other = replace(checked, candidates=checked.candidates.with_columns(value.alias(column)))
        assert "Necessary?" not in other.conclusion(), column


def test_an_interval_over_two_halves_is_of_the_spread_within_them():
    bias, sides = np.array([3.0, 3.2, 2.8, -3.0, -3.1, -2.9]), np.array([1.0, 1, 1, -1, -1, -1])
    found, plain = (spread(1.0 + bias, "x", of) for of in (sides, np.ones(6)))
    assert found["x"] == plain["x"] == pytest.approx(1.0) and plain["x_low"] < -2
    half = 4.302653 * np.hypot(0.2, 0.1) / 3**0.5 / 2
    assert found["x_high"] - 1 == pytest.approx(half, rel=1e-5) and 1 - found["x_low"] == pytest.approx(half, rel=1e-5)
    assert np.isnan(spread(bias[:4], "x", sides[:4])["x_low"])  # one claim tells no spread


def test_what_does_not_belong_together_is_refused(lm, behavior, swept, cache):
    w, sweep = swept
    for change, told in (
        ({"candidates": ["wriet"]}, "wriet.*write"),
        ({"candidates": ["dW_left_basis_ceiling"]}, "no candidate of this sweep"),
        ({"alpha": 0.0}, "ALPHA"),
        ({"templates": 9}, "wordings"),
        ({"sections": ["wher"]}, "wher.*where"),
        ({"forward": -1}, "FORWARD: -1"),
        ({"templates": 0}, "N_WORDINGS: 0"),
        ({"sections": "dose"}, "SECTIONS: dose: expected a list"),
        ({"cloud": -1}, "CLOUD: -1"),
        ({"boot": 0}, "BOOT: 0"),
        ({"ranks": [1, 0]}, "RANKS: 0"),
    ):
        with pytest.raises(ValueError, match=told):
            causal_check(lm, w, sweep, behavior, cache=cache, **{**SMALL, **change})
    few = causal_check(lm, w, sweep, behavior, cache=cache, **SMALL, sections=[])
    assert few.where["part"].to_list() == ["w", "writers", "readers"] and not len(few.read) and not len(few.ranks)
    assert "Left out of this run: where, read" in few.conclusion() and few.forest().axes
    with pytest.raises(ValueError, match="another w"):
        causal_check(lm, w.scale(2), sweep, behavior, cache=cache, **SMALL)
    with pytest.raises(ValueError, match="is of sycophancy"):
        causal_check(lm, w, sweep, replace(behavior, name="other"), cache=cache, **SMALL)


def test_over_seeds_the_same_twice_is_the_same(checked, tmp_path):
    twice = over_seeds({0: checked, 1: checked})
    rows = {r["candidate"]: r for r in twice.table.iter_rows(named=True)}
    first = {r["subspace"]: r for r in checked.candidates.iter_rows(named=True)}
    for name, row in rows.items():
        assert row["excess"] == pytest.approx(first[name]["excess"]) and row["excess_p"] == pytest.approx(
            first[name]["p"]
        )
        assert row["excess_low"] == pytest.approx(first[name]["excess_low"], abs=1e-6)  # seeds that agree add nothing
    assert "of w's effect" in twice.text() and len(twice.effects) == 2
    assert over_seeds({3: checked}).table["excess_low"].is_nan().all()  # one seed has no spread
    own = checked.tensors["excess"]
    sides = torch.tensor([1.0, -1.0]).repeat(own.shape[1])[: own.shape[1]]
    pushed = own + 20 * own.abs().max() * sides  # a push to yes, which helps one half and harms the other

    def width(excess, of):
        one = replace(checked, tensors=checked.tensors | {"excess": excess, "sides": of})
        return over_seeds({0: one, 1: one}).table.sort("candidate").select(pl.col("excess_high") - pl.col("excess_low"))

    halves = width(pushed, sides).to_series().to_numpy()
    assert halves == pytest.approx(width(own, sides).to_series().to_numpy(), rel=1e-5)
    assert (halves < width(pushed, torch.ones(len(sides))).to_series().to_numpy() / 3).all()
    with pytest.raises(ValueError, match="alpha"):
        over_seeds({0: checked, 1: replace(checked, setting=checked.setting | {"alpha": 2.0})})
    with pytest.raises(ValueError, match="no causal check"):
        over_seeds({})
    folder = checked.save(tmp_path / "seed_1" / "causal")
    assert finished({0: tmp_path / "seed_0" / "causal", 1: folder}) == {1: folder}


def test_the_best_candidate_is_chosen_on_other_seeds(checked, swept, tmp_path):
    _, sweep = swept
    folder = checked.save(tmp_path / "causal")
    name, bases, how = best_candidate(sweep, {0: folder, 1: folder}, 0)
    table = over_seeds({1: folder}).table
    sure = table.filter((pl.col("excess_p_max") < 0.05) & (pl.col("excess") > 0) & (pl.col("kind") == "A-hypothesis"))
    assert set(bases) == set(sweep.layers) and name == (sure["candidate"].to_list() or [name])[0]
    assert ("seed 1" in how and "seed 0" not in how) if len(sure) else "joint score" in how
    with pytest.raises(ValueError, match="attn_qkv_read: reads"):
        best_candidate(sweep, {}, 0, "attn_qkv_read")
    assert best_candidate(sweep, {}, 0)[2].endswith("no causal check names one)")
    assert best_candidate(sweep, {0: folder}, 0, "write")[0] == "write"
    with pytest.raises(ValueError, match="nonsense"):
        best_candidate(sweep, {}, 0, "nonsense")


def test_a_second_check_asks_the_model_nothing(lm, behavior, cache, swept, checked, monkeypatch):
    w, sweep = swept
    monkeypatch.setattr(Passes, "_stack", None)  # what every variant answered is read
    rest = [one for one in SECTIONS if one != "matched"]  # whose KLs are measured anew
    more = {**SMALL, "sections": rest, "other": w.scale(-1), "nulls": [w.scale(0.1)]}
    again = causal_check(lm, w, sweep, behavior, cache=cache, **more)
    assert again.candidates.equals(checked.candidates, null_equal=True)
