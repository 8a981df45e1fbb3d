"""What a model holds in memory, as a hash, and the fingerprint that follows it.

    sum_i b_i x_i  mod 2^64     per block of 2^15 words x_i of 64 bits, b_i fixed odd numbers

An odd factor loses no bit, so no single change goes unseen, and the places count. The sums run at the speed of a copy (2 to 5
GB/s on one core) and are the same on every device; they tell changes by training or by hand, not by somebody who looks for
another model of the same sums.
"""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ws.cache.syntax import digest
from ws.model.guard import check_plain, hooked

BLOCK = 1 << 15
AT_ONCE = 256  # blocks per step on an accelerator; on the CPU one, which stays in its cache


def checksum(model: nn.Module) -> str:
    """Hash of names, shapes, dtypes and bits of all parameters and buffers (non-persistent too), tied ones read once. What
    is not in memory (meta, offloaded) counts by its shape alone."""
    factors = torch.randint(-(1 << 63), (1 << 63) - 1, (BLOCK,), generator=torch.Generator().manual_seed(0)) | 1
    placed, read, rows = {torch.device("cpu"): factors}, {}, []
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, x in every:
        where = (
            (x.data_ptr(), x.shape, x.dtype, x.device) if isinstance(x, Tensor) and x.layout == torch.strided else None
        )
        if where is None or x.device.type == "meta":
            rows.append(f"{name} {where and (tuple(x.shape), x.dtype)}")
            continue
        if where not in read:
            b = placed.setdefault(x.device, placed[torch.device("cpu")].to(x.device))
            read[where] = digest(_sums(x, b).cpu().numpy().tobytes())
        rows.append(f"{name} {tuple(x.shape)} {x.dtype} {read[where]}")
    return digest("\n".join(rows).encode())


def _sums(x: Tensor, factors: Int[Tensor, " b"]) -> Int[Tensor, " blocks"]:
    """The sums of a tensor's raw words, in order; the last word is filled up with zeros."""
    raw = x.detach().contiguous().view(-1).view(torch.uint8)
    if len(raw) % 8 or raw.storage_offset() % 8:
        raw = torch.nn.functional.pad(raw, (0, -len(raw) % 8)).clone()
    words = raw.view(torch.int64)
    step = BLOCK * (AT_ONCE if x.device.type != "cpu" else 1)
    products, found = torch.empty_like(words[:step]), []
    for part in words.split(step):
        whole = len(part) // BLOCK * BLOCK
        if whole:
            rows = products[:whole].view(-1, BLOCK)
            found.append(torch.mul(part[:whole].view(-1, BLOCK), factors, out=rows).sum(dim=1))
        if whole < len(part):
            rest = part[whole:]
            found.append((rest * factors[: len(rest)]).sum()[None])
    return torch.cat(found) if found else words.new_zeros(0)


class Fingerprint:
    """The field `LM.fingerprint`: what was given (a hub commit or a folder's content, and the dtype) while the model holds what
    it held then, `<given>+<hash>` of what it holds where that was changed since, "" where nothing was given and while
    somebody's forward hook is set: what is computed then is kept nowhere. ValueError while the model is steered. Asking costs
    one pass over the weights: ask once per use."""

    def __get__(self, lm: object | None, _owner: type | None = None) -> str:
        given, loaded = ("", "") if lm is None else lm.__dict__["_fingerprint"]
        if not given:
            return ""
        check_plain(lm.model)
        if hooked(lm.model):
            return ""
        if loaded is None:  # `LM.at_rest`
            return given
        now = checksum(lm.model)
        return given if now == loaded else f"{given}+{now}"

    def __set__(self, lm: object, given: str) -> None:
        lm.__dict__["_fingerprint"] = given, checksum(lm.model) if given else ""
