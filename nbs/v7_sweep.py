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
# # Which subspace explains a weight difference?
#
# Two adapters were trained on opposite behaviours; their difference `w` steers the model when it is added to the
# weights. Here candidate subspaces of the residual stream, built from the base model alone, are scored on two
# questions: how much of what `w` does to **activations** lies inside them, and how much of **w itself** does. A score of
# 1 is what a random subspace of the same rank gets. Two ceilings that do see `w` show what eight directions of theirs
# hold; `% best` is the strict bound.

# %% tags=["parameters"]
# model and behaviour
MODEL_ID = "tiny"  # hub id, local folder, .gguf file, or tiny, smollm2, gemma3-270m
REVISION = ""  # pin of a hub model
CHAT_TEMPLATE = ""  # the tokenizer's own; plain: User: ... Assistant: ..., for a base model without one; or a file
BEHAVIOR = "sycophancy"  # shipped name, or a JSON file
OUT_DIR = ""  # empty: out/<model>/<behavior>/<adapter>/seed_<k>/<protocol>
# the weight difference
ADAPTER = "lora"  # folder of the trained runs: lora, rslora, pissa, dora, or one with a recipe in its name
SEED = 0  # LoRA seed
W_PATH = ""  # weight difference; empty: the one of this run
NULL_W_PATH = []  # one or more weight differences of adapters with shuffled labels; empty: all that the adapter has
# the protocol
PROTOCOL = "v7"  # v7 or v7b; of these switches an empty one is the protocol's
EVAL_SPLIT = ""  # probes that scores are taken on: half, held_out
CHAT_PROBES = ""  # every probe in the chat template: true, false
PERSONA_PAIRS = ""  # 1, all
RAW_LAST = ""  # last layer's states before the final norm: true, false
FOLD_GAIN = ""  # fold a norm's gain into what its block writes: true, false
TEMPLATES = ""  # wordings of the probe that scores are taken on: 1, all
POSITIONS = ""  # what is read of these probes: last (token), all (the mean over the claim's tokens too)
SOURCES = []  # which candidates take part, by source
GRADIENTS = ""  # pairs whose gradients further candidates are read from: own (those w was trained on), none, a JSONL file, or shipped ones
OTHERS = []  # behaviours whose pairs are a control of these gradients
MAX_LENGTH = 256  # tokens that are read of a text; v7b refuses a longer one, v7 cuts it
# scores
CANDIDATES = []  # Python files with candidates of one's own
LORA_LAYERS = []  # layers the summary averages over, as [2, 3, 4] or 2-4; empty: those that w touches
PCS = 8  # rank of a basis
K_BROAD = 64  # width of what "not read" projects out
N_NULL = 120  # Monte-Carlo draws that check the closed-form null; 0: none
# the machine
DEVICE = "auto"  # auto (all GPUs, else the CPU), cpu, cuda, cuda:1
DTYPE = "auto"  # of the model: auto (the checkpoint's own), float32, bfloat16, float16

# %%
from IPython.display import HTML, Markdown, display

import ws
from ws.explanation import words
from ws.explanation.rows import null_summary
from ws.lab import begin
from ws.show.notebook import embedded, headline, show, show_table, start_log
from ws.show.tables import write_table
from ws.subspaces.candidate import load_candidates
from ws.subspaces.protocol import load_protocol

run = begin("v7_sweep", globals())
switches = dict(EVAL_SPLIT=EVAL_SPLIT, CHAT_PROBES=CHAT_PROBES, PERSONA_PAIRS=PERSONA_PAIRS, RAW_LAST=RAW_LAST)
switches |= dict(FOLD_GAIN=FOLD_GAIN, TEMPLATES=TEMPLATES, POSITIONS=POSITIONS, SOURCES=SOURCES, MAX_LENGTH=MAX_LENGTH)
protocol = load_protocol(PROTOCOL, **switches)
behavior = ws.load_behavior(BEHAVIOR)
w = ws.load_diff(run.w)
lm = ws.load_lm(MODEL_ID, DTYPE, DEVICE, REVISION or None, CHAT_TEMPLATE)
log = start_log("v7_sweep", run.folder)

# %% [markdown]
# ## Scores
#
# Candidates other than the ceilings are **A-hypotheses**: built without `w`. Their source says since when they are there: `v5` and
# `external-v6-plan` came with protocol v7, `v7b` later, `gradient` are of the base model's gradient on training pairs, `B-side` the ceilings.
# No candidate sees an adapter, so that their bases are the same for every LoRA seed: they are built once and kept. `sees` says
# what comes nearest to the training: base weights, prompts, pairs about other topics or in other wordings, or the very pairs
# that the adapters are trained on, through the base model's gradient; these are no rivals of the others. The ceilings are built from `w` and from what it does on the FIT probes. Per layer: activation
# recovery on the EVAL probes, weight recovery on `o_proj` and `down_proj`, z-scores against the closed-form null. The
# summary is the mean over the LoRA layers; `joint` is the geometric mean of the two recoveries. `on null`: the geometric mean
# over null diffs, the same training with shuffled labels, which is the control for every score. `% best`: the share of what
# the best subspace of the same rank holds, a dash where there is none, since the rank is larger than the number of EVAL rows.

# %%
found = ws.explain(
    lm,
    w,
    behavior,
    protocol=protocol,
    extra=load_candidates(CANDIDATES),
    null=run.nulls,
    pairs=GRADIENTS,
    others=OTHERS,
    layers=LORA_LAYERS,
    k=PCS,
    k_broad=K_BROAD,
    title=run.title,
)
found.save(run.folder)
display(Markdown(words.setting_table(found.setting)))

# %%
display(HTML(found.top(20, "html")))

# %% [markdown]
# The differences of one wording of the probe are nearly one vector, so `R_act` is mostly that of their mean. `varying`: R_act
# of the rows minus their mean; `claim` (under v7b alone): the mean over the claim's tokens; `without 3 coordinates`: without the three
# coordinates of the residual stream that hold most of the differences, which in a trained model may be massive at any token.

# %%
display(show_table(found.summary, words.positions(found.summary), rows=12))
display(Markdown(words.largest(found.summary, found.setting["d"])))

# %% [markdown]
# ## Activation against weight recovery

# %%
display(show(found.figure(), run.folder / "v7_joint_act_weight_scatter", key=True))

# %% [markdown]
# The best candidates by layer, with the ceilings dotted.

# %%
display(show(found.layer_figure(), run.folder / "v7_recovery_by_layer"))

# %% [markdown]
# ## Beyond what clean activations vary along
#
# Part of what a subspace explains is where any activation varies. Here each layer's clean PCA is projected out of both
# the candidate and the difference; what is left is specific to the steering.

# %%
display(show_table(found.specific, words.BEYOND, rows=12))

# %% [markdown]
# ## The null
#
# z-scores use the exact mean and variance of the score of a uniformly random subspace. Drawn at random, it looks like
# this (a ratio near 1 is right; its own sampling error at N draws is about `1/sqrt(2N)`).

# %%
if N_NULL:
    drawn = found.null_check(N_NULL)
    write_table(drawn, run.folder / "v7_null_check.csv")
    display(show_table(null_summary(drawn)))

# %% [markdown]
# ## What this run says

# %%
log.info("done: %s", run.folder)
display(embedded(found.conclusion()), headline(found.headline()))

# %% [markdown]
# ## Definitions

# %%
display(Markdown(found.definitions().replace("# Candidate subspaces\n", "")))
