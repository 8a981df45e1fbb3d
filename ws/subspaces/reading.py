"""What a model computes on texts: one reading per text set records all that candidates need; what several texts begin with
goes through the model once. (method section 3)"""

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ws.model.lm import LM
from ws.model.prefix import reads_each
from ws.model.text import encode, last_index
from ws.model.together import Pass, passes, together
from ws.model.trace import hidden, recorded
from ws.show.bars import tqdm


@dataclass(frozen=True)
class TokenStates:
    """Block outputs of all tokens of n texts, `(L, n, T, d)`, aligned at the right edge and zero-filled on the left; what texts
    begin with alike is held once. states: `(L, m, d)`; at: which state each token has, m where there is none. Indexed by
    layer: `x[l]` is `(n, T, d)`."""

    states: Float[Tensor, "L m d"]
    at: Int[Tensor, "n T"]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.states), *self.at.shape, self.states.shape[2]

    def __getitem__(self, key: int | tuple) -> Tensor:
        l, *rest = key if isinstance(key, tuple) else (key,)
        one = self.states[l]
        found = torch.cat([one, one.new_zeros(1, one.shape[1])])[self.at]
        return found[tuple(rest)] if rest else found

    def dense(self) -> Float[Tensor, "L n T d"]:
        """All layers."""
        return torch.stack([self[l] for l in range(len(self.states))])

    def take(self, rows: list[int]) -> "TokenStates":
        """Those of some of the texts."""
        return TokenStates(self.states, self.at[rows])


@dataclass(frozen=True)
class TextActs:
    """One text set's recordings, float32 on the CPU.

    resid: block outputs at the last token. embed: input of block 0 there. up_in: input of `mlp.up_proj` there. tokens:
    block outputs of all tokens. attn: the last token's attention row averaged over heads, aligned as they are. ids: the
    token ids, unpadded. claim: block outputs averaged over chosen tokens of each text. tokens, attn, up_in and claim are
    None where they were not asked for.
    """

    resid: Float[Tensor, "L n d"]
    embed: Float[Tensor, "n d"]
    ids: tuple[tuple[int, ...], ...]
    up_in: Float[Tensor, "L n d"] | None = None
    tokens: TokenStates | None = None
    attn: Float[Tensor, "L n T"] | None = None
    claim: Float[Tensor, "L n d"] | None = None

    @property
    def block(self) -> Float[Tensor, "L n d"]:
        """What each block added at the last token: post - pre."""
        return self.resid - torch.cat([self.embed[None], self.resid[:-1]])

    def take(self, rows: list[int]) -> "TextActs":
        """The recordings of some of the texts."""
        found = {f: getattr(self, f) for f in ("resid", "up_in", "attn", "claim")}
        found = {f: None if x is None else x[:, rows] for f, x in found.items()}
        found["tokens"] = None if self.tokens is None else self.tokens.take(rows)
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
    batch_size: int = 32,
    padding_side: str = "right",
    label: str = "",
    max_length: int = 256,
    mean_of: Sequence[Sequence[int]] | None = None,
) -> TextActs:
    """Run the texts through the model once and record them. detail: also record up_in, tokens and attn. mean_of: of each
    text the places of the tokens whose mean is `claim`, counted from its first token. max_length: tokens that are read of
    a text. Shapes and units as in `TextActs`; raises ValueError for no texts and for places that a text has not."""
    ids, mask = encode(lm.tokenizer, texts, add_special_tokens, max_length, padding_side)
    lengths = mask.sum(dim=1)
    for i, (places, length) in enumerate(zip(mean_of or [], lengths.tolist(), strict=mean_of is not None)):
        if not places or not 0 <= min(places) <= max(places) < length:
            raise ValueError(
                f"text {i}: has {length} tokens, none or others are to be averaged: {list(places)[:3]} ..."
            )
    width = int(lengths.max())
    window = getattr(lm.decoder.body.config, "sliding_window", None) or width + 1  # beyond it a cache forgets
    groups = together(ids, mask, padding_side == "right" and window > width and not reads_each(lm.model, width))
    found = _Recording(lm, mask, groups, mean_of, detail)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if detail:
            stack.enter_context(eager_attention(lm.model))
        bar = stack.enter_context(
            tqdm(total=len(texts), desc=label, disable=not label or len(texts) <= batch_size, leave=False)
        )
        for one in passes(ids, mask, groups, lambda n, _T, _first: n <= batch_size):
            found.read(one)
            bar.update(0 if one.leads else len(one.places))
    unpadded = tuple(tuple(row[real > 0].tolist()) for row, real in zip(ids, mask, strict=True))
    return TextActs(ids=unpadded, **found.kept())


