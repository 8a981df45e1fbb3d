"""The first cell of a notebook: its parameters checked and complete, and where it reads and writes.

A run by papermill is told a folder (OUT_DIR). A notebook that is run by hand reads what is finished under its parameters;
what it makes anew goes to `out/by_hand/`, in the same order of folders, unless OUT_DIR says otherwise.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ws.cache.files import settled
from ws.cache.names import BY_HAND, RunId, cache_folder
from ws.cache.places import out_folder, root
from ws.cache.syntax import digest
from ws.runs import parameters
from ws.runs.folders import Params, library_files, null_diffs, run_id, seed_folder
from ws.runs.identity import record_of
from ws.runs.notebooks import CAUSAL, Notebook, Place, notebook_of, other_seed

SWEPT, CHECKED = "explanation.json", "causal.json"  # the last file that a sweep, a causal check writes


class Refused(ValueError):
    """A parameter, or what it names, cannot be used; a notebook shows the one line and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True)
class Here:
    """Where a notebook works. folder: of its results; home: of its weight difference when it trains one; by_hand: nobody
    but the reader started it; title: whose run it is, in words."""

    notebook: Notebook
    params: Params
    folder: Path
    by_hand: bool

    @property
    def id(self) -> RunId:
        return run_id(self.params, self.notebook.dtype)

    @property
    def title(self) -> str:
        return self.notebook.title_of(self.params)

    @property
    def outs(self) -> list[Path]:
        """Folders of results to read from, the finished ones first."""
        return [out_folder(), out_folder() / BY_HAND] if self.by_hand else [out_folder()]

    @property
    def home(self) -> Path:
        """Where a weight difference that is made goes: the seed's folder, or the run's own where that was chosen."""
        standard = self.notebook.own_folder({**self.params, "OUT_DIR": ""}, out_folder())
        if settled(self.folder).resolve() == standard.resolve():
            return seed_folder(self.params, out_folder())
        return seed_folder(self.params, self.outs[-1]) if self.by_hand and not self.params["OUT_DIR"] else self.folder

    @property
    def finished_home(self) -> Path:
        """Where the finished weight difference of these parameters lies, if there is one."""
        return seed_folder(self.params, out_folder())

    def find(self, below: str, make: str) -> Path:
        """A file or folder below the seed's folder, or the adapter's in a notebook over seeds. Refused where it is nowhere;
        `make`: the command that makes it."""
        level = self.notebook.level
        homes = [self.id.adapter_folder(o) if level == "adapter" else seed_folder(self.params, o) for o in self.outs]
        for home in homes:
            if (home / below).exists():
                return home / below
        raise Refused(f"{homes[0] / below}: is not there; make it first: {make}")

    @property
    def w(self) -> Path:
        """The weight difference: W_PATH, or the one of this seed."""
        if given := self.params.get("W_PATH"):
            return Path(str(given))
        return self.find("w.safetensors", f"just nb weight_diff{self.words('MODEL_ID', 'BEHAVIOR', 'ADAPTER', 'SEED')}")

    @property
    def nulls(self) -> list[Path]:
        """The null diffs: NULL_W_PATH, else those of this adapter that are there."""
        if given := self.params.get("NULL_W_PATH"):
            return [Path(str(path)) for path in given]
        return next((list(found.values()) for out in self.outs if (found := null_diffs(self.params, out))), [])

    @property
    def sweep(self) -> Path:
        """Folder of the finished sweep of this seed's weight difference."""
        words = self.words("MODEL_ID", "BEHAVIOR", "ADAPTER", "SEED", "W_PATH")
        protocol = self.params["PROTOCOL"]
        return self.find(f"{protocol}/{SWEPT}", f"just nb v7_sweep -p PROTOCOL {protocol}{words}").parent

    @property
    def other(self) -> tuple[Path | None, Path | None]:
        """Another LoRA seed's weight difference and its finished sweep, as far as they are there. Refused where OTHER_SEED is
        given and is not trained."""
        for out in self.outs:
            if (seed := other_seed(self.params, out)) is not None:
                home = seed_folder({**self.params, "SEED": seed, "W_PATH": ""}, out)
                w, swept = home / "w.safetensors", home / str(self.params["PROTOCOL"])
                if w.is_file():
                    return w, swept if (swept / SWEPT).is_file() else None
        if (seed := self.params["OTHER_SEED"]) is not None:
            words = self.words("MODEL_ID", "BEHAVIOR", "ADAPTER")
            raise Refused(f"OTHER_SEED {seed}: is not trained; train it: just nb weight_diff -p SEED {seed}{words}")
        return None, None

    @property
    def sweeps(self) -> dict[int, Path]:
        """Folder of each seed's finished sweep, below RUNS_DIR or the adapter's folder."""
        base, protocol = str(self.params.get("RUNS_DIR") or ""), self.params["PROTOCOL"]
        command = f"just nb v7_sweep -p PROTOCOL {protocol}{self.words('MODEL_ID', 'BEHAVIOR', 'ADAPTER')} -p SEED "
        found = {}
        for seed in self.params["SEEDS"]:
            below = f"seed_{seed}/{protocol}"
            if base and not (Path(base) / below).is_dir():
                raise Refused(f"{Path(base) / below}: is not there; RUNS_DIR must hold a sweep of every seed")
            found[seed] = Path(base) / below if base else self.find(f"{below}/{SWEPT}", f"{command}{seed}").parent
        return found

    @property
    def all_checks(self) -> dict[int, Path]:
        """Folder of the finished causal check of every seed of this adapter."""
        home = self.id.adapter_folder(self.outs[0])
        found = {
            p.parent.parent.name.removeprefix("seed_"): p.parent for p in home.glob(f"seed_[0-9]*/{CAUSAL}/{CHECKED}")
        }
        return {int(seed): folder for seed, folder in sorted(found.items())}

    @property
    def adapters(self) -> Path | None:
        """The folder of this seed's two adapters, if it is there."""
        found = self.finished_home / "adapters"
        return found if (found / "pos").is_dir() else None

    @property
    def checks(self) -> dict[int, Path]:
        """Folder of each seed's causal check, beside its sweep; there or not."""
        return {seed: sweep.with_name(CAUSAL) for seed, sweep in self.sweeps.items()}

    def w_of(self, seed: int) -> Path:
        """The weight difference that the sweep of a seed is of."""
        homes = [self.sweeps[seed].parent, *(seed_folder({**self.params, "SEED": seed}, out) for out in self.outs)]
        return next((home / "w.safetensors" for home in homes if (home / "w.safetensors").is_file()), homes[0])

    def diffs_of(self, behavior: str) -> dict[int, Path]:
        """The weight difference of each of SEEDS, of one of several behaviours. Refused where one is missing."""
        found = {}
        for seed in self.params["SEEDS"]:
            own = {**self.params, "BEHAVIOR": behavior, "SEED": seed}
            there = [seed_folder(own, out) / "w.safetensors" for out in self.outs]
            path = next((path for path in there if path.is_file()), None)
            if path is None:
                told = f"-p BEHAVIOR {behavior} -p SEED {seed}{self.words('MODEL_ID')}"
                raise Refused(f"{there[0]}: is not there; make it first: just nb weight_diff {told}")
            found[seed] = path
        return found

    def library_of(self, behavior: str) -> list[tuple[str, int, bool, Path]]:
        """Weight differences and null diffs of one of several behaviours: adapter, seed, whether null, file."""
        found = {}
        for out in reversed(self.outs):
            found |= {one[:3]: one for one in library_files({**self.params, "BEHAVIOR": behavior}, out)}
        return list(found.values())

    def sweeps_of(self, behavior: str) -> dict[int, Path]:
        """The finished sweeps of one of several behaviours, of those of SEEDS that have one."""
        homes = {s: [seed_folder({**self.params, "BEHAVIOR": behavior, "SEED": s}, o) for o in self.outs]
                 for s in self.params["SEEDS"]}  # fmt: skip
        there = {s: [home / self.params["PROTOCOL"] for home in of] for s, of in homes.items()}
        return {s: path for s, paths in there.items() for path in paths[:1] if (path / SWEPT).is_file()}

    @property
    def cache(self) -> Path:
        """Where this run keeps what it goes on with when it was stopped; by hand and by a batch the same."""
        name = self.notebook.own_folder({**self.params, "OUT_DIR": ""}, out_folder()).name
        told = digest(json.dumps([self.params.get(key) for key in self.notebook.kept]).encode())[:8]
        return cache_folder(self.id.model) / self.notebook.name / f"{name}-{told}"

    def words(self, *names: str) -> str:
        """Parameters as they are typed, those that are not the notebook's own defaults."""
        usual = {"MODEL_ID": "tiny", "BEHAVIOR": "sycophancy", "ADAPTER": "lora"}
        return "".join(
            f" -p {n} {self.params[n]}" for n in names if n in self.params and self.params[n] != usual.get(n)
        )


def begin(name: str, cells: dict[str, object]) -> Here:
    """Check the parameters that a notebook's cells have set, fill in the model's own (`cells` is `globals()`), and say
    where it works. Raises Refused in one line, before anything is loaded."""
    try:
        known = parameters.defaults(parameters.read_notebook(Place().notebook(name)), name)
        given = {key: cells[key] for key in known if key in cells}
        values = {key: parameters.located(key, value, root()) for key, value in given.items()}
        values |= parameters.filled(name, values)
        cells.update(values)
        entry, out_dir = notebook_of(name), str(values.get("OUT_DIR") or "")
        by_hand = not (out_dir and Path(out_dir) != settled(Path(out_dir)))  # a run is made under a temporary name
        folder = Path(out_dir) if out_dir else entry.own_folder(values, out_folder() / BY_HAND)
        if by_hand and out_dir and record_of(name, folder):
            raise ValueError(f"OUT_DIR {folder}: holds a finished run; choose another folder, or none")
    except (ValueError, FileNotFoundError) as error:
        raise Refused(str(error)) from None
    told = {**values, "OUT_DIR": "" if out_dir and not by_hand else out_dir}
    return Here(entry, told, folder, by_hand)
