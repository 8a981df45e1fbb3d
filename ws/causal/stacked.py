"""Many weight differences in one forward pass: `W x + alpha_s B_s (A_s x)` for each of S rows of a stack. (docs/method.md
section 8)

The stack lies along the batch: what S weight differences make of n texts is one pass of `S n` rows, in which a hook adds each
row's own product of factors. Below the first layer that any of them changes all rows are alike, so these layers run on n rows;
what all texts begin with runs on S. A factor A that all of them share is applied once to all rows. Weights are not touched."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ws.diff import WeightDiff
from ws.diff.core import LowRank, layer_of
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.model.text import encode
from ws.model.together import Read, read_last
from ws.model.wide import widened
from ws.steer.weights import check_fits

# tokens of a pass, stack included: read (more leave the cache), and held with what all texts begin with
TOKENS, HELD = 2048, 16384
Row = tuple[WeightDiff, float]  # a weight difference and its alpha


@dataclass(frozen=True)
class _Added:
    """What is added at one linear map: rows of the stack, and their factors, `(out, q)` and `(q, in)` each or one for all."""

    rows: Int[Tensor, " k"]
    left: Float[Tensor, "k q out"]  # alpha B^T
    right: Float[Tensor, "k in_ q"] | Float[Tensor, "in_ q"]

    @classmethod
    def of(cls, entries: dict[int, LowRank], alphas: Sequence[float], device: torch.device) -> "_Added":
        factors = {s: e.to(device, torch.float32) for s, e in entries.items()}
        q = max(e.rank for e in factors.values())
        left = torch.stack([alphas[s] * _wide(e.B, q).T for s, e in factors.items()])
        first = next(iter(entries.values())).A
        one = all(e.A is first for e in entries.values())
        kept = [_wide(e.A.T, q) for e in factors.values()]
        return cls(torch.tensor([*entries], device=device), left, kept[0] if one else torch.stack(kept))

    def __call__(self, x: Float[Tensor, "m T in_"], y: Float[Tensor, "m T out"], S: int) -> Float[Tensor, "m T out"]:
        """The output of `S n` rows with what is added."""
        x, y = x.unflatten(0, (S, -1)), y.unflatten(0, (S, -1))
        every = len(self.rows) == S
        z = (x if every else x[self.rows]).flatten(1, 2)
        z = z @ self.right
        if every:
            return torch.baddbmm(y.flatten(1, 2), z, self.left).unflatten(1, y.shape[1:3]).flatten(0, 1)
        more = torch.bmm(z, self.left).unflatten(1, y.shape[1:3])
        return y.index_add(0, self.rows, more).flatten(0, 1)


def _wide(M: Float[Tensor, "n k"], q: int) -> Float[Tensor, "n q"]:
    return M if M.shape[1] == q else nn.functional.pad(M, (0, q - M.shape[1]))


def stackable(lm: LM, w: WeightDiff) -> bool:
    """Whether w consists of factors on the decoder's linear maps."""
    maps = {m.weight: m for m in lm.model.modules() if type(m).forward is nn.Linear.forward}
    known = {name for name, p in lm.model.named_parameters() if p in maps and layer_of(name) is not None}
    return all(isinstance(e, LowRank) and name in known for name, e in w.entries.items())


def stacked(lm: LM, rows: Sequence[Row], turns: Sequence[str], read: Read) -> None:
    """`read(logits, places)` for batch after batch of texts that the chat template has rendered already: the logits `(S, k,
    V)` after the last token of the texts at `places` under each row of the stack, float32 whatever the model's dtype. Texts
    of like length go together. ValueError inside a steered model, and for a w that does not fit or is not made of factors."""
    check_plain(lm.model)
    for w, _ in rows:
        check_fits(lm.model, w)
        if not stackable(lm, w):
            raise ValueError("a dense weight difference cannot be stacked; steer with it by weight_steer")
    alphas, added = [alpha for _, alpha in rows], {}
    for name in dict.fromkeys(name for w, _ in rows for name in w):
        entries = {s: w.entries[name] for s, (w, alpha) in enumerate(rows) if name in w and alpha != 0}
        entries = {s: e for s, e in entries.items() if e.rank}
        if entries:
            added[name] = _Added.of(entries, alphas, lm.model.get_parameter(name).device)
    with widened(lm.model):
        logits_of(lm, added, len(rows), turns, read)


def logits_of(lm: LM, added: Mapping[str, "_Added"], S: int, turns: Sequence[str], read: Read) -> None:
    """The same of a model as it is, with what is added per parameter to S rows of a stack."""
    ids, mask = encode(lm.tokenizer, list(turns), False, max_length=1 << 20)
    with torch.no_grad(), ExitStack() as stack:
        for name, one in added.items():
            module = lm.model.get_submodule(name.removesuffix(".weight"))
            stack.callback(module.register_forward_hook(lambda m, x, y, one=one: one(x[0], y, S)).remove)
        lowest = min((layer_of(name) for name in added), default=lm.decoder.n_layers - 1)
        rows = [1]  # of the pass at hand
        counts = lm.decoder.embed_tokens.register_forward_pre_hook(lambda m, x: rows.insert(0, len(x[0])))
        stack.callback(counts.remove)
        for block in lm.decoder.blocks[lowest:]:
            stack.callback(block.register_forward_pre_hook(_spread(S, rows), with_kwargs=True).remove)
        read_last(lm, ids, mask, lambda n, T, first: n * S * max((T - first) / TOKENS, T / HELD) <= 1, read, S)


def _spread(S: int, n: list[int]) -> Callable:
    """Makes of a block's inputs of `n[0]` rows those of `S n`, stack by stack; what has them already stays."""

    def each(x):
        if isinstance(x, tuple):
            return tuple(map(each, x))
        fits = isinstance(x, Tensor) and x.ndim > 1 and x.shape[0] == n[0]
        return x.repeat(S, *[1] * (x.ndim - 1)) if fits and S > 1 else x

    return lambda module, args, kwargs: (each(args), {key: each(value) for key, value in kwargs.items()})
