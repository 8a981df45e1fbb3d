"""Which texts a behaviour's gradients are taken of: its training pairs, pairs about other topics, in other wordings, its probes.

(docs/method.md section 12)
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ws.cache.syntax import digest
from ws.data import Behavior
from ws.diff import WeightDiff
from ws.gradient.accumulate import Example
from ws.gradient.capture import CONTRAST, HALVES, Gradients, chosen, pair_gradients, text_gradients
from ws.model.lm import LM
from ws.model.text import chat_text
from ws.runs.rules import GRADIENTS
from ws.runs.sets import own_set
from ws.steer.answers import answer_tokens
from ws.subspaces.captures import probes
from ws.subspaces.from_gradients import ANSWER, OTHERS, PROBE, TOPICS, TRAIN, WORDINGS
from ws.subspaces.protocol import Protocol
from ws.train.pairs import Pair, PairConfig, heldout_pairs, make_pairs
from ws.train.record import own_pairs, pairs_hash

OWN, NONE = GRADIENTS


@dataclass(frozen=True)
class GradientSets:
    """The gradients of a behaviour's texts, each taken when it is first asked for: `sets(name)`. config: the training pairs;
    layers: where gradients are taken; others: behaviours whose training pairs are a control; most: pairs that are read of
    each set, a seeded draw."""

    lm: LM
    behavior: Behavior
    protocol: Protocol
    config: PairConfig
    layers: tuple[int, ...]
    cache: Path
    others: tuple[Behavior, ...] = ()
    most: int = 200
    progress: bool = True
    _made: dict[str, Gradients] = field(default_factory=dict)

    @cached_property
    def pairs(self) -> dict[str, tuple[Pair, ...]]:
        """Pairs by the name of their set; a set is empty where there is none of its kind."""
        train = make_pairs(self.lm, self.behavior, self.config, self.cache, self.progress).rows
        held = heldout_pairs(self.lm, self.behavior, self.config, self.cache, self.progress)[0]
        known = {row.persona for row in train}  # of written pairs the wording
        other = tuple(row for row in held if row.persona not in known) if self.config.file else ()
        held = tuple(row for row in held if row.persona in known)
        if self.config.file and len({row.topic for row in (*train, *held)}) < 2:
            held = ()  # a file without topics holds out more of the same
        return {TRAIN: train, TOPICS: held, WORDINGS: other, OTHERS: self._of_others()}

    def _of_others(self) -> tuple[Pair, ...]:
        """The pairs that adapters of the other behaviours are trained on where nothing else is asked."""
        rows: tuple[Pair, ...] = ()
        for other in self.others:
            usual = own_set(self.lm.slug or self.lm.name, other.name).get("weight_diff", {})
            config = PairConfig(file=usual.get("PAIRS") or "", samples=usual.get("SAMPLES") or PairConfig().samples)
            rows += make_pairs(self.lm, other, config, self.cache, self.progress).rows
        return rows

    @property
    def names(self) -> list[str]:
        """The sets that there are."""
        return [name for name, rows in self.pairs.items() if rows] + [PROBE, ANSWER]

    @cached_property
    def content(self) -> str:
        """Hash of all texts and settings that bases from these gradients depend on, besides the model."""
        texts = {name: [asdict(row) for row in rows] for name, rows in self.pairs.items()}
        words = answer_tokens(self.lm.tokenizer, self.behavior)
        return digest(repr((texts, self.layers, self.most, self._probes(), words)).encode())

    @property
    def texts(self) -> str:
        """Hash of the pairs that hypotheses are read from: the training pairs and those held out."""
        return digest(repr([pairs_hash(self.pairs[name]) for name in (TRAIN, TOPICS, WORDINGS)]).encode())[:12]

    @property
    def said(self) -> str:
        """How many of what is read, in words."""
        counts = [f"{min(len(rows), self.most)} of {len(rows)} {name}" for name, rows in self.pairs.items() if rows]
        return f"of {', '.join(counts)}; of the FIT probes"

    def trained(self, w: WeightDiff) -> bool | None:
        """Whether w was trained on these training pairs; None where it does not say."""
        known = w.meta.get("pairs_hash")
        return None if known is None else known == pairs_hash(self.pairs[TRAIN])

    def half(self, number: int) -> "Half":
        return Half(self, number)

    def _probes(self) -> list[str]:
        return [
            chat_text(self.lm.tokenizer, self.behavior.probe_text(claim))
            for claim in probes(self.behavior, self.protocol).fit
        ]

    def __call__(self, name: str) -> Gradients:
        """The gradients of a set. ValueError for one that there is not."""
        if name not in self._made:
            self._made[name] = self._take(name)
        return self._made[name]

    def _take(self, name: str) -> Gradients:
        more = {"fold_gain": self.protocol.fold_gain, "label": name, "cache": self.cache, "progress": self.progress}
        if name in (PROBE, ANSWER):
            yes, no = answer_tokens(self.lm.tokenizer, self.behavior)
            return text_gradients(self.lm, self._asked(yes[0]), yes, no if name == PROBE else [], self.layers, **more)
        rows = chosen(self.pairs.get(name, ()), self.most)
        if not rows:
            raise ValueError(
                f"{self.behavior.name}: there are no pairs of the kind {name!r}; there are {', '.join(self.names)}"
            )
        return pair_gradients(self.lm, rows, self.layers, shuffles=8 if name == TRAIN else 0, **more)

    def _asked(self, token: int) -> list[Example]:
        """The FIT probes with one label, at the place of the answer's first token."""
        found: list[Sequence[int]] = [
            self.lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self._probes()
        ]
        return [{"input_ids": [*ids, token], "labels": [-100] * len(ids) + [token]} for ids in found]


