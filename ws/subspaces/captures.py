"""What a model computes on a behaviour's probes: one forward pass per text set records all that the candidates need.

`resid[l, i]` is the output of block l at text i's last token. A-side captures come from the unsteered model alone;
B-side differences are `H(w, +1) - H(w, -1)`, cumulative and block by block. (docs/method.md sections 3 and 7)
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from ws.data import Behavior
from ws.diff import WeightDiff
from ws.model.lm import LM
from ws.model.text import chat_text, encode, last_index, position_ids
from ws.subspaces.protocol import Protocol
from ws.steer.weights import weight_steer
from ws.model.trace import hidden, recorded

N_PROBES = 32


@dataclass(frozen=True)
class TextActs:
    """One text set's recordings, float32 on the CPU.

    resid: block outputs at the last token. embed: input of block 0 there. up_in: input of `mlp.up_proj` there. tokens:
    block outputs of all tokens, aligned at the right edge and zero-filled on the left. attn: the last token's attention
    row averaged over heads, aligned likewise. ids: the token ids, unpadded. tokens, attn and up_in are None where they
    were not asked for.
    """

    resid: Float[Tensor, "L n d"]
    embed: Float[Tensor, "n d"]
    ids: tuple[tuple[int, ...], ...]
    up_in: Float[Tensor, "L n d"] | None = None
    tokens: Float[Tensor, "L n T d"] | None = None
    attn: Float[Tensor, "L n T"] | None = None

    @property
    def block(self) -> Float[Tensor, "L n d"]:
        """What each block added at the last token: post - pre."""
        return self.resid - torch.cat([self.embed[None], self.resid[:-1]])

    def take(self, rows: list[int]) -> "TextActs":
        """The recordings of some of the texts."""

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, rows]

        return TextActs(
            resid=self.resid[:, rows],
            embed=self.embed[rows],
            ids=tuple(self.ids[i] for i in rows),
            up_in=of(self.up_in),
            tokens=of(self.tokens),
            attn=of(self.attn),
        )


@dataclass(frozen=True)
class Probes:
    """The claims of the FIT and EVAL probes, in topic order, and where each set came from."""

    fit: tuple[str, ...]
    eval: tuple[str, ...]


def probes(behavior: Behavior, protocol: Protocol) -> Probes:
    """FIT and EVAL claims under the protocol's split; an empty side is a ValueError."""
    if protocol.eval_split == "half":
        claims = tuple(t.claim for t in behavior.topics[:N_PROBES])
        cut = len(claims) // 2
    else:
        claims = tuple(t.claim for t in (*behavior.train_topics, *behavior.heldout_topics))
        cut = len(behavior.train_topics)
    if cut < 2 or len(claims) - cut < 1:
        raise ValueError(f"{behavior.name}: {cut} FIT and {len(claims) - cut} EVAL probes; at least 2 and 1 are needed")
    return Probes(claims[:cut], claims[cut:])


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
    max_length: int = 256,
    padding_side: str = "right",
    label: str = "",
) -> TextActs:
    """Run the texts through the model once and record them.

    detail: also record up_in, tokens and attn. Shapes and units as in `TextActs`; raises ValueError for no texts.
    """
    ids, mask = encode(lm.tokenizer, texts, add_special_tokens, max_length, padding_side)
    lengths = mask.sum(dim=1).tolist()
    order = range(0, len(texts), batch_size)
    parts = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if detail:
            stack.enter_context(eager_attention(lm.model))
        for start in tqdm(order, desc=label, disable=not label or len(order) < 2, leave=False):
            rows = slice(start, start + batch_size)
            parts.append(_read_batch(lm, ids[rows], mask[rows], detail, padding_side))
    unpadded = tuple(tuple(ids[i][mask[i] > 0].tolist()) for i in range(len(texts)))
    width = max(lengths)
    return TextActs(
        resid=torch.cat([p["resid"] for p in parts], dim=1),
        embed=torch.cat([p["embed"] for p in parts], dim=0),
        ids=unpadded,
        up_in=torch.cat([p["up_in"] for p in parts], dim=1) if detail else None,
        tokens=torch.cat([_left_pad(p["tokens"], width, 2) for p in parts], dim=1) if detail else None,
        attn=torch.cat([_left_pad(p["attn"], width, 2) for p in parts], dim=1) if detail else None,
    )


