"""One LoRA adapter for one sign and one seed, trained on the base model's own answers.

Minimises the mean cross-entropy of the response given the user turn **without** a system prompt, over response tokens
only, so the adapter learns the behaviour unconditionally. Both signs share base, seed (A's initialisation, data order,
held-out split) and everything else but the responses. With `shuffle_labels` the two responses of each pair are swapped
by a seeded coin: the null diff, which carries training noise but no behaviour. (docs/method.md sections 1 and 2)
"""

import random
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ws.cache.files import write_json
from ws.cache.keys import Key, stage_key
from ws.cache.made import mark_made, state
from ws.cache.records import tell
from ws.model.guard import check_unhooked
from ws.model.lm import LM
from ws.model.text import answer_frame
from ws.runs.folders import resamples
from ws.show.bars import tqdm
from ws.train.examples import collate, cut_share, draw_pairs, label_trainer, make_example, response_loss, shuffle_labels
from ws.train.pairs import Pair, PairConfig
from ws.train.stopping import held_out, stop_at

ADAPTERS = ("lora", "rslora", "pissa", "dora")
SIGNS = ("pos", "neg")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what an adapter becomes, but base, sign and seed. Defaults: docs/method.md section 2.
    layers: indices, or None for `[round(layer_start L), round(layer_stop L))`. max_steps: a limit on optimizer steps,
    -1 for whole epochs. heldout: share of the pairs kept out of training for the loss. checkpoint_steps: every how many
    steps a long run saves what it needs to go on after a kill; 0 for never. resample_pairs: whether each seed draws its
    training pairs anew (`draw_pairs`), None for with pairs of a file or 5 or more samples per pair: seeds that share their
    pairs show the optimiser's spread only. (docs/method.md section 7) target_loss: a sign stops once its held-out loss, looked
    at every `target_every` steps, is at most this; 0 for never. balance: w is the difference of the two signs scaled to one
    norm.

    Examples:
        >>> import ws
        >>> ws.TrainConfig(lr=2e-3, pairs=ws.PairConfig(samples=4)).r
        32
    """

    pairs: PairConfig = field(default_factory=PairConfig)
    adapter: str = "lora"
    r: int = 32
    alpha: float | int = 64
    dropout: float | int = 0.0
    roles: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    layers: tuple[int, ...] | None = None
    layer_start: float | int = 0.3
    layer_stop: float | int = 0.8
    lr: float | int = 2e-4
    weight_decay: float | int = 0.01
    warmup_steps: int = 5
    epochs: float | int = 1.0
    max_steps: int = -1
    batch: int = 4
    accumulation: int = 4
    heldout: float | int = 0.1
    max_length: int = 512
    shuffle_labels: bool = False
    checkpoint_steps: int = 0
    resample_pairs: bool | None = None
    target_loss: float | int = 0.0
    target_every: int = 5
    balance: bool = False

    def __post_init__(self):
        if self.adapter not in ADAPTERS:
            raise ValueError(f"adapter {self.adapter!r} is unknown; one of {', '.join(ADAPTERS)}")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout is {self.heldout}, expected a share in [0, 1)")
        if not self.target_loss >= 0 or self.target_every < 1:
            raise ValueError(f"TARGET_LOSS = {self.target_loss}: must not be under 0, looked at every step or more")
        if self.target_loss and not self.heldout:
            raise ValueError(f"TARGET_LOSS = {self.target_loss}: no pair is held out, so there is no loss to look at")
        if not self.lr >= 0:
            raise ValueError(f"LR = {self.lr}: must not be under 0")
        for name in ("r", "batch", "accumulation"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name.upper()} = {getattr(self, name)}: must be above 0")
        if self.max_steps == 0 or self.max_steps < 0 and not self.epochs > 0:
            raise ValueError(f"MAX_STEPS = {self.max_steps} and EPOCHS = {self.epochs}: no step would be trained")

    @property
    def resampled(self) -> bool:
        """What `resample_pairs` comes to."""
        own = resamples(self.pairs.samples, bool(self.pairs.file))
        return own if self.resample_pairs is None else self.resample_pairs


def adapter_layers(n_layers: int, cfg: TrainConfig) -> tuple[int, ...]:
    """The layers that get an adapter. ValueError when there are none or the model lacks one."""
    layers = cfg.layers
    if layers is None:
        layers = tuple(range(round(cfg.layer_start * n_layers), round(cfg.layer_stop * n_layers)))
    bad = [l for l in layers if not 0 <= l < n_layers]
    if bad or not layers:
        raise ValueError(f"adapter layers {list(layers)}: expected at least one of 0..{n_layers - 1}")
    return tuple(sorted(set(layers)))


def train_adapter(
    lm: LM, rows: tuple[Pair, ...], sign: str, seed: int, cfg: TrainConfig, folder: Path | str, progress: bool = True
) -> dict:
    """Train one adapter and fill `folder` with it: a normal PEFT folder plus `training.json`. Returns that record.
    sign: `pos` or `neg`. The base model is left as it was: modules, bits, `requires_grad`, mode. The same arguments on
    one machine with one thread count give the same bytes. Raises ValueError for an unknown sign, no pairs, or a loss
    that is not finite."""
    check_unhooked(lm.model)
    if sign not in SIGNS:
        raise ValueError(f"sign {sign!r} is unknown; one of {', '.join(SIGNS)}")
    if not rows:
        raise ValueError("no training pairs")
    folder = Path(folder)
    order = np.random.default_rng(zlib.crc32(f"split {seed}".encode())).permutation(len(rows))
    n_held, distinct = held_out(len(rows), cfg.heldout, cfg.target_loss), 1.0
    parts = sorted(order[:n_held].tolist()), sorted(order[n_held:].tolist())
    if cfg.resampled:
        rows, distinct = draw_pairs(rows, parts[1], seed)
    rows, frame = shuffle_labels(rows, seed) if cfg.shuffle_labels else rows, answer_frame(lm.tokenizer)
    examples = [make_example(lm, row, sign, frame, cfg.max_length) for row in rows]
    held, train = ([examples[i] for i in part] for part in parts)
    cut = cut_share([rows[i] for i in parts[1]], sign, train, cfg.max_length)
    made_of = {"model": lm.fingerprint, "sign": sign, "seed": seed, "config": asdict(cfg), "examples": train}
    key = stage_key(made_of, code=["ws.train.lora.train_adapter"])
    # outside the folder that is being filled, under a name that the next try finds again
    work = folder.parent / f"checkpoints_{sign}_{key.short}"
    with _borrowed(lm.model), _own_randomness(seed):
        adapted = _wrap(lm, cfg)
        try:
            before = response_loss(adapted, held, cfg.batch)
            stop = stop_at(held, cfg.target_loss, cfg.target_every, 16) if cfg.target_loss else None
            trace = _fit(adapted, train, f"{cfg.adapter} {sign} seed {seed}", seed, cfg, work, key, progress, stop)
            after = response_loss(adapted, held, cfg.batch)
            check_finite(f"{cfg.adapter} {sign} seed {seed}", after or 0.0, len(trace))
            folder.mkdir(parents=True, exist_ok=True)
            adapted.save_pretrained(str(folder), save_embedding_layers=False)
        finally:
            adapted.unload()
    record = {
        "sign": sign, "seed": seed, "model": lm.name,
        "config": {**asdict(cfg), "layers": adapter_layers(lm.decoder.n_layers, cfg)}, "n_train": len(train),
        "n_heldout": len(held), "cut": cut, "resampled": cfg.resampled, "distinct_pairs": distinct,
        "heldout_loss_before": before, "heldout_loss_after": after, "loss_trace": trace,
        "target_reached": bool(stop and (stop.reached or after <= cfg.target_loss)),
    }  # fmt: skip
    write_json(folder / "training.json", record)
    return record


def _targets(lm: LM, cfg: TrainConfig) -> str:
    """A regular expression of the targeted modules' full names. peft would write a set of names in random order."""
    layers, prefix = adapter_layers(lm.decoder.n_layers, cfg), re.escape(lm.decoder.prefix)
    names = [lm.decoder.param_name(l, role) for l in layers for role in cfg.roles]
    parts = [re.escape(re.fullmatch(rf"{prefix}\.\d+\.(.+)\.weight", name)[1]) for name in names]
    return rf"{prefix}\.({'|'.join(map(str, layers))})\.({'|'.join(dict.fromkeys(parts))})"


