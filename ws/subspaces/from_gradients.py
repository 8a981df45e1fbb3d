"""Candidates read off the base model's gradient on texts, before anything is trained. (docs/method.md section 12)

They see texts and no adapter: `pairs` are those that adapters are trained on, `other pairs` are not.
"""

from ws.subspaces.algebra import Basis, empty, left_svd
from ws.subspaces.candidate import candidate
from ws.subspaces.materials import Materials

GRADIENT = "gradient"
TRAIN, TOPICS, WORDINGS, PROBE, ANSWER = "training pairs", "held-out topics", "other wordings", "probes", "answer"
OTHERS = "other behaviours"
PAIRS, OTHER, PROMPTS = ("weights", "pairs"), ("weights", "other pairs"), ("weights", "prompts")


def _top(m: Materials, texts: str, kind: str, side: str, l: int) -> Basis:
    """Top-k left singular vectors of what the gradient's root at layer l is the root of."""
    root = m.gradients(texts).roots.get((kind, side, l))
    return empty(m.d, "no gradient was taken at this layer") if root is None else left_svd(root, m.k)


@candidate(family="grad:contrast", source="gradient", sees=PAIRS)
def grad_contrast(m: Materials, l: int) -> Basis:
    """Top 8 left singular vectors of [D_o/|D_o| | D_down/|D_down|], D = grad(L_neg - L_pos) on training pairs: where one step on
    both adapters moves w."""
    return _top(m, TRAIN, "contrast", "write", l)


@candidate(family="grad:control", source="gradient", sees=PAIRS)
def grad_sum(m: Materials, l: int) -> Basis:
    """The same of grad(L_pos + L_neg): where any fine-tuning on these texts would act."""
    return _top(m, TRAIN, "sum", "write", l)


@candidate(family="grad:contrast", source="gradient", sees=OTHER)
def grad_contrast_heldout_topics(m: Materials, l: int) -> Basis:
    """grad_contrast of pairs about topics that no adapter is trained on (EVAL asks about them), in the wordings of training."""
    return _top(m, TOPICS, "contrast", "write", l)


@candidate(family="grad:contrast", source="gradient", sees=OTHER)
def grad_contrast_other_wording(m: Materials, l: int) -> Basis:
    """grad_contrast of pairs about topics that no adapter is trained on (EVAL asks about them), in wordings that none is trained
    on either."""
    return _top(m, WORDINGS, "contrast", "write", l)


@candidate(family="grad:probe", source="gradient", sees=PROMPTS)
def grad_probe(m: Materials, l: int) -> Basis:
    """Top 8 left singular vectors of the gradient of log P(no) - log P(yes) over the FIT probes, o and down side by side, each
    divided by its norm."""
    return _top(m, PROBE, "contrast", "write", l)


@candidate(family="grad:control", source="gradient", sees=PROMPTS)
def grad_answer(m: Materials, l: int) -> Basis:
    """The same of -log P(yes) alone: a mere Yes, whatever was asked."""
    return _top(m, ANSWER, "contrast", "write", l)


@candidate(family="grad:control", source="gradient", sees=OTHER)
def grad_other_behavior(m: Materials, l: int) -> Basis:
    """grad_contrast of the training pairs of other behaviours, all together: what is no matter of this behaviour."""
    return _top(m, OTHERS, "contrast", "write", l)


def _null(number: int) -> None:
    @candidate(family="grad:control", name=f"grad_null_{number}", source="gradient", sees=PAIRS)
    def grad_null(m: Materials, l: int) -> Basis:
        """grad_contrast with the two answers of each pair swapped by a fair coin: these texts without the behaviour."""
        return _top(m, TRAIN, f"null {number - 1}", "write", l)


for _number in range(1, 9):
    _null(_number)


@candidate(family="grad:read", source="gradient", sees=PAIRS)
def grad_contrast_read(m: Materials, l: int) -> Basis:
    """Top 8 right singular vectors of [D_q; D_k; D_v; D_gate; D_up], each divided by its norm, on training pairs."""
    return _top(m, TRAIN, "contrast", "read", l)


@candidate(family="grad:read", source="gradient", sees=OTHER)
def grad_contrast_heldout_topics_read(m: Materials, l: int) -> Basis:
    """grad_contrast_read of pairs about topics that no adapter is trained on, in the wordings of training."""
    return _top(m, TOPICS, "contrast", "read", l)


@candidate(family="grad:read", source="gradient", sees=OTHER)
def grad_contrast_other_wording_read(m: Materials, l: int) -> Basis:
    """grad_contrast_read of pairs about topics that no adapter is trained on, in wordings that none is trained on either."""
    return _top(m, WORDINGS, "contrast", "read", l)


@candidate(family="grad:read", source="gradient", sees=PROMPTS)
def grad_probe_read(m: Materials, l: int) -> Basis:
    """grad_probe on the read side: right singular vectors of q, k, v, gate and up."""
    return _top(m, PROBE, "contrast", "read", l)


USES = {  # what is left out where there is no such text
    "grad_other_behavior": OTHERS,
    "grad_contrast_heldout_topics": TOPICS, "grad_contrast_heldout_topics_read": TOPICS,
    "grad_contrast_other_wording": WORDINGS, "grad_contrast_other_wording_read": WORDINGS,
}  # fmt: skip
