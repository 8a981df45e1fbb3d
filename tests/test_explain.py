"""`explain` and its result: one's own candidates, ready bases, what is refused, files that are read back."""

import json
import warnings
from dataclasses import replace

import polars as pl
import pytest
import torch
from harm import flip
from polars.testing import assert_frame_equal

import ws
from ws.cache import keys
from ws.cache.made import Damaged
from ws.explanation.result import Explanation
from ws.explanation.scores import activation_target, score
from ws.subspaces.algebra import Basis, pca


@pytest.fixture(scope="module")
def lm(parity_folder):
    return ws.load_lm(str(parity_folder / "model"), "float32", "cpu")


@pytest.fixture(scope="module")
def given(lm, parity_folder, tmp_path_factory):
    """What every call shares: the reference diff and behaviour, two shipped candidates, a cache."""
    cache = tmp_path_factory.mktemp("cache")
    behavior = ws.load_behavior(parity_folder / "behavior.json")
    fixed = {"protocol": "v7", "candidates": ["write", "TaskDiff_contrast"], "cache": cache, "progress": False}

    def ask(**more):
        return ws.explain(lm, ws.load_diff(parity_folder / "w.pt"), behavior, **{**fixed, **more})

    return ask


@ws.candidate(family="act:persona", sees=("prompts",))
def mine(m, l):
    "Persona contrast plus clean states."
    return ws.pca(m.base.pos.resid[l] + m.base.clean.resid[l], m.k)


def row(found: Explanation, name: str, column: str) -> float:
    return found.summary.filter(pl.col("subspace") == name)[column][0]


def test_a_candidate_in_five_lines(given):
    found = given(extra=[mine])
    assert "mine" in found.top() and "Persona contrast plus clean states." in found.definitions()
    assert found.summary.filter(pl.col("subspace") == "mine")["axis_kind"][0] == "mixed"
    plain = given(extra=[lambda m, l: pca(m.base.pos.resid[l] + m.base.clean.resid[l], m.k)])
    assert row(plain, "<lambda>", "joint_score") == pytest.approx(row(found, "mine", "joint_score"), rel=1e-6)
    shared = given(extra=[lambda m: torch.eye(m.d)[:, :3]])
    assert row(shared, "<lambda>", "mean_rank") == 3 and shared.candidates[2]["shared"]


def test_ready_bases_are_scored_as_they_are_or_made_orthonormal(given):
    g = torch.Generator().manual_seed(0)
    B = torch.linalg.qr(torch.randn(128, 5, generator=g)).Q
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = given(extra={"mine": {l: B for l in (2, 3, 4)}})
    with pytest.warns(UserWarning, match="skew at layer 2: columns are not orthonormal; their span is used"):
        skew = given(extra=[{"skew": {l: 2 * B @ torch.triu(torch.ones(5, 5)) for l in (2, 3, 4)}}])
    for column in ("mean_conc_act", "mean_conc_w_combined", "mean_rank"):
        assert row(found, "mine", column) == pytest.approx(row(skew, "skew", column), rel=1e-5)
    hole = found.per_layer.filter((pl.col("subspace") == "mine") & (pl.col("layer") == 0)).row(0, named=True)
    assert hole["rank"] == 0 and hole["note"] == "not given at this layer"
    with pytest.raises(
        ValueError, match=r"bad at layer 2: a \(d, r\) tensor with d = 128 is needed, this is \(64, 3\)"
    ):
        given(extra={"bad": {2: torch.eye(64)[:, :3]}})
    with pytest.raises(ValueError, match="not finite"):
        given(extra={"bad": {2: torch.full((128, 2), float("nan"))}})
    with pytest.raises(ValueError, match=r"far: bases are given for layers \[9\]; the model has 0 to 5"):
        given(extra={"far": {9: B}})
    with pytest.raises(ValueError, match="candidate write: two of this name are given, or a shipped one has it"):
        given(extra={"write": {2: B}})


def test_a_basis_that_is_not_orthonormal_has_no_score():
    B = torch.eye(16)[:, :3]
    target = activation_target(torch.randn(5, 16, dtype=torch.float64))
    assert score(target, Basis(B)) == score(target, B)
    with pytest.raises(ValueError, match=r"not orthonormal: max \|B\^T B - I\| = 3"):
        score(target, 2 * B)
    with pytest.raises(ValueError, match="the basis is 12 wide, the target 16"):
        score(target, torch.eye(12)[:, :3])


