"""A weight difference and its linear algebra, never forming a dense matrix where the factors do. (method section 2)

Per parameter it is kept as factors `delta = B A` (rank r <= 2 x the adapters' rank) or as the dense tensor. With
`B = Q_B R_B` and `A^T = Q_A R_A` the singular values of `BA` are those of the small matrix `R_B R_A^T = U S V^T`, its
singular vectors `Q_B U` and `Q_A V`: solved in float64, once per object.
"""

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.show.tables import facts


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

    def to(self, *where: str | torch.device | torch.dtype) -> "LowRank":
        """Both factors on a device, in a dtype, as in `Tensor.to`."""
        return LowRank(self.B.to(*where), self.A.to(*where))

    def dense(self) -> Float[Tensor, "out in_"]:
        """`B A` in float32 (in float64 where the factors are)."""
        B, A = (part if part.dtype == torch.float64 else part.float() for part in (self.B, self.A))
        return B @ A


Entry = LowRank | Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST = 1e30  # of an entry; float32 ends at 3e38, and squares are summed
DENSE_BUDGET = 2 << 30  # bytes of singular vectors of dense matrices that one object remembers
TABLE = {
    "layer": pl.Int64, "module": pl.String, "name": pl.String, "form": pl.String, "shape": pl.String,
    "norm": pl.Float64, "rank": pl.Int64, "effective_rank": pl.Float64, "top_singular_value": pl.Float64,
}  # fmt: skip


def dims(shape: Iterable[int]) -> str:
    """A shape as people write it: `128x256`."""
    return "x".join(map(str, shape)) or "scalar"


def same_names(a: Collection[str], b: Collection[str], where: str) -> None:
    """ValueError naming a parameter that only one of two sides has."""
    odd = sorted(set(a) ^ set(b))
    if odd:
        raise ValueError(f"{where}: different targets: {odd[0]} is on one side only ({len(odd)} such names)")


def parts(entry: Entry) -> tuple[Tensor, ...]:
    """The tensors that an entry holds: B and A, or itself."""
    return (entry.B, entry.A) if isinstance(entry, LowRank) else (entry,)


