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
PCS = 8
K_BROAD = 64
BOOT = 20000  # bootstrap draws
N_NULL = 10000  # random subspaces behind the p-values
STAT_SEED = 0  # of bootstrap and nulls
CORRECTIONS = True  # run v7 again with one correction at a time
DEVICE = "auto"
DTYPE = "auto"

# %%
from pathlib import Path

import polars as pl
from IPython.display import HTML, Markdown, display

from ws.cache.files import write_text
from ws.cache.names import RunId, cache_folder, model_slug
from ws.data import load_behavior
from ws.diff import load_diff
from ws.model.lm import load_lm
from ws.show import notebook, tables
from ws.show.figures import save
from ws.stability import corrections, overlap
from ws.stability import figures as draw
from ws.stability.conclusion import conclusion
from ws.stability.scores import per_seed_table, rank_stability_table, summary_table
from ws.stability.seeds import doubts, load_seeds, seed_folders
from ws.stability.significance import significance_table
from ws.stability.verdict import verdict
from ws.subspaces.candidate import registered
from ws.subspaces.kept import part_bases
from ws.subspaces.protocol import load_protocol

behavior = load_behavior(BEHAVIOR)
protocol = load_protocol(PROTOCOL)
run = RunId(model_slug(MODEL_ID), behavior.name, ADAPTER, 0)
runs_folder = Path(RUNS_DIR) if RUNS_DIR else run.adapter_folder()
folders = seed_folders(SEEDS, runs_folder)
sweeps = {seed: f / PROTOCOL for seed, f in folders.items()}
folder = Path(OUT_DIR) if OUT_DIR else runs_folder / "v7b"
log = notebook.start_log("v7b_stability", folder)
runs = load_seeds(sweeps)
scores = runs.scores
lm = load_lm(MODEL_ID, DTYPE, DEVICE, REVISION or None)
candidates = registered(protocol.sources)
log.info("%d seeds, %d candidates, layers %s", len(scores.seeds), len(scores.candidates), scores.layers)
display(
    Markdown(
        f"{run.model}, {behavior.name}, {ADAPTER}: S = {len(SEEDS)} seeds, {len(scores.candidates)} candidates, LoRA"
        f" layers {', '.join(map(str, scores.layers))}, {scores.act.shape[3]} EVAL probes, d = {scores.d}"
    )
)

# %% [markdown]
# ## Are the bases themselves stable?
#
# A basis built without `w` must not depend on the seed at all; the runs share one file of them. Whether its *data*
# determine it is another question: here every basis that depends on prompts is built again from half of the probes, and
# from one persona pair at a time. The energy-weighted overlap says how much of the one's signal the other holds; under
# 0.5 a candidate counts as unstable and cannot win.

# %%
same = notebook.same_bases(sweeps, cache_folder(run.model))
display(Markdown(same))
parts = part_bases(lm, behavior, protocol, candidates, PCS, K_BROAD)
rows = [
    overlap.compare_parts(
        "A", name, compared, {p: [b[name][l] for l in scores.layers] for p, b in by_part.items()}, scores.layers
    )
    for compared, by_part in parts.items()
    for name in next(iter(by_part.values()))
]
rows += [
    overlap.compare_parts("B", f"{side} oracle", "seeds", runs.oracles[side], scores.layers) for side in runs.oracles
]
subspaces = pl.concat(rows)
a_side = overlap.a_side_stability(subspaces)
unstable = a_side.filter("unstable")["candidate"].to_list()
tables.write_table(subspaces, folder / "v7b_subspace_stability.csv")
display(HTML(tables.as_text(a_side.sort("stability"), rows=12, style="html")))

# %% [markdown]
# What `w` does and where it acts, on the other hand, may differ from seed to seed: the best eight directions for the
# activation difference and for the weights, compared between seeds, with the overlap of random subspaces.

# %%
figure = draw.oracle_overlap_figure(subspaces)
save(figure, folder / "v7b_oracle_overlap")
display(notebook.show(figure))

# %% [markdown]
# ## Scores and intervals
#
# Two intervals for every score: a bootstrap that resamples seeds and probes independently, and a t interval over seeds.
# With few seeds the second is the honest one (its simulated coverage is in docs/method.md). `p_R_w` compares the weight
# recovery with random subspaces, `q_R_w` is adjusted over all candidates.

# %%
summary = summary_table(scores, STAT_SEED, BOOT)
significance = significance_table(scores, runs.factors, runs.one_basis, STAT_SEED, N_NULL, lm.device.type)
doubtful = doubts(sweeps, scores.layers)
summary = notebook.join_summary(summary, significance, a_side).join(doubtful, on="candidate", maintain_order="left")
per_seed = per_seed_table(scores).join(doubtful, on="candidate", maintain_order="left")
ranks = rank_stability_table(scores)
tables.write_table(per_seed, folder / "v7b_per_seed.csv")
tables.write_table(summary, folder / "v7b_summary.tsv")
tables.write_table(ranks, folder / "v7b_rank_stability.csv")
v = verdict(scores, unstable, significance["q_R_w"].to_numpy())
figure = draw.forest_plot(summary, per_seed, v.winner)
save(figure, folder / "v7b_forest")
display(notebook.show(figure))

# %%
figure = draw.bump_chart(per_seed, summary)
save(figure, folder / "v7b_ranks")
display(notebook.show(figure))
display(HTML(tables.as_text(ranks, style="html")))

# %% [markdown]
# ## The verdict

# %%
text = conclusion(v, summary, ranks, significance, subspaces, unstable)
write_text(folder / "v7b_conclusion.md", text)
display(notebook.embedded(text))

# %% [markdown]
# ## What the corrections moved
#
# v7 with one correction of capture at a time, on the same seeds and with v7's candidates.

# %%
if CORRECTIONS:
    diffs = {seed: load_diff(f / "w.safetensors") for seed, f in folders.items()}
    moved, behind = corrections.capture_corrections(lm, behavior, diffs, cache_folder(run.model))
    tables.write_table(moved, folder / "v7b_capture_corrections.tsv")
    tables.write_table(behind, folder / "v7b_capture_corrections_scores.csv")
    display(HTML(tables.as_text(moved, style="html")))

# %% [markdown]
# Corrections of a basis stand beside the candidate they mend, scored in the same runs (geometric means over seeds).

# %%
mended = corrections.basis_corrections(per_seed)
tables.write_table(mended, folder / "v7b_basis_corrections.tsv")
display(HTML(tables.as_text(mended, style="html")))
log.info("done: %s", folder)
