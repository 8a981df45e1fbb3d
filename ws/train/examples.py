"""Training examples: pairs as token ids whose labels are the response alone, batches of them, their loss.

(docs/method.md section 1)
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ws.model.lm import LM
from ws.model.prefix import logits_at
from ws.model.text import chat_text
from ws.train.pairs import Pair


def shuffle_labels(rows: tuple[Pair, ...], seed: int) -> tuple[Pair, ...]:
    """The pairs with the two responses swapped by a fair coin per pair: the data of the null diff."""
    generator = np.random.default_rng(zlib.crc32(f"shuffle labels {seed}".encode()))
    swap = generator.random(len(rows)) < 0.5
    return tuple(
        replace(
            row, response_pos=row.response_neg, response_neg=row.response_pos, cut_pos=row.cut_neg, cut_neg=row.cut_pos
        )
        if s
        else row
        for row, s in zip(rows, swap, strict=True)
    )


def draw_pairs(rows: tuple[Pair, ...], train: list[int], seed: int) -> tuple[tuple[Pair, ...], float]:
    """The pairs with those at `train` drawn anew from among themselves, with replacement, within each topic and persona
    (written pairs: topic and wording); and the share of them that is drawn at all. Pairs at other places are as they were,
    so what is held out stays so. The draw is the seed's: the same for both signs, whatever their labels. (docs/method.md
    section 7)"""
    generator, drawn, strata = np.random.default_rng(zlib.crc32(f"resample {seed}".encode())), list(rows), {}
    for i in train:
        strata.setdefault((rows[i].topic, rows[i].persona), []).append(i)
    picked = {name: generator.choice(places, len(places)).tolist() for name, places in sorted(strata.items())}
    for name, places in strata.items():
        for place, pick in zip(places, picked[name], strict=True):
            drawn[place] = rows[pick]
    return tuple(drawn), len({pick for picks in picked.values() for pick in picks}) / len(train)


def make_example(lm: LM, row: Pair, sign: str, frame: tuple[str, str], max_length: int) -> dict[str, list[int]]:
    """Ids and labels of one answer; the prompt is exactly what the model sees when it is asked without a persona. An answer
    that the token limit or `max_length` cut has no label for the end of its turn: else w would learn when to stop. frame:
    what the template puts before and after an answer (`ws.model.text.answer_frame`)."""
    lead, end = frame
    prompt = lm.tokenizer(chat_text(lm.tokenizer, row.user), add_special_tokens=False)["input_ids"]
    answer, cut = row.answer(sign)
    reply = lm.tokenizer(lead + answer.strip() + ("" if cut else end), add_special_tokens=False)["input_ids"]
    if len(prompt) >= max_length:
        raise ValueError(f"topic {row.topic}: the prompt alone has {len(prompt)} tokens, max_length is {max_length}")
    return {"input_ids": (prompt + reply)[:max_length], "labels": ([-100] * len(prompt) + reply)[:max_length]}


def cut_share(rows: Sequence[Pair], sign: str, examples: list[dict[str, list[int]]], max_length: int) -> float:
    """Share of answers that a token limit ended: while they were written, or at `max_length`. examples: those of `rows`."""
    cut = [row.limited(sign) or len(one["input_ids"]) >= max_length for row, one in zip(rows, examples, strict=True)]
    return sum(cut) / max(1, len(cut))


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Right-padded ids, mask and labels `(n, T)`. The pad id is 0: masked out and without a label it is never read."""
    ids, labels = ([torch.tensor(row[key]) for row in batch] for key in ("input_ids", "labels"))
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    ids, labels = pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def label_loss(model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy of the labels `(n, T)`, nats in float32, and their number. Only positions before a label are
    unembedded: the vocabulary is most of a small model's work."""
    rows, at = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    base = getattr(model, "get_base_model", lambda: model)()
    logits = logits_at(base, inputs["input_ids"], inputs["attention_mask"], rows, at)
    loss = F.cross_entropy(logits.float(), labels[rows, at + 1].to(logits.device), reduction="sum")
    return loss, len(rows)


@torch.no_grad()
def response_loss(model: nn.Module, examples: list[dict[str, list[int]]], batch: int) -> float | None:
    """Mean cross-entropy per response token, in float32; None without examples."""
    if not examples:
        return None
    was, device, total, count = model.training, next(model.parameters()).device, 0.0, 0
    model.eval()
    for start in range(0, len(examples), batch):
        rows = {key: value.to(device) for key, value in collate(examples[start : start + batch]).items()}
        labels = rows.pop("labels")
        loss, n = label_loss(model, rows, labels)
        total, count = total + float(loss), count + n
    model.train(was)
    return total / count


def label_trainer() -> type:
    """transformers' Trainer with `label_loss`."""
    from transformers import Trainer

    class LabelTrainer(Trainer):
        """Unembeds what has a label; mean over the labels of all passes of a step, as the Trainer's own."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            loss, count = label_loss(model, inputs, labels)
            loss = loss / (count if num_items_in_batch is None else num_items_in_batch)
            return (loss, {}) if return_outputs else loss

    return LabelTrainer
