"""What a benchmark shows, in words that are computed from its tables. (docs/method.md section 8)"""

from collections.abc import Mapping

import numpy as np
import polars as pl

from ws.show.tables import as_text, literal
from ws.steer.statements import MIN_PMASS
from ws.use.surgery import both_halves

COLUMNS = (
    "method alpha kl said_kl effect effect_low effect_high effect_yes effect_no control surgical wrong_way pmass off_target"
    " off_bias perplexity facts repeats"
).split()
CONTROL, WHOLE = "mag_only", "w"
SATURATED = 12.0  # nats
TIED = 0.005  # of surgical informedness


def conclusion(about: Mapping, table: pl.DataFrame, by_item: pl.DataFrame, methods: Mapping, left_out: Mapping) -> str:
    """Per dose a table and what of it can be said; what the methods are; what was left out."""
    where = "of fixed texts" if about["along"] == "texts" else "of their own greedy text"
    rows = table.filter(pl.col("refused") == "")
    n, controls = int(rows["n"][0]), int(rows["n_control"][0])
    beside = f" and {controls} that they should leave alone" if controls else ""
    said = [
        f"**{literal(about['behavior'])}** on {literal(about['model'])}: methods that have a strength are compared where"
        f" the {about['q']:.0%} quantile of KL(steered || base) over the tokens {where} meets a target at the end that moves it"
        f" more. Effects are in nats, between both ends, over {n} held-out items{beside}; intervals are 95 % t intervals over"
        " items."
    ]
    for dose in table["dose"].unique(maintain_order=True):
        part = table.filter(pl.col("dose") == dose)
        met = part.filter(pl.col("refused") == "")
        title = "Without a strength" if np.isnan(part["target"][0]) else f"At {part['target'][0]:.3g} nats"
        title += " (what the persona prompt moves the model by)" * (dose == "persona")
        shown = met.select([c for c in COLUMNS if c == "method" or not met[c].is_nan().all()] if len(met) else [])
        said.append(f"# {title}")
        said += [as_text(shown.with_columns(pl.col("method").map_elements(literal, pl.String)))] if len(met) else []
        said += [
            f"{literal(row['method'])}: {literal(row['refused'])}."
            for row in part.filter(pl.col("refused") != "").to_dicts()
        ]
        if len(met):
            said.append(_compared(met, by_item.filter(pl.col("dose") == dose)))
    said.append("\n".join(f"- {literal(name)}: {literal(what)}" for name, what in methods.items()))
    if left_out:
        said.append(
            "Left out: " + "; ".join(f"{literal(name)} ({literal(why)})" for name, why in left_out.items()) + "."
        )
    return "\n\n".join(said) + "\n"


def headline(about: Mapping, table: pl.DataFrame, by_item: pl.DataFrame) -> str:
    """The smallest target in a sentence or two: which method with a strength moves the behaviour most, w and a random direction
    beside it. Of what says little (`_little`) nothing."""
    rows = table.filter((pl.col("refused") == "") & pl.col("target").is_not_nan() & (pl.col("method") != "nothing"))
    rows = rows.filter(pl.col("effect").is_not_nan() & (pl.col("target") == pl.col("target").min())).to_dicts()
    ranked = [row for row in rows if not _little(row)]
    ranked.sort(key=lambda row: -row["effect"])
    if not ranked:
        return "No method met a target with answers that say something."
    known, first = {row["method"]: row for row in ranked}, ranked[0]
    start = f"Where the model is moved by {first['target']:.3g} nats per token ({about['q']:.0%} quantile of KL)"
    if not first["effect_low"] > 0:
        return f"{start}, no method with a strength is seen to move the behaviour ({len(ranked)} were tried)."
    part = by_item.filter(dose=first["dose"])
    moved = {name: one.sort("item")["moved"].to_numpy() for (name,), one in part.group_by("method")}
    yes = part.filter(method=first["method"]).sort("item")["wanted"].to_numpy() > 0
    tied = [
        row["method"]
        for row in ranked[1:]
        if not _apart(both_halves("by", moved[first["method"]] - moved[row["method"]], yes))
    ]
    beside = [
        f"{literal(m)} {_ends(known[m], 'effect')}" for m in (WHOLE, CONTROL) if m in known and m != first["method"]
    ]
    apart = f", not told apart from {', '.join(map(literal, tied))}" if tied else ""
    return (
        f"{start}, **{literal(first['method'])}** moves the behaviour most of the {len(ranked)} methods with a strength{apart}:"
        f" {_ends(first, 'effect')} nats{'; beside it ' if beside else ''}{', '.join(beside)}. Perplexity of plain text is then"
        f" {first['perplexity']:.2f} times as high. One seed, intervals over items."
    )


