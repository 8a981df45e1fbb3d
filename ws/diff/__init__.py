"""Weight diffs: `w = theta_pos - theta_neg`, exactly, from whatever holds the two sides. (docs/method.md section 2) For
a LoRA pair `w = s (B+ A+ - B- A-)` is kept as the factors `([s B+, -s B-], [A+; A-])` of rank <= 2r, in float32, so no
rounding of merged weights enters. This module is the front door to the other modules of the package."""

from pathlib import Path

from ws.cache.made import verified
from ws.diff.algebra import dot, geometry, project
from ws.diff.build import Base, balanced_diff, from_adapters, task_vectors
from ws.diff.check import located
from ws.diff.checkpoints import from_checkpoints
from ws.diff.core import LowRank, WeightDiff
from ws.diff.io import describe, export_adapter, read_diff, save_diff

__all__ = [
    "LowRank", "WeightDiff", "balanced_diff", "describe", "dot", "export_adapter", "from_adapters", "from_checkpoints",
    "geometry", "load_diff", "project", "save_diff", "task_vectors",
]  # fmt: skip


def load_diff(source: WeightDiff | Path | str | tuple | list, base: Base = None) -> WeightDiff:
    """A weight diff from any supported form.

    source: one file (this project's `.safetensors`, a dense `.safetensors`, a legacy `w.pt`), a run folder that holds
    `w.safetensors`, `tiny` (the shipped model's), a pair (pos, neg) of PEFT adapter folders or of full checkpoints
    (folder or `.safetensors`), or a `WeightDiff`, which is given back as it is. base: for adapters that must be merged
    (DoRA and other non-LoRA types), the base as a module or a path; by default the one that the adapters name. Raises
    FileNotFoundError / ValueError naming what is wrong.

    Examples:
        >>> import ws
        >>> w = ws.load_diff("tiny")
        >>> len(w), w.layers(), tuple(w["model.layers.3.mlp.down_proj.weight"].shape)
        (28, [2, 3, 4, 5], (128, 320))
    """
    if isinstance(source, WeightDiff):
        return source
    kind, paths = located(source)
    if kind == "file":
        return read_diff(verified(*paths))
    return from_adapters(*paths, base) if kind == "adapters" else from_checkpoints(*paths)
