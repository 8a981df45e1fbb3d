"""What is compared in a benchmark of steering: each method is a name, `alpha -> context`, and what it is in words.

    weights      W + alpha u        u = w, parts of w, t+, -t-, the base model's gradient, a random direction
    activations  h_l + alpha v      v = mean over topics and personas of h(pos) - h(neg) at the last token
    logits       W(h' - h) + ...    a theta head, fitted towards the behaviour's answers on training topics
    prompt       persona system prompts at both ends, no alpha;  the adapters as trained, no alpha

(docs/method.md section 8)
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ws.cache.files import write_text
from ws.cache.keys import stage_key
from ws.cache.made import kept
from ws.cache.syntax import digest
from ws.causal.variants import check_bases, gains, keep, writers
from ws.data import Behavior
from ws.diff import WeightDiff, task_vectors
from ws.diff.algebra import random_as
from ws.gradient.diff import as_diff, contrasts
from ws.model.lm import LM
from ws.model.text import chat_text
from ws.model.wide import widened
from ws.steer.answers import answer_scores, answer_tokens
from ws.steer.calibrate import met
from ws.steer.kl import Steering, Unreached, as_steering, token_kls, token_rows
from ws.steer.stream import pushed
from ws.subspaces.reading import read_texts
from ws.theta.fit import FitConfig, fit_adam
from ws.theta.heads import CVH, svd_basis
from ws.theta.live import check_plain_logits, wear
from ws.theta.recorded import Recorded
from ws.theta.states import UserText, record_states

D_THETA = 64
MOST_TOPICS, FEW = 20, 8  # training topics on which is chosen; of which KL is taken there
LATER = ("gradient", "theta head", "nothing", "persona prompt", "mean difference")
Ends = tuple[str | None, str | None]  # system prompts at the positive and at the negative end


@dataclass(frozen=True, eq=False)
class Method:
    """at: alpha -> a context. mark: all that the numbers depend on beside the model and what is asked. free: whether alpha is
    calibrated; else the method is what it is at its two ends, +1 and -1. systems: its system prompts there."""

    name: str
    what: str
    at: Steering
    mark: str
    free: bool = True
    systems: Ends = (None, None)


def nothing(_alpha: float) -> nullcontext:
    """No steering."""
    return nullcontext()


def methods(
    lm: LM,
    behavior: Behavior,
    w: WeightDiff,
    *,
    adapters: tuple[Path, Path] | None = None,
    gradient: WeightDiff | Sequence | None = None,
    best: tuple[str, Mapping[int, Tensor]] | None = None,
    fold_gain: bool = True,
    more: Mapping[str, WeightDiff] | None = None,
    personas: int = 5,
    layers: int = 6,
    target: float = 0.1,
    seed: int = 0,
    cache: Path | None = None,
) -> tuple[list[Method], dict[str, str]]:
    """All methods that can be had, and why the others cannot. adapters: folders of the positive and the negative one.
    gradient: D of the training pairs, or the pairs (`ws.gradient.diff`). best: a candidate's name and its bases, for every
    layer that w has a writer in; fold_gain: whether these are of what leaves the norm on a block's output. more: further
    weight differences. personas: how many pairs are tried and read. layers: how many, evenly spaced, are tried for activation
    steering; target: the KL at which they are compared. seed: of the random direction. ValueError for what does not fit, and
    for a name that is taken."""
    found, left = [], {}

    def weights(name: str, what: str, make: Callable[[], WeightDiff]) -> None:
        try:
            u = make()
        except ValueError as error:
            left[name] = str(error)
        else:
            found.append(Method(name, what, as_steering(lm, u), u.fingerprint))

    weights("w", "the whole difference", lambda: w)
    weights("w, writers", "o_proj and down_proj of w", lambda: writers(w))
    weights("w, v_proj", "v_proj of w", lambda: _some(w, ".v_proj.weight"))
    if best:
        bases, norms = check_bases(*best, w, lm.decoder.d), gains(lm.decoder, w, fold_gain)
        weights(f"w, {best[0]}", "what the candidate keeps of the writers", lambda: keep(w, bases, norms))
    else:
        left["w, best candidate"] = "no bases were given"
    if adapters:
        pos, neg = task_vectors(*adapters, lm.model)
        weights("t+", "the positive adapter alone, at both signs", lambda: pos)
        weights("t-, reversed", "the negative adapter alone, at both signs: W - alpha t-", lambda: neg.scale(-1.0))
        at, mark = partial(as_trained, lm, pos, neg), f"{pos.fingerprint} {neg.fingerprint}"
        found.append(Method("adapters", "as trained: t+ at one end, t- at the other", at, mark, free=False))
    else:
        left |= dict.fromkeys(("t+", "t-, reversed", "adapters"), "no adapters were given")
    weights("mag_only", "a random direction with w's norms", lambda: random_as(w, seed))
    for name, u in (more or {}).items():
        if name in {m.name for m in found} | {*left, *LATER}:
            raise ValueError(f"more: {name!r} is a method already; give it another name")
        found.append(Method(name, "given", as_steering(lm, u), u.fingerprint))
    if gradient is None:
        left["gradient"] = "no gradient and no pairs were given"
    else:
        given = isinstance(gradient, WeightDiff)
        D = gradient if given else contrasts(lm, gradient, w, cache=cache, progress=False)[0]
        weights("gradient", "the base model's gradient on training pairs, w's norms", lambda: as_diff(D, w))
    try:
        found.append(theta_head(lm, behavior, cache))
    except ValueError as error:
        left["theta head"] = str(error)
    first = [Method("nothing", "the base model", nothing, "", free=False)]
    if pairs := behavior.persona_pairs[:personas]:
        first += _of_personas(lm, behavior, pairs, evenly(lm.decoder.n_layers, layers), target, cache)
    else:
        left |= dict.fromkeys(("persona prompt", "mean difference"), f"{behavior.name} has no personas")
    return first + found, left


def _of_personas(
    lm: LM,
    behavior: Behavior,
    pairs: Sequence[tuple[str, str]],
    layers: Sequence[int],
    target: float,
    cache: Path | None,
) -> list[Method]:
    best = chosen_on_training(lm, behavior, pairs, layers, target, cache)
    l, v, systems = best["layer"], torch.tensor(best["v"]), pairs[best["persona"]]
    prompt = f"persona pair {best['persona'] + 1} of {len(pairs)}, the best on training topics"
    tried = ", ".join(f"{at}: {effect:+.2f}" for at, effect in best["tried"])
    told = f"activations at layer {l}, the best on training topics (effects {tried})"
    return [
        Method("persona prompt", prompt, nothing, repr(systems), free=False, systems=systems),
        Method("mean difference", told, partial(pushed, lm, l, v), f"{l} {_hash(v)}"),
    ]


def _hash(x: Tensor) -> str:
    return digest(x.numpy().tobytes())


def evenly(L: int, n: int) -> list[int]:
    """Up to n of L layers, evenly spaced, neither end among them where there are enough."""
    return sorted({round((i + 1) * (L - 1) / (n + 1)) for i in range(n)})


def _some(w: WeightDiff, ending: str) -> WeightDiff:
    if not len(part := w.select(lambda name: name.endswith(ending))):
        raise ValueError(f"w changes no {ending.split('.')[1]}")
    return part


def as_trained(lm: LM, pos: WeightDiff, neg: WeightDiff, alpha: float):
    """The base with one adapter merged in, by alpha's sign, whatever its size; at 0 the base."""
    return as_steering(lm, pos if alpha > 0 else neg)(float(alpha != 0))


