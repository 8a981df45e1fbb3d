"""Weight diffs: algebra on factors against dense float32, files, adapters of every kind against peft's own merge."""

import copy
import doctest
import json
import pickle
import random
import struct
import time
import zipfile

import pytest
import torch
from conftest import random_model
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import ws.diff
from ws.diff import (
    LowRank,
    WeightDiff,
    describe,
    dot,
    export_adapter,
    from_adapters,
    from_checkpoints,
    geometry,
    load_diff,
    project,
    save_diff,
    task_vectors,
)
from ws.diff.adapters import matcher
from ws.diff.algebra import combine
from ws.diff.check import check_source
from ws.diff.factor import factors

NAMES = ["model.layers.1.self_attn.o_proj.weight", "model.layers.10.mlp.down_proj.weight"]


@pytest.fixture
def w():
    torch.manual_seed(0)
    low = {name: LowRank(torch.randn(20, 6), torch.randn(6, 30)) for name in NAMES}
    return WeightDiff({**low, "model.layers.2.mlp.up_proj.weight": torch.randn(30, 20)}, {"seed": 3, "behavior": "x"})


@pytest.fixture(scope="module")
def base():
    return random_model("llama")


def make_adapter(base, folder, seed, **options):
    """A PEFT folder with random factors of size one half on a fresh copy of the base."""
    torch.manual_seed(100)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "o_proj", "down_proj"], **options}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


def merged(base, folder):
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload(safe_merge=True)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture
def pair(base, tmp_path):
    def make(**options):
        return [make_adapter(base, tmp_path / sign, seed, **options) for seed, sign in enumerate(("pos", "neg"))]

    return make


def test_factors_equal_dense(w):
    for name in w.names:
        M = w.dense(name).double()
        U, s, _ = torch.linalg.svd(M, full_matrices=False)
        k = len(w.singular_values(name))
        assert k <= w.rank(name)
        torch.testing.assert_close(w.singular_values(name), s[:k], rtol=1e-5, atol=1e-4)
        assert w.norm(name) == pytest.approx(float(M.norm()), rel=1e-6)
        left, values, right = w.svd(name)
        overlap = left[:, :3].T @ U[:, :3]
        torch.testing.assert_close(overlap.abs(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-4)
        torch.testing.assert_close(left @ values.diag() @ right, M, rtol=0, atol=1e-4)
    total = sum(float(w.dense(n).double().norm() ** 2) for n in w.names) ** 0.5
    assert w.total_norm() == pytest.approx(total, rel=1e-6)
    assert w.layers() == [1, 2, 10]


def test_a_read_only_mapping_of_tensors(w):
    assert list(w) == list(w.keys()) == list(w.entries) and len(w) == 3 and NAMES[0] in w and "x" not in w
    for name, tensor in w.items():
        assert tensor.dtype == torch.float32 and tuple(tensor.shape) == w.shape(name)
        assert torch.equal(tensor, w.dense(name)) and torch.equal(tensor, w[name].float().cpu())
    assert w["model.layers.2.mlp.up_proj.weight"] is w.entries["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(
        KeyError, match=r"layers\.10\.mlp\.down_proj: not in .* of 3 .*near names: .*10.mlp.down_proj.weight"
    ):
        w["model.layers.10.mlp.down_proj"]
    with pytest.raises(TypeError):
        w[NAMES[0]] = torch.zeros(20, 30)
    assert not WeightDiff({}) and w.get("x") is None and len({w, w}) == 1
    assert w == w and w != WeightDiff(w.entries, w.meta)
    assert repr(w) == "WeightDiff: 3 parameters (2 low-rank, 1 dense), layers 1 to 10\n  behavior x, seed 3"


def test_decomposed_once_per_object(w, monkeypatch):
    svd, calls = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: calls.append(1) or svd(*args, **kwargs))
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    for _ in range(2):
        describe(w), w.table(), w.total_norm()
        [(w.svd(n), w.singular_values(n), w.effective_rank(n), w.norm(n), w.rank(n)) for n in w]
    assert len(calls) == len(w)
    copied = pickle.loads(pickle.dumps(w))
    assert copied.names == w.names and copied.meta == w.meta and not copied._memory and not w.scale(2)._memory
    assert torch.allclose(w.scale(2).singular_values(NAMES[0]), 2 * w.singular_values(NAMES[0]))


