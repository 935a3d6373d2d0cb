"""What a run leaves for its users: RUN/model, which from_pretrained loads, with its tokenizer; and summary.json.

Steering that belongs to the policy goes with the model as its `on_deploy` says: strip (a plain model), keep (steering.yaml
beside it), fold (in its biases).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerl.rollout.common import processes
from steerl.rollout.common.errors import CheckpointError
from steerl.rollout.common.run_folder import write_json, written_aside
from steerl.rollout.model import adapters, auto_classes
from steerl.rollout.steering import Steering, deploy
from steerl.training.engine import full_state
from steerl.training.model.actor_critic import ActorCritic
from steerl.training.run.evaluate import Evaluation
from steerl.training.settings import PPOSettings
from steerl.training.types import TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


def deployed(steering: Steering | None) -> str:
    """What becomes of the steering when the policy is saved: strip, keep or fold. Without a part in the policy it is left."""
    return steering.spec.on_deploy if steering is not None and steering.role in ("policy", "trainable") else "strip"


def check_export(model: ActorCritic, accelerator: Accelerator, settings: PPOSettings) -> None:
    """What cannot be left behind as asked is said before the first step."""
    steering, how = model.steering, deployed(model.steering)
    if steering is not None and steering.spec.on_deploy == "fold" and how != "fold":
        raise CheckpointError(
            f"steering.on_deploy: fold leaves the steering in the model, and role {steering.role} leaves a plain one; use strip"
        )
    if steering is not None and how == "fold":
        if hasattr(model.actor, "peft_config") and not settings.export_merged:
            raise CheckpointError(
                "steering.on_deploy: fold writes into the model, and the run saves an adapter alone; "
                "set ppo.export_merged true, or use keep"
            )
        deploy.check_fold(steering)
    if str(getattr(accelerator, "distributed_type", "")).rpartition(".")[2] != "FSDP":
        return
    problems = []
    if settings.export_merged:
        problems.append(
            "ppo.export_merged: true, but FSDP's weights cannot be merged; leave the adapter as it is, or use ZeRO-3"
        )
    if how != "strip":
        problems.append(
            f"steering.on_deploy: {how}, but FSDP's weights cannot be saved with their steering; use strip, or ZeRO-3"
        )
    if problems:
        raise CheckpointError(*problems)


def save_model(folder: Path, model: ActorCritic, settings: PPOSettings) -> None:
    """The policy in `folder`/model: the adapter alone where there is one, or the whole model with it merged in."""

    def save() -> None:
        with written_aside(folder / "model") as aside:
            aside.mkdir()
            policy = _with_folded_steering(model) if deployed(model.steering) == "fold" else model.actor
            if not hasattr(policy, "peft_config"):
                auto_classes.save(policy, aside, state)
            elif settings.export_merged:
                auto_classes.save(adapters.merge(copy.deepcopy(policy)), aside)
            else:
                adapters.save(policy, aside, state)
            if model.steering is not None and deployed(model.steering) == "keep":
                deploy.save(model.steering, aside)
            model.policy.tokenizer.save_pretrained(aside)

    # Under ZeRO-3 the modules themselves hold all weights meanwhile; FSDP's never do, so a dict stands in for them.
    with full_state.whole_for_export(model) as state:
        processes.on_main(save)


def _with_folded_steering(model: ActorCritic) -> PreTrainedModel:
    copied = copy.deepcopy(model.actor)
    if hasattr(copied, "peft_config"):
        copied = adapters.merge(copied)
    assert model.steering is not None
    deploy.fold(model.steering, copied)
    return copied


def summarize(folder: Path, state: TrainState, after: Evaluation | None) -> dict[str, Any]:
    """Write summary.json, the last file of a run, and return what it holds."""
    summary = {
        "reward_before": state.reward_before,
        "reward_after": after and after.reward,
        "kl_after": after and after.kl,
        "gap_max": state.totals.get("gap_max", 0.0),
        "steps": state.step,
        "optimizer_steps": int(state.totals.get("optimizer_steps", 0)),
        "rollouts": int(state.totals.get("rollouts", 0)),
        "tokens": int(state.totals.get("tokens", 0)),
        "seconds": state.totals.get("seconds", 0.0),
        "world_size": processes.start().world_size,
    }
    processes.on_main(lambda: write_json(folder / "summary.json", summary))
    return summary


def read_summary(folder: Path) -> dict[str, object]:
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary
