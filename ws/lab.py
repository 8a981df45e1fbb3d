"""The first line of a notebook: `run = begin("v7_sweep", globals())`."""

from ws.runs import here
from ws.runs.here import Here, Refused


def begin(name: str, cells: dict[str, object]) -> Here:
    """Check a notebook's parameters (`cells` is its `globals()`), fill in the model's own, and say where it reads and
    writes. Of a notebook that is run by hand, what the parameters name is checked too: a command has done so before.
    Raises Refused, one line, before anything is loaded or written."""
    run = here.begin(name, cells)
    if run.by_hand:
        from ws.ready import check_inputs

        try:
            check_inputs(name, run.params, own=False)
        except (ValueError, FileNotFoundError) as error:
            raise Refused(f"{name}: {error}") from None
    return run
