"""The verdict on theta heads, computed from one run: is the gain the user's, which head, does gating beat a bias.

Heads are compared at a matched scale on the same held-out texts, so their gains are paired; intervals are t intervals over
the texts of each user (`ws.theta.intervals`), given the fits. The head in question was chosen on training texts
(`ws.theta.controls`), so nothing here is corrected for the choice: that it beats *each* other head is claimed where every
one of the differences' 95 % intervals lies above 0, which is true of no more than 5 % of the heads that do not (Berger
1982). The control deals the training texts to random users: `p = (1 + #{deals that gain as much}) / (1 + N)`.
docs/method.md section 10.
"""

from pathlib import Path

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.show.tables import literal
from ws.theta.compare import Heldout, by_user, mean_interval, score, score_near
from ws.theta.controls import Choice, permuted_thetas
from ws.theta.fit import FitConfig
from ws.theta.fitted import ThetaFits
from ws.theta.heads import Head
from ws.theta.recorded import Recorded

PAIRS = (("cvh", "unconditional"), ("svd_cvh", "svd_unconditional"))
SAME = 1e-4  # nats: two heads whose gains differ by less on every held-out text are one function
TIED = 1e-5  # nats, of gains
LEVEL = 0.05  # of p; intervals have 95 %
ENOUGH = 199  # deals; fewer give a coarse p


def controls(
    train: Recorded,
    found: ThetaFits,
    heads: list[str],
    draws: int,
    seed: int,
    folder: Path | None = None,
    progress: bool = False,
) -> dict[str, Float[Tensor, "rows texts"]]:
    """Per head: `control_gains` of the users' own thetas and of `draws` permuted ones, both by Adam. folder: where the permuted
    ones are kept."""
    held, cfg, gains = found.heldout, found.config, {}
    for name in heads:
        head, own = found.heads[name], found.stacked(name)
        permuted = permuted_thetas(train, head, cfg, draws, seed, folder, progress, own_too=train.large)
        if train.large:  # by an expansion all are fitted alike, so that nothing but the deal tells them apart
            own, permuted = permuted[0], permuted[1:]
        gains[name] = control_gains(held, head, cfg, own, permuted)
    return gains


def control_gains(
    heldout: Heldout, head: Head, cfg: FitConfig, own: Float[Tensor, "users D"], permuted: Float[Tensor, "n users D"]
) -> Float[Tensor, "rows texts"]:
    """Gains of each held-out text: a row for the `own` thetas, then one for each draw of the permuted."""
    mine = own[heldout.user]
    ce = score(heldout, head, mine[None], cfg)[0], score_near(heldout, head, mine, permuted[:, heldout.user], cfg)
    return heldout.ce0 - torch.cat(ce)


def control_table(heldout: Heldout, controls: dict[str, Float[Tensor, "rows texts"]]) -> pl.DataFrame:
    """Per head: the excess of the own over the mean permuted gain with its 95 % interval over texts, the permutation p,
    then both gains and the largest permuted one (nats per token), and the deals N.
    `p = (1 + #{permuted mean gain >= own}) / (1 + N)`: N deals cannot give less than 1 / (1 + N). A gain within TIED of the own
    counts as equal: a deal that leaves each user's texts together is the own again, but for rounding."""
    rows = []
    for name, (own, *permuted) in controls.items():
        mine, control = by_user(heldout, own).mean(), by_user(heldout, torch.stack(permuted)).mean(dim=1)
        excess = mean_interval(heldout, own - torch.stack(permuted).mean(0))
        p = (1 + int((control >= mine - TIED).sum())) / (1 + len(control))
        ends = (excess.mean, excess.low, excess.high)
        rows.append((name, *ends, p, *map(float, (mine, control.mean(), control.max())), len(control)))
    columns = ("head", "excess", "low", "high", "p", "own_gain", "permuted_gain", "largest_permuted", "deals")
    return pl.DataFrame(rows, columns, orient="row")


def compare_gains(heldout: Heldout, gain: dict[str, Tensor], pairs: list[tuple[str, str]]) -> pl.DataFrame:
    """Paired difference of held-out gains (nats per token) for pairs of heads, mean over users, with its 95 % interval
    over held-out texts."""
    found = [(a, b, mean_interval(heldout, gain[a] - gain[b])) for a, b in pairs]
    rows = [(a, b, i.mean, i.low, i.high) for a, b, i in found]
    schema = {"head": pl.String, "against": pl.String} | dict.fromkeys(("difference", "low", "high"), pl.Float64)
    return pl.DataFrame(rows, schema, orient="row")


def verdict(
    heldout: Heldout, gain: dict[str, dict[str, Tensor]], control: pl.DataFrame, own: pl.DataFrame, choice: Choice
) -> str:
    """The verdict in Markdown. `gain[solver][head]`: held-out gain `(texts,)` at the matched scale; control:
    `control_table`; own: `diagonal`; choice: the head that was chosen on the training texts."""
    lines = _caveats(heldout)
    lines += [_the_users_own(row) for row in control.iter_rows(named=True)]
    lines += _which_head(heldout, gain["adam"], choice)
    for solver, label in (("adam", "Adam"), ("optimum", "the free optimum")):
        there = [pair for pair in PAIRS if set(pair) <= set(gain[solver])]
        for row in compare_gains(heldout, gain[solver], there).iter_rows(named=True):
            said = "beats" if row["low"] > 0 else "loses to" if row["high"] < 0 else "is not shown to differ from"
            lines.append(
                f"**Gating against bias, {label}.** `{row['head']}` {said} `{row['against']}`:"
                f" {_told(row['difference'], row['low'], row['high'])} nats per token."
            )
    for (scale,), part in own.group_by("scale", maintain_order=True):
        counts = "; ".join(
            f"`{r['head']}` {r['own_theta_wins']} of {r['users']}"
            + (f" (not {literal(r['not_for'])})" if r["not_for"] else "")
            for r in part.iter_rows(named=True)
        )
        lines.append(f"**Whose theta, {scale} scale.** Users on whose texts their own theta is the best: {counts}.")
    return "\n".join(f"- {line}" for line in lines)


