"""How far a weight difference moves what a model says next, and at which strength two move it as far.

`KL(steered || base) = sum_v p_steered(v) (log p_steered(v) - log p_base(v))` in nats, mean over every position of the texts.
It grows as alpha^2 near 0. (docs/method.md section 12)
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ws.diff import WeightDiff
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.model.text import encode, position_ids
from ws.model.wide import widened
from ws.steer.weights import check_fits, weight_steer

TOGETHER = 8  # texts of a batch
WITHIN, STEP, LARGEST = 0.01, 1.5, 1024.0  # relative error in KL; how a bracket grows; alpha at most


def kl_from_base(lm: LM, texts: Sequence[str]) -> Callable[[WeightDiff, float], float]:
    """`kl(w, alpha)`: mean KL(steered || base), nats per token, over all positions of texts that the chat template has rendered
    already. In float32 whatever the model's dtype. The base's log-probabilities are kept in memory, 4 bytes per position and
    token of the vocabulary. ValueError for no text, inside a steered model, and for a w that does not fit."""
    check_plain(lm.model)
    texts = list(texts)
    if not texts:
        raise ValueError("no text to take the KL on; give the probes of a behaviour")
    batches = [encode(lm.tokenizer, texts[i : i + TOGETHER], False, 4096) for i in range(0, len(texts), TOGETHER)]

    def logp(ids: Tensor, mask: Tensor) -> Float[Tensor, "k V"]:
        device = next(lm.model.parameters()).device
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
        with torch.no_grad():
            logits = lm.model(**{name: x.to(device) for name, x in inputs.items()}, use_cache=False).logits
        return logits[mask.to(logits.device) > 0].float().log_softmax(dim=-1)

    with widened(lm.model):
        base = [logp(*batch) for batch in batches]
    positions = sum(map(len, base))

    def kl(w: WeightDiff, alpha: float) -> float:
        check_plain(lm.model)
        check_fits(lm.model, w)
        total = 0.0
        with widened(lm.model), weight_steer(lm.model, w, alpha):
            for batch, before in zip(batches, base, strict=True):
                now = logp(*batch)
                total += float((now.exp() * (now - before)).sum(dim=-1).double().sum())
        return total / positions

    return kl


def matched_alpha(
    kl: Callable[[float], float], target: float, within: float = WITHIN, largest: float = LARGEST
) -> tuple[float, float]:
    """alpha > 0 at which `kl(alpha)` is within a share `within` of `target` (nats), and that KL. KL is taken to grow as alpha^2
    from alpha 1; from there a bracket, then bisection in log alpha. ValueError with the curve, alpha and KL, for a target that
    is not reached under `largest` or before KL is no longer finite, and for one that is not above 0."""
    if not (np.isfinite(target) and target > 0):
        raise ValueError(f"a KL of {target:g} nats cannot be matched: it must be above 0")
    curve: dict[float, float] = {}

    def at(alpha: float) -> float:
        if alpha not in curve:
            curve[alpha] = kl(alpha)
        return curve[alpha]

    def refuse() -> ValueError:
        told = ", ".join(f"{a:.3g}: {k:.3g}" for a, k in sorted(curve.items()))
        return ValueError(f"a KL of {target:.4g} nats is not reached; alpha: KL is {told}; choose a smaller target")

    first = at(1.0)
    if not np.isfinite(first):
        raise refuse()
    low = high = float(np.clip((target / max(first, 1e-12)) ** 0.5, 1 / largest, largest))
    while (value := at(high)) < target:
        low, high = high, high * STEP
        if high > largest:
            raise refuse()
    while at(low) > target:
        low, high = low / STEP, low
        if low < 1e-9:
            raise refuse()
    if not np.isfinite(value):
        raise refuse()
    for _ in range(60):
        near = min((a for a in curve if np.isfinite(curve[a])), key=lambda a: abs(curve[a] - target))
        if abs(curve[near] - target) <= within * target:
            return near, curve[near]
        middle = (low * high) ** 0.5
        low, high = (middle, high) if at(middle) < target else (low, middle)
    raise refuse()
