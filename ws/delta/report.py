"""The result of a delta SVD: its tables, words and files, and the comparison of models from their files.

`delta_svd.json` holds the numbers of docs/method.md section 9 under its names and nothing else; intervals, chance
levels and leave-one-out values are in the tables, what was read in `delta_svd_run.json`, directions in
`delta_svd.safetensors`.
"""

import json
import math
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ws.cache.files import atomic_file, settled, write_json, write_text
from ws.cache.made import verified
from ws.delta.bootstrap import Interval
from ws.delta.phases import RANK, Phase, expected_cos, phases, top1_cos, verdict
from ws.show.tables import Told, literal, read_table, write_table

SHOWN = [
    "L", "phase", "rel_step_mean", "h_norm_mean", "eff_rank", "eff_rank_low", "eff_rank_high", "top1_frac", "top3_frac",
    "top10_frac", "parallel_frac", "cos_delta_h_mean",
]  # fmt: skip
COMPARED = ["rel_step_mean", "rel_step_std", "eff_rank", "eff_rank_low", "eff_rank_high", "top1_frac", "parallel_frac"]
TITLES = {"shared_C": "Phase C shares one broad subspace", "specialised_E": "Phase E layers are specialised"}

NULL_NOTE = (
    "Random directions are the weakest of nulls: a stream with a few large coordinates lifts every overlap above them."
    " The layers outside a phase are the stronger comparison."
)


@dataclass(frozen=True)
class LayerDelta:
    """One block's numbers; `directions (k, d)` are unit rows (zeros beyond the rank), the rest as in section 9."""

    L: int
    phase: str
    frob: float
    token_norm_mean: float
    token_norm_std: float
    h_norm_mean: float
    rel_step_mean: float
    rel_step_std: float
    parallel_frac: float
    cos_delta_h_mean: float
    top_singvals: tuple[float, ...]
    eff_rank: float
    top1_frac: float
    top3_frac: float
    top10_frac: float
    eff_rank_interval: Interval
    top1_frac_interval: Interval
    directions: Float[Tensor, "k d"]


FIELDS = [f.name for f in fields(LayerDelta)][:-3]  # of the JSON


