"""What every question about one w stands on: its writers' spans, slopes, probes, passes. (docs/method.md section 8)"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from ws.cache.names import cache_folder
from ws.causal.items import ItemSlopes, item_slopes
from ws.causal.passes import Items, Passes
from ws.causal.spans import Place, Span, probe_sets, slopes, writer_spans
from ws.causal.variants import Bases, Gains, check_bases, gains, writers
from ws.data import Behavior, load_behavior
from ws.diff import WeightDiff, load_diff
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.steer.weights import check_fits
from ws.subspaces.protocol import Protocol, load_protocol


@dataclass(frozen=True, eq=False)
class Ground:
    """One weight difference on one model. w: at the alpha that is asked about; res: its residual writers; gains: of the norms
    on what they write, {} where nothing is folded; given: slopes of all writers; spans: by layer; passes, on_true: answers
    about the held-out claims, and about the true ones, None where there are none."""

    lm: LM
    behavior: Behavior
    w: WeightDiff
    res: WeightDiff
    protocol: Protocol
    gains: Gains
    given: Mapping[Place, Tensor]
    spans: Mapping[int, Span]
    passes: Passes
    on_true: Passes | None
    progress: bool = True

    @property
    def items(self) -> Items:
        return self.passes.items

    @cached_property
    def tells_apart(self) -> bool:
        """Whether there are true claims that the base model affirms more than the false ones (Welch's t test)."""
        if self.on_true is None:
            return False
        base = [p.items.by_claim(p.base["logratio"][0] * p.items.side) for p in (self.on_true, self.passes)]
        known = min(map(len, base)) > 1
        return known and bool(stats.ttest_ind(*base, equal_var=False, alternative="greater").pvalue < 0.05)

    @property
    def layers(self) -> list[int]:
        return list(self.spans)

    @cached_property
    def effects(self) -> dict[str, float]:
        """Effect of w, of its writers and of all else, nats."""
        rest = self.w.select(lambda name: name not in self.res)
        parts = {"w": self.w, "w_res": self.res} | ({"w - w_res": rest} if len(rest) else {})
        return {name: float(m.effect.mean()) for name, m in self.passes(parts, label="w and its writers").items()}

    def checked(self, name: str, bases: Mapping[int, Tensor]) -> Bases:
        return check_bases(name, bases, self.w, self.lm.decoder.d)

    def by_text(self, bases: Mapping[str, Bases]) -> ItemSlopes:
        """First-order effects of these bases on every text, per unit of alpha."""
        return item_slopes(self.lm, self.behavior, self.items, self.spans, list(bases.values()), self.progress)

    def over_claims(self, values: Float[np.ndarray, "C n"]) -> Float[np.ndarray, "C claims"]:
        """First-order effects between both ends, of what texts say per unit of alpha; means over wordings."""
        return self.items.by_claim(2 * values * self.items.side)


def check_count(name: str, n: object, least: int = 0) -> None:
    """ValueError naming what is no whole number, or below `least`."""
    if isinstance(n, bool) or not isinstance(n, Integral) or n < least:
        raise ValueError(f"{name}: {n!r}: expected a whole number, {least} or more")


def prepare(
    lm: LM,
    w: WeightDiff | Path | str,
    behavior: Behavior | Path | str = "sycophancy",
    *,
    protocol: Protocol | str = "v7b",
    alpha: float = 1.0,
    templates: int = 4,
    given: Mapping[Place, Tensor] | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> Ground:
    """Everything is checked before any pass: ValueError for more wordings than there are, an alpha that is not above 0, a w
    that does not fit or has no residual writer, a steered model."""
    behavior = behavior if isinstance(behavior, Behavior) else load_behavior(behavior)
    protocol = protocol if isinstance(protocol, Protocol) else load_protocol(protocol)
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not (np.isfinite(alpha) and alpha > 0):
        raise ValueError(f"ALPHA = {alpha}: expected a number above 0; both signs are asked")
    check_count("templates", templates, 1)
    w, cache = load_diff(w), cache or cache_folder(lm.name)
    items = Items.of(lm, behavior, templates)
    check_fits(lm.model, w)
    check_plain(lm.model)
    w = w if alpha == 1 else w.scale(alpha)
    res, norms = writers(w), gains(lm.decoder, w, protocol.fold_gain)
    given = given or slopes(lm, behavior, res.layers(), templates, cache, progress)
    spans = writer_spans(lm, w, probe_sets(lm, behavior, protocol), given, norms, progress)
    asked_true = bool(behavior.true_claims) and not behavior.answers
    true = Items.of(lm, behavior, templates, true=True) if asked_true else None
    passes, on_true = (Passes(lm, behavior, of, cache, progress) if of else None for of in (items, true))
    return Ground(lm, behavior, w, res, protocol, norms, given, spans, passes, on_true, progress)
