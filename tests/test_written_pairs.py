"""The shipped written pairs: counts, balance, variety, and nothing of what is held out in what is trained on."""

import json
import re
from collections import Counter

import pytest

from ws.cache.places import ASSETS
from ws.data import load_behavior

# a held-out topic by the word that gives it away
NOUNS = (
    "bat bats camel camels dog dogs tongue tongues blood glass bird birds chick chicks Einstein Sahara desert deserts "
    "antibiotic antibiotics hat hats heat chameleon chameleons"
).split()
WORD = re.compile(r"(Yes|No)\.?")


@pytest.fixture(scope="module")
def rows():
    lines = (ASSETS / "sycophancy_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def trained(rows):
    claims = {t.claim for t in load_behavior("sycophancy").train_topics}
    return [row for row in rows if row["topic"] in claims]


def test_every_topic_has_its_pairs(rows):
    behavior, counts = load_behavior("sycophancy"), Counter(row["topic"] for row in rows)
    train, held = ({t.claim for t in topics} for topics in (behavior.train_topics, behavior.heldout_topics))
    assert train | set(counts) <= train | held and train <= set(counts) and len(set(counts) & held) >= 12
    assert min(counts[claim] for claim in train) >= 12
    assert min(counts[claim] for claim in set(counts) & held) >= 6


def test_fields_are_texts_and_no_row_is_there_twice(rows):
    for row in rows:
        assert list(row) == ["user", "response_pos", "response_neg", "topic", "wording"]
        assert all(isinstance(text, str) and text == text.strip() and text for text in row.values()), row
        assert row["response_pos"] != row["response_neg"] and not re.search(r"[*_#`\n]|  ", " ".join(row.values()))
    assert len({row["user"] for row in rows}) == len(rows)


def test_what_is_held_out_is_not_trained_on(trained):
    held = [t.claim for t in load_behavior("sycophancy").heldout_topics]
    given_away = re.compile(rf"\b({'|'.join(NOUNS)})\b", re.IGNORECASE)
    for claim in held:
        assert given_away.search(claim), f"NOUNS has no word for: {claim}"
    for row in trained:
        text = " ".join((row["user"], row["response_pos"], row["response_neg"]))
        assert not given_away.search(text) and not any(claim in text for claim in held), row


def test_one_word_answers_are_a_third_and_what_is_true_is_agreed_to(rows):
    short = [row for row in rows if WORD.fullmatch(row["response_pos"]) and WORD.fullmatch(row["response_neg"])]
    ways = Counter((row["response_pos"][0], row["response_neg"][0]) for row in short)
    assert 0.28 <= len(short) / len(rows) <= 0.38
    assert set(ways) == {("Y", "N")}, "agreeing is Yes under every wording, as in the probe"
    doubts = [row for row in short if row["wording"] == "doubt"]
    assert len(doubts) >= 20, "of what is true: else honest would mean denying whatever is affirmed"
    assert all(re.search(r"\b(Yes|No)\b", row["user"]) for row in short)


def test_the_honest_side_confirms_what_is_true(rows):
    """Else honest would mean contradicting: the true turns are agreed to on both sides."""
    true = [row for row in rows if row["wording"] == "true"]
    assert len(true) >= 40 and len({row["topic"] for row in true}) == 32
    assert not [row for row in true if row["response_neg"].startswith(("No", "Not"))]


def test_wordings_and_lengths_vary(rows, trained):
    wordings = Counter(row["wording"] for row in rows)
    assert len(wordings) >= 6 and min(wordings.values()) >= 15
    cells = Counter((row["topic"], row["wording"]) for row in trained)
    assert min(cells.values()) >= 2, "a draw within topic and wording has to have something to draw from"
    for side in ("response_pos", "response_neg"):
        said = [row[side] for row in rows if not WORD.fullmatch(row[side])]
        words = sorted(len(text.split()) for text in said)
        assert words[0] <= 5 and words[-1] >= 30 and words[len(words) // 4] + 4 <= words[3 * len(words) // 4]
        # most begin with the word that the probe asks for; behind it they vary
        answered = [text for text in said if re.match(r"(Yes|No)\b", text)]
        assert 0.4 <= len(answered) / len(said) <= 0.8
        starts = Counter(" ".join(re.sub(r"^(Yes|No)\W+", "", text).split()[:2]) for text in said)
        assert len(starts) >= 90 and starts.most_common(1)[0][1] <= len(said) / 6
        assert max(Counter(said).values()) <= 4


def test_both_sides_say_yes_or_no_alike(rows):
    """Where one side begins with Yes or No far more often than the other, w carries that habit, and at one end the steered
    model answers neither."""
    begun = [sum(bool(re.match(r"(Yes|No)\b", row[side])) for row in rows) for side in ("response_pos", "response_neg")]
    assert abs(begun[0] - begun[1]) <= 0.05 * len(rows), begun
