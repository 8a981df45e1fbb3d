"""What the base model's gradient says of w before training, over LoRA seeds; and how much of that is wording.

    python bench/gradient.py --model smollm2 --pairs sycophancy --w out/smollm2/sycophancy/lora/seed_*/w.safetensors
    python bench/gradient.py --model smollm2 --pairs sycophancy --grid 2 --seeds 0 1 --out grid

The first scores every candidate of v7b and those of source `gradient` on each seed's w: geometric mean of R_w over seeds with a
95 % t interval in log R, the share of the best subspace of rank 8, the mean over shuffled labels, and whether the gradient lies
above the best of the others on every seed; and of those shown the retention, that of controls of equal energy, and p of each
seed, not corrected for the number of candidates, with ? where the gap to forward passes is larger than the excess
(`ws.causal`). The second (`wording.py`) trains adapters on half of the wordings (`--grid` random halves, each also the other
way round) and scores gradients and activations of pairs that share topics, wordings, both or neither with the training. What
is finished is kept in --out.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from scipy import stats
from wording import grid

import ws
from ws.causal.retention import retention
from ws.causal.spans import slopes
from ws.diff.algebra import WRITERS
from ws.diff.core import layer_of
from ws.show.tables import as_text, write_table
from ws.subspaces.algebra import left_svd
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


def plain_interval(values: Sequence[float]) -> str:
    """Mean and 95 % t interval."""
    mean, n = np.mean(values), len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5 if n > 1 else np.nan
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]" if n > 1 else f"{mean:.3f}"


def scored(lm, behavior, w, pairs: str, title: str) -> tuple[pl.DataFrame, dict[str, dict[int, torch.Tensor]]]:
    """R_act and R_w by candidate, and the bases of those that write."""
    found = ws.explain(lm, w, behavior, protocol="v7b", pairs=pairs, title=title)
    names = {"mean_conc_act": "R_act", "mean_conc_w_combined": "R_w"}
    table = found.summary.select("subspace", "kind", "axis_kind", *names).rename(names)
    bases: dict[str, dict[int, torch.Tensor]] = {}
    write = {c["name"] for c in found.candidates if c["axis_kind"] != "read"}
    for name, B in found.tensors.items():
        if name.startswith("basis/") and (own := name.split("/")[1]) in write:
            bases.setdefault(own, {})[int(name.split("/")[2])] = B
    sides: dict[int, list[torch.Tensor]] = {}
    for name in filter(lambda n: n.endswith(WRITERS), w):
        U, s, _ = w.svd(name)
        sides.setdefault(layer_of(name), []).append(U * s)
    bases["dW_left_basis_ceiling"] = {l: left_svd(torch.cat(each, dim=1), 8).B for l, each in sides.items()}
    return table, bases


def carried(lm, behavior, paths, bases, shown: list[str], templates: int, draws: int, out: Path | None) -> pl.DataFrame:
    """`retention` of the rows shown on every seed, the nulls as the first shuffle; control_share: linear effect of controls of
    equal energy over that of w_res."""
    tables, given = [], None
    for i, (path, each) in enumerate(zip(paths, bases, strict=True)):
        w = ws.load_diff(path)
        given = given or slopes(lm, behavior, w.layers(), templates)
        each = each | {"grad_null": each["grad_null_1"]}
        mine = {name: each[name] for name in shown if name in each}
        table = retention(lm, w, mine, behavior, templates=templates, n_draws=draws, given=given)
        linear = table.filter(subspace="w_res")["linear"][0]
        tables.append(table.with_columns(seed=pl.lit(i), control_share=pl.col("control") / linear))
        print(as_text(tables[-1]), flush=True)
        if out:
            write_table(pl.concat(tables), out / "retention.tsv")
    return pl.concat(tables)


def over_seeds(lm, behavior, paths: list[Path], pairs: str, templates: int, draws: int, out: Path | None) -> None:
    """The first table."""
    tables, bases = [], []
    for i, path in enumerate(paths):
        table, each = scored(lm, behavior, ws.load_diff(path), pairs, path.parent.name)
        tables.append(table.with_columns(seed=pl.lit(i)))
        bases.append(each)
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
    shown = [n for n in [*best, *SHOWN] if n in by_name and np.isfinite(by_name[n]["R_w"].to_numpy()).all()]
    kept = carried(lm, behavior, paths, bases, shown, templates, draws, out)
    for name in shown:
        rows = by_name[name]
        share = (rows["R_w"].to_numpy() / by_name["dW_left_basis_ceiling"]["R_w"].to_numpy()).mean()
        each = [interval(rows[score].to_list()) for score in ("R_w", "R_act")]
        part, said = kept.filter(subspace=name), ""
        if len(part):
            kinds = {column: plain_interval(part[column].to_list()) for column in ("retention", "control_share")}
            p = ", ".join(
                f"{p:.3g}{'' if sure else '?'}" for p, sure in part.select("p", "sure").rows()
            )  # by seed, uncorrected
            said = f" retention {kinds['retention']:24} of equal energy {kinds['control_share']:24} p {p}"
        print(f"{name:36} R_w {each[0]:24} R_act {each[1]:24} share of the best {share:.3f}{said}")
    top = np.max([by_name[n]["R_w"].to_numpy() for n in means], axis=0)
    over = by_name["grad_contrast"]["R_w"].to_numpy() / top
    print("grad_contrast over the best of the others, by seed:", over.round(2).tolist())


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
    parser.add_argument("--templates", type=int, default=4)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    behavior = ws.load_behavior(args.behavior)
    if gone := [path for path in args.w if not path.is_file()]:
        parser.error(f"--w {gone[0]}: no such file")
    if not args.w and (args.grid < 1 or not args.seeds):
        parser.error("nothing to do: give --w, or --grid 1 or more with --seeds")
    if not 1 <= args.templates <= len(behavior.templates):
        parser.error(
            f"--templates {args.templates}: {behavior.name} has {len(behavior.templates)} wordings of the probe"
        )
    if args.grid and len({row.wording for row in split_written(args.pairs, behavior)[0]}) < 2:
        parser.error(f"--pairs {args.pairs}: the grid takes pairs of two wordings or more")
    lm = ws.load_lm(args.model)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.w:
        over_seeds(lm, behavior, args.w, args.pairs, args.templates, args.draws, args.out)
    if args.grid:
        out, steps = args.out or Path("grid"), {"lr": args.lr, "epochs": args.epochs}
        grid(lm, behavior, args.pairs, args.grid, args.seeds, out, args.most, args.templates, steps)


if __name__ == "__main__":
    main()
