"""Candidates read off the base weights. `W_o`, `W_down` write to the residual stream; q, k, v, up, gate and the
unembedding read from it. (docs/method.md section 5; those of source v7b mend one named defect each, section 7)"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ws.subspaces.algebra import Basis, cut_at_rank, gram_basis, left_svd, pca, project_away, union, write_away
from ws.subspaces.candidate import candidate
from ws.subspaces.grams import weight_noise
from ws.subspaces.materials import Materials
from ws.subspaces.noise import Noise


@candidate(family="W:unembed", source="v5", shared=True)
def lm_head_read(m: Materials) -> Basis:
    """Top 8 right singular vectors of the unembedding: what the logits read most."""
    return gram_basis(m.unembed_gram, m.k, noise=m.unembed_noise)


@candidate(family="W:unembed", source="v5", shared=True)
def logits_null(m: Materials) -> Basis:
    """Bottom 8 right singular vectors of the unembedding: what the logits hardly read."""
    return gram_basis(m.unembed_gram, m.k, bottom=True, noise=m.unembed_noise)


@candidate(family="W:read", source="v5", shared=True)
def global_read(m: Materials) -> Basis:
    """Top 8 eigenvectors of the readers' Gram summed over all layers plus the unembedding's."""
    return gram_basis(m.readers_gram, m.k, noise=m.noise_of_all("readers_gram"))


@candidate(family="W:write", source="v5", shared=True)
def global_write(m: Materials) -> Basis:
    """Top 8 left singular vectors of all layers' [W_o|W_down] side by side."""
    return gram_basis(m.writers_gram, m.k, noise=m.noise_of_all("writers_gram"))


@candidate(family="W:write-not-read", source="v5", shared=True)
def global_write_not_global_read(m: Materials) -> Basis:
    """global_write after projecting out the top 64 directions that all readers together read."""
    return write_away(m.writers_gram, m.read_broad, m.k, m.noise_of_all("writers_gram"))


@candidate(family="W:write", source="v5")
def write(m: Materials, l: int) -> Basis:
    """Top 8 left singular vectors of the layer's [W_o|W_down]."""
    return m.top(l, "write_gram")


@candidate(family="W:write", source="v5")
def attn_write(m: Materials, l: int) -> Basis:
    """Top 8 left singular vectors of W_o."""
    return m.top(l, "o_gram")


@candidate(family="W:write", source="v5")
def mlp_write(m: Materials, l: int) -> Basis:
    """Top 8 left singular vectors of W_down."""
    return m.top(l, "down_gram")


@candidate(family="W:write-not-read", source="v5")
def write_not_lm_head_read(m: Materials, l: int) -> Basis:
    """write after projecting out the top 64 right singular vectors of the unembedding."""
    return write_away(m.layer(l).write_gram, m.lm_broad, m.k, m.layer(l).noise("write_gram"))


@candidate(family="W:write-not-read", source="v5")
def write_not_global_read(m: Materials, l: int) -> Basis:
    """write after projecting out the top 64 directions that all readers together read."""
    return write_away(m.layer(l).write_gram, m.read_broad, m.k, m.layer(l).noise("write_gram"))


@candidate(family="W:write-not-read", source="v5")
def write_not_downstream_read(m: Materials, l: int) -> Basis:
    """write after projecting out the top 64 directions read by later blocks and the unembedding."""
    return write_away(m.layer(l).write_gram, m.downstream_broad(l), m.k, m.layer(l).noise("write_gram"))


@candidate(family="W:read", source="v5")
def mlp_up_read(m: Materials, l: int) -> Basis:
    """Top 8 right singular vectors of W_up."""
    return m.top(l, "up_gram")


@candidate(family="W:read", source="v5")
def mlp_gate_read(m: Materials, l: int) -> Basis:
    """Top 8 right singular vectors of W_gate."""
    return m.top(l, "gate_gram")


@candidate(family="W:read", source="v5")
def attn_qkv_read(m: Materials, l: int) -> Basis:
    """Top 8 right singular vectors of [W_q; W_k; W_v]."""
    return m.top(l, "qkv_gram")


