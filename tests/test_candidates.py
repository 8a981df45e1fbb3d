"""Candidates: definitions against direct computation, planted answers, what v7b mends, what is refused."""

import polars as pl
import pytest
import torch
from conftest import FAMILIES

from ws.data import load_behavior
from ws.diff import LowRank, WeightDiff
from ws.model.lm import load_lm
from ws.subspaces import algebra as S
from ws.subspaces.build import build, candidates
from ws.subspaces.candidate import Candidate, candidate, get
from ws.subspaces.captures import capture_base
from ws.subspaces.from_activations import kmeans
from ws.subspaces.from_weights import folded
from ws.subspaces.materials import Materials
from ws.subspaces.protocol import load_protocol
from ws.subspaces.steered import CeilingMaterials, capture_steered
from ws.subspaces.tokens import common_suffix


@pytest.fixture(scope="module")
def behavior(parity_folder):
    return load_behavior(parity_folder / "behavior.json")


@pytest.fixture(scope="module")
def lm(parity_folder):
    return load_lm(str(parity_folder / "model"), "float32", "cpu")


@pytest.fixture(scope="module")
def materials(lm, behavior):
    base = capture_base(lm, behavior, load_protocol("v7b"))
    return Materials(lm.decoder, base, lm.decoder.sink_token(lm.tokenizer))


def same_span(A, B) -> float:
    A, B = A.double(), B.double()
    return float(torch.linalg.matrix_norm(A - B @ (B.T @ A), ord=2))


def top(M, k=8):
    return torch.linalg.svd(M.double(), full_matrices=False)[0][:, :k]


def test_registry_has_every_candidate_of_the_method_once():
    names = [c.name for c in candidates("v7b")]
    assert len(names) == len(set(names))
    v7 = [c for c in candidates("v7b") if c.source != "v7b"]
    assert len([c for c in v7 if c.kind == "A-hypothesis"]) == 42 and len([c for c in v7 if c.kind == "ceiling"]) == 2
    added = {c.name for c in [c for c in candidates("v7b") if c.source == "v7b"]}
    assert added == {
        "TaskDiff_uncentred", "up_proj_input_uncentred", "up_written_uncentred", "TaskDiff_lora_uncentred_ceiling",
        "attn_ov_heads", "qk_heads", "attn_min_common", "attn_max_common", "attn_diff_common", "chars_clusters_cut",
        "attention_sink_cut", "rotation_cut", "mlp_up_read_gain", "attn_qkv_read_gain", "input_super_gain",
        "random_orthogonal",
    }  # fmt: skip
    assert all(len(c.definition) > 20 for c in candidates("v7b"))
    assert get("write").axis_kind == "write" and get("global_read").axis_kind == "read"
    assert get("TaskDiff_contrast").axis_kind == "mixed" and get("random_orthogonal").kind == "control"


def test_registry_replaces_ones_own_and_refuses_shipped_names_missing_definitions_and_unknown_names():
    for width in (2, 3):

        @candidate(family="W:write", name="mine_twice")
        def mine(m, l, width=width):
            """Running the cell again replaces it."""
            return torch.eye(m.d)[:, :width]

    assert get("mine_twice").build(type("M", (), {"d": 4}), 0).shape == (4, 3) and mine.candidate is get("mine_twice")
    with pytest.raises(ValueError, match="write: a shipped candidate has this name"):

        @candidate(family="W:write", name="write")
        def again(m, l):
            """Twice."""

    with pytest.raises(ValueError, match="no definition"):

        @candidate(family="W:write")
        def bare(m, l):
            pass

    with pytest.raises(
        ValueError, match="sees 'texts' is unknown; known are weights, prompts, pairs, other pairs, personas"
    ):

        @candidate(family="act:mine", sees=("texts",))
        def wrong(m, l):
            """Sees texts."""

    with pytest.raises(ValueError, match="only the shipped ceilings see w"):

        @candidate(family="ceiling", sees=("w",))
        def peeks(m, l):
            """Sees w."""

    with pytest.raises(ValueError, match="no candidate 'wirte'; did you mean write"):
        get("wirte")


