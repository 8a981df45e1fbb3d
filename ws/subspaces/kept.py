"""A-side bases on disk: one entry per candidate, built once per model and what the candidate sees, reused by every seed.

A candidate's key holds the model with its dtype, the widths, the FIT prompts where it sees them, and the code of its
function, of what that calls (in this package and in the caller's own files) and of the candidates it is composed of. A
candidate with one basis for all layers is stored once. (docs/method.md section 7: A-side bases do not depend on the seed)
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from safetensors.torch import save_file

from ws.cache.files import lock
from ws.cache.keys import Key, stage_key
from ws.cache.made import made, read_safetensors, state
from ws.cache.names import cache_folder, slug
from ws.cache.sources import Unkeyed, hashed, walk
from ws.data import Behavior
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.show.bars import tqdm
from ws.subspaces.algebra import Basis
from ws.subspaces.build import build
from ws.subspaces.candidate import Candidate, registered
from ws.subspaces.captures import BaseCaptures, capture_base, prompts_key
from ws.subspaces.from_gradients import GRADIENT
from ws.subspaces.grams import has_output_gains
from ws.subspaces.materials import Materials, check_widths
from ws.subspaces.protocol import Protocol

log = logging.getLogger(__name__)


def save_bases(rows: list[Basis], path: Path) -> None:
    """Write a candidate's bases by layer, with what is known of their conditioning in the file's metadata."""
    tensors, facts = {}, {}
    for l, b in enumerate(rows[:1] if all(b is rows[0] for b in rows) else rows):
        tensors |= {f"{l}/B": b.B.contiguous().clone(), f"{l}/s": b.s.clone()}  # a cut basis shares memory
        facts[str(l)] = {"gap": b.gap, "ill_conditioned": b.ill_conditioned, "note": b.note}
        facts[str(l)] |= {"turn": b.turn, "most": b.most}
    save_file(tensors, path, metadata={"bases": json.dumps({"layers": len(rows), "facts": facts})})


def load_bases(path: Path) -> list[Basis]:
    """Read what `save_bases` wrote."""
    tensors, header = read_safetensors(path)
    about = json.loads(header["bases"])
    rows = [Basis(tensors[f"{l}/B"], tensors[f"{l}/s"], **fact) for l, fact in about["facts"].items()]
    return rows * about["layers"] if len(rows) == 1 else rows


def reads_gradients(c: Candidate) -> bool:
    return c.source == GRADIENT or bool({"pairs", "other pairs"} & set(c.sees))


def composed_of(c: Candidate, walked: dict | None = None) -> tuple[list[Candidate], str]:
    """The candidates whose names stand in the code of `c` (transitively), and the hash of all that code, with that of the
    captures where it sees them. walked: what the walks of other candidates have in common, by where they start. Unkeyed where
    the code refers to a value that has no content hash."""
    names = {other.name: other for other in registered()}
    read = ["ws.subspaces.captures.capture_base"] if "prompts" in c.sees else []
    if reads_gradients(c):
        read += [f"ws.gradient.{x}" for x in ("capture.pair_gradients", "capture.text_gradients", "sets.GradientSets")]
    roots, walked, parts, todo = ("ws.subspaces.materials.Materials", *read), {} if walked is None else walked, {}, [c]
    if roots not in walked:
        walked[roots] = walk(*roots)
    found = deepcopy(walked[roots])
    while todo:
        one = todo.pop()
        found.value(one.name, one.build)
        for name in found.strings & set(names) - {c.name} - set(parts):
            parts[name] = names[name]
            todo.append(names[name])
    return list(parts.values()), hashed(found)


@dataclass(frozen=True)
class Shelf:
    """Where a model's bases lie under one protocol and width, and what they are built from."""

    lm: LM
    behavior: Behavior
    protocol: Protocol
    k: int
    k_broad: int
    cache: Path
    part: str = ""  # which of the prompts, where not all
    take: Callable[[BaseCaptures], BaseCaptures] | None = None
    whole: Callable[[], BaseCaptures] | None = None  # the captures, where others take their part of them too
    layers: tuple[int, ...] = ()  # those that are asked about, where not all (`build`)
    gradients: Callable | None = None  # of sets of texts, with a `content` hash (`ws.gradient.sets.GradientSets`)

    def key(self, c: Candidate, prompts: dict, model: str, code: str) -> Key:
        params = {"model": model, "k": self.k, "k_broad": self.k_broad, "shared": c.shared, "name": c.name}
        params |= {"fold_gain": self.protocol.fold_gain and has_output_gains(self.lm.decoder)}
        params |= {"prompts": prompts, "part": self.part} if "prompts" in c.sees else {}
        params |= {"layers": self.layers} if self.layers else {}
        if self.gradients and reads_gradients(c):
            params |= {"gradients": self.gradients.content, "part": self.part}
        return stage_key(params, sources=code)

    def base(self) -> BaseCaptures:
        read = self.whole or (lambda: capture_base(self.lm, self.behavior, self.protocol, cache=self.cache))
        return self.take(read()) if self.take else read()

    def bases(self, chosen: Sequence[Candidate], progress: bool = True) -> dict[str, list[Basis]]:
        """Bases of the candidates, read where they are kept under their key and whole, built otherwise. ValueError in a
        steered model."""
        check_plain(self.lm.model)
        prompts, model = prompts_key(self.lm, self.behavior, self.protocol), self.lm.fingerprint
        keys: dict[str, Key] = {}
        parts: dict[str, list[Candidate]] = {}
        walked: dict = {}
        folder, whole = self.cache / "bases", replace(self, layers=())

        def at(name: str, key: Key) -> Path:
            return folder / f"{slug(name)}_{key.params[:8]}.safetensors"

        def there(name: str, key: Key) -> bool:
            return state(at(name, key), key) == "done"

        own: dict[str, Key] = {}
        for c in chosen:
            try:
                if model:
                    parts[c.name], code = composed_of(c, walked)
                    keys[c.name] = own[c.name] = self.key(c, prompts, model, code)
                    if self.layers and there(c.name, every := whole.key(c, prompts, model, code)):
                        keys[c.name] = every
            except Unkeyed as error:
                log.warning("candidate %s is built anew each time: %s", c.name, error)

        paths = {n: at(n, key) for n, key in keys.items()}

        def known(todo: list[Candidate]) -> dict[str, list[Basis]]:
            """Of what is composed of others, those that see weights alone and are kept."""
            names = {c.name for c in todo}
            others = {part.name: part for c in todo for part in parts.get(c.name, []) if part.sees == ("weights",)}
            found = {}
            for name, c in others.items():
                key = whole.key(c, {}, model, composed_of(c, walked)[1])
                with suppress(FileNotFoundError):  # somebody tidies up
                    if name not in names and there(name, key):
                        found[name] = load_bases(at(name, key))
            return found

        def missing() -> list[Candidate]:
            return [c for c in chosen if c.name not in keys or not there(c.name, keys[c.name])]

        fresh: dict[str, list[Basis]] = {}
        if missing():
            with lock(folder):  # runs of several seeds may start at once: the first builds
                gone = [c.name for c in missing() if c.name in keys]
                for name in gone:  # what was there whole is built at the layers that are asked about
                    keys[name], paths[name] = own[name], at(name, own[name])
                todo = missing()
                sink = self.lm.decoder.sink_token(self.lm.tokenizer)
                widths = self.k, self.k_broad, self.protocol.fold_gain
                materials = Materials(self.lm.decoder, self.base, sink, *widths, self.gradients, known(todo))
                fresh = build(materials, todo, progress, self.layers)
                for c in (c for c in todo if c.name in keys):
                    # read back, not used as built: a cut basis lies otherwise in memory, and its last digits with it
                    if materials.asked.get(c.name, set()) <= {part.name for part in parts[c.name]}:
                        made(paths[c.name], keys[c.name], lambda path, c=c: save_bases(fresh[c.name], path))
                        fresh[c.name] = load_bases(paths[c.name])
            if progress:
                tqdm.write(f"bases: {len(todo)} built, {len(chosen) - len(todo)} kept")
        return {c.name: fresh[c.name] if c.name in fresh else load_bases(paths[c.name]) for c in chosen}


