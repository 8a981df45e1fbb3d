"""Where the time of a sweep goes, stage by stage, on one device or on two that are compared.

.venv/bin/python bench/stages.py MODEL W [W ...] [--protocol v7] [--devices cpu cuda] [--others] [--out FILE]

MODEL and W as bench/models.py writes them, or any model and weight difference. Of every stage its own seconds, without those
of the stages it calls; whole is the time from loading to the last file. With two devices the scores of every candidate at
every layer are compared where neither side calls its basis ill-conditioned. A further W is swept on the same model, whose
bases are kept. --others: delta SVD, theta fit of the shipped users, gradients of training pairs, 30 steps of
training, stacked variants and calibration too. Peak memory is of this process, in GiB; on a GPU that of the device beside it.
"""

import argparse
import importlib
import json
import resource
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import ws
import ws.explanation.explain

STAGES = {  # what is timed: where a caller looks it up
    "load the model": "ws.model.lm.load_lm",
    "load w": "ws.explanation.explain.load_diff",
    "base passes": "ws.subspaces.kept.capture_base",
    "Grams and bases": "ws.subspaces.kept.build",
    "keeping bases": "ws.subspaces.kept.made",
    "steered passes": "ws.explanation.explain.capture_steered",
    "ceilings": "ws.explanation.explain.build",
    "targets": "ws.explanation.rows.layer_targets",
    "plain targets": "ws.explanation.rows.plain_targets",
    "scores": "ws.explanation.rows.per_layer",
    "specificity": "ws.explanation.rows.specific_per_layer",
    "kept tensors": "ws.explanation.rows.kept_tensors",
    "answers": "ws.explanation.explain.effects",
    "files": "ws.explanation.result.Explanation.save",
    "null check": "ws.explanation.result.Explanation.null_check",
}


