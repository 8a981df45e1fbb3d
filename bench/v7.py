"""The whole v7 sweep, from loading to the last file, against its textbook version, each in a process of its own.

.venv/bin/python bench/v7.py [--d 512] [--layers 7] [--vocabulary 32768] [--kind dense] [--repeats 1] [--full]

A Qwen3 model of random bfloat16 weights (bench/models.py) with a w of rank 64 on all seven linear maps of every layer, dense
or as factors, is given to both: bench/textbook.py and bench/stages.py. Both print their stages. Told is the ratio of their
times, peak memory of either, the time of a second w beside the first, and of v7b beside v7. --full: the shapes of Qwen3-0.6B.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from models import config, make, make_diff, write_diff
from ratios import told

HERE = Path(__file__).parent


def ours(model: Path, files: list[Path], protocol: str, out: Path) -> dict:
    """Seconds of every w, one after the other in one process, and its peak memory in GiB."""
    command = [sys.executable, HERE / "stages.py", model, *files, "--protocol", protocol, "--out", out]
    print(subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout, flush=True)
    found = json.loads(out.read_text(encoding="utf-8"))["cpu"]
    return {"seconds": [run["whole"] for run in found["runs"]], "gib": found["rss_gib"]}


def textbook(model: Path, w: Path, out: Path) -> dict:
    """The same of the textbook, which loads a dense w."""
    command = [sys.executable, HERE / "textbook.py", model, w, out]
    said = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout
    print(said, flush=True)
    seconds, peak = (re.search(rf"{what} +([\d.]+)", said)[1] for what in ("together", "peak memory"))
    return {"seconds": [float(seconds)], "gib": float(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--kind", choices=("dense", "factors"), default="dense")
    parser.add_argument("--repeats", type=int, default=1, help="medians are told")
    parser.add_argument("--full", action="store_true", help="Qwen3-0.6B: d 1024, 28 layers, V 151,936")
    a = parser.parse_args()
    given = config(d=0, layers=0) if a.full else config(d=a.d, layers=a.layers, vocabulary=a.vocabulary)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, dense = make(folder, given, "dense")
        (folder / "second").mkdir()
        other = write_diff(folder / "second", make_diff(given, seed=7), a.kind)
        w = dense if a.kind == "dense" else write_diff(folder, make_diff(given), "factors")
        runs: dict[str, list[dict]] = {"textbook": [], "v7": [], "v7b": []}
        for _ in range(a.repeats):
            runs["textbook"].append(textbook(model, dense, folder / "textbook"))
            for protocol in ("v7", "v7b"):
                runs[protocol].append(ours(model, [w, other], protocol, folder / "found.json"))
    middle = {name: statistics.median(run["seconds"][0] for run in each) for name, each in runs.items()}
    second = {name: statistics.median(run["seconds"][-1] for run in runs[name]) for name in ("v7", "v7b")}
    memory = {name: max(run["gib"] for run in each) for name, each in runs.items()}
    size = f"d {given.hidden_size}, {given.num_hidden_layers} layers, V {given.vocab_size}"
    print(f"{size}, {a.kind} w, {torch.get_num_threads()} threads")
    for name in runs:
        more = f", a second w {second[name]:.1f} s" if name in second else ""
        print(f"{name:10} {middle[name]:8.1f} s, {memory[name]:.2f} GiB{more}")
    told(f"whole sweep, {a.kind} w", middle["textbook"], middle["v7"])
    print(f"the first w takes {middle['v7'] / second['v7']:.1f} times as long as a second one")


if __name__ == "__main__":
    main()
