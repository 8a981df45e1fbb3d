"""The verdict on theta heads, computed from one run: which head, is the gain the user's, does gating beat a bias.

Heads are compared at a matched scale on the same held-out texts, so their gains are paired; intervals resample the texts
within each user (a percentile bootstrap). The control deals the training texts to random users and fits again:
`p = (1 + #{deals that gain as much}) / (1 + N)`. docs/method.md section 10.
"""

from pathlib import Path

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.cache.files import write_text
from ws.theta.compare import Heldout, bootstrap_users, by_user, permuted_thetas, score_own
from ws.theta.fit import FitConfig
from ws.theta.fitted import ThetaFits
from ws.theta.heads import Head
from ws.theta.states import States

PAIRS = (("cvh", "unconditional"), ("svd_cvh", "svd_unconditional"))
SAME = 1e-4  # nats: two heads whose gains differ by less on every held-out text are one function


def controls(
    train: dict[str, States], found: ThetaFits, heads: list[str], draws: int, seed: int
) -> dict[str, dict[str, Tensor]]:
    """Per head: gains of each held-out text under the own and the permuted thetas (`control_gains`), both by Adam."""
    held, cfg, out = found.heldout, found.config, {}
    for name in heads:
        head = found.heads[name]
        permuted = permuted_thetas(train, head, held.W, held.bias, cfg, draws, seed)
        out[name] = control_gains(held, head, cfg, found.stacked(name), permuted)
    return out


def control_gains(
    heldout: Heldout, head: Head, cfg: FitConfig, own: Float[Tensor, "users D"], permuted: list[Tensor]
) -> dict[str, Tensor]:
    """Gains of each held-out text: `own` theta `(texts,)`, each permuted theta `(draws, texts)`."""
    mine = heldout.ce0 - score_own(heldout, head, own, cfg).ce[0]
    control = torch.stack([heldout.ce0 - score_own(heldout, head, thetas, cfg).ce[0] for thetas in permuted])
    return {"own": mine, "permuted": control}


def control_table(heldout: Heldout, controls: dict[str, dict[str, Tensor]], draws: int, seed: int) -> pl.DataFrame:
    """Per head: own gain, mean permuted gain, their difference with a 95 % interval over texts, and the permutation p.

    `p = (1 + #{permuted mean gain >= own}) / (1 + N)`: N permutations cannot give less than 1 / (1 + N).
    """
    rows = []
    for name, gain in controls.items():
        mine, control = by_user(heldout, gain["own"]).mean(), by_user(heldout, gain["permuted"]).mean(dim=1)
        excess, low, high = bootstrap_users(heldout, gain["own"] - gain["permuted"].mean(0), draws, seed)
        p = (1 + int((control >= mine).sum())) / (1 + len(control))
        rows.append(
            {"head": name, "own_gain": float(mine), "permuted_gain": float(control.mean()),
             "largest_permuted": float(control.max()), "excess": excess, "low": low, "high": high, "p": p}
        )  # fmt: skip
    return pl.DataFrame(rows)


def compare_gains(
    heldout: Heldout,
    gain: dict[str, Float[Tensor, " texts"]],
    pairs: list[tuple[str, str]],
    draws: int,
    seed: int,
    level: float,
) -> pl.DataFrame:
    """Paired difference of held-out gains for pairs of heads, mean over users, with an interval over held-out texts."""
    rows = []
    for a, b in pairs:
        mean, low, high = bootstrap_users(heldout, gain[a] - gain[b], draws, seed, level)
        rows.append({"head": a, "against": b, "difference": mean, "low": low, "high": high, "level": level})
    return pl.DataFrame(rows)


def verdict(
    heldout: Heldout,
    gain: dict[str, dict[str, Float[Tensor, " texts"]]],
    control: pl.DataFrame,
    diagonals: pl.DataFrame,
    draws: int,
    seed: int,
) -> str:
    """The verdict in Markdown. `gain[solver][head]`: held-out gain of each text at the matched scale."""
    of = gain["adam"]
    mean = {name: float(by_user(heldout, g.double()).mean()) for name, g in of.items()}
    best = max(mean, key=mean.get)
    twins = [n for n in of if n != best and float((of[n] - of[best]).abs().max()) < SAME]
    rivals = [n for n in of if n != best and n not in twins]
    level = 1 - 0.05 / len(rivals)
    against = compare_gains(heldout, of, [(best, r) for r in rivals], draws, seed, level)
    close = against.filter(pl.col("low") <= 0)["against"].to_list()
    same = f" (and {', '.join(twins)}: the same function of h)" if twins else ""
    gains = f"{mean[best]:+.4f} nats per token."
    lines = [f"**Which head.** `{best}`{same} gains most on held-out texts at the matched scale: {gains}"]
    paired = "(paired over held-out texts, Bonferroni)."
    if mean[best] <= 0:
        lines = [f"**Which head.** None: at the matched scale the best, `{best}`, gains {gains}"]
    elif close:
        lines.append(f"It cannot be told apart from {', '.join(f'`{c}`' for c in close)} {paired}")
    else:
        lines.append(f"It beats each of the {len(rivals)} others {paired}")
    for row in control.iter_rows(named=True):
        real = row["low"] > 0 and row["p"] <= 0.05
        word = "is the users' own" if real else "is **not** shown to be the users' own"
        lines.append(
            f"**Is it real, `{row['head']}`.** The gain {word}: {row['own_gain']:+.4f} against"
            f" {row['permuted_gain']:+.4f} with permuted users; excess"
            f" {row['excess']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}], p = {row['p']:.3g}."
        )
    for solver, label in (("adam", "Adam"), ("optimum", "the free optimum")):
        for row in compare_gains(heldout, gain[solver], list(PAIRS), draws, seed, 0.95).iter_rows(named=True):
            said = "beats" if row["low"] > 0 else "loses to" if row["high"] < 0 else "cannot be told apart from"
            lines.append(
                f"**Gating against bias, {label}.** `{row['head']}` {said} `{row['against']}`:"
                f" {row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}] nats per token."
            )
    for (scale,), part in diagonals.group_by("scale", maintain_order=True):
        counts = "; ".join(
            f"`{r['head']}` {r['own_theta_wins']} of {r['users']}" + (f" (not {r['not_for']})" if r["not_for"] else "")
            for r in part.iter_rows(named=True)
        )
        lines.append(f"**Whose theta, {scale} scale.** Users on whose texts their own theta is the best: {counts}.")
    return "\n".join(f"- {line}" for line in lines)


def write_conclusion(text: str, path: Path) -> Path:
    """The verdict as a Markdown file."""
    return write_text(path, f"# Theta fit\n\n{text}\n")
