"""The command `ws`: run notebooks, the demo, inspect a weight difference, the report, the tiny model.

Exit codes: 0 all is well, 1 a run failed, 2 the command was not understood (an unknown parameter, a missing file),
130 interrupted. Heavy modules are imported where they are used: a demo that is done ends within seconds.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, UseAppendAction, arg

Pairs = Annotated[tuple[tuple[str, str], ...], arg(aliases=["-p"], metavar="KEY VALUE"), UseAppendAction]
Files = Annotated[tuple[Path, ...], arg(aliases=["-f"]), UseAppendAction]


def typed_in() -> Path:
    """The folder the command was typed in: `just` changes the working folder and says here where it came from."""
    return Path(os.environ.get("WS_TYPED_IN") or Path.cwd())


def nb(
    name: Positional[str],
    /,
    params: Pairs = (),
    files: Files = (),
    force: bool = False,
    timeout: int | None = None,
) -> int:
    """Run one notebook headless with papermill, unless that very run is done.

    Args:
        name: a notebook of nbs/, without its suffix.
        params: a parameter and its value; may be repeated. OUT_DIR says where the run goes.
        files: a YAML file of parameters; may be repeated. `params` win.
        force: run even if the run is done.
        timeout: seconds that one cell may take.
    """
    from ws.batch import run_notebook

    here = typed_in()
    paths = [here / file for file in files]
    name = name.removesuffix(".ipynb").removesuffix(".py")
    return _tell(run_notebook(name, dict(params), timeout=timeout, files=paths, force=force, cwd=here))


def demo() -> int:
    """The whole pipeline on the shipped tiny model: adapters, w, alpha sweep, v7 sweep, report."""
    from ws.batch import run_notebook

    for step, name in enumerate(("weight_diff", "v7_sweep"), 1):
        print(f"[{step}/2] {name}", flush=True)
        run = run_notebook(name, {"MODEL_ID": "tiny"})
        if code := _tell(run):
            return code
    from ws.conclusion import top_table
    from ws.tables import read_table

    print(f"\n{top_table(read_table(run.folder / 'v7_summary_pct.tsv'), 12, 'simple')}\n")
    print(f"this run: {run.html}")
    return report()


def inspect(file: Positional[Path], /) -> int:
    """Print norms, ranks, layers and metadata of a weight difference.

    Args:
        file: w.safetensors, a legacy w.pt, or a run's folder.
    """
    from ws.diff import describe, load_diff

    print(describe(load_diff(typed_in() / file)))
    return 0


def report() -> int:
    """Write out/index.html over all runs."""
    from ws.report import report as write

    print(f"report: {write()}")
    return 0


def tiny_model() -> int:
    """Rebuild the shipped tiny model from its corpus, into ws/assets/tiny."""
    from ws.config import ASSETS
    from ws.tiny import Recipe, build

    build(ASSETS / "tiny", Recipe())
    return 0


def _tell(run) -> int:
    """Say how a run ended; its exit code."""
    if not run.ok:
        lines = run.error.splitlines()
        print(f"\n{run.notebook} failed after {run.seconds:.0f} s; the end of its traceback:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in lines[-12:]), file=sys.stderr)
        print(f"kept as {run.folder / run.notebook}.failed.ipynb", file=sys.stderr)
        return 1
    how = "already done" if run.seconds == 0 else f"ran in {run.seconds:.0f} s ({run.found})"
    print(f"{run.notebook}: {how}, {run.html}", flush=True)
    return 0


def main(args: list[str] | None = None) -> None:
    """Entry point of `ws` and `python -m ws`."""
    commands = {"nb": nb, "demo": demo, "inspect": inspect, "report": report, "tiny-model": tiny_model}
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="ws",
            description="Weight steering, and the subspaces that explain it.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to finish", file=sys.stderr)
        code = 130
    sys.exit(code)
