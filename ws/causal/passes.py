"""What weight differences do to the answers, by forward passes: log-ratio, pmass and KL at both ends of alpha.
(docs/method.md section 8)

`effect = (s(+alpha) - s(-alpha)) side` in nats, s the log-ratio `log P(yes) - log P(no)` of one text, side -1 where the
no-word shows the behaviour. A unit is a held-out claim, whose texts are the wordings of the probe: means over wordings first,
intervals over claims. Every variant's answers are kept in the cache under its content, so that a killed check goes on where
it was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from safetensors.numpy import load_file, save_file
from scipy import stats

from ws.cache.keys import Key, stage_key
from ws.cache.made import kept, state
from ws.cache.syntax import digest
from ws.causal.stacked import logits_of, stackable, stacked
from ws.data import Behavior
from ws.diff import WeightDiff
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.model.text import chat_text
from ws.model.wide import widened
from ws.show.bars import tqdm
from ws.steer.answers import answer_tokens
from ws.steer.effect import LEVEL, asked
from ws.steer.weights import check_fits, weight_steer

TOGETHER = 8  # variants of a stack, each at both ends
SATURATED, LEAST_PMASS = 12.0, 0.5  # nats of the log-ratio; what is beyond says no more of a subspace


@dataclass(frozen=True)
class Items:
    """What is asked. turns: texts as the chat template renders them; claim: `(n,)` which claim each is about; wording:
    `(n,)`; side: `(n,)` +1 where the yes-word shows the behaviour, else -1."""

    turns: tuple[str, ...]
    claim: Int[np.ndarray, " n"]
    wording: Int[np.ndarray, " n"]
    side: Float[np.ndarray, " n"]

    @classmethod
    def of(cls, lm: LM, behavior: Behavior, templates: int, true: bool = False) -> "Items":
        """The held-out claims of a behaviour, or its true ones. ValueError for more wordings than the behaviour has."""
        if not 1 <= templates <= len(behavior.templates):
            raise ValueError(
                f"templates = {templates}: {behavior.name} has {len(behavior.templates)} wordings of the probe"
            )
        claims, sides = asked(behavior) if not true else (behavior.true_claims, [1.0] * len(behavior.true_claims))
        rows = [(i, a) for a in range(templates) for i in range(len(claims))]
        texts = [chat_text(lm.tokenizer, behavior.probe_text(claims[i], a)) for i, a in rows]
        i, a = np.array(rows).T
        return cls(tuple(texts), i, a, np.array(sides, dtype=float)[i])

    @cached_property
    def sides(self) -> Float[np.ndarray, " claims"]:
        """Of the claims."""
        return self.by_claim(self.side)

    def by_claim(self, values: Float[np.ndarray, "*k n"]) -> Float[np.ndarray, "*k claims"]:
        """Means over wordings of what is known of each text."""
        return np.stack([values[..., self.claim == c].mean(axis=-1) for c in np.unique(self.claim)], axis=-1)


@dataclass(frozen=True)
class Moved:
    """A variant's answers: `(2, n)` at +alpha and at -alpha. logratio in nats; kl: `KL(steered || base)` of the answer's
    first token, nats; base: `(n,)` log-ratio of the base model."""

    logratio: Float[np.ndarray, "2 n"]
    pmass: Float[np.ndarray, "2 n"]
    kl: Float[np.ndarray, "2 n"]
    base: Float[np.ndarray, " n"]
    items: Items = field(repr=False)

    @cached_property
    def effect(self) -> Float[np.ndarray, " claims"]:
        """Between -alpha and +alpha on every claim, nats."""
        return self.items.by_claim((self.logratio[0] - self.logratio[1]) * self.items.side)

    def spread(self) -> dict[str, float]:
        """Mean effect over claims and its 95 % t interval."""
        return spread(self.effect, "effect", self.items.sides)

    @property
    def ends(self) -> tuple[float, float]:
        """What +alpha and what -alpha move the score by, nats: their difference is the effect."""
        up, down = self.items.by_claim((self.logratio - self.base) * self.items.side).mean(axis=1)
        return float(up), float(down)

    @property
    def mean_kl(self) -> float:
        """Mean over texts and both ends."""
        return float(self.kl.mean())

    @property
    def least_pmass(self) -> float:
        """Of the two ends, mean over texts."""
        return float(self.pmass.mean(axis=1).min())

    @property
    def saturated(self) -> bool:
        """Whether the mean log-ratio is beyond 12 nats, or pmass under one half, at either end."""
        far = self.items.by_claim(np.abs(self.logratio)).mean(axis=-1).max() > SATURATED
        return bool(far or self.least_pmass < LEAST_PMASS)


def spread(by_claim: Float[np.ndarray, " n"], name: str, sides: Shaped[np.ndarray, " n"]) -> dict[str, float]:
    """Mean over claims and its 95 % t interval. sides: a push to yes moves both against each other, so that the spread is
    taken within them."""
    mean, parts = float(by_claim.mean()), [by_claim[sides == side] for side in np.unique(sides)]
    halves = [stats.t.ppf((1 + LEVEL) / 2, len(x) - 1) * stats.sem(x) * len(x) if len(x) > 1 else np.nan for x in parts]
    half = float(np.hypot.reduce(halves)) / len(by_claim)
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


class Passes:
    """Answers of variants, many in a pass. lm, behavior: what is asked; cache: a folder of this model, None to keep nothing;
    tokens of a pass are bounded by `ws.causal.stacked.TOKENS`. ValueError in a steered model, and for answer words that are
    no tokens."""

    def __init__(self, lm: LM, behavior: Behavior, items: Items, cache: Path | None = None, progress: bool = True):
        check_plain(lm.model)
        self.lm, self.items, self.progress = lm, items, progress
        self.yes, self.no = answer_tokens(lm.tokenizer, behavior)
        self.folder = cache / "causal" if cache and lm.fingerprint else None
        self.slug = behavior.slug

    def __call__(
        self, variants: Mapping[str, WeightDiff], alpha: float = 1.0, label: str = "variants"
    ) -> dict[str, Moved]:
        """Answers at both ends of alpha, by name. Errors as in `ws.steer.weights.check_fits`, before any pass."""
        for w in variants.values():
            check_fits(self.lm.model, w)
        found, todo = {}, list(variants)
        keys = {name: self._key(w, alpha) for name, w in variants.items()} if self.folder else {}
        there = [name for name in todo if name in keys and state(self._path(keys[name]), keys[name]) == "done"]
        with tqdm(total=len(todo), desc=label, disable=not self.progress) as bar:
            for name in there:
                found[name] = self._read(keys[name], {})
            bar.update(len(there))
            todo = [name for name in todo if name not in found]
            factors = [name for name in todo if stackable(self.lm, variants[name])]
            alone = [[name] for name in todo if name not in factors]
            stacks = [factors[i : i + TOGETHER] for i in range(0, len(factors), TOGETHER)]
            for names in [*stacks, *alone]:
                read = self._stack if names[0] in factors else self._dense
                for name, one in zip(names, read([variants[n] for n in names], alpha), strict=True):
                    found[name] = self._read(keys[name], one) if keys else one
                bar.update(len(names))
        base = self.base["logratio"][0]
        return {name: Moved(**found[name], base=base, items=self.items) for name in variants}

    @cached_property
    def base(self) -> dict[str, np.ndarray]:
        """The base model's answers, `(1, n)`, and its log-probabilities `(n, V)`."""
        logp = {}
        stacked(
            self.lm, [(WeightDiff({}), 0.0)], self.items.turns, lambda x, at: logp.update(zip(at, x[0], strict=True))
        )
        whole = torch.stack([logp[i] for i in range(len(logp))]).log_softmax(dim=-1)
        return self._scores(whole[None], whole) | {"logp": whole}

    def _key(self, w: WeightDiff, alpha: float) -> Key:
        params = {"model": self.lm.fingerprint, "w": w.fingerprint, "alpha": float(alpha), "words": [self.yes, self.no]}
        return stage_key(params | {"texts": self.texts}, code=["ws.causal.stacked.stacked", "ws.causal.passes.Passes"])

    @cached_property
    def texts(self) -> str:
        """A hash of what is asked."""
        return digest(repr(self.items.turns).encode())

    def _path(self, key: Key) -> Path:
        return self.folder / f"{self.slug}_{key.params[:16]}.safetensors"

    def _read(self, key: Key, made: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return kept(self._path(key), key, lambda to: save_file(made, to), load_file)

    def _scores(self, logp: Float[torch.Tensor, "S k V"], base: Float[torch.Tensor, "k V"]) -> dict[str, np.ndarray]:
        yes, no = logp[..., self.yes].logsumexp(dim=-1), logp[..., self.no].logsumexp(dim=-1)
        kl = (logp.exp() * (logp - base)).sum(dim=-1)
        found = {"logratio": yes - no, "pmass": yes.exp() + no.exp(), "kl": kl}
        return {name: x.cpu().numpy() for name, x in found.items()}

    def _collect(self, S: int) -> tuple[dict[str, np.ndarray], object]:
        found = {name: np.zeros((S, len(self.items.turns)), np.float32) for name in ("logratio", "pmass", "kl")}
        before = self.base["logp"]

        def read(logits: Float[torch.Tensor, "S k V"], places: list[int]) -> None:
            scores = self._scores(logits.log_softmax(dim=-1), before[places])
            for name, values in scores.items():
                found[name][:, places] = values

        return found, read

    def _stack(self, variants: Sequence[WeightDiff], alpha: float) -> list[dict[str, np.ndarray]]:
        found, read = self._collect(2 * len(variants))
        stacked(self.lm, [(w, sign * alpha) for w in variants for sign in (1, -1)], self.items.turns, read)
        return [{name: x[2 * i : 2 * i + 2].copy() for name, x in found.items()} for i in range(len(variants))]

    def _dense(self, variants: Sequence[WeightDiff], alpha: float) -> list[dict[str, np.ndarray]]:
        """One by one, by `weight_steer`: what is no product of factors."""
        ends = []
        for w in variants:
            both = []
            for sign in (1, -1):
                found, read = self._collect(1)
                with widened(self.lm.model), weight_steer(self.lm.model, w, sign * alpha):
                    logits_of(self.lm, {}, 1, self.items.turns, read)
                both.append(found)
            ends.append({name: np.concatenate([one[name] for one in both]) for name in found})
        return ends
