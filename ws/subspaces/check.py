"""What a basis has to be: checked as it is made."""

import warnings

import torch
from torch import Tensor

from ws.subspaces.algebra import Basis, orthonormalize


def as_basis(value: object, d: int, label: str) -> Basis:
    """A checked basis from what a candidate returned: a `Basis`, or a `(d, r)` tensor, which is made orthonormal if it
    is not (with a warning). ValueError naming `label` for another type or size, or entries that are not finite."""
    if isinstance(value, Tensor):
        finite = "" if torch.isfinite(value).all() else ", with entries that are not finite"
        if value.ndim != 2 or len(value) != d or finite:
            raise ValueError(f"{label}: a (d, r) tensor with d = {d} is needed, this is {tuple(value.shape)}{finite}")
        B = value.detach().float().cpu()
        if skew(B) > 1e-3:
            warnings.warn(f"{label}: columns are not orthonormal; their span is used", stacklevel=2)
            B = orthonormalize(B / B.norm(dim=0).clamp_min(1e-30))  # a small column counts like a large one
        value = Basis(B, note="" if B.shape[1] else "empty")
    if not isinstance(value, Basis):
        raise ValueError(f"{label}: a Basis or a (d, r) tensor is needed, this is a {type(value).__name__}")
    check_basis(value, d, label)
    return value


def check_basis(basis: Basis, d: int, label: str) -> None:
    """Raise ValueError naming `label` unless the basis lives in R^d with `max |B^T B - I| <= 1e-3`."""
    B = basis.B
    if B.shape[0] != d:
        raise ValueError(f"{label}: basis is {B.shape[0]} wide, the model {d}")
    if not torch.isfinite(B).all():
        raise ValueError(f"{label}: basis holds NaN or infinite entries")
    if skew(B) > 1e-3:
        raise ValueError(f"{label}: basis is not orthonormal, max |B^T B - I| = {skew(B):.2g}")


def skew(B: Tensor) -> float:
    """`max |B^T B - I|`, 0 without columns."""
    return float((B.T @ B - torch.eye(B.shape[1])).abs().max()) if B.shape[1] else 0.0
