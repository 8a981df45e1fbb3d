"""What a model answers: Yes against No at the position where its answer begins. (docs/method.md section 1)

`logratio = log P(yes-words) - log P(no-words)`, `pmass = P(yes) + P(no)`, from a float32 log-softmax.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ws.cache.files import write_text
from ws.cache.keys import Key, stage_key
from ws.cache.made import kept, state
from ws.cache.syntax import digest
from ws.data import Behavior
from ws.diff import WeightDiff
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.model.text import chat_text, encode
from ws.model.together import Once, Read, read_last
from ws.model.wide import widened
from ws.steer.weights import untouched, weight_steer

SPACES = "Ġ▁ \n"  # how vocabularies write a leading space
TOKENS = 2048  # of a pass
ENDS = 1.0, -1.0  # of alpha, between which an effect lies
Known = Mapping[float, Mapping[str, Sequence[float]]]  # by alpha and rendered text: log-ratio and pmass


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
    """Whether the behaviour can be asked about: ValueError for what `kept_answers` would raise, without the model (no
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
    lm: LM, texts: list[str], yes: list[int], no: list[int], batch_size: int = 64, padding_side: str = "right"
) -> Answers:
    """Answers at the last token of texts that are already rendered by the chat template."""
    ids, mask = encode(lm.tokenizer, texts, False, 4096, padding_side)
    found = torch.zeros(2, len(ids))
    read = into(found, yes, no)
    with torch.no_grad():
        right = padding_side == "right"
        read_last(lm, ids, mask, lambda n, T, first: n <= batch_size and n * (T - first) <= TOKENS, read, share=right)
    return Answers(*found)


def into(found: Float[Tensor, "2 n"], yes: list[int], no: list[int]) -> Read:
    """What writes the log-ratio and pmass of texts into `found`, given the logits after their last tokens."""

    def read(logits: Float[Tensor, "1 k V"], places: list[int]) -> None:
        logp = logits[0].log_softmax(dim=-1).cpu()
        log_yes, log_no = logp[:, yes].logsumexp(dim=-1), logp[:, no].logsumexp(dim=-1)
        found[:, places] = torch.stack([log_yes - log_no, log_yes.exp() + log_no.exp()])

    return read


def kept_answers(
    lm: LM, behavior: Behavior, texts: list[str], w: WeightDiff | None, alpha: float, cache: Path | None
) -> Float[np.ndarray, "2 n"]:
    """Log-ratio (nats) and pmass of each user turn under `alpha w` (None: of the base model), read in float32 whatever the
    model's dtype. cache: a folder (of this model) to keep them in. The model is the same before and after. ValueError inside a
    steered model, and for answer words that are no tokens."""
    return answers_of(lm, behavior, [texts], w or WeightDiff({}), [alpha], cache)[0, 0]


def answers_of(
    lm: LM,
    behavior: Behavior,
    sets: list[list[str]],
    w: WeightDiff,
    alphas: list[float],
    cache: Path | None,
    known: Known | None = None,
) -> Float[np.ndarray, "A s 2 n"]:
    """`kept_answers` of s sets of as many texts at A alphas, each kept by itself; what is not kept is read together, w is put on
    once for each alpha, and blocks that it leaves alone run for the first alone. known: answers that were read with something
    else. Which texts are read together moves the last digits of float32."""
    check_plain(lm.model)
    yes, no = answer_tokens(lm.tokenizer, behavior)
    turns = [[chat_text(lm.tokenizer, text) for text in texts] for texts in sets]
    once, model = Once(lm.model, untouched(w, lm.decoder.n_layers) if len(alphas) > 1 else 0), lm.fingerprint

    code = ["ws.steer.answers.answer_scores", "ws.subspaces.reading.read_texts"]  # known ones are read by the latter

    def place(alpha: float, some: list[str]) -> tuple[Path, Key] | None:
        if cache is None or not model:
            return None
        params = {"model": model, "w": w.fingerprint if len(w) else "", "alpha": float(alpha), "words": [yes, no]}
        key = stage_key(params | {"texts": digest(repr(some).encode())}, code=code)
        return cache / "answers" / f"{behavior.slug}_{key.params[:8]}.json", key

    def at(alpha: float) -> list[list[list[float]]]:
        have, places = dict((known or {}).get(alpha, {})), [place(alpha, some) for some in turns]

        def measured(some: list[str]) -> list[list[float]]:
            missing = (one for one, to in zip(turns, places, strict=True) if to is None or state(*to) != "done")
            if todo := [text for text in dict.fromkeys(chain(*missing, some)) if text not in have]:
                with widened(lm.model, by_block=w.in_blocks), weight_steer(lm.model, w, alpha), once(repr(todo)):
                    answers = answer_scores(lm, todo, yes, no)
                have.update(zip(todo, zip(answers.logratio.tolist(), answers.pmass.tolist(), strict=True), strict=True))
            return [list(one) for one in zip(*(have[text] for text in some), strict=True)]

        def of(some: list[str], to: tuple[Path, Key] | None) -> list[list[float]]:
            write, read = (
                lambda path: write_text(path, json.dumps(measured(some))),
                lambda path: path.read_text("utf-8"),
            )
            return json.loads(kept(*to, write, read)) if to else measured(some)

        return [of(some, to) for some, to in zip(turns, places, strict=True)]

    return np.array([at(alpha) for alpha in alphas])
