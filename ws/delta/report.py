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

from ws.cache.files import atomic_file, write_json, write_text
from ws.delta.bootstrap import Interval
from ws.delta.phases import RANK, Phase, expected_cos, phases, top1_cos, verdict
from ws.show.tables import read_table, write_table

FIELDS = (
    "L", "phase", "frob", "token_norm_mean", "token_norm_std", "h_norm_mean", "rel_step_mean", "rel_step_std",
    "parallel_frac", "cos_delta_h_mean", "top_singvals", "eff_rank", "top1_frac", "top3_frac", "top10_frac",
)  # fmt: skip
SHOWN = [
    "L", "phase", "rel_step_mean", "h_norm_mean", "eff_rank", "eff_rank_low", "eff_rank_high", "top1_frac", "top3_frac",
    "top10_frac", "parallel_frac", "cos_delta_h_mean",
]  # fmt: skip
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


@dataclass(frozen=True)
class DeltaRun:
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
        """A row per layer: its numbers, singular values as columns s1, s2, ..., 95 % bootstrap intervals."""
        return layer_table(self)

    def conclusion(self) -> str:
        """Markdown: both hypotheses about depth with their computed verdicts and chance levels."""
        return conclusion(self)

    def save(self, folder: Path | str) -> Path:
        """Write every result file into `folder`."""
        return save_run(self, Path(folder))


def _number(value: float) -> float | None:
    """JSON knows no NaN: what is undefined is null."""
    return value if math.isfinite(value) else None


def result_json(run: DeltaRun) -> dict:
    """The named schema of docs/method.md section 9."""
    per_layer = []
    for layer in run.layers:
        entry = {name: getattr(layer, name) for name in FIELDS}
        per_layer.append(entry | {"top_singvals": list(layer.top_singvals)})
    groups = {}
    for p in run.phases:
        groups[p.name] = {"n": len(p.layers), "intra": _number(p.intra), "cross": _number(p.cross)}
        if p.captures:
            groups[p.name]["capture"] = {str(c.layer): c.capture for c in p.captures}
    return {
        "model": run.model,
        "num_layers": len(run.layers),
        "hidden": run.hidden,
        "n_calib_tokens": run.n_calib_tokens,
        "per_layer": per_layer,
        "top1_cos_adjacent": top1_cos(run.directions).diagonal(1).tolist(),
        "phases": groups,
    }


def layer_table(run: DeltaRun) -> pl.DataFrame:
    """A row per layer: the fields of the JSON, singular values as columns s1, s2, ..., 95 % bootstrap intervals."""
    rows = []
    for layer in run.layers:
        row = {name: getattr(layer, name) for name in FIELDS if name != "top_singvals"}
        row |= {"eff_rank_low": layer.eff_rank_interval.low, "eff_rank_high": layer.eff_rank_interval.high}
        row |= {"top1_frac_low": layer.top1_frac_interval.low, "top1_frac_high": layer.top1_frac_interval.high}
        rows.append(row | {f"s{i}": s for i, s in enumerate(layer.top_singvals, 1)})
    return pl.DataFrame(rows)


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
    values = ("capture", "chance_capture", "left_out", "chance_left_out")
    chance = min(RANK, run.hidden) / run.hidden
    rows = [(p.name, c.layer, c.capture, p.chance, c.left_out, chance) for p in run.phases for c in p.captures]
    return pl.DataFrame(
        rows, {"phase": pl.String, "layer": pl.Int64, **dict.fromkeys(values, pl.Float64)}, orient="row"
    )


def cos_table(cos: Float[Tensor, "L L"]) -> pl.DataFrame:
    """Signed cosines of top-1 directions, a row and a column per layer."""
    return pl.DataFrame({"layer": list(range(len(cos)))} | {f"{l}": cos[:, l].tolist() for l in range(len(cos))})


def reading_notes(run: DeltaRun) -> list[str]:
    """What a reader must know about this very run, as sentences."""
    plural = "s" if run.n_sequences > 1 else ""
    read = f"{run.n_calib_tokens} tokens in {run.n_sequences} sequence{plural} (mode {run.mode})"
    notes = [
        f"{read}; the first token of each is left out.",
        "The last layer's output is "
        + ("taken after the final norm." if run.final_norm else "the block's own, before the final norm."),
    ]
    if run.n_cut_tokens:
        of = f"{run.n_cut_sequences} sequence{'s' * (run.n_cut_sequences > 1)}"
        notes.append(f"{run.n_cut_tokens} tokens of {of} were cut off at max_length {run.max_length}.")
    if run.boot:
        notes.append(f"95 % intervals: {run.boot} bootstrap draws over {run.bootstrap_unit}, seed {run.seed}.")
    rows = run.n_calib_tokens - run.n_sequences
    if rows < run.hidden:
        notes.append(
            f"{rows} update rows in {run.hidden} dimensions: eff_rank is bounded by {rows} and grows with more text."
        )
    return notes


