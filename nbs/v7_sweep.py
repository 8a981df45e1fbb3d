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
# 1 is what a random subspace of the same rank gets. Two ceilings that do see `w` show how far a subspace of rank 8
# could go.

# %% tags=["parameters"]
MODEL_ID = "tiny"  # hub id, local folder, or tiny
REVISION = ""  # pin of a hub model
BEHAVIOR = "sycophancy"  # shipped name, or a JSON file
ADAPTER = "lora"
SEED = 0  # LoRA seed
W_PATH = ""  # weight difference; empty: the one of this run
NULL_W_PATH = (
    ""  # difference of adapters with shuffled labels, for the *_vs_null_diff columns; empty: the run's, if any
)
OUT_DIR = ""  # empty: out/<model>/<behavior>/<adapter>/seed_<k>/<protocol>
PROTOCOL = "v7"  # v7 or v7b; what follows is the protocol's where it is empty
EVAL_SPLIT = ""  # half, held_out
CHAT_PROBES = ""  # true, false
PERSONA_PAIRS = ""  # 1, all
RAW_LAST = ""  # true, false
FOLD_GAIN = ""  # true, false
SOURCES = []  # which candidates take part, by source
LORA_LAYERS = []  # layers the summary averages over; empty: those that w touches
PCS = 8  # rank of a basis
K_BROAD = 64  # width of what "not read" projects out
N_NULL = 120  # Monte-Carlo draws that check the closed-form null; 0: none
DEVICE = "auto"
DTYPE = "auto"

# %%
from pathlib import Path

from IPython.display import HTML, Markdown, display

from ws.cache.files import sweep as draw
from ws.cache.files import write_json, write_text
from ws.cache.names import RunId, model_slug
from ws.data import load_behavior
from ws.diff import load_diff
from ws.explanation import rows as sweep
from ws.explanation import words as conclusion
from ws.model.lm import load_lm
from ws.show import notebook, tables
from ws.show.figures import save
from ws.subspaces.build import build
from ws.subspaces.candidate import registered
from ws.subspaces.captures import capture_steered, probes
from ws.subspaces.kept import a_side_bases
from ws.subspaces.materials import CeilingMaterials
from ws.subspaces.protocol import load_protocol

behavior = load_behavior(BEHAVIOR)
protocol = load_protocol(
    PROTOCOL,
    EVAL_SPLIT=EVAL_SPLIT,
    CHAT_PROBES=CHAT_PROBES,
    PERSONA_PAIRS=PERSONA_PAIRS,
    RAW_LAST=RAW_LAST,
    FOLD_GAIN=FOLD_GAIN,
    SOURCES=SOURCES,
)
run = RunId(model_slug(MODEL_ID), behavior.name, ADAPTER, SEED)
folder = Path(OUT_DIR) if OUT_DIR else run.folder() / PROTOCOL
log = notebook.start_log("v7_sweep", folder)
w = load_diff(W_PATH or run.folder() / "w.safetensors")
lm = load_lm(MODEL_ID, DTYPE, DEVICE, REVISION or None)
split = probes(behavior, protocol)
layers = sweep.lora_layers(w, lm.decoder.n_layers, LORA_LAYERS)
candidates = registered(protocol.sources)
log.info("%s: %d candidates, w of %d parameters, LoRA layers %s", lm.name, len(candidates), len(w.names), layers)
display(Markdown(notebook.setting(lm, behavior, protocol, w, layers)))

# %% [markdown]
# ## Bases
#
# The candidates see base weights and base activations only, so that their bases are the same for every LoRA seed: they
# are built once and reused. The ceilings are built from `w` and from what it does on the FIT probes.

# %%
a_side, cache = a_side_bases(lm, behavior, protocol, candidates, PCS, K_BROAD)
steered = capture_steered(lm, behavior, w, protocol)
b_side = CeilingMaterials(lm.decoder, w, steered, PCS, protocol.fold_gain)
bases = a_side | build(b_side, [c for c in candidates if c.kind == "ceiling"])
record = write_json(folder / "bases.json", notebook.bases_record(cache))
log.info("bases: %s", cache.name)

