"""What a report opens with: in a sentence or two, and never more than its tables hold."""

from inspect import unwrap
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from ws.causal.words import headline as causal
from ws.stability.cross_words import headline as crossed
from ws.stability.words import headline as over_seeds
from ws.steer.effect import steering
from ws.steer.evaluate import headline as steered
from ws.use.benchmark_words import headline as beside


def sweep(**moved: tuple[float, float]) -> pl.DataFrame:
    """An alpha sweep of 12 claims per set: mean and spread of what the log-ratio moves by between -1 and +1."""
    g, rows = np.random.default_rng(0), []
    for name, (mean, sd) in moved.items():
        noise = g.standard_normal(12)
        each = mean + sd * (noise - noise.mean()) / noise.std(ddof=1)
        rows += [(a, name, f"{name}{i}", a * x / 2) for a in (-1.0, 1.0) for i, x in enumerate(each)]
    return pl.DataFrame(rows, schema=["alpha", "set", "claim", "logratio"], orient="row")


AGREES = {"agrees": True, "distance": 1.13, "low": 1.0, "high": 1.2}


@pytest.mark.parametrize(
    ("moved", "margin", "said", "unsaid"),
    [
        ({"false": (8.0, 1.0), "true": (4.0, 1.0), "negated": (6.0, 1.0)}, AGREES,
         ["towards", "+8.00 [+7.36, +8.64]", "some 50%", "move with it"], ["not"]),
        ({"false": (8.0, 1.0), "true": (0.1, 1.0)}, AGREES, ["no mere push to yes"], ["some"]),
        ({"false": (0.1, 1.0), "true": (4.0, 1.0)}, {"text": "none"}, ["**not seen to move**"], ["push", "Free answers"]),
        ({"false": (-3.0, 1.0)}, AGREES | {"agrees": False}, ["**against** the behaviour", "move **against it**"], ["push"]),
        ({"false": (8.0, 1.0)}, AGREES | {"low": -0.1}, ["Free answers, by their margin, are **not seen to move**"], []),
    ],
)  # fmt: skip
def test_what_a_weight_difference_does(moved, margin, said, unsaid):
    text = steered(sweep(**moved), {"text": ""}, margin)
    assert all(words in text for words in said), text
    assert not any(words in text for words in unsaid), text


def test_a_null_diff_says_that_it_is_one_and_statements_speak_of_their_halves():
    assert steered(sweep(false=(0.2, 1.0)), {}, AGREES, null=True).startswith("**A null diff")
    apart = {"moved_yes": 3.0, "moved_no": -2.5, "together": False}
    told = steered(sweep(yes=(3.0, 1.0), no=(2.5, 1.0)), apart, {})
    assert "+0.25 nats" in told and "a bias towards one word is not ruled out" in told
    assert "both halves" in steered(sweep(yes=(3.0, 1.0)), apart | {"moved_no": 2.0, "together": True}, {})


@pytest.mark.parametrize(
    ("nulls", "said"),
    [((0.1, 0.2, -0.3), "it steers"), ((9.0, -8.0), "is **not shown**"), ((), "two null diffs would tell")],
)
def test_whether_w_steers_in_a_sentence(nulls, said):
    short = steering([[5.0, 5.1, 5.2, 4.9]], nulls).short
    assert "+5.05 nats" in short and said in short and ("null diffs" in short)


def verdict(winner: str | None) -> SimpleNamespace:
    rivals = pl.DataFrame(
        {"rival": ["b_1"], "log_ratio": [np.log(1.5)], "crossed_lo": [np.log(1.2)], "crossed_hi": [np.log(1.9)]}
    )
    steer = SimpleNamespace(short="It steers.")
    return SimpleNamespace(winner=winner, S=3, rivals=rivals, reasons=["tied with c"], leader="a", steering=steer)


def test_the_verdict_over_seeds():
    text = unwrap(over_seeds)(verdict("a"))
    assert "**a wins** over 3 LoRA seeds" in text and "1.50 times the closest, b_1 (95 % 1.20 to 1.90" in text.replace(
        "\\", ""
    )
    text = unwrap(over_seeds)(verdict(None))
    assert text.startswith("**No winner** over 3 LoRA seeds: tied with c. Highest mean: a.") and "wins" not in text


def check(saturated: bool, p_max: float) -> SimpleNamespace:
    where = pl.DataFrame({"part": ["w", "writers"], "effect": [10.0, 3.0], "retention": [1.0, 0.3]})
    row = {"kind": "A-hypothesis", "p": 0.01, "excess": 0.5, "excess_low": 0.4, "excess_high": 0.6, "slope": 0.2,
           "p_forward": 0.01, "excess_forward": 0.5}  # fmt: skip
    whole = dict.fromkeys(row) | {"subspace": "w", "saturated": False, "p_max": None}
    rows = [whole, whole | {"subspace": "w_res"}, row | {"subspace": "mine", "saturated": saturated, "p_max": p_max}]
    return SimpleNamespace(where=where, candidates=pl.DataFrame(rows), setting={"pmass": 0.31})


def test_what_carries_the_behaviour():
    text = causal(check(False, 0.01))
    assert (
        "+10.00 nats" in text
        and "+3.00 alone (30%)" in text
        and "**1 of 1 candidates carry" in text
        and "`mine` +0.50" in text
    )
    assert "**0 of 1 candidates carry" in causal(check(False, 0.4)) and "`mine`" not in causal(check(False, 0.4))
    assert "**No candidate is ranked**" in causal(check(True, 0.01)) and "pmass 0.31" in causal(check(True, 0.01))


def test_the_benchmark_and_the_cross_matrix():
    rows = [("nothing", float("nan"), 0.0), ("w", 0.3, 5.0), ("mag_only", 0.3, 0.1), ("prompt", 0.3, 6.0)]
    table = pl.DataFrame(
        [
            {
                "method": m,
                "target": t,
                "effect": e,
                "effect_low": e - 1,
                "effect_high": e + 1,
                "perplexity": 1.2,
                "refused": "",
            }
            for m, t, e in rows
        ]
    )
    text = beside(table)
    assert (
        "**prompt** moves the behaviour most of 3 methods: +6.00" in text and "w +5.00" in text and "1.20 times" in text
    )
    assert beside(table.head(1)) == "No method met a target."
    one = {f"{p}{e}": v for p in ("behaviour", "bias", "yes", "no") for e, v in (("", 1.0), ("_lo", 0.5), ("_hi", 1.5))}
    moves = pl.DataFrame(
        [one | {"w": "kind", "own": True, "less_lo": 0.0}, one | {"w": "kind", "own": False, "less_lo": 0.2}]
    )
    assert crossed(moves) == "Is a weight difference specific to its behaviour? **1 of 1 specific (kind)**."
