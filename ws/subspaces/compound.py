"""Candidates composed of others, and the random reference. (docs/method.md sections 5 and 7)"""

import zlib

import torch

from ws.subspaces.algebra import Basis, bisector, random_basis, union
from ws.subspaces.candidate import candidate
from ws.subspaces.materials import Materials

PERSONAS = ("weights", "prompts", "personas")


@candidate(family="compound", source="external-v6-plan", sees=PERSONAS)
def qk_x_chars_clusters(m: Materials, l: int) -> Basis:
    """Bisector of qk_circuit and chars_clusters."""
    return bisector(m.of("qk_circuit", l), m.of("chars_clusters", l), m.k)


@candidate(name="WNR_union_TaskDiff", family="compound", source="v5", sees=PERSONAS)
def wnr_union_task_diff(m: Materials, l: int) -> Basis:
    """Union of write_not_downstream_read and TaskDiff_contrast (rank up to 16)."""
    return union(m.of("write_not_downstream_read", l), m.of("TaskDiff_contrast", l))


@candidate(family="control", source="v7b")
def random_orthogonal(m: Materials, l: int) -> Basis:
    """A uniformly random subspace of rank 8, drawn with a seed that depends on the layer alone: expected score 1."""
    seed = zlib.crc32(f"random_orthogonal/{l}".encode())
    return random_basis(m.d, m.k, torch.Generator().manual_seed(seed))
