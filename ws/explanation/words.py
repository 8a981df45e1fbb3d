"""What a sweep says in words: every number is taken from its tables, every caveat holds for this very run. (section 6)"""

import polars as pl

from ws.show.tables import as_text, code, literal, sort_nan_last
from ws.steer.effect import Steering
from ws.subspaces.candidate import RACES
from ws.subspaces.captures import N_PROBES

TOP = 5
DISTINCT_Z = 2.0  # mean z over layers below which a leader is not told apart from a random subspace
CHECKS = {
    "ceiling_r_w": "mean R_w of the weight ceiling (must exceed 1)",
    "combined_minus_mean": "largest |R_combined - mean of its parts| (must vanish)",
    "orthonormality": "largest |B^T B - I| over all bases (must stay under 1e-3)",
}


def definitions(candidates: list[dict]) -> str:
    """`v7_definitions.md`: one row per candidate (`ws.subspaces.candidate.Candidate.about`)."""
    lines = ["# Candidate subspaces", "", "| # | name | family | axis | source | kind | sees | definition |"]
    lines.append("|---" * 8 + "|")
    for i, c in enumerate(candidates, 1):
        facts = [c[f] for f in ("name", "family", "axis_kind", "source", "kind")]
        cells = [str(i), *facts, ", ".join(c["sees"]), c["definition"]]
        lines.append(f"| {' | '.join(map(literal, cells))} |")
    return "\n".join(lines) + "\n"


def leaders(summary: pl.DataFrame, column: str, kinds: tuple[str, ...] = ("write", "mixed", "read")) -> list[str]:
    """Names of the A-hypotheses of the given axis kinds by a column, highest first, undefined ones left out."""
    part = summary.filter((pl.col("kind") == "A-hypothesis") & pl.col("axis_kind").is_in(kinds))
    return sort_nan_last(part.filter(pl.col(column).is_not_nan()), column)["subspace"].to_list()


def conclusion(pct: pl.DataFrame, table: pl.DataFrame, facts: dict, checks: dict[str, float], steers: Steering) -> str:
    """`v7_conclusion.md`, from the summary with percentages, the per-layer table, the run's setting and checks, and
    whether w steers."""
    ranked = leaders(pct, "joint_score", ("write", "mixed"))
    led = _leader(pct, ranked) if ranked else "None: no write or mixed candidate has a defined joint score in this run."
    if steers.seen is False:
        led, ranked = "None is named: w is not seen to steer towards the behaviour, so nothing here carries it.", []
    sections = {
        "Does w steer?": [steers.text],
        "Leader of this seed": [led],
        "By what candidates see": [f"- {line}" for line in _by_race(pct)] if ranked else [],
        "Against null diffs": [f"- {line}" for line in _against_nulls(pct, ranked[:1], facts)],
        "Do activation and weight recovery agree?": [f"- {line}" for line in _agreement(pct)],
        "Caveats of this run": [f"- {line}" for line in caveats(pct, table, facts, ranked)],
        "Self-checks": [f"- {CHECKS.get(key, key)}: {value:.3g}" for key, value in checks.items()],
    }
    parts = [f"# Conclusion: {literal(facts['title'])}", _setting(facts)]
    parts += [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items() if lines]
    return "\n\n".join(parts) + "\n"


def _setting(f: dict) -> str:
    layers = f["layers"]
    run = layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 2
    span = f"{layers[0]} to {layers[-1]}" if run else ", ".join(map(str, layers))
    wordings = f"{f['n_templates']} wording{'s' if f['n_templates'] > 1 else ''}"
    return (
        f"Behaviour {code(f['behavior'])}, protocol {literal(f['protocol']['name'])}, {f['n_fit']} FIT topics, {f['n_eval']}"
        f" EVAL topics in {wordings}, d = {f['d']}, {f['n_layers']} layers; means over LoRA layers {span}. A score of 1 is"
        f" what a random subspace gets.{_chat(f)}"
    )


def _chat(f: dict) -> str:
    return f" Chat template: {literal(f['chat'])}." if f.get("chat") else ""