def make_shelf(
    lm: LM,
    behavior: Behavior,
    protocol: Protocol,
    k: int = 8,
    k_broad: int = 64,
    cache: Path | None = None,
    gradients: Callable | None = None,
) -> Shelf:
    """A shelf with checked widths; `cache` defaults to `out/<model>/cache`."""
    check_widths(k, k_broad, lm.decoder.d)
    return Shelf(lm, behavior, protocol, k, k_broad, cache or cache_folder(lm.name), gradients=gradients)


def part_bases(
    shelf: Shelf, chosen: Sequence[Candidate], halves: Mapping[str, Callable] | None = None
) -> dict[str, dict[str, dict[str, list[Basis]]]]:
    """Bases from parts of the prompts, to see which candidates their data determine: `{"FIT halves": {...}, "persona
    pairs": {...}, "text halves": {...}}`, each `{part: {candidate: [basis per layer]}}`.

    Only candidates that see prompts or pairs. Halves are every other probe, so that both span all topics. Persona pairs are
    left out when the protocol uses one. halves: what takes the gradients of every other text alone, by name.
    (docs/method.md section 7, A-side stability)
    """
    read = [c for c in chosen if c.source == GRADIENT and c.kind == "A-hypothesis"]
    chosen = [c for c in chosen if "prompts" in c.sees and c.kind != "ceiling" and c.source != GRADIENT]
    n_pairs = 1 if shelf.protocol.persona_pairs == "1" else len(shelf.behavior.persona_pairs)

    def taken(every: slice, pairs: range) -> Callable[[BaseCaptures], BaseCaptures]:
        return lambda base: base.take(list(range(len(base.clean.ids)))[every], list(pairs))

    shelf = replace(shelf, whole=cache(shelf.base))
    parts = {"FIT halves": {name: taken(slice(i, None, 2), range(n_pairs)) for i, name in enumerate(("even", "odd"))}}
    if n_pairs > 1:
        parts["persona pairs"] = {f"pair {p + 1}": taken(slice(None), range(p, p + 1)) for p in range(n_pairs)}

    def built(compared: str, label: str, take: Callable) -> dict[str, list[Basis]]:
        return replace(shelf, part=f"{compared}: {label}", take=take).bases(chosen, progress=False)

    found = {
        compared: {label: built(compared, label, take) for label, take in tqdm(rows.items(), compared)}
        for compared, rows in parts.items()
    }
    if read and halves:
        found["text halves"] = {
            name: replace(shelf, part=f"text halves: {name}", gradients=half).bases(read, progress=False)
            for name, half in halves.items()
        }
    return found
