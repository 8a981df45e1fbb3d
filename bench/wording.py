"""How much of what a basis says of w is the wording of its pairs? Grid of `python bench/gradient.py --grid`.

Adapters are trained on half of the wordings (random halves, each also the other way round). Per training, bases of rank 8 are
built on pairs that share topics, wordings, both or neither with it, of three kinds: `gradient` (`grad_contrast`),
`activations` (left singular vectors, uncentred, of the mean block output over response tokens of `pos` minus that of `neg`),
`null` (the gradient with labels shuffled). Scores: R_w, R_act, and retention, the effect of `P w_res` over that of w_res.

Seeds of one half share their wordings: logs of R (retention itself) are averaged over seeds, and the 95 % t interval is over
which of *these* wordings are held out. Halves overlap, so that it does not speak of new wordings: simulated with additive
effects of nine wordings it holds these in .99, a mean over new ones in .78 to .84 with four halves, in fewer with more. Every
finished cell is kept in --out and read back.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from scipy import stats

import ws
from ws.cache.files import atomic_file, write_text
from ws.cache.names import cache_folder
from ws.cache.syntax import digest
from ws.causal.variants import gains, keep, writers
from ws.gradient.capture import chosen, pair_gradients
from ws.model.text import answer_frame
from ws.model.trace import hidden, recorded
from ws.show.figures import MARKERS, PALETTE, plain_log_ticks, save
from ws.show.tables import as_text, write_table
from ws.steer.effect import effects
from ws.subspaces.algebra import left_svd
from ws.subspaces.protocol import load_protocol
from ws.train.examples import collate, make_example
from ws.train.pairs import Pair, from_file
from ws.train.written import split_written

RANK, SHUFFLES = 8, 4
KINDS, SCORES = ("gradient", "activations", "null"), ("R_w", "R_act", "retention")
CELLS = [*product(("same", "other"), ("same", "other"))]  # topics, wordings
SHARES = (
    "share due to wording",
    "share due to topics",
    "beside the null",
)


def halves_of(pairs: str, behavior, half: int) -> tuple[list[str], list[str]]:
    """The wordings of a file in two random halves."""
    names = list(dict.fromkeys(row.wording for row in split_written(pairs, behavior)[0]))
    order = np.random.default_rng(half).permutation(names).tolist()
    return order[: len(order) // 2], order[len(order) // 2 :]


def cells(behavior, pairs: str, wordings: Sequence[str]) -> dict[tuple[str, str], tuple[Pair, ...]]:
    """Pairs by what they share with a training on some wordings: (topics, wordings), each same or other."""
    everything = from_file(behavior, ws.PairConfig(file=pairs))
    train = from_file(behavior, ws.PairConfig(file=pairs, wordings=tuple(wordings))).rows
    known, parts = {row.persona for row in train}, {"same": everything.rows, "other": everything.heldout}
    return {(t, s): tuple(r for r in parts[t] if (r.persona in known) == (s == "same")) for t, s in CELLS}


@torch.no_grad()
def pair_activations(lm, rows: Sequence[Pair], layers: Sequence[int], batch: int = 8) -> dict[int, torch.Tensor]:
    """Per layer `(n, d)`: mean block output over response tokens, pos minus neg."""
    frame, sums = answer_frame(lm.tokenizer), {}
    for sign in ("pos", "neg"):
        made = [make_example(lm, row, sign, frame, 512) for row in rows]
        found: dict[int, list[torch.Tensor]] = {l: [] for l in layers}
        for start in range(0, len(made), batch):
            inputs = collate(made[start : start + batch])
            answer = (inputs.pop("labels") != -100).float()[:, :, None]

            def mean(output, inputs, l, answer=answer, found=found):
                found[l].append((hidden(output).float().cpu() * answer).sum(1) / answer.sum(1))

            at = {f"{lm.decoder.prefix}.{l}": lambda o, i, l=l, mean=mean: mean(o, i, l) for l in layers}
            device = next(lm.model.parameters()).device
            with recorded(lm.model, at):
                lm.model(**{k: x.to(device) for k, x in inputs.items()}, use_cache=False)
        sums[sign] = {l: torch.cat(parts) for l, parts in found.items()}
    return {l: sums["pos"][l] - sums["neg"][l] for l in layers}


def bases_of(lm, rows: Sequence[Pair], layers: Sequence[int], label: str) -> dict[str, dict[int, torch.Tensor]]:
    """The bases of one cell's pairs: `gradient`, `activations`, `null 0`, ..."""
    more = {"fold_gain": True, "shuffles": SHUFFLES, "cache": cache_folder(lm.name)}
    G, X = pair_gradients(lm, rows, layers, label=label, **more), pair_activations(lm, rows, layers)
    kinds = {"gradient": "contrast"} | {f"null {i}": f"null {i}" for i in range(SHUFFLES)}
    found = {name: {l: left_svd(G.roots[kind, "write", l], RANK).B for l in layers} for name, kind in kinds.items()}
    return found | {"activations": {l: left_svd(X[l].T, RANK).B for l in layers}}


