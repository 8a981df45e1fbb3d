"""What a model computes on texts: one reading per text set records all that candidates need; what several texts begin with
goes through the model once. (method section 3)"""

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ws.model.lm import LM
from ws.model.text import encode, last_index
from ws.model.together import Group, Pass, Read, last_logits, may_share, passes, together, window
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
    answers: Read | None = None,
) -> TextActs:
    """Run the texts through the model once and record them. detail: also record up_in, tokens and attn. mean_of: of each
    text the places of the tokens whose mean is `claim`, counted from its first token. max_length: tokens that are read of
    a text. answers: is given the logits after the last token too, as by `ws.model.together.read_last`; not in detail. Shapes and
    units as in `TextActs`; raises ValueError for no texts and for places that a text has not."""
    ids, mask = encode(lm.tokenizer, texts, add_special_tokens, max_length, padding_side)
    lengths = mask.sum(dim=1)
    for i, (places, length) in enumerate(zip(mean_of or [], lengths.tolist(), strict=mean_of is not None)):
        if not places or not 0 <= min(places) <= max(places) < length:
            told = f"has {length} tokens, none or others are to be averaged"
            raise ValueError(f"text {i}: {told}: {list(places)[:3]} ...")
    width, shape = int(lengths.max()), (lm.decoder.n_layers, len(ids), lm.decoder.d)
    groups = together(ids, mask, padding_side == "right" and may_share(lm, width))
    if mean_of:  # whose tokens are read of each text by itself
        groups = [(min(first, *(min(mean_of[i]) for i in those)), those) for first, those in groups]
    found = {name: torch.zeros(shape) for name in ["resid", *["up_in"] * detail, *["claim"] * bool(mean_of)]}
    found |= {"embed": torch.zeros(shape[1:])} | ({"attn": torch.zeros(*shape[:2], width)} if detail else {})
    found |= {"tokens": _nothing_yet(groups, lengths.tolist(), lm)} if detail else {}
    quiet = not label or len(texts) <= batch_size
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eager_attention(lm.model) if detail else nullcontext())
        every = passes(ids, mask, groups, lambda n, _T, _first: n <= batch_size, room=window(lm))
        for one in tqdm(every, label, disable=quiet, leave=False):
            _record(lm, one, lengths[one.places], found, [mean_of[i] for i in one.places] if mean_of else [], answers)
    return TextActs(ids=tuple(tuple(row[real > 0].tolist()) for row, real in zip(ids, mask, strict=True)), **found)


def _nothing_yet(groups: Sequence[Group], lengths: list[int], lm: LM) -> TokenStates:
    """Room for the states of all tokens, and which is whose."""
    at, many = torch.full((len(lengths), max(lengths)), -1), 0
    for first, those in groups:
        shared, many = torch.arange(many, many + first), many + first
        for i in those:
            own = torch.arange(many, many + lengths[i] - first)
            at[i, -lengths[i] :], many = torch.cat([shared, own]), many + len(own)
    return TokenStates(torch.zeros(lm.decoder.n_layers, many, lm.decoder.d), at.where(at >= 0, torch.tensor(many)))


def _record(lm: LM, one: Pass, lengths: Int[Tensor, " n"], found: dict, mean_of: list, answers: Read | None) -> None:
    """One pass: every layer is reduced to what is kept as the pass reaches it."""
    decoder, last, own = lm.decoder, last_index(one.mask)[:, None], None
    # only real tokens are gathered, what fills a row up has no weight: what padding holds moves nothing
    most, begin = max(map(len, mean_of or [()])), one.mask.argmax(dim=1)
    chosen = torch.tensor([[*places, *[places[0]] * (most - len(places))] for places in mean_of])
    weight = torch.tensor([[1 / len(p)] * len(p) + [0.0] * (most - len(p)) for p in mean_of])
    if "tokens" in found:
        starts, real = found["tokens"].at.shape[1] - lengths + one.first, one.mask.sum(dim=1)
        rows = zip(one.places, starts.tolist(), (starts + real).tolist(), strict=True)
        own = torch.cat([found["tokens"].at[i, start:end] for i, start, end in rows])

    def at_block(l, output, inputs):
        states = hidden(output)
        if l == 0 and not one.leads:
            found["embed"][one.places] = _picked(inputs[0], last)[:, 0]
        if not one.leads:
            found["resid"][l, one.places] = _picked(states, last)[:, 0]
        if mean_of and not one.leads:
            columns = chosen + (begin - one.first)[:, None]
            found["claim"][l, one.places] = (_picked(states, columns) * weight[:, :, None]).sum(dim=1)
        if own is not None:
            found["tokens"].states[l, own] = states.float().cpu()[one.mask > 0]

    def at_up(l, _output, inputs):
        found["up_in"][l, one.places] = _picked(inputs[0], last)[:, 0]

    at = {f"{decoder.prefix}.{l}": partial(at_block, l) for l in range(decoder.n_layers)}
    if "up_in" in found and not one.leads:
        at |= {decoder.param_name(l, "up").removesuffix(".weight"): partial(at_up, l) for l in range(decoder.n_layers)}
    with recorded(lm.model, at):
        if answers and not one.leads:
            return answers(last_logits(lm, one)[None], one.places)
        output = one.run(lm.body, lm.device, **({"output_attentions": True} if own is not None else {}))
    for l, weights in enumerate(output.attentions if own is not None and not one.leads else ()):
        at_last = weights[torch.arange(len(weights), device=weights.device), :, last[:, 0].to(weights.device)]
        row = at_last.float().mean(dim=1).cpu()
        for i, values, real in zip(one.places, row, one.whole > 0, strict=True):
            found["attn"][l, i, -int(real.sum()) :] = values[real]


def _picked(states: Float[Tensor, "n T d"], columns: Int[Tensor, "n k"]) -> Float[Tensor, "n k d"]:
    """Float32 states of some columns of each row, on the CPU."""
    rows = torch.arange(len(states))[:, None].to(states.device)
    return states[rows, columns.to(states.device)].float().cpu()
