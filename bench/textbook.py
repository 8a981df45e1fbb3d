"""The v7 sweep as its definitions read: the honest textbook version that the package is timed against.

.venv/bin/python bench/textbook.py MODEL_FOLDER W_PT OUT_DIR [--behavior sycophancy] [--draws 120]
.venv/bin/python bench/textbook.py --check [MODEL_FOLDER W_PT]

Writes v7_per_layer.csv and v7_summary.csv; prints seconds per stage and the peak memory. `--check` compares its scores with
those of `ws.explain` and fails where they differ, on the shipped model unless another is given (so without arguments).

w is dense, the model float32. Fourteen forward passes, each with all logits, record one thing each:
 1 to 3    block outputs at the last token: clean, persona_pos, persona_neg
 4 to 6    input of up_proj at the last token: the same three
 7, 8      states of all tokens (`output_hidden_states`): persona_pos, persona_neg
 9, 10     the last token's attention row (`output_attentions`): the same two
11 to 14   block outputs at the last token under w: EVAL and FIT at alpha +1 and -1
Every candidate and layer has its own `torch.linalg.svd` (`eigh` where the definition speaks of eigenvectors) of the matrix
that docs/method.md section 5 names. Only what has a name there is made once: lm8, lm64 and the bottom 8 come from one SVD,
gr8 and gr64 from one eigh, read_gram(l) is kept. The null is drawn: random bases per layer, target and rank.
"""

import argparse
import re
import resource
import tempfile
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import polars as pl
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ws.data import Behavior, load_behavior
from ws.model.text import chat_text

K, BROAD, EPS, NAN, MAX_LENGTH = 8, 64, 1e-12, float("nan"), 256
ROLES = {r: f"self_attn.{r}_proj" for r in "qkvo"} | {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}
# family, source, candidates, in the order of docs/method.md section 5
TABLE = """
W:unembed v5 lm_head_read logits_null
W:read v5 global_read
W:write v5 global_write
W:write-not-read v5 global_write_not_global_read
W:write v5 write attn_write mlp_write
W:write-not-read v5 write_not_lm_head_read write_not_global_read write_not_downstream_read
W:read v5 mlp_up_read mlp_gate_read attn_qkv_read
W:OV v5 attn_ov_write
W:MLP v5 mlp_roundtrip_write
W:QK external-v6-plan qk_circuit
W:read external-v6-plan input_super kv_super
W:MLP external-v6-plan gate_kernel
W:OV external-v6-plan attention_sink
W:write-not-read external-v6-plan causally_isolated
W:read external-v6-plan input_super_not_lm_read
act:clean v5 suppressed amplified
act:clean external-v6-plan added_features
act:baseline v5 global_clean_resid_pca global_persona_resid_pca layer_clean_resid_pca
act:persona v5 TaskDiff_contrast
act:attn-selected external-v6-plan attn_min_taskdiff attn_max_taskdiff attn_diff_taskdiff attn_min_x_diffnorm_taskdiff
act:up_proj v5 up_proj_input_contrast up_proj_output_written_contrast
act:MLP external-v6-plan gate_active_written
act:cluster external-v6-plan chars_clusters
act:clean v5 churn
act:rotation v5 rotation_contrast
compound external-v6-plan qk_x_chars_clusters
compound v5 WNR_union_TaskDiff
ceiling B-side TaskDiff_lora_ceiling dW_left_basis_ceiling
"""
FACTS = {name: (f, s) for f, s, *names in map(str.split, TABLE.strip().splitlines()) for name in names}
AXES = {"ceiling": "ceiling", "W:read": "read", "W:unembed": "read"}
AXES |= dict.fromkeys(("W:write", "W:write-not-read", "W:OV", "W:MLP"), "write")
KEYS = ["subspace", "family", "axis_kind", "source", "kind"]
COMPARED = "conc_act conc_block conc_w_combined conc_w_oproj conc_w_downproj cos_with_dW specific_conc_act".split()


class Clock(Counter):
    """Seconds per stage."""

    @contextmanager
    def __call__(self, stage: str):
        start = time.perf_counter()
        yield
        self[stage] += time.perf_counter() - start


# --- forward passes (section 3) --------------------------------------------------------------------------------------


def last_of(batch: dict[str, Tensor]) -> Tensor:
    return batch["attention_mask"].sum(dim=1) - 1


