"""From a behaviour to a weight difference: pairs, two adapters, `w = theta_pos - theta_neg`.

The front door of training. The rooms behind it are `pairs` (the base model writes both answers under the personas) and
`lora` (one adapter for one sign and seed). (docs/method.md sections 1 and 2)
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from ws.cache.keys import stage_key
from ws.cache.made import kept, made, state
from ws.cache.names import RunId, cache_folder
from ws.data import Behavior, load_behavior
from ws.diff import WeightDiff, from_adapters, geometry, load_diff, read_diff, save_diff, task_vectors
from ws.model.lm import LM
from ws.train.lora import SIGNS, TrainConfig, train_adapter
from ws.train.pairs import make_pairs


def train_diff(
    lm: LM,
    behavior: Behavior | str | Path,
    adapter: str = "lora",
    seed: int = 0,
    null: bool = False,
    config: TrainConfig | None = None,
    *,
    folder: Path | str | None = None,
    retrain: bool = False,
    progress: bool = True,
) -> WeightDiff:
    """Both adapters of one seed and their difference: `adapters/{pos,neg}` and `w.safetensors` under `folder`.

    behavior: a Behavior, a shipped name or a file. adapter: lora, rslora, pissa or dora. null: shuffle the labels pair
    by pair, which leaves training noise without the behaviour (both may also stand in `config`, default TrainConfig()).
    folder: default `out/<model>/<behavior>/<adapter>/seed_<k>/`, `null_diff/` below it for shuffled labels.
    What is done is not done again: adapters whose model, pairs or settings changed are trained anew, those where only
    the training code changed are kept (and said so) unless `retrain`. Every file appears whole or not at all.
    Raises ValueError for an unknown adapter, layers that the model lacks, or when no usable pair was written.
    (docs/method.md sections 1 and 2)

    Example:
        >>> import ws
        >>> few = ws.PairConfig(topics=2, personas=1, samples=1, max_new_tokens=8)
        >>> config = ws.TrainConfig(few, max_steps=1)
        >>> w = ws.train_diff(ws.load_lm("tiny"), "sycophancy", config=config, progress=False)
        >>> w.meta["adapter"], w.meta["seed"], w.layers()
        ('lora', 0, [2, 3, 4, 5])
    """
    behavior = behavior if isinstance(behavior, Behavior) else load_behavior(behavior)
    cfg = config or TrainConfig()
    kind, null = cfg.adapter if adapter == "lora" else adapter, null or cfg.shuffle_labels
    cfg = replace(cfg, adapter=kind, shuffle_labels=null)
    folder = Path(folder) if folder else RunId(lm.name, behavior.name, kind, seed).folder(null=null)
    pairs = make_pairs(lm, behavior, cfg.pairs, cache_folder(lm.name), progress)
    params = {"model": lm.fingerprint, "seed": seed, "train": asdict(cfg), "pairs": list(map(asdict, pairs.rows))}
    params["train"].pop("pairs")  # what was written counts, not how
    sides, found = [folder / "adapters" / sign for sign in SIGNS], set()
    keys = [stage_key({**params, "sign": sign}, code=["ws.train.lora.train_adapter"]) for sign in SIGNS]
    states = [state(side, key) for side, key in zip(sides, keys, strict=True)]
    for sign, side, key, known in zip(SIGNS, sides, keys, states, strict=True):

        def make(path: Path, sign: str = sign) -> None:
            train_adapter(lm, pairs.rows, sign, seed, cfg, path, progress)

        # a stale side is kept beside another stale one, never beside one that is of today's code
        remake = retrain or (known == "changed code" and len(set(states)) > 1)
        found.add(made(side, key, make, folder=True, keep_stale=True, remake=remake))
    if "stale" in found:
        tqdm.write(f"{folder / 'adapters'}: kept, although the training code changed since; --retrain trains them anew")
    counts = {"pairs": len(pairs.rows), "pairs_empty": pairs.empty, "pairs_identical": pairs.identical}
    return _join(lm, behavior, kind, seed, sides, folder, {"null": null, **counts})


def _join(
    lm: LM, behavior: Behavior, adapter: str, seed: int, sides: list[Path], folder: Path, more: dict | None = None
) -> WeightDiff:
    """`w.safetensors` in `folder`: the difference of two adapter folders."""
    meta = {"base_model": lm.name, "behavior": behavior.name, "adapter": adapter, "seed": seed, **(more or {})}
    code = ["ws.diff.build.from_adapters", "ws.diff.io.save_diff"]
    key = stage_key({**meta, "model": lm.fingerprint}, inputs=sides, code=code)

    def join(path: Path) -> None:
        save_diff(from_adapters(*sides, lm.model, meta), path)

    return kept(folder / "w.safetensors", key, join, read_diff)


def obtain_diff(
    lm: LM,
    behavior: Behavior,
    seed: int,
    config: TrainConfig,
    folder: Path,
    w_path: Path | str = "",
    adapters: tuple[Path | str, Path | str] = ("", ""),
    retrain: bool = False,
    finished: Path | None = None,
) -> tuple[WeightDiff, dict]:
    """The run's weight difference and how it came about: read from `w_path`, formed from two adapters, or trained.
    folder: where `w.safetensors` and `adapters/` go. The difference of own `adapters` (pos, neg) is saved there too, so
    that the sweep finds it. The record holds the source, norms and geometry of the pair and, where this project trained
    it, pairs and held-out losses. Raises ValueError when only one adapter is given, both a diff and adapters, or when w
    is 0."""
    own = [Path(side) for side in adapters if side]
    if len(own) == 1:
        raise ValueError(f"POS_ADAPTER and NEG_ADAPTER go together; only {own[0]} was given")
    if w_path and own:
        raise ValueError("give W_PATH, or POS_ADAPTER and NEG_ADAPTER, not both")
    sides = own or [folder / "adapters" / sign for sign in SIGNS]
    if w_path:
        w, record = load_diff(w_path), {"source": Path(w_path).name}
    elif own:
        w = _join(lm, behavior, config.adapter, seed, own, folder)
        record = {"source": f"{own[0].name} - {own[1].name}"}
    else:
        w = train_diff(lm, behavior, seed=seed, config=config, folder=folder, retrain=retrain)
        record = {"source": "trained, labels shuffled" if config.shuffle_labels else "trained"}
        for sign, side in zip(SIGNS, sides, strict=True):
            log = json.loads((side / "training.json").read_text(encoding="utf-8"))
            counts = {"pairs_trained": log["n_train"], "pairs_held_out": log["n_heldout"]}
            record |= {"layers": log["config"]["layers"]} | counts
            record |= {f"held_out_loss_{sign}_{when}": log[f"heldout_loss_{when}"] for when in ("before", "after")}
        record |= {k: w.meta[k] for k in ("pairs_empty", "pairs_identical")}
    norm = w.total_norm()
    if norm == 0:
        raise ValueError(
            f"{w_path or folder / 'w.safetensors'}: the weight difference is 0 everywhere; the two sides are the same"
        )
    return w, record | ({"norm_w": norm} if w_path else geometry(*task_vectors(*sides, lm.model)))


def training_text(training: dict) -> str:
    """How w came about, as a Markdown table: pairs written and dropped, losses of both signs, geometry of the pair."""
    short = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in training.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {key.replace('_', ' ')} | {said} |" for key, said in short.items())])
