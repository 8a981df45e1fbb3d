"""`ws trim`: a planted carrier is found, what was taken keeps the share at the least KL, and what cannot be kept is said."""

from dataclasses import replace

import polars as pl
import pytest
import torch
from test_cli import call

import ws
from ws.diff import LowRank, WeightDiff
from ws.steer.effect import effects
from ws.use.restrict import restricted
from ws.use.trim import State, trim


@pytest.fixture(scope="module")
def lm():
    return ws.load_lm("tiny")


@pytest.fixture(scope="module")
def behavior():
    """Four training topics, four held-out ones, one wording."""
    b = ws.load_behavior("sycophancy")
    topics = (*b.topics[:4], *b.topics[20:24])
    return replace(
        b,
        topics=topics,
        n_train_topics=4,
        claims=(),
        negations=(),
        true_claims=(),
        train_true_claims=(),
        probes=(),
    )


@pytest.fixture(scope="module")
def planted(lm):
    """Rank 2 of w's up and down in layers 4 and 5 carries the effect; q, and layer 3, hold small noise of rank 4."""
    w = restricted(ws.load_diff("tiny"), lm.decoder, roles=["up", "down"], layers=[4, 5], rank=2)[0]
    g, entries = torch.Generator().manual_seed(0), dict(w.entries)
    for l in (3, 4, 5):
        for role in ("q",) + ("down",) * (l == 3):
            out, width = lm.decoder.weight(l, role).shape
            B, A = torch.randn(out, 4, generator=g), torch.randn(4, width, generator=g)
            entries[lm.decoder.param_name(l, role)] = LowRank(B * 0.1 / (out * width) ** 0.5, A)
    return WeightDiff(entries, {"base_model": "tiny", "behavior": "sycophancy"})


@pytest.fixture(scope="module")
def found(lm, planted, behavior, tmp_path_factory):
    return trim(lm, planted, behavior, 0.97, cache=tmp_path_factory.mktemp("cache"), progress=False)


def test_a_planted_carrier_is_found(found, planted, lm, behavior):
    assert found.state == State(("up", "down"), (4, 5), 2)
    assert set(found.w) == {n for n in planted if "mlp" in n and ".3." not in n}
    whole, part = found.report.rows(named=True)
    assert whole["share"] == 1 and whole["energy"] == pytest.approx(1) and part["share"] > 0.97
    assert part["effect"] == pytest.approx(effects(lm, behavior, found.w).mean(), rel=1e-5)
    assert whole["effect"] == pytest.approx(effects(lm, behavior, planted).mean(), rel=1e-5)
    assert (part["rank"], part["matrices"], part["kl"] > 0) == (2, 4, True)
    assert (
        part["parameters"] == sum(e.B.numel() + e.A.numel() for e in found.w.entries.values()) < whole["parameters"] / 2
    )
    assert "(kept)" in found.text() and found.w.meta["part"] == "--roles up,down --layers 4-5 --rank 2"


def test_each_step_takes_the_least_kl_of_what_keeps_the_share(found):
    path = found.path
    assert path.row(0, named=True)["move"] == "all of w" and path["taken"].sum() == 4
    for (step,), rows in path.group_by("step", maintain_order=True):
        kept = rows.filter(pl.col("share") >= 0.97)
        assert rows.filter(pl.col("share") < 0.97)["kl"].is_nan().all()
        taken = rows.filter(pl.col("taken"))
        assert len(taken) <= 1 or step == path["step"].max()
        if len(taken) == 1 and len(kept) > 1 and step < path["step"].max():
            assert taken["kl"].item() == kept["kl"].min(), step
    assert path.filter("taken")["parameters"].is_sorted(descending=True)


def test_passes_are_kept(lm, planted, behavior, tmp_path, monkeypatch):
    small = planted.select(lambda name: ".5.mlp" in name)
    first = trim(lm, small, behavior, 0.9, cache=tmp_path, progress=False)
    monkeypatch.setattr("ws.steer.answers.weight_steer", None)  # a pass that is not kept fails
    again = trim(lm, small, behavior, 0.9, cache=tmp_path, progress=False)
    assert again.path.equals(first.path, null_equal=True) and again.report.equals(first.report)


def test_what_cannot_be_kept_is_said(lm, planted, behavior, tmp_path):
    one = planted.select(lambda name: name.endswith("layers.4.mlp.up_proj.weight"))
    options = {"cache": tmp_path, "progress": False}
    found = trim(lm, one, behavior, 0.999, **options)
    assert found.state is None and found.w is one and len(found.report) == 1
    assert "**No smaller part of w keeps 99.9% of its effect**: the nearest (rank 1) keeps " in found.text()
    single = restricted(one, lm.decoder, rank=1)[0]
    assert "it is one direction" in trim(lm, single, behavior, 0.5, **options).text()
    g = torch.Generator().manual_seed(0)
    idle = one.map(lambda _, e: LowRank(torch.randn(e.B.shape, generator=g) * 1e-7, e.A))
    with pytest.raises(ValueError, match="w has no effect to keep on the training topics of sycophancy: "):
        trim(lm, idle.scale(0), behavior, 0.9, **options)
    with pytest.raises(ValueError, match=r"keep-behaviour 1.2: must be above 0, at most 1"):
        trim(lm, one, behavior, 1.2, **options)
    with pytest.raises(ValueError, match="model.norm.weight: is no q, k, v, o, gate, up or down matrix"):
        trim(lm, WeightDiff({"model.norm.weight": torch.ones(128)}), behavior, 0.9, **options)
    with pytest.raises(ValueError, match="has 1 training topic, two are needed"):
        trim(lm, one, replace(behavior, n_train_topics=1), 0.9, **options)


def test_roles_that_lie_in_different_layers_are_not_parted_to_nothing(lm, planted, behavior, tmp_path):
    names = {lm.decoder.param_name(4, "up"), lm.decoder.param_name(5, "down")}
    found = trim(lm, planted.select(names.__contains__), behavior, 0.3, cache=tmp_path, progress=False)
    assert found.path["parameters"].min() > 0 and len(found.w) >= 1


def test_the_command(planted, behavior, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WS_TYPED_IN", str(tmp_path))
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    monkeypatch.setattr("ws.data.load_behavior", lambda name: behavior)
    ws.save_diff(planted, tmp_path / "planted.safetensors")
    line = ("trim", "planted.safetensors", "--keep-behaviour", "0.97")
    assert call(*line, "--save", "new/small.safetensors") == 0
    told = capsys.readouterr().out
    assert "as an adapter: ws export planted.safetensors --as peft --roles up,down --layers 4-5 --rank 2" in told
    assert len(ws.load_diff(tmp_path / "new" / "small.safetensors")) == 4 and (tmp_path / "new" / "small.tsv").is_file()
    assert (
        call("export", "new/small.safetensors", "--to", "adapter") == 0
        and (tmp_path / "adapter" / "README.md").is_file()
    )
    for bad, said in {
        "--save new/small.safetensors": "give a new file that ends in .safetensors",
        "--save small.pt": "give a new file that ends in .safetensors",
        "--keep-behaviour 0": "must be above 0",
    }.items():
        assert call("trim", "planted.safetensors", *bad.split()) == 2 and said in capsys.readouterr().err
