"""From a behaviour to a weight difference: pairs, two adapters, `w = theta_pos - theta_neg`.

The front door of training. The rooms behind it are `pairs` (the base model writes both answers under the personas) and
`lora` (one adapter for one sign and seed). (docs/method.md sections 1 and 2)
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from ws.cache.keys import stage_key
from ws.cache.made import made
from ws.cache.names import RunId, cache_folder
from ws.cache.places import OUT
from ws.data import Behavior
from ws.diff import WeightDiff, from_adapters, geometry, load_diff, save_diff, task_vectors
from ws.model.lm import LM
from ws.train.examples import shuffle_labels
from ws.train.lora import ADAPTERS, SIGNS, TrainConfig, adapter_layers, train_adapter
from ws.train.pairs import Pair, PairConfig, Pairs, make_pairs, pairs_key

__all__ = [
    "ADAPTERS",
    "Pair",
    "PairConfig",
    "Pairs",
    "TrainConfig",
    "adapter_layers",
    "make_pairs",
    "obtain_diff",
    "shuffle_labels",
    "train_adapter",
    "train_diff",
]


def train_diff(
    lm: LM,
    behavior: Behavior,
    run: RunId,
    cfg: TrainConfig,
    folder: Path | None = None,
    out: Path = OUT,
    retrain: bool = False,
    progress: bool = True,
) -> WeightDiff:
    """Both adapters of one seed and their difference: `adapters/{pos,neg}` and `w.safetensors` under `folder`.

    folder: default `run.folder(out)`, with `null_diff/` below it when `cfg.shuffle_labels`. Adapter kind and seed come
    from `run`. What is done is not done again; adapters whose parameters or pairs changed are trained anew, those where
    only the training code changed are kept (and said so) unless `retrain`. Every file appears whole or not at all.
    """
    cfg = replace(cfg, adapter=run.adapter)
    if folder is None:
        folder = run.folder(out) / "null_diff" if cfg.shuffle_labels else run.folder(out)
    cache = cache_folder(run.model, out)
    pairs = make_pairs(lm, behavior, cfg.pairs, cache, progress)
    params = {
        "pairs": pairs_key(lm, behavior, cfg.pairs),
        "seed": run.seed,
        "model": lm.fingerprint,
        "train": asdict(cfg),
    }
    stale = False
    sides = {}
    for sign in SIGNS:
        target = folder / "adapters" / sign
        key = stage_key({**params, "sign": sign}, modules=["ws.train.lora"])

        def make(path: Path, sign: str = sign) -> None:
            train_adapter(lm, pairs.rows, sign, run.seed, cfg, path, progress)

        found = made(target, key, make, folder=True, keep_stale=True, remake=retrain)
        stale = stale or found == "stale"
        sides[sign] = target
    if stale:
        tqdm.write(f"{folder / 'adapters'}: kept, although the training code changed since; --retrain trains them anew")
    meta = {
        "base_model": lm.name,
        "behavior": run.behavior,
        "adapter": run.adapter,
        "seed": run.seed,
        "null": cfg.shuffle_labels,
        "pairs": len(pairs.rows),
        "pairs_empty": pairs.empty,
        "pairs_identical": pairs.identical,
    }
    target = folder / "w.safetensors"
    key = stage_key(meta, inputs=[sides["pos"], sides["neg"]], modules=["ws.diff.build"])

    def join(path: Path) -> None:
        save_diff(from_adapters(sides["pos"], sides["neg"], lm.model, meta), path)

    made(target, key, join)
    return load_diff(target)


def obtain_diff(
    lm: LM,
    behavior: Behavior,
    run: RunId,
    cfg: TrainConfig,
    w_path: Path | str = "",
    pos_adapter: Path | str = "",
    neg_adapter: Path | str = "",
    folder: Path | None = None,
    out: Path = OUT,
    retrain: bool = False,
) -> tuple[WeightDiff, dict]:
    """The run's weight difference and how it came about: read from `w_path`, formed from two adapters, or trained.

    folder: where `w.safetensors` and `adapters/` go, by default `run.folder(out)` (`null_diff/` below it for shuffled
    labels). The difference of own adapters is saved there too, so that the sweep finds it. The record holds
    the source, norms and geometry of the pair and, where this project trained it, pairs and held-out losses.
    Raises ValueError when only one adapter is given, both a diff and adapters, or when w is 0.
    """
    if bool(pos_adapter) != bool(neg_adapter):
        raise ValueError(f"POS_ADAPTER and NEG_ADAPTER go together; only {pos_adapter or neg_adapter} was given")
    if w_path and pos_adapter:
        raise ValueError("give W_PATH, or POS_ADAPTER and NEG_ADAPTER, not both")
    if folder is None:
        folder = run.folder(out) / "null_diff" if cfg.shuffle_labels else run.folder(out)
    if w_path:
        w = _not_zero(load_diff(w_path), w_path)
        return w, {"source": Path(w_path).name, "norm_w": w.total_norm()}
    if pos_adapter:
        sides = (Path(pos_adapter), Path(neg_adapter))
        target = folder / "w.safetensors"
        meta = {"base_model": lm.name, "behavior": run.behavior, "adapter": run.adapter, "seed": run.seed}
        key = stage_key(meta, inputs=list(sides), modules=["ws.diff.build"])
        target.parent.mkdir(parents=True, exist_ok=True)
        made(target, key, lambda path: save_diff(from_adapters(*sides, lm.model, meta), path))
        record = {"source": f"{sides[0].name} - {sides[1].name}"}
    else:
        train_diff(lm, behavior, run, cfg, folder, out, retrain)
        sides = (folder / "adapters" / "pos", folder / "adapters" / "neg")
        target = folder / "w.safetensors"
        record = {"source": "trained, labels shuffled" if cfg.shuffle_labels else "trained"}
        for sign, side in zip(SIGNS, sides, strict=True):
            log = json.loads((side / "training.json").read_text(encoding="utf-8"))
            record |= {
                "layers": log["config"]["layers"],
                "pairs_trained": log["n_train"],
                "pairs_held_out": log["n_heldout"],
                f"held_out_loss_{sign}_before": log["heldout_loss_before"],
                f"held_out_loss_{sign}_after": log["heldout_loss_after"],
            }
    w = _not_zero(load_diff(target), target)
    kept = {k: w.meta[k] for k in ("pairs_empty", "pairs_identical") if k in w.meta}
    return w, record | kept | geometry(*task_vectors(*sides, lm.model))


def _not_zero(w: WeightDiff, source: Path | str) -> WeightDiff:
    """The same diff; ValueError where there is nothing to look at."""
    if w.total_norm() == 0:
        raise ValueError(f"{source}: the weight difference is 0 everywhere; the two sides are the same")
    return w


def training_text(training: dict) -> str:
    """How w came about, as a Markdown table: pairs written and dropped, losses of both signs, geometry of the pair."""
    rows = [f"| {key.replace('_', ' ')} | {_short(value)} |" for key, value in training.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
