"""Fitted thetas with what they are judged on: fits of several users and heads at one scale, and held-out texts.

The front door of the theta heads. Gains are held-out `CE(base) - CE(theta)` in nats per token. docs/method.md section
10.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.cache.names import model_folder
from ws.model.lm import LM
from ws.theta.compare import Heldout, Scores, by_user, make_heldout, score_own, score_thetas
from ws.theta.fit import FitConfig
from ws.theta.heads import Head, all_heads
from ws.theta.states import States, UserText, load_users, record_users
from ws.theta.users import UserFit, fit_users

SOLVERS = ("adam", "clipped", "optimum")


@dataclass(frozen=True, eq=False)
class ThetaFits:
    """Fits by (user, head), the heads, the users' held-out texts, the fit's parameters; `scale` names how alpha was
    chosen."""

    fits: dict[tuple[str, str], UserFit]
    heads: dict[str, Head]
    heldout: Heldout
    config: FitConfig
    scale: str = "default"

    @property
    def users(self) -> list[str]:
        return self.heldout.users

    def theta(self, user: str, head: str, solver: str = "adam") -> Float[Tensor, " D"]:
        """One user's theta for one head, float32."""
        return self.fits[user, head].theta(solver)

    def stacked(self, head: str, solver: str = "adam") -> Float[Tensor, "users D"]:
        """The users' thetas of one head and solver as rows."""
        return torch.stack([self.theta(user, head, solver) for user in self.users])

    def own_scores(self, head: str, solver: str = "adam", config: FitConfig | None = None) -> Scores:
        """Each held-out text under its own user's theta, worn as fitted or with another `config`: one row."""
        return score_own(self.heldout, self.heads[head], self.stacked(head, solver), config or self.config)

    def text_gains(self, solver: str = "adam") -> dict[str, Float[Tensor, " texts"]]:
        """Per head: the gain of each held-out text under its own user's theta."""
        return {name: self.heldout.ce0 - self.own_scores(name, solver).ce[0] for name in self.heads}

    @cached_property
    def summary(self) -> pl.DataFrame:
        """A row per head, user and solver: held-out CE and perplexity per token before and after, gain, KL, |theta|.

        Iterations, condition number and gradient_ratio belong to the optimum rows and are null in Adam's.
        """
        rows, ce0 = [], by_user(self.heldout, self.heldout.ce0)
        tokens = torch.zeros(len(self.users), dtype=torch.long).index_add_(0, self.heldout.user, self.heldout.tokens)
        for name, head in self.heads.items():
            for solver in SOLVERS:
                scores = self.own_scores(name, solver)
                ce, kl = by_user(self.heldout, scores.ce[0]), by_user(self.heldout, scores.kl[0])
                for u, user in enumerate(self.users):
                    fit = self.fits[user, name]
                    best = None if solver == "adam" else getattr(fit, solver)
                    row = {
                        "user": user, "head": name, "scale": self.scale, "solver": solver, "alpha": head.alpha,
                        "tokens_heldout": int(tokens[u]),
                        "ce_before": float(ce0[u]), "ce_after": float(ce[u]), "gain": float(ce0[u] - ce[u]),
                        "ppl_before": float(ce0[u].exp()), "ppl_after": float(ce[u].exp()), "kl": float(kl[u]),
                        "theta_norm": float(fit.theta(solver).norm()),
                        "train_loss": float(fit.adam.trace["loss"][-1]) if best is None else best.loss,
                    }  # fmt: skip
                    effort = ("iterations", "condition", "gradient_ratio")
                    rows.append(row | {field: getattr(best, field, None) for field in effort})
        return pl.DataFrame(rows, infer_schema_length=None)

    @cached_property
    def cross(self) -> pl.DataFrame:
        """A row per head, user of theta and user of held-out texts: CE, gain, KL; `best` = least CE on those texts."""
        rows, ce0, users = [], by_user(self.heldout, self.heldout.ce0), self.users
        for name, head in self.heads.items():
            scores = score_thetas(self.heldout, head, self.stacked(name), self.config)
            ce, kl = by_user(self.heldout, scores.ce), by_user(self.heldout, scores.kl)
            best = ce.argmin(dim=0)
            rows += [
                {
                    "head": name, "scale": self.scale, "theta_user": users[i], "text_user": users[j],
                    "ce": float(ce[i, j]), "gain": float(ce0[j] - ce[i, j]), "kl": float(kl[i, j]),
                    "best": i == int(best[j]),
                }
                for i in range(len(users)) for j in range(len(users))
            ]  # fmt: skip
        return pl.DataFrame(rows)


def fit_heads(
    train: dict[str, States],
    heads: dict[str, Head],
    heldout: Heldout,
    config: FitConfig,
    folder: Path,
    scale: str = "default",
    progress: bool = True,
) -> ThetaFits:
    """Every head for every user (`fit_users`), with the held-out texts that judge them."""
    fits = fit_users(train, heads, heldout.W, heldout.bias, config, folder, progress=progress)
    return ThetaFits(fits, heads, heldout, config, scale)


def fit_theta(
    lm: LM,
    users: str | Path | dict[str, list] = "",
    *,
    heads: Sequence[str] | None = None,
    dim: int = 64,
    alpha: float | int = 0.1,
    config: FitConfig | None = None,
    heldout: float = 0.25,
    folder: Path | str | None = None,
    seed: int = 42,
    progress: bool = True,
) -> ThetaFits:
    """A theta for every user and head, fitted on the user's own words before a frozen model's unembedding.

    users: a JSONL file with user, prompt, text; '' for the shipped users; or `{user: [(prompt, text), ...]}`. heads:
    names out of `all_heads`, all of them by default. dim: D. heldout: the last part of each user's texts, kept out of
    the fit. folder: of one file per user and head, and of the recorded states; default `out/<model>/theta_fit`. What
    is there, whole and of the same model, texts, parameters and code, is read. seed: of the random bases.
    Raises ValueError for an unknown head, a user with fewer than two texts, a model whose logits are not `W h + b`.
    (docs/method.md section 10)

    Example:
        >>> import ws
        >>> texts = {"ann": [("Hi", "Well, hello dear."), ("Why", "Well, because.")], "bob": [("", "No."), ("", "Nope.")]}
        >>> found = ws.fit_theta(ws.load_lm("tiny"), texts, heads=["unconditional"], dim=4, progress=False)
        >>> found.theta("ann", "unconditional").shape, found.summary["user"].unique(maintain_order=True).to_list()
        (torch.Size([4]), ['ann', 'bob'])
    """
    if isinstance(users, dict):
        texts = {u: [t if isinstance(t, UserText) else UserText(u, *t) for t in items] for u, items in users.items()}
    else:
        texts = load_users(users)
    W = lm.decoder.unembed()
    known = all_heads(W, dim, float(alpha), seed)
    if unknown := [name for name in heads or () if name not in known]:
        raise ValueError(f"head {unknown[0]!r} is unknown; one of {', '.join(known)}")
    folder = Path(folder) if folder else model_folder(lm.name) / "theta_fit"
    train, rest = record_users(lm, texts, heldout, path=folder / "states.safetensors", progress=progress)
    chosen = {name: known[name] for name in heads or known}
    judged = make_heldout(rest, W, lm.decoder.unembed_bias())
    return fit_heads(train, chosen, judged, config or FitConfig(), folder, progress=progress)
