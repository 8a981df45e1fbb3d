"""What is fitted so that the held-out texts can judge: the head is chosen without them, the users are permuted.

*Choice*: every user's training texts are dealt into folds; Adam fits each head on all folds but one, and the head that
gains most on the texts left out, mean over users, is the one whose claims the held-out texts then test. *Permuted users*:
the training texts dealt to the users at random, fitted alike. docs/method.md section 10.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from ws.cache.keys import stage_key
from ws.cache.made import kept, read_safetensors
from ws.cache.sources import code_key
from ws.show.bars import tqdm
from ws.theta.adam import anchored, near_fits
from ws.theta.compare import by_user, make_heldout, numbered_texts, score
from ws.theta.fit import FitConfig, Problem, fit_adam
from ws.theta.heads import Head
from ws.theta.recorded import Recorded, at_once, dealt
from ws.theta.users import head_identity

FOLDS = 4  # of each user's training texts; a user with fewer texts has as many, each left out once
CHUNK = 5  # deals in one kept file: what a killed run does again, at most


@dataclass(frozen=True, eq=False)
class Choice:
    """The head chosen on training texts, a row of gains (nats per token) for each head with the best first, and `how`
    it was chosen, in words that follow "chosen"."""

    head: str
    gains: pl.DataFrame
    how: str


def choose_head(
    train: Recorded,
    heads: dict[str, Head],
    cfg: FitConfig,
    folder: Path | None = None,
    progress: bool = False,
) -> Choice:
    """Which of `heads` (at one scale) gains most on training texts that its fit did not see: cross-validation over FOLDS
    folds of each user's texts, leave-one-out for a user with fewer. Users with one training text have nothing to leave out
    and do not vote; where all have one, the gain on the training texts themselves decides, which favours the head that fits
    closest. Either way the held-out texts had no part in it. folder: where the fits are kept."""
    texts = {user: states.text.unique().tolist() for user, states in train.states.items()}
    voters = {user: states for user, states in train.states.items() if len(texts[user]) > 1}
    blind, voters = bool(voters), voters or train.states
    most = max(len(texts[user]) for user in voters)
    folds = min(FOLDS, most) if blind else 1
    fold = torch.tensor([i % folds for user in voters for i in range(len(texts[user]))])
    seen = train if len(voters) == len(train.states) else replace(train, states=voters)
    judged = make_heldout(seen)
    thetas: dict[str, Tensor] = {}
    out = (
        torch.stack([fold == k for k in range(folds)])[:, judged.text]
        if blind
        else torch.zeros(1, len(judged.text)).bool()
    )
    owners, users = torch.where(out, len(voters), seen.owner), len(voters) + blind  # what is left out is of a user more
    for name, head in tqdm(heads.items(), "choice of a head", disable=not progress):

        def fit(head: Head = head) -> Float[Tensor, "folds users D"]:
            return refitted(seen.problem(head), owners, users, cfg)

        about = {"folds": fold.tolist(), "blind": blind, "users": list(voters)}
        found = _kept(folder, f"chosen_{name}", about, name, head, train, cfg, fit)
        thetas[name] = found[fold, judged.user]
    rows = []
    for name, head in heads.items():
        gain = by_user(judged, judged.ce0 - score(judged, head, thetas[name][None], cfg)[0])[0]
        rows.append((name, float(gain.mean()), float(gain.min())))
    gains = pl.DataFrame(rows, ("head", "gain", "least_gain"), orient="row")
    gains = gains.sort("gain", descending=True, maintain_order=True)
    parts = "each left out once" if folds == most else f"{folds} folds"
    how = f"on training texts that its fits did not see (cross-validation, {parts})"
    if not blind:
        how = "by its gain on the very texts it was fitted on, since no user has two of them to leave one out"
    elif len(voters) < len(train.states):
        how += f", those of the {len(voters)} of {len(train.states)} users who have two or more"
    return Choice(gains["head"][0], gains, how)


def permuted_thetas(
    train: Recorded,
    head: Head,
    cfg: FitConfig,
    draws: int,
    seed: int,
    folder: Path | None = None,
    progress: bool = False,
    own_too: bool = False,
) -> Float[Tensor, "draws users D"]:
    """Control: training texts dealt to the users at random (each keeps its number of texts), fitted by Adam alike. What
    such thetas gain on held-out texts is what any user's texts would teach; only what a user's own theta gains beyond
    it is the user's. The first deals of a seed are the same however many are drawn. folder: where they are kept, CHUNK
    by CHUNK (over a large vocabulary as many as are fitted at once, by an expansion that is anchored at the fit of all
    texts as one user's), so that a run that was stopped goes on, and one that asks for more adds to them. own_too: before
    the deals, as one more of them, each user's own texts, so that they are fitted as all others are."""
    (number, home), gen = numbered_texts(train.states), torch.Generator().manual_seed(seed)
    deals = [home] * own_too + [home[torch.randperm(len(home), generator=gen)] for _ in range(draws)]
    users, problem = len(train.states), cache(partial(pooled, train, head, cfg))
    out, size = [], at_once(len(number)) if train.large else CHUNK
    with tqdm(total=len(deals), desc=f"permuted users, {head.name}", disable=not progress) as bar:
        for start in range(0, len(deals), size):
            some = deals[start : start + size]

            def fit(some: list[Tensor] = some) -> Float[Tensor, "deals users D"]:
                return refitted(problem(), torch.stack([deal[number] for deal in some]), users, cfg, bar)

            params = {"deals": [deal.tolist() for deal in some]}
            file = f"permuted_{head.name}_{seed}_{start:04d}"
            out.append(_kept(folder, file, params, head.name, head, train, cfg, fit))
            bar.update(start + len(some) - bar.n)  # those that were kept, or fitted at once
    return torch.cat(out)


def pooled(train: Recorded, head: Head, cfg: FitConfig) -> Problem:
    """The users' problem; its expansion, where it has one, anchored at the fit of all texts as one user's."""
    problem = train.problem(head)
    if problem.quick:
        one = dealt(problem, torch.zeros_like(train.owner)[None], 1)
        with suppress(ValueError):  # too far for an expansion, and so will be the users'
            thetas = torch.stack([fit.theta for fit in near_fits(one, cfg)])
            return replace(problem, quick=anchored(one, thetas, cfg)[0].quick)
    return replace(problem, quick=None)


def refitted(
    problem: Problem, owners: Int[Tensor, "n T"], users: int, cfg: FitConfig, bar: tqdm | None = None
) -> Float[Tensor, "n users D"]:
    """Adam's thetas of the same tokens under other owners, all at once where the problem has an expansion."""
    if problem.quick:
        with suppress(ValueError):  # too far for an expansion
            fits = near_fits(dealt(problem, owners, users), cfg)
            return torch.stack([fit.theta for fit in fits]).unflatten(0, (len(owners), users))
        problem = replace(problem, quick=None)
    fits = []
    for owner in owners.to(problem.owner.device):
        fits.append(adam_thetas(replace(problem, owner=owner, n=torch.bincount(owner, minlength=users)), cfg))
        if bar is not None:
            bar.update()
    return torch.stack(fits)


def adam_thetas(problem: Problem, cfg: FitConfig) -> Float[Tensor, "users D"]:
    """Adam's thetas of all users of a problem."""
    return torch.stack([fit.theta for fit in fit_adam(problem, cfg)])


def _kept(
    folder: Path | None, file: str, params: dict, name: str, head: Head, train: Recorded, cfg: FitConfig, fit: Callable
) -> Tensor:
    """Thetas that `fit` makes, kept in `folder` under a key of `params`, states, unembedding, head, config and code."""
    if folder is None:
        return fit()
    about = {"states": list(train.hashes.items()), "unembedding": train.unembedding, "expanded": train.large}
    about["config"] = asdict(cfg)
    code = code_key("ws.theta.controls.refitted", "ws.theta.controls.pooled", Recorded, type(head))
    key = stage_key({**about, **params, "head": head_identity(name, head)}, sources=code)

    def write(path: Path) -> None:
        save_file({"theta": fit().contiguous()}, path)

    return kept(folder / f"{file}.safetensors", key, write, lambda path: read_safetensors(path)[0]["theta"])