def test_a_candidate_sees_only_what_it_says(materials):
    @candidate(family="W:write")
    def blind(m, l):
        """Says it sees weights."""
        return m.base.clean.resid[l].T[:, :2]

    @candidate(family="compound")
    def hidden(m, l):
        """Uses one that sees prompts."""
        return m.of("TaskDiff_contrast", l)

    with pytest.raises(ValueError, match="candidate blind looks at activations: decorate it with sees="):
        build(materials, [get("blind")], False)
    with pytest.raises(ValueError, match="candidate hidden uses TaskDiff_contrast, which sees prompts: add it to sees"):
        build(materials, [get("hidden")], False)


def test_weight_candidates_equal_their_definition(materials, lm):
    m, dec = materials, lm.decoder
    l = 2
    w = {r: dec.weight(l, r).double() for r in ("q", "k", "v", "o", "gate", "up", "down")}
    both = torch.cat([w["o"], w["down"]], dim=1)
    reads = torch.cat([w["q"], w["k"], w["v"], w["up"], w["gate"]])
    lm_head = dec.unembed().double()
    lm64 = top(lm_head.T, 64)
    gr = lm_head.T @ lm_head
    later = gr.clone()
    for i in range(dec.n_layers):
        S_i = torch.cat([dec.weight(i, r).double() for r in ("q", "k", "v", "up", "gate")])
        gr += S_i.T @ S_i
        later += S_i.T @ S_i if i > l else 0
    gr64, down64 = (torch.linalg.eigh(G)[1][:, -64:] for G in (gr, later))
    everything = torch.cat([torch.cat([dec.weight(i, "o"), dec.weight(i, "down")], dim=1) for i in range(6)], dim=1)
    away = lambda F: top(both - F @ (F.T @ both))  # noqa: E731
    expected = {
        "lm_head_read": top(lm_head.T),
        "logits_null": torch.linalg.svd(lm_head)[2][-8:].T,
        "global_read": torch.linalg.eigh(gr)[1][:, -8:],
        "global_write": top(everything),
        "global_write_not_global_read": top(everything.double() - gr64 @ (gr64.T @ everything.double())),
        "write": top(both),
        "attn_write": top(w["o"]),
        "mlp_write": top(w["down"]),
        "write_not_lm_head_read": away(lm64),
        "write_not_global_read": away(gr64),
        "write_not_downstream_read": away(down64),
        "mlp_up_read": top(w["up"].T),
        "mlp_gate_read": top(w["gate"].T),
        "attn_qkv_read": top(torch.cat([w["q"], w["k"], w["v"]]).T),
        "attn_ov_write": top(w["o"] @ w["v"].repeat_interleave(2, 0)),
        "mlp_roundtrip_write": top(w["down"] @ w["up"]),
        "qk_circuit": top(w["q"].T @ w["k"].repeat_interleave(2, 0)),
        "input_super": top(reads.T),
        "kv_super": top(torch.cat([w["k"], w["v"]]).T),
    }
    for name, B in expected.items():
        assert same_span(m.of(name, l).B, B) < 2e-3, name
    readers = torch.linalg.qr(torch.cat([expected["input_super"], expected["kv_super"], lm64], dim=1)).Q
    assert same_span(m.of("causally_isolated", l).B, away(readers)) < 2e-3


def test_activation_candidates_equal_their_definition(materials):
    m, l, base = materials, 3, materials.base
    pca = lambda X: top((X - X.mean(dim=0)).double().T)  # noqa: E731
    diff = base.pos.resid[l] - base.neg.resid[l]
    size = base.clean.resid.abs()
    D = size[1:] - size[:-1]
    expected = {
        "TaskDiff_contrast": pca(diff),
        "layer_clean_resid_pca": pca(base.clean.resid[l]),
        "global_clean_resid_pca": pca(base.clean.resid.flatten(0, 1)),
        "suppressed": pca(torch.minimum(D.relu().sum(0), (-D).relu().sum(0))),
        "amplified": pca((size[-1] - size[0]).relu()),
        "added_features": pca(D.relu().sum(0)),
        "churn": pca(base.clean.resid[l + 1] - base.clean.resid[l]),
        "up_proj_input_contrast": pca(base.pos.up_in[l] - base.neg.up_in[l]),
        "TaskDiff_uncentred": top((diff / diff.norm(dim=1, keepdim=True)).T),
    }
    for name, B in expected.items():
        assert same_span(m.of(name, l).B, B) < 2e-3, name


