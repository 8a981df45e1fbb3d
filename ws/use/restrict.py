"""A part of w: what lies in a subspace, in some roles, in some layers, in the best directions of each matrix. (section 8)

    keep: P_l w_res        roles, layers: their matrices alone        rank: the best rank-k approximation of each matrix

Applied in this order to what was left: roles, layers, keep, rank.
"""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ws.causal.variants import Gains, check_bases, gains, keep, rescaled, writers
from ws.diff import WeightDiff
from ws.diff.core import layer_of, parts
from ws.diff.factor import balanced
from ws.explanation.result import Explanation
from ws.model.decoder import ROLES, Decoder
from ws.subspaces.algebra import left_svd

OWN = "dW"
CUT = 1e-7  # of the largest singular value: what lies below is float32 rounding


def restricted(
    w: WeightDiff,
    decoder: Decoder,
    kept: str | Mapping[int, Tensor] = "",
    roles: Sequence[str] = (),
    layers: Collection[int] = (),
    rank: int | None = None,
    sweep: Explanation | None = None,
) -> tuple[WeightDiff, str]:
    """The part of w, and in words what it is ("" for all of w).

    kept: a candidate of `sweep`, `dW:K` (the left singular vectors of [w_o|w_down], K per layer), or layer -> orthonormal
    `(d, r)`; roles: of q, k, v, o, gate, up, down; layers: indices; rank: of each matrix. ValueError naming what does not
    exist, with what is near, and a part in which nothing of w is left."""
    own = {decoder.param_name(l, role): role for l in range(decoder.n_layers) for role in ROLES}
    told, has = [], w.layers()
    if roles:
        known = [role for role in ROLES if role in {own.get(name) for name in w}]
        for role in roles:
            check_name("role", role, known, f"w has {', '.join(known) or 'none'}")
        w = w.select(lambda name: own.get(name) in roles)
        told.append(f"roles {', '.join(role for role in ROLES if role in roles)}")
    if layers:
        if lacks := sorted(set(layers) - set(has)):
            raise ValueError(f"layer {lacks[0]}: w changes nothing there; it has layers {spans(has) or 'none'}")
        w = w.select(lambda name: layer_of(name) in layers)
        told.append(f"layers {spans(layers)}")
    if kept:
        fold = sweep is None or bool(sweep.setting["protocol"]["fold_gain"])
        norms = gains(decoder, writers(w), fold)
        name, bases = kept if isinstance(kept, str) else "the given subspace", kept
        if isinstance(kept, str):
            bases = own_bases(w, kept, norms) if re.match(rf"{OWN}\b", kept) else swept_bases(kept, sweep)
        w = keep(w, check_bases(name, bases, w, decoder.d), norms)
        told.append(f"in {name} what o_proj and down_proj write")
    if rank is not None:
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank {rank}: a rank is a whole number, 1 or more")
        w = truncated(w, rank)
        told.append(f"rank {rank} of each matrix")
    if not len(w) or not w.total_norm():
        raise ValueError(f"nothing of w is left: {'; '.join(told) or 'w is 0'}")
    return w, "; ".join(told)


def check_name(what: str, name: str, known: Sequence[str], told: str = "") -> None:
    """ValueError for a name that is not known, with those near it."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.5)
        hint = f"did you mean {', '.join(near)}?" if near else told or f"known are {', '.join(known)}"
        raise ValueError(f"{what} {name!r} is unknown; {hint}")


def swept_bases(name: str, sweep: Explanation | None) -> dict[int, Float[Tensor, "d r"]]:
    """A candidate's bases at the layers of a sweep's summary. ValueError for one that it does not hold: unknown, or a
    ceiling."""
    if sweep is None:
        raise ValueError(
            f"{name!r}: a candidate's bases come from a sweep; give one, or dW:8 for w's own best directions"
        )
    known = sorted({key.split("/")[1] for key in sweep.tensors if key.startswith("basis/")})
    ceilings = [row["name"] for row in sweep.candidates if row.get("name") not in known]
    if name in ceilings:
        raise ValueError(f"{name!r}: a ceiling's bases are not kept; {OWN}:8 keeps w's own best 8 directions")
    check_name("candidate", name, known, f"the sweep has {len(known)}: {', '.join(known[:6])}, ...")
    if next(row for row in sweep.candidates if row["name"] == name)["axis_kind"] == "read":
        raise ValueError(
            f"{name!r}: reads the residual stream, and what is kept is of what writes; name a candidate that writes"
        )
    return {l: sweep.tensors[f"basis/{name}/{l}"] for l in sweep.layers}


def own_bases(w: WeightDiff, name: str, norms: Gains) -> dict[int, Float[Tensor, "d r"]]:
    """Per layer the top K left singular vectors of w's [w_o|w_down] side by side, as they leave the norms on the output."""
    found = re.fullmatch(rf"{OWN}:([1-9]\d{{0,5}})", name)
    if not found:
        raise ValueError(f"{name!r}: w's own best directions are written {OWN}:K, such as {OWN}:8")
    res, factors = rescaled(writers(w), norms), {}
    for one in res:
        U, s, _ = res.svd(one)
        factors.setdefault(layer_of(one), []).append(U * s)
    return {l: left_svd(torch.cat(each, dim=1), int(found[1])).B for l, each in factors.items()}


def truncated(w: WeightDiff, rank: int | None = None) -> WeightDiff:
    """Every matrix at its best approximation of that rank at most (None: at its numerical rank), as float32 factors
    `B = U sqrt(S)`, `A = sqrt(S) Vh`; what is 0 is left out, and what is no matrix stays as it is."""
    entries = {}
    for name, entry in w.entries.items():
        if len(entry.shape) != 2:
            entries[name] = entry
            continue
        U, s, Vh = w.svd(name)
        many = min(int((s > CUT * s.max()).sum()) if len(s) and s.any() else 0, rank or len(s))
        if many:
            entries[name] = balanced(U[:, :many], s[:many], Vh[:many])
    return replace(w, entries=entries)


def share_of(part: WeightDiff, w: WeightDiff) -> float:
    """`|part|^2 / |w|^2` over all parameters."""
    return part.total_norm() ** 2 / max(w.total_norm() ** 2, 1e-300)


def parameters(w: WeightDiff) -> int:
    """Numbers that w is made of, as factors where it has them."""
    return sum(piece.numel() for entry in w.entries.values() for piece in parts(entry))


def spans(layers: Collection[int]) -> str:
    """Layers as people write them: `2-5, 8`."""
    rows: list[list[int]] = []
    for l in sorted(set(layers)):
        if rows and l == rows[-1][-1] + 1:
            rows[-1].append(l)
        else:
            rows.append([l])
    return ", ".join(f"{row[0]}-{row[-1]}" if len(row) > 1 else str(row[0]) for row in rows)


def parse_layers(text: str) -> tuple[int, ...]:
    """`8-15`, `3,5`, `2-5,8` as layers. ValueError for what is none."""
    found: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        ends = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if not ends or (ends[2] and int(ends[2]) < int(ends[1])):
            raise ValueError(f"layers {part!r}: expected a layer or a range, such as 8-15 or 3,5")
        found |= set(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return tuple(sorted(found))
