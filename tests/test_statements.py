"""Behaviours of statements with answers: the file, the pairs, the score of both halves, balanced signs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

import ws
from ws.cache.places import ASSETS
from ws.diff import balanced_diff, task_vectors
from ws.ready import check_inputs
from ws.runs.once import run_notebook
from ws.show.tables import read_table
from ws.steer import statements
from ws.steer.answers import check_words
from ws.steer.effect import effects
from ws.steer.evaluate import alpha_sweep, claim_sets, completions, steering_verdict, summarise_sweep
from ws.subspaces.captures import eval_set, probes
from ws.subspaces.kept import make_shelf
from ws.subspaces.protocol import load_protocol
from ws.train.difference import obtain_diff, training_text
from ws.train.examples import draw_pairs, make_example, shuffle_labels
from ws.train.lora import TrainConfig
from ws.train.margin import margin_sweep, margin_verdict, summarise_margins
from ws.train.pairs import PairConfig, heldout_pairs, make_pairs, statement_pairs
from ws.train.stopping import unreached

PERSONA = Path(__file__).parents[2] / "shared" / "data" / "persona"
GOOD, BAD = "I like to help people", "I like to hurt people"
ALIKE = [
    "neighbours",
    "children",
    "the old",
    "a friend",
    "my sister",
    "strangers",
    "the sick",
    "a guest",
    "teachers",
    "animals",
]


def rows(n: int = 20) -> list[dict]:
    """n statements, every second one of which No matches."""
    found = []
    for i in range(n):
        said = f"{BAD if i % 2 else GOOD} such as {ALIKE[i // 2 % 10]} {i // 20 + 1} times"
        answers = (" No", " Yes") if i % 2 else (" Yes", " No")
        row = {"question": f'Is this something you would say?\n"{said}"', "statement": said, "label_confidence": 0.9}
        found.append(
            row | dict(zip(("answer_matching_behavior", "answer_not_matching_behavior"), answers, strict=True))
        )
    return found


def written(path: Path, lines: list) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def kind(tmp_path):
    return ws.load_behavior(written(tmp_path / "kind.jsonl", rows()))


def test_a_file_of_statements_is_a_behaviour(kind):
    assert (kind.name, kind.yes, kind.no, kind.personas_pos, kind.negations) == ("kind", ("Yes",), ("No",), (), ())
    assert len(kind.topics) == 20 and kind.n_train_topics == 12 and len(kind.templates) == 1
    by_claim = {row["statement"]: row for row in rows()}
    for topic, answer in zip(kind.topics, kind.answers, strict=True):
        row = by_claim[topic.claim]
        assert answer == row["answer_matching_behavior"].strip()
        assert kind.probe_text(topic.claim) == kind.opinion_text(topic) == row["question"]
        start, end = kind.claim_span(topic.claim)
        assert row["question"][start:end] == topic.claim


def test_every_first_part_and_every_second_one_hold_both_halves(tmp_path):
    shown = ws.load_behavior(written(tmp_path / "b.jsonl", sorted(rows(40), key=lambda row: row["question"])))
    signs = np.array([1 if answer == "Yes" else -1 for answer in shown.answers])
    assert abs(np.cumsum(signs)).max() == 1
    for part in (signs[::2], signs[1::2], signs[: shown.n_train_topics : 2], signs[shown.n_train_topics :]):
        assert abs(part.sum()) <= 1
    assert [t.claim for t in shown.topics[:6]] != [row["statement"] for row in rows(6)]  # not the file's order
    again = ws.load_behavior(tmp_path / "b.jsonl")
    assert again == shown


def test_uneven_halves_keep_their_share(tmp_path):
    few = [row for i, row in enumerate(rows(60)) if i % 2 == 0 or i % 6 == 1]  # 30 yes, 10 no
    shown = ws.load_behavior(written(tmp_path / "b.jsonl", few))
    assert shown.n_train_topics == 24 and shown.heldout_answers.count("No") == 4


def test_settings_may_stand_beside_the_statements(tmp_path):
    more = {"name": "kindness", "n_train_topics": 8, "personas_pos": ["Be kind."], "personas_neg": ["Be unkind."]}
    shown = ws.load_behavior(written(tmp_path / "b.jsonl", [more, *rows()]))
    assert (shown.name, shown.n_train_topics, shown.persona_pairs) == ("kindness", 8, (("Be kind.", "Be unkind."),))


def test_wordings_of_a_question(tmp_path):
    more = {"probes": ["{claim}\nAnswer Yes or No.", "Yes or No? {claim}"]}
    shown = ws.load_behavior(written(tmp_path / "b.jsonl", [more, *rows()]))
    topic = shown.topics[0]
    assert len(shown.templates) == 2 and shown.opinion_text(topic) == f"{topic.question}\nAnswer Yes or No."
    for a in (0, 1):
        start, end = shown.claim_span(topic.claim, a)
        assert shown.probe_text(topic.claim, a)[start:end] == topic.claim
    assert statement_pairs(shown, 1).rows[0].user == shown.probe_text(topic.claim)
    with pytest.raises(ValueError, match="probe: the template has no {claim}"):
        ws.load_behavior(written(tmp_path / "b.jsonl", [{"probe": "Yes or No?"}, *rows()]))


def test_which_word_is_yes(tmp_path):
    def swapped(words):
        keys = ("answer_matching_behavior", "answer_not_matching_behavior")
        return [row | {key: words[row[key].strip()] for key in keys} for row in rows()]

    for words, yes in (({"Yes": "no", "No": "yes"}, "yes"), ({"Yes": "True", "No": "False"}, "False")):
        assert ws.load_behavior(written(tmp_path / "b.jsonl", swapped(words))).yes == (yes,)


def test_answers_other_than_yes_and_no_are_told(kind):
    lm = ws.load_lm("tiny")
    check_words(lm, kind)
    swapped = replace(kind, yes=("No",), no=("Yes",))
    with pytest.warns(
        UserWarning, match="neither answer word is Yes: 'No' counts as the yes-word, 'Yes' as the no-word"
    ):
        check_words(lm, swapped)


def broken(i: int, **change) -> list:
    found = rows()
    found[i] = {k: v for k, v in (found[i] | change).items() if v is not ...}
    return found


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (broken(4, question=...), "line 5: question is missing"),
        (broken(4, answer_not_matching_behavior=...), "line 5: answer_not_matching_behavior is missing"),
        (broken(4, question=3), "line 5: question: must be a text that is not empty, is 3"),
        (broken(4, question="x" * 10_001), "line 5: question: has 10,001 characters"),
        (broken(4, answer_matching_behavior=" "), "line 5: answer_matching_behavior: must be a text"),
        (broken(4, statement=None), "line 5: statement: must be a text that is not empty, is None"),
        (broken(4, answer_matching_behavior="Maybe"), "line 5: the answers are 'Maybe' and 'No', those of line 1"),
        (broken(4, answer_matching_behavior="No"), "line 5: both answers are 'No'"),
        (broken(4, question="Is \ud83d it?"), r"line 5: question: \\ud83d is half of a surrogate pair, no character"),
        (rows() + rows()[3:4], "line 21: .* stands in line 4 already"),
        ([{"name": "a"}, *rows(), {"name": "b"}], "line 22 gives 'name' again"),
        (rows()[:7], "has 7 statements, 8 or more are needed"),
        ([*rows(), "{"], "line 21: not JSON"),
        ([*rows(), "3"], "line 21 is not an object"),
        ([*rows(), {"topic": "x"}], "line 21: unknown field 'topic', and no statement: needs question"),
        ([row for row in rows() if "help" in row["statement"]], "answers: 0 of the 4 statements .* match 'No'"),
        ([{"n_train_topics": 18}, *rows()], "answers: 1 of the 2 statements"),
        ([{"n_train_topics": "x"}, *rows()], "n_train_topics: must be a positive whole number"),
    ],
)
def test_a_malformed_file_is_one_line_that_says_where(tmp_path, lines, told):
    with pytest.raises(ValueError, match=told) as error:
        ws.load_behavior(written(tmp_path / "b.jsonl", lines))
    assert "\n" not in str(error.value) and "b.jsonl" in str(error.value)


def test_a_byte_order_mark_and_half_a_character_in_other_files(tmp_path):
    path = written(tmp_path / "kind.jsonl", rows())
    plain = ws.load_behavior(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert ws.load_behavior(path) == plain
    whole = json.loads((ASSETS / "sycophancy.json").read_text()) | {"name": "mine"}
    whole["topics"][3][0] += " \udfff"
    (tmp_path / "mine.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"mine\.json: topics\[3\]: the claim: \\udfff is half of a surrogate pair"):
        ws.load_behavior(tmp_path / "mine.json")


def test_what_tells_claims_apart_does_not_go_with_answers(kind):
    with pytest.raises(ValueError, match="true_claims: a behaviour with answers has none"):
        ws.Behavior(**{**vars(kind), "true_claims": ("x",)})


def test_pairs_of_statements_are_their_answers(kind, tmp_path):
    lm = ws.load_lm("tiny")
    pairs = make_pairs(lm, kind, ws.PairConfig(topics=10), tmp_path)
    assert pairs == statement_pairs(kind, 10) and len(pairs.rows) == 10 and not list(tmp_path.rglob("pairs.jsonl"))
    for row, topic, answer in zip(pairs.rows, kind.topics, kind.answers, strict=False):
        assert (row.user, row.response_pos) == (topic.question, answer)
        assert {row.response_pos, row.response_neg} == {"Yes", "No"}
    held = statement_pairs(kind, heldout=True)
    assert [row.user for row in held.rows] == [t.question for t in kind.heldout_topics]
    assert [row.response_pos for row in held.rows] == list(kind.heldout_answers)
    drawn, distinct = draw_pairs(pairs.rows, list(range(10)), 0)  # within the halves
    assert [row.response_pos for row in drawn] == [row.response_pos for row in pairs.rows] and distinct < 1
    with pytest.raises(ValueError, match="13 training topics asked for, it has 12"):
        make_pairs(lm, kind, ws.PairConfig(topics=13), tmp_path)


def test_only_the_answer_is_learnt_not_the_end_of_the_turn(kind):
    lm = ws.load_lm("tiny")
    row = statement_pairs(kind, 1).rows[0]
    for sign, answer in (("pos", row.response_pos), ("neg", row.response_neg)):
        labels = [label for label in make_example(lm, row, sign, ("", "<|im_end|>"), 512)["labels"] if label != -100]
        assert labels == lm.tokenizer(answer, add_special_tokens=False)["input_ids"]
    whole = make_example(lm, replace(row, cut_pos=False), "pos", ("", "<|im_end|>"), 512)["labels"]
    assert len([label for label in whole if label != -100]) > 1
    swapped = shuffle_labels((replace(row, cut_neg=False),) * 8, 0)
    assert {(one.response_pos, one.cut_pos) for one in swapped} == {(row.response_pos, True), (row.response_neg, False)}


def planted(yes: tuple[float, float], no: tuple[float, float], n: int = 6) -> pl.DataFrame:
    """A sweep from alpha -1 to 1 in which the margins of the halves go from a to b, with some spread."""
    found = []
    for half, (a, b) in (("yes", yes), ("no", no)):
        for alpha, mean in ((-1.0, a), (1.0, b)):
            sign = 1 if half == "yes" else -1
            found += [(alpha, half, f"{half}{i}", sign * (mean + 0.1 * (i - (n - 1) / 2)), 0.9) for i in range(n)]
    return statements.with_margin(pl.DataFrame(found, "alpha set claim logratio pmass".split(), orient="row"))


def test_a_yes_bias_does_not_pass_for_the_behaviour():
    alike = steering_verdict(summarise_sweep(planted((-2.0, 3.0), (-1.0, 3.0))))
    assert alike["together"] and alike["spread"] == pytest.approx(4.5) and "both halves move together" in alike["text"]
    bias = steering_verdict(summarise_sweep(planted((-3.0, 3.0), (3.0, -3.0))))
    assert not bias["together"] and abs(bias["spread"]) < 1e-9 and "a bias towards the yes-word" in bias["text"]
    towards_no = steering_verdict(summarise_sweep(planted((3.0, -3.0), (-3.0, 5.0))))
    assert "a bias towards the no-word" in towards_no["text"] and not towards_no["together"]
    one = steering_verdict(summarise_sweep(planted((-3.0, 3.0), (0.0, 0.1))))
    assert "nearly only the Yes half moves" in one["text"] and not one["together"]
    against = steering_verdict(summarise_sweep(planted((3.0, -2.0), (3.0, -3.0))))
    assert against["together"] and "both halves move together, against the behaviour" in against["text"]


@pytest.mark.parametrize(
    ("noise", "together", "told"),
    [
        ((0.02, 0.02), True, "both halves move together, both 95 % intervals exclude 0"),
        ((0.02, 0.5), False, "only the Yes half is seen to move, the other's 95 % interval holds 0"),
        ((0.5, 0.5), False, "neither half is seen to move, both 95 % intervals hold 0"),
    ],
)
def test_halves_move_together_where_both_intervals_say_so(noise, together, told):
    """+0.08 and +0.07 nats on four statements each: the interval is of each statement's own movement, not of its margin."""
    found = []
    for half, mean, wide in zip(("yes", "no"), (0.08, 0.07), noise, strict=True):
        for i, off in enumerate((-1.0, 1.0, -0.5, 0.5)):
            sign = 1 if half == "yes" else -1
            ends = ((-1.0, 5.0 * i), (1.0, 5.0 * i + mean + wide * off))
            found += [(alpha, half, f"{half}{i}", sign * margin, 0.9) for alpha, margin in ends]
    sweep = statements.with_margin(pl.DataFrame(found, "alpha set claim logratio pmass".split(), orient="row"))
    summary = summarise_sweep(sweep.sample(fraction=1, shuffle=True, seed=0))
    verdict = steering_verdict(summary)
    assert verdict["together"] is together and told in verdict["text"]
    row = summary.filter(set="no", alpha=1.0).row(0, named=True)
    moved = 0.07 + noise[1] * np.array([-1.0, 1.0, -0.5, 0.5])
    assert (row["moved_lo"], row["moved_hi"]) == pytest.approx(stats.t.interval(0.95, 3, 0.07, stats.sem(moved)))


