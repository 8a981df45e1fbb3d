"""A grid of runs: every combination of models, behaviours, adapters and seeds, what each needs, what is already done.

Per (model, behaviour, adapter), with s0 the lowest seed, as the table of notebooks says (`batch`, `needs`):

    weight_diff(s)  ->  v7_sweep(s, protocol v7b)  ->  v7b_stability(all s)
    with `causal`: v7_sweep(s), v7_sweep(the lowest other seed)  ->  causal_check(s)  ->  v7b_stability(all s)
    weight_diff(s0 .. s0 + 4, shuffled labels)  ->  v7_sweep(s) of every s     (docs/method.md section 7)

A job is one run of one notebook. A job whose own state is "done" but which needs one that is not may turn out done.
"""

from dataclasses import dataclass, field, fields, replace
from itertools import count, islice, product
from pathlib import Path

from ws.cache.places import ASSETS
from ws.runs import parameters, rules
from ws.runs.failed import tries
from ws.runs.folders import null_diffs
from ws.runs.identity import record_of, run_state, stale_adapters
from ws.runs.notebooks import TABLE, Notebook, Place, notebook_of, paths_in
from ws.runs.once import Job, prepare
from ws.runs.pairing import check_pair
from ws.runs.rules import ADAPTERS

# What tells the jobs of a grid apart, and what would take a job out of it.
OWNED = "MODEL_ID BEHAVIOR ADAPTER SEED SEEDS NULL_DIFF NULL_W_PATH OUT_DIR PROTOCOL RETRAIN".split()
FOREIGN = "W_PATH POS_ADAPTER NEG_ADAPTER".split()
NULL_DIFFS = 5  # of an adapter: one null diff beats another too, so that one alone says little


@dataclass(frozen=True)
class Grid:
    """Combinations to run; `set` holds further notebook parameters, texts as typed. nulls: null diffs per combination, at
    least; those that are there count, 0 trains none. causal: whether each seed's causal check is run, too."""

    models: tuple[str, ...] = ("tiny",)
    behaviors: tuple[str, ...] = ("sycophancy",)
    adapters: tuple[str, ...] = ("lora",)
    seeds: tuple[int, ...] = (0, 1, 2)
    set: dict[str, object] = field(default_factory=dict)
    nulls: int = NULL_DIFFS
    causal: bool = False


@dataclass(frozen=True)
class Step:
    """A job and what is known before anything runs. state: one of ws.cache.made.STATES; why: for a reader; run: whether
    a worker has to look at it; stale: its adapters' training code has changed since; retrain: they are trained anew."""

    job: Job
    state: str
    why: str
    run: bool
    stale: bool = False
    retrain: bool = False


def parse_seeds(words: tuple[str, ...] | list[str | int]) -> tuple[int, ...]:
    """Seeds from words: `0 1 2`, `0-9`, `0,1,2`. Raises ValueError that names the word."""
    rule = rules.listed(rules.SEED, f"numbers and ranges such as 0 1 2 or 0-9, from 0 to {rules.TOP_SEED}")
    seeds: set[int] = set()
    for word in map(str, words):
        try:
            seeds.update(rules.read(rule, word))
        except ValueError as error:
            raise ValueError(f"seeds: {error}, got {rules.shown(word)}") from None
    return tuple(sorted(seeds))


def parse_nulls(given: object) -> int:
    """The number of null diffs. ValueError that says what is expected."""
    rule = rules.whole(0, rules.MOST)
    try:
        return rules.read(rule, given)
    except ValueError as error:
        raise ValueError(f"nulls: {error}, got {rules.shown(given)}") from None


def read_grid(path: Path) -> Grid:
    """A grid from a YAML file with the fields of `Grid`, all optional. Paths in it are seen from the file."""
    given = parameters.read_set(path)
    known = [f.name for f in fields(Grid)]
    for key in given:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key}; known: {', '.join(known)}")
    extra = given.pop("set", {})
    if not isinstance(extra, dict):
        raise ValueError(f"{path}: set: expects a mapping of parameters, got {extra!r}")
    nulls, causal = given.pop("nulls", None), given.pop("causal", False)
    if not isinstance(causal, bool):
        raise ValueError(f"{path}: causal: expects true or false, got {causal!r}")
    axes = {k: tuple(map(str, v if isinstance(v, list) else [v])) for k, v in given.items()}
    extra = {k: parameters.located(k, v, path.parent) for k, v in extra.items()}
    return _over(Grid(causal=causal), axes, extra, path.parent, nulls)


