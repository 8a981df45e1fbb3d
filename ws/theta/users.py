"""Many users in one go: fits that can be interrupted, one file per user and head.

Users are fitted together, each with its own theta, on base logits computed once for all heads (`ws/theta.py`). A file
is whole or absent, and carries a key over states, head and config, so that a run that was stopped goes on where it was.
docs/method.md section 10.
"""

import json
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ws.cache.files import atomic_file
from ws.theta.fit import BASE_MB, Base, Fit, FitConfig, fit_adam, make_problem, record_base
from ws.theta.heads import Head
from ws.theta.optimum import Optimum, as_float64, fit_optimum, hessians_at_zero
from ws.theta.states import States


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


# ---- files -------------------------------------------------------------------------------------------------------


def theta_path(folder: Path, user: str, head: str) -> Path:
    """`theta_<user>_<head>.safetensors`; what a file name cannot hold becomes `_`."""
    return folder / f"theta_{re.sub(r'[^A-Za-z0-9.-]', '_', user)}_{head}.safetensors"


def save_fit(fit: UserFit, path: Path, key: str, cfg: FitConfig) -> None:
    """One file per user and head: thetas, trace, and everything else as JSON in the header.

    The header has one entry: safetensors writes several in random order, and the same fit must give the same bytes.
    """
    tensors = {"theta": fit.adam.theta, "theta_optimum": fit.optimum.theta, "theta_clipped": fit.clipped.theta}
    tensors |= {f"trace/{name}": values for name, values in fit.adam.trace.items()}
    about = {"key": key, "user": fit.user, "head": fit.head, "alpha": fit.alpha, "config": asdict(cfg)}
    for name in ("optimum", "clipped"):
        about[name] = {k: v for k, v in vars(getattr(fit, name)).items() if k != "theta"}
    with atomic_file(path) as tmp:
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp, {"about": json.dumps(about)})


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


def _crc(*parts: object) -> int:
    crc = 0
    for part in parts:
        data = (
            part.detach().cpu().contiguous().view(torch.uint8).numpy()
            if isinstance(part, Tensor)
            else repr(part).encode()
        )
        crc = zlib.crc32(data, crc)
    return crc


def _is_done(path: Path, key: str) -> bool:
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get("about", "{}")
    return json.loads(about).get("key") == key


# ---- fitting -----------------------------------------------------------------------------------------------------


def fit_users(
    states: dict[str, States],
    heads: dict[str, Head],
    W: Float[Tensor, "V d"],
    bias: Tensor | None,
    cfg: FitConfig,
    folder: Path,
    max_mb: int = BASE_MB,
    progress: bool = True,
) -> dict[tuple[str, str], UserFit]:
    """Every head for every user: `{(user, head): UserFit}`; a file each under `folder`, written as soon as it is known.

    Users are fitted together as long as their base logits take at most `max_mb`, which are computed once for all heads.
    A file made from the same states, head and config is read instead of made again, so an interrupted run goes on where
    it was. (The last digits of a theta depend on who was fitted together.) Raises ValueError when two users' files
    would have one name.
    """
    names = {theta_path(folder, user, "").name: user for user in states}
    if len(names) < len(states):
        clash = next(u for u in states if names[theta_path(folder, u, "").name] != u)
        raise ValueError(
            f"users {clash!r} and {names[theta_path(folder, clash, '').name]!r} would share a file; rename one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    common = _crc(W, bias, cfg)
    head_keys = {
        name: _crc(common, head.alpha, *[v for v in vars(head).values() if isinstance(v, Tensor)])
        for name, head in heads.items()
    }
    user_keys = {user: _crc(s.h, s.y) for user, s in states.items()}
    key = {(u, n): f"{user_keys[u]:08x}{head_keys[n]:08x}" for u in states for n in heads}
    todo = [u for u in states if not all(_is_done(theta_path(folder, u, n), key[u, n]) for n in heads)]
    with tqdm(total=len(states) * len(heads), desc="theta fits", disable=not progress) as bar:
        bar.update((len(states) - len(todo)) * len(heads))
        for group in _groups(todo, states, W.shape[0], max_mb):
            base, owner = joint_base([states[u] for u in group], W, bias, max_mb)
            for name, head in heads.items():
                if all(_is_done(theta_path(folder, u, name), key[u, name]) for u in group):
                    bar.update(len(group))
                    continue
                problem = make_problem(base, head, W, owner)
                adam = fit_adam(problem, cfg)
                exact = as_float64(problem)
                start = hessians_at_zero(exact, cfg)
                free, clipped = fit_optimum(exact, cfg, first=start), fit_optimum(exact, cfg, cfg.theta_clip, start)
                for i, user in enumerate(group):
                    if not _is_done(theta_path(folder, user, name), key[user, name]):
                        fit = UserFit(user, name, head.alpha, adam[i], free[i], clipped[i])
                        save_fit(fit, theta_path(folder, user, name), key[user, name], cfg)
                bar.update(len(group))
    return {(u, n): load_fit(theta_path(folder, u, n)) for u in states for n in heads}


def _groups(users: list[str], states: dict[str, States], V: int, max_mb: int) -> list[list[str]]:
    groups: list[list[str]] = []
    size = 0.0
    for user in users:
        more = len(states[user].y) * V * 4 / 2**20
        if not groups or size + more > max_mb:
            groups.append([])
            size = 0.0
        groups[-1].append(user)
        size += more
    return groups


def joint_base(
    states: list[States], W: Float[Tensor, "V d"], bias: Tensor | None, max_mb: int = BASE_MB
) -> tuple[Base, Int[Tensor, " T"]]:
    """Base logits of several records side by side, and which record each token is of."""
    owner = torch.repeat_interleave(torch.arange(len(states)), torch.tensor([len(s.y) for s in states]))
    return record_base(torch.cat([s.h for s in states]), torch.cat([s.y for s in states]), W, bias, max_mb), owner
