"""What a stranger's cosine with a behaviour is held against: seeds, null diffs, random diffs. (docs/method.md section 13)

    T(x) = mean over seeds s of artanh cos(x, w_s)

of the stranger over all w; of a null diff over the w of *other* seeds, as it shares initialisation, order and texts with the
one of its own, and a stranger with none; of a seed's own entry over the other seeds. Given these w, null diffs are
independent draws, and so is a stranger that is like one. With probability .95 T of one more lies in `-+ t_J sqrt(sum T^2 /
J)`, as its mean is 0 by design (`upper_effect`); where entries are read as one side it is not, and the interval is `m -+
t_{J-1} s sqrt(1 + 1/J)`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ws.diff import WeightDiff
from ws.diff.algebra import combine
from ws.steer.effect import SAME, upper_effect, upper_end
from ws.use.library import Known

LARGEST = 32  # singular values of a matrix that are drawn one by one


@dataclass(frozen=True)
class Bands:
    """Cosines, tanh of T: of the stranger with `w` differences, of each seed, of each null diff (`same`: with w of its own
    seed). low, high: the null band, NaN with fewer than two null diffs."""

    cos: float
    w: int
    seeds: list[float]
    nulls: list[float]
    same: list[float]
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Above, below or inside; undecided without a band, and inside one that does not part seeds from null diffs."""
        if np.isfinite([self.cos, self.low]).all() and not self.low <= self.cos <= self.high:
            return f"{'above' if self.cos > self.high else 'below'} the null band"
        return "inside" if self.seeds and min(self.seeds) > self.high else "undecided"


def bands(
    cos: Float[Tensor, "N N"], entries: Sequence[Known], each: int, out: Collection[int], seeds: Collection[int]
) -> Bands:
    """cos: of the stranger (row 0) and of `each` readings of every entry: w, then what is read as the stranger is. out:
    entries that are the stranger; seeds: LoRA seeds that it shares. Neither is compared with."""
    z = np.arctanh(np.clip(cos.numpy(), -SAME, SAME))
    kept = [(i, e) for i, e in enumerate(entries) if i not in out]
    w = {e.seed: 1 + each * i for i, e in kept if not e.null and e.seed not in seeds}
    found: dict[str, list[float]] = {"seeds": [], "nulls": [], "same": []}
    for i, e in kept:
        row = z[1 + each * i + (each > 1)]
        if others := [at for seed, at in w.items() if seed != e.seed]:
            found["nulls" if e.null else "seeds"] += [row[others].mean()] if e.null or e.seed in w else []
        if e.null and e.seed in w:
            found["same"].append(row[w[e.seed]])
    mine = z[0, [*w.values()]].mean() if w else np.nan
    nulls = np.array(found["nulls"])[:, None]
    end = upper_effect(found["nulls"])
    low, high = (-upper_end(-nulls)[0], upper_end(nulls)[0]) if each > 1 else (-end, end)
    told = (np.tanh(values).tolist() for values in found.values())
    return Bands(float(np.tanh(mine)), len(w), *told, float(np.tanh(low)), float(np.tanh(high)))


def random_cosines(
    u: WeightDiff, ws: Sequence[WeightDiff], names: Sequence[str], draws: int, seed: int
) -> Float[np.ndarray, " draws"]:
    """Mean cosines with `ws`, over `names`, of differences with u's singular values per matrix and random singular vectors.
    With M the mean of `w / |w|`, `<x, M> = sum_ij s_i sigma_j c_ij d_ij`, c and d the vectors' coordinates in M's singular
    bases, drawn as N(0, 1/rows) and N(0, 1/columns): mean and variance are those of Haar frames."""
    g, total, square = torch.Generator().manual_seed(seed), torch.zeros(draws, dtype=torch.float64), 0.0
    sizes = [sum(w.norm(name) ** 2 for name in names) ** 0.5 * len(ws) for w in ws]
    for name in names:
        parts = [w.select(name.__eq__).scale(1 / size).entries[name] for w, size in zip(ws, sizes, strict=True)]
        s = u.singular_values(name).square()
        sigma = WeightDiff({name: reduce(combine, parts)}).singular_values(name).square()
        energy = torch.outer(s[:LARGEST], sigma[:LARGEST])
        c = torch.randn(draws, *energy.shape, generator=g, dtype=torch.float64)
        # given c the sum over d is normal; the part of small singular values hardly varies with c
        variance = (c.square() * energy).sum((1, 2)) + (s.sum() * sigma.sum() - energy.sum()).clamp(min=0)
        normal = torch.randn(draws, generator=g, dtype=torch.float64)
        total += normal * (variance / float(np.prod(u.shape(name), dtype=float))).sqrt()
        square += float(s.sum())
    return (total / square**0.5).numpy()