def _little(row: Mapping) -> bool:
    """Whether answers are too rare, or saturated, for the effect to say much."""
    return row["pmass"] < MIN_PMASS or abs(row["effect"]) > 2 * SATURATED


def _compared(rows: pl.DataFrame, by_item: pl.DataFrame) -> str:
    """One dose: who moves the behaviour most and whether that is told apart from the next and from a random direction, and at
    what cost."""
    ranked = rows.filter(pl.col("method") != "nothing").sort("effect", descending=True).to_dicts()
    if not ranked:
        return "Nothing could be compared."
    moved = {name: part.sort("item")["moved"].to_numpy() for (name,), part in by_item.group_by("method")}
    yes = by_item.filter(method=ranked[0]["method"]).sort("item")["wanted"].to_numpy() > 0
    first, worst = ranked[0], max(ranked, key=lambda r: r["perplexity"])
    pairs = [(first["method"], row["method"]) for row in ranked[1:2]]
    if WHOLE in moved:
        pairs += [(WHOLE, other) for other in (first["method"], CONTROL) if other in moved and other != WHOLE]
    said = [
        f"Most: {literal(first['method'])}, {_ends(first, 'effect')} nats",
        *(f"{literal(a)} beside {literal(b)}: {_against(moved[a] - moved[b], yes)}" for a, b in dict.fromkeys(pairs)),
        _surgical(ranked),
        _wrong(ranked),
        f"perplexity of plain text grows most under {literal(worst['method'])}, {worst['perplexity']:.2f} times",
    ]
    if flagged := [literal(r["method"]) for r in ranked if _little(r)]:
        why = "the answer words hold less than half of the probability at an end, or are saturated"
        said.append(f"effects that say little, as {why}: {', '.join(flagged)}")
    return "; ".join(said) + "."


def _wrong(ranked: list[dict]) -> str:
    """How many answers the leader moves the wrong way."""
    share, name = ranked[0]["wrong_way"], literal(ranked[0]["method"])
    return f"moved the wrong way: {share:.0%} of the answers under {name} (a direction of random sign: half of them)"


def _surgical(ranked: list[dict]) -> str:
    """The most surgical method, or how many are as surgical as it."""
    best = max(ranked, key=lambda r: r["surgical"])
    tied = [r for r in ranked if r["surgical"] > best["surgical"] - TIED]
    most = f"of at most {best['surgical_most']:.2f}"
    if len(tied) > 1:
        return f"surgical informedness is the same, {best['surgical']:+.2f} {most}, for {len(tied)} of {len(ranked)} methods"
    return f"most surgical: {literal(best['method'])}, {_ends(best, 'surgical')} {most}"


def _ends(row: Mapping, name: str) -> str:
    return f"{row[name]:+.2f} ({row[f'{name}_low']:+.2f} to {row[f'{name}_high']:+.2f})"


def _against(by_item: np.ndarray, yes: np.ndarray) -> str:
    """A paired difference over items, in words; both answer halves counted alike, as in the effect."""
    found = both_halves("by", by_item, yes)
    return f"{_ends(found, 'by')}{'' if _apart(found) else ', not told apart'}"


def _apart(found: Mapping) -> bool:
    return found["by_low"] > 0 or found["by_high"] < 0
