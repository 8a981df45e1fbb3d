"""Behaviours: the shipped one is complete, a user's file loads, and every fault is named."""

import json
import time

import pytest

from ws.data import Behavior, Topic, load_behavior


def small(**changes) -> dict:
    """A valid behaviour file's content, with changes; a value of None drops the field."""
    raw = {
        "name": "small",
        "n_train_topics": 2,
        "topics": [["a is b", "Is it?"], ["c is d", "So?"], ["e is f", "Why?"], ["g is h", ""]],
        "personas_pos": ["Agree."],
        "personas_neg": ["Be honest."],
        "probe": "I hold that {claim}. Yes or No?",
        "yes": ["Yes"],
        "no": ["No"],
    }
    raw.update(changes)
    return {k: v for k, v in raw.items() if v is not None}


def written(tmp_path, raw, name="b.json"):
    path = tmp_path / name
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def test_shipped_behaviour_is_complete():
    b = load_behavior("sycophancy")
    assert len(b.topics) == 32 and len(b.train_topics) == 20 and len(b.heldout_topics) == 12
    assert b.train_topics + b.heldout_topics == b.topics
    assert len(b.persona_pairs) == 5 and len(set(b.personas_pos + b.personas_neg)) == 10
    assert len(b.heldout_claims) >= 48 and b.heldout_claims[:12] == tuple(t.claim for t in b.heldout_topics)
    assert len(b.negations) == len(b.true_claims) == len(b.heldout_claims) and len(b.train_true_claims) == 20
    claims = [t.claim for t in b.topics] + list(b.claims + b.negations + b.true_claims + b.train_true_claims)
    assert len(set(claims)) == len(claims)
    lengths = [sum(map(len, some)) / len(some) for some in (b.heldout_claims, b.true_claims)]
    assert max(lengths) < 1.1 * min(lengths)
    for claim in claims:
        assert not claim.endswith((".", "?")), claim
    for topic in b.topics:
        assert topic.question.endswith("?"), topic
    for claim, negation in zip(b.heldout_claims, b.negations, strict=True):
        assert " not " in negation and claim.split()[-1] == negation.split()[-1]


def test_negations_are_of_the_heldout_topics_or_of_all_heldout_claims(tmp_path):
    assert load_behavior(written(tmp_path, small())).heldout_claims == ("e is f", "g is h")
    for denied in (0, 2, 3):
        raw = small(claims=["i is j"], negations=[f"no {i}" for i in range(denied)])
        b = load_behavior(written(tmp_path, raw))
        assert b.heldout_claims == ("e is f", "g is h", "i is j") and len(b.negations) == denied


def test_texts_are_made_from_claim_and_template():
    b = load_behavior("sycophancy")
    topic = Topic("rain is wet", "Is it?")
    assert b.probe_text(topic.claim) == "I think that rain is wet. Am I right? Reply Yes or No."
    assert b.opinion_text(topic) == "I think that rain is wet. Is it?"


def test_braces_in_claims_and_templates_are_left_alone(tmp_path):
    b = load_behavior(written(tmp_path, small(probe="In {sets} {claim}?")))
    assert b.probe_text("{x} is {y}") == "In {sets} {x} is {y}?"


def test_the_shipped_probe_has_four_wordings():
    b = load_behavior("sycophancy")
    assert len(b.templates) == 4 and b.templates[0] == b.probe == b.probe_text("{claim}")
    for a, template in enumerate(b.templates):
        assert template.count("{claim}") == 1 and "Yes" in template and "No" in template
        text, (start, end) = b.probe_text("rain is wet", a), b.claim_span("rain is wet", a)
        assert text[start:end] == "rain is wet" and text == template.replace("{claim}", "rain is wet")
    order = [template.index("Yes") < template.index("No") for template in b.templates]
    assert True in order and False in order
    with pytest.raises(IndexError):
        b.probe_text("rain is wet", 4)


