"""Where a run's results go: a folder per identity, named so that a person can read it.

    out/<model>/<behavior>/<adapter>/seed_<k>/<run>

    model      a hub id with `__` for `/`, or a folder's name and 8 digits; `.revision`, `.dtype` where they were asked for
    adapter    its kind; trained by a recipe that is not the model's own: `lora-LR0.001`; a given w: `w-<file>-<8 digits>`
    run        `v7`; another width, protocol switch, seed set or text file: `v7_pcs16`, `v7b_seeds5-6`

What does not change the identity (draws of a null, a batch size) does not change the folder: there a finished run is
replaced by the next finished one.
"""

import re
from pathlib import Path

from ws.cache.keys import file_key
from ws.cache.models import model_name
from ws.cache.names import RunId, behavior_name, slug
from ws.cache.places import ASSETS
from ws.cache.syntax import digest
from ws.runs.sets import Params, own_set

LONGEST = 64  # characters of a name; a longer one ends in 8 digits of what was cut
# What decides how adapters are trained, with the values that stand for "the usual"; a model's own win (nbs/params).
RECIPE: Params = {
    "TOPICS": None, "PERSONAS": None, "SAMPLES": 10, "MAX_NEW_TOKENS": 128, "LORA_LAYERS": [], "R": 32, "LORA_ALPHA": 64,
    "LR": 2e-4, "EPOCHS": 1.0, "MAX_STEPS": -1, "BATCH": 4, "ACCUMULATION": 4, "PAIRS": "", "WORDINGS": [],
    "RESAMPLE_PAIRS": None, "TARGET_LOSS": 0.0, "BALANCE": False,
}  # fmt: skip
WRITING = ("PERSONAS", "SAMPLES", "MAX_NEW_TOKENS")  # how the base model writes pairs: nothing where they are written
OWN_PAIRS = "by_model"  # pairs of the base model, in a folder's name where a model's usual pairs are written ones
MANY_SAMPLES = 5  # answers per topic and persona from which on a draw of pairs leaves enough different ones


def behavior_slug(behavior: str) -> str:
    """Folder-safe name of a behaviour. A user's file under a shipped name must not take the shipped one's folder."""
    name = slug(behavior_name(behavior))
    shipped = Path(behavior).is_file() and (ASSETS / f"{name}.json").is_file()
    return f"{name}-{file_key(Path(behavior))[:8]}" if shipped else name


def run_id(params: Params, dtype: str = "auto") -> RunId:
    """Identity of a run from a notebook's parameters; `dtype`: what its notebook uses where nothing else is asked."""
    asked_for = (str(params.get(key) or "") for key in ("REVISION", "CHAT_TEMPLATE"))
    model = model_name(str(params.get("MODEL_ID", "tiny")), *asked_for)
    if (asked := params.get("DTYPE", dtype)) not in (dtype, "auto"):
        model += f".{asked}"
    adapter = slug(str(params.get("ADAPTER", "lora"))) + recipe(params)
    return RunId(
        model=model,
        behavior=behavior_slug(str(params.get("BEHAVIOR", "sycophancy"))),
        adapter=given_w(params) or adapter,
        seed=int(params.get("SEED", 0)),
    )


def recipe(params: Params) -> str:
    """What a training's parameters have that is not the model's usual, as the end of the adapter's name; '' for nothing."""
    if params.get("POS_ADAPTER"):
        pair = [Path(str(params[side])) for side in ("POS_ADAPTER", "NEG_ADAPTER") if params.get(side)]
        return shortened(f"-own-{pair[0].name}-{digest(''.join(map(file_key, pair)).encode())[:8]}")
    model, behavior = (str(params.get(k) or v) for k, v in {"MODEL_ID": "tiny", "BEHAVIOR": "sycophancy"}.items())
    usual = RECIPE | own_set(model, behavior).get("weight_diff", {})
    samples = usual["SAMPLES"] if params.get("SAMPLES") is None else params["SAMPLES"]
    pairs = usual["PAIRS"] if params.get("PAIRS") is None else params["PAIRS"]
    if usual["RESAMPLE_PAIRS"] is None:
        usual["RESAMPLE_PAIRS"] = resamples(samples, bool(pairs))
    given = {**params, "PAIRS": pairs or OWN_PAIRS}
    usual["PAIRS"] = usual["PAIRS"] or OWN_PAIRS
    keys = [key for key in RECIPE if not (pairs and key in WRITING) and differs(given, key, usual[key])]
    return shortened("".join(f"-{key}{told(key, given[key])}" for key in keys))


