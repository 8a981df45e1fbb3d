"""Behaviour scores against direct computation; the alpha sweep; blind completions."""

import json
from dataclasses import replace

import polars as pl
import pytest
import torch

from ws.data import load_behavior
from ws.diff import load_diff
from ws.model.lm import load_lm
from ws.model.text import chat_text, encode
from ws.steer import answers as A
from ws.steer import evaluate as E
from ws.steer.effect import effects
from ws.steer.wordings import wording_sweep, wording_text


@pytest.fixture(scope="module")
def lm(parity_folder):
    return load_lm(str(parity_folder / "model"), "float32", "cpu")


@pytest.fixture(scope="module")
def behavior(lm, parity_folder):
    """The parity behaviour with answer words that its 600-token vocabulary has."""
    vocab = [t for t in lm.tokenizer.get_vocab() if t.isalpha() and t.islower() and len(t) > 2]
    yes, no = sorted(vocab)[:2]
    return replace(load_behavior(parity_folder / "behavior.json"), yes=(yes,), no=(no,))


def asked(lm, behavior, claims):
    """Log-ratio and pmass of the base model."""
    return A.kept_answers(lm, behavior, [behavior.probe_text(claim) for claim in claims], None, 0.0, None)


def test_answer_ids_gather_case_and_leading_space_forms():
    class Vocab:
        def get_vocab(self):
            return {"Yes": 0, "ĠYes": 1, "▁yes": 2, "YES": 3, "Yesterday": 4, "No": 5, "Ġno": 6, "yes": 7}

    assert A.answer_ids(Vocab(), ("Yes",)) == [0, 1, 2, 3, 7]
    assert A.answer_ids(Vocab(), ("No",)) == [5, 6]
    with pytest.raises(ValueError, match="answer words 'Maybe': none is a single token"):
        A.answer_ids(Vocab(), ("Maybe",))


def test_logratio_and_pmass_are_those_of_the_last_token(lm, behavior):
    claims = tuple(t.claim for t in behavior.heldout_topics[:5])
    logratio, pmass = asked(lm, behavior, claims)
    yes, no = A.answer_ids(lm.tokenizer, behavior.yes), A.answer_ids(lm.tokenizer, behavior.no)
    for i, claim in enumerate(claims):
        ids, _ = encode(lm.tokenizer, [chat_text(lm.tokenizer, behavior.probe_text(claim))], False)
        with torch.no_grad():
            p = lm.model(ids).logits[0, -1].double().softmax(-1)
        assert logratio[i] == pytest.approx(float((p[yes].sum() / p[no].sum()).log()), abs=1e-4)
        assert pmass[i] == pytest.approx(float(p[yes].sum() + p[no].sum()), rel=1e-3)


def test_padding_side_and_batch_change_nothing(lm, behavior):
    texts = [chat_text(lm.tokenizer, behavior.probe_text(t.claim)) for t in behavior.heldout_topics]
    yes, no = A.answer_ids(lm.tokenizer, behavior.yes), A.answer_ids(lm.tokenizer, behavior.no)
    a = A.answer_scores(lm, texts, yes, no)
    b = A.answer_scores(lm, texts, yes, no, batch_size=5, padding_side="left")
    assert torch.allclose(a.logratio, b.logratio, atol=1e-4)


def test_a_token_that_is_both_answers_is_refused(lm, behavior):
    with pytest.raises(ValueError, match="counts as yes and as no"):
        asked(lm, replace(behavior, no=(behavior.yes[0].upper(),)), ("the sky is blue",))


def test_sweep_is_antisymmetric_where_it_must_be_and_leaves_the_model(lm, behavior, parity_folder):
    w = load_diff(parity_folder / "w.pt")
    full = replace(behavior, true_claims=("water is wet", "ice is cold"))
    before = {n: p.clone() for n, p in lm.model.named_parameters()}
    sweep = E.alpha_sweep(lm, full, w, [-1.0, 0.0, 1.0], progress=False)
    assert all(torch.equal(p, before[n]) for n, p in lm.model.named_parameters())
    summary = E.summarise_sweep(sweep)
    assert summary.select("set", "n").unique().sort("set").rows() == [
        ("false", len(behavior.heldout_claims)),
        ("true", 2),
    ]
    zero = summary.filter((summary["alpha"] == 0) & (summary["set"] == "false"))["mean_logratio"][0]
    base = asked(lm, full, E.claim_sets(full)["false"])[0].mean()
    assert zero == pytest.approx(float(base), abs=1e-6)
    assert summary["low_pmass"].all()  # a random model puts little mass on any two words
    reverse = E.alpha_sweep(lm, full, w.scale(-1), [1.0], progress=False)
    minus = sweep.filter(sweep["alpha"] == -1)["logratio"].to_list()
    assert reverse["logratio"].to_list() == pytest.approx(minus, abs=1e-4)


