"""The cross matrix of behaviours: planted behaviours, biases and general answers are told apart; cells are kept."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from looks import check_looks
from scipy import stats
from test_statements import ALIKE, rows, written

import ws
from ws.cache.places import ASSETS
from ws.diff import WeightDiff, save_diff
from ws.diff.algebra import random_as
from ws.lab import check_job
from ws.ready import check_inputs
from ws.runs.here import Refused
from ws.runs.notebooks import Place
from ws.runs.once import prepare, run_notebook
from ws.stability import cross_ranks
from ws.stability.cross import cross_behaviors, interval, matrix_of, moves_of, spread
from ws.stability.cross_figures import heat_maps
from ws.stability.cross_ranks import kendall_w, rank_table, ranks_text
from ws.stability.cross_words import conclusion, verdicts
from ws.steer import answers

NAMES = ("kind", "tidy")


def planted(
    moves: dict[tuple[str, str], tuple[float, float]], seeds: int = 3, n: int = 8, noise: float = 0.3
) -> pl.DataFrame:
    """Rows in which the margin of the halves moves by (y, n) for each (w, statements), from -half of it to +half."""
    g, found = np.random.default_rng(0), []
    for (w, asked), by_half in moves.items():
        for half, move in zip(("yes", "no"), by_half, strict=True):
            of_claim = noise * g.standard_normal(n)
            for seed in range(seeds):
                shift = noise * g.standard_normal()
                for i in range(n):
                    for alpha in (-1.0, 1.0):
                        margin = alpha * (move + of_claim[i] + shift) / 2
                        found.append((w, seed, asked, alpha, half, f"{asked} {half} {i}", margin, 0.9))
    return pl.DataFrame(found, "w seed statements alpha set claim margin pmass".split(), orient="row")


def read(moves: dict) -> tuple[dict, str]:
    table = planted(moves)
    matrix, found = matrix_of(table, NAMES), moves_of(table, NAMES)
    return verdicts(found), conclusion(matrix, found, pl.DataFrame())


def test_specific_general_and_biased_differences_are_told_apart():
    kinds, text = read({
        ("kind", "kind"): (6.0, 5.0), ("kind", "tidy"): (1.0, 1.0),
        ("tidy", "tidy"): (5.0, 5.0), ("tidy", "kind"): (5.0, 5.0),
    })  # fmt: skip
    assert kinds == {"kind": "specific", "tidy": "general"}
    assert (
        "1 of 2 specific, 1 of 2 not shown to be specific" in text
        and "Intervals are for new LoRA seeds and new statements" in text
    )
    kinds, text = read({
        ("kind", "kind"): (6.0, -6.0), ("kind", "tidy"): (5.0, -5.0),
        ("tidy", "tidy"): (0.02, 0.01), ("tidy", "kind"): (0.0, 0.0),
    })  # fmt: skip
    assert kinds == {"kind": "bias", "tidy": "none"}
    few = planted({(a, b): (0.5, 0.4) for a in NAMES for b in NAMES}, seeds=1, n=4, noise=0.5)
    assert "specific" not in verdicts(moves_of(few, NAMES)).values()
    towards_no = planted({(a, b): (-6.0, 2.5) for a in NAMES for b in NAMES})
    assert set(verdicts(moves_of(towards_no, NAMES)).values()) == {"bias"}
    assert "not told apart from a bias towards one word" in text


def test_other_statements_are_compared_with_own_ones_that_are_seen_to_move():
    kinds, text = read({
        ("kind", "kind"): (0.05, 0.02), ("kind", "tidy"): (3.0, 3.0),
        ("tidy", "tidy"): (-4.0, -4.0), ("tidy", "kind"): (-2.0, -2.0),
    })  # fmt: skip
    assert kinds == {"kind": "none", "tidy": "against"}
    assert "1 of 2 against the behaviour, 1 of 2 not seen to move its own statements." in text
    of_kind, of_tidy = (line for line in text.splitlines() if line.startswith("  - "))
    assert "nats (less by" in of_kind and re.search(r"on kind: -[\d.]+ \(.*\) nats, \d\d % of that \(less", of_tidy)
    _, text = read({
        ("kind", "kind"): (6.0, 5.0), ("kind", "tidy"): (-2.0, -2.0),
        ("tidy", "tidy"): (6.0, 6.0), ("tidy", "kind"): (-0.1, -0.1),
    })  # fmt: skip
    assert "nats, the other way (less" in text and "against it" not in text


def test_moves_and_matrix_are_the_means_that_they_say():
    table = planted({(a, b): (6.0, 2.0) for a in NAMES for b in NAMES})
    moves = moves_of(table, NAMES)
    mean = {
        h: table.filter(w="kind", statements="tidy", set=h).group_by("alpha").agg(pl.col("margin").mean())
        for h in ("yes", "no")
    }
    y, n = (float(t.filter(alpha=1.0)["margin"][0] - t.filter(alpha=-1.0)["margin"][0]) for t in mean.values())
    row = moves.filter(w="kind", statements="tidy").row(0, named=True)
    assert (row["yes"], row["no"]) == pytest.approx((y, n))
    assert (row["behaviour"], row["bias"]) == pytest.approx(((y + n) / 2, (y - n) / 2))
    own = moves.filter(w="kind", statements="kind").row(0, named=True)
    assert row["less"] == pytest.approx(own["behaviour"] - row["behaviour"]) and np.isnan(own["less"])
    matrix = matrix_of(table, NAMES)
    both = matrix.filter(w="kind", statements="kind", alpha=1.0, set="both").row(0, named=True)
    assert both["n"] == 16 and both["seeds"] == 3 and both["accuracy"] == 1.0 and both["pmass"] == pytest.approx(0.9)
    assert matrix.filter(w="kind", statements="kind", alpha=-1.0, set="no")["accuracy"][0] < 0.5


def test_intervals_add_seeds_and_statements_in_quadrature():
    values = np.array([[1.0, 2.0, 4.0, 3.0], [2.0, 4.0, 4.0, 5.0], [0.0, 2.0, 1.0, 2.0]])
    mean, low, high = interval(*spread({"yes": values}, {"yes": 1.0}))
    of_seeds, of_claims = values.mean(axis=1), values.mean(axis=0)
    expected = np.hypot(stats.t.ppf(0.975, 2) * stats.sem(of_seeds), stats.t.ppf(0.975, 3) * stats.sem(of_claims))
    assert (mean, high - mean, mean - low) == pytest.approx((values.mean(), expected, expected))
    one = interval(*spread({"yes": values[:1]}, {"yes": 1.0}))
    assert one[1:] == pytest.approx(stats.t.interval(0.95, 3, values[0].mean(), stats.sem(values[0])))


def test_the_intervals_hold_what_they_say():
    g, hits = np.random.default_rng(1), 0
    for _ in range(400):
        values = (
            1.0 + 0.5 * g.standard_normal((3, 1)) + 0.8 * g.standard_normal((1, 30)) + 0.5 * g.standard_normal((3, 30))
        )
        _, low, high = interval(*spread({"yes": values}, {"yes": 1.0}))
        hits += low <= 1.0 <= high
    assert hits >= 0.92 * 400


@pytest.fixture
def two(tmp_path):
    tidy = [
        json.loads(json.dumps(row).replace("to help people", "order").replace("to hurt people", "a mess"))
        for row in rows()
    ]
    assert len(ALIKE) == 10
    return [
        ws.load_behavior(written(tmp_path / f"{name}.jsonl", some))
        for name, some in zip(NAMES, (rows(), tidy), strict=True)
    ]


def test_a_stopped_matrix_goes_on_where_it_was(two, tmp_path, monkeypatch):
    lm, w = ws.load_lm("tiny"), ws.load_diff("tiny")
    diffs = {"kind": {0: w, 1: w.scale(0.5)}, "tidy": {0: w.scale(-1.0), 1: w.scale(0.25)}}
    counted, real = [], answers.widened

    def stops(*args, **more):
        counted.append(1)
        if len(counted) == 5:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(answers, "widened", stops)
    with pytest.raises(KeyboardInterrupt):
        cross_behaviors(lm, two, diffs, cache=tmp_path, progress=False)
    found = cross_behaviors(lm, two, diffs, cache=tmp_path, progress=False)
    assert len(counted) == 5 + (2 + 4 * 2 * 2) - 4  # the base once per behaviour, four w's at two strengths
    again = cross_behaviors(lm, two, diffs, cache=tmp_path, progress=False)
    assert len(counted) == 19 and again.rows.equals(found.rows)
    kind = found.matrix.filter(w="kind", statements="kind", alpha=1.0, set="yes").row(0, named=True)
    plain = [
        ws.alpha_sweep(lm, two[0], d, [1.0], progress=False).filter(set="yes")["margin"].mean()
        for d in diffs["kind"].values()
    ]
    assert kind["margin"] == pytest.approx(np.mean(plain), abs=1e-5)
    alike = found.cosines.filter(w="kind", other="tidy")["cos"].to_list()
    assert sorted(alike) == pytest.approx([-1.0, -1.0, 1.0, 1.0]) and len(found.cosines) == 6
    found.save(tmp_path / "saved")
    names = {"cross_statements.csv", "cross_matrix.tsv", "cross_moves.tsv", "cross_cosines.tsv", "cross_conclusion.md"}
    assert {p.name for p in (tmp_path / "saved").iterdir()} == names
    check_looks(heat_maps(found.matrix, found.moves))


def test_what_makes_no_matrix_is_refused(two, tmp_path):
    lm, w = ws.load_lm("tiny"), ws.load_diff("tiny")
    for behaviors, diffs, told in (
        (two[:1], {"kind": {0: w}}, "needs two or more different behaviours, given are kind"),
        (two, {"kind": {0: w}}, "tidy: no weight difference is given"),
        ([two[0], ws.load_behavior("sycophancy")], {"kind": {0: w}}, "sycophancy: is no behaviour of statements"),
    ):
        with pytest.raises(ValueError, match=told):
            cross_behaviors(lm, behaviors, diffs, cache=tmp_path, progress=False)


def test_ranks_over_behaviours(monkeypatch):
    assert kendall_w(np.array([[1.0, 2, 3, 4]] * 3)) == pytest.approx(1.0)
    assert kendall_w(np.array([[1.0, 2, 3], [3, 2, 1]])) == pytest.approx(0.0) and np.isnan(
        kendall_w(np.array([[1.0, 2.0]]))
    )
    g = np.random.default_rng(0)
    blind = [kendall_w(np.array([g.permutation(9) for _ in range(3)]).astype(float)) for _ in range(400)]
    assert np.mean(blind) == pytest.approx(1 / 3, abs=0.03)

    def sweep(scores: dict[str, float]) -> SimpleNamespace:
        names = list(scores)
        kinds = ["ceiling" if n == "top" else "A-hypothesis" for n in names]
        sides = ["read" if n == "reads" else "mixed" for n in names]
        columns = {"subspace": names, "kind": kinds, "axis_kind": sides, "honest_joint": list(scores.values())}
        return SimpleNamespace(plain_summary=pl.DataFrame(columns))

    first = {"top": 0.9, "reads": 0.8, "a": 0.5, "b": 0.4, "c": 0.3, "d": 0.2, "e": 0.1, "only": 0.6}
    other = {"top": 0.9, "reads": 0.8, "a": 0.5, "b": 0.04, "c": 0.3, "d": 0.2, "e": 0.1, "nil": 0.0}
    monkeypatch.setattr(cross_ranks.Explanation, "load", lambda path: sweep(first if path.name == "first" else other))
    table = rank_table({"kind": {0: Path("first"), 1: Path("first")}, "tidy": {0: Path("other")}})
    assert table["candidate"].to_list() == ["a", "c", "b", "d", "e"] or table["candidate"][0] == "a"
    assert table.filter(candidate="b").select("rank kind", "rank tidy", "moved").row(0) == (2.0, 5.0, 3.0)
    assert "Over 2 behaviours the orders of 5 write and mixed candidates" in ranks_text(table)
    assert "two or more behaviours are needed" in ranks_text(rank_table({}))


def test_the_notebook_reads_what_is_finished(two, tmp_path, monkeypatch):
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    w = ws.load_diff("tiny")
    for i, name in enumerate(NAMES):
        for seed in (0, 1):
            path = tmp_path / "out" / "tiny" / name / "lora" / f"seed_{seed}" / "w.safetensors"
            path.parent.mkdir(parents=True)
            save_diff(w.scale((-1.0) ** i * (1 + 0.2 * seed)), path)
    for seed, sign in ((0, 1), (1, -1)):  # null diffs of one behaviour, and another adapter of the other
        null = random_as(w, seed).scale(sign)
        home = tmp_path / "out" / "tiny" / NAMES[0] / "lora" / f"seed_{seed}"
        save_diff(WeightDiff(null.entries, {"base_model": "tiny", "null": True}), home / "null_diff" / "w.safetensors")
    save_diff(random_as(w, 5), tmp_path / "out" / "tiny" / NAMES[1] / "dora" / "seed_1" / "w.safetensors")
    files = [str(tmp_path / f"{name}.jsonl") for name in NAMES]
    given = {"BEHAVIORS": files, "SEEDS": [0, 1], "OUT_DIR": str(tmp_path / "run"), "ATLAS_ADAPTERS": ["dora"]}
    done = run_notebook("cross_behaviours", given, quiet=True, check=check_job)  # as the command does
    assert done.ok, done.error
    assert {
        "cross_matrix.png",
        "cross_matrix.tsv",
        "cross_conclusion.md",
        "cross_ranks.tsv",
        "atlas.png",
        "atlas.md",
    } <= {p.name for p in done.folder.iterdir()}
    means = pl.read_csv(done.folder / "atlas_means.tsv", separator="\t")
    assert means.select("behavior", "adapter", "other", "other_adapter").rows()[0] == (
        NAMES[0],
        "lora",
        NAMES[0],
        "lora",
    )
    cos = {
        row[:4]: row[4:6]
        for row in means.select("behavior", "adapter", "other", "other_adapter", "cos", "outside").rows()
    }
    assert cos[NAMES[0], "lora", NAMES[1], "lora"] == (pytest.approx(-1), 2)  # the other is the first one's negative
    assert abs(cos[NAMES[0], "lora", NAMES[1], "dora"][0]) < 0.02 and len(means) == 6
    text, page = (done.folder / "atlas.md").read_text(), (done.folder / "cross_behaviours.html").read_text()
    assert "between behaviours, other seeds: -0." in text and "of 2 with a null band 2 lie outside" in text
    assert "lies with probability .95" in page and "How alike the weight differences are" in page
    with pytest.raises(Refused, match=r"seed_2/w\.safetensors: is not there; make it first: just nb weight_diff"):
        check_job(prepare("cross_behaviours", given | {"SEEDS": [0, 2]}), Place())
    for given, told in ((files[:1], "two or more files of statements with answers, has 1"), (files, None)):
        values = {"MODEL_ID": "tiny", "BEHAVIORS": given, "SEEDS": [0, 1]}
        with pytest.raises(ValueError, match=told) if told else nullcontext():
            check_inputs("cross_behaviours", values)
    (tmp_path / "claims.json").write_text((ASSETS / "sycophancy.json").read_text())
    with pytest.raises(ValueError, match="BEHAVIORS: sycophancy: is no file of statements with answers"):
        check_inputs("cross_behaviours", {"MODEL_ID": "tiny", "BEHAVIORS": [*files, str(tmp_path / "claims.json")]})
