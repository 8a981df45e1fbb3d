"""What the base model's gradient says of pairs: where one step on both adapters would move w. (docs/method.md section 12)

`L_s` is the mean over response tokens of the cross-entropy of `response_s` given `user`, as in training; `G_s` its gradient per
weight matrix, `D = G_neg - G_pos` (`contrast`) and `G_pos + G_neg` (`sum`). `null i` is D with the labels of every pair shuffled.
`half 0` and `half 1` are the parts of D that come from half of the pairs each, `D = half 0 + half 1`, wordings (of statements
Yes and No) shared out evenly. Kept are, per layer, the square roots of two Grams, from which bases are read: of `[D_o/|D_o| |
D_down/|D_down|]` (`write`) and of `[D_q; D_k; D_v; D_gate; D_up]`, each divided by its norm (`read`); and of D itself norms
and leading singular triples.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from ws.cache.keys import stage_key
from ws.cache.made import kept, read_safetensors
from ws.cache.names import slug
from ws.cache.syntax import digest
from ws.diff import LowRank, WeightDiff
from ws.gradient.accumulate import Example, Sums, weighted_gradients
from ws.model.decoder import ROLES
from ws.model.lm import LM
from ws.model.text import answer_frame
from ws.subspaces.eigen import top_eigh
from ws.subspaces.grams import output_gain
from ws.train.examples import make_example
from ws.train.pairs import Pair, StatementPair

MOST = 200  # pairs that are read
SHUFFLES = 8
COLUMNS = 64  # of a Gram's root: what a basis is cut from
RANK = 32  # singular triples of D that are kept of a matrix
WRITERS, READERS = ("o", "down"), ("q", "k", "v", "gate", "up")
CONTRAST, SUM, HALVES = "contrast", "sum", ("half 0", "half 1")
Kinds = dict[str, dict[int, float]]  # each kind as a combination of the rows that are summed


@dataclass(frozen=True)
class Gradients:
    """Gradients of one set of texts. roots: `(d, c)` by (kind, side, layer), side `write` or `read`; norms: `|D|_F` by layer
    and role; diff: D of rank up to RANK per matrix, as a weight diff (w starts along `lr s^2 D A^T A`); agree: by side, the
    cosine of half 0 and half 1 over all its matrices; losses: mean
    cross-entropy of both sides, nats per response token; n: texts or pairs read."""

    roots: dict[tuple[str, str, int], Float[Tensor, "d c"]]
    norms: dict[tuple[int, str], float]
    diff: WeightDiff
    agree: dict[str, float]
    losses: dict[str, float]
    n: int

    @property
    def layers(self) -> list[int]:
        return sorted({l for _, _, l in self.roots})

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for kind, _, _ in self.roots))


def pair_texts(lm: LM, rows: Sequence[Pair]) -> tuple[list[Example], Float[Tensor, "2 n"]]:
    """All positive texts, then all negative ones, as in training; and their numbers of response tokens by side."""
    frame = answer_frame(lm.tokenizer)
    examples = [make_example(lm, row, sign, frame, 512) for sign in ("pos", "neg") for row in rows]
    return examples, torch.tensor([float(sum(t != -100 for t in e["labels"])) for e in examples]).reshape(2, -1)


def chosen(rows: Sequence[Pair], most: int = MOST, seed: int = 0) -> tuple[Pair, ...]:
    """At most `most` pairs, a seeded draw in the order of the file; all where there are no more."""
    if len(rows) <= most:
        return tuple(rows)
    drawn = np.random.default_rng(zlib.crc32(f"gradient pairs {seed}".encode())).permutation(len(rows))[:most]
    return tuple(rows[i] for i in sorted(drawn.tolist()))


def signs(n: int, shuffles: int, seed: int = 0) -> Float[Tensor, "S n"]:
    """A fair coin per shuffle and pair, +1 or -1; -1 swaps the two responses."""
    coins = np.random.default_rng(zlib.crc32(f"gradient shuffles {seed}".encode())).random((shuffles, n)) < 0.5
    return torch.from_numpy(np.where(coins, 1.0, -1.0)).float()


def side_weights(tokens: Float[Tensor, "2 n"], swaps: Float[Tensor, "S n"]) -> Float[Tensor, "k m"]:
    """Weights `(2 + S, 2 n)` of the gradients of all positive texts, then all negative ones, each summed over its response
    tokens: row 0 gives `G_pos`, row 1 `G_neg`, the others D with each pair's labels swapped where its sign is -1."""
    n = tokens.shape[1]
    zero = torch.zeros(n)
    rows = [torch.cat([torch.ones(n) / tokens[0].sum(), zero]), torch.cat([zero, torch.ones(n) / tokens[1].sum()])]
    for swap in swaps:
        as_pos = torch.stack([swap > 0, swap < 0])  # which of a pair's two texts counts as the positive one
        count = torch.where(as_pos, tokens, 0).sum(), torch.where(as_pos, 0, tokens).sum()
        rows.append(torch.where(as_pos, -1 / count[0], 1 / count[1]).flatten())
    return torch.stack(rows)


