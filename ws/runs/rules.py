"""What the parameters of each notebook may be: one schema per notebook, and what they may not be together.

Nothing is read or loaded here, so a mistake costs no time: `check` serves a command, a dry run and a notebook's first cell.
`read` turns what was given (a text that was typed, a value of a file, a literal in a cell) into the value that is used.
"""

import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

TOP_SEED = 2**32 - 1  # the largest that numpy takes
MOST = 10_000  # numbers that a range such as 0-9 may stand for
ADAPTERS = ("lora", "rslora", "pissa", "dora")
WORDS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
MODELS_OWN = "the model's own"
GRADIENTS = ("own", "none")  # of GRADIENTS: the pairs that w was trained on; no gradients
Params = Mapping[str, object]


@dataclass(frozen=True)
class Rule:
    """What one parameter may be, and `expects`, the same in words. kind: text, flag, whole, number, list, scalar, mapping or
    json. low, high: bounds, themselves allowed unless `inside`. choices, like: the texts there are, or a pattern of them.
    item: the rule of a list's elements, of which there are at least `least` different ones, none of them twice if `once`.
    none: what None says, "" where it may not be given. bounded: whether NaN and infinity are refused."""

    kind: str
    expects: str
    low: float | int = -math.inf
    high: float | int = math.inf
    inside: bool = False
    choices: tuple[str, ...] = ()
    like: str = ""
    item: "Rule | None" = None
    least: int = 0
    once: bool = False
    none: str = ""
    bounded: bool = True


def read(rule: Rule, given: object, typed: bool = True) -> object:
    """The value that `given` stands for. typed: a text may stand for what is no text: "3", "[1, 2]", "2-5", "none".
    ValueError: what is expected."""
    text = typed and isinstance(given, str)
    if rule.none and (given is None or (text and given.strip().lower() == "none")):
        return None
    if rule.item:
        return _read_list(rule, given, typed)
    try:
        return _read_one(rule, given, text)
    except (ValueError, OverflowError, RecursionError):
        raise ValueError(f"expects {rule.expects}") from None


def _read_one(rule: Rule, given: object, typed: bool) -> object:
    """One value; ValueError (whatever it says) where the rule is broken. typed: it is a text that stands for a value."""
    if rule.kind == "text":
        # a switch may be written as what it says: true for "true", 1 for "1"
        value = str(given).lower() if rule.choices and type(given) in (bool, int) else given
        value = value.lower() if typed and rule.choices and value not in rule.choices else value
        fits = isinstance(value, str) and re.fullmatch(rule.like or "[^\0]*", value, re.DOTALL)
        fits = fits and (not rule.choices or value in rule.choices)
    elif rule.kind == "flag":
        value = WORDS.get(given.strip().lower()) if typed else given
        fits = isinstance(value, bool)
    elif rule.kind in ("whole", "number"):
        kinds = (int,) if rule.kind == "whole" else (int, float)
        value = kinds[-1](given) if typed or type(given) in kinds else None
        within = value is not None and (rule.low < value < rule.high if rule.inside else rule.low <= value <= rule.high)
        fits = within and (math.isfinite(value) or not rule.bounded)
        fits = fits or (not rule.bounded and value != value)
    elif rule.kind == "scalar":
        fits = isinstance(given, str | int | float)  # with choices: one of them, else a number
        value = float(given) if fits and rule.choices and given not in rule.choices else given
        fits = fits and (not rule.choices or value in rule.choices or rule.low < value < rule.high)
    else:
        value = _json(given) if typed else given
        fits = rule.kind == "json" or isinstance(value, dict)
    if not fits:
        raise ValueError
    return value


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_list(rule: Rule, given: object, typed: bool) -> list:
    items = _split(rule.item, given) if typed and isinstance(given, str) else given
    if not isinstance(items, list | tuple):
        raise ValueError(f"expects {rule.expects}")
    try:
        values = [read(rule.item, item, typed) for item in items]
    except ValueError:
        raise ValueError(f"expects {rule.expects}") from None
    different = list(dict.fromkeys(map(repr, values)))
    if rule.once and len(different) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise ValueError(f"{twice} stands there twice; expects {rule.expects}")
    if len(different) < rule.least:
        raise ValueError(f"expects {rule.expects}")
    # a set has no order: seeds 2, 1, 0 are seeds 0, 1, 2
    return sorted(values) if rule.once and rule.item.kind == "whole" else values