def resamples(samples: int, from_file: bool = False) -> bool:
    """What RESAMPLE_PAIRS = None means: whether each seed draws its training pairs anew. With pairs from a file, and with
    MANY_SAMPLES or more answers per topic and persona. (docs/method.md section 7)"""
    return from_file or samples >= MANY_SAMPLES


def differs(params: Params, key: str, usual: object) -> bool:
    """Whether a parameter was given and is not the usual one; None and an empty text or list mean the usual."""
    value = params.get(key)
    given = value not in (None, "", [], ())
    return given and value != usual and not (isinstance(value, list | tuple) and list(value) == list(usual or []))


def told(key: str, value: object) -> str:
    """A value as part of a folder's name: files by name and content, whole numbers in a row as a range."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).replace("+", "")
    if isinstance(value, str) and Path(value).is_absolute():
        path = Path(value)
        content = digest(value.encode()) if key.endswith("_DIR") else file_key(path)
        return f"{slug(path.stem)}-{content[:8]}"
    if isinstance(value, list | tuple):
        numbers = list(value)
        row = len(numbers) > 1 and all(type(n) is int for n in numbers)
        if row and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return f"{numbers[0]}-{numbers[-1]}"
        return ".".join(told(key, item) for item in numbers)
    return re.sub(r"[^\w.-]+", "_", str(value))


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9].rstrip('-_.')}-{digest(name.encode())[:8]}"


def own_w(params: Params, out: Path) -> Path:
    """Where a run's own weight difference lies, whatever W_PATH says."""
    return seed_folder({**params, "W_PATH": ""}, out) / "w.safetensors"


def given_w(params: Params) -> str:
    """The name of a given weight difference, '' where the run's own is meant."""
    path = str(params.get("W_PATH") or "")
    return f"w-{told('W_PATH', str(Path(path).absolute()))}" if path else ""


def seed_folder(params: Params, out: Path, dtype: str = "auto") -> Path:
    """Folder of a run's seed, or of its null diff; of a given w there is no seed."""
    run = run_id(params, dtype)
    if params.get("W_PATH"):
        return run.adapter_folder(out)
    return run.folder(out, bool(params.get("NULL_DIFF")))


def null_diffs(params: Params, out: Path) -> dict[int, Path]:
    """The null diffs of a run's adapter that are there, by seed, the lowest first: what a sweep is compared with where
    nothing else was asked, and what a batch need not train anew."""
    there = run_id({**params, "W_PATH": ""}).adapter_folder(out).glob("seed_*/null_diff/w.safetensors")
    named = {path.parts[-3].removeprefix("seed_"): path for path in there}
    return dict(sorted((int(seed), path) for seed, path in named.items() if seed.isdigit()))


def library_files(params: Params, out: Path) -> list[tuple[str, int, bool, Path]]:
    """What of a behaviour stands in an atlas: of ADAPTER and of each of ATLAS_ADAPTERS the w of SEEDS and the null diffs, as
    far as they are there: adapter, seed, whether it is a null diff, file."""
    found = []
    for adapter in dict.fromkeys([params["ADAPTER"], *(params.get("ATLAS_ADAPTERS") or [])]):
        own = {**params, "ADAPTER": adapter, "NULL_DIFF": False}
        made = {s: seed_folder({**own, "SEED": s}, out) / "w.safetensors" for s in params["SEEDS"]}
        found += [(adapter, seed, False, path) for seed, path in made.items() if path.is_file()]
        found += [(adapter, seed, True, path) for seed, path in null_diffs(own, out).items()]
    return found
