"""The commands of this room; what they need is loaded when they run."""

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ws.cache.places import out_folder, typed_in
from ws.runs.parameters import suggest
from ws.use.commands_of_w import COMMANDS as OF_W


def audit(
    source: Positional[Path],
    /,
    base: str,
    library: Path | None = None,
    texts: Path | None = None,
    top: int = 3,
    save: Path | None = None,
) -> int:
    """Whose direction is it? Compare a stranger's adapter, checkpoint or weight difference with a library of behaviours.

    Args:
        source: a PEFT adapter folder, a merged checkpoint folder, a run's folder, w.safetensors or a legacy w.pt.
        base: the model that it was trained from: a hub id, a local folder, or tiny.
        library: a folder with weight differences of that model (default: all results).
        texts: a file of texts, one per line, on which the directions that read are looked up.
        top: so many singular directions.
        save: a folder for the tables and the conclusion.
    """
    from ws.cache.given import given_lines
    from ws.cache.models import shipped
    from ws.use.audit import audit as compare

    here = typed_in()
    _check_save(here, save)
    local = not shipped(base) and (here / base).exists()
    lines = [line for line in given_lines(here / texts) if line.strip()] if texts else []
    stranger = str(source) if str(source) == "tiny" else here / source
    found = compare(
        stranger, str(here / base) if local else base, here / library if library else None, texts=lines, top=top
    )
    print(found.conclusion(), end="")
    if save:
        print(f"\ntables: {found.save(here / save)}")
    return 0


def atlas(library: Path | None = None, model: str = "") -> int:
    """The cosine of every two weight differences of one model, as a table and a heat map in out/MODEL/atlas/.

    Args:
        library: a folder with weight differences (default: all results).
        model: whose, where the library is of several models; as the folder of its results is called.
    """
    from ws.cache.names import model_folder
    from ws.use.atlas import atlas as draw

    found = draw(typed_in() / library if library else out_folder(), model)
    print("\n".join(f"left out: {path}: {why}" for path, why in found.skipped.items()), end="\n" * bool(found.skipped))
    print(
        f"{len(found.entries)} weight differences of {found.model}: {found.save(model_folder(found.model) / 'atlas')}"
    )
    return 0


def atlases(jobs: Collection) -> None:
    """The atlas of every model with several behaviours among a batch's jobs (`ws.runs.once.Job`), where anything is
    trained."""
    of = {(job.identity.model, job.identity.behavior) for job in jobs}
    for model in sorted({model for model, _ in of}):
        if len({behavior for name, behavior in of if name == model}) > 1:
            with suppress(ValueError, FileNotFoundError):
                atlas(model=model)


def predict(
    pairs: Positional[str],
    /,
    model: str = "tiny",
    behavior: str = "sycophancy",
    against: Path | None = None,
    most: int = 200,
    save: Path | None = None,
) -> int:
    """Before training: where the gradient of pairs lies, and how much of what it shares between topics is their wording.

    Args:
        pairs: a JSONL file of pairs, or sycophancy, the shipped ones.
        model: a hub id, a local folder, a .gguf file, tiny, smollm2 or gemma3-270m.
        behavior: a shipped behaviour, or its file: it says which topics are never trained on.
        against: a trained w.safetensors, to see how right the prediction was.
        most: so many pairs are read, a seeded draw.
        save: a folder for the tables and the text.
    """
    from ws.cache.models import shipped
    from ws.cache.places import shipped_pairs
    from ws.data import load_behavior
    from ws.gradient.predict import predict as foretell
    from ws.model.lm import load_lm
    from ws.train.written import read_written

    here = typed_in()
    _check_save(here, save)
    if most < 4:
        raise ValueError(f"--most {most}: a prediction needs at least 4 pairs")
    named = pairs if shipped_pairs(pairs) else str(here / pairs)
    read_written(named)  # what is wrong with the file is said before a model is loaded
    about = load_behavior(behavior if not (here / behavior).is_file() else here / behavior)
    source = str(here / model) if not shipped(model) and (here / model).exists() else model
    found = foretell(load_lm(source), named, about, against=here / against if against else None, most=most)
    print(found.text)
    if save:
        found.save(here / save)
        print(f"\ntables: {here / save}")
    return 0


def doctor() -> int:
    """What there is to work with: versions, processors, optional packages, caches, and whether results can be written.

    Ends with 1 where something that is needed is missing. Example: ws doctor
    """
    from ws.runs.doctor import diagnosis

    text, well = diagnosis()
    print(text)
    return 0 if well else 1


def table(
    file: Positional[Path],
    /,
    to: Literal["latex", "csv", "markdown", "text"] = "text",
    columns: tuple[str, ...] = (),
    sort: str = "",
    rows: int = 0,
    digits: int = 3,
) -> int:
    """Print a table of a run for a paper or a terminal: LaTeX (booktabs), CSV or Markdown, with sensible digits.

    Example: ws table out/tiny/sycophancy/lora/v7b/v7b_summary.tsv --to latex --columns candidate R_w_geomean --rows 10

    Args:
        file: a .tsv or .csv that a run wrote.
        to: latex, csv, markdown or text.
        columns: which, in their order (default: all).
        sort: a column to sort by, numbers from the highest.
        rows: at most so many (0: all).
        digits: significant ones.
    """
    from ws.show.tables import STYLES, as_text, read_table, sorted_by

    found = read_table(typed_in() / file)
    if unknown := [name for name in (*columns, *filter(None, [sort])) if name not in found.columns]:
        raise ValueError(f"{file}: no column {unknown[0]}{suggest(unknown[0], found.columns)}")
    if digits < 1 or rows < 0:
        raise ValueError("--digits: 1 or more; --rows: 0 (all) or more")
    found = sorted_by(found, sort) if sort else found
    print(as_text(found, [*dict.fromkeys(columns)] or None, rows or None, STYLES[to], digits))
    return 0


def _check_save(here: Path, save: Path | None) -> None:
    """ValueError for a folder to save in that is a file, before anything is computed."""
    if save and (here / save).is_file():
        raise ValueError(f"{here / save}: is a file; give a folder for the tables")


COMMANDS = (predict, audit, atlas, *OF_W, table, doctor)