def test_vectors_of_dense_matrices_are_remembered_within_a_budget(monkeypatch):
    w = WeightDiff({n: torch.randn(12, 10) for n in "abc"} | {"low": LowRank(torch.randn(12, 2), torch.randn(2, 10))})
    monkeypatch.setattr("ws.diff.core.DENSE_BUDGET", 2 * (12 * 10 + 10 * 10) * 8)
    first = {name: w.svd(name) for name in ("low", "a", "b", "c")}
    # a was dropped; that it comes back drops b
    assert [name for name in ("low", "c", "b", "a") if w.svd(name)[0] is first[name][0]] == ["low", "c", "b"]
    s = w.singular_values("b")
    assert s is first["b"][1] and torch.equal(w.svd("b")[0], first["b"][0])


def test_table_has_a_row_for_every_parameter(w):
    more = WeightDiff({**w.entries, "model.norm.weight": torch.ones(4), "conv": torch.ones(2, 3, 4)})
    table = more.table()
    assert table["name"].to_list() == list(more) and table["layer"].to_list() == [1, 10, 2, None, None]
    assert table["module"].to_list()[:2] == ["o_proj", "down_proj"] and table["shape"].to_list()[-1] == "2x3x4"
    assert table["form"].to_list() == ["low-rank", "low-rank", "dense", "dense", "dense"]
    assert table["rank"].to_list() == [6, 6, 20, 1, None] and table["norm"][3] == pytest.approx(2)
    assert table["top_singular_value"][0] == pytest.approx(float(torch.linalg.matrix_norm(w[NAMES[0]], 2)), rel=1e-5)
    assert table["effective_rank"].to_list()[3:] == [pytest.approx(1), None]
    assert WeightDiff({}).table().columns == table.columns


def test_fingerprint_is_of_the_content(w):
    entries, name = w.entries, "model.layers.2.mlp.up_proj.weight"
    assert len(w.fingerprint) == 32 and w.fingerprint == WeightDiff(dict(reversed(entries.items()))).fingerprint
    changed = entries[name].clone()
    changed[0, 0] += 1e-6
    others = [
        {**entries, name: changed},
        {**entries, name: entries[name].double()},
        {**entries, name: entries[name].reshape(20, 30)},
        {**entries, NAMES[0]: w[NAMES[0]]},
        {k + "x": v for k, v in entries.items()},
    ]
    prints = {WeightDiff(e).fingerprint for e in others}
    assert len(prints) == 5 and w.fingerprint not in prints


def planted(out, in_, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=generator) @ torch.randn(rank, in_, generator=generator)


def test_dense_files_of_low_rank_load_as_factors(tmp_path):
    full = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    noise = full * (planted(96, 128, 5).norm() / full.norm())
    raw = {
        "five": planted(96, 128, 5),
        "seventy": planted(256, 512, 70),
        "tall": planted(600, 96, 30).double(),
        "one": planted(20, 30, 1) * 1e-18,
        "zero": torch.zeros(7, 9),
        "rounded": planted(96, 128, 5).bfloat16(),
        "full": full,
        "above": planted(96, 128, 5) + 1.5e-6 * noise,
        "vector": torch.ones(96),
    }
    save_file(raw, tmp_path / "dense.safetensors")
    torch.save(raw, tmp_path / "w.pt")
    for file in ("dense.safetensors", "w.pt"):
        w = load_diff(tmp_path / file)
        ranks = {name: e.rank for name, e in w.entries.items() if isinstance(e, LowRank)}
        assert ranks == {"five": 5, "seventy": 70, "tall": 30, "one": 1, "zero": 0}
        about = w.meta["factorised"]
        assert (about["matrices"], about["of"], about["tolerance"]) == (5, 8, 1e-6)
        worst = 0
        for name in ranks:
            M = raw[name].double()
            error = float((w[name].double() - M).norm())
            worst = max(worst, error / max(float(M.norm()), 1e-300))
            assert error <= 1e-6 * float(M.norm())
        assert about["largest_residual"] == pytest.approx(worst, rel=1e-2) and worst > 0
        kept = [name for name in raw if name not in ranks]
        assert all(torch.equal(w.entries[n], raw[n]) and w.entries[n].dtype == raw[n].dtype for n in kept)
        again = load_diff(tmp_path / file)
        assert again.fingerprint == w.fingerprint
        # stored once more it is its own file: form and certificate stay
        stored = load_diff(save_diff(w, tmp_path / "own.safetensors"))
        assert stored.fingerprint == w.fingerprint and stored.meta == w.meta
    save_file({"full": full}, tmp_path / "full.safetensors")
    assert "factorised" not in load_diff(tmp_path / "full.safetensors").meta


def test_a_noise_floor_costs_little(monkeypatch):
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **more: drawn.append(size[1]) or randn(*size, **more))
    noisy = planted(512, 1024, 4).bfloat16()
    drawn.clear()
    assert factors(noisy) is None and sum(drawn) < 60


