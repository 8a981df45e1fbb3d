"""Pairs from a file: what is read and what is refused, what is never trained on, how the runs are named."""

import json
from collections import Counter
from dataclasses import replace

import pytest

import ws.train.difference
from ws.cache.made import read_sidecar
from ws.data import load_behavior
from ws.model.lm import load_lm
from ws.ready import check_inputs
from ws.runs import identity, notebooks
from ws.runs.folders import recipe
from ws.runs.grid import make_jobs, read_options
from ws.runs.notebooks import Place
from ws.runs.parameters import defaults, read_notebook, resolve
from ws.train.difference import train_diff
from ws.train.examples import draw_pairs
from ws.train.lora import TrainConfig
from ws.train.pairs import PairConfig, counted, from_file, heldout_pairs, make_pairs
from ws.train.written import read_written, split_written


@pytest.fixture(scope="module")
def behavior():
    return load_behavior("sycophancy")


def pair(i: int, **more) -> dict:
    return {"user": f"Is it {i}?", "response_pos": f"Yes, {i}.", "response_neg": f"No, {i}.", **more}


@pytest.fixture
def file(tmp_path):
    """`file(rows, name)`: a file of pairs; texts stand as they are."""

    def write(rows, name="mine.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
        return str(path)

    return write


def split(path, behavior, **more):
    train, held = split_written(path, behavior, **more)
    return {r.line for r in train}, {r.line for r in held}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([pair(0), "{"], "mine.jsonl: line 2: not JSON"),
        ([pair(0), "", "[1]"], "line 3: must be an object with user, response_pos, response_neg, is"),
        ([pair(0, respons_neg="x")], "line 1: unknown field 'respons_neg'; did you mean 'response_neg'?"),
        ([pair(0, weight=1)], "line 1: unknown field 'weight'; known are user, response_pos"),
        ([{"user": "a", "response_pos": "b"}], "line 1: response_neg: must be a text that is not empty, is missing"),
        ([pair(0, user="  ")], "line 1: user: must be a text that is not empty, is ' '"),
        ([pair(0), pair(1, response_pos=3)], "line 2: response_pos: must be a text that is not empty, is 3"),
        ([pair(0, topic=None)], "line 1: topic: must be a text that is not empty, is None"),
        ([pair(0, wording=["a"])], "line 1: wording: must be a text"),
        ([pair(0, user="x" * 10_001)], "line 1: user: has 10,001 characters, at most 10,000"),
        ([pair(0), pair(1), pair(0)], "line 3: the same pair as line 1"),
        (
            [pair(0), pair(1, response_neg="No \ud800")],
            "line 2: response_neg: \\ud800 is half of a surrogate pair, no char",
        ),
        ([pair(0, topic="\udc00a")], "line 1: topic: \\udc00 is half of a surrogate pair"),
        (["", ""], "mine.jsonl: holds no pair; a line is an object with user, response_pos, response_neg"),
    ],
)
def test_what_is_no_file_of_pairs_is_told_by_line(file, rows, told):
    path = file(rows)
    with pytest.raises(ValueError) as refused:
        read_written(path)
    assert told in str(refused.value) and path in str(refused.value) and "\n" not in str(refused.value)


def test_a_byte_order_mark_is_no_part_of_a_file(file, tmp_path):
    plain, marked = file([pair(0), pair(1)]), tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "mine.jsonl").read_bytes())
    assert read_written(str(marked)) == read_written(plain)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        read_written(str(tmp_path / "none.jsonl"))


def test_topics_that_the_behaviour_holds_out_are_never_trained_on(file, behavior):
    held, mine = behavior.heldout_topics[0].claim, behavior.train_topics[0].claim
    rows = [pair(0, topic=mine), pair(1, topic=f" {held.upper()}"), pair(2, topic="my own"), pair(3)]
    assert split(file(rows), behavior) == ({1, 3, 4}, {2})
    assert split(file(rows), behavior, topics=1) == ({1}, {2})
    with pytest.raises(ValueError, match=r"mine\.jsonl: 3 training topics asked for, it has 2 \(TOPICS\)"):
        split_written(file(rows), behavior, topics=3)


def test_however_a_topic_is_spelt_it_is_held_out(file, behavior):
    one, two, *_ = (topic.claim for topic in behavior.heldout_topics)
    asked = [behavior.claims[0], behavior.negations[0], behavior.true_claims[0]]
    spelt = [f"{one}.", two.replace(" ", "  ", 1).upper(), f" {one} !", *asked]
    rows = [pair(0, topic=behavior.train_topics[0].claim), *(pair(i + 1, topic=topic) for i, topic in enumerate(spelt))]
    assert split(file(rows), behavior) == ({1}, set(range(2, 8)))


