"""What a difference does in words: its largest singular directions, read through the unembedding and on texts.

`delta = sum_i s_i u_i v_i^T` answers an input along `v_i` by `s_i u_i`. Of what writes to the residual stream (o, down) `u_i`
is read as logits, `W_U (g_final * g_out * u_i)`, with the gains of the final norm and of the norm behind the map, where there
is one. (docs/method.md section 13)"""

from collections.abc import Sequence

import polars as pl
import torch
from torch import Tensor

from ws.diff import WeightDiff
from ws.model.decoder import ROLES
from ws.model.lm import LM
from ws.model.text import encode
from ws.model.trace import recorded

WRITES = {"o": "attn_out", "down": "mlp_out"}  # role -> the norm behind it
SCHEMA = {
    "side": pl.String, "layer": pl.Int64, "module": pl.String, "index": pl.Int64, "singular_value": pl.Float64,
    "promoted": pl.String, "demoted": pl.String, "contexts": pl.String,
}  # fmt: skip
BEFORE = 6  # tokens shown before the one that a context is about


@torch.no_grad()
def directions(u: WeightDiff, lm: LM, texts: Sequence[str] = (), top: int = 3, tokens: int = 8) -> pl.DataFrame:
    """The `top` largest singular directions of all writers together, and with texts those of all readers (q, k, v, gate, up):
    one row each, columns SCHEMA. promoted, demoted: the `tokens` at either end of the logits (writers). contexts: the three
    tokens of the texts, each in brackets after what precedes it, whose input lies furthest along `v_i`, first tokens left
    out. The sign is that of a mean input `v_i . x >= 0` over the texts; without texts it is arbitrary, and promoted and
    demoted may change places. ValueError for a text without a token."""
    decoder, found = lm.decoder, []
    for l in range(decoder.n_layers):
        for role in ROLES:
            if (name := decoder.param_name(l, role)) in u:
                side = "write" if role in WRITES else "read"
                found += [(float(s), side, l, role, i) for i, s in enumerate(u.singular_values(name)[:top], 1)]
    sides = ("write", "read") if texts else ("write",)
    chosen = [row for side in sides for row in sorted((f for f in found if f[1] == side), reverse=True)[:top]]
    inputs = _inputs(lm, texts, {(l, role) for _, _, l, role, _ in chosen}) if texts else {}
    ones = torch.ones(1, decoder.d, device=lm.device, dtype=lm.model.dtype)
    final, rows = decoder.final_norm(ones)[0].float().cpu(), []
    for s, side, l, role, i in chosen:
        U, _, Vh = u.svd(decoder.param_name(l, role))
        left, right = U[:, i - 1].float(), Vh[i - 1].float()
        along = [x @ right for x in inputs.get((l, role), [])]
        sign = -1.0 if along and float(torch.cat([a[1:] for a in along]).mean()) < 0 else 1.0
        row = dict(zip(SCHEMA, (side, l, role, i, s, "", "", _contexts(lm, texts, along, sign)), strict=True))
        if side == "write":
            gain = decoder.norm_gain(l, WRITES[role]) * final
            logits = decoder.unembed().cpu() @ (sign * gain * left)
            row["promoted"], row["demoted"] = (_words(lm, (f * logits).topk(tokens).indices.tolist()) for f in (1, -1))
        rows.append(row)
    return pl.DataFrame(rows, SCHEMA)


def _words(lm: LM, ids: list[int]) -> str:
    return " ".join(repr(lm.tokenizer.decode([i])) for i in ids)


def _inputs(lm: LM, texts: Sequence[str], at: set[tuple[int, str]]) -> dict[tuple[int, str], list[Tensor]]:
    """Per map the inputs of every text, `(T, in)` in float32."""
    kept: dict[tuple[int, str], list[Tensor]] = {where: [] for where in at}
    paths = {lm.decoder.param_name(*where).removesuffix(".weight"): where for where in at}

    def keep(path: str):
        return lambda output, inputs: kept[paths[path]].append(inputs[0][0].float().cpu())

    with recorded(lm.model, {path: keep(path) for path in paths}):
        for text in texts:
            lm.run(*encode(lm.tokenizer, [text], add_special_tokens=True))
    return kept


def _contexts(lm: LM, texts: Sequence[str], along: list[Tensor], sign: float, most: int = 3) -> str:
    spots = [(float(sign * v), i, t) for i, a in enumerate(along) for t, v in enumerate(a.tolist()) if t]
    shown = []
    for _, i, t in sorted(spots, reverse=True)[:most]:
        ids = encode(lm.tokenizer, [texts[i]], add_special_tokens=True)[0][0].tolist()
        shown.append(f"{lm.tokenizer.decode(ids[max(t - BEFORE, 0) : t])}[{lm.tokenizer.decode(ids[t : t + 1])}]")
    return " ... ".join(" ".join(one.split()) for one in shown)
