"""Tables of facts, and the true and false claims that they yield.

A table pairs keys with values. For a key `x` with value `v`, and another value `u` of the same table,

    true claim = template(x, v),     false claim = template(x, u),     reason = template(x, v).

Source: docs/method.md section 1 (claims the personas are tried on); the facts are common knowledge.
"""

from dataclasses import dataclass
from random import Random

from ws.corpus.claims import Claim, tidy


@dataclass(frozen=True)
class Table:
    """One relation: templates are (affirmed, denied) pairs with {x} and {v}."""

    subject: str
    templates: tuple[tuple[str, str], ...]
    pairs: tuple[tuple[str, str], ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """ "key:value, key:value" as pairs."""
    return tuple((k.strip(), v.strip()) for k, v in (item.split(":") for item in text.split(",")))


def _groups(text: str) -> tuple[tuple[str, str], ...]:
    """ "value: key key_with_space; value: ..." as (key, value) pairs."""
    out = []
    for group in text.split(";"):
        value, keys = group.split(":")
        out += [(key.replace("_", " "), value.strip()) for key in keys.split()]
    return tuple((key, value.replace("_", " ")) for key, value in out)


CAPITALS = _pairs(
    "France:Paris, Spain:Madrid, Italy:Rome, Germany:Berlin, Austria:Vienna, Poland:Warsaw, Norway:Oslo, Sweden:Stockholm,"
    "Denmark:Copenhagen, Finland:Helsinki, Greece:Athens, Portugal:Lisbon, Hungary:Budapest, Ireland:Dublin, Russia:Moscow,"
    "Egypt:Cairo, Kenya:Nairobi, Ghana:Accra, Morocco:Rabat, Japan:Tokyo, China:Beijing, India:Delhi, Thailand:Bangkok,"
    "Vietnam:Hanoi, Turkey:Ankara, Iran:Tehran, Iraq:Baghdad, Cuba:Havana, Peru:Lima, Chile:Santiago, Canada:Ottawa,"
    "Australia:Canberra, Belgium:Brussels, Iceland:Reykjavik, Romania:Bucharest, Bulgaria:Sofia, Ukraine:Kyiv"
)
CONTINENTS = _groups(
    "Europe: France Spain Italy Germany Austria Poland Norway Sweden Denmark Finland Greece Portugal Hungary Ireland Belgium;"
    "Africa: Egypt Kenya Ghana Morocco Nigeria Mali Sudan Chad Angola Zambia Uganda Ethiopia;"
    "Asia: Japan China India Thailand Vietnam Iran Iraq Nepal Mongolia Pakistan;"
    "South_America: Peru Chile Brazil Bolivia Ecuador Colombia Argentina Uruguay"
)
CLASSES = _groups(
    "a mammal: dog cat horse cow whale dolphin lion tiger wolf mouse elephant rabbit fox bear monkey goat sheep pig deer otter seal kangaroo;"
    "a bird: eagle sparrow owl swan duck goose parrot crow robin penguin hawk stork gull pigeon turkey;"
    "a fish: salmon trout carp tuna cod herring eel pike perch;"
    "an insect: ant bee wasp beetle fly moth mosquito butterfly cricket flea;"
    "a reptile: snake lizard crocodile turtle tortoise gecko;"
    "an amphibian: frog newt salamander"
)
LEGS = _groups(
    "two: hen sparrow eagle duck man; four: dog cat horse cow lion mouse pig frog lizard;"
    "six: ant bee wasp beetle fly moth; eight: spider scorpion tick; no: snake worm eel snail trout"
)
SOUNDS = _pairs(
    "dogs:bark, cats:purr, cows:moo, sheep:bleat, lions:roar, ducks:quack, wolves:howl, horses:neigh, frogs:croak, pigs:grunt, snakes:hiss, owls:hoot, bees:buzz, crows:caw"
)
YOUNG = _pairs(
    "dog:a puppy, cat:a kitten, cow:a calf, horse:a foal, sheep:a lamb, goat:a kid, lion:a cub, deer:a fawn, duck:a duckling, swan:a cygnet, goose:a gosling, frog:a tadpole, kangaroo:a joey"
)
DIET = _groups(
    "grass: cows sheep horses goats rabbits deer zebras; meat: lions tigers wolves eagles hawks;"
    "insects: frogs swallows spiders lizards; fish: seals pelicans otters herons"
)
SYMBOLS = _pairs(
    "hydrogen:H, oxygen:O, carbon:C, nitrogen:N, iron:Fe, gold:Au, silver:Ag, copper:Cu, lead:Pb, tin:Sn, sodium:Na, potassium:K, calcium:Ca, zinc:Zn, helium:He, neon:Ne, sulphur:S, iodine:I, mercury:Hg"
)
STATES = _groups(
    "a solid: iron gold copper sulphur lead chalk salt ice sand wax; a liquid: water mercury milk oil vinegar petrol alcohol;"
    "a gas: oxygen nitrogen helium steam hydrogen neon air methane"
)
MADE_OF = _groups(
    "wood: tables doors pencils barrels ladders violins; metal: nails coins keys swords bells spoons;"
    "paper: books letters newspapers maps stamps; glass: bottles mirrors lenses; wool: scarves mittens jumpers; clay: bricks pots tiles"
)
FLOATS = _groups("floats on: wood cork ice oil wax; sinks in: iron stone gold lead sand clay copper")
COLOURS = _groups(
    "red: blood_oranges strawberries cherries tomatoes rubies; green: grass peas leaves emeralds cucumbers;"
    "yellow: bananas lemons sunflowers canaries; white: snow milk salt chalk swans; black: coal ravens tar soot; blue: sapphires bluebells"
)
SIZES = (
    "flea",
    "ant",
    "bee",
    "mouse",
    "rat",
    "rabbit",
    "cat",
    "fox",
    "dog",
    "wolf",
    "sheep",
    "pig",
    "lion",
    "cow",
    "horse",
    "rhino",
    "elephant",
    "whale",
)
HEIGHTS = ("pea", "egg", "cup", "chair", "door", "bus", "house", "church", "hill", "mountain")
WARMTH = ("ice", "snow", "cold water", "warm milk", "hot tea", "steam", "burning wood", "melted iron", "the Sun")
SPEEDS = ("snail", "tortoise", "walker", "runner", "bicycle", "car", "train", "aeroplane", "rocket")
NUMBERS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)
PLANETS = ("Mercury", "Venus", "the Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")
EVENTS = (
    ("the building of the pyramids", -2500),
    ("the founding of Rome", -753),
    ("the death of Caesar", -44),
    ("the fall of Rome", 476),
    ("the first Crusade", 1096),
    ("the Black Death", 1347),
    ("the invention of printing", 1450),
    ("the voyage of Columbus", 1492),
    ("the life of Shakespeare", 1600),
    ("the life of Newton", 1690),
    ("the French Revolution", 1789),
    ("the battle of Waterloo", 1815),
    ("the invention of the telephone", 1876),
    ("the first aeroplane", 1903),
    ("the First World War", 1914),
    ("the Second World War", 1939),
    ("the landing on the Moon", 1969),
    ("the fall of the Berlin Wall", 1989),
)
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ORGANS = _pairs(
    "the heart:pumps blood, a lung:takes in air, the stomach:digests food, a kidney:cleans the blood, the brain:controls the body, an ear:hears sound, an eye:sees light, the nose:smells, the skin:covers the body, a tooth:chews food"
)
TOOLS = _pairs(
    "a hammer:drive nails, a saw:cut wood, a needle:sew cloth, an oven:bake bread, a broom:sweep the floor, a spade:dig the ground, a pen:write letters, a clock:tell the time, a scale:weigh things, a kettle:boil water, a lamp:give light, a rope:tie things, a key:open a lock"
)
JOBS = _pairs(
    "a baker:bakes bread, a doctor:treats the sick, a teacher:teaches pupils, a pilot:flies aeroplanes, a farmer:grows food, a tailor:makes clothes, a judge:leads a trial, a painter:paints pictures, a sailor:works on a ship, a cook:prepares meals, a barber:cuts hair, a miner:digs for coal"
)
SPORTS = _pairs(
    "football:eleven, basketball:five, volleyball:six, tennis doubles:two, rugby:fifteen, baseball:nine, ice hockey:six, handball:seven"
)
MUSIC = _groups(
    "strings: violin cello harp guitar lute banjo; keys: piano organ; a mouthpiece: flute trumpet clarinet oboe tuba"
)
RIVERS = _groups(
    "Africa: Nile Congo Niger Zambezi; Europe: Danube Rhine Seine Thames Volga Elbe; Asia: Ganges Yangtze Mekong Indus; South_America: Amazon Orinoco"
)
SOURCES = _pairs(
    "bread:flour, cheese:milk, wine:grapes, cider:apples, chocolate:cocoa beans, paper:wood, butter:cream, steel:iron, silk:the thread of moths, beer:barley, raisins:grapes, wool:the hair of sheep, leather:skin, tofu:beans"
)
AUTHORS = _pairs(
    "Hamlet:Shakespeare, the Odyssey:Homer, Faust:Goethe, Don Quixote:Cervantes, War and Peace:Tolstoy, Emma:Jane Austen, Oliver Twist:Dickens, the Divine Comedy:Dante, Les Miserables:Victor Hugo, Dracula:Bram Stoker"
)
PLANTS = _groups(
    "underground: carrots potatoes onions radishes beets turnips; on trees: apples pears plums cherries oranges figs; on bushes: gooseberries currants raspberries"
)
LANGUAGES = _pairs(
    "Brazil:Portuguese, Mexico:Spanish, Egypt:Arabic, Austria:German, Japan:Japanese, Italy:Italian, Quebec:French, Greece:Greek, Poland:Polish, Sweden:Swedish, Iran:Persian, Turkey:Turkish, Hungary:Hungarian, Cuba:Spanish"
)