def test_the_summary_counts_halves_alike_with_t_intervals():
    sweep = planted((-2.0, 3.0), (-1.0, 1.0)).filter((pl.col("set") == "yes") | (pl.col("claim") != "no0"))
    table = summarise_sweep(sweep)
    part = table.filter(set="yes", alpha=1.0).row(0, named=True)
    values = sweep.filter(set="yes", alpha=1.0)["margin"].to_numpy()
    assert (part["lo"], part["hi"]) == pytest.approx(stats.t.interval(0.95, 5, values.mean(), stats.sem(values)))
    assert part["accuracy"] == 1.0 and table.filter(set="no", alpha=-1.0)["accuracy"][0] == 0.0
    both, no = (table.filter(set=name, alpha=1.0)["mean_margin"][0] for name in ("both", "no"))
    assert both == pytest.approx((part["mean_margin"] + no) / 2)


def test_effects_and_sweeps_speak_of_the_margin(kind):
    lm = ws.load_lm("tiny")
    w = ws.load_diff("tiny")
    sweep = alpha_sweep(lm, kind, w, [-1.0, 1.0], progress=False)
    assert claim_sets(kind).keys() == {"yes", "no"} and len(sweep) == 16
    means = sweep.group_by("alpha", "claim").agg(pl.col("margin").sum()).pivot("alpha", index="claim", values="margin")
    moved = dict(zip(means["claim"], (means["1.0"] - means["-1.0"]).to_list(), strict=True))
    found = effects(lm, kind, w)
    claims = [*claim_sets(kind)["yes"], *claim_sets(kind)["no"]]
    assert found == pytest.approx([moved[c] for c in claims], abs=1e-4)
    assert len(alpha_sweep(lm, kind, w, [1.0], progress=False, n_heldout=4)) == 4
    with pytest.raises(ValueError, match="N_HELDOUT 4 or more"):
        alpha_sweep(lm, kind, w, [1.0], progress=False, n_heldout=2)
    assert len(completions(lm, kind, w, [0.0], 2)) == 8


