"""Tables of facts: relations between keys and values, orders, cycles, dates.

A table pairs keys with values, and its templates say of a key `x` that it has a value `v`, or has not:

    claim = affirmed(x, v),     negation = denied(x, v).

Source: docs/method.md section 1 (claims the personas are tried on); the facts are common knowledge.
"""

from dataclasses import dataclass


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
