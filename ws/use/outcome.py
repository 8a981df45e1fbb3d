"""What one method does at one strength: answers, KL, perplexity and greedy text at both ends, measured once and kept.
(docs/method.md section 8)"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from ws.cache.files import write_text
from ws.cache.keys import stage_key
from ws.cache.made import kept
from ws.cache.sources import code_key
from ws.cache.syntax import digest
from ws.data import Behavior
from ws.model.greedy import greedy_ids
from ws.model.lm import LM
from ws.model.text import chat_text
from ws.model.wide import widened
from ws.steer.answers import answer_scores, answer_tokens
from ws.steer.calibrate import continued_kls, met, opening_texts, probe_rows, quantile, said_kls
from ws.steer.kl import KLs, Unreached, log_probs, token_kls, token_rows
from ws.steer.neutral import passage_rows
from ws.use.items import Group, Size
from ws.use.methods import Method

BATCH, SAMPLES, N_GRAM = 8, 2, 3
WITHIN = 0.05  # of a target


@dataclass(frozen=True, eq=False)
class Task:
    """What every method is measured on. along, q: how KL is matched."""

    lm: LM
    behavior: Behavior
    groups: Sequence[Group]
    size: Size
    along: str
    q: float

    def rows(self, system: str | None = None) -> list[list[int]]:
        """Token ids that KL on fixed texts is taken on: probes of held-out topics, neutral passages."""
        own = probe_rows(self.lm, self.behavior, self.size.topics, self.size.wordings, system)
        return own + passage_rows(self.lm, self.size.passages, system)[0]

    def prompts(self, system: str | None = None) -> list[list[int]]:
        """Token ids of what is gone on from."""
        return token_rows(self.lm, opening_texts(self.lm, self.behavior, self.size.prompts, system))

    @cached_property
    def sources(self) -> str:
        """A hash of the code that measures, taken once."""
        return code_key("ws.use.outcome.measured", "ws.use.methods.methods")

    @cached_property
    def fixed(self) -> KLs:
        """KL at every position of `rows`."""
        return token_kls(self.lm, self.rows())

    @property
    def kls(self) -> KLs:
        """What alpha is calibrated on."""
        return self.fixed if self.along == "texts" else continued_kls(self.lm, self.prompts(), self.size.tokens)


def measured(task: Task, method: Method, target: float | None, cache: Path | None) -> dict:
    """One record: `alpha`, the calibration's `curve`, and `ends`, what `end` finds at +alpha and at -alpha; or `refused`, why
    the target cannot be met. target: nats, None for a method that has no alpha. Kept in `cache`, so that it is measured once.
    """

    def measure() -> dict:
        alpha, curve, known = 1.0, None, (None, None)
        if method.free:
            try:
                found = met(task.kls, method.at, target, along=task.along, q=task.q, within=WITHIN)
            except Unreached as error:
                return {"refused": str(error)}
            alpha, curve = found.alpha, found.curve.rows()
            known = (found.plus, found.minus) if task.along == "texts" else known
        sides = zip((alpha, -alpha), method.systems, known, strict=True)
        return {
            "alpha": alpha if method.free else None,
            "curve": curve,
            "ends": [end(task, method, *side) for side in sides],
        }

    if cache is None or not (model := task.lm.fingerprint):
        return measure()
    asked = [(g.turns, g.words.yes, g.words.no) for g in task.groups]
    texts = digest(repr((asked, task.rows(), task.prompts())).encode())
    params = {
        "model": model,
        "texts": texts,
        "size": asdict(task.size),
        "along": task.along,
        "q": task.q,
        "target": target,
    }
    key = stage_key(
        params | {"name": method.name, "mark": method.mark, "systems": method.systems}, sources=task.sources
    )
    path = cache / "benchmark" / f"{task.behavior.slug}_{key.params[:12]}.json"
    return kept(
        path, key, lambda to: write_text(to, json.dumps(measure())), lambda at: json.loads(at.read_text("utf-8"))
    )


def end(task: Task, method: Method, alpha: float, system: str | None, kl: float | None = None) -> dict:
    """One end: `ratio` and `pmass`, per set A rows of n; the q-quantile of KL(steered || base) on fixed texts, `kl`, and
    along the greedy continuation, `said_kl`, nats; `nll`, of each passage (nats, tokens); `repeats`, of each continuation the
    share of its token trigrams that it has said before; `said`, the first continuations. kl: where it is known."""
    lm, found = task.lm, {"ratio": {}, "pmass": {}}
    prompts, (rows, starts) = task.prompts(system), passage_rows(lm, task.size.passages, system)
    with widened(lm.model), method.at(alpha):
        for group in task.groups:
            words = answer_tokens(lm.tokenizer, group.words)
            flat = [chat_text(lm.tokenizer, text, system) for row in group.turns for text in row]
            answers = answer_scores(lm, flat, *words)
            for name, values in (("ratio", answers.logratio), ("pmass", answers.pmass)):
                found[name][group.name] = values.reshape(len(group.turns), -1).tolist()
        found["nll"] = [
            one for i in range(0, len(rows), BATCH) for one in _nll(lm, rows[i : i + BATCH], starts[i : i + BATCH])
        ]
        said = greedy_ids(lm, prompts, task.size.tokens)
    if kl is None:
        fixed = token_kls(lm, *aligned(task.rows(), task.rows(system)), budget=0) if system else task.fixed
        kl = quantile(fixed(method.at, alpha), task.q)
    along = said_kls(lm, task.prompts(), said, method.at, alpha, prompts)
    texts = lm.tokenizer.batch_decode(said[:SAMPLES], skip_special_tokens=True)
    more = {"kl": kl, "said_kl": quantile(along, task.q), "repeats": [repeated(row) for row in said]}
    return found | more | {"said": [text.strip() for text in texts]}


def _nll(lm: LM, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[tuple[float, int]]:
    """Of each row, from where its own text begins: the negative log-likelihood, nats, and the number of tokens."""
    logp, owner = log_probs(lm, rows, [start - 1 for start in starts])
    targets = torch.tensor([t for row, start in zip(rows, starts, strict=True) for t in [*row[start:], 0]])
    each = -logp.gather(1, targets[:, None].to(logp.device))[:, 0].double().cpu()
    parts = [each[owner.cpu() == i][:-1] for i in range(len(rows))]  # what follows the last token is not asked
    return [(float(part.sum()), len(part)) for part in parts]


def aligned(
    base: Sequence[Sequence[int]], steered: Sequence[Sequence[int]]
) -> tuple[list, list[int], tuple[list, list[int]]]:
    """Rows, where the end that they have in common with the steered side's begins, and the same of these: what a system
    prompt puts before has no counterpart."""
    same = [next((i for i, (a, b) in enumerate(zip(r[::-1], s[::-1], strict=False)) if a != b), min(len(r), len(s)))
            for r, s in zip(base, steered, strict=True)]  # fmt: skip
    first = [[len(row) - n for row, n in zip(rows, same, strict=True)] for rows in (base, steered)]
    return list(base), first[0], (list(steered), first[1])


def repeated(ids: Sequence[int], n: int = N_GRAM) -> float:
    """The share of a text's n-grams of tokens that it has said before, `1 - distinct / all`; 0 for fewer than n tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
