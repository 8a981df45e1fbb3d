"""Calibration: the quantile of KL per token by another road, both signs, refusals, the continuation, jumps; neutral texts."""

import json

import numpy as np
import pytest
import torch

import ws
from ws.cache.places import ASSETS
from ws.diff import LowRank
from ws.model.generate import complete
from ws.model.greedy import greedy_ids
from ws.model.text import chat_text
from ws.steer.calibrate import calibrate, met, opening_texts, probe_rows
from ws.steer.kl import Unreached, as_steering, matched_alpha, token_kls, token_rows
from ws.steer.neutral import neutral, passage_rows, request
from ws.steer.stream import pushed

Q = 0.9


@pytest.fixture(scope="module")
def lm():
    return ws.load_lm("tiny")


@pytest.fixture(scope="module")
def texts(lm):
    b = ws.load_behavior("sycophancy")
    return [chat_text(lm.tokenizer, b.probe_text(t.claim)) for t in b.heldout_topics[:3]]


@pytest.fixture(scope="module")
def planted(lm):
    """One rank-one matrix."""
    g, name = torch.Generator().manual_seed(0), lm.decoder.param_name(4, "down")
    out, width = lm.decoder.weight(4, "down").shape
    return ws.WeightDiff({name: LowRank(torch.randn(out, 1, generator=g) / 8, torch.randn(1, width, generator=g) / 8)})


def by_hand(lm, w, alpha, rows, first=None):
    """KL at every position, text by text, in float64, from weights that are added to."""
    parameters = {name: lm.model.get_parameter(name) for name in w}

    def logp(row):
        with torch.no_grad():
            return lm.model(torch.tensor([row])).logits[0].double().log_softmax(-1)

    base = [logp(row) for row in rows]
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.add_(alpha * w[name])
    now = [logp(row) for row in rows]
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(before[name])
    starts = first or [0] * len(rows)
    return torch.cat([(a.exp() * (a - b)).sum(-1)[i:] for a, b, i in zip(now, base, starts, strict=True)])


def test_kl_of_every_position_is_that_of_the_textbook(lm, texts, planted):
    rows = token_rows(lm, texts)
    want = by_hand(lm, planted, 1.5, rows)
    kept, again = (token_kls(lm, rows, budget=b)(as_steering(lm, planted), 1.5) for b in (1 << 30, 0))
    assert torch.equal(kept, again) and len(kept) == sum(map(len, rows))
    assert np.allclose(sorted(kept.tolist()), sorted(want.tolist()), rtol=1e-3, atol=1e-6)
    some = token_kls(lm, rows, [len(row) - 2 for row in rows])(as_steering(lm, planted), 1.5)
    assert len(some) == 2 * len(rows)
    half = ws.load_lm("tiny", dtype="bfloat16")
    wide = token_kls(half, rows)(as_steering(half, planted), 1.5)
    assert torch.quantile(wide, Q) == pytest.approx(float(torch.quantile(kept, Q)), rel=0.1)  # of rounded weights


@pytest.mark.parametrize("target", [0.02, 0.3, 2.0])
def test_the_target_is_met_by_the_sign_that_is_moved_more(lm, texts, planted, target):
    bits = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    found, rows = calibrate(lm, planted, target, texts=texts, q=Q), token_rows(lm, texts)
    assert found.kl == max(found.plus, found.minus) == pytest.approx(target, rel=0.02) and found.alpha > 0
    for value, sign in ((found.plus, 1), (found.minus, -1)):
        want = np.quantile(by_hand(lm, planted, sign * found.alpha, rows).numpy(), Q)
        assert value == pytest.approx(want, rel=2e-3)

    def larger(alpha):
        return max(np.quantile(by_hand(lm, planted, s * alpha, rows).numpy(), Q) for s in (1, -1))

    grid = found.alpha * np.array([0.9, 0.95, 1.05, 1.1])
    assert [larger(a) > target for a in grid] == [False, False, True, True]
    assert found.curve["alpha"].is_sorted() and found.alpha in found.curve["alpha"]
    assert found.curve["positions_plus"].to_list() == [sum(map(len, rows))] * len(found.curve)
    assert f"alpha {found.alpha:.4g}" in found.text() and "fixed texts" in found.text()
    assert all(torch.equal(p, bits[n]) for n, p in lm.model.named_parameters())


