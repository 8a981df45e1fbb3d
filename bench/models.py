"""Models of given shapes with a weight difference on them, for benches: random weights, the shipped tokenizer.

.venv/bin/python bench/models.py FOLDER [--shape qwen3-0.6b] [--layers L] [--d D] [--dtype bfloat16] [--kind dense]

writes FOLDER/model (a Qwen3 folder that transformers loads), FOLDER/w.pt (`--kind dense`: one float32 tensor per matrix) or
FOLDER/w.safetensors (`--kind factors`), and with `--kind full` a dense w.pt of full rank. Weights have power-law spectra along
the residual stream, so that every candidate's directions are well defined; w is of rank 64 on all seven linear maps of the
chosen layers, a hundredth of the weights' size, as a pair of LoRA adapters of rank 32 leaves it.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from ws.cache.models import model_files
from ws.diff import LowRank, WeightDiff, save_diff
from ws.model.decoder import ROLES

SHAPES = {  # d, layers, heads, key/value heads, head_dim, intermediate size, vocabulary
    "qwen3-0.6b": (1024, 28, 16, 8, 128, 3072, 151_936),
    "smollm2": (576, 30, 9, 3, 64, 1536, 49_152),
}
RANK = 64
SIZE = 0.01  # |w| / |W| of a matrix


def config(shape: str = "qwen3-0.6b", d: int = 0, layers: int = 0, vocabulary: int = 0) -> Qwen3Config:
    """The configuration of a shape, or of its proportions at another width."""
    width, depth, heads, kv, e, inside, words = SHAPES[shape]
    d = d or width
    return Qwen3Config(
        hidden_size=d,
        num_hidden_layers=layers or depth,
        num_attention_heads=max(1, heads * d // width),
        num_key_value_heads=max(1, kv * d // width),
        head_dim=e,
        intermediate_size=inside * d // width,
        vocab_size=vocabulary or words,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )


def write_model(folder: Path, given: Qwen3Config, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A model folder of random weights with the shipped tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_files("tiny")[0])
    given.bos_token_id, given.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(given)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                law = (
                    torch.arange(1, given.hidden_size + 1)[torch.randperm(given.hidden_size, generator=generator)]
                    ** -0.5
                )
                p *= law[:, None] if name.endswith(("o_proj.weight", "down_proj.weight")) else law
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_diff(given: Qwen3Config, layers: list[int] | None = None, rank: int = RANK, seed: int = 2) -> WeightDiff:
    """A w of rank `rank` on the seven linear maps of each layer (default: all), its spectrum falling as a power law."""
    generator = torch.Generator().manual_seed(seed)
    d, e = given.hidden_size, given.head_dim
    wide = {"q": given.num_attention_heads * e, "k": given.num_key_value_heads * e, "v": given.num_key_value_heads * e}
    wide |= {"gate": given.intermediate_size, "up": given.intermediate_size}
    shapes = {role: (wide[role], d) for role in wide}
    shapes |= {"o": (d, given.num_attention_heads * e), "down": (d, given.intermediate_size)}
    law, entries = torch.arange(1, rank + 1) ** -0.5, {}
    for l in layers if layers is not None else range(given.num_hidden_layers):
        for role, path in ROLES.items():
            out, inside = shapes[role]
            B, A = torch.randn(out, rank, generator=generator) * law, torch.randn(rank, inside, generator=generator)
            size = SIZE * 0.02 / (float(law.square().sum()) ** 0.5)  # of entries of 0.02, as transformers draws them
            entries[f"model.layers.{l}.{path}.weight"] = LowRank(B * size, A)
    return WeightDiff(entries)


def write_diff(folder: Path, w: WeightDiff, kind: str = "dense") -> Path:
    """w as `w.pt` of float32 matrices (`dense`), the same with noise of full rank (`full`), or as factors."""
    if kind == "factors":
        return save_diff(w, folder / "w.safetensors")
    generator, dense = torch.Generator().manual_seed(3), {}
    for name, entry in w.entries.items():
        M = entry.dense()
        dense[name] = M + (kind == "full") * M.std() * 0.1 * torch.randn(M.shape, generator=generator)
    torch.save(dense, folder / "w.pt")
    return folder / "w.pt"


def make(
    folder: Path, given: Qwen3Config, kind: str = "dense", dtype: torch.dtype = torch.bfloat16
) -> tuple[Path, Path]:
    """Model folder and file of w; what is there already is used again."""
    model, w = (
        folder / "model",
        folder / ("w.safetensors" if kind == "factors" else "w.pt" if kind == "dense" else "full/w.pt"),
    )
    if not (model / "config.json").is_file():
        write_model(model, given, dtype)
    if not w.is_file():
        w.parent.mkdir(parents=True, exist_ok=True)
        write_diff(w.parent, make_diff(given), kind)
    return model, w


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--d", type=int, default=0)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--kind", choices=("dense", "factors", "full"), default="dense")
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    for path in make(a.folder, config(a.shape, a.d, a.layers, a.vocabulary), a.kind, getattr(torch, a.dtype)):
        print(path)


if __name__ == "__main__":
    main()
