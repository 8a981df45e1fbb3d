"""How time and memory of the v7 sweep grow with the width d, the layers, the vocabulary and the number of LoRA seeds.

.venv/bin/python bench/growth.py [--out out/bench/growth.json] [--small]     measures what the file lacks, then fits and draws
.venv/bin/python bench/growth.py --figure docs/figures/growth.png            draws the last measurement there too

Random models in the proportions of Qwen3-0.6B (bench/models.py, bfloat16) with a w of rank 64 on every layer, as factors; each
run is a process of its own (bench/stages.py) and is written down as it ends, so that a measurement that was stopped goes on.
Fitted are, by least squares with no coefficient below 0,

    seconds = a + b L d^2 + c L d^3 + e V d^2        peak GiB = a + b V d + c d^2 + e L d^2

over all first runs, and told for larger models as if they had these proportions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from ws.show.figures import TEXT, styled

HERE = Path(__file__).parent
WIDTHS, DEPTHS, SEEDS, WORDS = (256, 512, 1024, 2048), (7, 14, 28), (1, 3, 10), (32_768, 151_936)
LARGER = {"0.6B": (1024, 28, 151_936), "8B": (4096, 36, 151_936), "32B": (5120, 64, 151_936)}


def plan(small: bool = False) -> list[tuple[int, int, int, int]]:
    """d, layers, vocabulary, seeds of every run; small: one that takes seconds, for a test."""
    if small:
        return [(128, 2, 4096, 1), (256, 2, 4096, 1), (128, 4, 4096, 2)]
    runs = [(d, 7, WORDS[0], 1) for d in WIDTHS] + [(512, L, WORDS[0], 1) for L in DEPTHS[1:]]
    return runs + [(512, 7, WORDS[1], 1)] + [(256, 7, WORDS[0], n) for n in SEEDS[1:]]


def made(folder: Path, d: int, layers: int, vocabulary: int, seeds: int) -> None:
    """A model and a w of each seed."""
    from models import config, make, make_diff, write_diff

    given = config(d=d, layers=layers, vocabulary=vocabulary)
    make(folder, given, "factors")
    for i in range(1, seeds):
        (folder / str(i)).mkdir()
        write_diff(folder / str(i), make_diff(given, seed=10 + i), "factors")


def measure(d: int, layers: int, vocabulary: int, seeds: int) -> dict:
    """Seconds of every seed's sweep in one process, by stage, and the peak of its memory."""
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place), Path(place) / "found.json"
        # in a process of its own: what this one holds would count as the other's peak
        maker = get_context("spawn").Process(target=made, args=(folder, d, layers, vocabulary, seeds))
        maker.start()
        maker.join()
        files = [folder / "w.safetensors", *(folder / str(i) / "w.safetensors" for i in range(1, seeds))]
        command = [sys.executable, HERE / "stages.py", folder / "model", *files, "--out", out]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        found = json.loads(out.read_text(encoding="utf-8"))["cpu"]
    shape = {"d": d, "layers": layers, "vocabulary": vocabulary, "seeds": seeds}
    return shape | {"seconds": [run["whole"] for run in found["runs"]], "gib": found["rss_gib"],
                    "stages": [run["stages"] for run in found["runs"]]}  # fmt: skip


def terms(d: float, layers: float, vocabulary: float) -> tuple[list[float], list[float]]:
    """What seconds and what memory are sums of, each of order 1 at the shapes measured."""
    d, V = d / 1024, vocabulary / 32_768
    return [1.0, layers * d**2, layers * d**3, V * d**2], [1.0, V * d, d**2, layers * d**2]


