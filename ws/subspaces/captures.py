"""What the unsteered model computes on a behaviour's FIT probes, kept on disk. (docs/method.md sections 3 and 7)"""

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ws.cache.keys import stage_key
from ws.cache.made import kept, read_safetensors
from ws.cache.names import slug
from ws.cache.syntax import digest
from ws.data import Behavior
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.model.text import chat_text, encode
from ws.model.wide import widened
from ws.subspaces.protocol import Protocol
from ws.subspaces.reading import TextActs, read_texts

N_PROBES = 32
MOST_BYTES = 1 << 30  # of one text set's token states; more is read again where it is needed, not kept


@dataclass(frozen=True)
class Probes:
    """The claims of the FIT and EVAL probes, in topic order, and where each set came from."""

    fit: tuple[str, ...]
    eval: tuple[str, ...]


def probes(behavior: Behavior, protocol: Protocol) -> Probes:
    """FIT and EVAL claims under the protocol's split; an empty side is a ValueError."""
    half = protocol.eval_split == "half"
    claims = tuple(t.claim for t in (behavior.topics[:N_PROBES] if half else behavior.topics))
    cut = len(claims) // 2 if half else len(behavior.train_topics)
    if cut < 2 or len(claims) - cut < 1:
        raise ValueError(f"{behavior.name}: {cut} FIT and {len(claims) - cut} EVAL probes; at least 2 and 1 are needed")
    return Probes(claims[:cut], claims[cut:])


@dataclass(frozen=True)
class TextSet:
    """Texts to record, as they are tokenized: with the tokenizer's special tokens or without."""

    label: str
    texts: tuple[str, ...]
    special: bool

    def content(self, lm: LM) -> str:
        """Hash of the token ids."""
        ids, mask = encode(lm.tokenizer, list(self.texts), self.special)
        return digest(repr([row[m > 0].tolist() for row, m in zip(ids, mask, strict=True)]).encode())

    def read(self, lm: LM, cache: Path | None) -> TextActs:
        """The recordings in detail, kept in `cache` under the model, the token ids and the code that reads."""
        check_plain(lm.model)

        def make() -> TextActs:
            with widened(lm.model):
                return read_texts(lm, list(self.texts), self.special, detail=True, label=self.label)

        ids, _ = encode(lm.tokenizer, list(self.texts), self.special)
        large = ids.numel() * lm.decoder.n_layers * lm.decoder.d * 4 > MOST_BYTES
        if cache is None or large or not (model := lm.fingerprint):
            return make()
        params = {"model": model, "tokens": self.content(lm), "detail": True}
        key = stage_key(params, code=["ws.subspaces.reading.read_texts", "ws.model.wide.widened"])
        path = cache / "captures" / f"{slug(self.label)}_{key.params[:8]}.safetensors"
        return kept(path, key, lambda target: _save(make(), target), _load)


def _save(acts: TextActs, path: Path) -> None:
    tensors = {f.name: getattr(acts, f.name) for f in fields(acts) if isinstance(getattr(acts, f.name), Tensor)}
    save_file({n: x.contiguous() for n, x in tensors.items()}, path, metadata={"ids": json.dumps(acts.ids)})


def _load(path: Path) -> TextActs:
    tensors, about = read_safetensors(path)
    return TextActs(ids=tuple(map(tuple, json.loads(about["ids"]))), **tensors)


@dataclass(frozen=True)
class BaseCaptures:
    """A-side recordings of the FIT probes, from the unsteered model: `clean` without a persona; `pos` and `neg` under
    the personas, row i of both being the same probe (with several persona pairs, pair after pair)."""

    clean: TextActs
    pos: TextActs
    neg: TextActs
    n_pairs: int

    @cached_property
    def aligned(self) -> "BaseCaptures":
        """With the clean rows once per persona pair, so that row i of clean, pos and neg is the same probe."""
        rows = list(range(len(self.clean.ids))) * self.n_pairs
        return replace(self, clean=self.clean.take(rows)) if self.n_pairs > 1 else self

    def take(self, probes: list[int], pairs: list[int]) -> "BaseCaptures":
        """The recordings of some FIT probes under some persona pairs."""
        n = len(self.clean.ids)
        rows = [p * n + i for p in pairs for i in probes]
        return BaseCaptures(self.clean.take(probes), self.pos.take(rows), self.neg.take(rows), len(pairs))


def probe_set(lm: LM, behavior: Behavior, claims: tuple[str, ...], protocol: Protocol, label: str) -> TextSet:
    texts = map(behavior.probe_text, claims)
    texts = (chat_text(lm.tokenizer, text) for text in texts) if protocol.chat_probes else texts
    return TextSet(label, tuple(texts), not protocol.chat_probes)


def base_sets(lm: LM, behavior: Behavior, protocol: Protocol) -> list[TextSet]:
    """The three A-side text sets of docs/method.md section 3: clean, persona_pos, persona_neg."""
    claims = probes(behavior, protocol).fit
    pairs = behavior.persona_pairs[:1] if protocol.persona_pairs == "1" else behavior.persona_pairs
    sets = [probe_set(lm, behavior, claims, protocol, "clean")]
    for side, label in ((0, "persona_pos"), (1, "persona_neg")):
        texts = [chat_text(lm.tokenizer, behavior.probe_text(c), system=pair[side]) for pair in pairs for c in claims]
        # v7 lets the tokenizer add its special tokens to templated text too; v7b does not
        sets.append(TextSet(label, tuple(texts), not protocol.chat_probes))
    return sets


def prompts_key(lm: LM, behavior: Behavior, protocol: Protocol) -> dict:
    """What base captures depend on besides the model and the code: token ids, and how the last layer is read."""
    return {"tokens": [s.content(lm) for s in base_sets(lm, behavior, protocol)], "raw_last": protocol.raw_last}


def capture_base(lm: LM, behavior: Behavior, protocol: Protocol, cache: Path | None = None) -> BaseCaptures:
    """The A-side captures: one forward pass per text set, kept in the folder `cache` where one is given."""
    sets = base_sets(lm, behavior, protocol)
    clean, *sides = [s.read(lm, cache) for s in sets]
    if not protocol.raw_last:
        with widened(lm.model):
            sides = [_last_normed(lm, acts) for acts in sides]
    return BaseCaptures(clean, *sides, n_pairs=len(sets[1].texts) // len(sets[0].texts))


def _last_normed(lm: LM, acts: TextActs) -> TextActs:
    """Token states with the last layer's after the final norm, as v7 reads them."""
    norm, states = lm.decoder.final_norm, acts.tokens[-1]
    with torch.no_grad():
        normed = norm(states.to(next(norm.parameters()).device).to(lm.model.dtype)).float().cpu()
    acts.tokens[-1] = normed * (states.abs().sum(dim=-1, keepdim=True) > 0)
    return acts