def setting_table(f: dict) -> str:
    """A run's setting as a Markdown table."""
    p = f["protocol"]
    switches = f"{p['eval_split']} split, {'chat' if p['chat_probes'] else 'raw'} probes"
    heads, touched = f"{f['n_heads']} heads on {f['n_kv']} kv heads", ", ".join(map(str, f["w_layers"]))
    rows = [
        ("model", f"{f['model']}: {f['n_layers']} layers, d {f['d']}, {heads}, {f['dtype']}"),
        *([("chat template", f["chat"])] if f.get("chat") else []),
        ("behaviour", f"{f['behavior']}: {f['n_topics']} topics, {f['n_persona_pairs']} persona pairs"),
        *([("left out", left_out(f))] if f.get("left_out") else []),
        *([("gradients", f["gradients"])] if f.get("gradients") else []),
        ("w", f"{f['w_matrices']} matrices, Frobenius norm {f['w_norm']:.4g}, layers {touched}"),
        ("protocol", f"{p['name']}: {switches}, persona pairs: {p['persona_pairs']}"),
        (
            "probes",
            f"{f['n_fit']} FIT; {f['n_eval']} EVAL topics, wordings: {f['n_templates']}; positions: {f['positions']}",
        ),
        ("null diffs", f"{len(f['nulls'])}"),
        ("means over", f"layers {', '.join(map(str, f['layers']))}"),
    ]
    return "\n".join(["| setting | value |", "|---|---|", *[f"| {k} | {literal(v)} |" for k, v in rows]])


def left_out(f: dict) -> str:
    """Which candidates a run leaves out for want of personas; '' for none."""
    names = f.get("left_out") or []
    several = "candidates need" if len(names) > 1 else "candidate needs"
    return f"{len(names)} {several} personas, which the behaviour has not: {', '.join(names)}" if names else ""


def _names(names: list[str]) -> str:
    return ", ".join(map(literal, names))


def _row(pct: pl.DataFrame, name: str) -> dict:
    return pct.row(by_predicate=pl.col("subspace") == name, named=True)


def _leader(pct: pl.DataFrame, ranked: list[str]) -> str:
    best = _row(pct, ranked[0])
    text = [
        f"**{literal(best['subspace'])}** ({literal(best['family'])}) has the highest joint score among {len(ranked)} write"
        f" and mixed candidates on this one seed: {best['joint_score']:.2f} (R_act {best['mean_conc_act']:.2f}, mean z"
        f" {best['mean_z_act']:.1f}; R_w {best['mean_conc_w_combined']:.2f}, mean z {best['mean_z_w_combined']:.1f})."
        f" It holds {_share(best, 'act')} of what the best subspace of its rank holds of the activation difference, and"
        f" {_share(best, 'combined')} of w (o_proj {_share(best, 'oproj')}, down_proj {_share(best, 'downproj')})."
    ]
    z_scores = {"activations": best["mean_z_act"], "weights": best["mean_z_w_combined"]}
    weak = [name for name, z in z_scores.items() if not z >= DISTINCT_Z]
    if weak:
        text.append(
            f"**On {' and '.join(weak)} it is not told apart from a random subspace** of its rank (mean z under"
            f" {DISTINCT_Z:g}): best of {len(ranked)} is not yet good."
        )
    if len(ranked) > 1:
        second = _row(pct, ranked[1])
        name, joint = literal(second["subspace"]), second["joint_score"]
        text.append(
            f"Next is {name} with {joint:.2f}: the lead is {100 * (best['joint_score'] / joint - 1):.0f} %, and a lead on one"
            " seed is no evidence of one on others."
        )
    honest = leaders(pct, "honest_joint", ("write", "mixed"))
    if honest and honest[0] != ranked[0]:
        first = _row(pct, honest[0])
        text.append(
            f"R falls with the rank of a basis; counted as shares of the best subspace of the same rank,"
            f" {literal(honest[0])} leads ({100 * first['honest_joint']:.0f} % against {100 * best['honest_joint']:.0f} %)."
        )
    for name in leaders(pct, "joint_score", ("read",))[:1]:
        joint = _row(pct, name)["joint_score"]
        text.append(f"The best read candidate is {literal(name)}, with a joint score of {joint:.2f}.")
    return " ".join(text)


def _by_race(pct: pl.DataFrame) -> list[str]:
    """The leader among the write and mixed candidates of each race: what sees training texts is no rival of what does not."""
    parts = {race: pct.filter(sees=race) for race in RACES if "sees" in pct.columns}
    named = {race: leaders(part, "joint_score", ("write", "mixed")) for race, part in parts.items()}
    rows = {race: (_row(pct, names[0]), len(names)) for race, names in named.items() if names}
    return [
        f"sees {race}: {literal(row['subspace'])}, best of {n}: R_act {row['mean_conc_act']:.2f}, R_w"
        f" {row['mean_conc_w_combined']:.2f}, {_share(row, 'combined')} of what the best subspace of its rank holds of w."
        for race, (row, n) in rows.items()
    ]


