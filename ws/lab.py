"""What is looked at before a notebook works: its first line, `run = begin("v7_sweep", globals())`, and the same for the
commands that start it."""

from dataclasses import replace

from ws.runs import here
from ws.runs.grid import Step
from ws.runs.here import Here, Refused
from ws.runs.notebooks import Place, notebook_of
from ws.runs.once import Job, check_target
from ws.runs.pairing import check_pair


def begin(name: str, cells: dict[str, object]) -> Here:
    """Check a notebook's parameters (`cells` is its `globals()`), fill in the model's own, and say where it reads and
    writes. Of a notebook that is run by hand, what the parameters name is checked too: a command has done so before.
    Raises Refused, one line, before anything is loaded or written."""
    run = here.begin(name, cells)
    if run.by_hand:
        from ws.ready import check_inputs

        try:
            check_inputs(name, run.params, own=False)
            check_sweep(run)
        except (ValueError, FileNotFoundError) as error:
            raise Refused(f"{name}: {error}") from None
    return run


def check_job(job: Job, place: Place, own: bool = True) -> None:
    """What a run is about to read, looked at before its kernel starts. own: whether its w must be there already."""
    from ws.ready import check_inputs

    try:
        if own and job.values.get("SEEDS"):
            run = Here(notebook_of(job.notebook), job.values, job.folder, by_hand=False)
            _ = [run.diffs_of(b) for b in job.values["BEHAVIORS"]] if "BEHAVIORS" in job.values else run.sweeps
        check_inputs(job.notebook, job.values, place.out, own)
        if own:
            check_sweep(Here(notebook_of(job.notebook), job.values, job.folder, by_hand=False))
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{job.notebook}: {error}") from None


def check_sweep(run: Here) -> None:
    """Of a notebook that looks at candidates of a finished sweep: the sweep, the candidates that are named, another seed's w.
    Refused, or ValueError with what was meant."""
    from ws.ready import check_candidates

    if {"SUBSPACES", "SUBSPACE"} & set(run.params):
        check_candidates(run.params, run.sweep)
        _ = "OTHER_SEED" in run.params and run.other


def check_steps(steps: list[Step], place: Place) -> None:
    """The same for a batch: once per notebook, model, behaviour and adapter of what has to run, and where it goes."""
    looked = set()
    for name in {step.job.notebook for step in steps if step.run}:
        check_pair(place.notebook(name))
    for step in (step for step in steps if step.run):
        check_target(step.job, place)
        run = step.job.identity
        if (alike := (step.job.notebook, run.model, run.behavior, run.adapter)) not in looked:
            made = [key for key in ("NULL_W_PATH",) if step.job.needs]  # by a run before it
            values = {key: value for key, value in step.job.values.items() if key not in made}
            check_job(replace(step.job, values=values), place, own=not step.job.needs)
            looked.add(alike)
