"""How strongly to steer: alpha at which a quantile of KL(steered || base) over tokens meets a target. (docs/method.md section 8)

    alpha:  max over the signs s of  Q_q { KL(p(. | x, s alpha) || p(. | x)) : x a position }  =  target

On `texts`, positions are those of fixed texts. Along the `continuation` they are those of what the steered model says itself,
greedily, where steering breaks text first: that KL is a step function of alpha wherever a token changes, and may jump over a
target.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.data import Behavior, load_behavior
from ws.diff import WeightDiff
from ws.model.greedy import greedy_ids
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.model.text import chat_text
from ws.model.wide import widened
from ws.steer.kl import LARGEST, KLs, Rows, Steering, as_steering, matched_alpha, token_kls, token_rows
from ws.steer.neutral import neutral, passage_rows, request

ALONG, SIGNS = ("texts", "continuation"), ("both", "+", "-")
QUANTILE, WITHIN, TOKENS, SCAN = 0.95, 0.02, 64, 12  # SCAN: strengths tried around a jump
MOST_TOPICS = 32  # held-out topics whose probes are read


@dataclass(frozen=True, eq=False)
class Calibration:
    """alpha > 0, and the q-quantile of KL over positions, nats per token, at +alpha (`plus`) and at -alpha (`minus`). The
    target is met by the larger of the two where `sign` is both, else by the sign's own. curve: what was tried, ascending:
    alpha, plus, minus, and the number of positions at either sign."""

    alpha: float
    plus: float
    minus: float
    target: float
    q: float
    along: str
    sign: str
    curve: pl.DataFrame

    @property
    def kl(self) -> float:
        """What meets the target, nats."""
        return {"both": max(self.plus, self.minus), "+": self.plus, "-": self.minus}[self.sign]

    def text(self) -> str:
        """In words."""
        by = "-alpha" if self.kl == self.minus else "+alpha"
        where = "of fixed texts" if self.along == "texts" else "of its own greedy text"
        return (
            f"At alpha {self.alpha:.4g} the {self.q:.0%} quantile of KL(steered || base) over the tokens {where} is"
            f" {self.plus:.3g} nats at +alpha and {self.minus:.3g} at -alpha; {by} meets the target of {self.target:.3g}."
        )


def calibrate(
    lm: LM,
    w: WeightDiff | Steering,
    target: float | int,
    behavior: Behavior | str = "sycophancy",
    *,
    along: str = "texts",
    texts: Sequence[str] | None = None,
    q: float = QUANTILE,
    sign: str = "both",
    within: float = WITHIN,
    tokens: int = TOKENS,
) -> Calibration:
    """The strength at which steering moves a model by `target` nats per token, to a share `within`.

    w: a weight difference, or any steering, `alpha -> context`. along: `texts` (every position of the held-out topics' probes
    in all wordings and of the neutral passages) or `continuation` (up to `tokens` greedy tokens after the held-out topics'
    opinions and the requests for the passages, with the one that ends a turn). texts: others in their place, rendered by the
    chat template; for `continuation` prompts. q: the quantile. sign: which end meets the target; `both` the one that is moved
    more, so that neither is moved further. ValueError before anything is computed for an unknown word, a q outside (0, 1), a
    target that is not above 0 and a w that does not fit; `ws.steer.kl.Unreached` (a ValueError) with the curve for a target
    that is out of reach or, along the continuation, jumped over. The model is the same before and after.

    Examples:
        >>> import ws
        >>> lm, w = ws.load_lm("tiny"), ws.load_diff("tiny")
        >>> found = ws.calibrate(lm, w, 0.1, texts=["I think that ice is warm. Am I right?"])
        >>> abs(found.kl / 0.1 - 1) < 0.02, found.alpha > 0
        (True, True)
    """
    behavior = behavior if isinstance(behavior, Behavior) else load_behavior(behavior)
    for name, value, known in (("along", along, ALONG), ("sign", sign, SIGNS)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown; one of {', '.join(known)}")
    if not 0 < q < 1:
        raise ValueError(f"q = {q}: a quantile lies between 0 and 1")
    check_plain(lm.model)
    steering, target = as_steering(lm, w), float(target)
    if along == "texts":
        rows = token_rows(lm, texts) if texts is not None else probe_rows(lm, behavior) + passage_rows(lm)[0]
        return met(token_kls(lm, rows), steering, target, along=along, q=q, sign=sign, within=within)
    prompts = token_rows(lm, texts if texts is not None else opening_texts(lm, behavior))
    return met(continued_kls(lm, prompts, tokens), steering, target, along=along, q=q, sign=sign, within=within)


def met(
    kls: KLs,
    steering: Steering,
    target: float,
    *,
    along: str = "texts",
    q: float = QUANTILE,
    sign: str = "both",
    within: float = WITHIN,
    largest: float = LARGEST,
) -> Calibration:
    """`calibrate` with its measure `kls(steering, alpha)`, one KL per position, given."""
    seen: dict[float, tuple[float, float, int, int]] = {}

    def at(alpha: float, signs: str) -> tuple[float, float, int, int]:
        found = [kls(steering, s * alpha) if signs in ("both", name) else None for name, s in (("+", 1), ("-", -1))]
        return (
            *(quantile(x, q) if x is not None else float("nan") for x in found),
            *(0 if x is None else len(x) for x in found),
        )

    def larger(alpha: float) -> float:
        seen[alpha] = at(alpha, sign)
        plus, minus = seen[alpha][:2]
        return {"both": plus if plus > minus or plus != plus else minus, "+": plus, "-": minus}[sign]

    alpha, _ = matched_alpha(larger, target, within, largest, SCAN if along == "continuation" else 0)
    if sign != "both":
        seen[alpha] = at(alpha, "both")
    columns = ["alpha", "plus", "minus", "positions_plus", "positions_minus"]
    curve = pl.DataFrame([(a, *seen[a]) for a in sorted(seen)], columns, orient="row")
    return Calibration(alpha, *seen[alpha][:2], target, q, along, sign, curve)


def quantile(kls: Float[Tensor, " k"], q: float) -> float:
    """By linear interpolation, NaN where one is not finite."""
    return float(torch.quantile(kls.double(), q)) if bool(torch.isfinite(kls).all()) else float("nan")


def continued_kls(lm: LM, prompts: Sequence[Sequence[int]], tokens: int = TOKENS) -> KLs:
    """`kls(steering, alpha)`: KL(steered || base) at every token that the steered model itself says after the prompts, up to
    `tokens` each. The base reads the same text."""

    def kls(steering: Steering, alpha: float) -> Float[Tensor, " k"]:
        check_plain(lm.model)
        with widened(lm.model), steering(alpha):
            said = greedy_ids(lm, prompts, tokens)
        return said_kls(lm, prompts, said, steering, alpha)

    return kls


def said_kls(
    lm: LM, prompts: Rows, said: Rows, steering: Steering, alpha: float, others: Rows | None = None
) -> Float[Tensor, " k"]:
    """KL(steered || base) where each token of `said`, ids that follow the prompts, is chosen. others: the steered side's own
    prompts."""
    sides = []
    for each in (prompts, others or prompts):
        rows = [[*before, *after[:-1]] for before, after in zip(each, said, strict=True)]
        sides.append((rows, [len(before) - 1 for before in each]))
    return token_kls(lm, *sides[0], steered=sides[1], budget=0)(steering, alpha)


def probe_rows(
    lm: LM, behavior: Behavior, topics: int = MOST_TOPICS, wordings: int | None = None, system: str | None = None
) -> list[list[int]]:
    """Token ids of the probes about the first held-out topics, wording after wording (None: all)."""
    claims = [topic.claim for topic in behavior.heldout_topics[:topics]]
    asked = [behavior.probe_text(claim, a) for a in range(len(behavior.templates[:wordings])) for claim in claims]
    return token_rows(lm, [chat_text(lm.tokenizer, text, system) for text in asked])


def opening_texts(lm: LM, behavior: Behavior, n: int = MOST_TOPICS, system: str | None = None) -> list[str]:
    """Rendered turns that ask for prose: the held-out topics' opinions and the requests for the neutral passages, up to n of
    each."""
    asked = [behavior.opinion_text(topic) for topic in behavior.heldout_topics[:n]]
    asked += [request(about) for about, _ in neutral().passages[:n]]
    return [chat_text(lm.tokenizer, text, system) for text in asked]