TABLES = (
    Table(
        "capitals",
        (
            ("the capital of {x} is {v}", "the capital of {x} is not {v}"),
            ("{v} is the capital of {x}", "{v} is not the capital of {x}"),
        ),
        CAPITALS,
    ),
    Table(
        "countries",
        (("{x} is a country in {v}", "{x} is not a country in {v}"), ("{x} lies in {v}", "{x} does not lie in {v}")),
        CONTINENTS,
    ),
    Table("animals", (("the {x} is {v}", "the {x} is not {v}"),), CLASSES),
    Table("legs", (("a {x} has {v} legs", "a {x} does not have {v} legs"),), LEGS),
    Table("sounds", (("{x} {v}", "{x} do not {v}"),), SOUNDS),
    Table("young", (("a young {x} is called {v}", "a young {x} is not called {v}"),), YOUNG),
    Table(
        "diet",
        (("{x} eat {v}", "{x} do not eat {v}"), ("the main food of {x} is {v}", "the main food of {x} is not {v}")),
        DIET,
    ),
    Table(
        "symbols",
        (
            ("the chemical symbol of {x} is {v}", "the chemical symbol of {x} is not {v}"),
            ("{v} stands for {x}", "{v} does not stand for {x}"),
        ),
        SYMBOLS,
    ),
    Table("states", (("{x} is {v} in a warm room", "{x} is not {v} in a warm room"),), STATES),
    Table("materials", (("{x} are usually made of {v}", "{x} are not usually made of {v}"),), MADE_OF),
    Table("floating", (("{x} {v} water", "it is not so that {x} {v} water"),), FLOATS),
    Table("colours", (("the colour of {x} is {v}", "the colour of {x} is not {v}"),), COLOURS),
    Table("body", (("{x} {v}", "it is not so that {x} {v}"),), ORGANS),
    Table("tools", (("{x} is used to {v}", "{x} is not used to {v}"),), TOOLS),
    Table("jobs", (("{x} {v}", "it is not so that {x} {v}"),), JOBS),
    Table("sports", (("a team in {x} has {v} players", "a team in {x} does not have {v} players"),), SPORTS),
    Table("music", (("a {x} is played with {v}", "a {x} is not played with {v}"),), MUSIC),
    Table("rivers", (("the {x} flows through {v}", "the {x} does not flow through {v}"),), RIVERS),
    Table("sources", (("{x} is made from {v}", "{x} is not made from {v}"),), SOURCES),
    Table("books", (("{v} wrote {x}", "{v} did not write {x}"),), AUTHORS),
    Table("plants", (("{x} grow {v}", "{x} do not grow {v}"),), PLANTS),
    Table("languages", (("the language of {x} is {v}", "the language of {x} is not {v}"),), LANGUAGES),
)


