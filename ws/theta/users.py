"""Many users in one go: fits that can be interrupted, one file per user and head.

Users are fitted together, each with its own theta, on base logits computed once for all heads (`ws.theta.fit`). A file
is kept under a key of states, head, config and the code that fits, so that a run that was stopped goes on where it was.
docs/method.md section 10.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ws.cache.keys import Key, stage_key
from ws.cache.made import made, state
from ws.cache.names import slug
from ws.cache.sources import code_key
from ws.show.bars import tqdm
from ws.theta.adam import adam
from ws.theta.fit import Fit, FitConfig, Problem
from ws.theta.heads import Head
from ws.theta.optimum import Optimum, fit_optimum, hessian
from ws.theta.recorded import Recorded, content_hash


@dataclass(frozen=True, eq=False)
class UserFit:
    """One user's fit of one head: Adam's result, the free optimum, and the optimum within `|theta| <= theta_clip`."""

    user: str
    head: str
    alpha: float
    adam: Fit
    optimum: Optimum
    clipped: Optimum

    def theta(self, solver: str = "adam") -> Float[Tensor, " D"]:
        """Theta by `adam`, `optimum` or `clipped`, float32."""
        return self.adam.theta.float() if solver == "adam" else getattr(self, solver).theta.float()


def theta_path(folder: Path, user: str, head: str) -> Path:
    """`theta_<user>_<head>.safetensors`, with the user's name as files have it."""
    return folder / f"theta_{slug(user)}_{head}.safetensors"


def save_fit(fit: UserFit, path: Path, cfg: FitConfig) -> None:
    """One file per user and head: thetas, trace, and everything else as JSON in the header. The header has one entry:
    safetensors writes several in random order, and the same fit must give the same bytes."""
    tensors = {"theta": fit.adam.theta, "theta_optimum": fit.optimum.theta, "theta_clipped": fit.clipped.theta}
    tensors |= {f"trace/{name}": values for name, values in fit.adam.trace.items()}
    about = {"user": fit.user, "head": fit.head, "alpha": fit.alpha, "config": asdict(cfg)}
    for name in ("optimum", "clipped"):
        about[name] = {k: v for k, v in vars(getattr(fit, name)).items() if k != "theta"}
    save_file({k: v.clone() for k, v in tensors.items()}, path, {"about": json.dumps(about)})


def load_fit(path: Path) -> UserFit:
    """A fit as `save_fit` wrote it. Raises ValueError when the file is another one."""
    with safe_open(path, "pt") as file:
        meta = file.metadata() or {}
        if "about" not in meta:
            raise ValueError(f"{path}: not a theta file (no record of its fit in the header)")
        about, tensors = json.loads(meta["about"]), {name: file.get_tensor(name) for name in file.keys()}
    trace = {name.removeprefix("trace/"): v for name, v in tensors.items() if name.startswith("trace/")}
    return UserFit(
        about["user"], about["head"], about["alpha"], Fit(tensors["theta"], trace),
        Optimum(theta=tensors["theta_optimum"], **about["optimum"]),
        Optimum(theta=tensors["theta_clipped"], **about["clipped"]),
    )  # fmt: skip


def head_identity(name: str, head: Head) -> list:
    """What a key holds of a head beside its code: name, alpha, content of its matrices."""
    return [name, head.alpha, content_hash(*(v for v in vars(head).values() if isinstance(v, Tensor)))]


def _keys(train: Recorded, heads: dict[str, Head], cfg: FitConfig) -> dict[tuple[str, str], Key]:
    """Key of every fit: all tensors that enter it, by content, and the code of the fit and of its head."""
    common = {"unembedding": train.unembedding, "config": asdict(cfg), "expanded": train.large}
    mine = {user: content_hash(s.h, s.y) for user, s in train.states.items()}
    keys = {}
    for name, head in heads.items():
        about = head_identity(name, head)
        code = code_key("ws.theta.users.fit_group", "ws.theta.users.save_fit", Recorded, type(head))
        keys |= {(u, name): stage_key({**common, "states": h, "head": about}, sources=code) for u, h in mine.items()}
    return keys


def fit_users(
    train: Recorded, heads: dict[str, Head], cfg: FitConfig, folder: Path, progress: bool = True
) -> dict[tuple[str, str], UserFit]:
    """Every head for every user: `{(user, head): UserFit}`; a file each under `folder`, written as soon as it is known.
    Users are fitted together. A file made from the same states, head and config by the same code is read instead of made
    again; two heads that are the same function of h are fitted once. Raises ValueError when two users' files would have one
    name."""
    users = list(train.states)
    owners = {theta_path(folder, user, ""): user for user in users}
    for user in users:
        if (other := owners[theta_path(folder, user, "")]) != user:
            raise ValueError(f"users {user!r} and {other!r} would share a file; rename one")
    keys = _keys(train, heads, cfg)
    late = {pair for pair in keys if state(theta_path(folder, *pair), keys[pair]) != "done"}
    same: dict[tuple, list[UserFit]] = {}
    with tqdm(total=len(keys), initial=len(keys) - len(late), desc="theta fits", disable=not progress) as bar:
        for name, head in heads.items():
            if not any((user, name) in late for user in users):
                continue
            problem = train.problem(head)
            function = content_hash(problem.phi, problem.C), head.alpha
            if function not in same:  # all users, whoever is late: the last digits depend on who is fitted together
                same[function] = fit_group(train, problem, cfg)
            for user, fit in zip(users, same[function], strict=True):
                if (user, name) in late:
                    path, fit = theta_path(folder, user, name), replace(fit, user=user, head=name)
                    made(path, keys[user, name], lambda target, fit=fit: save_fit(fit, target, cfg))
                    bar.update()
    return {pair: load_fit(theta_path(folder, *pair)) for pair in keys}


def fit_group(train: Recorded, problem: Problem, cfg: FitConfig) -> list[UserFit]:
    """Adam, the free and the clipped optimum of one head for all users, whose names stand in the order of `train`."""
    (fits, problem), exact, start = adam(problem, cfg), train.exact(problem), None
    if problem.quick is None:
        zero = exact.phi.new_zeros(exact.users, exact.D)
        start = torch.stack([hessian(exact, zero, cfg, u, torch.float32) for u in range(exact.users)])
    free = fit_optimum(problem, cfg, first=start, exact=exact)
    within = all(float(best.theta.norm()) <= cfg.theta_clip for best in free)  # then the bound binds nobody
    clipped = free if within else fit_optimum(problem, cfg, cfg.theta_clip, start, exact)
    return [UserFit("", problem.name, problem.alpha, *found) for found in zip(fits, free, clipped, strict=True)]
