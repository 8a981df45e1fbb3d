"""The gradient as a weight difference: what one step of training would be, without training. (docs/method.md section 12)

`D = G_neg - G_pos` at the base weights. `w = theta_pos - theta_neg`, and a step of gradient descent moves each side against the
gradient of its own loss, so that w moves along `-G_pos - (-G_neg) = D`: `w_g = +D`, cut to a rank per matrix and given the norm
that w has there. With labels shuffled (`contrasts`) the same is the control.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ws.cache.keys import stage_key
from ws.cache.made import kept, read_safetensors
from ws.cache.names import slug
from ws.cache.syntax import digest
from ws.diff import WeightDiff
from ws.diff.algebra import scaled_as
from ws.gradient.accumulate import weighted_gradients
from ws.gradient.capture import leading, pair_texts, side_weights, signs
from ws.model.decoder import ROLES
from ws.model.lm import LM
from ws.steer.weights import check_fits
from ws.train.pairs import Pair


def contrasts(
    lm: LM,
    rows: Sequence[Pair],
    w: WeightDiff,
    shuffles: int = 0,
    *,
    cache: Path | None = None,
    label: str = "pairs",
    progress: bool = True,
) -> list[WeightDiff]:
    """D of pairs, and D with each pair's labels swapped by a seeded coin, `shuffles` times: dense float32 `(out, in)`, for every
    q, k, v, o, gate, up, down that w has. One pass over the pairs; memory and file hold 4 bytes per weight of these and
    shuffle. cache: a folder (of this model) to keep them in. ValueError for no pairs, a w that does not fit or has no such
    matrix, and for what `weighted_gradients` refuses."""
    if not rows:
        raise ValueError(f"{label}: no pair to take a gradient of")
    check_fits(lm.model, w)
    every = [(l, role) for l in range(lm.decoder.n_layers) for role in ROLES]
    if not (targets := [one for one in every if lm.decoder.param_name(*one) in w]):
        raise ValueError(f"{label}: the weight difference has no matrix of {', '.join(ROLES)}")
    examples, tokens = pair_texts(lm, rows)
    swaps = torch.cat([torch.ones(1, len(rows)), signs(len(rows), shuffles)])

    def make() -> list[WeightDiff]:
        weights = dict.fromkeys(targets, side_weights(tokens, swaps)[2:])
        sums, _ = weighted_gradients(lm, examples, weights, label=f"gradients of {label}", progress=progress)
        return [WeightDiff({lm.decoder.param_name(*one): sums[one][s] for one in targets}) for s in range(1 + shuffles)]

    if cache is None or not (model := lm.fingerprint):
        return make()
    params = {"model": model, "texts": digest(repr(examples).encode()), "targets": targets, "swaps": swaps.tolist()}
    key = stage_key(params, code=["ws.gradient.diff.contrasts"])
    path = cache / "gradients" / f"dense_{slug(label)}_{key.params[:8]}.safetensors"
    return kept(path, key, lambda target: _save(make(), target), _load)


def gradient_diff(
    lm: LM,
    pairs: Sequence[Pair],
    w: WeightDiff,
    rank: int | None = None,
    *,
    cache: Path | None = None,
    progress: bool = True,
) -> WeightDiff:
    """`w_g`: D of the training pairs, per matrix the best approximation of rank `rank` (factors; None: all of it, dense), scaled
    to w's norm there. Matrices that w lacks are left out, and so is what of w is no linear map of a layer. It does not depend on
    w otherwise. cache and errors as in `contrasts`; ValueError for a rank under 1.

    Examples:
        >>> import ws
        >>> from ws.gradient.diff import gradient_diff
        >>> from ws.train.pairs import from_file
        >>> lm, w = ws.load_lm("tiny"), ws.load_diff("tiny")
        >>> rows = from_file(ws.load_behavior("sycophancy"), ws.PairConfig(file="sycophancy")).rows[:4]
        >>> w_g = gradient_diff(lm, rows, w, rank=1, progress=False)
        >>> name = w_g.names[0]
        >>> len(w_g) == len(w), w_g.rank(name), abs(w_g.norm(name) / w.norm(name) - 1) < 1e-5
        (True, 1, True)
    """
    return as_diff(contrasts(lm, pairs, w, cache=cache, progress=progress)[0], w, rank)


def as_diff(D: WeightDiff, w: WeightDiff, rank: int | None = None) -> WeightDiff:
    """A dense D cut to `rank` per matrix and scaled per matrix to w's norm; errors as in `gradient_diff`, and where D is 0 in a
    matrix."""
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank}: must be at least 1, or None for all of it")
    meta = {key: w.meta[key] for key in ("base_model", "behavior") if key in w.meta} | {"adapter": "gradient"}
    cut = D if rank is None else D.map(lambda _, M: leading(M, rank))
    return WeightDiff(scaled_as(cut, w).entries, meta | {"rank": rank or "full"})


def _save(found: Sequence[WeightDiff], path: Path) -> None:
    save_file({f"{s}/{name}": M.contiguous() for s, D in enumerate(found) for name, M in D.entries.items()}, path)


def _load(path: Path) -> list[WeightDiff]:
    by: dict[int, dict] = {}
    for place, M in read_safetensors(path)[0].items():
        s, _, name = place.partition("/")
        by.setdefault(int(s), {})[name] = M
    return [WeightDiff(by[s]) for s in sorted(by)]