def read_options(
    axes: dict[str, tuple[str, ...]],
    extra: dict[str, str],
    file: Path | None,
    folder: Path,
    nulls: int | str | None = None,
    causal: bool = False,
) -> Grid:
    """The grid of a command line: the defaults, over them `file`, over them the non-empty `axes`, `extra`, `nulls` and
    `causal`. Relative paths in `axes` are seen from `folder`."""
    given, grid = {k: words for k, words in axes.items() if words}, read_grid(file) if file else Grid()
    return _over(replace(grid, causal=grid.causal or causal), given, extra, folder, nulls)


def _over(grid: Grid, axes: dict[str, tuple[str, ...]], extra: dict[str, object], folder: Path, nulls: object) -> Grid:
    given: dict = axes | ({"seeds": parse_seeds(axes["seeds"])} if "seeds" in axes else {})
    given |= {} if nulls is None else {"nulls": parse_nulls(nulls)}
    return located(replace(grid, **given, set={**grid.set, **extra}), folder)


def located(grid: Grid, folder: Path) -> Grid:
    """The grid with paths of models and behaviours absolute, seen from `folder`, and no combination twice. Raises
    ValueError for an empty axis, an unknown adapter, a behaviour that is neither shipped nor a file."""
    models = [parameters.located("MODEL_ID", model, folder) for model in grid.models]
    behaviors = [parameters.located("BEHAVIOR", name, folder) for name in grid.behaviors]
    axes = {"models": models, "behaviors": behaviors, "adapters": grid.adapters, "seeds": sorted(grid.seeds)}
    unknown = [name for name in behaviors if not any(f.is_file() for f in (ASSETS / f"{name}.json", Path(name)))]
    faults = [f"behaviors: {name} is neither a shipped behaviour nor a file" for name in unknown]
    unknown = [name for name in grid.adapters if name not in ADAPTERS]
    faults += [f"adapters: unknown adapter {name}; known: {', '.join(ADAPTERS)}" for name in unknown]
    faults += [f"{name}: the grid has none" for name, values in axes.items() if not values]
    if faults:
        raise ValueError(faults[0])
    return replace(grid, **{name: tuple(dict.fromkeys(values)) for name, values in axes.items()})


def make_jobs(grid: Grid, cwd: Path | None = None, place: Place | None = None) -> list[Job]:
    """All jobs of a grid, each after those it needs. `cwd`: where relative paths in `grid.set` were typed. Raises
    ValueError / FileNotFoundError for a parameter no notebook defines or the grid itself decides."""
    place = place or Place()
    entries = [entry for entry in TABLE.values() if entry.batch is not None and (grid.causal or not entry.extra)]
    known = {e.name: parameters.defaults(parameters.read_notebook(place.notebook(e.name)), e.name) for e in entries}
    everything = sorted({key for values in known.values() for key in values} - {*OWNED, *FOREIGN})
    for key in grid.set:
        if key in OWNED + FOREIGN:
            raise ValueError(f"{key}: the grid decides it; it cannot be set")
        if key not in everything:
            raise ValueError(f"unknown parameter {key}{parameters.suggest(key, everything)}")

    jobs: dict[str, Job] = {}

    def add(entry: Notebook, own: dict, needs: list[str]) -> str:
        extra = {k: v for k, v in grid.set.items() if k in known[entry.name]}
        # the parameter sets lie in nbs/params, whatever folder the notebooks lie in
        files = [place.nbs / "params" / f"{entry.batch}.yaml"] if entry.batch else []
        job = prepare(entry.name, {**extra, **own}, files, cwd, place)
        run = job.identity
        seed = f"seed {run.seed}" if entry.level == "seed" else "all seeds"
        null = " null" if own.get("NULL_DIFF") else ""
        name = f"{run.model} {run.behavior} {run.adapter} {seed}{null}: {entry.name}"
        if name in jobs:
            raise ValueError(f"{name}: two models or behaviours of the grid have the same name")
        jobs[name] = replace(job, name=name, needs=tuple(dict.fromkeys(needs)))
        return name

    seeds = sorted(set(grid.seeds))  # null diffs start at the lowest seed, in whatever order they are given
    for model, behavior, adapter in product(grid.models, grid.behaviors, grid.adapters):
        own = {"MODEL_ID": model, "BEHAVIOR": behavior, "ADAPTER": adapter}
        made: dict[str, list[str]] = {}  # per notebook, by seed
        null: list[str] = []
        # how the runs are named that use the adapters: training by a recipe of one's own has its own folder
        trained = own
        for entry in entries:
            if entry.level != "seed":
                add(entry, {**trained, "SEEDS": seeds}, [job for need in entry.needs for job in made.get(need, [])])
                continue
            made[entry.name] = []
            for i, seed in enumerate(seeds):
                asks = null if "NULL_W_PATH" in known[entry.name] else []
                paths = [str(jobs[name].folder.parent / "w.safetensors") for name in asks]
                needs = [made[need][i] for need in entry.needs] + asks
                if "OTHER_SEED" in known[entry.name]:  # its w and its sweep; of any seed the lowest other is one of two
                    away = [s for s in seeds if str(s) == str(grid.set.get("OTHER_SEED"))] or seeds[:2]
                    needs += [made[need][seeds.index(s)] for need in entry.needs for s in away]
                nulled = {"NULL_W_PATH": paths} if paths else {}
                others = [other for other in grid.behaviors if other != behavior]
                if others and "OTHERS" in known[entry.name] and "OTHERS" not in grid.set:
                    nulled["OTHERS"] = others
                made[entry.name].append(add(entry, {**trained, "SEED": seed, **nulled}, needs))
            if "NULL_DIFF" in known[entry.name]:
                for seed in null_seeds(jobs[made[entry.name][0]].values, place.out, seeds[0], grid.nulls):
                    null.append(add(entry, {**own, "SEED": seed, "NULL_DIFF": True}, []))
            if entry.trains:
                trained = {**own, "ADAPTER": jobs[made[entry.name][0]].identity.adapter}
    for job in jobs.values():
        if apart := [key for key in notebook_of(job.notebook).apart(job.values) if key in grid.set]:
            alone = f"sweep each seed by `just nb {job.notebook} -p {apart[0]} ...`"
            raise ValueError(
                f"{apart[0]}: the report over seeds compares sweeps of the usual width and protocol; {alone}"
            )
    for entry in entries:  # last: it may have to load jupytext, and a mistake in a parameter should cost less
        check_pair(place.notebook(entry.name), edited=True)
    return list(jobs.values())


