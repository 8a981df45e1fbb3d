"""Bases and captures on disk: exact, kept per candidate, made anew when what they depend on changes or is damaged."""

import os
from dataclasses import replace

import pytest
import torch

from ws.data import load_behavior
from ws.diff import load_diff
from ws.model.lm import load_lm
from ws.subspaces import captures, from_weights, kept, reading, steered
from ws.subspaces.algebra import empty, left_svd, pca, random_basis
from ws.subspaces.build import candidates
from ws.subspaces.candidate import candidate, get, load_candidates
from ws.subspaces.kept import composed_of, load_bases, make_shelf, save_bases
from ws.subspaces.materials import Materials
from ws.subspaces.protocol import load_protocol

NAMES = ("write", "TaskDiff_contrast", "global_write", "causally_isolated")


@pytest.fixture(scope="module")
def lm(parity_folder):
    return load_lm(str(parity_folder / "model"), "float32", "cpu")


@pytest.fixture(scope="module")
def behavior(parity_folder):
    return load_behavior(parity_folder / "behavior.json")


@pytest.fixture
def shelf(lm, behavior, tmp_path):
    candidates("v7b")
    return make_shelf(lm, behavior, load_protocol("v7"), cache=tmp_path)


@pytest.fixture
def built(monkeypatch):
    """Names of the candidates that were really built, and how many passes through the model were made."""
    seen = {"built": [], "passes": 0}
    build, read = kept.build, reading.read_texts

    def counting(materials, chosen, *more):
        seen["built"] += sorted(c.name for c in chosen)
        return build(materials, chosen, *more)

    def passes(*args, **more):
        seen["passes"] += 1
        return read(*args, **more)

    passes.__module__, passes.__qualname__ = read.__module__, read.__qualname__  # still the same code, for the keys
    passes.__code__ = passes.__code__.replace(co_filename=reading.__file__)
    monkeypatch.setattr(kept, "build", counting)
    monkeypatch.setattr(captures, "read_texts", passes)
    monkeypatch.setattr(steered, "read_texts", passes)
    return seen


