"""Delta SVD: seconds per layer against full float32 SVD, and peak memory at 4 layers against 12.

.venv/bin/python bench/delta.py [--t 2047] [--d 2048] [--repeats 3] [--no-memory]

Each memory figure is a process of its own: a random model is made in place, the peak of the resident set is reset, the
whole run follows. Memory needs Linux (/proc).
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from ratios import told

from ws.delta.bootstrap import bootstrap, bootstrap_weights, group_parts, sketch_basis
from ws.delta.measure import delta_svd
from ws.delta.spectrum import Spectrum, eff_rank, spectrum

LAYERS = (4, 12)
TOKENS, WIDTH = 2048, 2048


def textbook_numpy(delta: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Full float32 SVD of the update, as one would first write it."""
    _, s, vt = np.linalg.svd(delta.numpy(), full_matrices=False)
    return s, vt[:k]


def textbook_torch(delta: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    _, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return s.numpy(), vt[:k].numpy()


def update(t: int, d: int) -> torch.Tensor:
    """Random rows with a power-law spectrum, as the updates of a block have it."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d + 1) ** -0.7
    return torch.randn(t, d, generator=generator) * scale @ torch.linalg.qr(torch.randn(d, d, generator=generator))[0]


def best_of(repeats: int, run: Callable) -> tuple[float, object]:
    """Least seconds of `repeats` runs, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return min(times), result


def speed(t: int, d: int, repeats: int) -> None:
    delta = update(t, d)
    spectrum(delta[:200], 8)
    ours, found = best_of(repeats, lambda: spectrum(delta, 8))
    print(f"T {t}, d {d}, {torch.get_num_threads()} threads, best of {repeats}")
    print(f"Gram, all eigenvalues, top 8 directions : {ours:6.2f} s")
    for name, textbook in (("numpy", textbook_numpy), ("torch", textbook_torch)):
        seconds, (s, v) = best_of(repeats, lambda textbook=textbook: textbook(delta, 8))
        ratio = told(f"full SVD, {name}", seconds, ours)
        print(f"full float32 SVD, {name:22s}: {seconds:6.2f} s   ratio {ratio:.2f}   {_deviation(found, s, v)}")
    group = torch.arange(t) * 30 // t
    weights = bootstrap_weights(30, 200, 0)
    seconds, _ = best_of(
        repeats, lambda: bootstrap(found, group_parts(delta, sketch_basis(delta), group, 30, True), weights)
    )
    print(f"bootstrap, 200 draws over 30 passages   : {seconds:6.2f} s more")


def _deviation(found: Spectrum, s: np.ndarray, v: np.ndarray) -> str:
    """Largest relative deviation of the singular values reported and of eff_rank, and largest angle of a direction."""
    shares = s.astype(np.float64) ** 2 / (s.astype(np.float64) ** 2).sum()
    values = np.abs(found.singvals[:8] / s[:8] - 1).max()
    rank = abs(eff_rank(found.shares) / eff_rank(shares) - 1)
    mine, theirs = (
        x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (found.directions.numpy(), v)
    )
    angle = np.linalg.norm(theirs - (mine * theirs).sum(axis=1, keepdims=True) * mine, axis=1).max()
    assert max(values, rank, angle) < 1e-4, "the spectra differ"
    return f"largest deviation: s {values:.0e}, eff_rank {rank:.0e}, direction {angle:.0e} rad"


class Bytes:
    """A tokenizer of bytes."""

    is_fast = False

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def memory(n_layers: int) -> None:
    """Print MiB of the peak above the model, and the seconds, of one run over `TOKENS` tokens."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    from ws.model.decoder import Decoder
    from ws.model.lm import LM

    config = Qwen3Config(
        hidden_size=WIDTH,
        num_hidden_layers=n_layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=WIDTH,
        vocab_size=256,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    lm = LM(model, Bytes(), Decoder(model), "random")
    texts = [f"Passage {i}. " + "".join(chr(32 + (i * j * j) % 90) for j in range(80)) for i in range(30)]
    delta_svd(lm, texts, max_length=64, progress=False)  # libraries and their buffers are there before the count begins
    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")  # resets the peak of the resident set
    before = _status("VmRSS")
    start = time.perf_counter()
    run = delta_svd(lm, texts, max_length=TOKENS, progress=False)
    seconds = time.perf_counter() - start
    assert run.n_calib_tokens == TOKENS
    print(f"{_status('VmHWM') - before:.1f} {before:.1f} {seconds:.1f}")


def _status(key: str) -> float:
    """A line of /proc/self/status in MiB."""
    with open("/proc/self/status") as handle:
        return next(int(line.split()[1]) / 1024 for line in handle if line.startswith(key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--t", type=int, default=2047)
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", type=int, default=0, help="layers of the one model to measure, in this process")
    options = parser.parse_args()
    if options.memory_of:
        memory(options.memory_of)
        return
    speed(options.t, options.d, options.repeats)
    if options.no_memory:
        return
    print(f"\nwhole run, {TOKENS} tokens, d {WIDTH}, float32, one process each")
    # glibc keeps freed blocks of up to 32 MB; with a low threshold the peak is what the run holds, not what was left over
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    peaks = []
    for n_layers in LAYERS:
        command = [sys.executable, __file__, "--memory-of", str(n_layers)]
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.split()
        peak, model, seconds = map(float, out[-3:])
        states = (n_layers + 1) * TOKENS * WIDTH * 4 / 2**20
        print(
            f"{n_layers:3d} layers: peak {peak:6.0f} MiB above {model:.0f} MiB with the model, {seconds:.0f} s"
            f" (all hidden states alone would be {states:.0f} MiB)"
        )
        peaks.append(peak)
    print(f"ratio {LAYERS[1]} / {LAYERS[0]} layers: {peaks[1] / peaks[0]:.2f}")


if __name__ == "__main__":
    main()