def _split(item: Rule, text: str) -> list:
    """The elements of a list that was typed: JSON, or separated by commas; of whole numbers also ranges, `0-9`."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list):
        return found
    parts = [part.strip() for part in text.strip().strip("[]()").split(",") if part.strip()]
    return [number for part in parts for number in in_range(part)] if item.kind == "whole" else parts


def in_range(word: str) -> list:
    """What a word for whole numbers stands for: `7`, or the range `2-5`. ValueError for an empty or an endless range."""
    if not (ends := re.fullmatch(r"([0-9]{1,18})-([0-9]{1,18})", word)):
        return [word]
    first, last = map(int, ends.groups())
    if not 0 <= last - first < MOST:
        raise ValueError(f"{word} is no range from a lower to a higher number, of at most {MOST} numbers")
    return list(range(first, last + 1))


# ---- the words ---------------------------------------------------------------------------------------------------
def whole(low: float | int = -math.inf, high: float | int = math.inf, words: str = "", none: str = "") -> Rule:
    span = f" from {low} to {high}" if math.isfinite(high) else f", {low} or more" if math.isfinite(low) else ""
    return Rule("whole", words or f"a whole number{span}", low, high, none=none)


def number(low: float | int = -math.inf, high: float | int = math.inf, inside: bool = True, none: str = "") -> Rule:
    within = f" between {low} and {high}" if math.isfinite(high) else f" above {low}"
    span = within if inside else f", {low} or more"
    return Rule("number", f"a number{span if math.isfinite(low) else ''}", low, high, inside, none=none)


def one_of(*choices: str) -> Rule:
    named = ", ".join(filter(None, choices))
    return Rule("text", f"one of {named}{' (empty: not given)' if '' in choices else ''}", choices=choices)


def text(words: str = "a text", like: str = "") -> Rule:
    return Rule("text", words, like=like)


def listed(item: Rule, words: str, least: int = 0, once: bool = False) -> Rule:
    return Rule("list", words, item=item, least=least, once=once)


def rule_of(default: object) -> Rule:
    """The rule that a default alone gives, in a notebook without rules: its type. None: anything, JSON where it is JSON; an
    empty text says "not given" and stands for any single value."""
    if isinstance(default, list | tuple):
        return listed(rule_of(default[0] if default else None), f"a list such as {json.dumps(default, default=str)}")
    kinds = {
        bool: ("flag", "true or false"), int: ("whole", "int"), float: ("number", "float"), str: ("text", "a text"),
    }  # fmt: skip
    kind, words = kinds.get(type(default), ("json", "anything") if default is None else ("mapping", "JSON (dict)"))
    return Rule("scalar" if default == "" else kind, words, none="not given", bounded=False)


# ---- the notebooks -----------------------------------------------------------------------------------------------

FLAG = Rule("flag", "true or false")
BY_PAIRS = "true with PAIRS or 5 or more samples"
BY_SAMPLES = Rule("flag", f"true, false, or none: {BY_PAIRS}", none=BY_PAIRS)
SWITCH = one_of("true", "false", "")
SEED = whole(0, TOP_SEED)
PATH, PATHS = text("a file or folder"), listed(text("a file", r"[^\0]+"), 'files such as ["mine.py"]')
LAYERS = listed(whole(0), "whole numbers such as [2, 3, 4, 5]")
# no part of a path: what lies in the folder decides, not where a name leads
FOLDER = text("a folder's name below out/<model>/<behavior>/, such as lora", r"(?!.*\.\.)\w[\w.+=,@-]{0,99}")
MODEL = {
    "MODEL_ID": text("a hub id, a local folder, a .gguf file, tiny, smollm2 or gemma3-270m", r"[^\0\s][^\0]*"),
    "REVISION": text(),
    "OUT_DIR": PATH,
    "DEVICE": text("auto, cpu, cuda, cuda:1, ...", r"auto|cpu|(cuda|mps|xpu)(:\d+)?"),
    "DTYPE": one_of("auto", "float32", "bfloat16", "float16"),
}
BEHAVIOR = {"BEHAVIOR": text("a shipped behaviour, a JSON file, or a JSONL file of statements", r"[^\0\s][^\0]*")}
CHAT = {"CHAT_TEMPLATE": text("plain, a file, or nothing: the tokenizer's own")}
SEEDS = listed(SEED, f"one or more different whole numbers from 0 to {TOP_SEED}", 1, once=True)
KINDS = one_of("v7", "v7b")
PARTS = ("where", "read", "ranks", "dose", "matched", "controls")
HEADS = ("cvh", "unconditional", "svd_cvh", "svd_unconditional", "lm_head_random")
FOLDERS = listed(text("a folder", r"[^\0]+"), 'folders such as ["out/tiny/delta_svd"]')
MANY = listed(number(0, inside=False), "one or more numbers, each 0 or more", 1)
STRENGTHS = listed(number(), "two or more different numbers such as [-1.0, 0.0, 1.0]", 2)

RULES: dict[str, dict[str, Rule]] = {
    "weight_diff": MODEL | CHAT | BEHAVIOR | {
        "ADAPTER": one_of(*ADAPTERS), "SEED": SEED, "NULL_DIFF": FLAG, "RETRAIN": FLAG, "W_PATH": PATH, "POS_ADAPTER": PATH,
        "NEG_ADAPTER": PATH, "TOPICS": whole(1, none="all"), "PERSONAS": whole(1, none="all"),
        "SAMPLES": whole(1, none=MODELS_OWN), "MAX_NEW_TOKENS": whole(1),
        "PAIRS": Rule("text", "a JSONL file of pairs, or the name of shipped ones", none=MODELS_OWN),
        "WORDINGS": listed(text("a wording"), "wordings of the file of PAIRS", once=True), "LORA_LAYERS": LAYERS, "R": whole(1),
        "LORA_ALPHA": whole(1), "LR": number(0, none=MODELS_OWN), "EPOCHS": number(0, inside=False, none=MODELS_OWN),
        "BATCH": whole(1), "MAX_STEPS": whole(-1, words="a whole number above 0, or -1 for no limit"), "ACCUMULATION": whole(1),
        "CHECKPOINT_STEPS": whole(0), "RESAMPLE_PAIRS": BY_SAMPLES, "TARGET_LOSS": number(0, inside=False), "BALANCE": FLAG,
        "N_HELDOUT": whole(4, none="all"), "ALPHAS": STRENGTHS,
    },
    "v7_sweep": MODEL | CHAT | BEHAVIOR | {
        "ADAPTER": FOLDER, "SEED": SEED, "W_PATH": PATH, "NULL_W_PATH": PATHS, "CANDIDATES": PATHS, "PROTOCOL": KINDS,
        "EVAL_SPLIT": one_of("half", "held_out", ""), "CHAT_PROBES": SWITCH, "PERSONA_PAIRS": one_of("1", "all", ""),
        "RAW_LAST": SWITCH, "FOLD_GAIN": SWITCH, "TEMPLATES": one_of("1", "all", ""), "POSITIONS": one_of("last", "all", ""),
        "MAX_LENGTH": whole(1),
        "GRADIENTS": text("own (the pairs that w was trained on), none, a JSONL file of pairs, or the name of shipped ones"),
        "OTHERS": listed(text("a shipped behaviour or a file", r"[^\0]+"), "behaviours other than BEHAVIOR", once=True),
        "SOURCES": listed(one_of("v5", "external-v6-plan", "B-side", "v7b"), "some of v5, external-v6-plan, B-side, v7b"),
        "LORA_LAYERS": LAYERS, "PCS": whole(1), "K_BROAD": whole(1), "N_NULL": whole(0),
    },
    "causal_check": MODEL | CHAT | BEHAVIOR | {
        "ADAPTER": FOLDER, "SEED": SEED, "W_PATH": PATH, "NULL_W_PATH": PATHS, "PROTOCOL": KINDS,
        "OTHER_SEED": whole(0, TOP_SEED, none="the lowest other one that is trained"),
        "SUBSPACES": listed(text("a candidate", r"[^\0]+"), "names of the sweep's candidates", once=True), "ALPHA": number(0),
        "N_WORDINGS": whole(1, none="all"), "DRAWS": whole(1), "CHECKED": whole(0), "FORWARD": whole(1, none="all"),
        "DROPS": whole(0, none="all"), "RANKS": listed(whole(1), "ranks such as [1, 8, 32]", 1), "CLOUD": whole(0),
        "SECTIONS": listed(one_of(*PARTS), f"some of {', '.join(PARTS)}", once=True),
        "BOOT": whole(1), "STAT_SEED": SEED, "KL_TARGET": number(0),
    },
    "benchmark": MODEL | CHAT | BEHAVIOR | {
        "ADAPTER": FOLDER, "SEED": SEED, "PROTOCOL": KINDS, "SUBSPACE": text("a candidate of the sweep"), "STAT_SEED": SEED,
        "KL_TARGET": listed(Rule("scalar", "nats above 0, or persona", 0, choices=("persona",)), "nats above 0, or persona", 1),
        "ALONG": one_of("texts", "continuation"), "STATEMENTS": PATHS, "TRUTH": PATHS, "SIZE": one_of("full", "quick"),
    },
    "v7b_stability": MODEL | CHAT | BEHAVIOR | {
        "ADAPTER": FOLDER, "SEEDS": SEEDS, "PROTOCOL": KINDS, "RUNS_DIR": PATH, "BOOT": whole(1), "N_NULL": whole(1),
        "STAT_SEED": SEED, "CANDIDATES": PATHS, "CORRECTIONS": FLAG,
    },
    "cross_behaviours": MODEL | CHAT | {
        "BEHAVIORS": listed(text("a file", r"[^\0]+"), "two or more files of statements with answers", once=True),
        "ADAPTER": FOLDER, "SEEDS": SEEDS, "PROTOCOL": KINDS, "N_HELDOUT": whole(4, none="all"), "ALPHAS": STRENGTHS,
        "ATLAS_ADAPTERS": listed(FOLDER, 'folders of other adapters such as ["dora"]', once=True),
    },
    "tutorial": MODEL | {"SEED": SEED, "DRAWS": whole(1)},
    "delta_svd": MODEL | {
        "CALIBRATION": PATH, "MODE": one_of("stream", "documents"), "FINAL_NORM": FLAG, "MAX_LENGTH": whole(3),
        "TOP_K": whole(1), "BOOT": whole(0), "SEED": SEED, "BATCH_SIZE": whole(1), "COMPARE": FOLDERS,
    },
    "theta_fit": MODEL | CHAT | {
        "USERS": PATH, "THETA_DIM": whole(1), "ALPHA": number(0), "GAMMA": number(0), "BETA": number(0, inside=False),
        "LAM": number(0, inside=False), "LR": number(0), "STEPS": whole(1), "GRAD_CLIP": number(0), "THETA_CLIP": number(0),
        "SEED": SEED, "HELDOUT": number(0, 1), "MASK_PROMPT": FLAG, "MAX_LENGTH": whole(2), "MATCHED_KL": number(0),
        "PERMUTATIONS": whole(1), "SAMPLE_TOKENS": whole(1), "GAMMAS": MANY, "BETAS": MANY, "BATCH_SIZE": whole(1),
        "CONTROL_HEADS": listed(one_of(*HEADS), f"some of {', '.join(HEADS)}", once=True),
    },
}  # fmt: skip


def _together(notebook: str, values: Params) -> Iterator[str]:
    """What is wrong with values that are right by themselves."""
    if notebook == "causal_check" and values.get("OTHER_SEED") == values.get("SEED", -1) and not values.get("W_PATH"):
        yield f"OTHER_SEED: {values['OTHER_SEED']} is SEED itself; name another one, or none"
    if notebook != "weight_diff":
        return
    sides = [name for name in ("POS_ADAPTER", "NEG_ADAPTER") if values.get(name)]
    if values.get("W_PATH") and sides:
        yield f"W_PATH: goes without {' and '.join(sides)}: give a weight difference or the two adapters, not both"
    elif len(sides) == 1:
        other = "NEG_ADAPTER" if sides == ["POS_ADAPTER"] else "POS_ADAPTER"
        yield f"{sides[0]}: goes together with {other}, which is not given"
    if values.get("MAX_STEPS") == 0 or (values.get("MAX_STEPS") == -1 and values.get("EPOCHS") == 0):
        yield "MAX_STEPS: no step would be trained: give MAX_STEPS or EPOCHS above 0"


def shown(value: object, width: int = 60) -> str:
    """A value in an error message: on one line, not too long, however large or deep it is."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = width
    brief.maxlist, brief.maxdict, brief.maxlevel = 12, 4, 3
    said = brief.repr(value)
    return said if len(said) <= width else f"{said[: width - 15]}...{said[-12:]}"


def faults(notebook: str, values: Params, typed: bool = False) -> list[str]:
    """What is wrong with a notebook's values, one line each; names without a rule are not looked at. typed: texts may
    stand for values."""
    found = []
    for name, rule in RULES.get(notebook, {}).items():
        if name in values:
            try:
                read(rule, values[name], typed)
            except ValueError as error:
                found.append(f"{notebook}: {name}: {error}, got {shown(values[name])}")
    return found or [f"{notebook}: {fault}" for fault in _together(notebook, values)]


def check(notebook: str, values: Params) -> None:
    """ValueError with all that is wrong, one line each. What has no rule passes: `values` may be the globals of a notebook."""
    if found := faults(notebook, values):
        raise ValueError("\n".join(found))
