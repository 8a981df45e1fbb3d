"""What a causal check says in words: every number is taken from its tables. (docs/method.md section 8)"""

import numpy as np
import polars as pl

from ws.causal.passes import LEAST_PMASS
from ws.causal.retention import TIED
from ws.runs.rules import PARTS as SECTIONS
from ws.show.tables import code, literal

FOLLOWS = 0.8  # rank correlation from which on what is kept is what is held
ALPHA = 0.05


def conclusion(found) -> str:
    """`causal_conclusion.md` of a `CausalCheck`."""
    s = found.setting
    sections = {
        "Where w acts": _where(found),
        "Who carries more than its energy": _carriers(found),
        "Are first-order effects to be believed?": _gap(found),
        "Necessary?": _needed(found),
        "At one KL": _matched(found),
        "Controls and ceilings": _controls(found),
        "Does an overlap score say what matters?": _cloud(found),
        "Caveats of this run": _caveats(found),
    }
    head = (
        f"# Causal check: {literal(s['title'])}\n\nalpha {s['alpha']:g}, {s['claims']} held-out claims, "
        f"{s['templates']} wordings, layers {', '.join(map(str, s['layers']))}, {s['draws']:,} energy-matched "
        "draws."
    )
    told = [f"## {title}\n\n" + "\n".join(f"- {x}" for x in lines) for title, lines in sections.items() if lines]
    return "\n\n".join([head, *told]) + "\n"


def exceeds() -> pl.Expr:
    return pl.col("p_max").is_not_nan() & (pl.col("p_max") < ALPHA) & (pl.col("excess") > 0)


def unconfirmed() -> pl.Expr:
    return pl.col("p_forward").is_not_nan() & ((pl.col("p_forward") >= ALPHA) | (pl.col("excess_forward") <= 0))


def around(row: dict, name: str = "effect") -> str:
    return f"{row[name]:+.2f} [{row[f'{name}_low']:+.2f}, {row[f'{name}_high']:+.2f}]"


def _where(found) -> list[str]:
    by = {row["part"]: row for row in found.where.iter_rows(named=True)}
    w = by["w"]
    lines = [f"w moves the score by {around(w)} nats between both ends (95 % over claims)."]
    if "writers" in by:
        one = by["writers"]
        lines.append(
            f"What writes to the residual stream holds {one['share']:.0%} of |w|² and does {around(one)} "
            f"nats alone: **{one['retention']:.0%} of the effect is what every projection below speaks about**."
        )
        if one["effect_low"] <= 0 or one["effect"] < w["effect"] / 20:
            lines.append(
                "**What writes does next to nothing alone**: retention, a share of that, says little here; read nats."
            )
    rest = found.setting["effects"].get("w - w_res")
    if rest is not None and w["effect"]:
        both = (by["writers"]["effect"] + rest) / w["effect"]
        lines.append(f"All else does {rest:+.2f} nats alone; the two add up to {both:.2f} of w's effect.")
    roles = sorted(
        (r for n, r in by.items() if n in ("q", "k", "v", "o", "gate", "up", "down")), key=lambda r: -r["effect"]
    )
    if roles:
        lines.append(
            "By module, alone: "
            + ", ".join(f"{r['part']} {r['effect']:+.2f} ({r['share']:.0%} of |w|²)" for r in roles)
            + "."
        )
    alone = sorted((r for n, r in by.items() if n.startswith("layer")), key=lambda r: -r["effect"])
    if len(alone) > 1:
        best = alone[0]
        lines.append(
            f"Of single layers {best['part'].removeprefix('layer ')} does most, {best['effect']:+.2f} nats; "
            f"all layers alone sum to {sum(r['effect'] for r in alone):+.2f}."
        )
    return lines


def held(found) -> pl.DataFrame:
    """Rows of candidates that are held against controls: A-hypotheses."""
    known = pl.col("p", "p_max", "excess", "p_forward", "excess_forward").fill_null(float("nan"))
    far = found.setting.get("pmass", 1.0) < LEAST_PMASS  # of what was not run
    rows = found.candidates[2:].with_columns(known, pl.col("saturated").fill_null(far))
    return rows.filter(pl.col("p").is_not_nan() & (pl.col("kind") == "A-hypothesis"))


