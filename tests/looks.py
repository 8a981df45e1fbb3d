"""What every figure has to be: as wide as a page or a column, its words large enough, inside the figure, and apart."""

from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ws.show.figures import COLUMN, TEXT, TYPE

SLACK = 1.5  # pixels of 100 an inch that rounding may move a box by


def check_looks(figure: Figure, wide: bool = False) -> None:
    """wide: may be wider than a page."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    assert wide or COLUMN <= figure.get_figwidth() <= TEXT, figure.get_figwidth()
    ticks = {}
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            near = 1e-9 * (high - low)
            shown = [t.label1 for t in axis.get_major_ticks() if low - near <= t.get_loc() <= high + near]
            ticks[ax.get_title(), axis.axis_name, id(ax)] = [
                t for t in shown if t.get_visible() and t.get_text().strip()
            ]
    legends = [*figure.legends, *filter(None, (ax.get_legend() for ax in figure.axes))]
    other = [*figure.texts, *(t for legend in legends for t in [*legend.get_texts(), legend.get_title()])]
    other = [t for t in other if t.get_text().strip() and t.get_visible()]
    words = [t for ts in ticks.values() for t in ts] + other
    for ax in figure.axes:
        words += [
            t for t in (*ax.texts, ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label) if t.get_text().strip()
        ]
    assert words
    for text in words:
        assert text.get_fontsize() >= TYPE, (text.get_text(), text.get_fontsize())
        box = text.get_window_extent(canvas.get_renderer())
        inside = -SLACK <= box.x0 and box.x1 <= width + SLACK and -SLACK <= box.y0 and box.y1 <= height + SLACK
        assert inside, (text.get_text(), box, width, height)
    for where, labels in ticks.items():
        boxes = [
            (t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in labels if not t.get_rotation() % 90
        ]
        for (a, first), (b, second) in combinations(boxes, 2):
            assert not first.padded(-SLACK).overlaps(second.padded(-SLACK)), (where, a, b)
