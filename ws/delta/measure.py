"""Delta SVD: what each block adds to the residual stream, `delta_l = h_{l+1} - h_l` over tokens.

The first token of a sequence is left out (attention-sink outlier). `h_L` is the last block's raw output, or what the
final norm makes of it. A forward hook takes each layer's numbers when the pass reaches it, on the layer's device, so
nothing of size L x T x d is ever held. All standard deviations are of the population. (docs/method.md section 9)

    rel_step_t = |delta_t| / max(|h_t|, 1e-8)        cos_t = cos(delta_t, h_t)        parallel_frac = mean |cos_t|
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ws.delta.bootstrap import SKETCH, UNKNOWN, Interval, Parts, bootstrap, bootstrap_weights, group_parts, sketch_basis
from ws.delta.calibration import Sequence, as_documents, as_stream, bootstrap_groups, load_calibration
from ws.delta.phases import RANK, phase_of
from ws.delta.reading import read_deltas
from ws.delta.report import DeltaRun, LayerDelta
from ws.delta.spectrum import Spectrum, eff_rank, right_gram, spectrum, spectrum_of_gram
from ws.model.guard import check_plain
from ws.model.lm import LM
from ws.show.bars import tqdm

MODES = ("stream", "documents")
Batches = list[list[Sequence]]


def token_sums(delta: Float[Tensor, "N d"], h: Float[Tensor, "N d"]) -> Float[np.ndarray, "2 5"]:
    """Sums over tokens, and sums of squares, of |delta|, |h|, rel_step, cos(delta, h), |cos|, in float64."""
    step, size = torch.linalg.vector_norm(delta, dim=1).double(), torch.linalg.vector_norm(h, dim=1).double()
    cos = (delta.double() * h.double()).sum(dim=1) / (step * size).clamp_min(1e-16)
    numbers = torch.stack([step, size, step / size.clamp_min(1e-8), cos, cos.abs()])
    return torch.stack([numbers.sum(dim=1), numbers.square().sum(dim=1)]).cpu().numpy()


def layer_numbers(
    l: int,
    n_layers: int,
    sums: np.ndarray,
    count: int,
    found: Spectrum,
    top_k: int,
    intervals: tuple[Interval, Interval],
) -> LayerDelta:
    """A layer's fields from `token_sums` over `count` tokens, and its spectrum."""
    mean = sums[0] / count
    spread = np.sqrt(np.maximum(sums[1] / count - mean**2, 0.0))
    shares = found.shares
    return LayerDelta(
        L=l, phase=phase_of(l, n_layers), frob=float(np.sqrt(found.energy.sum())), token_norm_mean=float(mean[0]),
        token_norm_std=float(spread[0]), h_norm_mean=float(mean[1]), rel_step_mean=float(mean[2]),
        rel_step_std=float(spread[2]), parallel_frac=float(mean[4]), cos_delta_h_mean=float(mean[3]),
        top_singvals=tuple(float(s) for s in found.singvals[:top_k]), eff_rank=eff_rank(shares),
        top1_frac=float(shares[:1].sum()), top3_frac=float(shares[:3].sum()), top10_frac=float(shares[:10].sum()),
        eff_rank_interval=intervals[0], top1_frac_interval=intervals[1],
        directions=torch.nn.functional.pad(found.directions, (0, 0, 0, max(top_k, RANK) - len(found.directions))),
    )  # fmt: skip


