"""Statistics over seeds: planted orders come back, identities of the intervals, coverage of what they claim."""

import numpy as np
import pytest
from scipy import stats

from bench.coverage import coverage
from ws.stability.intervals import (
    crossed_bootstrap,
    crossed_t_interval,
    percentile_interval,
    t_interval,
    topic_influence,
)
from ws.stability.scores import (
    log_values,
    make_scores,
    per_seed_table,
    rank_stability_table,
    ranks_per_seed,
    seed_values,
    sign_agreement,
    summary_table,
)

BOOT = 800


def table(S=3, C=6, L=4, n=5, seed=0, d=64, names=None, **more):
    """A random score table; `more` goes to make_scores."""
    generator = np.random.default_rng(seed)
    act = np.exp(0.3 * generator.standard_normal((S, C, L, n)))
    w = np.exp(0.3 * generator.standard_normal((S, C, L)))
    names = names or [f"c{i}" for i in range(C)]
    return make_scores(names, list(range(S)), act, w, np.full((C, L), 8.0), d, **more)


def test_scores_of_a_seed_are_means_over_layers_and_topics():
    scores = table()
    values = seed_values(scores)
    act, w = scores.act[1, 2].mean(), scores.w[1, 2].mean()
    row = per_seed_table(scores).filter(seed=1, candidate="c2").row(0, named=True)
    assert row["R_act"] == pytest.approx(act) and row["R_w"] == pytest.approx(w)
    assert row["joint_score"] == pytest.approx(np.sqrt(act * w))
    assert values["joint"][1, 2] == pytest.approx(row["joint_score"])
    summary = summary_table(scores, seed=0, boot=BOOT)
    found = summary.filter(candidate="c2").row(0, named=True)
    assert found["mean_log_joint"] == pytest.approx(np.log(values["joint"][:, 2]).mean())
    assert found["joint_geomean"] == pytest.approx(np.exp(found["mean_log_joint"]))
    assert found["R_act_median"] == pytest.approx(np.median(values["R_act"][:, 2]))
    assert found["R_w_sd"] == pytest.approx(values["R_w"][:, 2].std(ddof=1))
    assert [found[f"joint_seed_{k}"] for k in range(3)] == pytest.approx(values["joint"][:, 2].tolist())


def test_undefined_candidates_are_visible_sort_last_and_hold_no_rank():
    scores = table()
    act, w = scores.act.copy(), scores.w.copy()
    w[1, 0, 2] = np.nan  # a missing tensor at one layer of one seed
    act[:, 3] = 0.0  # no energy at all
    broken = make_scores(scores.candidates, scores.seeds, act, w, scores.ranks, 64)
    summary = summary_table(broken, seed=0, boot=BOOT)
    assert set(summary["candidate"][-2:]) == {"c0", "c3"}
    reasons = dict(summary.select("candidate", "undefined").iter_rows())
    assert reasons["c0"] == "R_w undefined at 1 of 4 layers" and reasons["c3"] == "R_act is 0"
    assert all(reasons[f"c{i}"] == "" for i in (1, 2, 4, 5))
    assert summary["mean_log_joint"][-2:].is_nan().all() and summary["joint_boot_lo"][-2:].is_nan().all()
    places = ranks_per_seed(broken)
    assert np.isnan(places[1, 0]) and places[0, 0] >= 1 and np.isnan(places[:, 3]).all()
    assert sorted(places[1, [1, 2, 4, 5]]) == [1, 2, 3, 4]
    assert per_seed_table(broken).filter(candidate="c3")["rank_in_seed"].null_count() == 3
    assert rank_stability_table(broken).filter(seed_a=0, seed_b=1, score="joint")["n_candidates"][0] == 4


def test_ceilings_and_controls_take_no_rank():
    kinds = ["A-hypothesis"] * 4 + ["ceiling", "control"]
    axis = ["write", "read", "mixed", "write", "ceiling", "write"]
    scores = table(kinds=kinds, axis_kinds=axis)
    assert np.isnan(ranks_per_seed(scores)[:, 4:]).all()
    assert scores.contenders.tolist() == [True, False, True, True, False, False]


def test_malformed_tables_are_refused_by_name():
    good = table()
    with pytest.raises(ValueError, match="seeds: repeated"):
        make_scores(good.candidates, (0, 1, 1), good.act, good.w, good.ranks, 64)
    with pytest.raises(ValueError, match="act: 3 seeds, 2 were named"):
        make_scores(good.candidates, (0, 1), good.act, good.w, good.ranks, 64)
    with pytest.raises(ValueError, match="w: negative score of c4"):
        w = good.w.copy()
        w[0, 4, 1] = -1
        make_scores(good.candidates, good.seeds, good.act, w, good.ranks, 64)