def headline(heldout: Heldout, gain: dict[str, Tensor], control: pl.DataFrame, choice: Choice) -> str:
    """The verdict in a sentence or two. gain: of every head by Adam, at the matched scale."""
    row, head = control.row(0, named=True), choice.head
    real = row["low"] > 0 and row["p"] <= LEVEL
    said = (
        f"A user's own `{row['head']}` theta gains {_told(row['excess'], row['low'], row['high'])} nats per token on held-out"
        f" texts beyond thetas fitted on texts dealt to random users (p = {row['p']:.2g}, {row['deals']} deals): "
    ) + ("**this much is the user's own**." if real else "that any of it is the user's own is **not shown**.")
    rivals = [n for n in gain if n != head and float((gain[n] - gain[head]).abs().max()) >= SAME]
    against = compare_gains(heldout, gain, [(head, rival) for rival in rivals])
    won = int((against["low"] > 0).sum()) if rivals else 0
    return said + (
        f" `{head}`, chosen on the training texts, beats {won} of the {len(rivals)} other heads." if rivals else ""
    )


def _told(mean: float, low: float, high: float) -> str:
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]" if low == low else f"{mean:+.4f} [no interval]"


def _caveats(heldout: Heldout) -> list[str]:
    """What keeps every interval from being known, as a line; none where nothing does."""
    alone = mean_interval(heldout, heldout.ce0).alone
    if not alone:
        return []
    named = ", ".join(literal(heldout.users[u]) for u in alone[:3])
    more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
    return [
        f"**No interval, so nothing is shown.** One text is held out of {named}{more}, and one text has no spread: give"
        " more texts, or a larger HELDOUT."
    ]


def _the_users_own(row: dict) -> str:
    """The headline of one head: what a user's own theta gains beyond permuted ones; the gains themselves after it."""
    least = 1 / (1 + row["deals"])
    p = f"p = {row['p']:.3g} from {row['deals']} deals"
    if row["deals"] < ENOUGH:
        cannot = f", which cannot reach {LEVEL}" if least > LEVEL else ""
        p += f" (coarse: no fewer than {least:.3g}{cannot}; PERMUTATIONS {ENOUGH} gives {1 / (1 + ENOUGH):.3g})"
    real = row["low"] > 0 and row["p"] <= LEVEL
    word = "this much is the users' own" if real else "that any of the gain is the users' own is **not shown**"
    return (
        f"**Is it the user's, `{row['head']}`.** On held-out texts a user's own theta gains"
        f" {_told(row['excess'], row['low'], row['high'])} nats per token more than thetas fitted on texts dealt to"
        f" random users; {p}: {word}. The whole gain over the base is {row['own_gain']:+.4f}; with permuted users it is"
        f" {row['permuted_gain']:+.4f}, which any of the users' texts teach."
    )


def _which_head(heldout: Heldout, gain: dict[str, Tensor], choice: Choice) -> list[str]:
    """What the held-out texts say of the head that was chosen without them."""
    head, mine = choice.head, mean_interval(heldout, gain[choice.head])
    title, told = f"**Which head.** `{head}`", f"{_told(mine.mean, mine.low, mine.high)} nats per token"
    word = "gains" if mine.low > 0 else "loses" if mine.high < 0 else "is not shown to gain"
    chosen = f"{title}, chosen {choice.how}, {word} on held-out texts at the matched scale: {told}."
    if len(gain) == 1:
        return [f"{chosen} It is the only head that was fitted, so there is none to compare it with."]
    twins = [n for n in gain if n != head and float((gain[n] - gain[head]).abs().max()) < SAME]
    rivals = [n for n in gain if n != head and n not in twins]
    if not rivals:
        return [f"{chosen} All {len(gain)} heads are the same function of h here, so none is better than another."]
    lines = [chosen]
    if twins:
        lines.append(
            f"**Its twins.** {_names(twins)}: the same function of h, to {SAME:g} nats on every held-out text."
        )
    against = compare_gains(heldout, gain, [(head, rival) for rival in rivals])
    won = [r["against"] for r in against.iter_rows(named=True) if r["low"] > 0]
    lost = [r["against"] for r in against.iter_rows(named=True) if r["high"] < 0]
    open_ = [name for name in rivals if name not in won + lost]
    if len(won) == len(rivals):
        said = f"beats each of the {len(rivals)} others" if len(rivals) > 1 else f"beats {_names(rivals)}"
    else:
        parts = [("is not shown to differ from", open_), ("loses to", lost), ("beats", won)]
        said = "; ".join(f"{verb} {_names(names)}" for verb, names in parts if names)
    lines.append(f"**Against the others.** `{head}` {said} (paired over held-out texts, each at 95 %).")
    return lines


def _names(heads: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in heads)
