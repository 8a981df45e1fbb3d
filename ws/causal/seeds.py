"""Does a candidate carry more than its energy on other LoRA seeds too? One row per candidate, over seeds. (docs/method.md
section 8)

`T = mean_s (linear_s - mean control_s)`. The joint draws of all seeds are of the same rotations, so `p = (1 + #{T_draw >= T})
/ (1 + N)` keeps what seeds and candidates have in common; max-T over candidates is exact for the same reason. The interval is
crossed, for new seeds and new claims: `T +- sqrt(sum_k (t_k se_k)^2)`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float
from torch import Tensor

from ws.cache.records import read_record, tell
from ws.causal.check import bases_of, chosen
from ws.causal.found import RECORD, CausalCheck
from ws.causal.retention import TIE, TIED, adjusted
from ws.causal.words import ALPHA
from ws.explanation.result import RECORD as SWEEP
from ws.explanation.result import Explanation
from ws.explanation.words import leaders
from ws.show.tables import code
from ws.stability.intervals import Part, half_width, mean_part
from ws.stability.significance import benjamini_hochberg

SHOWN = 6
HYPOTHESIS = pl.col("kind") == "A-hypothesis"
CARRIES = (pl.col("excess_p_max") < ALPHA) & (pl.col("excess") > 0)
SAME = ("alpha", "seed", "draws", "templates", "behavior", "fingerprint", "layers", "protocol", "k", "options", "texts")


@dataclass(frozen=True, eq=False)
class OverSeeds:
    """table: candidate, excess (nats, mean over seeds) with its crossed 95 % interval excess_low, excess_high, excess_p,
    excess_p_max, excess_q, excess_forward (mean), excess_min (of the seeds), retention, kept (effect of keep, nats), energy,
    slope (share of the score's own slope), out_of_reach (of any seed's draw), best first. effects: by seed, of w, of its
    writers and of all else."""

    table: pl.DataFrame
    effects: pl.DataFrame
    seeds: tuple[int, ...]

    def text(self) -> str:
        """In words, every number from the table (Markdown)."""
        judged = HYPOTHESIS & ~pl.col("saturated") & pl.col("excess").is_not_nan()
        rows, S = self.table.filter(judged), len(self.seeds)
        if rows.is_empty():
            return "No candidate was held against controls."
        sure = rows.filter(CARRIES)
        known = sure.filter(pl.col("excess_low").is_not_nan() & (pl.col("excess_low") > 0)) if S > 1 else sure
        share = self.effects["w_res"].mean() / self.effects["w"].mean()
        lines = [
            f"The residual writers, which every projection is of, do {share:.0%} of w's effect (mean of "
            f"{S} seed{'s' if S > 1 else ''}).",
            f"{len(sure)} of {len(rows)} candidates exceed controls of equal energy over all seeds (max-T, "
            f"p < .05); of {len(known)}"
            " the interval for new seeds and claims lies above 0.",
        ]
        tied = known.filter(pl.col("slope") > TIED)["candidate"].to_list()
        for r in known.filter(pl.col("slope") <= TIED).head(SHOWN).iter_rows(named=True):
            around = f"{r['excess']:+.2f} [{r['excess_low']:+.2f}, {r['excess_high']:+.2f}] nats"
            ran = not np.isnan(r["retention"])
            kept = (
                f"; keeps {r['retention']:.0%} of the writers' effect on {r['energy']:.1%} of their energy"
                if ran
                else ""
            )
            forward = f", by forward passes {r['excess_forward']:+.2f}" if not np.isnan(r["excess_forward"]) else ""
            least = f"at least {r['excess_min']:+.2f} on each seed"
            lines.append(f"{code(r['candidate'])}: excess {around}, {least}{forward}{kept}.")
        far = self.table.filter(HYPOTHESIS & pl.col("saturated") & CARRIES)
        if flagged := [f"{code(name)} {excess:+.2f}" for name, excess in far.select("candidate", "excess").rows()]:
            lines.append(
                f"Not ranked, as they are saturated on a seed; their first-order excess, for the record: {', '.join(flagged)}."
            )
        if tied:
            lines.append(f"By construction, as they hold the score's own slope: {', '.join(map(code, tied))}.")
        return "\n".join(f"- {line}" for line in lines)


def over_seeds(checks: Mapping[int, CausalCheck | Path | str]) -> OverSeeds:
    """checks: seed -> causal check, or its folder. Only candidates that every check has. ValueError for none, and for checks
    that differ in alpha, draws, wordings, model or behaviour, naming it."""
    found = {s: c if isinstance(c, CausalCheck) else CausalCheck.load(c) for s, c in sorted(checks.items())}
    if not found:
        raise ValueError("no causal check is given: just nb causal_check -p SEED 0 makes one")
    first, *rest = found.values()
    for s, one in zip(list(found)[1:], rest, strict=True):
        for key in SAME:
            mine, its = one.setting.get(key), first.setting.get(key)
            if mine != its:
                told = f"{key} {mine} of seed {s}, {its} of seed {next(iter(found))}"
                raise ValueError(f"the causal checks differ in {told}: run them alike")
    names = [name for name in first.names if all(name in one.names for one in rest)]
    at = {s: [one.names.index(name) for name in names] for s, one in found.items()}
    by_claim = np.stack([found[s].tensors["excess"].numpy()[at[s]] if found[s].tensors["excess"].numel() else
                         np.full((len(names), 1), np.nan) for s in found])  # fmt: skip
    drawn = np.stack([found[s].tensors["drawn"].double().numpy()[:, at[s]] for s in found])
    linear = np.stack([found[s].tensors["linear"].numpy()[at[s]] for s in found])
    values, lost = by_claim.mean(axis=2), np.isnan(drawn).any(axis=0)  # (S, C), (N, C)
    with np.errstate(all="ignore"):
        centre = (
            np.nanmean(drawn, axis=1, keepdims=True) if drawn.shape[1] else np.full((len(found), 1, len(names)), np.nan)
        )
    T, draws = (linear - centre[:, 0]).mean(axis=0), (drawn - centre).mean(axis=0)
    tie = TIE * np.abs(linear).mean(axis=0)
    p = (1 + ((draws >= T - tie) | lost).sum(axis=0)) / (1 + len(draws))
    p_max = adjusted(T, np.where(lost, np.nan, draws), p) if len(draws) else np.full(len(names), np.nan)
    sides = first.tensors.get("sides", np.ones(by_claim.shape[2]))  # a push to yes moves both halves against each other
    half = half_width([mean_part(values), *within(by_claim.mean(axis=0), np.asarray(sides))])
    kinds = dict(first.candidates.select("subspace", "kind").rows())
    far = {n for one in found.values() for n in one.candidates.filter(pl.col("saturated"))["subspace"]}
    mean = {c: _mean(found, names, c) for c in ("retention", "effect", "energy", "excess_forward", "slope")}
    table = pl.DataFrame({
        "candidate": names, "kind": [kinds[name] for name in names], "saturated": [name in far for name in names],
        "excess": values.mean(axis=0), "excess_low": values.mean(axis=0) - half,
        "excess_high": values.mean(axis=0) + half, "excess_p": p, "excess_p_max": p_max, "excess_q": benjamini_hochberg(p),
        "excess_forward": mean["excess_forward"], "excess_min": values.min(axis=0), "retention": mean["retention"],
        "kept": mean["effect"], "energy": mean["energy"], "slope": mean["slope"],
        "out_of_reach": lost.mean(axis=0) if len(draws) else np.nan,
    })  # fmt: skip
    effects = pl.DataFrame([{"seed": s, **one.setting["effects"]} for s, one in found.items()])
    key = pl.col("excess").fill_nan(None)
    return OverSeeds(table.sort(key, descending=True, nulls_last=True, maintain_order=True), effects, tuple(found))


def within(by_claim: Float[np.ndarray, "C n"], sides: Float[np.ndarray, " n"]) -> list[Part]:
    """Standard errors of the mean over claims, one for each half of them (by their sizes, as in the mean); NaN for
    a half of one claim, whose spread is unknown."""
    halves = [by_claim[:, sides == side].T for side in np.unique(sides)]
    found = [(mean_part(x), len(x) / by_claim.shape[1]) for x in halves]
    return [(se * share, df) for (se, df), share in found]


def finished(folders: Mapping[int, Path]) -> dict[int, Path]:
    """Of the seeds' folders those with a finished causal check of the weight difference that the sweep beside it is of; the
    others are told."""
    found = {}
    for seed, folder in folders.items():
        if (folder / RECORD).is_file():
            known = read_record(folder / RECORD).get("setting", {})
            sweep = folder.with_name(str(known.get("protocol"))) / SWEEP
            if sweep.is_file() and read_record(sweep).get("setting", {}).get("w") != known.get("w"):
                tell(f"left out: {folder}: a causal check of an earlier weight difference; run causal_check again")
                continue
            found[seed] = folder
    return found


def best_candidate(
    sweep: Explanation | Path | str, checks: Mapping[int, Path], seed: int, name: str = ""
) -> tuple[str, dict[int, Tensor], str]:
    """A candidate's name, its bases in this seed's sweep, and how it was chosen: as named, else by the largest excess in the
    causal checks of other seeds, in this seed's own without these, and without any by the sweep's joint score. ValueError for
    a name that the sweep lacks."""
    sweep = sweep if isinstance(sweep, Explanation) else Explanation.load(sweep)
    there = finished(checks)
    others = {s: folder for s, folder in there.items() if s != seed} or there
    how = "as asked"
    if not name and others:
        sure = HYPOTHESIS & CARRIES & ~pl.col("saturated") & (pl.col("slope") <= TIED)
        ranked = over_seeds(others).table.filter(sure)["candidate"].to_list()
        name, how = next(iter(ranked), ""), f"largest excess in the causal checks of seed {', '.join(map(str, others))}"
    if not name:
        name, how = (
            leaders(sweep.summary, "joint_score", ("write", "mixed"))[0],
            "best joint score of this sweep; no causal check names one",
        )
    if chosen(sweep, [name])[0]["axis_kind"] == "read":
        raise ValueError(
            f"SUBSPACE: {name}: reads the residual stream, and w's writers are projected; name one that writes"
        )
    return name, bases_of(sweep, name), f"candidate {name} ({how})"


def _mean(found: Mapping[int, CausalCheck], names: list[str], column: str) -> Float[np.ndarray, " C"]:
    by = [dict(one.candidates.select("subspace", column).rows()) for one in found.values()]
    return np.array([np.mean([float("nan") if of[name] is None else of[name] for of in by]) for name in names])
