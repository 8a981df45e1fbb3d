"""The wording grid's statistics: planted shares are found, over halves and not over seeds."""

import numpy as np
import polars as pl
import pytest

from bench.wording import CELLS, KINDS, SCORES, figure_of, sentence, table_of

WORDING, TOPICS, NULL = 0.6, 0.9, 2.0  # what other wordings and other topics leave; the null


def planted(spread: float = 0.0, kept: float = 0.4) -> pl.DataFrame:
    """Two draws, both halves, three seeds whose scores differ by a factor that a mean of logs takes out."""
    rows, g = [], np.random.default_rng(0)
    for half, side in ((0, 0), (0, 1), (1, 0), (1, 1)):
        own = np.exp(spread * g.standard_normal())
        for seed, factor in enumerate((0.5, 1.0, 2.0)):
            for topics, words in CELLS:
                left = (TOPICS if topics == "other" else 1) * (WORDING * own if words == "other" else 1)
                for kind in ("gradient", "activations", *(f"null {i}" for i in range(4))):
                    R = NULL if kind.startswith("null") else 8 * left
                    known = kept * left if not kind.startswith("null") else 0.1 if kind == "null 0" else float("nan")
                    rows.append((half, side, seed, topics, words, kind, factor * R, factor * R, known, 3.0))
    names = ["half", "side", "seed", "topics", "words", "kind", "R_w", "R_act", "retention", "effect_w_res"]
    return pl.DataFrame(rows, names, orient="row")


def value(found: pl.DataFrame, what: str, kind: str, score: str) -> dict:
    return found.filter(what=what, kind=kind, score=score).row(0, named=True)


def test_planted_shares_are_found():
    found = table_of(planted())
    assert set(found["halves"]) == {4}
    for kind in KINDS[:2]:
        for score in SCORES:
            assert value(found, "share due to wording", kind, score)["value"] == pytest.approx(1 - WORDING)
            assert value(found, "share due to topics", kind, score)["value"] == pytest.approx(1 - TOPICS)
        assert value(found, "beside the null", kind, "R_w")["value"] == pytest.approx(8 * WORDING * TOPICS / NULL)
        kept = 0.4 * WORDING * TOPICS
        assert value(found, "beside the null", kind, "retention")["value"] == pytest.approx(kept - 0.1)
    assert value(found, "other topics, same wordings", "gradient", "R_act")["value"] == pytest.approx(8 * TOPICS)
    assert value(found, "share due to wording", "null", "R_w")["value"] == pytest.approx(0, abs=1e-12)


def test_intervals_are_over_halves_in_logs():
    row = value(table_of(planted(spread=0.2)), "share due to wording", "gradient", "R_w")
    logs = np.log(WORDING) + 0.2 * np.random.default_rng(0).standard_normal(4)
    half = 3.182446 * logs.std(ddof=1) / 2  # t of 3 degrees of freedom
    assert row["value"] == pytest.approx(1 - np.exp(logs.mean()))
    assert (row["low"], row["high"]) == pytest.approx((1 - np.exp(logs.mean() + half), 1 - np.exp(logs.mean() - half)))


def test_a_share_of_a_retention_that_is_not_positive_is_undefined():
    table = planted(kept=-0.1)
    found = table_of(table)
    assert np.isnan(value(found, "share due to wording", "gradient", "retention")["value"])
    assert value(found, "share due to wording", "gradient", "R_w")["value"] == pytest.approx(1 - WORDING)
    said = sentence(found, table, "planted")
    assert (
        "12 trainings, 4 halves" in said and "undefined of retention" in said and "40 % (40 % to 40 %) of R_w" in said
    )


def test_the_figure_is_legible():
    figure = figure_of(table_of(planted(spread=0.2)), "planted")
    figure.canvas.draw()
    for axis in figure.axes:
        boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
        assert len(boxes) == 4 and all(label.get_fontsize() >= 9 for label in axis.get_xticklabels())
        assert all(one.x1 < two.x0 for one, two in zip(boxes, boxes[1:], strict=False))
        assert len(axis.containers) == len(KINDS)
