"""A second device for tests on a machine that has none: tensors that say `other`, hold their numbers on the CPU, and refuse what
a GPU refuses.

Inside `elsewhere()` whatever is made on or moved to `other` is such a tensor. An operation on tensors of both devices is a
RuntimeError, as are `numpy()` and whatever needs the bytes. What runs here runs on a GPU as far as devices go; numbers are the
CPU's.
"""

from contextlib import contextmanager
from threading import Thread
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    """What torch asks of a device's module. Nobody is to choose it by himself: other tests run in the same process."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("other", backend_module=Backend())
DEVICE = torch.device("other", 0)


class There(torch.Tensor):
    """A tensor on the second device."""

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        shape = torch.empty_strided(here.shape, here.stride(), dtype=here.dtype, device="meta")
        made = torch.Tensor._make_subclass(cls, shape, False, dispatch_device=True, device_for_backend_keys=DEVICE)
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> list:
        return self.here.tolist()

    def __getitem__(self, key):
        return super().__getitem__(_indices(key))

    def __setitem__(self, key, value):
        super().__setitem__(_indices(key), value)


def _indices(key):
    """Lists of places as tensors there: torch makes them past the dispatcher."""
    if isinstance(key, tuple):
        return tuple(map(_indices, key))
    return There(torch.tensor(key)) if isinstance(key, list) else key


def there(x):
    return There(x) if isinstance(x, torch.Tensor) and not isinstance(x, There) else x


def here(x):
    return x.here if isinstance(x, There) else x


def dispatched(func, args, kwargs):
    if func is torch.ops.prim.device.default:
        return DEVICE
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    far = [x for x in tensors if isinstance(x, There)]
    near = [x for x in tensors if not isinstance(x, There) and x.ndim > 0]
    asked = kwargs.get("device")
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    picks = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)
    if far and near and not moves and not (picks and isinstance(args[0], There)):
        shapes = [tuple(x.shape) for x in (far[0], near[0])]
        raise RuntimeError(f"{func}: tensors on two devices, {DEVICE.type} {shapes[0]} and cpu {shapes[1]}")
    goes = torch.device(asked).type == DEVICE.type if asked is not None else bool(far)
    if func is torch.ops.aten.copy_.default:
        goes = isinstance(args[0], There)
    kwargs = {
        key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()
    }
    found = func(*tree_map(here, args), **tree_map(here, kwargs))
    if func._schema.name.split("::")[1].endswith("_") and args and isinstance(args[0], There):
        return args[0]
    if goes and func is torch.ops.aten._to_copy.default and not far:
        found = found.clone()
    return tree_map(there, found) if goes else found


class Elsewhere(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})


@contextmanager
def elsewhere():
    made = torch.tensor

    def tensor(data, *args, device=None, **kwargs):  # torch.tensor goes past the dispatcher
        found = made(data, *args, **kwargs)
        return There(found) if device is not None and torch.device(device).type == DEVICE.type else found

    run = Thread.run

    def there_too(thread: Thread) -> None:  # a mode is a thread's own
        with Elsewhere():
            run(thread)

    with patch.object(torch, "tensor", tensor), patch.object(Thread, "run", there_too), Elsewhere():
        yield DEVICE


def move(model: nn.Module) -> nn.Module:
    """The model with all parameters and buffers there."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and not isinstance(p.data, There):
                module._parameters[name] = nn.Parameter(There(p.detach().clone()), requires_grad=False)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = There(b.clone())
    return model
