"""Before training: where the gradient of pairs lies, and how much of it is their wording. (docs/method.md section 12)

`D = grad(L_neg - L_pos)` of the base model on the training pairs; one step of plain gradient descent on both adapters moves w by
`D A^T A`. `cos(D_a, D_b)` of disjoint sets of pairs, over random halves of topics and of wordings, how much of
it is topic, wording, or the behaviour. With w given: `cos(D, w)` beside the same with the pairs' labels shuffled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from scipy import stats

from ws.cache.files import write_text
from ws.cache.names import cache_folder
from ws.data import Behavior, load_behavior
from ws.diff import WeightDiff, load_diff
from ws.gradient.accumulate import Adder
from ws.gradient.capture import chosen, pair_texts, side_weights, signs
from ws.gradient.sketch import Target, diff_sketch, text_sketches
from ws.model.decoder import ROLES
from ws.model.lm import LM
from ws.show.tables import write_table
from ws.steer.weights import check_fits
from ws.train.lora import TrainConfig, adapter_layers
from ws.train.pairs import Pair, PairConfig, make_pairs

SPLITS, SHUFFLES = 100, 1000
LEAST = 8  # pairs of a cell: a cosine of fewer says little
CELLS = {
    "same wordings, other topics": (1, 0), "other wordings, same topics": (0, 1), "other wordings, other topics": (1, 1),
}  # fmt: skip
HALVES, SWAPPED = "any other pairs", "labels shuffled"


@dataclass(frozen=True)
class Prediction:
    """parts: per layer and role the share of `|D|^2` (with w: of `|w|^2`, and the cosine); grid: cosines of D between disjoint
    sets of pairs, mean and 95 % range over splits; against: cos(D, w) and its null, or {}; wording: share of what D has in
    common between topics that is gone with the wordings, NaN where it cannot be told, and its 95 % jackknife interval over
    wordings; text: that in words."""

    parts: pl.DataFrame
    grid: pl.DataFrame
    against: dict
    wording: float
    wording_interval: tuple[float, float]
    n: int
    text: str

    def save(self, folder: Path | str) -> None:
        """`predict_parts.tsv`, `predict_grid.tsv`, `predict.md`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_table(self.parts, folder / "predict_parts.tsv")
        write_table(self.grid, folder / "predict_grid.tsv")
        write_text(folder / "predict.md", self.text + "\n")


def predict(
    lm: LM,
    pairs: PairConfig | Path | str,
    behavior: Behavior | Path | str = "sycophancy",
    *,
    against: WeightDiff | Path | str | None = None,
    layers: Sequence[int] | None = None,
    most: int = 200,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = True,
) -> Prediction:
    """What can be said of w before it is trained on these pairs, from one pass over at most `most` of them.

    pairs: a file of pairs (PAIRS), or a `PairConfig`. against: a trained w, to see how right the prediction was. layers: those
    that get an adapter; default those of w, else as in training. Raises ValueError for what the pairs, the model or w do not
    allow.

    Examples:
        >>> import ws
        >>> found = ws.predict(ws.load_lm("tiny"), "sycophancy", most=8, progress=False)
        >>> found.n, found.parts.height, abs(found.parts["share"].sum() - 1) < 1e-9
        (8, 28, True)
    """
    behavior = behavior if isinstance(behavior, Behavior) else load_behavior(behavior)
    config = pairs if isinstance(pairs, PairConfig) else PairConfig(file=str(pairs))
    w = None if against is None else load_diff(against)
    if w is not None:
        check_fits(lm.model, w)
        layers = layers or w.layers()
        if not any(lm.decoder.param_name(l, role) in w for l in layers for role in ROLES):
            raise ValueError(
                f"the weight difference has no matrix of q, k, v, o, gate, up, down at layers {list(layers)}"
            )
    if most < 4:
        raise ValueError(f"most = {most}: a prediction needs at least 4 pairs")
    layers = adapter_layers(lm.decoder.n_layers, TrainConfig(layers=tuple(layers) if layers else None))
    rows = chosen(make_pairs(lm, behavior, config, cache or cache_folder(lm.name), progress).rows, most, seed)
    if len(rows) < 4:
        raise ValueError(f"{len(rows)} pairs: a prediction needs at least 4")
    examples, tokens = pair_texts(lm, rows)
    targets = [(l, role) for l in layers for role in ROLES]
    adder = Adder(dict.fromkeys(targets, side_weights(tokens, signs(len(rows), 0))))
    sketches, _ = text_sketches(lm, examples, targets, adder, "gradients of pairs", progress)
    D = {one: total[1] - total[0] for one, total in adder.sums().items()}
    F = torch.cat([sketches[one] for one in targets], dim=1).double()
    K = (F @ F.T).numpy()
    grid, wording = wording_grid(K, rows, tokens.numpy(), seed)
    span = jackknife(K, rows, tokens.numpy(), seed) if np.isfinite(wording) else (float("nan"),) * 2
    parts = _parts(lm, D, w)
    found = _against(lm, F, tokens, targets, w, parts, seed) if w is not None else {}
    text = _text(parts, grid, found, wording, span, len(rows), bool(config.file))
    return Prediction(parts, grid, found, wording, span, len(rows), text)


