"""Blind copies at the size of SmolLM2-135M: seconds for 10,000 draws, and the ratio to one rotation per draw and candidate.

60 candidates, 3 seeds, 15 LoRA layers, d 576; factors as steep as a trained w's (singular values falling as 1/i) and, as the
worst case, as flat as i^-0.6. The textbook form is timed on a few draws and scaled up.

.venv/bin/python bench/blind.py
"""

import sys
import time
from pathlib import Path

import torch
from ratios import told

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.calibration import World, plain_scores, simulated
from ws.stability.blind import blind_scores, haar

D, SEEDS, LAYERS, CANDIDATES, DRAWS = 576, 3, 15, 60, 10_000
PLAIN = 2  # draws of the textbook form


def seconds(world: World, draws: int) -> float:
    start = time.perf_counter()
    blind_scores(world.geometry, draws, 0)
    return time.perf_counter() - start


def textbook(world: World) -> float:
    """Seconds per draw: a rotation, then every candidate at every layer on every seed's whole targets."""
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for _ in range(PLAIN):
        plain_scores(world, haar(D, generator).double())
    return (time.perf_counter() - start) / PLAIN


def main() -> None:
    print(
        f"d {D}, {CANDIDATES} candidates, {SEEDS} seeds, {LAYERS} layers, {DRAWS:,} draws, {torch.get_num_threads()} threads"
    )
    for power in (-1.0, -0.6):
        world = simulated(D, SEEDS, LAYERS, CANDIDATES, power=power)
        width = max(f.F.shape[1] for of_seed in world.geometry.w for f in of_seed)
        took, plain = seconds(world, DRAWS), textbook(world) * DRAWS
        ratio = told(f"blind copies, i^{power:g}", plain, took)
        print(
            f"singular values as i^{power:g} ({width} columns of a seed's w kept): {took:.0f} s; textbook {plain:,.0f} s"
            f" (scaled from {PLAIN} draws); {ratio:.0f} times faster",
            flush=True,
        )


if __name__ == "__main__":
    main()
