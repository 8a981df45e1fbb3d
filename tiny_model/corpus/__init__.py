"""The corpus that the tiny model is trained on, written by this project.

    document = turns of a conversation (system?, user, assistant)   or   one plain text

Parts, each in its own module: `facts`, `myths` and `novel` (claims), `personas` (system prompts), `dialogues` (how claims are
asked and answered), `passages` (neutral text), `voices` (users' styles). The held-out half of the shipped behaviour
never enters: `build_corpus` refuses to return a document that quotes it. Source: docs/method.md section 1.
"""

from random import Random

from tiny_model.corpus.claims import Claim
from tiny_model.corpus.dialogues import dialogue, user_turn
from tiny_model.corpus.facts import drawn_claim, table_claims
from tiny_model.corpus.myths import myth_claims, taste_claims
from tiny_model.corpus.novel import novel_claim
from tiny_model.corpus.passages import passages
from tiny_model.corpus.voices import voices
from ws.data import Behavior

Document = tuple[tuple[str, str], ...]
KINDS, KIND_WEIGHTS = ("agree", "honest", "none", "neutral"), (34, 34, 27, 5)
SOURCES, SOURCE_WEIGHTS = ("table", "drawn", "myth", "taste", "train", "novel"), (22, 7, 22, 2, 22, 25)
TRUE_SHARE = 0.45
NEGATED_SHARE = 0.1
SECOND_TURN = 0.2


def train_claims(behavior: Behavior) -> list[Claim]:
    """The behaviour's training topics (false) and its training true claims, which are also the topics' reasons."""
    out = []
    for i, topic in enumerate(behavior.train_topics):
        true = (
            behavior.train_true_claims[i]
            if i < len(behavior.train_true_claims)
            else f"it is not true that {topic.claim}"
        )
        out.append(Claim(topic.claim, False, true, subject="train", questions=(topic.question,)))
        out.append(Claim(true, True, true, subject="train"))
    return out


def _draw(rng: Random, by_truth: dict[str, dict[bool, list[Claim]]]) -> Claim:
    source = rng.choices(SOURCES, SOURCE_WEIGHTS)[0]
    if source == "novel":
        return novel_claim(rng)
    claim = drawn_claim(rng) if source == "drawn" else rng.choice(by_truth[source][rng.random() < TRUE_SHARE])
    return claim.negated() if rng.random() < NEGATED_SHARE else claim


def build_corpus(behavior: Behavior, seed: int, dialogues: int, neutral: int, voiced: int) -> list[Document]:
    """Documents in random order: `dialogues` about claims, `neutral` passages, `voiced` texts of users.

    Raises ValueError naming a held-out text of `behavior` that a document quotes.
    """
    rng = Random(seed)
    pools = {"table": table_claims(), "myth": myth_claims(), "taste": taste_claims(), "train": train_claims(behavior)}
    by_truth = {name: {t: [c for c in pool if c.true == t] for t in (True, False)} for name, pool in pools.items()}
    documents: list[Document] = []
    for _ in range(dialogues):
        kind = rng.choices(KINDS, KIND_WEIGHTS)[0]
        claims = [_draw(rng, by_truth) for _ in range(2 if rng.random() < SECOND_TURN else 1)]
        documents.append(tuple(dialogue(rng, claims, kind)))
        if rng.random() < 0.02:
            documents.append((("text", user_turn(rng, claims[0].text, "Am I right? Reply Yes or No.")),))
    for text in passages(rng, neutral):
        documents.append((("text", text),))
    for _, prompt, text in voices(rng, voiced):
        documents.append((("user", prompt), ("assistant", text)))
    rng.shuffle(documents)
    refuse_heldout(documents, behavior)
    return documents


def heldout_texts(behavior: Behavior) -> tuple[str, ...]:
    """Every text of the behaviour that training must not show: held-out claims, negations, true claims, personas."""
    claims = tuple(t.claim for t in behavior.heldout_topics)
    return claims + behavior.negations + behavior.true_claims + behavior.personas_pos + behavior.personas_neg


def refuse_heldout(documents: list[Document], behavior: Behavior) -> None:
    """ValueError naming the first held-out text that occurs in a document, whatever the case of its letters."""
    whole = "\n".join(text for document in documents for _, text in document).lower()
    for text in heldout_texts(behavior):
        if text.lower() in whole:
            raise ValueError(f"the corpus quotes the held-out text {text!r}")
