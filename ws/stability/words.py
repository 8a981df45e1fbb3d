"""`v7b_conclusion.md`: what the tables over seeds say, every count beside its chance level. (docs/method.md section 7)"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import polars as pl
from scipy import stats

from ws.show.tables import literal
from ws.stability.chance import COPIES, COUNTS
from ws.stability.verdict import ALPHA, POWER, WITHOUT, Verdict
from ws.subspaces.candidate import RACES


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(literal, names))


def _winner_lines(v: Verdict, summary: pl.DataFrame) -> list[str]:
    bound = f"a false winner has probability at most {ALPHA:g} where a rival is as good"
    lines = []
    if v.winner:
        name, other, *logs = v.rivals.select(
            "rival", "mean_rank", "log_ratio", "t_lo", "t_hi", "crossed_lo", "crossed_hi"
        ).row(0)
        ratio, t_lo, t_hi, crossed_lo, crossed_hi = np.exp(logs)
        lines += [
            f"**Winner: {literal(v.winner)}** ({_beside_nulls(v.winner, summary)}), above each of {v.rivals.height} rivals over"
            f" {v.S} seeds ({bound}){_left_out(v)}. Closest rival: {literal(name)}{_rank(other, v.rank)},"
            f" rank-honest joint score {ratio:.2f} times lower (95 % t interval {t_lo:.2f} to {t_hi:.2f}; with the spread of"
            f" templates and topics {crossed_lo:.2f} to {crossed_hi:.2f}; equal: 1)."
        ]
    else:
        lines += [f"**No winner** ({bound}): " + "; ".join(map(literal, v.reasons)) + "."]
        lines += [f"Highest mean among the stable contenders: {literal(v.leader)}."] if v.leader else []
        far = v.far
        rest = [name for name in v.tied[1:] if name not in far]
        lines += [f"Cannot be told apart from it ({len(rest)}): {_names(rest)}."] if rest else []
        if far:
            part = v.rivals.filter(pl.col("rival").is_in(far))
            said = (
                f"{literal(name)} ({np.exp(log):.2f} times lower)"
                for name, log in part.select("rival", "log_ratio").rows()
            )
            lines += [f"Not told apart because its interval is wide, not because it is close: {', '.join(said)}."]
    if v.establishable == v.establishable:
        lines.append(
            f"Power: with {v.S} seeds and the noise of this run, a leader about {v.establishable:.2f} times better than the"
            f" closest rival is named with probability {POWER:g} (the other rivals as far behind that one as they are here)."
        )
    lines += [f"Steering: {v.steering.text}"] if v.steering else []
    return lines + _named_against_nulls(v.winner or v.leader, summary)


def headline(v: Verdict, summary: pl.DataFrame) -> str:
    """The verdict in a sentence or two, for the head of the report."""
    over = f"{v.S} LoRA seed{'s' if v.S > 1 else ''}"
    if v.winner:
        name, log, low, high = v.rivals.select("rival", "log_ratio", "crossed_lo", "crossed_hi").row(0)
        ratio, low, high = np.exp([log, low, high])
        said = (
            f"**{literal(v.winner)} wins** over {over}: above each of {v.rivals.height} rivals, {ratio:.2f} times the closest,"
            f" {literal(name)} (95 % {low:.2f} to {high:.2f}, for new seeds, wordings and topics; equal: 1);"
            f" {_beside_nulls(v.winner, summary)}."
        )
    else:
        said = f"**No winner** over {over}{': ' if v.reasons else ''}{'; '.join(map(literal, v.reasons))}."
        said += f" Highest mean: {literal(v.leader)}." if v.leader else ""
    return said + (f" {v.steering.short}" if v.steering else "")


def _race_lines(v: Verdict, races: Mapping[str, Verdict]) -> list[str]:
    """Each race's verdict in a sentence, the whole one's among them where some candidates see pairs."""
    shown = ({"with gradient candidates": v} if WITHOUT in races else {}) | dict(races)
    named = {WITHOUT: "without them"} | {race: f"sees {race}" for race in RACES}
    alone = f"Each is a verdict by itself, at {ALPHA:g}; that one of several names a false winner is more likely."
    lines = [alone] if len(shown) > 1 else []
    for name, one in shown.items():
        if one.n_contenders == 1 and one.leader:
            lines.append(f"{named.get(name, name)}: {literal(one.leader)} alone, so that nothing is compared.")
            continue
        said = f"{named.get(name, name)} ({one.n_contenders} contenders): "
        if one.winner:
            lines.append(f"{said}**{literal(one.winner)}** wins.")
            continue
        told = f"highest mean {literal(one.leader)}, not told apart from {len(one.tied) - 1}" if one.leader else ""
        why = literal(one.reasons[0]) if one.reasons and not len(one.tied) > 1 else ""
        lines.append(f"{said}no winner{'; '.join(['', *filter(None, [told, why])])}.")
    return lines


def _beside_nulls(name: str, summary: pl.DataFrame) -> str:
    """Whether the winner's scores lie above those of null diffs, for the line that names it."""
    if "R_w_above_null" not in summary.columns:
        return "not compared with null diffs"
    row = summary.row(by_predicate=pl.col("candidate") == name, named=True)
    if not row["R_w_null_hi"] > 0:
        return "not compared with null diffs"
    above = {m: row[f"{m}_above_null"] for m in ("R_act", "R_w")}
    return ", ".join(f"{m} {'above' if yes else '**not** above'} null diffs" for m, yes in above.items())