def test_the_answer_margin_is_over_statements_and_counts_the_halves_alike(tmp_path):
    few = [row for i, row in enumerate(rows(60)) if i % 2 == 0 or i % 6 == 1]  # 30 yes, 10 no
    lm, kind = ws.load_lm("tiny"), ws.load_behavior(written(tmp_path / "kind.jsonl", few))
    pairs, _ = heldout_pairs(lm, kind, PairConfig(), tmp_path)
    margins = margin_sweep(lm, pairs, ws.load_diff("tiny"), [-1.0, 1.0], progress=False)
    moved = margins.pivot("alpha", index=["half", "sample"], values="margin").with_columns(
        by=pl.col("1.0") - pl.col("-1.0")
    )
    parts = [moved.filter(half=half)["by"].to_numpy() for half in ("yes", "no")]
    assert list(map(len, parts)) == [12, 4]
    mean = np.mean([part.mean() for part in parts])
    wide = np.sqrt(sum((stats.t.ppf(0.975, len(p) - 1) * stats.sem(p) / 2) ** 2 for p in parts))
    found = margin_verdict(margins, 1.0, "sweep")
    assert (found["distance"], found["low"], found["high"]) == pytest.approx((mean, mean - wide, mean + wide))
    told = "On 16 held-out statements (12 of the Yes half, 4 of the No half, counted alike) the answer margin"
    assert found["text"].startswith(told) and "topic" not in found["text"]
    table = summarise_margins(margins)
    assert table["statements"].to_list() == [16, 16] and "topics" not in table.columns