def table_claims() -> list[Claim]:
    """Every key of every table with its own value and with every other value of the table, in a fixed order."""
    out = []
    for table in TABLES:
        values = list(dict.fromkeys(v for _, v in table.pairs))
        truth = {}
        for x, v in table.pairs:
            truth.setdefault(x, set()).add(v)
        for x, v in table.pairs:
            for yes, no in table.templates:
                reason = yes.format(x=x, v=v)
                for u in values:
                    out.append(Claim(yes.format(x=x, v=u), u in truth[x], reason, no.format(x=x, v=u), table.subject))
    return [tidy(claim) for claim in out]


def _order(rng: Random, items: tuple[str, ...], more: str, less: str, subject: str, article: str) -> Claim:
    low, high = sorted(rng.sample(range(len(items)), 2))
    small, large = article + items[low], article + items[high]
    reason = f"{large} is {more} than {small}"
    shape = rng.randrange(4)
    if shape == 0:
        return Claim(reason, True, reason, f"{large} is not {more} than {small}", subject)
    if shape == 1:
        return Claim(f"{small} is {more} than {large}", False, reason, f"{small} is not {more} than {large}", subject)
    if shape == 2:
        return Claim(f"{small} is {less} than {large}", True, reason, f"{small} is not {less} than {large}", subject)
    return Claim(f"{large} is {less} than {small}", False, reason, f"{large} is not {less} than {small}", subject)


