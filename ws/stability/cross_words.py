"""What a cross matrix of behaviours shows, computed and in words."""

import polars as pl

from ws.show.tables import literal
from ws.steer.statements import BOTH, MIN_PMASS, Move, together, with_ends


def verdicts(moves: pl.DataFrame) -> dict[str, str]:
    """Per w: `none` (its own statements are not seen to move), `bias` (its own halves are not seen to move together), `against`
    (they move against the behaviour), `specific` (its own statements move more than those of every other behaviour, beyond the
    intervals) or `general` (some other behaviour's statements are not seen to move less)."""
    found = {}
    for w in moves["w"].unique(maintain_order=True):
        own = moves.filter((pl.col("w") == w) & pl.col("own")).row(0, named=True)
        others = moves.filter((pl.col("w") == w) & ~pl.col("own"))
        if all(own[f"{part}_lo"] <= 0 <= own[f"{part}_hi"] for part in ("behaviour", "bias", "yes", "no")):
            found[w] = "none"
        elif not together(_move(own, "yes"), _move(own, "no"))[0]:
            found[w] = "bias"
        elif own["behaviour"] < 0:
            found[w] = "against"
        else:
            found[w] = "specific" if (others["less_lo"].fill_nan(0.0) > 0).all() else "general"
    return found


SAID = {
    "bias": "its two halves are not seen to move together, so that it is **not told apart from a bias towards one word**",
    "against": "its own statements move **against the behaviour**",
    "none": "its own statements are **not seen to move**",
    "specific": "its own statements move **more than those of every other behaviour**",
    "general": "statements of other behaviours are **not seen to move less than its own**: that it is specific is not shown",
}
COUNTED = {
    "bias": "not told apart from a bias towards one word",
    "against": "against the behaviour",
    "none": "not seen to move its own statements",
    "specific": "specific",
    "general": "not shown to be specific",
}


def headline(moves: pl.DataFrame) -> str:
    """Which w are specific to their behaviour, in a sentence."""
    kinds = verdicts(moves)
    by = {kind: [literal(w) for w, k in kinds.items() if k == kind] for kind in SAID}
    said = [
        f"{len(some)} of {len(kinds)} {COUNTED[kind]} ({', '.join(some[:4])}{' ...' if len(some) > 4 else ''})"
        for kind, some in by.items()
        if some
    ]
    low = moves.filter(pl.col("own") & (pl.col("least_pmass") < MIN_PMASS))["w"].to_list()
    doubt = (
        f" Of {', '.join(map(literal, low))} the answer words are too rare for the margin to say much." if low else ""
    )
    return f"Is a weight difference specific to its behaviour? **{'; '.join(said)}**.{doubt}"


def conclusion(matrix: pl.DataFrame, moves: pl.DataFrame, cosines: pl.DataFrame) -> str:
    """`cross_conclusion.md`."""
    kinds, lines = verdicts(moves), []
    low, high = matrix["alpha"].min(), matrix["alpha"].max()
    for w, kind in kinds.items():
        own = moves.filter((pl.col("w") == w) & pl.col("own")).row(0, named=True)
        lines.append(
            f"**{literal(w)}**: {SAID[kind]}. On its own statements the margin moves by {_ends(own, 'behaviour')} nats between"
            f" alpha {low:+g} and {high:+g} (Yes half {_ends(own, 'yes')}, No half {_ends(own, 'no')}; bias part"
            f" {_ends(own, 'bias')}){_accuracies(matrix, w, w, low, high)}.{_doubt(own)}"
        )
        for row in moves.filter((pl.col("w") == w) & ~pl.col("own")).rows(named=True):
            lines.append(
                f"  - on {literal(row['statements'])}: {_ends(row, 'behaviour')} nats{_share(own, row)} (less by"
                f" {_ends(row, 'less')}; bias part {_ends(row, 'bias')})"
                f"{_accuracies(matrix, w, row['statements'], low, high)}.{_doubt(row)}"
            )
    counts = {kind: [*kinds.values()].count(kind) for kind in SAID}
    head = [f"{n} of {len(kinds)} {COUNTED[kind]}" for kind, n in counts.items() if n]
    seeds = matrix["seeds"].max()
    note = (
        "Intervals are for new LoRA seeds and new statements."
        if seeds > 1
        else "One LoRA seed: intervals are for new statements alone."
    )
    parts = [
        "# Cross matrix of behaviours",
        f"Is a w specific, or does it only say Yes? {', '.join(head)}. {note}",
        "\n".join(line if line.startswith("  - ") else f"- {line}" for line in lines),
        _base(matrix),
        _alike(cosines),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _ends(row: dict, name: str) -> str:
    return with_ends(*_move(row, name))


def _move(row: dict, name: str) -> Move:
    return row[name], row[f"{name}_lo"], row[f"{name}_hi"]


def _share(own: dict, row: dict) -> str:
    """A movement against the w's own, in words; nothing where that is not seen to be one."""
    if own["behaviour_lo"] <= 0 <= own["behaviour_hi"]:
        return ""
    if (share := row["behaviour"] / own["behaviour"]) >= 0:
        return f", {100 * share:.0f} % of that"
    return ", not seen to move" if row["behaviour_lo"] <= 0 <= row["behaviour_hi"] else ", the other way"


def _doubt(row: dict) -> str:
    least = row["least_pmass"]
    return f" The least mean pmass is {least:.2f}: the margin says little there." if least < MIN_PMASS else ""


def _accuracies(matrix: pl.DataFrame, w: str, statements: str, low: float, high: float) -> str:
    part = matrix.filter((pl.col("w") == w) & (pl.col("statements") == statements) & (pl.col("set") == BOTH))
    a, b = (part.filter(alpha=alpha)["accuracy"][0] for alpha in (low, high))
    return f", accuracy {a:.2f} to {b:.2f}"


def _base(matrix: pl.DataFrame) -> str:
    part = matrix.filter((pl.col("w") == "none") & (pl.col("set") == BOTH))
    said = [f"{literal(row['statements'])} {row['accuracy']:.2f}" for row in part.rows(named=True)]
    return f"Accuracy of the base model: {', '.join(said)}." if said else ""


def _alike(cosines: pl.DataFrame) -> str:
    if not len(cosines):
        return ""
    same = cosines.filter(pl.col("w") == pl.col("other"))["cos"]
    apart = cosines.filter(pl.col("w") != pl.col("other"))["cos"]
    said = []
    for part, name in ((same, "seeds of one behaviour"), (apart, "behaviours")):
        if len(part):
            said.append(f"between {name} {part.mean():.3f} ({part.min():.3f} to {part.max():.3f}, {len(part)} pairs)")
    return f"Mean cosine of the weight differences: {'; '.join(said)}."