def test_rank_agreement_of_known_orders():
    """Seed 1 repeats seed 0's order, seed 2 reverses it."""
    order = np.exp(np.arange(8.0))
    w = np.stack([order, order**2, 1 / order])[:, :, None]
    scores = make_scores([f"c{i}" for i in range(8)], [10, 11, 12], np.ones((3, 8, 1, 2)), w, np.full((8, 1), 8.0), 64)
    rows = {
        (r["seed_a"], r["seed_b"]): r for r in rank_stability_table(scores).filter(score="joint").iter_rows(named=True)
    }
    assert rows[10, 11]["kendall_tau"] == pytest.approx(1) and rows[10, 11]["spearman"] == pytest.approx(1)
    assert rows[10, 12]["kendall_tau"] == pytest.approx(-1) and rows[11, 12]["spearman"] == pytest.approx(-1)
    assert rows[10, 11]["top5_shared"] == 5 and rows[10, 12]["top5_shared"] == 2
    assert rows[10, 11]["chance_top5_shared"] == pytest.approx(25 / 8)
    summary = summary_table(scores, seed=0, boot=BOOT)
    counts = dict(summary.select("candidate", "top5_count").iter_rows())
    assert counts == {"c0": 1, "c1": 1, "c2": 1, "c3": 3, "c4": 3, "c5": 2, "c6": 2, "c7": 2}
    assert summary["top5_chance"][0] == pytest.approx(3 * 5 / 8)


def test_chance_columns_match_shuffled_orders():
    generator = np.random.default_rng(0)
    m = 12
    draws = [(generator.permutation(m), generator.permutation(m)) for _ in range(3000)]
    tau = np.array([stats.kendalltau(a, b).statistic for a, b in draws[:1500]])
    shared = [len(set(np.argsort(a)[:5]) & set(np.argsort(b)[:5])) for a, b in draws]
    row = rank_stability_table(table(C=m)).row(0, named=True)
    assert tau.std() == pytest.approx(row["chance_tau_sd"], rel=0.06) and abs(tau.mean()) < 0.02
    assert np.mean(shared) == pytest.approx(row["chance_top5_shared"], rel=0.03)


def test_sign_agreement_and_its_chance():
    logs = np.array([[1.0, 1.0, np.nan], [2.0, -1.0, 1.0], [0.5, -3.0, 1.0]])
    assert sign_agreement(logs)[:2] == pytest.approx([1.0, 2 / 3]) and np.isnan(sign_agreement(logs)[2])


def test_bootstrap_of_one_topic_and_identical_seeds_has_no_width():
    one = np.random.default_rng(0).uniform(0.5, 3, size=(1, 7, 1))
    draws = crossed_bootstrap(np.repeat(one, 4, axis=0), np.repeat(one[:, :, 0], 4, axis=0), seed=0, boot=BOOT)
    for name in ("R_act", "R_w", "joint"):
        lo, hi = percentile_interval(draws[name])
        np.testing.assert_allclose(lo, np.log(one[0, :, 0]), atol=1e-12)
        np.testing.assert_allclose(hi, lo, atol=1e-12)


def test_bootstrap_equals_index_resampling_with_one_topic_draw_for_all_seeds():
    """Index arrays give the same spread; two seeds with mirrored topics show that both meet the same topic draw."""
    scores = table(S=2, C=3, L=1, n=4).act.mean(axis=2)
    w = np.ones((2, 3))
    draws = crossed_bootstrap(scores, w, seed=3, boot=60_000)["R_act"]
    generator = np.random.default_rng(9)
    plain = np.empty((6000, 3))
    for b in range(len(plain)):
        s, t = generator.integers(0, 2, 2), generator.integers(0, 4, 4)
        plain[b] = np.log(scores[s][:, :, t].mean(axis=2)).mean(axis=0)
    np.testing.assert_allclose(draws.mean(axis=0), plain.mean(axis=0), atol=0.006)
    np.testing.assert_allclose(draws.std(axis=0), plain.std(axis=0), rtol=0.04)
    anti = np.array([[[1.0, 3.0]], [[3.0, 1.0]]])  # mean over seeds: log 2 + log 2 when both topics come once
    values = np.unique(crossed_bootstrap(anti, np.ones((2, 1)), seed=0, boot=4000)["R_act"].round(9))
    possible = [0.0, np.log(3) / 2, np.log(2), np.log(3)]  # separate topic draws would add (log 1 + log 2) / 2, ...
    np.testing.assert_allclose(values, np.sort(possible), atol=1e-8)


