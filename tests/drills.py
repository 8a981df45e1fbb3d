"""The command `ws` in this process, on the real notebooks: nothing is started, so that a drill can give a hundred commands.

A notebook's cells run here instead of in a kernel, and a batch's runs here, one after another, instead of on workers; all
else is the command's own way, its plans, checks, folders and words.
"""

import io
import os
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import ws.cli
from ws.cache import keys
from ws.cache.places import root
from ws.runs import engine, job, once
from ws.runs.once import Ending
from ws.runs.parameters import is_tagged, read_notebook, source_of


def cells_here(path, values, target, out, log, timeout, quiet, on_stage) -> str:
    """In place of `ws.runs.execute.execute`. What the cells say on stderr is heard, too (a batch has it in the run's log)."""
    content, names, error, before = read_notebook(path), {"__name__": "__main__"}, "", Path.cwd()
    os.chdir(root())
    try:
        with redirect_stdout(log):
            for cell in (c for c in content["cells"] if c["cell_type"] == "code"):
                exec(compile(source_of(cell), path.name, "exec"), names)
                if is_tagged(cell):
                    names.update(values)
    except Exception as raised:
        told = getattr(raised, "_render_traceback_", None)
        error = "\n".join(told()) if told else "".join(traceback.format_exception(raised))
    finally:
        os.chdir(before)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    target.write_text(once.json.dumps(content))
    return error


def steps_here(steps, place, settings, board) -> dict[str, Ending]:
    """In place of `ws.runs.engine.run_steps`."""
    by_name, endings = {step.job.name: step for step in steps}, {}
    for step in steps:
        needs = [by_name[name] for name in step.job.needs]
        if not step.run:
            endings[step.job.name] = Ending("done")
        elif lost := [need.job.name for need in needs if not endings[need.job.name].ok]:
            endings[step.job.name] = Ending("skipped", error=f"needs {lost[0]}")
        else:
            print(f"{step.job.name}: {step.why}")
            endings[step.job.name] = job.run(engine.spec_of(step, needs, place, settings))
    return endings


def stand_in(monkeypatch) -> None:
    monkeypatch.setattr(once, "execute", cells_here)
    monkeypatch.setattr(engine, "run_steps", steps_here)
    monkeypatch.setattr(job, "report", lambda what: None)


def ws_command(*words: str) -> tuple[int, str]:
    """Exit code of a command and all it says on its two streams."""
    said = io.StringIO()
    keys._file_key.cache_clear()  # as a process of its own: what it remembers of files is on disk
    try:
        with redirect_stdout(said), redirect_stderr(said):
            ws.cli.main(list(words))
    except SystemExit as end:
        code = end.code
    except Exception:
        said.write(traceback.format_exc())
        code = 99
    return code, said.getvalue()