def test_scores_do_not_depend_on_who_else_is_there_and_the_null_adds_columns(given, parity_folder):
    half, double = (ws.load_diff(parity_folder / "w.pt").scale(c) for c in (0.5, 2.0))
    alone, more = given(candidates=["write"]), given(extra=[mine], null=half)
    assert row(alone, "write", "joint_score") == row(more, "write", "joint_score")
    assert row(more, "write", "R_w_vs_null_diff") == pytest.approx(1)  # R_w does not see the scale
    assert "R_w_vs_null_diff" not in alone.summary.columns and given(null=[]).setting["nulls"] == []
    with pytest.raises(ValueError, match="null diff 1 and null diff 2 are one null diff, up to sign and scale"):
        given(candidates=["write"], null=[half, double])
    turned = ws.WeightDiff({n: (-1.0) ** ("o_proj" in n) * double[n] for n in double})
    several = given(candidates=["write"], null=[half, turned])
    assert row(several, "write", "R_w_vs_null_diff") == pytest.approx(1)
    assert len(several.setting["nulls"]) == 2 and set(several.null_per_layer["null"]) == {0, 1}
    assert set(alone.summary["subspace"]) == {"write", "TaskDiff_lora_ceiling", "dW_left_basis_ceiling"}
    assert given(layers=[3]).layers == [3] and given(k=4).setting["k"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "v8"}, "PROTOCOL 'v8' is unknown"),
        ({"layers": [9]}, "the model has layers 0 to 5"),
        ({"k": 0}, "PCS = 0"),
        ({"candidates": ["wirte"]}, "no candidate 'wirte'; did you mean write"),
        ({"extra": [3]}, "a int is no candidate"),
    ],
)
def test_mistakes_are_named(given, change, message):
    with pytest.raises(ValueError, match=message):
        given(**change)


def test_saved_and_read_back_it_is_the_same(given, tmp_path):
    found = given(extra=[mine, {"axes": {3: torch.eye(128)[:, :2]}}])
    back = Explanation.load(found.save(tmp_path / "run"))
    assert_frame_equal(back.per_layer, found.per_layer, check_exact=True)
    assert_frame_equal(back.summary, found.summary, check_exact=True)
    assert_frame_equal(back.specific, found.specific, check_exact=True)
    assert back.conclusion() == found.conclusion() and back.definitions() == found.definitions()
    assert back.setting == json.loads(json.dumps(found.setting)) and back.bases == found.bases
    assert_frame_equal(back.null_check(20), found.null_check(20), rel_tol=1e-9)
    for l in found.layers:
        scored = score(back.targets(l)["combined"], torch.eye(128)[:, :2]).conc
        assert scored == pytest.approx(score(found.targets(l)["combined"], torch.eye(128)[:, :2]).conc)
    assert "TaskDiff_lora_ceiling" in repr(found.top()) and found.figure().axes and found.layer_figure().axes
    names = {f.name for f in (tmp_path / "run").iterdir()}
    assert names >= {"v7_per_layer.csv", "v7_summary.tsv", "v7_summary_pct.tsv", "v7_conclusion.md", "explanation.json"}


@pytest.mark.parametrize("name", ["scores.safetensors", "v7_per_layer.csv", "explanation.json"])
def test_damaged_files_of_a_run_are_named(given, tmp_path, name):
    folder = given().save(tmp_path)
    file = folder / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 64
    file.write_bytes(bytes(data))
    with pytest.raises(Damaged, match=f"{name}: damaged, .*; running this v7_sweep again makes it anew") as refused:
        Explanation.load(folder)
    assert refused.value._render_traceback_() == [f"Damaged: {refused.value}"]  # a notebook shows no more
    (folder / "explanation.json").unlink()
    with pytest.raises(FileNotFoundError, match="explanation.json is missing"):
        Explanation.load(folder)


