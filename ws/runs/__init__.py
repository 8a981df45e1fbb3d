"""Notebooks as runs: one with papermill, many on Dask, their pages and tables. It knows no science."""

import importlib
from types import ModuleType


def need(module: str, extra: str) -> ModuleType:
    """Import what an extra of the package installs. Raises ModuleNotFoundError that names the extra in one line."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        hint = f"{error.name} is missing: pip install 'weight-steering[{extra}]'"
        raise ModuleNotFoundError(hint, name=error.name) from None
