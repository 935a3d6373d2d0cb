"""Steering in a PPO step: what is logged of it, and its KL budget.

measure(...)       strength, share of rows, reward with and without, edits per row, KL to the unsteered policy
hold_budget(...)   the KL budget: rescale the strength of the next step, warn, or stop
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from steerl.rollout.analysis.steering_table import edits_per_row
from steerl.rollout.common.errors import ConfigError
from steerl.rollout.model.hooks import unsteered
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering
from steerl.rollout.steering.spec.spec import ROLES
from steerl.training.model.actor_critic import ActorCritic
from steerl.training.types import Scored, SteeringStats

logger = logging.getLogger(__name__)
_STEP = (0.5, 2.0)
"""How much a rescaling may change the strength in one training step."""


def measure(model: ActorCritic, scored: Scored) -> SteeringStats | None:
    """What steering did to this step's rows. KL: of the distribution sampled from, from the other one of the steered and the
    plain policy."""
    steering, rollout = model.steering, scored.rollout
    if steering is None or not rollout.steering:
        return None
    steered_B, first_B = (rollout.strength_BK != 0).any(1), rollout.strength_B
    total_B = scored.scores.total_B.to(steered_B.device)

    def reward(rows_B: Tensor) -> float | None:
        return float(total_B[rows_B].double().mean()) if bool(rows_B.any()) else None

    edits_B = edits_per_row(steering, rollout)
    kl_sequence, kl_token = None, None
    other_BR = _other_logprobs(model, steering, scored)
    if other_BR is not None:
        gap_BR = torch.where(rollout.action_mask_BR, rollout.behaviour_logprobs_BR.double() - other_BR.double(), 0.0)
        kl_sequence = float(gap_BR[steered_B].sum()) / max(int(steered_B.sum()), 1)
        kl_token = float(gap_BR[steered_B].sum()) / max(int(rollout.action_mask_BR[steered_B].sum()), 1)
    return SteeringStats(
        share=float(steered_B.double().mean()),
        strength=float(first_B[first_B != 0].double().mean()) if bool(first_B.any()) else 0.0,
        scale=steering.scale,
        reward_steered=reward(steered_B),
        reward_plain=reward(~steered_B),
        edits_per_row=None if edits_B is None else float(edits_B.double().mean()),
        kl_sequence=kl_sequence,
        kl_token=kl_token,
    )


def _other_logprobs(model: ActorCritic, steering: Steering, scored: Scored) -> Tensor | None:
    """Of the law that the rows were not drawn from. At hand where it is the policy's that learns. The unsteered one's: the
    reference's for role trainable (the same model); an extra pass for role policy, and only where a budget asks for it."""
    if not ROLES[steering.role].one_law:
        return scored.rollout.policy_logprobs_BR
    if steering.role == "trainable" and scored.reference_logprobs_BR is not None:
        return scored.reference_logprobs_BR
    if steering.spec.kl_budget is None:
        return None

    rollout = scored.rollout.to(model.device)
    with torch.no_grad(), unsteered():
        return model.inside(lambda: teacher_forced(model.policy, rollout, want_entropy=False).logprobs_BR).cpu()


def hold_budget(steering: Steering | None, stats: SteeringStats | None, step: int) -> None:
    """Hold the KL per steered response to the budget. Rescaling never goes above the strength of the spec."""
    limit, spent = None if steering is None else steering.spec.kl_budget, None if stats is None else stats.kl_sequence
    if steering is None or limit is None or spent is None:
        return
    if limit.action == "rescale":
        # KL grows with the square of a small strength.
        factor = _STEP[1] if spent <= 0 else (limit.nats_per_sequence / spent) ** 0.5
        steering.scale = min(1.0, steering.scale * min(max(factor, _STEP[0]), _STEP[1]))
    elif spent > limit.nats_per_sequence:
        allowed = f"above steering.kl_budget {limit.nats_per_sequence:g}"
        said = f"step {step + 1}: steered responses cost {spent:.2f} nats of KL, {allowed}"
        if limit.action == "error":
            raise ConfigError(f"{said}; lower the strength, steer fewer steps, or set kl_budget.action to rescale")
        logger.warning("%s", said)