def scored(lm, behavior, w, bases: dict[tuple[str, str, str], dict[int, torch.Tensor]], templates: int) -> pl.DataFrame:
    """R_w, R_act and retention of the bases of every cell; of the nulls' retention the first shuffle's alone."""
    names = {" | ".join(one): one for one in bases}
    extra = {name: bases[one] for name, one in names.items()}
    protocol = load_protocol("v7b", **({"TEMPLATES": "1"} if templates == 1 else {}))
    found = ws.explain(lm, w, behavior, protocol=protocol, candidates=["write"], extra=extra, progress=False)
    score = {r["subspace"]: r for r in found.summary.iter_rows(named=True)}
    norms, cache = gains(lm.decoder, w), cache_folder(lm.name)
    whole, rows = float(effects(lm, behavior, writers(w), templates, cache).mean()), []
    for name, (topics, words, kind) in names.items():
        kept = float("nan")
        if kind in (*KINDS, "null 0"):
            kept = float(effects(lm, behavior, keep(w, extra[name], norms), templates, cache).mean())
        rows.append((topics, words, kind, score[name]["mean_conc_w_combined"], score[name]["mean_conc_act"],
                     kept / whole, kept, whole))  # fmt: skip
    names = ["topics", "words", "kind", "R_w", "R_act", "retention", "effect", "effect_w_res"]
    return pl.DataFrame(rows, names, orient="row")


def grid(lm, behavior, pairs: str, halves: int, seeds: list[int], out: Path, most: int, templates: int, steps: dict):
    """All cells, seed by seed; tables, figure and sentence after each seed."""
    tables, made = [], {}  # bases do not depend on the seed
    for seed in seeds:
        for h, side in product(range(halves), (0, 1)):
            some = halves_of(pairs, behavior, h)[side]
            config = ws.TrainConfig(ws.PairConfig(file=pairs, wordings=tuple(some)), **steps)
            w = ws.train_diff(lm, behavior, seed=seed, config=config, folder=out / f"w_{h}_{side}_{seed}")
            parts, path = cells(behavior, pairs, some), out / f"cell_{h}_{side}_{seed}.tsv"
            size = min(most, *map(len, parts.values()))
            texts = digest(repr((list(parts.values()), behavior.templates, behavior.heldout_claims)).encode())[:12]
            about = {"w": w.fingerprint, "model": lm.fingerprint, "pairs": size, "templates": templates, "texts": texts}
            known = pl.read_csv(path, separator="\t") if path.exists() else pl.DataFrame()
            if not len(known) or any(k not in known or str(known[k][0]) != str(v) for k, v in about.items()):
                bases = {}
                for (topics, words), rows in parts.items():
                    # what this half calls other wordings are those of the other half of the draw
                    label = f"{topics} topics, same wordings {h} {side if words == 'same' else 1 - side}"
                    if label not in made:
                        made[label] = bases_of(lm, chosen(rows, size), w.layers(), label)
                    bases |= {(topics, words, kind): B for kind, B in made[label].items()}
                known = scored(lm, behavior, w, bases, templates).with_columns(
                    half=pl.lit(h), side=pl.lit(side), seed=pl.lit(seed), **{k: pl.lit(v) for k, v in about.items()}
                )
                write_table(known, path)
            tables.append(known)
            short = {c: round(known.filter(topics=c[0], words=c[1], kind="gradient")["R_w"][0], 2) for c in CELLS}
            print(h, side, seed, "gradient R_w by (topics, wordings)", short, flush=True)
        report(pl.concat(tables, how="vertical_relaxed"), out, f"{lm.name}, {behavior.name}")


def units(table: pl.DataFrame, score: str) -> dict[tuple[str, str, str], np.ndarray]:
    """By cell and kind, one value for each half that was trained on, averaged over seeds and shuffles: of R its log."""
    value = pl.col(score) if score == "retention" else pl.col(score).log()
    kind = pl.when(pl.col("kind").str.starts_with("null")).then(pl.lit("null")).otherwise("kind").alias("kind")
    rows = table.with_columns(kind, value=value).filter(pl.col("value").is_finite())
    mean = rows.group_by("topics", "words", "kind", "half", "side").agg(pl.col("value").mean()).sort("half", "side")
    return {(*c, k): mean.filter(topics=c[0], words=c[1], kind=k)["value"].to_numpy() for c in CELLS for k in KINDS}


def t_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % t interval; NaN ends for one value."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else float("nan")
    return mean, mean - half, mean + half