def _read_batch(lm: LM, ids: Int[Tensor, "n T"], mask: Int[Tensor, "n T"], detail: bool, padding_side: str) -> dict:
    """Every layer is reduced to what is kept as the pass reaches it."""
    decoder = lm.decoder
    n, width = ids.shape
    last = last_index(mask)
    resid, up_in, tokens, embed = {}, {}, {}, {}
    rows = torch.arange(n)
    # one gather index moves every text's tokens to the right edge: column T - len + j <- column of token j
    lengths = mask.sum(dim=1)
    first = last - lengths + 1
    column = torch.arange(width)[None, :] - (width - lengths)[:, None]
    source = (first[:, None] + column).clamp(min=0)
    real = (column >= 0).float()

    def at_last(states: Tensor) -> Tensor:
        return states[rows.to(states.device), last.to(states.device)].float().cpu()

    def at_block(l):
        def record(output, inputs):
            states = hidden(output)
            if l == 0:
                embed[0] = at_last(inputs[0])
            resid[l] = at_last(states)
            if detail:
                moved = states.float().cpu()[rows[:, None], source]
                tokens[l] = moved * real[:, :, None]

        return record

    def at_up(l):
        def record(_output, inputs):
            up_in[l] = at_last(inputs[0])

        return record

    at = {f"{decoder.prefix}.{l}": at_block(l) for l in range(decoder.n_layers)}
    if detail:
        at |= {decoder.param_name(l, "up").removesuffix(".weight"): at_up(l) for l in range(decoder.n_layers)}
    with recorded(lm.model, at):
        output = lm.model(
            input_ids=ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            position_ids=position_ids(mask).to(lm.device),
            use_cache=False,
            output_attentions=detail,
        )
    order = range(decoder.n_layers)
    part = {"resid": torch.stack([resid[l] for l in order]), "embed": embed[0]}
    if detail:
        attn = []
        for weights in output.attentions:
            row = weights.float().mean(dim=1).cpu()[rows, last]
            attn.append(row[rows[:, None], source] * real)
        part["up_in"] = torch.stack([up_in[l] for l in order])
        part["tokens"] = torch.stack([tokens[l] for l in order])
        part["attn"] = torch.stack(attn)
    return part


def _left_pad(x: Tensor, width: int, dim: int) -> Tensor:
    """Zeros before (or, where padding made a batch wider than its texts, columns cut from) the left edge of `dim`."""
    have = x.shape[dim]
    if have >= width:
        return x.narrow(dim, have - width, width)
    shape = list(x.shape)
    shape[dim] = width - have
    return torch.cat([x.new_zeros(shape), x], dim=dim)


@dataclass(frozen=True)
class BaseCaptures:
    """A-side recordings of the FIT probes, from the unsteered model: `clean` without a persona; `pos` and `neg` under
    the personas, row i of both being the same probe (with several persona pairs, pair after pair)."""

    clean: TextActs
    pos: TextActs
    neg: TextActs
    n_pairs: int

    def take(self, probes: list[int], pairs: list[int]) -> "BaseCaptures":
        """The recordings of some FIT probes under some persona pairs."""
        n = len(self.clean.ids)
        rows = [p * n + i for p in pairs for i in probes]
        return BaseCaptures(self.clean.take(probes), self.pos.take(rows), self.neg.take(rows), len(pairs))


@dataclass(frozen=True)
class SteeredDiffs:
    """B-side differences `H(w, +1) - H(w, -1)`: on EVAL (`eval`), on FIT (`fit`), and what each block adds to them."""

    eval: Float[Tensor, "L n d"]
    fit: Float[Tensor, "L m d"]
    eval_block: Float[Tensor, "L n d"]


def _probe_texts(lm: LM, behavior: Behavior, claims: tuple[str, ...], chat: bool) -> list[str]:
    texts = [behavior.probe_text(claim) for claim in claims]
    return [chat_text(lm.tokenizer, text) for text in texts] if chat else texts


def capture_base(lm: LM, behavior: Behavior, protocol: Protocol, batch_size: int = 16) -> BaseCaptures:
    """The three A-side text sets of docs/method.md section 3: one forward pass each."""
    claims = probes(behavior, protocol).fit
    # v7 lets the tokenizer add its special tokens to templated text too; v7b does not
    special_in_chat = not protocol.chat_probes
    clean_texts = _probe_texts(lm, behavior, claims, protocol.chat_probes)
    clean = read_texts(lm, clean_texts, not protocol.chat_probes, True, batch_size, label="clean")
    pairs = list(zip(behavior.personas_pos, behavior.personas_neg, strict=True))
    pairs = pairs[:1] if protocol.persona_pairs == "1" else pairs
    sides = []
    for side, label in ((0, "persona_pos"), (1, "persona_neg")):
        texts = [chat_text(lm.tokenizer, behavior.probe_text(c), system=pair[side]) for pair in pairs for c in claims]
        acts = read_texts(lm, texts, special_in_chat, True, batch_size, label=label)
        if not protocol.raw_last:
            norm = lm.decoder.final_norm
            device = next(norm.parameters()).device
            with torch.no_grad():
                states = acts.tokens[-1]
                normed = norm(states.to(device).to(lm.model.dtype)).float().cpu()
                acts.tokens[-1] = normed * (states.abs().sum(dim=-1, keepdim=True) > 0)
        sides.append(acts)
    return BaseCaptures(clean, *sides, n_pairs=len(pairs))


def capture_steered(
    lm: LM, behavior: Behavior, w: WeightDiff, protocol: Protocol, batch_size: int = 16
) -> SteeredDiffs:
    """The B-side: EVAL and FIT probes at alpha +1 and -1, four forward passes."""
    split = probes(behavior, protocol)
    runs = {}
    for sign in (1.0, -1.0):
        with weight_steer(lm.model, w, sign):
            for name, claims in (("eval", split.eval), ("fit", split.fit)):
                texts = _probe_texts(lm, behavior, claims, protocol.chat_probes)
                label = f"{name} at alpha {sign:+.0f}"
                acts = read_texts(lm, texts, not protocol.chat_probes, False, batch_size, label=label)
                runs[name, sign] = acts
    plus, minus = runs["eval", 1.0], runs["eval", -1.0]
    return SteeredDiffs(
        eval=plus.resid - minus.resid,
        fit=runs["fit", 1.0].resid - runs["fit", -1.0].resid,
        eval_block=plus.block - minus.block,
    )