class Clock:
    """Own seconds of nested stages."""

    def __init__(self, device: str):
        self.device, self.seconds, self.open = device, {}, []

    @contextmanager
    def stage(self, name: str):
        self._switch()
        self.open.append(name)
        try:
            yield
        finally:
            self._switch()
            self.open.pop()

    def _switch(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.since
        self.since = now

    def timed(self, name: str, run: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            with self.stage(name):
                return run(*args, **kwargs)

        return wrapped


@contextmanager
def timed_stages(clock: Clock):
    """The functions of STAGES, timed."""
    with ExitStack() as stack:
        for name, path in STAGES.items():
            where, _, attribute = path.rpartition(".")
            try:
                owner = importlib.import_module(where)
            except ModuleNotFoundError:
                module, _, kind = where.rpartition(".")
                owner = getattr(importlib.import_module(module), kind)
            stack.enter_context(patch.object(owner, attribute, clock.timed(name, vars(owner)[attribute])))
        yield


def sweep(model: str, files: list[str], protocol: str, device: str, dtype: str, behavior: str) -> dict:
    """The sweeps of one or more w on one device, nothing kept before: per w its stages and `whole`, and the first's table."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        torch.linalg.eigh(torch.eye(64, device=device, dtype=torch.float64))  # libraries load once
    found: dict = {"device": device, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        for i, file in enumerate(files):
            clock, lm, one = Clock(device), None, None  # one model at a time
            with clock.stage("other"), timed_stages(clock):
                w = ws.explanation.explain.load_diff(file)
                lm = ws.model.lm.load_lm(model, dtype, device)
                one = ws.explain(lm, w, behavior, protocol=protocol, cache=Path(folder) / "cache", progress=False)
                one.save(Path(folder) / f"run_{i}")
                one.null_check(120)
            found["runs"].append({"whole": sum(clock.seconds.values()), "stages": clock.seconds})
            if i == 0:
                found["table"] = one.per_layer
    found["rss_gib"] = max(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20
    if device.startswith("cuda"):
        found["device_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def largest_difference(a, b) -> tuple[float, str, int]:
    """Between two per-layer tables: the largest relative difference of a score, where, and how many rows are well determined
    on both sides."""
    both = a.join(b, on=["layer", "subspace"], suffix="_b")
    assert len(both) == len(a) == len(b), "a candidate is missing on one side"
    both = both.filter(~both["ill_conditioned"] & ~both["ill_conditioned_b"])
    worst, where = 0.0, ""
    for name in ("conc_act", "conc_block", "conc_w_combined"):
        x, y = both[name].to_numpy(), both[f"{name}_b"].to_numpy()
        off = np.abs(x - y) / np.maximum(np.abs(x), 1e-3)
        off = np.where(np.isnan(x) & np.isnan(y), 0.0, np.where(np.isnan(off), np.inf, off))
        if len(off) and off.max() > worst:
            i = int(off.argmax())
            worst, where = float(off[i]), f"{name} of {both['subspace'][i]} at layer {both['layer'][i]}"
    return worst, where, len(both)


def other_stages(model: str, w: str, device: str, dtype: str, behavior: str) -> dict[str, tuple[float, list[float]]]:
    """Seconds and a few numbers to compare of what is no sweep; what fails is told and left out."""
    from ws.causal.passes import Items, Passes
    from ws.causal.retention import retention
    from ws.delta.calibration import load_calibration
    from ws.gradient.capture import pair_gradients
    from ws.theta.fitted import fit_theta
    from ws.theta.states import load_users
    from ws.train.lora import TrainConfig, train_adapter
    from ws.train.pairs import Pair

    lm, diff, about = ws.load_lm(model, dtype, device), ws.load_diff(w), ws.load_behavior(behavior)
    rows = tuple(
        Pair(i, 0, 0, about.probe_text(topic.claim), "Yes, that is true.", "No, that is false.")
        for i, topic in enumerate(about.topics[:16])
    )
    g = torch.Generator().manual_seed(0)
    bases = {
        l: torch.linalg.qr(torch.randn(lm.decoder.d, 8, generator=g, dtype=torch.float64)).Q for l in diff.layers()
    }

    def theta() -> list[float]:
        users = dict(list(load_users().items())[:2])
        with tempfile.TemporaryDirectory() as folder:
            return (
                fit_theta(lm, users, heads=["cvh"], folder=folder, progress=False)
                .theta(next(iter(users)), "cvh")
                .tolist()
            )

    def gradients() -> list[float]:
        return [float(x) for x in pair_gradients(lm, rows, diff.layers(), progress=False).losses.values()]

    def training() -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            said = train_adapter(
                lm, rows, "pos", 0, TrainConfig(max_steps=30, checkpoint_steps=0), Path(folder) / "a", False
            )
        return [float(said["loss_trace"][-1])]

    def stacks() -> list[float]:
        passes = Passes(lm, about, Items.of(lm, about, 1), None, False)
        return passes({"w": diff})["w"].effect.tolist()

    runs = {
        "delta SVD": lambda: [x.eff_rank for x in ws.delta_svd(lm, load_calibration(""), boot=20).layers],
        "theta fit": theta,
        "gradients": gradients,
        "training": training,
        "stacked passes": stacks,
        "retention": lambda: [float(x) for x in retention(lm, diff, {"blind": bases}, about)["effect"].to_list()],
        "calibration": lambda: [ws.calibrate(lm, diff, 0.1).alpha],
    }
    found = {}
    for name, run in runs.items():
        start = time.perf_counter()
        try:
            values = run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            found[name] = (time.perf_counter() - start, values)
        except Exception:
            print(f"{name} on {device} failed", flush=True)
            traceback.print_exc()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("w", nargs="+")
    parser.add_argument("--protocol", default="v7")
    parser.add_argument("--behavior", default="sycophancy")
    parser.add_argument("--devices", nargs="+", default=["cpu"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--others", action="store_true")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    found = [sweep(a.model, a.w, a.protocol, device, a.dtype, a.behavior) for device in a.devices]
    names = [*STAGES, "other", "whole"]
    columns = [(one["device"], i, run) for one in found for i, run in enumerate(one["runs"])]
    print(" " * 20 + "".join(f"{device + (f' w{i + 1}' if i else ''):>12}" for device, i, _ in columns))
    for name in names:
        print(f"{name:20}" + "".join(f"{run['stages'].get(name, run.get(name, 0.0)):12.2f}" for *_, run in columns))
    for one in found:
        print(
            f"{one['device']}: {one['rss_gib']:.2f} GiB"
            + (f", {one['device_gib']:.2f} on it" if "device_gib" in one else "")
        )
    report = {one["device"]: {k: v for k, v in one.items() if k != "table"} for one in found}
    if len(found) == 2:
        worst, where, rows = largest_difference(found[0]["table"], found[1]["table"])
        print(f"largest difference of a score: {worst:.1e} ({where}; {rows} of {len(found[0]['table'])} rows)")
        report["difference"] = worst
    if a.others:
        others = [other_stages(a.model, a.w[0], device, a.dtype, a.behavior) for device in a.devices]
        for name in dict.fromkeys(name for one in others for name in one):
            line = f"{name:20}" + "".join(f"{one[name][0] if name in one else float('nan'):12.2f}" for one in others)
            if len(others) == 2 and all(name in one for one in others):
                x, y = (np.array(one[name][1], dtype=float) for one in others)
                off = float(np.linalg.norm(x - y) / np.linalg.norm(x))
                line += f"   {off:.1e}"
                report.setdefault("others", {})[name] = {"seconds": [one[name][0] for one in others], "difference": off}
            print(line, flush=True)
    if a.out:
        a.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
