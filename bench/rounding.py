"""What the last bit decides: scores of ill-conditioned v7 candidates, and of their v7b forms, under rounding noise.

Another instruction set or thread count changes float32 results in their last bits. Here the captured activations and the
weights' copies are changed by one part in 1e7, a few times; printed is the spread (max - min) / mean of R_act and R_w
over the draws, the largest over layers. Run: `just bench rounding`.
"""

from dataclasses import replace
from pathlib import Path

import torch

from ws.activations import capture_base, capture_steered
from ws.candidates import CeilingMaterials, Materials
from ws.candidates import weights as weight_candidates
from ws.data import load_behavior
from ws.diff import load_diff
from ws.model import load_lm
from ws.protocol import load_protocol
from ws.scoring import ZERO, activation_target, score, weight_targets

PARITY = Path(__file__).resolve().parents[1] / "tests" / "data" / "parity"
NAMES = ["rotation_contrast", "rotation_cut", "attention_sink", "attention_sink_cut", "chars_clusters",
         "chars_clusters_cut", "TaskDiff_contrast", "write"]  # fmt: skip
DRAWS, NOISE = 8, 1e-7


def jittered(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return x * (1 + NOISE * torch.randn(x.shape, generator=g, dtype=x.dtype))


def main() -> None:
    lm = load_lm(str(PARITY / "model"), "float32", "cpu")
    behavior, w, protocol = load_behavior(PARITY / "behavior.json"), load_diff(PARITY / "w.pt"), load_protocol("v7")
    base = capture_base(lm, behavior, protocol)
    b_side = CeilingMaterials(lm.decoder, w, capture_steered(lm, behavior, w, protocol))
    layers = w.layers()
    act = {l: activation_target(b_side.steered.eval[l]) for l in layers}
    wt = {l: weight_targets(b_side.left_factor(l, "o"), b_side.left_factor(l, "down"))["combined"] for l in layers}
    sink, g = lm.decoder.sink_token(lm.tokenizer), torch.Generator().manual_seed(0)
    plain = weight_candidates._sink_writes
    values = {name: {l: [] for l in layers} for name in NAMES}
    for _ in range(DRAWS):
        sides = [replace(a, resid=jittered(a.resid, g)) for a in (base.clean, base.pos, base.neg)]
        weight_candidates._sink_writes = lambda m, l: jittered(plain(m, l), g)
        m = Materials(lm.decoder, replace(base, clean=sides[0], pos=sides[1], neg=sides[2]), sink)
        for name in NAMES:
            for l in layers:
                B = m.of(name, l).B
                values[name][l].append((score(act[l], B, ZERO).conc, score(wt[l], B).conc))
    print(
        f"{'candidate':22} {'R_act spread':>13} {'R_w spread':>11}   (max - min) / mean over {DRAWS} draws, worst layer"
    )
    for name in NAMES:
        t = torch.tensor([values[name][l] for l in layers])
        spread = ((t.amax(dim=1) - t.amin(dim=1)) / t.mean(dim=1)).amax(dim=0)
        print(f"{name:22} {100 * spread[0]:12.3g}% {100 * spread[1]:10.3g}%")


if __name__ == "__main__":
    main()
