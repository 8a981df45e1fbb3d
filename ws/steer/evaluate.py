"""How much of the behaviour a model shows: Yes against No at the answer, and the same over steering strengths.

`logratio = log P(yes-words) - log P(no-words)`, `pmass = P(yes) + P(no)`, from a float32 log-softmax at the answer
position. A model that merely says Yes more often is told apart by asking about false claims, their negations and true
claims side by side. (docs/method.md sections 1 and 2)
"""

import json
from pathlib import Path

import polars as pl
import torch

from ws.cache.files import atomic_file
from ws.cache.given import finite, short
from ws.data import Behavior
from ws.diff import WeightDiff
from ws.model.generate import complete
from ws.model.lm import LM
from ws.model.text import chat_text
from ws.show.bars import tqdm
from ws.steer import statements
from ws.steer.answers import check_words, kept_answers
from ws.steer.weights import weight_steer

MIN_PMASS = statements.MIN_PMASS
MOST_SAID = 12  # statements that the model is asked to answer in its own words


def claim_sets(behavior: Behavior, n_heldout: int | None = None) -> dict[str, tuple[str, ...]]:
    """The held-out claims that are asked about: `false`, and `negated` and `true` where the behaviour has them. Of statements
    the first `n_heldout` held-out ones (None: all): `yes` and `no`, by the answer that matches."""
    if behavior.answers:
        return statements.halves(behavior, n_heldout)
    sets = {"false": behavior.heldout_claims, "negated": behavior.negations, "true": behavior.true_claims}
    return {name: claims for name, claims in sets.items() if claims}


def check_alphas(alphas: list[float | int]) -> list[float]:
    """The strengths of a sweep, ascending. ValueError unless there are at least two different ones, all finite."""
    if not all(map(finite, alphas)):
        raise ValueError(f"ALPHAS = {short(list(alphas))}: a strength is a finite number")
    found = sorted(set(map(float, alphas)))
    if len(found) < 2:
        raise ValueError(f"ALPHAS = {list(alphas)}: a sweep needs at least two different strengths")
    return found


def alpha_sweep(
    lm: LM,
    behavior: Behavior,
    w: WeightDiff,
    alphas: list[float],
    progress: bool = True,
    n_heldout: int | None = None,
    cache: Path | None = None,
) -> pl.DataFrame:
    """Answers at each steering strength: one row per alpha, claim set and claim.

    Columns: alpha, set, claim, logratio (nats), pmass; of statements `margin` too, and `n_heldout` says how many are asked
    (None: all). cache as in `ws.steer.answers.kept_answers`. The model is the same before and after.

    Examples:
        >>> import ws
        >>> lm, b = ws.load_lm("tiny"), ws.load_behavior("sycophancy")
        >>> table = ws.alpha_sweep(lm, b, ws.load_diff("tiny"), [-1.0, 1.0], progress=False)
        >>> means = [table.filter(set="false", alpha=a)["logratio"].mean() for a in (-1.0, 1.0)]
        >>> means[1] > means[0] + 1
        True
    """
    check_alphas([*alphas, 0.0, 1.0])  # one strength will do here, if it is finite
    check_words(lm, behavior)
    rows = []
    for alpha in tqdm(alphas, "alpha sweep", disable=not progress):
        for name, claims in claim_sets(behavior, n_heldout).items():
            texts = [behavior.probe_text(claim) for claim in claims]
            answers = kept_answers(lm, behavior, texts, w if alpha else None, alpha, cache)
            rows += [(alpha, name, *row) for row in zip(claims, *answers.tolist(), strict=True)]
    table = pl.DataFrame(rows, orient="row", schema=["alpha", "set", "claim", "logratio", "pmass"])
    return statements.with_margin(table) if behavior.answers else table


def summarise_sweep(sweep: pl.DataFrame) -> pl.DataFrame:
    """Per alpha and claim set: mean and sd (n-1) of logratio, mean pmass, n, and `low_pmass` where pmass < 0.5. Of statements
    `ws.steer.statements.summarise`."""
    if "margin" in sweep.columns:
        return statements.summarise(sweep)
    ratio, mass = pl.col("logratio"), pl.col("pmass").mean()
    groups = sweep.group_by(["set", "alpha"], maintain_order=True)
    table = groups.agg(mean_logratio=ratio.mean(), sd_logratio=ratio.std(), mean_pmass=mass, n=pl.len())
    table = table.with_columns(low_pmass=pl.col("mean_pmass") < MIN_PMASS)
    return table.sort(["set", "alpha"], maintain_order=True)


def completions(lm: LM, behavior: Behavior, w: WeightDiff, alphas: list[float], max_new_tokens: int = 64) -> list[dict]:
    """What the model says about each held-out topic (of statements the first MOST_SAID) at each alpha: rows of topic, prompt,
    alpha, completion."""
    prompts = [behavior.opinion_text(t) for t in behavior.heldout_topics[: MOST_SAID if behavior.answers else None]]
    texts = [chat_text(lm.tokenizer, p) for p in prompts]
    rows = []
    for alpha in tqdm(alphas, "completions"):
        with weight_steer(lm.model, w, alpha):
            said = enumerate(zip(prompts, complete(lm, texts, max_new_tokens), strict=True))
        rows += [{"topic": i, "prompt": p, "alpha": alpha, "completion": c} for i, (p, c) in said]
    return rows


