"""What a report opens with: in a sentence or two, and never more than its tables hold."""

from inspect import unwrap
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from ws.causal.headline import headline as causal
from ws.stability.cross_words import headline as crossed
from ws.stability.words import headline as over_seeds
from ws.steer.effect import steering
from ws.steer.evaluate import headline as steered
from ws.steer.statements import together
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


CASES = [
    ({"false": (8.0, 1.0), "true": (4.0, 1.0), "negated": (6.0, 1.0)}, AGREES,
     ["towards", "+8.00 [+7.36, +8.64]", "true ones by +4.00 [+3.36, +4.64]", "some 50%", "move towards it"], ["not"]),
    ({"false": (8.0, 1.0), "true": (0.1, 1.0)}, AGREES, ["a push to yes whatever is claimed is not seen"], ["some"]),
    ({"false": (0.1, 1.0), "true": (4.0, 1.0)}, {"text": "none"}, ["**not seen to move**"], ["push", "Free answers"]),
    ({"false": (0.1, 1.0)}, AGREES | {"distance": -1.1, "low": -1.2, "high": -1.0},
     ["not seen", "move **against it**, -1.1"], []),
    ({"false": (-3.0, 1.0)}, AGREES, ["**against** the behaviour", "move towards it"], ["push"]),
    ({"false": (8.0, 1.0)}, AGREES | {"low": -0.1}, ["Free answers, by their margin, are **not seen to move**"], []),
    ({"false": (8.0, 1.0)}, AGREES | {"low": None, "high": None}, ["of one topic and so without an interval"], ["not seen"]),
]  # fmt: skip


@pytest.mark.parametrize(("moved", "margin", "said", "unsaid"), CASES)
def test_what_a_weight_difference_does(moved, margin, said, unsaid):
    text = steered(sweep(**moved), {"text": ""}, margin)
    assert all(words in text for words in said), text
    assert not any(words in text for words in unsaid), text


def test_a_null_diff_one_claim_rare_words_and_statements():
    assert steered(sweep(false=(0.2, 1.0)), {}, AGREES, null=True).startswith("**A null diff")
    alone = sweep(false=(2.0, 0.0)).filter(claim="false0")
    assert "+2.00 nats between alpha -1 and +1; there is no interval" in steered(alone, {}, {})
    assert "hold 0.31 of the probability" in steered(sweep(false=(8.0, 1.0)), {"least_pmass": 0.31}, {})
    apart = ((3.0, 2.5, 3.5), (-2.5, -3.0, -2.0), "a bias towards the yes-word")
    for yes, no, said in (apart, ((-2.0, -3.0, -1.0), (-2.0, -3.0, -1.0), "against the behaviour")):
        alike, told = together(yes, no)
        verdict = {"moved_yes": yes[0], "moved_no": no[0], "together": alike, "said": told}
        text = steered(sweep(yes=(3.0, 1.0)), verdict, {})
        assert said in text and f"{yes[0]:+.2f} nats (Yes half) and {no[0]:+.2f}" in text


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


NULLS = pl.DataFrame({"candidate": ["a"], "R_act_above_null": [False], "R_w_above_null": [True], "R_w_null_hi": [3.0]})


def test_the_verdict_over_seeds():
    text = unwrap(over_seeds)(verdict("a"), NULLS)
    assert "**a wins** over 3 LoRA seeds" in text and "1.50 times the closest, b_1 (95 % 1.20 to 1.90" in text.replace(
        "\\", ""
    )
    assert "R_act **not** above null diffs, R_w above null diffs" in text
    text = unwrap(over_seeds)(verdict(None), NULLS)
    assert text.startswith("**No winner** over 3 LoRA seeds: tied with c. Highest mean: a.") and "wins" not in text