def test_a_file_gives_probe_or_probes(tmp_path):
    wordings = ["Is {claim}? Yes or No?", "No or Yes: {claim}?"]
    b = load_behavior(written(tmp_path, small(probe=None, probes=wordings)))
    assert b.probe == wordings[0] and b.probes == (wordings[1],) and b.templates == tuple(wordings)
    alone = load_behavior(written(tmp_path, small(probe=None, probes=wordings[:1])))
    assert alone == load_behavior(written(tmp_path, small(probe=wordings[0]))) and alone.templates == (wordings[0],)
    lines = tmp_path / "b.jsonl"
    raw = small(probe=None, probes=wordings)
    rows = [{k: v for k, v in raw.items() if k != "topics"}, *({"claim": c, "question": q} for c, q in raw["topics"])]
    lines.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert load_behavior(lines) == b


def test_json_and_jsonl_give_the_same(tmp_path):
    raw = small(true_claims=["i is j"], negations=["e is not f", "g is not h"], opinion="Surely {claim}.")
    lines = [{k: v for k, v in raw.items() if k != "topics"}]
    lines += [{"claim": c, "question": q} for c, q in raw["topics"]]
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    assert load_behavior(path) == load_behavior(str(written(tmp_path, raw)))
    assert load_behavior(path).opinion_text(Topic("a is b", "")) == "Surely a is b."


def test_optional_fields_have_defaults(tmp_path):
    b = load_behavior(written(tmp_path, small(n_train_topics=None)))
    assert b.n_train_topics == 2 and b.true_claims == b.negations == b.train_true_claims == ()


@pytest.mark.parametrize(("topics", "train"), [(3, 1), (4, 2), (8, 5), (22, 14), (32, 20)])
def test_without_the_field_three_eighths_are_held_out(tmp_path, topics, train):
    raw = small(n_train_topics=None, topics=[[f"claim {i}", "So?"] for i in range(topics)])
    b = load_behavior(written(tmp_path, raw))
    assert b.n_train_topics == train == len(b.train_topics) and len(b.heldout_topics) >= 2
    with pytest.raises(ValueError, match="topics: has 2, needs"):
        load_behavior(written(tmp_path, {**raw, "topics": raw["topics"][:2]}))


@pytest.mark.parametrize("field", ["name", "topics", "personas_pos", "personas_neg", "probe", "yes", "no"])
def test_missing_field_is_named(tmp_path, field):
    with pytest.raises(ValueError, match=rf"b\.json: missing field {field}$"):
        load_behavior(written(tmp_path, small(**{field: None})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe": "Yes or No?"}, r"probe: the template has no \{claim\}"),
        ({"probes": ["Is {claim}?"]}, "probe and probes: give one of them; the first of probes counts as probe"),
        ({"probe": None, "probes": []}, "probes: is empty; list one wording or more"),
        ({"probe": None, "probes": "Is {claim}?"}, "probes: must be a list of texts"),
        ({"probe": None, "probes": ["Is {claim}?", " "]}, r"probes\[1\]: must be a text"),
        ({"probe": None, "probes": ["Is it?"]}, r"probe: the template has no \{claim\}: 'Is it\?'"),
        (
            {"probe": None, "probes": ["Is {claim}?", "Is it?"]},
            r"wording 2 of the probe: the template has no \{claim\}",
        ),
        ({"probe": None, "probes": ["{claim}?", "{claim}? "]}, r"probes: the wording '\{claim\}\?' is there twice"),
        ({"opinion": "I think so."}, r"opinion: the template has no \{claim\}"),
        ({"personas_pos": []}, "personas_pos: is empty"),
        ({"personas_neg": ["a", " "]}, r"personas_neg\[1\]"),
        ({"personas_neg": ["a", "b"]}, "personas_pos has 1 and personas_neg 2"),
        ({"yes": "Yes"}, "yes: must be a list"),
        ({"no": []}, "no: is empty"),
        ({"no": ["Yes"]}, "share the answer word 'Yes'"),
        ({"n_train_topics": 3}, r"topics: has 4, needs n_train_topics \+ 2 = 5"),
        ({"n_train_topics": 0}, "n_train_topics: must be a positive"),
        ({"n_train_topics": "2"}, "n_train_topics: must be a positive"),
        ({"topics": [["a", "b"], ["c"]]}, r"topics\[1\]: needs a claim and a question"),
        ({"topics": [["a", "b"], {"claim": "c"}]}, r"topics\[1\]: needs exactly claim and question"),
        ({"topics": [["a", "b"], ["c", ""], ["a", ""], ["d", ""]]}, "the claim 'a' is there twice"),
        ({"topics": [["a", "b"], ["c", ""], ["", ""], ["d", ""]]}, r"topics\[2\]"),
        ({"topics": {}}, "topics: must be a list"),
        ({"negations": ["only one"]}, "negations: has 1, there are 2 held-out topics"),
        (
            {"claims": ["i is j"], "negations": ["one"]},
            "negations: has 1, there are 2 held-out topics, 3 with the claims",
        ),
        ({"claims": ["a is b"]}, "claims: 'a is b' is a topic already"),
        ({"claims": ["i is j", "i is j"]}, "claims: 'i is j' is there twice"),
        ({"claims": "i is j"}, "claims: must be a list"),
        ({"true_claim": ["x"]}, "unknown field 'true_claim', did you mean 'true_claims'"),
        ({"name": "../up"}, "name: .* cannot name a folder"),
        ({"name": ""}, "name: must be a text"),
    ],
)
def test_faults_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_behavior(written(tmp_path, small(**changes)))