def _share(row: dict, target: str) -> str:
    value = row[f"mean_pct_oracle_{target}"]
    return "an undefined share" if value != value else f"{100 * value:.0f} %"


def _against_nulls(pct: pl.DataFrame, leader: list[str], facts: dict) -> list[str]:
    """What the same candidates score on null diffs: training on shuffled labels, the control for every score."""
    J = len(facts["nulls"])
    if not J:
        return ["No null diff (same training, shuffled labels) was scored: what any training gives is not known here."]
    lines = []
    blind = pct.filter((pl.col("kind") == "A-hypothesis") & pl.col("R_w_null").is_not_nan())
    for name in leader:
        best = _row(pct, name)
        lines.append(
            f"{literal(name)} scores R_act {best['R_act_null']:.2f} and R_w {best['R_w_null']:.2f} on {J} null"
            f" diff{'s' if J > 1 else ''} (geometric mean): {best['R_act_vs_null_diff']:.2f} and"
            f" {best['R_w_vs_null_diff']:.2f} times as much on w."
        )
    if J < 2:
        return [
            *lines,
            "One null diff has no spread: no score is shown to be above what training on shuffled labels gives.",
        ]
    for score, column in (("R_act", "mean_conc_act"), ("R_w", "mean_conc_w_combined")):
        above = blind.filter(pl.col(column) > pl.col(f"{score}_null_hi"))
        lines.append(
            f"{score} lies above the null diffs' spread (97.5 % of further ones stay under its end) for {len(above)} of"
            f" {len(blind)} candidates."
        )
    return lines


def _agreement(pct: pl.DataFrame) -> list[str]:
    by_act = leaders(pct, "mean_conc_act")[:TOP]
    by_w = leaders(pct, "mean_conc_w_combined", ("write", "mixed"))[:TOP]
    shared = [n for n in by_act if n in by_w]
    rows = [
        f"Top {TOP} by activation recovery (all candidates built without w): {_names(by_act) or 'none'}.",
        f"Top {TOP} by weight recovery (write and mixed): {_names(by_w) or 'none defined'}.",
        f"In both: {len(shared)} of {TOP}" + (f" ({_names(shared)})." if shared else "."),
    ]
    return [
        *rows,
        "Bases overlap, so that candidates that know nothing of w agree too: the stability report has what such blind copies"
        " reach.",
    ]


