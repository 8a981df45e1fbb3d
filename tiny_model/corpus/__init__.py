"""The corpus that the tiny model is trained on, written by this project.

    document = turns of a conversation (system?, user, assistant)   or   one plain text

Parts, each in its own module: `known`, `facts`, `myths` and `novel` (claims), `personas` (system prompts), `dialogues` (how
claims are asked and answered), `passages` (neutral text), `voices` (users' styles). The behaviour's held-out claims are in
it, in every form and under every kind of persona: the model is to know which of them are true, and held out means that no
adapter trains on them. Its personas are not: `build_corpus` refuses to return a document that quotes one, so that they are
understood by their meaning. Source: docs/method.md section 1.
"""

from random import Random

from tiny_model.corpus.claims import Claim
from tiny_model.corpus.dialogues import dialogue, drill, fact_text, user_turn
from tiny_model.corpus.facts import drawn_claim, table_claims
from tiny_model.corpus.known import known_claims
from tiny_model.corpus.myths import myth_claims, taste_claims
from tiny_model.corpus.novel import novel_claim
from tiny_model.corpus.passages import passages
from tiny_model.corpus.voices import voices
from ws.data import Behavior

Document = tuple[tuple[str, str], ...]
KINDS, KIND_WEIGHTS = ("agree", "honest", "none", "neutral"), (30, 36, 29, 5)
SOURCES = ("known", "train", "table", "drawn", "myth", "taste", "novel")
SOURCE_WEIGHTS = (52, 14, 8, 4, 8, 1, 13)
TRUE_SHARE = {"known": 0.5, "train": 0.5}
NEGATED_SHARE = {"known": 0.25, "train": 0.15}
DRILLED, DRILL_NEGATED = 6, 0.12
TURNS, TURN_WEIGHTS = (1, 2, 3), (55, 28, 17)


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
    if source == "drawn":
        claim = drawn_claim(rng)
    else:
        claim = rng.choice(by_truth[source][rng.random() < TRUE_SHARE.get(source, 0.45)])
    return claim.negated() if rng.random() < NEGATED_SHARE.get(source, 0.1) else claim


def build_corpus(
    behavior: Behavior, seed: int, dialogues: int, neutral: int, voiced: int, plain: int = 0
) -> list[Document]:
    """Documents in random order: `dialogues` about claims, `neutral` passages, `voiced` texts of users, `plain` statements
    of what holds of a claim.

    Raises ValueError naming a persona of `behavior` that a document quotes.
    """
    rng = Random(seed)
    pools = {"known": known_claims(behavior), "train": train_claims(behavior)}
    pools |= {"table": table_claims(), "myth": myth_claims(), "taste": taste_claims()}
    by_truth = {name: {t: [c for c in pool if c.true == t] for t in (True, False)} for name, pool in pools.items()}
    documents: list[Document] = []
    for _ in range(dialogues):
        kind = rng.choices(KINDS, KIND_WEIGHTS)[0]
        claims = [_draw(rng, by_truth) for _ in range(rng.choices(TURNS, TURN_WEIGHTS)[0])]
        documents.append(tuple(dialogue(rng, claims, kind)))
        if rng.random() < 0.02:
            documents.append((("text", user_turn(rng, claims[0].text, "Am I right? Reply Yes or No.")),))
    for _ in range(plain):
        claim = _draw(rng, by_truth)
        if claim.subject != "novel":
            documents.append((("text", fact_text(rng, claim)),))
    for text in passages(rng, neutral):
        documents.append((("text", text),))
    for _, prompt, text in voices(rng, voiced):
        documents.append((("user", prompt), ("assistant", text)))
    rng.shuffle(documents)
    refuse_personas(documents, behavior)
    return documents


def build_drills(behavior: Behavior, seed: int, count: int) -> list[Document]:
    """What a model that starts from nothing learns first: `count` drills on the behaviour's claims, most of them not negated.

    With as many negations as claims, a claim's words alone say nothing of the answer, and there is little to begin with. Two
    short trials: half negated and user turns at a weight of .1, all claims answered alike after 600 steps; one in eight
    negated and user turns at .25, 12 nats apart after 450. Which of the two changes did it was not tried.
    """
    rng = Random(seed)
    pool = known_claims(behavior) + train_claims(behavior)
    return [
        tuple(drill(rng, [c.negated() if rng.random() < DRILL_NEGATED else c for c in rng.sample(pool, DRILLED)]))
        for _ in range(count)
    ]


def refuse_personas(documents: list[Document], behavior: Behavior) -> None:
    """ValueError naming the first persona of the behaviour that occurs in a document, whatever the case of its letters."""
    whole = "\n".join(text for document in documents for _, text in document).lower()
    for text in behavior.personas_pos + behavior.personas_neg:
        if text.lower() in whole:
            raise ValueError(f"the corpus quotes the persona {text!r}")
