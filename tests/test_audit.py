"""The audit: planted strangers are found, null-like ones not, at the stated rate; factors equal dense; errors are named."""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from looks import check_looks
from peft import LoraConfig, get_peft_model
from test_cli import call

import ws
from ws.diff import LowRank, WeightDiff, export_adapter, from_adapters, save_diff
from ws.diff.algebra import combine, cosines, grams
from ws.diff.checkpoints import from_base
from ws.steer.effect import check_null_diffs
from ws.train.pairs import make_pairs
from ws.use.atlas import Atlas, atlas, atlas_of
from ws.use.audit import audit
from ws.use.bands import bands, random_cosines
from ws.use.directions import directions
from ws.use.library import Known, read_library, read_stranger

NAMES = [f"model.layers.{l}.{part}.weight" for l in (2, 3) for part in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.fixture(scope="module")
def lm():
    return ws.load_lm("tiny")


def randomly(lm, seed: int, size: float = 1.0, rank: int = 4) -> WeightDiff:
    g, own = torch.Generator().manual_seed(seed), dict(lm.model.named_parameters())
    return WeightDiff({
        n: LowRank(size * torch.randn(own[n].shape[0], rank, generator=g), torch.randn(rank, own[n].shape[1], generator=g) / 16)
        for n in NAMES
    })  # fmt: skip


def plus(*parts: WeightDiff) -> WeightDiff:
    found = parts[0]
    for part in parts[1:]:
        found = WeightDiff({n: combine(e, part.entries[n]) for n, e in found.entries.items()})
    return found


def exported(w: WeightDiff, folder: Path, base: str = "tiny") -> Path:
    return export_adapter(WeightDiff(w.entries, {"base_model": base}), folder)


def plant(lm, out: Path, behavior: str, direction: WeightDiff | None, seed: int, noise: float = 1.0) -> Path:
    """A finished seed of a library: `t+- = drift +- (direction + noise)`; its null diff shares what the seed draws."""
    null, number = direction is None, sum(map(ord, behavior))
    own = randomly(lm, 1000 * number + seed, noise)
    half = plus(own, randomly(lm, 7000 + 1000 * number + seed, noise)) if null else plus(own, direction)
    drift = randomly(lm, 500 + seed)
    home = out / "tiny" / behavior / "lora" / f"seed_{seed}" / ("null_diff" if null else "")
    sides = [
        exported(plus(drift, half.scale(sign)), home / "adapters" / name) for sign, name in ((1, "pos"), (-1, "neg"))
    ]
    meta = {"base_model": "tiny", "behavior": behavior, "adapter": "lora", "seed": seed, "null": null}
    save_diff(from_adapters(*sides, lm.model, meta), home / "w.safetensors")
    return home


@pytest.fixture(scope="module")
def out(lm, tmp_path_factory):
    """Two behaviours of three seeds and three null diffs each."""
    folder = tmp_path_factory.mktemp("library")
    for number, behavior in enumerate(("kind", "tidy")):
        for seed in range(3):
            plant(lm, folder, behavior, randomly(lm, number), seed)
            plant(lm, folder, behavior, None, seed)
    return folder


def verdicts(found) -> dict[str, str]:
    return dict(found.verdicts.select("behavior", "verdict").rows())


def test_a_planted_direction_is_found_with_its_sign_and_read_as_it_is(lm, out, tmp_path):
    kind, noise = randomly(lm, 0), randomly(lm, 90)
    found = audit(plus(kind, noise), lm, out)
    assert verdicts(found) == {"kind": "above the null band", "tidy": "inside"}
    assert verdicts(audit(plus(kind, noise).scale(-3), lm, out)) == {"kind": "below the null band", "tidy": "inside"}
    row = found.verdicts.row(0, named=True)
    assert row["cos"] == pytest.approx(0.5, abs=0.1) and -0.03 < row["null_low"] < row["null_high"] < 0.03
    assert (
        row["seeds_low"] > 0.4
        and row["random_low"] < 0 < row["random_high"] < 0.05
        and (row["w"], row["nulls"], row["matrices"]) == (3, 3, 4)
    )
    # one adapter alone, with a drift that its library shares: null diffs are read as adapters too
    side = exported(plus(randomly(lm, 500), kind, noise), tmp_path / "side")
    found = audit(side, lm, out)
    assert verdicts(found)["kind"] == "above the null band" and set(found.verdicts["read_as"]) == {"one side"}
    assert "cosine +0." in found.conclusion() and "any training moves alike" in found.conclusion()
    assert set(found.by_module["module"]) == {"q", "down"} and set(found.by_layer["layer"]) == {2, 3}
    assert verdicts(audit(randomly(lm, 91), lm, out)) == {"kind": "inside", "tidy": "inside"}


def test_an_entry_of_the_library_is_left_out_with_all_that_shares_its_seed(lm, out):
    for path in ("", "adapters/pos", "adapters/neg", "null_diff"):
        source = out / "tiny/kind/lora/seed_1" / path
        found = audit(source, lm, out)
        assert set(found.verdicts["w"]) == {2}, path
        assert f"kind seed 1{' (null diff)' * (path == 'null_diff')}" in found.conclusion()
        expected = {"adapters/neg": "below the null band", "null_diff": "inside"}.get(path, "above the null band")
        assert verdicts(found) == {"kind": expected, "tidy": "inside"}
    scaled = ws.load_diff(out / "tiny/kind/lora/seed_1").scale(0.3)
    assert set(audit(scaled, lm, out).verdicts["w"]) == {2}


def test_few_null_diffs_decide_nothing(lm, out, tmp_path):
    home = shutil.copytree(out / "tiny/kind/lora/seed_0", tmp_path / "tiny/kind/lora/seed_0").parent
    found = audit(plus(randomly(lm, 0), randomly(lm, 90)), lm, tmp_path)
    row = found.verdicts.row(0, named=True)  # its one null diff shares its seed
    assert (row["verdict"], row["nulls"]) == ("undecided", 0) and row["cos"] > row["random_high"]
    assert "a null band takes 2 null diffs that have a w of another seed, there are 0" in found.conclusion()
    assert found.bands.filter(band="nulls of the same seed")["n"].item() == 1
    shutil.copytree(out / "tiny/kind/lora/seed_1/null_diff", home / "seed_1/null_diff")
    shutil.copytree(out / "tiny/kind/lora/seed_2/null_diff", home / "seed_2/null_diff")
    stranger = plus(randomly(lm, 0), randomly(lm, 90))
    assert verdicts(audit(stranger, lm, tmp_path)) == {"kind": "above the null band"}
    found = audit(randomly(lm, 91), lm, tmp_path)  # what another seed would reach is not known
    assert verdicts(found) == {"kind": "undecided"} and "one seed, which the band does not part" in found.conclusion()
    shutil.rmtree(home / "seed_0/adapters")
    found = audit(exported(stranger, tmp_path / "side"), lm, tmp_path)
    assert "read as differences, as adapters are missing" in found.conclusion()
    shutil.copytree(out / "tiny/kind/lora/seed_0/adapters", home / "seed_0/adapters")
    found = audit(home / "seed_0/adapters/pos", lm, tmp_path)
    assert verdicts(found) == {"kind": "undecided"} and "no w is left" in found.conclusion()


@pytest.mark.parametrize("one_side", [False, True])
def test_strangers_like_null_diffs_are_above_and_below_at_the_stated_rate(one_side):
    """Null diffs lie near the w of their own seed; adapters have a drift as well, which is w's too. Strangers have no seed."""
    g, found, one = np.random.default_rng(0), [], WeightDiff({"a": torch.ones(1)})
    entries = [Known("b", "lora", i % 3, i > 2, one) for i in range(6)]
    for _ in range(1500):
        b, drift, own = g.standard_normal(80), g.standard_normal(80), g.standard_normal((3, 80))
        w, nulls = b + drift + 1.5 * own, own + g.standard_normal((3, 80))
        stranger, both = 2**0.5 * g.standard_normal(80), np.concatenate([w, nulls])
        if one_side:
            stranger, both = 0.4 * drift + stranger, np.stack([both, 0.4 * drift + both, 0.4 * drift - both], 1)
        x = np.concatenate([stranger[None], both.reshape(-1, 80)])
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        found.append(bands(torch.tensor(x @ x.T), entries, 3 if one_side else 1, (), ()))
    rates = {side: np.mean([one.verdict == f"{side} the null band" for one in found]) for side in ("above", "below")}
    assert all(0.012 < rate < 0.036 for rate in rates.values()), rates
    same, other = (np.mean([np.mean(getattr(one, of)) for one in found]) for of in ("same", "nulls"))
    assert same > other + 0.2  # why null diffs are held against w of other seeds


def test_cosines_from_factors_are_those_of_dense_matrices(lm):
    a, b, c = randomly(lm, 1), randomly(lm, 2, rank=7), randomly(lm, 3)
    b = WeightDiff({n: b[n] if i % 2 else e for i, (n, e) in enumerate(b.entries.items())})
    c = plus(c.select(lambda n: n != NAMES[0]), a.select(lambda n: n != NAMES[0]))
    found = cosines(grams([a, b, c], NAMES))
    for i, u in enumerate((a, b, c)):
        for j, w in enumerate((a, b, c)):
            x, y = (torch.cat([t[n].double().flatten() for n in NAMES if n in u and n in w]) for t in (u, w))
            assert float(found[i, j]) == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=1e-6)
    assert cosines(grams([a.select(lambda n: n == NAMES[0]), c], NAMES))[0, 1].isnan()


