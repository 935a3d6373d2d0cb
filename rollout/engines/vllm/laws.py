"""Whether a server draws by the law it was told: some tokens of its rows, drawn again from the trainer's own logits.

A server that applied the processors in another order, left one out or had other random numbers would agree with itself in all
that it records; only the law applied to other logits finds it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.random import uniforms
from steerl.rollout.decoding.distribution import Distribution, History
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.decoding.weights import Space
from steerl.rollout.model.policy import Policy
from steerl.rollout.model.sharding import needs_sync
from steerl.rollout.scoring.alignment import response_logits
from steerl.rollout.scoring.steered import Steers, steered
from steerl.rollout.types import Rollout, row_name

TOKENS = 32
"""Of each row, its first ones."""
ROUGH = 0.1
"""Nats: where as much is allowed, dtypes round so that many a token lies on the border of another."""


def rows_of(policy: Policy, rollout: Rollout, count: int) -> Rollout:
    """The rows that are looked at, cut short. Where passes are collective, as many on every rank."""
    rows = min(count, len(rollout))
    if needs_sync(policy.model):
        rows = -processes.most(-rows)
    part = dataclasses.replace(rollout, kept=None).select(range(rows)).trim()
    wide: dict[str, Any] = {name: value[:, :TOKENS] for name, value in part.tensors().items() if name.endswith("_BR")}
    return dataclasses.replace(part, **wide, lengths_B=part.lengths_B.clamp(max=TOKENS))


def check_laws(policy: Policy, part: Rollout, sampling: Sampling, step: int, tolerance: float, steering: Steers | None) -> None:
    """UserError where these rows, drawn at `step`, are not what `sampling` makes of this policy's logits."""
    distribution, space = Distribution(sampling, policy), Space()
    with steered(steering, policy, part):
        logits_BRV = response_logits(policy, part).float()
    token_R = torch.arange(part.response_width, device=part.device)
    uniform_BR = uniforms(sampling.seed, step, part.row_B, part.sample_B, token_R)
    history = History(part.prompt_BP, part.prompt_mask_BP, distribution)
    drawn, law = [], []
    for t in range(part.response_width):
        drawn.append(distribution.draw(logits_BRV[:, t], history, uniform_BR[:, t], space).tokens_B)
        scores_BV = logits_BRV[:, t] if sampling.greedy else distribution.behaviour_scores(logits_BRV[:, t], history)
        law.append(scores_BV.log_softmax(-1).gather(1, part.response_BR[:, t : t + 1])[:, 0])
        history.append(part.response_BR[:, t])
    _compare(part, torch.stack(law, 1), torch.stack(drawn, 1), tolerance)


def _compare(part: Rollout, law_BR: Tensor, drawn_BR: Tensor, tolerance: float) -> None:
    real_BR, rough = part.action_mask_BR, tolerance >= ROUGH
    off_BR = torch.where(real_BR, (part.behaviour_logprobs_BR - law_BR).abs().nan_to_num(nan=torch.inf), 0.0)
    other_BR = real_BR & (drawn_BR != part.response_BR)
    tokens = int(real_BR.sum())
    # Rounding decides some: in float32 one token in a thousand at 150,000 ids, in bfloat16 many. Another seed decides most.
    beyond, others, allowed = int((off_BR > tolerance).sum()), int(other_BR.sum()), 1 + tokens // (4 if rough else 20)
    usual = "another order of processors, one that is missing, or another version of steerl beside vLLM"
    if beyond > (allowed if rough else 0):
        row, t = divmod(int(off_BR.argmax()), part.response_width)
        raise UserError(
            f"engine: the server draws by another law than sampling says: token {t} of {row_name(part, row)} has log-prob "
            f"{float(part.behaviour_logprobs_BR[row, t]):.6g} there, {float(law_BR[row, t]):.6g} by the settings; {usual}"
        )
    if others > allowed:
        row, t = divmod(int(other_BR.int().argmax()), part.response_width)
        raise UserError(
            f"engine: the server draws other tokens than the settings of sampling: {others} of {tokens}, the first of them "
            f"token {t} of {row_name(part, row)}; another seed or step, {usual}"
        )
