"""A grid of runs: every combination of models, behaviours, adapters and seeds, what each needs, what is already done.

Per (model, behaviour, adapter), with s0 the lowest seed:

    weight_diff(s)  ->  v7_sweep(s, protocol v7b)  ->  v7b_stability(all s)
    weight_diff(s0, shuffled labels)  ->  v7_sweep(s) of every s     (docs/method.md section 7)

A job is one run of one notebook. A job whose own state is "done" but which needs one that is not may turn out done.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from ws.cache import made as store
from ws.cache.places import ASSETS, OUT
from ws.runs import parameters
from ws.runs.identity import run_id, run_key, run_state, stale_adapters
from ws.runs.once import prepare
from ws.runs.pairing import NBS, check_pair

NOTEBOOKS = ("weight_diff", "v7_sweep", "v7b_stability")
ADAPTERS = ("lora", "rslora", "pissa", "dora")
# What tells the jobs of a grid apart, and what would take a job out of it.
OWNED = (
    "MODEL_ID",
    "BEHAVIOR",
    "ADAPTER",
    "SEED",
    "SEEDS",
    "NULL_DIFF",
    "NULL_W_PATH",
    "OUT_DIR",
    "PROTOCOL",
    "RETRAIN",
)
FOREIGN = ("W_PATH", "POS_ADAPTER", "NEG_ADAPTER")


@dataclass(frozen=True)
class Grid:
    """Combinations to run; `set` holds further notebook parameters, texts as typed."""

    models: tuple[str, ...] = ("tiny",)
    behaviors: tuple[str, ...] = ("sycophancy",)
    adapters: tuple[str, ...] = ("lora",)
    seeds: tuple[int, ...] = (0, 1, 2)
    set: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run of one notebook: its complete parameters, its folder, the names of the jobs it needs."""

    name: str
    notebook: str
    values: dict[str, object]
    folder: Path
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """A job and what is known before anything runs. state: one of ws.cache.made.STATES; why: for a reader.

    run: whether the job has to be looked at by a worker. stale: adapters kept although their training code changed.
    retrain: they are trained anew.
    """

    job: Job
    state: str
    why: str
    run: bool
    stale: bool = False
    retrain: bool = False


def parse_seeds(words: tuple[str, ...] | list[str | int]) -> tuple[int, ...]:
    """Seeds from words: `0 1 2`, `0-9`, `0,1,2`. Raises ValueError that names the word."""
    seeds: list[int] = []
    for word in [part for text in words for part in str(text).split(",") if part]:
        first, _, last = word.partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or word.endswith("-"):
            raise ValueError(f"seeds: expects numbers and ranges such as 0 1 2 or 0-9, got {word!r}")
        seeds.extend(range(int(first), int(last or first) + 1))
    return tuple(sorted(set(seeds)))


def read_grid(path: Path) -> Grid:
    """A grid from a YAML file with the fields of `Grid`, all optional. Paths in it are seen from the file."""
    given = parameters.read_set(path)
    known = [f.name for f in fields(Grid)]
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{path}: unknown key {key}; known: {', '.join(known)}")
        if key == "set" and not isinstance(value, dict):
            raise ValueError(f"{path}: set: expects a mapping of parameters, got {value!r}")
    lists = {k: v if isinstance(v, list) else [v] for k, v in given.items() if k != "set"}
    grid = Grid(**{k: tuple(str(x) for x in v) for k, v in lists.items() if k != "seeds"}, set=given.get("set") or {})
    return located(replace(grid, seeds=parse_seeds(lists["seeds"])) if "seeds" in lists else grid, path.parent)


def read_options(axes: dict[str, tuple[str, ...]], extra: dict[str, str], file: Path | None, folder: Path) -> Grid:
    """The grid of a command line: the defaults, over them `file`, over them the non-empty `axes` and `extra`.

    Relative paths in `axes` are seen from `folder`.
    """
    grid = read_grid(file) if file else Grid()
    given: dict = {name: words for name, words in axes.items() if words}
    if "seeds" in given:
        given["seeds"] = parse_seeds(given["seeds"])
    return located(replace(grid, **given, set={**grid.set, **extra}), folder)


def located(grid: Grid, folder: Path) -> Grid:
    """The grid with paths of models and behaviours absolute, seen from `folder`, and no combination twice.

    Raises ValueError for an empty axis, an unknown adapter, a behaviour that is neither shipped nor a file.
    """
    models = [parameters.located("MODEL_ID", model, folder) for model in grid.models]
    behaviors = [
        name if (ASSETS / f"{name}.json").is_file() else parameters.located("BEHAVIOR", name, folder)
        for name in grid.behaviors
    ]
    for name in behaviors:
        if not (ASSETS / f"{name}.json").is_file() and not Path(name).is_file():
            raise ValueError(f"behaviors: {name} is neither a shipped behaviour nor a file")
    for adapter in grid.adapters:
        if adapter not in ADAPTERS:
            raise ValueError(f"adapters: unknown adapter {adapter}; known: {', '.join(ADAPTERS)}")
    axes = {"models": models, "behaviors": behaviors, "adapters": grid.adapters, "seeds": sorted(grid.seeds)}
    for name, values in axes.items():
        if not values:
            raise ValueError(f"{name}: the grid has none")
    return replace(grid, **{name: tuple(dict.fromkeys(values)) for name, values in axes.items()})


