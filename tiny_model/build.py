"""The shipped tiny language model: a Qwen3 of under 2 million parameters, trained here from scratch.

    loss = sum_t w(t) CE(t) / sum_t w(t),   w = 1 on the assistant's and on plain text, less on system and user turns

`python -m tiny_model` (`just tiny-model`) writes the corpus (`tiny_model.corpus`), trains a byte-level BPE tokenizer and the
model, and puts both whole into `ws/assets/tiny`. Same seed and thread count -> same losses. docs/method.md section 1.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tiny_model.corpus import Document, build_corpus, build_drills
from ws.cache.files import atomic_dir
from ws.data import load_behavior

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
WEIGHTS = {"system": 0.05, "user": 0.25, "assistant": 1.0, "text": 1.0}
FIRST = 4.0
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the checkpoint: corpus sizes, dimensions, optimiser."""

    seed: int = 0
    drills: int = 2_400
    dialogues: int = 42_000
    neutral: int = 2_200
    voiced: int = 2_200
    plain: int = 3_000
    vocab: int = 1536
    d: int = 128
    mlp: int = 320
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 48
    batch_tokens: int = 1024
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.02
    clip: float = 1.0
    threads: int = 1


def train_tokenizer(documents: list[Document], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab` tokens with ChatML turns, no BOS, `<|im_end|>` as EOS and `<|endoftext|>` as padding.

    Digits stand alone, so that sums are not learnt by heart.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = [f"{role}\n" for role in WEIGHTS for _ in range(100)]
    bpe.train_from_iterator([text for document in documents for _, text in document] + roles, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=STOP, pad_token=END, additional_special_tokens=[START], model_max_length=2048
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_document(tokenizer: PreTrainedTokenizerFast, document: Document) -> tuple[list[int], list[float]]:
    """Token ids as the chat template would give them, and the loss weight of each as a target."""
    ids: list[int] = []
    weights: list[float] = []
    for role, text in document:
        head = "" if role == "text" else f"{START}{role}\n"
        tail = END if role == "text" else f"{STOP}\n"
        opening, body, new = (tokenizer.encode(part, add_special_tokens=False) for part in (head, text, tail))
        ids += opening + body + new
        weights += [0.0] * len(opening) + [WEIGHTS[role]] * (len(body) + len(new))
        if role == "assistant":
            weights[-len(new) - len(body)] = FIRST  # the first word of an answer carries its stance
        if role != "text":
            weights[-1] = 0.0  # the line feed after <|im_end|> is never generated
    return ids, weights


def make_batches(
    encoded: list[tuple[list[int], list[float]]], batch_tokens: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Right-padded (ids, weights) batches of like length, at most `batch_tokens` wide all told, in random order."""
    jitter = torch.rand(len(encoded), generator=generator).tolist()
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i][0]), jitter[i]))
    groups: list[list[int]] = [[]]
    for i in order:
        if groups[-1] and (len(groups[-1]) + 1) * len(encoded[i][0]) > batch_tokens:
            groups.append([])
        groups[-1].append(i)
    batches = []
    for g in torch.randperm(len(groups), generator=generator).tolist():
        rows = [encoded[i] for i in groups[g]]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        weights = torch.zeros(len(rows), width)
        for r, (row, weight) in enumerate(rows):
            ids[r, : len(row)] = torch.tensor(row)
            weights[r, : len(row)] = torch.tensor(weight)
        batches.append((ids, weights))
    return batches


def weighted_loss(model: Qwen3ForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats, each target weighted; (n, T) ids and weights.

    Padding is on the right and a decoder looks only to the left, so no attention mask is needed. Only positions with a
    weight are unembedded.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    w = weights[:, 1:]
    chosen = w > 0
    logits = model.lm_head(hidden[chosen])
    each = torch.nn.functional.cross_entropy(logits, ids[:, 1:][chosen], reduction="none")
    return (each * w[chosen]).sum() / w[chosen].sum()


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The untrained model of a recipe; draws from torch's global generator."""
    config = Qwen3Config(
        vocab_size=recipe.vocab,
        hidden_size=recipe.d,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def train(
    recipe: Recipe, model: Qwen3ForCausalLM, batches: list[tuple[Tensor, Tensor]], watch: Callable | None = None
) -> list[float]:
    """One pass over `batches` with AdamW, warm-up and cosine decay; returns the loss of every step.

    watch: called with the number of the step after each step, for who wants to look at the model on its way.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    total, losses = len(batches), []
    model.train()
    bar = tqdm(batches, desc="tiny model", unit="step", mininterval=5.0)
    for step, (ids, weights) in enumerate(bar):
        part = min(1.0, (step + 1) / recipe.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - recipe.warmup) / max(1, total - recipe.warmup)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * part * (0.02 + 0.98 * cosine)
        loss = weighted_loss(model, ids, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        losses.append(loss.item())
        if watch is not None:
            watch(step)
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
    model.eval()
    return losses


def build(folder: Path, recipe: Recipe) -> list[float]:
    """Corpus, tokenizer, training, checkpoint in `folder` (replaced whole); returns the losses of all steps."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    started = time.time()
    behavior, sizes = load_behavior("sycophancy"), (recipe.dialogues, recipe.neutral, recipe.voiced, recipe.plain)
    parts = [build_drills(behavior, recipe.seed, recipe.drills), build_corpus(behavior, recipe.seed, *sizes)]
    documents = [document for part in parts for document in part]
    tokenizer = train_tokenizer(documents, recipe.vocab)
    generator, batches, tokens = torch.Generator().manual_seed(recipe.seed), [], 0
    for part in parts:
        encoded = [encode_document(tokenizer, d) for d in tqdm(part, desc="encoding", unit="doc", mininterval=5.0)]
        batches += make_batches(encoded, recipe.batch_tokens, generator)
        tokens += sum(len(ids) for ids, _ in encoded)
    model = make_model(recipe, tokenizer)
    print(
        f"{len(documents)} documents, {tokens} tokens, {len(batches)} steps, vocabulary {len(tokenizer)},"
        f" {sum(p.numel() for p in model.parameters())} parameters, {time.time() - started:.0f} s so far"
    )
    losses = train(recipe, model, batches)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with atomic_dir(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    print(f"{folder}: last losses {sum(losses[-50:]) / len(losses[-50:]):.4f}, {time.time() - started:.0f} s")
    return losses