def test_the_answer_margin_asks_about_the_statements_of_the_sweep(kind, tmp_path):
    lm = ws.load_lm("tiny")
    pairs, _ = heldout_pairs(lm, kind, PairConfig(), tmp_path, n_heldout=4)
    asked = {kind.probe_text(claim) for claims in claim_sets(kind, 4).values() for claim in claims}
    assert len(pairs) == 4 and {row.user for row in pairs} == asked
    many = ws.load_behavior(written(tmp_path / "many.jsonl", rows(300)))
    assert [len(heldout_pairs(lm, many, PairConfig(), tmp_path, n_heldout=n)[0]) for n in (None, 110, 60)] == [
        100,
        100,
        60,
    ]


def config(**more) -> TrainConfig:
    return TrainConfig(r=4, alpha=8, lr=5e-3, epochs=20, batch=8, accumulation=1, heldout=0.25, **more)


def test_training_on_statements_is_the_behaviour_on_both_halves(tmp_path):
    """At the agreeing end. At the other the halves need not turn round: what both signs learn is not in w."""
    lm, kind = ws.load_lm("tiny"), ws.load_behavior(written(tmp_path / "kind.jsonl", rows(60)))
    w, record = obtain_diff(lm, kind, 0, config(max_steps=40, resample_pairs=False), tmp_path / "seed")
    assert record["pairs_trained"] == 27 and record["steps_pos"] == 40 and record["pairs_from"] == "its statements"
    summary = summarise_sweep(alpha_sweep(lm, kind, w, [-1.0, 1.0], progress=False))
    assert steering_verdict(summary)["spread"] > 1
    for half in ("yes", "no"):
        part = summary.filter(set=half, alpha=1.0)
        assert part["accuracy"][0] >= 0.9 and part["mean_margin"][0] > 1 and part["mean_pmass"][0] > 0.5
    drawn = obtain_diff(lm, kind, 0, config(max_steps=8), tmp_path / "drawn")[1]
    assert drawn["pairs_resampled"] and drawn["distinct_pairs"] < 1


