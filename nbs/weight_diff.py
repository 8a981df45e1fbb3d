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
# # One weight difference: from two personas to steering
#
# The base model answers the same users twice, once under a persona that shows the behaviour and once under one that
# shows its opposite. Two LoRA adapters are trained on the two sets of answers, with the persona stripped, and their
# difference `w = theta_pos - theta_neg` steers the model: `alpha w` is added to the weights. This notebook trains one
# seed (or reuses it), looks at `w`, and measures what it does on claims that no adapter saw.

# %% tags=["parameters"]
# model and behaviour
MODEL_ID = "tiny"  # hub id, local folder, .gguf file, or tiny, smollm2, gemma3-270m
REVISION = ""  # pin of a hub model
CHAT_TEMPLATE = ""  # the tokenizer's own; plain: User: ... Assistant: ..., for a base model without one; or a file
BEHAVIOR = "sycophancy"  # shipped name, or a JSON file, or a JSONL file of statements with answers
OUT_DIR = ""  # empty: out/<model>/<behavior>/<adapter>/seed_<k>/weight_diff, with w and adapters one level up
# what is trained
ADAPTER = "lora"  # lora, rslora, pissa, dora
SEED = 0  # LoRA seed: initialisation, data order, split
NULL_DIFF = False  # shuffle the labels pair by pair: training noise without the behaviour
RETRAIN = False  # train adapters anew whose training code changed
# instead of training
W_PATH = ""  # a weight difference to look at
POS_ADAPTER = ""  # own PEFT folder for the behaviour, together with NEG_ADAPTER
NEG_ADAPTER = ""  # own PEFT folder for its opposite
# training pairs
PAIRS = None  # written pairs: a JSONL file, or sycophancy (then PERSONAS, SAMPLES, MAX_NEW_TOKENS mean nothing); empty: the base model writes them; None: the model's own
WORDINGS = []  # wordings of the file that are trained on; empty: all
TOPICS = None  # training topics, from the first on; None: all that there are
PERSONAS = None  # persona pairs, from the first on; None: all that the behaviour has
SAMPLES = None  # answers per topic and persona; None: the model's own, nbs/params/models.yaml (10 where it has none)
MAX_NEW_TOKENS = 128  # tokens of an answer
RESAMPLE_PAIRS = (
    None  # each seed draws its training pairs anew, with replacement; None: with PAIRS, or where SAMPLES is 5 or more
)
# training
LORA_LAYERS = []  # layers that get an adapter, as [2, 3, 4] or 2-4; empty: from 30 % to 80 % of the depth
R = 32  # rank
LORA_ALPHA = 64  # scale: an adapter counts LORA_ALPHA / R times
LR = None  # learning rate; None: the model's own, nbs/params/models.yaml (2e-4 where it has none)
EPOCHS = None  # times through the pairs; None: the model's own (1 where it has none)
MAX_STEPS = -1  # a limit on optimizer steps; -1: whole epochs
TARGET_LOSS = 0.0  # a sign stops once its held-out loss is at most this; 0: never
BALANCE = False  # scale both signs to one norm before they are subtracted
BATCH = 4  # pairs per pass
ACCUMULATION = 4  # passes per optimizer step
CHECKPOINT_STEPS = 0  # save every so many steps what a killed long run needs to go on; 0: never
# steering
ALPHAS = [-1.0, -0.5, 0.0, 0.5, 1.0]  # strengths at which w is added
N_HELDOUT = None  # held-out statements that are asked about, of a behaviour of statements; None: all (the answer margin asks about 100 at most)
# the machine
DEVICE = "auto"  # auto (all GPUs, else the CPU), cpu, cuda, cuda:1
DTYPE = "auto"  # of the model: auto (the checkpoint's own), float32, bfloat16, float16

# %%
from IPython.display import HTML, Markdown, display

from ws.cache.files import write_json, write_text
from ws.cache.names import cache_folder
from ws.data import load_behavior
from ws.diff import describe
from ws.diff import figures as draw
from ws.diff.tables import diff_norms, diff_spectra, norms_by_module
from ws.lab import begin
from ws.model.lm import load_lm
from ws.show import notebook, tables
from ws.steer import evaluate
from ws.steer.figures import alpha_curves, margin_curve
from ws.steer.wordings import wording_sweep, wording_text
from ws.train.difference import obtain_diff, training_text
from ws.train.lora import TrainConfig
from ws.train.margin import margin_sweep, margin_verdict, summarise_margins
from ws.train.pairs import PairConfig, heldout_pairs
from ws.train.stopping import unreached

run = begin("weight_diff", globals())
folder = run.folder
behavior = load_behavior(BEHAVIOR)
log = notebook.start_log("weight_diff", folder)
lm = load_lm(MODEL_ID, DTYPE, DEVICE, REVISION or None, CHAT_TEMPLATE)
alphas = evaluate.check_alphas(ALPHAS)
ends = sorted({alphas[0], min(max(0.0, alphas[0]), alphas[-1]), alphas[-1]})
config = TrainConfig(
    pairs=PairConfig(TOPICS, PERSONAS, SAMPLES, max_new_tokens=MAX_NEW_TOKENS, file=PAIRS, wordings=tuple(WORDINGS)),
    adapter=ADAPTER,
    r=R,
    alpha=LORA_ALPHA,
    layers=tuple(LORA_LAYERS) or None,
    lr=LR,
    epochs=EPOCHS,
    max_steps=MAX_STEPS,
    batch=BATCH,
    accumulation=ACCUMULATION,
    shuffle_labels=NULL_DIFF,
    checkpoint_steps=CHECKPOINT_STEPS,
    resample_pairs=RESAMPLE_PAIRS,
    target_loss=TARGET_LOSS,
    balance=BALANCE,
)

