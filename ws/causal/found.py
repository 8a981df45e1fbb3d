"""`CausalCheck`: what a causal check found, as tables, figures and words, and as the files of a run. (docs/method.md section
8)"""

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor

from ws.cache.files import atomic_file, write_text
from ws.cache.keys import read_hash
from ws.cache.made import Damaged, read_safetensors
from ws.cache.records import read_record, write_record
from ws.causal import figures, words
from ws.causal.headline import headline
from ws.show.tables import Told, read_table, write_table

RECORD, TENSORS = "causal.json", "causal_excess.safetensors"
AGAIN = "running this causal_check again"
TABLES = ("candidates", "where", "read", "ranks", "dose", "matched", "controls", "forward")
CLOUD = ("points", "fit", "slopes", "beyond")


@dataclass(frozen=True, eq=False, repr=False)
class CausalCheck(Told):
    """candidates: the columns of `ws.causal.retention` with kind, family, sees and the sweep's scores, other_layer
    (first-order effect of the bases of another layer), excess_forward and p_forward. where, read, ranks, dose, matched,
    controls: see `ws.causal.parts` and `ws.causal.others`. forward: the controls that were run forward. cloud: points, fit,
    slopes, beyond of `ws.causal.cloud`, {} without. tensors: excess `(C, claims)`, linear `(C,)`, drawn `(N, C)`, in the
    order of `names`; sides `(claims,)`, -1 where the no-word shows the behaviour."""

    candidates: pl.DataFrame
    where: pl.DataFrame
    read: pl.DataFrame
    ranks: pl.DataFrame
    dose: pl.DataFrame
    matched: pl.DataFrame
    controls: pl.DataFrame
    forward: pl.DataFrame
    cloud: dict[str, pl.DataFrame]
    setting: dict
    tensors: dict[str, Tensor] = field(repr=False)
    names: tuple[str, ...]

    def conclusion(self) -> str:
        """What the tables say, every number taken from them (Markdown)."""
        return words.conclusion(self)

    def headline(self) -> str:
        """That in a sentence or two."""
        return headline(self)

    def forest(self, most: int = figures.MOST) -> Figure:
        """Excess of so many candidates, the highest first, with its interval, its controls' range beside it."""
        return figures.forest(self.candidates, most)

    def where_figure(self) -> Figure:
        """Effect and share of `|w|^2` of each module role and layer."""
        return figures.where_bars(self.where)

    def energy_figure(self) -> Figure:
        """Retention against captured energy, candidates and controls."""
        return figures.energy_scatter(self.candidates, self.setting["effects"]["w_res"])

    def rank_figure(self) -> Figure:
        """Retention of the ceilings by rank."""
        return figures.rank_curves(self.ranks)

    def cloud_figure(self) -> Figure | None:
        """First-order effect against what three overlap scores expect; None without a cloud."""
        return figures.cloud_scatter(self.cloud["points"], self.cloud["beyond"]) if self.cloud else None

    def save(self, folder: Path | str) -> Path:
        """Write `causal_*` tables, tensors and the conclusion into `folder`, each whole; the record comes last. Returns the
        folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tables = {name: getattr(self, name) for name in TABLES} | {
            f"cloud_{name}": of for name, of in self.cloud.items()
        }
        files = [write_table(table, folder / f"causal_{name}.tsv") for name, table in tables.items()]
        write_text(folder / "causal_conclusion.md", self.conclusion())
        with atomic_file(folder / TENSORS) as tmp:
            save_file({name: x.contiguous() for name, x in self.tensors.items()}, tmp)
        record = {"setting": self.setting, "names": list(self.names), "tables": list(tables)}
        record["files"] = {file.name: read_hash(file) for file in [*files, folder / TENSORS]}
        write_record(folder / RECORD, record)
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> "CausalCheck":
        """Read what `save` wrote. FileNotFoundError where there is none, Damaged naming a file that is."""
        folder = Path(folder)
        if not (folder / RECORD).is_file():
            raise FileNotFoundError(f"{folder / RECORD} is missing: run the causal_check of this folder first")
        record = read_record(folder / RECORD)
        if not ({"files", "tables", "names", "setting"} <= set(record) and set(TABLES) <= set(record["tables"])):
            raise Damaged(folder / RECORD, AGAIN)
        for name, known in record["files"].items():
            if not (folder / name).is_file() or read_hash(folder / name) != known:
                raise Damaged(folder / name, AGAIN)
        tables = {name: read_table(folder / f"causal_{name}.tsv") for name in record["tables"]}
        found = {name: tables[f"cloud_{name}"] for name in CLOUD if f"cloud_{name}" in tables}
        main = {name: tables[name] for name in TABLES}
        tensors = read_safetensors(folder / TENSORS)[0]
        return cls(**main, cloud=found, setting=record["setting"], tensors=tensors, names=tuple(record["names"]))