def test_blind_completions_hide_alpha_and_the_key_restores_it(lm, behavior, parity_folder, tmp_path):
    w = load_diff(parity_folder / "w.pt")
    rows = E.completions(lm, behavior, w, [-1.0, 1.0], max_new_tokens=3)
    assert len(rows) == 24
    read, key = E.write_blind(rows, tmp_path)
    shown = [json.loads(line) for line in read.read_text().splitlines()]
    known = {r["id"]: r for r in map(json.loads, key.read_text().splitlines())}
    assert all("alpha" not in r for r in shown) and len(known) == 24
    for r in shown:
        match = [x for x in rows if x["topic"] == known[r["id"]]["topic"] and x["alpha"] == known[r["id"]]["alpha"]]
        assert match[0]["completion"] == r["completion"]
    assert [r["alpha"] for r in known.values()] != sorted(r["alpha"] for r in known.values())


def test_strengths_of_a_sweep_are_checked_before_anything_is_trained():
    assert E.check_alphas([1, -1.0, 0, 1]) == [-1.0, 0.0, 1.0]
    for bad in ([], [1.0]):
        with pytest.raises(ValueError, match="ALPHAS = .*at least two different strengths"):
            E.check_alphas(bad)
    for bad in ([0.0, float("nan")], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="ALPHAS = .*a strength is a finite number"):
            E.check_alphas(bad)


def test_every_wording_is_asked_and_told():
    lm, behavior, w = load_lm("tiny"), load_behavior("sycophancy"), load_diff("tiny")
    table = wording_sweep(lm, behavior, w, [-1.0, 1.0], progress=False)
    assert table.height == 2 * len(behavior.templates) == 8
    own = E.summarise_sweep(E.alpha_sweep(lm, behavior, w, [-1.0, 1.0], progress=False)).filter(set="false")
    assert table.filter(wording=0)["mean_logratio"].to_list() == pytest.approx(own["mean_logratio"].to_list(), abs=1e-5)
    by_hand = asked(lm, replace(behavior, probe=behavior.probes[1], probes=()), behavior.heldout_claims)
    at_0 = wording_sweep(lm, behavior, w, [0.0], progress=False).row(2, named=True)
    assert at_0["mean_pmass"] == pytest.approx(float(by_hand[1].mean()), abs=1e-5)
    low = table.with_columns(mean_pmass=pl.when(pl.col("wording") == 1).then(0.4).otherwise("mean_pmass"))
    text = wording_text(behavior, low)
    assert "4 wordings" in text and "least pmass 0.400" in text and behavior.templates[2].strip() in text
    assert behavior.templates[1].strip() not in text
    assert "Asked at alpha -1, +1, the 4 wordings" in text
    assert "under none" in wording_text(behavior, table.with_columns(mean_pmass=pl.lit(0.1)))
    one = replace(behavior, probes=())
    assert wording_text(one, wording_sweep(lm, one, w, [1.0], progress=False)) == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sweep_wordings_and_effect_ask_the_model_once(dtype, tmp_path):
    lm, behavior, w = load_lm("tiny", dtype), load_behavior("sycophancy"), load_diff("tiny")

    def kept():
        return len([*(tmp_path / "answers").glob("sycophancy_*.json")])

    sweep = E.alpha_sweep(lm, behavior, w, [-1.0, 0.0, 1.0], progress=False, cache=tmp_path)
    assert kept() == 9  # three sets of claims
    table = wording_sweep(lm, behavior, w, [-1.0, 0.0, 1.0], progress=False, cache=tmp_path)
    assert kept() == 9 + 3 * 3  # the first wording is the sweep's
    own = E.summarise_sweep(sweep).filter(set="false")
    assert table.filter(wording=0)["mean_logratio"].to_list() == pytest.approx(
        own["mean_logratio"].to_list(), abs=1e-12
    )
    moved = effects(lm, behavior, w, 4, tmp_path)
    E.alpha_sweep(lm, behavior, w.scale(2), [0.0], progress=False, cache=tmp_path)  # another w's base model is this one
    assert kept() == 18
    ends = table.group_by("alpha").agg(pl.col("mean_logratio").mean()).sort("alpha")["mean_logratio"]
    assert moved.mean() == pytest.approx(ends[-1] - ends[0], abs=1e-9)
    E.alpha_sweep(lm, behavior, w.scale(2), [1.0], progress=False, cache=tmp_path)
    assert kept() == 21
