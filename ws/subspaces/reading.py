"""What a model computes on texts: one forward pass per text set records all that candidates need. (method section 3)"""

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ws.model.lm import LM
from ws.model.text import encode, last_index
from ws.model.trace import hidden, recorded
from ws.show.bars import tqdm


@dataclass(frozen=True)
class TextActs:
    """One text set's recordings, float32 on the CPU.

    resid: block outputs at the last token. embed: input of block 0 there. up_in: input of `mlp.up_proj` there. tokens:
    block outputs of all tokens, aligned at the right edge and zero-filled on the left. attn: the last token's attention
    row averaged over heads, aligned likewise. ids: the token ids, unpadded. claim: block outputs averaged over chosen
    tokens of each text. tokens, attn, up_in and claim are None where they were not asked for.
    """

    resid: Float[Tensor, "L n d"]
    embed: Float[Tensor, "n d"]
    ids: tuple[tuple[int, ...], ...]
    up_in: Float[Tensor, "L n d"] | None = None
    tokens: Float[Tensor, "L n T d"] | None = None
    attn: Float[Tensor, "L n T"] | None = None
    claim: Float[Tensor, "L n d"] | None = None

    @property
    def block(self) -> Float[Tensor, "L n d"]:
        """What each block added at the last token: post - pre."""
        return self.resid - torch.cat([self.embed[None], self.resid[:-1]])

    def take(self, rows: list[int]) -> "TextActs":
        """The recordings of some of the texts."""
        found = {f: getattr(self, f) for f in ("resid", "up_in", "tokens", "attn", "claim")}
        found = {f: None if x is None else x[:, rows] for f, x in found.items()}
        return TextActs(embed=self.embed[rows], ids=tuple(self.ids[i] for i in rows), **found)


@contextmanager
def eager_attention(model):
    """Attention weights are only returned by the eager implementation; the model's own comes back on exit."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def read_texts(
    lm: LM,
    texts: list[str],
    add_special_tokens: bool,
    detail: bool = False,
    batch_size: int = 16,
    padding_side: str = "right",
    label: str = "",
    max_length: int = 256,
    mean_of: Sequence[Sequence[int]] | None = None,
) -> TextActs:
    """Run the texts through the model once and record them. detail: also record up_in, tokens and attn. mean_of: of each
    text the places of the tokens whose mean is `claim`, counted from its first token. max_length: tokens that are read of
    a text. Shapes and units as in `TextActs`; raises ValueError for no texts and for places that a text has not."""
    ids, mask = encode(lm.tokenizer, texts, add_special_tokens, max_length, padding_side)
    for i, (places, length) in enumerate(zip(mean_of or [], mask.sum(dim=1).tolist(), strict=mean_of is not None)):
        if not places or not 0 <= min(places) <= max(places) < length:
            raise ValueError(
                f"text {i}: has {length} tokens, none or others are to be averaged: {list(places)[:3]} ..."
            )
    width = int(mask.sum(dim=1).max())
    order, parts = range(0, len(texts), batch_size), []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if detail:
            stack.enter_context(eager_attention(lm.model))
        for start in tqdm(order, desc=label, disable=not label or len(order) < 2, leave=False):
            rows = slice(start, start + batch_size)
            parts.append(_read_batch(lm, ids[rows], mask[rows], detail, width, mean_of[rows] if mean_of else None))
    unpadded = tuple(tuple(row[real > 0].tolist()) for row, real in zip(ids, mask, strict=True))
    whole = {name: torch.cat([p[name] for p in parts], dim=int(name != "embed")) for name in parts[0]}
    return TextActs(ids=unpadded, **whole)


def _read_batch(
    lm: LM,
    ids: Int[Tensor, "n T"],
    mask: Int[Tensor, "n T"],
    detail: bool,
    width: int,
    mean_of: Sequence[Sequence[int]] | None,
) -> dict:
    """Every layer is reduced to what is kept as the pass reaches it; tokens are aligned at the right edge of `width`."""
    decoder, last = lm.decoder, last_index(mask)
    resid, up_in, tokens, claim, embed = {}, {}, {}, {}, {}
    rows = torch.arange(len(ids))
    # one gather index moves every text's tokens to the right edge: column width - len + j <- column of token j
    lengths = mask.sum(dim=1)
    column = torch.arange(width)[None, :] - (width - lengths)[:, None]
    source = ((last - lengths + 1)[:, None] + column).clamp(min=0)
    real = (column >= 0).float()
    # only real tokens are gathered, what fills a row up has no weight: what padding holds moves nothing
    most = max(map(len, mean_of or [()]))
    chosen = torch.tensor([[*places, *[places[0]] * (most - len(places))] for places in mean_of or []])
    weight = torch.tensor([[1 / len(p)] * len(p) + [0.0] * (most - len(p)) for p in mean_of or []])

    def at_last(states: Tensor) -> Tensor:
        return states[rows.to(states.device), last.to(states.device)].float().cpu()

    def at_block(l, output, inputs):
        states = hidden(output)
        if l == 0:
            embed[0] = at_last(inputs[0])
        resid[l] = at_last(states)
        if mean_of:
            picked = states[rows[:, None].to(states.device), (chosen + (last - lengths + 1)[:, None]).to(states.device)]
            claim[l] = (picked.float().cpu() * weight[:, :, None]).sum(dim=1)
        if detail:
            tokens[l] = states.float().cpu()[rows[:, None], source] * real[:, :, None]

    def at_up(l, _output, inputs):
        up_in[l] = at_last(inputs[0])

    at = {f"{decoder.prefix}.{l}": partial(at_block, l) for l in range(decoder.n_layers)}
    if detail:
        at |= {decoder.param_name(l, "up").removesuffix(".weight"): partial(at_up, l) for l in range(decoder.n_layers)}
    with recorded(lm.model, at):
        output = lm.run(ids, mask, output_attentions=detail)
    found = {"resid": resid} | ({"claim": claim} if mean_of else {})
    if detail:
        last_rows = (weights.float().mean(dim=1).cpu()[rows, last] for weights in output.attentions)
        attn = {l: row[rows[:, None], source] * real for l, row in enumerate(last_rows)}
        found |= {"up_in": up_in, "tokens": tokens, "attn": attn}
    stacked = {name: torch.stack([by_layer[l] for l in range(decoder.n_layers)]) for name, by_layer in found.items()}
    return stacked | {"embed": embed[0]}
