"""From a behaviour to a weight difference: pairs, two adapters, `w = theta_pos - theta_neg`.

The front door of training. The rooms behind it are `pairs` (the base model writes both answers under the personas) and
`lora` (one adapter for one sign and seed). (docs/method.md sections 1 and 2)
"""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from ws.cache.files import lock, write_json
from ws.cache.keys import Key, stage_key
from ws.cache.made import intact, kept, made, read_sidecar, sidecar, state
from ws.cache.names import RunId, cache_folder, check_seed
from ws.data import Behavior, load_behavior
from ws.diff import WeightDiff, balanced_diff, from_adapters, geometry, load_diff, read_diff, save_diff, task_vectors
from ws.diff.io import read_meta
from ws.model.lm import LM
from ws.runs.folders import recipe
from ws.show.bars import tqdm
from ws.show.tables import literal
from ws.steer.answers import check_words
from ws.train.asked import trained_on
from ws.train.lora import SIGNS, TrainConfig, adapter_layers, train_adapter
from ws.train.pairs import make_pairs, most_pairs, trained_claims
from ws.train.record import base_content, pairs_meta
from ws.train.stopping import held_out
from ws.train.written import named_pairs

NEXT, READY, W_FILE = ".next", "ready.json", "w.safetensors"
FINISHED = ("done", "changed parameters", "changed inputs", "changed code")  # states of what is whole


def train_diff(
    lm: LM,
    behavior: Behavior | str | Path,
    adapter: str = "lora",
    seed: int = 0,
    null: bool = False,
    config: TrainConfig | None = None,
    *,
    folder: Path | str | None = None,
    finished: Path | str | None = None,
    retrain: bool = False,
    progress: bool = True,
) -> WeightDiff:
    """Both adapters of one seed and their difference: `adapters/{pos,neg}` and `w.safetensors` under `folder`.

    behavior: a Behavior, a shipped name or a file. adapter: lora, rslora, pissa or dora. null: shuffle the labels pair
    by pair, which leaves training noise without the behaviour (both may also stand in `config`, default TrainConfig()).
    folder: default `out/<model>/<behavior>/<adapter>/seed_<k>/`, `null_diff/` below it for shuffled labels; of settings
    that are not the model's own (nbs/params/models.yaml) the adapter's folder says which. finished: where to look first; what is
    finished there under these very settings is read, and nothing is written.
    What is done is not done again: adapters whose model, pairs or settings changed are trained anew, those where only
    the training code changed are kept (and said so) unless `retrain`. Every file appears whole or not at all, and what
    is finished is replaced, in `.next/` beside it until then, only when both adapters and w are finished.
    Raises ValueError for what `check_training` finds, a loss that diverges, or when no usable pair was written.
    (docs/method.md sections 1 and 2)

    Examples:
        >>> import ws
        >>> few = ws.PairConfig(topics=2, personas=1, samples=1, max_new_tokens=8)
        >>> config = ws.TrainConfig(few, max_steps=1)
        >>> w = ws.train_diff(ws.load_lm("tiny"), "sycophancy", config=config, progress=False)
        >>> w.meta["adapter"], w.meta["seed"], w.layers()
        ('lora', 0, [2, 3, 4, 5])
    """
    kind = adapter if adapter != "lora" or config is None else config.adapter
    cfg = replace(
        config or TrainConfig(), adapter=kind, shuffle_labels=null or (config or TrainConfig()).shuffle_labels
    )
    return _trained(lm, behavior, seed, cfg, folder, finished, retrain, progress)[0]