def delta_svd(
    lm: LM,
    texts: list[str] | str | Path | None = None,
    mode: str = "stream",
    final_norm: bool = False,
    max_length: int = 2048,
    top_k: int = 8,
    boot: int = 200,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> DeltaRun:
    """Every block's update on the calibration texts, with directions, spectra and 95 % intervals.

    texts: passages, a file of them (`load_calibration`), or None for the shipped ones. mode `stream`: the texts as one
    sequence, one pass, each layer finished when the pass reaches it. mode `documents`: a sequence per text,
    `batch_size` at a time; per-layer d x d Grams are accumulated, so that more text costs no more memory, and with
    `boot > 0` the texts are read a second time for the intervals. Longer texts are cut at `max_length` tokens and
    counted. boot: draws of the bootstrap over passages (0: none). seed: of the bootstrap. Raises ValueError for an
    unknown mode, fewer than 3 tokens, hidden states that are not finite (naming the block). (docs/method.md section 9)

    Examples:
        >>> import ws
        >>> run = ws.delta_svd(ws.load_lm("tiny"), ["The mill is near the river.", "So is the inn."], boot=0, progress=False)
        >>> run.hidden, run.table()["phase"].to_list()
        (128, ['A', 'B', 'C', 'C', 'D', 'D', 'E', 'E'])
    """
    if texts is None or isinstance(texts, str | Path):
        texts = load_calibration(texts or "")
    check_plain(lm.model)
    if mode not in MODES:
        raise ValueError(f"MODE {mode!r} is unknown; one of {', '.join(MODES)}")
    if top_k < 1 or max_length < 3 or batch_size < 1:
        sizes = f"TOP_K {top_k} and BATCH_SIZE {batch_size} must be at least 1, MAX_LENGTH {max_length} at least 3"
        raise ValueError(sizes)
    sequences = (as_stream if mode == "stream" else as_documents)(lm.tokenizer, texts, max_length) if texts else []
    tokens = sum(len(s.ids) for s in sequences)
    if tokens < 3 or tokens - len(sequences) < 2:
        raise ValueError(
            f"the calibration text has {tokens} tokens in {len(sequences)} sequences; at least 3 tokens are needed, and"
            " the first of each sequence does not count"
        )
    grouped, unit = bootstrap_groups(sequences)
    weights = bootstrap_weights(int(torch.cat([s.passage for s in grouped]).max()) + 1, boot, seed)
    batches = [grouped[i : i + batch_size] for i in range(0, len(grouped), batch_size)]
    layers = (_stream if mode == "stream" else _documents)(lm, batches, final_norm, top_k, weights, progress)
    cut = [s.cut for s in sequences if s.cut]
    return DeltaRun(
        model=lm.name, hidden=lm.decoder.d, n_calib_tokens=tokens, n_sequences=len(sequences), n_cut_tokens=sum(cut),
        n_cut_sequences=len(cut), max_length=max_length, mode=mode, final_norm=final_norm, top_k=top_k, boot=boot,
        seed=seed, bootstrap_unit=unit, layers=tuple(layers),
    )  # fmt: skip


def _stream(
    lm: LM, batches: Batches, final_norm: bool, top_k: int, weights: Float[np.ndarray, "b P"], progress: bool
) -> list[LayerDelta]:
    layers: list[LayerDelta] = []
    with tqdm(total=lm.decoder.n_layers, desc="delta SVD, layers", disable=not progress) as bar:

        def visit(l: int, delta: Tensor, h: Tensor, group: Int[Tensor, " N"]) -> None:
            found = spectrum(delta, max(top_k, RANK))
            intervals = (UNKNOWN, UNKNOWN)
            if len(weights):
                basis = sketch_basis(delta)
                outside = basis.shape[1] < min(delta.shape)
                intervals = bootstrap(found, group_parts(delta, basis, group, weights.shape[1], outside), weights)
            sums = token_sums(delta, h)
            layers.append(layer_numbers(l, lm.decoder.n_layers, sums, len(delta), found, top_k, intervals))
            bar.update()

        for batch in batches:
            read_deltas(lm, batch, final_norm, visit)
    return layers


def _documents(
    lm: LM, batches: Batches, final_norm: bool, top_k: int, weights: Float[np.ndarray, "b P"], progress: bool
) -> list[LayerDelta]:
    n_layers, d, k = lm.decoder.n_layers, lm.decoder.d, max(top_k, RANK)
    sums, counts = np.zeros((n_layers, 2, 5)), [0] * n_layers
    grams: dict[int, Tensor] = {}
    totals: dict[int, Tensor] = {}
    parts: dict[int, Parts] = {}
    spectra, bases, layers = [], [], []

    def add(l: int, delta: Tensor, h: Tensor, _group: Tensor) -> None:
        if len(delta):
            sums[l] += token_sums(delta, h)
            counts[l] += len(delta)
            for sums_of, more in (grams, right_gram(delta)), (totals, delta.double().sum(dim=0)):
                sums_of[l] = sums_of[l].add_(more) if l in sums_of else more

    def add_groups(l: int, delta: Tensor, _h: Tensor, group: Tensor) -> None:
        more = group_parts(delta, bases[l], group, weights.shape[1], bases[l].shape[1] < d)
        parts[l] = parts[l].plus(more) if l in parts else more

    for batch in tqdm(batches, desc="delta SVD, batches", disable=not progress):
        read_deltas(lm, batch, final_norm, add)

    for l in tqdm(range(n_layers), desc="delta SVD, spectra", disable=not progress):
        found = spectrum_of_gram(grams.pop(l), totals[l], max(k, SKETCH) if len(weights) else k)
        if len(weights):
            bases.append(found.directions[:SKETCH].T.to(totals[l].device))
        spectra.append(Spectrum(found.energy, found.directions[:k]))

    for batch in tqdm(batches if bases else [], desc="delta SVD, intervals", disable=not progress):
        read_deltas(lm, batch, final_norm, add_groups)
    for l in range(n_layers):
        intervals = bootstrap(spectra[l], parts[l], weights) if bases else (UNKNOWN, UNKNOWN)
        layers.append(layer_numbers(l, n_layers, sums[l], counts[l], spectra[l], top_k, intervals))
    return layers