def test_kl_grows_as_the_square_of_alpha(lm, texts, planted):
    small, large = (calibrate(lm, planted, t, texts=texts, within=0.002).alpha for t in (1e-4, 4e-4))
    assert large / small == pytest.approx(2, rel=0.02)


def test_one_sign_and_what_the_other_has(lm, texts, planted):
    plus, minus, both = (calibrate(lm, planted, 0.5, texts=texts, sign=s, within=0.005) for s in ("+", "-", "both"))
    assert plus.plus == pytest.approx(0.5, rel=0.005) and minus.minus == pytest.approx(0.5, rel=0.005)
    assert both.alpha == pytest.approx(min(plus.alpha, minus.alpha), rel=0.01)
    assert plus.minus > 0 and minus.plus > 0 and not np.isnan(plus.curve.filter(alpha=plus.alpha)["minus"][0])


def test_what_cannot_be_met_is_refused_with_the_curve(lm, texts, planted):
    with pytest.raises(Unreached, match=r"a KL of 0.5 nats is not reached; alpha: KL is 1: 0, 4: 0, 16: 0"):
        calibrate(lm, ws.WeightDiff({}), 0.5, texts=texts)
    with pytest.raises(Unreached, match="not reached") as error:
        matched_alpha(lambda a: a**2 / (1 + a**2), 2.0)
    assert len(error.value.curve) > 5 and np.isnan(error.value.bracket).all()
    bad = ws.WeightDiff({"model.layers.99.mlp.down_proj.weight": torch.ones(2, 2)})
    for w, target, more, told in (
        (planted, 0.0, {}, "must be above 0"),
        (planted, 0.1, {"along": "text"}, "along 'text' is unknown; one of texts, continuation"),
        (planted, 0.1, {"sign": "x"}, "sign 'x' is unknown"),
        (planted, 0.1, {"q": 1.0}, "q = 1.0: a quantile lies between 0 and 1"),
        (planted, 0.1, {"texts": []}, "no text"),
        (bad, 0.1, {}, "no such parameter"),
    ):
        with pytest.raises(ValueError, match=told):
            calibrate(lm, w, target, **{"texts": texts} | more)
    with ws.weight_steer(lm.model, planted, 1.0), pytest.raises(ValueError, match="is being steered"):
        calibrate(lm, planted, 0.1, texts=texts)


def test_a_jump_over_the_target_is_told_or_got_round():
    with pytest.raises(
        Unreached, match=r"jumped over between alpha 0.699\d* and 0.7\d*; alpha: KL is .*another target"
    ) as error:
        matched_alpha(lambda a: 0.2 if a < 0.7 else 5.0, 1.0)
    low, high = error.value.bracket
    assert low < 0.7 <= high and high / low < 1.001
    beyond = lambda a: a / 2 if a < 2 else 3.0 if 2.5 < a < 3.5 else 8.0  # noqa: E731
    with pytest.raises(Unreached, match="jumped over between alpha 2 and 2.00"):
        matched_alpha(beyond, 3.0)
    alpha, kl = matched_alpha(beyond, 3.0, scan=12)
    assert kl == 3.0 and 2.5 < alpha < 3.5
    with pytest.raises(Unreached, match="not reached"):
        matched_alpha(lambda a: 0.1 if a < 3 else np.nan, 1.0)


def test_the_continuation_is_what_the_steered_model_says(lm):
    w, b, n = ws.load_diff("tiny"), ws.load_behavior("sycophancy"), 12
    prompts = opening_texts(lm, b, 3)
    assert len(prompts) == 6 and request(neutral().passages[0][0]) in prompts[3]
    found = calibrate(lm, w, 0.5, texts=prompts, along="continuation", tokens=n, within=0.05)
    assert found.kl == pytest.approx(0.5, rel=0.05)
    want = {}
    for sign in (1, -1):
        rows, first = [], []
        for prompt in token_rows(lm, prompts):
            row = list(prompt)
            with ws.weight_steer(lm.model, w, sign * found.alpha), torch.no_grad():
                for _ in range(n):  # one at a time, without keys and values kept
                    row.append(int(lm.model(torch.tensor([row])).logits[0, -1].argmax()))
                    if lm.tokenizer.decode([row[-1]]) == "<|im_end|>":
                        break
            rows.append(row[:-1])
            first.append(len(prompt) - 1)
        want[sign] = np.quantile(by_hand(lm, w, sign * found.alpha, rows, first).numpy(), 0.95)
    assert found.plus == pytest.approx(want[1], rel=5e-3) and found.minus == pytest.approx(want[-1], rel=5e-3)
    assert found.curve["positions_plus"].max() <= 6 * n and "its own greedy text" in found.text()