def _left_out(v: Verdict) -> str:
    n = len(v.undefined)
    return f"; {n} contender{'s' if n > 1 else ''} without a score left out" if n else ""


def _rank(other: float, own: float) -> str:
    return "" if other == own else f" (of rank {other:g}, the winner's is {own:g})"


def _named_against_nulls(name: str | None, summary: pl.DataFrame) -> list[str]:
    """The winner's or leader's scores beside those of null diffs, which no verdict over rivals asks for."""
    if name is None or "R_w_null_hi" not in summary.columns:
        return []
    row = summary.row(by_predicate=pl.col("candidate") == name, named=True)
    if not row["R_w_null_hi"] > 0:
        return []
    said = (
        f"{m} {row[f'{m}_geomean']:.2f} on w and {row[f'{m}_null_diff']:.2f} on null diffs, 97.5 % of further ones of which"
        f" stay under {row[f'{m}_null_hi']:.2f} ({'above' if row[f'{m}_above_null'] else '**not above** their spread'})"
        for m in ("R_act", "R_w")
    )
    return [f"{literal(name)} against null diffs: {'; '.join(said)}."]


def _chance_lines(chance: pl.DataFrame, what: Iterable[str]) -> list[str]:
    """Counts beside what blind copies of the candidates reach."""
    lines = []
    for name in what:
        part = chance.filter(what=name)
        said = [
            f"{row['score']} {_number(row['observed'])} (blind copies {_number(row['blind_mean'])},"
            f" {_number(row['blind_lo'])} to {_number(row['blind_hi'])})"
            for row in part.iter_rows(named=True)
            if row["observed"] == row["observed"]
        ]
        lines += [f"{name} ({part['candidates'].max()} candidates): {'; '.join(said)}."] if said else []
    return lines


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) and abs(value) >= 1 else f"{value:.2f}"


def _significance_lines(table: pl.DataFrame, chance: pl.DataFrame) -> list[str]:
    found = [name for name in chance["what"].unique(maintain_order=True) if name not in COUNTS]
    draws = table["n_blind"][0]
    most = table.filter(pl.col("p_max_R_w") <= ALPHA).height
    return [
        *_chance_lines(chance, found),
        f"R_w of {most} candidates is above what the best of all blind copies reaches in {1 - ALPHA:.0%} of draws (max-T).",
        f"{draws:,} blind copies; smallest possible p: {1 / (1 + draws):.1g}. z-scores are descriptive.",
        "Blind copies know nothing of the training texts either: what any training on them does passes this test as w does."
        " Null diffs are the control.",
    ]


def _null_lines(nulls: pl.DataFrame) -> list[str]:
    if not nulls["nulls"].sum():
        return ["No null diff (same training, shuffled labels) was scored: no score is compared with training noise."]
    J = nulls["nulls"].max()
    if J < 2:
        return ["One null diff has no spread: no score is shown to be above what training on shuffled labels gives."]
    lines = [
        f"{row['score']} lies above the spread of {J} null diffs (same training, shuffled labels) for {row['above']} of"
        f" {row['candidates']} candidates"
        + (
            f" (each null diff held against the others: {_number(row['above_mean'])} on average, {_number(row['above_most'])}"
            " at most)."
            if row["above_mean"] == row["above_mean"]
            else "."
        )
        for row in nulls.iter_rows(named=True)
    ]
    return lines + ([f"The method asks for at least 5 null diffs; here are {J}."] if J < 5 else [])


