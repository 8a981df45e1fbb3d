"""w as something that runs without this project: a PEFT LoRA, or a whole checkpoint. (docs/use.md)

    peft:   alpha w = B A per matrix, B = U sqrt(S), A = sqrt(S) V^T, of rank <= 2r        merged:   W + alpha w

w is restricted first (`ws.use.restrict`). Both kinds are written whole or not at all, with a README that says what they are.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ws.cache.files import atomic_dir
from ws.cache.models import folder_hash
from ws.diff import LowRank, WeightDiff, load_diff
from ws.diff.check import check_shapes
from ws.diff.core import check_entries
from ws.diff.factor import factors
from ws.diff.io import write_adapter
from ws.explanation.result import Explanation
from ws.model.lm import LM, check_model, load_lm
from ws.train.record import base_content, other_base
from ws.use.merge import commit_of, write_merged
from ws.use.restrict import parameters, restricted, share_of, truncated
from ws.use.run import MOST

KINDS = ("peft", "merged")
SHARD = "5GB"
INSTEAD = "--as merged takes it, --roles q,k,v,o,gate,up,down leaves it out"


@dataclass(frozen=True)
class Exported:
    """folder: where it lies. w: what of w it holds, without alpha. text: what it is, in words (Markdown)."""

    folder: Path
    w: WeightDiff
    text: str


def export(
    w: WeightDiff | Path | str | tuple | list,
    folder: Path | str,
    model: LM | Path | str,
    alpha: float | int = 1.0,
    kind: str = "peft",
    *,
    keep: str | Mapping[int, Tensor] = "",
    roles: Sequence[str] = (),
    layers: Collection[int] = (),
    rank: int | None = None,
    sweep: Explanation | Path | str | None = None,
    shard: str = SHARD,
    revision: str | None = None,
) -> Exported:
    """Write `alpha w`, or a part of w, for use without this project.

    w: as `load_diff` takes it. folder: new or empty. model: the base model, or its MODEL_ID (and the hub's revision), of
    which no weight is loaded that is not needed. kind: `peft` (a LoRA of exactly the matrices that are left, scaling 1,
    float32), `merged` (a checkpoint: config, tokenizer, shards of at most `shard`; tensor by tensor in the dtype of the
    checkpoint's files, of a loaded model in its own). keep, roles, layers, rank: the part of w
    (`ws.use.restrict.restricted`); sweep: whose candidates `keep` names. ValueError / FileNotFoundError before anything is
    written: what does not fit the model, does not exist, or cannot be a LoRA (embeddings, norms, biases; a dense matrix of
    full rank, without `rank`).

    Examples:
        >>> import tempfile, ws
        >>> done = ws.export("tiny", tempfile.mkdtemp() + "/nice", "tiny", alpha=2.0, roles=["v", "o"])
        >>> sorted(file.name for file in done.folder.iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; one of {', '.join(KINDS)}")
    if not abs(alpha) < MOST or (kind == "peft" and not alpha):
        raise ValueError(f"alpha is {alpha}, expected a finite number{' other than 0' * (kind == 'peft')}")
    folder = check_empty(folder)
    w, lm = load_diff(w), model if isinstance(model, LM) else check_model(str(model), revision=revision)
    check_entries(w.entries, "w")
    check_shapes(
        {name: w.shape(name) for name in w}, lm.model, f"w of {w.meta.get('base_model') or 'an unnamed model'}"
    )
    sweep = Explanation.load(sweep) if isinstance(sweep, (Path, str)) else sweep
    source = lm.model.config._name_or_path
    commit = commit_of(lm, revision)
    try:
        part, told = restricted(w, lm.decoder, keep, roles, layers, rank, sweep)
    except (
        NotImplementedError
    ):  # the gains of norms on what is written are weights, which a model on the meta device lacks
        part, told = restricted(w, load_lm(source, revision=commit).decoder, keep, roles, layers, rank, sweep)
    if kind == "peft":
        part = as_factors(part, lm.model)
    said = _about(w, part, told, lm, alpha, commit)
    with atomic_dir(folder) as temporary:
        if kind == "peft":
            write_adapter(_folded(part, alpha), temporary, source, commit)
            ranks = sorted({part.rank(name) for name in part})
            said.append(
                f"PEFT LoRA, scaling 1, {len(part)} matrices, rank {ranks[0]}{f' to {ranks[-1]}' * (len(ranks) > 1)}"
            )
        else:
            said.append(write_merged(part, alpha, lm, temporary, shard, commit))
        text = "\n".join(f"- {line}" for line in said) + "\n"
        (temporary / "README.md").write_text(_card(kind, source, text), encoding="utf-8")
    return Exported(folder, part, text)


def check_empty(folder: Path | str) -> Path:
    """`folder` as a path; ValueError for one that holds something, and for a file."""
    folder = Path(folder).expanduser()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already; give a new folder, or remove it")
    return folder


def as_factors(w: WeightDiff, model: nn.Module) -> WeightDiff:
    """w as factors of each matrix's numerical rank, for a LoRA on linear modules. ValueError naming a parameter that is none,
    or a dense matrix that low-rank factors do not give."""
    embedding = model.get_input_embeddings().weight
    entries = {}
    for name, entry in w.entries.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if model.get_parameter(name) is embedding:
            raise ValueError(
                f"{name}: an embedding (or tied to it), which cannot be a LoRA that acts as w does; {INSTEAD}"
            )
        if not isinstance(module, nn.Linear) or len(entry.shape) != 2:
            what = "a bias" if name.endswith(".bias") else f"of a {type(module).__name__}"
            raise ValueError(f"{name}: {what}, which cannot be a LoRA; {INSTEAD}")
        if not isinstance(entry, LowRank):
            found = factors(entry)
            if found is None:
                s = w.singular_values(name).square()
                some = max(1, min(64, len(s) // 2))
                share = float(s[:some].sum() / s.sum())
                raise ValueError(
                    f"{name}: is dense and of full rank; --rank {some} keeps {share:.1%} of its |w|^2 (loses {1 - share:.1%}),"
                    " --as merged keeps all"
                )
            entry = found[0]
        entries[name] = entry
    return truncated(WeightDiff(entries, w.meta))


def _folded(w: WeightDiff, alpha: float | int) -> WeightDiff:
    """`alpha w`, alpha shared evenly by both factors."""
    root = abs(alpha) ** 0.5
    return w.map(lambda _, e: LowRank(e.B * math.copysign(root, alpha), e.A * root))


def content(lm: LM, commit: str | None) -> str:
    """What tells the base model's files apart from others of its name; on the meta device the folder's hash, or the hub's
    commit."""
    if lm.device.type != "meta":
        return base_content(lm)
    source = Path(lm.model.config._name_or_path)
    return folder_hash(source) if source.is_dir() else commit or ""


def _about(w: WeightDiff, part: WeightDiff, told: str, lm: LM, alpha: float | int, commit: str | None) -> list[str]:
    """What is exported, line by line."""
    known = [(key, w.meta.get(key)) for key in ("behavior", "adapter", "seed", "null", "cut")]
    about = ", ".join(f"{key} {value}" for key, value in known if value not in (None, "") and value is not False)
    held = content(lm, commit)
    base = f"{lm.slug or lm.name}, content {held or 'unknown'}, {type(lm.model).__name__}"
    lines = [
        f"w: {about or 'no metadata'}; fingerprint {w.fingerprint}",
        f"alpha: {alpha:g}, folded in",
        f"part of w: {told or 'all of it'}; {share_of(part, w):.2%} of |w|^2, {parameters(part):,} numbers",
        f"base model: {base}",
    ]
    trained, sketched = w.meta.get("base_content"), lm.device.type == "meta"
    local = sketched and Path(lm.model.config._name_or_path).is_dir()  # of the hub's files the commit alone is known
    if other_base(w.meta, lm) if not sketched else local and trained and trained != held:
        lines.append(f"**w was trained from other files under this name**: content {trained}")
    return lines


def _card(kind: str, source: str, text: str) -> str:
    """The README of an export."""
    hub = f"base_model: {source}\n" * bool(source and not Path(source).is_absolute())
    library = "peft" if kind == "peft" else "transformers"
    use = f'''from transformers import AutoModelForCausalLM
{"from peft import PeftModel" if kind == "peft" else "from transformers import AutoTokenizer"}

{
        f"""model = AutoModelForCausalLM.from_pretrained({source or "THE BASE MODEL"!r})
model = PeftModel.from_pretrained(model, "THIS FOLDER")"""
        if kind == "peft"
        else """model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")"""
    }'''
    title = "A weight difference as a LoRA" if kind == "peft" else "A model with a weight difference added"
    what = (
        "Weight steering: `w` is what fine-tuning on a behaviour changes minus what fine-tuning on its opposite does, and the"
        f" model's weights act as `W + alpha w`{'.' if kind == 'peft' else '; here they are these sums.'}"
    )
    return f"---\n{hub}library_name: {library}\n---\n\n# {title}\n\n{what}\n\n{text}\n```python\n{use}\n```\n"