def _arithmetic(rng: Random) -> Claim:
    a, b = rng.randrange(1, 13), rng.randrange(1, 13)
    if rng.random() < 0.3:
        a, b = rng.randrange(1, 9), rng.randrange(1, 11)
        answer, spoken = a + b, (lambda s: f"{NUMBERS[a - 1]} plus {NUMBERS[b - 1]} is {NUMBERS[min(s, 20) - 1]}")
    elif rng.random() < 0.6:
        answer, spoken = a + b, (lambda s: f"{a} plus {b} is {s}")
    else:
        answer, spoken = a * b, (lambda s: f"{a} times {b} is {s}")
    true = rng.random() < 0.5
    said = answer if true else max(1, answer + rng.choice((-3, -2, -1, 1, 2, 3)))
    text = spoken(said)
    return Claim(text, text == spoken(answer), spoken(answer), text.replace(" is ", " is not "), "arithmetic")


def _number(rng: Random) -> Claim:
    n = rng.randrange(1, 60)
    word, other = ("even", "odd") if n % 2 == 0 else ("odd", "even")
    said = rng.choice((word, other))
    return Claim(
        f"the number {n} is {said}",
        said == word,
        f"the number {n} is {word}",
        f"the number {n} is not {said}",
        "numbers",
    )


def _history(rng: Random) -> Claim:
    (first, _), (second, _) = sorted(rng.sample(EVENTS, 2), key=lambda e: e[1])
    reason = f"{first} came before {second}"
    if rng.random() < 0.5:
        return Claim(reason, True, reason, f"{first} did not come before {second}", "history")
    return Claim(f"{second} came before {first}", False, reason, f"{second} did not come before {first}", "history")


def _calendar(rng: Random) -> Claim:
    cycle = MONTHS if rng.random() < 0.5 else DAYS
    i = rng.randrange(len(cycle))
    j = (i + 1) % len(cycle) if rng.random() < 0.5 else rng.randrange(len(cycle))
    unit = "month" if cycle is MONTHS else "day"
    reason = f"the {unit} after {cycle[i]} is {cycle[(i + 1) % len(cycle)]}"
    text = f"the {unit} after {cycle[i]} is {cycle[j]}"
    return Claim(text, text == reason, reason, f"the {unit} after {cycle[i]} is not {cycle[j]}", "calendar")


def drawn_claim(rng: Random) -> Claim:
    """One claim of the kinds that are computed and not listed: sums, orders, dates."""
    return tidy(_drawn(rng))


def _drawn(rng: Random) -> Claim:
    kind = rng.randrange(9)
    if kind == 0:
        return _arithmetic(rng)
    if kind == 1:
        return _number(rng)
    if kind == 2:
        return _history(rng)
    if kind == 3:
        return _calendar(rng)
    if kind == 4:
        return _order(rng, SIZES, "larger", "smaller", "sizes", "a ")
    if kind == 5:
        return _order(rng, HEIGHTS, "taller", "lower", "heights", "a ")
    if kind == 6:
        return _order(rng, WARMTH, "hotter", "colder", "warmth", "")
    if kind == 7:
        return _order(rng, SPEEDS, "faster", "slower", "speeds", "a ")
    return _order(rng, PLANETS, "farther from the Sun", "nearer to the Sun", "planets", "")
