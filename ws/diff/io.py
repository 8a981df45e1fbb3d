"""Weight diffs on disk: one `.safetensors` file, a legacy `w.pt`, and a PEFT adapter folder as export. The file holds
`NAME::B` and `NAME::A` for a low-rank entry and `NAME` for a dense one; everything else is JSON under one key of its
header, so the bytes depend on the content alone. (docs/method.md section 2)"""

import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from ws.cache.files import atomic_dir, atomic_file
from ws.cache.given import first_line, parsed, short
from ws.diff.core import Entry, LowRank, WeightDiff, check_entries, dims, parts
from ws.diff.factor import balanced, factorised

HEADER = "ws_weight_diff"
SUFFIXES = ("::B", "::A")
LEGACY = (".pt", ".pth", ".bin")
FLOATS, INTEGERS = ("F64", "F32", "F16", "BF16"), ("I64", "I32", "I16", "I8", "U8", "BOOL")
FEW = 16  # tensors of a torch file that are read at a time
MOST_DIM, MOST_NAME = 1 << 24, 300  # rows or columns of a tensor; characters of its name


def save_diff(w: WeightDiff, path: Path | str) -> Path:
    """Write `w` to one `.safetensors` file, whole. Loading gives the same tensors, dtypes, order and metadata.

    Examples:
        >>> import tempfile, ws
        >>> w = ws.load_diff("tiny")
        >>> file = ws.save_diff(w, tempfile.mkdtemp() + "/w.safetensors")
        >>> ws.load_diff(file).fingerprint == w.fingerprint
        True
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a weight diff is saved as .safetensors")
    check_entries(w.entries, str(path))
    tensors: dict[str, Tensor] = {}
    for name, entry in w.entries.items():
        if "::" in name:
            raise ValueError(f"{name}: a parameter name cannot contain '::'")
        for suffix, part in zip(SUFFIXES if isinstance(entry, LowRank) else ("",), parts(entry), strict=True):
            tensors[name + suffix] = part.detach().cpu().clone(memory_format=torch.contiguous_format)
    header = json.dumps({"format": 1, "names": list(w.names), "meta": w.meta}, sort_keys=True)
    with atomic_file(path) as temporary:
        save_file(tensors, str(temporary), metadata={HEADER: header})
    return path


def opened(path: Path) -> safe_open:
    """A safetensors file, open. FileNotFoundError / ValueError naming it when it is missing or broken."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        broken = "not a whole safetensors file (truncated, or another format)"
        raise ValueError(f"{path}: {broken}: {first_line(error)}") from error


def shapes_in(handle: safe_open, path: Path, kinds: tuple[str, ...] = FLOATS) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an open file, from its header alone; ValueError naming one of another type than `kinds`,
    or of a name or size that no parameter has."""
    shapes = {}
    for name in handle.keys():
        piece = handle.get_slice(name)
        kind, shape = piece.get_dtype(), tuple(piece.get_shape())
        if kind not in kinds:
            expected = ", ".join(kinds[: len(FLOATS)])
            raise ValueError(f"{path}: {name[:MOST_NAME]} has dtype {kind}, expected {expected}; convert it first")
        if len(name) > MOST_NAME or max(shape, default=0) > MOST_DIM:
            raise ValueError(f"{path}: {name[:60]!r} ({dims(shape)}): no parameter has such a name or size")
        shapes[name] = shape
    return shapes


def read_tensors(path: Path, kinds: tuple[str, ...] = FLOATS) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header's metadata of a safetensors file; errors as in `opened` and `shapes_in`."""
    with opened(path) as handle:
        names = shapes_in(handle, path, kinds)
        return {name: handle.get_tensor(name) for name in names}, dict(handle.metadata() or {})


