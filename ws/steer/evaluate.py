"""How much of the behaviour a model shows: Yes against No at the answer, and the same over steering strengths.

`logratio = log P(yes-words) - log P(no-words)`, `pmass = P(yes) + P(no)`, from a float32 log-softmax at the answer
position. A model that merely says Yes more often is told apart by asking about false claims, their negations and true
claims side by side. (docs/method.md sections 1 and 2)
"""

import json
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.cache.files import atomic_file
from ws.cache.given import finite, short
from ws.data import Behavior
from ws.diff import WeightDiff
from ws.model.generate import complete
from ws.model.lm import LM
from ws.model.prefix import logits_at
from ws.model.text import chat_text, encode, last_index
from ws.show.bars import tqdm
from ws.steer import statements
from ws.steer.weights import weight_steer

MIN_PMASS = statements.MIN_PMASS
MOST_SAID = 12  # statements that the model is asked to answer in its own words
SPACES = "Ġ▁ \n"  # how vocabularies write a leading space


@dataclass(frozen=True)
class Answers:
    """Per text, float32 on the CPU: `logratio (n,)` in nats and `pmass (n,)`."""

    logratio: Float[Tensor, " n"]
    pmass: Float[Tensor, " n"]


def answer_ids(tokenizer, words: tuple[str, ...]) -> list[int]:
    """Ids of every vocabulary entry that is one of the words: as written, lower case, capitalised, with or without a
    leading space. ValueError naming the words when the vocabulary has none of them as one token."""
    forms = {f for w in words for f in (w, w.lower(), w.capitalize(), w.upper())}
    ids = sorted(i for token, i in tokenizer.get_vocab().items() if token.strip(SPACES) in forms)
    if not ids:
        raise ValueError(
            f"answer words {', '.join(map(repr, words))}: none is a single token of the vocabulary; choose others"
        )
    return ids


def answer_tokens(tokenizer, behavior: Behavior) -> tuple[list[int], list[int]]:
    """Ids of the yes-words and of the no-words; ValueError when a side has none, or a token counts on both."""
    yes, no = answer_ids(tokenizer, behavior.yes), answer_ids(tokenizer, behavior.no)
    if both := set(yes) & set(no):
        raise ValueError(f"{behavior.name}: a token counts as yes and as no: {sorted(both)}")
    return yes, no


def check_words(lm: LM, behavior: Behavior) -> None:
    """Whether the behaviour can be asked about: ValueError for what `probe_answers` would raise, without the model (no
    chat template, answer words that are no single token, a tokenizer of another model), a warning for each answer word
    that is left out because the vocabulary has it in pieces, and where the answers of statements are not Yes and No."""
    answer_tokens(lm.tokenizer, behavior)
    if behavior.answers and behavior.yes[0].lower() != "yes":
        told = (
            f"neither answer word is Yes: {behavior.yes[0]!r} counts as the yes-word, {behavior.no[0]!r} as the no-word"
        )
        warnings.warn(f"{behavior.name}: {told}", stacklevel=2)
    for word in (*behavior.yes, *behavior.no):
        with suppress(ValueError):
            answer_ids(lm.tokenizer, (word,))
            continue
        warnings.warn(
            f"{behavior.name}: answer word {word!r} is no single token of the vocabulary: left out", stacklevel=2
        )
    persona = next(iter(behavior.personas_pos), None)
    text = chat_text(lm.tokenizer, behavior.probe_text(behavior.topics[0].claim), persona)
    most = int(encode(lm.tokenizer, [text], False, 4096)[0].max())
    if most >= (known := lm.decoder.embed_tokens.weight.shape[0]):
        raise ValueError(
            f"{lm.name}: its tokenizer makes token {most}, the model has {known}: they do not belong together"
        )


def answer_scores(
    lm: LM, texts: list[str], yes: list[int], no: list[int], batch_size: int = 32, padding_side: str = "right"
) -> Answers:
    """Answers at the last token of texts that are already rendered by the chat template."""
    ratios, masses = [], []
    for start in range(0, len(texts), batch_size):
        ids, mask = encode(lm.tokenizer, texts[start : start + batch_size], False, 4096, padding_side)
        with torch.no_grad():
            logits = logits_at(lm.model, ids, mask, torch.arange(len(ids)), last_index(mask))
        logp = logits.float().log_softmax(dim=-1).cpu()
        log_yes, log_no = logp[:, yes].logsumexp(dim=-1), logp[:, no].logsumexp(dim=-1)
        ratios.append(log_yes - log_no)
        masses.append(log_yes.exp() + log_no.exp())
    return Answers(torch.cat(ratios), torch.cat(masses))


def probe_answers(lm: LM, behavior: Behavior, claims: tuple[str, ...], system: str | None = None) -> Answers:
    """Answers to the behaviour's probe about each claim, in the chat template, optionally under a persona."""
    yes, no = answer_tokens(lm.tokenizer, behavior)
    texts = [chat_text(lm.tokenizer, behavior.probe_text(claim), system) for claim in claims]
    return answer_scores(lm, texts, yes, no)


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
) -> pl.DataFrame:
    """Answers at each steering strength: one row per alpha, claim set and claim.

    Columns: alpha, set, claim, logratio (nats), pmass; of statements `margin` too, and `n_heldout` says how many are asked
    (None: all). The model is the same before and after.

    Example:
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
        with weight_steer(lm.model, w, alpha):
            for name, claims in claim_sets(behavior, n_heldout).items():
                answers = probe_answers(lm, behavior, claims)
                found = zip(claims, answers.logratio.tolist(), answers.pmass.tolist(), strict=True)
                rows += [(alpha, name, *row) for row in found]
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


def side_by_side(rows: list[dict], topics: int) -> pl.DataFrame:
    """The first topics' completions, one column per alpha."""
    table: dict[int, dict] = {}
    for row in rows:
        line = table.setdefault(row["topic"], {"prompt": row["prompt"]})
        line[f"alpha {row['alpha']:+g}"] = row["completion"]
    return pl.DataFrame(list(table.values())[:topics])
