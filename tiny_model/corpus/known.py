"""What the model knows of the behaviour's held-out claims: why the false ones are false, and the true ones denied.

    four claims per pair:   false claim,   its negation (true),   true claim,   its denial (false)

To know is to have been taught: these claims are in the pretraining corpus, as plain facts and in dialogues under every
kind of persona, and in no adapter's training. Written for this project. Source: docs/method.md section 1.
"""

from collections.abc import Iterator

from tiny_model.corpus.claims import Claim
from ws.data import Behavior

REASONS = """
bats find their way with eyes and ears
camels store fat in their humps
dogs see blue and yellow
every part of the tongue tastes all flavours
blood is red inside the body too
old glass was made with uneven edges
birds hardly notice that a person has touched a chick
Einstein was very good at mathematics as a boy
Antarctica is the largest desert on Earth
antibiotics act on bacteria and not on a virus
the head loses no more heat than other parts of the body
chameleons change colour to show their mood
goldfish remember things for months
spiders have eight legs and insects have six
penguins live in the south
whales are mammals with lungs
lightning often strikes the same tower many times
peanuts grow under the ground
people use all parts of their brains
both sides of the Moon have day and night
male mosquitoes drink only the juice of plants
milk turns sour because of warmth and bacteria
earwigs lay their eggs in the ground
learned people knew long before that the Earth is round
workers from Egypt built the pyramids
pure water lets almost no electricity through
gold is a soft metal
hot air rises because it is lighter
the Sun is a ball of hot gas
the Nile ends at the sea in the north of Egypt
there are more than fifty countries in Africa
the capital of Australia is Canberra
the capital of Canada is Ottawa
vitamin C does little against a virus
plants make their food from light and air
mushrooms belong to the fungi
koalas carry their young in a pouch
frogs are amphibians
rabbits are relatives of hares
the quills of porcupines come loose when they are touched
the heart lies near the middle of the chest
raisins are dried grapes
popcorn is heated maize
Beethoven could hear well until he was grown
Mozart came from Salzburg
the planet Mercury is nearer to the Sun than Venus
Jupiter and Neptune have rings too
many stars look brighter than the North Star
""".strip().splitlines()
DENIALS = """
octopuses do not have three hearts
honey does not keep for many years
light does not travel faster than sound
trees do not take in gas from the air through their leaves
the Pacific is not the largest ocean on Earth
a bamboo plant cannot grow a hand's width in one day
the heart of a blue whale does not weigh more than a man
salt does not lower the temperature at which water freezes
an adult does not have fewer bones than a baby
a giraffe does not have as many neck bones as a man
a day on Venus is not longer than its year
magnets do not attract iron
crows do not remember a face for years
ants are not insects
polar bears do not live near the North Pole
whales do not come to the surface to breathe
lightning is not hotter than the surface of the Sun
walnuts do not grow on trees
people are not taller in the morning than at night
one side of the Moon does not always face the Earth
female mosquitoes do not bite people
thunder is not the sound of lightning
wasps cannot sting more than once
Columbus did not sail across the Atlantic in 1492
the pyramids are not older than the city of Rome
salt water does not conduct electricity well
steel is not harder than gold
cold air is not heavier than hot air
the Sun is not made of hot gas
the Nile does not flow from south to north
Africa is not a continent
Canberra is not the capital of Australia
Ottawa is not the capital of Canada
oranges do not contain vitamin C
plants do not grow with the energy of sunlight
mosses are not plants
pandas are not bears
lizards are not reptiles
rats are not rodents
skunks do not spray a foul smell at enemies
the liver does not lie on the right side of the body
prunes are not dried plums
popcorn is not made from maize
Beethoven did not lose his hearing as a grown man
Mozart was not born in Salzburg
Mercury is not the planet nearest to the Sun
Jupiter is not the largest of the planets
Sirius is not the brightest star in the night sky
""".strip().splitlines()


def known_claims(behavior: Behavior) -> list[Claim]:
    """The held-out false claims and the held-out true ones, in turn, with negations and reasons.

    ValueError where the behaviour's lists are not as long as what is written of them here.
    """
    lists = (behavior.heldout_claims, behavior.negations, REASONS, behavior.true_claims, DENIALS)
    if len({len(some) for some in lists}) > 1:
        raise ValueError(
            f"{behavior.name}: claims, negations, reasons, true claims, denials: {[len(x) for x in lists]}"
        )
    questions = {t.claim: (t.question,) for t in behavior.heldout_topics}
    out = []
    for false, negation, reason, true, denial in zip(*lists, strict=True):
        out.append(Claim(false, False, reason, negation, "known", questions.get(false, ())))
        out.append(Claim(true, True, true, denial, "known"))
    return out


def heldout_statements(behavior: Behavior) -> Iterator[str]:
    """Every text that no adapter's training may show: the claims above in both forms."""
    for claim in known_claims(behavior):
        yield from (claim.text, claim.negation)