# %% [markdown]
# ## Scores
#
# Per layer: activation recovery on the EVAL probes, weight recovery on `o_proj` and `down_proj`, z-scores against the
# closed-form null. The summary is the mean over the LoRA layers; `joint` is the geometric mean of the two recoveries.

# %%
targets = sweep.layer_targets(b_side, bases["layer_clean_resid_pca"])
table = sweep.per_layer(candidates, bases, targets)
null_path = Path(NULL_W_PATH) if NULL_W_PATH else run.folder() / "null_diff" / "w.safetensors"
if NULL_W_PATH or null_path.is_file():
    w_null = load_diff(null_path)
    null_side = CeilingMaterials(
        lm.decoder, w_null, capture_steered(lm, behavior, w_null, protocol), PCS, protocol.fold_gain
    )
    table = sweep.with_null_diff(
        table, candidates, bases, sweep.layer_targets(null_side, bases["layer_clean_resid_pca"])
    )
specific = sweep.specific_per_layer(candidates, bases, targets)
checks = sweep.self_checks(table, layers) | {"orthonormality": sweep.largest_deviation(bases)}
summary = tables.summarise(table, layers)
pct = tables.with_percentages(summary)
beyond = tables.summarise_specific(specific, layers)
display(HTML(conclusion.top_table(pct, 20, "html")))

# %%
for name, part in {
    "v7_per_layer.csv": table,
    "v7_specific_per_layer.csv": specific,
    "v7_summary.tsv": summary,
    "v7_summary_pct.tsv": pct,
    "v7_specific_summary.tsv": beyond,
}.items():
    tables.write_table(part, folder / name)
saved = notebook.save_scores(folder / "scores.safetensors", candidates, bases, targets, PCS)

# %% [markdown]
# ## Activation against weight recovery

# %%
figure = draw.joint_scatter(summary, f"{run.model}, {run.behavior}, {run.adapter}, seed {run.seed}, {protocol.name}")
save(figure, folder / "v7_joint_act_weight_scatter")
display(notebook.show(figure))

# %% [markdown]
# The best candidates by layer, with the ceilings dotted.

# %%
best = conclusion.leaders(pct, "joint_score", ("write", "mixed"))[:6]
figure = draw.recovery_by_layer(table, best + ["TaskDiff_lora_ceiling", "dW_left_basis_ceiling"], layers)
save(figure, folder / "v7_recovery_by_layer")
display(notebook.show(figure))

# %% [markdown]
# ## Beyond what clean activations vary along
#
# Part of what a subspace explains is where any activation varies. Here each layer's clean PCA is projected out of both
# the candidate and the difference; what is left is specific to the steering.

# %%
display(HTML(tables.as_text(notebook.renamed(beyond, notebook.SPECIFIC), rows=12, style="html")))

# %% [markdown]
# ## The null
#
# z-scores use the exact mean and variance of the score of a uniformly random subspace. Drawn at random, it looks like
# this (a ratio near 1 is right; its own sampling error at N draws is about `1/sqrt(2N)`).

# %%
if N_NULL:
    null = sweep.null_check(targets, layers, PCS, N_NULL)
    tables.write_table(null, folder / "v7_null_check.csv")
    display(HTML(tables.as_text(notebook.null_summary(null), style="html")))

# %% [markdown]
# ## What this run says

# %%
facts = conclusion.RunFacts(
    f"{run.model}, {run.behavior}, {run.adapter}, seed {run.seed}",
    behavior,
    protocol,
    layers,
    lm.decoder.n_layers,
    len(split.fit),
    len(split.eval),
    lm.decoder.d,
)
verdict = conclusion.conclusion(pct, table, facts, checks)
write_text(folder / "v7_conclusion.md", verdict)
write_text(folder / "v7_definitions.md", conclusion.definitions(candidates))
write_text(folder / "v7_plan_merge.md", conclusion.PLAN_MERGE)
log.info("done: %s", folder)
display(notebook.embedded(verdict))

# %% [markdown]
# ## Definitions

# %%
display(Markdown(conclusion.definitions(candidates).replace("# Candidate subspaces\n", "")))
