"""What a steered model says, beside what the base model says, and a conversation with it. (docs/use.md)

`W + alpha w` acts while an answer is written and not a moment longer; alpha 0 is the base model.
"""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ws.diff import WeightDiff
from ws.model.generate import write_answers
from ws.model.lm import LM
from ws.model.text import chat_text
from ws.steer.weights import weight_steer
from ws.use.run import MOST

NARROWEST = 24  # characters of a column, under which answers stand below each other
COMMANDS = "/alpha X: another strength, /reset: forget what was said, /quit: end"
Turn = dict[str, str]


@dataclass(frozen=True)
class Writing:
    """How answers are written. sample: drawn at `temperature` from the nucleus of mass `top_p`, with `seed`; else greedy."""

    max_new_tokens: int = 64
    sample: bool = False
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self):
        for name, value, fine, expected in (
            ("max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature, 0 < self.temperature < float("inf"), "above 0"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", self.seed, 0 <= self.seed < 1 << 63, "0 or more"),
        ):
            if not fine:
                raise ValueError(f"--{name} {value}: must be {expected}")

    def __call__(self, lm: LM, w: WeightDiff, alpha: float, prompts: list[str], seed: int | None = None) -> list[str]:
        """Answers to rendered prompts under `alpha w`."""
        hot = self.temperature if self.sample else 0
        with weight_steer(lm.model, w, alpha):
            return write_answers(lm, prompts, self.max_new_tokens, hot, self.top_p, self.seed if seed is None else seed)


def answers(
    lm: LM,
    w: WeightDiff,
    prompts: Sequence[str],
    alphas: Sequence[float],
    system: str = "",
    writing: Writing = Writing(),
) -> list[list[str]]:
    """Per prompt the answer at each alpha. prompts: what the user says, put in the chat template. ValueError for an empty
    prompt, for no alpha, and as `weight_steer` and `chat_text` raise."""
    if not alphas:
        raise ValueError("no alpha is given; such as --alpha -1,0,1")
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty; give a text, or - to read it from standard input")
    texts = [chat_text(lm.tokenizer, prompt, system or None) for prompt in prompts]
    for text in texts:
        _fits(lm, text, writing)
    columns = [writing(lm, w, alpha, texts) for alpha in alphas]
    return [list(row) for row in zip(*columns, strict=True)]


def _fits(lm: LM, text: str, writing: Writing, say: bool = True) -> bool:
    """Whether a rendered prompt and its answer fit the model's context; ValueError where not, if `say`."""
    most = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    long = len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    if say and long + writing.max_new_tokens > most:
        raise ValueError(
            f"the prompt has {long:,} tokens, with {writing.max_new_tokens} of the answer more than the {most:,} that {lm.name}"
            " reads; shorten it, or lower --max-new-tokens"
        )
    return long + writing.max_new_tokens <= most


def beside(texts: Sequence[str], alphas: Sequence[float], width: int = 0) -> str:
    """Answers side by side in columns that fill `width` characters; below each other where that is 0 or too narrow."""
    heads = [f"alpha {alpha:+g}" if alpha else "alpha 0 (base model)" for alpha in alphas]
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    if each < NARROWEST:
        return "\n\n".join(f"[{head}]\n{text}" for head, text in zip(heads, texts, strict=True))
    columns = [
        [*textwrap.wrap(head, each), "-" * each, *_wrapped(text, each)] for head, text in zip(heads, texts, strict=True)
    ]
    tall = max(map(len, columns))
    rows = zip(*(column + [""] * (tall - len(column)) for column in columns), strict=True)
    return "\n".join(" | ".join(cell.ljust(each) for cell in row).rstrip() for row in rows)


def _wrapped(text: str, width: int) -> list[str]:
    return [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]


def conversation(tokenizer, turns: Sequence[Turn], system: str = "") -> str:
    """Turns `{"role", "content"}` rendered by the chat template up to the next answer. A system text stands before the first
    user turn where the template has no such role, as in `chat_text`."""
    messages, first = [dict(turn) for turn in turns], turns[0]["content"]
    together = chat_text(
        tokenizer, f"{system}\n\n{first}" if system else first
    )  # refuses a tokenizer without a template
    if system and chat_text(tokenizer, first, system) == together:
        messages[0]["content"] = f"{system}\n\n{first}"
    elif system:
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


@dataclass
class Chat:
    """A conversation with the model under `alpha w`."""

    lm: LM
    w: WeightDiff
    alpha: float
    system: str = ""
    writing: Writing = field(default_factory=Writing)
    turns: list[Turn] = field(default_factory=list)

    def answer(self, text: str) -> str:
        """What the model says next. The oldest turns are forgotten where the conversation no longer fits; ValueError, the
        conversation as it was, where this turn alone does not."""
        turns = [*self.turns, {"role": "user", "content": text}]
        while not _fits(
            self.lm, prompt := conversation(self.lm.tokenizer, turns, self.system), self.writing, len(turns) == 1
        ):
            turns = turns[2:]
        said = self.writing(self.lm, self.w, self.alpha, [prompt], self.writing.seed + len(turns) // 2)[0]
        self.turns = [*turns, {"role": "assistant", "content": said}]
        return said

    def command(self, line: str) -> str:
        """What a line that begins with / does, in words. ValueError for one that is no command."""
        word, _, rest = line.partition(" ")
        if word == "/reset" and not rest.strip():
            self.turns = []
            return "what was said is forgotten"
        if word == "/alpha":
            self.alpha = number(rest)
            return f"alpha is {self.alpha:+g} from here on"
        raise ValueError(f"{line!r}: no command; {COMMANDS}")


def talk(chat: Chat, lines: Iterable[str], say: Callable[[str], None]) -> None:
    """Answer line by line until /quit or the last line."""
    for line in map(str.strip, lines):
        if line == "/quit":
            return
        if not line:
            continue
        before = len(chat.turns)
        try:
            say(chat.command(line) if line.startswith("/") else chat.answer(line))
            if not line.startswith("/") and len(chat.turns) < before + 2:
                say("(the oldest turns no longer fit and are forgotten)")
        except ValueError as error:
            say(f"error: {error}")


def number(text: str) -> float:
    """A finite number; ValueError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < MOST:
        raise ValueError(f"alpha {text.strip()!r}: expected a finite number, such as -1 or 0.5")
    return value


def numbers(text: str) -> list[float]:
    """`-1,0,1` as numbers."""
    return [number(part) for part in text.split(",") if part.strip()]
