"""Threads do not decide science: bases under one thread and two, and under noise in the last bit, are the same to 1e-6
in overlap, or flagged; the report over seeds that were swept under different thread counts says so and ends."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from ws.data import load_behavior
from ws.diff import load_diff
from ws.explanation.explain import explain
from ws.model.lm import load_lm
from ws.stability.compare import compare_seeds
from ws.stability.overlap import SAME, same_span
from ws.subspaces.algebra import MOST_TURN, Basis, bisector, compose, left_svd, pca, project_away, rounding
from ws.subspaces.build import build, candidates
from ws.subspaces.candidate import get
from ws.subspaces.captures import BaseCaptures, TextActs, capture_base
from ws.subspaces.eigen import libraries, side_by_side
from ws.subspaces.kept import make_shelf
from ws.subspaces.materials import Materials
from ws.subspaces.protocol import load_protocol

ARBITRARY = {"chars_clusters", "qk_x_chars_clusters", "attention_sink", "rotation_contrast"}  # by definition


@contextmanager
def threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_side_by_side_each_has_one_thread_and_afterwards_all_are_as_they_were():
    def told() -> list[int]:
        return [tell() for tell, _ in libraries()]

    before = told()
    try:
        with threads(2):
            for _, put in libraries():
                put(2)
            with side_by_side() as each:
                assert list(each(abs, [-1, 2, -3])) == [1, 2, 3]
                assert set(each(lambda _: torch.get_num_threads(), range(8))) <= ({1} if libraries() else {2}) and set(
                    told()
                ) <= {1}
            with pytest.raises(ZeroDivisionError), side_by_side() as each:
                list(each(lambda x: 1 / x, [1, 0, 2]))
            assert set(told()) <= {2} and torch.get_num_threads() == 2
        with threads(1), side_by_side() as each:
            assert each is map
    finally:
        for (_, put), n in zip(libraries(), before, strict=True):
            put(n)


@pytest.fixture(scope="module")
def lm():
    return load_lm("tiny", "float32", "cpu")


@pytest.fixture(scope="module")
def behavior():
    """The shipped behaviour with twelve of its training topics and one persona pair."""
    b = load_behavior("sycophancy")
    topics = (*b.topics[:12], *b.topics[b.n_train_topics :])
    return replace(
        b, topics=topics, n_train_topics=12, personas_pos=b.personas_pos[:1], personas_neg=b.personas_neg[:1]
    )


def test_what_all_layers_share_is_made_once_whoever_asks_first(lm):
    """Also where no shared candidate asks: the pass over all layers starts while a basis is on its way."""
    names = ("write_not_global_read", "write", "write_not_downstream_read", "write_not_lm_head_read")
    found = {}
    for n in (1, 2):
        with threads(n):
            found[n] = build(Materials(lm.decoder, None, 0), [c for c in candidates("v7") if c.name in names], False)
    assert all(
        1 - same_span(a.B.double(), b.B.double()) < SAME
        for name in names
        for a, b in zip(found[1][name], found[2][name], strict=True)
    )


def defects(a: dict[str, list[Basis]], b: dict[str, list[Basis]]) -> dict[str, float]:
    """Largest 1 - overlap over layers, of the flagged ones under `name!`."""
    found: dict[str, float] = {}
    for name in a:
        for x, y in zip(a[name], b[name], strict=True):
            key = name + "!" * (x.ill_conditioned or y.ill_conditioned)
            A, B = (torch.linalg.qr(basis.B.double()).Q for basis in (x, y))
            found[key] = max(found.get(key, 0.0), 1 - same_span(A, B))
    return found


@pytest.fixture(scope="module")
def built(lm, behavior, tmp_path_factory):
    """All v7b candidates from fresh captures under one thread and two, and from the first ones with noise."""
    protocol = load_protocol("v7b")
    chosen = [c for c in candidates(protocol) if c.kind != "ceiling"]
    shelves = {n: make_shelf(lm, behavior, protocol, cache=tmp_path_factory.mktemp(f"cache{n}")) for n in (1, 2)}
    found = {}
    for n, shelf in shelves.items():
        with threads(n):
            found[n] = shelf.bases(chosen, False)
    g = torch.Generator().manual_seed(0)

    def noisy(acts: TextActs) -> TextActs:
        """Each number as wrong as two float32 computations of it are apart (docs/reliability.md)."""
        shaken = {f: getattr(acts, f) for f in ("resid", "up_in", "attn")} | {"tokens": acts.tokens.states}
        made = {f: x * (1 + 4e-7 * torch.randn(x.shape, generator=g)) for f, x in shaken.items()}
        return replace(acts, **made | {"tokens": replace(acts.tokens, states=made["tokens"])})

    base = capture_base(lm, behavior, protocol, cache=shelves[1].cache)
    base = BaseCaptures(noisy(base.clean), noisy(base.pos), noisy(base.neg), base.n_pairs)
    sink = lm.decoder.sink_token(lm.tokenizer)
    found["noise"] = build(Materials(lm.decoder, base, sink, fold_gain=protocol.fold_gain), chosen, False)
    return found, shelves


@pytest.mark.parametrize("other", [2, "noise"])
def test_every_v7b_basis_is_the_same_to_1e_6_or_flagged(built, other):
    found = defects(built[0][1], built[0][other])
    assert {name.strip("!") for name in found} == {c.name for c in candidates("v7b") if c.kind != "ceiling"}
    assert max(value for name, value in found.items() if not name.endswith("!")) < SAME
    assert sum(not name.endswith("!") for name in found) >= 50  # most are not flagged
    for name in ARBITRARY:  # flagged at every layer, and filled up in one and the same way
        assert name not in found and found[f"{name}!"] < SAME, name


def test_the_key_of_bases_and_captures_does_not_hold_the_thread_count(built, monkeypatch):
    shelves = built[1]
    names = [
        {str(f.relative_to(shelf.cache)) for f in shelf.cache.rglob("*.safetensors")} for shelf in shelves.values()
    ]
    assert names[0] == names[1] and len(names[0]) > 50
    one = replace(shelves[2], cache=shelves[1].cache)
    monkeypatch.setattr("ws.subspaces.kept.build", lambda *args: pytest.fail("what one thread made is made anew"))
    with threads(2):
        one.bases([get(name) for name in ("write", "TaskDiff_uncentred", "chars_clusters_cut")], False)


@pytest.mark.parametrize("protocol", ["v7", "v7b"])
def test_seeds_swept_under_different_thread_counts_are_compared(protocol, lm, behavior, tmp_path):
    chosen = [
        "write",
        "TaskDiff_contrast",
        "rotation_contrast",
        "chars_clusters",
        "attention_sink",
        "qk_x_chars_clusters",
    ]
    found, w = {}, load_diff("tiny")
    for seed, n in enumerate((1, 2)):
        with threads(n):
            found[seed] = explain(
                lm,
                w.scale(1 + seed),
                behavior,
                protocol=protocol,
                candidates=chosen,
                cache=tmp_path / str(n),
                progress=False,
            )
    report = compare_seeds(found, boot=50, n_null=50)
    flags = {row["candidate"]: row for row in report.summary.filter(kind="A-hypothesis").iter_rows(named=True)}
    assert set(chosen) <= set(flags) and not any(row["depends_on_seed"] for row in flags.values())
    assert all(row["seed_overlap"] >= 1 - SAME for row in flags.values())
    assert {name for name, row in flags.items() if row["ill_conditioned"]} >= ARBITRARY
    # what another machine or an older version fills up otherwise is named, and the report ends
    turned = dict(found[1].tensors)
    for l in found[1].layers:
        turned[f"basis/attention_sink/{l}"] = found[1].tensors[f"basis/attention_sink/{l}"].flip(0)
    other = replace(found[1], tensors=turned, bases=found[1].bases | {"attention_sink": "other"})
    report = compare_seeds({0: found[0], 1: other}, boot=50, n_null=50)
    assert "so no winner: attention_sink (least overlap" in report.conclusion() and report.verdict.winner is None
    assert report.summary.filter(candidate="attention_sink")["kind"][0] == "A-hypothesis"


def test_a_turn_is_bounded_by_noise_over_the_gap_and_carried_along():
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(40, 40, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(60, 40, generator=g, dtype=torch.float64)).Q
    s = torch.tensor([8.0, 4.0, 2.0, 1.992] + [0.1] * 36, dtype=torch.float64)
    M, noise = Q * s @ V.T, torch.randn(40, 60, generator=g, dtype=torch.float64)
    noise *= 1e-5 / torch.linalg.matrix_norm(noise, 2)
    for k, flagged in ((2, False), (3, True), (4, False)):
        found, shaken = left_svd(M, k, 1e-5), left_svd(M + noise, k, 1e-5)
        assert found.turn == pytest.approx(1e-5 / float(s[k - 1] - s[k])) and found.ill_conditioned == flagged == (
            k == 3
        )
        assert 1 - same_span(*(torch.linalg.qr(b.B.double()).Q for b in (found, shaken))) <= found.turn**2
        assert not left_svd(M, k, 0.0).ill_conditioned and left_svd(M, k, 0.0).turn == 0
    a, b = Basis(Q[:, :2].float(), turn=2e-4), Basis((Q[:, 2:4] + 20 * Q[:, :2]).float() / 401**0.5, turn=2e-4)
    both = compose(torch.cat([a.B, b.B], dim=1), a, b)
    assert both.turn > MOST_TURN and both.ill_conditioned  # nearly dependent: the small rest turns by more
    assert not project_away(Basis(Q[:, 4:6].float()), a).ill_conditioned and project_away(b, a).ill_conditioned
    assert bisector(a, Basis(Q[:, 5:7].float(), turn=2e-4), 2).ill_conditioned  # they share nothing
    X = torch.randn(12, 40, generator=g) + 1e4  # a difference of large numbers is known by its parts
    assert pca(X, 3, rounding(X)).ill_conditioned and not pca(X - X.mean(dim=0), 3).ill_conditioned
