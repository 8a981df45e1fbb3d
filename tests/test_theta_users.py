"""Many users: files whole and resumable, groups that change nothing, planted users told apart, controls and verdict."""

from dataclasses import replace

import polars as pl
import pytest
import torch
from looks import check_looks

from tests.harm import HARMS
from ws.cache.made import made
from ws.model.lm import load_lm
from ws.theta import adam, base, compare, recorded, report, users
from ws.theta import figures as draw
from ws.theta.base import record_base
from ws.theta.fit import FitConfig, evaluate, make_problem
from ws.theta.fitted import ThetaFits, fit_theta
from ws.theta.heads import CVH, all_heads, cvh
from ws.theta.recorded import Recorded
from ws.theta.states import States
from ws.theta.users import fit_users, load_fit, theta_path

USERS = ["ann", "bob", "cy d"]
V, d, D = 120, 24, 8


@pytest.fixture(scope="module")
def planted():
    """Three users whose words are drawn at thetas of their own (an unconditional head): 12 texts of 25 tokens each."""
    gen = torch.Generator().manual_seed(0)
    W = torch.randn(V, d, generator=gen) / d**0.5
    heads = all_heads(W, D=D, alpha=1.0)
    thetas = 3 * torch.nn.functional.normalize(torch.randn(3, D, generator=gen), dim=1)
    train, rest = {}, {}
    for user, theta in zip(USERS, thetas, strict=True):
        h = 2 * torch.randn(300, d, generator=gen)
        p = (h @ W.T + 0.5 * heads["unconditional"].logit_delta(h, theta, W)).softmax(-1)
        y = torch.multinomial(p, 1, generator=gen)[:, 0]
        states = States(h, y, torch.arange(300) // 25)
        train[user], rest[user] = states.of_texts(list(range(9))), states.of_texts([9, 10, 11])
    cfg = FitConfig(steps=20)
    heldout = compare.make_heldout(Recorded(rest, W))
    return W, heads, train, rest, cfg, heldout


@pytest.fixture(scope="module")
def fitted(planted, tmp_path_factory):
    W, heads, train, _, cfg, *_ = planted
    folder = tmp_path_factory.mktemp("fits")
    some = {n: heads[n] for n in ("cvh", "unconditional", "svd_cvh", "svd_unconditional", "lm_head_cvh")}
    return some, fit_users(Recorded(train, W), some, cfg, folder, progress=False), folder


@pytest.fixture(scope="module")
def found(planted, fitted):
    return ThetaFits(fitted[1], fitted[0], planted[-1], planted[-2], "matched")


def visible(folder):
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def test_one_file_per_user_and_head_that_loads_as_it_was(fitted):
    heads, fits, folder = fitted
    assert {p.name for p in visible(folder)} == {
        f"theta_{u}_{h}.safetensors" for u in ("ann", "bob", "cy_d") for h in heads
    }
    for (user, head), fit in fits.items():
        again = load_fit(theta_path(folder, user, head))
        assert torch.equal(again.adam.theta, fit.adam.theta) and again.optimum.loss == fit.optimum.loss
        assert (again.user, again.head, again.alpha) == (user, head, 1.0) and len(again.adam.trace["loss"]) == 20
        assert fit.optimum.loss <= fit.clipped.loss + 1e-12 <= float(fit.adam.trace["loss"].min()) + 1e-6
        assert fit.optimum.gradient_ratio <= 1e-6


def test_the_same_fits_give_the_same_bytes(planted, fitted, tmp_path):
    W, _, train, _, cfg, *_ = planted
    heads, _, folder = fitted
    fit_users(Recorded(train, W), heads, cfg, tmp_path, progress=False)
    files = visible(folder)
    assert len(files) == 15 and all(p.read_bytes() == (tmp_path / p.name).read_bytes() for p in files)


@pytest.fixture
def counted(monkeypatch):
    """Names of the files that are made; `dies_after` of them, if set, the process is interrupted."""

    def count(path, key, make):
        if len(names) == names.dies_after:
            raise KeyboardInterrupt
        names.append(path.name.removesuffix("_cvh.safetensors").removeprefix("theta_"))
        return made(path, key, make)

    class Names(list):
        dies_after = None

    names = Names()
    monkeypatch.setattr(users, "made", count)
    return names


def test_an_interrupted_run_goes_on_and_changed_inputs_are_fitted_again(planted, tmp_path, counted):
    W, heads, train, _, cfg, *_ = planted
    one = {"cvh": heads["cvh"]}
    counted.dies_after = 2
    with pytest.raises(KeyboardInterrupt):
        fit_users(Recorded(train, W), one, cfg, tmp_path, progress=False)
    assert len(visible(tmp_path)) == 2
    stamps = {p.name: p.stat().st_mtime_ns for p in visible(tmp_path)}
    counted.dies_after = None
    fit_users(Recorded(train, W), one, cfg, tmp_path, progress=False)
    assert counted == ["ann", "bob", "cy_d"] and {n: (tmp_path / n).stat().st_mtime_ns for n in stamps} == stamps
    resumed = visible(tmp_path)
    fit_users(Recorded(train, W), one, cfg, tmp_path / "whole", progress=False)
    assert all(p.read_bytes() == (tmp_path / "whole" / p.name).read_bytes() for p in resumed)
    del counted[:]
    fit_users(Recorded(train, W), one, cfg, tmp_path, progress=False)
    assert counted == []
    fit_users(Recorded(train, W), one, replace(cfg, beta=0.1), tmp_path, progress=False)
    fit_users(Recorded(train, W), {"cvh": cvh(d, D, alpha=0.7)}, replace(cfg, beta=0.1), tmp_path, progress=False)
    changed = {**train, "bob": replace(train["bob"], y=train["bob"].y.flip(0))}
    fit_users(Recorded(changed, W), {"cvh": cvh(d, D, alpha=0.7)}, replace(cfg, beta=0.1), tmp_path, progress=False)
    assert counted == [*["ann", "bob", "cy_d"] * 2, "bob"]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_fit_is_made_anew(planted, tmp_path, counted, harm):
    W, heads, train, _, cfg, *_ = planted
    one = {"cvh": heads["cvh"]}
    fit_users(Recorded(train, W), one, cfg, tmp_path, progress=False)
    path = theta_path(tmp_path, "bob", "cvh")
    want = path.read_bytes()
    harm(path)
    fit_users(Recorded(train, W), one, cfg, tmp_path, progress=False)
    assert counted == ["ann", "bob", "cy_d", "bob"] and path.read_bytes() == want


@pytest.mark.parametrize("room,name", [(adam, "fit_adam"), (users, "fit_optimum"), (recorded, "record_base")])
def test_old_thetas_do_not_come_back_for_another_fit(planted, tmp_path, monkeypatch, room, name):
    W, heads, train, _, cfg, *_ = planted
    one = {"cvh": heads["cvh"]}
    fit_users(Recorded(train, W), one, cfg, tmp_path, progress=False)

    def fails(*args, **options):
        raise RuntimeError("another fit")

    monkeypatch.setattr(room, name, fails)
    with pytest.raises(RuntimeError, match="another fit"):
        fit_users(Recorded(train, W), one, cfg, tmp_path, progress=False)


def test_a_head_of_ones_own_is_known_by_its_code(planted, tmp_path, counted):
    W, heads, train, _, cfg, *_ = planted
    parts = heads["cvh"].A, heads["cvh"].B

    class Louder(CVH):
        def features(self, h):
            return 2 * super().features(h)

    for kind in (CVH, CVH, Louder, Louder):
        fit_users(Recorded(train, W), {"cvh": kind(*parts)}, cfg, tmp_path, progress=False)
    assert len(counted) == 6


def test_the_front_door_fits_users_of_ones_own(parity_folder, tmp_path, counted):
    lm = load_lm(str(parity_folder / "model"), "float32", "cpu")
    texts = {"ann": [("Hi", "Well, hello dear."), ("Why", "Well, because.")], "bob": [("", "No."), ("", "Nope.")]}
    options = dict(heads=["cvh"], dim=4, folder=tmp_path, progress=False)
    found = fit_theta(lm, texts, **options)
    assert counted == found.users == ["ann", "bob"] and found.theta("bob", "cvh").shape == (4,)
    assert found.summary["head"].unique().to_list() == ["cvh"] and len(found.summary) == 2 * 3
    again = fit_theta(lm, texts, **options)
    assert len(counted) == 2 and torch.equal(again.stacked("cvh"), found.stacked("cvh"))
    assert {p.suffix for p in visible(tmp_path)} == {".safetensors"} and len(visible(tmp_path)) == 3
    with pytest.raises(ValueError, match="head 'cvhh' is unknown; one of cvh, "):
        fit_theta(lm, texts, **{**options, "heads": ["cvhh"]})
    with pytest.raises(ValueError, match="user 'bob': at least two texts"):
        fit_theta(lm, {**texts, "bob": texts["bob"][:1]}, **options)


def test_a_base_on_disk_changes_nothing(planted, fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "BASE_MB", 0)
    W, heads, train, _, cfg, *_ = planted
    alone = fit_users(Recorded(train, W), {"cvh": heads["cvh"]}, cfg, tmp_path, progress=False)
    _, together, _ = fitted
    for user in USERS:
        assert torch.allclose(alone[user, "cvh"].theta(), together[user, "cvh"].theta(), atol=1e-5)
        assert torch.allclose(alone[user, "cvh"].optimum.theta, together[user, "cvh"].optimum.theta, atol=1e-5)


def test_users_that_would_share_a_file_and_foreign_files_are_refused(planted, tmp_path):
    W, heads, train, _, cfg, *_ = planted
    with pytest.raises(ValueError, match="users 'a b' and 'a_b' would share a file"):
        fit_users(Recorded({"a b": train["ann"], "a_b": train["bob"]}, W), heads, cfg, tmp_path, progress=False)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a theta file"):
        load_fit(tmp_path / "other.safetensors")


def test_held_out_scores_equal_a_problem_per_user(planted, found):
    W, heads, _, rest, cfg, heldout = planted
    thetas = found.stacked("cvh")
    cross = compare.by_user(heldout, compare.score(heldout, heads["cvh"], thetas[:, None].expand(-1, 9, -1), cfg)[0])
    own = compare.by_user(heldout, found.own_scores("cvh")[0])
    assert torch.allclose(own, cross.diagonal(), atol=1e-6)
    for j, user in enumerate(USERS):
        problem = make_problem(record_base(rest[user].h, rest[user].y, W), heads["cvh"], W)
        for i in range(3):
            assert torch.isclose(cross[i, j], evaluate(problem, thetas[i : i + 1], cfg).ce[0], atol=1e-5)
        assert torch.isclose(compare.by_user(heldout, heldout.ce0)[j], problem.ce0.double().mean(), atol=1e-5)


def test_kappa_is_the_kl_of_small_random_thetas_and_matched_heads_share_it(planted):
    W, heads, train, *_ = planted
    base = (seen := Recorded(train, W)).base
    matched, before = compare.matched_heads(heads, seen, 0.5, 1e-4)
    cfg, gen = FitConfig(), torch.Generator().manual_seed(1)
    thetas = torch.nn.functional.normalize(torch.randn(100, D, generator=gen), dim=1).double()
    with pytest.raises(ValueError, match="MATCHED_KL = 0.0: must be above 0"):
        compare.matched_heads(heads, seen, 0.5, 0.0)
    with pytest.raises(ValueError, match="head cvh moves nothing at ALPHA 1 and GAMMA 0"):
        compare.matched_heads(heads, seen, 0.0, 1e-4)
    for name, head in matched.items():
        problem = make_problem(base, head, W, dtype=torch.float64)
        kl = torch.cat([evaluate(problem, theta[None], cfg).kl for theta in thetas]).mean()
        assert abs(float(kl) / 1e-4 - 1) < 0.25, name
        assert before[name] == pytest.approx(compare.random_kl(make_problem(base, heads[name], W), 0.5))
    assert "lm_head_svd" not in compare.distinct_functions(matched) and len(matched) == 7


def test_tables_show_the_planted_users(found):
    heads, table = found.heads, found.summary
    assert (
        len(table) == 3 * len(heads) * 3
        and (table["gain"] - (table["ce_before"] - table["ce_after"])).abs().max() < 1e-9
    )
    assert table.filter((pl.col("head") == "unconditional") & (pl.col("solver") == "adam"))["gain"].min() > 0.03
    effort = report.adam_against_optimum(table)
    assert effort["adam_above_free"].min() >= 0 and effort["largest_gradient_ratio"].max() <= 1e-6
    diagonal = report.diagonal(found.cross)
    assert diagonal.filter(pl.col("head") == "unconditional").row(0) == ("matched", "unconditional", 3, 3, "")


def test_sweeps_and_figures(planted, found):
    W, _, train, _, cfg, _ = planted
    gamma = report.gamma_sweep(found, ["cvh"], [replace(cfg, gamma=g) for g in (0.0, 0.5, 2.0)])
    assert gamma["gain"][0] == pytest.approx(0, abs=1e-6) and gamma["kl"][0] == pytest.approx(0, abs=1e-7)
    mine = found.summary.filter((pl.col("solver") == "adam") & (pl.col("head") == "cvh"))
    assert gamma["kl"].is_sorted() and gamma["gain"][1] == pytest.approx(mine["gain"].mean())
    beta = report.beta_sweep(Recorded(train, W), found, ["cvh"], [replace(cfg, beta=b) for b in (0.0, 1.0)])
    assert beta["kl"][1] < beta["kl"][0]
    heads = list(found.heads)
    figures = [
        draw.fit_traces(found, heads),
        draw.heldout_gain(found.summary),
        draw.cross_heatmap(found.cross, ["cvh"], USERS),
        draw.cosine_heatmap({"cvh": found.stacked("cvh")}, USERS),
        draw.sweep_curves(gamma, "gamma", 0.5, heads),
        draw.sweep_curves(beta, "beta", 0.05, heads),
    ]
    assert all(axis.get_ylabel() or axis.get_xlabel() for figure in figures for axis in figure.axes)
    for figure in figures:
        check_looks(figure)
