# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version,-jupytext.text_representation.format_version
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which ranking survives another LoRA seed?
#
# The sweep scored every candidate subspace once per LoRA seed. The bases that are built without `w` are the same for
# every seed; `w`, what it does to activations, and so every score are not. This report asks what of the ranking is more
# than the luck of a seed, of a probe, or of a random subspace, and says "no winner" where that is the answer.

# %% tags=["parameters"]
# model and behaviour
MODEL_ID = "tiny"  # hub id, local folder, .gguf file, or tiny, smollm2, gemma3-270m
REVISION = ""  # pin of a hub model
CHAT_TEMPLATE = ""  # the tokenizer's own; plain: User: ... Assistant: ..., for a base model without one; or a file
BEHAVIOR = "sycophancy"  # shipped name, or a JSON file
OUT_DIR = ""  # empty: out/<model>/<behavior>/<adapter>/v7b
# the sweeps
ADAPTER = "lora"  # folder of the trained runs: lora, rslora, pissa, dora, or one with a recipe in its name
SEEDS = [0, 1, 2]  # LoRA seeds that are compared, as [0, 1, 2] or 0-2; one has no spread and so no winner
PROTOCOL = "v7b"  # whose runs are compared: seed_<k>/<protocol>
RUNS_DIR = ""  # folder that holds seed_<k>/<protocol>; empty: out/<model>/<behavior>/<adapter>
CANDIDATES = []  # files with candidates of one's own; empty: those kept with the sweeps
# statistics
BOOT = 20000  # bootstrap draws
N_NULL = 10000  # blind copies of the candidates behind p-values and chance levels
STAT_SEED = 0  # of bootstrap and blind copies
CORRECTIONS = True  # run v7 again with one correction at a time
# the machine
DEVICE = "auto"  # auto (all GPUs, else the CPU), cpu, cuda, cuda:1
DTYPE = "auto"  # of the model: auto (the checkpoint's own), float32, bfloat16, float16

# %%
from IPython.display import Markdown, display

import ws
from ws.causal.seeds import finished, over_seeds
from ws.lab import begin
from ws.show.notebook import embedded, headline, show, show_table, start_log
from ws.show.tables import literal, write_table
from ws.stability import corrections
from ws.stability import figures as draw
from ws.stability.compare import own_candidates

run = begin("v7b_stability", globals())
sweeps = run.sweeps
behavior = ws.load_behavior(BEHAVIOR)
lm = ws.load_lm(MODEL_ID, DTYPE, DEVICE, REVISION or None, CHAT_TEMPLATE)
log = start_log("v7b_stability", run.folder)

# %% [markdown]
# ## Are the bases themselves stable?
#
# A basis built without `w` must not depend on the seed at all; the runs share them, and one that differs is named here and
# cannot win. Whether its *data* determine it is another question: here every basis that depends on prompts is built again from half of the probes, and from one persona
# pair at a time, and every basis that is read off gradients from half of its texts. The energy-weighted overlap says how much of the one's signal the other holds; under 0.5 a candidate
# counts as unstable and cannot win.

# %%
own = own_candidates(next(iter(sweeps.values())), CANDIDATES)
draws = dict(boot=BOOT, n_null=N_NULL, seed=STAT_SEED)
checks = finished(run.checks)
causal, unlike = None, "No causal check of these seeds is finished: `just nb causal_check -p SEED 0` makes one."
try:
    causal = over_seeds(checks) if checks else None
except ValueError as error:  # the rest of the report does not depend on it
    unlike = literal(error)
