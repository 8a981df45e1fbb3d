"""A w that was trained on what is asked about now is not used as if it were not: refused, or told in the conclusion."""

import json
from dataclasses import replace

import pytest
from test_statements import rows, written
from test_written import file, pair  # noqa: F401

import ws
from ws.cache.places import ASSETS
from ws.diff import WeightDiff, save_diff
from ws.diff.io import read_meta
from ws.ready import check_inputs
from ws.runs.folders import own_w
from ws.runs.notebooks import Place
from ws.runs.parameters import read_notebook, resolve
from ws.train.asked import other_training, trained_on
from ws.train.difference import train_diff
from ws.train.lora import TrainConfig
from ws.train.pairs import PairConfig, trained_claims


def values(notebook: str, behavior, **more) -> dict:
    given = {"BEHAVIOR": str(behavior), **more}
    return resolve(notebook, read_notebook(Place().notebook(notebook)), given)


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """`swept(file)`: the parameters of a sweep whose w bears the record of a training on a file's behaviour."""
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))

    def plant(path):
        asked, behavior = values("v7_sweep", path), ws.load_behavior(path)
        pairs = PairConfig(file="" if behavior.answers else "sycophancy")
        meta = trained_on(behavior, trained_claims(behavior, pairs), bool(pairs.file))
        home = own_w(asked, tmp_path / "out")
        home.parent.mkdir(parents=True)
        save_diff(WeightDiff(ws.load_diff("tiny").entries, {"behavior": behavior.name} | meta), home)
        return asked

    return plant


def test_a_sweep_refuses_a_w_of_statements_that_were_replaced(tmp_path, swept):
    path = written(tmp_path / "kind.jsonl", rows())
    asked = swept(path)
    check_inputs("v7_sweep", asked, tmp_path / "out")
    written(path, [row for i, row in enumerate(rows(30)) if i >= 4])  # others of the same kind, some of them trained on
    told = r"kind\.jsonl: w was trained on \d+ of the 10 claims .*w\.safetensors\); train it again: just nb weight_diff"
    with pytest.raises(ValueError, match=told) as refused:
        check_inputs("v7_sweep", asked, tmp_path / "out")
    assert "\n" not in str(refused.value) and "use it as it is: W_PATH " in str(refused.value)
    with pytest.raises(ValueError, match=told):
        check_inputs("v7b_stability", values("v7b_stability", path, SEEDS=[0]), tmp_path / "out")
    check_inputs("v7_sweep", asked, tmp_path / "out", own=False)  # of a batch that trains it anew first
    check_inputs("v7_sweep", asked | {"W_PATH": str(own_w(asked, tmp_path / "out"))}, tmp_path / "out")
    swapped = [json.loads(json.dumps(row).replace("help", "feed")) for row in rows()]
    written(path, swapped)
    with pytest.raises(ValueError, match="w was trained on other topics than kind has now"):
        check_inputs("v7_sweep", asked, tmp_path / "out")
    two = [str(written(tmp_path / "tidy.jsonl", rows())), str(path)]
    crossed = {"MODEL_ID": "tiny", "BEHAVIORS": two, "SEEDS": [0]}
    with pytest.raises(ValueError, match=r"kind\.jsonl: w was trained on other topics"):
        check_inputs("cross_behaviours", crossed, tmp_path / "out")


def test_topics_that_were_held_out_may_change_where_none_of_them_was_trained_on(tmp_path, swept):
    """With pairs of a file: what they are about is held against what is asked about."""
    whole = json.loads((ASSETS / "sycophancy.json").read_text())
    for key in ("claims", "true_claims", "negations", "train_true_claims"):
        del whole[key]
    path, whole["name"] = tmp_path / "mine.json", "mine"
    path.write_text(json.dumps(whole))
    asked = swept(path)
    whole["topics"][-1] = ["the moon is a lamp", "Is it?"]
    path.write_text(json.dumps(whole))
    check_inputs("v7_sweep", asked, tmp_path / "out")
    whole["topics"][-1], whole["topics"][0] = whole["topics"][0], whole["topics"][-1]
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"mine\.json: w was trained on 1 of the 12 claims that are asked about"):
        check_inputs("v7_sweep", asked, tmp_path / "out")


def test_what_the_record_of_a_training_says(tmp_path, file):  # noqa: F811
    kind = ws.load_behavior(written(tmp_path / "kind.jsonl", rows()))
    meta = {"behavior": "kind"} | trained_on(kind, [t.claim for t in kind.train_topics], False)
    assert len(meta["trained_on"]) == 12 and not other_training(meta, kind) and not other_training({}, kind)
    flipped = replace(kind, answers=tuple("No" if a == "Yes" else "Yes" for a in kind.answers))
    assert other_training(meta, flipped) == "w was trained on other topics than kind has now"
    assert not other_training(meta | {"behavior": "other"}, flipped)
    few = {"behavior": "kind"} | trained_on(kind, trained_claims(kind, PairConfig(topics=3)), False)
    assert len(few["trained_on"]) == 3 and not other_training(few, kind)
    path = file([pair(0, topic="a"), pair(1, topic="a"), pair(2, topic=kind.heldout_topics[0].claim), pair(3)])
    assert trained_claims(kind, PairConfig(file=path)) == ["a"]


def test_a_sweep_refuses_a_null_diff_that_was_trained_on_what_is_asked(tmp_path, swept):
    path, out = written(tmp_path / "kind.jsonl", rows()), tmp_path / "out"
    asked, kind = swept(path), ws.load_behavior(path)
    null = own_w(asked, out).parent / "null_diff" / "w.safetensors"
    null.parent.mkdir(parents=True)
    meta = {"behavior": "kind"} | trained_on(kind, [t.claim for t in kind.heldout_topics[:2]], True)
    save_diff(WeightDiff(ws.load_diff("tiny").entries, meta), null)
    told = (
        r"a null diff was trained on 2 of the \d+ claims .*null_diff/w\.safetensors\); train it again: .*NULL_DIFF true"
    )
    with pytest.raises(ValueError, match=told):
        check_inputs("v7_sweep", asked, out)
    check_inputs("v7_sweep", asked | {"NULL_W_PATH": [str(null)]}, out)


def test_the_conclusion_says_what_w_was_trained_on(tmp_path):
    lm, tiny = ws.load_lm("tiny"), ws.load_diff("tiny")
    kind = ws.load_behavior(written(tmp_path / "kind.jsonl", rows()))
    other = trained_on(replace(kind, name="other"), [t.claim for t in kind.heldout_topics[:3]], True)
    for meta, told in ((other, True), ({}, False)):
        w = WeightDiff(tiny.entries, meta)
        found = ws.explain(lm, w, kind, candidates=["write"], cache=tmp_path, progress=False)
        assert ("**w was trained on 3 of the 8 claims that are asked about" in found.conclusion()) is told
    null = WeightDiff(tiny.scale(0.5).entries, other)
    found = ws.explain(lm, tiny, kind, candidates=["write"], null=null, cache=tmp_path, progress=False)
    assert "**a null diff was trained on 3 of the 8 claims" in found.conclusion()


def test_the_record_is_in_the_file_of_w(tmp_path):
    kind = written(tmp_path / "kind.jsonl", rows())
    train_diff(
        ws.load_lm("tiny"),
        kind,
        config=TrainConfig(max_steps=2, r=2, layers=(3,)),
        folder=tmp_path / "run",
        progress=False,
    )
    meta = read_meta(tmp_path / "run" / "w.safetensors")
    assert len(meta["trained_on"]) == 12 and not other_training(meta, ws.load_behavior(kind))
