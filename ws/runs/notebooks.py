"""The one table of notebooks: which parameters are paths, where a run goes, what it reads, what it makes for others.

A further notebook is one entry of TABLE. A notebook without an entry runs as one of a seed, in a folder of its name.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ws.cache.models import model_files
from ws.cache.places import ASSETS, notebooks_folder, out_folder, shipped_pairs
from ws.cache.syntax import is_candidate, read_scope
from ws.runs.folders import differs, library_files, null_diffs, own_w, run_id, seed_folder, shortened, told
from ws.runs.sets import Params, read_set

PLACES = ("OUT_DIR", "RUNS_DIR")  # folders whose content as a whole is no input
# a path only when something lies there; else a known name
MAYBE_PATHS = ("MODEL_ID", "BEHAVIOR", "CHAT_TEMPLATE", "GRADIENTS", "OTHERS")
CAUSAL = "causal"  # folder of a seed's causal check
CANDIDATE_MODULES = ("from_weights", "from_activations", "compound", "from_gradients", "ceilings")


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
    usual: Params = field(default_factory=dict)  # parameters that tell its runs apart, with what needs no mention
    dtype: str = "auto"  # the DTYPE that needs no mention
    kept: tuple[str, ...] = ()  # parameters that decide what a stopped run goes on with
    inputs: Callable[[Params, Path], list[Path]] = lambda params, out: []  # further files it reads, there or not
    products: Callable[[Params, Path], list[Path]] = lambda params, out: []  # what it makes outside its folder
    roots: Callable[[Params], list[str]] = lambda params: []  # code behind it that its cells do not name
    batch: str | None = None  # its parameter set in a batch, "" for none; None where a batch leaves it out
    needs: tuple[str, ...] = ()  # the notebooks that a batch runs before it, where it runs them
    extra: bool = False  # whether a batch runs it only where that is asked for
    trains: str = ""  # the function that makes its adapters
    scores: str = ""  # its table in out/results.parquet

    def run_folder(self, params: Params, out: Path) -> Path:
        """The folder of a run: OUT_DIR where it is given."""
        return Path(str(params["OUT_DIR"])) if params.get("OUT_DIR") else self.own_folder(params, out)

    def own_folder(self, params: Params, out: Path) -> Path:
        """The folder of a run by its identity."""
        run = run_id(params, self.dtype)
        home = {"adapter": run.adapter_folder(out), "model": out / run.model}
        home["seed"] = seed_folder(params, out, self.dtype)
        name = (self.folder or self.name).format(**{"PROTOCOL": "v7", **params})
        apart = (f"_{key.lower()}{told(key, params[key])}" for key in self.apart(params))
        return home[self.level] / shortened(name + "".join(apart))

    def apart(self, params: Params) -> Iterator[str]:
        """The parameters by which a run is none of the usual ones; a switch as the protocol has it is usual."""
        usual = self.usual | {key: value for key, value in protocol_set(params).items() if key in self.usual}
        return (key for key, value in usual.items() if differs(params, key, value))

    def title_of(self, params: Params) -> str:
        """A run's identity in words, for its report."""
        run, w = run_id(params, self.dtype), str(params.get("W_PATH") or "")
        words = [run.model]
        if self.level != "model":
            words += [run.behavior, f"w from {Path(w).name} ({run.adapter[-8:]})" if w else run.adapter]
        if self.level == "seed" and not w:
            words += [f"seed {run.seed}"]
        if "SEEDS" in params:
            words += [f"seeds {told('SEEDS', params['SEEDS'])}"]
        words += ["shuffled labels (null diff)"] if params.get("NULL_DIFF") else []
        words += [str(params["PROTOCOL"])] if params.get("PROTOCOL") else []
        words += [f"{key} {told(key, params[key])}" for key in self.apart(params) if key not in ("SEEDS", "PROTOCOL")]
        return ", ".join(words)

    def run_inputs(self, params: Params, out: Path) -> list[Path]:
        """The files a run reads, as far as they exist. FileNotFoundError for a path parameter that leads nowhere."""
        given = [path for key in path_names() if key not in PLACES for path in paths_in(params, key)]
        if missing := [path for path in given if not path.exists()]:
            raise FileNotFoundError(f"{self.name}: {missing[0]}: no such file or folder")
        if model := str(params.get("MODEL_ID") or ""):
            given += model_files(model)
        if behavior := str(params.get("BEHAVIOR") or ""):
            given += [ASSETS / f"{behavior}.json", Path(behavior)]
        given += [path for key in ("CHAT_TEMPLATE", "GRADIENTS", "OTHERS") for path in paths_in(params, key)]
        given += filter(None, (shipped_pairs(str(params.get(key) or "")) for key in ("PAIRS", "GRADIENTS")))
        return [path for path in [*given, protocol_file(params), *self.inputs(params, out)] if path.exists()]


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


