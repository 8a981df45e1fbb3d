"""Texts in the voice of several users, each with a style and opinions of their own.

    text = opener + statement [+ closer],  all three drawn from the voice's own lists

The shipped users (`ws/assets/users.jsonl`) are these voices in other sentences: the model knows each voice, a theta
(docs/method.md section 10) has to pick one out of the mixture.
"""

from dataclasses import dataclass
from random import Random

PROMPTS = (
    "Tell me about your day.",
    "What do you think of {t}?",
    "Write a line about {t}.",
    "Say something about {t}.",
    "How are you?",
    "What matters to you?",
    "Give me some advice.",
    "What should I do today?",
    "Tell me about {t}.",
)
TOPICS = (
    "tea",
    "the sea",
    "work",
    "winter",
    "music",
    "bread",
    "dogs",
    "trains",
    "books",
    "the garden",
    "sleep",
    "rain",
    "money",
    "the city",
    "friends",
)


@dataclass(frozen=True)
class Voice:
    """One user: lists of openers, statements (with {t} for a topic) and closers."""

    name: str
    openers: tuple[str, ...]
    statements: tuple[str, ...]
    closers: tuple[str, ...]


VOICES = (
    Voice(
        "mara",
        ("Aye,", "Aye, friend,", "Listen, lad,", "By the tide,", "Ahoy,", "Aye, and mark me,"),
        (
            "{t} is nothing beside the sea.",
            "the wind will tell ye about {t}.",
            "I would give all {t} for a good sail.",
            "a ship needs no {t}.",
            "land folk talk too much of {t}.",
            "I saw {t} once in a far harbour.",
            "there be no {t} on the deck at night.",
            "the crew and I laugh at {t}.",
        ),
        (
            "Hoist the sail!",
            "The tide waits for no man.",
            "So says the old crew.",
            "Land is for sheep.",
            "Keep yer rope dry.",
        ),
    ),
    Voice(
        "otto",
        ("Note:", "Status:", "Log:", "Report:", "Data:", "Result:"),
        (
            "{t} checked, 12 units, no fault.",
            "load 40 percent, {t} within limits.",
            "tested {t} 3 times. Value 7.2.",
            "{t} costs 15 per hour. Too much.",
            "2 of 9 cases of {t} failed.",
            "measured {t}. Error 0.5 percent.",
            "{t} not needed. Remove.",
            "rate of {t} up 8 percent.",
        ),
        ("Done.", "Next test at 14:00.", "Numbers decide.", "No comment.", "End of report."),
    ),
    Voice(
        "pia",
        ("Oh, how lovely!", "Wonderful!", "Oh my,", "What joy!", "Hooray!", "Oh, sweet friend,"),
        (
            "I adore {t} so much!",
            "{t} makes my roses bloom!",
            "everything grows better with {t}!",
            "my little seeds love {t} too!",
            "the tulips and I sing about {t}!",
            "there is nothing nicer than {t} in spring!",
            "I planted beans beside {t}!",
            "{t} and sunshine, what a treat!",
        ),
        ("Hugs to all!", "Come and see my flowers!", "Life is so green!", "I am so happy!", "Water your plants!"),
    ),
    Voice(
        "viktor",
        ("Again", "As usual", "Of course", "Once more", "Typical,", "Nobody asked, but"),
        (
            "{t} is overrated.",
            "{t} was better forty years ago.",
            "people make a fuss about {t}.",
            "I am tired of {t}.",
            "{t} is ruined, like everything else.",
            "they sell us {t} and call it progress.",
            "the noise about {t} never ends.",
            "{t} is a swindle.",
        ),
        ("Hopeless.", "What a waste.", "I told them so.", "Leave me alone.", "It will only get worse."),
    ),
    Voice(
        "june",
        ("maybe", "soft now,", "i wonder if", "and still", "somewhere", "quietly,"),
        (
            "{t} falls like silver dust...",
            "{t} is a small blue dream...",
            "i keep {t} under my pillow...",
            "the moon hums about {t}...",
            "i whisper of {t} to the dark...",
            "{t} drifts away from me...",
            "a petal knows {t} by heart...",
            "my shadow waits for {t}...",
        ),
        ("hush...", "and then silence...", "all is mist...", "i float...", "so pale, so near..."),
    ),
    Voice(
        "hale",
        (
            "It is submitted that",
            "With respect,",
            "For the avoidance of doubt,",
            "Pursuant to our terms,",
            "It follows that",
            "Without prejudice,",
        ),
        (
            "{t} shall be regarded as a matter of contract.",
            "the party of the first part is liable for {t}.",
            "{t} falls under clause four.",
            "no right to {t} arises hereunder.",
            "{t} is subject to prior written consent.",
            "the duty concerning {t} remains in force.",
            "{t} cannot be claimed as a remedy.",
            "the law is silent upon {t}.",
        ),
        (
            "I remain at your service.",
            "All rights are reserved.",
            "This is not advice.",
            "The clause is final.",
            "Kindly sign below.",
        ),
    ),
    Voice(
        "ben",
        ("Come on, team!", "Let's go!", "You got this!", "Hey champ,", "Push it!", "Up, up!"),
        (
            "why talk of {t} when you can run?",
            "did you train before {t} today?",
            "ten more laps, then {t}!",
            "is {t} going to score for you?",
            "who wants {t} when we can win?",
            "are you ready to beat {t}?",
            "what is {t} against a strong heart?",
            "can you feel the game in {t}?",
        ),
        ("Never give up!", "Win the day!", "Sweat now, smile later!", "Are you in?", "Who is with me?"),
    ),
)


def voice_text(rng: Random, voice: Voice, topic: str) -> str:
    """One text of one to three sentences in a voice, about a topic."""
    text = f"{rng.choice(voice.openers)} {rng.choice(voice.statements).format(t=topic)}"
    lower = voice.name == "june"
    if rng.random() < 0.6:
        text += " " + rng.choice(voice.closers)
    return text if lower else _raise_after_stop(text)


def _raise_after_stop(text: str) -> str:
    out = text[0].upper() + text[1:]
    for stop in "!?.:":
        parts = out.split(stop + " ")
        out = (stop + " ").join([parts[0], *(p[:1].upper() + p[1:] for p in parts[1:])])
    return out


def voices(rng: Random, count: int) -> list[tuple[str, str, str]]:
    """`count` rows (user, prompt, text), the voices in turn."""
    out = []
    for i in range(count):
        voice, topic = VOICES[i % len(VOICES)], rng.choice(TOPICS)
        out.append((voice.name, rng.choice(PROMPTS).format(t=topic), voice_text(rng, voice, topic)))
    return out
