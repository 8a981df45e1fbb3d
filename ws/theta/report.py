"""Tables of the theta fits: what the notebook displays and writes, a function each.

Gains are held-out `CE(base) - CE(theta)` in nats per token; means over users give each user the same weight.
docs/method.md section 10.
"""

from itertools import product

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.model.generate import complete
from ws.model.lm import LM
from ws.theta.adam import adam
from ws.theta.compare import Heldout, by_user, score
from ws.theta.fit import FitConfig
from ws.theta.fitted import ThetaFits
from ws.theta.heads import Head
from ws.theta.live import wear
from ws.theta.recorded import Recorded
from ws.theta.states import States, UserText, prompt_text

TOGETHER = 8  # users whose samples are written in one batch, at every strength


def gains(table: pl.DataFrame) -> pl.DataFrame:
    """Mean over users of held-out gain, KL and |theta|, per head, scale and solver; highest gain first."""
    return (
        table.group_by("scale", "head", "solver", maintain_order=True)
        .agg(pl.first("alpha"), pl.mean("gain"), pl.min("gain").alias("least_gain"), pl.mean("kl", "theta_norm"))
        .sort(["scale", "gain"], descending=[False, True], maintain_order=True)
    )


def adam_against_optimum(table: pl.DataFrame) -> pl.DataFrame:
    """Per head and scale: how far Adam's loss stays above the clipped and the free optimum's, and Newton's effort."""

    def of(solver: str, column: str = "train_loss") -> pl.Expr:
        return pl.col(column).filter(pl.col("solver") == solver)

    return table.group_by("scale", "head", maintain_order=True).agg(
        (of("adam") - of("clipped")).mean().alias("adam_above_clipped"),
        (of("adam") - of("optimum")).mean().alias("adam_above_free"),
        of("optimum", "theta_norm").mean().alias("free_theta_norm"),
        of("optimum", "iterations").max().alias("most_iterations"),
        of("optimum", "condition").max().alias("largest_condition"),
        of("optimum", "gradient_ratio").max().alias("largest_gradient_ratio"),
    )


def diagonal(cross: pl.DataFrame) -> pl.DataFrame:
    """Per scale and head: for how many users their own theta is the best on their texts, and for whom not."""
    own = cross.filter(pl.col("theta_user") == pl.col("text_user"))
    return own.group_by("scale", "head", maintain_order=True).agg(
        pl.col("best").sum().alias("own_theta_wins"),
        pl.len().alias("users"),
        pl.col("text_user").filter(~pl.col("best")).str.join(", ").alias("not_for"),
    )


def _means(heldout: Heldout, ce: Float[Tensor, " texts"], kl: Float[Tensor, " texts"]) -> dict[str, float]:
    """Gain and KL, mean over users, of each text under its own user's theta."""
    return {"gain": float(by_user(heldout, heldout.ce0 - ce).mean()), "kl": float(by_user(heldout, kl).mean())}


def gamma_sweep(found: ThetaFits, heads: list[str], cfgs: list[FitConfig]) -> pl.DataFrame:
    """Held-out gain and KL, mean over users, of the fitted thetas worn at other gammas (`cfgs` differ in gamma)."""
    rows = []
    for name, cfg in product(heads, cfgs):
        scores = found.own_scores(name, config=cfg)
        rows.append({"head": name, "gamma": cfg.gamma} | _means(found.heldout, *scores))
    return pl.DataFrame(rows)


def beta_sweep(train: Recorded, found: ThetaFits, heads: list[str], cfgs: list[FitConfig]) -> pl.DataFrame:
    """Held-out gain and KL, mean over users, of thetas fitted by Adam at other betas (`cfgs` differ in beta)."""
    held, rows = found.heldout, []
    for name, cfg in product(heads, cfgs):
        if cfg == found.config:  # fitted already
            thetas = found.stacked(name)
        else:
            thetas = torch.stack([fit.theta for fit in adam(train.problem(found.heads[name]), cfg)[0]])
        (ce,), (kl,) = score(held, found.heads[name], thetas[None, held.user], cfg)
        rows.append({"head": name, "beta": cfg.beta} | _means(held, ce, kl))
    return pl.DataFrame(rows)


def user_table(
    texts: dict[str, list[UserText]], train: dict[str, States], rest: dict[str, States], heldout: Heldout
) -> pl.DataFrame:
    """Per user: texts, training and held-out tokens, the base's held-out CE and perplexity, and a first text."""
    ce = by_user(heldout, heldout.ce0)
    columns = {
        "user": list(texts),
        "texts": [len(items) for items in texts.values()],
        "tokens_train": [len(train[user].y) for user in texts],
        "tokens_heldout": [len(rest[user].y) for user in texts],
        "base_ce": ce.tolist(),
        "base_ppl": ce.exp().tolist(),
        "first_text": [items[0].text for items in texts.values()],
    }
    return pl.DataFrame(columns)


def scale_table(heads: dict[str, Head], matched: dict[str, Head], kappa: dict[str, float]) -> pl.DataFrame:
    """Per head: alpha and kappa (nats of KL per token of a random theta of norm 1), and the alpha of the matched scale."""
    return pl.DataFrame(
        [{"head": n, "alpha": h.alpha, "kappa": kappa[n], "matched_alpha": matched[n].alpha} for n, h in heads.items()]
    )


def samples(
    lm: LM, prompts: dict[str, str], found: ThetaFits, shown: list[str], gammas: list[float], max_new_tokens: int
) -> pl.DataFrame:
    """Greedy answers to a prompt of each user: of the base, then wearing the user's theta."""
    texts, users = [prompt_text(lm, prompt) for prompt in prompts.values()], list(prompts)
    columns: dict[str, list[str]] = {"user": users, "prompt": list(prompts.values()), "base": []}
    if not shown:
        columns["base"] = complete(lm, texts, max_new_tokens)
    gammas = list(dict.fromkeys(gammas))
    for name, few in product(dict.fromkeys(shown), range(0, len(users), TOGETHER)):
        some, labels = slice(few, few + TOGETHER), [f"{name}, gamma {gamma:g}" for gamma in gammas]
        thetas = torch.stack([found.theta(user, name) for user in users[some]])
        worn = [*zip(labels, gammas, strict=True), *[("base", 0.0)] * (name == shown[0])]
        with wear(lm.model, found.heads[name], torch.cat([gamma * thetas for _, gamma in worn])):
            said = complete(lm, texts[some] * len(worn), max_new_tokens)
        for i, (label, _) in enumerate(worn):
            columns.setdefault(label, []).extend(said[i * len(thetas) : (i + 1) * len(thetas)])
    return pl.DataFrame(columns)
