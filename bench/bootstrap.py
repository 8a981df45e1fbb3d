"""Crossed bootstrap of 60 candidates x 10 seeds at BOOT = 20,000: seconds, and the ratio to a textbook loop.

.venv/bin/python bench/bootstrap.py
"""

import time

import numpy as np
from ratios import told

from ws.stability.intervals import BOOT, crossed_bootstrap, percentile_interval

SEEDS, CANDIDATES, LAYERS, TOPICS = 10, 60, 28, 12
LOOP_DRAWS = 200  # the loop is timed on this many draws and scaled up


def textbook(act: np.ndarray, w: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """The same statistic as one would first write it: index arrays, one draw and one candidate at a time."""
    generator = np.random.default_rng(seed)
    S, C, _, n = act.shape
    out = np.empty((draws, C))
    for b in range(draws):
        seeds, topics = generator.integers(0, S, S), generator.integers(0, n, n)
        for c in range(C):
            logs = [0.5 * (np.log(act[s, c][:, topics].mean()) + np.log(w[s, c].mean())) for s in seeds]
            out[b, c] = np.mean(logs)
    return out


def main() -> None:
    generator = np.random.default_rng(0)
    act = np.exp(0.5 * generator.standard_normal((SEEDS, CANDIDATES, LAYERS, TOPICS)))
    w = np.exp(0.3 * generator.standard_normal((SEEDS, CANDIDATES, LAYERS)))

    start = time.perf_counter()
    weight = {"R_w": w.mean(axis=2), "H_w": w.mean(axis=2) / 2}
    draws = crossed_bootstrap(act, 2 * act, weight, templates=1, seed=0, boot=BOOT)
    for values in draws.values():
        percentile_interval(values)
    fast = time.perf_counter() - start

    start = time.perf_counter()
    loop = textbook(act, w, LOOP_DRAWS, seed=1)
    slow = (time.perf_counter() - start) * BOOT / LOOP_DRAWS

    agree = np.abs(loop.std(axis=0) / draws["joint"].std(axis=0) - 1).mean()
    print(f"crossed bootstrap, {CANDIDATES} candidates x {SEEDS} seeds x {TOPICS} topics, BOOT = {BOOT}")
    print(f"  here      {fast:8.2f} s (four scores and their percentiles)")
    print(f"  textbook  {slow:8.1f} s (joint only; from {LOOP_DRAWS} draws)")
    print(f"  ratio     {told('crossed bootstrap', slow, fast):8.1f}   mean relative difference of the sds {agree:.3f}")


if __name__ == "__main__":
    main()