def test_scores_that_changed_without_a_trace_are_refused(given, tmp_path, monkeypatch):
    folder = given().save(tmp_path)
    monkeypatch.setattr(keys, "_identity", lambda path: (path.stat().st_size,))  # as on a disk that loses bits
    keys.file_key(folder / "scores.safetensors")
    flip(folder / "scores.safetensors")
    with pytest.raises(Damaged, match="scores.safetensors"):
        Explanation.load(folder)


def test_a_diff_that_does_not_fit_the_model_is_named(given, lm):
    wrong = ws.WeightDiff({"model.layers.2.self_attn.o_proj.weight": torch.ones(4, 4)}, {})
    with pytest.raises(ValueError, match="o_proj.weight: diff is 4x4, model has"):
        ws.explain(replace(lm, fingerprint=""), wrong, progress=False)


def test_a_layers_copies_are_let_go(lm):
    """In a model of lower precision one block's float32 copies live at a time."""
    from ws.model.decoder import ROLES, Decoder
    from ws.subspaces.materials import Materials

    half = Decoder(__import__("copy").deepcopy(lm.model).to(torch.bfloat16))
    m = Materials(half, None, 0)
    for l in range(6):
        [getattr(m.layer(l), f"{role}_wide") for role in ROLES]
    held = {id(x) for w in m._layers.values() for r, x in w.__dict__.items() if r.removesuffix("_wide") in ROLES}
    assert len(held) == 7 and len(m._layers) == 6


def test_a_dense_diff_is_decomposed_once_whatever_is_asked_of_it(lm, parity_folder, tmp_path, monkeypatch):
    """Its tables, two protocols, and the corrections over a sweep: each matrix goes through one SVD."""
    from ws.diff import core
    from ws.diff.tables import diff_norms, diff_spectra

    asked: list[str] = []
    svd = core._svd
    monkeypatch.setattr(core, "_svd", lambda name, entry: asked.append(name) or svd(name, entry))
    w, behavior = ws.load_diff(parity_folder / "w.pt"), ws.load_behavior(parity_folder / "behavior.json")
    assert all(isinstance(entry, torch.Tensor) for entry in w.entries.values())  # rounded to bfloat16: of full rank
    diff_norms(w), diff_spectra(w), ws.diff.describe(w)
    for protocol in ("v7", "v7b"):
        ws.explain(lm, w, behavior, protocol=protocol, candidates=["write"], cache=tmp_path, progress=False)
    assert sorted(asked) == sorted(w.names)


def test_a_null_diff_is_another_diff_of_the_same_modules(given, parity_folder):
    w = ws.load_diff(parity_folder / "w.pt")
    other = w.scale(0.5)
    with pytest.raises(ValueError, match="null diff 1 is the same as w: give each one once"):
        given(candidates=["write"], null=[w])
    with pytest.raises(ValueError, match="null diff 2 is the same as null diff 1"):
        given(candidates=["write"], null=[other, w.scale(0.5)])
    few = ws.WeightDiff({name: other[name] for name in list(other.entries)[:1]})
    with pytest.raises(ValueError, match="null diff 1 lacks .*which w changes"):
        given(candidates=["write"], null=[few])


def test_nothing_is_kept_for_a_model_that_a_candidate_of_ones_own_changed(tmp_path):
    """In float32 a candidate is shown the model's own weights."""
    w, clean = ws.load_diff("tiny"), ws.load_lm("tiny")
    more = {"protocol": "v7", "candidates": ["write"], "cache": tmp_path, "progress": False}

    def careless(m, l):
        W = m.layer(l).up
        W -= W.mean(dim=1, keepdim=True)
        return ws.left_svd(W.T, 4)

    ws.explain(ws.load_lm("tiny"), w, extra=[careless], **more)
    again = ws.explain(clean, w, **more).per_layer["conc_act"]
    fresh = ws.explain(clean, w, **(more | {"cache": tmp_path / "other"})).per_layer["conc_act"]
    assert again.to_list() == fresh.to_list()


def test_what_is_told_to_be_quiet_draws_no_bar(given, tmp_path, capfd):
    given(cache=tmp_path / "empty", progress=False)
    assert "it/s" not in "".join(capfd.readouterr())
    given(cache=tmp_path / "other", progress=True)
    assert "bases" in capfd.readouterr().err  # and the next one is heard again
