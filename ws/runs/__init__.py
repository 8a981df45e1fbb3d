"""Notebooks as runs: one with papermill, many on Dask, their pages and tables. It knows no science."""

import importlib
import sys
from types import ModuleType


class Missing(ModuleNotFoundError):
    """What an extra of the package would have installed."""


def need(module: str, extra: str) -> ModuleType:
    """Import what an extra installs. Raises Missing, whose one line names the extra."""
    # jsonschema compiles grammars for a text format that no notebook uses: seconds of every start
    unread = {"rfc3987_syntax"} - sys.modules.keys()
    sys.modules.update(dict.fromkeys(unread))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Missing(f"{error.name} is missing: pip install 'weight-steering[{extra}]'") from None
    finally:
        for name in unread:
            sys.modules.pop(name, None)
