"""How sure a model was: average log-prob, perplexity, the least certain tokens, tokens under a probability.

    confidence(tokens, logprobs)               of numbers at hand (a completion's, a dump's row)
    sequence_logprob(policy, prompt, response) log-prob of a given response, teacher-forced at temperature 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Token:
    position: int
    """In the list of tokens the report was made of."""
    text: str
    logprob: float

    @property
    def probability(self) -> float:
        return math.exp(self.logprob)


@dataclass(frozen=True)
class Confidence:
    count: int
    """Tokens that have a log-prob."""
    logprob: float
    """Their sum: the log-prob of the whole sequence."""
    average_logprob: float
    perplexity: float
    """exp(-average_logprob): 1 = certain of every token."""
    least_certain: list[Token]
    """The k with the lowest log-probs, lowest first; of equals the earlier first."""
    under: list[Token]
    """All with a probability under `below`, in their order."""
    below: float

    def lines(self) -> list[str]:
        """For a person."""
        if not self.count:
            return ["no tokens"]
        head = f"{self.count} tokens, average log-prob {self.average_logprob:.4f}, perplexity {self.perplexity:.3f}"
        named = ", ".join(f"{token.text!r} {token.probability:.3g} (token {token.position})" for token in self.least_certain)
        return [head, f"least certain: {named}", f"under {self.below:g}: {len(self.under)} of {self.count} tokens"]


def confidence(tokens: Sequence[str], logprobs: Sequence[float | None], k: int = 5, below: float = 0.1) -> Confidence:
    """`tokens` and `logprobs` side by side; a token whose log-prob is None (the first of an echo) is left out."""
    known = [Token(i, text, value) for i, (text, value) in enumerate(zip(tokens, logprobs, strict=True)) if value is not None]
    total = math.fsum(token.logprob for token in known)
    average = total / len(known) if known else 0.0
    return Confidence(
        count=len(known),
        logprob=total,
        average_logprob=average,
        perplexity=math.exp(min(-average, 700.0)),
        least_certain=sorted(known, key=lambda token: token.logprob)[:k],
        under=[token for token in known if token.probability < below],
        below=below,
    )