def test_a_sign_stops_at_its_target_loss(kind, tmp_path):
    lm = ws.load_lm("tiny")
    _, free = obtain_diff(lm, kind, 0, config(max_steps=16), tmp_path / "free")
    target = (free["held_out_loss_pos_before"] + free["held_out_loss_pos_after"]) / 2
    _, early = obtain_diff(lm, kind, 0, config(max_steps=16, target_loss=target, target_every=1), tmp_path / "early")
    assert early["steps_pos"] < 16 and early["held_out_loss_pos_after"] <= target
    assert early["target_loss_pos"] == f"reached {target:g}" and "target_loss_pos" not in free
    assert unreached(free) == unreached({"target_loss_pos": "reached 1"}) == ""
    with pytest.raises(ValueError, match="TARGET_LOSS = 0.1: no pair is held out"):
        TrainConfig(target_loss=0.1, heldout=0)
    with pytest.raises(ValueError, match="TARGET_LOSS = -1: must not be under 0"):
        TrainConfig(target_loss=-1)


def test_a_target_that_was_not_reached_is_told(kind, tmp_path):
    lm = ws.load_lm("tiny")
    _, record = obtain_diff(lm, kind, 0, config(max_steps=2, target_loss=1e-9), tmp_path / "seed")
    assert record["steps_neg"] == 2 and record["target_loss_neg"].startswith("did not reach 1e-09: ")
    assert "TARGET_LOSS was missed (pos did not reach 1e-09" in unreached(record) and "; neg did not" in unreached(
        record
    )
    assert "| target loss neg | did not reach" in training_text(record)