def test_the_written_mlp_states_are_the_blocks_own_mlp_output(materials, lm):
    """gate_active_written and gate_kernel use the model's activation: W_down (act(gate x) * up x) is mlp(x)."""
    x = materials.base.clean.up_in[1]
    w = materials.layer(1)
    written = (lm.decoder.act(x @ w.gate.T) * (x @ w.up.T)) @ w.down.T
    with torch.no_grad():
        assert torch.allclose(written, lm.decoder.blocks[1].mlp(x), atol=1e-5)


def test_per_head_ov_is_what_attention_computes(materials, lm):
    """A head that attends to one token writes o_h v_kv(h) x; the side-by-side SVD of these maps is attn_ov_heads."""
    dec, l = lm.decoder, 2
    o = dec.weight(l, "o").double().reshape(dec.d, dec.n_heads, dec.head_dim)
    v = dec.weight(l, "v").double().reshape(dec.n_kv, dec.head_dim, dec.d)
    maps = [o[:, h] @ v[h // 2] for h in range(4)]
    assert same_span(materials.of("attn_ov_heads", l).B, top(torch.cat(maps, dim=1))) < 1e-3
    x = torch.randn(1, 1, dec.d, dtype=torch.float64)
    attended = sum(M @ x[0, 0] for M in maps)
    block = dec.blocks[l].self_attn
    value = torch.nn.functional.linear(x, block.v_proj.weight.double()).reshape(dec.n_kv, dec.head_dim)
    full = torch.nn.functional.linear(value.repeat_interleave(2, 0).reshape(1, -1), block.o_proj.weight.double())
    assert torch.allclose(full[0], attended)
    q = dec.weight(l, "q").double().reshape(dec.n_heads, dec.head_dim, dec.d)
    k = dec.weight(l, "k").double().reshape(dec.n_kv, dec.head_dim, dec.d)
    qk = torch.cat([q[h].T @ k[h // 2] for h in range(4)], dim=1)
    assert same_span(materials.of("qk_heads", l).B, top(qk)) < 1e-3


def test_gain_candidates_fold_the_norm_in(materials, lm):
    dec, l = lm.decoder, 2
    g_attn, g_mlp = (dec.blocks[l].input_layernorm.weight.detach().double(),
                     dec.blocks[l].post_attention_layernorm.weight.detach().double())  # fmt: skip
    up, gate = dec.weight(l, "up").double() * g_mlp, dec.weight(l, "gate").double() * g_mlp
    qkv = torch.cat([dec.weight(l, r).double() for r in ("q", "k", "v")]) * g_attn
    assert same_span(materials.of("mlp_up_read_gain", l).B, top(up.T)) < 1e-3
    assert same_span(materials.of("attn_qkv_read_gain", l).B, top(qkv.T)) < 1e-3
    assert same_span(materials.of("input_super_gain", l).B, top(torch.cat([qkv, up, gate]).T)) < 1e-3


def test_common_suffix_selects_only_tokens_both_texts_share(materials):
    assert common_suffix((1, 2, 3, 4), (9, 3, 4)) == 2
    assert common_suffix((1, 2), (1, 2)) == 2 and common_suffix((1,), (2,)) == 0
    m, l = materials, 3
    rows = []
    for i, (a, b) in enumerate(zip(m.base.pos.ids, m.base.neg.ids, strict=True)):
        n = common_suffix(a, b)
        assert 0 < n < min(len(a), len(b))
        D = m.base.pos.tokens[l, i, -n:] - m.base.neg.tokens[l, i, -n:]
        weight = torch.minimum(m.base.pos.attn[l, i, -n:], m.base.neg.attn[l, i, -n:])
        rows.append(D * (weight + 1e-12).sqrt()[:, None])
    assert same_span(m.of("attn_min_common", l).B, top(torch.cat(rows).T)) < 1e-3


def test_kmeans_finds_separated_clusters_and_keeps_empty_ones():
    g = torch.Generator().manual_seed(0)
    centres = 50 * torch.eye(8, 12, dtype=torch.float64)
    rows = torch.cat([c + torch.randn(5, 12, generator=g, dtype=torch.float64) for c in centres])
    rows = rows - rows.mean(dim=0)
    found, margin = kmeans(rows)
    assert margin > 0.001
    assert found.shape == (8, 12)
    still, margin = kmeans(torch.zeros(9, 3, dtype=torch.float64))
    assert still.abs().sum() == 0 and margin == 0


@pytest.mark.parametrize("columns", [2, 3, 4, 5])
def test_columns_are_folded_as_rows_would_be_repeated(columns):
    g = torch.Generator().manual_seed(0)
    M, X = torch.randn(7, columns, generator=g).double(), torch.randn(2, 6, generator=g).double()
    repeated = X.repeat_interleave(-(-columns // 2), dim=0)[:columns]
    found, times = folded(M, 2)
    assert torch.allclose(found @ X, M @ repeated) and times == -(-columns // 2)


def test_rounding_noise_turns_neither_ill_conditioned_ones_nor_their_v7b_forms(lm, behavior):
    """Noise at float32's resolution on the captures: directions that no data determine are the same all the same."""
    from dataclasses import replace

    protocol = load_protocol("v7")
    base = capture_base(lm, behavior, protocol)
    g = torch.Generator().manual_seed(0)

    def jitter(acts):
        noise = 1 + 1e-7 * torch.randn(acts.resid.shape, generator=g)
        return replace(acts, resid=acts.resid * noise)

    other = replace(base, clean=jitter(base.clean), pos=jitter(base.pos), neg=jitter(base.neg))
    sink = lm.decoder.sink_token(lm.tokenizer)
    a, b = Materials(lm.decoder, base, sink), Materials(lm.decoder, other, sink)
    for unstable, stable in (("rotation_contrast", "rotation_cut"), ("chars_clusters", "chars_clusters_cut")):
        cut_a, cut_b = a.of(stable, 3), b.of(stable, 3)
        assert cut_a.rank == cut_b.rank and same_span(cut_a.B, cut_b.B) < 1e-2, stable
        assert a.of(unstable, 3).ill_conditioned and not cut_a.ill_conditioned
        assert same_span(a.of(unstable, 3).B, b.of(unstable, 3).B) < 1e-3
    assert a.of("attention_sink", 3).ill_conditioned and a.of("attention_sink_cut", 3).rank == 3


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_candidate_is_built_on_every_family(family, model_folder, behavior):
    lm = load_lm(str(model_folder(family)), "float32", "cpu")
    protocol = load_protocol("v7b")
    w = WeightDiff({lm.decoder.param_name(1, r): LowRank(torch.randn(48, 2), torch.randn(2, lm.decoder.weight(1, r).shape[1]))
                    for r in ("o", "down")}, {})  # fmt: skip
    base = capture_base(lm, behavior, protocol)
    sink = lm.decoder.sink_token(lm.tokenizer)
    a_side = Materials(lm.decoder, base, sink, k_broad=16, fold_gain=protocol.fold_gain)
    bases = build(a_side, [c for c in candidates("v7b") if c.kind != "ceiling"], False)
    b_side = CeilingMaterials(lm.decoder, w.scale(0.01), capture_steered(lm, behavior, w.scale(0.01), protocol),
                              fold_gain=protocol.fold_gain)  # fmt: skip
    bases |= build(b_side, [c for c in candidates("v7b") if c.kind == "ceiling"], False)
    assert len(bases) == len(candidates("v7b")) and all(len(rows) == 3 for rows in bases.values())
    assert bases["dW_left_basis_ceiling"][1].rank == 4 and bases["dW_left_basis_ceiling"][0].rank == 0
    assert "no residual writer" in bases["dW_left_basis_ceiling"][0].note


def test_output_norm_gain_is_folded_into_what_a_block_writes(model_folder, behavior):
    lm = load_lm(str(model_folder("olmo2")), "float32", "cpu")
    base = capture_base(lm, behavior, load_protocol("v7b"))
    gain = lm.decoder.blocks[1].post_attention_layernorm.weight.detach()
    folded = Materials(lm.decoder, base, 2, k_broad=16, fold_gain=True).of("attn_write", 1)
    assert same_span(folded.B, top(gain[:, None] * lm.decoder.weight(1, "o"))) < 1e-3
    plain = Materials(lm.decoder, base, 2, k_broad=16).of("attn_write", 1)
    assert same_span(folded.B, plain.B) > 0.01


def test_no_candidate_depends_on_which_others_are_built(materials):
    alone = build(materials, [get("causally_isolated"), get("qk_x_chars_clusters")], False)
    for name, rows in alone.items():
        assert all(torch.equal(a.B, materials.of(name, l).B) for l, a in enumerate(rows))


def test_a_malformed_basis_names_candidate_and_layer(materials, monkeypatch):
    from dataclasses import replace

    bad = replace(get("write"), build=lambda m, l: S.Basis(torch.ones(128, 2)))
    monkeypatch.setitem(__import__("ws.subspaces.candidate", fromlist=["x"])._REGISTRY, "write", bad)
    fresh = Materials(materials.decoder, materials.base, 2)
    with pytest.raises(ValueError, match="write at layer 0: basis is not orthonormal"):
        build(fresh, [bad], False)


def test_planted_ceilings_are_found(lm, behavior):
    """w whose writers live in a known 8-dimensional space: the weight ceiling is that space; where only down_proj is
    changed, the block's output moves inside it, and so do both activation ceilings."""
    g = torch.Generator().manual_seed(3)
    U = S.random_basis(128, 8, g).B
    entries = {}
    for role in ("o", "down"):
        width = lm.decoder.weight(2, role).shape[1]
        entries[lm.decoder.param_name(2, role)] = LowRank(0.01 * U, torch.randn(8, width, generator=g))
    both = WeightDiff(entries, {})
    down = both.select(lambda name: "down" in name)
    protocol = load_protocol("v7")
    b_side = CeilingMaterials(lm.decoder, both, capture_steered(lm, behavior, down, protocol))
    assert same_span(b_side.build(get("dW_left_basis_ceiling"), 2).B, U) < 1e-4
    assert same_span(b_side.build(get("TaskDiff_lora_ceiling"), 2).B, U) < 1e-3
    assert same_span(b_side.build(get("TaskDiff_lora_uncentred_ceiling"), 2).B, U) < 1e-3


def test_tables_order_of_axis_kinds(materials):
    table = pl.DataFrame(
        [(c.name, c.family, c.axis_kind) for c in candidates("v7b")], orient="row", schema=["n", "f", "a"]
    )
    reads = table.filter(pl.col("f").is_in(["W:read", "W:unembed"]))["a"].unique().to_list()
    writes = table.filter(pl.col("f").is_in(["W:write", "W:write-not-read", "W:OV", "W:MLP"]))["a"].unique().to_list()
    assert reads == ["read"] and writes == ["write"]


def test_a_width_that_no_basis_can_have_is_refused(materials):
    decoder, base = materials.decoder, materials.base
    for k, k_broad, message in (
        (0, 64, "PCS = 0"),
        (decoder.d + 1, 64, f"1 to d = {decoder.d}"),
        (8, 0, "K_BROAD = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Materials(decoder, base, 0, k, k_broad)


def test_what_is_built_on_the_way_over_the_layers_is_what_each_layer_gives(materials):
    """Bases that wait for the sum of all layers, and those built while it is added up, in one pass over the weights."""
    fresh = Materials(materials.decoder, materials.base, 2)
    read: list[tuple[int, str]] = []
    weight = fresh.decoder.weight
    fresh.decoder.weight = lambda l, role: read.append((l, role)) or weight(l, role)
    chosen = [c for c in candidates("v7b") if c.kind != "ceiling" and "pairs" not in c.sees]
    try:
        found = build(fresh, chosen, False)
    finally:
        del fresh.decoder.weight
    assert all(read.count((l, "up")) == 1 for l in range(fresh.n_layers)), "each layer's weights are read once"
    assert not any(vars(layer).keys() & {"up_gram", "down_gram"} for layer in fresh._layers.values())
    for c in chosen:
        for l in range(fresh.n_layers):
            assert torch.equal(found[c.name][l].B, materials.build(c, l).B), (c.name, l)


def test_a_candidate_that_catches_errors_gets_what_all_layers_add_up_to(materials):
    def cautious(m, l):
        try:
            return m.read_broad.B[:, :4]
        except Exception:
            return torch.eye(m.d)[:, :4]

    fresh = Materials(materials.decoder, materials.base, 2)
    own = Candidate("cautious", "own", "own", False, ("weights",), cautious)
    found = build(fresh, [get("global_read"), own], False)
    assert all(torch.equal(basis.B, materials.read_broad.B[:, :4]) for basis in found["cautious"])