@dataclass(frozen=True)
class Half:
    """The same of half of the texts alone, 0 or 1: its part of each contrast. Nothing where the two halves do not point the same
    way (their cosine is not above 0): left singular vectors have no sign, and would agree all the same."""

    sets: GradientSets
    number: int

    @property
    def content(self) -> str:
        return self.sets.content

    def __call__(self, name: str) -> Gradients:
        found, mine = self.sets(name), HALVES[self.number]
        roots = {
            (CONTRAST, *at): x for (kind, *at), x in found.roots.items() if kind == mine and found.agree[at[0]] > 0
        }
        return replace(found, roots=roots)


def gradient_sets(
    lm: LM,
    behavior: Behavior,
    protocol: Protocol,
    w: WeightDiff,
    pairs: PairConfig | Path | str | None,
    layers: Sequence[int],
    cache: Path,
    progress: bool = True,
    others: Sequence[Behavior] = (),
) -> tuple[GradientSets | None, str]:
    """What candidates of source `gradient` are read from, and what that is in words: where there is none, why and what to do.
    pairs: as for `ws.explain`. ValueError / FileNotFoundError for given pairs that cannot be read."""
    if pairs in (None, "", NONE):
        return None, ""
    config = pairs if isinstance(pairs, PairConfig) else PairConfig(file=str(pairs))
    mended = f"train it again, or give every seed a file of pairs or {NONE!r} (GRADIENTS)"
    if pairs == OWN:
        try:
            if (config := own_pairs(w.meta)) is None:
                raise ValueError("w does not say which pairs it was trained on")
            if pairs_hash(make_pairs(lm, behavior, config, cache, progress).rows) != w.meta.get("pairs_hash"):
                raise ValueError("the pairs that w was trained on have changed since")
        except (FileNotFoundError, ValueError) as error:
            return None, f"no candidate of source gradient: {error}; {mended}"
    sets = GradientSets(lm, behavior, protocol, config, tuple(layers), cache, tuple(others), progress=progress)
    return sets, sets.said + TOLD[sets.trained(w)]


TOLD = {  # of pairs by whether w was trained on them
    True: "", False: "; **not the pairs that w was trained on**", None: "; whether w was trained on these pairs is not recorded",
}  # fmt: skip