def null_seeds(values: rules.Params, out: Path, lowest: int, number: int) -> list[int]:
    """The seeds of the null diffs that all sweeps of an adapter share: of those that are there, as a sweep by itself finds
    them, and of as many more from `lowest` on as `number` asks for."""
    found = list(null_diffs(values, out)) if number else []
    lowest = min(lowest, rules.TOP_SEED - number - len(found))  # so that there are as many seeds above it
    more = (seed for seed in count(lowest) if seed not in found)
    return sorted([*found, *islice(more, max(0, number - len(found)))])


def job_state(job: Job, place: Place) -> str:
    """One of ws.cache.made.STATES for a job, as its inputs are now."""
    if _null_is_there(job):
        return run_state(job.notebook, job.folder, job.key(place))
    if record_of(job.notebook, job.folder):  # a job before this one makes the missing file
        return "changed inputs"
    return "failed before" if tries(job.folder, job.notebook) else "new"


def _null_is_there(job: Job) -> bool:
    return all(path.is_file() for path in paths_in(job.values, "NULL_W_PATH"))


def plan(jobs: list[Job], retrain: bool = False, place: Place | None = None) -> list[Step]:
    """What would run and why, in the order of `jobs`."""
    place = place or Place()
    steps: dict[str, Step] = {}
    for job in jobs:
        state = job_state(job, place)
        stale = bool(stale_adapters(job.notebook, job.values, place.out))
        waits = [steps[need].job for need in job.needs if steps[need].run]
        why = [f"done; looked at again after {waits[0].notebook}"] if waits else []
        if state != "done":
            why = [job.why(state, place) if _null_is_there(job) else state]
        if stale and retrain:
            why = ["training code changed, --retrain"]
        elif stale:
            why.append("stale adapters" if state == "changed parameters" else "stale adapters kept")
        run = state != "done" or bool(waits) or (stale and retrain)
        steps[job.name] = Step(job, state, "; ".join(why), run, stale, stale and retrain)
    return list(steps.values())


def plan_text(steps: list[Step]) -> str:
    """The plan as a table and a sentence."""
    from tabulate import tabulate

    fates = ["done" if not s.run else "run" if s.state != "done" or s.retrain else "check" for s in steps]
    rows = [[fate, *step.job.name.split(": "), step.why] for fate, step in zip(fates, steps, strict=True)]
    told = f"{fates.count('run')} would run, {fates.count('check')} would be looked at again, {fates.count('done')} are done"
    if stale := sum(step.stale and not step.retrain for step in steps):
        told += (
            f"; {stale} have stale adapters: their training code changed. They are kept where the parameters of the"
            " training are the same (--retrain trains them anew)"
        )
    return tabulate(rows, headers=["", "run", "notebook", "why"], tablefmt="simple") + f"\n\n{told}"
