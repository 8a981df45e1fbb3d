"""What the base model's gradient says of w before training, over LoRA seeds; and how much of that is wording.

    python bench/gradient.py --model smollm2 --pairs sycophancy --w out/smollm2/sycophancy/lora/seed_*/w.safetensors
    python bench/gradient.py --model smollm2 --pairs sycophancy --grid 2 --seeds 0 1 --out grid

The first scores every candidate of v7b and those of source `gradient` on each seed's w: geometric mean of R_w over seeds with a
95 % t interval in log R, the share of the best subspace of rank 8, the mean over shuffled labels, and whether the gradient lies
above the best of the others on every seed. The second trains adapters on half of the wordings (`--grid` random halves, each
also the other way round) and scores gradients of pairs that share topics, wordings, both or neither with the training: R_w and
`share due to wording = 1 - R(other topics, other wordings) / R(other topics, same wordings)`. What is finished is kept in --out.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
from scipy import stats

import ws
from ws.cache.names import cache_folder
from ws.gradient.capture import chosen, pair_gradients
from ws.subspaces.algebra import left_svd
from ws.train.pairs import Pair, from_file
from ws.train.written import split_written

SHOWN = ("grad_contrast", "grad_sum", "grad_null", "grad_contrast_heldout_topics", "grad_contrast_other_wording", "grad_probe",
         "grad_answer", "grad_contrast_read", "dW_left_basis_ceiling", "random_orthogonal")  # fmt: skip


def interval(values: Sequence[float]) -> str:
    """Geometric mean and 95 % t interval in logs."""
    logs = np.log(values)
    mean, n = logs.mean(), len(logs)
    if n < 2:
        return f"{np.exp(mean):.2f}"
    half = stats.t.ppf(0.975, n - 1) * logs.std(ddof=1) / n**0.5
    return f"{np.exp(mean):.2f} [{np.exp(mean - half):.2f}, {np.exp(mean + half):.2f}]"


def scored(lm, behavior, w, pairs: str, title: str) -> pl.DataFrame:
    """R_act, R_w, share of the best rank 8 by candidate; the eight shuffles as their mean, `grad_null`."""
    found = ws.explain(lm, w, behavior, protocol="v7b", pairs=pairs, title=title)
    names = {"mean_conc_act": "R_act", "mean_conc_w_combined": "R_w"}
    table = found.summary.select("subspace", "kind", "axis_kind", *names).rename(names)
    null = table.filter(pl.col("subspace").str.starts_with("grad_null_"))
    mean = null.select(
        subspace=pl.lit("grad_null"), kind=pl.lit("control"), axis_kind=pl.lit("write"),
        R_act=pl.col("R_act").mean(), R_w=pl.col("R_w").mean(),
    ).head(1)  # fmt: skip
    return pl.concat([table.filter(~pl.col("subspace").str.starts_with("grad_null_")), mean])


def over_seeds(lm, behavior, paths: list[Path], pairs: str, out: Path | None) -> None:
    """The first table."""
    tables = []
    for i, path in enumerate(paths):
        tables.append(scored(lm, behavior, ws.load_diff(path), pairs, path.parent.name).with_columns(seed=pl.lit(i)))
        if out:
            pl.concat(tables).write_csv(out / "seeds.csv")
    whole = pl.concat(tables)
    mine = whole.filter(~pl.col("subspace").str.starts_with("grad_"))
    others = mine.filter(kind="A-hypothesis")["subspace"].unique().to_list()
    by_name = {n: whole.filter(subspace=n).sort("seed") for n in whole["subspace"].unique().to_list()}
    means = {
        n: np.log(by_name[n]["R_w"].to_numpy()).mean()
        for n in others
        if np.isfinite(by_name[n]["R_w"].to_numpy()).all()
    }
    best = sorted(means, key=means.get, reverse=True)[:3]
    for name in [*best, *SHOWN]:
        if name in by_name and np.isfinite(by_name[name]["R_w"].to_numpy()).all():
            rows = by_name[name]
            share = (rows["R_w"].to_numpy() / by_name["dW_left_basis_ceiling"]["R_w"].to_numpy()).mean()
            each = [interval(rows[score].to_list()) for score in ("R_w", "R_act")]
            print(f"{name:36} R_w {each[0]:24} R_act {each[1]:24} share of the best {share:.3f}")
    top = np.max([by_name[n]["R_w"].to_numpy() for n in means], axis=0)
    over = by_name["grad_contrast"]["R_w"].to_numpy() / top
    print("grad_contrast over the best of the others, by seed:", over.round(2).tolist())


def cells(behavior, pairs: str, wordings: list[str]) -> dict[str, tuple[Pair, ...]]:
    """Pairs by what they share with a training on some wordings: topics and wordings, each same or other."""
    everything = from_file(behavior, ws.PairConfig(file=pairs))
    train = from_file(behavior, ws.PairConfig(file=pairs, wordings=tuple(wordings))).rows
    known = {row.persona for row in train}
    parts = {"same": everything.rows, "other": everything.heldout}
    return {
        f"{topics} topics, {words} wordings": tuple(r for r in rows if (r.persona in known) == (words == "same"))
        for (topics, rows), words in product(parts.items(), ("same", "other"))
    }


def grid(lm, behavior, pairs: str, halves: int, seeds: list[int], out: Path, most: int, steps: dict) -> None:
    """The second table."""
    names = list(dict.fromkeys(row.wording for row in split_written(pairs, behavior)[0]))
    rows = []
    for h, seed in product(range(halves), seeds):
        order = np.random.default_rng(h).permutation(names).tolist()
        for side, some in enumerate((order[: len(order) // 2], order[len(order) // 2 :])):
            config = ws.TrainConfig(ws.PairConfig(file=pairs, wordings=tuple(some)), **steps)
            w = ws.train_diff(lm, behavior, seed=seed, config=config, folder=out / f"w_{h}_{side}_{seed}")
            found, layers = cells(behavior, pairs, some), w.layers()
            size = min(most, *map(len, found.values()))
            bases = {}
            for name, part in found.items():
                label = f"{name} {h} {side}"
                G = pair_gradients(
                    lm, chosen(part, size), layers, fold_gain=True, shuffles=4, label=label, cache=cache_folder(lm.name)
                )
                kinds = {"": "contrast"} | {f" null {i}": f"null {i}" for i in range(4)}
                for end, kind in kinds.items():
                    bases[name + end] = {l: left_svd(G.roots[kind, "write", l], 8).B for l in layers}
            ex = ws.explain(lm, w, behavior, protocol="v7b", candidates=["write"], extra=bases, progress=False)
            for r in ex.summary.iter_rows(named=True):
                rows.append((h, side, seed, r["subspace"], r["mean_conc_w_combined"], r["mean_conc_act"], size))
            table = pl.DataFrame(rows, ["half", "side", "seed", "subspace", "R_w", "R_act", "pairs"], orient="row")
            table.write_csv(out / "grid.csv")
            print(
                h,
                side,
                seed,
                {r[3]: round(r[4], 2) for r in rows[-len(ex.summary) :] if "null" not in r[3]},
                flush=True,
            )
    for name in found:
        R = table.filter(subspace=name).sort("half", "side", "seed")["R_w"].to_list()
        null = table.filter(pl.col("subspace").str.starts_with(name + " null"))["R_w"].to_list()
        print(f"{name:32} R_w {interval(R):24} labels shuffled {interval(null)}")
    R = {n: np.array(table.filter(subspace=n).sort("half", "side", "seed")["R_w"]) for n in found}
    ratio = np.log(R["other topics, other wordings"] / R["other topics, same wordings"])
    by_half = ratio.reshape(halves, 2, len(seeds)).mean(axis=2).ravel()  # seeds of one half share their wordings
    n, mean = len(by_half), by_half.mean()
    half = stats.t.ppf(0.975, n - 1) * by_half.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    shares = [1 - np.exp(x) for x in (mean, mean + half, mean - half)]
    print("share due to wording: {:.2f} [{:.2f}, {:.2f}]".format(*shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--behavior", default="sycophancy")
    parser.add_argument("--pairs", default="sycophancy")
    parser.add_argument("--w", nargs="*", type=Path, default=[])
    parser.add_argument("--grid", type=int, default=0)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--most", type=int, default=60)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lm, behavior = ws.load_lm(args.model), ws.load_behavior(args.behavior)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.w:
        over_seeds(lm, behavior, args.w, args.pairs, args.out)
    if args.grid:
        grid(
            lm,
            behavior,
            args.pairs,
            args.grid,
            args.seeds,
            args.out or Path("grid"),
            args.most,
            {"lr": args.lr, "epochs": args.epochs},
        )


if __name__ == "__main__":
    main()
