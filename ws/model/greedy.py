"""What a model goes on to say, token by token: `y_t = argmax p(. | x, y_<t)`, as ids, the end of the turn included.
(docs/method.md section 8)"""

from collections.abc import Sequence

import torch

from ws.model.generate import turn_end
from ws.model.lm import LM


def greedy_ids(lm: LM, rows: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Up to `most` tokens after each row of ids, one batch padded on the left; what ends the turn is the last of them where the
    model came to it. The model is as it is found: also steered. ValueError for an empty row."""
    from transformers import GenerationConfig

    if not rows or not all(map(len, rows)):
        raise ValueError("no prompt to go on from, or one without a token")
    ending = lm.tokenizer(turn_end(lm.tokenizer), add_special_tokens=False)["input_ids"]
    known = getattr(lm.model.generation_config, "eos_token_id", None)
    ends = {lm.tokenizer.eos_token_id, *(known if isinstance(known, list | tuple) else [known])}
    stops = sorted({*ends, *(ending if len(ending) == 1 else [])} - {None})
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=lm.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)
    plain = dict.fromkeys(("temperature", "top_p", "top_k"))
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=stops or None, pad_token_id=0, **plain
    )
    with torch.no_grad():
        output = lm.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    new = output[:, width:].tolist()
    return [row[: next((i + 1 for i, t in enumerate(row) if t in stops), len(row))] for row in new]
