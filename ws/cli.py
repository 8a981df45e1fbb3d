"""The command `ws`: run notebooks, one or many, the demo, inspect a weight difference, the report.

Exit codes: 0 all is well, 1 a run failed, 2 the command was not understood (an unknown parameter, a missing file or extra),
3 another batch works on the same results, 130 interrupted, 141 nobody reads the output any more, 143 ended by SIGTERM. Heavy
modules are imported where they are used: a demo that is done ends within seconds."""

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from ws.cache.files import Locked
from ws.cache.places import typed_in
from ws.runs import Missing
from ws.runs.typed import parsed, stem
from ws.use.commands import COMMANDS, atlases

Pairs = Annotated[tuple[tuple[str, str], ...], arg(aliases=["-p"], metavar="KEY VALUE"), UseAppendAction]
Files = Annotated[tuple[Path, ...], arg(aliases=["-f"]), UseAppendAction]


def nb(
    name: Positional[str], /, params: Pairs = (), files: Files = (), force: bool = False, timeout: int | None = None
) -> int:
    """Run one notebook headless with papermill, unless that very run is done. `ws nb NAME --help` lists its parameters.

    Example: ws nb v7_sweep -p MODEL_ID Qwen/Qwen3-0.6B -p DTYPE bfloat16

    Args:
        name: a notebook of nbs/, without its suffix.
        params: a parameter and its value; may be repeated. OUT_DIR says where the run goes.
        files: a YAML file of parameters; may be repeated. `params` win.
        force: run even if the run is done.
        timeout: seconds that one cell may take.
    """
    from ws.lab import check_job
    from ws.runs.once import run_notebook

    here = typed_in()
    name = stem(name)
    asked = {"files": [here / f for f in files], "cwd": here, "force": force, "timeout": timeout}
    run = run_notebook(name, dict(params), check=check_job, **asked)
    if not run.ok:
        print(f"\n{name} failed after {run.seconds:.0f} s; the end of its traceback:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in run.error.splitlines()[-12:]), file=sys.stderr)
        print(f"kept in {run.kept}; what was finished before is as it was", file=sys.stderr)
        return 1
    how = "already done" if run.state == "done" else f"ran in {run.seconds:.0f} s ({run.why or run.found})"
    print(f"{name}: {how}, {run.folder / name}.{'ipynb' if run.unrendered else 'html'}", flush=True)
    if run.next:
        print(f"next: {run.next}", flush=True)
    if run.unrendered:
        print(f"{run.unrendered}; the notebook is finished: `ws report` tries again", file=sys.stderr)
    return 0


def demo() -> int:
    """Everything on the shipped tiny model: three LoRA seeds, null diffs, both protocols, delta SVD, theta fit, report."""
    from ws import demo

    return max(demo.play(demo.DEMO), report())


def real(quick: bool = False) -> int:
    """The same on a real language model, SmolLM2-135M-Instruct.

    Args:
        quick: one seed and no null diffs.
    """
    from ws import demo

    return max(demo.play(demo.QUICK if quick else demo.REAL), report())


def batch(
    models: tuple[str, ...] = (),
    behaviors: tuple[str, ...] = (),
    adapters: tuple[str, ...] = (),
    seeds: tuple[str, ...] = (),
    nulls: int | None = None,
    causal: bool = False,
    grid: Path | None = None,
    params: Annotated[tuple[tuple[str, str], ...], arg(name="set", metavar="KEY VALUE"), UseAppendAction] = (),
    files: Files = (),
    dry_run: bool = False,
    retrain: bool = False,
    wait: bool = False,
    workers: int = 0,
    threads: int = 0,
    scheduler: str = "",
    tls: Annotated[tuple[Path, Path, Path] | None, arg(metavar="CA CERT KEY")] = None,
    insecure: bool = False,
    slurm: bool = False,
    slurm_set: Annotated[tuple[tuple[str, str], ...], arg(metavar="KEY VALUE"), UseAppendAction] = (),
    timeout: int | None = None,
) -> int:
    """Many runs: per combination and seed weight_diff and v7_sweep (protocol v7b), per combination v7b_stability.

    What is done is not done again. Ctrl-C stops; the same command goes on. With several behaviours it ends with their atlas.

    Example: ws batch --models Qwen/Qwen3-0.6B --seeds 0-9 --set DTYPE bfloat16 --dry-run

    Args:
        models: hub ids, local folders, or tiny (the default).
        behaviors: shipped names or JSON files (default: sycophancy).
        adapters: lora (the default), rslora, pissa, dora.
        seeds: LoRA seeds: numbers and ranges (default: 0-2).
        nulls: null diffs (shuffled labels) per combination that every score is compared with (default: 5). Those that are
            there count, the others take the lowest seeds; 0 trains none.
        causal: check causally, too, what each seed's candidates carry (nbs/causal_check; it takes longest).
        grid: a YAML file with models, behaviors, adapters, seeds, nulls, causal, set; the options win.
        params: a further parameter, for every notebook that defines it; may be repeated.
        files: a YAML file of such parameters; may be repeated. `--set` wins.
        dry_run: print what would run, and why, and what is done.
        retrain: train adapters anew whose training code changed.
        wait: wait for another batch on the same results instead of refusing.
        workers: runs at a time (default: one per GPU, or one per two cores).
        threads: threads of each run (default: cores / workers).
        scheduler: address of a running Dask scheduler, tls://host:port.
        tls: PEM files for `scheduler` (default: those of Dask's configuration).
        insecure: use a `scheduler` without TLS: whoever reaches it can run code as you.
        slurm: submit the workers as Slurm jobs (sbatch), on the login node; lost jobs are replaced.
        slurm_set: of a Slurm job: partition, account, walltime (24:00:00), memory (32GB), cores (4), gpus (0: none is
            asked for); replacements (10): lost jobs replaced in the whole batch; may be repeated.
        timeout: seconds that one cell may take.
    """
    from ws.lab import check_steps
    from ws.runs.engine import Settings, run_jobs
    from ws.runs.grid import make_jobs, plan, plan_text, read_options
    from ws.runs.notebooks import Place
    from ws.runs.sets import read_set
    from ws.runs.slurm import make_slurm

    if slurm and scheduler:
        raise ValueError("--slurm and --scheduler: choose one")
    if slurm_set and not slurm:
        raise ValueError("--slurm-set is for --slurm")
    if (tls or insecure) and not scheduler:
        raise ValueError(
            "--tls and --insecure are for --scheduler; what a batch starts itself has a certificate of its own"
        )
    here = typed_in()
    job = make_slurm(dict(slurm_set)) if slurm else None
    pem = (here / tls[0], here / tls[1], here / tls[2]) if tls else None
    settings = Settings(workers, threads, scheduler, job, wait, timeout, pem, insecure)
    axes = {"models": models, "behaviors": behaviors, "adapters": adapters, "seeds": seeds}
    more = {key: value for file in files for key, value in read_set(here / file).items()} | dict(params)
    jobs = make_jobs(read_options(axes, more, here / grid if grid else None, here, nulls, causal), here)
    if dry_run:
        steps = plan(jobs, retrain)
        check_steps(steps, Place())
        print(plan_text(steps))
        return 0
    endings, summary = run_jobs(jobs, Place(), settings, retrain, check_steps)
    print(f"\n{summary}", flush=True)
    atlases(jobs)
    return 0 if all(ending.ok for ending in endings.values()) else 1


def results(
    model: tuple[str, ...] = (),
    behavior: tuple[str, ...] = (),
    adapter: tuple[str, ...] = (),
    seed: tuple[str, ...] = (),
    protocol: tuple[str, ...] = (),
    candidate: tuple[str, ...] = (),
    sort: str = "",
    columns: tuple[str, ...] = (),
    top: int = 0,
) -> int:
    """Print the scores of all runs (out/results.parquet, brought up to date), filtered and sorted.

    Example: ws results --model tiny --protocol v7b --sort joint_score --top 10

    Args:
        model: only these models; `*` stands for anything, here and below.
        behavior: only these behaviours.
        adapter: only these adapters.
        seed: only these seeds.
        protocol: only these protocols.
        candidate: only these candidates.
        sort: a column to sort by, numbers from the highest.
        columns: what to show instead of the main columns.
        top: at most so many rows.
    """
    import polars

    from ws.runs.results import results_text, select, write_results

    path = write_results()
    table = polars.read_parquet(path)
    if table.is_empty():
        print("no sweep is finished yet")
        return 0
    runs = {"model": model, "behavior": behavior, "adapter": adapter, "seed": seed}
    chosen = select(table, {**runs, "protocol": protocol, "subspace": candidate}, sort, top)
    print(results_text(chosen, list(columns)))
    print(f"\n{len(chosen)} of {len(table)} rows of {path}")
    return 0


def report() -> int:
    """Write out/index.html over all runs; pages that are missing are rendered."""
    from ws.runs.index import report as write

    print(f"report: {write()}")
    return 0


def status(run: Positional[Path | None] = None, /, params: Pairs = ()) -> int:
    """What is known of a run: finished or not, what changed since, how its failed tries ended. Without RUN: of all.

    Args:
        run: a run's folder.
        params: a parameter and its value; what the same run with it would change.
    """
    from ws.cache.places import out_folder
    from ws.runs.index import runs, runs_text
    from ws.runs.index import status as status_of

    print(status_of((typed_in() / run).resolve(), dict(params), typed_in()) if run else runs_text(runs(out_folder())))
    return 0


def clean(failed: bool = False, yes: bool = False) -> int:
    """Remove failed tries. Without --yes it only says what would go.

    Args:
        failed: the failed tries of all runs.
        yes: really remove them.
    """
    from ws.cache.places import out_folder
    from ws.runs.index import clear_failed

    if not failed:
        raise ValueError("say what to clean: ws clean --failed")
    found = clear_failed(out_folder(), yes)
    sum_of_it = f"{len(found)} failed tries {'removed' if yes else 'would go; --yes removes them'}"
    print("\n".join([*map(str, found), sum_of_it]))
    return 0


def told(args: list[str]) -> int | None:
    """Print a notebook's own help where that is asked for (`nb NAME --help`); None where it is not."""
    command, name, *rest = [*args, "", ""]
    if command != "nb" or not name or name.startswith("-") or not {"-h", "--help"} & {*rest}:
        return None
    from ws.runs.manual import manual

    print(manual(stem(name)))
    return 0


def main(args: list[str] | None = None) -> None:
    """Entry point of `ws` and `python -m ws`."""
    try:
        try:
            code = answered(args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # who read the output wants no more of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def answered(args: list[str] | None) -> int:
    """The exit code of a command; what it has to say of an error is printed."""
    commands = {f.__name__: f for f in (nb, batch, results, demo, real, *COMMANDS, report, status, clean)}
    try:
        code = told(sys.argv[1:] if args is None else args)
        code = parsed(commands, args)() if code is None else code
    except (ValueError, FileNotFoundError, Missing) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except Locked as error:
        print(f"{error}; --wait waits for it", file=sys.stderr)
        code = 3
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        more = "make room; what was finished is as it was, the same command goes on"
        print(f"error: {error.strerror}: {more}", file=sys.stderr)
        code = 1
    except SystemExit as ended:
        if ended.code != 128 + signal.SIGTERM:
            raise
        print("ended by SIGTERM; run the same command again to finish", file=sys.stderr)
        code = ended.code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to finish", file=sys.stderr)
        code = 130
    return code
