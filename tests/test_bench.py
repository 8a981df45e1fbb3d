"""The benches' ratios: what a bench tells is collected, and one that got worse is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import growth, models, ratios

BENCH = Path(__file__).resolve().parents[1] / "bench"


def test_what_a_bench_tells_is_collected_and_one_that_fails_or_tells_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ratios, "HERE", tmp_path)
    tells = f"import sys\nsys.path.insert(0, {str(BENCH)!r})\nfrom ratios import told\n"
    (tmp_path / "good.py").write_text(f"{tells}assert told('first', 6.0, 2.0) == 3.0\ntold('second', 1.0, 4.0)\n")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "mute.py").write_text("")
    rows = ratios.run("good", [], tmp_path)
    assert [(r["bench"], r["name"], r["ratio"]) for r in rows] == [("good", "first", 3.0), ("good", "second", 0.25)]
    with pytest.raises(RuntimeError, match="bench/bad.py: exit code 3"):
        ratios.run("bad", [], tmp_path)
    with pytest.raises(RuntimeError, match="bench/mute.py: no ratio told"):
        ratios.run("mute", [], tmp_path)


def test_a_ratio_that_is_more_than_thirty_percent_below_the_committed_one_is_worse():
    rows = [
        {"bench": "b", "name": n, "ratio": r} for n, r in (("same", 4.0), ("less", 2.9), ("gone", 2.7), ("new", 0.1))
    ]
    committed = {"b: same": 4.0, "b: less": 4.0, "b: gone": 4.0}
    assert ratios.worse(rows, committed) == ["b: gone: ratio 2.70, committed 4.00"]
    rows = [{"bench": "b", "name": "same", "ratio": float("nan")}]
    untold = {"b: same": 1.0, "b: other": 1.0, "c: of a bench that was not run": 1.0}
    assert ratios.worse(rows, untold) == ["b: same: ratio nan, committed 1.00", "b: other: not told any more"]


def test_every_bench_of_speed_is_there_and_tells_ratios():
    for name in ratios.SPEED:
        assert "told(" in (BENCH / f"{name}.py").read_text(encoding="utf-8"), name
    committed = json.loads(ratios.COMMITTED.read_text(encoding="utf-8"))
    assert committed and all(key.split(":")[0] in ratios.SPEED and value > 0 for key, value in committed.items())
    unknown = subprocess.run([sys.executable, str(BENCH / "ratios.py"), "nonesuch"], capture_output=True, text=True)
    assert unknown.returncode == 2 and "nonesuch: no bench of speed" in unknown.stderr


def test_a_model_of_given_shapes_loads_and_its_w_is_found_again_as_factors(tmp_path):
    import ws

    given = models.config(d=512, layers=1, vocabulary=2048)
    folder, dense = models.make(tmp_path, given)
    lm, w = ws.load_lm(str(folder)), ws.load_diff(dense)
    d = lm.decoder
    assert (d.d, d.n_layers, d.vocab, lm.model.dtype) == (512, 1, 2048, torch.bfloat16)
    assert w.meta["factorised"]["matrices"] == len(w) == 7 and w.rank(w.names[0]) == models.RANK
    assert not ws.load_diff(models.make(tmp_path, given, "full")[1]).meta.get("factorised")
    shares = [w.norm(n) / float(p.float().norm()) for n, p in lm.model.named_parameters() if n in w]
    assert 0.002 < min(shares) and max(shares) < 0.2


def test_growth_is_fitted_to_what_it_was_made_of():
    """Times and memory that are sums of the terms give the coefficients back; the plan varies one thing at a time."""
    seconds, memory = [3.0, 0.4, 2.0, 0.7], [0.5, 0.1, 0.0, 0.05]
    runs = []
    for d, layers, vocabulary, seeds in growth.plan():
        time, space = growth.terms(d, layers, vocabulary)
        whole = sum(a * b for a, b in zip(seconds, time, strict=True))
        gib = sum(a * b for a, b in zip(memory, space, strict=True))
        shape = {"d": d, "layers": layers, "vocabulary": vocabulary, "seeds": seeds}
        runs.append(shape | {"seconds": [whole] + [whole / 5] * (seeds - 1), "gib": gib})
    found = growth.fitted(runs)
    assert found[0].tolist() == pytest.approx(seconds, abs=1e-6) and found[1].tolist() == pytest.approx(
        memory, abs=1e-6
    )
    assert "0.20 of the first" in growth.table(runs) and len(growth.figure(runs).axes) == 3
