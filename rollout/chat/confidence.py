"""How sure a model was: average log-prob, perplexity, the least certain tokens, tokens under a probability.

    confidence(tokens, logprobs)               of numbers at hand (a completion's, a dump's row)
    sequence_logprob(policy, prompt, response) log-prob of a given response
    prompt_logprobs(policy, prompts)           log-prob of every prompt token
    raw_logprob(logits, tokens)                of one step's tokens, for streams

All of them are of the raw logits at temperature 1, whatever the tokens were drawn with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steerl.rollout.common.errors import UserError
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.chat import Speller, text_ids
from steerl.rollout.scoring.logprobs import teacher_forced, token_logprobs
from steerl.rollout.scoring.steered import Steers
from steerl.rollout.types import Rollout


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


# -- given texts ------------------------------------------------------------------------------------------------------


def prompt_logprobs(
    policy: Policy, prompt_ids: Sequence[Sequence[int]], *, steering: Steers | None = None, batch_size: int = 32
) -> list[list[float | None]]:
    """Log-prob of every prompt token given those before it, at temperature 1; the first has none."""
    logprobs: list[list[float | None]] = []
    lone = 1 if steering is not None else batch_size  # a steered prompt keeps its own positions: no padding, row by row
    for start in range(0, len(prompt_ids), lone):
        prompts = [list(ids) for ids in prompt_ids[start : start + lone]]
        rollout = given(policy, [ids[:1] for ids in prompts], [ids[1:] for ids in prompts])
        with torch.no_grad():
            if steering is None or not rollout.response_width:  # of one token there is nothing to predict
                forced = teacher_forced(policy, rollout, temperature=1.0, want_entropy=False)
            else:
                mask_1P = torch.ones(1, len(prompts[0]), dtype=torch.bool, device=policy.device)
                row_B = torch.tensor([start], device=policy.device)
                sample_B = torch.zeros_like(row_B)
                applied = steering.applied(mask_1P, row_B, sample_B)
                with steering.active(prompt_mask_BP=mask_1P, row_B=row_B, sample_B=sample_B, applied=applied):
                    forced = teacher_forced(policy, rollout, temperature=1.0, want_entropy=False)
        for row, ids in enumerate(prompts):
            logprobs.append([None, *forced.logprobs_BR[row, : len(ids) - 1].tolist()])
    return logprobs


def sequence_logprob(policy: Policy, prompt: str | Sequence[int], response: str | Sequence[int]) -> float:
    """Log-prob of a whole response after a prompt, teacher-forced at temperature 1: the sum over its tokens."""
    before = text_ids(policy, prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    goes_on = [] if policy.is_seq2seq else before
    after = Speller(policy.tokenizer).ids(goes_on, response) if isinstance(response, str) else list(response)
    if not before:
        raise UserError("prompt: empty; a model needs at least one token to go on from")
    if not len(after):
        return 0.0
    for name, ids in (("prompt", before), ("response", after)):
        if not all(0 <= token < policy.vocab_size for token in ids):
            raise UserError(f"{name}: an id is out of range; ids go from 0 to {policy.vocab_size - 1}")
    room = policy.decoder_context if policy.is_seq2seq else policy.context
    used = len(after) + (len(policy.start_ids) if policy.is_seq2seq else len(before))
    if room is not None and used > room + 1:  # the last token is predicted, never read
        raise UserError(
            f"response: prompt and response have {used} tokens, more than the model's context of {room}; shorten them"
        )
    with torch.no_grad():
        forced = teacher_forced(policy, given(policy, [before], [after]), temperature=1.0, want_entropy=False)
    return float(forced.logprobs_BR.double().sum())


def given(policy: Policy, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Rollout:
    """A rollout of responses that were not sampled here, to be scored; its recorded log-probs are 0."""
    return Rollout.of_ids(prompts, responses, pad_id=policy.pad_id, device=policy.device, start_ids=policy.start_ids)


def raw_logprob(logits_BV: torch.Tensor, tokens_B: torch.Tensor) -> list[float]:
    """Of the tokens of one step, at temperature 1: for streams, which see each step's raw logits."""
    return [float(value) for value in token_logprobs(logits_BV[:, None], tokens_B[:, None])[:, 0]]
