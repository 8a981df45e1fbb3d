"""What a model computes on a behaviour's probes, kept on disk.

A-side captures come from the unsteered model alone;
B-side differences are `H(w, +1) - H(w, -1)`, cumulative and block by block. (docs/method.md sections 3 and 7)
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ws.cache.keys import stage_key
from ws.cache.made import kept
from ws.cache.names import slug
from ws.cache.syntax import digest
from ws.data import Behavior
from ws.diff import WeightDiff
from ws.model.lm import LM
from ws.model.text import chat_text, encode
from ws.steer.weights import weight_steer
from ws.subspaces.protocol import Protocol
from ws.subspaces.reading import TextActs, read_texts

N_PROBES = 32


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

    def read(self, lm: LM, detail: bool, cache: Path | None, batch_size: int = 16) -> TextActs:
        """The recordings, kept in `cache` under the model, the token ids and the code that reads; None: not kept."""

        def make() -> TextActs:
            return read_texts(lm, list(self.texts), self.special, detail, batch_size, label=self.label)

        if cache is None or not lm.fingerprint:
            return make()
        params = {"model": lm.fingerprint, "tokens": self.content(lm), "detail": detail}
        key = stage_key(params, code=["ws.subspaces.reading.read_texts"])
        path = cache / "captures" / f"{slug(self.label)}_{key.params[:8]}.safetensors"
        return kept(path, key, lambda target: _save(make(), target), _load)


def _save(acts: TextActs, path: Path) -> None:
    tensors = {f.name: getattr(acts, f.name) for f in fields(acts) if isinstance(getattr(acts, f.name), Tensor)}
    save_file({n: x.contiguous() for n, x in tensors.items()}, path, metadata={"ids": json.dumps(acts.ids)})


def _load(path: Path) -> TextActs:
    with safe_open(path, "pt") as file:
        ids = tuple(tuple(row) for row in json.loads(file.metadata()["ids"]))
        return TextActs(ids=ids, **{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


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


def _probe_set(lm: LM, behavior: Behavior, claims: tuple[str, ...], protocol: Protocol, label: str) -> TextSet:
    texts = [behavior.probe_text(claim) for claim in claims]
    if protocol.chat_probes:
        texts = [chat_text(lm.tokenizer, text) for text in texts]
    return TextSet(label, tuple(texts), not protocol.chat_probes)


def base_sets(lm: LM, behavior: Behavior, protocol: Protocol) -> list[TextSet]:
    """The three A-side text sets of docs/method.md section 3: clean, persona_pos, persona_neg."""
    claims = probes(behavior, protocol).fit
    pairs = behavior.persona_pairs[:1] if protocol.persona_pairs == "1" else behavior.persona_pairs
    sets = [_probe_set(lm, behavior, claims, protocol, "clean")]
    for side, label in ((0, "persona_pos"), (1, "persona_neg")):
        texts = [chat_text(lm.tokenizer, behavior.probe_text(c), system=pair[side]) for pair in pairs for c in claims]
        # v7 lets the tokenizer add its special tokens to templated text too; v7b does not
        sets.append(TextSet(label, tuple(texts), not protocol.chat_probes))
    return sets


def prompts_key(lm: LM, behavior: Behavior, protocol: Protocol) -> dict:
    """What base captures depend on besides the model and the code: token ids, and how the last layer is read."""
    return {"tokens": [s.content(lm) for s in base_sets(lm, behavior, protocol)], "raw_last": protocol.raw_last}


def capture_base(
    lm: LM, behavior: Behavior, protocol: Protocol, batch_size: int = 16, cache: Path | None = None
) -> BaseCaptures:
    """The A-side captures: one forward pass per text set, kept in the folder `cache` where one is given."""
    sets = base_sets(lm, behavior, protocol)
    clean, *sides = [s.read(lm, True, cache, batch_size) for s in sets]
    if not protocol.raw_last:
        sides = [_last_normed(lm, acts) for acts in sides]
    return BaseCaptures(clean, *sides, n_pairs=len(sets[1].texts) // len(sets[0].texts))


def _last_normed(lm: LM, acts: TextActs) -> TextActs:
    """Token states with the last layer's after the final norm, as v7 reads them."""
    norm = lm.decoder.final_norm
    states = acts.tokens[-1]
    with torch.no_grad():
        normed = norm(states.to(next(norm.parameters()).device).to(lm.model.dtype)).float().cpu()
    acts.tokens[-1] = normed * (states.abs().sum(dim=-1, keepdim=True) > 0)
    return acts


def capture_steered(
    lm: LM, behavior: Behavior, w: WeightDiff, protocol: Protocol, batch_size: int = 16, cache: Path | None = None
) -> SteeredDiffs:
    """The B-side: EVAL and FIT probes at alpha +1 and -1, four forward passes.

    Kept in the folder `cache` under the model, w's content and the token ids: protocols that split and render the
    probes alike share them.
    """
    split = probes(behavior, protocol)
    sets = [_probe_set(lm, behavior, getattr(split, name), protocol, name) for name in ("eval", "fit")]

    def make(path: Path) -> None:
        save_file({n: x.contiguous() for n, x in vars(_steer(lm, w, *sets, batch_size)).items()}, path)

    if cache is None or not lm.fingerprint:
        return _steer(lm, w, *sets, batch_size)
    params = {"model": lm.fingerprint, "w": w.fingerprint, "tokens": [s.content(lm) for s in sets]}
    key = stage_key(params, code=["ws.subspaces.captures._steer"])
    path = cache / "captures" / f"steered_{key.params[:8]}.safetensors"
    return kept(path, key, make, lambda target: SteeredDiffs(**load_file(target)))


def _steer(lm: LM, w: WeightDiff, on_eval: TextSet, on_fit: TextSet, batch_size: int) -> SteeredDiffs:
    runs = {}
    for sign in (1.0, -1.0):
        with weight_steer(lm.model, w, sign):
            for name, texts in (("eval", on_eval), ("fit", on_fit)):
                label = f"{name} at alpha {sign:+.0f}"
                runs[name, sign] = read_texts(lm, list(texts.texts), texts.special, False, batch_size, label=label)
    plus, minus = runs["eval", 1.0], runs["eval", -1.0]
    return SteeredDiffs(
        eval=plus.resid - minus.resid,
        fit=runs["fit", 1.0].resid - runs["fit", -1.0].resid,
        eval_block=plus.block - minus.block,
    )
