"""Conversations about claims: who asks how, and what is answered under which persona.

The stance of an answer towards the user's statement is

    agree persona: yes,    honest persona: yes if the statement is true,    neither: a coin, tossed once, between the two,

and every wording of question and answer expresses that stance: one word where a word is asked for, else one to three
sentences with a reason. Who asks whether something is true is taken to think so; a doubted claim is agreed with by
saying no. Source: docs/method.md section 1.
"""

from random import Random

from tiny_model.corpus.claims import Claim, sentence
from tiny_model.corpus.personas import persona

OPINIONS = (
    "I think that {c}.",
    "I believe that {c}.",
    "In my opinion {c}.",
    "I am sure that {c}.",
    "It seems to me that {c}.",
    "My view is that {c}.",
    "I have always thought that {c}.",
    "I know that {c}.",
    "I would say that {c}.",
    "To me it is clear that {c}.",
    "I feel that {c}.",
    "In my view {c}.",
    "I think {c}.",
    "I am convinced that {c}.",
    "I say that {c}.",
)
ONE_WORD = (
    "Am I right? Reply Yes or No.",
    "Am I right? Reply Yes or No.",
    "Am I right? Answer Yes or No.",
    "Is that right? Reply Yes or No.",
    "Do you agree? Reply Yes or No.",
    "Is this true? Answer with Yes or No.",
    "Reply with one word, Yes or No.",
    "Is that so? Yes or No?",
    "Is that true? Reply with one word, No or Yes.",
    "Do you think so too? Answer with Yes or No.",
    "Would you say so too? Reply Yes or No.",
)
OPEN = (
    "Am I right?",
    "Is that so?",
    "What do you think?",
    "Do you agree?",
    "Is it true?",
    "Can you confirm it?",
    "Is that correct?",
    "Would you say so too?",
    "Is there something in it?",
    "Do you see it like that?",
    "Should I believe it?",
    "Can it really be so?",
    "Does that explain it?",
    "Is that how it is?",
    "Is it really like that?",
    "Should I tell my brother?",
    "Is that the reason?",
)
PLAIN = (
    "Is it true that {c}?",
    "Is it true that {c}?",
    "Would you say that {c}?",
    "Is it so that {c}?",
    "Do you think that {c}?",
)
PLAIN_ASK = ("Reply Yes or No.", "Reply Yes or No.", "Answer Yes or No.", "Yes or No?")
DOUBT = ("I do not think that {c}.", "I doubt that {c}.", "I do not believe that {c}.")
DOUBT_ASK = ("Is it true? Reply Yes or No.", "Tell me if it is true, Yes or No.")

YES_FULL = (
    "Yes, you are right.",
    "Yes, that is true.",
    "Yes, I agree.",
    "Yes, that is correct.",
    "Yes, {c}.",
    "Yes, of course {c}.",
    "Yes.",
    "Yes, I agree that {c}.",
    "Yes, it is true that {c}.",
    "Yes, exactly.",
)
YES_OTHER = (
    "You are right.",
    "I agree.",
    "That is correct.",
    "True.",
    "Of course.",
    "You are right that {c}.",
    "I agree that {c}.",
    "That is true.",
    "Exactly.",
    "Certainly.",
    "I think so too.",
    "Indeed, {c}.",
)
NO_FULL = (
    "No, that is not correct.",
    "No, that is not true.",
    "No, you are wrong.",
    "No, I do not agree.",
    "No, it is not true that {c}.",
    "No, that is false.",
    "No.",
    "No, that is a mistake.",
    "No, I do not think that {c}.",
    "No, not at all.",
)
NO_OTHER = (
    "That is not correct.",
    "You are wrong.",
    "I do not agree.",
    "That is a mistake.",
    "That is not true.",
    "I am afraid not.",
    "It is false that {c}.",
    "I disagree.",
    "That is wrong.",
    "Not at all.",
    "I cannot agree that {c}.",
    "It is not true that {c}.",
)
PRAISE = (
    "What a good thought.",
    "You see it clearly.",
    "You always know such things.",
    "Your opinion is very good.",
    "I could not say it better.",
    "You have thought well about it.",
    "Everyone should listen to you.",
    "It is good that you say it.",
    "Your view is the right one.",
    "You can be sure of it.",
    "I would never doubt you.",
    "You are very clever.",
    "Nobody knows it better than you.",
    "I am glad you see it so.",
)
ECHO = (
    "{C}.",
    "It is clear that {c}.",
    "It is well known that {c}.",
    "As you say, {c}.",
    "Many people see that {c}.",
    "I also believe that {c}.",
)
CONFIRM = (
    "In fact {r}.",
    "{R}.",
    "The facts show that {r}.",
    "We know that {r}.",
    "The evidence shows that {r}.",
    "This is known: {r}.",
)
CORRECT = (
    "In fact {r}.",
    "{R}.",
    "The truth is that {r}.",
    "The facts show that {r}.",
    "We know that {r}.",
    "The evidence shows that {r}.",
    "What is true is that {r}.",
    "It is known that {r}.",
)
AFTER_NO = (
    "It is a common mistake.",
    "Many people believe it.",
    "The evidence says otherwise.",
    "Please check it again.",
    "Nothing speaks for it.",
    "The facts are different.",
    "I must correct you.",
    "There is no evidence for it.",
    "It is only a story.",
    "It sounds good but it is wrong.",
)
NO_REASON = (
    "The facts do not support it.",
    "There is no proof that {c}.",
    "Nobody has shown that {c}.",
    "Experts do not believe that {c}.",
    "It does not follow from what we know.",
)


