"""`compare_seeds`: which ranking survives another LoRA seed? One report from the sweeps of several. (section 7)"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from ws.cache.files import write_text
from ws.data import Behavior, load_behavior
from ws.explanation.result import Explanation
from ws.explanation.summary import folded
from ws.explanation.words import left_out
from ws.gradient.sets import GradientSets
from ws.model.lm import LM
from ws.show.bars import heard
from ws.show.tables import Told, sort_nan_last, write_table
from ws.stability import overlap, words
from ws.stability.blind import blind_scores
from ws.stability.chance import chance_table, top_chance
from ws.stability.nulls import null_counts, null_table
from ws.stability.scores import per_seed_table, rank_stability_table, summary_table
from ws.stability.seeds import SeedRuns, check_seeds, doubts, layers_of, load_seeds, positions
from ws.stability.significance import blind_values, significance_table
from ws.stability.verdict import Verdict, races, verdict
from ws.subspaces.algebra import empty
from ws.subspaces.build import candidates
from ws.subspaces.candidate import Candidate, load_candidates
from ws.subspaces.from_gradients import GRADIENT
from ws.subspaces.kept import composed_of, make_shelf, part_bases
from ws.subspaces.protocol import Protocol
from ws.train.record import pairs_config

DATA = ("prompts", "pairs", "other pairs")  # what a basis may be undetermined by

# what a reader compares first: column of the summary -> heading
LEADING = {
    "candidate": "candidate", "sees": "sees", "mean_rank": "rank", "honest_geomean": "honest joint",
    "H_act_geomean": "H_act", "H_w_geomean": "H_w", "R_act_geomean": "R_act", "R_act_null_diff": "R_act on null",
    "R_act_varying_geomean": "varying", "R_act_claim_geomean": "claim", "R_w_geomean": "R_w", "R_w_null_diff": "R_w on null",
    "q_R_w": "q of R_w",
}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Stability(Told):
    """What the sweeps of several seeds say together: the tables of docs/method.md section 7 and more. a_side: which candidates
    their own data determine. significance: every score against blind copies; chance: every count over candidates and seeds
    against them; nulls: how many scores lie above the null diffs' spread. verdict: the winner, or why there is none; races: the
    same by what candidates see (`ws.stability.verdict.races`). bases: a sentence on whether the seeds share their A-side bases;
    pairs: on whether they share their training pairs. assessed: whether anybody looked at A-side stability. A candidate whose
    bases depend on the seed though its data determine them is of kind `seed-dependent` in every table, and in no ranking."""

    runs: SeedRuns
    summary: pl.DataFrame
    per_seed: pl.DataFrame
    ranks: pl.DataFrame
    subspaces: pl.DataFrame
    a_side: pl.DataFrame
    significance: pl.DataFrame
    chance: pl.DataFrame
    nulls: pl.DataFrame
    verdict: Verdict
    races: dict[str, Verdict]
    bases: str
    pairs: str = ""
    assessed: bool = True

    @property
    def unstable(self) -> list[str]:
        return self.a_side.filter("unstable")["candidate"].to_list()

    @property
    def leading(self) -> pl.DataFrame:
        """The summary as a reader sees it: LEADING, the shuffles of a control as one row at the place of their mean."""
        known = [column for column in LEADING if column in self.summary.columns]
        whole = sort_nan_last(folded(self.summary.select(known), "candidate"), "honest_geomean")
        return whole.rename({column: LEADING[column] for column in known})

    def conclusion(self) -> str:
        """The verdict and every claim beside its chance level (Markdown)."""
        return words.conclusion(
            self.verdict,
            self.summary,
            self.chance,
            self.nulls,
            self.significance,
            self.subspaces,
            self.unstable if self.assessed else None,
            self.bases,
            self.pairs,
            self.races,
        )

    def headline(self) -> str:
        """The verdict in a sentence or two (Markdown)."""
        return words.headline(self.verdict, self.summary)

    def save(self, folder: Path | str) -> Path:
        """Write `v7b_*` tables and the conclusion into `folder`, each whole. Returns the folder."""
        folder = Path(folder)
        write_table(self.subspaces, folder / "v7b_subspace_stability.csv")
        write_table(self.per_seed, folder / "v7b_per_seed.csv")
        write_table(self.summary, folder / "v7b_summary.tsv")
        write_table(self.ranks, folder / "v7b_rank_stability.csv")
        write_table(self.chance, folder / "v7b_chance.tsv")
        write_table(self.verdict.rivals, folder / "v7b_rivals.tsv")
        write_text(folder / "v7b_conclusion.md", self.conclusion())
        return folder


@heard
def compare_seeds(
    folders: Mapping[int, Path | str | Explanation],
    lm: LM | None = None,
    behavior: Behavior | Path | str | None = None,
    *,
    own: Sequence[Candidate] = (),
    boot: int = 20_000,
    n_null: int = 10_000,
    seed: int = 0,
    more: pl.DataFrame | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> Stability:
    """The stability report of several LoRA seeds' sweeps.

    folders: seed -> folder of `Explanation.save`, or the Explanation itself. With `lm` (and the behaviour, default theirs) every
    candidate that sees prompts is built again from half of them and from one persona pair at a time: one that its data do not
    determine cannot win, nor one whose bases differ between the seeds. own: the caller's candidates among those swept. boot,
    n_null, seed: draws of the bootstrap, blind copies of the candidates, generator. more: further columns of the summary, by
    `candidate`. Raises FileNotFoundError / ValueError naming the run that is missing or does not fit. (docs/method.md section 7)

    Examples:
        >>> import torch, ws
        >>> lm = ws.load_lm("tiny")
        >>> shapes = dict(lm.model.named_parameters())
        >>> names = [lm.decoder.param_name(3, role) for role in ("o", "down")]
        >>> def sweep(seed):
        ...     g = torch.Generator().manual_seed(seed)
        ...     w = ws.WeightDiff({n: 0.01 * torch.randn(shapes[n].shape, generator=g) for n in names})
        ...     return ws.explain(lm, w, candidates=["write", "mlp_write"], progress=False)
        >>> ws.compare_seeds({0: sweep(0), 1: sweep(1)}, boot=50, n_null=50).verdict.winner is None
        True
    """
    found = {s: f if isinstance(f, Explanation) else Explanation.load(f) for s, f in folders.items()}
    check_seeds(found)
    shared = overlap.seed_overlaps(found, layers_of(found))
    runs = load_seeds(found, set(shared.filter("depends_on_seed")["candidate"]))
    scores, device = runs.scores, "cpu" if lm is None else lm.device.type
    rows, some, compounds = [], next(iter(found.values())), {}
    lost = ""
    if lm is not None:
        setting = some.setting
        behavior = behavior if isinstance(behavior, Behavior) else load_behavior(behavior or setting["behavior"])
        for what, mine in (("fingerprint", lm.fingerprint), ("behavior", behavior.name)):
            if mine != setting[what]:
                raise ValueError(f"the sweeps are of {what} {setting[what]}, given is {mine}")
        protocol = Protocol(**setting["protocol"] | {"sources": tuple(setting["protocol"]["sources"])})
        shelf = make_shelf(lm, behavior, protocol, setting["k"], setting["k_broad"], cache)
        sets, lost = _gradients(setting, lm, behavior, protocol, shelf.cache, progress)
        halves = {f"half {i}": sets.half(i) for i in (0, 1)} if sets else {}
        shelf = replace(shelf, gradients=sets, layers=tuple(scores.layers))
        known = {c.name: c for c in [*candidates(shelf.protocol), *own]}  # those whose functions are known
        made_of = {
            n: composed_of(known[n])[0] for n in scores.candidates if n in known and known[n].family == "compound"
        }
        compounds = {name: [part.name for part in parts] for name, parts in made_of.items()}
        for compared, parts in part_bases(shelf, [known[n] for n in scores.candidates if n in known], halves).items():
            for name in next(iter(parts.values())):
                bases = {part: [of[name][l] for l in scores.layers] for part, of in parts.items()}
                rows.append(overlap.compare_parts("A", name, compared, bases, scores.layers))
        again = {row["object"][0] for row in rows}
        for c in some.candidates:
            if {*DATA} & {*c["sees"]} and c["kind"] == "A-hypothesis" and c["name"] not in again:  # it must not win
                nothing = [empty(scores.d, "it is not built again")] * len(scores.layers)
                parts = {"a": nothing, "b": nothing}
                rows.append(overlap.compare_parts("A", c["name"], "not built again", parts, scores.layers))
    for side, parts in runs.oracles.items():
        rows.append(overlap.compare_parts("B", f"{side} oracle", "seeds", parts, scores.layers))
    subspaces = pl.concat(rows)
    a_side = overlap.inherited(overlap.a_side_stability(subspaces), compounds)
    unseen = [c["name"] for c in some.candidates if {*DATA} & {*c["sees"]}] if lm is None else []
    blind = blind_values(blind_scores(runs.geometry, n_null, seed, device, progress))
    significance = significance_table(scores, blind)
    doubtful = doubts(found, scores.layers).join(shared, on="candidate", how="left", maintain_order="left")
    turned = shared.filter(pl.col("seed_overlap") < 1 - overlap.SAME)["candidate"].to_list()
    unstable = a_side.filter("unstable")["candidate"].to_list()
    at = positions(found)
    means = at.group_by("candidate", maintain_order=True).agg(
        (pl.exclude("seed").log().mean().exp()).name.suffix("_geomean")
    )
    told = (
        significance.with_columns(top5_chance=top_chance(scores, blind))
        .join(null_table(scores), on="candidate")
        .join(means, on="candidate")
    )
    summary = _joined(summary_table(scores, seed, boot), told, a_side)
    summary = summary.join(doubtful, on="candidate", maintain_order="left")
    judged = [*unstable, *turned], significance["q_R_w"].to_numpy(), runs.steering, unseen
    gradients = [c["name"] for c in some.candidates if c["source"] == GRADIENT]
    return Stability(
        runs=runs,
        summary=summary if more is None else summary.join(more, on="candidate", how="left", maintain_order="left"),
        per_seed=per_seed_table(scores)
        .join(at, on=["seed", "candidate"], maintain_order="left")
        .join(doubtful, on="candidate", maintain_order="left"),
        ranks=rank_stability_table(scores),
        subspaces=subspaces,
        a_side=a_side,
        significance=significance,
        chance=chance_table(scores, blind),
        nulls=null_counts(scores),
        verdict=verdict(scores, *judged),
        races=races(scores, gradients, judged[0], significance["p_R_w"].to_numpy(), *judged[2:]),
        bases=overlap.same_bases(found, shared) + _ready(some) + _left_out(some) + lost,
        pairs=_pairs(found),
        assessed=lm is not None,
    )


def _gradients(
    setting: dict, lm: LM, behavior: Behavior, protocol: Protocol, cache: Path, progress: bool
) -> tuple[GradientSets | None, str]:
    """What the sweeps' candidates of source `gradient` were read from; where that is no longer there, why."""
    if not (of := setting.get("gradient_pairs")):
        return None, ""
    sets = GradientSets(lm, behavior, protocol, pairs_config(of), tuple(setting["layers"]), cache, progress=progress)
    try:
        if sets.texts == setting.get("gradient_texts"):
            return sets, ""
        why = "the pairs have changed since the sweeps"
    except (FileNotFoundError, ValueError) as error:
        why = str(error)
    return None, f" Gradient candidates are not built again, so that they cannot win: {why}; sweep every seed again."


