"""Runs the benches of speed and keeps their ratios: `just bench`, `just bench NAME ...`, `just bench --check`.

Every bench measures this project and a textbook version in one run, so that a ratio says the same on another machine. A bench
tells its ratios by `told`; this file collects them into out/bench/bench.json with the seconds behind them, and prints them
beside the committed ones (bench/ratios.json). `--check` exits with 1 where a ratio is more than 30 % worse than the committed
one; `--commit` writes what was measured into bench/ratios.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
COMMITTED = HERE / "ratios.json"
# whose ratios are compared, with the arguments of a run that takes a minute or two
SPEED: dict[str, list[str]] = {
    "v7": [], "sweep": [], "theta": ["--skip-optimum"], "delta": ["--no-memory"], "prefix": [], "causal": [],
    "bootstrap": [], "blind": [],
}  # fmt: skip
WORSE = 0.3
SAID = "BENCH_RATIOS"  # environment: the file that a bench tells its ratios to


def told(name: str, slow: float, fast: float) -> float:
    """The ratio `slow / fast` of two times in seconds, written down where a run of all benches asked for it."""
    if file := os.environ.get(SAID):
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps({"name": name, "textbook": slow, "here": fast, "ratio": slow / fast}) + "\n")
    return slow / fast


def run(name: str, arguments: list[str], folder: Path) -> list[dict]:
    """The ratios that one bench tells. RuntimeError where it fails or tells none."""
    said = folder / f"{name}.jsonl"
    said.unlink(missing_ok=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *arguments], env=os.environ | {SAID: str(said)})
    if done.returncode or not said.is_file():
        raise RuntimeError(
            f"bench/{name}.py: {'exit code ' + str(done.returncode) if done.returncode else 'no ratio told'}"
        )
    rows = [json.loads(line) for line in said.read_text(encoding="utf-8").splitlines()]
    said.unlink()
    return [row | {"bench": name, "whole": round(time.perf_counter() - start, 1)} for row in rows]


def worse(rows: list[dict], committed: dict[str, float]) -> list[str]:
    """A line for every ratio that is more than WORSE below the committed one, or is not told any more."""
    now = {f"{row['bench']}: {row['name']}": row["ratio"] for row in rows}
    ran = {row["bench"] for row in rows}
    found = []
    for key, before in committed.items():
        if key.split(":")[0] in ran and not now.get(key, 0.0) >= (1 - WORSE) * before:
            found.append(
                f"{key}: ratio {now[key]:.2f}, committed {before:.2f}" if key in now else f"{key}: not told any more"
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SPEED)}; default: all")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a ratio is more than 30 %% worse")
    parser.add_argument("--commit", action="store_true", help="write the ratios into bench/ratios.json")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(SPEED)):
        parser.error(f"{unknown[0]}: no bench of speed; choose among {', '.join(SPEED)} (others: python bench/NAME.py)")
    folder = Path(os.environ.get("WS_OUT", HERE.parent / "out")) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    committed = json.loads(COMMITTED.read_text(encoding="utf-8")) if COMMITTED.is_file() else {}
    rows, failed = [], []
    for name in given.names or SPEED:
        print(f"== {name}", flush=True)
        try:
            rows += run(name, SPEED[name], folder)
        except RuntimeError as error:
            failed.append(str(error))
        about = {"python": platform.python_version(), "cores": os.cpu_count(), "ratios": rows, "failed": failed}
        (folder / "bench.json").write_text(json.dumps(about, indent=1), encoding="utf-8")  # what is known so far
    print(f"\n{'':44}{'textbook':>10}{'here':>10}{'ratio':>8}{'committed':>11}")
    for row in rows:
        key = f"{row['bench']}: {row['name']}"
        before = f"{committed[key]:.1f}" if key in committed else ""
        print(f"{key:44}{row['textbook']:9.2f}s{row['here']:9.2f}s{row['ratio']:8.1f}{before:>11}")
    for line in failed:
        print(f"failed: {line}")
    if given.commit and not failed:
        COMMITTED.write_text(
            json.dumps(committed | {f"{r['bench']}: {r['name']}": round(r["ratio"], 2) for r in rows}, indent=1) + "\n",
            encoding="utf-8",
        )
    late = worse(rows, committed) if given.check else []
    for line in late:
        print(f"worse by more than {WORSE:.0%}: {line}")
    return bool(failed or late)


if __name__ == "__main__":
    sys.exit(main())
