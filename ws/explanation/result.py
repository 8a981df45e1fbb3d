"""`Explanation`: what a sweep found, as tables, figures and words, and as the files of a run (docs/method.md section 6):
`v7_*.csv, .tsv, .md`, `scores.safetensors` (what statistics over seeds start from), `explanation.json` (the rest)."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor

from ws.cache.files import atomic_file, write_text
from ws.cache.keys import read_hash
from ws.cache.made import Damaged, read_safetensors
from ws.cache.places import ASSETS
from ws.cache.records import read_record, write_record
from ws.explanation import words
from ws.explanation.figures import joint_scatter, recovery_by_layer
from ws.explanation.rows import NULL_ROWS, null_check
from ws.explanation.scores import Target, target, weight_targets
from ws.explanation.summary import against_nulls, folded, null_summary, summarise, summarise_specific, with_percentages
from ws.show.tables import literal, read_table, sort_nan_last, write_table
from ws.steer.effect import Steering, steering

CEILINGS = ["TaskDiff_lora_ceiling", "dW_left_basis_ceiling"]
RECORD = "explanation.json"
AGAIN = "running this v7_sweep again"


@dataclass(frozen=True, eq=False)
class Explanation:
    """Every candidate's scores on what one w does to activations and to weights.

    per_layer: one row per layer and candidate (docs/method.md sections 6 and 7). specific_per_layer: what each explains
    beyond the clean states. null_per_layer: the scores on each null diff (`ws.explanation.rows.null_rows`). candidates:
    what is known of each. checks: the run's own assertions with their values. tensors: `ws.explanation.rows.kept_tensors`.
    bases: content hash of each A-side candidate's bases. sources: `{file name: text}` of the caller's own candidate files.

    Examples:
        >>> import tempfile, ws
        >>> found = ws.explain(ws.load_lm("tiny"), ws.load_diff("tiny"), candidates=["write"], progress=False)
        >>> again = ws.Explanation.load(found.save(tempfile.mkdtemp()))
        >>> again.top(1) == found.top(1), found.layers
        (True, [2, 3, 4, 5])
    """

    per_layer: pl.DataFrame
    specific_per_layer: pl.DataFrame
    null_per_layer: pl.DataFrame
    setting: dict
    candidates: list[dict]
    checks: dict[str, float]
    tensors: dict[str, Tensor] = field(repr=False)
    bases: dict[str, str] = field(default_factory=dict, repr=False)
    sources: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> list[int]:
        """The layers that summaries are means over."""
        return self.setting["layers"]

    @cached_property
    def plain_summary(self) -> pl.DataFrame:
        found = summarise(self.per_layer, self.layers)
        return against_nulls(found, self.nulls, self.setting["d"]) if len(self.nulls) else found

    @cached_property
    def summary(self) -> pl.DataFrame:
        """One row per candidate, means over the layers, best joint score first, with percentages of the ceilings. The shuffles of
        a control are one row, their mean."""
        return sort_nan_last(folded(with_percentages(self.plain_summary)), "joint_score")

    @cached_property
    def nulls(self) -> pl.DataFrame:
        """R_act and R_w of every candidate on each null diff, means over the layers."""
        return null_summary(self.null_per_layer, self.layers)

    @cached_property
    def steering(self) -> Steering:
        """Whether w steers, held against the null diffs."""
        return steering([self.setting["effects"]], self.setting["null_effects"], self.setting.get("score", "log-ratio"))

    @cached_property
    def specific(self) -> pl.DataFrame:
        """One row per candidate: what it explains beyond the clean states' own directions, best first."""
        return sort_nan_last(folded(summarise_specific(self.specific_per_layer, self.layers)), "mean_specific_conc_act")

    def top(self, rows: int = 12, style: str = "simple") -> str:
        """The head of the summary as text; style: a tabulate format, or `html`."""
        return words.top_table(self.summary, rows, style)

    def figure(self) -> Figure:
        """Activation against weight recovery of every candidate."""
        return joint_scatter(self.summary, self.setting["title"])

    def layer_figure(self, best: int = 6) -> Figure:
        """Recovery by layer of the best write and mixed candidates, with the ceilings."""
        names = words.leaders(self.summary, "joint_score", ("write", "mixed"))[:best]
        known = set(self.summary["subspace"])
        return recovery_by_layer(self.per_layer, names + [c for c in CEILINGS if c in known], self.layers)

    def conclusion(self) -> str:
        """What the tables say in words, every number taken from them (Markdown)."""
        return words.conclusion(self.summary, self.per_layer, self.setting, self.checks, self.steering)

    def headline(self) -> str:
        """That in a sentence or two: does w steer, and which candidate leads this seed."""
        ranked = words.leaders(self.summary, "joint_score", ("write", "mixed"))
        if self.steering.seen is False or not ranked:
            return self.steering.short
        rows = {row["subspace"]: row for row in self.summary.iter_rows(named=True)}
        first = rows[ranked[0]]
        if not first["joint_score"] > 1:
            return f"{self.steering.short} None of {len(ranked)} write and mixed candidates holds more than a random subspace."
        plain = next((n for n in ranked if rows[n].get("sees", "") in ("", *words.RACES[:2])), ranked[0])
        apart = "" if plain == ranked[0] else f" Of those that see no training texts it is {_held(rows[plain])}."
        return (
            f"{self.steering.short} Of {len(ranked)} write and mixed candidates the highest joint score on this one seed is that"
            f" of {_held(first)}.{apart} One seed ranks nothing; the report over seeds does."
        )

    def definitions(self) -> str:
        """The candidates and their definitions (Markdown)."""
        return words.definitions(self.candidates)

    def targets(self, l: int) -> dict[str, Target | None]:
        """What layer l was scored on: `act`, `oproj`, `downproj`, `combined`."""
        factors = (self.tensors.get(f"weight_factor/{l}/{name}") for name in ("oproj", "downproj"))
        return {"act": target(self.tensors[f"act_factor/{l}"]), **weight_targets(*factors)}

    def null_check(self, draws: int) -> pl.DataFrame:
        """The closed-form null beside `draws` random subspaces, by layer and target."""
        return null_check({l: self.targets(l) for l in self.layers}, self.setting["k"], draws)

    def save(self, folder: Path | str) -> Path:
        """Write all files of the run into `folder`, each whole; the record comes last. Returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tables = {
            "v7_per_layer.csv": self.per_layer,
            "v7_specific_per_layer.csv": self.specific_per_layer,
            "v7_null_diffs.csv": self.null_per_layer,
            "v7_summary.tsv": self.plain_summary,
            "v7_summary_pct.tsv": self.summary,
            "v7_specific_summary.tsv": self.specific,
        }
        files = [write_table(table, folder / name) for name, table in tables.items()]
        texts = {"conclusion": self.conclusion(), "definitions": self.definitions()}
        # what v7 measures that its predecessor did not
        texts["plan_merge"] = (ASSETS / "v7_plan_merge.md").read_text(encoding="utf-8")
        for name, text in texts.items():
            write_text(folder / f"v7_{name}.md", text)
        files += [write_text(folder / name, text) for name, text in self.sources.items()]
        with atomic_file(folder / "scores.safetensors") as tmp:
            save_file(self.tensors, tmp)
        record = {f: getattr(self, f) for f in ("setting", "candidates", "checks", "bases")}
        record["sources"] = list(self.sources)
        record["files"] = {file.name: read_hash(file) for file in [*files, folder / "scores.safetensors"]}
        write_record(folder / RECORD, record)
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> "Explanation":
        """Read what `save` wrote. FileNotFoundError where there is none, Damaged naming a file that is."""
        folder = Path(folder)
        path = folder / RECORD
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: run the v7_sweep of this folder first")
        record = read_record(path)
        if not {"files", "sources"} <= set(record):
            raise Damaged(path, AGAIN)
        hashes, sources = record.pop("files"), record.pop("sources")
        for name, known in hashes.items():
            if not (folder / name).is_file() or read_hash(folder / name) != known:
                raise Damaged(folder / name, AGAIN)
        rows = read_table(folder / "v7_per_layer.csv")
        return cls(
            per_layer=rows.with_columns(pl.col("note").cast(pl.String).fill_null("")),
            specific_per_layer=read_table(folder / "v7_specific_per_layer.csv"),
            null_per_layer=read_table(folder / "v7_null_diffs.csv").cast(NULL_ROWS),
            tensors=read_safetensors(folder / "scores.safetensors")[0],
            sources={name: (folder / name).read_text(encoding="utf-8") for name in sources},
            **record,
        )

    def __repr__(self) -> str:
        of = f"{len(self.candidates)} candidates, layers {self.layers}, protocol {self.setting['protocol']['name']}"
        return f"Explanation({self.setting['title']}: {of})"

    def _repr_html_(self) -> str:
        return self.top(style="html")


def _held(row: dict) -> str:
    """A leader and its two scores, in words."""
    act, w = row["mean_conc_act"], row["mean_conc_w_combined"]
    of = f" (sees {row['sees']})" if row.get("sees") else ""
    share = (
        f"{act:.1f} times a random subspace's share of the activation differences (R_act), {w:.1f} times of `w` (R_w)"
    )
    return f"**{literal(row['subspace'])}**{of}: {share}"