found = ws.compare_seeds(sweeps, lm, behavior, own=own, more=causal and causal.table, progress=True, **draws)
found.save(run.folder)
scores = found.runs.scores
display(
    Markdown(
        f"{literal(run.title)}: S = {len(SEEDS)} seeds, {len(scores.candidates)} candidates, LoRA"
        f" layers {', '.join(map(str, scores.layers))}, {scores.act.shape[3]} EVAL probes ({scores.templates} wordings of each topic), null diffs: {len(scores.null_w)},"
        f" d = {scores.d}. {literal(found.bases)}" + (f" Chat template: {literal(lm.chat)}." if lm.chat else "")
    )
)
told = found.summary.select("candidate", "sees")
display(show_table(found.a_side.sort("stability").join(told, on="candidate", maintain_order="left"), rows=12))

# %% [markdown]
# What `w` does and where it acts, on the other hand, may differ from seed to seed: the best eight directions for the
# activation difference and for the weights, compared between seeds, with the overlap of random subspaces.

# %%
display(show(draw.oracle_overlap_figure(found.subspaces), run.folder / "v7b_oracle_overlap"))

# %% [markdown]
# ## Scores and intervals
#
# Two intervals for every score: a bootstrap that resamples seeds, wordings and topics independently, and a t interval over
# seeds. With few seeds the second is the honest one (its simulated coverage is in docs/method.md). The hollow diamond is the
# geometric mean over null diffs: training on the same texts with shuffled labels. Families stand together; a candidate marked
# with a circle has its v7 form, hollow, on the same line.

# %%
lines = {
    "families": found.runs.families,
    "twins": corrections.MENDED,
}
tables = found.summary, found.per_seed, found.verdict.winner
display(show(draw.forest_plot(*tables, most=20, **lines), run.folder / "v7b_forest_top", key=True))
display(
    show(draw.forest_plot(*tables, **lines), run.folder / "v7b_forest", folded="all candidates, controls and ceilings")
)

# %%
display(show(draw.bump_chart(found.per_seed, found.summary, **lines), run.folder / "v7b_ranks"))

# %% [markdown]
# The best by the rank-honest joint score, the geometric mean of two shares: of what the best subspace of the same rank holds
# of the activation differences (`H_act`) and of `w` (`H_w`). R falls with the rank of a basis, these do not. `on null`: the
# geometric mean over null diffs. `varying`: R_act of the EVAL rows minus their mean; `claim`: at the claim's tokens.

# %%
display(show_table(found.leading, rows=15))

# %% [markdown]
# ## What chance gives
#
# The seeds share bases, prompts and most of `w`, and bases overlap. So a *blind copy* of all candidates, their own bases under
# one random rotation, agrees between seeds too. Every count stands beside what such copies reach; `p` is the share of copies
# that reach as much.

# %%
display(show_table(found.chance, rows=40))

# %% [markdown]
# ## The verdict

# %%
display(embedded(found.conclusion()), headline(found.headline()))

# %% [markdown]
# ## Which of them carry the behaviour?
#
# Overlap is not need. What each candidate keeps of `w`'s effect, beyond random subspaces that hold as much energy, is measured seed by
# seed in `causal_check`; here over seeds, with intervals for new seeds and new claims.

# %%
if causal:
    write_table(causal.table, run.folder / "v7b_causal.tsv")
    display(embedded(causal.text()), show_table(causal.table, rows=12))
else:
    display(Markdown(unlike))

# %% [markdown]
# ## What the corrections moved
#
# v7 with one correction of capture at a time, on the same seeds and with v7's candidates.

# %%
if CORRECTIONS:
    diffs = {seed: ws.load_diff(run.w_of(seed)) for seed in sweeps}
    moved, behind = corrections.capture_corrections(lm, behavior, diffs)
    write_table(moved, run.folder / "v7b_capture_corrections.tsv")
    write_table(behind, run.folder / "v7b_capture_corrections_scores.csv")
    display(show_table(moved))

# %% [markdown]
# Corrections of a basis stand beside the candidate they mend, scored in the same runs (geometric means over seeds).

# %%
mended = corrections.basis_corrections(found.per_seed)
write_table(mended, run.folder / "v7b_basis_corrections.tsv")
display(show_table(mended))
log.info("done: %s", run.folder)
