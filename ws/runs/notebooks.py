"""The one table of notebooks: which parameters are paths, where a run goes, what it reads, what it makes for others.

A further notebook is one entry of TABLE. A notebook without an entry runs as one of a seed, in a folder of its name.
"""

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ws.cache.names import RunId, model_slug, slug
from ws.cache.places import ASSETS, notebooks_folder, out_folder
from ws.cache.syntax import is_candidate, read_scope

PLACES = ("OUT_DIR", "RUNS_DIR")  # folders whose content as a whole is no input
MAYBE_PATHS = ("MODEL_ID", "BEHAVIOR")  # a path only when something lies there; else a hub id or a shipped name
CANDIDATE_MODULES = ("from_weights", "from_activations", "compound", "ceilings")
Params = dict[str, object]


@dataclass(frozen=True)
class Place:
    """Folders that runs work with: notebooks, results. Workers must see them under the same names."""

    nbs: Path = field(default_factory=notebooks_folder)
    out: Path = field(default_factory=out_folder)

    def notebook(self, name: str) -> Path:
        return self.nbs / f"{name}.ipynb"

    @property
    def logs(self) -> Path:
        return self.out.parent / "logs"


@dataclass(frozen=True)
class Notebook:
    """What is known of a notebook before it runs."""

    name: str
    title: str = ""  # of its reports in the index
    paths: tuple[str, ...] = ()  # parameters that hold files or folders it reads
    level: str = "seed"  # what a run belongs to: a seed, an adapter (all its seeds) or a model
    folder: str = ""  # the run's folder below that, a template of its parameters
    inputs: Callable[[Params, Path], list[Path]] = lambda params, out: []  # further files it reads, there or not
    products: Callable[[Params, Path], list[Path]] = lambda params, out: []  # what it makes outside its folder
    roots: Callable[[Params], list[str]] = lambda params: []  # code behind it that its cells do not name
    batch: str | None = None  # its parameter set in a batch, "" for none; None where a batch leaves it out
    needs: tuple[str, ...] = ()  # the notebooks that a batch runs before it
    trains: str = ""  # the function that makes its adapters
    scores: str = ""  # its table in out/results.parquet

    def run_folder(self, params: Params, out: Path) -> Path:
        """The folder of a run: OUT_DIR where it is given."""
        if params.get("OUT_DIR"):
            return Path(str(params["OUT_DIR"]))
        run = run_id(params)
        home = {"seed": seed_folder(params, out), "adapter": run.adapter_folder(out), "model": out / run.model}
        return home[self.level] / (self.folder or self.name).format(**{"PROTOCOL": "v7", **params})

    def run_inputs(self, params: Params, out: Path) -> list[Path]:
        """The files a run reads, as far as they exist. FileNotFoundError for a path parameter that leads nowhere."""
        given = [path for key in path_names() if key not in PLACES for path in paths_in(params, key)]
        if missing := [path for path in given if not path.exists()]:
            raise FileNotFoundError(f"{self.name}: {missing[0]}: no such file or folder")
        if model := str(params.get("MODEL_ID") or ""):
            given.append(ASSETS / "tiny" if model == "tiny" else Path(model))
        if behavior := str(params.get("BEHAVIOR") or ""):
            given += [ASSETS / f"{behavior}.json", Path(behavior)]
        return [path for path in [*given, protocol_file(params), *self.inputs(params, out)] if path.exists()]


def behavior_slug(behavior: str) -> str:
    """Folder-safe name of a behaviour: a shipped one's name, or the `name` in a user's file, else the file's name."""
    path = Path(behavior)
    if path.suffix != ".json" or not path.is_file():
        return slug(path.stem if path.is_file() else behavior)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    return slug((content.get("name") if isinstance(content, dict) else "") or path.stem)


def run_id(params: Params) -> RunId:
    """Identity of a run from a notebook's parameters."""
    return RunId(
        model=model_slug(str(params.get("MODEL_ID", "tiny"))),
        behavior=behavior_slug(str(params.get("BEHAVIOR", "sycophancy"))),
        adapter=str(params.get("ADAPTER", "lora")),
        seed=int(params.get("SEED", 0)),
    )