def contrast(keep: Float[np.ndarray, " n"], tokens: Float[np.ndarray, "2 n"]) -> Float[np.ndarray, " m"]:
    """Weights `(2 n,)` of the texts' gradients (positive ones first) that give D of the pairs where `keep` is 1; -1 swaps a
    pair's answers, 0 leaves it out."""
    pos, neg = np.stack([keep > 0, keep < 0]), np.stack([keep < 0, keep > 0])
    return (neg / max((neg * tokens).sum(), 1) - pos / max((pos * tokens).sum(), 1)).ravel()


def wording_grid(
    K: Float[np.ndarray, "m m"], rows: Sequence[Pair], tokens: Float[np.ndarray, "2 n"], seed: int = 0
) -> tuple[pl.DataFrame, float]:
    """Cosines of D between disjoint sets of pairs of like size, by what they share: mean, and 2.5 and 97.5 % over SPLITS
    random halves of topics and of wordings; and the share due to wording, `1 - cos(other, other) / cos(same wordings)`.
    K: inner products of the texts' gradients."""
    generator = np.random.default_rng(seed)
    topics, wordings = (np.array([getattr(row, name) for row in rows]) for name in ("topic", "persona"))
    found: dict[str, list[float]] = {name: [] for name in [*CELLS, HALVES, SWAPPED]}
    for _ in range(SPLITS):
        t, v = (_half(values, generator) for values in (topics, wordings))
        cells = {(i, j): np.flatnonzero((t == i) & (v == j)) for i in (0, 1) for j in (0, 1)}
        size = min(map(len, cells.values()))
        if len(set(wordings)) > 1 and size >= LEAST:
            parts = {at: _only(generator.permutation(places)[:size], len(rows)) for at, places in cells.items()}
            for name, at in CELLS.items():
                found[name].append(_cos(K, parts[0, 0], parts[at], tokens))
        order = generator.permutation(len(rows))
        half = [_only(part, len(rows)) for part in (order[: len(order) // 2], order[len(order) // 2 :])]
        coins = [part * generator.choice([-1.0, 1.0], len(rows)) for part in half]
        found[HALVES].append(_cos(K, *half, tokens))
        found[SWAPPED].append(_cos(K, *coins, tokens))
    lines = []
    for name, values in found.items():
        low, high = np.percentile(values, [2.5, 97.5]) if values else (np.nan, np.nan)
        lines.append((name, float(np.mean(values)) if values else np.nan, low, high, len(values)))
    table = pl.DataFrame(lines, ["pairs", "cos", "low", "high", "splits"], orient="row")
    same, other = (table.filter(pairs=name)["cos"][0] for name in (list(CELLS)[0], list(CELLS)[2]))
    clear = same > table.filter(pairs=SWAPPED)["high"][0]  # NaN where there are not two wordings
    return table, float(1 - other / same) if clear else float("nan")


def jackknife(K: np.ndarray, rows: Sequence[Pair], tokens: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % t interval of the share due to wording over wordings, by leaving out each of them; NaN for fewer than three."""
    wordings, found = np.array([row.persona for row in rows]), []
    for one in np.unique(wordings):
        at = np.flatnonzero(wordings != one)
        both = np.concatenate([at, at + len(rows)])
        found.append(wording_grid(K[np.ix_(both, both)], [rows[i] for i in at], tokens[:, at], seed)[1])
    n = len(found)
    if n < 3 or not np.isfinite(found).all():
        return float("nan"), float("nan")
    whole = wording_grid(K, rows, tokens, seed)[1]
    wide = stats.t.ppf(0.975, n - 1) * np.sqrt((n - 1) / n * np.sum((np.array(found) - np.mean(found)) ** 2))
    return float(whole - wide), float(whole + wide)


def _half(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """0 or 1 per pair, by a random half of the different values."""
    kinds = generator.permutation(np.unique(values))
    return np.isin(values, kinds[: (len(kinds) + 1) // 2]).astype(int)


def _only(places: np.ndarray, n: int) -> np.ndarray:
    return np.bincount(places, minlength=n).astype(float)


def _cos(K: np.ndarray, a: np.ndarray, b: np.ndarray, tokens: np.ndarray) -> float:
    u, v = contrast(a, tokens), contrast(b, tokens)
    return float(u @ K @ v / np.sqrt((u @ K @ u) * (v @ K @ v)))


def _parts(lm: LM, D: dict[Target, torch.Tensor], w: WeightDiff | None) -> pl.DataFrame:
    """Shares and cosines by layer and role."""
    energy = {one: float(M.double().square().sum()) for one, M in D.items()}
    rows = [(l, role, energy[l, role] / sum(energy.values())) for l, role in D]
    table = pl.DataFrame(rows, ["layer", "role", "share"], orient="row")
    if w is None:
        return table
    names = [lm.decoder.param_name(*one) for one in D]
    norms = [w.norm(name) if name in w.entries else 0.0 for name in names]
    cos = []
    for (one, M), name, norm in zip(D.items(), names, norms, strict=True):
        inner = float((M.double() * w[name].double()).sum()) if norm else float("nan")
        cos.append(inner / (norm * energy[one] ** 0.5) if norm and energy[one] else float("nan"))
    total = sum(norm**2 for norm in norms)
    return table.with_columns(share_w=pl.Series([norm**2 / total for norm in norms]), cos=pl.Series(cos))


def _against(lm: LM, F, tokens, targets: Sequence[Target], w: WeightDiff, parts: pl.DataFrame, seed: int) -> dict:
    """cos(D, w) over all matrices, exact; the same of D with shuffled labels, from sketches: 95 % range, two-sided p."""
    share, share_w, cos = (parts[name].to_numpy() for name in ("share", "share_w", "cos"))
    whole = float(np.nansum(cos * np.sqrt(share * share_w)))
    v = torch.cat([one for one in diff_sketch(lm, w, targets).values()]).double()
    generator = np.random.default_rng(seed)
    n = tokens.shape[1]
    coins = [np.ones(n), *generator.choice([-1.0, 1.0], (SHUFFLES, n))]
    U = torch.from_numpy(np.stack([contrast(c, tokens.numpy()) for c in coins])).double()
    made = U @ F
    found = ((made @ v) / (made.norm(dim=1) * v.norm())).numpy()
    low, high = np.percentile(found[1:], [2.5, 97.5])
    p = (1 + (np.abs(found[1:]) >= abs(found[0])).sum()) / (1 + SHUFFLES)
    rank = float(stats.spearmanr(share, share_w).statistic)
    return {
        "cos": whole,
        "sketched": float(found[0]),
        "null_low": float(low),
        "null_high": float(high),
        "p": float(p),
        "rank_correlation": rank,
    }


def _text(
    parts: pl.DataFrame,
    grid: pl.DataFrame,
    found: dict,
    wording: float,
    span: tuple[float, float],
    n: int,
    written: bool,
) -> str:
    """The prediction in sentences. written: whether the pairs come from a file, which can say their wordings."""
    roles = parts.group_by("role", maintain_order=True).agg(pl.col("share").sum()).sort("share", descending=True)
    layers = parts.group_by("layer", maintain_order=True).agg(pl.col("share").sum()).sort("share", descending=True)
    most = ", ".join(f"{role} {share:.0%}" for role, share in roles.head(3).rows())
    where = ", ".join(f"{layer} ({share:.0%})" for layer, share in layers.head(3).rows())
    cos = {name: (mean, low, high) for name, mean, low, high, _ in grid.rows()}
    half, null = cos[HALVES], cos[SWAPPED]
    lines = [
        f"From {n} pairs: of |D|^2 {most} are in these modules, most of it in layers {where} (of a gradient; how w is shared"
        " among them is not predicted).",
        f"Two random halves of the pairs agree on D with a cosine of {half[0]:.2f} ({half[1]:.2f} to {half[2]:.2f} over halves);"
        f" with shuffled labels {null[0]:.2f} ({null[1]:.2f} to {null[2]:.2f}).",
    ]
    same, topics, both = (cos[name] for name in CELLS)
    if not np.isfinite(same[0]):
        how = "Give them a field `wording`." if written else "It takes written pairs (PAIRS) with a field `wording`."
        lines.append(f"The pairs have one wording, or none: what of D is wording cannot be told. {how}")
    else:
        lines.append(
            f"About other topics in the same wordings D keeps a cosine of {same[0]:.2f}, in other wordings {both[0]:.2f}"
            f" ({both[1]:.2f} to {both[2]:.2f} over which are held out); about the same topics in other wordings {topics[0]:.2f}."
        )
    if np.isfinite(wording):
        lines.append(
            f"Of what topics share over half of the wordings {wording:.0%} is gone in the other half (95 % interval over wordings"
            f" {span[0]:.0%} to {span[1]:.0%})."
        )
        if span[0] > 0.5:
            lines.append("**Your pairs differ in phrasing more than in behaviour**: add wordings before you train.")
    if found:
        inside = found["null_low"] <= found["sketched"] <= found["null_high"]
        where = (
            "**inside** what other labels give"
            if inside
            else "so that w learnt these labels, which is no behaviour yet"
        )
        lines.append(
            f"Against the trained w: cos(D, w) = {found['cos']:+.3f}, with shuffled labels {found['null_low']:+.3f} to"
            f" {found['null_high']:+.3f} (p = {found['p']:.3f}), {where};"
            f" the shares of layers and modules agree with a rank correlation of {found['rank_correlation']:+.2f}."
        )
    return "\n".join(lines)
