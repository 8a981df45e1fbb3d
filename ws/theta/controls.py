"""What is fitted so that the held-out texts can judge: the head is chosen without them, the users are permuted.

*Choice*: every user's training texts are dealt into folds; Adam fits each head on all folds but one, and the head that
gains most on the texts left out, mean over users, is the one whose claims the held-out texts then test. *Permuted users*:
the training texts dealt to the users at random, fitted alike. docs/method.md section 10.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from ws.cache.keys import stage_key
from ws.cache.made import kept, read_safetensors
from ws.cache.sources import code_key
from ws.show.bars import tqdm
from ws.theta.compare import Heldout, by_user, make_heldout, numbered_texts, score
from ws.theta.fit import FitConfig, Problem, fit_adam, make_problem
from ws.theta.heads import Head
from ws.theta.states import States, joint_base
from ws.theta.users import content_hash, head_identity

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
    train: dict[str, States],
    heads: dict[str, Head],
    heldout: Heldout,
    cfg: FitConfig,
    folder: Path | None = None,
    progress: bool = False,
) -> Choice:
    """Which of `heads` (at one scale) gains most on training texts that its fit did not see: cross-validation over FOLDS
    folds of each user's texts, leave-one-out for a user with fewer. Of `heldout` only the unembedding is used. Users
    with one training text have nothing to leave out and do not vote; where all have one, the gain on the training texts
    themselves decides, which favours the head that fits closest. Either way the held-out texts had no part in it. folder:
    where the fits are kept."""
    texts = {user: states.text.unique().tolist() for user, states in train.items()}
    voters = {user: states for user, states in train.items() if len(texts[user]) > 1}
    blind, voters = bool(voters), voters or train
    most = max(len(texts[user]) for user in voters)
    folds = min(FOLDS, most) if blind else 1
    fold = torch.tensor([i % folds for user in voters for i in range(len(texts[user]))])
    judged = make_heldout(voters, heldout.W, heldout.bias)
    thetas = {name: torch.zeros(len(fold), head.D) for name, head in heads.items()}
    with tqdm(total=len(heads) * folds, desc="choice of a head", disable=not progress) as bar:
        for k in range(folds):
            left = {u: [t for i, t in enumerate(texts[u]) if not blind or i % folds != k] for u in voters}
            seen, mine = [voters[u].of_texts(left[u]) for u in voters], (fold == k).nonzero()[:, 0]
            base, about = cache(partial(joint_base, seen, heldout.W, heldout.bias)), {"states": _hashes(seen)}
            for name, head in heads.items():

                def fit(head: Head = head, base: Callable = base) -> Float[Tensor, "users D"]:
                    return adam_thetas(make_problem(base()[0], head, heldout.W, base()[1]), cfg)

                found = _kept(folder, f"chosen_{name}_{k}", about, name, head, heldout, cfg, fit)
                thetas[name][mine] = found[judged.user[mine]]
                bar.update()
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
    elif len(voters) < len(train):
        how += f", those of the {len(voters)} of {len(train)} users who have two or more"
    return Choice(gains["head"][0], gains, how)


def permuted_thetas(
    states: dict[str, States],
    head: Head,
    heldout: Heldout,
    cfg: FitConfig,
    draws: int,
    seed: int,
    folder: Path | None = None,
    progress: bool = False,
) -> Float[Tensor, "draws users D"]:
    """Control: training texts dealt to the users at random (each keeps its number of texts), fitted by Adam alike. What
    such thetas gain on held-out texts is what any user's texts would teach; only what a user's own theta gains beyond
    it is the user's. The first deals of a seed are the same however many are drawn. folder: where they are kept, CHUNK
    by CHUNK, so that a run that was stopped goes on, and one that asks for more adds to them."""
    (number, home), gen = numbered_texts(states), torch.Generator().manual_seed(seed)
    deals = [home[torch.randperm(len(home), generator=gen)] for _ in range(draws)]
    about = {"states": _hashes(states.values())}

    @cache
    def problem() -> Problem:
        base, _ = joint_base(list(states.values()), heldout.W, heldout.bias)
        return make_problem(base, head, heldout.W, home[number])

    out = []
    with tqdm(total=draws, desc=f"permuted users, {head.name}", disable=not progress) as bar:
        for start in range(0, draws, CHUNK):
            some = deals[start : start + CHUNK]

            def fit(some: list[Tensor] = some) -> Float[Tensor, "deals users D"]:
                fits = []
                for deal in some:
                    mixed = deal[number].to(problem().owner.device)
                    n = torch.bincount(mixed, minlength=len(states))
                    fits.append(adam_thetas(replace(problem(), owner=mixed, n=n), cfg))
                    bar.update()
                return torch.stack(fits)

            params = about | {"deals": [deal.tolist() for deal in some]}
            out.append(
                _kept(folder, f"permuted_{head.name}_{seed}_{start:04d}", params, head.name, head, heldout, cfg, fit)
            )
            bar.update(start + len(some) - bar.n)  # those that were kept
    return torch.cat(out)


def _hashes(states: Iterable[States]) -> list[str]:
    return [content_hash(s.h, s.y, s.text) for s in states]


def adam_thetas(problem: Problem, cfg: FitConfig) -> Float[Tensor, "users D"]:
    """Adam's thetas of all users of a problem."""
    return torch.stack([fit.theta for fit in fit_adam(problem, cfg)])


def _kept(
    folder: Path | None, file: str, params: dict, name: str, head: Head, heldout: Heldout, cfg: FitConfig, fit: Callable
) -> Tensor:
    """Thetas that `fit` makes, kept in `folder` under a key of `params`, unembedding, head, config and code."""
    if folder is None:
        return fit()
    about = {"unembedding": content_hash(heldout.W, heldout.bias), "config": asdict(cfg)}
    code = code_key(
        "ws.theta.controls.adam_thetas", "ws.theta.fit.make_problem", "ws.theta.states.joint_base", type(head)
    )
    key = stage_key({**about, **params, "head": head_identity(name, head)}, sources=code)

    def write(path: Path) -> None:
        save_file({"theta": fit().contiguous()}, path)

    return kept(folder / f"{file}.safetensors", key, write, lambda path: read_safetensors(path)[0]["theta"])
