"""Figures: what is drawn is what the table says; labels are there; files are whole and repeatable."""

import itertools

import matplotlib
import numpy as np
import polars as pl
from looks import check_looks
from matplotlib.figure import Figure

from ws.diff import figures as diff
from ws.explanation import figures as sweep
from ws.show.figures import described, save
from ws.steer.figures import alpha_curves


def summary() -> pl.DataFrame:
    rows = [
        ("write", "W:write", "write", "A-hypothesis", 2.0, 3.0),
        ("lm_head_read", "W:unembed", "read", "A-hypothesis", 0.5, 0.9),
        ("TaskDiff_contrast", "act:persona", "mixed", "A-hypothesis", 1.5, 1.1),
        ("churn", "act:clean", "mixed", "A-hypothesis", 1.5, float("nan")),
        ("dW_left_basis_ceiling", "ceiling", "ceiling", "ceiling", 4.0, 9.0),
    ]
    names = ["subspace", "family", "axis_kind", "kind", "mean_conc_act", "mean_conc_w_combined"]
    table = pl.DataFrame(rows, schema=names, orient="row")
    return table.with_columns(joint_score=(pl.col("mean_conc_act") * pl.col("mean_conc_w_combined")).sqrt())


def drawn(axis) -> set[tuple[float, float]]:
    return {tuple(np.round(p, 6)) for c in axis.collections for p in c.get_offsets()}


def test_scatter_puts_every_candidate_in_its_panel():
    figure = sweep.joint_scatter(summary(), "title")
    check_looks(figure)
    left, right = figure.axes
    assert drawn(left) == {(2.0, 3.0), (1.5, 1.1), (4.0, 9.0)}
    assert drawn(right) == {(0.5, 0.9), (4.0, 9.0)}
    assert left.get_xscale() == left.get_yscale() == "log"
    assert {t.get_text() for t in left.texts} == {"write", "TaskDiff_contrast", "dW_left_basis_ceiling"}
    assert "1 with an undefined score not drawn" in figure.get_suptitle()
    assert "R_act" in left.get_xlabel() and "R_w" in left.get_ylabel()


def test_labels_keep_their_distance():
    placed = sweep.spread_labels([1.0, 1.01, 1.02, 5.0], 0.0, 6.0, 0.5)
    assert np.diff(sorted(placed)).min() > 0.49 and abs(placed[3] - 5) < 1e-6


def test_saved_files_are_the_same_twice(tmp_path):
    paths = save(sweep.joint_scatter(summary()), tmp_path / "a" / "f") if (tmp_path / "a").mkdir() is None else []
    again = save(sweep.joint_scatter(summary()), tmp_path / "g")
    assert [p.name for p in paths] == ["f.png", "f.pdf", "f.svg"]
    assert b"/Type3" not in paths[1].read_bytes() and b"/FontFile2" in paths[1].read_bytes()  # which venues take
    assert b"<text" not in paths[2].read_bytes()  # outlines
    for a, b in zip(paths, again, strict=True):
        assert a.read_bytes() == b.read_bytes() and len(a.read_bytes()) > 5000


def test_alpha_curves_norm_map_spectra_and_layers():
    rows = [(s, a, a * 2.0, 0.5, 0.9, 12) for s in ("false", "true") for a in (-1.0, 0.0, 1.0)]
    columns = ["set", "alpha", "mean_logratio", "sd_logratio", "mean_pmass", "n"]
    figure = alpha_curves(pl.DataFrame(rows, schema=columns, orient="row"))
    check_looks(figure)
    apart = [c.lines[0].get_xdata() for c in figure.axes[0].containers]
    assert all((abs(a - b) > 0.01).all() for a, b in itertools.pairwise(apart))  # the same values, neither hidden
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0.9] * 3
    norms = pl.DataFrame(
        [(2, "q", 1.0), (3, "q", 2.0), (2, "o", 3.0)], schema=["layer", "module", "norm"], orient="row"
    )
    check_looks(diff.norm_map(norms))
    grid = np.asarray(diff.norm_map(norms).axes[0].images[0].get_array())
    assert grid[0].tolist() == [1.0, 2.0] and grid[1][0] == 3.0
    line = diff.spectra({"q": [np.array([2.0, 1.0]), np.array([4.0, 1.0])]}).axes[0].lines[0]
    assert line.get_ydata().tolist() == [1.0, 0.375]
    table = pl.DataFrame(
        [("write", "A-hypothesis", l, 1.0 + l, 2.0) for l in range(3)],
        schema=["subspace", "kind", "layer", "conc_act", "conc_w_combined"],
        orient="row",
    )
    figure = sweep.recovery_by_layer(table, ["write"], [1, 2])
    assert figure.axes[0].lines[0].get_ydata().tolist() == [1.0, 2.0, 3.0]
    check_looks(figure)


def test_a_figure_leaves_the_users_own_style_alone():
    before = dict(matplotlib.rcParams)
    figure = sweep.joint_scatter(summary())
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 20, "xtick.labelsize": 20}):  # drawn by a user with a style of their own
        check_looks(figure)


def test_a_figure_is_described_by_what_it_shows():
    text = described(sweep.joint_scatter(summary()))
    assert "weight recovery R_w" in text and "against activation recovery R_act" in text
    assert f"{summary()['mean_conc_w_combined'].max():.3g}" in text
    figure = Figure()
    left, right = figure.subplots(1, 2)
    left.plot([0, 1, 2], [3.0, float("nan"), 7.0], label="up")
    left.set(title="$Left$", xlabel="x", ylabel="y (nats)")
    right.bar([0, 1], [2.0, 2.0], label="bars")
    right.plot([0, 1], [9, 9])  # without a name: not told
    figure.set_label("What it is about.")
    assert described(figure) == "What it is about. Left: y (nats) against x (up 3 to 7). (bars 2)."
    other = Figure()
    axis = other.subplots()
    axis.fill_between([0, 1], [2, 3], [5, 6], label="band")
    axis.vlines([0, 1], 5, 9, label="lines")
    axis.axhline(4, label="level")  # spans the panel: its ends are no data
    axis.errorbar([0, 1], [1.0, 2.0], yerr=0.5, label="bars")
    axis.set(title=r"costs \$5 and $x^2$", ylabel="y")
    assert described(other) == "costs $5 and x^2: y (band 2 to 6; lines 5 to 9; bars 1 to 2)."