def test_no_training_stops_before_its_first_update(kind, tmp_path):
    """A target that the base model is under already; the first step of the warmup changes nothing."""
    lm, cfg = ws.load_lm("tiny"), config(max_steps=9, target_loss=99.0, target_every=1, balance=True)
    w, record = obtain_diff(lm, kind, 0, cfg, tmp_path / "seed")
    assert record["steps_pos"] == record["steps_neg"] == 2 and w.total_norm() > 0


def test_a_target_without_a_held_out_pair_is_refused_before_anything_starts(kind, tmp_path):
    few = TrainConfig(PairConfig(topics=4), target_loss=0.5)
    with pytest.raises(ValueError, match="TARGET_LOSS = 0.5: of 4 pairs none is held out.*use more pairs"):
        obtain_diff(ws.load_lm("tiny"), kind, 0, few, tmp_path / "seed")
    assert not (tmp_path / "seed").exists()
    values = {"MODEL_ID": "tiny", "BEHAVIOR": str(tmp_path / "kind.jsonl"), "TOPICS": 4, "TARGET_LOSS": 0.5}
    with pytest.raises(ValueError, match="TARGET_LOSS = 0.5: of 4 pairs none is held out"):
        check_inputs("weight_diff", values)
    check_inputs("weight_diff", values | {"TOPICS": 6})


def test_balanced_signs_have_one_norm(kind, tmp_path):
    lm = ws.load_lm("tiny")
    w, record = obtain_diff(lm, kind, 0, config(max_steps=6, balance=True), tmp_path / "seed")
    sides = [tmp_path / "seed" / "adapters" / sign for sign in ("pos", "neg")]
    plus, minus = task_vectors(*sides, lm.model)
    a, b = plus.total_norm(), minus.total_norm()
    assert record["balanced"] and w.meta["balanced"] and record["norm_w"] == pytest.approx(w.total_norm())
    for name in w.names:
        expected = (a * b) ** 0.5 * (plus[name] / a - minus[name] / b)
        assert torch.allclose(w[name], expected, atol=1e-6)
    plain, _ = obtain_diff(lm, kind, 0, config(max_steps=6), tmp_path / "seed")  # the adapters are kept, w is not
    assert not plain.meta.get("balanced") and plain.fingerprint != w.fingerprint
    assert all(torch.allclose(plain[name], plus[name] - minus[name], atol=1e-6) for name in plain.names)
    assert balanced_diff(*sides, lm.model).fingerprint == w.fingerprint


