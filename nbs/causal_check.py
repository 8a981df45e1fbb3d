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
# # Which subspace carries the behaviour?
#
# Overlap says where `w` lies. This notebook asks what the behaviour needs: `w` is restricted to each candidate subspace, added to
# the model, and the model is asked the held-out claims. A larger share of `w` keeps more of its effect whatever it is, so each
# candidate is held against random subspaces that hold *as much energy*: what it does beyond them is its **excess**.

# %% tags=["parameters"]
# model and behaviour
MODEL_ID = "tiny"  # hub id, local folder, .gguf file, or tiny, smollm2, gemma3-270m
REVISION = ""  # pin of a hub model
CHAT_TEMPLATE = ""  # the tokenizer's own; plain: User: ... Assistant: ..., for a base model without one; or a file
BEHAVIOR = "sycophancy"  # shipped name, or a JSON file
OUT_DIR = ""  # empty: out/<model>/<behavior>/<adapter>/seed_<k>/causal
# the weight difference and its sweep
ADAPTER = "lora"  # folder of the trained runs: lora, rslora, pissa, dora, or one with a recipe in its name
SEED = 0  # LoRA seed
W_PATH = ""  # weight difference; empty: the one of this run
PROTOCOL = "v7b"  # whose finished sweep the candidates' bases are taken from
NULL_W_PATH = []  # null diffs, as controls; empty: all that the adapter has
OTHER_SEED = (
    None  # LoRA seed whose weight difference the ceilings are built from; None: the lowest other one that is trained
)
SUBSPACES = []  # names of candidates of the sweep; empty: all
# what is asked
ALPHA = 1.0  # strength; both signs are asked
N_WORDINGS = None  # of the probe; None: all
DRAWS = 10000  # energy-matched controls, by first-order effects
CHECKED = 100  # of these controls so many are run forward
FORWARD = None  # so many candidates of the largest first-order effects are run forward; None: all
DROPS = None  # for so many w without them is run, too; None: all
RANKS = [1, 2, 4, 8, 16, 32]  # of the ceilings
KL_TARGET = 0.3  # nats per token, at which the leading candidates are compared a second time
SECTIONS = []  # what is asked beside the candidates, of where, read, ranks, dose, matched, controls; empty: all
CLOUD = 300  # blind subspaces that tell whether an overlap score is worth looking at; 0: none
BOOT = 2000  # bootstrap draws of the cloud's slopes
STAT_SEED = 0  # of all that is drawn
# the machine
DEVICE = "auto"  # auto (all GPUs, else the CPU), cpu, cuda, cuda:1
DTYPE = "auto"  # of the model: auto (the checkpoint's own), float32, bfloat16, float16

# %%
import polars as pl
from IPython.display import Markdown, display

import ws
from ws.causal import check
from ws.lab import begin
from ws.show.notebook import embedded, headline, show, show_table, start_log
from ws.show.tables import literal

run = begin("causal_check", globals())
behavior = ws.load_behavior(BEHAVIOR)
lm = ws.load_lm(MODEL_ID, DTYPE, DEVICE, REVISION or None, CHAT_TEMPLATE)
log = start_log("causal_check", run.folder)
other, other_sweep = run.other
found = check.causal_check(
    lm,
    run.w,
    run.sweep,
    behavior,
    other=other,
    other_sweep=other_sweep,
    nulls=[ws.load_diff(path) for path in run.nulls],
    candidates=SUBSPACES,
    alpha=ALPHA,
    ranks=RANKS,
    draws=DRAWS,
    checked=CHECKED,
    forward=FORWARD,
    drops=DROPS,
    cloud=CLOUD,
    boot=BOOT,
    templates=N_WORDINGS,
    kl_target=KL_TARGET,
    sections=SECTIONS or list(check.SECTIONS),
    seed=STAT_SEED,
    title=run.title,
)
found.save(run.folder)
s = found.setting
chat = f" Chat template: {literal(s['chat'])}." if s["chat"] else ""
display(
    Markdown(
        f"{literal(s['title'])}: alpha {ALPHA:g} and {-ALPHA:g}, {s['claims']} held-out claims, {s['templates']} wordings, layers"
        f" {', '.join(map(str, s['layers']))}, {len(found.names)} write, mixed and gradient candidates, {DRAWS:,} energy-matched"
        f" controls, {len(found.forward)} of them run forward, {s['nulls']} null diffs.{chat}"
    )
)

