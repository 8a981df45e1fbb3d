"""One PEFT adapter folder: its settings and tensors, checked as what a stranger wrote. (docs/method.md section 2)

Nothing in it is executed, pickles are not read, and patterns of its settings match in bounded time.
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import regex
import torch
from torch import Tensor

from ws.cache.given import finite, first_line, parsed, read_given, short
from ws.cache.made import verified
from ws.diff.io import FLOATS, INTEGERS, read_tensors

MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")  # initialisations that change the base weights
NOT_PLAIN = (
    "use_dora", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "alora_invocation_tokens",
    "target_parameters", "layer_replication", "trainable_token_indices",
)  # fmt: skip
"""Options of peft's LoRA with which the products of factors do not say all."""
PATTERNS = ("rank_pattern", "alpha_pattern")
SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out")
MOST_CONFIG, MOST_RANK = 8 << 20, 1 << 20  # bytes of the settings; a rank
MOST_SECONDS = 2.0  # of matching all patterns of one adapter


@dataclass(frozen=True)
class Adapter:
    """One PEFT folder as read from disk."""

    folder: Path
    config: dict
    tensors: dict[str, Tensor]

    @property
    def init(self) -> str:
        return str(self.config.get("init_lora_weights", True)).lower()

    @property
    def moves_base(self) -> bool:
        return self.init.startswith(MOVES_BASE)

    @property
    def kind(self) -> str:
        """`lora`, its variants joined by `+`, or the peft type."""
        c = self.config
        if c.get("peft_type") != "LORA":
            return str(c.get("peft_type")).lower()
        words = [] if self.init in ("true", "false") else [self.init]
        return "+".join(words + [word for word in ("rslora", "dora") if c.get(f"use_{word}")]) or "lora"

    def scaling(self, alpha: float | int, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def plain(self) -> bool:
        """Whether products of factors say all: LoRA without magnitudes, replicated layers or targeted parameters."""
        c = self.config
        return c.get("peft_type") == "LORA" and not any(c.get(key) for key in NOT_PLAIN)


def read_adapter(folder: Path | str) -> Adapter:
    """Config and tensors of a PEFT folder. FileNotFoundError / ValueError naming the file that is missing or broken, the
    setting or the tensor that cannot be: sizes, types, finiteness."""
    folder = verified(folder)
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder}: not a PEFT adapter folder, adapter_config.json is missing")
    config = _checked(parsed(read_given(config_file, MOST_CONFIG), config_file), config_file)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file() and (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{folder}: adapter_model.bin is a pickle, which is not read; convert it to safetensors: load the adapter"
            " with a peft that you trust and save it again with save_pretrained(..., safe_serialization=True)"
        )
    if not weights.is_file():
        raise FileNotFoundError(f"{folder}: adapter_model.safetensors is missing")
    tensors, _ = read_tensors(weights, FLOATS if config["peft_type"] == "LORA" else FLOATS + INTEGERS)
    if not tensors:
        raise ValueError(f"{weights}: no tensors")
    broken = next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if broken:
        raise ValueError(f"{folder}: {broken} contains NaN or inf")
    return Adapter(folder, config, tensors)


def _checked(config: object, file: Path) -> dict:
    """The settings, when each that is read here has a type and a value it can have."""
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected an object with an adapter's settings, found a {type(config).__name__}")

    def need(key: str, value: object, fine: bool, expected: str) -> None:
        if not fine:
            raise ValueError(f"{file}: {short(key)} must be {expected}, is {short(value)}; mend it to what was trained")

    for key in ("peft_type", "base_model_name_or_path", "revision"):
        value = config.get(key)
        need(key, value, isinstance(value, str) and bool(value) or value is None and key != "peft_type", "a text")
    if config["peft_type"] != "LORA":
        return config
    for key in SWITCHES:
        need(key, config.get(key), isinstance(config.get(key), bool | None), "true or false")
    for key in PATTERNS:
        need(key, config.get(key), isinstance(config.get(key), dict | None), "an object")
    init = config.get("init_lora_weights")
    need("init_lora_weights", init, isinstance(init, str | bool | None), "a text")
    rank_of, alpha_of = (config.get(key) or {} for key in PATTERNS)
    for key, value in [("r", config.get("r")), *rank_of.items()]:
        need(key, value, type(value) is int and 0 < value <= MOST_RANK, "a whole number above 0")
    for key, value in [("lora_alpha", config.get("lora_alpha")), *alpha_of.items()]:
        need(key, value, finite(value) and abs(value) < 1e9, "a finite number")
    return config


