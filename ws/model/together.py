"""Texts read in few tokens: what several begin with goes through the model once (`ws.model.prefix`), texts of like length go
together, and blocks that two readings have in common run in the first of them alone."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from ws.model.decoder import Decoder, unembeds_some
from ws.model.guard import Guarded, compiled
from ws.model.lm import LM
from ws.model.prefix import reads_each
from ws.model.text import last_index, position_ids

LEAST, PASS = 4, 64  # tokens of a beginning that is worth a pass of its own; and what a pass costs beside its tokens
Ids = Int[Tensor, "n T"]
Group = tuple[int, list[int]]  # how many tokens texts begin with alike, and which they are
Fits = Callable[[int, int, int], bool]
Read = Callable[[Float[Tensor, "S k V"], list[int]], object]


@dataclass
class Pass:
    """One pass: of the texts at `places` what follows their first `first` tokens, or (`leads`) these tokens of all of them as
    one row. ids, mask: `(n, T)`, from the first token on; cache: keys and values of the first tokens, once the lead has run."""

    places: list[int]
    ids: Ids
    mask: Ids
    first: int = 0
    lead: "Pass | None" = None
    leads: bool = False
    cache: Cache | None = None

    def run(self, module: nn.Module, device: torch.device, **more):
        """The output of a model, or of its body, on the tokens that are read."""
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": position_ids(self.mask)}
        inputs = {name: x[:, 0 if name == "attention_mask" else self.first :].to(device) for name, x in inputs.items()}
        if self.lead:
            inputs["past_key_values"] = deepcopy(self.lead.cache)
            inputs["past_key_values"].batch_repeat_interleave(len(self.ids))
        output = module(**inputs, use_cache=self.leads or self.lead is not None, **more)
        self.cache = output.past_key_values if self.leads else None
        return output


def may_share(lm: LM, width: int) -> bool:
    """Whether what texts of at most `width` tokens begin with may be read once: beyond a sliding window a cache forgets."""
    window = getattr(lm.decoder.body.config, "sliding_window", None) or width + 1
    return window > width and not reads_each(lm.model, width)


def together(ids: Ids, mask: Ids, share: bool = True) -> list[Group]:
    """Texts that are padded on the right, shortest first, in groups that are read together. share: whether what several begin
    with may be read once; else all are one group that begins with nothing."""
    order = mask.sum(dim=1).argsort(stable=True).tolist()
    return _parted(ids, mask, order) if share else [(0, order)]


def passes(ids: Ids, mask: Ids, groups: Sequence[Group], fits: Fits, stack: int = 1) -> list[Pass]:
    """The passes that read texts in `groups`, in order: each lead before what it serves, cut where that leaves the least padding.
    `fits(few, length, first)`: whether so many texts of at most that length may go together; stack: rows of each."""
    lengths, found = (mask * torch.arange(1, mask.shape[1] + 1)).amax(dim=1).tolist(), []
    for first, those in groups:
        lead = Pass(those, ids[those[:1], :first], mask[those[:1], :first], leads=True) if first else None
        best = [(0, 0)]  # of the first texts: what reading them costs, and where their last pass begins
        for end, width in enumerate((lengths[i] for i in those), 1):
            starts = [i for i in range(end) if i == end - 1 or fits(end - i, width, first)]
            best.append(min((best[i][0] + PASS + stack * (end - i) * (width - first), i) for i in starts))
        end, found = len(those), found + [lead] * bool(lead)
        while end:
            start, width = best[end][1], lengths[those[end - 1]]
            places, end = those[start:end], start
            found.append(Pass(places, ids[places, :width], mask[places, :width], first, lead))
    return found


def read_last(lm: LM, ids: Ids, mask: Ids, fits: Fits, read: Read, stack: int = 1, share: bool = True) -> None:
    """`read(logits, places)` for pass after pass: float32 logits `(stack, k, V)` after the last token of the texts at `places`,
    of `stack` rows for each; nothing else is unembedded. share: unless somebody's hook may tell, what texts begin with is read
    once."""
    groups = together(ids, mask, share and unembeds_some(lm.model) and not reads_each(lm.model, ids.shape[1]))
    for one in passes(ids, mask, groups, fits, stack):
        if one.leads:
            one.run(lm.decoder.body, lm.device)
            continue
        read(last_logits(lm, one, stack).unflatten(0, (stack, -1)), one.places)


def last_logits(lm: LM, one: Pass, stack: int = 1) -> Float[Tensor, "n V"]:
    """A pass through the whole model: float32 logits after the last token of each row, and no others."""
    last = (last_index(one.mask) - one.first).repeat(stack)
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
