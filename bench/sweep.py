"""The sweep's weight candidates and weight scores: shared Grams and factors against a full SVD per candidate.

.venv/bin/python bench/sweep.py [--layers 3] [--d 1024] [--vocabulary 32768]

Both sides build the same 20 candidates of a random model with the shapes of Qwen3-0.6B (fewer layers, a smaller
vocabulary) and score them on the residual writers of a rank-64 w. The textbook takes the definitions at their word:
`torch.linalg.svd` in float32 of every matrix that a candidate names, and `|B^T M|_F^2 / |M|_F^2` with w made dense. Printed are
seconds, their ratio, and how far the two disagree; the script fails if they do.
"""

import argparse
import time

import torch
from ratios import told
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from ws.diff import LowRank, WeightDiff
from ws.explanation.scores import score, weight_targets
from ws.model.decoder import Decoder
from ws.subspaces.build import candidates
from ws.subspaces.materials import Materials

SHARED = ("lm_head_read", "global_read", "global_write", "global_write_not_global_read")
PER_LAYER = (
    "write", "attn_write", "mlp_write", "write_not_lm_head_read", "write_not_global_read", "write_not_downstream_read",
    "mlp_up_read", "mlp_gate_read", "attn_qkv_read", "attn_ov_write", "mlp_roundtrip_write", "qk_circuit",
    "input_super", "kv_super", "causally_isolated", "input_super_not_lm_read",
)  # fmt: skip
K, BROAD = 8, 64