def matcher(patterns: dict | None, where: object) -> Callable[[str, object], object]:
    """`(module, default) -> value` by the rule of peft: the first pattern that matches the end of the module's name at a
    dot. A pattern comes from a file: all matching together may take MOST_SECONDS, then it is a ValueError."""
    plain: dict[str, tuple[int, object]] = {}
    others = []
    for i, (pattern, value) in enumerate((patterns or {}).items()):
        if re.fullmatch(r"[\w.-]+", pattern):
            plain[pattern] = (i, value)
        else:
            others.append((i, rf"(.*\.)?({pattern})$", value))
    search = bounded(where)

    def found(module: str, default: object) -> object:
        pieces = module.split(".")
        hits = [plain[end] for i in range(len(pieces)) if (end := ".".join(pieces[i:])) in plain]
        at, value = min(hits, key=lambda hit: hit[0], default=(len(plain) + len(others), default))
        return next((v for i, pattern, v in others if i < at and search(pattern, module)), value)

    return found


def bounded(where: object) -> Callable[[str, str], bool]:
    """`(pattern, text) -> does it match from the start`, for patterns of a file; ValueError naming `where` and the pattern
    for one that is no regular expression, or when all calls together took more than MOST_SECONDS."""
    left = MOST_SECONDS

    def match(pattern: str, text: str) -> bool:
        nonlocal left
        start = time.monotonic()
        try:
            hit = regex.match(pattern, text, timeout=max(left, 1e-3))
        except TimeoutError:
            raise ValueError(f"{where}: the pattern {short(pattern)} takes too long; write modules' names") from None
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(f"{where}: the pattern {short(pattern)} cannot be read: {first_line(error)}") from None
        left -= time.monotonic() - start
        return bool(hit)

    return match


def strip(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".base_layer", "")


def _scalings(adapter: Adapter) -> Callable[[str, int], float]:
    """`(module, rank) -> s`; ValueError where the settings say another rank."""
    config, file = adapter.config, adapter.folder / "adapter_config.json"
    rank_of, alpha_of = (matcher(config.get(name), f"{file}: {name}") for name in PATTERNS)

    def scaling(module: str, rank: int) -> float:
        r = rank_of(module, config.get("r"))
        if r != rank:
            raise ValueError(f"{adapter.folder}: {module} has rank {rank}, its adapter_config.json says {r}")
        return adapter.scaling(alpha_of(module, config.get("lora_alpha")), rank)

    return scaling


def read_factors(adapter: Adapter) -> tuple[dict[str, tuple[Tensor, Tensor, float]], dict[str, Tensor]]:
    """`(B, A, s)` per parameter, oriented as it is stored; and what is saved whole (biases, full modules)."""
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    scaling_of = _scalings(adapter)
    for key, tensor in adapter.tensors.items():
        found = re.fullmatch(r"(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.weight)?", strip(key))
        if found:
            parts.setdefault(found[1], {})[found[2]] = tensor.float()
        elif re.fullmatch(r".+\.lora_B\.bias", key):
            module = strip(key).removesuffix(".lora_B.bias")
            A = adapter.tensors.get(key.replace(".lora_B.bias", ".lora_A.weight"))
            if A is None:
                raise ValueError(f"{adapter.folder}: {key}: its lora_A.weight is missing")
            whole[f"{module}.bias"] = tensor.float() * scaling_of(module, A.shape[0] if A.ndim else 0)
        elif ".lora_" in key or ".token_adapter." in key:
            raise ValueError(f"{adapter.folder}: {key} is a kind of adapter tensor this project does not know")
        else:
            whole[strip(key)] = tensor.float()
    factors = {}
    for module, part in parts.items():
        embedding = "embedding_A" in part or "embedding_B" in part
        A, B = (part.get(f"embedding_{f}" if embedding else f) for f in "AB")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            shapes = {f: tuple(t.shape) for f, t in part.items()}
            raise ValueError(f"{adapter.folder}: {module}: factors do not fit: {shapes}")
        scaling = scaling_of(module, A.shape[0])
        if embedding or adapter.config.get("fan_in_fan_out"):
            A, B = B.T.contiguous(), A.T.contiguous()
        factors[f"{module}.weight"] = (B, A, scaling)
    return factors, whole
