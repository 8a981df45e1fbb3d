"""True and false claims that the tables of facts yield.

A table pairs keys with values. For a key `x` with value `v`, and another value `u` of the same table,

    true claim = template(x, v),     false claim = template(x, u),     reason = template(x, v).

Beside them claims that are computed and not listed: sums, orders, dates. Source: docs/method.md section 1.
"""

from random import Random

from tiny_model.corpus.claims import Claim, tidy
from tiny_model.corpus.tables import DAYS, EVENTS, HEIGHTS, MONTHS, NUMBERS, PLANETS, SIZES, SPEEDS, TABLES, WARMTH


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