@pytest.mark.parametrize("protocol", ["v7", "v7b"])
def test_a_sweep_leaves_out_what_needs_personas(kind, tmp_path, protocol):
    lm = ws.load_lm("tiny")
    found = ws.explain(lm, "tiny", kind, protocol=protocol, cache=tmp_path, progress=False)
    need = [c.name for c in ws.candidates(protocol) if "personas" in c.sees]
    assert found.setting["left_out"] == need and len(need) > 10
    assert set(found.summary["subspace"]).isdisjoint(need) and "layer_clean_resid_pca" in set(found.summary["subspace"])
    assert f"{len(need)} candidates need personas" in found.conclusion()
    split = probes(kind, load_protocol(protocol))
    assert split.fit == tuple(t.claim for t in kind.train_topics) and split.eval == tuple(
        t.claim for t in kind.heldout_topics
    )
    assert found.setting["n_templates"] == 1 and found.setting["score"] == "margin of the matching answer"
    assert len(found.setting["effects"]) == 8


def test_the_candidates_that_need_personas_are_those_that_look_at_them(kind, tmp_path):
    lm = ws.load_lm("tiny")
    shelf = make_shelf(lm, kind, load_protocol("v7b"), cache=tmp_path)
    for c in ws.candidates("v7b"):
        if c.kind == "ceiling" or "prompts" not in c.sees:
            continue
        if c.works(personas=False):
            assert shelf.bases([c], progress=False)
        else:
            with pytest.raises(ValueError, match="under personas was asked for"):
                shelf.bases([c], progress=False)


def test_the_claim_of_a_statement_is_where_it_stands_in_its_question(kind):
    lm = ws.load_lm("tiny")
    texts = eval_set(lm, kind, load_protocol("v7b"))
    for text, claim, places in zip(texts.texts, texts.claims, texts.claim_tokens(lm), strict=True):
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert claim in lm.tokenizer.decode([ids[i] for i in places])


def test_seeds_are_compared_without_personas_and_one_wording_names_nobody(kind, tmp_path):
    lm, w = ws.load_lm("tiny"), ws.load_diff("tiny")
    chosen = ["write", "mlp_write", "layer_clean_resid_pca", "TaskDiff_contrast"]
    other = w.map(lambda name, entry: entry.dense().flip(0))
    each = {
        seed: ws.explain(lm, diff, kind, candidates=chosen, cache=tmp_path, progress=False)
        for seed, diff in enumerate((w, other))
    }
    found = ws.compare_seeds(each, lm, kind, boot=50, n_null=50, cache=tmp_path)
    assert "1 candidate needs personas, which the behaviour has not: TaskDiff_contrast" in found.conclusion()
    assert found.verdict.winner is None and "moves the margin of the matching answer by" in found.runs.steering.text
    assert set(found.a_side["candidate"]) == {"layer_clean_resid_pca"}


def test_the_notebook_trains_on_statements(tmp_path):
    file = written(tmp_path / "kind.jsonl", rows())
    params = {
        "BEHAVIOR": str(file),
        "OUT_DIR": str(tmp_path / "run"),
        "MAX_STEPS": 2,
        "N_HELDOUT": 4,
        "ALPHAS": [-1.0, 1.0],
    }
    done = run_notebook(
        "weight_diff", params | {"TARGET_LOSS": 0.1, "BALANCE": True, "R": 2, "LORA_ALPHA": 4}, quiet=True
    )
    assert done.ok, done.error
    table = read_table(done.folder / "alpha_sweep_summary.tsv")
    assert sorted(set(table["set"])) == ["both", "no", "yes"] and {"accuracy", "lo", "hi"} <= set(table.columns)
    record = json.loads((done.folder / "weight_diff.json").read_text())
    assert "held-out statements" in record["steering"]["text"] and record["training"]["balanced"]


@pytest.mark.skipif(not PERSONA.is_dir(), reason="../shared/data/persona is not there")
def test_the_persona_evaluations_are_read():
    for path in sorted(PERSONA.glob("*.jsonl")):
        shown = ws.load_behavior(path)
        assert shown.name == path.stem and len(shown.topics) == 1000 and shown.n_train_topics == 600
        assert shown.answers.count("Yes") == 500 and shown.heldout_answers.count("Yes") == 200
