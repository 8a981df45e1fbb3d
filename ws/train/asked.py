"""What scores ask about, and whether a w was trained on it: claims compared whatever their case, blanks and final punctuation.

The metadata of a trained w holds `trained_on`, marks of the claims that it was trained on, and `topics`, a hash of the
behaviour's topics (claim, question, answer) that these are; of pairs from a file there is none.
"""

from collections.abc import Sequence

from ws.cache.given import short
from ws.cache.syntax import digest
from ws.data import Behavior

MARK = 12  # hex digits


def alike(text: str) -> str:
    """What two spellings of a claim have in common."""
    plain = " ".join(text.casefold().split())
    return plain.rstrip(" .!?,;:") or plain


def asked(behavior: Behavior) -> dict[str, str]:
    """Every claim that scores ask about, by `alike`: held-out topics, further claims, their negations, true ones."""
    claims = (*behavior.heldout_claims, *behavior.negations, *behavior.true_claims)
    return {alike(claim): claim for claim in claims}


def trained_on(behavior: Behavior, claims: Sequence[str], from_file: bool) -> dict:
    """The metadata of a w that is trained on these claims: the behaviour's first training topics, or a file's topics."""
    found = {"trained_on": [_mark(alike(claim)) for claim in claims]}
    return found | ({} if from_file else {"topics": _topics(behavior, len(claims))})


def other_training(meta: dict, behavior: Behavior, whose: str = "w") -> str:
    """What speaks against asking a w of this metadata about a behaviour, in words: it was trained on something that scores ask
    about, or on other topics of a behaviour of this name. '' for nothing, and where the metadata does not say. whose: what the
    words call it."""
    known = meta.get("trained_on") or []
    if not known or meta.get("topics") == _topics(behavior, len(known)):
        return ""
    held = asked(behavior)
    among = [claim for plain, claim in held.items() if _mark(plain) in set(known)]
    if among:
        return (
            f"{whose} was trained on {len(among)} of the {len(held)} claims that are asked about, as {short(among[0])}"
        )
    same = "topics" in meta and meta.get("behavior") == behavior.name
    return f"{whose} was trained on other topics than {behavior.name} has now" if same else ""


def _mark(plain: str) -> str:
    return digest(plain.encode())[:MARK]


def _topics(behavior: Behavior, n: int) -> str:
    answers = behavior.answers or ("",) * len(behavior.topics)
    first = zip(behavior.train_topics[:n], answers, strict=False)
    return digest(repr([(t.claim, t.question, answer) for t, answer in first]).encode())[:MARK]
