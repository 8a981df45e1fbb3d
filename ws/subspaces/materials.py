"""What candidates are built from: base weights and base activations. Grams that several candidates share are made once:
one pass from the last layer to the first accumulates what reads downstream of each block. Float32 copies of a layer's
weights live only while their layer is at work."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from threading import RLock, local

import torch
from jaxtyping import Float
from torch import Tensor

from ws.model.decoder import Decoder
from ws.subspaces.algebra import Basis, gram_basis, pca
from ws.subspaces.candidate import Candidate, get
from ws.subspaces.captures import BaseCaptures
from ws.subspaces.check import as_basis
from ws.subspaces.grams import GRAMS, SUMS, LayerWeights, left_gram, weight_eps, weight_noise
from ws.subspaces.noise import FLOAT32_EPS, MOST_TURN, NARROW_TURN, Noise, rounding

Captures = BaseCaptures | Callable[[], BaseCaptures] | None
GRAM_BUDGET = 4 << 30  # bytes of per-layer Grams kept between the passes; beyond it they are computed twice


class TooEarly(BaseException):
    """What all layers share was asked for while they are still being added up, or while candidates are built side by side.
    Beyond what a candidate's own `except Exception` takes."""


def once(make: Callable) -> property:
    """A property made once per object. That of functools locks up to Python 3.11 what a thread would wait for."""

    def get(self):
        if make not in self.made:
            self.made[make] = make(self)
        return self.made[make]

    return property(get, doc=make.__doc__)


def check_widths(k: int, k_broad: int, d: int) -> None:
    """ValueError unless `1 <= PCS <= d` and `K_BROAD >= 1` (a broad basis has at most d columns)."""
    if not 1 <= k <= d:
        raise ValueError(f"PCS = {k}: a basis has 1 to d = {d} columns")
    if k_broad < 1:
        raise ValueError(f"K_BROAD = {k_broad}: a broad basis has at least 1 column")