def seed_folder(params: Params, out: Path) -> Path:
    """Folder of a run's seed, or of its null diff."""
    return run_id(params).folder(out, bool(params.get("NULL_DIFF")))


def paths_in(params: Params, key: str) -> list[Path]:
    """The absolute paths that a resolved parameter holds; [] where it is no path."""
    value = params.get(key)
    texts = value if isinstance(value, list | tuple) else [value]
    return [Path(text) for text in texts if isinstance(text, str) and Path(text).is_absolute()]


def path_names() -> list[str]:
    """Parameters that are paths, in whichever notebook."""
    return sorted({*PLACES, *(key for entry in TABLE.values() for key in entry.paths)})


def notebook_of(name: str) -> Notebook:
    """A notebook's entry; a plain one for a notebook that has none."""
    return TABLE.get(name) or Notebook(name)


def protocol_file(params: Params) -> Path:
    return notebooks_folder() / "params" / f"{params.get('PROTOCOL')}.yaml"


def protocol_sources(params: Params) -> list[str] | None:
    """The sources of candidates that take part in a sweep: SOURCES, else the protocol's; None when nothing says so."""
    import yaml

    file = protocol_file(params)
    known = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return params.get("SOURCES") or known.get("SOURCES")


def candidate_code(sources: list[str] | None) -> list[str]:
    """Dotted names of this package's candidates, of the given sources or all. One that names no source always counts."""
    found = []
    for module in (f"ws.subspaces.{name}" for name in CANDIDATE_MODULES):
        for name, nodes in read_scope(module).defs.items():
            for call in filter(is_candidate, (d for node in nodes for d in getattr(node, "decorator_list", []))):
                own = [ast.literal_eval(k.value) for k in getattr(call, "keywords", []) if k.arg == "source"]
                if sources is None or not own or own[0] in sources:
                    found.append(f"{module}.{name}")
    return found


def _made_w(params: Params, out: Path) -> list[Path]:
    return [] if params.get("W_PATH") else [seed_folder(params, out) / "w.safetensors"]


def _swept_w(params: Params, out: Path) -> list[Path]:
    own = {"W_PATH": "w.safetensors", "NULL_W_PATH": "null_diff/w.safetensors"}
    return [run_id(params).folder(out) / file for key, file in own.items() if not params.get(key)]


def _swept_seeds(params: Params, out: Path) -> list[Path]:
    home = next(iter(paths_in(params, "RUNS_DIR")), run_id(params).adapter_folder(out))
    tables = ("v7_per_layer.csv", "v7_specific_per_layer.csv", "scores.safetensors", "*.py")
    files = ["w.safetensors", *(f"{params.get('PROTOCOL') or 'v7*'}/{name}" for name in tables)]
    return [p for s in params.get("SEEDS") or ["*"] for f in files for p in sorted(home.glob(f"seed_{s}/{f}"))]


_ENTRIES = (
    Notebook(
        "weight_diff", "The weight difference and how it steers", ("W_PATH", "POS_ADAPTER", "NEG_ADAPTER", "PAIRS"),
        products=_made_w, batch="", trains="ws.train.lora.train_adapter",
    ),
    Notebook(
        "v7_sweep", "Which subspace explains the difference", ("W_PATH", "NULL_W_PATH", "CANDIDATES"),
        folder="{PROTOCOL}", inputs=_swept_w, roots=lambda params: candidate_code(protocol_sources(params)),
        batch="v7b", needs=("weight_diff",), scores="v7_summary.tsv",
    ),
    Notebook(
        "v7b_stability", "Which of it holds over seeds", ("CANDIDATES",), level="adapter", folder="v7b",
        inputs=_swept_seeds, roots=lambda params: candidate_code(None), batch="", needs=("v7_sweep",),
    ),
    Notebook("delta_svd", "What each block adds to the residual stream", ("CALIBRATION", "COMPARE"), level="model"),
    Notebook("theta_fit", "What a small vector per user teaches", ("USERS",), level="model"),
)  # fmt: skip
TABLE = {entry.name: entry for entry in _ENTRIES}