def at_last(model, batch: dict[str, Tensor], inputs_of: list, outputs_of: list) -> Tensor:
    """One pass: what goes into some modules and what comes out of others, at the last token, `(modules, n, width)`."""
    found, rows, last = {}, range(len(batch["input_ids"])), last_of(batch)

    def keep(key: str, states) -> None:
        found[key] = (states[0] if isinstance(states, tuple) else states)[rows, last]

    hooks = [m.register_forward_hook(lambda _m, x, _y, i=i: keep(f"in {i}", x)) for i, m in enumerate(inputs_of)]
    hooks += [m.register_forward_hook(lambda _m, _x, y, i=i: keep(f"out {i}", y)) for i, m in enumerate(outputs_of)]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return torch.stack(list(found.values()))  # in the order in which the pass reached them


def right_edge(states: Tensor, batch: dict[str, Tensor], width: int) -> Tensor:
    """`(L, n, T, ...)` with every text moved to the right edge of `width` tokens, zeros before it."""
    moved = states.new_zeros(*states.shape[:2], width, *states.shape[3:])
    for i, last in enumerate(last_of(batch).tolist()):
        moved[:, i, width - last - 1 :] = states[:, i, : last + 1]
    return moved


def add(model, w: dict[str, Tensor], alpha: float) -> None:
    """`alpha w` is added to the weights; `add(model, w, -alpha)` takes it off again."""
    for name, delta in w.items():
        model.get_parameter(name).add_(delta, alpha=alpha)


