"""A notebook run's identity: the folder its files go to, what it depends on, whether it is done.

done = the notebook ended, without exception, its outputs are there, and its key is that of now
"""

import json
import os
import re
from pathlib import Path

from ws.cache import made as store
from ws.cache.names import RunId, model_folder, model_slug
from ws.cache.places import ASSETS, OUT, ROOT
from ws.runs import parameters


def behavior_slug(behavior: str) -> str:
    """Folder-safe name of a behaviour: a shipped one's name, or the `name` in a user's file, else the file's name."""
    path = Path(behavior)
    name = behavior
    if path.is_file():
        name = path.stem
        if path.suffix == ".json":
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: not JSON: {error}") from None
            name = content.get("name") or path.stem if isinstance(content, dict) else path.stem
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "behavior"


def run_id(params: dict) -> RunId:
    """Identity of a run from a notebook's parameters."""
    return RunId(
        model=model_slug(str(params.get("MODEL_ID", "tiny"))),
        behavior=behavior_slug(str(params.get("BEHAVIOR", "sycophancy"))),
        adapter=str(params.get("ADAPTER", "lora")),
        seed=int(params.get("SEED", 0)),
    )


def run_folder(notebook: str, params: dict, out: Path = OUT) -> Path:
    """The folder of a notebook's run when OUT_DIR does not say otherwise."""
    if params.get("OUT_DIR"):
        return Path(str(params["OUT_DIR"]))
    run = run_id(params)
    if notebook == "v7_sweep":
        return run.folder(out) / str(params.get("PROTOCOL", "v7"))
    if notebook == "v7b_stability":
        return run.adapter_folder(out) / "v7b"
    if notebook == "causal_check":
        return run.adapter_folder(out) / "causal"
    if notebook in ("delta_svd", "theta_fit"):
        return model_folder(run.model, out) / notebook
    return run.folder(out) / ("null_diff" if params.get("NULL_DIFF") else "") / notebook


def hub_revision(model_id: str, revision: str = "main") -> str:
    """The commit that the local hub cache holds for a model, `revision` itself where it holds none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    ref = Path(HF_HUB_CACHE) / f"models--{model_id.replace('/', '--')}" / "refs" / revision
    return ref.read_text().strip() if ref.is_file() else revision


def run_inputs(notebook: str, params: dict, out: Path = OUT) -> list[Path]:
    """The files a run reads: its path parameters, the model's folder, the shipped behaviour, the w of its own seed."""
    inputs = [path for key in parameters.PATHS if key != "OUT_DIR" for path in parameters.paths_in(params, key)]
    missing = [path for path in inputs if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{notebook}: {missing[0]}: no such file or folder")
    model, behavior = str(params.get("MODEL_ID", "")), str(params.get("BEHAVIOR", ""))
    shipped = {"tiny": ASSETS / "tiny", behavior: ASSETS / f"{behavior}.json"}
    for value in (model, behavior):
        path = shipped.get(value, Path(value)) if value else Path(value)
        inputs.extend(p for p in {path, Path(value)} if value and p.exists() and p != Path())
    if params.get("PROTOCOL"):
        inputs.append(ROOT / "nbs" / "params" / f"{params['PROTOCOL']}.yaml")
    if notebook == "v7_sweep":
        for key, made in (("W_PATH", "w.safetensors"), ("NULL_W_PATH", "null_diff/w.safetensors")):
            if not params.get(key):
                inputs.append(run_id(params).folder(out) / made)
    if notebook == "v7b_stability":
        folder = run_id(params).adapter_folder(out)
        for seed in params.get("SEEDS") or ["*"]:
            protocol = params.get("PROTOCOL") or "v7*"
            for name in ("w.safetensors", f"{protocol}/v7_per_layer.csv", f"{protocol}/scores.safetensors"):
                inputs.extend(sorted(folder.glob(f"seed_{seed}/{name}")))
    return [path for path in inputs if path.exists()]


def run_key(notebook: str, content: dict, params: dict, out: Path = OUT) -> store.Key:
    """Key of a run. Paths count by what lies there, not by where it lies; a hub model counts by its commit."""
    located = {key for key in parameters.PATHS + parameters.MAYBE_PATHS if parameters.paths_in(params, key)}
    # where results go and whether to train anew are no part of what is asked for
    counted = {k: v for k, v in params.items() if k not in located and k not in ("OUT_DIR", "RETRAIN")}
    model = str(params.get("MODEL_ID", ""))
    if model and model != "tiny" and not Path(model).exists():
        counted["hub commit"] = hub_revision(model, str(params.get("REVISION") or "main"))
    return store.stage_key(counted, run_inputs(notebook, params, out), code=parameters.code_of(content))


def outputs(notebook: str, folder: Path) -> dict[str, int]:
    """`{relative name: bytes}` of the files a finished run left in its folder.

    Files that another notebook's run lists as its own do not count (two may share a folder), nor do the rendering and
    params.json, which may be written anew.
    """
    others: set[str] = set()
    for record in folder.glob(".made.*.ipynb.json"):
        other = record.name.removeprefix(".made.").removesuffix(".json")
        if other != f"{notebook}.ipynb":
            others |= {other, *store.read_sidecar(folder / other).get("about", {}).get("outputs", {})}
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file() or any(part.startswith(store.HIDDEN) for part in file.relative_to(folder).parts):
            continue
        if name not in others and not name.endswith((".html", ".ipynb")) and name != "params.json":
            found[name] = file.stat().st_size
    return found


def products(notebook: str, folder: Path, params: dict, out: Path = OUT) -> dict[str, dict]:
    """`{name relative to the run's folder: ws.cache.made.describe}` of what a run makes for others, outside its folder.

    That is the weight difference of a `weight_diff` which was not given one.
    """
    if notebook != "weight_diff" or params.get("W_PATH"):
        return {}
    made = run_id(params).folder(out) / ("null_diff" if params.get("NULL_DIFF") else "") / "w.safetensors"
    return {os.path.relpath(made, folder): store.describe(made)} if made.is_file() else {}


def missing_output(notebook: str, folder: Path) -> str:
    """The first file of a finished run that is gone or is not what it was when the run ended, '' when all are whole.

    A run without a record has none of its files: its notebook is named.
    """
    target = folder / f"{notebook}.ipynb"
    about = store.read_sidecar(target).get("about")
    if about is None or not target.is_file():
        return str(target)
    for name, size in about["outputs"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return str(folder / name)
    for name, record in about.get("products", {}).items():
        if not (folder / name).is_file() or not store.intact(folder / name, record):
            return os.path.normpath(folder / name)
    return ""


def run_state(notebook: str, folder: Path, key: store.Key) -> str:
    """One of ws.cache.made.STATES for the run in `folder`."""
    found = store.state(folder / f"{notebook}.ipynb", key)
    if found != "done":
        return found
    return "damaged" if missing_output(notebook, folder) else "done"


def stale_adapters(params: dict, out: Path = OUT) -> list[Path]:
    """Adapter folders of a `weight_diff` run whose training code changed since they were trained.

    Such a run keeps them and uses them as they are, unless it is told to train them anew.
    """
    if params.get("W_PATH") or params.get("POS_ADAPTER"):
        return []
    folder = run_id(params).folder(out) / ("null_diff" if params.get("NULL_DIFF") else "") / "adapters"
    found = {side: store.read_sidecar(side).get("key", {}) for side in (folder / "pos", folder / "neg")}
    if not any(found.values()):
        return []
    now = store.stage_key({}, modules=["ws.train.lora"]).sources
    return [side for side, key in found.items() if key and key["sources"] != now]
