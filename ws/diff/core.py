"""A weight difference and its linear algebra, never forming a dense matrix where the factors do.

`w = theta_pos - theta_neg` is kept per parameter, either as factors `delta = B A` (rank r <= 2 x the adapters' rank) or
as the dense tensor. With `B = Q_B R_B` and `A^T = Q_A R_A`: `|BA| = |R_B R_A^T|`, the singular values of `BA` are those
of the small matrix `R_B R_A^T = U S V^T`, its left singular vectors are `Q_B U`, and `(BA)(BA)^T = B (A A^T) B^T`.
The small problems are solved in float64. (docs/method.md section 2)
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """`delta = B @ A`, with `B` of shape (out, r) and `A` of shape (r, in), one dtype and device."""

    B: Tensor
    A: Tensor

    def __post_init__(self):
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"low-rank factors do not fit: B is {dims(self.B.shape)}, A is {dims(self.A.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.B.shape[0], self.A.shape[1])

    @property
    def rank(self) -> int:
        """Number of columns of B: an upper bound of the rank."""
        return self.B.shape[1]

    def dense(self) -> Float[Tensor, "out in_"]:
        """`B A` in float32 (in float64 where the factors are)."""
        return _wide(self.B) @ _wide(self.A)


Entry = LowRank | Tensor


def dims(shape: Iterable[int]) -> str:
    """A shape as people write it: `128x256`."""
    return "x".join(map(str, shape)) or "scalar"


def same_names(a: Collection[str], b: Collection[str], where: str) -> None:
    """ValueError naming a parameter that only one of two sides has."""
    odd = sorted(set(a) ^ set(b))
    if odd:
        raise ValueError(f"{where}: different targets: {odd[0]} is on one side only ({len(odd)} such names)")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def entry_to(entry: Entry, device: str | torch.device, dtype: torch.dtype | None = None) -> Entry:
    """One entry on another device, optionally in another dtype."""
    if isinstance(entry, LowRank):
        return LowRank(entry.B.to(device, dtype), entry.A.to(device, dtype))
    return entry.to(device, dtype)


def layer_of(name: str) -> int | None:
    """Layer index in a parameter name: its first purely numeric part (`model.layers.2.mlp.up_proj.weight` -> 2)."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class WeightDiff:
    """Parameter name -> `LowRank` or tensor, plus metadata (base_model, behavior, adapter, seed, scale, ...).

    The names are those of the base model's `named_parameters()`. Objects are not changed after they are made: every
    operation returns a new one. `meta` must be fit for JSON.
    """

    entries: dict[str, Entry]
    meta: dict = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    def layers(self) -> list[int]:
        """Sorted layer indices found in the names."""
        return sorted({l for l in map(layer_of, self.names) if l is not None})

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise KeyError(f"{name}: not in this weight diff of {len(self.entries)} parameters")
        return self.entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name).shape)

    def rank(self, name: str) -> int:
        """A bound of the rank: number of factor columns, or a dense matrix's smaller dimension (1 for a vector)."""
        entry = self._entry(name)
        if isinstance(entry, LowRank):
            return entry.rank
        return min(entry.shape) if entry.ndim > 1 else 1

    def dense(self, name: str) -> Tensor:
        """The parameter's difference as one float32 tensor."""
        entry = self._entry(name)
        return (entry.dense() if isinstance(entry, LowRank) else entry).float()

    def norm(self, name: str) -> float:
        """Frobenius norm, from the factors."""
        entry = self._entry(name)
        if not isinstance(entry, LowRank):
            return float(torch.linalg.vector_norm(entry.double()))
        return float(torch.linalg.matrix_norm(_core(entry)[1])) if entry.rank else 0.0

    def total_norm(self) -> float:
        """Frobenius norm over all parameters together."""
        return sum(self.norm(name) ** 2 for name in self.names) ** 0.5

    def left_gram(self, name: str, dtype: torch.dtype = torch.float64) -> Float[Tensor, "out out"]:
        """`M M^T` of one matrix, computed in `dtype`."""
        entry = self._entry(name)
        if isinstance(entry, LowRank):
            B, A = entry.B.to(dtype), entry.A.to(dtype)
            return B @ (A @ A.T) @ B.T
        M = _matrix(name, entry).to(dtype)
        return M @ M.T

    def left_vectors(self, name: str, k: int | None = None) -> Float[Tensor, "out r"]:
        """Left singular vectors, strongest first, at most `k`; float32. A low-rank entry has at most its rank."""
        U = _svd(name, self._entry(name))[0]
        return U[:, :k].float()

    def singular_values(self, name: str) -> Float[Tensor, " r"]:
        """Singular values in descending order, float64: as many as the bound of the rank."""
        return _svd(name, self._entry(name))[1]

    def effective_rank(self, name: str) -> float:
        """`exp(-sum p log p)` with `p = s^2 / sum s^2` (p > 1e-12); 0 for a zero matrix."""
        s = self.singular_values(name)
        total = float((s**2).sum())
        if total == 0:
            return 0.0
        p = s**2 / total
        p = p[p > 1e-12]
        return float(torch.exp(-(p * p.log()).sum()))

    def scale(self, c: float | int) -> "WeightDiff":
        """`c w`."""
        return self.map(lambda _, e: LowRank(e.B * c, e.A) if isinstance(e, LowRank) else e * c)

    def map(self, change: Callable[[str, Entry], Entry]) -> "WeightDiff":
        """The same names with `change(name, entry)` as entries, same metadata."""
        return replace(self, entries={name: change(name, entry) for name, entry in self.entries.items()})

    def select(self, keep: Callable[[str], bool]) -> "WeightDiff":
        """Only the parameters whose name satisfies `keep`."""
        return replace(self, entries={name: entry for name, entry in self.entries.items() if keep(name)})

    def to(self, device: str | torch.device) -> "WeightDiff":
        """On another device."""
        return self.map(lambda _, entry: entry_to(entry, device))

    def with_meta(self, meta: dict) -> "WeightDiff":
        """The same difference with `meta` laid over the metadata."""
        return replace(self, meta={**self.meta, **meta})

    def save(self, path: Path | str) -> Path:
        """Write to one `.safetensors` file, whole; see `ws.diff.io.save_diff`."""
        from ws.diff.io import save_diff

        return save_diff(self, path)

    @classmethod
    def load(cls, path: Path | str) -> "WeightDiff":
        """Read any of the file forms; see `ws.diff.io.read_diff`."""
        from ws.diff.io import read_diff

        return read_diff(path)


