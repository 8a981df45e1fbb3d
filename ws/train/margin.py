"""The answer margin: which of two written answers a model gives sooner, a behaviour score that needs no answer words.

    margin = log p(response_pos | user) / n_pos - log p(response_neg | user) / n_neg        nats per token

over the tokens of the response with the end of its turn (unless the answer was cut), chat template, no system prompt,
float32 log-softmax. Its mean and t interval are over topics, since pairs of a topic share what a model knows of it; of
statements over those of each half, and the halves count alike.
(docs/method.md section 1)
"""

import math

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.diff import WeightDiff
from ws.model.lm import LM
from ws.model.prefix import logits_at
from ws.model.text import answer_frame
from ws.show.bars import tqdm
from ws.steer.statements import HALVES, half_interval
from ws.steer.weights import weight_steer
from ws.train.examples import collate, make_example
from ws.train.lora import SIGNS
from ws.train.pairs import Pair, StatementPair

BATCH = 16  # texts per pass: what bounds the memory
MAX_LENGTH = 512  # tokens of a text, as in training


def answer_margin(
    lm: LM, pairs: tuple[Pair, ...], batch: int = BATCH, max_length: int = MAX_LENGTH
) -> Float[Tensor, " n"]:
    """The margin of each pair, float32 on the CPU, in nats per token. batch: texts per pass; it changes the time and the
    memory, not the result. ValueError where a user turn alone fills `max_length` tokens."""
    pos, neg = (answer_logprobs(lm, pairs, sign, batch, max_length) for sign in SIGNS)
    return pos - neg


@torch.no_grad()
def answer_logprobs(
    lm: LM, pairs: tuple[Pair, ...], sign: str, batch: int = BATCH, max_length: int = MAX_LENGTH
) -> Float[Tensor, " n"]:
    """Mean log-probability per response token of one side of each pair. Texts go through the model by length."""
    frame = answer_frame(lm.tokenizer)
    examples = [make_example(lm, row, sign, frame, max_length) for row in pairs]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    found = torch.zeros(len(examples))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        rows = collate([examples[i] for i in places])
        labels = rows["labels"][:, 1:]
        row, column = (labels != -100).nonzero(as_tuple=True)
        logits = logits_at(lm.model, rows["input_ids"], rows["attention_mask"], row, column)
        said = labels[row, column, None].to(logits.device)
        own = logits.float().log_softmax(dim=-1).gather(1, said)[:, 0].cpu()
        found[places] = torch.zeros(len(places)).index_add(0, row, own) / torch.bincount(row, minlength=len(places))
    return found


def margin_sweep(
    lm: LM, pairs: tuple[Pair, ...], w: WeightDiff, alphas: list[float], progress: bool = True
) -> pl.DataFrame:
    """The margin of each pair at each strength: alpha, topic, persona, sample, user, logp_pos, logp_neg, margin (nats per
    token). topic, persona and sample as in `Pair`; of statements `half` (yes, no) in place of the topic. The model is the same
    before and after."""
    about = [(row.topic, row.persona, row.sample, row.user) for row in pairs]
    rows = []
    for alpha in tqdm(alphas, "answer margin", disable=not progress):
        with weight_steer(lm.model, w, alpha):
            sides = [answer_logprobs(lm, pairs, sign).tolist() for sign in SIGNS]
        rows += [(alpha, *a, pos, neg, pos - neg) for a, pos, neg in zip(about, *sides, strict=True)]
    names = ["alpha", "topic", "persona", "sample", "user", "logp_pos", "logp_neg", "margin"]
    table = pl.DataFrame(rows, orient="row", schema=names)
    if any(isinstance(row, StatementPair) for row in pairs):
        half = pl.col("topic").replace_strict(dict(enumerate(HALVES)), return_dtype=pl.String)
        table = table.with_columns(topic=half).rename({"topic": "half"})
    return table


def summarise_margins(margins: pl.DataFrame) -> pl.DataFrame:
    """Per alpha: mean over topics (or statements), the ends of its 95 % t interval (NaN for one), numbers of these and of
    pairs. margins: `margin_sweep`."""
    rows = [
        (alpha, *mean_with_interval(part), part.height)
        for (alpha,), part in margins.sort("alpha", maintain_order=True).group_by("alpha", maintain_order=True)
    ]
    units = "statements" if "half" in margins.columns else "topics"
    return pl.DataFrame(rows, orient="row", schema=["alpha", "mean_margin", "low", "high", units, "pairs"])


def mean_with_interval(table: pl.DataFrame, column: str = "margin") -> tuple[float, float, float, int]:
    """(mean, low, high, number of units) of a column: the mean of the topics' means with its t interval; of a file without
    topics each pair counts as one. Of statements the mean of both halves' means, their t intervals added in quadrature."""
    if "half" in table.columns:
        parts = [table.filter(half=name)[column].to_numpy() for name in HALVES]
    else:
        by = "topic" if table["topic"].n_unique() > 1 else "sample"
        parts = [table.group_by(by, maintain_order=True).agg(pl.col(column).mean())[column].to_numpy()]
    mean = float(np.mean([part.mean() for part in parts]))
    half = math.hypot(*map(half_interval, parts)) / len(parts)
    return mean, mean - half, mean + half, sum(map(len, parts))


def margin_verdict(margins: pl.DataFrame, spread: float, score: str = "log-ratio") -> dict:
    """What the margin shows beside the sweep: `distance` (nats per token, between the extreme alphas, pair by pair), its interval
    `low`, `high` over topics or statements (None for one), `agrees` (whether it has the sign of `spread`, the sweep's own
    distance in nats, of its `score`: the log-ratio, of statements the margin of the matching answer) and `text`. margins:
    `margin_sweep`."""
    first, last = float(margins["alpha"].min()), float(margins["alpha"].max())
    down, up = (margins.filter(pl.col("alpha") == alpha) for alpha in (first, last))
    moved = down.with_columns(margin=up["margin"] - down["margin"])
    distance, low, high, units = mean_with_interval(moved)
    agrees = (distance > 0) == (spread > 0)
    means = [mean_with_interval(part)[0] for part in (down, up)]
    if not math.isnan(low):
        interval = f"{distance:+.3f} [{low:+.3f}, {high:+.3f}]"
        unsure = "; the interval holds 0, so that the margin does not show a movement" if low <= 0 <= high else ""
    else:
        low, high, interval, unsure = None, None, f"{distance:+.3f}", "; one topic gives no interval"
    said = "The signs agree" if agrees else "The signs disagree: the two scores do not measure the same here"
    if "half" in margins.columns:
        counts = [int((moved["half"] == name).sum()) for name in HALVES]
        told = f"statements ({counts[0]} of the Yes half, {counts[1]} of the No half, counted alike)"
    else:
        told = f"pairs of {units} topics" if margins["topic"].n_unique() > 1 else "pairs"
    text = (
        f"On {down.height} held-out {told} the answer margin goes from {means[0]:+.3f} at alpha {first:+g} to"
        f" {means[1]:+.3f} nats per token at alpha {last:+g}, a distance of {interval}; the"
        f" {score}'s is {spread:+.2f} nats. {said}{unsure}."
    )
    return {"distance": distance, "low": low, "high": high, "agrees": agrees, "text": text}
