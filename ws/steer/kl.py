"""How far steering moves what a model says next, and at which strength it moves it so far.

`KL(steered || base) = sum_v p_steered(v) (log p_steered(v) - log p_base(v))` in nats, of every position of a text. It grows as
alpha^2 near 0. (docs/method.md sections 8 and 12)
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ws.diff import WeightDiff
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.model.text import position_ids
from ws.model.wide import widened
from ws.steer.weights import check_fits, weight_steer

TOGETHER = 8  # texts of a batch
BUDGET = 1 << 30  # bytes of the base's log-probabilities that are kept; what is beyond is computed again each time
WITHIN, STEP, LEAP, LARGEST = 0.01, 1.5, 4.0, 1024.0  # relative error in KL; how a bracket grows; alpha at most
JUMP = 1.001  # ends of a bracket whose ratio is below are one alpha, at which the KL jumps
Steering = Callable[[float], AbstractContextManager]  # alpha -> a context in which the model is steered by it
Rows = Sequence[Sequence[int]]  # token ids of texts
KLs = Callable[[Steering, float], Float[Tensor, " k"]]


class Unreached(ValueError):
    """A KL that no strength was found for. curve: alpha -> KL, what was tried; bracket: the neighbours between which the KL
    jumps over the target, (nan, nan) where none is above it."""

    def __init__(self, told: str, curve: dict[float, float], bracket: tuple[float, float]):
        super().__init__(told)
        self.curve, self.bracket = curve, bracket


def as_steering(lm: LM, w: WeightDiff | Steering) -> Steering:
    """`W + alpha w` of a weight difference, once it is known to fit (else ValueError); another steering as it is."""
    if not isinstance(w, WeightDiff):
        return w
    check_fits(lm.model, w)
    return lambda alpha: weight_steer(lm.model, w, alpha)


def token_rows(lm: LM, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that the chat template has rendered. ValueError for no text, and for an empty one."""
    rows = [list(row) for row in lm.tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []
    if not rows or not all(rows):
        raise ValueError("no text to take the KL on; give the probes of a behaviour")
    return rows


def log_probs(lm: LM, rows: Rows, first: Sequence[int]) -> tuple[Float[Tensor, "k V"], Int[Tensor, " k"]]:
    """Log-probabilities of the next token, float32, at every position of the rows from `first` on, row after row; and which row
    each is of."""
    T = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T, dtype=torch.long)
    wanted = torch.zeros(len(rows), T, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, first, strict=True)):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        wanted[i, start : len(row)] = True
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
    with torch.no_grad():
        logits = lm.model(**{name: x.to(lm.device) for name, x in inputs.items()}, use_cache=False).logits
    return logits[wanted.to(logits.device)].float().log_softmax(dim=-1), wanted.nonzero()[:, 0]


def token_kls(
    lm: LM,
    rows: Rows,
    first: Sequence[int] = (),
    steered: tuple[Rows, Sequence[int]] | None = None,
    budget: int = BUDGET,
) -> KLs:
    """`kls(steering, alpha)`: KL(steered || base), nats, at every position of the rows from `first` on (default: all). In
    float32 whatever the model's dtype. steered: other rows for the steered side and where theirs begin, with as many positions
    each. Of the base's log-probabilities up to `budget` bytes are kept. ValueError for no row, inside a steered model, and
    where a diff does not fit."""
    check_plain(lm.model)
    rows = list(rows)
    if not rows:
        raise ValueError("no text to take the KL on; give the probes of a behaviour")
    first = list(first) or [0] * len(rows)
    others, theirs = steered or (rows, first)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches = [order[i : i + TOGETHER] for i in range(0, len(order), TOGETHER)]
    held: dict[int, Tensor] = {}

    def side(which: Rows, starts: Sequence[int], batch: list[int]) -> Float[Tensor, "k V"]:
        return log_probs(lm, [which[i] for i in batch], [starts[i] for i in batch])[0]

    def before(b: int) -> Float[Tensor, "k V"]:
        found = held[b] if b in held else side(rows, first, batches[b])
        if b not in held and sum(x.nbytes for x in held.values()) + found.nbytes <= budget:
            held[b] = found
        return found

    def kls(steering: Steering, alpha: float) -> Float[Tensor, " k"]:
        check_plain(lm.model)
        found = []
        with widened(lm.model):
            for b, batch in enumerate(batches):
                base = before(b)
                with steering(alpha):
                    now = side(others, theirs, batch)
                found.append((now.exp() * (now - base)).sum(dim=-1).cpu())
        return torch.cat(found)

    return kls


def kl_from_base(lm: LM, texts: Sequence[str]) -> Callable[[WeightDiff | Steering, float], float]:
    """`kl(w, alpha)`: mean KL(steered || base), nats per token, over all positions of texts that the chat template has rendered
    already. Otherwise as `token_kls`."""
    measure = token_kls(lm, token_rows(lm, texts))
    return lambda w, alpha: float(measure(as_steering(lm, w), alpha).double().mean())


def matched_alpha(
    kl: Callable[[float], float], target: float, within: float = WITHIN, largest: float = LARGEST, scan: int = 0
) -> tuple[float, float]:
    """alpha > 0 at which `kl(alpha)` is within a share `within` of `target` (nats), and that KL. KL is taken to grow as
    alpha^2 from alpha 1 on, until the target is bracketed; then the bracket is cut in log alpha, where a straight line through
    the logs of its ends meets the target, at least a tenth away from either. Where the KL jumps over the target, `scan` more
    strengths around the jump are tried. Unreached (a ValueError) with the curve for a target that is jumped over, that is not
    reached under `largest` or before KL is no longer finite; ValueError for one that is not above 0."""
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"a KL of {target:g} nats cannot be matched: it must be above 0")
    curve: dict[float, float] = {}

    def hit(alpha: float) -> bool:
        if alpha not in curve:
            curve[alpha] = kl(alpha)
        return abs(curve[alpha] - target) <= within * target

    def refuse(why: str, bracket: tuple[float, float]) -> Unreached:
        told = ", ".join(f"{a:.4g}: {k:.3g}" for a, k in sorted(curve.items()))
        said = f"a KL of {target:.4g} nats is {why}; alpha: KL is {told}"
        return Unreached(f"{said}; choose {'another' if 'jump' in why else 'a smaller'} target", curve, bracket)

    alpha, nan = 1.0, float("nan")
    while not hit(alpha):
        over = min((a for a, k in curve.items() if not k < target), default=None)
        under = max((a for a, k in curve.items() if k < target and (over is None or a < over)), default=None)
        if over is None:
            if (alpha := under * min(LEAP, max(STEP, (target / max(curve[under], 1e-12)) ** 0.5))) > largest:
                raise refuse("not reached", (nan, nan))
        elif under is None:
            many = curve[over] / target
            if (alpha := over / (min(largest, max(STEP, many**0.5)) if math.isfinite(many) else LEAP)) < 1e-9:
                raise refuse("not reached", (nan, nan))
        elif over / under < JUMP:
            if not math.isfinite(curve[over]):
                raise refuse("not reached", (nan, nan))
            for step in range(scan):
                if hit(alpha := under * 4 ** ((step + 0.5) / scan - 0.5)):
                    return alpha, curve[alpha]
            raise refuse(f"jumped over between alpha {under:.5g} and {over:.5g}", (under, over))
        else:
            low, high = (math.log(max(curve[a], 1e-12)) if math.isfinite(curve[a]) else nan for a in (under, over))
            share = (math.log(target) - low) / (high - low) if high > low else 0.5
            alpha = under * (over / under) ** min(0.9, max(0.1, share))
    return alpha, curve[alpha]
