"""The benchmark: its numbers on answers that are made up, what each method does, what is asked, a small one from end to end."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from looks import check_looks

import ws
import ws.use.outcome
from ws.causal.variants import writers
from ws.steer.answers import answer_scores, answer_tokens
from ws.steer.kl import as_steering
from ws.use.benchmark import benchmark
from ws.use.items import Group, Size, groups
from ws.use.methods import Method, as_trained, evenly, methods, persona_vectors
from ws.use.outcome import Task, aligned, end, measured, repeated
from ws.use.surgery import costs, moved, movers, scores

SMALL = Size(4, 2, 8, 4, 4, 1, 1, 4, 1, 1, 1)


@pytest.fixture(scope="module")
def lm():
    return ws.load_lm("tiny")


@pytest.fixture(scope="module")
def behavior():
    return ws.load_behavior("sycophancy")


def statements_file(folder: Path, name="other") -> Path:
    answers = (" No", " Yes")
    rows = [
        {
            "question": f"Would you say this? {i} is {('odd', 'even')[i % 2]}",
            "answer_matching_behavior": answers[i % 2],
            "answer_not_matching_behavior": answers[1 - i % 2],
        }
        for i in range(40)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


def record(plus, minus, pmass=(1.0, 1.0)):
    ends = [{"ratio": {"g": x}, "pmass": {"g": [[p] * len(x[0])]}} for x, p in zip((plus, minus), pmass, strict=True)]
    return {"ends": ends}


def group(plus, minus, behavior):
    return Group("g", "own", ((("?",) * len(plus)),), tuple(plus), tuple(minus), behavior)


def test_surgery_on_answers_that_are_made_up(behavior):
    """Four false claims and two true ones under two wordings: fixed, broken, controls and the wrong way are counted by hand."""
    g = group([1] * 6, [-1] * 4 + [1] * 2, behavior)
    before = record([[-1.0, -1, 2, 2, 1, 1]] * 2, [[-1.0, -1, 2, 2, 1, 1]] * 2)
    after = record(
        [[1.0, -1, 3, -1, 2, 1], [1.0, -2, 3, 1, 2, -1]], [[-2.0, 1, -1, 2, 1, 1], [-2.0, -1, -1, 3, -3, 1]], (0.9, 0.5)
    )
    found = scores(g, after, before)
    assert found["n"] == 4 and found["n_control"] == 2 and movers(g).tolist() == [True] * 4 + [False] * 2
    # +: of 12 answers claim 0 is fixed twice, claim 3 broken once, control 5 broken once
    assert found["fixed_plus"] == pytest.approx(2 / 12) and found["broken_plus"] == pytest.approx(2 / 12)
    assert found["surgical_plus"] == pytest.approx((2 - 2 * 2) / 12 * 0.81)
    # -: claim 2 is fixed twice (was yes, is no), claim 1 broken once, control 4 broken once
    assert found["fixed_minus"] == pytest.approx(2 / 12) and found["broken_minus"] == pytest.approx(2 / 12)
    assert found["surgical_minus"] == pytest.approx((2 - 2 * 2) / 12 * 0.25)
    assert found["surgical"] == pytest.approx((found["surgical_plus"] + found["surgical_minus"]) / 2)
    assert found["surgical_most"] == pytest.approx((4 + 4) / 24)  # claims 0 and 1 at +, 2 and 3 at -
    assert found["before_plus"] == pytest.approx(8 / 12) and found["before_minus"] == pytest.approx(8 / 12)
    each = np.array([3.0, -1.5, 4.0, -2.5])
    assert np.allclose(moved(g, after)[:4], each) and found["effect"] == pytest.approx(each.mean())
    half = 3.182446 * each.std(ddof=1) / 2
    assert found["effect_high"] - found["effect"] == pytest.approx(half, rel=1e-5)
    assert found["effect_yes"] == found["effect"] and np.isnan(found["effect_no"])
    assert found["control"] == pytest.approx(np.mean([3.0, -1.0]))  # (2 - 1 + 2 + 3) / 2, (0 - 2) / 2
    assert found["wrong_way"] == pytest.approx(4 / 8)  # claims 1 and 3, under both wordings
    same = scores(g, before, before)
    assert all(same[k] == 0 for k in ("effect", "surgical", "wrong_way", "control", "fixed_plus", "broken_minus"))


def test_halves_count_alike_and_a_bias_is_no_effect(behavior):
    g = group([1, 1, 1, -1], [-1, -1, -1, 1], behavior)
    zero = record([[0.5] * 4], [[0.5] * 4])
    bias = scores(g, record([[2.5] * 4], [[-1.5] * 4]), zero)
    assert bias["effect_yes"] == 4 and bias["effect_no"] == -4 and bias["effect"] == 0 and bias["wrong_way"] == 0.25
    real = scores(g, record([[2.0, 2, 2, -2]], [[-2.0, -2, -2, 2]]), zero)
    assert real["effect"] == real["effect_yes"] == real["effect_no"] == 4 and real["surgical"] == pytest.approx(0.5)
    assert real["surgical"] == pytest.approx(real["surgical_most"])  # all that was wrong is mended, nothing is broken
    calm = scores(
        group([1] * 6, [-1] * 3 + [1] * 3, behavior),
        record([[1.0] * 6], [[-1.0] * 3 + [1.0] * 3]),
        record([[1.0] * 6], [[1.0] * 6]),
    )
    assert calm["surgical"] == calm["surgical_low"] == calm["surgical_high"] == 0.25  # each kind of item does the same
    off = scores(g, record([[2.0, 2, 2, -2]], [[-2.0, -2, -2, 2]], (0.5, 0.5)), zero)
    assert off["surgical"] == pytest.approx(0.5 * 0.25)


def test_costs_are_those_of_the_worse_end():
    one = {"nll": [[6.0, 4], [4.0, 6]], "repeats": [0.0, 0.5], "kl": 0.1, "said_kl": 0.4}
    two = {"nll": [[10.0, 4], [10.0, 6]], "repeats": [0.0, 0.0], "kl": 0.3, "said_kl": 0.2}
    found = costs({"ends": [one, two]}, {"ends": [one]})
    assert found == pytest.approx({"perplexity": np.exp(2 - 1), "repeats": 0.25, "kl": 0.3, "said_kl": 0.4})
    assert repeated([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4) and repeated([1, 2]) == 0.0
    assert repeated([5] * 12) == pytest.approx(0.9)
    rows, first, (others, theirs) = aligned([[1, 2, 3], [4, 5]], [[9, 8, 2, 3], [4, 5]])
    assert first == [1, 0] and theirs == [2, 0] and (rows, others) == ([[1, 2, 3], [4, 5]], [[9, 8, 2, 3], [4, 5]])


def test_what_is_asked_and_which_answer_is_wanted(behavior, tmp_path):
    truth = tmp_path / "towns.csv"
    truth.write_text("statement,label\n" + "".join(f"The town {i} is in Spain.,{i % 2}\n" for i in range(20)), "utf-8")
    own, other, towns, facts = groups(behavior, SMALL, [statements_file(tmp_path)], [truth])
    assert (own.role, other.role, towns.role, facts.role) == ("own", "other", "truth", "fact")
    assert own.plus == (1,) * 8 and own.minus == (-1,) * 4 + (1,) * 4 and len(own.turns) == 2
    assert own.turns[1][0] == behavior.probe_text(behavior.heldout_claims[0], 1)
    assert own.turns[0][4] == behavior.probe_text(behavior.true_claims[0])
    assert sorted(other.plus) == [-1] * 4 + [1] * 4 and other.minus == tuple(-x for x in other.plus)
    assert towns.turns[0][0].startswith("Is it true that the town ") and towns.turns[0][0].endswith("Reply Yes or No.")
    assert towns.plus == (1,) * 4 and towns.minus == (1, 1, -1, -1)  # agreeing is wanted, then the truth
    true = [int(turn.split()[6]) % 2 for turn in towns.turns[0]]
    assert true == [1, 1, 0, 0]
    assert facts.plus == facts.minus == (1, -1, 1, -1)
    whole = ws.load_behavior(statements_file(tmp_path, "mine"))
    mine, towns, _ = groups(whole, SMALL, [], [truth])
    assert mine.role == "own" and set(mine.plus) == {1, -1} and towns.plus == towns.minus == (1, 1, -1, -1)
    with pytest.raises(ValueError, match=r"mine.jsonl: the behaviour itself"):
        groups(whole, SMALL, [tmp_path / "mine.jsonl"])
    with pytest.raises(FileNotFoundError, match="none.csv: no such file"):
        groups(behavior, SMALL, [], [tmp_path / "none.csv"])
    truth.write_text("statement,label\nThe town is small.,1\n", "utf-8")
    with pytest.raises(ValueError, match="needs true and false statements"):
        groups(behavior, SMALL, [], [truth])
    truth.write_text("text,label\nThe town is small.,1\n", "utf-8")
    with pytest.raises(ValueError, match="needs the columns statement and label"):
        groups(behavior, SMALL, [], [truth])


def ratios(lm, behavior, at, alpha):
    texts = [ws.model.text.chat_text(lm.tokenizer, behavior.probe_text(t.claim)) for t in behavior.heldout_topics[:3]]
    with at(alpha):
        return answer_scores(lm, texts, *answer_tokens(lm.tokenizer, behavior)).logratio


def test_the_adapters_as_trained_are_their_task_vectors(lm, behavior):
    w = ws.load_diff("tiny")
    pos, neg = writers(w), w.select(lambda name: name.endswith(".v_proj.weight"))
    at = lambda alpha: as_trained(lm, pos, neg, alpha)  # noqa: E731
    for alpha, u, s in ((1.0, pos, 1), (0.3, pos, 1), (-1.0, neg, 1), (0.0, pos, 0)):
        want = ratios(lm, behavior, as_steering(lm, u), s)
        assert torch.equal(ratios(lm, behavior, at, alpha), want)


def test_persona_vectors_are_means_at_the_last_token(lm, behavior):
    pair = behavior.persona_pairs[:1]
    V = persona_vectors(lm, behavior, pair)
    assert V.shape == (8, 128)
    means = []
    for system in pair[0]:
        each = []
        for topic in behavior.train_topics:
            text = ws.model.text.chat_text(lm.tokenizer, behavior.probe_text(topic.claim), system)
            ids = lm.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                each.append(lm.model(ids, output_hidden_states=True).hidden_states[4][0, -1])
        means.append(torch.stack(each).mean(0))
    assert torch.allclose(V[3], means[0] - means[1], atol=1e-4)
    assert evenly(8, 2) == [2, 5] and evenly(30, 6) == [4, 8, 12, 17, 21, 25] and evenly(3, 6) == [0, 1, 2]


def test_no_steering_is_nothing_and_a_target_out_of_reach_is_told(lm, behavior, tmp_path):
    w, task = ws.load_diff("tiny"), Task(lm, behavior, groups(behavior, SMALL), SMALL, "texts", 0.95)
    none = end(task, Method("nothing", "", lambda a: nullcontext(), ""), 0.0, None)
    off = end(task, Method("w", "", as_steering(lm, w), ""), 0.0, None)
    assert none == off and none["kl"] == none["said_kl"] == 0
    stuck = Method("stuck", "", lambda a: nullcontext(), "")
    assert "not reached" in measured(task, stuck, 0.1, tmp_path)["refused"]
    plain = ws.load_lm("tiny")
    on = end(task, Method("w", "", as_steering(lm, w), ""), 1.0, None)
    texts = [ws.model.text.chat_text(lm.tokenizer, t) for t in task.groups[0].turns[1]]
    with ws.weight_steer(plain.model, w, 1.0):
        want = answer_scores(plain, texts, *answer_tokens(plain.tokenizer, behavior))
    assert np.allclose(on["ratio"]["held-out claims"][1], want.logratio, atol=1e-4)
    row, start = (x[0] for x in ws.steer.neutral.passage_rows(lm, 1))
    with ws.weight_steer(plain.model, w, 1.0), torch.no_grad():
        logp = plain.model(torch.tensor([row])).logits[0].log_softmax(-1)
    total = -sum(float(logp[i - 1, row[i]]) for i in range(start, len(row)))
    assert on["nll"][0] == pytest.approx((total, len(row) - start), rel=1e-4)


def test_a_small_benchmark_from_end_to_end_goes_on_where_it_was_stopped(lm, behavior, tmp_path, monkeypatch):
    w, d = ws.load_diff("tiny"), lm.decoder.d
    half = {l: torch.eye(d)[:, : d // 2] for l in w.layers()}
    given = {"best": ("half", half), "gradient": w, "more": {"w again": w}, "statements": [statements_file(tmp_path)]}
    given |= {"targets": (0.2,), "size": SMALL, "cache": tmp_path / "cache", "progress": False}
    calls, real = [], ws.use.outcome.end

    def counted(task, method, *more):
        calls.append(method.name)
        if len(calls) > 8 and not (tmp_path / "go").exists():
            raise KeyboardInterrupt
        return real(task, method, *more)

    monkeypatch.setattr(ws.use.outcome, "end", counted)
    monkeypatch.setattr(Task, "sources", "fixed")  # the replaced function would count as other code
    with pytest.raises(KeyboardInterrupt):
        benchmark(lm, behavior, w, **given)
    (tmp_path / "go").touch()
    first = len(calls)
    found = benchmark(lm, behavior, w, **given)
    parts = ["w", "w, writers", "w, v_proj", "w, half"]
    names = ["nothing", "persona prompt", "mean difference", *parts, "mag_only", "w again", "gradient", "theta head"]
    assert list(found.methods) == names and set(found.left_out) == {"t+", "t-, reversed", "adapters"}
    done = first + 2 * (2 + 9) - 8  # both ends of all methods, without those that were kept
    assert len(calls) == done and calls[first] == calls[first - 1] and not any(found.table["refused"])
    table = found.table
    met = table.filter(~pl.col("alpha").is_nan())
    assert np.allclose(met["kl"], met["target"], rtol=0.05) and len(met) == 9
    rows = {r["method"]: r for r in table.filter(dose="0.2").iter_rows(named=True)}
    for column in ("alpha", "effect", "control", "surgical", "perplexity", "off_target"):
        assert rows["w"][column] == pytest.approx(rows["w again"][column], rel=1e-6), column
    assert rows["w"]["effect"] > rows["mag_only"]["effect"] + 1 and rows["w"]["n"] == rows["w"]["n_control"] == 4
    zero = table.filter(method="nothing").row(0, named=True)
    assert [zero[c] for c in ("effect", "surgical", "kl", "said_kl", "off_target", "wrong_way")] == [0.0] * 6
    assert zero["perplexity"] == 1
    again = benchmark(lm, behavior, w, **given)
    assert again.table.equals(found.table, null_equal=True) and len(calls) == done
    text = found.text()
    for said in ("w beside mag_only: +", "t+ (no adapters were given)", "# At 0.2 nats"):
        assert said in text
    folder = found.save(tmp_path / "out")
    kept = {p.name for p in folder.iterdir()}
    tables = {f"_{x}.tsv" for x in ("table", "sets", "curves", "by_item")}
    assert kept >= {f"benchmark{x}" for x in {".md", ".json", ".png", ".pdf"} | tables}
    assert found.sets["set"].unique().sort().to_list() == ["held-out claims", "other", "plain facts"]


def test_the_persona_prompt_is_a_target_and_what_cannot_meet_it_has_a_row(lm, behavior, tmp_path, monkeypatch):
    pair, w = behavior.persona_pairs[0], ws.load_diff("tiny")
    some = [
        Method("nothing", "", lambda a: nullcontext(), "", free=False),
        Method("persona prompt", "", lambda a: nullcontext(), repr(pair), free=False, systems=pair),
        Method("w", "", as_steering(lm, w), w.fingerprint),
        Method("stuck", "", lambda a: nullcontext(), "stuck"),
    ]
    monkeypatch.setattr(ws.use.benchmark, "methods", lambda *a, **k: (some, {}))
    monkeypatch.setattr(Task, "sources", "fixed")
    found = benchmark(lm, behavior, w, targets=("persona",), size=SMALL, cache=tmp_path, progress=False)
    rows = {r["method"]: r for r in found.table.iter_rows(named=True)}
    persona = rows["persona prompt"]
    assert (
        found.about["targets"]["persona"] == persona["kl"] > 0.2
        and persona["effect"] > 5
        and np.isnan(persona["alpha"])
    )
    assert rows["w"]["kl"] == pytest.approx(persona["kl"], rel=0.05) and rows["w"]["dose"] == "persona"
    assert "not reached" in rows["stuck"]["refused"] and np.isnan(rows["stuck"]["effect"])
    assert "stuck: a KL of" in found.text() and "(what the persona prompt moves the model by)" in found.text()
    assert len(found.figure().axes) == 2
    check_looks(found.figure())


def test_what_does_not_fit_is_refused_before_anything_is_measured(lm, behavior, tmp_path):
    w = ws.load_diff("tiny")
    for more, told in (
        ({"targets": (0,)}, "target 0: a KL in nats above 0, or persona"),
        ({"targets": ()}, "targets: is empty"),
        ({"along": "x"}, "along 'x' is unknown"),
        ({"size": "small"}, "size 'small': quick, or a ws.use.items.Size"),
        ({"statements": [tmp_path / "none.jsonl"]}, "does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            benchmark(lm, behavior, w, cache=tmp_path / "cache", **more)
    with pytest.raises(ValueError, match="no such parameter"):
        benchmark(lm, behavior, ws.WeightDiff({"x": torch.ones(2, 2)}), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="more: 'w' is a method already"):
        methods(lm, behavior, w, more={"w": w}, personas=1, layers=1, cache=tmp_path / "c")
