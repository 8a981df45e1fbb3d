"""Many users in one go: fits that can be interrupted, one file per user and head.

Users are fitted together, each with its own theta, on base logits computed once for all heads (`ws.theta.fit`). A file
is kept under a key of states, head, config and the code that fits, so that a run that was stopped goes on where it was.
docs/method.md section 10.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ws.cache.keys import Key, stage_key
from ws.cache.made import made, state
from ws.cache.names import slug
from ws.cache.sources import code_key
from ws.show.bars import tqdm
from ws.theta.fit import BASE_MB, Base, Fit, FitConfig, fit_adam, make_problem
from ws.theta.heads import Head
from ws.theta.optimum import Optimum, as_float64, fit_optimum, hessian
from ws.theta.states import States, joint_base


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
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"about": json.dumps(about)})


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


def content_hash(*parts: Tensor | None) -> str:
    """Content of tensors."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if part is not None:
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def head_identity(name: str, head: Head) -> list:
    """What a key holds of a head beside its code: name, alpha, content of its matrices."""
    return [name, head.alpha, content_hash(*(v for v in vars(head).values() if isinstance(v, Tensor)))]


def _keys(
    states: dict[str, States], heads: dict[str, Head], W: Tensor, bias: Tensor | None, cfg: FitConfig
) -> dict[tuple[str, str], Key]:
    """Key of every fit: all tensors that enter it, by content, and the code of the fit and of its head."""
    common = {"unembedding": content_hash(W, bias), "config": asdict(cfg)}
    mine = {user: content_hash(s.h, s.y) for user, s in states.items()}
    keys = {}
    for name, head in heads.items():
        about = head_identity(name, head)
        code = code_key("ws.theta.users.fit_group", "ws.theta.users.save_fit", "ws.theta.states.joint_base", type(head))
        keys |= {(u, name): stage_key({**common, "states": h, "head": about}, sources=code) for u, h in mine.items()}
    return keys


def fit_users(
    states: dict[str, States],
    heads: dict[str, Head],
    W: Float[Tensor, "V d"],
    bias: Tensor | None,
    cfg: FitConfig,
    folder: Path,
    progress: bool = True,
) -> dict[tuple[str, str], UserFit]:
    """Every head for every user: `{(user, head): UserFit}`; a file each under `folder`, written as soon as it is known.
    Users are fitted together as long as their base logits, computed once for all heads, take at most BASE_MB. A file
    made from the same states, head and config by the same code is read instead of made again. Raises ValueError when
    two users' files would have one name."""
    owners = {theta_path(folder, user, ""): user for user in states}
    for user in states:
        if (other := owners[theta_path(folder, user, "")]) != user:
            raise ValueError(f"users {user!r} and {other!r} would share a file; rename one")
    keys = _keys(states, heads, W, bias, cfg)
    late = {pair for pair in keys if state(theta_path(folder, *pair), keys[pair]) != "done"}
    with tqdm(total=len(keys), initial=len(keys) - len(late), desc="theta fits", disable=not progress) as bar:
        for group in _groups(states, W.shape[0]):
            todo = [name for name in heads if any((user, name) in late for user in group)]
            base = joint_base([states[u] for u in group], W, bias) if todo else None
            for name in todo:
                # the whole group again: the last digits depend on who is fitted together
                for fit in fit_group(*base, W, name, heads[name], group, cfg):
                    if (fit.user, name) in late:
                        path = theta_path(folder, fit.user, name)
                        made(path, keys[fit.user, name], lambda target, fit=fit: save_fit(fit, target, cfg))
                        bar.update()
    return {pair: load_fit(theta_path(folder, *pair)) for pair in keys}


def fit_group(
    base: Base, owner: Int[Tensor, " T"], W: Tensor, name: str, head: Head, users: list[str], cfg: FitConfig
) -> list[UserFit]:
    """Adam, the free and the clipped optimum of one head for users whose tokens stand in one base."""
    problem = make_problem(base, head, W, owner)
    adam, exact = fit_adam(problem, cfg), as_float64(problem)
    zero = exact.phi.new_zeros(exact.users, exact.D)
    start = torch.stack([hessian(exact, zero, cfg, u, torch.float32) for u in range(exact.users)])
    free, clipped = fit_optimum(exact, cfg, first=start), fit_optimum(exact, cfg, cfg.theta_clip, start)
    return [UserFit(u, name, head.alpha, *fits) for u, *fits in zip(users, adam, free, clipped, strict=True)]


def _groups(states: dict[str, States], V: int) -> list[list[str]]:
    groups: list[list[str]] = []
    for user in states:
        together = sum(len(states[u].y) for u in groups[-1]) + len(states[user].y) if groups else 0
        if groups and together * V * 4 <= BASE_MB * 2**20:
            groups[-1].append(user)
        else:
            groups.append([user])
    return groups
