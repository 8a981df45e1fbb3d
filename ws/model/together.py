"""Texts read in few tokens: what several begin with goes through the model once (`ws.model.prefix`), texts of like length go
together, and blocks that two readings have in common run in the first of them alone."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ws.model.decoder import Decoder, unembeds_some
from ws.model.guard import Guarded, compiled
from ws.model.lm import LM
from ws.model.prefix import reads_each
from ws.model.text import last_index, position_ids

LEAST, PASS = 4, 64  # tokens of a beginning that is worth a row of its own; and what a pass costs beside its tokens
LEADS = 32  # beginnings that are read together
Ids = Int[Tensor, "n T"]
Group = tuple[int, list[int]]  # how many tokens texts begin with alike, and which they are
Fits = Callable[[int, int, int], bool]
Read = Callable[[Float[Tensor, "S k V"], list[int]], object]


@dataclass
class Pass:
    """One pass: of the texts at `places` what follows their first `first` tokens, or (`leads`) these tokens themselves, as rows
    that others go on from. ids, mask: `(n, t)`, of the tokens that are read; lead, of: where the first ones were read, and in
    which of its rows; cache: their keys and values, once the lead has run."""

    places: list[int]
    ids: Ids
    mask: Ids
    first: Int[Tensor, " n"]
    lead: "Pass | None" = None
    of: Int[Tensor, " n"] | None = None
    leads: bool = False
    cache: Cache | None = None

    @property
    def whole(self) -> Ids:
        """The mask of all tokens that are seen, those of the lead (filled up on the right) before what is read."""
        return torch.cat([self.lead.mask[self.of], self.mask], dim=1) if self.lead else self.mask

    def run(self, module: nn.Module, device: torch.device, **more):
        """The output of a model, or of its body, on the tokens that are read."""
        inputs = {"attention_mask": self.whole, "position_ids": position_ids(self.whole)[:, -self.ids.shape[1] :]}
        inputs = {name: x.to(device) for name, x in (inputs | {"input_ids": self.ids}).items()}
        if self.lead:
            inputs["past_key_values"] = cache = copy(self.lead.cache)
            cache.layers = [_lent(layer, self.of, len(self.lead.ids)) for layer in cache.layers]
        output = module(**inputs, use_cache=self.leads or self.lead is not None, **more)
        self.cache = output.past_key_values if self.leads else None
        return output


def _lent(layer: CacheLayerMixin, of: Int[Tensor, " n"], rows: int) -> CacheLayerMixin:
    """A layer's keys and values of a lead's `rows` rows (and of as many more for each of a stack) before those of the rows that
    go on from them. Nothing is kept of the latter, which nobody goes on from."""
    lent = copy(layer)

    def update(keys: Tensor, values: Tensor, *_args, **_more) -> tuple[Tensor, Tensor]:
        at = (torch.arange(0, len(layer.keys), rows)[:, None] + of).flatten().to(keys.device)
        return torch.cat([layer.keys[at], keys], dim=-2), torch.cat([layer.values[at], values], dim=-2)

    lent.update = update  # which must not know `lent`: a cycle would keep all of it until somebody collects
    return lent


def window(lm: LM) -> int:
    """So many tokens a cache remembers."""
    return getattr(lm.decoder.body.config, "sliding_window", None) or 1 << 60


def may_share(lm: LM, width: int) -> bool:
    """Whether what texts of at most `width` tokens begin with may be read once: beyond a sliding window a cache forgets."""
    return window(lm) > width and not reads_each(lm.model, width)


def together(ids: Ids, mask: Ids, share: bool = True) -> list[Group]:
    """Texts that are padded on the right, shortest first, in groups that are read together. share: whether what several begin
    with may be read once; else all are one group that begins with nothing."""
    order = mask.sum(dim=1).argsort(stable=True).tolist()
    return _parted(ids, mask, order) if share else [(0, order)]


def _led(groups: Sequence[Group], lengths: list[int], fits: Fits, room: int) -> list[list[Group]]:
    """Groups whose beginnings are read together: those without one; others, shortest first, as long as they fit, and as what is
    filled up in between lets nobody's first token out of sight."""
    parts: list[list[Group]] = [[group for group in groups if not group[0]]]
    led, longest = sorted((group for group in groups if group[0]), key=lambda group: group[0]), 0
    for first, those in led:
        rest = max(lengths[i] for i in those) - first
        alone = len(parts) == 1 or len(parts[-1]) == LEADS or not fits(len(parts[-1]) + 1, first, 0)
        if alone or first + max(rest, longest) >= room:
            parts, longest = [*parts, []], 0
        parts[-1].append((first, those))
        longest = max(rest, longest)
    return parts


