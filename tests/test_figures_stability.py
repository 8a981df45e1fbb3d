"""Figures of the stability report draw what the tables hold, at 60 candidates as at 3."""

import numpy as np
import polars as pl
import pytest
import torch
from looks import check_looks
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ws.stability.figures import bump_chart, forest_plot, lines_of, oracle_overlap_figure
from ws.stability.overlap import compare_parts
from ws.stability.scores import make_scores, per_seed_table, summary_table
from ws.subspaces.algebra import random_basis


def tables(C, S=3, undefined=True):
    generator = np.random.default_rng(0)
    real = np.exp(0.8 * generator.standard_normal((1, C, 1)))
    act = real[..., None] * np.exp(0.15 * generator.standard_normal((S, C, 3, 6)))
    w = real * np.exp(0.15 * generator.standard_normal((S, C, 3)))
    if undefined:
        w[:, -1] = np.nan
    kinds = ["A-hypothesis"] * (C - 1) + ["ceiling"]
    axis = [("write", "mixed", "read")[c % 3] for c in range(C - 1)] + ["ceiling"]
    names = [f"candidate_with_a_long_name_{c}" for c in range(C)]
    scores = make_scores(
        names,
        range(S),
        act,
        w,
        np.full((C, 3), 8.0),
        64,
        kinds=kinds,
        axis_kinds=axis,
        null_act=np.ones((2, C)),
        null_w=np.ones((2, C)),
    )
    return per_seed_table(scores), summary_table(scores, seed=0, boot=300)


def label_boxes(figure, names):
    """Pixel boxes of the drawn texts that are candidate names."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [t for axes in figure.axes for t in [*axes.texts, *axes.get_yticklabels()]]
    return [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in texts if t.get_text() in names]


@pytest.mark.parametrize("C", [3, 60])
def test_names_do_not_overlap_and_stay_inside(C):
    per_seed, summary = tables(C)
    for figure, least in (
        (forest_plot(summary, per_seed, winner=summary["candidate"][0]), C - 1),
        (bump_chart(per_seed, summary), 2 * min(C - 1, 10)),
    ):
        check_looks(figure)
        boxes = label_boxes(figure, set(summary["candidate"]))
        assert len(boxes) >= least
        width = figure.canvas.get_width_height()[0]
        left = sorted((b for _, b in boxes if b.x0 == pytest.approx(boxes[0][1].x0, abs=width / 3)), key=lambda b: b.y0)
        assert all(upper.y0 - lower.y1 > -2.5 for lower, upper in zip(left[:-1], left[1:], strict=True))


def test_forest_plot_marks_chance_and_undefined():
    per_seed, summary = tables(5)
    figure = forest_plot(summary, per_seed)
    assert "no winner" in figure.get_suptitle()
    texts = [t.get_text() for axes in figure.axes for t in axes.texts]
    assert [text for text in texts if text] == ["undefined"]  # the ceiling has no R_w
    assert all(any((np.asarray(line.get_xdata()) == 1).all() for line in axes.lines) for axes in figure.axes)


def test_bump_chart_draws_each_rank_as_it_is():
    per_seed, summary = tables(6, undefined=False)
    axes = bump_chart(per_seed, summary).axes[0]
    drawn = sorted(tuple(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "-")
    want = per_seed.filter(per_seed["rank_in_seed"].is_not_null()).sort("seed")
    assert drawn == sorted(tuple(p["rank_in_seed"]) for _, p in want.group_by("candidate", maintain_order=True))
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # rank 1 at the top


def test_families_stand_together_and_both_forms_of_a_candidate_on_one_line():
    per_seed, summary = tables(8, undefined=False)
    names = summary["candidate"].to_list()
    a, b, c, d = [name for name in names if not name.endswith("_7")][:4]
    twins, families = {c: a, d: "absent"}, {a: "one", b: "two", c: "three", d: "one"}
    assert lines_of([a, b, c, d], families, twins) == {"one": [[a, c], [d]], "two": [[b]]}
    assert lines_of([c, b, a], families, twins) == {"three": [[a, c]], "two": [[b]]}  # where the better form is
    figure = forest_plot(summary, per_seed, families=families, twins=twins)
    check_looks(figure)
    left, right = figure.axes
    shown = [t.get_text().removesuffix(" ○") for t in left.get_yticklabels()]
    assert len(shown) == 7 and c not in shown and shown.index(d) == shown.index(a) + 1
    assert [t.get_text() for t in right.texts if t.get_text()] == ["one", "two"]
    hollow = [line for line in left.lines if line.get_markerfacecolor() == "white" and line.get_marker() in "o*"]
    mean = summary.filter(pl.col("candidate") == c)["R_act_geomean"].item()
    assert [line.get_xdata()[0] for line in hollow if len(line.get_xdata())] == [pytest.approx(mean)]
    assert "first 2 of 7 lines" in forest_plot(summary, per_seed, most=2, twins=twins).get_suptitle()
    chart = bump_chart(per_seed, summary, twins=twins).axes[0]
    curves = [line.get_ydata() for line in chart.lines if line.get_linestyle() == "-"]
    ranks = {n: per_seed.filter(pl.col("candidate") == n)["rank_in_seed"].to_numpy() for n in names}
    ahead = ranks[c] < ranks[a]  # on these seeds the older form speaks for both
    marks = [line for line in chart.lines if line.get_markerfacecolor() == "white"]
    assert len(curves) == 6 and sum(len(line.get_xdata()) for line in marks) == ahead.sum()
    assert np.array(curves).sum(axis=0) == pytest.approx(np.full(3, 21))  # ranks 1 to 6 of lines on every seed


def test_oracle_figure_has_a_panel_per_oracle_and_the_chance_line():
    g = torch.Generator().manual_seed(0)
    parts = {str(k): [random_basis(64, 8, g) for _ in range(4)] for k in range(3)}
    table = compare_parts("B", "activation oracle", "seeds", parts, [2, 3, 4, 5])
    table = table.vstack(compare_parts("B", "weight oracle", "seeds", parts, [2, 3, 4, 5]))
    figure = oracle_overlap_figure(table)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["activation oracle", "weight oracle"]
    check_looks(figure)
    for axes in figure.axes:
        assert any(np.allclose(line.get_ydata(), 8 / 64) for line in axes.lines)