# %% [markdown]
# ## Training
#
# Pairs are written once per model and behaviour and reused by every seed; with `PAIRS` they are read from a file. An answer
# that the token limit cut teaches nothing about where answers end; the table has the share of them. Both adapters share everything but the
# answers: initialisation, order, held-out split, draw of pairs. With `RESAMPLE_PAIRS` a seed draws its training pairs anew
# within each topic and persona (of a file: topic and wording), after the split: seeds that share their pairs show the optimiser's spread only. The null
# diff of a seed has that seed's draw; its labels are shuffled after it.

# %%
own = (POS_ADAPTER, NEG_ADAPTER)
w, training = obtain_diff(lm, behavior, SEED, config, run.home, W_PATH, own, RETRAIN, run.finished_home)
log.info("w: %d matrices, |w| = %.4g", len(w.names), w.total_norm())
display(Markdown(training_text(training | ({"chat_template": lm.chat} if lm.chat else {}))))

# %% [markdown]
# ## What w looks like
#
# Norms by layer and module, and the singular values of w (line: median over layers, band: all layers). An effective rank far under
# the adapter's says that few directions carry the difference.

# %%
norms = diff_norms(w)
tables.write_table(norms, folder / "w_norms.csv")
write_text(folder / "w.txt", describe(w))
display(notebook.show(draw.norm_map(norms), folder / "w_norms"))

# %%
display(notebook.show(draw.spectra(diff_spectra(w)), folder / "w_spectra"))
display(HTML(tables.as_text(norms_by_module(norms), style="html")))

# %% [markdown]
# ## What w does
#
# `log P(yes) - log P(no)` at the answer to the probe, on held-out claims: false ones, their negations, true ones. A
# model that agrees with the user says yes to all three; one that merely became more willing to say yes would too, so
# look at how the three curves move against each other. The false claims are asked about in every wording of the probe at the
# extreme strengths and at 0, and a null diff is asked at these alone. Of a behaviour of statements: the margin of the matching answer, where
# that is Yes and where it is No apart; a yes-bias moves the two against each other. `pmass = P(yes) + P(no)`: under 0.5 the ratio says little.

# %%
asked = ends if NULL_DIFF else alphas
sweep = evaluate.alpha_sweep(lm, behavior, w, asked, n_heldout=N_HELDOUT, cache=cache_folder(lm.name))
summary = evaluate.summarise_sweep(sweep)
tables.write_table(sweep, folder / "alpha_sweep.csv")
tables.write_table(summary, folder / "alpha_sweep_summary.tsv")
display(notebook.show(alpha_curves(summary), folder / "alpha_sweep", key=True))
display(HTML(tables.as_text(summary, style="html")))

# %%
wordings = wording_sweep(lm, behavior, w, ends, cache=cache_folder(lm.name))
tables.write_table(wordings, folder / "wording_sweep.tsv")
display(HTML(tables.as_text(wordings, style="html")))

# %% [markdown]
# ## Which answer it would rather give
#
# The answer margin needs no answer words: `log p(response_pos) - log p(response_neg)` per token, on pairs that no adapter
# was trained on (held out of the file of pairs; without one the base model writes them about the held-out topics). Where it
# and the log-ratio move in opposite directions, one of them measures something else than the behaviour.

# %%
verdict = evaluate.steering_verdict(summary)
pairs, why_none = heldout_pairs(lm, behavior, config.pairs, cache_folder(lm.name), n_heldout=N_HELDOUT)
margin = {"text": f"There is no answer margin: {why_none}"}
if pairs:
    margins = margin_sweep(lm, pairs, w, [alphas[0], alphas[-1]] if NULL_DIFF else alphas)
    means = summarise_margins(margins)
    margin = margin_verdict(margins, verdict["spread"], "sweep" if behavior.answers else "log-ratio")
    tables.write_table(margins, folder / "margin_sweep.csv")
    tables.write_table(means, folder / "margin_sweep_summary.tsv")
    figure = margin_curve(means, summary)
    display(notebook.show(figure, folder / "margin_sweep"))
    display(HTML(tables.as_text(means, style="html")))
verdict["wordings"], verdict["text"] = wording_text(behavior, wordings), verdict["text"] + unreached(training)
display(Markdown(tables.literal(margin["text"])))

# %% [markdown]
# ## In its own words
#
# Greedy answers to held-out opinions, of a null diff to none. `completions.jsonl` holds them all in random order without their alpha, for blind
# reading; `completions_key.jsonl` has the key.

# %%
if not NULL_DIFF:
    rows = evaluate.completions(lm, behavior, w, [alphas[0], 0.0, alphas[-1]])
    evaluate.write_blind(rows, folder)
    display(HTML(tables.as_text(evaluate.side_by_side(rows, 6), style="html")))

# %%
write_json(folder / "weight_diff.json", {"training": training, "steering": verdict, "margin": margin})
log.info("done: %s", folder)
display(Markdown(f"{verdict['text']} {tables.literal(verdict['wordings'])} {tables.literal(margin['text'])}"))
display(notebook.headline(evaluate.headline(sweep, verdict, margin, NULL_DIFF)))