def fitted(runs: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of seconds and GiB, weighted so that every run counts by its relative error."""
    found = []
    for which, value in ((0, lambda run: run["seconds"][0]), (1, lambda run: run["gib"])):
        y = np.array([value(run) for run in runs])
        X = np.array([terms(run["d"], run["layers"], run["vocabulary"])[which] for run in runs])
        found.append(nnls(X / y[:, None], np.ones(len(y)))[0])
    return found[0], found[1]


def table(runs: list[dict]) -> str:
    """Measured and fitted, and the larger models."""
    seconds, memory = fitted(runs)
    lines = [
        f"seconds: {seconds.round(3).tolist()}; GiB: {memory.round(3).tolist()} (terms in units of d 1024, V 32,768)"
    ]
    lines.append(f"{'d':>6}{'layers':>8}{'V':>9}{'seconds':>10}{'fitted':>9}{'GiB':>7}{'fitted':>8}")
    for run in runs:
        time, space = terms(run["d"], run["layers"], run["vocabulary"])
        lines.append(
            f"{run['d']:6}{run['layers']:8}{run['vocabulary']:9}{run['seconds'][0]:10.1f}{time @ seconds:9.1f}"
            f"{run['gib']:7.2f}{space @ memory:8.2f}"
        )
    for run in runs:
        if len(run["seconds"]) > 1:
            later = run["seconds"][1:]
            share = np.mean(later) / run["seconds"][0]
            lines.append(
                f"{len(later)} further seeds at d {run['d']}: {np.mean(later):.2f} s each, {share:.2f} of the first"
            )
    for name, shape in LARGER.items():
        time, space = terms(*shape)
        lines.append(
            f"{name} (d {shape[0]}, {shape[1]} layers): {time @ seconds:.0f} s, {space @ memory:.1f} GiB by the fit"
        )
    return "\n".join(lines)


@styled
def figure(runs: list[dict]):
    """Seconds and memory against d, layers and seeds, measured and fitted, on logarithmic axes."""
    import matplotlib.pyplot as plt

    seconds, memory = fitted(runs)
    panels, axes = plt.subplots(1, 3, figsize=(TEXT, 2.4), layout="constrained")
    least, few = min(run["vocabulary"] for run in runs), min(run["layers"] for run in runs)
    deep = max(run["d"] for run in runs if run["layers"] > few)
    for ax, key, fixed in ((axes[0], "d", ("layers", few)), (axes[1], "layers", ("d", deep))):
        some = [r for r in runs if r[fixed[0]] == fixed[1] and r["vocabulary"] == least and r["seeds"] == 1]
        x = sorted(r[key] for r in some)
        line, shape = np.geomspace(x[0], x[-1], 50), {"layers": few, "vocabulary": least} | dict([fixed])
        time, space = map(np.array, zip(*(terms(**(shape | {key: at})) for at in line), strict=True))
        ax.plot(line, time @ seconds, color="C0", label="seconds, fitted")
        ax.plot(line, space @ memory, color="C1", ls="--", label="GiB, fitted")
        ax.plot([r[key] for r in some], [r["seconds"][0] for r in some], "o", color="C0", label="seconds")
        ax.plot([r[key] for r in some], [r["gib"] for r in some], "s", color="C1", label="peak GiB")
        ax.set(xscale="log", yscale="log", xlabel=f"{key} ({fixed[0]} {fixed[1]})")
        ax.set_xticks(x, [str(at) for at in x])
        ax.minorticks_off()
    axes[0].legend()
    run = max(runs, key=lambda run: run["seeds"])
    axes[2].plot(1 + np.arange(run["seeds"]), np.cumsum(run["seconds"]), "o-", color="C0")
    axes[2].set(xlabel=f"seeds (d {run['d']}, layers {run['layers']})", ylabel="seconds together")
    axes[2].set_ylim(0)
    return panels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/bench/growth.json"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--small", action="store_true", help="three runs of seconds, to see that it works")
    a = parser.parse_args()
    runs = json.loads(a.out.read_text(encoding="utf-8")) if a.out.is_file() else []
    have = {(r["d"], r["layers"], r["vocabulary"], r["seeds"]) for r in runs}
    a.out.parent.mkdir(parents=True, exist_ok=True)
    for shape in plan(a.small):
        if shape not in have:
            runs.append(measure(*shape))
            print(shape, [round(s, 1) for s in runs[-1]["seconds"]], f"{runs[-1]['gib']:.2f} GiB", flush=True)
            a.out.write_text(json.dumps(runs, indent=1), encoding="utf-8")
    print(table(runs))
    path = a.figure or a.out.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(runs).savefig(path, dpi=200)


if __name__ == "__main__":
    main()
