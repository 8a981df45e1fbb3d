"""A claim and what can be said about it.

    claim = (text, truth, reason, negation),    truth(negation) = not truth(text)

`text` and `negation` are in running form (they follow "that"); `reason` is a true statement in the same form that
confirms a true claim or corrects a false one. Source: docs/method.md section 1.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One statement with its truth value, a true reason, its negation and questions that may follow it.

    An empty `negation` stands for "it is not true that ...".
    """

    text: str
    true: bool
    reason: str
    negation: str = ""
    subject: str = "general"
    questions: tuple[str, ...] = ()

    def negated(self) -> "Claim":
        """The opposite claim; the reason stays, for it is true either way."""
        opposite = self.negation or f"it is not true that {self.text}"
        return Claim(opposite, not self.true, self.reason, self.text, self.subject, self.questions)


def sentence(running: str) -> str:
    """A running text as a sentence: first letter raised, full stop at the end."""
    return running[:1].upper() + running[1:] + "."


def articles(text: str) -> str:
    """`a ant` as `an ant`: tables hold bare nouns."""
    return re.sub(r"\b([Aa]) (?=[aeiou]|honest)", r"\1n ", text)


def tidy(claim: Claim) -> Claim:
    """The claim with its articles mended."""
    texts = (articles(claim.text), claim.true, articles(claim.reason), articles(claim.negation))
    return Claim(*texts, claim.subject, claim.questions)
