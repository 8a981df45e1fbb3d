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
# # Is a weight difference specific to its behaviour?
#
# Each behaviour is a file of statements, half of which are answered Yes by one who shows it and half No. `w` of behaviour `i` is
# added to the model, and the model is asked the held-out statements of behaviour `j`. If `w` only says Yes, the Yes half and
# the No half move against each other. If it makes the model answer by what a statement says, whatever it is about, the
# statements of other behaviours move as much as its own. If it is the behaviour, its own move most.

# %% tags=["parameters"]
# model and behaviours
MODEL_ID = "tiny"  # hub id, local folder, .gguf file, or tiny, smollm2, gemma3-270m
REVISION = ""  # pin of a hub model
CHAT_TEMPLATE = ""  # the tokenizer's own; plain: User: ... Assistant: ..., for a base model without one; or a file
BEHAVIORS = []  # two or more JSONL files of statements with answers
OUT_DIR = ""  # empty: out/<model>/cross_behaviours
# the weight differences
ADAPTER = "lora"  # folder of the trained runs: lora, rslora, pissa, dora, or one with a recipe in its name
SEEDS = [0, 1, 2]  # LoRA seeds, as [0, 1, 2] or 0-2; of one the intervals are for new statements alone
ATLAS_ADAPTERS = []  # more adapters in the atlas, folders beside ADAPTER's such as ["dora"]
PROTOCOL = "v7b"  # whose finished sweeps are ranked over behaviours: seed_<k>/<protocol>
# what is asked
ALPHAS = [-1.0, 0.0, 1.0]  # strengths at which w is added
N_HELDOUT = 100  # held-out statements of each behaviour; None: all
# the machine
DEVICE = "auto"  # auto (all GPUs, else the CPU), cpu, cuda, cuda:1
DTYPE = "auto"  # of the model: auto (the checkpoint's own), float32, bfloat16, float16

# %%
import polars as pl
from IPython.display import Markdown, display

import ws
from ws.lab import begin
from ws.show.notebook import embedded, headline, show, show_table, start_log
from ws.show.tables import literal, write_table
from ws.stability.cross import cross_behaviors
from ws.stability.cross_figures import heat_maps
from ws.stability.cross_ranks import rank_table, ranks_text
from ws.use.atlas import atlas_of
from ws.use.library import Known

run = begin("cross_behaviours", globals())
behaviors = [ws.load_behavior(file) for file in BEHAVIORS]
diffs = {b.name: run.diffs_of(file) for b, file in zip(behaviors, BEHAVIORS, strict=True)}
lm = ws.load_lm(MODEL_ID, DTYPE, DEVICE, REVISION or None, CHAT_TEMPLATE)
log = start_log("cross_behaviours", run.folder)

# %% [markdown]
# ## The cross matrix
#
# Rows: whose `w`; columns: whose statements. With `y`, `n` what the mean margin `log P(matching answer) - log P(other)` of the
# Yes half and of the No half moves by between the extreme strengths: behaviour part `(y + n) / 2`, bias part `(y - n) / 2`.

# %%
chat = f" Chat template: {literal(lm.chat)}." if lm.chat else ""
asked = f"alphas {ALPHAS}, {N_HELDOUT or 'all'} held-out statements of each behaviour."
display(Markdown(f"`{lm.name}`, {lm.model.dtype}, LoRA seeds {', '.join(map(str, SEEDS))}, {asked}{chat}"))
found = cross_behaviors(lm, behaviors, diffs, alphas=ALPHAS, n_heldout=N_HELDOUT)
found.save(run.folder)
display(show(heat_maps(found.matrix, found.moves), run.folder / "cross_matrix", key=True))

# %% [markdown]
# 95 % intervals are for new LoRA seeds and new statements. `less`: by how much the behaviour part is under that on the own
# statements.

# %%
display(show_table(found.moves, rows=40))

# %% [markdown]
# ## Both halves, strength by strength

# %%
display(show_table(found.matrix.filter(pl.col("set") != "both"), rows=60))

# %% [markdown]
# ## How alike the weight differences are
#
# The cosine of every two weight differences, null diffs (trained on shuffled labels) last. In the table seeds of one behaviour
# and behaviours are compared over *other* LoRA seeds, since two of one seed share initialisation and order; `outside`: pairs
# beyond the null band, which is what shuffled labels reach.

# %%
library = [(b.name, one) for b, file in zip(behaviors, BEHAVIORS, strict=True) for one in run.library_of(file)]
known = [Known(name, adapter, seed, null, ws.load_diff(path)) for name, (adapter, seed, null, path) in library]
map_ = atlas_of(known, lm.name)
map_.save(run.folder)
display(show(map_.figure(), run.folder / "atlas"))
display(show_table(map_.means.drop("low", "high"), rows=40))
display(embedded(map_.text()))

# %% [markdown]
# ## What this says

# %%
display(embedded(found.conclusion()), headline(found.headline()))

# %% [markdown]
# ## Which candidates keep their place when the behaviour changes?
#
# Ranks by the rank-honest joint score, from the finished sweeps of these behaviours and seeds.

# %%
sweeps = {b.name: run.sweeps_of(file) for b, file in zip(behaviors, BEHAVIORS, strict=True)}
ranks = rank_table({name: by_seed for name, by_seed in sweeps.items() if by_seed})
write_table(ranks, run.folder / "cross_ranks.tsv")
if len(ranks):
    display(show_table(ranks, rows=60))
log.info("done: %s", run.folder)
display(Markdown(ranks_text(ranks)))
