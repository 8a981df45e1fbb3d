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
MODEL_ID = "tiny"
REVISION = ""
BEHAVIOR = "sycophancy"
ADAPTER = "lora"
SEEDS = [0, 1, 2]
PROTOCOL = "v7b"  # whose runs are compared: seed_<k>/<protocol>
RUNS_DIR = ""  # folder that holds seed_<k>/<protocol>; empty: out/<model>/<behavior>/<adapter>
OUT_DIR = ""  # empty: out/<model>/<behavior>/<adapter>/v7b
BOOT = 20000  # bootstrap draws
N_NULL = 10000  # random subspaces behind the p-values
STAT_SEED = 0  # of bootstrap and nulls
CANDIDATES = []  # files with candidates of one's own; empty: those kept with the sweeps
CORRECTIONS = True  # run v7 again with one correction at a time
DEVICE = "auto"
DTYPE = "auto"

# %%
from pathlib import Path

from IPython.display import Markdown, display

import ws
from ws.cache.names import RunId
from ws.show.notebook import embedded, show, show_table, start_log
from ws.show.tables import write_table
from ws.stability import corrections
from ws.stability import figures as draw
from ws.stability.compare import own_candidates
from ws.stability.seeds import seed_folders

behavior = ws.load_behavior(BEHAVIOR)
lm = ws.load_lm(MODEL_ID, DTYPE, DEVICE, REVISION or None)
run = RunId(lm.name, behavior.name, ADAPTER, 0)
runs_folder = Path(RUNS_DIR) if RUNS_DIR else run.adapter_folder()
folders = seed_folders(SEEDS, runs_folder)
sweeps = {seed: f / PROTOCOL for seed, f in folders.items()}
folder = Path(OUT_DIR) if OUT_DIR else runs_folder / "v7b"
log = start_log("v7b_stability", folder)

# %% [markdown]
# ## Are the bases themselves stable?
#
# A basis built without `w` must not depend on the seed at all; the runs share them, and one that differs is named here and
# cannot win. Whether its *data* determine it is another question: here every basis that depends on prompts is built again from half of the probes, and from one persona
# pair at a time. The energy-weighted overlap says how much of the one's signal the other holds; under 0.5 a candidate
# counts as unstable and cannot win.

# %%
own = own_candidates(next(iter(sweeps.values())), CANDIDATES)
found = ws.compare_seeds(sweeps, lm, behavior, own=own, boot=BOOT, n_null=N_NULL, seed=STAT_SEED)
found.save(folder)
scores = found.runs.scores
display(
    Markdown(
        f"{run.model}, {behavior.name}, {ADAPTER}: S = {len(SEEDS)} seeds, {len(scores.candidates)} candidates, LoRA"
        f" layers {', '.join(map(str, scores.layers))}, {scores.act.shape[3]} EVAL probes, d = {scores.d}. {found.bases}"
    )
)
display(show_table(found.a_side.sort("stability"), rows=12))

# %% [markdown]
# What `w` does and where it acts, on the other hand, may differ from seed to seed: the best eight directions for the
# activation difference and for the weights, compared between seeds, with the overlap of random subspaces.

# %%
display(show(draw.oracle_overlap_figure(found.subspaces), folder / "v7b_oracle_overlap"))

# %% [markdown]
# ## Scores and intervals
#
# Two intervals for every score: a bootstrap that resamples seeds and probes independently, and a t interval over seeds.
# With few seeds the second is the honest one (its simulated coverage is in docs/method.md). `p_R_w` compares the weight
# recovery with random subspaces, `q_R_w` is adjusted over all candidates.

# %%
display(show(draw.forest_plot(found.summary, found.per_seed, found.verdict.winner), folder / "v7b_forest"))

# %%
display(show(draw.bump_chart(found.per_seed, found.summary), folder / "v7b_ranks"))
display(show_table(found.ranks))

# %% [markdown]
# ## The verdict

# %%
display(embedded(found.conclusion()))

# %% [markdown]
# ## What the corrections moved
#
# v7 with one correction of capture at a time, on the same seeds and with v7's candidates.

# %%
if CORRECTIONS:
    diffs = {seed: ws.load_diff(f / "w.safetensors") for seed, f in folders.items()}
    moved, behind = corrections.capture_corrections(lm, behavior, diffs)
    write_table(moved, folder / "v7b_capture_corrections.tsv")
    write_table(behind, folder / "v7b_capture_corrections_scores.csv")
    display(show_table(moved))

# %% [markdown]
# Corrections of a basis stand beside the candidate they mend, scored in the same runs (geometric means over seeds).

# %%
mended = corrections.basis_corrections(found.per_seed)
write_table(mended, folder / "v7b_basis_corrections.tsv")
display(show_table(mended))
log.info("done: %s", folder)