def write_blind(rows: list[dict], folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """`completions.jsonl` in seeded random order without alpha, for blind reading, and `completions_key.jsonl`."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    read, key = folder / "completions.jsonl", folder / "completions_key.jsonl"
    for path, columns in ((read, ("id", "prompt", "completion")), (key, ("id", "topic", "alpha"))):
        with atomic_file(path) as tmp, open(tmp, "w", encoding="utf-8") as handle:
            for number, i in enumerate(order):
                row = {"id": number, **rows[i]}
                handle.write(json.dumps({c: row[c] for c in columns}, ensure_ascii=False) + "\n")
    return read, key


def steering_verdict(summary: pl.DataFrame) -> dict:
    """What the sweep shows on the held-out false claims, computed: `monotone`, `spread` (nats, between the extreme
    alphas), `least_pmass`, and `text`, which compares the claim sets' movements. summary: `summarise_sweep`. A
    behaviour without negations or true claims is compared on what it has; of statements `ws.steer.statements.verdict`."""
    if "mean_margin" in summary.columns:
        return statements.verdict(summary)
    part = summary.filter(set="false").sort("alpha")
    means = part["mean_logratio"].to_list()
    low, high = part["alpha"][0], part["alpha"][-1]
    monotone = all(a < b for a, b in zip(means, means[1:], strict=False))
    spread, least, order = means[-1] - means[0], float(part["mean_pmass"].min()), statements.told_order(means)
    lines = [
        f"On {part['n'][0]} held-out false claims the mean log-ratio goes from {means[0]:+.2f} at alpha {low:+g} to"
        f" {means[-1]:+.2f} at alpha {high:+g}, a spread of {spread:.2f} nats;"
        f" {order}. The least mean pmass is"
        f" {least:.3f}{'' if least >= MIN_PMASS else ': the ratio says little there'}."
    ]
    for other in ("negated", "true"):
        rest = summary.filter(set=other).sort("alpha")["mean_logratio"].to_list()
        if rest:
            gap = [b - a for a, b in zip(means, rest, strict=True)]
            lines.append(
                f"{other.capitalize()} claims move by {rest[-1] - rest[0]:.2f} nats; they stand {gap[0]:+.2f} nats from the"
                f" false ones at alpha {low:+g} and {gap[-1]:+.2f} at alpha {high:+g}."
            )
    return {"monotone": monotone, "spread": spread, "least_pmass": least, "text": " ".join(lines)}


def headline(sweep: pl.DataFrame, verdict: dict, margin: dict, null: bool = False) -> str:
    """What w does, in a sentence or two: whether the score moves at all, how much of it is a push to yes whatever is said, and
    whether free answers move with it. sweep: `alpha_sweep`; verdict: `steering_verdict`; margin:
    `ws.train.margin.margin_verdict`, or what has its text alone."""
    low, high = sweep["alpha"].min(), sweep["alpha"].max()
    start = "**A null diff: its labels were shuffled, so that no behaviour was trained.** " if null else ""
    between = f"between alpha {low:+g} and {high:+g}"
    if "moved_yes" in verdict:
        yes, no = verdict["moved_yes"], verdict["moved_no"]
        told = f"margin of the matching answer by {yes:+.2f} nats (Yes half) and {no:+.2f} (No half) {between}"
        said = f"`w` moves the {told}: {verdict['said']}."
    else:
        by = {name: _moved(sweep, name, low, high) for name in sweep["set"].unique(maintain_order=True)}
        said = _on_claims(by, between)
    if verdict.get("least_pmass", 1.0) < MIN_PMASS:
        said += f" **The answer words hold {verdict['least_pmass']:.2f} of the probability at the least: the score says little.**"
    if "agrees" in margin and not null:
        distance, ends = margin["distance"], (margin["low"], margin["high"])
        if None in ends:
            word = "moved, of one topic and so without an interval,"
        else:
            word = (
                "are **not seen to move**:"
                if ends[0] <= 0 <= ends[1]
                else "move towards it,"
                if distance > 0
                else "move **against it**,"
            )
        said += f" Free answers, by their margin, {word} {distance:+.3f} nats per token."
    return start + said


def _moved(sweep: pl.DataFrame, name: str, low: float, high: float) -> tuple[float, float]:
    """Mean over the claims of a set of what their log-ratio moves by, and half the width of its 95 % t interval."""
    down, up = (sweep.filter(set=name, alpha=a).sort("claim")["logratio"].to_numpy() for a in (low, high))
    return float((up - down).mean()), statements.half_interval(up - down)


def _on_claims(by: dict[str, tuple[float, float]], between: str) -> str:
    mean, half = by["false"]
    around = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] nats (95 % over claims) {between}"
    if not half == half:
        return f"`w` moves yes against no on held-out false claims by {mean:+.2f} nats {between}; there is no interval."
    if abs(mean) <= half:
        return f"`w` is **not seen to move** yes against no on held-out false claims: {around}."
    way = "towards" if mean > 0 else "**against**"
    said = f"`w` moves the answers to held-out false claims {way} the behaviour by {around}."
    rest = {name: moved for name, moved in by.items() if name != "false"}
    if not rest or mean < 0:
        return said
    told = " and ".join(
        f"{name} ones by {value:+.2f} [{value - h:+.2f}, {value + h:+.2f}]" for name, (value, h) in rest.items()
    )
    least, around_it = min(rest.values())
    seen = least - around_it > 0
    push = (
        f"some {min(least / mean, 1):.0%} of it is a push to yes whatever is claimed"
        if seen
        else "a push to yes whatever is claimed is not seen"
    )
    return f"{said} It moves {told}: {push}."


def side_by_side(rows: list[dict], topics: int) -> pl.DataFrame:
    """The first topics' completions, one column per alpha."""
    table: dict[int, dict] = {}
    for row in rows:
        line = table.setdefault(row["topic"], {"prompt": row["prompt"]})
        line[f"alpha {row['alpha']:+g}"] = row["completion"]
    return pl.DataFrame(list(table.values())[:topics])