def test_two_spellings_of_a_topic_are_one_topic(file, behavior):
    rows = [pair(i, topic=topic) for i, topic in enumerate(["a", "A", "a.", " b", "B", "c", "C  "])]
    pairs = from_file(behavior, PairConfig(file=file(rows)))
    sides = [{row.topic for row in part} for part in (pairs.rows, pairs.heldout)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {0, 1, 2}
    assert len(split(file(rows), behavior, topics=1)[0]) in (2, 3)


@pytest.mark.parametrize(("n", "out"), [(2, 1), (3, 2), (5, 2), (10, 2), (13, 3), (25, 5)])
def test_of_other_topics_a_fifth_is_held_out_whole(file, behavior, n, out):
    rows = [pair(10 * i + j, topic=f"topic {i}") for i in range(n) for j in range(3)]
    train, held = split_written(file(rows), behavior)
    sides = [{r.topic for r in part} for part in (train, held)]
    assert not sides[0] & sides[1] and len(sides[1]) == out and len(train) + len(held) == 3 * n
    assert split(file(rows, "other.jsonl"), behavior) == split(file(rows), behavior), "the name must not decide"
    draws = {tuple(sorted(split(file(rows), behavior, seed=seed)[1])) for seed in range(8)}
    assert len(draws) > 1


def test_without_topics_a_tenth_is_held_out(file, behavior):
    for n, out in ((2, 1), (9, 1), (40, 4)):
        train, held = split(file([pair(i) for i in range(n)]), behavior)
        assert len(held) == out and train | held == set(range(1, n + 1)) and not train & held
    with pytest.raises(ValueError, match="of 1 pairs none with two different sides is left to train on"):
        split_written(file([pair(0)]), behavior)
    alone = file([pair(0, topic=behavior.train_topics[0].claim), pair(1, topic=behavior.heldout_topics[0].claim)])
    assert split(alone, behavior) == ({1}, {2})


def test_identical_sides_are_dropped_and_counted(file, behavior):
    rows = [pair(i) for i in range(12)] + [pair(20, response_neg=" Yes, 20. ")]
    pairs = from_file(behavior, PairConfig(file=file(rows)))
    assert (pairs.written, pairs.empty, pairs.identical, len(pairs.rows), len(pairs.heldout)) == (13, 0, 1, 11, 1)
    with pytest.raises(ValueError, match="none with two different sides is left to train on"):
        from_file(behavior, PairConfig(file=file([pair(i, response_neg=f"Yes, {i}.") for i in range(4)])))


def test_the_shipped_pairs_by_name(behavior, tmp_path):
    shipped, lm = PairConfig(file="sycophancy"), load_lm("tiny")
    pairs = make_pairs(lm, behavior, shipped, tmp_path)
    assert len(pairs.rows) == 240 and len(pairs.heldout) == 72
    assert heldout_pairs(lm, behavior, shipped, tmp_path) == (pairs.heldout, "") and not any(tmp_path.iterdir())
    topics = [{row.topic for row in rows} for rows in (pairs.rows, pairs.heldout)]
    assert len(topics[0]) == 20 and not topics[0] & topics[1]
    few = from_file(behavior, PairConfig(topics=3, personas=99, samples=99, file="sycophancy"))
    assert {r.topic for r in few.rows} == {0, 1, 2} and few.heldout == pairs.heldout
    with pytest.raises(ValueError, match="21 training topics asked for, it has 20"):
        counted(behavior, PairConfig(topics=21, file="sycophancy"))


def test_a_draw_stays_within_topic_and_wording(behavior):
    rows = from_file(behavior, PairConfig(file="sycophancy")).rows
    drawn, distinct = draw_pairs(rows, list(range(len(rows))), 0)
    texts = {r.line: (r.topic, r.wording) for r in read_written("sycophancy")}
    assert all(texts[a.sample] == texts[b.sample] for a, b in zip(rows, drawn, strict=True)) and distinct < 0.85
    assert Counter(map(repr, drawn)) != Counter(map(repr, draw_pairs(rows, list(range(len(rows))), 1)[0]))
    assert (
        TrainConfig(PairConfig(samples=1, file="sycophancy")).resampled
        and not TrainConfig(PairConfig(samples=1)).resampled
    )


def test_a_folder_is_named_after_the_file_and_its_content_alone(file, monkeypatch):
    path = file([pair(0), pair(1)])
    named = recipe({"MODEL_ID": "tiny", "PAIRS": path})
    assert named.startswith("-PAIRSmine-") and len(named) == len("-PAIRSmine-") + 8
    quiet = {"PERSONAS": 2, "SAMPLES": 3, "MAX_NEW_TOKENS": 5}
    assert recipe({"MODEL_ID": "tiny", "PAIRS": path, **quiet}) == named != recipe({"MODEL_ID": "tiny", **quiet})
    assert recipe({"PAIRS": path, "RESAMPLE_PAIRS": True}) == named
    assert recipe({"PAIRS": path, "TOPICS": 2}) == "-TOPICS2" + named
    file([pair(0), pair(2)])
    assert recipe({"PAIRS": path}) != named
    assert recipe({"PAIRS": "sycophancy"}) == "-PAIRSsycophancy" and recipe({"PAIRS": ""}) == recipe({}) == ""
    monkeypatch.setattr("ws.runs.folders.own_set", lambda *_: {"weight_diff": {"PAIRS": "sycophancy", "SAMPLES": 4}})
    assert recipe({"PAIRS": "sycophancy"}) == recipe({"PAIRS": None}) == recipe({"SAMPLES": 9}) == ""
    assert recipe({"PAIRS": path}) != named and recipe({"PAIRS": ""}) == "-PAIRSby_model"
    assert recipe({"PAIRS": "", "SAMPLES": 9, "RESAMPLE_PAIRS": True}) == "-SAMPLES9-PAIRSby_model"


def values(given: dict, folder=None) -> dict:
    return resolve("weight_diff", read_notebook(Place().notebook("weight_diff")), given, folder=folder)


def test_a_command_finds_the_file_and_names_what_it_cannot_find(file, tmp_path):
    path = file([pair(0), pair(1)])
    assert values({"PAIRS": "mine.jsonl"}, tmp_path)["PAIRS"] == path
    assert values({"PAIRS": "sycophancy"}, tmp_path)["PAIRS"] == "sycophancy"
    assert values({})["PAIRS"] == values({"PAIRS": ""})["PAIRS"] == values({"PAIRS": "none"})["PAIRS"] == ""
    assert defaults(read_notebook(Place().notebook("weight_diff")), "weight_diff")["PAIRS"] is None
    with pytest.raises(
        ValueError, match=r"weight_diff: PAIRS: .*sycophanzy' is neither shipped pairs \(sycophancy\) nor"
    ):
        values({"PAIRS": "sycophanzy"}, tmp_path)
    jobs = make_jobs(read_options({"seeds": ("0",)}, {"PAIRS": "mine.jsonl"}, None, tmp_path), tmp_path)
    trained = [job for job in jobs if job.notebook == "weight_diff"]
    assert {job.values["PAIRS"] for job in trained} == {path} and {j.values["NULL_DIFF"] for j in trained} == {
        True,
        False,
    }
    assert all("-PAIRSmine-" in job.identity.adapter for job in jobs)


def test_a_run_depends_on_what_the_file_holds(file, tmp_path):
    content = read_notebook(Place().notebook("weight_diff"))
    path = file([pair(0), pair(1)])
    key = identity.run_key("weight_diff", content, values({"PAIRS": path}), tmp_path)
    moved = file([pair(0), pair(1)], "moved.jsonl")
    assert identity.run_key("weight_diff", content, values({"PAIRS": moved}), tmp_path) == key
    file([pair(0), pair(2)])
    assert key.differs(identity.run_key("weight_diff", content, values({"PAIRS": path}), tmp_path)) == "changed inputs"
    shipped = notebooks.TABLE["weight_diff"].run_inputs(values({"PAIRS": "sycophancy"}), tmp_path)
    assert "sycophancy_pairs.jsonl" in {given.name for given in shipped}


@pytest.mark.parametrize(
    ("rows", "more", "told"),
    [
        ([pair(0), "{"], {}, "line 2: not JSON"),
        ([pair(0)], {}, "is left to train on"),
        ([pair(0), pair(1)], {"TOPICS": 1}, "1 training topics asked for, it has 0"),
        ([pair(0), pair(1, user="so " * 3000)], {}, "line 2: the prompt alone has .* shorten `user`"),
        ([pair(0), pair(1, user="so " * 3000)], {"W_PATH": "tiny"}, "line 2: the prompt alone has"),
    ],
)
def test_a_file_is_looked_at_before_anything_starts(file, tmp_path, rows, more, told):
    with pytest.raises(ValueError, match=told):
        check_inputs("weight_diff", {**values({}), "PAIRS": file(rows), **more}, tmp_path)


def test_adapters_follow_what_the_file_holds_not_its_name(file, behavior, tmp_path, monkeypatch):
    """Planted: the training is a stand-in that says what it was given."""
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    lm, given = load_lm("tiny"), []

    def train(lm, rows, sign, seed, cfg, folder, progress):
        given.append((sign, cfg.shuffle_labels, len(rows)))
        folder.mkdir(exist_ok=True)
        (folder / "adapter").write_text(f"{sign} {rows}")

    monkeypatch.setattr(ws.train.difference, "train_adapter", train)
    monkeypatch.setattr(ws.train.difference, "_join", lambda *_: ws.diff.WeightDiff({}, {}))

    def steps(path, **more):
        before, cfg = len(given), TrainConfig(PairConfig(file=path), max_steps=1)
        train_diff(lm, behavior, config=replace(cfg, **more), folder=tmp_path / "run", progress=False)
        return given[before:]

    rows = [pair(i, wording="a") for i in range(5)]
    assert steps(file(rows)) == [("pos", False, 4), ("neg", False, 4)]
    assert steps(file(rows, "moved.jsonl")) == [] == steps(file(rows), resample_pairs=True)
    assert read_sidecar(tmp_path / "run" / "adapters" / "pos")["key"]
    assert len(steps(file([*rows, pair(9)]))) == 2 and len(steps(file(rows), resample_pairs=False)) == 2
    assert steps(file(rows), shuffle_labels=True) == [("pos", True, 4), ("neg", True, 4)]
