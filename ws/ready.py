"""What a run is about to read, checked before a kernel starts or a training begins: the model, the behaviour, w, files.

Configs, tokenizers, headers and factors are read, weights are not. Each fault is a ValueError or FileNotFoundError of one
line that names the thing and the next step; the checks themselves live with what they check, so that the Python names
(`ws.load_lm`, `ws.train_diff`, `ws.explain`) raise the same.
"""

from collections.abc import Mapping
from pathlib import Path

from ws.cache.names import check_part, check_seed
from ws.cache.places import out_folder
from ws.cache.records import read_record
from ws.data import Behavior, load_behavior
from ws.delta.calibration import load_calibration
from ws.delta.report import read_folder
from ws.diff.check import check_source
from ws.diff.io import read_meta
from ws.explanation.explain import check_sizes
from ws.explanation.result import RECORD
from ws.model.lm import LM, check_model
from ws.runs.folders import null_diffs, own_w
from ws.runs.parameters import suggest
from ws.runs.rules import GRADIENTS
from ws.steer.answers import check_words
from ws.steer.evaluate import check_alphas
from ws.subspaces.captures import check_texts, probes
from ws.subspaces.protocol import Protocol, load_protocol
from ws.theta.live import check_plain_logits
from ws.theta.states import load_users, split_texts
from ws.train.asked import other_training
from ws.train.examples import make_example
from ws.train.lora import TrainConfig, adapter_layers
from ws.train.pairs import PairConfig, from_file, most_pairs
from ws.train.stopping import held_out
from ws.train.written import pairs_file, read_written
from ws.use.items import QUICK, groups

SWITCHES = "EVAL_SPLIT CHAT_PROBES PERSONA_PAIRS RAW_LAST FOLD_GAIN TEMPLATES POSITIONS SOURCES MAX_LENGTH".split()
Values = Mapping[str, object]


def check_inputs(notebook: str, values: Values, out: Path | None = None, own: bool = True) -> None:
    """Whether what a notebook's parameters name can be used together. values: all of them, paths resolved; those that a
    notebook has decide what is checked. out: folder of results. own: whether the run's own w must be there already,
    which in a batch that trains it first it need not. Raises ValueError / FileNotFoundError; warns of single answer
    words that no vocabulary entry holds."""
    check_numbers(values)
    check_files(values)
    behavior = load_behavior(str(values["BEHAVIOR"])) if values.get("BEHAVIOR") else None
    if behavior and behavior.name in [load_behavior(str(other)).name for other in values.get("OTHERS") or []]:
        raise ValueError(f"OTHERS: {behavior.name} is the behaviour itself; name others")
    several = [load_behavior(file) for file in values.get("BEHAVIORS") or []]
    if "BEHAVIORS" in values and len(several) < 2:
        raise ValueError(f"BEHAVIORS: expects two or more files of statements with answers, has {len(several)}")
    for one in several:
        if not one.answers:
            raise ValueError(f"BEHAVIORS: {one.name}: is no file of statements with answers")
    if behavior and "PROTOCOL" in values:
        probes(behavior, protocol_of(values))
    if not values.get("MODEL_ID"):
        return
    if (
        own
        and notebook in ("v7_sweep", "causal_check")
        and not values.get("W_PATH")
        and not own_w(dict(values), out or out_folder()).is_file()
    ):
        raise FileNotFoundError(
            f"{own_w(dict(values), out or out_folder())}: no weight difference yet; train it first: {_train(values)}"
        )
    dtype, device = (str(values.get(key) or "auto") for key in ("DTYPE", "DEVICE"))
    revision, template = (str(values.get(key) or "") for key in ("REVISION", "CHAT_TEMPLATE"))
    lm = check_model(str(values["MODEL_ID"]), dtype, device, revision or None, template)
    check_sizes_of(values, lm)
    for file, one in zip(values.get("BEHAVIORS") or [], several, strict=True):
        check_words(lm, one)
        check_trained({**values, "BEHAVIOR": file}, one, out or out_folder())
    if behavior:
        check_behavior(values, lm, behavior)
        if "TRUTH" in values:
            groups(
                behavior, QUICK, *([Path(file) for file in values.get(key) or []] for key in ("STATEMENTS", "TRUTH"))
            )
        check_diffs(notebook, values, lm, behavior, out, own)
        if own and "PROTOCOL" in values and not values.get("W_PATH") and not values.get("RUNS_DIR"):
            check_trained(values, behavior, out or out_folder())
    if "USERS" in values:
        check_plain_logits(lm.model)


