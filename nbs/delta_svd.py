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
# # What does each block add to the residual stream?
#
# A decoder block reads the residual stream `h` and adds an update, `delta = h_out - h_in`. Read over a set of
# calibration texts, the updates of one block form a matrix with a row per token. How long is a row beside `h`? How many
# directions does the block really use? Do neighbouring blocks write along the same ones? Two hypotheses about depth are
# judged at the end: that the layers of **phase C** (the first half after the start) share one broad subspace, and that
# those of **phase E** (near the end) are specialised, each writing its own direction. Chance levels stand beside every
# overlap.

# %% tags=["parameters"]
# model and texts
MODEL_ID = "tiny"  # hub id, local folder, .gguf file, or tiny, smollm2, gemma3-270m
REVISION = ""  # pin of a hub model
CALIBRATION = ""  # .txt (passages between blank lines), .json or .jsonl; empty: the shipped passages
OUT_DIR = ""  # empty: out/<model>/delta_svd
# reading
MODE = "stream"  # stream: the passages as one sequence; documents: a sequence per passage
FINAL_NORM = False  # last layer's output after the final norm instead of the block's own
MAX_LENGTH = 2048  # tokens per sequence; the rest is cut off and counted
BATCH_SIZE = 8  # sequences per pass in mode documents
# statistics
TOP_K = 8  # singular values to report
BOOT = 200  # bootstrap draws over passages; 0: no intervals
SEED = 0  # of the bootstrap
COMPARE = []  # result folders of other models; relative ones are seen from the project's root
# the machine
DEVICE = "auto"  # auto (all GPUs, else the CPU), cpu, cuda, cuda:1
DTYPE = "auto"  # of the model: auto (the checkpoint's own), float32, bfloat16, float16

# %%
from IPython.display import HTML, Markdown, display

from ws.cache.places import root
from ws.delta import figures as draw
from ws.delta import report
from ws.delta.calibration import load_calibration
from ws.delta.measure import delta_svd
from ws.delta.phases import top1_cos
from ws.lab import begin
from ws.model.lm import load_lm
from ws.show import notebook
from ws.show.tables import as_text, write_table

folder = begin("delta_svd", globals()).folder
log = notebook.start_log("delta_svd", folder)
texts = load_calibration(CALIBRATION)
lm = load_lm(MODEL_ID, DTYPE, DEVICE, REVISION or None)

# %% [markdown]
# ## Reading the texts
#
# One forward pass; a layer's numbers are taken when the pass reaches it, so nothing the size of all layers is held. The
# first token of a sequence is left out: it is an attention sink, and its update is an outlier.

# %%
run = delta_svd(lm, texts, MODE, FINAL_NORM, MAX_LENGTH, TOP_K, BOOT, SEED, BATCH_SIZE)
run.save(folder)
log.info("%s: %d tokens, %d layers, d %d", run.model, run.n_calib_tokens, len(run.layers), run.hidden)
display(Markdown(report.setting(run, len(texts))))

# %% [markdown]
# ## Layer by layer
#
# `rel_step`: length of the update over length of the stream. `eff_rank`: exponential of the entropy of the update's
# spectrum, the number of directions of equal energy that would be as spread out, with its 95 % interval over passages.
# `topN_frac`: share of the energy in the first N directions. `parallel_frac`: mean |cos| between update and stream.

# %%
layers = run.table()
display(HTML(as_text(layers, report.SHOWN, style="html")))

# %%
figure = draw.rel_step(layers)
display(notebook.show(figure, folder / "delta_svd_rel_step"))

# %%
figure = draw.eff_rank(layers)
display(notebook.show(figure, folder / "delta_svd_eff_rank", key=True))

# %%
figure = draw.top_spectrum(layers)
display(notebook.show(figure, folder / "delta_svd_spectrum"))

# %% [markdown]
# Along the stream itself: a negative mean cosine says that a block shrinks what is there.

# %%
figure = draw.parallel(layers, run.hidden)
display(notebook.show(figure, folder / "delta_svd_parallel"))

# %% [markdown]
# ## Between layers
#
# Each block's strongest direction against every other's. A direction's sign is set so that the block moves the stream
# along it on average; the signed cosines are in `delta_svd_cos.tsv`.

# %%
figure = draw.cos_heatmap(top1_cos(run.directions).numpy(), run.hidden)
display(notebook.show(figure, folder / "delta_svd_cos"))

# %% [markdown]
# ## Phases
#
# Phases are ranges of depth, A first, E near the end, `tail` the last layers; the table says which layers they are here.
# `intra` and `cross`: mean |cos| of strongest directions inside a phase and to the layers outside. `capture`: share of
# a layer's strongest direction in the best rank-8 space of its phase's directions. The layer itself helped to build
# that space, so even random layers are captured well; `left_out` rebuilds it without the layer: chance is then 8/d.
# `outside`: what the phase's space holds of the other phases' layers, the comparison that matters most.

# %%
rows = report.phase_table(run)
display(HTML(as_text(rows, style="html")))

# %%
figure = draw.capture(report.capture_table(run), rows, len(run.layers), run.hidden)
display(notebook.show(figure, folder / "delta_svd_capture"))

# %% [markdown]
# ## Beside other models

# %%
if COMPARE:
    table = report.compare([folder, *(root() / other for other in COMPARE)])
    write_table(table, folder / "delta_svd_comparison.tsv")
    figure = draw.comparison(table)
    display(notebook.show(figure, folder / "delta_svd_comparison"))
else:
    display(Markdown("No other result folders given (`COMPARE`)."))

# %% [markdown]
# ## What this run says

# %%
log.info("done: %s", folder)
display(notebook.embedded(run.conclusion()), notebook.headline(run.headline()))
