"""What the last bit decides: scores of ill-conditioned v7 candidates, and of their v7b forms, under rounding.

Another instruction set or thread count changes float32 results in their last bits. First the scores are computed in
processes of their own that differ in nothing else; then the captured activations and the weights' copies are changed by
one part in 1e7, a few times. Printed is the spread (max - min) / mean of R_act and R_w, the largest over layers. Run:
`just bench rounding`.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import polars as pl
import torch

import ws
from ws.model.lm import LM
from ws.subspaces import from_weights, kept
from ws.subspaces.captures import BaseCaptures

PARITY = Path(__file__).resolve().parents[1] / "tests" / "data" / "parity"
NAMES = ["rotation_contrast", "rotation_cut", "attention_sink", "attention_sink_cut", "chars_clusters",
         "chars_clusters_cut", "TaskDiff_contrast", "write"]  # fmt: skip
DRAWS, NOISE = 8, 1e-7


def jittered(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return x * (1 + NOISE * torch.randn(x.shape, generator=g, dtype=x.dtype))


Values = dict[str, torch.Tensor]  # candidate -> (layers, 2): R_act, R_w
HERE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
OLD = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OPENBLAS_CORETYPE": "Nehalem"}
TWO = dict.fromkeys(HERE, "2")
MACHINES = [HERE, TWO, {**HERE, **OLD}, {**TWO, **OLD}]


def reference_model() -> LM:
    """The reference model; without a fingerprint nothing of it is kept."""
    return replace(ws.load_lm(str(PARITY / "model"), "float32", "cpu"), fingerprint="")


def values(lm: LM) -> Values:
    """R_act and R_w of each candidate by layer, by the one score path."""
    with tempfile.TemporaryDirectory() as cache:
        asked = {"protocol": "v7", "candidates": NAMES, "cache": Path(cache), "progress": False}
        found = ws.explain(lm, PARITY / "w.pt", PARITY / "behavior.json", **asked)
    rows = found.per_layer.filter(pl.col("layer").is_in(found.layers))
    part = {name: rows.filter(pl.col("subspace") == name).sort("layer") for name in NAMES}
    return {name: torch.tensor(p.select("conc_act", "conc_w_combined").rows()) for name, p in part.items()}


def by_machine() -> list[Values]:
    """The scores under each of MACHINES' settings, a process each."""
    found = []
    for machine in MACHINES:
        command = [sys.executable, __file__, "--once"]
        told = subprocess.run(command, env={**os.environ, **machine}, capture_output=True, text=True, check=True).stdout
        found.append({name: torch.tensor(rows) for name, rows in json.loads(told.splitlines()[-1]).items()})
    return found


def by_noise() -> list[Values]:
    """The scores under relative noise on what the bases are built from."""
    lm, g = reference_model(), torch.Generator().manual_seed(0)
    writes, capture = from_weights._sink_writes, kept.capture_base

    def noisy(*args, **more) -> BaseCaptures:
        base = capture(*args, **more)
        clean, pos, neg = (replace(a, resid=jittered(a.resid, g)) for a in (base.clean, base.pos, base.neg))
        return replace(base, clean=clean, pos=pos, neg=neg)

    from_weights._sink_writes = lambda m, l: jittered(writes(m, l), g)
    kept.capture_base = noisy
    try:
        return [values(lm) for _ in range(DRAWS)]
    finally:
        from_weights._sink_writes, kept.capture_base = writes, capture


def show(title: str, found: list[Values]) -> None:
    print(f"\n{title}\n{'candidate':22} {'R_act':>10} {'R_w':>10}   spread, worst layer")
    for name in NAMES:
        t = torch.stack([values[name] for values in found])
        spread = ((t.amax(dim=0) - t.amin(dim=0)) / t.mean(dim=0)).amax(dim=0)
        print(f"{name:22} {100 * spread[0]:9.3g}% {100 * spread[1]:9.3g}%")


def main() -> None:
    if "--once" in sys.argv:
        print(json.dumps({name: rows.tolist() for name, rows in values(reference_model()).items()}))
        return
    show("one or two threads, this processor's instructions or SSE's", by_machine())
    show(f"noise of one part in {1 / NOISE:.0e}, {DRAWS} draws", by_noise())


if __name__ == "__main__":
    main()
