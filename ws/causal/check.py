"""`causal_check`: which part of a weight difference carries the behaviour? One seed, every candidate of its sweep.
(docs/method.md 8)"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ws.cache.syntax import digest
from ws.causal.cloud import LEAST
from ws.causal.cloud import cloud as designed
from ws.causal.controls import formed
from ws.causal.found import CausalCheck
from ws.causal.ground import Ground, check_count, prepare
from ws.causal.others import other_controls, other_layer, rank_table
from ws.causal.parts import MATCHED, READ, dose_table, matched_table, read_table, where_table
from ws.causal.retention import TIED, Carried, carried, linear_of
from ws.causal.variants import Bases, keep
from ws.causal.words import SECTIONS
from ws.data import Behavior, load_behavior
from ws.diff import WeightDiff, load_diff
from ws.explanation.result import Explanation
from ws.model.lm import LM
from ws.runs.parameters import suggest
from ws.stability.blind import haar
from ws.subspaces.candidate import race_of
from ws.subspaces.protocol import Protocol

SHUFFLES = "grad_null_"  # of these controls the first few stand for all
FEW = 3
EFFECTS = dict.fromkeys(("effect", "retention", "energy"), pl.Float64)
EMPTY = {  # of a section that is left out
    "read": dict.fromkeys(READ, pl.Float64) | {"subspace": pl.String},
    "ranks": {"of": pl.String, "whose": pl.String, "rank": pl.Int64, "linear": pl.Float64} | EFFECTS,
    "dose": {"subspace": pl.String, "saturated": pl.Boolean} | dict.fromkeys(("dose", "effect", "plus", "minus"), pl.Float64),
    "matched": {"subspace": pl.String, "saturated": pl.Boolean, "why": pl.String} | dict.fromkeys(MATCHED, pl.Float64),
    "controls": {"control": pl.String, "draws": pl.Int64} | EFFECTS | dict.fromkeys(("rank", "low", "high"), pl.Float64),
}  # fmt: skip
EACH, ENOUGH = 10, 5  # controls that are run forward for a candidate, and the fewest that say something of it
DOSED = 3  # candidates whose dose, and whose effect at one KL, is looked at
SCORES = ("mean_conc_act", "mean_conc_w_combined", "joint_score")  # of the sweep, beside what the candidates carry


def causal_check(
    lm: LM,
    w: WeightDiff | Path | str,
    sweep: Explanation | Path | str,
    behavior: Behavior | Path | str | None = None,
    *,
    other: WeightDiff | Path | str | None = None,
    other_sweep: Explanation | Path | str | None = None,
    nulls: Sequence[WeightDiff] = (),
    candidates: Sequence[str] = (),
    alpha: float = 1.0,
    ranks: Sequence[int] = (1, 2, 4, 8, 16, 32),
    draws: int = 10_000,
    checked: int = 100,
    forward: int | None = None,
    drops: int | None = None,
    cloud: int = 300,
    boot: int = 2000,
    templates: int | None = None,
    kl_target: float = 0.3,
    sections: Sequence[str] = SECTIONS,
    seed: int = 0,
    cache: Path | None = None,
    title: str = "",
    progress: bool = True,
) -> CausalCheck:
    """Everything of section 8 that one w can say. sweep: the finished sweep of this w, whose bases are used; other,
    other_sweep: w of another LoRA seed and its sweep, for the ceilings; nulls: null diffs, for the controls; candidates:
    names to look at, [] for all; ranks: of the ceilings; draws: energy-matched controls, by first-order effects; checked: how
    many of these are run forward; forward, drops: keep, and drop with full_drop, are run forward for so many candidates of
    the largest first-order effects, None for all; cloud: blind subspaces of the designed cloud, 0 for none; templates:
    wordings of the probe, None for all; kl_target: nats, of what is compared at one KL; sections: what is asked beside the
    candidates, some of SECTIONS. Effects by forward passes are kept in `cache`, so that a killed check goes on. ValueError
    for a sweep of another w or model, an unknown candidate, and what `ws.causal.ground.prepare` says.

    Examples:
        >>> import ws
        >>> from ws.causal.check import causal_check
        >>> lm, w = ws.load_lm("tiny"), ws.load_diff("tiny")
        >>> sweep = ws.explain(lm, w, candidates=["write", "mlp_write"], progress=False)
        >>> found = causal_check(lm, w, sweep, ranks=[1], draws=10, checked=0, cloud=0, templates=1, progress=False)
        >>> found.candidates["subspace"].to_list()
        ['w', 'w_res', 'write', 'mlp_write']
    """
    if isinstance(sections, str):
        raise ValueError(f"SECTIONS: {sections}: expected a list of names")
    if unknown := [one for one in sections if one not in SECTIONS]:
        raise ValueError(f"SECTIONS: {unknown[0]}: one of {', '.join(SECTIONS)}{suggest(unknown[0], list(SECTIONS))}")

    asked = {"FORWARD": (forward, 0), "DROPS": (drops, 0), "CHECKED": (checked, 0), "BOOT": (boot, int(cloud > 0))}
    asked |= {"DRAWS": (draws, 0), "CLOUD": (cloud, 0), "N_WORDINGS": (templates, 1)}
    for name, (n, few) in (asked | {"RANKS": (min(ranks, default=1), 1)}).items():
        if n is not None:
            check_count(name, n, few)

    def made(name: str, make: Callable[[], pl.DataFrame]) -> pl.DataFrame:
        return make() if name in sections and (ranks or name != "ranks") else pl.DataFrame(schema=EMPTY[name])

    if not (np.isfinite(kl_target) and kl_target > 0):
        raise ValueError(f"KL_TARGET = {kl_target}: expected a number of nats above 0")
    if 0 < cloud < LEAST:
        raise ValueError(f"CLOUD = {cloud}: a regression on three scores needs at least {LEAST} subspaces (0: none)")
    sweep = sweep if isinstance(sweep, Explanation) else Explanation.load(sweep)
    w, setting = load_diff(w), sweep.setting
    for what, mine, its in (("model", lm.fingerprint, setting["fingerprint"]), ("w", w.fingerprint, setting["w"])):
        if mine != its:
            raise ValueError(f"the sweep is of another {what}; sweep this one first: just nb v7_sweep -p PROTOCOL v7b")
    behavior = behavior if isinstance(behavior, Behavior) else load_behavior(behavior or setting["behavior"])
    if behavior.name != setting["behavior"]:
        raise ValueError(f"the sweep is of {setting['behavior']}, given is {behavior.name}")
    protocol = Protocol(**setting["protocol"] | {"sources": tuple(setting["protocol"]["sources"])})
    about = chosen(sweep, candidates)
    least = [l for l in w.layers() if l not in sweep.layers]
    if least:
        raise ValueError(f"the sweep leaves out layer {least[0]}, which w changes: sweep with LORA_LAYERS empty")
    templates = len(behavior.templates) if templates is None else templates
    ground = prepare(
        lm, w, behavior, protocol=protocol, alpha=alpha, templates=templates, cache=cache, progress=progress
    )
    sides: dict[bool, dict[str, Bases]] = {True: {}, False: {}}  # by whether it reads
    for c in about:
        sides[c["axis_kind"] == "read"][c["name"]] = ground.checked(c["name"], bases_of(sweep, c["name"]))
    write = sides[False]
    found = carried(ground, write, draws, seed, forward, drops)
    ran = run_forward(ground, found, write, checked, seed)
    away = pl.Series("other_layer", _in_order(found, other_layer(ground, write)), dtype=pl.Float64)
    table = with_forward(found, ran, seed).with_columns(away)
    own = [c["name"] for c in about if c["kind"] == "A-hypothesis"]
    rows = table[2:].filter(pl.col("effect").is_not_nan() & pl.col("subspace").is_in(own) & (pl.col("slope") <= TIED))
    led = rows.sort("effect", descending=True)["subspace"].to_list()
    leaders = {n: keep(ground.w, write[n], ground.gains) for n in led[:DOSED]}
    act = factors_of(sweep, ground.layers)
    theirs = other_sweep
    if theirs is not None and not isinstance(theirs, Explanation):
        theirs = Explanation.load(theirs)
    act_other = factors_of(theirs, ground.layers) if theirs else {}
    k = int(setting["k"])
    clouded = designed(ground, write, act, k, cloud, boot, seed) if cloud and act else None
    scores = sweep.plain_summary.select("subspace", *(c for c in SCORES if c in sweep.plain_summary.columns))
    known = ("kind", "axis_kind", "family")
    facts = pl.DataFrame(
        [{"subspace": c["name"], **{key: c[key] for key in known}, "sees": race_of(c["sees"])} for c in about]
    )
    for more in (facts, scores):
        table = table.join(more, on="subspace", how="left", maintain_order="left")
    return CausalCheck(
        candidates=table,
        where=where_table(ground, "where" in sections),
        read=made("read", lambda: read_table(ground, sides[True], drops)),
        ranks=made("ranks", lambda: rank_table(ground, ranks, other if other is None else load_diff(other), act, act_other)),
        dose=made("dose", lambda: dose_table(ground, leaders)),
        matched=made("matched", lambda: matched_table(ground, leaders, kl_target, alpha, seed)),
        controls=made("controls", lambda: other_controls(ground, k, nulls, cache, seed)),
        forward=ran,
        cloud={} if clouded is None else {name: getattr(clouded, name) for name in ("points", "fit", "slopes", "beyond")},
        setting={
            "title": title or setting["title"], "model": lm.name, "fingerprint": lm.fingerprint, "w": w.fingerprint,
            "behavior": behavior.name, "alpha": alpha, "draws": draws, "seed": seed, "templates": templates,
            "claims": int(found.excess.shape[1]) or len(ground.items.by_claim(np.zeros(len(ground.items.turns)))),
            "layers": ground.layers, "effects": ground.effects, "boot": boot, "k": k, "protocol": protocol.name,
            "nulls": len(nulls), "other": other is not None, "chat": lm.chat,
            "pmass": float(ground.passes.base["pmass"].mean()), "sections": list(sections),
            "kl_target": kl_target, "texts": ground.passes.texts,
            "options": digest(repr(sorted(setting["protocol"].items())).encode()),
        },
        tensors={
            "excess": torch.tensor(found.excess), "linear": torch.tensor(found.linear), "sides": torch.tensor(ground.items.sides),
            "drawn": torch.tensor(found.drawn.effect if found.drawn else np.zeros((0, len(write)))).float(),
        },
        names=tuple(write),
    )  # fmt: skip


def chosen(sweep: Explanation, names: Sequence[str]) -> list[dict]:
    """What is known of the candidates that are looked at: of all without names; no ceilings, and few of the shuffles.
    ValueError for a name that the sweep lacks, or that is a ceiling."""
    known = {c["name"]: c for c in sweep.candidates if c["kind"] != "ceiling"}
    for name in names:
        if name not in known:
            raise ValueError(f"candidates: {name}: no candidate of this sweep{suggest(name, list(known))}")
    if names:
        return [known[name] for name in dict.fromkeys(names)]
    shuffles = [name for name in known if name.startswith(SHUFFLES)]
    return [c for name, c in known.items() if name not in shuffles[FEW:]]


def bases_of(sweep: Explanation, name: str) -> dict[int, Tensor]:
    """A candidate's bases by layer, as the sweep keeps them."""
    return {l: sweep.tensors[f"basis/{name}/{l}"] for l in sweep.layers if f"basis/{name}/{l}" in sweep.tensors}