class _Recording:
    """What is kept of texts; every layer is reduced to it as a pass reaches it."""

    def __init__(self, lm: LM, mask: Int[Tensor, "n T"], groups: list, mean_of: object, detail: bool):
        self.lm, self.detail, decoder, n = lm, detail, lm.decoder, len(mask)
        self.start, lengths = mask.argmax(dim=1), mask.sum(dim=1).tolist()
        shape = (decoder.n_layers, n, decoder.d)
        self.resid, self.embed = torch.zeros(shape), torch.zeros(shape[1:])
        # only real tokens are gathered, what fills a row up has no weight: what padding holds moves nothing
        self.mean_of, most = mean_of, max(map(len, mean_of or [()]))
        self.chosen = torch.tensor([[*places, *[places[0]] * (most - len(places))] for places in mean_of or []])
        self.weight = torch.tensor([[1 / len(p)] * len(p) + [0.0] * (most - len(p)) for p in mean_of or []])
        self.claim = torch.zeros(shape) if mean_of else None
        self.up_in = self.tokens = self.attn = None
        if detail:
            # of each text, from its first token on, which state is whose; moved to the right edge in the end
            width, self.own, many = max(lengths), torch.full(mask.shape, -1), 0
            for first, those in groups:
                self.own[those, :first] = many + torch.arange(first)
                many += first
                for i in those:
                    self.own[i, first : lengths[i]] = many + torch.arange(lengths[i] - first)
                    many += lengths[i] - first
            self.up_in, self.attn = torch.zeros(shape), torch.zeros(decoder.n_layers, n, width)
            at = torch.full((n, width), many)
            for i, length in enumerate(lengths):
                at[i, width - length :] = self.own[i, :length]
            self.tokens = TokenStates(torch.zeros(decoder.n_layers, many, decoder.d), at)

    def kept(self) -> dict:
        return {name: getattr(self, name) for name in ("resid", "embed", "up_in", "tokens", "attn", "claim")}

    def read(self, one: Pass) -> None:
        """One pass, recorded."""
        decoder, at = self.lm.decoder, {}
        for l in range(decoder.n_layers):
            at[f"{decoder.prefix}.{l}"] = partial(self._lead if one.leads else self._block, one, l)
            if self.detail and not one.leads:
                at[decoder.param_name(l, "up").removesuffix(".weight")] = partial(self._up, one, l)
        if one.leads and not self.detail:
            one.run(self.lm.body, self.lm.device)
            return
        with recorded(self.lm.model, at):
            output = one.run(self.lm.body, self.lm.device, output_attentions=self.detail)
        if self.detail and not one.leads:
            rows, width = torch.arange(len(one.ids)), self.attn.shape[2]
            for l, weights in enumerate(output.attentions):
                row = weights[rows.to(weights.device), :, one.last.to(weights.device)].float().mean(dim=1).cpu()
                for i, values, start, stop in zip(one.places, row, *self._span(one), strict=True):
                    self.attn[l, i, width - (stop - start) :] = values[start:stop]

    def _span(self, one: Pass) -> tuple[list[int], list[int]]:
        """First column of each text and the one after its last."""
        return one.mask.argmax(dim=1).tolist(), (last_index(one.mask) + 1).tolist()

    def _lead(self, one: Pass, l: int, output, _inputs) -> None:
        self.tokens.states[l, self.own[one.places[0], : one.ids.shape[1]]] = hidden(output)[0].float().cpu()

    def _up(self, one: Pass, l: int, _output, inputs) -> None:
        self.up_in[l, one.places] = _picked(inputs[0], one.last[:, None])[:, 0]

    def _block(self, one: Pass, l: int, output, inputs) -> None:
        states = hidden(output)
        if l == 0:
            self.embed[one.places] = _picked(inputs[0], one.last[:, None])[:, 0]
        self.resid[l, one.places] = _picked(states, one.last[:, None])[:, 0]
        if self.mean_of:
            columns = self.chosen[one.places] + self.start[one.places, None] - one.first
            self.claim[l, one.places] = (_picked(states, columns) * self.weight[one.places, :, None]).sum(dim=1)
        if self.detail:
            real = one.mask[:, one.first :] > 0
            own = torch.cat([self.own[i, one.first : int(m.sum())] for i, m in zip(one.places, one.mask, strict=True)])
            self.tokens.states[l, own] = states.float().cpu()[real]


def _picked(states: Float[Tensor, "n T d"], columns: Int[Tensor, "n k"]) -> Float[Tensor, "n k d"]:
    """Float32 states of some columns of each row, on the CPU."""
    rows = torch.arange(len(states))[:, None].to(states.device)
    return states[rows, columns.to(states.device)].float().cpu()