def _asked(behavior: Behavior) -> tuple[list[str], Float[Tensor, " n"]]:
    """The probes about the first training topics, and +1 or -1 for each: whether the yes-word is the behaviour's."""
    topics = behavior.train_topics[:MOST_TOPICS]
    answers = behavior.answers[: len(topics)] or behavior.yes[:1] * len(topics)
    sides = torch.tensor([2.0 * (answer in behavior.yes) - 1 for answer in answers])
    return [behavior.probe_text(topic.claim) for topic in topics], sides


def _effect(lm: LM, behavior: Behavior, at: Steering, alpha: float, systems: Ends = (None, None)) -> float:
    """Mean over the training topics of the behaviour's log-ratio at +alpha minus that at -alpha, nats."""
    texts, sides = _asked(behavior)
    words, found = answer_tokens(lm.tokenizer, behavior), []
    for system, s in zip(systems, (1, -1), strict=True):
        turns = [chat_text(lm.tokenizer, text, system) for text in texts]
        with widened(lm.model), at(s * alpha):
            found.append(float((answer_scores(lm, turns, *words).logratio * sides).mean()))
    return found[0] - found[1]


def persona_vectors(lm: LM, behavior: Behavior, pairs: Sequence[tuple[str, str]]) -> Float[Tensor, "L d"]:
    """Per layer the mean, over training topics and persona pairs, of the block's output at the probe's last token under the
    positive persona minus that under the negative one."""
    texts, _ = _asked(behavior)
    means = []
    for side in (0, 1):
        turns = [chat_text(lm.tokenizer, text, pair[side]) for pair in pairs for text in texts]
        with widened(lm.model):
            means.append(read_texts(lm, turns, False, max_length=4096, label="personas").resid.mean(dim=1))
    return means[0] - means[1]