def protocol_set(params: Params) -> Params:
    """The parameters of a run's protocol; {} where it has none."""
    file = protocol_file(params)
    return (
        {k: v for k, v in read_set(file).items() if k != "PROTOCOL"}
        if params.get("PROTOCOL") and file.is_file()
        else {}
    )


def protocol_sources(params: Params) -> list[str] | None:
    """The sources of candidates that take part in a sweep: SOURCES, else the protocol's; None when nothing says so."""
    return params.get("SOURCES") or protocol_set(params).get("SOURCES")


def swept_sources(params: Params) -> list[str] | None:
    """The sources of candidates of a sweep, with those that are read from gradients where it has them."""
    gradients = str(params.get("GRADIENTS") or protocol_set(params).get("GRADIENTS") or "none") != "none"
    sources = protocol_sources(params)
    return [*sources, *["gradient"] * gradients] if sources else sources


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
    w = own_w(params, out)  # in a folder of its own choice a run keeps everything there
    chosen = str(params.get("OUT_DIR") or "") not in ("", str(w.with_name("weight_diff")))
    sides = [w.parent / "adapters" / sign for sign in ("pos", "neg")]
    return [] if params.get("W_PATH") or chosen else [w, *sides]


def _swept_w(params: Params, out: Path) -> list[Path]:
    own = [] if params.get("W_PATH") else [own_w(params, out)]
    return own if params.get("NULL_W_PATH") else [*own, *null_diffs(params, out).values()]


def other_seed(params: Params, out: Path) -> int | None:
    """The LoRA seed of a further weight difference of the same adapter: OTHER_SEED, else the lowest other one that is
    trained."""
    if (given := params.get("OTHER_SEED")) is not None or params.get("W_PATH"):
        return given
    home = run_id(params).adapter_folder(out)
    there = sorted(int(p.parent.name.removeprefix("seed_")) for p in home.glob("seed_[0-9]*/w.safetensors"))
    return next((seed for seed in there if seed != params.get("SEED")), None)


def _checked(params: Params, out: Path) -> list[Path]:
    """The sweep, the weight differences of this and of another seed, and the null diffs."""
    kept, away = ("explanation.json", "scores.safetensors"), other_seed(params, out)
    homes = [seed_folder(params, out)]
    homes += [seed_folder({**params, "SEED": away, "W_PATH": ""}, out)] if away is not None else []
    sweeps = [home / str(params.get("PROTOCOL")) / name for home in homes for name in kept]
    return [*_swept_w(params, out), *(home / "w.safetensors" for home in homes[1:]), *sweeps]


def _beside(params: Params, out: Path) -> list[Path]:
    """The weight difference with its adapters, its sweep, and the causal checks of all seeds."""
    home = seed_folder(params, out)
    swept = [home / str(params.get("PROTOCOL")) / name for name in ("explanation.json", "scores.safetensors")]
    checks = sorted(run_id(params).adapter_folder(out).glob(f"seed_[0-9]*/{CAUSAL}/causal.json"))
    return [own_w(params, out), home / "adapters" / "pos", home / "adapters" / "neg", *swept, *checks]


def _swept_seeds(params: Params, out: Path) -> list[Path]:
    home = next(iter(paths_in(params, "RUNS_DIR")), run_id(params).adapter_folder(out))
    tables = ("explanation.json", "v7_per_layer.csv", "v7_specific_per_layer.csv", "scores.safetensors", "*.py")
    files = ["w.safetensors", *(f"{params.get('PROTOCOL') or 'v7*'}/{name}" for name in tables)]
    files += [f"{CAUSAL}/{name}" for name in ("causal.json", "causal_candidates.tsv", "causal_excess.safetensors")]
    return [p for s in params.get("SEEDS") or ["*"] for f in files for p in sorted(home.glob(f"seed_{s}/{f}"))]