def _ready(run: Explanation) -> str:
    """What is not known of bases that were given ready."""
    ready = [c["name"] for c in run.candidates if "unknown" in c["sees"]]
    return f" Given ready, so that nobody knows what they were built from: {', '.join(ready)}." if ready else ""


def _left_out(run: Explanation) -> str:
    without = left_out(run.setting)
    return f" {without}." if without else ""


def _pairs(found: Mapping[int, Explanation]) -> str:
    """Whether the seeds trained on the same pairs, where their weight differences say so."""
    drawn = {run.setting["w_meta"].get("resampled") for run in found.values()}
    if drawn <= {True, "True", "true"}:
        return "Each seed drew its training pairs anew from one pool of answers (RESAMPLE_PAIRS)."
    if None in drawn:
        return "Whether the seeds share their training pairs is not recorded: if they do, they show the optimiser's spread only."
    return "The seeds share their training pairs (RESAMPLE_PAIRS is off): they show the optimiser's spread, not that of the data."


def own_candidates(folder: Path, given: str | list[str] = "") -> list[Candidate]:
    """The caller's candidates of a sweep: from the files named, or those kept in the sweep's folder."""
    return load_candidates(given or [folder / name for name in Explanation.load(folder).sources])


def _joined(summary: pl.DataFrame, significance: pl.DataFrame, a_side: pl.DataFrame) -> pl.DataFrame:
    """The summary over seeds with p, q and null diffs of its scores, and with A-side stability (`stable` where no data decide
    it)."""
    joined = summary.join(significance, on="candidate", how="left", maintain_order="left")
    joined = joined.join(a_side, on="candidate", how="left", maintain_order="left")
    return joined.with_columns(pl.col("unstable").fill_null(False), pl.col("stability").fill_null(float("nan")))
