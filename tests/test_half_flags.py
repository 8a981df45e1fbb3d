"""In half precision a basis that rounding of the weights turns by more than 0.01 rad says so; in float32 nothing changes."""

from dataclasses import replace

import pytest
import torch

import ws.subspaces.grams as grams
import ws.subspaces.materials as materials
from ws.data import load_behavior
from ws.model.lm import load_lm
from ws.subspaces.algebra import Basis, compose, gram_basis, left_svd, pca
from ws.subspaces.build import build, candidates
from ws.subspaces.candidate import Candidate, get
from ws.subspaces.captures import capture_base
from ws.subspaces.grams import left_gram, weight_noise
from ws.subspaces.kept import load_bases, save_bases
from ws.subspaces.materials import Materials
from ws.subspaces.noise import FLOAT32_EPS, MOST_TURN, NARROW_TURN, NONE, Noise, rounding
from ws.subspaces.protocol import load_protocol


@pytest.fixture(scope="module")
def behavior():
    """The shipped behaviour with twelve of its training topics and one persona pair."""
    b = load_behavior("sycophancy")
    few = {"topics": (*b.topics[:12], *b.topics[b.n_train_topics :]), "n_train_topics": 12}
    return replace(b, **few, personas_pos=b.personas_pos[:1], personas_neg=b.personas_neg[:1])


@pytest.fixture(scope="module")
def made(behavior):
    """Materials of the shipped model in both precisions, under v7b."""
    protocol, found = load_protocol("v7b"), {}
    for dtype in ("float32", "bfloat16"):
        lm = load_lm("tiny", dtype, "cpu")
        base = capture_base(lm, behavior, protocol)
        found[dtype] = Materials(lm.decoder, base, lm.decoder.sink_token(lm.tokenizer), fold_gain=protocol.fold_gain)
    return found


def again(m: Materials) -> Materials:
    return Materials(m.decoder, m._base, m.sink_token, fold_gain=m._fold)


def turn(a: Basis, b: Basis) -> float:
    """Largest principal angle in rad."""
    A, B = (torch.linalg.qr(x.B.double()).Q for x in (a, b))
    if A.shape != B.shape or not A.shape[1]:
        return 0.0 if A.shape == B.shape else 2.0
    return float(torch.linalg.matrix_norm(A - B @ (B.T @ A), ord=2).clamp(max=1).asin())


def test_what_is_not_flagged_in_bfloat16_turns_by_less_than_a_hundredth(made, monkeypatch):
    chosen = [c for c in candidates("v7b") if c.kind != "ceiling"]
    full, half = (build(m, chosen, False) for m in made.values())
    for module in (materials, grams):
        monkeypatch.setattr(module, "weight_eps", lambda _: FLOAT32_EPS)  # the flags of float32's rounding alone
    blind = build(again(made["bfloat16"]), chosen, False)
    unflagged, moved = {"half": 0, "blind": 0}, {"half": [], "blind": []}
    for name in full:
        for l, (a, b, c) in enumerate(zip(full[name], half[name], blind[name], strict=True)):
            assert turn(b, c) < max(1e-6, 0.02 * b.turn)  # flags alone differ, and what makes products of weights
            for kind, basis in (("half", b), ("blind", c)):
                if not basis.ill_conditioned:
                    unflagged[kind] += 1
                    moved[kind] += [(name, l)] if turn(a, basis) > NARROW_TURN else []
    print({kind: (unflagged[kind], len(moved[kind])) for kind in moved}, "of", sum(map(len, full.values())))
    assert not moved["half"] and unflagged["half"] >= 80
    assert len(moved["blind"]) > 100


def test_in_float32_weights_have_no_noise_and_activations_that_of_float32(made):
    m = made["float32"]
    for l in (0, 5):
        w = m.layer(l)
        for gram in ("write_gram", "read_gram", "kv_gram", "up_gram"):
            a, b = m.top(l, gram), gram_basis(getattr(w, gram), 8)
            assert torch.equal(a.B, b.B) and a.turn == b.turn == 0 and a.most == MOST_TURN
        assert w.noise("write_gram") == m.product_noise(l, "o", "v") == m.unembed_noise == NONE
        assert m.noise_of_all("readers_gram") == m.noise_of_all("writers_gram") == NONE
        x = m.base.clean.resid[l]
        assert m.rounding(x) == Noise(rounding(x)) and m.pca(x).turn == pca(x, 8).turn
    assert not get("logits_null").build(m).ill_conditioned and get("logits_null").build(m).turn == 0