def setting(run: DeltaRun, n_texts: int) -> str:
    """What was read, as a Markdown list."""
    size = f"- {run.model}: {len(run.layers)} layers, d {run.hidden}; {n_texts} calibration passages"
    return "\n".join([size, *(f"- {note}" for note in reading_notes(run))])


def conclusion(run: DeltaRun) -> str:
    """Markdown: both hypotheses with their computed verdicts and chance levels, then the notes on this run."""
    said = verdict(run.phases, [layer.eff_rank for layer in run.layers], run.hidden)
    parts = [f"# Delta SVD of {run.model}", *(f"**{title}**: {said[key]}" for key, title in TITLES.items()), NULL_NOTE]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in reading_notes(run))]) + "\n"


def save_run(run: DeltaRun, folder: Path) -> Path:
    """Write every result file whole into `folder`; the JSON comes last, so that a folder with it is complete."""
    with atomic_file(folder / "delta_svd.safetensors") as tmp:
        # One metadata entry: the format's writer does not keep the order of several.
        about = json.dumps(
            {"model": run.model, "rows": "unit right singular vectors, signs by docs/method.md section 9"}
        )
        singvals = torch.nn.utils.rnn.pad_sequence([torch.tensor(l.top_singvals) for l in run.layers], batch_first=True)
        save_file({"directions": run.directions.contiguous(), "top_singvals": singvals}, tmp, metadata={"about": about})
    tables = {"per_layer": layer_table(run), "phases": phase_table(run), "capture": capture_table(run)}
    for name, table in (tables | {"cos": cos_table(top1_cos(run.directions))}).items():
        write_table(table, folder / f"delta_svd_{name}.tsv")
    write_text(folder / "delta_svd_conclusion.md", conclusion(run))
    settings = {f.name: getattr(run, f.name) for f in fields(run) if f.name != "layers"}
    write_json(folder / "delta_svd_run.json", settings | {"notes": reading_notes(run)})
    write_json(folder / "delta_svd.json", result_json(run))
    return folder


@dataclass(frozen=True)
class Saved:
    """A result folder read back: its name in comparisons, the JSON, the per-layer table."""

    label: str
    result: dict
    layers: pl.DataFrame


def read_folder(folder: str | Path) -> Saved:
    """Read a result folder. Raises FileNotFoundError / ValueError naming the file that is missing or foreign."""
    folder = Path(folder).expanduser()
    path, table = folder / "delta_svd.json", folder / "delta_svd_per_layer.tsv"
    for file in (path, table):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: not a delta SVD result folder, this file is missing")
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    lacks = [key for key in ("model", "num_layers", "per_layer") if not isinstance(result, dict) or key not in result]
    if lacks:
        raise ValueError(f"{path}: not a delta SVD result, it lacks {', '.join(lacks)}")
    return Saved(result["model"], result, read_table(table))


def compare(folders: list[str | Path]) -> pl.DataFrame:
    """rel_step and eff_rank of two or more result folders against relative depth `L / num_layers`.

    A row per model and layer; models of one name get their folder's name added. Raises ValueError for fewer than two
    folders or a folder given twice.
    """
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    if len(paths) < 2:
        raise ValueError(f"a comparison needs at least two result folders, {len(paths)} given")
    twice = next((p for p in paths if paths.count(p) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice}: given twice")
    saved = [read_folder(path) for path in paths]
    names = [s.label for s in saved]
    labels = [
        n if names.count(n) == 1 else f"{n} ({p.parent.name}/{p.name})" for n, p in zip(names, paths, strict=True)
    ]
    columns = [
        "rel_step_mean", "rel_step_std", "eff_rank", "eff_rank_low", "eff_rank_high", "top1_frac", "parallel_frac",
    ]  # fmt: skip
    parts = [
        s.layers.select(
            pl.lit(label).alias("model"),
            pl.col("L").alias("layer"),
            (pl.col("L") / s.result["num_layers"]).alias("depth"),
            pl.col("phase"),
            *(pl.col(c).cast(pl.Float64) for c in columns),
        )
        for s, label in zip(saved, labels, strict=True)
    ]
    return pl.concat(parts)