def read_diff(path: Path | str) -> WeightDiff:
    """Read a diff from its own file, from a dense `.safetensors`, or from a legacy `.pt` (dict name -> tensor).

    The two dense forms: matrices of low numerical rank become factors (`ws.diff.factor`), the rest is kept to the bit.
    Raises FileNotFoundError, or ValueError that names the file and, where there is one, the tensor: truncated or
    foreign files, PEFT adapters, factors that do not fit, NaN, inf.
    """
    path = Path(path)
    if path.suffix in LEGACY:
        names = list(_legacy(path, mapped=True))
        return _foreign(names, _in_turn(path, names), path, "legacy")
    tensors, header = read_tensors(path)
    if HEADER not in header:
        names = list(tensors)
        return _foreign(names, ((name, tensors.pop(name)) for name in names), path, "dense")
    names, meta = _own_header(header[HEADER], path)
    entries: dict[str, Entry] = {}
    try:
        for name in names:
            low = name + SUFFIXES[0] in tensors
            entries[name] = LowRank(*(tensors.pop(name + s) for s in SUFFIXES)) if low else tensors.pop(name)
    except KeyError as error:
        raise ValueError(f"{path}: header and tensors of this weight diff do not fit together: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error
    if tensors:
        raise ValueError(f"{path}: tensors that its header does not name: {', '.join(sorted(tensors)[:3])}")
    check_entries(entries, str(path))
    return WeightDiff(entries, meta)


def peek(path: Path) -> tuple[dict[str, tuple[int, ...]], Iterator[tuple[str, tuple[Tensor, ...]]]]:
    """Parameter -> shape of a diff's file, and `(parameter, its tensors)` one by one, read when they are asked for. Errors
    as in `read_diff`, as far as headers tell."""
    if path.suffix in LEGACY:
        held = _legacy(path, mapped=True)
        return {name: tuple(value.shape) for name, value in held.items()}, ((n, (v,)) for n, v in held.items())
    handle = opened(path)
    shapes, header = shapes_in(handle, path), handle.metadata() or {}
    names = _own_header(header[HEADER], path)[0] if HEADER in header else list(shapes)
    pieces = {
        name: tuple(f"{name}{s}" for s in SUFFIXES) if name + SUFFIXES[0] in shapes else (name,) for name in names
    }
    if odd := set(shapes) ^ {piece for found in pieces.values() for piece in found}:
        raise ValueError(f"{path}: header and tensors of this weight diff do not fit together: {min(odd)[:60]!r}")
    if not names:
        raise ValueError(f"{path}: no tensors")
    if adapter := next((name for name in names if ".lora_" in name), None):
        raise ValueError(f"{path}: holds one PEFT adapter ({adapter}); give the folders of a pair, pos and neg")
    for name, (B, *A) in pieces.items():
        if A and not (len(shapes[B]) == len(shapes[A[0]]) == 2 and shapes[B][1] == shapes[A[0]][0]):
            raise ValueError(f"{path}: {name}: low-rank factors do not fit: {dims(shapes[B])} and {dims(shapes[A[0]])}")
    whole = {n: (shapes[f[0]][0], shapes[f[1]][1]) if len(f) == 2 else shapes[f[0]] for n, f in pieces.items()}
    return whole, ((name, tuple(map(handle.get_tensor, found))) for name, found in pieces.items())


def read_meta(path: Path) -> dict:
    """The metadata of this project's own form, from the header alone; {} where the file is not there or not one."""
    try:
        with opened(path) as handle:
            return _own_header((handle.metadata() or {})[HEADER], path)[1]
    except (FileNotFoundError, ValueError, KeyError):
        return {}


def _own_header(text: str, path: Path) -> tuple[list[str], dict]:
    """Names and metadata out of the header of this project's own form."""
    head = parsed(text, f"{path}: its header")
    names, meta = (head.get(key) for key in ("names", "meta")) if isinstance(head, dict) else (None, None)
    if not isinstance(names, list) or not isinstance(meta, dict) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: header and tensors of this weight diff do not fit together: no names or no meta")
    return names, meta


def _legacy(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a torch file, each checked before it is touched; mapped: read from disk when they are used."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    broken = f"{path}: not a whole torch file of tensors (truncated, or another format)"
    try:
        packed_form = zipfile.is_zipfile(path)
        if packed_form:
            with zipfile.ZipFile(path) as packed:
                if any(record.compress_type != zipfile.ZIP_STORED for record in packed.infolist()):
                    raise ValueError("its records are compressed, which torch.save does not do")
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=mapped and packed_form)
    except Exception as error:  # a stranger's pickle may end its reader with anything
        raise ValueError(f"{broken}: {first_line(error)}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected a dict of parameter name -> tensor, found {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = f"{short(name)} holds a {type(value).__name__}"
            raise ValueError(f"{path}: {found}; expected parameter name -> tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(f"{path}: {short(name)} is sparse, quantised or without content; expected a plain tensor")
        # a stride of 0 lets a few bytes stand for any size
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: {short(name)} says {dims(value.shape)}, which is more than the file holds")
    return content


def _in_turn(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a torch file, read a few at a time: the whole file never stands in memory, where its form allows that."""
    few = FEW if zipfile.is_zipfile(path) else len(names)
    for i in range(0, len(names), few):
        held = _legacy(path, mapped=True)
        if list(held) != names:
            raise ValueError(f"{path}: was changed while it was read; read it again")
        for name in names[i : i + few]:
            yield name, held.pop(name).clone(memory_format=torch.contiguous_format)


def _foreign(names: list[str], tensors: Iterable[tuple[str, Tensor]], path: Path, form: str) -> WeightDiff:
    """A weight diff of dense tensors, each checked as it comes and let go once it has become factors."""
    adapter = next((name for name in names if ".lora_" in name), None)
    if adapter:
        raise ValueError(f"{path}: holds one PEFT adapter ({adapter}); give the folders of a pair, pos and neg")
    if not names:
        check_entries({}, str(path))

    def checked() -> Iterator[tuple[str, Tensor]]:
        for name, value in tensors:
            check_entries({name: value}, str(path))
            yield name, value

    entries, about = factorised(checked())
    return WeightDiff(entries, {"source": path.name, "form": form, **about})


def export_adapter(w: WeightDiff, folder: Path | str, alpha: float | int = 1.0) -> Path:
    """Write `alpha w` as a PEFT LoRA folder, whole: added to the base model it acts as `W + alpha w`. The base model is the one
    that the metadata name. Errors as in `write_adapter`."""
    with atomic_dir(Path(folder)) as temporary:
        write_adapter(w.scale(alpha), temporary, str(w.meta.get("base_model") or ""))
    return Path(folder)


def write_adapter(w: WeightDiff, folder: Path, base: str, revision: str | None = None) -> None:
    """Fill a folder with w as a PEFT LoRA of the base model of that name or path, and of no other module.

    Scaling is 1 (`lora_alpha = r` for every module). Dense matrices are factored at their numerical rank. Embedding weights are
    stored the way peft wants them, transposed. Raises ValueError naming a parameter that a LoRA cannot hold (a bias, a norm).
    """
    from peft import LoraConfig

    tensors, ranks = {}, {}
    for name in w.names:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(w.shape(name)) != 2:
            raise ValueError(f"{name}: {w.shape(name)} is not a linear weight; a PEFT LoRA cannot hold it")
        entry = w.entries[name]
        if not isinstance(entry, LowRank):
            U, s, Vh = w.svd(name)
            keep = int((s > s[0] * torch.finfo(torch.float32).eps * max(entry.shape)).sum())
            entry = balanced(U[:, :keep], s[:keep], Vh[:keep])
        ranks[module] = max(entry.rank, 1)
        missing = ranks[module] - entry.rank  # peft knows no rank 0
        B, A = pad(entry.B.float(), (0, missing)), pad(entry.A.float(), (0, 0, 0, missing))
        key = f"base_model.model.{module}.lora"
        if module.split(".")[-1] in ("embed_tokens", "wte"):
            tensors |= {f"{key}_embedding_A": B.T, f"{key}_embedding_B": A.T}
        else:
            tensors |= {f"{key}_A.weight": A, f"{key}_B.weight": B}
    top = max(ranks.values())
    pattern = {module: r for module, r in sorted(ranks.items()) if r != top}
    # a regular expression, because peft writes a set of names in an order that differs between runs
    targets = "|".join(module.replace(".", r"\.") for module in sorted(ranks))
    config = LoraConfig(r=top, lora_alpha=top, rank_pattern=pattern, alpha_pattern={**pattern}, target_modules=targets)
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    config.base_model_name_or_path, config.revision = base, revision
    config.save_pretrained(str(folder))
    whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    save_file(whole, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def describe(w: WeightDiff) -> str:
    """Metadata, totals and one line per parameter (form, shape, rank, effective rank, norm, top singular value)."""
    table = w.table()
    low = int((table["form"] == "low-rank").sum())
    lines = [
        *(f"{key}: {value}" for key, value in sorted(w.meta.items()) if not isinstance(value, list | dict)),
        f"parameters: {len(w)} ({low} low-rank, {len(w) - low} dense)",
        f"layers: {', '.join(map(str, w.layers())) or 'none'}",
        f"norm: {w.total_norm():.6g}\n",
        f"{'parameter':<52} {'form':<9} {'shape':>13} {'rank':>5} {'eff.rank':>8} {'norm':>10} {'s1':>10}",
    ]
    numbers = {"rank": ">5", "effective_rank": ">8.2f", "norm": ">10.4g", "top_singular_value": ">10.4g"}
    for row in table.iter_rows(named=True):
        cells = [f"{row['name']:<52} {row['form']:<9} {row['shape']:>13}"]
        cells += [f"{'-':{f.partition('.')[0]}}" if row[c] is None else f"{row[c]:{f}}" for c, f in numbers.items()]
        lines.append(" ".join(cells))
    return "\n".join(lines)
