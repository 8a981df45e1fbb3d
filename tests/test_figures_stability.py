"""Figures of the stability report draw what the tables hold, at 60 candidates as at 3."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ws.stability.figures import bump_chart, forest_plot, oracle_overlap_figure
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
    for figure in (forest_plot(summary, per_seed, winner=summary["candidate"][0]), bump_chart(per_seed, summary)):
        boxes = label_boxes(figure, set(summary["candidate"]))
        assert len(boxes) >= C - 1
        width, height = figure.canvas.get_width_height()
        for _, box in boxes:
            assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1
        left = sorted((b for _, b in boxes if b.x0 == pytest.approx(boxes[0][1].x0, abs=width / 3)), key=lambda b: b.y0)
        assert all(upper.y0 - lower.y1 > -2.5 for lower, upper in zip(left[:-1], left[1:], strict=True))


def test_forest_plot_marks_chance_and_undefined():
    per_seed, summary = tables(5)
    figure = forest_plot(summary, per_seed)
    assert "no winner" in figure.get_suptitle()
    texts = [t.get_text() for axes in figure.axes for t in axes.texts]
    assert texts == ["undefined"]  # the ceiling has no R_w
    assert all(any((np.asarray(line.get_xdata()) == 1).all() for line in axes.lines) for axes in figure.axes)


def test_bump_chart_draws_each_rank_as_it_is():
    per_seed, summary = tables(6, undefined=False)
    axes = bump_chart(per_seed, summary).axes[0]
    drawn = sorted(tuple(line.get_ydata()) for line in axes.lines)
    want = per_seed.filter(per_seed["rank_in_seed"].is_not_null()).sort("seed")
    assert drawn == sorted(tuple(p["rank_in_seed"]) for _, p in want.group_by("candidate", maintain_order=True))
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # rank 1 at the top


def test_oracle_figure_has_a_panel_per_oracle_and_the_chance_line():
    g = torch.Generator().manual_seed(0)
    parts = {str(k): [random_basis(64, 8, g) for _ in range(4)] for k in range(3)}
    table = compare_parts("B", "activation oracle", "seeds", parts, [2, 3, 4, 5])
    table = table.vstack(compare_parts("B", "weight oracle", "seeds", parts, [2, 3, 4, 5]))
    figure = oracle_overlap_figure(table)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["activation oracle", "weight oracle"]
    for axes in figure.axes:
        assert any(np.allclose(line.get_ydata(), 8 / 64) for line in axes.lines)