def _subspace_lines(table: pl.DataFrame | None, unstable: Sequence[str] | None) -> list[str]:
    lines = []
    if table is not None:
        between = table.filter((pl.col("side") == "B") & pl.col("overlap").is_not_nan())
        lines = [
            f"{name} between seeds: overlap {part['overlap'].mean():.2f} (layers: {part['overlap'].min():.2f} to "
            f"{part['overlap'].max():.2f}), unrelated subspaces {part['chance'].mean():.3f} +- {part['chance_sd'].mean():.3f}; "
            f"smallest principal cosine {part['smallest_cos'].mean():.2f}."
            for (name,), part in between.group_by("object", maintain_order=True)
        ]
    if unstable is None:
        return [*lines, "Whether candidates are determined by their data was not looked at: that takes the model."]
    flagged = _names(unstable) or "none"
    return [*lines, f"Flagged unstable (energy-weighted overlap between halves of the data under 0.5): {flagged}."]


def _limits(v: Verdict, pairs: str, draws: int) -> list[str]:
    if v.S < 2:
        return ["One seed: no statement about other seeds is possible."]
    lines = [
        "honest: the geometric mean of two shares, of what the best subspace of the same rank holds of the activation differences"
        " and of w; candidates are ordered by it.",
        f"{v.S} seeds give t intervals with {v.S - 1} degrees of freedom (factor {stats.t.ppf(0.975, v.S - 1):.2f}). The"
        " claim that one candidate is better than every rival needs no correction for their number.",
        f"Chance levels are those of {min(COPIES, draws):,} or more blind copies: the candidates' own bases under one random"
        " rotation, so that they overlap as they do and know nothing of w.",
    ]
    lines += [
        "Percentile bootstrap intervals (X_boot) hold the truth less often than they say, at any number of seeds: read the t"
        " interval (these wordings and topics) and the crossed one (new ones as well).",
        *filter(None, [pairs]),
    ]
    rows = f"{v.n_topics} EVAL topic{'s' if v.n_topics > 1 else ''} in {v.n_templates} wording{'s' if v.n_templates > 1 else ''}"
    lines.append(
        f"Seeds share {rows} and one base model: more seeds do not tell about other topics, wordings, models or behaviours."
        " The t interval over seeds is for these topics and wordings."
    )
    if v.n_templates < 4:
        lines.append(
            "Topics of one wording are nearly one measurement; the method asks for at least 4 wordings of the probe."
        )
    return lines


def conclusion(
    v: Verdict,
    summary: pl.DataFrame,
    chance: pl.DataFrame,
    nulls: pl.DataFrame,
    significance: pl.DataFrame,
    subspace: pl.DataFrame | None = None,
    unstable: Sequence[str] | None = (),
    bases: str = "",
    pairs: str = "",
    races: Mapping[str, Verdict] | None = None,
) -> str:
    """`v7b_conclusion.md`: the verdict, also within each of `races`, and every count beside its chance level, all computed from
    the tables given."""
    on_all = summary.filter((pl.col("kind") == "A-hypothesis") & (pl.col("top5_count") == v.S))["candidate"]
    sections = {
        "Verdict": _winner_lines(v, summary),
        "By what candidates see": _race_lines(v, races or {}),
        "Agreement between seeds": []
        if v.S < 2
        else [
            *_chance_lines(chance, COUNTS if v.S > 1 else ()),
            *(
                [f"In the top 5 on all {v.S} seeds by the rank-honest joint score: {_names(on_all) or 'none'}."]
                * (v.S > 1)
            ),
        ],
        "Against blind copies": _significance_lines(significance, chance),
        "Against null diffs": _null_lines(nulls),
        "Subspaces": [*filter(None, [bases]), *_subspace_lines(subspace, unstable)],
        f"What {v.S} seed{'s' if v.S > 1 else ''} can and cannot show": _limits(v, pairs, significance["n_blind"][0]),
    }
    if v.undefined:
        sections["Undefined"] = [f"No joint score, so out of the ranking: {_names(v.undefined)}."]
    parts = [f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) for title, lines in sections.items() if lines]
    return "# v7b: stability over seeds\n\n" + "\n\n".join(parts) + "\n"
