"""A block's weights in float32 and the float64 Grams of what candidates take singular vectors of. (docs/method.md section 4)"""

import torch
from jaxtyping import Float
from torch import Tensor

from ws.model.decoder import ROLES, Decoder
from ws.model.wide import NARROW
from ws.subspaces.noise import FLOAT32_EPS, NARROW_TURN, Noise

GRAMS = {"o_gram": "o", "kv_gram": "kv", "q_gram": "q"} | {f"{r}_gram": (r,) for r in ("down", "up", "gate")}
SUMS = {
    "write_gram": ("o_gram", "down_gram"),
    "qkv_gram": ("kv_gram", "q_gram"),
    "read_gram": ("qkv_gram", "up_gram", "gate_gram"),
}
CHUNK = 8192  # columns per step of a float64 Gram: bounds the copy in float64


def left_gram(*parts: Float[Tensor, "d _"]) -> Float[Tensor, "d d"]:
    """`sum M M^T` in float64."""
    G = parts[0].new_zeros(len(parts[0]), len(parts[0]), dtype=torch.float64)
    for columns in (c for M in parts for c in M.split(CHUNK, dim=1)):
        block = columns.to(G.device).double()
        # on the CPU numpy's product of a matrix with its own transpose does half the work
        G += torch.from_numpy(block.numpy() @ block.numpy().T) if G.device.type == "cpu" else block @ block.T
    return G


class LayerWeights:
    """One block's matrices, float32, by role (`q k v o gate up down`), and Grams `M M^T` of what they are made of.

    Grams: `o_gram`, `down_gram`, their sum `write_gram`; of the transposes `kv_gram`, `qkv_gram`, `up_gram`,
    `gate_gram`, and `read_gram` = `S^T S`, `S = [q; k; v; up; gate]`. Made when first asked for; `release` lets the
    matrices go (float32 copies where the model is of lower precision) and keeps the Grams.
    """

    def __init__(self, decoder: Decoder, l: int, fold_gain: bool):
        self._decoder, self._l, self._fold = decoder, l, fold_gain

    def __getattr__(self, name: str) -> Tensor:
        if name in SUMS:
            return sum(getattr(self, part) for part in SUMS[name])
        if name in ROLES:
            made = self._decoder.weight(self._l, name)
            if self._fold and name in ("o", "down"):
                made = output_gain(self._decoder, self._l, name).to(made.device)[:, None] * made
        elif name in GRAMS:
            made = left_gram(*(getattr(self, r) if r in ("o", "down") else getattr(self, r).T for r in GRAMS[name]))
        else:
            raise AttributeError(name)
        setattr(self, name, made)
        return made

    def noise(self, gram: str) -> Noise:
        """Of what the named Gram is the Gram of."""
        gains = [output_gain(self._decoder, self._l, role) for role in ("o", "down")] if self._fold else []
        gained = gram in ("o_gram", "down_gram", "write_gram") and any((g != 1).any() for g in gains)
        return weight_noise(self._decoder, getattr(self, gram).diagonal(), self.columns(gram), gained)

    def columns(self, gram: str) -> int:
        """Number of columns of what the named Gram is the Gram of."""
        if gram in SUMS:
            return sum(map(self.columns, SUMS[gram]))
        return sum(self._decoder.linear(self._l, r).weight.shape[r in ("o", "down")] for r in GRAMS[gram])

    def release(self) -> None:
        for role in ROLES:
            self.__dict__.pop(role, None)

    def thin(self, needed: bool) -> None:
        """Let all go but, where it is needed again, `write_gram`."""
        kept = {"write_gram": self.write_gram} if needed else {}
        for name in (*ROLES, *GRAMS, "write_gram"):
            self.__dict__.pop(name, None)
        self.__dict__.update(kept)


def output_gain(decoder: Decoder, l: int, role: str) -> Float[Tensor, " d"]:
    """Gain of the norm on the output that `role` (`o` or `down`) writes; ones where there is none."""
    return decoder.norm_gain(l, "attn_out" if role == "o" else "mlp_out")


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
