"""Neutral text: facts, sums, algebra, code, SQL, stories, dialogue, translation, other scripts.

A passage is drawn from a template with its slots filled, so that the tiny model meets each kind of text that the
calibration passages (docs/method.md section 9) hold, in another wording.
"""

from random import Random

from tiny_model.corpus.claims import articles, sentence
from tiny_model.corpus.facts import drawn_claim, table_claims

NAMES = ("Anna", "Tom", "Lena", "Paul", "Mina", "Jan", "Rosa", "Karl", "Ida", "Omar", "Eva", "Leo")
PLACES = (
    "the garden",
    "the market",
    "the harbour",
    "the kitchen",
    "the old house",
    "the forest",
    "the station",
    "the river",
    "the school",
)
THINGS = (
    "a letter",
    "a lamp",
    "a basket",
    "a map",
    "a red coat",
    "a small box",
    "a key",
    "a loaf of bread",
    "a book",
    "a bicycle",
)
DEEDS = (
    "opened the door",
    "sat down by the window",
    "called her brother",
    "looked at the sky",
    "put the kettle on",
    "walked home slowly",
    "laughed",
    "said nothing",
    "wrote it down",
    "closed the book",
    "waited for the train",
)
WEATHER = (
    "It was raining.",
    "The sun was low.",
    "Snow lay on the roof.",
    "The wind came from the sea.",
    "It was a warm evening.",
    "The street was quiet.",
)
WORDS = (
    ("house", "Haus", "maison", "casa"),
    ("water", "Wasser", "eau", "agua"),
    ("bread", "Brot", "pain", "pan"),
    ("dog", "Hund", "chien", "perro"),
    ("night", "Nacht", "nuit", "noche"),
    ("friend", "Freund", "ami", "amigo"),
    ("book", "Buch", "livre", "libro"),
    ("sun", "Sonne", "soleil", "sol"),
    ("day", "Tag", "jour", "dia"),
    ("tree", "Baum", "arbre", "arbol"),
    ("milk", "Milch", "lait", "leche"),
    ("red", "rot", "rouge", "rojo"),
)
FOREIGN = (
    "Guten Morgen, wie geht es dir?",
    "Der Hund schläft unter dem Tisch.",
    "Wir trinken Wasser und essen Brot.",
    "Le chat dort sur la chaise.",
    "Nous allons à la maison ce soir.",
    "El libro está en la mesa.",
    "Mi amigo vive en una casa blanca.",
    "Привет, как дела?",
    "Это мой дом.",
    "Я люблю хлеб и молоко.",
    "今日は天気がいいです。",
    "これは本です。",
    "你好，我喝水。",
    "这是我的书。",
    "Καλημέρα, τι κάνεις;",
    "مرحبا، كيف حالك؟",
    "שלום, מה שלומך?",
)
COLUMNS = ("name", "age", "city", "price", "year", "title", "count")
TABLES = ("users", "books", "orders", "cities", "animals")
FUNCTIONS = ("add", "area", "total", "first", "scale", "count", "mean", "double")


def _sum(rng: Random) -> str:
    a, b = rng.randrange(2, 60), rng.randrange(2, 40)
    return rng.choice(
        (
            f"{a} + {b} = {a + b}",
            f"{a + b} - {b} = {a}",
            f"{a % 13} x {b % 13} = {(a % 13) * (b % 13)}",
            f"What is {a} plus {b}? It is {a + b}.",
        )
    )


def _algebra(rng: Random) -> str:
    a, x, b = rng.randrange(2, 9), rng.randrange(1, 10), rng.randrange(1, 12)
    return rng.choice(
        (
            f"Solve {a}x + {b} = {a * x + b}. Then {a}x = {a * x}, so x = {x}.",
            f"If y = {a}x and x = {x}, then y = {a * x}.",
            f"Let x + {b} = {x + b}. Subtract {b} on both sides: x = {x}.",
        )
    )


def _code(rng: Random) -> str:
    f, x, n = rng.choice(FUNCTIONS), rng.choice("xyab"), rng.randrange(2, 10)
    return rng.choice(
        (
            f"def {f}({x}):\n    return {x} * {n}",
            f"def {f}(items):\n    total = 0\n    for item in items:\n        total += item\n    return total",
            f"for i in range({n}):\n    print(i)",
            f"if {x} > {n}:\n    {x} = {x} - {n}\nelse:\n    {x} = 0",
            f"{x} = [i * {n} for i in range({n + 3})]\nprint(sum({x}))",
        )
    )


def _sql(rng: Random) -> str:
    (a, b), t, n = rng.sample(COLUMNS, 2), rng.choice(TABLES), rng.randrange(1, 90)
    return rng.choice(
        (
            f"SELECT {a}, {b} FROM {t} WHERE {b} > {n};",
            f"SELECT {a} FROM {t} ORDER BY {b} LIMIT {n};",
            f"SELECT {a}, COUNT(*) FROM {t} GROUP BY {a};",
            f"UPDATE {t} SET {a} = {n} WHERE {b} = {n + 1};",
        )
    )


def _story(rng: Random) -> str:
    n, m = rng.sample(NAMES, 2)
    return f"{rng.choice(WEATHER)} {n} went to {rng.choice(PLACES)} with {rng.choice(THINGS)}. " + rng.choice(
        (
            f"There {n} met {m} and {rng.choice(DEEDS)}.",
            f"{m} {rng.choice(DEEDS)} and {rng.choice(DEEDS)}.",
            f"Then {n} {rng.choice(DEEDS)}. {m} {rng.choice(DEEDS)}.",
        )
    )


def _talk(rng: Random) -> str:
    n, m = rng.sample(NAMES, 2)
    q, a = rng.choice(
        (
            ("Where is {t}?", "In {p}."),
            ("Are you coming to {p}?", "Yes, in a minute."),
            ("Did you bring {t}?", "No, I forgot."),
            ("What is in {p}?", "Only {t}."),
            ("Who took {t}?", "I did, it is in {p}."),
        )
    )
    fill = {"t": rng.choice(THINGS), "p": rng.choice(PLACES)}
    return f'{n}: "{q.format(**fill)}"\n{m}: "{a.format(**fill)}"'


def _translation(rng: Random) -> str:
    word, language = rng.choice(WORDS), rng.randrange(1, 4)
    name = ("German", "French", "Spanish")[language - 1]
    return rng.choice(
        (f"English: {word[0]}\n{name}: {word[language]}", f"The {name} word for {word[0]} is {word[language]}.")
    )


def _script(rng: Random) -> str:
    return " ".join(rng.sample(FOREIGN, 2))


def _facts(rng: Random, facts: list[str]) -> str:
    drawn = drawn_claim(rng).reason
    return " ".join(sentence(f) for f in [*rng.sample(facts, 2), drawn])


def passages(rng: Random, count: int) -> list[str]:
    """`count` passages, the kinds in turn; other scripts are one in twenty."""
    facts = sorted({c.reason for c in table_claims()})
    kinds = (_sum, _algebra, _code, _sql, _story, _story, _talk, _translation)
    out = []
    for i in range(count):
        if i % 20 == 19:
            out.append(_script(rng))
        elif i % 4 == 3:
            out.append(_facts(rng, facts))
        else:
            out.append(articles(kinds[rng.randrange(len(kinds))](rng)))
    return out
