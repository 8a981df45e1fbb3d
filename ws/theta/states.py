"""Users' texts, and the last hidden states that a frozen model has on them, recorded once.

A user is a set of (prompt, text) pairs in one style or opinion. A pair becomes tokens `[prompt in the chat template] +
[text]`; the state `h_t` before the unembedding at position t predicts token `t + 1`, so the record is the pairs

    (h_t, y_t = token_{t+1})   for the t whose target is one of the user's own words (or, unmasked, for every t)

and everything later works on these alone: the model is not run again. docs/method.md section 10.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ws.cache.given import MOST_TEXT, fits, given_lines, parsed, short
from ws.cache.keys import stage_key
from ws.cache.made import kept
from ws.cache.places import ASSETS
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.model.text import chat_text, encode
from ws.model.together import may_share, passes, together, window
from ws.show.bars import tqdm
from ws.theta.live import check_plain_logits

FIELDS = ("user", "prompt", "text")


@dataclass(frozen=True)
class UserText:
    """One text of a user, and the prompt it answers (may be empty)."""

    user: str
    prompt: str
    text: str


@dataclass(frozen=True, eq=False)
class States:
    """Recorded states h `(T, d)` float32 on the CPU, targets y `(T,)`, and `text` `(T,)`: which text a token is of."""

    h: Float[Tensor, "T d"]
    y: Int[Tensor, " T"]
    text: Int[Tensor, " T"]

    def of_texts(self, texts: list[int]) -> "States":
        """The tokens of these texts only, in the record's order; `text` keeps the record's numbers."""
        keep = torch.isin(self.text, torch.tensor(texts, dtype=torch.long)).nonzero()[:, 0]
        return States(self.h[keep], self.y[keep], self.text[keep])


def load_users(path: Path | str = "") -> dict[str, list[UserText]]:
    """Users in order of first appearance, from a JSONL file with rows `{"user", "prompt", "text"}`; '' = shipped ones.
    A prompt or text has at most 10,000 characters, a user's name 200, a file 100,000 lines and 64 MB. Raises
    FileNotFoundError, or ValueError naming the line and what is wrong with it; for fewer than two users, and for a user
    with fewer than two texts (one must be held out), too."""
    path = Path(path).expanduser() if path else ASSETS / "users.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"USERS: {path} does not exist")
    users: dict[str, list[UserText]] = {}
    for number, line in enumerate(given_lines(path), 1):
        if line.strip():
            row = parsed(line, where := f"USERS {path}, line {number}")
            try:
                item = _user_text(row)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            users.setdefault(item.user, []).append(item)
    if len(users) < 2:
        raise ValueError(f"USERS {path}: {len(users)} user(s); at least two are needed to compare them")
    for user, texts in users.items():
        if len(texts) < 2:
            raise ValueError(f"USERS {path}: user {user!r} has one text; at least two are needed, to hold one out")
    return users


def _user_text(row: object) -> UserText:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with {', '.join(FIELDS)}, found {type(row).__name__}")
    for field in FIELDS:
        if not isinstance(row.get(field), str):
            raise ValueError(f"field {field!r} is missing or not a text")
        if field != "prompt" and not row[field].strip():
            raise ValueError(f"field {field!r} is empty")
        fits(row[field], f"field {field!r}", 200 if field == "user" else MOST_TEXT)
    if unknown := sorted(set(row) - set(FIELDS)):
        raise ValueError(f"unknown field {short(unknown[0])}; the fields are {', '.join(FIELDS)}")
    return UserText(**row)


def split_texts(texts: list[UserText], heldout: float = 0.25) -> tuple[list[UserText], list[UserText]]:
    """A user's training texts and held-out texts: the last `heldout` part in file order, at least one text each."""
    if not 0 < heldout < 1:
        raise ValueError(f"HELDOUT = {heldout}: must lie between 0 and 1")
    if len(texts) < 2:
        raise ValueError(f"user {texts[0].user if texts else ''!r}: at least two texts are needed, to hold one out")
    n = min(len(texts) - 1, max(1, round(heldout * len(texts))))
    return texts[:-n], texts[-n:]


def prompt_text(lm: LM, prompt: str) -> str:
    """A prompt as the model sees it: the chat template with the generation prompt, or a line of its own without one."""
    if getattr(lm.tokenizer, "chat_template", None):
        return chat_text(lm.tokenizer, prompt)
    return f"{prompt}\n" if prompt else ""


def _tokens(lm: LM, item: UserText, mask_prompt: bool, max_length: int) -> tuple[list[int], int]:
    """Token ids of one pair, and the index of the first target; prompt and text are tokenized apart."""
    templated = bool(getattr(lm.tokenizer, "chat_template", None))
    before = lm.tokenizer(prompt_text(lm, item.prompt), add_special_tokens=not templated)["input_ids"]
    own = encode(lm.tokenizer, [item.text], False, max_length)[0][0].tolist()
    ids = [*before, *own][:max_length]
    if len(before) >= len(ids):
        raise ValueError(
            f"user {item.user!r}: the prompt {item.prompt[:40]!r} alone fills {max_length} tokens (MAX_LENGTH)"
        )
    if len(ids) < 2:
        raise ValueError(f"user {item.user!r}: the text {item.text[:40]!r} has no token to predict")
    return ids, max(len(before), 1) if mask_prompt else 1


