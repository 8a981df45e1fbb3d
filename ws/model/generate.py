"""What a model writes: sampled or greedy answers to prompts that the chat template has rendered, until the end of the turn: `p_t
~ softmax(z_t / temperature)` cut to the nucleus of mass `top_p`; at temperature 0 the most probable token. (method section 1)"""

import torch

from ws.model.lm import LM
from ws.model.text import answer_frame, encode


def turn_end(tokenizer) -> str:
    """What the chat template puts after an answer (`<|im_end|>`), or the EOS token where it puts nothing."""
    return answer_frame(tokenizer)[1]


def write_answers(
    lm: LM, prompts: list[str], max_new_tokens: int, temperature: float | int = 0, top_p: float | int = 1, seed: int = 0
) -> list[str]:
    """Answers to rendered prompts, one batch padded on the left, seeded; special tokens and blanks stripped. The model
    is in eval mode meanwhile; the caller's random state stays."""
    return [text for text, _ in answers_and_cuts(lm, prompts, max_new_tokens, temperature, top_p, seed)]


def answers_and_cuts(
    lm: LM, prompts: list[str], max_new_tokens: int, temperature: float | int = 0, top_p: float | int = 1, seed: int = 0
) -> list[tuple[str, bool]]:
    """The answers of `write_answers`, and of each whether the token limit cut it: the model did not end its turn."""
    from transformers import GenerationConfig

    ids, mask = encode(lm.tokenizer, prompts, False, max_length=1 << 20, padding_side="left")
    known = getattr(lm.model.generation_config, "eos_token_id", None)
    ending = lm.tokenizer(turn_end(lm.tokenizer), add_special_tokens=False)["input_ids"]
    ends = {lm.tokenizer.eos_token_id, *(known if isinstance(known, list | tuple) else [known])}
    stops = sorted(i for i in ends | set(ending if len(ending) == 1 else []) if i is not None)
    sampled = temperature > 0
    draw = {"temperature": temperature, "top_p": top_p, "top_k": 0}
    settings = GenerationConfig(
        do_sample=sampled,
        **(draw if sampled else dict.fromkeys(draw)),
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=next((t for t in (lm.tokenizer.pad_token_id, *stops) if t is not None), 0),
    )
    was = lm.model.training
    lm.model.eval()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            torch.manual_seed(seed)
            ids, mask = ids.to(lm.device), mask.to(lm.device)
            output = lm.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    finally:
        lm.model.train(was)
    new = output[:, ids.shape[1] :].tolist()
    ends = [next((i for i, t in enumerate(row) if t in stops), len(row)) for row in new]
    texts = lm.tokenizer.batch_decode([row[:i] for row, i in zip(new, ends, strict=True)], skip_special_tokens=True)
    return [(text.strip(), i == len(row)) for text, i, row in zip(texts, ends, new, strict=True)]


def complete(lm: LM, texts: list[str], max_new_tokens: int = 64) -> list[str]:
    """Greedy answers to rendered texts: `write_answers` at temperature 0."""
    return write_answers(lm, texts, max_new_tokens)
