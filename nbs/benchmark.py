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
# # Beside other ways to steer
#
# `w`, parts of `w`, the adapters as they were trained, the gradient before any training, a mean difference of activations, a persona
# prompt, a theta head and a random direction, all at the strength at which they move the model *as far* (the 95th percentile of
# KL per token): what each does to held-out claims, to what it should leave alone, and to plain text.

# %% tags=["parameters"]
# model and behaviour
MODEL_ID = "tiny"  # hub id, local folder, .gguf file, or tiny, smollm2, gemma3-270m
REVISION = ""  # pin of a hub model
CHAT_TEMPLATE = ""  # the tokenizer's own; plain: User: ... Assistant: ..., for a base model without one; or a file
BEHAVIOR = "sycophancy"  # shipped name, or a JSON file
OUT_DIR = ""  # empty: out/<model>/<behavior>/<adapter>/seed_<k>/benchmark
# the weight difference
ADAPTER = "lora"  # folder of the trained runs: lora, rslora, pissa, dora, or one with a recipe in its name
SEED = 0  # LoRA seed
PROTOCOL = "v7b"  # whose finished sweep a candidate's bases are taken from
SUBSPACE = (
    ""  # the candidate; empty: the one with the largest excess in other seeds' causal checks, else in this seed's
)
# what is asked
KL_TARGET = [0.1, 0.5]  # nats: the 95th percentile of KL per token; each method meets each target
ALONG = "texts"  # where KL is taken: texts (probes and neutral passages), continuation (of the steered greedy text)
STATEMENTS = []  # JSONL files of statements of other behaviours: off-target effects
TRUTH = []  # CSV files of statement, label (1 true): accuracy where nothing should change
SIZE = "full"  # how much is asked: full, quick
STAT_SEED = 0  # of the random direction
# the machine
DEVICE = "auto"  # auto (all GPUs, else the CPU), cpu, cuda, cuda:1
DTYPE = "auto"  # of the model: auto (the checkpoint's own), float32, bfloat16, float16

# %%
from IPython.display import Markdown, display

import ws
from ws.causal.seeds import best_candidate
from ws.lab import begin
from ws.show.notebook import embedded, headline, show, show_table, start_log
from ws.show.tables import literal
from ws.subspaces.protocol import load_protocol
from ws.use.benchmark import benchmark, trained_pairs

run = begin("benchmark", globals())
behavior = ws.load_behavior(BEHAVIOR)
lm = ws.load_lm(MODEL_ID, DTYPE, DEVICE, REVISION or None, CHAT_TEMPLATE)
log = start_log("benchmark", run.folder)
w = ws.load_diff(run.w)
name, bases, why = best_candidate(run.sweep, run.all_checks, SEED, SUBSPACE)
found = benchmark(
    lm,
    behavior,
    w,
    adapters=run.adapters,
    gradient=trained_pairs(lm, behavior, w),
    best=(name, bases),
    fold_gain=load_protocol(PROTOCOL).fold_gain,
    statements=STATEMENTS,
    truth=TRUTH,
    targets=KL_TARGET,
    along=ALONG,
    size=SIZE,
    seed=STAT_SEED,
)
found.save(run.folder)
display(Markdown(f"{literal(run.title)}: targets {', '.join(map(str, KL_TARGET))} nats, {literal(why)}."))

# %% [markdown]
# ## What this run says

# %%
display(embedded(found.text()), headline(found.headline()))

# %% [markdown]
# ## Effect at equal KL

# %%
display(show(found.figure(), run.folder / "benchmark_effects", key=True))

# %% [markdown]
# ## All of it
#
# `effect`: between both ends, nats, on the `n` items to which the two ends want different answers; `effect_yes`, `effect_no`: its halves, where
# yes and where no is wanted at +. `control`: the same on the `n_control` items to which both want the same answer, 0 where they are left alone.
# `surgical`: `(fixed - 2 broken) / n` over items that were wrong, or right, before, times pmass squared; `surgical_most`: what it could reach
# here; `wrong_way`: the share of items that move against the behaviour. `kl`: to the base model along given texts, `said_kl` along the method's
# own continuations, nats per token; `perplexity`: on neutral passages, over the base model's; `repeats`: of the continuations; `facts`: accuracy
# on unrelated yes/no items. `off_target`: mean |effect| on other behaviours' statements, `off_bias`: of it a push to yes or no. Intervals are t intervals over items, of one seed.

# %%
display(show_table(found.table, rows=40))
log.info("done: %s", run.folder)
