"""Tables of the theta fits: what the notebook displays and writes, a function each.

Gains are held-out `CE(base) - CE(theta)` in nats per token; means over users give each user the same weight.
docs/method.md section 10.
"""

import polars as pl
import torch

from ws.model.generate import complete
from ws.model.lm import LM
from ws.theta.compare import Heldout, Scores, by_user, score_own
from ws.theta.fit import FitConfig, fit_adam, make_problem
from ws.theta.fitted import ThetaFits
from ws.theta.heads import Head
from ws.theta.live import wear
from ws.theta.states import States, UserText, joint_base, prompt_text, split_texts


def gains(table: pl.DataFrame) -> pl.DataFrame:
    """Mean over users of held-out gain, KL and |theta|, per head, scale and solver; highest gain first."""
    return (
        table.group_by("scale", "head", "solver", maintain_order=True)
        .agg(
            pl.col("alpha").first(),
            pl.col("gain").mean(),
            pl.col("gain").min().alias("least_gain"),
            pl.col("kl").mean(),
            pl.col("theta_norm").mean(),
        )
        .sort(["scale", "gain"], descending=[False, True], maintain_order=True)
    )


def best_head(table: pl.DataFrame, scale: str = "matched") -> str:
    """The head whose Adam fits gain most on held-out texts, mean over users, at one scale."""
    ranked = gains(table).filter((pl.col("scale") == scale) & (pl.col("solver") == "adam"))
    return ranked["head"][0]


def adam_against_optimum(table: pl.DataFrame) -> pl.DataFrame:
    """Per head and scale: how far Adam's loss stays above the clipped and the free optimum's, and Newton's effort."""
    wide = table.pivot(on="solver", index=["scale", "head", "user"], values="train_loss")
    effort = table.filter(pl.col("solver") == "optimum").group_by("scale", "head", maintain_order=True).agg(
        pl.col("theta_norm").mean().alias("free_theta_norm"),
        pl.col("iterations").max().alias("most_iterations"),
        pl.col("condition").max().alias("largest_condition"),
        pl.col("gradient_ratio").max().alias("largest_gradient_ratio"),
    )  # fmt: skip
    return (
        wide.group_by("scale", "head", maintain_order=True)
        .agg(
            (pl.col("adam") - pl.col("clipped")).mean().alias("adam_above_clipped"),
            (pl.col("adam") - pl.col("optimum")).mean().alias("adam_above_free"),
        )
        .join(effort, on=["scale", "head"], how="left", maintain_order="left")
    )


def diagonal(cross: pl.DataFrame) -> pl.DataFrame:
    """Per scale and head: for how many users their own theta is the best on their texts, and for whom not."""
    own = cross.filter(pl.col("theta_user") == pl.col("text_user"))
    return own.group_by("scale", "head", maintain_order=True).agg(
        pl.col("best").sum().alias("own_theta_wins"),
        pl.len().alias("users"),
        pl.col("text_user").filter(~pl.col("best")).str.join(", ").alias("not_for"),
    )


def _means(heldout: Heldout, scores: Scores) -> dict[str, float]:
    """Gain and KL, mean over users, of each text under its own user's theta."""
    gain, kl = by_user(heldout, heldout.ce0 - scores.ce[0]), by_user(heldout, scores.kl[0])
    return {"gain": float(gain.mean()), "kl": float(kl.mean())}


def gamma_sweep(found: ThetaFits, heads: list[str], cfgs: list[FitConfig]) -> pl.DataFrame:
    """Held-out gain and KL, mean over users, of the fitted thetas worn at other gammas (`cfgs` differ in gamma)."""
    return pl.DataFrame(
        [
            {"head": name, "gamma": cfg.gamma} | _means(found.heldout, found.own_scores(name, config=cfg))
            for name in heads for cfg in cfgs
        ]
    )  # fmt: skip


def beta_sweep(train: dict[str, States], found: ThetaFits, heads: list[str], cfgs: list[FitConfig]) -> pl.DataFrame:
    """Held-out gain and KL, mean over users, of thetas fitted by Adam at other betas (`cfgs` differ in beta)."""
    held = found.heldout
    base, owner = joint_base(list(train.values()), held.W, held.bias)
    rows = []
    for name in heads:
        problem = make_problem(base, found.heads[name], held.W, owner)
        for cfg in cfgs:
            thetas = torch.stack([fit.theta for fit in fit_adam(problem, cfg)])
            scores = score_own(held, found.heads[name], thetas, cfg)
            rows.append({"head": name, "beta": cfg.beta} | _means(held, scores))
    return pl.DataFrame(rows)


def user_table(
    texts: dict[str, list[UserText]], train: dict[str, States], rest: dict[str, States], heldout: Heldout
) -> pl.DataFrame:
    """Per user: texts, training and held-out tokens, the base's held-out CE and perplexity, and a first text."""
    ce = by_user(heldout, heldout.ce0)
    return pl.DataFrame(
        [
            {
                "user": user, "texts": len(items), "tokens_train": len(train[user].y), "tokens_heldout": len(rest[user].y),
                "base_ce": float(ce[u]), "base_ppl": float(ce[u].exp()), "first_text": items[0].text,
            }
            for u, (user, items) in enumerate(texts.items())
        ]
    )  # fmt: skip


def scale_table(heads: dict[str, Head], matched: dict[str, Head], kappa: dict[str, float]) -> pl.DataFrame:
    """Per head: alpha and kappa (nats of KL per token of a random theta of norm 1), and the alpha of the matched scale."""
    return pl.DataFrame(
        [{"head": n, "alpha": h.alpha, "kappa": kappa[n], "matched_alpha": matched[n].alpha} for n, h in heads.items()]
    )


def samples(
    lm: LM,
    texts: dict[str, list[UserText]],
    heldout: float,
    found: ThetaFits,
    shown: list[str],
    gammas: list[float],
    max_new_tokens: int,
) -> pl.DataFrame:
    """Greedy answers to the first held-out prompt of each user: of the base, then wearing the user's theta."""
    rows = []
    for user, items in texts.items():
        prompt = split_texts(items, heldout)[1][0].prompt
        asked = [prompt_text(lm, prompt)]
        row = {"user": user, "prompt": prompt, "base": complete(lm, asked, max_new_tokens)[0]}
        for name in shown:
            for gamma in gammas:
                with wear(lm.model, found.heads[name], found.theta(user, name), gamma):
                    row[f"{name}, gamma {gamma:g}"] = complete(lm, asked, max_new_tokens)[0]
        rows.append(row)
    return pl.DataFrame(rows)
