"""What training adds: w against the base model's gradient on the same pairs as a weight difference, over LoRA seeds.

    python bench/untrained.py --model smollm2 --pairs sycophancy --w out/smollm2/sycophancy/lora/seed_*/w.safetensors

For each w: the effect on held-out false claims (log-ratio at +alpha minus at -alpha, nats, mean over the wordings of the probe)
of w, of the gradient at rank 1, rank 8 and full, of the gradient with shuffled labels, and of a random direction. Each is taken
with w's norm per matrix at alpha 1 (`norms`), and at the alpha whose mean KL(steered || base) over all positions of the EVAL
probes is that of w at alpha 1 (`kl`). Shuffles and random directions are drawn anew for every seed; the gradient is one, scaled
to each w. Intervals are t intervals of 95 % over seeds. What is measured is kept in --out/untrained.csv as it comes, and not
measured again; the table goes to --out/untrained.tsv.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
from scipy import stats

import ws
from ws.cache.files import write_text
from ws.cache.names import cache_folder
from ws.cache.syntax import digest
from ws.diff import WeightDiff
from ws.diff.algebra import dot, random_as
from ws.gradient.capture import chosen
from ws.gradient.diff import as_diff, contrasts
from ws.model.text import chat_text
from ws.show.tables import as_text, write_table
from ws.steer.answers import kept_answers
from ws.steer.effect import effects
from ws.steer.kl import kl_from_base, matched_alpha
from ws.subspaces.captures import probes
from ws.subspaces.protocol import load_protocol
from ws.train.pairs import make_pairs

RANKS = {"gradient, rank 1": 1, "gradient, rank 8": 8, "gradient, full": None}
SHUFFLED, RANDOM = "gradient, labels shuffled", "random direction"
SCHEMA = {
    "of": str, "seed": int, "what": str, "at": str, "alpha": float, "kl": float, "effect": float, "effect_sd": float,
    "pmass_low": float, "pmass_high": float, "cos": float,
}  # fmt: skip


def variants(w: WeightDiff, seed: int, found: list[WeightDiff]) -> Iterator[tuple[str, Callable[[], WeightDiff]]]:
    """What is compared, made when it is asked for. found: D, and D of each seed's shuffled labels."""
    yield "w", lambda: w
    for name, rank in RANKS.items():
        yield name, lambda rank=rank: as_diff(found[0], w, rank)
    yield SHUFFLED, lambda: as_diff(found[1 + seed], w)
    yield RANDOM, lambda: random_as(w, seed)


def measured(lm, behavior, u: WeightDiff, alpha: float, templates: int) -> dict[str, float]:
    """Effect of `alpha u`, mean and sd over claims, and mean pmass at either end."""
    cache, v = cache_folder(lm.name), u.scale(alpha)
    by_claim = effects(lm, behavior, v, templates, cache)
    texts = [[behavior.probe_text(c, a) for c in behavior.heldout_claims] for a in range(templates)]
    low, high = (np.mean([kept_answers(lm, behavior, t, v, s, cache)[1].mean() for t in texts]) for s in (-1.0, 1.0))
    ends = {"pmass_low": float(low), "pmass_high": float(high)}
    return {"effect": float(by_claim.mean()), "effect_sd": float(by_claim.std(ddof=1))} | ends