def test_bootstrap_is_reproducible_and_marks_undefined_columns():
    scores = table().act.mean(axis=2)
    scores[0, 1, 2] = np.nan
    w = np.ones((3, 6))
    first, second = (crossed_bootstrap(scores, w, seed=5, boot=300)["joint"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.isnan(first[:, 1]).all() and not np.isnan(np.delete(first, 1, axis=1)).any()
    assert not np.array_equal(first, crossed_bootstrap(scores, w, seed=6, boot=300)["joint"])


def test_no_draws_are_refused():
    with pytest.raises(ValueError, match="BOOT = 0: at least one"):
        crossed_bootstrap(np.ones((2, 1, 3)), np.ones((2, 1)), 0, 0)


def test_a_seed_without_energy_makes_minus_infinity_not_nan():
    scores = np.ones((2, 1, 2))
    scores[0] = [[0.0, 1.0]]  # draws of topic 0 alone have no energy on seed 0
    draws = crossed_bootstrap(scores, np.ones((2, 1)), seed=0, boot=500)["R_act"]
    assert not np.isnan(draws).any() and np.isneginf(draws).any() and (draws == 0).any()


def test_t_interval_is_scipys_and_needs_two_seeds():
    values = np.random.default_rng(0).standard_normal((4, 3))
    lo, hi = t_interval(values)
    for c in range(3):
        want = stats.t.interval(0.95, 3, values[:, c].mean(), stats.sem(values[:, c]))
        assert (lo[c], hi[c]) == pytest.approx(want)
    assert np.isnan(t_interval(values[:1])[0]).all()


def test_crossed_t_is_the_t_interval_when_topics_agree_and_wider_otherwise():
    scores = table(S=4).act.mean(axis=2)
    logs = np.log(scores.mean(axis=2))
    flat = crossed_t_interval(logs, np.ones((6, 5)))
    np.testing.assert_allclose(flat, t_interval(logs))
    influence = topic_influence(scores)
    np.testing.assert_allclose(influence.mean(axis=1), 1)
    lo, hi = crossed_t_interval(logs, influence)
    assert (hi - lo > flat[1] - flat[0]).all()
    assert np.isnan(crossed_t_interval(logs, influence[:, :1])[0]).all()


def test_coverage_of_three_seeds_is_honest_for_t_only():
    """t covers 95 % at S = 3, bootstrap percentiles about 76 %; both are for seeds when topics do not vary."""
    found = coverage(S=3, n=6, seed_sd=0.3, topic_sd=0.0, cross_sd=0.0, reps=2000, boot=1000, seed=1)
    assert found["t_all_topics"] == pytest.approx(0.95, abs=0.015)
    assert found["boot_all_topics"] == pytest.approx(0.76, abs=0.03)


def test_only_crossed_intervals_cover_the_population_of_topics():
    found = coverage(S=5, n=12, seed_sd=0.05, topic_sd=0.6, cross_sd=0.0, reps=1500, boot=800, seed=1)
    assert found["t_all_topics"] < 0.5 and found["t_these_topics"] == pytest.approx(0.95, abs=0.02)
    assert found["boot_all_topics"] > 0.85 and found["crossed_t_all_topics"] > 0.92


def test_summary_intervals_hold_the_geometric_mean_and_null_diff_ratio():
    null = np.full(6, 0.5)
    scores = table(S=5, null_act=null, null_w=2 * null)
    summary = summary_table(scores, seed=1, boot=BOOT)
    for name in ("R_act", "R_w", "joint"):
        assert (summary[f"{name}_t_lo"] <= summary[f"{name}_geomean"]).all()
        assert (summary[f"{name}_geomean"] <= summary[f"{name}_t_hi"]).all()
        assert (summary[f"{name}_boot_lo"] < summary[f"{name}_boot_hi"]).all()
    np.testing.assert_allclose(summary["R_act_vs_null_diff"], summary["R_act_geomean"] / 0.5)
    np.testing.assert_allclose(summary["R_w_vs_null_diff"], summary["R_w_geomean"])
    assert summary.equals(summary_table(scores, seed=1, boot=BOOT))
    assert not np.isnan(log_values(scores)["joint"]).any()


def test_one_seed_gives_a_table_without_intervals():
    summary = summary_table(table(S=1), seed=0, boot=BOOT)
    assert summary["joint_t_lo"].is_nan().all() and summary["R_w_sd"].is_nan().all()
    assert rank_stability_table(table(S=1)).height == 0