def passes(model, tokenizer, w: dict[str, Tensor], behavior: Behavior) -> dict[str, Tensor]:
    """The fourteen passes. Residual states are `(L + 1, n, d)`: the input of block 0, then every block's output."""
    blocks, probes = list(model.model.layers), [behavior.probe_text(topic.claim) for topic in behavior.topics[:32]]
    fit, held = probes[: len(probes) // 2], probes[len(probes) // 2 :]
    texts = {"clean": fit, "eval": held}
    for side, personas in (("pos", behavior.personas_pos), ("neg", behavior.personas_neg)):
        texts[side] = [chat_text(tokenizer, probe, system=personas[0]) for probe in fit]
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.pad_token or tokenizer.eos_token
    options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": MAX_LENGTH}
    coded = {name: tokenizer(some, **options) for name, some in texts.items()}
    coded = {name: {key: batch[key] for key in ("input_ids", "attention_mask")} for name, batch in coded.items()}

    acts, width = {}, max(coded[side]["input_ids"].shape[1] for side in ("pos", "neg"))
    for name in ("clean", "pos", "neg"):
        acts[name] = at_last(model, coded[name], blocks[:1], blocks)
        acts[f"up_{name}"] = at_last(model, coded[name], [block.mlp.up_proj for block in blocks], [])
    for side in ("pos", "neg"):
        states = model(**coded[side], output_hidden_states=True).hidden_states[1:]
        acts[f"tokens_{side}"] = right_edge(torch.stack(states), coded[side], width)
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that returns attention rows
    for side in ("pos", "neg"):
        rows = model(**coded[side], output_attentions=True).attentions
        rows = torch.stack([a.mean(dim=1)[range(len(a)), last_of(coded[side])] for a in rows])
        acts[f"attn_{side}"] = right_edge(rows, coded[side], width)
    model.set_attn_implementation(attention)
    for name, batch in (("diff_eval", coded["eval"]), ("diff_fit", coded["clean"])):
        sides = []
        for alpha in (1.0, -1.0):
            add(model, w, alpha)
            sides.append(at_last(model, batch, blocks[:1], blocks))
            add(model, w, -alpha)
        acts[name] = sides[0] - sides[1]
    return acts


# --- basis operations (section 4) ------------------------------------------------------------------------------------


def left(M: Tensor, k: int = K) -> Tensor:
    return torch.linalg.svd(M, full_matrices=False).U[:, :k]


def right(M: Tensor, k: int = K) -> Tensor:
    return torch.linalg.svd(M, full_matrices=False).Vh[:k].T


def pca(X: Tensor, k: int = K) -> Tensor:
    return right(X - X.mean(dim=0), k)


def eigenvectors(G: Tensor) -> Tensor:
    """Largest eigenvalue first."""
    return torch.linalg.eigh(G).eigenvectors.flip(1)


def orthonormalize(M: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(M)
    return Q[:, R.diagonal().abs() > 1e-5]


def without(M: Tensor, F: Tensor) -> Tensor:
    """`(I - F F^T) M`."""
    return M - F @ (F.T @ M)


def repeat(M: Tensor, rows: int) -> Tensor:
    return M.repeat_interleave(-(-rows // len(M)), dim=0)[:rows]


def bisector(A: Tensor, B: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(A.T @ B, full_matrices=False)
    return orthonormalize(A @ U[:, :K] + B @ Vh[:K].T)[:, :K]


def centroids(rows: Tensor) -> Tensor:
    """8 centroids of the centred rows, from the 8 of largest norm, after 8 Lloyd iterations."""
    rows = rows - rows.mean(dim=0)
    found = rows[rows.norm(dim=1).argsort(descending=True, stable=True)[:8]].clone()
    for _ in range(8):
        nearest = torch.cdist(rows, found).argmin(dim=1)
        for c in nearest.unique():
            found[c] = rows[nearest == c].mean(dim=0)
    return found


def rotation(X: Tensor, Y: Tensor) -> Tensor:
    J = pca(torch.cat([X, Y]), min(32, 2 * len(X) - 2, X.shape[1]))
    if J.shape[1] < 2:
        return J[:, :0]
    U, _, Vh = torch.linalg.svd(((X - X.mean(dim=0)) @ J).T @ ((Y - Y.mean(dim=0)) @ J))
    return orthonormalize(J @ left(U @ Vh - (U @ Vh).T))


# --- bases (section 5) -----------------------------------------------------------------------------------------------


def weights(model, l: int) -> dict[str, Tensor]:
    return {role: model.model.layers[l].get_submodule(path).weight for role, path in ROLES.items()}


def shared_bases(model, acts: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """Candidates with one basis for all layers, and what those of a layer name: lm64, gr64, the readers' Grams."""
    U, all_weights = model.get_output_embeddings().weight, [weights(model, l) for l in range(len(model.model.layers))]
    readers = [sum(W[role].T @ W[role] for role in ("q", "k", "v", "up", "gate")) for W in all_weights]
    logits, everything = torch.linalg.svd(U, full_matrices=False).Vh, eigenvectors(sum(readers) + U.T @ U)
    writers = torch.cat([W[role] for W in all_weights for role in ("o", "down")], dim=1)
    named = {"lm64": logits[:BROAD].T, "gr64": everything[:, :BROAD], "readers": readers, "unembed": U.T @ U}
    clean, pos, neg = (acts[name][1:] for name in ("clean", "pos", "neg"))
    grown = clean[1:].abs() - clean[:-1].abs()
    return {
        "lm_head_read": logits[:K].T, "logits_null": logits[-K:].T, "global_read": everything[:, :K],
        "global_write": left(writers), "global_write_not_global_read": left(without(writers, named["gr64"])),
        "suppressed": pca(torch.minimum(grown.relu().sum(dim=0), (-grown).relu().sum(dim=0))),
        "amplified": pca((clean[-1].abs() - clean[0].abs()).relu()), "added_features": pca(grown.relu().sum(dim=0)),
        "global_clean_resid_pca": pca(clean.flatten(0, 1)),
        "global_persona_resid_pca": pca(torch.cat([pos.flatten(0, 1), neg.flatten(0, 1)])),
    }, named  # fmt: skip


def layer_bases(model, tokenizer, l: int, acts: dict[str, Tensor], named: dict) -> dict[str, Tensor]:
    """The candidates that have a basis of their own at layer l."""
    W, act, lm64, gr64 = weights(model, l), model.model.layers[l].mlp.act_fn, named["lm64"], named["gr64"]
    q, k, v, o, gate, up, down = (W[role] for role in ("q", "k", "v", "o", "gate", "up", "down"))
    write, qk_circuit = torch.cat([o, down], dim=1), left(q.T @ repeat(k, len(q)))
    input_super, kv_super = right(torch.cat([q, k, v, up, gate])), right(torch.cat([k, v]))
    isolated = orthonormalize(torch.cat([input_super, kv_super, lm64], dim=1))
    downstream = eigenvectors(named["unembed"] + sum(named["readers"][l + 1 :]))[:, :BROAD]
    not_downstream = left(without(write, downstream))
    sink = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    heads, n_kv = model.config.num_attention_heads, model.config.num_key_value_heads
    by_head, value = o.reshape(len(o), heads, -1), (v @ model.get_input_embeddings().weight[sink]).reshape(n_kv, -1)
    clean, pos, neg = (acts[name][l + 1] for name in ("clean", "pos", "neg"))
    up_clean, up_pos, up_neg = (acts[f"up_{name}"][l] for name in ("clean", "pos", "neg"))
    contrast, chars = pca(pos - neg), pca(centroids(torch.cat([clean, pos, neg])))
    D, a, b = acts["tokens_pos"][l] - acts["tokens_neg"][l], acts["attn_pos"][l], acts["attn_neg"][l]
    size = D.norm(dim=2)
    mean_size = size.sum() / ((size > 0).sum() + EPS)

    def selected(weight: Tensor) -> Tensor:
        return pca((D * (weight + EPS).sqrt()[:, :, None]).flatten(0, 1))

    return {
        "write": left(write), "attn_write": left(o), "mlp_write": left(down),
        "write_not_lm_head_read": left(without(write, lm64)), "write_not_global_read": left(without(write, gr64)),
        "write_not_downstream_read": not_downstream,
        "mlp_up_read": right(up), "mlp_gate_read": right(gate), "attn_qkv_read": right(torch.cat([q, k, v])),
        "attn_ov_write": left(o @ repeat(v, o.shape[1])), "mlp_roundtrip_write": left(down @ up),
        "qk_circuit": qk_circuit, "input_super": input_super, "kv_super": kv_super,
        "gate_kernel": left((down * act(up_clean @ gate.T).mean(dim=0)) @ up),
        "attention_sink": pca(torch.stack([by_head[:, h] @ value[h * n_kv // heads] for h in range(heads)])),
        "causally_isolated": left(without(write, isolated)),
        "input_super_not_lm_read": orthonormalize(without(input_super, lm64))[:, :K],
        "layer_clean_resid_pca": pca(clean), "TaskDiff_contrast": contrast,
        "attn_min_taskdiff": selected(torch.minimum(a, b)), "attn_max_taskdiff": selected(torch.maximum(a, b)),
        "attn_diff_taskdiff": selected((a - b).abs()),
        "attn_min_x_diffnorm_taskdiff": selected(torch.minimum(a, b) * size / (mean_size + EPS)),
        "up_proj_input_contrast": pca(up_pos - up_neg),
        "up_proj_output_written_contrast": pca((up_pos @ up.T) @ down.T - (up_neg @ up.T) @ down.T),
        "gate_active_written": pca((act(up_clean @ gate.T) * (up_clean @ up.T)) @ down.T),
        "chars_clusters": chars, "rotation_contrast": rotation(neg, pos),
        "churn": pca(acts["clean"][min(l + 2, len(acts["clean"]) - 1)] - clean),
        "qk_x_chars_clusters": bisector(qk_circuit, chars),
        "WNR_union_TaskDiff": orthonormalize(torch.cat([not_downstream, contrast], dim=1)),
    }  # fmt: skip


# --- scores (section 6) ----------------------------------------------------------------------------------------------


def rows_target(X: Tensor) -> Tensor:
    """`F` with `|B^T F|^2 = mean_i |B^T x_i|^2 / (|x_i|^2 + 1e-12)`."""
    return (X / (len(X) * (X.square().sum(dim=1, keepdim=True) + EPS)).sqrt()).T


def weight_target(*parts: Tensor | None) -> Tensor | None:
    """`[M_1/|M_1| | ...]` at norm 1; None where a part is missing or zero."""
    if any(M is None or not M.any() for M in parts):
        return None
    return torch.cat([M / (M.square().sum() + EPS).sqrt() for M in parts], dim=1) / len(parts) ** 0.5


def drawn(F: Tensor, d: int, r: int, away: Tensor | None, draws: int, label: str) -> tuple[float, float]:
    """Mean and sd of the concentration of random rank-r bases, all in d dimensions: those orthogonal to `away`."""
    generator, values = torch.Generator().manual_seed(zlib.crc32(label.encode())), []
    for _ in range(draws):
        G = torch.randn(len(F), r, generator=generator)
        B = torch.linalg.qr(G if away is None else without(G, away)).Q
        values.append((B.T @ F).square().sum() * d / r)
    values = torch.stack(values)
    return float(values.mean()), float(values.std())


def row_of(l: int, name: str, on: dict, targets: dict, dims: dict, null: dict, dw: Tensor) -> dict:
    """One candidate at one layer: what it is, then conc, z and energy_frac on every target."""
    B, (family, source) = on["act"][name], FACTS[name]
    row = {"layer": l, "subspace": name, "family": family, "axis_kind": AXES.get(family, "mixed"), "source": source}
    row |= {"kind": "ceiling" if family == "ceiling" else "A-hypothesis", "rank": B.shape[1]}
    for at, F in targets.items():
        r, conc, z, energy = on[at][name].shape[1], *[NAN if at.startswith("w_") else 0.0] * 3
        if F is not None and r:
            energy = float((on[at][name].T @ F).square().sum())
            conc, (mean, sd) = energy * dims[at] / r, null.get((at, r), (1.0, 0.0))
            z = (conc - mean) / sd if sd > 0 else 0.0
        label = "specific_{}_act" if at == "beyond" else f"{{}}_{at}"
        row |= {label.format("conc"): conc, label.format("z"): z, label.format("energy_frac"): energy}
        if at == "w_combined":
            cosines = torch.linalg.svdvals(B.T @ dw)
            row["cos_with_dW"] = float(cosines.mean().clamp(0, 1)) if len(cosines) else NAN
    return row | {"specific_rank": r}


def sweep(model, tokenizer, w: dict, behavior: Behavior, draws: int = 120, clock: Clock | None = None) -> pl.DataFrame:
    """One row per layer and candidate: the columns of docs/method.md section 6, then block-local scores and specificity."""
    clock, rows, d = Clock() if clock is None else clock, [], model.config.hidden_size
    with torch.no_grad():
        with clock("passes"):
            acts = passes(model, tokenizer, w, behavior)
        with clock("shared bases"):
            shared, named = shared_bases(model, acts)
        for l in range(len(model.model.layers)):
            with clock("per-layer bases"):
                bases = shared | layer_bases(model, tokenizer, l, acts, named)
            with clock("ceilings"):
                o, down = (w.get(f"model.layers.{l}.{ROLES[role]}.weight") for role in ("o", "down"))
                writers = [M for M in (o, down) if M is not None]
                dw = left(torch.cat(writers, dim=1)) if writers else torch.zeros(d, 0)
                bases |= {"TaskDiff_lora_ceiling": pca(acts["diff_fit"][l + 1]), "dW_left_basis_ceiling": dw}
            with clock("targets and scores"):
                clean, X = bases["layer_clean_resid_pca"], acts["diff_eval"]
                targets = {"act": rows_target(X[l + 1]), "w_oproj": weight_target(o), "w_downproj": weight_target(down)}
                targets |= {"w_combined": weight_target(o, down), "block": rows_target(X[l + 1] - X[l])}
                targets["beyond"] = rows_target(without(X[l + 1].T, clean).T)  # specific: beyond the clean directions
                on = dict.fromkeys(targets, bases)
                on["beyond"] = {name: orthonormalize(without(B, clean)) for name, B in bases.items()}
                dims = dict.fromkeys(targets, d) | {"beyond": d - clean.shape[1]}
                skew = max(float((B.T @ B - torch.eye(B.shape[1])).abs().sum()) for B in bases.values())
                assert skew < 1e-3, f"layer {l}: a basis is not orthonormal"
            with clock("null"):
                null, away = {}, {"beyond": clean}
                for at in (at for at, F in targets.items() if draws > 1 and F is not None and F.any()):
                    for r in {B.shape[1] for B in on[at].values()} - {0}:
                        null[at, r] = drawn(targets[at], dims[at], r, away.get(at), draws, f"{l}/{at}/{r}")
            with clock("targets and scores"):
                rows += [row_of(l, name, on, targets, dims, null, dw) for name in FACTS]
    return pl.DataFrame(rows, infer_schema_length=None)


def summarise(table: pl.DataFrame, w: dict[str, Tensor]) -> pl.DataFrame:
    """Means over the layers that w touches, best joint score first."""
    layers = sorted({int(found[1]) for name in w if (found := re.search(r"layers\.(\d+)\.", name))})
    means = table.filter(pl.col("layer").is_in(layers)).group_by(KEYS, maintain_order=True).mean().drop("layer")
    means = means.rename(lambda c: c if c in KEYS else "mean_cos_dW" if c == "cos_with_dW" else f"mean_{c}")
    act, both = pl.col("mean_conc_act"), pl.col("mean_conc_w_combined")
    means = means.with_columns(joint_score=(act * both).sqrt(), act_w_gap_log2=act.log(2) - both.log(2))
    return means.sort(pl.col("joint_score").fill_nan(None), descending=True, nulls_last=True)


# --- the command -----------------------------------------------------------------------------------------------------


def loaded(folder: str | Path) -> tuple:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def check(folder: str | Path, w: dict, behavior: Behavior, draws: int = 120) -> tuple[pl.DataFrame, dict[str, float]]:
    """The sweep, and by column its largest relative difference from `ws.explain` where that does not say ill-conditioned.
    AssertionError for one above 1e-3 (naming it), another rank of a basis, another family of a candidate."""
    import ws

    with tempfile.TemporaryDirectory() as place:
        torch.save(w, file := Path(place) / "w.pt")
        lm = replace(ws.load_lm(str(folder), "float32", "cpu"), fingerprint="")  # nothing is kept, so no keys are made
        found = ws.explain(lm, file, behavior, protocol="v7", cache=Path(place) / "cache", progress=False)
    plain, theirs = sweep(*loaded(folder), w, behavior, draws), found.per_layer
    beyond = found.specific_per_layer.select("layer", "subspace", "specific_conc_act", "specific_rank")
    both = plain.join(theirs.join(beyond, on=["layer", "subspace"]), on=["layer", *KEYS, "rank"], suffix="_ws")
    assert len(both) == len(plain) == len(theirs), "a candidate has another family, source or rank"
    kept, largest = both.filter(~pl.col("ill_conditioned")), {}
    for column in COMPARED:
        a, b = pl.col(column), pl.col(f"{column}_ws")
        apart = pl.when(a.is_nan() & b.is_nan()).then(0.0).otherwise((a - b).abs() / b.abs().clip(EPS))
        worst = kept.with_columns(apart=apart).sort("apart").row(-1, named=True)  # a NaN on one side sorts last
        largest[column] = worst["apart"]
        where = f"{worst['subspace']}, layer {worst['layer']}: {worst[column]:.6g}, ws {worst[f'{column}_ws']:.6g}"
        print(f"{column:18} {worst['apart']:.1e}  {where}")
        assert worst["apart"] < 1e-3, f"{column}: {where}"
    print(f"largest relative differences over {len(kept)} of {len(both)} bases; the others are ill-conditioned")
    return plain, largest


def read(file: Path) -> dict[str, Tensor]:
    return {name: delta.float() for name, delta in torch.load(file, weights_only=True).items()}


def shipped() -> tuple[Path, dict[str, Tensor]]:
    """The shipped model and its w, dense."""
    import ws
    from ws.cache.places import ASSETS

    w = ws.load_diff("tiny")
    return ASSETS / "tiny", {name: w[name].float() for name in w.names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "w", "out"):
        parser.add_argument(name, nargs="?", type=Path)
    parser.add_argument("--behavior", default="sycophancy")
    parser.add_argument("--draws", type=int, default=120)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    behavior, clock = load_behavior(given.behavior), Clock()
    if given.model and not (given.w and (given.out or given.check)):
        parser.error("MODEL_FOLDER, W_PT and OUT_DIR are needed")
    if given.check or not given.model:
        check(*(given.model, read(given.w)) if given.model else shipped(), behavior, given.draws)
        return
    with clock("load"):
        (model, tokenizer), w = loaded(given.model), read(given.w)
    table = sweep(model, tokenizer, w, behavior, given.draws, clock)
    given.out.mkdir(parents=True, exist_ok=True)
    table.write_csv(given.out / "v7_per_layer.csv")
    summarise(table, w).write_csv(given.out / "v7_summary.csv")
    for stage, seconds in [*clock.items(), ("together", clock.total())]:
        print(f"{stage:20} {seconds:9.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory          {peak:9.2f} GiB, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
