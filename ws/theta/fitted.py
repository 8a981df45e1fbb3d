"""Fitted thetas with what they are judged on: fits of several users and heads at one scale, and held-out texts.

The front door of the theta heads. Gains are held-out `CE(base) - CE(theta)` in nats per token. docs/method.md section
10.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.cache.names import BY_HAND, model_folder
from ws.cache.places import out_folder
from ws.model.lm import LM
from ws.theta.compare import Heldout, by_user, make_heldout, score
from ws.theta.fit import FitConfig
from ws.theta.heads import Head, all_heads
from ws.theta.recorded import Recorded
from ws.theta.states import UserText, load_users, record_users
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

    def own_scores(
        self, head: str, solver: str = "adam", config: FitConfig | None = None
    ) -> tuple[Float[Tensor, " texts"], Float[Tensor, " texts"]]:
        """CE and KL of each held-out text under its own user's theta, worn as fitted or with another `config`."""
        thetas = self.stacked(head, solver)[None, self.heldout.user]
        ce, kl = score(self.heldout, self.heads[head], thetas, config or self.config)
        return ce[0], kl[0]

    def text_gains(self, solver: str = "adam") -> dict[str, Float[Tensor, " texts"]]:
        """Per head: the gain of each held-out text under its own user's theta."""
        return {name: self.heldout.ce0 - self.own_scores(name, solver)[0] for name in self.heads}

    @cached_property
    def summary(self) -> pl.DataFrame:
        """A row per head, user and solver: held-out CE and perplexity per token before and after, gain, KL, |theta|.
        Iterations, condition number and gradient_ratio belong to the optimum rows and are null in Adam's."""
        held, parts = self.heldout, []
        ce0, tokens = by_user(held, held.ce0), torch.bincount(held.user, weights=held.tokens).long()
        for name, solver in product(self.heads, SOLVERS):
            ce, kl = (by_user(held, values) for values in self.own_scores(name, solver))
            fits = [getattr(self.fits[user, name], solver) for user in self.users]
            named = {"user": self.users, "head": name, "scale": self.scale, "solver": solver}
            scores = {"tokens_heldout": tokens, "ce_before": ce0, "ce_after": ce, "gain": ce0 - ce}
            scores |= {"ppl_before": ce0.exp(), "ppl_after": ce.exp(), "kl": kl}
            fitted = {
                "theta_norm": [float(fit.theta.float().norm()) for fit in fits],
                "train_loss": [float(fit.trace["loss"][-1]) if solver == "adam" else fit.loss for fit in fits],
            }
            fitted |= {
                f: [getattr(fit, f, None) for fit in fits] for f in ("iterations", "condition", "gradient_ratio")
            }
            scores = {"alpha": self.heads[name].alpha} | {k: v.tolist() for k, v in scores.items()}
            parts.append(pl.DataFrame(named | scores | fitted))
        return pl.concat(parts, how="vertical_relaxed")

    @cached_property
    def cross(self) -> pl.DataFrame:
        """A row per head, user of theta and user of held-out texts: CE, gain, KL; `best` = least CE on those texts."""
        held, users, parts = self.heldout, self.users, []
        for name, head in self.heads.items():
            thetas = self.stacked(name)[:, None].expand(-1, len(held.user), -1)
            ce, kl = (by_user(held, values) for values in score(held, head, thetas, self.config))
            numbers = {"ce": ce, "gain": by_user(held, held.ce0) - ce, "kl": kl}
            numbers["best"] = torch.arange(len(users))[:, None] == ce.argmin(dim=0)
            named = {"theta_user": [u for u in users for _ in users], "text_user": users * len(users)}
            flat = {k: v.flatten().tolist() for k, v in numbers.items()}
            parts.append(pl.DataFrame({"head": name, "scale": self.scale} | named | flat))
        return pl.concat(parts)


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
    the fit. folder: of one file per user and head, and of the recorded states; default `out/by_hand/<model>/theta_fit`. What
    is there, whole and of the same model, texts, parameters and code, is read. seed: of the random bases.
    Raises ValueError for an unknown head, a user with fewer than two texts, a model whose logits are not `W h + b`.
    (docs/method.md section 10)

    Examples:
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
    folder = Path(folder) if folder else model_folder(lm.name, out_folder() / BY_HAND) / "theta_fit"
    train, rest = record_users(lm, texts, heldout, path=folder / "states.safetensors", progress=progress)
    chosen = {name: known[name] for name in heads or known}
    config, bias = config or FitConfig(), lm.decoder.unembed_bias()
    seen = Recorded(train, W, bias)
    fits = fit_users(seen, chosen, config, folder, progress)
    return ThetaFits(fits, chosen, make_heldout(replace(seen, states=rest)), config)