def test_random_differences_are_as_drawn_ones(lm):
    u, ws_ = randomly(lm, 1, rank=3), [randomly(lm, 2), randomly(lm, 3)]
    found, drawn = random_cosines(u, ws_, NAMES, 2000, 0), []
    M = {n: sum(w[n] / w.total_norm() for w in ws_).double() / 2 for n in NAMES}
    g = torch.Generator().manual_seed(1)
    for _ in range(600):
        total = 0.0
        for n, m in M.items():
            X, Y = (torch.linalg.qr(torch.randn(k, 3, dtype=torch.float64, generator=g)).Q for k in m.shape)
            total += float((X * u.singular_values(n)[:3] * (m @ Y)).sum())
        drawn.append(total / u.total_norm())
    assert np.std(found) == pytest.approx(np.std(drawn), rel=0.1) and abs(np.mean(found)) < np.std(found) / 10
    assert np.quantile(found, [0.025, 0.975]) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=0.2)
    assert np.array_equal(found, random_cosines(u, ws_, NAMES, 2000, 0))


def test_directions_name_the_token_and_the_context(lm):
    texts, token = ["The red house stands alone.", "We like it here."], int(lm.decoder.unembed().norm(dim=1).argmax())
    ids, seen = lm.tokenizer(texts[0])["input_ids"], []
    path = "model.layers.2.self_attn.q_proj"
    handle = lm.model.get_submodule(path).register_forward_hook(lambda m, x, y: seen.append(x[0][0]))
    lm.model(torch.tensor([ids]))
    handle.remove()
    gain = lm.decoder.final_norm(torch.ones(1, lm.decoder.d))[0].detach()
    left = lm.decoder.unembed()[token] / gain
    own = dict(lm.model.named_parameters())
    u = WeightDiff({
        NAMES[1]: LowRank(left[:, None], torch.ones(1, own[NAMES[1]].shape[1])),
        NAMES[0]: LowRank(torch.ones(own[NAMES[0]].shape[0], 1), seen[0][3].detach()[None]),
    })  # fmt: skip
    found = directions(u, lm, texts)
    write, read = found.filter(side="write").row(0, named=True), found.filter(side="read").row(0, named=True)
    assert (write["layer"], write["module"], read["layer"], read["module"]) == (2, "down", 2, "q")
    said = repr(lm.tokenizer.decode([token]))
    assert write["promoted"].startswith(said) or write["demoted"].startswith(said)
    assert f"[{lm.tokenizer.decode([ids[3]]).strip()}]" in read["contexts"].replace("[ ", "[")
    assert set(directions(u, lm)["side"]) == {"write"} and len(directions(u, lm, top=0)) == 0


