"""A block's weights in float32 and the float64 Grams of what candidates take singular vectors of. Weights in bfloat16 are off
by up to 2^-9 of themselves: their products are float32's. (docs/method.md section 4)"""

from functools import reduce
from threading import RLock

import torch
from jaxtyping import Float
from torch import Tensor

from ws.model.decoder import ROLES, Decoder
from ws.model.rounded import fast_products
from ws.model.wide import NARROW
from ws.subspaces.eigen import gram, largest, spectral_norm
from ws.subspaces.noise import FLOAT32_EPS, NARROW_TURN, Noise

GRAMS = {"o_gram": "o", "kv_gram": "kv", "q_gram": "q"} | {f"{r}_gram": (r,) for r in ("down", "up", "gate")}
SUMS = {"write_gram": ("o_gram", "down_gram"), "qkv_gram": ("kv_gram", "q_gram")}
SUMS |= {"read_gram": ("qkv_gram", "up_gram", "gate_gram")}
WRITERS = ("o", "down")
CHUNK = 8192  # columns per step of a float64 Gram: bounds the copy in float64
FEW = 1024  # the same of bfloat16: so many products are added up in float32


def left_gram(*parts: Float[Tensor, "d _"], exact: bool = False) -> Float[Tensor, "d d"]:
    """`sum M M^T` in float64; of bfloat16 (unless `exact`, for what hangs on the least eigenvalues) by products in float32, which
    are added up in float64."""
    few, where = parts[0].dtype == torch.bfloat16 and not exact, parts[0].device

    def one(M: Float[Tensor, "d _"]) -> Float[Tensor, "d d"]:
        if few:
            M = M.float()
            with fast_products(torch.get_num_threads() > 1):  # one thread: others may multiply beside it
                return (M @ M.T).double()
        return gram(M.double())

    return reduce(Tensor.add_, (one(c.to(where)) for M in parts for c in M.split(FEW if few else CHUNK, dim=1)))


class LayerWeights:
    """One block's matrices by role (`q k v o gate up down`), float32, as `o_wide` float64 (of bfloat16 float32), their
    spectral norms `o_norm`, and Grams `M M^T` of what they are made of.

    Grams: `o_gram`, `down_gram`, their sum `write_gram`; of the transposes `kv_gram`, `qkv_gram`, `up_gram`,
    `gate_gram`, and `read_gram` = `S^T S`, `S = [q; k; v; up; gate]`. Made when first asked for, by one thread at a time;
    `release` lets the matrices go and keeps the rest.
    """

    def __init__(self, decoder: Decoder, l: int, fold_gain: bool):
        self._decoder, self._l, self._fold, self._lock = decoder, l, fold_gain, RLock()

    def __getattr__(self, name: str) -> Tensor | float:
        with self._lock:
            if name not in self.__dict__:
                self.__dict__[name] = self._made(name)
            return self.__dict__[name]

    def _made(self, name: str) -> Tensor | float:
        role, _, what = name.partition("_")
        if name in SUMS:
            first, second, *rest = (getattr(self, part) for part in SUMS[name])
            return reduce(Tensor.add_, rest, first + second)
        if name in GRAMS:
            own = {r: self._decoder.linear(self._l, r).weight.detach() for r in GRAMS[name]}
            G = left_gram(*(M if r in WRITERS else M.T for r, M in own.items()))
            for r in filter(WRITERS.__contains__, GRAMS[name] if self._fold else ()):
                gain = output_gain(self._decoder, self._l, r).to(G)
                G = gain[:, None] * G * gain
            return G
        if role not in ROLES or what not in ("", "wide", "norm"):
            raise AttributeError(name)
        if what == "norm":
            own = f"{role}_gram"
            return largest(getattr(self, own)) ** 0.5 if own in GRAMS else spectral_norm(getattr(self, f"{role}_wide"))
        if what == "wide":
            made = getattr(self, role)
            return made if self._decoder.linear(self._l, role).weight.dtype == torch.bfloat16 else made.double()
        made = self._decoder.weight(self._l, role)
        if self._fold and role in WRITERS:
            made = output_gain(self._decoder, self._l, role).to(made.device)[:, None] * made
        return made

    def noise(self, gram: str) -> Noise:
        """Of what the named Gram is the Gram of."""
        gains = [output_gain(self._decoder, self._l, role) for role in WRITERS] if self._fold else []
        gained = gram in ("o_gram", "down_gram", "write_gram") and any((g != 1).any() for g in gains)
        return weight_noise(self._decoder, getattr(self, gram).diagonal(), self.columns(gram), gained)

    def columns(self, gram: str) -> int:
        """Number of columns of what the named Gram is the Gram of."""
        if gram in SUMS:
            return sum(map(self.columns, SUMS[gram]))
        return sum(self._decoder.linear(self._l, r).weight.shape[r in WRITERS] for r in GRAMS[gram])

    def release(self) -> None:
        for name in (n for role in ROLES for n in (role, f"{role}_wide")):
            self.__dict__.pop(name, None)

    def thin(self, needed: bool) -> None:
        """Let all go but, where it is needed again, `write_gram`."""
        kept = {"write_gram": self.write_gram} if needed else {}
        self.__dict__ = {name: x for name, x in self.__dict__.items() if name[0] == "_"} | kept


def output_gain(decoder: Decoder, l: int, role: str) -> Float[Tensor, " d"]:
    """Gain of the norm on the output that `role` (`o` or `down`) writes; ones where there is none."""
    return decoder.norm_gain(l, "attn_out" if role == "o" else "mlp_out")


def has_output_gains(decoder: Decoder) -> bool:
    """Whether a norm scales what any block writes: where none does, there is no gain to fold."""
    return any(bool((output_gain(decoder, l, role) != 1).any()) for l in range(decoder.n_layers) for role in WRITERS)


def weight_eps(decoder: Decoder) -> float:
    """Distance of 1 from the next number in the dtype of the blocks' weights; float32's for wider ones."""
    dtype = decoder.linear(0, "o").weight.dtype
    return torch.finfo(dtype).eps if dtype in NARROW else FLOAT32_EPS


def weight_noise(decoder: Decoder, rows: Float[Tensor, " d"], columns: int, gained: bool = False) -> Noise:
    """Of a weight matrix M whose rows have these squared norms, the diagonal of `M M^T`: none in float32. In half precision a
    weight is off by up to `eps/2` of itself, evenly, so by at most `eps / sqrt 12` of it in standard deviation; taken from
    the row of largest norm. gained: each row was multiplied by a gain, rounded alike."""
    eps = weight_eps(decoder)
    if eps <= FLOAT32_EPS:
        return Noise()
    sigma = eps * (float(rows.max()) / columns / 12) ** 0.5
    return Noise(sigma=sigma, rows=eps / 12**0.5 if gained else 0.0, most=NARROW_TURN)