def protocol_of(values: Values) -> Protocol:
    """The protocol with the switches that are given."""
    switches = {key: values[key] for key in SWITCHES if values.get(key) not in (None, "", [], ())}
    return load_protocol(str(values["PROTOCOL"]), **switches)


def check_numbers(values: Values) -> None:
    """Seeds from 0 to 2^32 - 1; an adapter that can name a folder; strengths of a sweep finite, two or more."""
    check_part("ADAPTER", str(values.get("ADAPTER") or "lora"))
    seeds = values.get("SEEDS") or []
    for seed in [*seeds] if isinstance(seeds, list | tuple) else [seeds]:
        check_seed(seed)
    if "SEED" in values:
        check_seed(values["SEED"])
    if "ALPHAS" in values:
        check_alphas(list(values["ALPHAS"]) if isinstance(values["ALPHAS"], list | tuple) else [values["ALPHAS"]])


def check_files(values: Values) -> None:
    """Users' texts, calibration passages, pairs and candidate files, read as the run will read them; candidates are
    compiled, not run."""
    if "USERS" in values:
        for texts in load_users(str(values["USERS"] or "")).values():
            split_texts(texts, values.get("HELDOUT") or 0.25)
    if "CALIBRATION" in values:
        load_calibration(str(values["CALIBRATION"] or ""))
    for folder in values.get("COMPARE") or []:
        read_folder(Path(str(folder)))
    for key in ("PAIRS", "GRADIENTS"):
        if values.get(key) and values[key] not in GRADIENTS:
            read_written(str(values[key]))
    given = values.get("CANDIDATES") or []
    for file in map(Path, [given] if isinstance(given, str) else given):
        if not file.is_file():
            raise FileNotFoundError(f"CANDIDATES: {file}: no such file")
        try:
            compile(file.read_bytes(), str(file), "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"CANDIDATES: {file}: not Python: {error}") from error


def check_candidates(values: Values, sweep: Path) -> None:
    """SUBSPACES and SUBSPACE against the candidates of a finished sweep; ValueError with what was meant. A damaged sweep is
    told by whoever reads all of it."""
    known = [c["name"] for c in read_record(sweep / RECORD).get("candidates", []) if c["kind"] != "ceiling"]
    for key in ("SUBSPACES", "SUBSPACE"):
        given = values.get(key) or []
        for name in [given] if isinstance(given, str) else given:
            if known and name not in known:
                raise ValueError(f"{key}: {name}: no candidate of the sweep in {sweep}{suggest(name, known)}")


def check_sizes_of(values: Values, lm: LM) -> None:
    """Ranks and widths at most the model's, layers that it has."""
    d, n = lm.decoder.d, lm.decoder.n_layers
    if "PCS" in values:
        check_sizes(d, values["PCS"], values.get("K_BROAD", 1))
    if isinstance(size := values.get("THETA_DIM"), int) and size > d:
        raise ValueError(f"THETA_DIM = {size}: the model is {d} wide, a theta has at most as many numbers")
    layers = values.get("LORA_LAYERS") or []
    fine = isinstance(layers, list | tuple) and all(type(l) is int and 0 <= l < n for l in layers)
    if not fine:
        raise ValueError(f"LORA_LAYERS = {layers!r}: must be a list of layers, the model has 0 to {n - 1}")


def check_behavior(values: Values, lm: LM, behavior: Behavior) -> None:
    """Texts that the model's chat template renders and that are not cut, claims that are found in them, answer words of its
    vocabulary, as many topics and personas as are asked for."""
    if "ALPHAS" in values:
        check_words(lm, behavior)
    elif "PCS" in values:
        check_texts(lm, behavior, protocol_of(values))
    samples = values.get("SAMPLES") or PairConfig.samples
    asked = PairConfig(
        values.get("TOPICS"), values.get("PERSONAS"), samples,
        file=str(values.get("PAIRS") or ""), wordings=tuple(values.get("WORDINGS") or ()),
    )  # fmt: skip
    if asked.file:
        check_lengths(lm, behavior, asked)
    if not values.get("W_PATH") and not values.get("POS_ADAPTER"):
        held_out(most_pairs(behavior, asked), TrainConfig.heldout, values.get("TARGET_LOSS") or 0)


def check_lengths(lm: LM, behavior: Behavior, asked: PairConfig) -> None:
    """Whether there is room for an answer after each user turn of a file of pairs; ValueError naming the line."""
    pairs = from_file(behavior, asked)
    for row in (*pairs.rows, *pairs.heldout):
        try:
            make_example(lm, row, "pos", ("", ""), TrainConfig().max_length)
        except ValueError as error:
            told = str(error).partition(": ")[2] or error
            raise ValueError(f"{pairs_file(asked.file)}: line {row.sample}: {told}; shorten `user`") from error


def check_diffs(
    notebook: str, values: Values, lm: LM, behavior: Behavior, out: Path | None = None, own: bool = True
) -> None:
    """w, the null diffs and adapters against the model: those that are named, and the run's own as far as it is there."""
    sides = [str(values[key]) for key in ("POS_ADAPTER", "NEG_ADAPTER") if values.get(key)]
    # in a batch that trains first both are its own: they may not be there yet, or are damaged and made anew
    w, nulls = str(values.get("W_PATH") or ""), list(values.get("NULL_W_PATH") or [])
    given = [*([w] if w else []), *nulls] if own else []
    if len(sides) == 1:
        raise ValueError(f"POS_ADAPTER and NEG_ADAPTER go together; only {sides[0]} was given")
    if sides and values.get("W_PATH"):
        raise ValueError("give W_PATH, or POS_ADAPTER and NEG_ADAPTER, not both")
    for source in [*given, *([tuple(sides)] if sides else [])]:
        check_source(source, lm.model)
    if notebook == "weight_diff" and not sides and not given:
        layers = tuple(values.get("LORA_LAYERS") or ()) or None
        adapter_layers(lm.decoder.n_layers, TrainConfig(adapter=str(values.get("ADAPTER", "lora")), layers=layers))
    if notebook in ("v7_sweep", "causal_check") and own:
        path, found = own_w(dict(values), out or out_folder()), null_diffs(dict(values), out or out_folder())
        theirs = [] if w or not path.is_file() else [(path, values, False)]
        theirs += [] if nulls else [(path, {**values, "SEED": seed}, True) for seed, path in found.items()]
        for path, trained, null in theirs:
            try:
                check_source(path, lm.model)
            except ValueError as error:
                raise ValueError(f"{error}; train it again: {_train(trained, null)}") from error


def check_trained(values: Values, behavior: Behavior, out: Path) -> None:
    """ValueError where a run's own w, of any of its seeds, or a null diff that it reads was trained on what the behaviour now
    asks about, or on other topics."""
    mine = [{**values, "SEED": seed} for seed in values.get("SEEDS") or [values.get("SEED", 0)]]
    read = [(own_w(one, out), one, False) for one in mine]
    if "NULL_W_PATH" in values and not values["NULL_W_PATH"]:
        read += [(path, {**values, "SEED": seed}, True) for seed, path in null_diffs(dict(values), out).items()]
    for path, one, null in read:
        if told := other_training(read_meta(path), behavior, "a null diff" if null else "w"):
            foreign = (
                f", or use it as it is: {'NULL_W_PATH' if null else 'W_PATH'} {path}" if "W_PATH" in values else ""
            )
            raise ValueError(f"{values['BEHAVIOR']}: {told} ({path}); train it again: {_train(one, null)}{foreign}")


def _train(values: Values, null: bool = False) -> str:
    """The command that makes a run's own weight difference."""
    usual = {"MODEL_ID": "tiny", "BEHAVIOR": "sycophancy", "ADAPTER": "lora", "SEED": None}
    asked = {key: values.get(key, old) for key, old in usual.items() if values.get(key, old) != old}
    asked |= {"NULL_DIFF": "true"} if null else {}
    return " ".join(["just nb weight_diff", *(f"-p {key} {value}" for key, value in asked.items())])
