"""The command line: which command was typed, and one line where it is none."""

import io
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial, wraps
from pathlib import Path

import tyro


def parsed(commands: dict[str, Callable[..., int]], args: list[str] | None) -> Callable[[], int]:
    """The command that was typed, ready to be called. ValueError, one line, where it is none: tyro says it in a box."""

    def later(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
        return wraps(command)(lambda *given, **named: partial(command, *given, **named))

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                {name: later(command) for name, command in commands.items()},
                prog="ws",
                description="Weight steering, and the subspaces that explain it.",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as ended:
        if not ended.code:
            raise  # help was asked for
        typed = next((word for word in args or sys.argv[1:] if word in commands), "")
        raise ValueError(f"{unboxed(said.getvalue())}; see ws {typed and typed + ' '}--help") from None


def unboxed(box: str) -> str:
    """What a message of tyro's says is wrong, and what is near, in one line."""
    lines = [re.sub(r"^[\s│|]+|[\s│|]+$", "", line) for line in box.splitlines()[1:]]
    parts = re.sub(r"^[─╰╯+-]+$", "\f", "\n".join(lines), flags=re.MULTILINE).split("\f")
    wrong, *more = [part.strip() for part in parts if part.strip()] or [box]
    near = re.findall(r"^--[\w-]+", "\n".join(part for part in more if part.startswith("Perhaps")), re.MULTILINE)
    known = [part for part in more if part.startswith("Available")]
    found = [wrong.partition("\n\n")[0], *known, *(f"did you mean {name}?" for name in near[:1])]
    told = "; ".join(" ".join(part.split()).removesuffix(".") for part in found)
    return told.replace("Expected 2 values", "Expected 2 values: KEY VALUE")


def stem(notebook: str) -> str:
    """A notebook's name, however it was typed: v7_sweep, nbs/v7_sweep.ipynb."""
    return Path(notebook).name.removesuffix(".ipynb").removesuffix(".py")