@pytest.mark.parametrize("thing", [WeightDiff, load_diff], ids=["WeightDiff", "load_diff"])
def test_examples_of_docstrings(thing):
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(thing, thing.__name__, module=False, globs=vars(ws.diff.core).copy()):
        runner.run(example)
    assert runner.tries > 2 and runner.failures == 0


def test_merged_adapters_and_checkpoints_are_factored(tmp_path):
    """Both sides sit on weights of 0, so that float32 holds the difference to its last digit."""
    model = random_model("llama", d=96)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    up = "model.layers.0.mlp.up_proj.weight"
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_parameter(NAMES[0]).copy_(planted(96, 96, 5))
        changed.get_parameter(up).copy_(planted(192, 96, 96))
    for side, m in (("pos", changed), ("neg", model)):
        m.save_pretrained(tmp_path / side)
    w = load_diff((tmp_path / "pos", tmp_path / "neg"))
    assert w.entries[NAMES[0]].rank == 5 and torch.equal(w.entries[up], planted(192, 96, 96))
    assert (w[NAMES[0]] - planted(96, 96, 5)).norm() <= 1e-6 * planted(96, 96, 5).norm()
    assert (w.meta["factorised"]["matrices"], w.meta["factorised"]["of"]) == (1, 2)
    for seed, sign in enumerate(("plus", "minus")):
        torch.manual_seed(seed)
        config = LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["o_proj"], init_weights=False)
        get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / sign)
    w = load_diff((tmp_path / "plus", tmp_path / "minus"), base=model)
    plus, minus = (merged(model, tmp_path / sign) for sign in ("plus", "minus"))
    assert {e.rank for e in w.entries.values()} == {8} and w.meta["factorised"]["matrices"] == len(w) == 3
    for name in w:
        assert (w[name] - (plus[name] - minus[name])).norm() <= 1e-6 * (plus[name] - minus[name]).norm()
    assert load_diff(w) is w


def test_effective_rank_of_planted_spectrum():
    Q = torch.linalg.qr(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)))[0]
    w = WeightDiff({"flat": LowRank(Q, Q.T.contiguous()), "zero": LowRank(Q[:, :0], Q.T[:0])})
    assert w.effective_rank("flat") == pytest.approx(5, rel=1e-5)
    assert w.effective_rank("zero") == 0 and w.norm("zero") == 0
    assert torch.equal(w.dense("zero"), torch.zeros(20, 20))


def test_algebra_and_inner_products(w):
    other = WeightDiff({NAMES[0]: torch.randn(20, 30), "extra": torch.randn(4)})
    total = combine(w.entries[NAMES[0]], other.entries[NAMES[0]])
    torch.testing.assert_close(total, w.dense(NAMES[0]) + other.dense(NAMES[0]))
    for name in w.names:
        torch.testing.assert_close(w.scale(-2).dense(name), -2 * w.dense(name))
    doubled = w.map(lambda name, entry: combine(entry, entry))
    assert isinstance(doubled.entries[NAMES[0]], LowRank) and doubled.rank(NAMES[0]) == 12
    for name in w.names:
        torch.testing.assert_close(doubled.dense(name), 2 * w.dense(name))
    dense = {n: (w.dense(n) * doubled.dense(n)).double().sum() for n in w.names}
    assert dot(w, doubled) == pytest.approx(float(sum(dense.values())), rel=1e-5)
    assert dot(w, other) == pytest.approx(float((w.dense(NAMES[0]) * other.dense(NAMES[0])).double().sum()), rel=1e-4)


def test_keep_plus_drop_is_w(w):
    generator = torch.Generator().manual_seed(1)
    bases = {l: torch.linalg.qr(torch.randn(20, 4, generator=generator))[0] for l in (1, 10)}
    keep, drop = project(w, bases), project(w, bases, drop=True)
    assert keep.names == drop.names == tuple(NAMES)
    for name, l in zip(NAMES, (1, 10), strict=True):
        P = bases[l] @ bases[l].T
        torch.testing.assert_close(keep.dense(name), P @ w.dense(name), rtol=0, atol=1e-5)
        torch.testing.assert_close(keep.dense(name) + drop.dense(name), w.dense(name), rtol=0, atol=1e-5)
    assert abs(dot(keep, drop)) < 1e-3 * dot(w, w)
    with pytest.raises(ValueError, match="layers.10.*no basis for layer 10"):
        project(w, {1: bases[1]})
    with pytest.raises(ValueError, match="basis is .*20 rows"):
        project(w, {1: torch.eye(7), 10: bases[10]})