# %% [markdown]
# ## What this run says

# %%
display(embedded(found.conclusion()), headline(found.headline()))

# %% [markdown]
# ## Effect beyond energy
#
# `excess`: the first-order effect of a candidate minus the mean of its controls', in nats between both ends of alpha, with its 95 % interval
# over held-out claims. A control has the candidate's rank, its overlaps between layers and its captured energy at every layer (the mean square of
# what `P w` adds to the stream), and no direction of its own. Gray: the middle 95 % of these controls. Diamond: the same by forward passes.

# %%
display(show(found.forest(14), run.folder / "causal_forest_top", key=True))
if len(found.names) > 14:
    display(show(found.forest(), run.folder / "causal_forest", folded="more of them"))

# %% [markdown]
# The line from each point ends at what its controls keep on the same energy.

# %%
display(show(found.energy_figure(), run.folder / "causal_energy"))

# %% [markdown]
# `effect`: of `P w` on the residual writers, by forward passes; `retention`: over that of all writers. `drop`: the writers without the
# candidate; `full drop`: all of `w` without it, so necessity. `slope`: how much of the score's own gradient the basis holds; near 1, retention
# says nothing of `w`. `max-T`: p adjusted for all candidates.

# %%
shown = {
    "subspace": "candidate", "sees": "sees", "effect": "effect", "retention": "retention", "energy": "energy", "excess": "excess",
    "excess_low": "low", "excess_high": "high", "p": "p", "p_max": "max-T", "excess_forward": "excess, forward", "p_forward": "p, forward",
    "excess_frobenius": "excess, Frobenius", "drop": "drop", "full_drop": "full drop", "slope": "slope", "contrast": "false - true",
    "kl": "KL", "pmass": "pmass",
}  # fmt: skip
display(show_table(found.candidates.sort("excess", descending=True, nulls_last=True), shown, rows=14))

# %% [markdown]
# ## Where w acts at all

# %%
display(show(found.where_figure(), run.folder / "causal_where"))
display(show_table(found.where, rows=12))

# %% [markdown]
# ## Subspaces that read
#
# The same from the right, `w P` on q, k, v, gate and up; without energy-matched controls.

# %%
unasked = Markdown("Left out of this run (`SECTIONS`).")
display(show_table(found.read.sort("effect", descending=True), rows=10) if len(found.read) else unasked)

# %% [markdown]
# ## Ceilings by rank, and further controls
#
# A ceiling of `w`'s own directions keeps what it is cut from; that of another LoRA seed has to find the same place again.

# %%
display(show(found.rank_figure(), run.folder / "causal_ranks") if len(found.ranks) else unasked)
if len(found.controls):
    display(show_table(found.controls))

# %% [markdown]
# ## Dose, and effects at one KL
#
# One alpha is no equal dose: what moves the model by less may be given more. `matched`: each at the alpha at which it moves the tokens of
# held-out probes and neutral passages by `KL_TARGET` nats, beside a random direction of the writers' norms (`mag_only`).

# %%
display(show_table(found.dose.sort("subspace", "dose"), rows=15) if len(found.dose) else unasked)
if len(found.matched):
    display(show_table(found.matched.drop("why")))

# %% [markdown]
# ## Is any overlap score worth looking at?
#
# Blind subspaces that are pulled, independently, to where the energy lies, where the input-weighted energy lies, and where activations
# differ. What three overlap scores say of their effect, on folds that were left out; and the candidates' distance from that.

# %%
if found.cloud:
    display(show(found.cloud_figure(), run.folder / "causal_cloud"))
    display(show_table(found.cloud["fit"]))
    display(show_table(found.cloud["beyond"].sort(pl.col("residual"), descending=True), rows=10))
log.info("done: %s", run.folder)