def _matrix(name: str, entry: Tensor) -> Tensor:
    if entry.ndim != 2:
        raise ValueError(f"{name}: {dims(entry.shape)} is not a matrix")
    return entry


def _core(entry: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """`Q_B`, `R_B R_A^T`, `Q_A` in float64: `BA = Q_B (R_B R_A^T) Q_A^T`."""
    Q_B, R_B = torch.linalg.qr(entry.B.double())
    Q_A, R_A = torch.linalg.qr(entry.A.double().T)
    return Q_B, R_B @ R_A.T, Q_A


def _svd(name: str, entry: Entry) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(entry, LowRank):
        if entry.rank == 0:
            (out, in_), zero = entry.shape, torch.float64
            return torch.zeros(out, 0, dtype=zero), torch.zeros(0, dtype=zero), torch.zeros(0, in_, dtype=zero)
        Q_B, core, Q_A = _core(entry)
        U, s, Vh = torch.linalg.svd(core, full_matrices=False)
        return Q_B @ U, s, Vh @ Q_A.T
    M = entry.reshape(-1, 1) if entry.ndim == 1 else _matrix(name, entry)
    return torch.linalg.svd(M.double(), full_matrices=False)


def entry_svd(w: WeightDiff, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """`U (out, r)`, `s (r,)`, `Vh (r, in)` of one entry in float64, from the factors."""
    return _svd(name, w._entry(name))


def check_entries(entries: dict[str, Entry], source: str) -> None:
    """ValueError naming the parameter when an entry is not floating point, is empty, or holds NaN or inf."""
    if not entries:
        raise ValueError(f"{source}: no tensors")
    for name, entry in entries.items():
        parts = (entry.B, entry.A) if isinstance(entry, LowRank) else (entry,)
        for part in parts:
            if not part.is_floating_point():
                raise ValueError(f"{source}: {name} has dtype {part.dtype}, expected floating point")
            if part.numel() == 0 and not isinstance(entry, LowRank):
                raise ValueError(f"{source}: {name} is empty ({dims(part.shape)})")
            if not torch.isfinite(part).all():
                raise ValueError(f"{source}: {name} contains NaN or inf")
