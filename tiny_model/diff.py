"""The shipped example of a weight difference: the demo's seed 0, its strongest 16 directions per matrix.

`python -m tiny_model.diff`, after `just demo`, writes `ws/assets/tiny_w.safetensors`.
"""

from ws.cache.names import RunId
from ws.cache.places import ASSETS
from ws.diff import LowRank, WeightDiff, load_diff, save_diff

RANK = 16


def truncated(w: WeightDiff, rank: int = RANK) -> WeightDiff:
    """The best approximation of each matrix at `rank`, with the share of |w|^2 that is left in the metadata."""
    entries = {}
    for name in w.names:
        U, s, Vh = w.svd(name)
        entries[name] = LowRank((U[:, :rank] * s[:rank]).float().contiguous(), Vh[:rank].float().contiguous())
    short = WeightDiff(entries, w.meta)
    share = (short.total_norm() / w.total_norm()) ** 2
    return WeightDiff(entries, {**w.meta, "cut": f"rank {rank} per matrix, {100 * share:.1f} % of |w|^2"})


if __name__ == "__main__":
    full = load_diff(RunId("tiny", "sycophancy", "lora", 0).folder() / "w.safetensors")
    print(save_diff(truncated(full), ASSETS / "tiny_w.safetensors"))
