"""The smallest part of w that keeps a share of its effect. (docs/use.md)

    share = effect(part) / effect(w)        effect: log-ratio at alpha +1 minus at -1, nats, mean over claims and wordings

A greedy search on claims of training topics (FIT): from all of w, each step takes one of the moves that make it smaller (a
role less, the first or last layer less, half the rank) and still keep the share, the one whose part has the least KL to the
base model. Monotony is assumed: a move that once kept too little is not tried again. The end is judged on held-out claims
(EVAL)."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float
from scipy import stats

from ws.cache.names import cache_folder
from ws.data import Behavior, load_behavior
from ws.diff import LowRank, WeightDiff, load_diff
from ws.model.decoder import ROLES
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.model.text import chat_text
from ws.show.bars import tqdm
from ws.show.tables import as_text
from ws.steer.answers import check_words, kept_answers
from ws.steer.effect import LEVEL, asked, effects
from ws.steer.kl import kl_from_base
from ws.steer.statements import MOST_ASKED
from ws.steer.weights import check_fits
from ws.use.restrict import parameters, share_of, spans, truncated

FIT_WORDINGS = 2


@dataclass(frozen=True)
class State:
    """A part of w: its roles, its layers (a range), the largest rank of a matrix."""

    roles: tuple[str, ...]
    layers: tuple[int, ...]
    rank: int

    def moves(self) -> dict[tuple[str, object], "State"]:
        """What is one step smaller, by what is taken away."""
        found: dict[tuple[str, object], State] = {}
        if len(self.roles) > 1:
            for role in self.roles:
                found["role", role] = replace(self, roles=tuple(r for r in self.roles if r != role))
        if len(self.layers) > 1:
            found["layer", self.layers[0]] = replace(self, layers=self.layers[1:])
            found["layer", self.layers[-1]] = replace(self, layers=self.layers[:-1])
        if self.rank > 1:
            found["rank", self.rank // 2] = replace(self, rank=self.rank // 2)
        return found

    def options(self) -> str:
        """The part as options of `ws export`."""
        return f"--roles {','.join(self.roles)} --layers {spans(self.layers).replace(', ', ',')} --rank {self.rank}"


@dataclass(frozen=True, eq=False)
class Trimmed:
    """w: the part that was found. state: which; None where nothing smaller keeps the share. path: every part that was tried,
    on FIT: step, move, roles, layers, rank, effect, share, kl (NaN where the share is not kept), parameters, taken. report: w
    and the part on EVAL. asked: the share."""

    w: WeightDiff
    state: State | None
    path: pl.DataFrame
    report: pl.DataFrame
    asked: float

    def text(self) -> str:
        """The path, the report and what they say, in words (Markdown)."""
        said = [f"On training topics (FIT), {len(self.path)} parts tried:", as_text(self.path.drop("taken"))]
        if self.state is None:
            less = self.path.filter(pl.col("step") > 0).sort("share", descending=True).head(1).to_dicts()
            close = (
                "".join(f"the nearest ({row['move']}) keeps {row['share']:.1%}" for row in less)
                or "it is one direction"
            )
            said.append(
                f"**No smaller part of w keeps {self.asked:.1%} of its effect**: {close}. Ask for less, or use all of w."
            )
            return "\n\n".join(said) + "\n"
        said += ["On held-out topics (EVAL):", as_text(self.report)]
        whole, part = self.report.rows(named=True)
        held = "kept" if part["share"] >= self.asked else "**not kept: the search fitted the training topics**"
        numbers, kl = (part[key] / max(whole[key], 1e-300) for key in ("parameters", "kl"))
        said.append(
            f"{self.asked:.1%} of the effect was asked for; on held-out topics {part['share']:.1%} are left ({held}), with"
            f" {numbers:.1%} of the numbers and {kl:.1%} of the KL."
        )
        return "\n\n".join(said) + "\n"


def trim(
    lm: LM,
    w: WeightDiff | Path | str,
    behavior: Behavior | Path | str = "sycophancy",
    share: float = 0.9,
    *,
    cache: Path | None = None,
    progress: bool = True,
) -> Trimmed:
    """Search for the smallest part of w that keeps `share` of its effect. Passes are kept in `cache` (default: the model's).
    ValueError for a share outside (0, 1], fewer than two training topics, matrices of no role, and a w without effect."""
    behavior = behavior if isinstance(behavior, Behavior) else load_behavior(behavior)
    w, cache = load_diff(w), cache or cache_folder(lm.name)
    if not 0 < share <= 1:
        raise ValueError(f"--keep-behaviour {share:g}: must be above 0, at most 1")
    check_plain(lm.model)
    check_fits(lm.model, w)
    check_words(lm, behavior)
    roles = {lm.decoder.param_name(l, role): role for l in range(lm.decoder.n_layers) for role in ROLES}
    if odd := [name for name in w if name not in roles]:
        raise ValueError(f"{odd[0]}: is no q, k, v, o, gate, up or down matrix; trim a w of these alone")
    fit = _Fit(lm, behavior, cache)
    whole = fit.effects(w)
    low, high = _interval(whole)
    if not (low > 0 or high < 0):
        span = f"{whole.mean():+.3g} nats, 95 % t interval {low:+.3g} to {high:+.3g} over {len(whole)} claims"
        raise ValueError(f"w has no effect to keep on the training topics of {behavior.name}: {span}")
    given, w = w, truncated(w)
    found = {roles[name] for name in w}
    start = State(tuple(r for r in ROLES if r in found), tuple(w.layers()), max(w.rank(name) for name in w))
    state, path = _search(lm, w, start, fit, float(whole.mean()), share, progress)
    last = _part(lm, w, state)
    done = state if state != start else None
    claims, _ = asked(behavior)
    kl = kl_from_base(lm, [chat_text(lm.tokenizer, behavior.probe_text(claim)) for claim in claims])
    report, before = [], 1.0
    for name, one in (("w", w), ("trimmed", last))[: 2 if done else 1]:
        each = effects(lm, behavior, one, len(behavior.templates), cache)
        before = before if report else float(each.mean())
        ends = dict(zip(("effect_low", "effect_high"), _interval(each), strict=True))
        rank = max(one.rank(name) for name in one)
        row = {
            "w": name,
            "effect": float(each.mean()),
            **ends,
            "share": float(each.mean()) / before,
            "kl": both(kl, one),
        }
        report.append(
            row | {"rank": rank, "matrices": len(one), "parameters": parameters(one), "energy": share_of(one, w)}
        )
    last = replace(last, meta={**w.meta, "part": state.options()}) if done else given
    return Trimmed(last, done, path, pl.DataFrame(report), share)


@dataclass(frozen=True)
class _Fit:
    """What is asked on training topics: each claim in the first wordings."""

    lm: LM
    behavior: Behavior
    cache: Path | None

    def claims(self) -> tuple[list[str], Float[np.ndarray, " n"]]:
        b = self.behavior
        claims = [topic.claim for topic in b.train_topics][:MOST_ASKED]
        if len(claims) < 2:
            raise ValueError(f"{b.name}: has {len(claims)} training topic, two are needed to search on")
        return claims, np.array(
            [1.0 if not b.answers or a in b.yes else -1.0 for a in (b.answers or claims)[: len(claims)]]
        )

    def effects(self, w: WeightDiff) -> Float[np.ndarray, " n"]:
        claims, sides = self.claims()
        wordings = min(FIT_WORDINGS, len(self.behavior.templates))
        texts = [self.behavior.probe_text(claim, a) for a in range(wordings) for claim in claims]
        up, down = (kept_answers(self.lm, self.behavior, texts, w, alpha, self.cache)[0] for alpha in (1.0, -1.0))
        return (up - down).reshape(wordings, -1).mean(axis=0) * sides

    def texts(self) -> list[str]:
        return [chat_text(self.lm.tokenizer, self.behavior.probe_text(claim)) for claim in self.claims()[0]]


def _search(
    lm: LM, w: WeightDiff, start: State, fit: _Fit, whole: float, share: float, progress: bool
) -> tuple[State, pl.DataFrame]:
    """The last state that keeps the share, and every state that was tried."""
    kl = kl_from_base(lm, fit.texts())
    first = {"step": 0, "move": "all of w", **_shown(start), "effect": whole, "share": 1.0, "kl": both(kl, w)}
    rows, state, failed = [first | {"parameters": parameters(w), "taken": True}], start, set()
    least = 0  # the largest rank that kept too little
    bar = tqdm(desc="parts of w", disable=not progress)

    def tried(step: int, move: tuple[str, object], to: State) -> dict:
        part = _part(lm, w, to)
        effect = float(fit.effects(part).mean())
        left = effect / whole
        told = f"rank {move[1]}" if move[0] == "rank" else f"without {'layer ' * (move[0] == 'layer')}{move[1]}"
        row = {"step": step, "move": told, **_shown(to), "effect": effect, "share": left}
        row |= {"kl": both(kl, part) if left >= share else float("nan"), "parameters": parameters(part), "taken": False}
        rows.append(row)
        bar.update()
        bar.set_postfix_str(f"step {step}, {row['parameters']:,} numbers")
        return row

    with bar:
        for step in range(1, 1000):
            kept = {}
            for move, to in state.moves().items():
                if move in failed or (move[0] == "rank" and to.rank <= least) or not len(_part(lm, w, to)):
                    continue
                row = tried(step, move, to)
                if row["share"] >= share:
                    kept[move] = (row, to)
                else:
                    failed.add(move)
                    least = to.rank if move[0] == "rank" else least
            if not kept:
                break
            row, state = min(kept.values(), key=lambda one: one[0]["kl"])
            row["taken"] = True
        low, high = least, state.rank  # half the rank keeps too little, or is 0
        while high - low > 1:
            middle = replace(state, rank=(low + high) // 2)
            row = tried(step, ("rank", middle.rank), middle)
            if row["share"] >= share:
                high, state, row["taken"] = middle.rank, middle, True
            else:
                low = middle.rank
    return state, pl.DataFrame(rows, infer_schema_length=None)


def _shown(state: State) -> dict:
    return {"roles": ",".join(state.roles), "layers": spans(state.layers), "rank": state.rank}


def _part(lm: LM, w: WeightDiff, state: State) -> WeightDiff:
    """A state's part of w, whose factors are in the order of their singular values (`truncated`)."""
    names = {lm.decoder.param_name(l, role) for l in state.layers for role in state.roles}
    cut = w.select(names.__contains__)
    return cut.map(lambda _, e: LowRank(e.B[:, : state.rank].contiguous(), e.A[: state.rank].contiguous()))


def both(kl, w: WeightDiff) -> float:
    """Mean KL to the base model at alpha -1 and +1, nats per token."""
    return (kl(w, 1.0) + kl(w, -1.0)) / 2


def _interval(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """The 95 % t interval of the mean over claims."""
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half
