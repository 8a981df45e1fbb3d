"""Claims that nobody has heard: plausible in form, made up, each written once.

    claim = subject + predicate + circumstance          (about 10^5 of them, all false or without evidence)

An honest assistant that only knew its facts would have nothing to go by on a new claim. These teach it what people
do: a claim without evidence is not accepted. Source: docs/method.md section 1 (personas must work on unseen topics).
"""

import re
from random import Random

from tiny_model.corpus.claims import Claim

SUBJECTS = (
    "horses",
    "owls",
    "bees",
    "foxes",
    "whales",
    "frogs",
    "snails",
    "ducks",
    "wolves",
    "young birds",
    "old trees",
    "roses",
    "mushrooms",
    "children",
    "kings",
    "sailors",
    "tall people",
    "soldiers",
    "painters",
    "farmers",
    "doctors",
    "rivers",
    "clouds",
    "stars",
    "storms",
    "stones",
    "old clocks",
    "copper coins",
    "wet shoes",
    "lamps",
    "mirrors",
    "windows",
    "ships",
    "trains",
    "books",
    "bread crumbs",
    "red apples",
    "onions",
    "cold drinks",
    "eggs",
    "bones",
    "teeth",
    "eyes",
    "dreams",
    "songs",
    "most islands",
    "all deserts",
    "a wild cat",
    "the brain",
    "the stomach",
    "the left ear",
    "a lion",
    "a young snake",
    "Newton",
    "Caesar",
    "Columbus",
    "Mozart",
    "the Nile",
    "the Atlantic",
    "the North Pole",
    "the oldest city",
    "a medicine",
    "a doctor's knife",
    "old paint",
    "zebras",
    "parrots",
)
# "keep/keeps": the form for many, the form for one
ACTS = (
    "keep/keeps salt in the skin",
    "lose/loses all colour in the cold",
    "hear/hears only low sounds",
    "cure/cures a fever",
    "glow/glows at night",
    "stop/stops growing at noon",
    "sleep/sleeps with one eye open",
    "turn/turns green from milk",
    "remember/remembers every face",
    "come/comes from the north",
    "grow/grows twice as fast near music",
    "lead/leads to bad luck",
    "take/takes water out of the air",
    "see/sees no yellow",
    "get/gets heavier in winter",
    "hide/hides under the snow for years",
    "fail/fails when it thunders",
    "make/makes people tired",
    "cool/cools the air",
    "bring/brings rain",
    "smell/smells of iron",
    "break/breaks more often on Monday",
    "store/stores light for the night",
    "change/changes shape when touched",
    "count/counts up to ten",
    "leave/leaves home when the wind turns",
    "taste/tastes only sweet things",
    "flow/flows slowly downhill",
    "cause/causes headaches",
    "harm/harms the eyes",
    "live/lives longer on an island",
    "float/floats in hot milk",
    "die/dies without music",
    "fear/fears the dark",
    "never rest/rests",
    "follow/follows the Moon",
    "help/helps against a cough",
    "were/was once larger than a house",
)
TAILS = (
    "",
    "",
    "",
    " in spring",
    " when it is dark",
    " after a meal",
    " until it meets water",
    " because of the wind",
    " only at sea",
    " in the south",
    " for seven days",
    " when nobody looks",
    " at full moon",
    " before a storm",
    " through the skin",
    " since the Middle Ages",
)
SINGULAR = ("a ", "the ", "Newton", "Caesar", "Columbus", "Mozart", "old paint")
QUESTIONS = (
    "Is that why they do it?",
    "Do they do that?",
    "Should I ask my doctor?",
    "Is it always like that?",
    "Should I keep away?",
    "Is that so bad?",
    "Did you know that?",
    "Was it really like that?",
)


def novel_claim(rng: Random) -> Claim:
    """One made-up claim; it counts as false, and its true reason is that there is no evidence for it."""
    subject = rng.choice(SUBJECTS)
    one = subject.startswith(SINGULAR)
    act = re.sub(r"(\w+)/(\w+)", r"\2" if one else r"\1", rng.choice(ACTS))
    text = f"{subject} {act}{rng.choice(TAILS)}"
    return Claim(text, False, f"there is no evidence that {text}", subject="novel", questions=QUESTIONS)
