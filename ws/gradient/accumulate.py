"""Weighted sums of per-text gradients of weight matrices, in one pass over the texts. (docs/method.md section 12)

For a linear map `y = W x` the gradient of a text's loss is `sum_t delta_t x_t^T`, `delta_t` the loss's gradient at the output of
token t. Inputs and deltas of a batch give every weighted sum over texts at once: the differences of two sides, and the same
with labels shuffled, cost a matrix product each and no further pass. Parameters get no gradient and keep their bits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ws.model.guard import check_plain, check_unhooked
from ws.model.lm import LM
from ws.model.prefix import logits_at
from ws.model.wide import widened
from ws.show.bars import tqdm
from ws.train.examples import collate

TOKENS = 256  # of a batch, padding included: what a batch holds in memory at every layer
Example = dict[str, list[int]]
Loss = Callable[[Float[Tensor, "k V"], Int[Tensor, " k"]], Float[Tensor, " k"]]
Sums = dict[tuple[int, str], Float[Tensor, "S out in_"]]


def cross_entropy(logits: Float[Tensor, "k V"], labels: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
    """`-log p(label)` in nats, float32."""
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def weighted_gradients(
    lm: LM,
    examples: Sequence[Example],
    weights: Mapping[tuple[int, str], Float[Tensor, "S n"]],
    loss: Loss = cross_entropy,
    label: str = "gradients",
    progress: bool = True,
) -> tuple[Sums, Float[Tensor, " n"]]:
    """`sum_i weights[target][s, i] grad loss_i` for every target `(layer, role)` and s, float32 `(S, out, in)`; and the texts'
    losses. `loss_i` is summed over the labels of text i; `loss` is of the logits before each. The model is as it was
    before: bits, `requires_grad`, modes. In half precision everything is computed in float32. ValueError for a steered or a
    hooked model, and for a text whose loss or gradient is not finite."""
    total = Adder(weights)
    losses = each_gradient(lm, examples, list(weights), total, loss, label, progress)
    return total.sums(), losses


class Adder:
    """Weighted sums of the gradients that `each_gradient` hands over."""

    def __init__(self, weights: Mapping[tuple[int, str], Float[Tensor, "S n"]]):
        self._weights, self._sums = weights, {}

    def __call__(self, places: list[int], one: tuple[int, str], x: Tensor, delta: Tensor) -> None:
        rows = self._weights[one][:, places].float()
        if one not in self._sums:
            self._sums[one] = x.new_zeros(len(rows), delta.shape[-1], x.shape[-1])
        for total, row in zip(self._sums[one], rows, strict=True):
            there = row.nonzero()[:, 0].to(delta.device)  # texts of weight 0 are left out
            if len(there):
                d = delta[there] * row.to(delta.device)[there, None, None]
                total.addmm_(d.flatten(0, 1).T, x[there].flatten(0, 1))

    def sums(self) -> Sums:
        """The sums on the CPU. ValueError for one that is not finite."""
        if not all(torch.isfinite(one).all() for one in self._sums.values()):
            raise ValueError("a gradient is not finite; load the model with DTYPE float32")
        return {one: total.cpu() for one, total in self._sums.items()}


def each_gradient(
    lm: LM,
    examples: Sequence[Example],
    targets: Sequence[tuple[int, str]],
    use: Callable[[list[int], tuple[int, str], Tensor, Tensor], None],
    loss: Loss = cross_entropy,
    label: str = "gradients",
    progress: bool = True,
) -> Float[Tensor, " n"]:
    """`use(places, target, x, delta)` for every batch and target: places of the batch's texts, inputs `(m, T, in)` and loss
    gradients at the outputs `(m, T, out)`, zero at padding. Returns the texts' losses; errors as in `weighted_gradients`."""
    check_plain(lm.model)
    check_unhooked(lm.model)
    losses = torch.zeros(len(examples))
    with widened(lm.model), _frozen(lm.model), tqdm(total=len(examples), desc=label, disable=not progress) as bar:
        for places in _batches(examples):
            found, losses[places] = _batch(lm, [examples[i] for i in places], targets, loss)
            if not torch.isfinite(losses[places]).all():
                raise ValueError(f"{label}: the loss of a text is not finite; load the model with DTYPE float32")
            for one, pair in found.items():
                use(places, one, *pair)
            bar.update(len(places))
    return losses


def _batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Places of texts of like length, up to TOKENS tokens together."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(examples[i]["input_ids"]) > TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _batch(
    lm: LM, rows: list[Example], targets: Sequence[tuple[int, str]], loss: Loss
) -> tuple[dict[tuple[int, str], tuple[Tensor, Tensor]], Tensor]:
    """Inputs and output gradients `(n, T, in)`, `(n, T, out)` of every target, and the texts' losses."""
    inputs = collate(rows)
    labels, outputs, read = inputs.pop("labels"), {}, {}
    rows_of, at = (labels[:, 1:] != -100).nonzero(as_tuple=True)

    def watch(one: tuple[int, str]) -> Callable:
        def record(module: nn.Module, args: tuple, output: Tensor) -> None:
            outputs[one], read[one] = output, args[0].detach()

        return record

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    with ExitStack() as stack, torch.enable_grad():
        first = lm.decoder.blocks[min(l for l, _ in targets)]  # no graph is kept of what lies below
        hooks = [first.register_forward_pre_hook(begin, with_kwargs=True)]
        hooks += [lm.decoder.linear(*one).register_forward_hook(watch(one)) for one in targets]
        for hook in hooks:
            stack.callback(hook.remove)
        logits = logits_at(lm.model, inputs["input_ids"], inputs["attention_mask"], rows_of, at)
        each = loss(logits, labels[rows_of, at + 1].to(logits.device))
        deltas = torch.autograd.grad(each.sum(), [outputs[one] for one in targets])
    sums = torch.zeros(len(rows)).index_add_(0, rows_of, each.detach().float().cpu())
    return {one: (read[one], delta) for one, delta in zip(targets, deltas, strict=True)}, sums


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, no module draws at random; both as before afterwards."""
    asked = [p for p in model.parameters() if p.requires_grad]
    modes = [m for m in model.modules() if m.training]
    try:
        for p in asked:
            p.requires_grad_(False)
        for m in modes:
            m.training = False
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)
        for m in modes:
            m.training = True
