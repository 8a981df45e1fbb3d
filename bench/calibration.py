"""Do the statistics over seeds keep what they promise? Type I error, discoveries, false winners, power, coverage.

Blind candidates (a world's bases under a random rotation that nobody's null has seen, scored by plain products with the
whole targets) are held against 10,000 blind copies: their p must be uniform. Then score tables whose truth is known, at the
noise measured between ten LoRA seeds of the shipped model. (docs/method.md section 7)

.venv/bin/python bench/calibration.py [FOLDER]

FOLDER: `out/<model>/<behavior>/<adapter>` with finished v7b sweeps, to calibrate on these instead of a simulated world.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.explanation.result import Explanation
from ws.show.bars import tqdm
from ws.show.tables import as_text
from ws.stability.blind import Geometry, blind_scores, combined_factor, haar, thin
from ws.stability.intervals import crossed_bootstrap, crossed_t_interval, percentile_interval, row_influence, t_interval
from ws.stability.scores import SeedScores, log_values, make_scores
from ws.stability.seeds import load_seeds
from ws.stability.significance import blind_p, blind_values, discoveries, mean_log
from ws.stability.verdict import verdict

SEEDS = (3, 5, 10)
# sd of one candidate's log honest joint between seeds, templates and topics: medians over pairs of contenders of the shipped
# model's ten seeds, divided by sqrt 2 (pairs), times sqrt m and sqrt n (means over templates and topics)
NOISE = {"seed_sd": 0.026, "template_sd": 0.023, "topic_sd": 0.009}
# of the shipped model's contenders behind the second best, log honest joint
BEHIND = (
    0.003,
    0.01,
    0.03,
    0.03,
    0.04,
    0.05,
    0.07,
    0.12,
    0.2,
    0.21,
    0.24,
    0.26,
    0.3,
    0.32,
    0.6,
    0.8,
    0.9,
    1.1,
    1.4,
    1.9,
)


@dataclass(frozen=True)
class World:
    """A geometry, and the whole targets behind its thin factors: per [seed][layer] `(d, q)` with trace 1."""

    geometry: Geometry
    w: list[list[Float[Tensor, "d q"]]]
    act: list[list[Float[Tensor, "d n"]]]
    beyond: list[list[Float[Tensor, "d n"]]]


def orth(M: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
    return torch.linalg.qr(M).Q


def simulated(
    d: int, S: int, L: int, C: int, seed: int = 0, rank: int = 64, rows: int = 48, power: float = -1.0
) -> World:
    """Seeds that share most of w and of what it does, layers that share directions, candidates whose bases drift over the
    layers, slowly or fast. power: how w's singular values fall."""
    g, rank = torch.Generator().manual_seed(seed), min(rank, d // 2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    spectrum = torch.arange(1, rank + 1, dtype=torch.float64) ** power
    shared, own = normal(d, rank), [[normal(d, rank) for _ in range(2)] for _ in range(L)]

    def writer(l: int, role: int) -> Tensor:
        return orth(0.6 * shared + own[l][role] + 0.35 * normal(d, rank)) * spectrum

    steer, by_layer, tilt = normal(1, d), normal(L, 1, d), normal(rows, d)

    def acts(l: int) -> Tensor:
        return steer + 0.7 * by_layer[l] + 0.3 * normal(1, d) + 0.15 * tilt + 0.05 * normal(rows, d)

    bases = []
    for c in range(C):
        r, drift = (8, 8, 8, 16, 7, 3)[c % 6], (0.1, 0.3, 0.6, 2.0)[c % 4]
        B = [orth(normal(d, r))]
        for _ in range(L - 1):
            B.append(orth(B[-1] + drift * normal(d, r) / d**0.5))
        bases.append(B)
    clean = [orth(steer.T @ normal(1, 8) + 3 * normal(d, 8)) for _ in range(L)]
    both = [[[writer(l, role) for role in (0, 1)] for l in range(L)] for _ in range(S)]
    X = [[acts(l) for l in range(L)] for _ in range(S)]
    return world([[bases[c][l] for c in range(C)] for l in range(L)], both, X, clean)


def unit(X: Float[Tensor, "n d"]) -> Float[Tensor, "d n"]:
    return (X / X.norm(dim=1, keepdim=True) / len(X) ** 0.5).T


def world(bases: list, both: list, X: list, clean: list) -> World:
    joined = [[torch.cat([F / F.norm() for F in f], dim=1) / 2**0.5 for f in of_seed] for of_seed in both]
    act = [[unit(x) for x in of_seed] for of_seed in X]
    beyond = [[unit(x - x @ Q @ Q.T) for x, Q in zip(of_seed, clean, strict=True)] for of_seed in X]
    best = np.ones((len(X), len(bases[0]), len(bases)))
    geometry = Geometry(
        bases=bases,
        w=[[combined_factor(f, "w") for f in of_seed] for of_seed in both],
        act=[[thin(F) for F in of_seed] for of_seed in act],
        specific=[[thin(F) for F in of_seed] for of_seed in beyond],
        clean=clean,
        best={"w": best, "act": best},
    )
    return World(geometry, joined, act, beyond)


def measured(folder: Path, protocol: str = "v7b") -> World:
    """The world of finished sweeps, in the order of their seeds."""
    found = {int(p.parent.name.removeprefix("seed_")): Explanation.load(p) for p in folder.glob(f"seed_*/{protocol}")}
    runs = load_seeds(dict(sorted(found.items())))
    parts, layers = [found[s].tensors for s in sorted(found)], runs.scores.layers
    writers = [[[p[f"weight_factor/{l}/{t}"].double() for t in ("oproj", "downproj")] for l in layers] for p in parts]
    joined = [[torch.cat([F / F.norm() for F in f], dim=1) / 2**0.5 for f in of_seed] for of_seed in writers]
    act, beyond = ([[p[f"{name}_factor/{l}"].double() for l in layers] for p in parts] for name in ("act", "beyond"))
    return World(runs.geometry, joined, act, beyond)


def plain_scores(w: World, O: Float[Tensor, "d d"]) -> dict[str, Float[np.ndarray, "S C"]]:
    """R_w, R_act and specific of the candidates turned by O, written down as they are defined: no thin factors."""
    S, L, d = len(w.w), len(w.geometry.bases), len(O)
    ranks = [[B.shape[1] for B in row] for row in w.geometry.bases]
    out = {name: np.zeros((S, len(ranks[0]))) for name in ("R_w", "R_act", "specific")}

    def energies(turned: list[Tensor], targets: list[Tensor], r: list[int]) -> Float[np.ndarray, "S C"]:
        every = torch.cat(turned, dim=1)
        columns = [(F.T @ every).square().sum(dim=0) for F in targets]
        return np.array([[float(part.sum()) for part in c.split(r)] for c in columns])

    for l, row in enumerate(w.geometry.bases):
        Q, r = w.geometry.clean[l].double(), np.array(ranks[l])
        turned = [O @ B.double() for B in row]
        left = [orth(B - Q @ (Q.T @ B)) for B in turned]
        for name, of, kept in (("R_w", w.w, turned), ("R_act", w.act, turned), ("specific", w.beyond, left)):
            room = d - Q.shape[1] if name == "specific" else d
            out[name] += energies(kept, [of_seed[l] for of_seed in of], ranks[l]) * room / r / L
    return out | {"joint": np.sqrt(out["R_w"] * out["R_act"])}


def type_one(w: World, copies: int, draws: int, seeds: tuple[int, ...] = SEEDS, progress: bool = True) -> pl.DataFrame:
    """Errors of blind candidates' p-values, per number of seeds and score: error at .05 and .01 (mean over candidates, and
    of the worst candidate), and the share of copies in which Benjamini-Hochberg finds anything."""
    null = blind_values(blind_scores(w.geometry, draws, 0, progress=progress))
    generator = torch.Generator().manual_seed(12345)
    d = len(w.geometry.bases[0][0])
    found = [plain_scores(w, haar(d, generator).double()) for _ in tqdm(range(copies), "blind", disable=not progress)]
    rows = []
    for S in (S for S in seeds if len(w.w) >= S):
        for name in ("R_w", "R_act", "joint", "specific"):
            copy = null[name][:, :S]
            p = np.stack([blind_p(mean_log(one[name][:S]), mean_log(copy)) for one in found])
            rate = {level: (p <= level).mean(axis=0) for level in (0.05, 0.01)}
            any_found = float((discoveries(p, 0.05) > 0).mean())
            row = {"d": d, "S": S, "score": name, "copies": copies, "candidates": p.shape[1]}
            row |= {f"error at {level:g}": float(r.mean()) for level, r in rate.items()}
            row |= {f"worst at {level:g}": float(r.max()) for level, r in rate.items()}
            rows.append(row | {"P(any discovery)": any_found})
    return pl.DataFrame(rows)


def independent_null(w: World, S: int, draws: int, seed: int = 0) -> Float[np.ndarray, "N C"]:
    """What was done before: for R_w, random bases drawn anew at every layer for every candidate."""
    g = torch.Generator().manual_seed(seed)
    d, L = len(w.geometry.bases[0][0]), len(w.geometry.bases)
    out = np.zeros((draws, S, len(w.geometry.bases[0])))
    for l, row in enumerate(w.geometry.bases):
        ranks = [B.shape[1] for B in row]
        for i in range(draws):
            Q = orth(torch.randn(d, max(ranks), generator=g, dtype=torch.float64))
            for s in range(S):
                energy = (Q.T @ w.w[s][l]).square().sum(dim=1).cumsum(dim=0).numpy()
                out[i, s] += [energy[r - 1] * d / r / L for r in ranks]
    return mean_log(out)


def simulate(
    g: np.random.Generator,
    S: int,
    C: int,
    lead: float,
    behind: tuple[float, ...] = (),
    *,
    seed_sd: float,
    template_sd: float,
    topic_sd: float,
    m: int = 4,
    n: int = 12,
) -> tuple[SeedScores, Float[np.ndarray, " C"]]:
    """A score table of C contenders, the first `lead` times better than the next (1: tied), the others as far `behind` that
    one (cycled; nats; all beside it where none are given), with noise between seeds, templates and topics
    (sd of the log honest joint) and in single cells; and each one's log honest joint for these templates and topics."""
    rows = template_sd * g.standard_normal((1, C, 1, m, 1)) + topic_sd * g.standard_normal((1, C, 1, 1, n))
    rows[:, 0] += np.log(lead)
    if behind:
        rows -= np.concatenate([[0.0, 0.0], np.resize(behind, C - 2)])[:, None, None, None]
    seeds = seed_sd * g.standard_normal((S, C, 1, 1, 1)) + 0.1 * g.standard_normal((S, 1, 1, 1, 1))
    cells = 0.5 * topic_sd * g.standard_normal((S, C, 1, m, n))
    act = np.exp(2 * (rows + seeds + cells)).reshape(S, C, 1, m * n)  # honest is the root of act times w
    names = [f"c{i}" for i in range(C)]
    scores = make_scores(names, range(S), act, np.ones((S, C, 1)), np.full((C, 1), 8.0), 128, templates=m)
    return scores, 0.5 * np.log(np.exp(2 * rows).mean(axis=(3, 4)))[0, :, 0]


def noise(scale: float = 1.0, only: str = "") -> dict[str, float]:
    """The measured noise times `scale`; only: one of its parts."""
    return {name: sd * scale * (not only or name == only) for name, sd in NOISE.items()}


def winners(
    reps: int, S: int, C: int, lead: float, sds: dict[str, float], behind: tuple[float, ...] = (), seed: int = 0
) -> float:
    """Share of tables in which the verdict names the first candidate (lead > 1) or anybody (lead = 1, all tied)."""
    g, q = np.random.default_rng(seed), np.zeros(C)
    named = [verdict(simulate(g, S, C, lead, behind, **sds)[0], (), q).winner for _ in range(reps)]
    return float(np.mean([name == "c0" if lead > 1 else name is not None for name in named]))


def coverage(reps: int, boot: int, S: int, sds: dict[str, float], seed: int = 0) -> dict[str, float]:
    """Share of 95 % intervals of a paired difference of two tied candidates that hold the truth: of t for these templates
    and topics, of the crossed t and the crossed bootstrap for new ones (where the truth is 0)."""
    scores, target = simulate(np.random.default_rng(seed), S, 2 * reps, 1.0, **sds)
    influence, logs = 0.5 * row_influence(scores.act, scores.best_act), log_values(scores)["honest"]
    values, spread, these = logs[:, ::2] - logs[:, 1::2], influence[::2] - influence[1::2], target[::2] - target[1::2]
    ones = np.ones((S, 2 * reps))
    draws = crossed_bootstrap(scores.act, scores.best_act, {"R_w": ones, "H_w": ones}, scores.templates, seed + 1, boot)
    difference = draws["honest"][:, ::2] - draws["honest"][:, 1::2]

    def share(ends: tuple, truth: float | np.ndarray) -> float:
        return float(((ends[0] <= truth) & (truth <= ends[1])).mean())

    return {
        "t, these rows": share(t_interval(values), these),
        "t, all rows": share(t_interval(values), 0.0),
        "crossed t, all rows": share(crossed_t_interval(values, spread, scores.templates), 0.0),
        "crossed bootstrap, all rows": share(percentile_interval(difference), 0.0),
    }


CASES = {"measured": noise(), "four times that": noise(4.0), "seeds only": noise(only="seed_sd")}
CASES |= {"templates mostly": noise() | {"seed_sd": 0.005}}


def main(folder: str = "", copies: int = 500, draws: int = 10_000, reps: int = 2000) -> None:
    start = time.perf_counter()

    def say(title: str, rows: list[dict] | pl.DataFrame) -> None:
        table = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(rows)
        print(f"\n{title} ({time.perf_counter() - start:.0f} s)\n\n{as_text(table)}", flush=True)

    worlds = [measured(Path(folder))] if folder else [simulated(128, 10, 4, 40), simulated(576, 10, 15, 40)]
    for w in worlds:
        say("Blind candidates", type_one(w, copies, draws))
    old = independent_null(worlds[0], 3, 2000)
    generator = torch.Generator().manual_seed(54321)
    d = len(worlds[0].geometry.bases[0][0])
    found = [mean_log(plain_scores(worlds[0], haar(d, generator).double())["R_w"][:3]) for _ in range(copies)]
    p = np.stack([blind_p(one, old) for one in found])
    rate = (p <= 0.05).mean(axis=0)
    row = {"d": d, "S": 3, "error at 0.05": rate.mean(), "worst at 0.05": rate.max()}
    say(
        "R_w against bases drawn anew at every layer, which was the null before",
        [row | {"P(any discovery)": (discoveries(p, 0.05) > 0).mean()}],
    )
    rows = [
        {"noise": name, "S": S} | {f"{C} tied": winners(reps if C < 40 else reps // 4, S, C, 1.0, sds) for C in (2, 3, 40)}
        for name, sds in CASES.items() for S in SEEDS
    ]  # fmt: skip
    say("False winners: anybody is named though all are tied (at most .05)", rows)
    rows = [
        {"noise": name, "rivals": where, "S": S}
        | {f"lead {lead:g}": winners(reps // 4, S, 40, lead, sds, behind) for lead in (1.05, 1.1, 1.2, 1.5)}
        for name, sds in CASES.items() for where, behind in (("spread", BEHIND), ("all equal", ())) for S in SEEDS
    ]  # fmt: skip
    say("Power: the best of 40 contenders is named", rows)
    rows = [{"noise": name, "S": S} | coverage(reps, 2000, S, sds) for name, sds in CASES.items() for S in SEEDS]
    say("Coverage of nominal .95", rows)


if __name__ == "__main__":
    main(*sys.argv[1:2])