def test_greedy_ids_are_those_of_the_answers(lm, texts):
    said = greedy_ids(lm, token_rows(lm, texts), 16)
    assert [lm.tokenizer.decode(row, skip_special_tokens=True).strip() for row in said] == complete(lm, texts, 16)
    assert all(lm.tokenizer.decode(row[-1:]) == "<|im_end|>" for row in said)
    with pytest.raises(ValueError, match="no prompt"):
        greedy_ids(lm, [[1], []], 4)


def test_any_steering_can_be_calibrated(lm, texts):
    v, hooks = (
        torch.randn(lm.decoder.d, generator=torch.Generator().manual_seed(1)),
        lm.decoder.blocks[5]._forward_hooks,
    )
    found = calibrate(lm, lambda alpha: pushed(lm, 5, v, alpha), 0.2, texts=texts)
    assert found.kl == pytest.approx(0.2, rel=0.02) and not hooks
    ids = torch.tensor(token_rows(lm, texts)[:1])
    seen = []
    watch = lm.decoder.blocks[6].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    with torch.no_grad():
        lm.model(ids)
        with pushed(lm, 5, v, 0.7):
            lm.model(ids)
    watch.remove()
    assert torch.allclose(seen[1] - seen[0], (0.7 * v).expand_as(seen[0]), atol=1e-4)
    with pytest.raises(ValueError, match="layer 8: tiny has layers 0 to 7"), pushed(lm, 8, v, 1.0):
        pass
    with pytest.raises(ValueError, match="layer 5 is not finite"), pushed(lm, 5, v / 0, 1.0):
        pass
    kls = token_kls(lm, token_rows(lm, texts))
    assert met(kls, lambda alpha: pushed(lm, 5, v, alpha), 0.2).alpha == found.alpha


def words(text):
    return "".join(c.lower() if c.isalnum() else " " for c in text).split()


def runs(text, n=8):
    each = words(text)
    return {tuple(each[i : i + n]) for i in range(len(each) - n + 1)}


def test_neutral_texts_stand_in_no_training_text(lm):
    found, b = neutral(), ws.load_behavior("sycophancy")
    assert len(found.passages) == len(dict(found.passages)) == 24 and len(found.facts) == len(dict(found.facts)) == 48
    assert sum(yes for _, yes in found.facts) == 24 and all(q.endswith("?") for q, _ in found.facts)
    assert all(45 <= len(words(text)) <= 80 for _, text in found.passages)
    mine = set().union(*(runs(text) for _, text in found.passages))
    pairs = [json.loads(line) for line in (ASSETS / "sycophancy_pairs.jsonl").read_text("utf-8").splitlines()]
    trained = [" ".join(map(str, row.values())) for row in pairs]
    trained += [row["text"] for row in json.loads((ASSETS / "calibration.json").read_text("utf-8"))]
    trained += (ASSETS / "users.jsonl").read_text("utf-8").splitlines()
    claims = [t.claim for t in b.topics] + [*b.claims, *b.negations, *b.true_claims, *b.train_true_claims]
    assert not mine & set().union(*map(runs, [*trained, *claims]))
    asked = {" ".join(words(q)) for q, _ in found.facts}
    assert not asked & {" ".join(words(f"is it true that {c}")) for c in claims}
    rows, starts = passage_rows(lm, 2, "Be brief.")
    for (about, text), row, start in zip(found.passages, rows, starts, strict=False):
        assert lm.tokenizer.decode(row[start:]) == text
        assert lm.tokenizer.decode(row[:start]) == chat_text(lm.tokenizer, request(about), "Be brief.")
    assert len(probe_rows(lm, b)) == 48 and len(probe_rows(lm, b, 3, 2)) == 6