def chosen_on_training(
    lm: LM,
    behavior: Behavior,
    pairs: Sequence[tuple[str, str]],
    layers: Sequence[int],
    target: float,
    cache: Path | None,
) -> dict:
    """What is chosen on training topics: `persona`, the index of the pair with the largest effect; `layer`, that whose
    `persona_vectors` have the largest effect where +alpha meets the target, roughly, on the probes of a few of the topics;
    its vector `v`; the effects of all layers, `tried`. ValueError where no layer can meet it. Kept in `cache`."""

    def choose() -> dict:
        by_pair = [_effect(lm, behavior, nothing, 0.0, pair) for pair in pairs]
        V, tried = persona_vectors(lm, behavior, pairs), {}
        kls = token_kls(lm, token_rows(lm, [chat_text(lm.tokenizer, text) for text in _asked(behavior)[0][:FEW]]))
        for l in layers:
            at = partial(pushed, lm, l, V[l])
            with suppress(Unreached):
                tried[l] = _effect(lm, behavior, at, met(kls, at, target, sign="+", within=0.1).alpha)
        if not tried:
            tried_at = ", ".join(map(str, layers))
            raise ValueError(
                f"activation steering: at none of the layers {tried_at} KL comes to {target:.3g} nats; use another target"
            )
        l = max(tried, key=tried.get)
        return {"persona": int(np.argmax(by_pair)), "layer": l, "v": V[l].tolist(), "tried": list(tried.items())}

    if cache is None or not (model := lm.fingerprint):
        return choose()
    turns = [chat_text(lm.tokenizer, text) for text in _asked(behavior)[0]]
    params = {"model": model, "texts": digest(repr((turns, pairs, behavior.yes, behavior.no)).encode())}
    key = stage_key(params | {"layers": list(layers), "target": target}, code=["ws.use.methods.chosen_on_training"])
    path = cache / "benchmark" / f"{behavior.slug}_chosen_{key.params[:8]}.json"
    return kept(
        path, key, lambda to: write_text(to, json.dumps(choose())), lambda at: json.loads(at.read_text("utf-8"))
    )


def theta_head(lm: LM, behavior: Behavior, cache: Path | None = None) -> Method:
    """A theta of 64 numbers on the unembedding's top singular directions (`svd_cvh`, section 10), fitted towards the answers
    that show the behaviour on the training topics under every wording; alpha scales what it adds to the logits. ValueError
    for a model whose logits are not `W h`."""
    check_plain_logits(lm.model)
    topics, each = behavior.train_topics[:MOST_TOPICS], range(len(behavior.templates))
    words = behavior.answers[: len(topics)] or behavior.yes[:1] * len(topics)
    texts = [
        UserText("all", behavior.probe_text(t.claim, a), word)
        for a in each
        for t, word in zip(topics, words, strict=True)
    ]
    W, bias = lm.decoder.unembed(), lm.decoder.unembed_bias()
    path = cache and cache / "benchmark" / f"{behavior.slug}_answers.safetensors"
    basis = svd_basis(W, min(D_THETA, lm.decoder.d))
    head = CVH(basis.T.contiguous(), basis, 0.1, "svd_cvh")
    with widened(lm.model):
        train = Recorded({"all": record_states(lm, texts, path=path, progress=False)}, W, bias)
    theta = fit_adam(train.problem(head, expand=False), FitConfig(gamma=1.0, beta=0.0, steps=60))[0].theta
    told = f"{len(theta)} numbers on the last hidden state, fitted on {len(texts)} training probes"
    return Method("theta head", told, lambda alpha: wear(lm.model, head, theta, alpha), _hash(theta))
