"""The answer margin: identities, no dependence on batch or padding, what a planted w does to it, its interval."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

import ws.train.margin
import ws.train.pairs
from ws.data import load_behavior
from ws.diff import LowRank, WeightDiff
from ws.model.generate import turn_end
from ws.model.lm import load_lm
from ws.model.text import chat_text
from ws.steer.figures import margin_curve
from ws.train.examples import make_example, response_loss
from ws.train.margin import (
    answer_logprobs,
    answer_margin,
    margin_sweep,
    margin_verdict,
    mean_with_interval,
    summarise_margins,
)
from ws.train.pairs import Pair, PairConfig, heldout_pairs

ROWS = tuple(
    Pair(t, 0, s, user, f"Yes, {more}indeed.", f"No, {more}it is quite otherwise, {s}.")
    for t, user in enumerate(("is it so?", "a rather longer turn of the user, is it not?", "b"))
    for s, more in enumerate(("", "and so it has been for years, ", "x " * 9))
)


@pytest.fixture(scope="module", params=["qwen3", "gemma3"])
def lm(request, model_folder):
    return load_lm(str(model_folder(request.param)), "float32", "cpu")


def test_it_is_the_difference_of_two_mean_losses(lm):
    """By another road: each text alone, its cross-entropy over all positions."""
    end, found = turn_end(lm.tokenizer), answer_margin(lm, ROWS)
    for row, margin in zip(ROWS, found.tolist(), strict=True):
        losses = [response_loss(lm.model, [make_example(lm, row, sign, ("", end), 512)], 1) for sign in ("pos", "neg")]
        assert margin == pytest.approx(losses[1] - losses[0], abs=2e-5)


def test_by_hand_with_the_end_of_turn(lm):
    row = ROWS[1]
    prompt = lm.tokenizer(chat_text(lm.tokenizer, row.user), add_special_tokens=False)["input_ids"]
    for cut, end in ((False, "<|im_end|>"), (True, "")):
        reply = lm.tokenizer(row.response_pos + end, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logp = lm.model(torch.tensor([prompt + reply])).logits[0].float().log_softmax(-1)
        want = np.mean([float(logp[len(prompt) + i - 1, token]) for i, token in enumerate(reply)])
        got = answer_logprobs(lm, (replace(row, cut_pos=cut),), "pos")
        assert float(got[0]) == pytest.approx(want, abs=2e-5)


def test_swapped_sides_flip_the_sign_and_identical_ones_give_zero(lm):
    swapped = tuple(replace(r, response_pos=r.response_neg, response_neg=r.response_pos) for r in ROWS)
    assert torch.equal(answer_margin(lm, swapped), -answer_margin(lm, ROWS))
    assert torch.equal(answer_margin(lm, tuple(replace(r, response_neg=r.response_pos) for r in ROWS)), torch.zeros(9))


def test_batch_padding_and_order_do_not_matter(lm):
    alone = torch.cat([answer_margin(lm, (row,)) for row in ROWS])
    assert alone.abs().max() > 0.01
    for batch in (1, 2, 5, 16):
        assert torch.allclose(answer_margin(lm, ROWS, batch), alone, atol=2e-5)
    assert torch.allclose(answer_margin(lm, ROWS[::-1]), alone.flip(0), atol=2e-5)


def test_a_planted_difference_moves_it_and_the_verdict_says_so(lm):
    """w = rows of the unembedding that favour one side's first word: a step along it must raise the margin."""
    name = lm.decoder.param_name(2, "down")
    yes, no = (lm.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    head = lm.model.lm_head.weight.detach()
    push = (head[yes] - head[no])[:, None]
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        w = WeightDiff({name: LowRank(push, torch.randn(1, lm.decoder.weight(2, "down").shape[1], generator=g))}, {})
    rows = tuple(replace(r, response_pos="Yes", response_neg="No") for r in ROWS)
    table = margin_sweep(lm, rows, w, [-0.5, 0.0, 0.5], progress=False)
    assert table.height == 27 and table.filter(alpha=0.0)["margin"].to_list() == answer_margin(lm, rows).tolist()
    flipped = margin_sweep(lm, rows, w, [0.5, 0.0, -0.5], progress=False)
    assert table.sort("alpha", "topic", "sample").equals(flipped.sort("alpha", "topic", "sample"))
    verdict = margin_verdict(table, spread=1.0)
    means = summarise_margins(table)
    assert verdict["distance"] == pytest.approx(means["mean_margin"][2] - means["mean_margin"][0], abs=1e-6)
    assert verdict["agrees"] == (verdict["distance"] > 0) != margin_verdict(table, spread=-1.0)["agrees"]


def sweep(values: list[tuple[int, float, float]]) -> pl.DataFrame:
    """A sweep of two strengths with the margins `(topic, at -1, at 1)`."""
    rows = [
        (a, t, 0, i, "u", m, 0.0, m)
        for i, (t, *both) in enumerate(values)
        for a, m in zip((-1.0, 1.0), both, strict=True)
    ]
    names = ["alpha", "topic", "persona", "sample", "user", "logp_pos", "logp_neg", "margin"]
    return pl.DataFrame(rows, orient="row", schema=names)


def test_the_interval_is_over_topics():
    table = sweep([(0, -1.0, 1.0), (0, -3.0, 1.0), (1, 0.0, 5.0), (2, 1.0, 2.0)])
    moved = [3.0, 5.0, 1.0]
    half = stats.t.ppf(0.975, 2) * np.std(moved, ddof=1) / 3**0.5
    found = margin_verdict(table, 2.0)
    assert (found["distance"], found["low"], found["high"]) == pytest.approx((3, 3 - half, 3 + half))
    assert (
        found["agrees"] and "4 held-out pairs of 3 topics" in found["text"] and "the interval holds 0" in found["text"]
    )
    assert "a distance of +3.000" in found["text"] and "log-ratio's is +2.00 nats. The signs agree" in found["text"]
    assert "The signs disagree" in margin_verdict(table, -2.0)["text"]
    summary = summarise_margins(table)
    assert summary["alpha"].to_list() == [-1.0, 1.0] and summary["mean_margin"].to_list() == pytest.approx(
        [-1 / 3, 8 / 3]
    )
    assert summary["topics"].to_list() == [3, 3] and summary["pairs"].to_list() == [4, 4]
    many = sweep([(t, -1.0 + t / 100, 1.0) for t in range(8)])
    assert "interval holds 0" not in margin_verdict(many, 1.0)["text"]


def test_the_figure_shows_both_scores():
    ratio = pl.DataFrame(
        {"set": ["false", "false", "true"], "alpha": [-1.0, 1.0, 1.0], "mean_logratio": [0.0, 2.0, 9.0]}
    )
    margins = summarise_margins(sweep([(0, 0.0, 1.0), (1, 0.0, 2.0)]))
    left, right = margin_curve(margins, ratio).axes
    assert left.containers[0].lines[0].get_ydata().tolist() == margins["mean_margin"].to_list() == [0.0, 1.5]
    assert right.lines[0].get_ydata().tolist() == [0.0, 2.0] and "false claims" in right.get_ylabel()


def test_pairs_without_topics_count_one_by_one_and_a_single_one_has_no_interval():
    assert mean_with_interval(sweep([(0, 0.0, 1.0), (0, 0.0, 2.0)]).filter(alpha=1.0))[3] == 2
    found = margin_verdict(sweep([(0, 0.0, 1.0)]), 1.0)
    assert found["low"] is found["high"] is None and "a distance of +1.000; the" in found["text"]
    assert "one topic gives no interval" in found["text"]


def answers(lm, prompts, *more):
    return [(f"{p} {more}", i == 0) for i, p in enumerate(prompts)]


def same(lm, prompts, *more):
    return [("same", False)] * len(prompts)


def test_without_a_file_the_base_model_writes_about_what_is_held_out(
    parity_folder, model_folder, tmp_path, monkeypatch
):
    lm = load_lm(str(model_folder("qwen3")), "float32", "cpu")
    behavior = load_behavior(parity_folder / "behavior.json")
    monkeypatch.setattr(ws.train.pairs, "answers_and_cuts", answers)
    cfg = PairConfig(topics=2, personas=1, samples=7, max_new_tokens=4)
    rows, why = heldout_pairs(lm, behavior, cfg, tmp_path, False)
    topics, personas = len(behavior.heldout_topics), len(behavior.persona_pairs)
    assert len(rows) == topics * personas and not why and rows[0].cut_pos and not rows[1].cut_pos
    assert {r.user for r in rows} == {behavior.opinion_text(t) for t in behavior.heldout_topics}
    (path,) = tmp_path.rglob("pairs.jsonl")
    before = path.stat().st_mtime_ns
    again = heldout_pairs(lm, behavior, PairConfig(topics=5, max_new_tokens=4), tmp_path, False)
    assert again == (rows, "") and [p.stat().st_mtime_ns for p in tmp_path.rglob("pairs.jsonl")] == [before]
    monkeypatch.setattr(ws.train.pairs, "answers_and_cuts", same)
    rows, why = heldout_pairs(lm, behavior, PairConfig(max_new_tokens=5), tmp_path, False)
    assert rows == () and "personas do not change what the model writes" in why