def layer_of(name: str) -> int | None:
    """Layer index in a parameter name: its first purely numeric part (`model.layers.2.mlp.up_proj.weight` -> 2)."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


@dataclass(frozen=True, eq=False, repr=False)
class WeightDiff(Mapping):
    """A read-only mapping: parameter name -> `w[name]`, the difference as one float32 tensor of the parameter's shape.

    entries: name -> `LowRank` or tensor, what is held. meta: base_model, behavior, adapter, seed, scale, ...; fit for
    JSON. The names are those of the base model's `named_parameters()`. Objects are not changed after they are made:
    every operation returns a new one, and two are equal only when they are one object. What was decomposed once is
    remembered; tensors that come from it are shared, not to be written to. An unknown name is a KeyError.

    Examples:
        >>> import torch, ws
        >>> from ws.diff import LowRank
        >>> name, entry = "model.layers.1.mlp.down_proj.weight", LowRank(torch.randn(4, 2), torch.randn(2, 6))
        >>> w = ws.WeightDiff({name: entry, "b": torch.ones(4)}, {"seed": 0})
        >>> w
        WeightDiff: 2 parameters (1 low-rank, 1 dense), layers 1 to 1
          seed 0
        >>> len(w), name in w, tuple(w[name].shape), w.rank(name), w.norm("b")
        (2, True, (4, 6), 2, 2.0)
    """

    entries: dict[str, Entry]
    meta: dict = field(default_factory=dict)

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entry(name)
        return (entry.dense() if isinstance(entry, LowRank) else entry).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __reduce__(self) -> tuple:
        return WeightDiff, (self.entries, self.meta)

    def __repr__(self) -> str:
        known = [(key, self.meta.get(key)) for key in ("base_model", "behavior", "adapter", "seed")]
        about = ", ".join(f"{key} {value}" for key, value in known if value not in (None, ""))
        low, layers = sum(not self._is_dense(name) for name in self), self.layers()
        span = f"layers {layers[0]} to {layers[-1]}" if layers else "no layers"
        held = f"{len(self)} parameters ({low} low-rank, {len(self) - low} dense)"
        return f"WeightDiff: {held}, {span}" + (f"\n  {about}" if about else "")

    def _repr_html_(self) -> str:
        low, layers = sum(not self._is_dense(name) for name in self), self.layers()
        about = {
            "parameters": f"{len(self)} ({low} low-rank, {len(self) - low} dense)",
            "norm": f"{self.total_norm():.4g}",
        }
        about |= {"layers": ", ".join(map(str, layers)) or "none"}
        about |= {
            key: value for key, value in self.meta.items() if isinstance(value, str | int | float) and value != ""
        }
        return facts("WeightDiff", about)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    def layers(self) -> list[int]:
        """Sorted layer indices found in the names."""
        return sorted({l for l in map(layer_of, self.names) if l is not None})

    @property
    def in_blocks(self) -> bool:
        """Whether every parameter is of a decoder's block: none that embeds, unembeds or comes last."""
        return all(layer_of(name) is not None for name in self.names)

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            near = ", ".join(difflib.get_close_matches(str(name), self.entries, 3)) or "none"
            raise KeyError(f"{name}: not in this weight diff of {len(self)} parameters; near names: {near}")
        return self.entries[name]

    def _is_dense(self, name: str) -> bool:
        return not isinstance(self._entry(name), LowRank)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name).shape)

    def rank(self, name: str) -> int:
        """A bound of the rank: number of factor columns, or a dense matrix's smaller dimension (1 for a vector)."""
        entry = self._entry(name)
        return entry.rank if isinstance(entry, LowRank) else min(entry.shape) if entry.ndim > 1 else 1

    dense = __getitem__

    @cached_property
    def fingerprint(self) -> str:
        """Content hash, 32 hex digits, of names, forms, shapes, dtypes and all bytes; order and metadata do not count."""
        digest = hashlib.blake2b(digest_size=16)
        for name, entry in sorted(self.entries.items()):
            for part in parts(entry):
                digest.update(repr((name, self._is_dense(name), tuple(part.shape), str(part.dtype))).encode())
                digest.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @cached_property
    def _memory(self) -> dict[str, tuple[Tensor | None, Tensor, Tensor | None]]:
        """Name -> what `svd` found; without U and Vh where the budget for dense ones ran out."""
        return {}

    @cached_property
    def derived(self) -> dict[tuple, object]:
        """What others have worked out from this difference alone, by what it is; lives as long as the object."""
        return {}

    def svd(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """`U (out, r)`, `s (r,)` in descending order, `Vh (r, in)` in float64, from the factors where there are any. r
        is the bound of the rank; a vector is one column. Decomposed once per object: U and Vh of dense matrices are
        remembered up to `DENSE_BUDGET` bytes, the oldest dropped, all else for good. ValueError for other shapes."""
        known = self._memory.get(name)
        if known is not None and known[0] is not None:
            return known
        found = _svd(name, self._entry(name))
        self._memory.pop(name, None)
        self._memory[name] = found
        dense = {n: U.nbytes + V.nbytes for n, (U, _, V) in self._memory.items() if U is not None and self._is_dense(n)}
        while sum(dense.values()) > DENSE_BUDGET:
            oldest = next(iter(dense))
            del dense[oldest]
            self._memory[oldest] = (None, self._memory[oldest][1], None)
        return found

    def singular_values(self, name: str) -> Float[Tensor, " r"]:
        """Singular values in descending order, float64: as many as the bound of the rank."""
        return self._memory[name][1] if name in self._memory else self.svd(name)[1]

    def norm(self, name: str) -> float:
        """Frobenius norm, from the factors."""
        values = self._entry(name).double() if self._is_dense(name) else self.singular_values(name)
        return float(torch.linalg.vector_norm(values))

    def total_norm(self) -> float:
        """Frobenius norm over all parameters together."""
        return sum(self.norm(name) ** 2 for name in self.names) ** 0.5

    def effective_rank(self, name: str) -> float:
        """`exp(-sum p log p)` with `p = s^2 / sum s^2` (p > 1e-12); 0 for a zero matrix."""
        energy = self.singular_values(name).square()
        p = energy / energy.sum()
        p = p[p > 1e-12]
        return float(torch.exp(-(p * p.log()).sum())) if energy.any() else 0.0

    def table(self) -> pl.DataFrame:
        """One row per parameter: the columns of `TABLE`; rank (a bound) and spectrum null unless matrix or vector."""
        rows = []
        for name, entry in self.entries.items():
            row = {"layer": layer_of(name), "module": name.removesuffix(".weight").rpartition(".")[2], "name": name}
            row["form"] = "dense" if self._is_dense(name) else "low-rank"
            row |= {"shape": dims(entry.shape), "norm": self.norm(name)}
            if len(entry.shape) in (1, 2):
                row |= {"rank": self.rank(name), "effective_rank": self.effective_rank(name)}
                row["top_singular_value"] = max(self.singular_values(name).tolist(), default=0.0)
            rows.append(row)
        return pl.DataFrame(rows, schema=TABLE)

    def scale(self, c: float | int) -> "WeightDiff":
        """`c w`."""
        return self.map(lambda _, e: LowRank(e.B * c, e.A) if isinstance(e, LowRank) else e * c)

    def map(self, change: Callable[[str, Entry], Entry]) -> "WeightDiff":
        """The same names with `change(name, entry)` as entries, same metadata."""
        return replace(self, entries={name: change(name, entry) for name, entry in self.entries.items()})

    def select(self, keep: Callable[[str], bool]) -> "WeightDiff":
        """Only the parameters whose name satisfies `keep`."""
        return replace(self, entries={name: entry for name, entry in self.entries.items() if keep(name)})


def _svd(name: str, entry: Entry) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(entry, LowRank):
        Q_B, R_B = torch.linalg.qr(entry.B.double())
        Q_A, R_A = torch.linalg.qr(entry.A.double().T)
        U, s, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        return Q_B @ U, s, Vh @ Q_A.T
    if entry.ndim not in (1, 2):
        raise ValueError(f"{name}: {dims(entry.shape)} is not a matrix")
    return torch.linalg.svd(entry.reshape(len(entry), -1).double(), full_matrices=False)


def check_entries(entries: dict[str, Entry], source: str) -> None:
    """ValueError naming the parameter when an entry is not floating point, is empty, holds NaN, inf or a product that
    float32 does not, or when its layer's number is beyond any model's."""
    if not entries:
        raise ValueError(f"{source}: no tensors")
    for name, entry in entries.items():
        if re.search(r"\d{6}", name):
            raise ValueError(f"{source}: {name[:60]!r}: no model has such a parameter")
        largest = float(entry.rank) if isinstance(entry, LowRank) else 1.0
        for part in parts(entry):
            if part.dtype not in FLOATS:
                raise ValueError(f"{source}: {name} has dtype {part.dtype}, expected floating point")
            if part.numel() == 0 and not isinstance(entry, LowRank):
                raise ValueError(f"{source}: {name} is empty ({dims(part.shape)})")
            size = max(abs(float(x)) for x in torch.aminmax(part)) if part.numel() else 0.0
            if not math.isfinite(size):
                raise ValueError(f"{source}: {name} contains NaN or inf")
            largest *= size
        if largest > LARGEST:
            raise ValueError(
                f"{source}: {name} holds numbers up to {largest:.1g}; more than {LARGEST:.0e} is no difference"
            )