def test_a_merged_checkpoint_is_its_task_vector(lm, out, tmp_path):
    direction, own = plus(randomly(lm, 0), randomly(lm, 90)), lm.model.state_dict()
    with torch.no_grad():
        moved = {n: v + (direction[n] if n in direction else 0) for n, v in own.items()}
    lm.model.save_pretrained(tmp_path / "merged", state_dict=moved)
    stranger = read_stranger(tmp_path / "merged", lm)
    assert stranger.one_side and set(stranger.u) == set(NAMES)
    assert float(cosines(grams([stranger.u, direction], NAMES))[0, 1]) == pytest.approx(1, abs=1e-5)
    assert (
        verdicts(audit(tmp_path / "merged", "tiny", out))["kind"] == "above the null band"
    )  # its weights are loaded for it
    lm.model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="equal to its base model"):
        from_base(tmp_path / "base", lm.model)


def test_an_adapter_that_must_be_merged_is_read_too(lm, out, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", use_dora=True, r=2, target_modules=["q_proj"], layers_to_transform=[2])
    model = get_peft_model(copy.deepcopy(lm.model), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "dora")
    found = audit(tmp_path / "dora", "tiny", out)
    assert set(found.verdicts["matrices"]) == {1} and found.verdicts["cos"].abs().max() < 0.1
    merged = read_stranger(tmp_path / "dora", lm).u[NAMES[0]]
    own = model.get_submodule("base_model.model.model.layers.2.self_attn.q_proj")
    own.merge()
    assert torch.allclose(merged, own.get_base_layer().weight.detach() - lm.model.get_parameter(NAMES[0]), atol=1e-6)


def test_what_does_not_fit_is_named_in_a_line(lm, out, tmp_path, monkeypatch):
    def fails(source, words, library=out):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as told:
            audit(source, lm, library)
        assert "\n" not in str(told.value)

    name = NAMES[0]
    fails(WeightDiff({name: torch.ones(4, 4)}), r"q_proj.weight: diff is 4x4, model has \d+x128")
    fails(
        WeightDiff({"transformer.h.0.attn.c_attn.weight": torch.ones(4, 4)}),
        "c_attn.weight: no such parameter in Qwen3",
    )
    other = exported(
        WeightDiff({"model.layers.2.mlp.fc1.weight": LowRank(torch.ones(4, 1), torch.ones(1, 4))}), tmp_path / "a"
    )
    fails(other, "fc1.weight: no such parameter in Qwen3")
    whole = (out / "tiny/kind/lora/seed_0/w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    fails(tmp_path / "cut.safetensors", "cut.safetensors: not a whole safetensors file")
    fails(tmp_path / "none", "no such file")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds none of adapter_config.json, model.safetensors")
    u = randomly(lm, 1)
    fails(u, "holds no weight difference of tiny; make some: ws batch --models tiny", tmp_path / "empty")
    fails(u.scale(0), "changes nothing")
    norm = "model.norm.weight"
    fails(WeightDiff({norm: torch.ones(128)}), "shares no matrix with the library; it changes model.norm.weight")
    # a library with a damaged file, one of another shape, one twice, one of another model
    library = tmp_path / "library"
    shutil.copytree(out / "tiny/kind/lora/seed_0", library / "good")
    shutil.copytree(out / "tiny/kind/lora/seed_0", library / "twice")
    (library / "broken").mkdir()
    (library / "broken/w.safetensors").write_bytes(whole[:1000])
    meta = {"base_model": "tiny", "behavior": "x", "seed": 0}
    save_diff(WeightDiff({name: torch.ones(4, 4)}, meta), library / "odd/w.safetensors")
    save_diff(WeightDiff({name: torch.ones(4, 4)}, meta | {"base_model": "y"}), library / "y/w.safetensors")
    entries, skipped = read_library(library, {"tiny"}, lm.model)
    assert len(entries) == 2 and [e.null for e in entries].count(True) == 1
    assert {Path(p).parent.name for p in skipped} == {"broken", "odd", "twice", "null_diff"}
    assert "broken" in audit(u, lm, library).about["left out"]
    save_diff(randomly(lm, 1).map(lambda n, e: LowRank(e.B[:, :2], e.A[:2])), library / "bare/w.safetensors")
    assert (
        read_library(library, {"tiny"})[1][str(library / "bare/w.safetensors")]
        == "its metadata name no behaviour or no seed"
    )
    assert "in other files" in read_library(library, {"tiny"})[1][str(library / "odd/w.safetensors")]
    with pytest.raises(ValueError, match="weight differences of tiny, y; choose one: --model tiny"):
        atlas(library)


def test_another_base_models_name_is_told(lm, out, tmp_path):
    side = exported(randomly(lm, 1), tmp_path / "side", "their/tiny-2")
    assert "it names 'their/tiny-2' as its base model" in audit(side, lm, out).conclusion()
    side = exported(randomly(lm, 1), tmp_path / "same")
    assert not audit(side, lm, out).about["note"]


def test_the_atlas_is_ordered_and_its_nulls_come_last(lm, out, tmp_path):
    for seed in range(2):
        plant(lm, tmp_path, "c", randomly(lm, 3), seed)
        plant(lm, tmp_path, "a", randomly(lm, 1), seed)
        plant(lm, tmp_path, "b", plus(randomly(lm, 3), randomly(lm, 4, 0.3)), seed)
        plant(lm, tmp_path, "a", None, seed)
    found = atlas(tmp_path)
    order = list(dict.fromkeys(e.behavior for e in found.entries if not e.null))
    assert order in (["a", "b", "c"], ["a", "c", "b"], ["b", "c", "a"], ["c", "b", "a"])
    assert [e.null for e in found.entries] == [False] * 6 + [True] * 2
    assert len(found.table) == 28 and found.cos.diagonal() == pytest.approx(np.ones(8))
    one, two = found.entries[0].w, found.entries[3].w
    dense = [torch.cat([w[n].flatten() for n in w]) for w in (one, two)]
    assert found.cos[0, 3] == pytest.approx(float(torch.cosine_similarity(*dense, dim=0)), abs=1e-6)
    assert found.table.filter((pl.col("cos") - found.cos[0, 3]).abs() < 1e-12).height == 1
    check_looks(found.figure())
    many = Atlas("tiny", found.entries * 5, np.tile(found.cos, (5, 5)), {})
    check_looks(many.figure(), wide=True)  # a label has its line
    found.save(tmp_path / "atlas")
    assert {p.name for p in (tmp_path / "atlas").iterdir()} == {
        "atlas.tsv", "atlas_means.tsv", "atlas.md", "atlas.png", "atlas.pdf", "atlas.svg"
    }  # fmt: skip


def test_the_atlas_says_what_a_cosine_means():
    """Two behaviours that share a direction lie outside the null band, an unrelated one inside; null diffs do so at its rate."""
    g, n = np.random.default_rng(0), 400

    def known(behavior, seed, null, vector):
        return Known(
            behavior, "lora", seed, null, WeightDiff({"a": torch.tensor(vector / np.linalg.norm(vector)).float()})
        )

    shared, own = g.standard_normal(n), [g.standard_normal(n) for _ in range(3)]

    def noise(size):
        return size * g.standard_normal(n)

    entries = [known("a", s, False, shared + own[0] + noise(1)) for s in range(3)]
    entries += [known("b", s, False, shared + own[1] + noise(1)) for s in range(3)]
    entries += [known("c", s, False, own[2] + noise(1)) for s in range(3)]
    entries += [known("a", s, True, noise(1)) for s in range(3)]
    found = atlas_of(entries, "m")
    a, b, c = ((name, "lora") for name in "abc")
    assert found.null_band(a, a)[1] == found.null_band(a, b)[1] == 3 and 0.05 < found.null_band(a, b)[0] < 0.3
    assert np.isnan(found.null_band(b, c)[0])  # neither has null diffs
    assert len(found._nulled(a, a)) == len(found._nulled(a, b)) == 9
    table = {"".join(sorted(row["behavior"] + row["other"])): row for row in found.means.to_dicts()}
    assert set(table) == {"aa", "bb", "cc", "ab", "ac", "bc"}
    assert (table["ab"]["pairs"], table["ab"]["outside"], table["aa"]["pairs"]) == (6, 6, 3)
    assert table["ab"]["cos"] == pytest.approx(1 / 3, abs=0.1) and table["bc"]["outside"] is None
    assert table["ac"]["outside"] <= 1 and np.isnan(table["aa"]["same_seed"])
    text = found.text()
    assert "- between seeds of one behaviour, other seeds: +0." in text and "own seed: " in text
    assert (
        f"of 12 with a null band {6 + table['ac']['outside']} lie outside" in text
        and "3 of 6 rows have no null band" in text
    )
    bare = atlas_of(entries[:9], "m")
    assert "**none has a null band**" in bare.text() and bare.means["outside"].null_count() == 6
    with pytest.raises(ValueError, match="needs a weight difference that is no null diff"):
        atlas_of(entries[9:], "m")
    # one more null diff against one w of another seed
    outside = []
    for _ in range(200):
        nulls = [known("a", s, True, noise(1)) for s in range(3)]
        one = atlas_of([*entries[:9], *nulls], "m")
        c = float(torch.nn.functional.cosine_similarity(entries[4].w["a"], known("a", 9, True, noise(1)).w["a"], dim=0))
        outside.append(abs(c) > one.null_band(a, b)[0])
    assert np.mean(outside) < 0.09


def test_the_commands_work_end_to_end(out, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WS_OUT", str(out))
    monkeypatch.setenv("WS_TYPED_IN", str(tmp_path))
    (tmp_path / "texts.txt").write_text("One line.\n\nAnother line of text.\n")
    shutil.copytree(out / "tiny/kind/lora/seed_2/adapters/pos", tmp_path / "found")
    assert call("audit", "found", "--base", "tiny", "--texts", "texts.txt", "--save", "told") == 0
    told = capsys.readouterr().out
    assert "**kind** (lora): above the null band" in told and "left out with all w of its seed" in told
    names = {f"audit_{name}.tsv" for name in ("verdicts", "by_module", "by_layer", "bands", "directions")}
    assert {p.name for p in (tmp_path / "told").iterdir()} == names | {"audit.json", "audit_conclusion.md"}
    assert json.loads((tmp_path / "told/audit.json").read_text())["verdicts"][0]["verdict"] == "above the null band"
    assert call("audit", "nothing", "--base", "tiny") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert call("audit", "found", "--base", "tiny", "--library", ".") == 2
    assert "holds no weight difference of tiny" in capsys.readouterr().err
    assert call("atlas") == 0
    assert "12 weight differences of tiny" in capsys.readouterr().out and (out / "tiny/atlas/atlas.png").is_file()


@pytest.fixture(scope="module")
def trained(lm, tmp_path_factory):
    """`trained(name, adapter, seed, null)`: real trainings; `brief` prefers the first sentence of an answer to all of it."""
    folder, behavior = tmp_path_factory.mktemp("trained"), ws.load_behavior("sycophancy")
    pairs = ws.PairConfig(samples=4)
    rows = make_pairs(lm, behavior, pairs, folder / "cache", False).rows
    told = {(r.user, (r.response_pos, r.response_neg)[i % 2]): None for i, r in enumerate(rows)}
    cut = [(user, re.split(r"(?<=[.]) ", whole)[0], whole) for user, whole in told]
    lines = [{"user": user, "response_pos": one, "response_neg": whole} for user, one, whole in cut if one != whole]
    (folder / "brief.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    config = {"sycophancy": pairs, "brief": ws.PairConfig(file=str(folder / "brief.jsonl"))}

    def make(name: str, adapter: str, seed: int, null: bool = False, part: str = "strangers") -> Path:
        home = folder / part / name / adapter / f"seed_{seed}" / ("null_diff" if null else "")
        about, how = replace(behavior, name=name), ws.TrainConfig(config[name], lr=5e-3)
        ws.train_diff(lm, about, adapter, seed, null, how, folder=home, progress=False)
        return home

    return make


@pytest.mark.slow  # ten trainings
def test_trained_adapters_are_recognised_and_others_not(lm, trained):
    """Another seed and another kind of adapter, as differences and as one adapter; another behaviour and a null diff are not."""
    for seed in range(3):
        library = trained("sycophancy", "lora", seed, part="library").parent
        trained("sycophancy", "lora", seed, True, "library")
    strangers = {
        "lora": trained("sycophancy", "lora", 3), "dora": trained("sycophancy", "dora", 3),
        "brief": trained("brief", "lora", 3), "null": trained("sycophancy", "lora", 3, True),
    }  # fmt: skip
    for kind, path in strangers.items():
        known = kind in ("lora", "dora")
        sides = {path: "above", path / "adapters/pos": "above", path / "adapters/neg": "below"}
        for source, sign in sides.items():
            row = audit(source, lm, library, top=0).verdicts.row(0, named=True)
            assert row["verdict"] == (f"{sign} the null band" if known else "inside"), (kind, source.name, row)
            assert (row["w"], row["nulls"]) == (3, 3) and (abs(row["cos"]) > 0.25) == known


def test_null_diffs_are_known_by_their_metadata_and_given_once(lm, out, tmp_path):
    u, w = randomly(lm, 91), ws.load_diff(out / "tiny/kind/lora/seed_0")
    null = ws.load_diff(out / "tiny/kind/lora/seed_1/null_diff")
    known = [Known("kind", "lora", 0, False, w), Known("kind", "lora", 1, True, null)]
    with pytest.raises(
        ValueError, match="null diff of kind, seed 1 and null diff of kind, seed 2 are one null diff, up to sign"
    ):
        audit(u, lm, [*known, Known("kind", "lora", 2, True, null.scale(-2))])
    bare = WeightDiff(randomly(lm, 5).entries, {"base_model": "tiny"})
    with pytest.warns(UserWarning, match="null diff of kind, seed 2: its metadata do not say null: true"):
        audit(u, lm, [*known, Known("kind", "lora", 2, True, bare)])
    with pytest.warns(UserWarning, match=r"bare\.safetensors: its metadata do not say null: true"):
        check_null_diffs([("bare.safetensors", bare)])
    for seed in (0, 1):
        shutil.copytree(out / f"tiny/kind/lora/seed_{seed}", tmp_path / f"tiny/kind/lora/seed_{seed}")
    path = tmp_path / "tiny/kind/lora/seed_1/null_diff/w.safetensors"
    shutil.rmtree(path.parent)
    save_diff(WeightDiff(null.entries, {**null.meta, "null": False}), path)
    entries, skipped = read_library(tmp_path, {"tiny"})
    assert sorted((e.seed, e.null) for e in entries) == [(0, False), (0, True), (1, False)]
    assert skipped == {str(path): "lies in null_diff/, but its metadata do not say null: true; train it again"}


def test_what_is_not_compared_is_told(lm, out):
    own = lm.model.get_parameter("model.layers.4.mlp.up_proj.weight").shape
    more = {"model.layers.4.mlp.up_proj.weight": torch.ones(own)}
    u = plus(randomly(lm, 0), randomly(lm, 90)).select(lambda n: n != NAMES[0])
    whole = audit(WeightDiff(u.entries | more), lm, out)
    row, size = whole.verdicts.row(0, named=True), sum(u.norm(n) ** 2 for n in u)
    assert row["share"] == pytest.approx(size / (size + own.numel()), rel=1e-4) and 0.5 < row["share_w"] < 0.95
    told = f"{1 - row['share']:.1%} of the stranger's |u|^2 and {1 - row['share_w']:.1%} of the library's |w|^2 lie in matrices"
    assert told in whole.conclusion()
    assert "are not compared" not in audit(plus(randomly(lm, 0), randomly(lm, 90)), lm, out).conclusion()


def test_a_library_of_an_earlier_model_is_told(lm, tmp_path):
    """Name and shapes fit, the files under the name were others."""
    from ws.train.record import base_content

    w = ws.load_diff("tiny")
    for content, told in ((base_content(lm), False), ("0" * 64, True)):
        entry = Known("sycophancy", "lora", 1, False, ws.WeightDiff(w.entries, {**w.meta, "base_content": content}))
        found = audit(randomly(lm, 5), lm, [entry])
        assert ("trained from other files" in found.conclusion()) == told
        scored = ws.explain(lm, entry.w, candidates=["write"], progress=False, cache=tmp_path)
        assert ("comes from other files" in scored.conclusion()) == told


def test_a_batch_of_several_behaviours_ends_with_their_atlas(lm, tmp_path, monkeypatch, capsys):
    from ws.use.commands import atlases

    monkeypatch.setenv("WS_OUT", str(tmp_path))

    def jobs(*of):
        return [SimpleNamespace(identity=SimpleNamespace(model=model, behavior=behavior)) for model, behavior in of]

    atlases(jobs(("tiny", "kind"), ("tiny", "tidy")))  # nothing is trained
    for seed, behavior in enumerate(("kind", "tidy")):
        meta = {"base_model": "tiny", "behavior": behavior, "adapter": "lora", "seed": seed}
        save_diff(
            WeightDiff(randomly(lm, seed).entries, meta),
            tmp_path / "tiny" / behavior / "lora" / f"seed_{seed}" / "w.safetensors",
        )
    atlases(jobs(("tiny", "kind"), ("other", "tidy")))
    assert capsys.readouterr().out == "" and not (tmp_path / "tiny" / "atlas").exists()
    atlases(jobs(("tiny", "kind"), ("tiny", "tidy")))
    assert "2 weight differences of tiny" in capsys.readouterr().out
    assert {"atlas.png", "atlas.tsv", "atlas.md"} <= {p.name for p in (tmp_path / "tiny" / "atlas").iterdir()}