def _trained(
    lm: LM,
    behavior: Behavior | str | Path,
    seed: int,
    cfg: TrainConfig,
    folder: Path | str | None,
    finished: Path | str | None,
    retrain: bool,
    progress: bool = True,
) -> tuple[WeightDiff, Path]:
    """The difference, and the folder that holds it and its adapters."""
    behavior = behavior if isinstance(behavior, Behavior) else load_behavior(behavior)
    kind, null = cfg.adapter, cfg.shuffle_labels
    check_training(lm, behavior, seed, cfg)
    own = RunId(lm.name, behavior.name, kind + recipe(_typed(lm, behavior, cfg)), seed).folder(null=null)
    if folder in (None, own) and (known := read_meta(own / W_FILE).get("behavior", behavior.name)) != behavior.name:
        whose = f"belongs to behaviour {known!r}; rename {behavior.name!r}, whose folder it would be too"
        raise ValueError(f"{own}: {whose}")
    folder = Path(folder or own)
    if behavior.answers and cfg.resample_pairs is None:
        cfg = replace(cfg, resample_pairs=True)  # one answer per statement, many statements
    pairs = make_pairs(lm, behavior, cfg.pairs, cache_folder(lm.name), progress)
    params = {"model": lm.fingerprint, "seed": seed, "train": asdict(cfg), "pairs": list(map(asdict, pairs.rows))}
    params["train"].pop("pairs")  # what was written counts, not how
    params["train"].pop("resample_pairs")
    params["train"].pop("balance")  # of w, not of its adapters
    if not cfg.target_loss:
        del params["train"]["target_loss"], params["train"]["target_every"]
    if cfg.resampled:
        params["train"]["resampled"] = True
    keys = {s: stage_key({**params, "sign": s}, code=["ws.train.lora.train_adapter"]) for s in SIGNS}
    if finished and not retrain and _finished(Path(finished), keys):
        return load_diff(Path(finished) / W_FILE), Path(finished)
    counts = {"pairs": len(pairs.rows), "pairs_empty": pairs.empty, "pairs_identical": pairs.identical}
    with lock(folder, name=".lock.training"):
        _publish(folder)  # what a killed process left between the renames
        states = {sign: state(folder / "adapters" / sign, key) for sign, key in keys.items()}
        # a stale side is kept beside another stale one, never beside one that is of today's code
        mixed = len(set(states.values())) > 1
        keeps = ("done",) if mixed else ("done", "changed code")
        stay = {sign for sign, found in states.items() if found in keeps and not retrain}
        # what is finished stays until all that takes its place is
        aside = any(found in FINISHED for sign, found in states.items() if sign not in stay)
        place, sides = folder / NEXT if aside else folder, []
        for sign, key in keys.items():
            sides.append((folder if sign in stay else place) / "adapters" / sign)

            def make(path: Path, sign: str = sign) -> None:
                train_adapter(lm, pairs.rows, sign, seed, cfg, path, progress)

            made(sides[-1], key, make, folder=True, keep_stale=sign in stay)
        if "changed code" in {states[sign] for sign in stay}:
            told = "kept, although the training code changed since; --retrain trains them anew"
            tqdm.write(f"{folder / 'adapters'}: {told}")
        more = trained_on(behavior, trained_claims(behavior, cfg.pairs), bool(cfg.pairs.file)) | pairs_meta(
            cfg.pairs, pairs.rows
        )
        more |= {"null": null, "resampled": cfg.resampled, **counts} | ({"balanced": True} if cfg.balance else {})
        w = _join(lm, behavior, kind, seed, sides, place, more)
        if aside:
            write_json(place / READY, sorted(set(SIGNS) - stay))
            _publish(folder)
        shutil.rmtree(folder / NEXT, ignore_errors=True)  # of other settings, begun and given up
    return w, folder


def _finished(folder: Path, keys: dict[str, Key]) -> bool:
    """Whether both adapters of these keys, and w of these adapters, are finished in a folder."""
    w, record = folder / W_FILE, read_sidecar(folder / W_FILE)
    sides = [folder / "adapters" / sign for sign in SIGNS]
    whole = all(state(side, keys[sign]) in ("done", "changed code") for sign, side in zip(SIGNS, sides, strict=True))
    made_of = record.get("key", {}).get("inputs")
    return whole and intact(w, record) and made_of == stage_key({}, inputs=sides, sources="-").inputs


def _typed(lm: LM, behavior: Behavior, cfg: TrainConfig) -> dict[str, object]:
    """A training's settings as the notebook's parameters of the same meaning: they name its folder."""
    pairs = {"TOPICS": cfg.pairs.topics, "PERSONAS": cfg.pairs.personas, "SAMPLES": cfg.pairs.samples}
    pairs |= {"MAX_NEW_TOKENS": cfg.pairs.max_new_tokens, "LORA_LAYERS": list(cfg.layers or ()), "R": cfg.r}
    steps = {"LR": cfg.lr, "EPOCHS": cfg.epochs, "MAX_STEPS": cfg.max_steps, "BATCH": cfg.batch}
    steps |= {"LORA_ALPHA": cfg.alpha, "ACCUMULATION": cfg.accumulation, "RESAMPLE_PAIRS": cfg.resample_pairs}
    signs = {"TARGET_LOSS": cfg.target_loss, "BALANCE": cfg.balance, "PAIRS": named_pairs(cfg.pairs.file)}
    signs |= {"WORDINGS": list(cfg.pairs.wordings)}
    return {"MODEL_ID": lm.slug or lm.name, "BEHAVIOR": behavior.name, **pairs, **steps, **signs}


def check_training(lm: LM, behavior: Behavior, seed: int, cfg: TrainConfig) -> None:
    """ValueError for what would end a training, or the sweep after it, before the first pair is written: a seed, layers
    that the model lacks, more topics or personas than there are, no pair to hold out for TARGET_LOSS, answer words that are
    no tokens, no chat template."""
    check_seed(seed)
    adapter_layers(lm.decoder.n_layers, cfg)
    held_out(most_pairs(behavior, cfg.pairs), cfg.heldout, cfg.target_loss)
    check_words(lm, behavior)


