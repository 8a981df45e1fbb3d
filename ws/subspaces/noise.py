"""What rounding does to a matrix, and by how much that turns its singular vectors.

Activations come from float32 arithmetic, whose last bits depend on the thread count and the processor. Noise of spectral
norm E turns the top k singular vectors by at most `E / (s_k - s_{k+1})` rad (Wedin), which every basis carries along.
Weights in half precision are rounded at random, which turns less: noise of standard deviation sigma, independent from
entry to entry, and of `rows` of itself where a whole row is rounded alike (a gain), turns them to first order by

    sqrt(sum_{i <= k < j} (sigma^2 (s_i^2 + s_j^2) + 2/d rows^2 (s_i^2 + s_j^2)^2) / (s_i^2 - s_j^2)^2)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

FLOAT32_EPS = 2.0**-23
ROUNDING = 2 * FLOAT32_EPS  # noise of captures over their norm: measured 0.6 to 2.1 eps (docs/reliability.md)
MOST_TURN = 1e-3  # rad; a turn of each direction by this takes 1e-6 off the overlap
NARROW_TURN = 1e-2  # the same of what was computed from half precision
SHARE, MOST_OFF = 0.02, 1e-4  # of the turn by noise; and in rad
WIDE, WIDER = 256, 768  # rows from which that takes less time; on the CPU WIDER but where half precision comes in
STORED = 1e-9  # rad, a hundredth of what float32 makes of a basis that is stored


def rounding(*parts: Tensor, eps: float = FLOAT32_EPS) -> float:
    """Bound on the spectral norm of what rounding does to what was computed from these activations of precision eps."""
    return ROUNDING / FLOAT32_EPS * eps * sum(float(x.double().square().sum()) for x in parts) ** 0.5


@dataclass(frozen=True)
class Noise:
    """What may be wrong with a matrix: `norm`, a bound on the spectral norm of any noise; `sigma`, standard deviation of
    noise that is independent from entry to entry; `rows`, the same of a row as a whole, relative; most: the turn in rad
    above which a basis is flagged."""

    norm: float = 0.0
    sigma: float = 0.0
    rows: float = 0.0
    most: float = MOST_TURN

    @property
    def needs_all(self) -> bool:
        """Whether a turn depends on all singular values, not on those around the cut alone."""
        return self.sigma > 0

    def hides(self, G: Float[Tensor, "d d"], k: int) -> Callable[[Float[Tensor, " q"]], float] | None:
        """By how many rad the first k eigenvectors of a Gram may be off, given its eigenvalues: SHARE of what this noise turns
        them by, and always what is lost anyway where a basis is stored in float32. None where exact ones take no more time."""
        d = len(G)
        if d < (WIDE if self.most > MOST_TURN or G.device.type != "cpu" else WIDER):
            return None
        return lambda values: min(max(SHARE * self.turn(values.clamp(min=0).sqrt(), k, d), STORED), MOST_OFF)

    def turn(self, s: Float[Tensor, " q"], k: int, d: int) -> float:
        """Bound in rad, at most 1, on the turn of the first k of d singular directions. s: k values, and one past the cut
        where there is one; all values, for `sigma` and `rows`."""
        distance = abs(float(s[k - 1] - s[k])) if len(s) > k else float(s[k - 1])
        if distance == 0:
            return 1.0
        if not self.sigma:
            return min(self.norm / distance, 1.0)
        square = torch.nn.functional.pad(s.double().square(), (0, d - len(s)))
        inside, outside = square[:k, None], square[None, k:]
        both = inside + outside
        wrong = self.sigma**2 * both + 2 / d * self.rows**2 * both.square()
        return min(self.norm / distance + float((wrong / (inside - outside).square()).sum()) ** 0.5, 1.0)


NONE = Noise()


def as_noise(noise: float | Noise) -> Noise:
    return noise if isinstance(noise, Noise) else Noise(noise)