@pytest.mark.parametrize("scale", [1.09, 1.31, 1.57, 1.83])
def test_other_roundings_of_the_same_weights_keep_to_the_bound(made, scale):
    """A matrix times a number has the same singular vectors and rounds in another way."""
    full, half = made["float32"].decoder, made["bfloat16"].decoder
    ratios, wrong, sure = [], 0, 0
    for l in range(8):
        for roles in (["o", "down"], ["down"], ["q", "k", "v"], ["up"]):
            parts = [full.weight(l, r) if r in ("o", "down") else full.weight(l, r).T for r in roles]
            rounded = [(M * scale).bfloat16().float() for M in parts]
            G = left_gram(*rounded)
            found = gram_basis(G, 8, noise=weight_noise(half, G.diagonal(), sum(M.shape[1] for M in rounded)))
            off = turn(gram_basis(left_gram(*parts), 8), found)
            ratios.append(off / found.turn)
            sure += not found.ill_conditioned
            wrong += not found.ill_conditioned and off > NARROW_TURN
    assert wrong <= 1 and sure >= 16
    assert 0.1 < sorted(ratios)[len(ratios) // 2] < 1 and max(ratios) < 3


@pytest.mark.parametrize("rows", [False, True])
def test_the_bound_of_planted_noise(rows):
    """Of matrices with known singular values the root mean square of the turn is that of the formula."""
    g = torch.Generator().manual_seed(0)
    d, m, k = 60, 200, 4
    U, V = (torch.linalg.qr(torch.randn(n, d, generator=g, dtype=torch.float64)).Q for n in (d, m))
    s = torch.linspace(3, 1, d, dtype=torch.float64) + torch.tensor([1.0] * k + [0.0] * (d - k))
    M, size, squares = (U * s) @ V.T, 1e-4, []
    for _ in range(40):
        if rows:
            E = size * torch.randn(d, 1, generator=g, dtype=torch.float64) * M
        else:
            E = size * torch.randn(d, m, generator=g, dtype=torch.float64)
        A = torch.linalg.svd(M + E)[0][:, :k]
        squares.append(float((A - U[:, :k] @ (U[:, :k].T @ A)).square().sum()))
    seen = (sum(squares) / len(squares)) ** 0.5
    bound = Noise(sigma=1e-12 if rows else size, rows=size if rows else 0.0).turn(s, k, d)
    assert 0.6 < seen / bound < (1.05 if rows else 1.1)  # rows: twice, for directions that lie on few coordinates
    found = left_svd(M, k, Noise(sigma=size if not rows else 1e-12, rows=size if rows else 0.0, most=bound / 2))
    assert (
        found.turn == pytest.approx(bound, rel=1e-6) and found.ill_conditioned and "rounding may turn it" in found.note
    )


def test_composed_ones_and_ones_own_inherit_the_precision(made, tmp_path):
    half, half_turn = again(made["bfloat16"]), 5e-3
    a, b = Basis(torch.eye(9)[:, :2], turn=half_turn, most=NARROW_TURN), Basis(torch.eye(9)[:, 3:4])
    both = compose(torch.cat([a.B, b.B], dim=1), a, b)
    assert both.turn == half_turn and both.most == NARROW_TURN and not both.ill_conditioned
    assert compose(a.B, replace(a, most=MOST_TURN)).ill_conditioned
    save_bases([both], tmp_path / "b.safetensors")
    assert load_bases(tmp_path / "b.safetensors")[0].most == NARROW_TURN

    def mine(m, l):
        return pca(m.base.pos.resid[l], m.k)

    entry = Candidate("mine", "own", "own", False, ("weights", "prompts"), mine)
    own, same = half.build(entry, 3), pca(half._base.pos.resid[3], 8)
    assert own.most == NARROW_TURN and own.turn == pytest.approx(min(same.turn * 2.0**16, 1.0))
    assert again(made["float32"]).build(entry, 3).most == MOST_TURN
