"""Variants of a weight difference, many in a pass, against one `weight_steer` and one pass for each.

    python bench/causal.py --model tiny --variants 24

Both give the log-ratio of every held-out claim in every wording at both ends, and KL is left out of both. Prints seconds and
the ratio, and by how much the two differ. Blind subspaces of rank 8: a third keep, a third drop, a third full_drop.
"""

import argparse
import time

import torch
from ratios import told

import ws
from ws.causal.passes import TOGETHER, Items
from ws.causal.stacked import stacked
from ws.causal.variants import drop, full_drop, keep
from ws.diff import WeightDiff
from ws.diff.core import LowRank
from ws.model.wide import widened
from ws.steer.answers import answer_scores, answer_tokens
from ws.steer.weights import weight_steer


def random_diff(lm, rank: int = 64) -> WeightDiff:
    """A weight difference of adapters of rank 32 on the default layers."""
    L, g, shapes, entries = lm.decoder.n_layers, torch.Generator().manual_seed(0), dict(lm.model.named_parameters()), {}
    for l in range(round(0.3 * L), round(0.8 * L)):
        for role in ("q", "k", "v", "o", "gate", "up", "down"):
            out, width = shapes[name := lm.decoder.param_name(l, role)].shape
            B, A = torch.randn(out, rank, generator=g), torch.randn(rank, width, generator=g)
            entries[name] = LowRank(0.02 * B, 0.02 * A)
    return WeightDiff(entries)


def textbook(lm, variants: list[WeightDiff], turns: tuple[str, ...], yes: list[int], no: list[int]) -> torch.Tensor:
    """One variant and one end after the other."""
    rows = []
    for w in variants:
        for alpha in (1.0, -1.0):
            with widened(lm.model), weight_steer(lm.model, w, alpha):
                rows.append(answer_scores(lm, list(turns), yes, no).logratio)
    return torch.stack(rows)


def together(lm, variants: list[WeightDiff], turns: tuple[str, ...], yes: list[int], no: list[int]) -> torch.Tensor:
    """Stacks of TOGETHER variants."""
    found = torch.zeros(2 * len(variants), len(turns))
    for i in range(0, len(variants), TOGETHER):
        rows = [(w, alpha) for w in variants[i : i + TOGETHER] for alpha in (1.0, -1.0)]

        def read(logits: torch.Tensor, places: list[int], start: int = 2 * i, end: int = 2 * i + len(rows)) -> None:
            logp = logits.log_softmax(dim=-1)
            found[start:end, places] = logp[..., yes].logsumexp(-1) - logp[..., no].logsumexp(-1)

        stacked(lm, rows, turns, read)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--variants", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    lm, behavior = ws.load_lm(args.model), ws.load_behavior("sycophancy")
    w, d = ws.load_diff("tiny") if args.model == "tiny" else random_diff(lm), lm.decoder.d
    turns = Items.of(lm, behavior, len(behavior.templates)).turns
    yes, no = answer_tokens(lm.tokenizer, behavior)
    g, variants = torch.Generator().manual_seed(1), []
    for i in range(args.variants):
        bases = {l: torch.linalg.qr(torch.randn(d, 8, generator=g, dtype=torch.float64)).Q for l in w.layers()}
        variants.append((keep, drop, full_drop)[i % 3](w, bases))
    times: dict[str, list[float]] = {"textbook": [], "together": []}
    for _ in range(args.repeats):
        found = {}
        for name, run in (("textbook", textbook), ("together", together)):
            start = time.perf_counter()
            found[name] = run(lm, variants, turns, yes, no)
            times[name].append(time.perf_counter() - start)
    off = float((found["textbook"] - found["together"]).abs().max())
    slow, fast = (sorted(times[name])[len(times[name]) // 2] for name in times)
    print(f"{args.model}: {args.variants} variants, {len(turns)} texts, two ends; largest difference {off:.1e} nats")
    ratio = told("stacked variants", slow, fast)
    print(f"one by one {slow:.2f} s, together {fast:.2f} s, ratio {ratio:.2f} (medians of {args.repeats})")


if __name__ == "__main__":
    main()
