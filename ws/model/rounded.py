"""Products of float32 matrices whose entries bfloat16 holds: units for bfloat16, where there are any, take a third of the time
and give what every machine gives, but for the order of the sums."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from types import SimpleNamespace

import torch
from torch import Tensor

LOCK = RLock()  # the setting is the process's


def rounded(x: Tensor) -> Tensor:
    """Float32 entries rounded to what bfloat16 holds: each is off by at most 2^-8 of itself."""
    return x.bfloat16().float()


@contextmanager
def fast_products(on: bool = True) -> Iterator[None]:
    """A context for products of `rounded` matrices, and of no others: float32 products of other threads are rounded meanwhile. A
    GPU's are as they are."""
    matmul = getattr(torch.backends.mkldnn, "matmul", SimpleNamespace(fp32_precision=""))  # not before torch 2.9
    if not on:
        yield
        return
    with LOCK:
        before = matmul.fp32_precision
        try:
            matmul.fp32_precision = "bf16"
            yield
        finally:
            matmul.fp32_precision = before
