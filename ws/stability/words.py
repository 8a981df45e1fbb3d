"""`v7b_conclusion.md`: what the tables over seeds say, every claim beside its chance level. (docs/method.md section 7)"""

from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl
from scipy import stats

from ws.show.tables import literal
from ws.stability.verdict import ALPHA, Verdict, false_winner_bound


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(literal, names))


def _winner_lines(v: Verdict) -> list[str]:
    bound = f"a false winner has probability at most {false_winner_bound(v.n_contenders):.3f} by chance"
    if v.winner:
        name, *logs, _ = v.rivals.row(0)
        ratio, t_lo, t_hi, crossed_lo, crossed_hi = np.exp(logs)
        return [
            f"**Winner: {literal(v.winner)}**, above each of {v.rivals.height} rivals over {v.S} seeds ({bound}). Closest rival: "
            f"{literal(name)}, joint score {ratio:.2f} times lower (corrected t interval {t_lo:.2f} to {t_hi:.2f}; with the "
            f"topics' spread {crossed_lo:.2f} to {crossed_hi:.2f}; chance level 1)."
        ]
    lines = [f"**No winner** ({bound}): " + "; ".join(map(literal, v.reasons)) + "."]
    lines += [f"Highest mean among the stable contenders: {literal(v.leader)}."] if v.leader else []
    rest = v.tied[1:]
    return lines + ([f"Cannot be told apart from it ({len(rest)}): {_names(rest)}."] if rest else [])


def _agreement_lines(summary: pl.DataFrame, ranks: pl.DataFrame, S: int) -> list[str]:
    lines = []
    joint = ranks.filter(pl.col("score") == "joint")
    if joint.height:
        pairs, mean = f"{joint.height} pair{'s' if joint.height > 1 else ''} of seeds", joint.mean().row(0, named=True)
        lines.append(
            f"Order of the candidates, mean over {pairs}: Kendall tau {mean['kendall_tau']:.2f} and Spearman "
            f"{mean['spearman']:.2f} (chance level 0, sd {mean['chance_tau_sd']:.2f} and {mean['chance_spearman_sd']:.2f} "
            f"for one pair of unrelated orders); top 5 shared {mean['top5_shared']:.1f} (chance "
            f"{mean['chance_top5_shared']:.1f})."
        )
    ranked = summary.filter(pl.col("kind") == "A-hypothesis")
    single = ranked["top5_chance"].fill_nan(None).max()  # seeds in the top 5 expected of any one candidate
    if single is not None:
        named = _names(ranked.filter(pl.col("top5_count") == S)["candidate"]) or "none"
        expected = ranked["top5_chance"].is_not_nan().sum() * (single / S) ** S
        lines.append(f"In the top 5 on all {S} seeds: {named} (chance: {expected:.2f} candidates).")
    for m in ("R_act", "R_w"):
        total = ranked[f"{m}_geomean"].is_not_nan().sum()
        same = (ranked[f"{m}_sign_agree"] == 1).sum()
        lines.append(
            f"{m} lies on one side of 1 on every seed for {same} of {total} candidates (chance "
            f"{total * 2.0 ** (1 - S):.1f}, were seeds fair coins); its t interval lies above 1 for "
            f"{ranked.filter(pl.col(f'{m}_t_lo') > 1).height} (chance {0.025 * total:.1f}, uncorrected)."
        )
    return lines


def _significance_lines(table: pl.DataFrame | None) -> list[str]:
    if table is None or table["p_R_w"].is_nan().all():
        return ["R_w > 1 was not tested against random subspaces."]
    tested = table.filter(pl.col("q_R_w").is_not_nan())
    hits, raw = (tested.filter(pl.col(column) <= ALPHA).height for column in ("q_R_w", "p_R_w"))
    draws = table["n_draws"][0]
    return [
        f"R_w > 1 against {draws:,} random subspaces: {hits} of {tested.height} candidates at a false discovery rate of "
        f"{ALPHA:g} (Benjamini-Hochberg: at most {ALPHA * hits:.1f} of these by chance); {raw} at p <= {ALPHA:g} "
        f"uncorrected (chance {ALPHA * tested.height:.1f}). Smallest possible p: {1 / (1 + draws):.1g}."
    ]