def passes(ids: Ids, mask: Ids, groups: Sequence[Group], fits: Fits, stack: int = 1, room: int = 1 << 60) -> list[Pass]:
    """The passes that read texts in `groups`: what these begin with, then the rest of all of them, shortest first, cut where that
    leaves the least padding. `fits(few, length, first)`: whether so many texts of at most that length, of which so many tokens
    at most were read before, may go together; stack: rows of each; room: tokens that a cache remembers (`window`)."""
    lengths, found = (mask * torch.arange(1, mask.shape[1] + 1)).amax(dim=1).tolist(), []
    for some in _led(groups, lengths, fits, room):
        lead, most = None, max((first for first, _ in some), default=0)
        if most:
            begin, heads = torch.tensor([first for first, _ in some]), [those[0] for _, those in some]
            real = (torch.arange(most) < begin[:, None]).to(mask)
            lead = Pass(heads, ids[heads, :most] * real, real, torch.zeros_like(begin), leads=True)
        rest = [(lengths[i] - first, first, i, of) for of, (first, those) in enumerate(some) for i in those]
        rest.sort(key=lambda one: one[0])
        best = [(0, 0)]  # of the first texts: what reading them costs, and where their last pass begins
        for end, (width, *_) in enumerate(rest, 1):
            start, choices = end - 1, []
            while start >= 0 and (start == end - 1 or fits(end - start, most + width, most)):
                choices.append((best[start][0] + PASS + stack * (end - start) * width, start))
                start -= 1
            best.append(min(choices))
        end, found = len(rest), found + [lead] * bool(lead)
        while end:
            start, width = best[end][1], rest[end - 1][0]
            _, first, places, of = map(list, zip(*rest[start:end], strict=True))
            first, of, end = torch.tensor(first), torch.tensor(of), start
            at = first[:, None] + torch.arange(width)
            inside, at = at < mask.shape[1], at.clamp(max=mask.shape[1] - 1)
            own = mask[places].gather(1, at) * inside
            found.append(Pass(places, ids[places].gather(1, at) * inside, own, first, lead, of if lead else None))
    return found


def read_last(lm: LM, ids: Ids, mask: Ids, fits: Fits, read: Read, stack: int = 1, share: bool = True) -> None:
    """`read(logits, places)` for pass after pass: float32 logits `(stack, k, V)` after the last token of the texts at `places`,
    of `stack` rows for each; nothing else is unembedded. share: unless somebody's hook may tell, what texts begin with is read
    once."""
    groups = together(ids, mask, share and unembeds_some(lm.model) and not reads_each(lm.model, ids.shape[1]))
    for one in passes(ids, mask, groups, fits, stack, window(lm)):
        if one.leads:
            one.run(lm.decoder.body, lm.device)
            continue
        read(last_logits(lm, one, stack).unflatten(0, (stack, -1)), one.places)


def last_logits(lm: LM, one: Pass, stack: int = 1) -> Float[Tensor, "n V"]:
    """A pass through the whole model: float32 logits after the last token of each row, and no others."""
    last = last_index(one.mask).repeat(stack)
    handle = lm.decoder.logits_module().register_forward_pre_hook(partial(_pick, last))
    try:
        return one.run(lm.model, lm.device).logits[:, 0].float()
    finally:
        handle.remove()


def _pick(last: Int[Tensor, " n"], _module: nn.Module, args: tuple) -> tuple:
    rows = torch.arange(len(last), device=args[0].device)
    return args[0][rows, last.to(args[0].device)][:, None], *args[1:]


def _parted(ids: Ids, mask: Ids, those: list[int]) -> list[Group]:
    """Texts that go together, and how many tokens they begin with alike: parted wherever that leaves fewer tokens to read."""
    same = ((ids[those] == ids[those[:1]]) & (mask[those] != 0)).all(dim=0).int().cumprod(dim=0).sum()
    first = min(int(last_index(mask[those]).min()), int(same)) if len(those) > 1 else 0
    whole = [(first if first >= LEAST else 0, those)]
    if len(those) <= 2:
        return whole
    parts: dict[int, list[int]] = {}
    for i in those:
        parts.setdefault(int(ids[i, first]), []).append(i)
    parted = [more for part in parts.values() for more in _parted(ids, mask, part)] if len(parts) > 1 else whole

    def cost(groups: list[Group]) -> int:
        return sum(PASS + k + int(mask[some].sum()) - k * len(some) for k, some in groups)

    return min(whole, parted, key=cost)


class Once(Guarded):
    """A context in which the first `n` blocks of a decoder run once for each reading: `with once(about):` remembers what they
    give, pass after pass, and gives it again when it is opened about the same, which must make the same passes. A compiled
    model's are run each time."""

    def __init__(self, model: nn.Module, n: int):
        super().__init__(model)
        self.blocks, self.about, self.given, self.turn = Decoder(model).blocks[:n] if n else [], "", {}, None

    def __call__(self, about: str) -> "Once":
        self.about = about
        return self

    def start(self) -> None:
        self.turn = iter(self.given[self.about]) if self.about in self.given else None
        self.given.setdefault(self.about, [])
        for block in self.blocks if not compiled(self.value) else ():
            before = block.__dict__.get("forward")
            self.undo.append(partial(_put_back, block, before))
            block.forward = partial(self._run, block.forward, block.self_attn)

    def _run(self, forward: Callable, attention: nn.Module, hidden: Tensor, *args, **kwargs):
        if self.turn is None:
            self.given[self.about].append(forward(hidden, *args, **kwargs))
            return self.given[self.about][-1]
        cache = kwargs.get("past_key_values")
        if cache is not None:  # as long as the others' are, since masks are made by it
            blank = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            cache.update(blank, blank, attention.layer_idx)
        return next(self.turn)


def _put_back(block: nn.Module, before: Callable | None) -> None:
    block.__dict__.pop("forward", None)
    if before is not None:
        block.forward = before