def _publish(folder: Path) -> None:
    """Put the finished adapters and w in `folder/.next` where they belong, by renames; nothing where not all is finished.
    A process that is killed between two of them leaves the rest to the next call."""
    new = folder / NEXT
    if not (new / READY).is_file():
        return
    for sign in SIGNS:
        side, target, old = new / "adapters" / sign, folder / "adapters" / sign, new / f"old_{sign}"
        if side.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(target, old)
            os.rename(side, target)
    for file in (sidecar(new / W_FILE), new / W_FILE):  # until the second rename the record fits nothing
        if file.is_file():
            os.replace(file, folder / file.name)
    shutil.rmtree(new)


def _join(
    lm: LM, behavior: Behavior, adapter: str, seed: int, sides: list[Path], folder: Path, more: dict | None = None
) -> WeightDiff:
    """`w.safetensors` in `folder`: the difference of two adapter folders; where `more` says that it is balanced, with both
    sides scaled to the geometric mean of their norms."""
    meta = {
        "base_model": lm.slug or lm.name,
        "behavior": behavior.name,
        "adapter": adapter,
        "seed": seed,
        **({"base_content": content} if (content := base_content(lm)) else {}),
        **(more or {}),
    }
    code = ["ws.diff.build.from_adapters", "ws.diff.io.save_diff"]
    code += ["ws.diff.build.balanced_diff"] if meta.get("balanced") else []
    key = stage_key({**meta, "model": lm.fingerprint}, inputs=sides, code=code)

    def join(path: Path) -> None:
        made = balanced_diff(*sides, lm.model, meta) if meta.get("balanced") else from_adapters(*sides, lm.model, meta)
        save_diff(made, path)

    return kept(folder / W_FILE, key, join, read_diff)


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
    folder: where `w.safetensors` and `adapters/` go; finished: where they are read, if they are finished there. The
    difference of own `adapters` (pos, neg) is saved in `folder` too, so that the sweep finds it. The record holds the
    source, norms and geometry of the pair and, where this project trained it, pairs and held-out losses. Raises
    ValueError when only one adapter is given, both a diff and adapters, or when w is 0."""
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
        w, where = _trained(lm, behavior, seed, config, folder, finished, retrain)
        sides = [where / "adapters" / sign for sign in SIGNS]
        record = {"source": "trained, labels shuffled" if config.shuffle_labels else "trained"}
        for sign, side in zip(SIGNS, sides, strict=True):
            log = json.loads((side / "training.json").read_text(encoding="utf-8"))
            counts = {"pairs_trained": log["n_train"], "pairs_held_out": log["n_heldout"]}
            drawn = {"pairs_resampled": log.get("resampled", False), "distinct_pairs": log.get("distinct_pairs", 1.0)}
            record |= {"layers": log["config"]["layers"]} | counts | drawn
            record |= {f"answers_cut_{sign}": log.get("cut", 0.0)}
            record |= {f"held_out_loss_{sign}_{when}": log[f"heldout_loss_{when}"] for when in ("before", "after")}
            steps, after = len(log["loss_trace"]), log["heldout_loss_after"]
            record |= {f"steps_{sign}": steps}
            if target := config.target_loss:
                missed = f"did not reach {target:g}: {after:.4g} after {steps} steps"
                reached = log.get("target_reached", after <= target)
                record |= {f"target_loss_{sign}": f"reached {target:g}" if reached else missed}
        record |= {k: w.meta[k] for k in ("pairs_empty", "pairs_identical")}
        record |= {
            "pairs_from": Path(config.pairs.file).name or ("its statements" if behavior.answers else "the base model")
        }
    norm = w.total_norm()
    if norm == 0:
        raise ValueError(
            f"{w_path or folder / 'w.safetensors'}: the weight difference is 0 everywhere; the two sides are the same"
        )
    found = {} if w_path else geometry(*task_vectors(*sides, lm.model))
    return w, record | found | {"norm_w": norm} | ({"balanced": True} if w.meta.get("balanced") else {})


MEANT = {
    "distinct_pairs": "share of the pairs that were drawn at least once",
    "asymmetry": "norm of t+ over that of t-, 1: both adapters moved as far",
    "cos_opposition": "`cos(t+, -t-)`, 1: the adapters are mirror images",
    "drift_ratio": "what both learnt over what sets them apart, 0: nothing in common",
    "cos_w_drift": "cosine of that difference and that common part",
}  # of the pairs and of the geometry of both adapters, for their reader


def training_text(training: dict) -> str:
    """How w came about, as a Markdown table: pairs written, dropped and drawn, losses of both signs, geometry of the
    pair."""
    said = {True: "yes", False: "no"}
    short = {
        key: said[value] if isinstance(value, bool) else f"{value:.4g}" if isinstance(value, float) else str(value)
        for key, value in training.items()
    }
    meant = {key: f" ({what})" for key, what in MEANT.items()}
    rows = (
        f"| {literal(key.replace('_', ' '))}{meant.get(key, '')} | {literal(said)} |" for key, said in short.items()
    )
    return "\n".join(["| quantity | value |", "|---|---|", *rows])