def flip(path) -> None:
    """One bit in the middle of a file, its size and time as before."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_round_trip(tmp_path):
    g = torch.Generator().manual_seed(0)
    one = replace(random_basis(10, 3, g), gap=0.5, ill_conditioned=True, note="because", s=torch.tensor([3.0, 2, 1]))
    for rows in ([one] * 4, [random_basis(10, 2, g) for _ in range(3)] + [empty(10, "nothing")]):
        save_bases(rows, tmp_path / "b.safetensors")
        back = load_bases(tmp_path / "b.safetensors")
        for a, b in zip(rows, back, strict=True):
            assert torch.equal(a.B, b.B) and torch.equal(a.s, b.s) and a.note == b.note
            assert a.ill_conditioned == b.ill_conditioned and (a.gap == b.gap or a.gap != a.gap)
        assert (back[0] is back[1]) == (rows[0] is rows[1])


def test_each_candidate_is_built_once_and_depends_on_what_it_sees(shelf, built, lm, behavior, tmp_path):
    chosen = [get(name) for name in NAMES]
    first = shelf.bases(chosen, False)
    assert built["built"] == sorted(NAMES) and built["passes"] == 3
    again = shelf.bases(chosen, False)
    assert len(built["built"]) == 4 and built["passes"] == 3
    assert all(torch.equal(a.B, b.B) for n in first for a, b in zip(first[n], again[n], strict=True))
    shelf.bases([*chosen, get("mlp_write")], False)
    assert built["built"][4:] == ["mlp_write"] and built["passes"] == 3  # one more candidate: nothing else runs again
    other = replace(shelf, protocol=load_protocol("v7b")).bases(chosen, False)
    assert "TaskDiff_contrast" in built["built"][5:] and built["passes"] == 6
    assert not torch.equal(first["TaskDiff_contrast"][3].B, other["TaskDiff_contrast"][3].B)
    assert torch.equal(first["write"][3].B, other["write"][3].B)
    built["built"].clear()
    make_shelf(
        lm, replace(behavior, name="other", personas_pos=("Agree.", "Nod.")), shelf.protocol, cache=tmp_path
    ).bases(chosen, False)
    assert built["built"] == ["TaskDiff_contrast"]  # weight candidates do not see the behaviour


@pytest.mark.parametrize(("family", "anew"), [("llama", []), ("gemma3", ["write"])])
def test_folding_a_gain_makes_other_bases_where_a_block_has_one(family, anew, model_folder, behavior, built, tmp_path):
    lm, chosen = load_lm(str(model_folder(family)), "float32", "cpu"), [get("write")]
    for fold in (False, True):
        built["built"].clear()
        protocol = replace(load_protocol("v7"), fold_gain=fold)
        found = make_shelf(lm, behavior, protocol, k_broad=16, cache=tmp_path).bases(chosen, False)["write"]
        plain = Materials(lm.decoder, None, 0, k_broad=16, fold_gain=fold).of("write", 1)
        assert torch.equal(found[1].B, plain.B)
    assert built["built"] == anew


def test_only_the_layers_that_are_asked_about_are_built(shelf, built, tmp_path, monkeypatch):
    """What is there whole is read; what all layers share is the same everywhere."""
    every = [c for c in candidates("v7") if c.kind != "ceiling"]
    few = replace(shelf, layers=(1, 4), cache=tmp_path / "few")
    some = few.bases(every, False)
    assert len(built["built"]) == len(every) and few.bases(every, False)["write"][1].rank and built["passes"] == 3
    assert len(built["built"]) == len(every)
    whole = shelf.bases(every, False)
    for c in every:
        for l, (one, all_) in enumerate(zip(some[c.name], whole[c.name], strict=True)):
            if l in few.layers or c.shared:
                assert torch.equal(one.B, all_.B) and one.note == all_.note, (c.name, l)
            else:
                assert one.rank == 0 and "not asked about" in one.note
    built["built"].clear()
    part = replace(shelf, layers=(1, 4))
    again = part.bases(every, False)
    assert not built["built"] and all(torch.equal(again[c.name][2].B, whole[c.name][2].B) for c in every)
    entry, wait = next((tmp_path / "bases").glob("mlp_write_????????.safetensors")), kept.lock

    def gone(folder):
        entry.unlink(missing_ok=True)  # somebody tidies up while this one waits for its turn
        return wait(folder)

    next((tmp_path / "bases").glob("write_????????.safetensors")).unlink()
    monkeypatch.setattr(kept, "lock", gone)
    assert part.bases(every, False)["mlp_write"][2].rank == 0
    monkeypatch.undo()
    assert torch.equal(shelf.bases([get("mlp_write")], False)["mlp_write"][2].B, whole["mlp_write"][2].B)


def test_bases_just_built_lie_in_memory_as_those_read_back(shelf):
    """The last digits of a score depend on how its factors lie in memory: a sweep run again must repeat them."""
    chosen = [get(name) for name in (*NAMES, "attention_sink_cut")]
    (first, again) = (shelf.bases(chosen, False) for _ in range(2))
    for name in first:
        assert [b.B.stride() for b in first[name]] == [b.B.stride() for b in again[name]], name


def test_a_changed_function_changes_its_bases_and_no_others(shelf, built, monkeypatch):
    chosen = [get(name) for name in NAMES]
    first = shelf.bases(chosen, False)
    built["built"].clear()
    monkeypatch.setattr(from_weights, "write_away", lambda G, F, k, noise: left_svd(G[:, : 2 * k], k))
    changed = shelf.bases(chosen, False)
    assert built["built"] == ["causally_isolated"]  # the only one of these that calls it
    assert not torch.equal(first["causally_isolated"][2].B, changed["causally_isolated"][2].B)
    monkeypatch.undo()
    assert {p.name for p in composed_of(get("causally_isolated"))[0]} == {"input_super", "kv_super"}


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "sidecar"])
def test_damaged_bases_and_captures_are_made_anew(damage, shelf, built, lm, behavior, parity_folder, tmp_path):
    w = load_diff(parity_folder / "w.pt")
    chosen = [get("write"), get("TaskDiff_contrast")]

    def everything():
        return shelf.bases(chosen, False), steered.capture_steered(lm, behavior, w, shelf.protocol, cache=tmp_path)

    before, passes = everything(), 7
    assert built["passes"] == passes
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 6  # two bases, three base captures, one of steered differences
    for file in files:
        if damage == "flip":
            flip(file)
        elif damage == "cut":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif damage == "empty":
            file.write_bytes(b"")
        else:
            file.with_name(f".made.{file.name}.json").write_bytes(b"\xff{")
    built["built"].clear()
    after = everything()
    assert built["built"] == ["TaskDiff_contrast", "write"] and built["passes"] == 2 * passes
    for name in before[0]:
        assert all(torch.equal(a.B, b.B) for a, b in zip(before[0][name], after[0][name], strict=True))
    assert torch.equal(before[1].eval, after[1].eval)
    everything()
    assert built["passes"] == 2 * passes


def test_captures_follow_the_code_that_reads_and_are_shared_by_protocols(
    lm, behavior, built, parity_folder, tmp_path, monkeypatch
):
    w, v7 = load_diff(parity_folder / "w.pt"), load_protocol("v7")
    steered.capture_steered(lm, behavior, w, v7, cache=tmp_path)
    assert built["passes"] == 4
    for switch in ({"raw_last": True}, {"persona_pairs": "all"}, {"fold_gain": True}, {"max_length": 300}):
        steered.capture_steered(lm, behavior, w, replace(v7, **switch), cache=tmp_path)
    assert built["passes"] == 4  # what w does to the probes depends on their split and format alone
    steered.capture_steered(lm, behavior, w.scale(0.5), v7, cache=tmp_path)
    steered.capture_steered(lm, behavior, w, replace(v7, chat_probes=True), cache=tmp_path)
    steered.capture_steered(replace(lm, fingerprint="another/torch.bfloat16"), behavior, w, v7, cache=tmp_path)
    assert built["passes"] == 16
    monkeypatch.setattr(reading, "last_index", lambda mask: mask.sum(dim=1) - 1)
    steered.capture_steered(lm, behavior, w, v7, cache=tmp_path)
    assert built["passes"] == 20
    monkeypatch.undo()
    files = len(list(tmp_path.rglob("steered_*.safetensors")))
    asked = replace(behavior, probes=("Surely {claim}?",))
    for more in ({"templates": "all"}, {"positions": "all"}, {"templates": "all", "positions": "all"}):
        steered.capture_steered(lm, asked, w, replace(v7, **more), cache=tmp_path)
    steered.capture_steered(lm, asked, w, v7, cache=tmp_path, fit=False)
    assert len(list(tmp_path.rglob("steered_*.safetensors"))) == files + 4


def test_bases_follow_the_code_that_reads_where_they_see_the_prompts(shelf, built, monkeypatch):
    chosen = [get("write"), get("TaskDiff_contrast")]
    shelf.bases(chosen, False)
    built["built"].clear()
    monkeypatch.setattr(reading, "last_index", lambda mask: mask.sum(dim=1) - 1)
    shelf.bases(chosen, False)
    assert built["built"] == ["TaskDiff_contrast"] and built["passes"] == 6


def test_ones_own_candidate_is_built_anew_when_it_or_what_it_calls_changes(shelf, built, tmp_path):
    file = tmp_path / "mine.py"
    text = (
        "import ws\nSCALE = 1.0\n\ndef rows(m, l):\n    return m.base.pos.resid[l] + SCALE * m.base.clean.resid[l]\n\n"
        "@ws.candidate(family='act:persona', sees=('prompts',))\ndef mine(m, l):\n    'Mine.'\n"
        "    return ws.pca(rows(m, l), m.k)\n"
    )

    def bases(source: str):
        file.write_text(source)
        built["built"].clear()
        return shelf.bases(load_candidates(file), False)["mine"][3].B

    first = bases(text)
    assert built["built"] == ["mine"]
    expected = pca(shelf.base().pos.resid[3] + shelf.base().clean.resid[3], 8).B
    assert torch.allclose(first.abs(), expected.abs(), atol=1e-5)
    bases(text.replace("'Mine.'", "'Mine, said better.'").replace("\n\n@", "\n\n# why\n@"))
    assert built["built"] == []
    second = bases(text.replace("SCALE = 1.0", "SCALE = -1.0"))
    assert built["built"] == ["mine"] and not torch.allclose(first.abs(), second.abs(), atol=1e-3)
    bases(text.replace("m.base.pos", "m.base.neg"))
    assert built["built"] == ["mine"]
    bases(text)
    assert built["built"] == ["mine"]


def test_a_cell_run_again_gives_the_new_function(shelf, built):
    def define(offset: int):
        @candidate(family="W:write")
        def cell(m, l):
            """Of a notebook cell."""
            return torch.eye(m.d)[:, offset : offset + 2]

        return cell.candidate

    first = shelf.bases([define(0)], False)["cell"]
    assert shelf.bases([define(0)], False)["cell"][0].B.equal(first[0].B) and built["built"] == ["cell"]
    assert not shelf.bases([define(3)], False)["cell"][0].B.equal(first[0].B) and built["built"] == ["cell", "cell"]


def test_mistakes_in_files_of_candidates_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.py: no such file"):
        load_candidates(tmp_path / "absent.py")
    (tmp_path / "none.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="none.py: holds no function decorated with @ws.candidate"):
        load_candidates([tmp_path / "none.py"])
    (tmp_path / "broken.py").write_text("import nothing_like_this\n")
    with pytest.raises(ValueError, match="broken.py: ModuleNotFoundError"):
        load_candidates(str(tmp_path / "broken.py"))
    assert load_candidates("") == load_candidates([]) == []


@pytest.mark.parametrize("name", ["v7", "v7b"])
def test_protocol_sets_load(name):
    assert load_protocol(name).name == name


def test_explicit_parameters_win_and_mistakes_are_named():
    assert load_protocol("v7", EVAL_SPLIT="held_out").eval_split == "held_out"
    assert load_protocol("v7b", CHAT_PROBES=False).chat_probes is False
    assert load_protocol("v7", RAW_LAST="true", PERSONA_PAIRS="").raw_last is True
    with pytest.raises(ValueError, match="PROTOCOL 'v8' is unknown; one of v7, v7b"):
        load_protocol("v8")
    with pytest.raises(ValueError, match="RAW_LAST is true or false, not 'maybe'"):
        load_protocol("v7", RAW_LAST="maybe")
    with pytest.raises(ValueError, match="PERSONAS is no protocol parameter"):
        load_protocol("v7", PERSONAS="all")


def test_names_that_make_one_file_name_and_small_columns_are_kept_apart(shelf):
    """`a/b` and `a+b` are two entries; a bound method, a partial and a default count with what they hold."""
    from functools import partial

    from ws.subspaces.candidate import Candidate, as_candidate

    def axes(m, l, i=0):
        return torch.eye(m.d)[:, i : i + 2]

    class Of:
        def __init__(self, i):
            self.i = i

        def basis(self, m, l):
            return torch.eye(m.d)[:, self.i : self.i + 2]

    def first(c) -> int:
        return int(shelf.bases([c], False)[c.name][0].B[:, 0].argmax())

    def named(name, f):
        return Candidate(name, "own", "own", False, ("weights",), f)

    for _ in range(2):
        assert [first(named(n, partial(axes, i=i))) for n, i in (("a/b", 1), ("a+b", 4))] == [1, 4]
    for i in (1, 5, 9):
        assert first(named("part", partial(axes, i=i))) == i
        assert first(named("method", Of(i).basis)) == i
        assert first(as_candidate(lambda m, l, i=i: torch.eye(m.d)[:, i : i + 2])) == i
        assert first(named("closure", (lambda j: lambda m, l: torch.eye(m.d)[:, j : j + 2])(i))) == i


def test_a_steered_model_is_refused_and_a_shipped_name_is_not_taken(lm, behavior, parity_folder, tmp_path):
    from ws.explanation.explain import explain
    from ws.steer.weights import weight_steer
    from ws.subspaces.check import as_basis

    w = load_diff(parity_folder / "w.pt")
    ask = {"candidates": ["write"], "cache": tmp_path, "progress": False}
    with weight_steer(lm.model, w, 1.0), pytest.raises(ValueError, match="the model is being steered"):
        explain(lm, w, behavior, **ask)
    with pytest.raises(
        ValueError, match="candidate layer_clean_resid_pca: two of this name are given, or a shipped one"
    ):
        explain(lm, w, behavior, extra={"layer_clean_resid_pca": {2: torch.eye(128)[:, :2]}}, **ask)
    with pytest.warns(UserWarning, match="not orthonormal"):
        assert as_basis(1e-7 * torch.eye(128)[:, :3], 128, "small").rank == 3


def test_what_is_composed_takes_kept_bases_of_weights_and_no_others(shelf, monkeypatch, tmp_path):
    """A candidate that sees prompts, built from other prompts: the one of weights that it is composed of is read, not built
    again, and what comes out is the same as where nothing was kept."""
    parts, whole = ("write_not_downstream_read", "TaskDiff_contrast"), get("WNR_union_TaskDiff")
    shelf.bases([get(name) for name in parts], progress=False)
    some = {"part": "half", "take": lambda base: base.take(list(range(0, len(base.clean.ids), 2)), [0])}
    given, seen = kept.Materials, []

    class Counting(given):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(sorted(self._known))

    monkeypatch.setattr(kept, "Materials", Counting)
    found = replace(shelf, **some).bases([whole], progress=False)[whole.name]
    alone = replace(shelf, **some, cache=tmp_path / "bare").bases([whole], progress=False)[whole.name]
    assert seen == [["write_not_downstream_read"], []]
    assert all(torch.allclose(a.B, b.B, atol=1e-6) for a, b in zip(found, alone, strict=True))
    wider = replace(shelf, k_broad=16).bases([whole], progress=False)
    assert seen[2] == [] and not torch.allclose(wider[whole.name][3].B, found[3].B, atol=1e-3)


def test_the_key_of_a_candidate_is_the_same_whoever_was_walked_before():
    walked = {}
    for c in candidates("v7b"):
        (parts, code), (again, same) = composed_of(c, walked), composed_of(c)
        assert code == same and [p.name for p in parts] == [p.name for p in again], c.name
