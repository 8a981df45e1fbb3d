"""`explain`, the only way from w to scores: captures -> bases -> targets -> rows -> Explanation. (method sections 3 to 7)"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import polars as pl

from ws.cache.names import cache_folder
from ws.data import Behavior, load_behavior
from ws.diff import WeightDiff, load_diff
from ws.explanation import rows
from ws.explanation.result import Explanation
from ws.explanation.rows import CLEAN
from ws.explanation.summary import null_summary
from ws.gradient.sets import gradient_sets
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.show.bars import heard
from ws.steer.effect import check_null_diffs, effects
from ws.steer.weights import check_fits
from ws.subspaces.algebra import Basis, empty
from ws.subspaces.build import build
from ws.subspaces.build import candidates as candidates_of
from ws.subspaces.candidate import Candidate, as_candidate
from ws.subspaces.captures import check_texts, n_templates, probes
from ws.subspaces.check import as_basis
from ws.subspaces.from_gradients import GRADIENT, USES
from ws.subspaces.kept import Shelf, make_shelf
from ws.subspaces.protocol import Protocol, load_protocol
from ws.subspaces.steered import CeilingMaterials, capture_steered, known_answers
from ws.train.asked import other_training
from ws.train.pairs import PairConfig
from ws.train.record import other_base

log = logging.getLogger(__name__)


@heard
def explain(
    lm: LM,
    w: WeightDiff | Path | str,
    behavior: Behavior | Path | str = "sycophancy",
    *,
    protocol: Protocol | str = "v7b",
    candidates: Sequence[object] | None = None,
    extra: Iterable[object] | Mapping[str, object] = (),
    null: WeightDiff | Path | str | Sequence[WeightDiff | Path | str] | None = None,
    layers: Sequence[int] | None = None,
    pairs: PairConfig | Path | str | None = None,
    others: Sequence[Behavior | Path | str] = (),
    k: int = 8,
    k_broad: int = 64,
    title: str = "",
    cache: Path | None = None,
    progress: bool = True,
) -> Explanation:
    """Which low-rank subspace, built without w, explains what w does to activations and to weights?

    protocol: `v7`, `v7b` or a `Protocol`. candidates: names or functions instead of the protocol's own; its ceilings are
    always there. extra: candidates of one's own beside them: functions (decorated with `ws.candidate`, or any
    `f(m, l)`) and ready bases `{"name": {layer: (d, r) tensor}}`, which are made orthonormal where they are not, with a
    warning. null: the null diff that every score is compared with, or several: two have a spread. layers: what
    summaries average over; default those that w touches. k: rank of a basis; k_broad: width of what "not read" projects
    out. pairs: training pairs, a `PairConfig`, a file of pairs, or `own`, those that w was trained on: then the candidates
    of source `gradient` take part, which see them and no adapter. others: behaviours whose training pairs are a control of
    these. cache: folder of captures and bases, default `out/<model>/cache`. Raises ValueError naming what does not fit: a
    tensor, a layer, a candidate, a text that is cut. (docs/method.md sections 5 to 7 and 12)

    Examples:
        >>> import torch, ws
        >>> lm = ws.load_lm("tiny")
        >>> names = [lm.decoder.param_name(l, role) for l in (3, 4) for role in ("o", "down")]
        >>> shapes = dict(lm.model.named_parameters())
        >>> g = torch.Generator().manual_seed(0)
        >>> w = ws.WeightDiff({n: 0.01 * torch.randn(shapes[n].shape, generator=g) for n in names})
        >>> found = ws.explain(lm, w, candidates=["write"], extra={"axes": {l: torch.eye(128)[:, :8] for l in range(8)}},
        ...                    progress=False)
        >>> sorted(found.summary["subspace"])[:3]
        ['TaskDiff_lora_ceiling', 'TaskDiff_lora_uncentred_ceiling', 'axes']
    """
    behavior = behavior if isinstance(behavior, Behavior) else load_behavior(behavior)
    protocol = protocol if isinstance(protocol, Protocol) else load_protocol(protocol)
    split = probes(behavior, protocol)
    check_sizes(lm.decoder.d, k, k_broad)
    several = isinstance(null, Sequence) and not isinstance(null, str)
    given = [one for one in (null if several else [null]) if one is not None]
    w, nulls = load_diff(w), [load_diff(one) for one in given]
    for diff in [w, *nulls]:
        check_fits(lm.model, diff)
    check_nulls(lm, w, nulls, [str(one) if isinstance(one, (str, Path)) else "" for one in given])
    check_plain(lm.model)
    if cut := check_texts(lm, behavior, protocol):
        log.warning("%d texts are longer than MAX_LENGTH = %d tokens and lose their end", cut, protocol.max_length)
    layers = rows.lora_layers(w, lm.decoder.n_layers, list(layers) if layers else None)
    others = [one if isinstance(one, Behavior) else load_behavior(one) for one in others]
    kept = cache or cache_folder(lm.name)
    sets, said = gradient_sets(lm, behavior, protocol, w, pairs, layers, kept, progress, others)
    if sets:
        protocol = replace(protocol, sources=tuple(dict.fromkeys([*protocol.sources, GRADIENT])))
    elif GRADIENT in protocol.sources:
        raise ValueError("candidates of source gradient see the training pairs: give them (pairs=..., GRADIENTS)")
    shipped = candidates_of(protocol)
    functions, ready = _sorted_out(extra)
    chosen = shipped if candidates is None else [as_candidate(c) for c in candidates]
    ceilings = [c for c in shipped if c.kind == "ceiling"]
    a_side = [c for c in [*chosen, *functions] if c.kind != "ceiling"]
    given = [Candidate(name, "own", "own", False, ("unknown",), lambda: None) for name in ready]
    by_name: dict[str, Candidate] = {}
    theirs = {c.name for c in candidates_of("v7b")}
    for c in [*a_side, *given, *ceilings]:
        if c.name in theirs and (c in given or not c.shipped):
            raise ValueError(f"candidate {c.name}: two of this name are given, or a shipped one has it")
        if by_name.setdefault(c.name, c) != c:
            raise ValueError(f"candidate {c.name}: two of this name are given")
    left_out = [c.name for c in by_name.values() if not c.works(bool(behavior.personas_pos))]
    textless = [name for name, texts in USES.items() if name in by_name and sets and texts not in sets.names]
    a_side = [c for c in a_side if c.name not in (*left_out, *textless)]
    everyone = [c for c in by_name.values() if c.name not in (*left_out, *textless)]
    if sets and sets.trained(w) is False:  # they see pairs, and not those of the adapters
        everyone = [replace(c, sees=tuple("other pairs" if s == "pairs" else s for s in c.sees)) for c in everyone]

    if all(c.shipped for c in a_side):  # a function of one's own may change the weights it is shown
        lm = lm.at_rest()
    shelf = make_shelf(lm, behavior, protocol, k, k_broad, cache, sets)
    wanted = {c.name: c for c in [*a_side, as_candidate(CLEAN)]}
    bases = shelf.bases(list(wanted.values()), progress)
    bases |= {name: _given(name, by_layer, lm) for name, by_layer in ready.items()}
    side = _b_side(shelf, w)
    targets = rows.layer_targets(side, bases[CLEAN])
    bases |= build(side, ceilings, progress=False)

    table = rows.per_layer(everyone, bases, targets)
    answered, null_targets = [known_answers(lm, behavior, protocol, side.steered)], []
    for one in nulls:
        null_side = _b_side(shelf, one, fit=False)
        answered.append(known_answers(lm, behavior, protocol, null_side.steered))
        null_targets.append(rows.plain_targets(null_side, range(len(targets))))
    null_rows = rows.null_rows(everyone, bases, null_targets)
    if nulls:
        table = rows.with_null_diff(table, null_rows)
    d, wordings = lm.decoder, n_templates(behavior, protocol)
    read = [(w, "w"), *((one, "a null diff") for one in nulls)]
    doubts = [other_training(one.meta, behavior, whose) for one, whose in read]
    asked = zip((w, *nulls), answered, strict=True)
    moved = [effects(lm, behavior, one, wordings, shelf.cache, known) for one, known in asked]
    return Explanation(
        per_layer=table,
        specific_per_layer=rows.specific_per_layer(everyone, bases, targets),
        null_per_layer=null_rows,
        setting={
            "title": title or f"{lm.name}, {behavior.name}",
            "model": lm.name, "fingerprint": lm.fingerprint, "dtype": str(lm.model.dtype), "chat": lm.chat,
            "n_layers": d.n_layers, "d": d.d, "n_heads": d.n_heads, "n_kv": d.n_kv, "behavior": behavior.name,
            "n_topics": len(behavior.topics), "n_train_topics": behavior.n_train_topics, "statements": bool(behavior.answers),
            "n_persona_pairs": len(behavior.personas_pos), "left_out": left_out,
            "gradients": said, "gradient_pairs": asdict(sets.config) if sets else None, "textless": textless,
            "gradient_texts": sets.texts if sets else "",
            "protocol": asdict(protocol) | {"sources": list(protocol.sources)},
            "n_fit": len(split.fit), "n_eval": len(split.eval),
            "n_templates": wordings, "positions": protocol.positions, "n_cut": cut,
            "layers": list(layers), "k": k, "k_broad": k_broad,
            "w": w.fingerprint, "w_matrices": len(w), "w_norm": w.total_norm(), "w_layers": w.layers(), "w_meta": w.meta,
            "other_training": next(filter(None, doubts), ""),
            "other_base": [whose for one, whose in read if other_base(one.meta, lm)],
            "nulls": [diff.fingerprint for diff in nulls], "effects": moved[0].tolist(),
            "null_effects": [float(effect.mean()) for effect in moved[1:]],
            "score": "margin of the matching answer" if behavior.answers else "log-ratio",
        },
        candidates=[c.about for c in everyone],
        checks=rows.self_checks(table, layers) | {"orthonormality": rows.largest_deviation(bases)},
        tensors=rows.kept_tensors(everyone, bases, targets, k, layers),
        bases={c.name: rows.bases_hash(bases[c.name]) for c in everyone if c.kind != "ceiling"},
        sources={c.file.name: c.file.read_text(encoding="utf-8") for c in functions if c.file},
    )  # fmt: skip


def plain_scores(
    lm: LM, diffs: Sequence[WeightDiff], behavior: Behavior, protocol: Protocol, cache: Path | None = None
) -> pl.DataFrame:
    """What the summaries of `explain` say of R_act and R_w of the protocol's candidates, and nothing else: w (which of `diffs`),
    subspace, kind, R_act, R_w, joint_score."""
    for w in diffs:
        check_fits(lm.model, w)
    everyone = [c for c in candidates_of(protocol) if c.works(bool(behavior.personas_pos))]
    touched = [rows.lora_layers(w, lm.decoder.n_layers) for w in diffs]
    shelf = make_shelf(lm.at_rest(), behavior, protocol, cache=cache)
    shelf = replace(shelf, layers=tuple(sorted({l for layers in touched for l in layers})))
    known, found = shelf.bases([c for c in everyone if c.kind != "ceiling"], progress=False), []
    for i, (w, layers) in enumerate(zip(diffs, touched, strict=True)):
        side = _b_side(shelf, w)
        bases = known | build(side, [c for c in everyone if c.kind == "ceiling"], False, layers)
        scored = null_summary(rows.null_rows(everyone, bases, [rows.plain_targets(side, layers)]), layers)
        found.append(scored.with_columns(pl.lit(i, pl.Int64).alias("null")))
    kinds = pl.DataFrame({"subspace": [c.name for c in everyone], "kind": [c.kind for c in everyone]})
    table = pl.concat(found).rename({"null": "w"}).join(kinds, on="subspace", maintain_order="left")
    joint = (pl.col("R_act") * pl.col("R_w")).sqrt().alias("joint_score")
    return table.select("w", "subspace", "kind", "R_act", "R_w", joint)


def check_sizes(d: int, k: int, k_broad: int) -> None:
    """ValueError for a rank (PCS) or width (K_BROAD) that subspaces of `d` dimensions cannot have."""
    for name, size in {"PCS": k, "K_BROAD": k_broad}.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= d:
            raise ValueError(f"{name} = {size}: must be a whole number from 1 to {d}, the width of the model")


def check_nulls(lm: LM, w: WeightDiff, nulls: Sequence[WeightDiff], files: Sequence[str]) -> None:
    """ValueError for a null diff that is given twice, that is w itself, or that lacks a residual writer that w has; and what
    `check_null_diffs` says of them, by their files where they have any."""
    seen = {w.fingerprint: "w"}
    for i, diff in enumerate(nulls):
        if diff.fingerprint in seen:
            raise ValueError(f"null diff {i + 1} is the same as {seen[diff.fingerprint]}: give each one once")
        seen[diff.fingerprint] = f"null diff {i + 1}"
        writers = [lm.decoder.param_name(l, role) for l in w.layers() for role in ("o", "down")]
        if lacking := [name for name in writers if name in w.entries and name not in diff.entries]:
            raise ValueError(f"null diff {i + 1} lacks {lacking[0]}, which w changes: train both on the same modules")
    check_null_diffs(
        [(file or f"null diff {i}", one) for i, (file, one) in enumerate(zip(files, nulls, strict=True), 1)]
    )


def _b_side(shelf: Shelf, w: WeightDiff, fit: bool = True) -> CeilingMaterials:
    """What w gives the ceilings (without `fit` nothing can be built from it) and its targets."""
    steered = capture_steered(shelf.lm, shelf.behavior, w, shelf.protocol, cache=shelf.cache, fit=fit)
    return CeilingMaterials(shelf.lm.decoder, w, steered, shelf.k, shelf.protocol.fold_gain)


def _sorted_out(extra: Iterable[object] | Mapping[str, object]) -> tuple[list[Candidate], dict[str, Mapping]]:
    """Functions and ready bases among what the caller gave."""
    items = []
    for item in [extra] if isinstance(extra, Mapping) else extra:
        items += item.items() if isinstance(item, Mapping) else [("", item)]
    functions = [as_candidate(item) for _, item in items if not isinstance(item, Mapping)]
    ready = [(name, item) for name, item in items if isinstance(item, Mapping)]
    if len(dict(ready)) < len(ready):
        raise ValueError(f"two ready bases have one name among {', '.join(str(name) for name, _ in ready)}")
    return functions, dict(ready)


def _given(name: str, by_layer: Mapping, lm: LM) -> list[Basis]:
    """Ready bases as one per layer. ValueError for a layer that the model lacks or a basis that does not fit."""
    n, d = lm.decoder.n_layers, lm.decoder.d
    if not by_layer or set(by_layer) - set(range(n)):
        raise ValueError(f"{name}: bases are given for layers {sorted(by_layer)}; the model has 0 to {n - 1}")
    missing = empty(d, "not given at this layer")
    return [as_basis(by_layer[l], d, f"{name} at layer {l}") if l in by_layer else missing for l in range(n)]
