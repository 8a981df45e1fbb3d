"""What reading a shared beginning once and unembedding labels alone saves, against the plain pass over padded texts.

A random Llama of SmolLM2-135M's shapes; 16 texts that share their first 31 tokens (its default system prompt) or 60 (an
answered turn too), then 20 to 40 of their own, of which the last 11 have labels. Seconds of the process, best of three, and the
largest difference of a log-probability. (ws.model.prefix)

.venv/bin/python bench/prefix.py
"""

import time
from functools import partial

import torch
import torch.nn.functional as F
from ratios import told

from ws.model.prefix import logits_at
from ws.train.examples import collate


def texts(shared: int) -> dict[str, torch.Tensor]:
    """Ids, mask and labels of 16 texts."""
    gen = torch.Generator().manual_seed(0)
    lead, rows = torch.randint(1, 49_152, (shared,), generator=gen).tolist(), []
    for length in torch.randint(20, 41, (16,), generator=gen).tolist():
        own = torch.randint(1, 49_152, (length,), generator=gen).tolist()
        rows.append({"input_ids": lead + own, "labels": [-100] * (shared + length - 11) + own[-11:]})
    return collate(rows)


def plain(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Textbook: all logits of all tokens; log-probabilities of the labels."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]


def ours(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["labels"][:, 1:]
    rows, at = (labels != -100).nonzero(as_tuple=True)
    logits = logits_at(model, batch["input_ids"], batch["attention_mask"], rows, at)
    return -F.cross_entropy(logits.float(), labels[rows, at], reduction="none")


def seconds(call, train: bool) -> tuple[float, torch.Tensor]:
    found = []
    for _ in range(3):
        start = time.process_time()
        with torch.set_grad_enabled(train):
            logp = call()
            if train:
                logp.mean().backward()
        found.append(time.process_time() - start)
    return min(found), logp.detach()


def main() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49_152, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers[9:24]:  # as an adapter's gradients would go back
        layer.mlp.down_proj.weight.requires_grad_(True)
    for shared in (31, 60):
        batch = texts(shared)
        for train in (False, True):
            (slow, a), (fast, b) = (seconds(partial(f, model, batch), train) for f in (plain, ours))
            what = "with gradients" if train else "without"
            ratio = told(f"{shared} shared tokens, {what}", slow, fast)
            print(
                f"{shared} shared tokens, {what}: {slow:.2f} s plain, {fast:.2f} s, ratio {ratio:.2f};"
                f" largest difference {float((a - b).abs().max()):.1e} nats"
            )


if __name__ == "__main__":
    main()
