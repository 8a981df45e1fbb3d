"""What depends on no theta and no head: the base's log-probabilities of recorded states, in memory or on disk. docs/method.md
section 10."""

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ws.theta.cumulants import MAPPED

TOKENS = 256  # per block of what goes to disk; twice as many in memory
BASE_MB = 512  # recorded base logits larger than this go to disk, memory-mapped


@dataclass(frozen=True, eq=False)
class Base:
    """What depends on no theta and no head: states, targets, and the base's log-softmax, float32 (perhaps a memory map), also of
    the targets alone."""

    logp: Float[Tensor, "T V"]
    y: Int[Tensor, " T"]
    h: Float[Tensor, "T d"]
    of_y: Float[Tensor, " T"]


def record_base(
    h: Float[Tensor, "T d"], y: Int[Tensor, " T"], W: Float[Tensor, "V d"], bias: Float[Tensor, " V"] | None = None
) -> Base:
    """Base log-probabilities of recorded hidden states, computed once in blocks of tokens. Above BASE_MB the `(T, V)`
    array lies in an unnamed temporary file that vanishes with the process. Raises ValueError when a target is outside
    the vocabulary or something is not finite."""
    T, V = h.shape[0], W.shape[0]
    if T == 0:
        raise ValueError("no tokens to fit: every position is masked out")
    if y.shape[0] != T:
        raise ValueError(f"{T} hidden states but {y.shape[0]} targets")
    if int(y.min()) < 0 or int(y.max()) >= V:
        raise ValueError(f"a target token ({int(y.min())}..{int(y.max())}) is outside the vocabulary of {V}")
    large = T * V * 4 > BASE_MB * 2**20
    logp = None if large else torch.empty(T, V, dtype=torch.float32, device=W.device)
    h, y, W = h.to(W.device).float(), y.to(W.device), W.float()
    of_y = torch.empty(T, device=W.device)
    step = TOKENS if large else 2 * TOKENS
    logits = torch.empty(min(step, T), V, device=W.device)  # written anew by each block
    found = torch.empty_like(logits) if large else None
    with tempfile.TemporaryFile() if large else nullcontext() as file:
        for start in range(0, T, step):
            part = slice(start, min(start + step, T))
            rows = slice(part.stop - start)
            z = torch.mm(h[part], W.T, out=logits[rows])
            z = z if bias is None else z.add_(bias.to(W))
            check_finite(z, f"base logits of tokens {start}..{part.stop - 1}")
            z = torch.log_softmax(z, dim=-1, out=found[rows] if large else logp[part])
            of_y[part] = z.gather(1, y[part, None])[:, 0]
            if large:
                z.cpu().numpy().tofile(file)
        if large:
            array = np.memmap(file, dtype=np.float32, mode="r+", shape=(T, V))
            logp = torch.from_numpy(array)
            MAPPED[logp] = array._mmap
    return Base(logp, y, h, of_y)


def check_finite(x: Tensor, where: str) -> None:
    """ValueError saying where, unless all entries are finite."""
    if not bool(x.sum().isfinite()) and not bool(x.isfinite().all()):  # a sum is quick, and may overflow
        raise ValueError(f"{where}: not finite ({int((~torch.isfinite(x)).sum())} of {x.numel()} entries)")
