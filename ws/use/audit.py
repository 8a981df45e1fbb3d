"""Whose direction is it? A stranger's weights against a library of behaviours, by cosines. (docs/method.md section 13)

    cos(u, w) = <u, w> / (|u| |w|)        <B1 A1, B2 A2> = tr((B2^T B1)(A1 A2^T))

over the matrices that both have, from factors. A cosine is read against the bands of `ws.use.bands`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float
from torch import Tensor

from ws.cache.files import write_json, write_text
from ws.cache.places import out_folder
from ws.diff.algebra import cosines, grams
from ws.diff.core import layer_of
from ws.model.lm import LM, check_model, load_lm
from ws.show.tables import as_text, literal, write_table
from ws.steer.effect import check_null_diffs
from ws.train.record import other_base
from ws.use.bands import SAME, Bands, bands, random_cosines
from ws.use.directions import directions
from ws.use.library import Known, Source, Stranger, read_library, read_stranger

SHOWN = "behavior adapter verdict cos null_low null_high seeds_low seeds_high random_low random_high w nulls".split()


@dataclass(frozen=True, eq=False)
class Audit:
    """about: the stranger in words, its base, what of the library was left out. verdicts: per behaviour and adapter the
    signed mean cosine, the ends of its bands, the shared matrices and their share of |u|^2 and of the library's |w|^2 (mean
    over w), how entries were read. by_module, by_layer: cosine, null band and mean over seeds of a part. bands: number, mean
    and ends of each band. directions: see there."""

    about: dict[str, str]
    verdicts: pl.DataFrame
    by_module: pl.DataFrame
    by_layer: pl.DataFrame
    bands: pl.DataFrame
    directions: pl.DataFrame

    def conclusion(self) -> str:
        """The verdicts as a table, a sentence on each, the directions (Markdown)."""
        said = [f"{key}: {literal(value)}" for key, value in self.about.items() if value]
        said += [as_text(self.verdicts, SHOWN), *map(sentence, self.verdicts.to_dicts())]
        said.append(
            "Bands are those of the library's own recipe. Of null diffs 2.5 % lie above, and 2.5 % below, each behaviour."
        )
        words = self.directions.with_columns(pl.col(pl.String).str.replace_all("|", "\\|", literal=True))
        return "\n\n".join(said + [as_text(words)] * bool(len(words))) + "\n"

    def save(self, folder: Path | str) -> Path:
        """Write `audit_*` and `audit.json` into `folder`, each file whole. Returns the folder."""
        folder = Path(folder)
        for name in ("verdicts", "by_module", "by_layer", "bands", "directions"):
            write_table(getattr(self, name), folder / f"audit_{name}.tsv")
        write_text(folder / "audit_conclusion.md", self.conclusion())
        write_json(folder / "audit.json", {"about": self.about, "verdicts": self.verdicts.to_dicts()})
        return folder


def sentence(row: dict) -> str:
    """A row of `verdicts` in words."""
    low, high, j = row["null_low"], row["null_high"], row["nulls"]
    said = f"**{literal(row['behavior'])}** ({literal(row['adapter'])}): {row['verdict']}"
    if not row["w"]:
        return f"{said}: no w is left that shares no seed with the stranger."
    held = f"one more null diff lies between {low:+.3f} and {high:+.3f} ({j} null diffs, w of other seeds)"
    if np.isnan(low):
        held = f"a null band takes 2 null diffs that have a w of another seed, there are {j}: ws batch --nulls 3"
    held += f"; seeds reach {row['seeds_low']:+.3f} to {row['seeds_high']:+.3f}" if row["w"] > 1 else "; one seed"
    held += ", which the band does not part from null diffs" if row["verdict"] == "undecided" and high == high else ""
    held += f"; entries were read as {row['read_as']}" if "missing" in row["read_as"] else ""
    outside = {"the stranger's |u|^2": 1 - row["share"], "the library's |w|^2": 1 - row["share_w"]}
    if lacking := [f"{part:.1%} of {whose}" for whose, part in outside.items() if part > 5e-4]:
        held += f"; {' and '.join(lacking)} lie in matrices that the other has not, and are not compared"
    return (
        f"{said}. Mean cosine {row['cos']:+.3f} with {row['w']} w; {held}; random differences of the same spectra reach"
        f" {row['random_low']:+.1g} to {row['random_high']:+.1g}: no evidence by themselves, as any training moves alike."
    )


@dataclass(frozen=True, eq=False)
class _Group:
    """One behaviour and adapter beside the stranger: `each` readings of every entry, inner products by parameter."""

    entries: list[Known]
    each: int
    names: list[str]
    grams: Float[Tensor, "P N N"]

    @property
    def same(self) -> set[int]:
        """Entries that are the stranger, up to its scale: by w, or by one of its two adapters."""
        alike = cosines(self.grams)[0].abs() >= SAME
        return {(i - 1) // self.each for i in alike.nonzero().flatten().tolist() if i}

    def bands(self, seeds: set[int], at: Sequence[int]) -> Bands:
        return bands(cosines(self.grams[list(at)]), self.entries, self.each, self.same, seeds)


def audit(
    source: Source,
    base: LM | Path | str,
    library: Path | str | Sequence[Known] | None = None,
    *,
    texts: Sequence[str] = (),
    top: int = 3,
    draws: int = 400,
    seed: int = 0,
) -> Audit:
    """Compare a stranger with every behaviour of a library.

    source: a PEFT adapter folder, a merged checkpoint folder, or what `load_diff` takes. base: the model it was trained from.
    library: a folder with `w.safetensors` of that base at any depth (default: all results), or entries. texts: on which
    readers' directions are looked up; top: how many directions. draws: of random differences. ValueError / FileNotFoundError
    before anything is computed: a stranger that is damaged, does not fit the base or shares no matrix with the library, a
    library without a difference of it.

    Examples:
        >>> import torch, ws
        >>> from ws.diff import LowRank
        >>> from ws.use.library import Known
        >>> w = ws.load_diff("tiny")
        >>> near = w.map(lambda name, e: LowRank(e.B + 0.5 * e.B.std() * torch.randn(e.B.shape), e.A))
        >>> found = ws.audit("tiny", "tiny", [Known("sycophancy", "lora", 1, False, near)])
        >>> found.verdicts["verdict"].item(), found.verdicts["cos"].item() > 0.5
        ('undecided', True)
    """
    lm = base if isinstance(base, LM) else check_model(str(base))
    try:
        stranger = read_stranger(source, lm)
    except NotImplementedError:  # it takes the base's weights, which a model on the meta device lacks
        stranger = read_stranger(source, lm := load_lm(str(base)))
    found = library is None or isinstance(library, (str, Path))
    models = {lm.slug, lm.name}
    entries, skipped = read_library(library or out_folder(), models, lm.model) if found else (library, {})
    lm = load_lm(str(base)) if lm.device.type == "meta" else lm
    groups = _groups(stranger, entries, lm)
    for group in groups.values():
        check_null_diffs([(entry.label, entry.w) for entry in group.entries if entry.null])
    twins = [group.entries[i] for group in groups.values() for i in group.same]
    seeds, u = {twin.seed for twin in twins}, stranger.u
    tables: dict[str, list[dict]] = {"verdicts": [], "module": [], "layer": [], "bands": []}
    for (behavior, adapter), group in groups.items():
        key = {"behavior": behavior, "adapter": adapter}
        for name, rows in _judged(stranger, group, seeds, draws, seed).items():
            tables[name] += [key | row for row in rows]
    kind = "a task vector, one side" if stranger.one_side else "a difference of two sides"
    itself = ", ".join(f"{twin.behavior} seed {twin.seed}{' (null diff)' * twin.null}" for twin in twins)
    about = {"stranger": f"{stranger.name}, {kind}, {len(u)} matrices, norm {u.total_norm():.3g}", "base": lm.name}
    apart = [stranger.name] * other_base(stranger.u.meta, lm) + [e.label for e in entries if other_base(e.w.meta, lm)]
    about |= {
        "trained from other files under the name of this base, so that a cosine may say nothing": ", ".join(apart)
    }
    about |= {"note": stranger.note, "left out with all w of its seed, as it is the stranger": itself}
    about |= {"left out": "; ".join(f"{path}: {why}" for path, why in skipped.items())}
    frames = (pl.DataFrame(rows, infer_schema_length=None) for rows in tables.values())
    return Audit(about, *frames, directions(u, lm, texts, top))


def _groups(stranger: Stranger, entries: Sequence[Known], lm: LM) -> dict[tuple[str, str], _Group]:
    """The library by behaviour and adapter, as far as it shares matrices with the stranger, read as the stranger is: beside a
    task vector with the adapters of w and of null diffs, where all of them can be read."""
    found: dict[tuple[str, str], list[Known]] = {}
    for entry in entries:
        found.setdefault((entry.behavior, entry.adapter), []).append(entry)
    groups, names = {}, [name for name in stranger.u if len(stranger.u.shape(name)) < 3]
    for key, group in found.items():
        if shared := [name for name in names if all(name in entry.w for entry in group)]:
            try:
                read = [entry.read(stranger.one_side, lm.model) for entry in group]
            except (ValueError, FileNotFoundError):
                read = [entry.read(False, lm.model) for entry in group]
            every = [stranger.u, *(w for one in read for w in one)]
            groups[key] = _Group(group, len(read[0]), shared, grams(every, shared))
    if not groups:
        raise ValueError(f"{stranger.name}: shares no matrix with the library; it changes {', '.join(names[:2])}, ...")
    return groups


def _judged(stranger: Stranger, group: _Group, seeds: set[int], draws: int, seed: int) -> dict[str, list[dict]]:
    """A group's rows of each table."""
    u, names, found = stranger.u, group.names, group.bands(seeds, range(len(group.names)))
    ws = [e.w for i, e in enumerate(group.entries) if i not in group.same and not e.null and e.seed not in seeds]
    drawn = np.quantile(random_cosines(u, ws, names, draws, seed), [0.025, 0.5, 0.975]).tolist() if ws else []
    values = {"stranger": [found.cos], "seeds": found.seeds, "nulls": found.nulls, "nulls of the same seed": found.same}
    rows = {name: _ends(v) for name, v in (values | {"random": drawn}).items()}
    rows["null band"] = _ends([found.low, found.high]) | {"n": len(found.nulls)}
    rows["random"] |= {"n": draws}
    verdict = {"verdict": found.verdict, "cos": found.cos, "null_low": found.low, "null_high": found.high}
    for name in ("seeds", "random"):
        verdict |= {f"{name}_low": rows[name]["low"], f"{name}_high": rows[name]["high"]}
    share = sum(u.norm(name) ** 2 for name in names) / u.total_norm() ** 2
    shares = [sum(w.norm(name) ** 2 for name in names) / w.total_norm() ** 2 for w in ws]
    verdict |= {"w": found.w, "nulls": len(found.nulls), "matrices": len(names), "share": share}
    verdict |= {"share_w": float(np.mean(shares)) if shares else np.nan}
    verdict |= {
        "read_as": "one side" if group.each > 1 else f"differences{', as adapters are missing' * stranger.one_side}"
    }
    tables = {"verdicts": [verdict], "bands": [{"band": name} | row for name, row in rows.items()]}
    parts = {
        "layer": layer_of,
        "module": lambda name: name.removesuffix(".weight").split(".")[-1].removesuffix("_proj"),
    }
    for what, part_of in parts.items():
        tables[what] = []
        for part in sorted({part_of(name) for name in names}, key=lambda part: (part is None, part)):
            some = group.bands(seeds, [p for p, name in enumerate(names) if part_of(name) == part])
            row = {what: part, "cos": some.cos, "null_low": some.low, "null_high": some.high}
            tables[what].append(row | {"seeds": float(np.mean(some.seeds)) if some.seeds else np.nan})
    return tables


def _ends(values: Sequence[float]) -> dict:
    nan = float("nan")
    mean, low, high = (float(f(values)) if len(values) else nan for f in (np.mean, np.min, np.max))
    return {"n": len(values), "mean": mean, "low": low, "high": high}
