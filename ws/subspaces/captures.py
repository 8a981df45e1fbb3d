"""What the unsteered model computes on a behaviour's FIT probes, kept on disk. (docs/method.md sections 3 and 7)"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ws.cache.given import short
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
from ws.subspaces.reading import TextActs, TokenStates, read_texts

N_PROBES = 32
MOST_BYTES = 1 << 30  # of one text set's token states; more is read again where it is needed, not kept


@dataclass(frozen=True)
class Probes:
    """The claims of the FIT and EVAL probes, in topic order, and where each set came from."""

    fit: tuple[str, ...]
    eval: tuple[str, ...]


def probes(behavior: Behavior, protocol: Protocol) -> Probes:
    """FIT and EVAL claims under the protocol's split; an empty side is a ValueError. Of statements, under either split, the
    first N_PROBES training ones and the first N_PROBES held-out ones: both halves alike."""
    if behavior.answers:
        sides = (side[:N_PROBES] for side in (behavior.train_topics, behavior.heldout_topics))
        return Probes(*(tuple(topic.claim for topic in side) for side in sides))
    half = protocol.eval_split == "half"
    claims = tuple(t.claim for t in (behavior.topics[:N_PROBES] if half else behavior.topics))
    cut = len(claims) // 2 if half else len(behavior.train_topics)
    if cut < 2 or len(claims) - cut < 1:
        raise ValueError(f"{behavior.name}: {cut} FIT and {len(claims) - cut} EVAL probes; at least 2 and 1 are needed")
    return Probes(claims[:cut], claims[cut:])


@dataclass(frozen=True)
class TextSet:
    """Texts to record, as they are tokenized: with the tokenizer's special tokens or without, the first `max_length` tokens
    of each. claims: what each is about. spans: the claim's first character in it and the one after it, where its tokens
    are to be read."""

    label: str
    texts: tuple[str, ...]
    special: bool
    claims: tuple[str, ...]
    max_length: int = 256
    spans: tuple[tuple[int, int], ...] = ()

    def content(self, lm: LM) -> str:
        """Hash of the token ids."""
        ids, mask = encode(lm.tokenizer, list(self.texts), self.special, self.max_length)
        return digest(repr([row[m > 0].tolist() for row, m in zip(ids, mask, strict=True)]).encode())

    def lengths(self, lm: LM) -> list[int]:
        """Tokens of each text, uncut."""
        return [len(row) for row in lm.tokenizer(list(self.texts), add_special_tokens=self.special)["input_ids"]]

    def claim_tokens(self, lm: LM) -> list[list[int]] | None:
        """Places of the claim's tokens in each text, by the tokenizer's offsets; None where they are not to be read.
        ValueError for a tokenizer without offsets, and naming a claim that was cut off."""
        if not self.spans:
            return None
        if not getattr(lm.tokenizer, "is_fast", False):
            raise ValueError(f"{lm.name}: its tokenizer does not tell where a claim's tokens are; use POSITIONS last")
        coded = lm.tokenizer(list(self.texts), add_special_tokens=self.special, return_offsets_mapping=True)
        found = []
        for claim, (start, end), offsets in zip(self.claims, self.spans, coded["offset_mapping"], strict=True):
            places = [j for j, (a, b) in enumerate(offsets) if a < end and start < b and a < b]
            if not places or places[-1] >= self.max_length:
                least = f"MAX_LENGTH {places[-1] + 1} or more" if places else "POSITIONS last"
                raise ValueError(
                    f"the claim {short(claim)}: not all of it is among the {self.max_length} tokens that are read of a"
                    f" probe; use {least}"
                )
            found.append(places)
        return found

    def read(self, lm: LM, cache: Path | None) -> TextActs:
        """The recordings in detail, kept in `cache` under the model, the token ids and the code that reads."""
        check_plain(lm.model)

        def make() -> TextActs:
            more = {"detail": True, "label": self.label, "max_length": self.max_length}
            with widened(lm.model, by_block=True):
                return read_texts(lm, list(self.texts), self.special, **more)

        ids, _ = encode(lm.tokenizer, list(self.texts), self.special, self.max_length)
        large = ids.numel() * lm.decoder.n_layers * lm.decoder.d * 4 > MOST_BYTES
        if cache is None or large or not (model := lm.fingerprint):
            return make()
        params = {"model": model, "tokens": self.content(lm), "detail": True}
        key = stage_key(params, code=["ws.subspaces.reading.read_texts", "ws.model.wide.widened"])
        path = cache / "captures" / f"{slug(self.label)}_{key.params[:8]}.safetensors"
        return kept(path, key, lambda target: _save(make(), target), _load)


def _save(acts: TextActs, path: Path) -> None:
    tensors = {f.name: getattr(acts, f.name) for f in fields(acts) if isinstance(getattr(acts, f.name), Tensor)}
    tensors |= {"states": acts.tokens.states, "at": acts.tokens.at}
    save_file({n: x.contiguous() for n, x in tensors.items()}, path, metadata={"ids": json.dumps(acts.ids)})


def _load(path: Path) -> TextActs:
    tensors, about = read_safetensors(path)
    tensors["tokens"] = TokenStates(tensors.pop("states"), tensors.pop("at"))
    return TextActs(ids=tuple(map(tuple, json.loads(about["ids"]))), **tensors)


class NoPersonas:
    """In place of what was read under personas, of a behaviour that has none."""

    def take(self, rows: list[int]) -> "NoPersonas":
        return self

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(
            f"{name} under personas was asked for, and the behaviour has none: name 'personas' in what the candidate sees,"
            " and it is left out"
        )


@dataclass(frozen=True)
class BaseCaptures:
    """A-side recordings of the FIT probes, from the unsteered model: `clean` without a persona; `pos` and `neg` under
    the personas, row i of both being the same probe (with several persona pairs, pair after pair)."""

    clean: TextActs
    pos: TextActs | NoPersonas
    neg: TextActs | NoPersonas
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


def probe_set(
    lm: LM,
    behavior: Behavior,
    claims: tuple[str, ...],
    protocol: Protocol,
    label: str,
    templates: int = 1,
    positions: bool = False,
) -> TextSet:
    """The probes about `claims` in the first `templates` wordings, wording after wording (row `a * len(claims) + t`).
    positions: with the places of the claims; a chat template that changes a probe is a ValueError naming its claim."""
    each = [(claim, a) for a in range(templates) for claim in claims]
    texts = [behavior.probe_text(*one) for one in each]
    texts = [chat_text(lm.tokenizer, text) for text in texts] if protocol.chat_probes else texts
    spans = [_span(text, behavior, *one) for text, one in zip(texts, each, strict=True)] if positions else []
    about = tuple(claim for claim, _ in each)
    return TextSet(label, tuple(texts), not protocol.chat_probes, about, protocol.max_length, tuple(spans))


def _span(text: str, behavior: Behavior, claim: str, template: int) -> tuple[int, int]:
    """Where the claim stands in a rendered probe."""
    probe, (start, end) = behavior.probe_text(claim, template), behavior.claim_span(claim, template)
    bare = probe.strip()  # many chat templates strip what the user says
    if (at := text.rfind(bare)) < 0:
        raise ValueError(
            f"the claim {short(claim)}: the chat template changes the probe about it, so that its tokens cannot be found;"
            " use POSITIONS last, or word the claim without what is changed"
        )
    before = len(probe) - len(probe.lstrip())
    return max(at, at - before + start), min(at + len(bare), at - before + end)


def eval_set(lm: LM, behavior: Behavior, protocol: Protocol) -> TextSet:
    """The EVAL probes: wordings x topics, wording after wording."""
    claims = probes(behavior, protocol).eval
    return probe_set(
        lm, behavior, claims, protocol, "eval", n_templates(behavior, protocol), protocol.positions == "all"
    )


def n_templates(behavior: Behavior, protocol: Protocol) -> int:
    """How many wordings of the probe EVAL has."""
    return len(behavior.templates) if protocol.templates == "all" else 1


def count_cut(lm: LM, sets: Sequence[TextSet], protocol: Protocol) -> int:
    """How many texts are longer than MAX_LENGTH tokens and so lose their question. Only v7 goes on with them: otherwise
    a ValueError that names the first. (docs/method.md section 3)"""
    every = [(s.label, claim, n) for s in sets for claim, n in zip(s.claims, s.lengths(lm), strict=True)]
    cut = [one for one in every if one[2] > protocol.max_length]
    if cut and protocol.name != "v7":
        label, claim, _ = cut[0]
        raise ValueError(
            f"{label}: the text about {short(claim)} has {cut[0][2]} tokens, {protocol.max_length} are read, and its question"
            f" would be lost; use MAX_LENGTH {max(n for _, _, n in cut)}, or shorten it"
        )
    return len(cut)


def check_texts(lm: LM, behavior: Behavior, protocol: Protocol) -> int:
    """How many texts of a sweep are cut; ValueError for what a sweep would refuse in its texts, without the model."""
    asked = eval_set(lm, behavior, protocol)
    cut = count_cut(lm, [*base_sets(lm, behavior, protocol), asked], protocol)
    asked.claim_tokens(lm)
    return cut


def base_sets(lm: LM, behavior: Behavior, protocol: Protocol) -> list[TextSet]:
    """The three A-side text sets of docs/method.md section 3: clean, persona_pos, persona_neg; clean alone where there are no
    personas."""
    claims = probes(behavior, protocol).fit
    pairs = behavior.persona_pairs[:1] if protocol.persona_pairs == "1" else behavior.persona_pairs
    sets = [probe_set(lm, behavior, claims, protocol, "clean")]
    if not pairs:
        return sets
    for side, label in ((0, "persona_pos"), (1, "persona_neg")):
        texts = [chat_text(lm.tokenizer, behavior.probe_text(c), system=pair[side]) for pair in pairs for c in claims]
        # v7 lets the tokenizer add its special tokens to templated text too; v7b does not
        about = claims * len(pairs)
        sets.append(TextSet(label, tuple(texts), not protocol.chat_probes, about, protocol.max_length))
    return sets


def prompts_key(lm: LM, behavior: Behavior, protocol: Protocol) -> dict:
    """What base captures depend on besides the model and the code: token ids, and how the last layer is read."""
    return {"tokens": [s.content(lm) for s in base_sets(lm, behavior, protocol)], "raw_last": protocol.raw_last}


def capture_base(lm: LM, behavior: Behavior, protocol: Protocol, cache: Path | None = None) -> BaseCaptures:
    """The A-side captures: one forward pass per text set, kept in the folder `cache` where one is given. ValueError for a
    text that `count_cut` refuses."""
    sets = base_sets(lm, behavior, protocol)
    count_cut(lm, sets, protocol)
    clean, *sides = [s.read(lm, cache) for s in sets]
    if not sides:
        return BaseCaptures(clean, NoPersonas(), NoPersonas(), n_pairs=0)
    if not protocol.raw_last:
        with widened(lm.decoder.final_norm):
            sides = [_last_normed(lm, acts) for acts in sides]
    return BaseCaptures(clean, *sides, n_pairs=len(sets[1].texts) // len(sets[0].texts))


def _last_normed(lm: LM, acts: TextActs) -> TextActs:
    """Token states with the last layer's after the final norm, as v7 reads them."""
    norm, states = lm.decoder.final_norm, acts.tokens.states
    with torch.no_grad():
        weight = next(norm.parameters())
        states[-1] = norm(states[-1].to(weight.device, weight.dtype)).float().cpu()
    return acts
