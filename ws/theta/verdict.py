"""The verdict on theta heads, computed from one run: which head, is the gain the user's, does gating beat a bias.

Heads are compared at a matched scale on the same held-out texts, so their gains are paired; intervals resample the texts
within each user (a percentile bootstrap). The control deals the training texts to random users and fits again:
`p = (1 + #{deals that gain as much}) / (1 + N)`. docs/method.md section 10.
"""

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.show.tables import literal
from ws.theta.compare import Heldout, bootstrap_users, by_user, permuted_thetas, score
from ws.theta.fit import FitConfig
from ws.theta.fitted import ThetaFits
from ws.theta.heads import Head
from ws.theta.states import States

PAIRS = (("cvh", "unconditional"), ("svd_cvh", "svd_unconditional"))
SAME = 1e-4  # nats: two heads whose gains differ by less on every held-out text are one function


def controls(
    train: dict[str, States], found: ThetaFits, heads: list[str], draws: int, seed: int
) -> dict[str, Float[Tensor, "rows texts"]]:
    """Per head: `control_gains` of the fitted thetas and of `draws` permuted ones, both by Adam."""
    held, cfg, of = found.heldout, found.config, {name: found.heads[name] for name in heads}
    permuted = {name: permuted_thetas(train, head, held, cfg, draws, seed) for name, head in of.items()}
    return {name: control_gains(held, head, cfg, found.stacked(name), permuted[name]) for name, head in of.items()}


def control_gains(
    heldout: Heldout, head: Head, cfg: FitConfig, own: Float[Tensor, "users D"], permuted: Float[Tensor, "n users D"]
) -> Float[Tensor, "rows texts"]:
    """Gains of each held-out text: a row for the `own` thetas, then one for each draw of the permuted."""
    return heldout.ce0 - score(heldout, head, torch.cat([own[None], permuted])[:, heldout.user], cfg)[0]


def control_table(
    heldout: Heldout, controls: dict[str, Float[Tensor, "rows texts"]], draws: int, seed: int
) -> pl.DataFrame:
    """Per head: own gain, mean permuted gain, their difference with a 95 % interval over texts, and the permutation p.
    `p = (1 + #{permuted mean gain >= own}) / (1 + N)`: N permutations cannot give less than 1 / (1 + N)."""
    rows = []
    for name, (own, *permuted) in controls.items():
        mine, control = by_user(heldout, own).mean(), by_user(heldout, torch.stack(permuted)).mean(dim=1)
        excess, low, high = bootstrap_users(heldout, own - torch.stack(permuted).mean(0), draws, seed)
        p = (1 + int((control >= mine).sum())) / (1 + len(control))
        rows.append((name, *map(float, (mine, control.mean(), control.max(), excess, low, high, p))))
    columns = ("head", "own_gain", "permuted_gain", "largest_permuted", "excess", "low", "high", "p")
    return pl.DataFrame(rows, columns, orient="row")


def compare_gains(
    heldout: Heldout, gain: dict[str, Tensor], pairs: list[tuple[str, str]], draws: int, seed: int, level: float = 0.95
) -> pl.DataFrame:
    """Paired difference of held-out gains for pairs of heads, mean over users, with an interval over held-out texts."""
    rows = [(a, b, *bootstrap_users(heldout, gain[a] - gain[b], draws, seed, level), level) for a, b in pairs]
    return pl.DataFrame(rows, ("head", "against", "difference", "low", "high", "level"), orient="row")


def verdict(
    heldout: Heldout,
    gain: dict[str, dict[str, Tensor]],
    control: pl.DataFrame,
    own: pl.DataFrame,
    draws: int,
    seed: int,
) -> str:
    """The verdict in Markdown. `gain[solver][head]`: held-out gain `(texts,)` at the matched scale; own: `diagonal`."""
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
    lines = [f"**Which head.** None: at the matched scale the best, `{best}`, gains {gains}"]
    if mean[best] > 0:
        unclear = f"cannot be told apart from {', '.join(f'`{c}`' for c in close)}"
        told = unclear if close else f"beats each of the {len(rivals)} others"
        lines = [
            f"**Which head.** `{best}`{same} gains most on held-out texts at the matched scale: {gains}",
            f"It {told} (paired over held-out texts, Bonferroni).",
        ]
    for row in control.iter_rows(named=True):
        real = row["low"] > 0 and row["p"] <= 0.05
        word = "is the users' own" if real else "is **not** shown to be the users' own"
        lines.append(
            f"**Is it real, `{row['head']}`.** The gain {word}: {row['own_gain']:+.4f} against"
            f" {row['permuted_gain']:+.4f} with permuted users; excess"
            f" {row['excess']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}], p = {row['p']:.3g}."
        )
    for solver, label in (("adam", "Adam"), ("optimum", "the free optimum")):
        for row in compare_gains(heldout, gain[solver], list(PAIRS), draws, seed).iter_rows(named=True):
            said = "beats" if row["low"] > 0 else "loses to" if row["high"] < 0 else "cannot be told apart from"
            lines.append(
                f"**Gating against bias, {label}.** `{row['head']}` {said} `{row['against']}`:"
                f" {row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}] nats per token."
            )
    for (scale,), part in own.group_by("scale", maintain_order=True):
        counts = "; ".join(
            f"`{r['head']}` {r['own_theta_wins']} of {r['users']}"
            + (f" (not {literal(r['not_for'])})" if r["not_for"] else "")
            for r in part.iter_rows(named=True)
        )
        lines.append(f"**Whose theta, {scale} scale.** Users on whose texts their own theta is the best: {counts}.")
    return "\n".join(f"- {line}" for line in lines)