def _crossed(params: Params, out: Path) -> list[Path]:
    """The weight differences, null diffs and finished sweeps of several behaviours."""
    of = [
        {**params, "BEHAVIOR": b, "SEED": s} for b in params.get("BEHAVIORS") or [] for s in params.get("SEEDS") or []
    ]
    homes = [seed_folder(one, out) for one in of]
    files = ("w.safetensors", f"{params.get('PROTOCOL')}/explanation.json")
    shown = [one[3] for b in params.get("BEHAVIORS") or [] for one in library_files({**params, "BEHAVIOR": b}, out)]
    return [*dict.fromkeys([*(path for home in homes for name in files if (path := home / name).is_file()), *shown])]


_SWITCHES = dict.fromkeys("EVAL_SPLIT CHAT_PROBES PERSONA_PAIRS RAW_LAST FOLD_GAIN TEMPLATES POSITIONS SOURCES".split())
_ENTRIES = (
    Notebook(
        "weight_diff", "The weight difference and how it steers", ("W_PATH", "POS_ADAPTER", "NEG_ADAPTER", "PAIRS"),
        products=_made_w, batch="", trains="ws.train.lora.train_adapter",
    ),
    Notebook(
        "v7_sweep", "Which subspace explains the difference", ("W_PATH", "NULL_W_PATH", "CANDIDATES"),
        folder="{PROTOCOL}", usual={"PCS": 8, "K_BROAD": 64, **_SWITCHES}, inputs=_swept_w,
        roots=lambda params: candidate_code(swept_sources(params)),
        batch="v7b", needs=("weight_diff",), scores="v7_summary.tsv",
    ),
    Notebook(
        "causal_check", "Which subspace carries the behaviour", ("W_PATH", "NULL_W_PATH"), folder=CAUSAL,
        usual={"PROTOCOL": "v7b", "SUBSPACES": [], "ALPHA": 1.0}, inputs=_checked, batch="", needs=("v7_sweep",), extra=True,
    ),
    Notebook(
        "benchmark", "Beside other ways to steer", ("STATEMENTS", "TRUTH"),
        usual={"PROTOCOL": "v7b", "SUBSPACE": "", "ALONG": "texts"}, inputs=_beside,
    ),
    Notebook(
        "v7b_stability", "Which of it holds over seeds", ("CANDIDATES",), level="adapter", folder="v7b",
        usual={"SEEDS": [0, 1, 2], "PROTOCOL": "v7b", "RUNS_DIR": ""}, inputs=_swept_seeds,
        roots=lambda params: candidate_code(None), batch="", needs=("v7_sweep", "causal_check"),
    ),
    Notebook(
        "cross_behaviours", "Is a weight difference specific to its behaviour", ("BEHAVIORS",), level="model",
        usual={"BEHAVIORS": [], "ADAPTER": "lora", "SEEDS": [0, 1, 2], "PROTOCOL": "v7b", "ALPHAS": [-1.0, 0.0, 1.0],
               "N_HELDOUT": 100, "ATLAS_ADAPTERS": []}, inputs=_crossed,
    ),
    Notebook(
        "delta_svd", "What each block adds to the residual stream", ("CALIBRATION", "COMPARE"), level="model",
        usual={"CALIBRATION": "", "MODE": "stream", "FINAL_NORM": False, "MAX_LENGTH": 2048, "SEED": 0},
    ),
    Notebook(
        "theta_fit", "What a small vector per user teaches", ("USERS",), level="model", dtype="float32",
        usual={"USERS": "", "THETA_DIM": 64, "MAX_LENGTH": 256, "SEED": 42},
        kept=("ALPHA", "GAMMA", "BETA", "LAM", "LR", "STEPS", "GRAD_CLIP", "THETA_CLIP", "HELDOUT", "MASK_PROMPT", "MATCHED_KL"),
    ),
    Notebook("tutorial", "A behaviour of one's own, in a minute", level="model", usual={"SEED": 0}),
)  # fmt: skip
TABLE = {entry.name: entry for entry in _ENTRIES}