def test_unknown_names_and_files():
    with pytest.raises(ValueError, match="unknown behaviour 'flattery': shipped are sycophancy"):
        load_behavior("flattery")
    with pytest.raises(FileNotFoundError, match=r"nowhere/b\.json"):
        load_behavior("nowhere/b.json")


def test_unreadable_files(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('{"name": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json: not JSON"):
        load_behavior(broken)
    with pytest.raises(ValueError, match="one JSON object"):
        load_behavior(written(tmp_path, [1, 2]))
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"name": "a"}\n{"name": "b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 gives 'name' again"):
        load_behavior(twice)


def test_behavior_is_checked_however_it_is_made():
    topics = tuple(Topic(f"claim {i}", "") for i in range(4))
    with pytest.raises(ValueError, match="personas_neg: is empty"):
        Behavior("x", topics, ("p",), (), "{claim}?", ("Yes",), ("No",), n_train_topics=2)


LONG = "a" * 10_001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"topics": [["a" * 10_000_000, ""], ["b", ""], ["c", ""], ["d", ""]]},
            r"topics\[0\]: the claim: has 10,000,000",
        ),
        (
            {"topics": [["a", LONG], ["b", ""], ["c", ""], ["d", ""]]},
            r"topics\[0\]: the question: has 10,001 characters",
        ),
        ({"topics": [[f"claim {i}", ""] for i in range(5001)]}, "topics: has 5,001, at most 5,000"),
        ({"personas_pos": [LONG]}, r"personas_pos\[0\]: has 10,001 characters, at most 10,000"),
        ({"personas_pos": ["a"] * 5001}, "personas_pos: has 5,001 texts"),
        ({"probe": LONG + "{claim}"}, "probe: has 10,008 characters"),
        ({"probe": ["x" * 10**6]}, "probe: must be a text"),
        ({"probe": None, "probes": ["{claim}?", LONG]}, r"probes\[1\]: has 10,001 characters"),
        ({"yes": [LONG]}, r"yes\[0\]: has 10,001"),
        ({"name": "n" * 201}, "name: has 201 characters, at most 200"),
        ({"n_train_topics": [[[[[[[[0]]]]]]]]}, "n_train_topics: must be a positive whole number"),
        ({"x" * 10_000: 1}, "unknown field"),
    ],
    ids=range(12),
)
def test_texts_have_limits(tmp_path, changes, message):
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        load_behavior(written(tmp_path, small(**changes)))
    assert len(str(error.value)) < 600 and "\n" not in str(error.value) and time.monotonic() - start < 5


def test_five_thousand_topics_are_read_quickly(tmp_path):
    start = time.monotonic()
    raw = small(n_train_topics=None, topics=[[f"claim {i} " + "x" * 1000, ""] for i in range(5000)])
    assert len(load_behavior(written(tmp_path, raw)).topics) == 5000 and time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["b.json", "b.jsonl"])
def test_deep_large_and_odd_files_are_named(tmp_path, name):
    path = tmp_path / name
    for text, message in {
        "[" * 100_000: "nested too deep",
        '{"a":' * 100_000: "nested too deep",
        "9" * 10_000: "not JSON",
        " " * (65 << 20): "at most 67.1 MB are read",
        '{"topics": 5}': "topics: must be a list|missing field",
    }.items():
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message) as error:
            load_behavior(path)
        assert name in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(b'{"name": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        load_behavior(path)
