"""What notebooks share: the log of a run, its setting in one table, the scores that later statistics start from."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
from IPython.display import Image, Markdown
from matplotlib.figure import Figure
from safetensors.torch import save_file

from ws.activations import probes
from ws.bases import load_bases
from ws.candidates import Candidate
from ws.config import LOGS
from ws.data import Behavior
from ws.diff import WeightDiff, layer_of
from ws.files import atomic_file
from ws.model import LM
from ws.protocol import Protocol
from ws.scoring import Target
from ws.stability.overlap import assert_same_bases
from ws.subspace import Basis
from ws.sweep import LayerTargets, oracle_bases, topic_scores


def start_log(notebook: str, folder: Path) -> logging.Logger:
    """A verbose log of one run under logs/, named after the notebook and its folder; warnings of ws go there too."""
    folder.mkdir(parents=True, exist_ok=True)
    LOGS.mkdir(exist_ok=True)
    name = "_".join((notebook, *folder.resolve().parts[1:][-4:]))
    log = logging.getLogger("ws")
    log.setLevel(logging.INFO)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(LOGS / f"{name}.log", mode="a", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return log


def show(figure: Figure) -> Image:
    """A figure as a notebook displays it: a PNG at twice the resolution, no plotting backend involved."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=170, metadata={"Software": None})
    width = int(figure.get_figwidth() * 85)
    return Image(buffer.getvalue(), format="png", width=width)


def embedded(text: str) -> Markdown:
    """A Markdown file as part of a report: its headings two levels deeper, below the section that shows it."""
    return Markdown(re.sub(r"^(#+) ", r"##\1 ", text, flags=re.MULTILINE))


def setting(lm: LM, behavior: Behavior, protocol: Protocol, w: WeightDiff, layers: list[int]) -> str:
    """A run's setting as a Markdown table."""
    d, split = lm.decoder, probes(behavior, protocol)
    switches = f"{protocol.eval_split} split, {'chat' if protocol.chat_probes else 'raw'} probes"
    rows = [
        ("model", f"{lm.name}: {d.n_layers} layers, d {d.d}, {d.n_heads} heads on {d.n_kv} kv heads, {lm.model.dtype}"),
        ("behaviour", f"{behavior.name}: {len(behavior.topics)} topics, {len(behavior.personas_pos)} persona pairs"),
        (
            "w",
            f"{len(w.names)} matrices, Frobenius norm {w.total_norm():.4g}, layers {', '.join(map(str, w.layers()))}",
        ),
        ("protocol", f"{protocol.name}: {switches}, persona pairs: {protocol.persona_pairs}"),
        ("probes", f"{len(split.fit)} FIT, {len(split.eval)} EVAL"),
        ("means over", f"layers {', '.join(map(str, layers))}"),
    ]
    return "\n".join(["| | |", "|---|---|", *[f"| {k} | {v} |" for k, v in rows]])


def null_summary(null: pl.DataFrame) -> pl.DataFrame:
    """Per target, over layers: mean of the drawn means (expected 1) and of the ratio of drawn to closed-form sd."""
    return null.group_by("target", maintain_order=True).agg(
        pl.col("mc_mean").mean().alias("mean of R (expected 1)"),
        pl.col("sd_ratio").mean().alias("drawn sd / closed form"),
        pl.col("sd_ratio").min().alias("least over layers"),
        pl.col("sd_ratio").max().alias("most over layers"),
    )


def save_scores(
    path: Path, candidates: list[Candidate], bases: dict[str, list[Basis]], targets: list[LayerTargets], k: int
) -> Path:
    """What statistics over seeds start from, in one file.

    `act_topics (C, L, n)`: R_act row by row; `act_oracle/<l>`, `weight_oracle/<l>`: top-k oracles `(d, <= k)`;
    `weight_factor/<l>/{oproj,downproj}`: scaled left factors `(d, r)`. Metadata: candidate names, d, k.
    """
    tensors = {"act_topics": topic_scores(candidates, bases, targets).contiguous()}
    for side, rows in oracle_bases(targets, k).items():
        tensors |= {f"{side}_oracle/{l}": B.contiguous() for l, B in enumerate(rows)}
    for l, t in enumerate(targets):
        for name in ("oproj", "downproj"):
            factor: Target | None = t.weights[name]
            if factor is not None:
                tensors[f"weight_factor/{l}/{name}"] = factor.F.contiguous()
    about = {"candidates": [c.name for c in candidates], "d": targets[0].act.F.shape[0], "k": k}
    with atomic_file(path) as tmp:
        save_file(tensors, tmp, metadata={"about": json.dumps(about)})
    return path