def check(**one) -> SimpleNamespace:
    where = pl.DataFrame({"part": ["w", "writers"], "effect": [10.0, 3.0], "retention": [1.0, 0.3]})
    row = {"kind": "A-hypothesis", "p": 0.01, "excess": 0.5, "excess_low": 0.4, "excess_high": 0.6, "slope": 0.2, "p_max": 0.01,
           "p_forward": 0.01, "excess_forward": 0.5, "saturated": False}  # fmt: skip
    whole = dict.fromkeys(row) | {"subspace": "w", "saturated": False}
    rows = [whole, whole | {"subspace": "w_res"}, row | {"subspace": "mine"} | one]
    return SimpleNamespace(where=where, candidates=pl.DataFrame(rows), setting={"pmass": 0.31})


@pytest.mark.parametrize(
    ("one", "said"),
    [
        ({}, "**1 of 1 candidates carry more"),
        ({"p_max": 0.4}, "**0 of 1 candidates carry"),
        ({"p_forward": 0.9, "excess_forward": -0.2}, "**0 of 1 candidates carry"),
        ({"p_max": float("nan")}, "equal energy** (max-T, p < .05; 1 undecided)"),
        ({"saturated": True}, "**No candidate is ranked**: the answer words hold less than half of the probability (pmass 0.31"),
        ({"slope": 0.99}, "holds the score's own slope"),
        ({"p": float("nan")}, "No candidate was held against controls"),
    ],
)  # fmt: skip
def test_what_carries_the_behaviour(one, said):
    text = causal(check(**one))
    assert said in text and "+10.00 nats" in text and "+3.00 alone (30%)" in text
    assert ("`mine` +0.50 [+0.40, +0.60] nats (95 % over claims)" in text) == (not one)


def benchmarked(**effects: float) -> tuple:
    rows = [
        {"method": m, "dose": "0.3", "target": 0.3, "effect": e, "effect_low": e - 0.5, "effect_high": e + 0.5, "perplexity": 1.2,
         "refused": "", "pmass": 0.9} for m, e in effects.items()
    ]  # fmt: skip
    items = [
        {"dose": "0.3", "method": m, "item": i, "moved": e + (-1) ** i * 0.1 * (k + 1), "wanted": 1.0}
        for k, (m, e) in enumerate(effects.items())
        for i in range(8)
    ]
    return {"q": 0.95}, pl.DataFrame(rows), pl.DataFrame(items)


def test_the_benchmark():
    text = beside(*benchmarked(nothing=9.0, w=5.0, mag_only=0.1, gradient=6.0))
    assert "**gradient** moves the behaviour most of the 3 methods with a strength: +6.00" in text and "w +5.00" in text
    assert "95% quantile" in text and "1.20 times as high" in text and "told apart" not in text
    assert "not told apart from gradient" in beside(*benchmarked(w=5.0, gradient=4.99))
    assert "no method with a strength is seen to move" in beside(*benchmarked(w=-2.0, mag_only=-0.1))
    about, table, items = benchmarked(w=5.0, gradient=6.0)
    lost = table.with_columns(effect=pl.when(pl.col("method") == "gradient").then(float("nan")).otherwise("effect"))
    assert "**w** moves" in beside(about, lost, items)
    assert "**w** moves" in beside(
        about, table.with_columns(pmass=pl.when(method="gradient").then(0.1).otherwise(0.9)), items
    )
    assert beside(about, table.head(0), items) == "No method met a target with answers that say something."


def test_the_cross_matrix():
    one = {f"{p}{e}": v for p in ("behaviour", "bias", "yes", "no") for e, v in (("", 1.0), ("_lo", 0.5), ("_hi", 1.5))}

    def told(less: float, pmass: float) -> str:
        rows = [one | {"w": "kind", "own": own, "less_lo": less, "least_pmass": pmass} for own in (True, False)]
        return crossed(pl.DataFrame(rows))

    assert told(0.2, 0.9) == "Is a weight difference specific to its behaviour? **1 of 1 specific (kind)**."
    assert "1 of 1 not shown to be specific" in told(float("nan"), 0.9)
    assert "Of kind the answer words are too rare" in told(0.2, 0.01)
