"""The commands that use one w: export, trim, generate, chat; what they need is loaded when they run. (docs/use.md)"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ws.cache.places import typed_in

Run = Positional[Annotated[Path, arg(metavar="RUN")]]


def export(
    run: Run,
    /,
    alpha: float = 1.0,
    kind: Annotated[Literal["peft", "merged"], arg(name="as")] = "peft",
    to: Path | None = None,
    keep: str = "",
    roles: str = "",
    layers: str = "",
    rank: int | None = None,
    model: str = "",
    shard: str = "5GB",
) -> int:
    """Write alpha w, or a part of it, as a PEFT LoRA or as a whole checkpoint, which load without this project.

    Example: ws export out/tiny/sycophancy/lora/seed_0 --alpha 2 --as peft --roles v,o --layers 3-5

    Args:
        run: a run's folder (of a seed, or its weight_diff or v7b), a w.safetensors, or tiny. alpha: the strength that is
        folded in; below 0 against the behaviour. kind: peft (an adapter) or merged (a checkpoint with tokenizer). to: a new
        folder (default: one named after w in the current folder). keep: only what o_proj and down_proj write inside a
        subspace: a candidate of the run's v7b (or v7) sweep, or dW:8, w's own
            best 8 directions.
        roles: only these of q,k,v,o,gate,up,down.
        layers: only these, such as 8-15 or 3,5.
        rank: the best approximation of this rank of each matrix.
        model: the base model (default: the one that the run names).
        shard: the largest file of a checkpoint.
    """
    from ws.use.export import check_empty
    from ws.use.export import export as write
    from ws.use.restrict import OWN, parse_layers
    from ws.use.run import read_run

    here = typed_in()
    folder = check_empty(here / to) if to else None
    part = {"roles": [role.strip() for role in roles.split(",") if role.strip()], "layers": parse_layers(layers)}
    found = read_run(run, here)
    sweep = found.sweep() if keep and (not keep.startswith(f"{OWN}:") or found.sweeps) else None
    lm = found.model(here, model, weights=False)
    folder = folder or check_empty(here / _named(found.w.meta, alpha, kind, any((keep, roles, layers, rank))))
    more = {"rank": rank, "sweep": sweep, "shard": shard}
    more |= {"revision": None if model else str(found.params.get("REVISION") or "") or None}
    done = write(found.w, folder, lm, alpha, kind, keep=keep, **part, **more)
    print(f"{done.text}\n{kind}: {done.folder}")
    return 0


def _named(meta: dict, alpha: float, kind: str, part: bool) -> str:
    """The default folder of an export, named after w."""
    from ws.cache.names import slug

    words = [meta.get("behavior") or "w", meta.get("adapter"), f"seed{meta['seed']}" if "seed" in meta else ""]
    return slug("-".join([*(str(word) for word in words if word), f"alpha{alpha:g}", *["part"] * part, kind]))


def trim(
    run: Run, /, keep_behaviour: float = 0.9, behavior: str = "", model: str = "", save: Path | None = None
) -> int:
    """Find the smallest part of w (rank, roles, layers) that keeps a share of its effect, at the least KL to the base model.

    The search asks about training topics, the report about held-out ones. Ends with 1 where no smaller part keeps the share.

    Example: ws trim tiny --keep-behaviour 0.9 --save trimmed.safetensors

    Args:
        run: a run's folder (of a seed, or its weight_diff or v7b), a w.safetensors, or tiny.
        keep_behaviour: the share of the effect to keep, above 0, at most 1.
        behavior: a shipped behaviour, or its file (default: the one that the run names).
        model: the base model (default: the one that the run names).
        save: a new .safetensors file for the trimmed w; a table of every part that was tried (.tsv) goes beside it.
    """
    from ws.data import load_behavior
    from ws.diff import save_diff
    from ws.show.tables import write_table
    from ws.use.run import read_run
    from ws.use.trim import trim as search

    here = typed_in()
    if not 0 < keep_behaviour <= 1:
        raise ValueError(f"--keep-behaviour {keep_behaviour:g}: must be above 0, at most 1")
    file = here / save if save else None
    if file and (file.suffix != ".safetensors" or file.exists()):
        raise ValueError(f"--save {file}: give a new file that ends in .safetensors")
    found = read_run(run, here)
    named = found.behavior(behavior)
    about = load_behavior(here / named if (here / named).is_file() else named)
    done = search(found.model(here, model), found.w, about, keep_behaviour)
    print(done.text())
    if file:
        print(f"parts tried: {write_table(done.path, file.with_suffix('.tsv'))}")
    if done.state is None:
        return 1
    if file:
        print(f"trimmed: {save_diff(done.w, file)}")
    print(f"as an adapter: ws export {run} --as peft {done.state.options()}")
    return 0


def generate(
    run: Run,
    prompts: Positional[Annotated[tuple[str, ...], arg(metavar="PROMPT")]],
    /,
    alpha: str = "-1,0,1",
    system: str = "",
    max_new_tokens: int = 64,
    sample: bool = False,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    model: str = "",
    dtype: str = "",
) -> int:
    """Print what the model answers at several strengths: side by side in a terminal, in blocks elsewhere.

    Example: ws generate tiny --alpha -1,0,1 "Is it true that the earth is flat?"

    Args:
        run: a run's folder (of a seed, or its weight_diff or v7b), a w.safetensors, or tiny.
        prompts: what the user says; - reads it from standard input.
        alpha: strengths, 0 is the base model.
        system: a system prompt.
        max_new_tokens: tokens of an answer at most.
        sample: draw answers instead of taking the most probable token.
        temperature: of --sample.
        top_p: of --sample, the mass of the nucleus.
        seed: of --sample, the same for every strength.
        model: the base model (default: the one that the run names).
        dtype: auto, float32, bfloat16, float16 (default: that of the run).
    """
    from ws.use.run import read_run
    from ws.use.talk import Writing, answers, beside, numbers

    here, alphas = typed_in(), numbers(alpha)
    writing = Writing(max_new_tokens, sample, temperature, top_p, seed)
    found = read_run(run, here)
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    if not alphas or not texts or not all(text.strip() for text in texts):
        raise ValueError(
            "a prompt and an alpha are needed: ws generate RUN --alpha -1,0,1 PROMPT, or - for standard input"
        )
    rows = answers(found.model(here, model, dtype), found.w, texts, alphas, system, writing)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    blocks = (f"> {text.strip()}\n\n{beside(row, alphas, width)}" for text, row in zip(texts, rows, strict=True))
    print("\n\n\n".join(blocks))
    return 0


def chat(
    run: Run,
    /,
    alpha: float = 1.0,
    system: str = "",
    max_new_tokens: int = 128,
    sample: bool = False,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    model: str = "",
    dtype: str = "",
) -> int:
    """Talk with the steered model. /alpha X changes the strength, /reset forgets, /quit or the end of the input ends.

    Example: ws chat tiny --alpha 1

    Args:
        run: a run's folder (of a seed, or its weight_diff or v7b), a w.safetensors, or tiny.
        alpha: the strength, 0 is the base model.
        system: a system prompt.
        max_new_tokens: tokens of an answer at most.
        sample: draw answers instead of taking the most probable token.
        temperature: of --sample.
        top_p: of --sample, the mass of the nucleus.
        seed: of --sample.
        model: the base model (default: the one that the run names).
        dtype: auto, float32, bfloat16, float16 (default: that of the run).
    """
    from ws.steer.weights import check_fits
    from ws.use.run import read_run
    from ws.use.talk import COMMANDS, Chat, Writing, number, talk

    here, strength = typed_in(), number(str(alpha))
    writing = Writing(max_new_tokens, sample, temperature, top_p, seed)
    found = read_run(run, here)
    lm = found.model(here, model, dtype)
    check_fits(lm.model, found.w)
    chatting = Chat(lm, found.w, strength, system, writing)
    if sys.stdin.isatty():
        print(f"{lm.name} at alpha {strength:+g}. {COMMANDS}")
    talk(chatting, _typed(chatting), lambda text: print(text, flush=True))
    return 0


def _typed(chatting) -> Iterator[str]:
    """The lines of standard input, with the strength as a prompt in a terminal."""
    while True:
        try:
            yield input(f"{chatting.alpha:+g}> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def inspect(file: Positional[Path], /) -> int:
    """Print norms, ranks, layers and metadata of a weight difference.

    Args:
        file: w.safetensors, a legacy w.pt, or a run's folder.
    """
    from ws.diff import describe, load_diff

    print(describe(load_diff(typed_in() / file)))
    return 0


COMMANDS = (inspect, export, trim, generate, chat)