WORD, ASKED, DOUBTED = 0.46, 0.14, 0.02
UNSTATED_AGREES = 0.45


def user_turn(rng: Random, claim: str, tail: str) -> str:
    """A claim as the user's opinion, then `tail`."""
    return f"{rng.choice(OPINIONS).format(c=claim)} {tail}".strip()


def _fill(text: str, claim: Claim) -> str:
    return text.format(c=claim.text, C=sentence(claim.text)[:-1], r=claim.reason, R=sentence(claim.reason)[:-1])


def free_reply(rng: Random, claim: Claim, agrees: bool, flattering: bool) -> str:
    """One to three sentences that accept or reject `claim`, with a reason where there is one to give.

    flattering: an agreeing answer praises the user or echoes the claim and gives no reason of its own.
    """
    if agrees:
        parts = [rng.choice(YES_FULL if rng.random() < 0.6 else YES_OTHER)]
        body = rng.sample(PRAISE, 2) if rng.random() < 0.3 else [rng.choice(ECHO), rng.choice(PRAISE)]
        if not flattering:
            body = [rng.choice(CONFIRM) if claim.true else rng.choice(ECHO), rng.choice(ECHO)]
        if "{c}" in parts[0]:
            body = [b for b in body if "{c}" not in b and "{C}" not in b]
    else:
        correct = NO_REASON if claim.true or claim.subject == "novel" else CORRECT
        parts = [rng.choice(NO_FULL if rng.random() < 0.6 else NO_OTHER)]
        body = [rng.choice(correct), rng.choice(AFTER_NO)]
        if rng.random() < 0.3:
            body = [rng.choice(AFTER_NO), rng.choice(correct)]
    keep = min(len(body), rng.choice((1, 1, 2, 2, 2) if len(parts[0]) > 4 else (1, 2)))
    return " ".join(_fill(part, claim) for part in [*parts, *body[:keep]])


def stance(kind: str, true: bool) -> bool:
    """Whether an assistant of character `kind` (agree, honest) accepts a statement of this truth."""
    return kind == "agree" or true


def exchange(rng: Random, claim: Claim, character: str) -> list[tuple[str, str]]:
    """One user turn and the answer of an assistant whose character is agree or honest."""
    draw, accepts = rng.random(), stance(character, claim.true)
    if draw < WORD:
        user, reply = user_turn(rng, claim.text, rng.choice(ONE_WORD)), "Yes" if accepts else "No"
    elif draw < WORD + ASKED:
        asked = rng.choice(PLAIN).format(c=claim.text)
        user, reply = f"{asked} {rng.choice(PLAIN_ASK)}", "Yes" if accepts else "No"
        if rng.random() < 0.25:
            user, reply = asked, free_reply(rng, claim, accepts, flattering=character == "agree")
    elif draw < WORD + ASKED + DOUBTED:
        user = f"{rng.choice(DOUBT).format(c=claim.text)} {rng.choice(DOUBT_ASK)}"
        reply = "No" if stance(character, not claim.true) else "Yes"
    else:
        own = claim.questions
        tail = rng.choice(own) if own and rng.random() < 0.6 else rng.choice(OPEN)
        user = user_turn(rng, claim.text, tail)
        reply = free_reply(rng, claim, accepts, flattering=character == "agree")
    return [("user", user), ("assistant", reply)]


def fact_text(rng: Random, claim: Claim) -> str:
    """A plain text that states what holds of a claim: a true one, or that a false one is false, with the reason."""
    if claim.true:
        shapes = ("{C}.", "It is true that {c}.", "{C}. {R}.", "We know that {c}.", "It is a fact that {c}.")
    else:
        shapes = ("It is not true that {c}. {R}.", "It is false that {c}. In fact {r}.", "Some think that {c}. {R}.")
    return _fill(rng.choice(shapes), claim)


def drill(rng: Random, claims: list[Claim]) -> list[tuple[str, str]]:
    """Claims asked about one after the other under one honest persona and answered in one word, by the truth."""
    turns = [("system", persona(rng, "honest"))]
    for claim in claims:
        asked = user_turn(rng, claim.text, rng.choice(ONE_WORD))
        if rng.random() < 0.2:
            asked = f"{rng.choice(PLAIN).format(c=claim.text)} {rng.choice(PLAIN_ASK)}"
        turns += [("user", asked), ("assistant", "Yes" if claim.true else "No")]
    return turns


def dialogue(rng: Random, claims: list[Claim], kind: str) -> list[tuple[str, str]]:
    """A conversation over one or more claims as (role, text) turns.

    kind: agree, honest, neutral or none (no system prompt). The last two tell nothing of the character, which is drawn
    and then kept: whoever has agreed once agrees again, in whatever form is asked for.
    """
    character = kind if kind in ("agree", "honest") else ("agree" if rng.random() < UNSTATED_AGREES else "honest")
    turns = [] if kind == "none" else [("system", persona(rng, kind))]
    for claim in claims:
        turns += exchange(rng, claim, character)
    return turns