class Materials:
    """A-side materials: base weights, base captures, the width `k` of a basis and `k_broad` of a broad one.

    `of(name, l)` is another candidate's basis at layer l, for candidates composed of others. base: the captures, or a
    function that makes them when they are first looked at. A candidate that looks at what it does not say it `sees` is
    a ValueError: its kept bases would not follow what they depend on. gradients: a function from a set of texts to its
    gradients (`ws.gradient.sets`). known: bases by layer of candidates that are there already, for those composed of them.
    """

    def __init__(
        self,
        decoder: Decoder,
        base: Captures,
        sink_token: int,
        k: int = 8,
        k_broad: int = 64,
        fold_gain: bool = False,
        gradients: Callable[[str], object] | None = None,
        known: Mapping[str, Sequence[Basis]] | None = None,
    ):
        check_widths(k, k_broad, decoder.d)
        self.decoder, self.sink_token, self.d, self.n_layers = decoder, sink_token, decoder.d, decoder.n_layers
        self.k, self.k_broad = k, min(k_broad, decoder.d)
        self._base, self._fold, self._gradients, self._known = base, fold_gain, gradients, known or {}
        self._layers: dict[int, LayerWeights] = {}
        self._at_work: LayerWeights | None = None
        self._composed: dict[tuple[str, int], Basis] = {}
        self._of_thread, self._locks, self._begun, self.made = local(), {}, set(), {}
        self._downstream: dict[int, Callable[[], Basis]] = {}  # while the pass over all layers is under way
        self.closed = False  # what all share and is not there yet waits: it is made by all threads together
        self.visit: Callable[[int], bool] | None = None  # called when that pass is at a layer: whether to come back
        self.asked: dict[str, set[str]] = {}  # candidate -> those it was composed of

    def __repr__(self) -> str:
        return (
            f"Materials({self.n_layers} layers, d {self.d}, k {self.k}, k_broad {self.k_broad}; base weights, captures)"
        )

    def rounding(self, *parts: Tensor) -> Noise:
        """What rounding does to what was computed from these activations of the model, in its precision."""
        eps = weight_eps(self.decoder)
        return Noise(rounding(*parts, eps=eps), most=NARROW_TURN if eps > FLOAT32_EPS else MOST_TURN)

    def product_noise(self, l: int, a: str, b: str, times: int = 1) -> Noise:
        """Of the product of two of block l's matrices, of q the transpose, each row of the second so many times: along any two
        directions `sqrt(sigma_A^2 |B|^2 + |A|^2 sigma_B^2)`."""
        if weight_eps(self.decoder) <= FLOAT32_EPS:
            return Noise()
        w = self.layer(l)
        A, B = w.q_wide.T if a == "q" else getattr(w, f"{a}_wide"), getattr(w, f"{b}_wide")
        one, two = (weight_noise(self.decoder, torch.linalg.vector_norm(M, dim=1) ** 2, M.shape[1]) for M in (A, B))
        size_a, size_b = getattr(w, f"{a}_norm"), getattr(w, f"{b}_norm") * times**0.5
        return Noise(sigma=((one.sigma * size_b) ** 2 + (two.sigma * size_a) ** 2) ** 0.5, most=NARROW_TURN)

    def pca(self, X: Float[Tensor, "n d"], k: int | None = None) -> Basis:
        """Top `k` principal directions of activations of the model."""
        return pca(X, k or self.k, self.rounding(X))

    def top(self, l: int, gram: str) -> Basis:
        """Top `k` left singular vectors of what a Gram of block l is the Gram of (`LayerWeights`)."""
        w = self.layer(l)
        return gram_basis(getattr(w, gram), self.k, noise=w.noise(gram))

    @property
    def _asking(self) -> list[Candidate]:
        """What this thread is building, each asked for by the one before it."""
        return self._of_thread.__dict__.setdefault("asking", [])

    @property
    def base(self) -> BaseCaptures:
        """Captures of the unsteered model on the FIT probes: `clean`, and `pos`, `neg` under the personas. A candidate
        of one's own gets all three with the same probe in row i (a clean row once per persona pair)."""
        blind = next((c.name for c in self._asking if "prompts" not in c.sees), None)
        if blind:
            raise ValueError(f"candidate {blind} looks at activations: decorate it with sees=('prompts',)")
        if self._base is None:
            raise ValueError("these materials hold no captures")
        if not isinstance(self._base, BaseCaptures):
            self._open()
            self._base = self._base()
        return self._base.aligned if self._asking and not self._asking[-1].shipped else self._base

    def gradients(self, texts: str):
        """Gradients of the base model on a set of texts (`ws.gradient.capture.Gradients`)."""
        blind = next((c.name for c in self._asking if not {"pairs", "other pairs", "prompts"} & set(c.sees)), None)
        if blind:
            raise ValueError(
                f"candidate {blind} looks at gradients: decorate it with sees=('pairs',) or ('other pairs',)"
            )
        if self._gradients is None:
            raise ValueError("these materials hold no gradients: give `explain` the training pairs (pairs=...)")
        self._open()
        return self._gradients(texts)

    def _open(self, also: bool = True) -> None:
        if self.closed or not also:
            raise TooEarly

    def layer(self, l: int) -> LayerWeights:
        """Weights and Grams of block l. One block's weights are held at a time, Grams up to a budget."""
        if l not in self._layers:
            if (len(self._layers) + 1) * len(GRAMS | SUMS) * self.d * self.d * 8 > GRAM_BUDGET:
                self._layers.clear()
            self._layers[l] = LayerWeights(self.decoder, l, self._fold)
        if self._at_work not in (None, self._layers[l]):
            self._at_work.release()
        self._at_work = self._layers[l]
        return self._at_work

    def of(self, name: str, l: int) -> Basis:
        """Basis of candidate `name` at layer l (the one basis of a shared candidate)."""
        entry = get(name)
        for asking in self._asking:
            self.asked.setdefault(asking.name, set()).add(name)
            if unseen := set(entry.sees) - {"weights", "personas", *asking.sees}:
                raise ValueError(f"candidate {asking.name} uses {name}, which sees {', '.join(unseen)}: add it to sees")
        return self.build(entry, l)

    def build(self, entry: Candidate, l: int) -> Basis:
        """A candidate's basis at layer l, built once, checked as it is made (`ws.subspaces.algebra.check_basis`)."""
        if entry.name in self._known:
            return self._known[entry.name][0 if entry.shared else l]
        key = (entry.name, -1 if entry.shared else l)
        if self.closed and key in self._begun:  # by who waits for this thread
            raise TooEarly
        with self._locks.setdefault(key, RLock()):  # the second to ask waits for the first
            if key in self._composed:
                return self._composed[key]
            first = not self.closed and key not in self._begun
            self._begun |= {key} if first else set()
            self._asking.append(entry)
            try:
                made = entry.build(self) if entry.shared else entry.build(self, l)
            finally:
                self._asking.pop()
                self._begun -= {key} if first else set()
            made = as_basis(made, self.d, entry.name if entry.shared else f"{entry.name} at layer {l}")
            coarser = weight_eps(self.decoder) / FLOAT32_EPS
            if coarser > 1 and made.turn and made.most < NARROW_TURN:  # one's own, which spoke of float32's rounding
                turn = min(made.turn * coarser, 1.0)
                doubt = made.ill_conditioned or turn > NARROW_TURN
                made = replace(made, turn=turn, most=NARROW_TURN, ill_conditioned=doubt)
            self._composed[key] = made
        return self._composed[key]

    def forget(self, l: int) -> None:
        """Let go what was built for layer l alone."""
        self._composed = {key: basis for key, basis in self._composed.items() if key[1] != l}

    @once
    def unembed_gram(self) -> Tensor:
        """`W_lm^T W_lm`, accumulated over vocabulary chunks."""
        self._open()
        return left_gram(self.decoder.logits_module().weight.detach().T, exact=True)

    @property
    def unembed_noise(self) -> Noise:
        return weight_noise(self.decoder, self.unembed_gram.diagonal(), self.decoder.vocab)

    @once
    def lm_broad(self) -> Basis:
        """lm64: top `k_broad` right singular vectors of the unembedding."""
        return gram_basis(self.unembed_gram, self.k_broad, noise=self.unembed_noise)

    @once
    def _global(self) -> tuple[Tensor, Tensor, dict[int, Callable[[], Basis]]]:
        """One pass from the last layer down: all readers, all writers, readers downstream of each block."""
        self._open(not self._downstream)
        readers, columns = self.unembed_gram.clone(), self.decoder.vocab
        writers, asking, self._of_thread = torch.zeros_like(readers), self._of_thread, local()
        try:
            for l in reversed(range(self.n_layers)):
                w, noise = self.layer(l), weight_noise(self.decoder, readers.diagonal(), columns)
                read, write = w.read_gram.to(readers.device), w.write_gram.to(readers.device)
                self._downstream[l] = cache(partial(gram_basis, readers, self.k_broad, noise=noise))
                needed = self.visit and self.visit(l)
                self._downstream[l]()  # before the sum goes on
                columns, readers, writers = columns + w.columns("read_gram"), readers.add_(read), writers.add_(write)
                if self.visit:
                    w.thin(needed)
            return readers, writers, self._downstream
        finally:
            self._of_thread, self._downstream = asking, {}

    def noise_of_all(self, gram: str) -> Noise:
        """Of what `readers_gram` or `writers_gram` is the Gram of."""
        reads = gram == "readers_gram"
        columns = self.decoder.vocab if reads else 0
        for l in range(self.n_layers):
            columns += LayerWeights(self.decoder, l, self._fold).columns("read_gram" if reads else "write_gram")
        return weight_noise(self.decoder, getattr(self, gram).diagonal(), columns)

    @property
    def readers_gram(self) -> Tensor:
        """`sum_l read_gram(l) + W_lm^T W_lm`."""
        return self._global[0]

    @property
    def writers_gram(self) -> Tensor:
        """`sum_l [W_o|W_down] [W_o|W_down]^T`."""
        return self._global[1]

    def downstream_broad(self, l: int) -> Basis:
        """down64(l): what the unembedding and the blocks after l read."""
        return (self._downstream if l in self._downstream else self._global[2])[l]()

    @once
    def read_broad(self) -> Basis:
        """gr64: top `k_broad` eigenvectors of `readers_gram`."""
        return gram_basis(self.readers_gram, self.k_broad, noise=self.noise_of_all("readers_gram"))
