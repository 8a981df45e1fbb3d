"""True against false on real statements, layer by layer, and what w does to it; how alike the seeds' w are.

Read are statements with labels (`statement,label` in CSV; docs/method.md section 1). At each layer the direction between the
means of true and of false statements' last tokens is taken from one half of them, and on the other half printed

    d' = (mean_true - mean_false) / pooled sd along that direction,    accuracy of the midpoint between both means,

of the base model, and of the model steered by +-w along the base model's own directions. A second file tells whether the
direction is truth: taken from the first, measured on the second (negations, where what is said is turned round). Run:

    python bench/truth.py --model smollm2 --data cities.csv neg_cities.csv --w out/smollm2/sycophancy/lora/seed_*/w.safetensors
"""

import argparse
import csv
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

import ws
from ws.diff.algebra import dot
from ws.model.lm import LM
from ws.model.text import encode, last_index

BATCH = 64


def read(path: Path, most: int, seed: int = 0) -> tuple[list[str], Tensor]:
    """Statements and labels, at most `most`, as many true as false ones, in a seeded order."""
    with path.open(encoding="utf-8") as handle:
        rows = [(row["statement"], int(row["label"])) for row in csv.DictReader(handle)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    sides = [[rows[i] for i in order if rows[i][1] == label] for label in (0, 1)]
    each = min(most // 2, *map(len, sides))
    mixed = [row for pair in zip(*(side[:each] for side in sides), strict=True) for row in pair]
    return [text for text, _ in mixed], torch.tensor([label for _, label in mixed], dtype=torch.bool)


@torch.no_grad()
def states(lm: LM, texts: list[str], w=None, alpha: float = 0.0) -> Tensor:
    """`(L, n, d)`: every block's output at each statement's last token, the last block's after the final norm."""
    found = []
    with ws.weight_steer(lm.model, w, alpha) if w is not None else nullcontext():
        for start in range(0, len(texts), BATCH):
            ids, mask = encode(lm.tokenizer, texts[start : start + BATCH], True)
            hidden = lm.run(ids, mask, output_hidden_states=True).hidden_states[1:]
            rows = torch.arange(len(ids))
            found.append(torch.stack([h[rows, last_index(mask)].float().cpu() for h in hidden]))
    return torch.cat(found, dim=1).double()


def measured(H: Tensor, labels: Tensor, direction: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """d' and accuracy per layer along `direction (L, d)` with the threshold `middle (L,)`."""
    along = torch.einsum("lnd,ld->ln", H, direction)
    true, false = along[:, labels], along[:, ~labels]
    pooled = ((true.var(dim=1) + false.var(dim=1)) / 2).sqrt()
    return (true.mean(dim=1) - false.mean(dim=1)) / pooled, ((along > middle[:, None]) == labels).double().mean(dim=1)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parse.add_argument("--model", default="tiny")
    parse.add_argument("--data", nargs="+", type=Path, required=True)
    parse.add_argument("--w", nargs="*", default=[])
    parse.add_argument("--most", type=int, default=400, help="statements of each file")
    args = parse.parse_args()
    lm = ws.load_lm(args.model)
    diffs = [ws.load_diff(path) for path in args.w]
    for (i, a), (j, b) in combinations(enumerate(diffs), 2):
        print(f"cos of w {i} and {j}: {dot(a, b) / (a.total_norm() * b.total_norm()):+.3f}")
    sets = [(path.stem, *read(path, args.most)) for path in args.data]
    name, texts, labels = sets[0]
    half = len(texts) // 2 // 2 * 2
    base = states(lm, texts)
    means = [base[:, :half][:, labels[:half] == side].mean(dim=1) for side in (True, False)]
    direction = torch.nn.functional.normalize(means[0] - means[1], dim=1)
    middle = torch.einsum("ld,ld->l", direction, (means[0] + means[1]) / 2)
    print(f"directions from {half} statements of {name}; d' and accuracy, by layer")
    for alpha in (0.0, -1.0, 1.0) if diffs else (0.0,):
        for k, (other, said, truth) in enumerate(sets):
            H = states(lm, said, diffs[0], alpha) if diffs else states(lm, said)
            rest = slice(half, None) if k == 0 else slice(None)
            gap, right = measured(H[:, rest], truth[rest], direction, middle)
            cells = " ".join(f"{g:+.2f}/{r:.2f}" for g, r in zip(gap.tolist(), right.tolist(), strict=True))
            print(f"alpha {alpha:+g}  {other} ({len(truth[rest])}): {cells}", flush=True)


if __name__ == "__main__":
    main()