def folded(M: Tensor, columns: int) -> tuple[Tensor, int]:
    """So many neighbouring columns of M added up that `columns` are left, and how many: that times X is M times X with each row
    repeated in place, v7's stand-in for shared key/value heads."""
    times = -(-M.shape[1] // columns)
    return sum(pad(M[:, i::times], (0, columns - len(M[0, i::times]))) for i in range(times)), times


@candidate(family="W:OV", source="v5")
def attn_ov_write(m: Materials, l: int) -> Basis:
    """Top 8 left singular vectors of W_o repeat(W_v), the value rows repeated one by one to W_o's columns."""
    v = m.layer(l).v_wide
    o, times = folded(m.layer(l).o_wide, len(v))
    return left_svd(o @ v, m.k, noise=m.product_noise(l, "o", "v", times))


@candidate(family="W:MLP", source="v5")
def mlp_roundtrip_write(m: Materials, l: int) -> Basis:
    """Top 8 left singular vectors of W_down W_up: the MLP with its gate held open."""
    w = m.layer(l)
    return left_svd(w.down_wide @ w.up_wide, m.k, noise=m.product_noise(l, "down", "up"))


@candidate(family="W:QK", source="external-v6-plan")
def qk_circuit(m: Materials, l: int) -> Basis:
    """Top 8 left singular vectors of W_q^T repeat(W_k), the key rows repeated one by one to W_q's rows."""
    k = m.layer(l).k_wide
    q, times = folded(m.layer(l).q_wide.T, len(k))
    return left_svd(q @ k, m.k, noise=m.product_noise(l, "q", "k", times))


@candidate(family="W:read", source="external-v6-plan")
def input_super(m: Materials, l: int) -> Basis:
    """Top 8 right singular vectors of [W_q; W_k; W_v; W_up; W_gate]: all that the block reads."""
    return m.top(l, "read_gram")


@candidate(family="W:read", source="external-v6-plan")
def kv_super(m: Materials, l: int) -> Basis:
    """Top 8 right singular vectors of [W_k; W_v]."""
    return m.top(l, "kv_gram")


@candidate(family="W:MLP", source="external-v6-plan", sees=("weights", "prompts"))
def gate_kernel(m: Materials, l: int) -> Basis:
    """Top 8 left singular vectors of W_down diag(g) W_up, g the mean activated gate over the clean probes."""
    w = m.layer(l)
    gate = m.decoder.act(m.base.clean.up_in[l].to(w.gate_wide) @ w.gate_wide.T)
    written = (w.down_wide * gate.mean(dim=0)) @ w.up_wide
    return left_svd(written, m.k, m.rounding(written))


@candidate(family="W:OV", source="external-v6-plan")
def attention_sink(m: Materials, l: int) -> Basis:
    """PCA over heads of what each writes when it attends to the BOS embedding alone (EOS where there is no BOS)."""
    return pca(_sink_writes(m, l), m.k, noise=_sink_noise(m, l))


def _sink_noise(m: Materials, l: int) -> Noise:
    """Of a head's write `W_o v`, `v = W_v e`: as of a product, times the embedding's norm, and the embedding's own."""
    e, noise = m.decoder.embed_tokens.weight[m.sink_token].detach().double(), m.product_noise(l, "o", "v")
    return replace(noise, sigma=noise.sigma * 2**0.5 * float(e.norm()))


def _sink_writes(m: Materials, l: int) -> Tensor:
    """`W_o[:, h] (v[kv(h)] e)` for every head h, `(H, d)`."""
    w, dec = m.layer(l), m.decoder
    e = dec.embed_tokens.weight[m.sink_token].detach().to(w.v_wide)
    values = (w.v_wide @ e).reshape(dec.n_kv, dec.head_dim)[_kv_of_heads(m)]
    return torch.einsum("dhe,he->hd", w.o_wide.reshape(m.d, dec.n_heads, dec.head_dim), values)


@candidate(family="W:write-not-read", source="external-v6-plan")
def causally_isolated(m: Materials, l: int) -> Basis:
    """write after projecting out input_super, kv_super and the unembedding's top 64."""
    readers = union(m.of("input_super", l), m.of("kv_super", l), m.lm_broad)
    return write_away(m.layer(l).write_gram, readers, m.k, m.layer(l).noise("write_gram"))


@candidate(family="W:read", source="external-v6-plan")
def input_super_not_lm_read(m: Materials, l: int) -> Basis:
    """input_super with the unembedding's top 64 projected out."""
    return project_away(m.of("input_super", l), m.lm_broad)


# What the sound protocol adds. Each says which defect of the one above it mends.


@candidate(family="W:OV", source="v7b")
def attn_ov_heads(m: Materials, l: int) -> Basis:
    """Top 8 left singular vectors of the heads' OV maps side by side, key/value heads shared as the model shares them.
    Mends attn_ov_write, whose row-by-row repeat pairs a head with the wrong value rows."""
    w = m.layer(l)
    return gram_basis(_heads_gram(m, w.o_wide.T, w.v_wide), m.k, noise=m.product_noise(l, "o", "v"))


@candidate(family="W:QK", source="v7b")
def qk_heads(m: Materials, l: int) -> Basis:
    """Top 8 left singular vectors of the heads' W_q^T W_k side by side, key heads shared as the model shares them.
    Mends qk_circuit, whose row-by-row repeat pairs a query with the wrong key rows."""
    w = m.layer(l)
    return gram_basis(_heads_gram(m, w.q_wide, w.k_wide), m.k, noise=m.product_noise(l, "q", "k"))


def _heads_gram(m: Materials, own: Tensor, shared: Tensor) -> Tensor:
    """`sum_h M_h M_h^T` with `M_h = own_h^T shared_kv(h)`, both matrices' rows split by head; float64."""
    a, b = (M.reshape(-1, m.decoder.head_dim, M.shape[1]) for M in (own, shared))
    return sum((a[h].T @ (b[kv] @ b[kv].T) @ a[h]).double() for h, kv in enumerate(_kv_of_heads(m)))


def _kv_of_heads(m: Materials) -> list[int]:
    """The key/value head of every head."""
    return [h * m.decoder.n_kv // m.decoder.n_heads for h in range(m.decoder.n_heads)]


@candidate(family="W:OV", source="v7b")
def attention_sink_cut(m: Materials, l: int) -> Basis:
    """attention_sink cut at the numerical rank of its samples. Mends attention_sink, which fills up with arbitrary
    directions where the model has fewer than 9 heads."""
    return cut_at_rank(m.of("attention_sink", l), _sink_noise(m, l))


@candidate(family="W:read", source="v7b")
def mlp_up_read_gain(m: Materials, l: int) -> Basis:
    """Top 8 right singular vectors of W_up diag(g), g the gain of the norm before the MLP. Mends mlp_up_read."""
    return _top_gained(m, l, mlp_in="up_gram")


@candidate(family="W:read", source="v7b")
def attn_qkv_read_gain(m: Materials, l: int) -> Basis:
    """Top 8 right singular vectors of [W_q; W_k; W_v] diag(g), g the gain of the norm before attention. Mends
    attn_qkv_read, which ignores the gain."""
    return _top_gained(m, l, attn_in="qkv_gram")


@candidate(family="W:read", source="v7b")
def input_super_gain(m: Materials, l: int) -> Basis:
    """Top 8 right singular vectors of all the block's readers, each with its norm's gain folded in. Mends input_super,
    which ignores the gains."""
    return _top_gained(m, l, attn_in="qkv_gram", mlp_in="up_gram gate_gram")


def _top_gained(m: Materials, l: int, **grams: str) -> Basis:
    """Of what a block's Grams are the Grams of, each with the gain of the norm before it folded in."""
    w = m.layer(l)
    names = {where: name.split() for where, name in grams.items()}
    G = sum(_gained(m, sum(getattr(w, name) for name in some), l, where) for where, some in names.items())
    columns = sum(w.columns(name) for some in names.values() for name in some)
    return gram_basis(G, m.k, noise=weight_noise(m.decoder, G.diagonal(), columns, gained=True))


def _gained(m: Materials, G: Tensor, l: int, where: str) -> Tensor:
    """`diag(g) G diag(g)`: the Gram of `W diag(g)`."""
    g = m.decoder.norm_gain(l, where).to(G.device).double()
    return g[:, None] * G * g[None, :]