def factors_of(sweep: Explanation, layers: Sequence[int]) -> dict[int, Tensor]:
    """The activation differences of the EVAL probes by layer; {} where one is missing or 0."""
    found = {l: sweep.tensors.get(f"act_factor/{l}") for l in layers}
    return {} if any(x is None or not x.numel() or not float(x.norm()) for x in found.values()) else found


def run_forward(ground: Ground, found: Carried, bases: Mapping[str, Bases], checked: int, seed: int) -> pl.DataFrame:
    """Energy-matched controls by forward passes: of (whose energy), linear, effect, nats. EACH or more for every candidate
    that they are spent on: those of the smallest p that were run forward themselves, the largest excess first, and last those
    that hold the score's own slope. The rotations are none of the joint draws'. A control whose energy is out of reach is
    left out."""
    rows = [row for row in found.table[2:].iter_rows(named=True) if row["rank"] and np.isfinite(row["effect"])]
    rows.sort(
        key=lambda r: (r["slope"] > TIED, np.nan_to_num(r["p"], nan=1.0), -np.nan_to_num(r["excess"], nan=-np.inf))
    )
    names, made = [row["subspace"] for row in rows[: max(1, checked // EACH)]], {}
    g, d = torch.Generator().manual_seed(1_000_003 + seed), ground.lm.decoder.d
    for i in range(checked if names else 0):
        name = names[i % len(names)]
        of = formed(ground.spans, bases[name], haar(d, g, torch.float64))
        if of is not None:
            made[f"{name}/{i}"] = of
    variants = {n: keep(ground.w, of, ground.gains) for n, of in made.items()}
    moved = ground.passes(variants, label="controls, run forward")
    told = [
        (n.rpartition("/")[0], linear_of(ground.spans, of)["linear"], float(moved[n].effect.mean()))
        for n, of in made.items()
    ]
    return pl.DataFrame(told, schema={"of": pl.String, "linear": pl.Float64, "effect": pl.Float64}, orient="row")


def with_forward(found: Carried, forward: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The table with excess_forward and p_forward of the candidates with ENOUGH controls of their own that were run forward:
    what their forward effects are off their first-order ones by is added to each joint draw, with the scatter of it. NaN for
    all others: nothing is carried over from one candidate to another."""
    table, generator = found.table, np.random.default_rng(seed)
    excess, p = (dict.fromkeys(table["subspace"], float("nan")) for _ in range(2))
    for c, (name, effect) in enumerate(table.select("subspace", "effect").rows()[2:]):
        own = forward.filter(pl.col("of") == name)
        if len(own) < ENOUGH or found.drawn is None or not np.isfinite(effect):
            continue
        off = (own["effect"] - own["linear"]).to_numpy()
        column = found.drawn.effect[:, c]
        scatter = (off - off.mean()) * np.sqrt(len(off) / (len(off) - 1))
        at = column + off.mean() + generator.choice(scatter, len(column))
        lost = np.isnan(column)
        excess[name] = float(effect - np.nanmean(column) - off.mean())
        p[name] = (1 + int((at[~lost] >= effect).sum()) + int(lost.sum())) / (1 + len(column))
    more = {"excess_forward": excess, "p_forward": p}
    return table.with_columns(
        pl.Series(name, [of[n] for n in table["subspace"]], dtype=pl.Float64) for name, of in more.items()
    )


def _in_order(found: Carried, values: Mapping[str, float]) -> list[float]:
    return [values.get(name, float("nan")) for name in found.table["subspace"]]
