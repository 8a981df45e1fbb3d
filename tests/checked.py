"""Types and shapes in all of ws, checked at run time at a price that the tests can pay.

jaxtyping's wrapper binds the arguments of every call to their names, to compare shapes: ten times the price of looking at types.
Functions that name shapes have it, all others beartype's own. A function inside another is made anew by each call of that one,
and its check would be, too: it is checked where it is made the first times.
"""

import types
from collections import Counter
from functools import partial

import beartype
import jaxtyping

OFTEN = 20  # times that an inner function is made and checked
PLAIN = beartype.beartype(conf=beartype.BeartypeConf(violation_type=TypeError))
whole = jaxtyping.jaxtyped
made: Counter = Counter()


def shaped(function: types.FunctionType) -> bool:
    """Whether annotations name shapes, or are texts."""
    return any(isinstance(note, str) or "jaxtyping." in repr(note) for note in function.__annotations__.values())


def jaxtyped(thing=None, *, typechecker):
    """In place of jaxtyping's decorator, under which its import hook puts every function and class."""
    if thing is None:
        return partial(jaxtyped, typechecker=typechecker)
    if isinstance(thing, types.FunctionType) and "<locals>" in thing.__qualname__:
        made[thing.__code__] += 1
        if made[thing.__code__] > OFTEN:
            return thing
    if not isinstance(thing, types.FunctionType) or shaped(thing):
        return whole(thing, typechecker=typechecker)
    found = PLAIN(thing)
    if found is not thing:  # for `ws.cache.sources` a wrapper of a library, not of the caller
        found.__code__ = found.__code__.replace(co_filename=beartype.__file__)
    return found


def install() -> None:
    """Check whatever of ws is imported from here on."""
    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook("ws", "beartype.beartype")