def repeat(M: Tensor, rows: int) -> Tensor:
    """Each row repeated in place until there are so many, v7's stand-in for shared heads."""
    return M.repeat_interleave(-(-rows // len(M)), dim=0)[:rows]


def random_model(layers: int, d: int, vocabulary: int) -> Qwen3ForCausalLM:
    """Random weights whose residual side has a power-law spectrum, so that the top directions are well defined."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=d // 64, num_key_value_heads=d // 128,
        head_dim=128, intermediate_size=3 * d, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                law = torch.arange(1, d + 1)[torch.randperm(d, generator=generator)] ** -0.5
                p *= law[:, None] if name.endswith(("o_proj.weight", "down_proj.weight")) else law
    return model


def random_diff(decoder: Decoder, rank: int = 64) -> WeightDiff:
    """A low-rank w on the residual writers of every layer."""
    generator = torch.Generator().manual_seed(2)
    entries = {}
    for l in range(decoder.n_layers):
        for role in ("o", "down"):
            out, inside = decoder.weight(l, role).shape
            B = torch.randn(out, rank, generator=generator)
            entries[decoder.param_name(l, role)] = LowRank(B, torch.randn(rank, inside, generator=generator))
    return WeightDiff(entries)


# --- the textbook ----------------------------------------------------------------------------------------------------


def left(M: Tensor, k: int = K) -> Tensor:
    return torch.linalg.svd(M, full_matrices=False).U[:, :k]


def right(M: Tensor, k: int = K) -> Tensor:
    return torch.linalg.svd(M, full_matrices=False).Vh[:k].T


def away(M: Tensor, F: Tensor) -> Tensor:
    return left(M - F @ (F.T @ M))


def textbook_bases(decoder: Decoder) -> dict[str, list[Tensor]]:
    """Each candidate as docs/method.md section 5 defines it, one SVD per name and layer."""
    L, U = decoder.n_layers, decoder.unembed()

    def of(l: int, *roles: str) -> list[Tensor]:
        return [decoder.weight(l, role) for role in roles]

    def gram(rows: list[Tensor]) -> Tensor:
        return sum(M.T @ M for M in rows)

    def reads(l: int) -> Tensor:
        return gram(of(l, "q", "k", "v", "up", "gate"))

    def top(G: Tensor, k: int) -> Tensor:
        return torch.linalg.eigh(G).eigenvectors.flip(1)[:, :k]

    everything = sum(reads(l) for l in range(L)) + U.T @ U
    writers = torch.cat([M for l in range(L) for M in of(l, "o", "down")], dim=1)
    lm_broad, read_broad = right(U, BROAD), top(everything, BROAD)
    bases = {
        "lm_head_read": [right(U)] * L,
        "global_read": [top(everything, K)] * L,
        "global_write": [left(writers)] * L,
        "global_write_not_global_read": [away(writers, read_broad)] * L,
    }
    for l in range(L):
        q, k, v, o, gate, up, down = of(l, "q", "k", "v", "o", "gate", "up", "down")
        write, inputs = torch.cat([o, down], dim=1), torch.cat([q, k, v, up, gate])
        downstream = top(U.T @ U + sum((reads(m) for m in range(l + 1, L)), torch.zeros_like(everything)), BROAD)
        input_super, kv_super = right(inputs), right(torch.cat([k, v]))
        isolated = torch.linalg.qr(torch.cat([input_super, kv_super, lm_broad], dim=1)).Q
        at_layer = {
            "write": left(write), "attn_write": left(o), "mlp_write": left(down),
            "write_not_lm_head_read": away(write, lm_broad), "write_not_global_read": away(write, read_broad),
            "write_not_downstream_read": away(write, downstream), "mlp_up_read": right(up), "mlp_gate_read": right(gate),
            "attn_qkv_read": right(torch.cat([q, k, v])), "attn_ov_write": left(o @ repeat(v, o.shape[1])),
            "mlp_roundtrip_write": left(down @ up), "qk_circuit": left(q.T @ repeat(k, q.shape[0])),
            "input_super": input_super, "kv_super": kv_super, "causally_isolated": away(write, isolated),
            "input_super_not_lm_read": torch.linalg.qr(input_super - lm_broad @ (lm_broad.T @ input_super)).Q,
        }  # fmt: skip
        for name, basis in at_layer.items():
            bases.setdefault(name, []).append(basis)
    return bases


def textbook_scores(decoder: Decoder, w: WeightDiff, bases: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Weight concentration of every candidate, layer and target, with w dense."""
    found = {}
    for name, by_layer in bases.items():
        rows = []
        for l, B in enumerate(by_layer):
            M = {role: w.entries[decoder.param_name(l, role)].dense() for role in ("o", "down")}
            M["both"] = torch.cat([m / m.norm() for m in M.values()], dim=1)
            rows.append([float((B.T @ m).square().sum() / m.square().sum() * len(B) / B.shape[1]) for m in M.values()])
        found[name] = torch.tensor(rows)
    return found


# --- ours ------------------------------------------------------------------------------------------------------------


def our_bases(decoder: Decoder) -> dict[str, list[Tensor]]:
    candidates("v7")  # loads them
    m = Materials(decoder, None, 0, K, BROAD)
    bases = {name: [m.of(name, 0).B] * decoder.n_layers for name in SHARED}
    for l in range(decoder.n_layers):
        for name in PER_LAYER:
            bases.setdefault(name, []).append(m.of(name, l).B)
    return bases


def our_scores(decoder: Decoder, w: WeightDiff, bases: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    targets = []
    for l in range(decoder.n_layers):
        factors = [U * s for U, s, _ in (w.svd(decoder.param_name(l, role)) for role in ("o", "down"))]
        targets.append(weight_targets(*factors))
    return {
        name: torch.tensor(
            [[score(t, B).conc for t in by_name.values()] for by_name, B in zip(targets, by_layer, strict=True)]
        )
        for name, by_layer in bases.items()
    }


def least_cosine(A: Tensor, B: Tensor) -> float:
    """Cosine of the largest principal angle between two subspaces."""
    return float(torch.linalg.svdvals(A.double().T @ B.double()).min())


def timed(label: str, run, *given):
    start = time.perf_counter()
    result = run(*given)
    seconds = time.perf_counter() - start
    print(f"{label:42} {seconds:7.2f} s", flush=True)
    return seconds, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32768)
    given = parser.parse_args()
    decoder = Decoder(random_model(given.layers, given.d, given.vocabulary))
    w = random_diff(decoder)
    print(
        f"{given.layers} layers, d {given.d}, V {given.vocabulary}, {len(SHARED + PER_LAYER)} candidates,"
        f" {torch.get_num_threads()} threads"
    )
    with torch.no_grad():
        a, ours = timed("bases: shared Grams, top eigenpairs", our_bases, decoder)
        b, plain = timed("bases: one full SVD per candidate", textbook_bases, decoder)
        c, our = timed("scores: factors of w", our_scores, decoder, w, ours)
        e, dense = timed("scores: dense w", textbook_scores, decoder, w, plain)
    cosines = {n: min(map(least_cosine, ours[n], plain[n])) for n in plain}
    worst = min(cosines, key=cosines.get)
    apart = max(float((our[n] / dense[n] - 1).abs().max()) for n in plain)
    together = told("bases and scores", b + e, a + c)
    print(f"ratio: bases {b / a:.1f}, scores {e / c:.1f}, together {together:.1f}")
    print(
        f"smallest principal cosine {cosines[worst]:.6f} ({worst}); largest relative difference of scores {apart:.1e}"
    )
    assert cosines[worst] > 0.999 and apart < 1e-3, "the two sides disagree"


if __name__ == "__main__":
    main()
