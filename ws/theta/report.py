"""Tables of the theta fits: what the notebook displays and writes, a function each.

Gains are held-out `CE(base) - CE(theta)` in nats per token; means over users give each user the same weight.
docs/method.md section 10.
"""

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.model.lm import LM
from ws.steer.evaluate import complete
from ws.theta.compare import Heldout, by_user, score_own, score_thetas
from ws.theta.fit import FitConfig, fit_adam, make_problem
from ws.theta.heads import Head
from ws.theta.live import wear
from ws.theta.states import States, UserText, prompt_text, split_texts
from ws.theta.users import UserFit, joint_base

SOLVERS = ("adam", "clipped", "optimum")


def stacked(
    fits: dict[tuple[str, str], UserFit], users: list[str], head: str, solver: str = "adam"
) -> Float[Tensor, "users D"]:
    """The users' thetas of one head and solver as rows."""
    return torch.stack([fits[user, head].theta(solver) for user in users])


def summary(
    fits: dict[tuple[str, str], UserFit],
    heads: dict[str, Head],
    heldout: Heldout,
    cfg: FitConfig,
    scale: str,
) -> pl.DataFrame:
    """A row per head, user and solver: held-out CE and perplexity per token before and after, gain, KL, |theta|.

    `scale` names the choice of alpha. Iterations, condition number and
    gradient_ratio belong to the optimum rows and are null in Adam's.
    """
    rows, ce0 = [], by_user(heldout, heldout.ce0)
    tokens = torch.zeros(len(heldout.users), dtype=torch.long).index_add_(0, heldout.user, heldout.tokens)
    for name, head in heads.items():
        for solver in SOLVERS:
            scores = score_own(heldout, head, stacked(fits, heldout.users, name, solver), cfg)
            ce, kl = by_user(heldout, scores.ce[0]), by_user(heldout, scores.kl[0])
            for u, user in enumerate(heldout.users):
                fit = fits[user, name]
                best = None if solver == "adam" else getattr(fit, solver)
                rows.append(
                    {
                        "user": user, "head": name, "scale": scale, "solver": solver, "alpha": head.alpha,
                        "tokens_heldout": int(tokens[u]),
                        "ce_before": float(ce0[u]), "ce_after": float(ce[u]), "gain": float(ce0[u] - ce[u]),
                        "ppl_before": float(ce0[u].exp()), "ppl_after": float(ce[u].exp()), "kl": float(kl[u]),
                        "theta_norm": float(fit.theta(solver).norm()),
                        "train_loss": float(fit.adam.trace["loss"][-1]) if best is None else best.loss,
                        "iterations": None if best is None else best.iterations,
                        "condition": None if best is None else best.condition,
                        "gradient_ratio": None if best is None else best.gradient_ratio,
                    }
                )  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None)


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


def cross_table(
    fits: dict[tuple[str, str], UserFit],
    heads: dict[str, Head],
    heldout: Heldout,
    cfg: FitConfig,
    scale: str,
) -> pl.DataFrame:
    """A row per head, user of theta and user of held-out texts: CE, gain, KL; `best` = least CE on those texts."""
    rows, ce0, users = [], by_user(heldout, heldout.ce0), heldout.users
    for name, head in heads.items():
        scores = score_thetas(heldout, head, stacked(fits, users, name), cfg)
        ce, kl = by_user(heldout, scores.ce), by_user(heldout, scores.kl)
        best = ce.argmin(dim=0)
        rows += [
            {
                "head": name, "scale": scale, "theta_user": users[i], "text_user": users[j], "ce": float(ce[i, j]),
                "gain": float(ce0[j] - ce[i, j]), "kl": float(kl[i, j]), "best": i == int(best[j]),
            }
            for i in range(len(users)) for j in range(len(users))
        ]  # fmt: skip
    return pl.DataFrame(rows)


