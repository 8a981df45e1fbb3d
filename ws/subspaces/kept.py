"""A-side bases on disk: built once per model, behaviour and protocol, reused by every LoRA seed.

One `.safetensors` file per key; a candidate with one basis for all layers is stored once. (docs/method.md section 7:
A-side bases do not depend on the seed)
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ws.cache.keys import stage_key
from ws.cache.made import made
from ws.cache.names import cache_folder
from ws.data import Behavior
from ws.model.lm import LM
from ws.subspaces.algebra import Basis
from ws.subspaces.build import build
from ws.subspaces.candidate import Candidate
from ws.subspaces.captures import BaseCaptures, capture_base
from ws.subspaces.materials import Materials, check_widths
from ws.subspaces.protocol import Protocol

MODULES = ("ws.subspaces.kept", "ws.subspaces.build", "ws.subspaces.captures", "ws.subspaces.algebra")


def save_bases(bases: dict[str, list[Basis]], path: Path) -> None:
    """Write bases by candidate and layer, with what is known of their conditioning in the file's metadata."""
    tensors, facts = {}, {}
    for name, rows in bases.items():
        same = all(b is rows[0] for b in rows)
        for l, b in enumerate(rows[:1] if same else rows):
            key = f"{name}/{'all' if same else l}"
            tensors[f"{key}/B"], tensors[f"{key}/s"] = (
                b.B.contiguous().clone(),
                b.s.clone(),
            )  # a cut basis shares memory
            facts[key] = {"gap": b.gap, "ill_conditioned": b.ill_conditioned, "note": b.note, "layers": len(rows)}
    save_file(tensors, path, metadata={"bases": json.dumps(facts)})


def load_bases(path: Path) -> dict[str, list[Basis]]:
    """Read what `save_bases` wrote."""
    bases: dict[str, list[Basis]] = {}
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["bases"])
        for key, fact in facts.items():
            name, _, layer = key.rpartition("/")
            b = Basis(
                file.get_tensor(f"{key}/B"),
                file.get_tensor(f"{key}/s"),
                fact["gap"],
                fact["ill_conditioned"],
                fact["note"],
            )
            rows = bases.setdefault(name, [None] * fact["layers"])
            if layer == "all":
                rows[:] = [b] * fact["layers"]
            else:
                rows[int(layer)] = b
    return bases


def a_side_materials(lm: LM, base: BaseCaptures, protocol: Protocol, k: int, k_broad: int) -> Materials:
    """Materials of a loaded model under a protocol."""
    return Materials(lm.decoder, base, lm.decoder.sink_token(lm.tokenizer), k, k_broad, protocol.fold_gain)


def a_side_bases(
    lm: LM,
    behavior: Behavior,
    protocol: Protocol,
    candidates: list[Candidate],
    k: int = 8,
    k_broad: int = 64,
    cache: Path | None = None,
) -> tuple[dict[str, list[Basis]], Path]:
    """Bases of the candidates (none may be a ceiling) and the cache file that holds them; captured and built if needed.

    The key covers the model's weights and dtype, the behaviour, the protocol, k, k_broad, the candidates' names and the
    sources that make them. cache defaults to `out/<model>/cache`.
    """
    check_widths(k, k_broad, lm.decoder.d)
    chosen = [c for c in candidates if c.kind != "ceiling"]
    switches = {f: v for f, v in asdict(protocol).items() if f not in ("name", "sources")}
    params = {
        "model": lm.fingerprint,
        "behavior": asdict(behavior),
        "protocol": switches,
        "k": k,
        "k_broad": k_broad,
        "candidates": [c.name for c in chosen],
        "threads": torch.get_num_threads(),
        "device": lm.device.type,
    }
    key = stage_key(params, modules=MODULES)
    path = (cache or cache_folder(lm.name)) / f"bases_{behavior.name}_{protocol.name}_{key.params[:8]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)

    def make(target: Path) -> None:
        base = capture_base(lm, behavior, protocol)
        save_bases(build(a_side_materials(lm, base, protocol, k, k_broad), chosen), target)

    found = made(path, key, make)
    tqdm.write(f"A-side bases: {'reused' if found == 'done' else 'built (' + found + ')'}, {path.name}")
    return load_bases(path), path


def part_bases(
    lm: LM, behavior: Behavior, protocol: Protocol, candidates: list[Candidate], k: int = 8, k_broad: int = 64
) -> dict[str, dict[str, dict[str, list[Basis]]]]:
    """Bases from parts of the prompts, to see which candidates their data determine: `{"FIT halves": {...}, "persona
    pairs": {...}}`, each `{part: {candidate: [basis per layer]}}`.

    Only candidates that depend on the prompts. Halves are every other probe, so that both span all topics. Persona
    pairs are left out when the protocol uses one. (docs/method.md section 7, A-side stability)
    """
    base = capture_base(lm, behavior, protocol)
    chosen = [c for c in candidates if c.prompts and c.kind != "ceiling"]
    n, everyone = len(base.clean.ids), list(range(base.n_pairs))
    parts = {
        "FIT halves": {
            "even": base.take(list(range(0, n, 2)), everyone),
            "odd": base.take(list(range(1, n, 2)), everyone),
        }
    }
    if base.n_pairs > 1:
        parts["persona pairs"] = {f"pair {p + 1}": base.take(list(range(n)), [p]) for p in everyone}
    return {
        compared: {
            label: build(a_side_materials(lm, part, protocol, k, k_broad), chosen, progress=False)
            for label, part in tqdm(rows.items(), compared)
        }
        for compared, rows in parts.items()
    }