def measure(lm, behavior, paths: list[Path], config, most: int, out: Path) -> pl.DataFrame:
    """All rows, those that are in the file already read from it."""
    file, templates, cache = out / "untrained.csv", max(len(behavior.templates), 1), cache_folder(lm.name)
    rows = pl.read_csv(file, schema_overrides=SCHEMA).to_dicts() if file.exists() else []
    pairs = chosen(make_pairs(lm, behavior, config, cache).rows, most)
    ws_ = [ws.load_diff(path) for path in paths]
    settings = (
        lm.fingerprint,
        pairs,
        templates,
        behavior.templates,
        behavior.heldout_claims,
        behavior.yes,
        behavior.no,
    )
    marks = [
        digest(repr((i, w.fingerprint, *settings)).encode())[:12] for i, w in enumerate(ws_)
    ]  # i draws the controls
    found = contrasts(lm, pairs, ws_[0], len(ws_), cache=cache, label="untrained")
    texts = [chat_text(lm.tokenizer, behavior.probe_text(c)) for c in probes(behavior, load_protocol("v7b")).eval]
    kl = kl_from_base(lm, texts)
    for seed, (w, mark) in enumerate(zip(ws_, marks, strict=True)):
        done = {(r["what"], r["at"]): r for r in rows if r["of"] == mark}
        target = done["w", "norms"]["kl"] if ("w", "norms") in done else kl(w, 1.0)
        for what, make in variants(w, seed, found):
            todo = [at for at in ("norms", "kl") if (what, at) not in done and (what, at) != ("w", "kl")]
            u = make() if todo else None
            for at in todo:
                try:
                    alpha, moved = (
                        (1.0, kl(u, 1.0)) if at == "norms" else matched_alpha(lambda a, u=u: kl(u, a), target)
                    )
                except ValueError as error:
                    print(f"seed {seed}, {what}: {error}", flush=True)
                    continue
                cos = dot(u, w) / (w.total_norm() * dot(u, u) ** 0.5)
                row = {"of": mark, "seed": seed, "what": what, "at": at, "alpha": alpha, "kl": moved, "cos": cos}
                rows.append(row | measured(lm, behavior, u, alpha, templates))
                table = pl.DataFrame(rows, schema=SCHEMA)
                write_text(file, table.write_csv())
                print(
                    {k: v if isinstance(v, str) else round(v, 4) for k, v in rows[-1].items() if k != "of"}, flush=True
                )
    return pl.DataFrame(rows, schema=SCHEMA).filter(pl.col("of").is_in(marks))


def spread(values: list[float]) -> str:
    """Mean and 95 % t interval."""
    mean, n = np.mean(values), len(values)
    if n < 2:
        return f"{mean:+.3f}"
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def summary(rows: pl.DataFrame) -> pl.DataFrame:
    """One row per variant and dose, over seeds; `over w` is the mean over seeds of the effect over that of the seed's w."""
    whole = dict(rows.filter(what="w").select("of", "effect").rows())
    found = []
    for (at, what), part in rows.sort("at", descending=True, maintain_order=True).group_by(
        "at", "what", maintain_order=True
    ):
        over = [effect / whole[of] for of, effect in part.select("of", "effect").rows()]
        found.append({
            "at": at, "what": what, "seeds": len(part), "effect": spread(part["effect"].to_list()), "over w": spread(over),
            "alpha": part["alpha"].mean(), "kl": part["kl"].mean(), "pmass -": part["pmass_low"].mean(),
            "pmass +": part["pmass_high"].mean(), "cos with w": spread(part["cos"].to_list()),
        })  # fmt: skip
    return pl.DataFrame(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--behavior", default="sycophancy")
    parser.add_argument("--pairs", default="", help="a file of pairs or a shipped name; empty: what the model writes")
    parser.add_argument("--samples", type=int, default=4, help="of each persona pair, where the model writes")
    parser.add_argument("--w", nargs="+", type=Path, required=True)
    parser.add_argument("--most", type=int, default=200, help="pairs that are read, a seeded draw")
    parser.add_argument("--out", type=Path, default=Path("untrained"))
    args = parser.parse_args()
    if gone := [path for path in args.w if not path.is_file()]:
        parser.error(f"--w {gone[0]}: no such file")
    lm, behavior = ws.load_lm(args.model), ws.load_behavior(args.behavior)
    config = ws.PairConfig(file=args.pairs) if args.pairs else ws.PairConfig(samples=args.samples)
    args.out.mkdir(parents=True, exist_ok=True)
    table = summary(measure(lm, behavior, args.w, config, args.most, args.out))
    write_table(table, args.out / "untrained.tsv")
    write_text(args.out / "untrained.md", as_text(table) + "\n")
    print(as_text(table))


if __name__ == "__main__":
    main()