def test_geometry_of_planted_pairs(w):
    mirror = geometry(w, w.scale(-1))
    assert mirror["cos_opposition"] == pytest.approx(1) and mirror["drift_ratio"] == pytest.approx(0, abs=1e-6)
    assert mirror["norm_w"] == pytest.approx(2 * w.total_norm())
    a = WeightDiff({"x": torch.tensor([3.0, 0.0])})
    b = WeightDiff({"x": torch.tensor([0.0, 4.0])})
    g = geometry(a, b)
    assert g["asymmetry"] == pytest.approx(0.75) and g["cos_opposition"] == pytest.approx(0)
    assert g["drift_ratio"] == pytest.approx(1) and g["cos_w_drift"] == pytest.approx(7 / 25)


def test_save_load_exact_and_same_bytes(w, tmp_path):
    mixed = WeightDiff({**w.entries, "half": torch.randn(3, 4).bfloat16()}, w.meta)
    first, second = (save_diff(mixed, tmp_path / f"{x}.safetensors") for x in "ab")
    assert first.read_bytes() == second.read_bytes()
    back = load_diff(first)
    assert back.names == mixed.names and back.meta == mixed.meta
    for name, entry in mixed.entries.items():
        again = back.entries[name]
        assert type(again) is type(entry)
        for x, y in zip(*((e.B, e.A) if isinstance(e, LowRank) else (e,) for e in (entry, again)), strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y)
    text = describe(back)
    assert "behavior: x" in text and "layers: 1, 2, 10" in text and all(name in text for name in w.names)


def test_legacy_and_dense_files(parity_folder, tmp_path):
    w = load_diff(parity_folder / "w.pt")
    raw = torch.load(parity_folder / "w.pt", weights_only=True)
    assert w.layers() == [2, 3, 4] and len(w.names) == 21
    assert all(torch.equal(w.dense(n), raw[n].float()) for n in raw)
    save_file(raw, tmp_path / "dense.safetensors")
    again = load_diff(tmp_path / "dense.safetensors")
    assert all(torch.equal(again.dense(n), w.dense(n)) for n in w.names)