def _carriers(found) -> list[str]:
    rows = held(found)
    if rows.is_empty():
        return ["Nothing was held against controls (0 draws, or no energy within reach)."]
    led = rows.filter(exceeds()).sort("excess", descending=True)
    over, far = led.filter(~pl.col("saturated")), led.filter("saturated")
    rows = rows.filter(~pl.col("saturated"))
    single = int(((rows["p"] < ALPHA) & (rows["excess"] > 0)).sum())
    lines = [
        f"{len(over)} of {len(rows)} candidates exceed controls of equal input-weighted energy (max-T over all, p < .05);"
        f" {single} have a p of their own under .05, of which chance gives {ALPHA * len(rows):.1f}."
    ] * bool(len(rows))
    tied = over.filter(pl.col("slope") > TIED)
    for row in over.filter(pl.col("slope") <= TIED).head(6).iter_rows(named=True):
        lines.append(_carrier(row))
    if len(tied):
        names = ", ".join(f"{code(r['subspace'])} {r['excess']:+.2f}" for r in tied.iter_rows(named=True))
        lines.append(
            f"By construction, since they hold nearly all of the slope of the score that is measured: {names}."
        )
    if len(far):
        names = ", ".join(
            f"{code(r['subspace'])} {r['excess']:+.2f} (pmass {r['pmass']:.2f})" for r in far.iter_rows(named=True)
        )
        lines.append(
            f"Not ranked, since pmass is under one half or the log-ratio beyond 12 nats at an end (pmass is"
            f" {found.setting.get('pmass', float('nan')):.2f} in the base model); their first-order excess, "
            f"for the record: {names}."
        )
    if lost := over.filter(unconfirmed())["subspace"].to_list():
        lines.append(f"Not confirmed by forward passes: {', '.join(map(code, lost))}.")
    if unsure := rows.filter(pl.col("p_max").is_nan())["subspace"].to_list():
        lines.append(f"Undecided, as no control of their energy exists: {', '.join(map(code, unsure))}.")
    low = rows.filter((pl.col("excess") < 0) & (pl.col("p") > 1 - ALPHA))["subspace"].to_list()
    if low:
        some = ", ".join(map(code, low[:6])) + (" ..." if len(low) > 6 else "")
        lines.append(f"{len(low)} carry *less* than their energy would (below 95 % of their controls): {some}.")
    follows = _spearman(rows["energy"], rows["linear"])
    tautology = ": a correlation of overlap scores with retention says next to nothing" if follows > FOLLOWS else ""
    said = [f"First-order effects follow captured energy with a rank correlation of {follows:.2f}{tautology}."]
    return lines + said * bool(np.isfinite(follows))


def _carrier(row: dict) -> str:
    """One candidate that carries more than its energy."""
    kept = f"keeps {row['effect']:+.2f} nats ({row['retention']:.0%}) on {row['energy']:.1%} of the energy; "
    kept = kept if np.isfinite(row["retention"]) else ""
    forward = "its controls were not run forward"
    if np.isfinite(row["p_forward"]):
        forward = f"by forward passes {row['excess_forward']:+.2f} (p {row['p_forward']:.2g})"
    return (
        f"{code(row['subspace'])} ({literal(row['sees'])}): {kept}excess {around(row, 'excess')}, p {row['p']:.2g}, max-T"
        f" {row['p_max']:.2g}; {forward}; at equal Frobenius energy {row['excess_frobenius']:+.2f}; holds {row['slope']:.0%}"
        " of the score's own slope."
    )


def _spearman(a: pl.Series, b: pl.Series) -> float:
    return (
        float(pl.DataFrame({"a": a, "b": b}).select(pl.corr("a", "b", method="spearman")).item())
        if len(a) > 2
        else float("nan")
    )


def _gap(found) -> list[str]:
    rows, lines = held(found), []
    rows = rows.filter(pl.col("gap").is_not_nan())  # those that were run forward
    gaps = rows["gap"].abs()
    if len(rows):
        lines.append(
            f"First-order against forward effect of {len(rows)} candidates: largest gap {gaps.max():.3f} "
            f"nats, median {gaps.median():.3f}; for {int((~rows['sure'].fill_null(True)).sum())} of them it is larger than "
            "the excess."
        )
    if len(found.forward) > 2:
        x, y = found.forward["linear"].to_numpy(), found.forward["effect"].to_numpy()
        slope, start = np.polyfit(x, y, 1)
        lines.append(
            f"{len(x)} energy-matched controls were run forward: correlation {np.corrcoef(x, y)[0, 1]:.4f}, "
            f"forward = {start:+.3f} {slope:+.3f} times first-order, scatter {np.std(y - start - slope * x, ddof=2):.3f} "
            "nats."
        )
    w_res = found.candidates.filter(pl.col("subspace") == "w_res")
    lines.append(f"All writers: first-order {w_res['linear'][0]:+.2f}, forward {w_res['effect'][0]:+.2f} nats.")
    return lines


def _needed(found) -> list[str]:
    rows, w = (
        found.candidates[2:].filter(pl.col("full_drop").fill_null(float("nan")).is_not_nan()),
        found.setting["effects"]["w"],
    )
    rows = rows.filter((pl.col("kind") == "A-hypothesis") & (pl.col("slope") <= TIED)).sort("full_drop")
    if rows.is_empty() or not w:
        return []
    told = [
        f"{code(r['subspace'])} {r['full_drop']:+.2f} ({r['full_drop'] / w:.0%} of w's {w:+.2f})"
        for r in rows.head(3).iter_rows(named=True)
    ]
    return [
        f"Of the {len(rows)} that were taken out of w's writers (without those that hold the score's own slope), w keeps"
        f" least of its effect without {'; '.join(told)}. What does not write stays in."
    ]