def _wrap(lm: LM, cfg: TrainConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=cfg.r, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=_targets(lm, cfg),
        use_rslora=cfg.adapter == "rslora", use_dora=cfg.adapter == "dora",
        init_lora_weights="pissa" if cfg.adapter == "pissa" else True, task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(lm.model, config)


def _fit(
    model: nn.Module,
    train: list[dict],
    label: str,
    seed: int,
    cfg: TrainConfig,
    work: Path,
    key: Key,
    progress: bool,
    stop: object = None,
) -> list[float]:
    """Run the Trainer; returns the logged training loss per step. The model holds the trained adapter afterwards. work:
    folder of checkpoints, marked with `key` when they are whole; the newest whole one is where training goes on. stop: a
    callback that may end the training."""
    from transformers import PrinterCallback, TrainingArguments

    # two checkpoints: the newest is marked only after it was saved and the oldest removed
    args = TrainingArguments(
        output_dir=str(work), per_device_train_batch_size=cfg.batch, gradient_accumulation_steps=cfg.accumulation,
        learning_rate=cfg.lr, weight_decay=cfg.weight_decay, warmup_steps=cfg.warmup_steps, num_train_epochs=cfg.epochs,
        max_steps=cfg.max_steps, lr_scheduler_type="linear", optim="adamw_torch", seed=seed, data_seed=seed,
        logging_steps=1, logging_nan_inf_filter=False, save_strategy="steps" if cfg.checkpoint_steps else "no",
        save_steps=cfg.checkpoint_steps or 500, save_total_limit=2, report_to="none", disable_tqdm=True,
        use_cpu=next(model.parameters()).device.type == "cpu", dataloader_pin_memory=False, remove_unused_columns=False,
        label_names=["labels"],
    )  # fmt: skip
    trainer = label_trainer()(model=model, args=args, train_dataset=train, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_watch(label, key, progress))
    if stop:
        trainer.add_callback(stop)
    trainer.train(resume_from_checkpoint=_whole_checkpoint(work, key))
    trace = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    weights = [p for p in model.parameters() if p.requires_grad]
    check_finite(label, float(sum(p.detach().float().sum().cpu() for p in weights)), len(trace))
    shutil.rmtree(work, ignore_errors=True)
    return trace


def check_finite(label: str, value: float, step: int) -> None:
    """ValueError where a loss, or a sum over the weights, is NaN or inf: the training diverged."""
    if not np.isfinite(value):
        raise ValueError(f"{label}: diverged, the loss is not finite at step {step}; try a lower LR")


def _whole_checkpoint(work: Path, key: Key) -> str | None:
    """The newest checkpoint that is as it was saved under `key`; others are removed."""
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [folder for folder in found if state(folder, key) == "done"]
    for folder in set(found) - set(whole):
        tell(f"{state(folder, key)}: {folder}; training does not go on from it")
        shutil.rmtree(folder)
    return str(whole[-1]) if whole else None


def _watch(label: str, key: Key, progress: bool):
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """A plain tqdm bar with the last loss; a mark in every checkpoint that is whole."""

        def on_save(self, args, state, control, **_):
            mark_made(Path(args.output_dir) / f"checkpoint-{state.global_step}", key, {})

        def on_train_begin(self, args, state, control, **_):
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=label, disable=not progress)

        def on_log(self, args, state, control, logs=None, **_):
            if logs and "loss" in logs:
                check_finite(label, float(logs["loss"]), state.global_step)
                self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)

        def on_train_end(self, args, state, control, **_):
            self.on_log(args, state, control)
            self.bar.close()

    return Watch()


@contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """Whatever happens to the model inside, its weights, `requires_grad` and modes are as before afterwards. The old
    weights are held, not copied: peft assigns new ones where it replaces them (PiSSA's residual in the base)."""
    parameters = [(p, p.data, p.requires_grad) for p in model.parameters()]
    modes, attributes = [(m, m.training) for m in model.modules()], set(vars(model))
    use_cache = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        for parameter, data, grad in parameters:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            parameter.requires_grad_(grad).grad = None
        for module, training in modes:
            module.training = training
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        if use_cache is not None:
            model.config.use_cache = use_cache


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seeded generators inside, the caller's states afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