def _subspace_lines(table: pl.DataFrame | None, unstable: Sequence[str]) -> list[str]:
    lines = []
    if table is not None:
        between = table.filter((pl.col("side") == "B") & pl.col("overlap").is_not_nan())
        lines = [
            f"{name} between seeds: overlap {part['overlap'].mean():.2f} (layers: {part['overlap'].min():.2f} to "
            f"{part['overlap'].max():.2f}), chance {part['chance'].mean():.3f} +- {part['chance_sd'].mean():.3f}; "
            f"smallest principal cosine {part['smallest_cos'].mean():.2f}."
            for (name,), part in between.group_by("object", maintain_order=True)
        ]
    flagged = _names(unstable) or "none"
    return [*lines, f"Flagged unstable (energy-weighted overlap between halves of the data under 0.5): {flagged}."]


def _null_diff_line(summary: pl.DataFrame) -> str:
    known = summary.filter((pl.col("kind") == "A-hypothesis") & pl.col("R_w_vs_null_diff").is_not_nan())
    n = known.height
    if n == 0:
        return "The null diff (shuffled labels) was not scored: no score is compared with training noise."
    act, w = (known.filter(pl.col(f"{m}_vs_null_diff") > 1).height for m in ("R_act", "R_w"))
    return (
        f"Above the null diff's score (same training, shuffled labels; chance level 1): R_act for {act} of {n}, R_w for "
        f"{w} of {n} candidates (chance {n / 2:g} each; the null diff is one run, so this has no interval)."
    )


def _limits(v: Verdict) -> list[str]:
    if v.S < 2:
        return ["One seed: no statement about other seeds is possible."]
    rivals, coins = max(v.n_contenders - 1, 1), 2.0 ** (1 - v.S)
    single, corrected = stats.t.ppf([0.975, 1 - ALPHA / (2 * rivals)], v.S - 1)
    lines = [
        f"{v.S} seeds give t intervals with {v.S - 1} degrees of freedom (factor {single:.2f} for one comparison, "
        f"{corrected:.1f} after the correction for {rivals} rivals).",
        f"The median rival had to differ by a factor of {v.detectable:.2f} in joint score to be told apart; smaller "
        "differences may exist and this run cannot show them.",
        f"If every seed agrees in sign, a fair coin would do so with probability {coins:.3g}: signs alone "
        + ("prove nothing here." if coins > ALPHA else "carry some weight."),
    ]
    if v.S < 5:
        lines += ["Percentile bootstrap intervals are too narrow with so few seeds; read the t interval beside them."]
    if v.n_topics < 2:
        lines.append("One EVAL topic: nothing can be said about other topics.")
    else:
        lines.append(
            f"Seeds share {v.n_topics} EVAL topics and one base model: more seeds do not tell about other topics, "
            "models or behaviours. The t interval over seeds is for these topics."
        )
    return lines


def conclusion(
    v: Verdict,
    summary: pl.DataFrame,
    ranks: pl.DataFrame,
    significance: pl.DataFrame | None = None,
    subspace: pl.DataFrame | None = None,
    unstable: Sequence[str] = (),
    bases: str = "",
) -> str:
    """`v7b_conclusion.md`: the verdict and every claim beside its chance level, all computed from the tables given."""
    sections = {
        "Verdict": _winner_lines(v),
        "Agreement between seeds": _agreement_lines(summary, ranks, v.S),
        "Against chance": [*_significance_lines(significance), _null_diff_line(summary)],
        "Subspaces": [*filter(None, [bases]), *_subspace_lines(subspace, unstable)],
        f"What {v.S} seed{'s' if v.S > 1 else ''} can and cannot show": _limits(v),
    }
    if v.undefined:
        sections["Undefined"] = [f"No joint score, so out of the ranking: {_names(v.undefined)}."]
    parts = [f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) for title, lines in sections.items()]
    return "# v7b: stability over seeds\n\n" + "\n\n".join(parts) + "\n"
