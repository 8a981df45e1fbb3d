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
from dataclasses import replace
from pathlib import Path

import torch

from ws.data import load_behavior
from ws.diff import load_diff
from ws.explanation.scores import ZERO, activation_target, score, weight_targets
from ws.model.lm import load_lm
from ws.subspaces.build import weights as weight_candidates
from ws.subspaces.captures import BaseCaptures, capture_base, capture_steered
from ws.subspaces.materials import CeilingMaterials, Materials
from ws.subspaces.protocol import load_protocol

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


class Reference:
    """The reference model with its captures and targets."""

    def __init__(self) -> None:
        self.lm = load_lm(str(PARITY / "model"), "float32", "cpu")
        behavior, w, protocol = load_behavior(PARITY / "behavior.json"), load_diff(PARITY / "w.pt"), load_protocol("v7")
        self.base = capture_base(self.lm, behavior, protocol)
        b_side = CeilingMaterials(self.lm.decoder, w, capture_steered(self.lm, behavior, w, protocol))
        self.layers = w.layers()
        self.act = {l: activation_target(b_side.steered.eval[l]) for l in self.layers}
        factors = {l: (b_side.left_factor(l, "o"), b_side.left_factor(l, "down")) for l in self.layers}
        self.weight = {l: weight_targets(*factors[l])["combined"] for l in self.layers}

    def values(self, base: BaseCaptures) -> Values:
        m = Materials(self.lm.decoder, base, self.lm.decoder.sink_token(self.lm.tokenizer))
        bases = {name: [(l, m.of(name, l).B) for l in self.layers] for name in NAMES}
        return {
            name: torch.tensor([[score(self.act[l], B, ZERO).conc, score(self.weight[l], B).conc] for l, B in rows])
            for name, rows in bases.items()
        }


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
    reference, g = Reference(), torch.Generator().manual_seed(0)
    plain, found = weight_candidates._sink_writes, []
    weight_candidates._sink_writes = lambda m, l: jittered(plain(m, l), g)
    for _ in range(DRAWS):
        base = reference.base
        clean, pos, neg = (replace(a, resid=jittered(a.resid, g)) for a in (base.clean, base.pos, base.neg))
        found.append(reference.values(replace(base, clean=clean, pos=pos, neg=neg)))
    weight_candidates._sink_writes = plain
    return found


def show(title: str, found: list[Values]) -> None:
    print(f"\n{title}\n{'candidate':22} {'R_act':>10} {'R_w':>10}   spread, worst layer")
    for name in NAMES:
        t = torch.stack([values[name] for values in found])
        spread = ((t.amax(dim=0) - t.amin(dim=0)) / t.mean(dim=0)).amax(dim=0)
        print(f"{name:22} {100 * spread[0]:9.3g}% {100 * spread[1]:9.3g}%")


def main() -> None:
    if "--once" in sys.argv:
        reference = Reference()
        print(json.dumps({name: rows.tolist() for name, rows in reference.values(reference.base).items()}))
        return
    show("one or two threads, this processor's instructions or SSE's", by_machine())
    show(f"noise of one part in {1 / NOISE:.0e}, {DRAWS} draws", by_noise())


if __name__ == "__main__":
    main()