def training_text(training: dict) -> str:
    """How w came about, as a Markdown table: pairs written and dropped, losses of both signs, geometry of the pair."""
    rows = [f"| {key.replace('_', ' ')} | {_short(value)} |" for key, value in training.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def diff_norms(w: WeightDiff) -> pl.DataFrame:
    """Per matrix of w in a layer: the columns of `WeightDiff.table` without form and shape."""
    return w.table().drop("form", "shape").filter(pl.col("layer").is_not_null())


def norms_by_module(norms: pl.DataFrame) -> pl.DataFrame:
    """Means over layers by module."""
    columns = ["norm", "rank", "effective_rank", "top_singular_value"]
    return norms.group_by("module", maintain_order=True).agg([pl.col(c).mean().alias(f"mean {c}") for c in columns])


def diff_spectra(w: WeightDiff) -> dict[str, list[np.ndarray]]:
    """Singular values of every matrix by module, for `ws.figures.diff.spectra`."""
    values: dict[str, list[np.ndarray]] = {}
    for name in w.names:
        if layer_of(name) is not None:
            values.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(
                w.singular_values(name).numpy()
            )
    return values


def side_by_side(rows: list[dict], topics: int) -> pl.DataFrame:
    """The first topics' completions, one column per alpha."""
    table: dict[int, dict] = {}
    for row in rows:
        line = table.setdefault(row["topic"], {"prompt": row["prompt"]})
        line[f"alpha {row['alpha']:+g}"] = row["completion"]
    return pl.DataFrame(list(table.values())[:topics])


def bases_record(cache: Path) -> dict[str, str]:
    """What a sweep notes of the A-side bases it used: the cache file's name and content hash."""
    return {"file": cache.name, "sha256": hashlib.sha256(cache.read_bytes()).hexdigest()}


def same_bases(folders: Mapping[int, Path], cache: Path) -> str:
    """Assert that every seed's sweep used the same A-side bases (`bases.json` of its run folder), and say so.

    Equal hashes pass at once; otherwise every basis in `cache` is compared (`ws.stability.overlap.assert_same_bases`, overlap >=
    1 - 1e-6). Raises ValueError naming candidate, seed and layer where they differ.
    """
    records = {seed: json.loads((f / "bases.json").read_text(encoding="utf-8")) for seed, f in folders.items()}
    if len({r["sha256"] for r in records.values()}) == 1:
        first = next(iter(records.values()))
        return f"All {len(records)} seeds used the same A-side bases: {first['file']}, SHA-256 {first['sha256'][:12]}."
    loaded = {seed: load_bases(cache / r["file"]) for seed, r in records.items()}
    names = next(iter(loaded.values()))
    least = min(assert_same_bases({seed: b[name] for seed, b in loaded.items()}, name)[1] for name in names)
    return f"The A-side bases of {len(records)} seeds differ in bytes but not in span: least overlap {least:.9f}."


def join_summary(summary: pl.DataFrame, significance: pl.DataFrame, a_side: pl.DataFrame) -> pl.DataFrame:
    """The summary over seeds with p, q and null of R_w, and with A-side stability (`stable` where no data decide it)."""
    keep = ["candidate", "null_q95", "p_R_w", "q_R_w", "basis"]
    joined = summary.join(significance.select(keep), on="candidate", how="left", maintain_order="left")
    joined = joined.join(a_side, on="candidate", how="left", maintain_order="left")
    return joined.with_columns(pl.col("unstable").fill_null(False), pl.col("stability").fill_null(float("nan")))


SPECIFIC = {
    "subspace": "subspace",
    "family": "family",
    "mean_specific_conc_act": "R_act beyond clean",
    "mean_specific_z_act": "z",
    "mean_specific_energy_frac_act": "energy fraction",
    "mean_specific_rank": "rank",
}


def renamed(table: pl.DataFrame, columns: dict[str, str]) -> pl.DataFrame:
    """The named columns under the names that a reader sees."""
    return table.select([pl.col(old).alias(new) for old, new in columns.items()])