@dataclass(frozen=True, repr=False)
class DeltaRun(Told):
    """All layers of one model, with what was read: token counts, passages, what was cut off, how the bootstrap drew."""

    model: str
    hidden: int
    n_calib_tokens: int
    n_sequences: int
    n_cut_tokens: int
    n_cut_sequences: int
    max_length: int
    mode: str
    final_norm: bool
    top_k: int
    boot: int
    seed: int
    bootstrap_unit: str
    layers: tuple[LayerDelta, ...]

    @property
    def directions(self) -> Float[Tensor, "L k d"]:
        return torch.stack([layer.directions for layer in self.layers])

    @cached_property
    def phases(self) -> list[Phase]:
        """What the layers of each phase of depth have in common, beside chance."""
        return phases(self.directions)

    def table(self) -> pl.DataFrame:
        """A row per layer: the fields of the JSON, singular values as columns s1, s2, ..., 95 % bootstrap intervals."""
        rows = []
        for layer in self.layers:
            row = {name: getattr(layer, name) for name in FIELDS if name != "top_singvals"}
            for name in ("eff_rank", "top1_frac"):
                row |= {f"{name}_{end}": x for end, x in getattr(layer, f"{name}_interval")._asdict().items()}
            rows.append(row | {f"s{i}": s for i, s in enumerate(layer.top_singvals, 1)})
        return pl.DataFrame(rows)

    def conclusion(self) -> str:
        """Markdown: both hypotheses about depth with their computed verdicts and chance levels, notes on this run."""
        said = verdict(self.phases, [layer.eff_rank for layer in self.layers], self.hidden)
        judged = [f"**{title}**: {said[key]}" for key, title in TITLES.items()]
        notes = "\n".join(f"- {note}" for note in reading_notes(self))
        return "\n\n".join([f"# Delta SVD of {literal(self.model)}", *judged, NULL_NOTE, notes]) + "\n"

    def headline(self) -> str:
        """Both verdicts in a line each, without their numbers (Markdown)."""
        said = verdict(self.phases, [layer.eff_rank for layer in self.layers], self.hidden)
        phase = {p.name: p for p in self.phases}
        held = {key: phase.get(name) for key, name in (("shared_C", "C"), ("specialised_E", "E"))}
        chance = min(RANK, self.hidden) / self.hidden
        parts = []
        for key, title in TITLES.items():
            word = said[key].partition(" (")[0].rstrip(".")
            one = held[key]
            share = f" (a left-out layer's top direction lies in the others' space by {one.left_out:.2f}, chance {chance:.2f})"
            parts.append(f"**{title}**: {word}{share if one and len(one.layers) > 1 else ''}.")
        return " ".join(parts)

    def save(self, folder: Path | str) -> Path:
        """Write every result file whole into `folder`; the JSON comes last: a folder with it is complete."""
        folder = Path(folder)
        # One metadata entry: the format's writer does not keep the order of several.
        about = {"model": self.model, "rows": "unit right singular vectors, signs by docs/method.md section 9"}
        singvals = [torch.tensor(layer.top_singvals) for layer in self.layers]
        tensors = {"directions": self.directions.contiguous(), "top_singvals": pad_sequence(singvals, batch_first=True)}
        with atomic_file(folder / "delta_svd.safetensors") as tmp:
            save_file(tensors, tmp, metadata={"about": json.dumps(about)})
        tables = {"per_layer": self.table(), "phases": phase_table(self), "capture": capture_table(self)}
        for name, table in (tables | {"cos": cos_table(top1_cos(self.directions))}).items():
            write_table(table, folder / f"delta_svd_{name}.tsv")
        write_text(folder / "delta_svd_conclusion.md", self.conclusion())
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        write_json(folder / "delta_svd_run.json", settings | {"notes": reading_notes(self)})
        write_json(folder / "delta_svd.json", result_json(self))
        return folder


def result_json(run: DeltaRun) -> dict:
    """The named schema of docs/method.md section 9; what is undefined (NaN) is null."""
    groups = {}
    for p in run.phases:
        means = {name: x if math.isfinite(x) else None for name, x in (("intra", p.intra), ("cross", p.cross))}
        groups[p.name] = {"n": len(p.layers)} | means
        if p.captures:
            groups[p.name]["capture"] = {str(c.layer): c.capture for c in p.captures}
    return {
        "model": run.model,
        "num_layers": len(run.layers),
        "hidden": run.hidden,
        "n_calib_tokens": run.n_calib_tokens,
        "per_layer": [{name: getattr(layer, name) for name in FIELDS} for layer in run.layers],
        "top1_cos_adjacent": top1_cos(run.directions).diagonal(1).tolist(),
        "phases": groups,
    }


def phase_table(run: DeltaRun) -> pl.DataFrame:
    """A row per phase: mean |cos| inside and outside, captures, each beside its chance level; NaN = undefined."""
    nan, d = float("nan"), run.hidden
    rows = [
        {
            "phase": p.name, "n": len(p.layers), "layers": f"{p.layers[0]}-{p.layers[-1]}", "intra": p.intra,
            "cross": p.cross, "chance_cos": expected_cos(d), "capture": p.capture, "chance_capture": p.chance,
            "chance_capture_95": p.chance_high, "left_out": p.left_out,
            "chance_left_out": min(RANK, d) / d if p.captures else nan, "chance_left_out_95": p.left_out_high,
            "outside": p.outside,
        }
        for p in run.phases
    ]  # fmt: skip
    return pl.DataFrame(rows)