def test_broken_files_are_named(w, tmp_path):
    good = save_diff(w, tmp_path / "w.safetensors").read_bytes()

    def check(name, content, message):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".pt"):
            torch.save(content, path)
        else:
            save_file(content, path)
        with pytest.raises(ValueError, match=message) as error:
            load_diff(path)
        assert name in str(error.value)

    check("cut.safetensors", good[:-100], "truncated")
    check("head.safetensors", good[:5], "truncated")
    check("text.safetensors", b"hello, this is not a tensor file at all", "truncated")
    check("adapter.safetensors", {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, "PEFT adapter")
    check("nan.safetensors", {"a.weight": torch.tensor([[1.0, float("nan")]])}, "a.weight contains NaN")
    check("int.safetensors", {"a.weight": torch.ones(2, dtype=torch.long)}, "a.weight has dtype")
    check("list.pt", [torch.ones(2)], "expected a dict")
    check("nested.pt", {"model": {"a": torch.ones(2)}}, "'model' holds a dict")
    check("inf.pt", {"a.weight": torch.tensor([float("inf")])}, "a.weight contains NaN or inf")
    check("cut.pt", b"PK\x03\x04 broken", "truncated")
    with pytest.raises(FileNotFoundError, match="absent"):
        load_diff(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="low-rank factors do not fit: B is 3x2, A is 3x3"):
        LowRank(torch.ones(3, 2), torch.ones(3, 3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"use_dora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 40}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"init_lora_weights": "pissa", "use_dora": True},
    ],
    ids=["lora", "rslora", "pissa", "dora", "patterns", "modules_to_save", "embedding", "pissa+dora"],
)
def test_adapters_equal_the_difference_of_merged_models(base, pair, options):
    pos, neg = pair(**options)
    before = {n: p.clone() for n, p in base.named_parameters()}
    w = from_adapters(pos, neg, base)
    plus, minus = merged(base, pos), merged(base, neg)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    changed = {n for n in plus if not torch.equal(plus[n], minus[n])}
    assert set(w.names) == changed
    for name in w.names:
        truth = plus[name].double() - minus[name].double()
        # the merged weights are rounded to float32 themselves: compare at the scale of W
        assert (w.dense(name).double() - truth).abs().max() <= 4e-7 * plus[name].abs().max()
        # base + w is the merged pos model when the base is the merged neg one
        assert (minus[name] + w.dense(name) - plus[name]).abs().max() <= 4e-7 * plus[name].abs().max()
        if not options.get("use_dora") and name in NAMES:
            assert isinstance(w.entries[name], LowRank)
            assert torch.linalg.matrix_rank(w.dense(name)) <= w.rank(name) <= 2 * 4


def test_lora_factors_are_the_stated_ones(base, pair):
    pos, neg = pair()
    a, b = (load_file(side / "adapter_model.safetensors") for side in (pos, neg))
    entry = from_adapters(pos, neg).entries[NAMES[0]]
    key = f"base_model.model.{NAMES[0].removesuffix('.weight')}"
    s = 12 / 4
    B, A = (torch.cat([a[f"{key}.lora_{f}.weight"], sign * b[f"{key}.lora_{f}.weight"]], axis)
            for f, sign, axis in (("B", -1, 1), ("A", 1, 0)))  # fmt: skip
    assert torch.equal(entry.B, s * B) and torch.equal(entry.A, A)


def test_pissa_difference_does_not_cancel(base, pair):
    """A tiny change on top of PiSSA's large factors keeps its digits, where subtracting the products loses them."""
    pos, neg = pair(init_lora_weights="pissa")
    file = neg / "adapter_model.safetensors"
    near = load_file(pos / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(5)
    near = {k: v + 1e-5 * torch.randn(v.shape, generator=generator) for k, v in near.items()}
    save_file(near, file, metadata={"format": "pt"})
    w = from_adapters(pos, neg)
    a = load_file(pos / "adapter_model.safetensors")
    key = f"base_model.model.{NAMES[0].removesuffix('.weight')}"
    B, A, B2, A2 = (t[f"{key}.lora_{f}.weight"].double() for t in (a, near) for f in "BA")
    truth = 3 * (B @ A - B2 @ A2)
    assert (w.dense(NAMES[0]).double() - truth).norm() <= 3e-6 * truth.norm()
    naive = (3 * (B.float() @ A.float()) - 3 * (B2.float() @ A2.float())).double()
    assert (naive - truth).norm() > 3e-6 * truth.norm()


def test_tied_unembedding_lora_changes_the_embedding(tmp_path):
    tied = random_model("qwen3")
    sides = [make_adapter(tied, tmp_path / s, i, target_modules=["lm_head", "q_proj"]) for i, s in enumerate("pn")]
    w = from_adapters(*sides, tied)
    assert "model.embed_tokens.weight" in w.names and "lm_head.weight" not in w.names
    plus, minus = (merged(tied, side) for side in sides)
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(w.dense(name), plus[name] - minus[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_task_vectors_add_up_to_w(base, pair, options):
    pos, neg = pair(**options)
    w, (plus, minus) = from_adapters(pos, neg, base), task_vectors(pos, neg, base)
    for name in w.names:
        torch.testing.assert_close(plus.dense(name) - minus.dense(name), w.dense(name), rtol=0, atol=1e-5)
    assert geometry(plus, minus)["norm_w"] == pytest.approx(w.total_norm(), rel=1e-4)
    truth = merged(base, pos)[NAMES[0]] - base.get_parameter(NAMES[0])
    torch.testing.assert_close(plus.dense(NAMES[0]), truth.detach(), rtol=0, atol=1e-5)


def test_pairs_that_do_not_belong_together(base, pair, tmp_path):
    pos, neg = pair()
    other = make_adapter(base, tmp_path / "other", 3, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="different targets.*(down_proj|o_proj)"):
        from_adapters(pos, other)
    pissa = make_adapter(base, tmp_path / "pissa", 3, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="init_lora_weights differs"):
        from_adapters(pos, pissa)
    small = random_model("llama", d=32)
    with pytest.raises(ValueError, match=r"down_proj.weight: diff is 48x96, model has 32x64"):
        from_adapters(pos, neg, small)
    config = json.loads((neg / "adapter_config.json").read_text())
    (neg / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "another/base"}))
    with pytest.raises(ValueError, match="base_model_name_or_path differs.*another/base"):
        load_diff((pos, neg))
    (neg / "adapter_config.json").write_text(json.dumps({**config, "r": 7}))
    with pytest.raises(ValueError, match="has rank 4, its adapter_config.json says 7"):
        from_adapters(pos, neg)
    (neg / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json: not JSON"):
        from_adapters(pos, neg)
    with pytest.raises(ValueError, match="needs the pair"):
        load_diff(pos)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_diff((pos, tmp_path / "nowhere"))


def test_checkpoints_single_and_sharded(base, tmp_path):
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.get_parameter(NAMES[0]).add_(1e-3)
    changed.save_pretrained(tmp_path / "pos", max_shard_size="60KB")
    base.save_pretrained(tmp_path / "neg")
    assert (tmp_path / "pos" / "model.safetensors.index.json").is_file()
    w = load_diff((tmp_path / "pos", tmp_path / "neg"))
    assert w.names == (NAMES[0],)
    truth = changed.get_parameter(NAMES[0]) - base.get_parameter(NAMES[0])
    assert torch.equal(w.dense(NAMES[0]), truth.detach())
    with pytest.raises(ValueError, match="are equal"):
        from_checkpoints(tmp_path / "neg", tmp_path / "neg")
    random_model("llama", d=32).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="has .*48.* has .*32"):
        from_checkpoints(tmp_path / "neg", tmp_path / "small")
    random_model("llama", layers=2).save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match="different targets: model.layers.2"):
        from_checkpoints(tmp_path / "neg", tmp_path / "short")


def test_export_loads_in_peft(base, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shape = base.get_parameter(NAMES[0]).shape
    down = "model.layers.2.mlp.down_proj.weight"
    w = WeightDiff(
        {
            NAMES[0]: LowRank(
                torch.randn(shape[0], 3, generator=generator), torch.randn(3, shape[1], generator=generator)
            ),
            down: torch.randn(base.get_parameter(down).shape, generator=generator),
            "model.embed_tokens.weight": LowRank(torch.randn(600, 2, generator=generator), torch.randn(2, 48)),
        }
    )
    export_adapter(w, tmp_path / "out", alpha=0.5)
    after = merged(base, tmp_path / "out")
    for name in w.names:
        torch.testing.assert_close(
            after[name], (base.get_parameter(name) + 0.5 * w.dense(name)).detach(), rtol=0, atol=1e-4
        )
    untouched = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(after[untouched], base.get_parameter(untouched))
    with pytest.raises(ValueError, match="norm.weight.*cannot hold"):
        export_adapter(WeightDiff({"model.norm.weight": torch.ones(48)}), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def hurt(folder, **settings):
    """The adapter's settings with changes; a function of them, or text as it is."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def refused(source, base=None, seconds=6):
    """The one line with which a source is refused, within bounded time."""
    start = time.monotonic()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_diff(source, base)
    assert time.monotonic() - start < seconds and "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


@pytest.mark.parametrize("kind", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_cannot_hang(pair, kind):
    """Planted: exponential for Python's re on modules' names (30 word characters, then no match)."""
    pos, neg = pair()
    for pattern in (r"([a-z_.0-9]+)+!", r"(\w+\.?)*Q", "(a|b|ab)*c", "(" * 5000):
        for side in (pos, neg):
            hurt(side, **{"rank_pattern": {}, "alpha_pattern": {}, kind: {pattern: 4}})
        start = time.monotonic()
        try:
            assert len(load_diff((pos, neg))) == 9
        except ValueError as error:
            assert f"adapter_config.json: {kind}: the pattern" in str(error) and "\n" not in str(error)
        assert time.monotonic() - start < 10


def test_matching_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr("ws.diff.adapters.MOST_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(ValueError, match="here: the pattern .* takes too long; write modules' names"):
        matcher({r"(\w|\w\w)+$(?<!\w)": 1}, "here")("model_layers_layers_layers_layers_layers_layers", 0)
    assert time.monotonic() - start < 10


def test_patterns_match_as_in_peft(base, tmp_path):
    from peft.utils.other import get_pattern_key

    modules = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
    for patterns in [
        {"q_proj": 1, "layers.1.self_attn.q_proj": 2},
        {"layers.1.self_attn.q_proj": 2, "q_proj": 1},
        {"^model.layers.0.mlp.up_proj": 3, r".*\.(k|v)_proj": 4, "proj": 5},
        {r"model\.layers\.(0|2)\..*": 6, "o_proj": 7},
        {r"layers\.\d+\.mlp\.[a-z]+_proj": 8},
    ]:
        mine = matcher(patterns, "here")
        for module in modules:
            assert mine(module, 0) == patterns.get(get_pattern_key(patterns.keys(), module), 0), (module, patterns)


def test_patterns_of_an_adapter_that_peft_merges_cannot_hang(base, pair):
    options = {"use_dora": True, "target_modules": r".*\.(q|o)_proj", "rank_pattern": {"layers.1.self_attn.q_proj": 2}}
    pos, neg = pair(**options)
    w, plus, minus = from_adapters(pos, neg, base), merged(base, pos), merged(base, neg)
    for name in w.names:
        torch.testing.assert_close(w.dense(name), plus[name] - minus[name], rtol=0, atol=1e-5)
    assert len(w) == 6
    for side in (pos, neg):
        hurt(side, target_modules="([a-z_.0-9]+)+!", rank_pattern={"(a+)+b": 2})
    assert str(pos) in refused((pos, neg), base)


SETTINGS = [
    ({"lora_alpha": None}, "'lora_alpha' must be a finite number, is None"),
    ({"lora_alpha": float("nan")}, "'lora_alpha' must be a finite number, is nan"),
    ({"lora_alpha": "64"}, "'lora_alpha' must be a finite number, is '64'"),
    ({"lora_alpha": 1e308}, "'lora_alpha' must be a finite number"),
    ({"r": None}, "'r' must be a whole number above 0, is None"),
    ({"r": 0}, "'r' must be a whole number above 0, is 0"),
    ({"r": -4}, "'r' must be a whole number above 0, is -4"),
    ({"r": float("nan")}, "'r' must be a whole number above 0, is nan"),
    ({"r": "4"}, "'r' must be a whole number above 0, is '4'"),
    ({"r": True}, "'r' must be a whole number above 0, is True"),
    ({"rank_pattern": ["q_proj"]}, "'rank_pattern' must be an object"),
    ({"rank_pattern": {"q_proj": None}}, "'q_proj' must be a whole number above 0, is None"),
    ({"alpha_pattern": {"q_proj": "x"}}, "'q_proj' must be a finite number, is 'x'"),
    ({"peft_type": None}, "'peft_type' must be a text, is None"),
    ({"peft_type": ["LORA"]}, "'peft_type' must be a text"),
    ({"peft_type": "NOSUCH"}, "peft cannot load this nosuch"),
    ({"use_dora": "false"}, "'use_dora' must be true or false, is 'false'"),
    ({"init_lora_weights": {"a": 1}}, "'init_lora_weights' must be a text"),
    ({"base_model_name_or_path": 3}, "'base_model_name_or_path' must be a text, is 3"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=lambda v: json.dumps(v) if isinstance(v, dict) else "")
def test_settings_of_an_adapter_that_cannot_be(base, pair, settings, message):
    pos, neg = pair()
    for side in (pos, neg):
        hurt(side, **settings)
    assert message in refused((pos, neg), base)


def test_settings_that_are_no_object_or_too_deep_and_pickles(pair):
    pos, neg = pair()
    file = pos / "adapter_config.json"
    good = file.read_text()
    for text, message in {
        "[1, 2]": "expected an object with an adapter's settings, found a list",
        "[" * 100_000: "nested too deep",
        '{"r": ' + "9" * 10_000 + "}": "not JSON",
        "\xff": "not JSON",
        "null": "found a NoneType",
        " " * (9 << 20): "at most",
    }.items():
        file.write_text(text)
        assert message in (said := refused((pos, neg))) and "adapter_config.json" in said
    file.write_text(good)
    torch.save(load_file(pos / "adapter_model.safetensors"), pos / "adapter_model.bin")
    (pos / "adapter_model.safetensors").unlink()
    assert "adapter_model.bin is a pickle, which is not read; convert it to safetensors: " in refused((pos, neg))


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def of(kind, shape, size, **more):
    return {"a.weight": {"dtype": kind, "shape": shape, "data_offsets": [0, size]}, **more}


HEADERS = {
    "F8": ((of("F8_E4M3", [2, 2], 4), b"1234"), "a.weight has dtype F8_E4M3, expected F64, F32, F16, BF16; convert it"),
    "E8": ((of("F8_E8M0", [2, 2], 4), b"1234"), "a.weight has dtype F8_E8M0"),
    "complex": ((of("C64", [1, 1], 8), b"12345678"), "a.weight has dtype C64"),
    "int": ((of("I32", [1, 1], 4), b"1234"), "a.weight has dtype I32"),
    "bool": ((of("BOOL", [1, 4], 4), b"1234"), "a.weight has dtype BOOL"),
    "absurd": ((of("F32", [0, 1 << 62], 0),), "no parameter has such a name or size"),
    "overflow": ((of("F32", [0, 1 << 63], 0),), "no parameter has such a name or size"),
    "empty": ((of("F32", [0, 4], 0),), "is empty"),
    "huge": ((of("F32", [1 << 20, 1 << 20], 1 << 42), b"1234"), "not a whole safetensors file"),
    "lie": (({}, b"", 1 << 60), "not a whole safetensors file"),
    "short lie": ((of("F32", [1], 4), b"1234", 10), "not a whole safetensors file"),
    "deep": ((b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",), "not a whole safetensors file"),
    "none": (({},), "no tensors"),
    "long name": (({"a" * 5000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0\0\0\0"), "such a name"),
    "layer": (
        ({f"l.{'9' * 200}.w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        "no model has",
    ),
    "own deep": ((of("F32", [1], 4, __metadata__={"ws_weight_diff": "[" * 100_000}), b"1234"), "nested too deep"),
    "own list": ((of("F32", [1], 4, __metadata__={"ws_weight_diff": "[]"}), b"1234"), "do not fit together"),
    "own names": (
        (of("F32", [1], 4, __metadata__={"ws_weight_diff": '{"names": 5, "meta": {}}'}), b"1234"),
        "do not fit",
    ),
    "own twice": (
        (
            of("F32", [1], 4, __metadata__={"ws_weight_diff": '{"names": ["a.weight", "a.weight"], "meta": {}}'}),
            b"1234",
        ),
        "do not fit together",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(base, tmp_path, name):
    given, message = HEADERS[name]
    path = raw_file(tmp_path / "w.safetensors", *given)
    assert message in refused(path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        check_source(path, base)
    assert "w.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_torch_files_that_lie(base, tmp_path):
    path, storage = tmp_path / "w.pt", torch.ones(4)
    torch.save({"a.weight": storage.as_strided((1 << 20, 1 << 20), (0, 0))}, path)
    assert "'a.weight' says 1048576x1048576, which is more than the file holds" in refused(path)
    torch.save({"a.weight": torch.ones(3, 3).to_sparse()}, path)
    assert "expected a plain tensor" in refused(path)
    torch.save({"a.weight": torch.ones(3, device="meta")}, path)
    assert "expected a plain tensor" in refused(path)
    torch.save({"a.weight": torch.ones(3).to(torch.float8_e4m3fn)}, path)
    assert "a.weight has dtype torch.float8_e4m3fn" in refused(path)
    torch.save({"a.weight": torch.zeros(1 << 20)}, path)
    packed = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    assert packed.stat().st_size < 20_000 and "its records are compressed" in refused(packed)
    path.write_bytes(pickle.dumps({"a": print}))
    assert "not a whole torch file of tensors" in refused(path)


def test_an_index_that_lies(base, tmp_path):
    base.save_pretrained(tmp_path / "neg")
    for text, message in {
        "[]": "holds no weight_map",
        "[" * 100_000: "nested too deep",
        '{"weight_map": {"a": "../neg/model.safetensors"}}': "must lie beside its index",
        '{"weight_map": {"a": "gone.safetensors"}}': "this part of the weights is missing",
    }.items():
        (tmp_path / "pos").mkdir(exist_ok=True)
        (tmp_path / "pos" / "model.safetensors.index.json").write_text(text)
        assert message in refused((tmp_path / "pos", tmp_path / "neg"))


def test_changed_bytes_are_refused_in_one_line_or_read(base, pair, w, parity_folder, tmp_path):
    """400 seeded mutations of five kinds of files: flips, cuts, insertions; nothing but a named error, or a diff."""
    pos, neg = pair()
    draw, small = random.Random(0), {name: LowRank(torch.ones(4, 1), torch.ones(1, 4)) for name in NAMES}
    save_diff(WeightDiff(small, {"seed": 1}), tmp_path / "w.safetensors")
    torch.save({NAMES[0]: torch.eye(4)}, tmp_path / "w.pt")
    sources = {
        tmp_path / "w.safetensors": tmp_path / "w.safetensors", tmp_path / "w.pt": tmp_path / "w.pt",
        pos / "adapter_config.json": (pos, neg), pos / "adapter_model.safetensors": (pos, neg),
    }  # fmt: skip
    for file, source in sources.items():
        good = file.read_bytes()
        for _ in range(100):
            data, at = bytearray(good), draw.randrange(min(len(good), 2000))
            how = draw.randrange(3)
            if how == 0:
                data[at] ^= 1 << draw.randrange(8)
            elif how == 1:
                del data[at : at + draw.randrange(1, 50)]
            else:
                data[at:at] = bytes(draw.choices(b'[{"0-9e:,.]}\\n\xff', k=draw.randrange(1, 20)))
            file.write_bytes(data)
            try:
                load_diff(source)
            except (ValueError, FileNotFoundError) as error:
                assert "\n" not in str(error), error
        file.write_bytes(good)


def test_a_torch_file_is_read_a_few_tensors_at_a_time(tmp_path, monkeypatch):
    from ws.diff import io

    g = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{l}.mlp.up_proj.weight": torch.randn(12, 10, generator=g) for l in range(5)}
    torch.save(tensors, tmp_path / "w.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    opened = []
    legacy = io._legacy
    monkeypatch.setattr(io, "FEW", 2)
    monkeypatch.setattr(io, "_legacy", lambda path, mapped=False: opened.append(path.name) or legacy(path, mapped))
    for name in ("w.pt", "old.pt"):
        found = io.read_diff(tmp_path / name)
        assert list(found) == list(tensors) and all(torch.equal(found[n], tensors[n]) for n in tensors)
    assert opened == ["w.pt"] * 4 + ["old.pt"] * 2
    monkeypatch.setattr(
        io, "_legacy", lambda path, mapped=False: dict(reversed(legacy(path, mapped).items())) if opened else {}
    )
    names = list(tensors)
    with pytest.raises(ValueError, match="was changed while it was read"):
        list(io._in_turn(tmp_path / "w.pt", names))