def pair_gradients(
    lm: LM,
    rows: Sequence[Pair],
    layers: Sequence[int],
    *,
    fold_gain: bool = False,
    shuffles: int = SHUFFLES,
    label: str = "pairs",
    cache: Path | None = None,
    progress: bool = True,
) -> Gradients:
    """The gradients of pairs at the base weights, at `layers`: `contrast` with its halves and, of what writes alone, `sum` and
    `null 0`, `null 1`, ... of as many shuffles. fold_gain: as in `load_protocol`. cache: a folder (of this model) to keep
    them in, under the model, the texts, the settings and the code. ValueError for no pairs, for what `weighted_gradients`
    refuses."""
    if not rows:
        raise ValueError(f"{label}: no pair to take a gradient of")
    examples, tokens = pair_texts(lm, rows)
    swaps = signs(len(rows), shuffles)

    def make() -> Gradients:
        weights = side_weights(tokens, swaps)
        groups = [(row.persona, row.topic if isinstance(row, StatementPair) else 0) for row in rows]
        halves = in_halves(weights[1] - weights[0], groups)
        last = len(weights)
        write = {
            CONTRAST: {0: -1.0, 1: 1.0},
            SUM: {0: 1.0, 1: 1.0},
            HALVES[0]: {last: 1.0},
            HALVES[1]: {0: -1.0, 1: 1.0, last: -1.0},
        }
        write |= {f"null {s}": {2 + s: 1.0} for s in range(shuffles)}
        # what takes most memory is held of writers alone
        each = {(l, role): torch.cat([weights, halves[:1]]) for l in layers for role in WRITERS}
        each |= {(l, role): halves for l in layers for role in READERS}
        sums, losses = weighted_gradients(lm, examples, each, label=f"gradients of {label}", progress=progress)
        mean = (losses.reshape(2, -1).sum(dim=1) / tokens.sum(dim=1)).tolist()
        return _read_off(lm, sums, write, fold_gain, dict(zip(("pos", "neg"), mean, strict=True)), len(rows))

    return _kept(
        lm, make, examples, {"layers": list(layers), "fold_gain": fold_gain, "swaps": swaps.tolist()}, label, cache
    )


def text_gradients(
    lm: LM,
    examples: Sequence[Example],
    towards: Sequence[int],
    away: Sequence[int],
    layers: Sequence[int],
    *,
    fold_gain: bool = False,
    label: str = "texts",
    cache: Path | None = None,
    progress: bool = True,
) -> Gradients:
    """The gradient of `-log P(towards) + log P(away)`, token ids, at the one label of each text, in the mean over texts: the
    `contrast` of one set, with its halves. away: may be empty. Otherwise as `pair_gradients`."""

    def loss(logits: Tensor, _: Tensor) -> Tensor:
        logp = logits.float().log_softmax(dim=-1)
        found = -logp[:, list(towards)].logsumexp(dim=-1)
        return found + logp[:, list(away)].logsumexp(dim=-1) if away else found

    def make() -> Gradients:
        n = len(examples)
        halves = in_halves(torch.full((n,), 1 / n), [0] * n)
        each = {(l, role): halves for l in layers for role in ROLES}
        sums, losses = weighted_gradients(lm, examples, each, loss, f"gradients of {label}", progress)
        return _read_off(lm, sums, BY_HALVES, fold_gain, {"texts": float(losses.mean())}, n)

    asked = {"layers": list(layers), "fold_gain": fold_gain, "words": [list(towards), list(away)]}
    return _kept(lm, make, examples, asked, label, cache)


BY_HALVES: Kinds = {CONTRAST: {0: 1.0, 1: 1.0}, HALVES[0]: {0: 1.0}, HALVES[1]: {1: 1.0}}