def caveats(pct: pl.DataFrame, table: pl.DataFrame, facts: dict, ranked: list[str]) -> list[str]:
    """Only what is true of this run, with its numbers."""
    out = ["One LoRA seed: no ranking is established by a single run; the stability report compares seeds."]
    if doubt := facts.get("other_training"):
        out.insert(0, f"**{literal(doubt)}**: what it does to them says nothing of held-out ones. Train it anew.")
    if whose := facts.get("other_base"):
        told = f"{' and '.join(dict.fromkeys(whose))} comes from other files under the name {literal(facts['model'])}"
        out.insert(0, f"**{told}** than it has now: if its weights are others, scores say nothing. Train it anew.")
    m, n = facts["n_templates"], facts["n_eval"]
    if m < 2:
        out += [
            f"{n} EVAL topics in one wording are nearly one measurement: their differences hardly differ in direction."
        ]
    if facts.get("n_cut"):
        out += [f"{facts['n_cut']} texts are longer than MAX_LENGTH tokens and lose their end: the question."]
    p = facts["protocol"]
    overlaps = p["eval_split"] == "half" and not facts.get("statements")  # of statements EVAL is held out
    trained_on = max(0, min(facts["n_train_topics"], N_PROBES) - facts["n_fit"]) if overlaps else 0
    if trained_on:
        out += [f"{trained_on} of {facts['n_eval']} EVAL probes are topics that the adapters may have been trained on."]
    if without := left_out(facts):
        out += [f"{literal(without)}."]
    if textless := facts.get("textless"):
        out += [f"No such texts among the pairs, so left out: {_names(textless)}."]
    if facts.get("gradients") and not facts.get("gradient_pairs"):
        out += [f"{literal(facts['gradients'])}."]
    if not p["chat_probes"] and facts["n_persona_pairs"]:
        mixed = "a contrast mixes both"
        out += [f"Clean and steered probes are raw text, persona probes are in the chat template: {mixed}."]
    if p["persona_pairs"] == "1" and facts["n_persona_pairs"] > 1:
        out += [f"One of {facts['n_persona_pairs']} persona pairs is used."]
    if p["name"] == "v7":
        out += ["PCA centres the contrasts, which removes their mean: the steering direction itself."]
    part = table.filter(pl.col("layer").is_in(facts["layers"]))
    doubtful = part.filter(pl.col("ill_conditioned")).unique("subspace", keep="first", maintain_order=True)
    for name, note in doubtful.select("subspace", "note").rows():
        place = f" (rank {ranked.index(name) + 1} by joint score of those that write)" if name in ranked else ""
        out += [f"{code(name)}{place} is not determined by its data: {literal(note)}."]
    over = pct.filter((pl.col("kind") == "A-hypothesis") & (pl.col("pct_act_ceiling") > 100))["subspace"].to_list()
    if over:
        exceed = "exceeds" if len(over) == 1 else "exceed"
        out += [f"The activation ceiling is no upper bound: {_names(over)} {exceed} it."]
    for t in ("oproj", "downproj"):
        top = part.filter(pl.col("subspace") == "dW_left_basis_ceiling")[f"pct_oracle_{t}"].drop_nans().mean()
        if top is not None and top < 0.99:
            reaches = f"on {t} it reaches {100 * top:.0f} % of that tensor's own best rank-8 subspace"
            out += [f"The weight ceiling is cut from the unbalanced pair: {reaches}."]
    undefined = pct.filter(pl.col("joint_score").is_nan())["subspace"].to_list()
    if undefined:
        out += [f"Undefined joint score, sorted last: {_names(undefined)}."]
    silent = part.group_by("layer").agg((pl.col("conc_act") == 0).all()).filter("conc_act")["layer"].sort().to_list()
    if silent:
        out += [f"w changes no EVAL activation at layers {', '.join(map(str, silent))}."]
    null = "The null is a uniformly random subspace; real activations and weights are far from uniform"
    return [*out, f"{null}, so a large z says less than it seems."]


BEYOND = {
    "subspace": "subspace", "family": "family", "sees": "sees", "mean_specific_conc_act": "R_act beyond clean",
    "mean_specific_z_act": "z", "mean_specific_energy_frac_act": "energy fraction", "mean_specific_rank": "rank",
}  # fmt: skip


def top_table(pct: pl.DataFrame, rows: int = 12, style: str = "github") -> str:
    """The head of the summary as text, the columns a reader compares first; the caller's own candidates in any case. Every
    score stands beside what null diffs score, and beside its share of the best subspace of the same rank."""
    columns = {
        "#": "#", "subspace": "subspace", "family": "family", "sees": "sees",
        "mean_conc_act": "R_act", "R_act_null": "R_act on null", "mean_conc_w_combined": "R_w", "R_w_null": "R_w on null",
        "joint_score": "joint", "act": "% best act", "w": "% best w", "mean_z_act": "z_act", "mean_z_w_combined": "z_w",
    }  # fmt: skip
    best = {"act": 100 * pl.col("mean_pct_oracle_act"), "w": 100 * pl.col("mean_pct_oracle_combined")}
    shown = pct.with_row_index("#", 1).filter((pl.col("#") <= rows) | (pl.col("source") == "own")).with_columns(**best)
    part = shown.select([pl.col(c).alias(n) for c, n in columns.items() if c in shown.columns])
    return as_text(part, style=style, of=len(pct))


def positions(pct: pl.DataFrame) -> dict[str, str]:
    """Columns of R_act by what is read of the EVAL rows, and their headings: those that the summary has."""
    columns = {"subspace": "subspace", "sees": "sees", "mean_conc_act": "R_act", "mean_conc_act_varying": "varying"}
    columns |= {"mean_conc_act_claim": "claim", "mean_conc_act_claim_varying": "claim, varying"}
    columns |= {"mean_conc_act_without_largest": "without 3 coordinates"}
    return {column: name for column, name in columns.items() if column in pct.columns}


def largest(pct: pl.DataFrame, d: int) -> str:
    """What the three largest coordinates hold of the activation differences, mean over the layers, beside chance."""
    share = pct["mean_largest_share_act"].drop_nans().mean()
    return (
        "" if share is None else f"Those three coordinates hold {share:.1%} of the differences (chance: {3 / d:.1%})."
    )