def make_jobs(grid: Grid, cwd: Path | None = None, nbs: Path = NBS, out: Path = OUT) -> list[Job]:
    """All jobs of a grid, each after those it needs. `cwd`: where relative paths in `grid.set` were typed.

    Raises ValueError / FileNotFoundError for a parameter no notebook defines or the grid itself decides.
    """
    known = {name: parameters.defaults(parameters.read_notebook(nbs / f"{name}.ipynb"), name) for name in NOTEBOOKS}
    everything = sorted({key for values in known.values() for key in values} - {*OWNED, *FOREIGN})
    for key in grid.set:
        if key in OWNED + FOREIGN:
            raise ValueError(f"{key}: the grid decides it; it cannot be set")
        if key not in everything:
            raise ValueError(f"unknown parameter {key}{parameters.suggest(key, everything)}")
    for name in NOTEBOOKS:
        notebook = nbs / f"{name}.ipynb"
        script = notebook.with_suffix(".py")
        if script.is_file() and script.stat().st_mtime > notebook.stat().st_mtime:
            check_pair(notebook)

    jobs: list[Job] = []
    seeds = sorted(set(grid.seeds))  # the null diff is the lowest seed's, in whatever order they are given

    def add(notebook: str, own: dict, needs: tuple[Job, ...] = ()) -> Job:
        extra = {k: v for k, v in grid.set.items() if k in known[notebook]}
        # nbs/params/v7b.yaml is the protocol, whatever folder the notebooks lie in
        files = [nbs / "params" / "v7b.yaml"] if notebook == "v7_sweep" else []
        ask = prepare(notebook, {**extra, **own}, files, cwd, nbs, out)
        run = run_id(ask.values)
        seed = "all seeds" if notebook == "v7b_stability" else f"seed {run.seed}"
        null = " null" if own.get("NULL_DIFF") else ""
        name = f"{run.model} {run.behavior} {run.adapter} {seed}{null}: {notebook}"
        job = Job(name, notebook, ask.values, ask.folder, tuple(need.name for need in needs))
        if any(job.name == other.name for other in jobs):
            raise ValueError(f"{job.name}: two models or behaviours of the grid have the same name")
        jobs.append(job)
        return job

    for model in grid.models:
        for behavior in grid.behaviors:
            for adapter in grid.adapters:
                own = {"MODEL_ID": model, "BEHAVIOR": behavior, "ADAPTER": adapter}
                first = seeds[0]
                trained = {first: add("weight_diff", {**own, "SEED": first})}
                null = add("weight_diff", {**own, "SEED": first, "NULL_DIFF": True})
                for seed in seeds[1:]:
                    trained[seed] = add("weight_diff", {**own, "SEED": seed})
                null_w = str(run_id({**own, "SEED": first}).folder(out) / "null_diff" / "w.safetensors")
                swept = [
                    add("v7_sweep", {**own, "SEED": seed, "NULL_W_PATH": null_w}, (trained[seed], null))
                    for seed in seeds
                ]
                add("v7b_stability", {**own, "SEEDS": seeds}, tuple(swept))
    return jobs


def job_state(job: Job, nbs: Path = NBS, out: Path = OUT) -> str:
    """One of ws.cache.made.STATES for a job, as its inputs are now."""
    null_w = job.values.get("NULL_W_PATH")
    if null_w and not Path(str(null_w)).is_file():  # a job before this one makes it
        target = job.folder / f"{job.notebook}.ipynb"
        if store.read_sidecar(target) and target.is_file():
            return "changed inputs"
        return "failed before" if store.read_failure(target) else "new"
    content = parameters.read_notebook(nbs / f"{job.notebook}.ipynb")
    return run_state(job.notebook, job.folder, run_key(job.notebook, content, job.values, out))


def plan(jobs: list[Job], retrain: bool = False, nbs: Path = NBS, out: Path = OUT) -> list[Step]:
    """What would run and why, in the order of `jobs`."""
    steps: dict[str, Step] = {}
    for job in jobs:
        state = job_state(job, nbs, out)
        stale = job.notebook == "weight_diff" and bool(stale_adapters(job.values, out))
        waits = [steps[need].job for need in job.needs if steps[need].run]
        why = "" if state == "done" else state
        if state == "done" and waits:
            why = f"done; looked at again after {waits[0].notebook}"
        if stale and retrain:
            why = "training code changed, --retrain"
        elif stale:
            kept = "stale adapters" if state == "changed parameters" else "stale adapters kept"
            why += f"{'; ' if why else ''}{kept}"
        run = state != "done" or bool(waits) or (stale and retrain)
        steps[job.name] = Step(job, state, why, run, stale, stale and retrain)
    return list(steps.values())


def plan_text(steps: list[Step]) -> str:
    """The plan as a table and a sentence."""
    from tabulate import tabulate

    def fate(step: Step) -> str:
        if not step.run:
            return "done"
        return "check" if step.state == "done" and not step.retrain else "run"

    rows = [[fate(step), *step.job.name.split(": "), step.why] for step in steps]
    fates = [row[0] for row in rows]
    stale = sum(step.stale and not step.retrain for step in steps)
    told = f"{fates.count('run')} would run, {fates.count('check')} would be looked at again, {fates.count('done')} are done"
    if stale:
        told += (
            f"; {stale} have stale adapters: their training code changed. They are kept where the parameters of the"
            " training are the same (--retrain trains them anew)"
        )
    return tabulate(rows, headers=["", "run", "notebook", "why"], tablefmt="simple") + f"\n\n{told}"