def in_halves(weights: Float[Tensor, " m"], groups: Sequence[object]) -> Float[Tensor, "2 m"]:
    """Weights of one or two sides of n texts, cut in two by a seeded draw in which every group is shared out evenly."""
    drawn = np.random.default_rng(zlib.crc32(b"gradient halves")).permutation(len(groups)).tolist()
    first = torch.zeros(len(groups), dtype=torch.bool)
    first[sorted(drawn, key=groups.__getitem__)[::2]] = True
    first = first.repeat(len(weights) // len(groups))
    return torch.stack([weights * first, weights * ~first])


def _read_off(lm: LM, sums: Sums, write: Kinds, fold: bool, losses: dict[str, float], n: int) -> Gradients:
    """What is kept of the sums. write: the kinds of what writes; those of what reads are D and its halves."""

    def made(kind: str, one: tuple[int, str]) -> Tensor:
        of = (write if one[1] in WRITERS else BY_HALVES)[kind]
        return sum(sums[one][row] if c == 1 else c * sums[one][row] for row, c in of.items())

    roots, norms, entries = {}, {}, {}
    for side, roles, kinds in (("write", WRITERS, write), ("read", READERS, BY_HALVES)):
        for kind, l in product(kinds, sorted({l for l, _ in sums})):
            roots[kind, side, l] = _root([_gained(lm, made(kind, (l, r)), l, r, fold) for r in roles], side)
    for l, role in sums:
        D = made(CONTRAST, (l, role))
        norms[l, role], entries[lm.decoder.param_name(l, role)] = float(D.double().norm()), leading(D, RANK)
    inner = {side: [0.0, 0.0, 0.0] for side in ("write", "read")}
    for one in sums:
        a, b = (made(half, one).double() for half in HALVES)
        into = inner["write" if one[1] in WRITERS else "read"]
        for at, (x, y) in enumerate(((a, b), (a, a), (b, b))):
            into[at] += float((x * y).sum())
    agree = {side: ab / max((aa * bb) ** 0.5, 1e-300) for side, (ab, aa, bb) in inner.items()}
    return Gradients(roots, norms, WeightDiff(entries), agree, losses, n)


def _gained(lm: LM, M: Tensor, l: int, role: str, fold: bool) -> Float[Tensor, "out in_"]:
    """What a writer adds to the residual stream: with the gain of a norm on its output folded in, where there is one."""
    return output_gain(lm.decoder, l, role)[:, None] * M if fold and role in WRITERS else M


def _root(parts: Sequence[Tensor], side: str) -> Float[Tensor, "d c"]:
    """`U sqrt(lambda)` of the leading eigenpairs of `sum M M^T / |M|^2` (read: of `M^T M`), float32."""
    G = 0.0
    for M in parts:
        A = (M if side == "write" else M.T).double()
        G = G + A @ A.T / max(float(A.square().sum()), 1e-300)
    values, vectors = top_eigh(G, min(COLUMNS, len(G)))
    return (vectors * values[: vectors.shape[1]].clamp(min=0).sqrt()).float().contiguous()


def leading(M: Float[Tensor, "out in_"], rank: int) -> LowRank:
    """The best approximation of M of a rank, as factors."""
    tall = M.shape[0] >= M.shape[1]
    A = (M.T if tall else M).double()  # as few rows as may be
    _, U = top_eigh(A @ A.T, min(rank, len(A)))
    other = U.T @ A
    B, right = (other.T, U.T) if tall else (U, other)
    return LowRank(B.float().contiguous(), right.float().contiguous())


def _kept(
    lm: LM, make: Callable[[], Gradients], examples: Sequence[Example], settings: dict, label: str, cache: Path | None
) -> Gradients:
    """From the cache where it is kept."""
    if cache is None or not (model := lm.fingerprint):
        return make()
    params = {"model": model, "texts": digest(repr(examples).encode()), "label": label, **settings}
    key = stage_key(params, code=["ws.gradient.capture.pair_gradients", "ws.gradient.capture.text_gradients"])
    path = cache / "gradients" / f"{slug(label)}_{key.params[:8]}.safetensors"
    return kept(path, key, lambda target: _save(make(), target), _load)


def _save(found: Gradients, path: Path) -> None:
    tensors = {f"root/{kind}/{side}/{l}": x for (kind, side, l), x in found.roots.items()}
    for name, entry in found.diff.entries.items():
        tensors |= {f"B/{name}": entry.B, f"A/{name}": entry.A}
    norms = [[l, role, value] for (l, role), value in found.norms.items()]
    about = {"norms": norms, "agree": found.agree, "losses": found.losses, "n": found.n}
    save_file({n: x.contiguous() for n, x in tensors.items()}, path, metadata={"gradients": json.dumps(about)})


def _load(path: Path) -> Gradients:
    tensors, header = read_safetensors(path)
    about, roots, entries = json.loads(header["gradients"]), {}, {}
    for name, x in tensors.items():
        where, _, rest = name.partition("/")
        if where == "root":
            kind, side, l = rest.split("/")
            roots[kind, side, int(l)] = x
        elif where == "B":
            entries[rest] = LowRank(x, tensors[f"A/{rest}"])
    norms = {(l, role): value for l, role, value in about["norms"]}
    return Gradients(roots, norms, WeightDiff(entries), about["agree"], about["losses"], about["n"])