def capture_table(run: DeltaRun) -> pl.DataFrame:
    """A row per layer of every phase with at least two: capture and leave-one-out capture, with chance levels."""
    schema = dict.fromkeys(("capture", "chance_capture", "left_out", "chance_left_out"), pl.Float64)
    chance = min(RANK, run.hidden) / run.hidden
    rows = [(p.name, c.layer, c.capture, p.chance, c.left_out, chance) for p in run.phases for c in p.captures]
    return pl.DataFrame(rows, {"phase": pl.String, "layer": pl.Int64} | schema, orient="row")


def cos_table(cos: Float[Tensor, "L L"]) -> pl.DataFrame:
    """Signed cosines of top-1 directions, a row and a column per layer."""
    return pl.DataFrame({"layer": list(range(len(cos)))} | {f"{l}": cos[:, l].tolist() for l in range(len(cos))})


def reading_notes(run: DeltaRun) -> list[str]:
    """What a reader must know about this very run, as sentences."""
    read = f"{run.n_calib_tokens} tokens in {run.n_sequences} sequence{'s' * (run.n_sequences > 1)} (mode {run.mode})"
    last = "taken after the final norm" if run.final_norm else "the block's own, before the final norm"
    notes = [f"{read}; the first token of each is left out.", f"The last layer's output is {last}."]
    if run.n_cut_tokens:
        of = f"{run.n_cut_sequences} sequence{'s' * (run.n_cut_sequences > 1)}"
        notes.append(f"{run.n_cut_tokens} tokens of {of} were cut off at max_length {run.max_length}.")
    if run.boot:
        notes.append(f"95 % intervals: {run.boot} bootstrap draws over {run.bootstrap_unit}, seed {run.seed}.")
    rows = run.n_calib_tokens - run.n_sequences
    if rows < run.hidden:
        of = f"{rows} update rows in {run.hidden} dimensions"
        notes.append(f"{of}: eff_rank is bounded by {rows} and grows with more text.")
    return notes


def setting(run: DeltaRun, n_texts: int) -> str:
    """What was read, as a Markdown list."""
    size = f"- {literal(run.model)}: {len(run.layers)} layers, d {run.hidden}; {n_texts} calibration passages"
    return "\n".join([size, *(f"- {note}" for note in reading_notes(run))])


def read_folder(folder: str | Path) -> tuple[dict, pl.DataFrame]:
    """The JSON and the per-layer table of a result folder. Raises FileNotFoundError / ValueError naming the file that
    is missing or foreign."""
    folder = verified(Path(folder).expanduser())
    path, table = folder / "delta_svd.json", folder / "delta_svd_per_layer.tsv"
    if missing := [file for file in (path, table) if not file.is_file()]:
        raise FileNotFoundError(f"{missing[0]}: not a delta SVD result folder, this file is missing")
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if lacks := [k for k in ("model", "num_layers", "per_layer") if not isinstance(result, dict) or k not in result]:
        raise ValueError(f"{path}: not a delta SVD result, it lacks {', '.join(lacks)}")
    return result, read_table(table)


def compare(folders: list[str | Path]) -> pl.DataFrame:
    """rel_step and eff_rank of two or more result folders against relative depth `L / num_layers`. Models of one name
    get their folder's name added. ValueError for fewer than two folders, or a folder given twice."""
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    if len(paths) < 2:
        raise ValueError(f"a comparison needs at least two result folders, {len(paths)} given")
    if twice := [p for p in paths if paths.count(p) > 1]:
        raise ValueError(f"{twice[0]}: given twice")
    saved = [read_folder(path) for path in paths]
    names, parts = [result["model"] for result, _ in saved], []
    for path, name, (result, layers) in zip(paths, names, saved, strict=True):
        label = name if names.count(name) == 1 else f"{name} ({path.parent.name}/{settled(path).name})"
        about = (
            pl.lit(label).alias("model"),
            pl.col("L").alias("layer"),
            (pl.col("L") / result["num_layers"]).alias("depth"),
        )
        parts.append(layers.select(*about, "phase", pl.col(COMPARED).cast(pl.Float64)))
    return pl.concat(parts)
