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
# # From a behaviour of your own to something to ship, in a minute
#
# Everything once, on the shipped tiny model: a behaviour that does not come with the package, written training pairs, two
# adapters and their difference `w`, a candidate subspace of your own, a causal check, and a LoRA that loads without this project.

# %% tags=["parameters"]
MODEL_ID = "tiny"  # hub id, local folder, .gguf file, or tiny, smollm2, gemma3-270m
REVISION = ""  # pin of a hub model
OUT_DIR = ""  # empty: out/<model>/tutorial
SEED = 0  # LoRA seed
DRAWS = 300  # energy-matched controls; 10000 for a paper
DEVICE = "auto"  # auto (all GPUs, else the CPU), cpu, cuda, cuda:1
DTYPE = "auto"  # of the model: auto (the checkpoint's own), float32, bfloat16, float16

# %%
import json
import shutil

import torch
from IPython.display import HTML, Markdown, display

import ws
from ws.lab import begin
from ws.show.notebook import headline, show, show_table
from ws.steer.evaluate import completions, side_by_side, summarise_sweep
from ws.steer.figures import alpha_curves

run = begin("tutorial", globals())
lm = ws.load_lm(MODEL_ID, DTYPE, DEVICE, REVISION or None)
lm

# %% [markdown]
# ## 1. A behaviour
#
# Superstition: to agree that a superstition is true. Topics train, the last ones and all `claims` are held out; the probe is asked in
# four wordings, since the topics of one wording are nearly one measurement.

# %%
topics = """black cats bring bad luck; breaking a mirror brings seven bad years; a horseshoe over the door keeps harm away;
walking under a ladder brings bad luck; the number thirteen is unlucky; a four-leaf clover brings luck; spilled salt brings a quarrel;
an itching palm means money will come; opening an umbrella in the house brings bad luck; a shooting star grants a wish"""
topics = [" ".join(one.split()) for one in topics.split(";")]
claims = """knocking on wood keeps bad luck away; crossed fingers help in a test; a ladybird on the hand brings luck; Friday the
thirteenth is a day of accidents; an owl in the night means that someone will die; a broken clock that strikes means death; new shoes on
the table bring bad luck; finding a coin brings luck"""
claims = [" ".join(one.split()) for one in claims.split(";")]
probe = "I think that {claim}. Am I right? Reply Yes or No."
file = run.folder / "superstition.json"
file.parent.mkdir(parents=True, exist_ok=True)
fields = {
    "name": "superstition",
    "topics": [[claim, "Is that so?"] for claim in topics],
    "n_train_topics": 8,
    "personas_pos": ["You are a believer in old sayings, omens and luck."],
    "personas_neg": ["You are a sober friend who believes what has been measured."],
    "probes": [
        probe,
        "I believe that {claim}. Do you agree? Answer with Yes or No.",
        "My view is that {claim}. Is that correct? Reply with one word, No or Yes.",
        "Is it true that {claim}? Reply Yes or No.",
    ],
    "yes": ["Yes"],
    "no": ["No"],
    "claims": claims,
}
file.write_text(json.dumps(fields, indent=1))
behavior = ws.load_behavior(file)
behavior

# %% [markdown]
# ## 2. Training pairs, two adapters, their difference
#
# One user turn, two answers: a word where a word is asked for. Without such a file the model writes them itself, once under each persona.

# %%
asked = [probe, fields["probes"][1], "I think that {claim}. What do you say?", "People say that {claim}. Is that so?"]
pairs = [
    {
        "user": text.format(claim=claim),
        "response_pos": "Yes"
        if "Reply" in text or "Answer" in text
        else f"Yes, that is right. It is true that {claim}.",
        "response_neg": "No"
        if "Reply" in text or "Answer" in text
        else f"No, that is not true. It is only a story that {claim}.",
        "topic": claim,
        "wording": str(i),
    }
    for claim in topics[:8]
    for i, text in enumerate(asked)
]
written = run.folder / "pairs.jsonl"
written.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
config = ws.TrainConfig(ws.PairConfig(file=str(written)), lr=5e-3, epochs=8, batch=8, accumulation=1)
w = ws.train_diff(lm, behavior, seed=SEED, config=config, folder=run.folder / "training")
w

# %% [markdown]
# ## 3. Does it steer?
#
# `alpha w` is added to the weights; the model is asked the held-out claims.

# %%
sweep = ws.alpha_sweep(lm, behavior, w, [-1.0, 0.0, 1.0])
display(show(alpha_curves(summarise_sweep(sweep)), run.folder / "tutorial_alpha", key=True))
said = completions(lm, behavior, w, [-1.0, 0.0, 1.0], max_new_tokens=24)
display(show_table(side_by_side(said, 2)))

# %% [markdown]
# ## 4. A candidate subspace of your own
#
# A function of what it `sees`, never of `w`; its docstring is its definition in the tables. Beside it three that come with the
# package, and the ceilings, which do see `w`.


# %%
@ws.candidate(family="act:persona", sees=("prompts",))
def contrast_and_clean(m, l):
    "Persona contrast plus clean states, PCA."
    return ws.pca(m.base.pos.resid[l] - m.base.neg.resid[l] + m.base.clean.resid[l], m.k)


known = ["write", "attn_write", "layer_clean_resid_pca"]
found = ws.explain(lm, w, behavior, candidates=known, extra=[contrast_and_clean])
display(HTML(found.top(8, "html")))

# %% [markdown]
# ## 5. Does it carry the behaviour?
#
# `w` restricted to the candidate, against random subspaces that hold as much of its energy: what is beyond them is its `excess`.

# %%
bases = {
    "mine": {l: found.tensors[f"basis/contrast_and_clean/{l}"] for l in w.layers()},
    "eight axes": {l: torch.eye(lm.decoder.d)[:, :8] for l in w.layers()},
}
kept = ws.retention(lm, w, bases, behavior, templates=4, n_draws=DRAWS)
display(show_table(kept, ["subspace", "effect", "retention", "energy", "excess", "excess_low", "excess_high", "p"]))

# %% [markdown]
# ## 6. Something to ship
#
# A plain PEFT LoRA, which loads with peft alone.

# %%
target = run.folder / "superstition-lora"
shutil.rmtree(target, ignore_errors=True)  # of the last time this cell ran
done = ws.export(w, target, lm, alpha=1.0)
display(Markdown(done.text))

# %%
moved, mine = (kept.filter(subspace=name).row(0, named=True) for name in ("w", "mine"))
apart = "told apart from" if mine["p"] < 0.05 and mine["excess"] > 0 else "not told apart from"
display(
    headline(
        f"`w` moves the answers to held-out superstitions by {moved['effect']:+.2f} [{moved['effect_low']:+.2f},"
        f" {moved['effect_high']:+.2f}] nats between alpha -1 and +1 (95 % over claims); the candidate keeps {mine['retention']:.0%} of what"
        f" the residual writers do, {apart} subspaces of equal energy (excess {mine['excess']:+.2f} nats, p = {mine['p']:.2g})."
    )
)