def table_of(table: pl.DataFrame) -> pl.DataFrame:
    """Scores by cell and kind, then the shares, with intervals."""
    rows = []
    for score in SCORES:
        logs, back = units(table, score), (lambda x: x) if score == "retention" else np.exp
        for (topics, words, kind), values in logs.items():
            rows.append(
                (f"{topics} topics, {words} wordings", kind, score, *map(back, t_interval(values)), len(values))
            )
        for kind in KINDS:
            oo, os, ss = (logs[topics, words, kind] for topics, words in (CELLS[3], CELLS[2], CELLS[0]))
            for name, one, two in ((SHARES[0], oo, os), (SHARES[1], os, ss)):
                mean, low, high = 1 - np.exp(t_interval(log_ratio(one, two, score)))
                rows.append((name, kind, score, mean, high, low, len(one)))
            if kind != "null":
                null = logs[(*CELLS[3], "null")]
                beside = oo - null  # logs of R, retentions
                rows.append((SHARES[2], kind, score, *map(back, t_interval(beside)), len(beside)))
    return pl.DataFrame(rows, ["what", "kind", "score", "value", "low", "high", "halves"], orient="row")


def log_ratio(one: np.ndarray, two: np.ndarray, score: str) -> np.ndarray:
    """Log of the ratio of two scores; NaN where a retention is not positive: a share of it is then undefined."""
    if score != "retention":
        return one - two
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.log(one) - np.log(two)
    return found if np.isfinite(found).all() else np.full_like(found, np.nan)


def figure_of(found: pl.DataFrame, title: str) -> Figure:
    """Three scores, four cells each, a marker per kind."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    for axis, score in zip(figure.subplots(1, 3), SCORES, strict=True):
        for i, kind in enumerate(KINDS):
            part = found.filter(
                pl.col("what").str.contains("topics,") & (pl.col("kind") == kind) & (pl.col("score") == score)
            )
            y, low, high = (part[name].to_numpy() for name in ("value", "low", "high"))
            x = np.arange(len(part)) + 0.18 * (i - 1)
            ends = np.nan_to_num(np.array([y - low, high - y]))
            axis.errorbar(x, y, ends, fmt=MARKERS[i], c=PALETTE[i], ms=7, capsize=3, lw=1.4, label=kind)
        names = [f"{topics} topics\n{words}\nwordings" for topics, words in CELLS]
        axis.set_xticks(range(4), names, fontsize=9)
        axis.set_title(score if score == "retention" else f"{score} (1 = chance)", fontsize=12)
        axis.tick_params(axis="y", labelsize=10)
        axis.grid(True, axis="y", alpha=0.25)
        if score != "retention":
            axis.set_yscale("log")
            plain_log_ticks(axis.yaxis)
        axis.axhline(0 if score == "retention" else 1, ls="--", c="0.5", lw=1)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


def sentence(found: pl.DataFrame, table: pl.DataFrame, title: str) -> str:
    """What the table says, in one sentence per kind."""
    n, moved = table.select("half", "side", "seed").unique().height, table["effect_w_res"]

    def said(what: str, kind: str, score: str, percent: bool) -> str:
        row = found.filter(what=what, kind=kind, score=score).row(0, named=True)
        if not np.isfinite(row["value"]):
            return "undefined"
        form = (lambda v: f"{100 * v:.0f} %") if percent else (lambda v: f"{v:.2f}")
        ends = (
            f" ({form(row['low'])} to {form(row['high'])})" if np.isfinite(row["low"]) else " (one half: no interval)"
        )
        return form(row["value"]) + ends

    lines = []
    for kind in KINDS[:2]:
        due = [
            f"{', '.join(f'{said(share, kind, s, True)} of {s}' for s in SCORES)} are due to {what}"
            for share, what in zip(SHARES, ("wording", "topics"), strict=False)
        ]
        left = [f"{said(SHARES[2], kind, s, False)} times the {s}" for s in SCORES[:2]]
        lines.append(
            f"of bases of {kind} {' and '.join(due)}, and on other topics in other wordings they have {' and '.join(left)}"
            f" of shuffled labels and a retention that differs by {said(SHARES[2], kind, 'retention', False)}"
        )
    return (
        f"{title}: {n} trainings, {found['halves'].max()} halves of the wordings, 95 % t intervals over halves, effects of w_res"
        f" of {moved.min():.2f} to {moved.max():.2f} nats: {'; '.join(lines)}."
    )


def report(table: pl.DataFrame, out: Path, title: str) -> None:
    """grid.tsv (all cells), wording.tsv, wording.png, .pdf, wording.md."""
    with atomic_file(out / "grid.tsv") as tmp:
        table.write_csv(tmp, separator="\t")
    found, n = table_of(table), table.select("half", "side", "seed").unique().height
    write_table(found, out / "wording.tsv")
    print(as_text(found), flush=True)
    save(figure_of(found, f"{title}: {n} trainings on half of the wordings"), out / "wording")
    text = sentence(found, table, title)
    write_text(out / "wording.md", text + "\n")
    print(text, flush=True)