def diagonal(cross: pl.DataFrame) -> pl.DataFrame:
    """Per scale and head: for how many users their own theta is the best on their texts, and for whom not."""
    own = cross.filter(pl.col("theta_user") == pl.col("text_user"))
    return own.group_by("scale", "head", maintain_order=True).agg(
        pl.col("best").sum().alias("own_theta_wins"),
        pl.len().alias("users"),
        pl.col("text_user").filter(~pl.col("best")).str.join(", ").alias("not_for"),
    )


def gamma_sweep(
    fits: dict[tuple[str, str], UserFit],
    heads: dict[str, Head],
    heldout: Heldout,
    cfgs: list[FitConfig],
) -> pl.DataFrame:
    """Held-out gain and KL, mean over users, of the fitted thetas worn at other gammas (`cfgs` differ in gamma)."""
    rows = []
    for name, head in heads.items():
        thetas = stacked(fits, heldout.users, name)
        for cfg in cfgs:
            scores = score_own(heldout, head, thetas, cfg)
            gain, kl = by_user(heldout, heldout.ce0 - scores.ce[0]).mean(), by_user(heldout, scores.kl[0]).mean()
            rows.append({"head": name, "gamma": cfg.gamma, "gain": float(gain), "kl": float(kl)})
    return pl.DataFrame(rows)


def beta_sweep(
    train: dict[str, States],
    heads: dict[str, Head],
    heldout: Heldout,
    bias: Tensor | None,
    cfgs: list[FitConfig],
) -> pl.DataFrame:
    """Held-out gain and KL, mean over users, of thetas fitted by Adam at other betas (`cfgs` differ in beta)."""
    base, owner = joint_base(list(train.values()), heldout.W, bias)
    rows = []
    for name, head in heads.items():
        problem = make_problem(base, head, heldout.W, owner)
        for cfg in cfgs:
            thetas = torch.stack([fit.theta for fit in fit_adam(problem, cfg)])
            scores = score_own(heldout, head, thetas, cfg)
            gain, kl = by_user(heldout, heldout.ce0 - scores.ce[0]).mean(), by_user(heldout, scores.kl[0]).mean()
            rows.append({"head": name, "beta": cfg.beta, "gain": float(gain), "kl": float(kl)})
    return pl.DataFrame(rows)


def user_table(
    texts: dict[str, list[UserText]],
    train: dict[str, States],
    rest: dict[str, States],
    heldout: Heldout,
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
    heads: dict[str, Head],
    fits: dict[tuple[str, str], UserFit],
    shown: list[str],
    gammas: list[float],
    max_new_tokens: int,
) -> pl.DataFrame:
    """Greedy answers to the first held-out prompt of each user: of the base, then wearing the user's theta."""
    rows = []
    for user, items in texts.items():
        prompt = split_texts(items, heldout)[1][0].prompt
        said = [complete(lm, [prompt_text(lm, prompt)], max_new_tokens)[0]]
        columns = ["base"]
        for name in shown:
            for gamma in gammas:
                with wear(lm.model, heads[name], fits[user, name].theta(), gamma):
                    said += complete(lm, [prompt_text(lm, prompt)], max_new_tokens)
                columns.append(f"{name}, gamma {gamma:g}")
        rows.append({"user": user, "prompt": prompt, **dict(zip(columns, said, strict=True))})
    return pl.DataFrame(rows)


def text_gains(
    fits: dict[tuple[str, str], UserFit],
    heads: dict[str, Head],
    heldout: Heldout,
    cfg: FitConfig,
    solver: str,
) -> dict[str, Float[Tensor, " texts"]]:
    """Per head: the gain of each held-out text under its own user's theta."""
    own = {name: stacked(fits, heldout.users, name, solver) for name in heads}
    return {name: heldout.ce0 - score_own(heldout, head, own[name], cfg).ce[0] for name, head in heads.items()}


def join(*tables: pl.DataFrame) -> pl.DataFrame:
    """Tables of the same columns below each other."""
    return pl.concat(tables, how="vertical_relaxed")


def of_scale(table: pl.DataFrame, scale: str) -> pl.DataFrame:
    """The rows of one scale."""
    return table.filter(pl.col("scale") == scale)