def _matched(found) -> list[str]:
    rows = found.matched.with_columns(pl.col("saturated").fill_null(False)).to_dicts()
    met = [
        f"{code(r['subspace'])} {around(r)} nats at alpha {r['alpha']:.3g}"
        for r in rows
        if np.isfinite(r["alpha"]) and not r["saturated"]
    ]
    what = f"{found.setting['kl_target']:g} nats of KL(steered || base), the 95 % quantile over tokens"
    lines = [f"Each at its own alpha, so that it moves the model by {what}: {'; '.join(met)}."] if met else []
    if far := [code(r["subspace"]) for r in rows if r["saturated"]]:
        lines.append(f"Saturated there, not compared: {', '.join(far)}.")
    lines += ["Intervals are over claims, with alpha given: other texts to match on would shift it."] if met else []
    return lines + [f"Not met, {code(r['subspace'])}: {r['why']}" for r in rows if r["why"]]


def _controls(found) -> list[str]:
    lines = [
        f"{literal(r['control'])}: {r['effect']:+.2f} nats ({r['retention']:.0%}), {r['draws']} drawn, "
        f"{r['low']:+.2f} to {r['high']:+.2f}."
        for r in found.controls.iter_rows(named=True)
    ]
    for (of, whose), part in found.ranks.group_by("of", "whose", maintain_order=True):
        told = ", ".join(f"{r['rank']}: {r['retention']:.2f}" for r in part.iter_rows(named=True))
        lines.append(f"Ceiling of {of}, {whose}, retention by rank: {told}.")
    return lines


def _cloud(found) -> list[str]:
    if not found.cloud:
        return []
    fit = {r["scores"]: r for r in found.cloud["fit"].iter_rows(named=True)}
    n = len(found.cloud["points"])
    told = ", ".join(f"{name} {r['r2_out']:.2f}" for name, r in fit.items())
    lines = [f"Over {n} blind subspaces, share of the effect's variance that is predicted on held-out folds: {told}."]
    rows = found.cloud["slopes"].to_dicts()
    alone = ", ".join(f"{r['score']} {r['correlation']:.2f} (VIF {r['vif']:.0f})" for r in rows)
    lines.append(f"Correlation of each score with the effect, and how far the others say the score: {alone}.")
    if tells := [
        f"{r['score']} {r['nats_per_sd']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]"
        for r in rows
        if r["nats_per_sd"] is not None and np.isfinite(r["nats_per_sd"])
    ]:
        lines.append(f"Nats per standard deviation, the others held, where these do not say it: {'; '.join(tells)}.")
    far = found.cloud["beyond"].sort("residual", descending=True).head(5)
    if len(far):
        told = ", ".join(f"{code(r['subspace'])} {r['residual']:+.2f} nats" for r in far.iter_rows(named=True))
        lines.append(f"Highest above what the three scores expect (a description, no test): {told}.")
    return lines


def _caveats(found) -> list[str]:
    s, rows = found.setting, found.candidates[2:]
    lines = ["One seed: an excess over LoRA seeds, with its interval, stands in the stability report."]
    if s["claims"] < 48:
        lines.append(f"{s['claims']} held-out claims: at least 48 are needed for intervals worth printing.")
    if s["templates"] < 4:
        lines.append(f"{s['templates']} wordings: the endpoint asks for at least 4.")
    if flagged := found.candidates.filter(pl.col("saturated"))["subspace"].to_list():
        lines.append(
            f"Saturated (beyond 12 nats, or pmass under one half), not ranked: {', '.join(map(code, flagged))}."
        )
    if lost := rows.filter(pl.col("out_of_reach") > 0).select("subspace", "out_of_reach").rows():
        lines.append("Energy out of reach of some draws: " + ", ".join(f"{code(n)} {x:.0%}" for n, x in lost) + ".")
    if left := [one for one in SECTIONS if one not in s["sections"]]:
        lines.append(f"Left out of this run: {', '.join(left)} (SECTIONS).")
    ran, out = (int(rows[name].is_not_nan().sum()) for name in ("effect", "full_drop"))
    if min(ran, out) < len(rows):
        lines.append(
            f"Of {len(rows)} candidates the {ran} of the largest first-order effects were run forward, {out} taken out of w,"
            " those that hold the score's own slope last (FORWARD, DROPS)."
        )
    if rows["contrast"].is_nan().all():
        lines.append(
            "No contrast to true claims: there are none, or the base model does not tell them from the false ones."
        )
    if not s["other"] and len(found.ranks):
        lines.append("No w of another seed was there: the ceilings are w's own, which keep what they are cut from.")
    if s["draws"] < 10_000:
        lines.append(f"{s['draws']:,} draws; a p that stands in a paper takes 10,000.")
    return lines
