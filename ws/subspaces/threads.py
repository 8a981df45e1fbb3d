"""Small problems side by side, each with one thread of linear algebra: quicker than one after the other with all threads."""

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock

import numpy
import scipy
import torch

MOST = 4  # problems at a time
ONE = Lock()  # threads of a library are those of the whole process


@cache
def libraries() -> list[list[Callable]]:
    """What tells and what sets the threads of the OpenBLAS that numpy and scipy each bring; [] where one brings none."""
    found = []
    for place in (Path(package.__file__).parent for package in (numpy, scipy)):
        for file in (*place.with_name(f"{place.name}.libs").glob("*openblas*"), *place.glob(".dylibs/*openblas*")):
            held = ctypes.CDLL(str(file))
            names = [f"{a}openblas_{{}}_num_threads{b}" for a in ("scipy_", "") for b in ("", "64_")]
            known = [name for name in names if hasattr(held, name.format("set"))][:1]
            found += [[getattr(held, name.format(what)) for what in ("get", "set")] for name in known]
    return found if len(found) == 2 else []


@contextmanager
def side_by_side() -> Iterator[Callable]:
    """`map` by several threads, each with one thread for linear algebra; the usual one where there is one thread, or where a
    library does not tell its threads."""
    threads = torch.get_num_threads()
    if threads < 2 or not libraries():
        yield map
        return
    with ONE, ThreadPoolExecutor(min(threads, MOST), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        before = [tell() for tell, _ in libraries()]
        try:
            for _, put in libraries():
                put(1)
            yield pool.map
        finally:
            torch.set_num_threads(threads)
            for (_, put), n in zip(libraries(), before, strict=True):
                put(n)
