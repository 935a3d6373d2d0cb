"""Steering in a PPO step: what is logged of it, its KL budget, and what a run leaves of it.

metrics(...)   steering/*: strength, share of rows, reward with and without, edits per row, KL to the unsteered policy
budget(...)    the KL budget: rescale the strength of the next step, warn, or stop
to_save, save_beside   RUN/model: strip (a plain model), keep (steering.yaml beside it), fold (in its biases)
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from steerl.rollout.analysis.steering_table import edits_per_row
from steerl.rollout.common.errors import UserError
from steerl.rollout.model import adapters
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering, unsteered
from steerl.rollout.steering.deploy import check_fold, fold, save
from steerl.training.algorithm.experience import Scored
from torch import Tensor

if TYPE_CHECKING:
    from steerl.training.setup import Components

logger = logging.getLogger(__name__)
_STEP = (0.5, 2.0)
"""How much a rescaling may change the strength in one training step."""


def metrics(parts: Components, scored: Scored) -> dict[str, float]:
    """What steering did to this step's rows. KL: of the law sampled from, from the unsteered policy."""
    steering, rollout = parts.steering, scored.rollout
    if steering is None or not rollout.steering:
        return {}
    steered_B = rollout.strength_B != 0
    total_B = scored.scores.total_B.to(steered_B.device)
    found = {
        "steering/share": float(steered_B.double().mean()),
        "steering/strength": float(rollout.strength_B[steered_B].double().mean()) if bool(steered_B.any()) else 0.0,
        "steering/scale": steering.scale,
    }
    for name, rows_B in (("steered", steered_B), ("plain", ~steered_B)):
        if bool(rows_B.any()):
            found[f"steering/reward_{name}"] = float(total_B[rows_B].double().mean())
    edits_B = edits_per_row(steering, rollout, scored.texts.columns)
    if edits_B is not None:
        found["steering/edits_per_row"] = float(edits_B.double().mean())
    plain_BR = _unsteered_logprobs(parts, scored)
    if plain_BR is not None:
        gap_BR = torch.where(rollout.mask_BR, rollout.behaviour_logprobs_BR.double() - plain_BR.double(), 0.0)
        rows = int(steered_B.sum())
        found["steering/kl_sequence"] = float(gap_BR[steered_B].sum()) / max(rows, 1)
        found["steering/kl_token"] = float(gap_BR[steered_B].sum()) / max(int(rollout.mask_BR[steered_B].sum()), 1)
    return found


def _unsteered_logprobs(parts: Components, scored: Scored) -> Tensor | None:
    """The unsteered policy's log-probs: at hand for role behaviour; the reference's for role trainable (the same model);
    an extra pass for role policy, and only where a budget asks for it."""
    steering: Steering = parts.steering
    if steering.role in ("behaviour", "data"):
        return scored.rollout.policy_logprobs_BR
    if steering.role == "trainable" and scored.reference_logprobs_BR is not None:
        return scored.reference_logprobs_BR
    if steering.spec.kl_budget is None:
        return None

    def passed() -> Tensor:
        return teacher_forced(parts.policy, scored.rollout, want_entropy=False).logprobs_BR

    with torch.no_grad(), unsteered():
        return parts.actor_critic.inside(passed)


def budget(parts: Components, found: dict[str, float], step: int) -> None:
    """Hold KL per steered response to the budget. Rescaling never goes above the strength that the spec asks for."""
    steering = parts.steering
    limit = None if steering is None else steering.spec.kl_budget
    spent = found.get("steering/kl_sequence")
    if limit is None or spent is None:
        return
    if limit.action == "rescale":
        # KL grows with the square of a small strength.
        factor = _STEP[1] if spent <= 0 else (limit.nats_per_sequence / spent) ** 0.5
        steering.scale = min(1.0, steering.scale * min(max(factor, _STEP[0]), _STEP[1]))
    elif spent > limit.nats_per_sequence:
        allowed = f"above steering.kl_budget {limit.nats_per_sequence:g}"
        said = f"step {step + 1}: steered responses cost {spent:.2f} nats of KL, {allowed}"
        if limit.action == "error":
            raise UserError(f"{said}; lower the strength, steer fewer steps, or set kl_budget.action to rescale")
        logger.warning("%s", said)


def check(steering: Steering | None, policy: Any, merges: bool) -> None:
    """What cannot be deployed as asked is said before the first step."""
    if steering is None or steering.spec.on_deploy != "fold":
        return
    if steering.role not in ("policy", "trainable"):
        raise UserError(
            f"steering.on_deploy: fold leaves the steering in the model, and role {steering.role} leaves a plain one; use strip"
        )
    if hasattr(policy.model, "peft_config") and not merges:
        raise UserError(
            "steering.on_deploy: fold writes into the model, and the run saves an adapter alone; "
            "set ppo.export_merged true, or use keep"
        )
    check_fold(steering)


def _deploys(parts: Components, how: str) -> bool:
    steering = parts.steering
    return steering is not None and steering.role in ("policy", "trainable") and steering.spec.on_deploy == how


def to_save(parts: Components) -> Any:
    """The model that is saved: the policy's own, or a copy with the steering folded in."""
    model = parts.policy.model
    if _deploys(parts, "fold"):
        model = copy.deepcopy(model)
        if hasattr(model, "peft_config"):
            model = adapters.merge(model)
        fold(parts.steering, model)
    return model


def save_beside(parts: Components, folder: Path) -> None:
    """steering.yaml and its files, for on_deploy keep."""
    if _deploys(parts, "keep"):
        save(parts.steering, folder)
