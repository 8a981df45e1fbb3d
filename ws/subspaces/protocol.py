"""The two protocols of capture, `nbs/params/v7.yaml` and `v7b.yaml`, as parameter sets. (docs/method.md section 7)"""

from dataclasses import dataclass, fields

import yaml

from ws.cache.places import notebooks_folder

V7 = ("v5", "external-v6-plan", "B-side")
CHOICES = {
    "eval_split": ("half", "held_out"),
    "persona_pairs": ("1", "all"),
    "templates": ("1", "all"),
    "positions": ("last", "all"),
}


@dataclass(frozen=True)
class Protocol:
    """How probes are split, rendered and read: the switches between v7 and v7b (docs/method.md section 7).

    eval_split: `half` (FIT = first half of the 32 probes, EVAL = second) or `held_out` (FIT = training topics, EVAL =
    held-out ones). chat_probes: every probe in the chat template, special tokens once. persona_pairs: `1` or `all`.
    raw_last: the last layer's token states before the final norm. fold_gain: fold the gain of a norm on a block's
    output into what that block writes. templates: `1`, or `all` wordings of the probe on EVAL. positions: what is read of
    an EVAL probe, its `last` token or `all` (the mean over the claim's tokens too). sources: which candidates take part.
    max_length: tokens of a text that are read; a longer one loses its question, and only v7 goes on without it.
    """

    name: str = "v7"
    eval_split: str = "half"
    chat_probes: bool = False
    persona_pairs: str = "1"
    raw_last: bool = False
    fold_gain: bool = False
    templates: str = "1"
    positions: str = "last"
    sources: tuple[str, ...] = V7
    max_length: int = 256

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name.upper()} {value!r} is unknown; {' or '.join(choices)}")
        if type(self.max_length) is not int or self.max_length < 1:
            raise ValueError(f"MAX_LENGTH {self.max_length!r}: must be a whole number, 1 or more")


def load_protocol(name: str, **overrides: str | bool | int | list[str]) -> Protocol:
    """The named protocol with explicit notebook parameters (upper-case names) laid over it; an empty string or list
    leaves the protocol's value. ValueError for an unknown protocol, parameter or value."""
    folder = notebooks_folder() / "params"
    known = sorted(p.stem for p in folder.glob("*.yaml") if "PROTOCOL:" in p.read_text(encoding="utf-8"))
    if name not in known:
        raise ValueError(f"PROTOCOL {name!r} is unknown; one of {', '.join(known)}")
    values = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    values |= {key: value for key, value in overrides.items() if value not in ("", [], ())}
    types = {f.name.upper(): f.type for f in fields(Protocol)}
    values = {key: value for key, value in values.items() if key not in ("PROTOCOL", "GRADIENTS")}  # the notebook's
    for key in values:
        if key not in types:
            raise ValueError(f"{name}: {key} is no protocol parameter; known are {', '.join(types)}")
    return Protocol(**{"name": name} | {key.lower(): _typed(key, value, types[key]) for key, value in values.items()})


def _typed(key: str, value: object, kind: object) -> object:
    if kind is bool:
        text = str(value).lower()
        if text not in ("true", "false"):
            raise ValueError(f"{key} is true or false, not {value!r}")
        return text == "true"
    if kind is int:
        return value
    return tuple(value) if isinstance(value, list) else str(value)