def record_states(
    lm: LM,
    texts: list[UserText],
    mask_prompt: bool = True,
    max_length: int = 256,
    batch: int = 16,
    path: Path | None = None,
    progress: bool = True,
) -> States:
    """States and targets of all texts in one go, texts in the given order, each truncated at `max_length` tokens.
    mask_prompt: only targets among the user's own words count. With `path`, the states are kept there as safetensors,
    written block by block and memory-mapped, and read where they were recorded from the same model, tokens and
    settings. Raises ValueError when the model's logits are not `W h + b` of these states."""
    check_plain(lm.model)
    rows = [_tokens(lm, item, mask_prompt, max_length) for item in texts]
    targets = [torch.tensor(ids[first:]) for ids, first in rows]
    y, index = torch.cat(targets), torch.repeat_interleave(torch.tensor([len(t) for t in targets]))
    blocks = _state_blocks(lm, rows, batch, progress)
    if path is None or not (model := lm.fingerprint):
        h = torch.empty(len(y), lm.decoder.d)
        for start, part in blocks:
            h[start : start + len(part)] = part
        return States(h, y, index)
    params = {"model": model, "rows": rows, "batch": batch}
    key = stage_key(params, code=["ws.theta.states._state_blocks", "ws.theta.states._write_states"])
    h = kept(path, key, lambda target: _write_states(target, blocks, (len(y), lm.decoder.d)), _read_states)
    return States(h, y, index)


def record_users(
    lm: LM, users: dict[str, list[UserText]], heldout: float = 0.25, **options
) -> tuple[dict[str, States], dict[str, States]]:
    """Every user's training and held-out states, from one recording of all texts (`split_texts`). options: of
    `record_states`."""
    states = record_states(lm, [item for items in users.values() for item in items], **options)
    train, rest, start = {}, {}, 0
    for user, items in users.items():
        kept_back, end = start + len(split_texts(items, heldout)[0]), start + len(items)
        train[user] = states.of_texts(list(range(start, kept_back)))
        rest[user] = states.of_texts(list(range(kept_back, end)))
        start = end
    return train, rest


def _state_blocks(
    lm: LM, rows: list[tuple[list[int], int]], batch: int, progress: bool
) -> Iterator[tuple[int, Float[Tensor, "t d"]]]:
    """Of every text where its kept states begin in the record, and these, float32 on the CPU; what prompts begin with is read
    once for all of them."""
    module, body = check_plain_logits(lm.model), lm.model.get_decoder()
    texts = [torch.tensor(ids) for ids, _ in rows]
    mask = pad_sequence([torch.ones_like(ids) for ids in texts], batch_first=True)
    ids = pad_sequence(texts, batch_first=True)  # padded with 0, which is masked out
    starts = [0, *accumulate(len(own) - first for own, first in rows)]
    groups = together(ids, mask, may_share(lm, ids.shape[1]))
    groups = [(min(first, *(rows[i][1] - 1 for i in those)), those) for first, those in groups]
    every = passes(ids, mask, groups, lambda n, _length, _first: n <= batch, room=window(lm))
    with torch.no_grad():
        alone = {"input_ids": texts[0][None].to(lm.device), "use_cache": False}
        _check_logits(lm, module(body(**alone).last_hidden_state), lm.model(**alone).logits)
        for one in tqdm(every, "hidden states", disable=not progress):
            h = one.run(body, lm.device).last_hidden_state
            for i, of_text, before in zip(() if one.leads else one.places, h, one.first.tolist(), strict=False):
                own, first = rows[i]
                yield starts[i], of_text[first - 1 - before : len(own) - 1 - before].float().cpu()


def _check_logits(lm: LM, ours: Tensor, model_s: Tensor) -> None:
    off = float((ours.float() - model_s.float()).abs().max() / model_s.float().abs().max().clamp(min=1e-6))
    if not off <= (0.05 if model_s.dtype in (torch.bfloat16, torch.float16) else 1e-3):
        wrong = f"its logits are not the unembedding of its last hidden state (off by {off:.2g})"
        raise ValueError(f"{type(lm.model).__name__}: {wrong}")


def _write_states(path: Path, blocks: Iterable[tuple[int, Tensor]], shape: tuple[int, int]) -> None:
    """A safetensors file with one float32 tensor `h`, written text by text: it never stands in memory whole."""
    T, d = shape
    header = json.dumps({"h": {"dtype": "F32", "shape": [T, d], "data_offsets": [0, T * d * 4]}}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for start, block in blocks:
            file.seek(8 + len(header) + start * d * 4)
            file.write(np.ascontiguousarray(block.numpy()).tobytes())


def _read_states(path: Path) -> Float[Tensor, "T d"]:
    with safe_open(path, "pt") as file:
        return file.get_tensor("h")
