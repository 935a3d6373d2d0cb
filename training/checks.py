"""What PPO refuses before it starts: settings out of range, and settings that do not fit each other, the model or the data."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import MOST_ROWS
from steerl.rollout.decoding.stops import warn_endless
from steerl.rollout.model import adapters
from steerl.rollout.prompts.prompts import Prompts
from torch import nn

if TYPE_CHECKING:
    from steerl.rollout.decoding.settings import Sampling
    from steerl.rollout.model.policy import Policy
    from steerl.training.ppo import PPOSettings

logger = logging.getLogger(__name__)


def settings_problems(ppo: PPOSettings) -> list[str]:
    """A line for every field of the section that is out of range by itself."""
    at_least = dict.fromkeys(("steps", "rollouts_per_step", "epochs", "minibatches", "micro_batch_size"), 1)
    at_least |= dict.fromkeys(("warmup_steps", "value_warmup_steps", "eval_every", "eval_prompts", "samples"), 0)
    zero_or_more = (
        "micro_batch_tokens",
        "learning_rate",
        "value_learning_rate",
        "weight_decay",
        "max_grad_norm",
        "value_coef",
        "kl_coef",
    )
    above_zero = ("clip", "clip_high", "value_clip", "kl_target", "kl_horizon", "stop_kl", "gap_tolerance")
    found = [
        f"ppo.{name}: {getattr(ppo, name)}, but it must be at least {low}"
        for name, low in at_least.items()
        if getattr(ppo, name) < low
    ]
    for name in (*zero_or_more, *above_zero):
        value = getattr(ppo, name)
        if value is not None and not (math.isfinite(value) and value >= 0 and (value > 0 or name in zero_or_more)):
            found.append(f"ppo.{name}: {value}, but it must be a number {'above 0' if name in above_zero else 'of 0 or more'}")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(ppo, name) <= 1:
            found.append(f"ppo.{name}: {getattr(ppo, name)}, but it must lie between 0 and 1")
    for name in ("entropy_coef", "missing_stop_penalty"):
        if not math.isfinite(getattr(ppo, name)):
            found.append(f"ppo.{name}: {getattr(ppo, name)}, but it must be a finite number")
    if ppo.dual_clip is not None and not ppo.dual_clip > 1:
        found.append(f"ppo.dual_clip: {ppo.dual_clip}, but it must be above 1 (3 is usual), or unset")
    if ppo.rollouts_per_step > MOST_ROWS:
        found.append(f"ppo.rollouts_per_step: {ppo.rollouts_per_step}, but it must be at most {MOST_ROWS:,}")
    elif ppo.rollouts_per_step >= 1 and ppo.minibatches >= 1 and ppo.rollouts_per_step % ppo.minibatches:
        fit = [m for m in range(1, ppo.rollouts_per_step + 1) if ppo.rollouts_per_step % m == 0]
        near = min(fit, key=lambda m: abs(m - ppo.minibatches))
        found.append(
            f"ppo.minibatches: {ppo.rollouts_per_step} rollouts_per_step cannot be split into {ppo.minibatches} equal "
            f"minibatches; {near} would do"
        )
    if ppo.kl_target is not None and ppo.kl_coef <= 0:
        found.append(
            f"ppo.kl_coef: {ppo.kl_coef} cannot be adapted to ppo.kl_target, which multiplies it; begin with 0.05, say"
        )
    if ppo.kl_target is not None and ppo.reference == "none":
        found.append("ppo.kl_target: there is no reference to measure the KL to; set ppo.reference to auto")
    if ppo.credit != "gae":
        unused = {"value": "separate", "value_warmup_steps": 0, "bootstrap_cut": False}
        found += [
            f"ppo.{name}: {getattr(ppo, name)!r} has no effect with ppo.credit {ppo.credit}, which has no value; leave it out"
            for name, default in unused.items()
            if getattr(ppo, name) != default
        ]
    correction = ppo.correction
    if correction is not None and not (correction.high > 0 and 0 <= correction.low <= correction.high):
        found.append(f"ppo.correction: low {correction.low} and high {correction.high}, but 0 <= low <= high and high > 0")
    return found


def check_job(policy: Policy, prompts: Any, sampling: Sampling, ppo: PPOSettings, steering: Any = None) -> None:
    """Raise a UserError with a line for everything in the job that does not fit together."""
    found: list[str] = []
    if ppo.rollouts_per_step % sampling.n:
        found.append(
            f"ppo.rollouts_per_step: {ppo.rollouts_per_step} cannot be split into groups of sampling.n = {sampling.n} samples "
            f"per prompt; {ppo.rollouts_per_step // sampling.n * sampling.n or sampling.n} would do"
        )
    if ppo.credit != "gae" and sampling.n < 2:
        found.append(f"sampling.n: {sampling.n}, but ppo.credit {ppo.credit} compares samples of one prompt; set 2 or more")
    if ppo.reference == "adapter" and not hasattr(policy.model, "peft_config"):
        found.append("ppo.reference: adapter, but the policy has none; set model.peft, or ppo.reference to copy")
    elif ppo.reference == "adapter" and (name := adapters.learns_in_base(policy.model)):
        found.append(
            f"ppo.reference: adapter, but {name} of the base learns, too, and stays changed where the adapter is off; set copy"
        )
    if prompts is not None and len(prompts) == 0:
        found.append("prompts: there are none; check prompts.path and prompts.limit")
    copies_value = ppo.credit == "gae" and ppo.value == "separate"
    if copies_value or getattr(steering, "role", "") != "trainable":
        found += float16_problems(policy.model)
    found += law_problems(sampling, ppo, steering)
    if ppo.kl_target is not None and _unweighed(sampling, ppo, steering):
        found.append(
            "ppo.kl_target: with a correction of type none the KL that is measured is the sampler's, not the policy's; "
            "set the type to token_truncate, or leave kl_target out"
        )
    if found:
        raise UserError(*found)
    if not ppo.replay and isinstance(prompts, Prompts):
        warn_endless(policy, sampling, prompts.table[0][prompts.column])
    if ppo.reference == "none" and ppo.kl_coef:
        logger.warning("ppo.kl_coef: %s has no effect without a reference", ppo.kl_coef)
    if _unweighed(sampling, ppo, steering) and ppo.kl_as == "loss" and ppo.kl_coef:
        logger.warning(
            "ppo.kl_as: loss with a correction of type none has not the KL's gradient, for the rows come from another law than "
            "the policy's; token_truncate weighs them, and ppo.kl_as reward shares the bias of the policy loss alone"
        )
    if ppo.kl_as == "reward" and ppo.kl_estimator != "k1":
        logger.warning(
            "ppo.kl_estimator: %s in the reward has the mean of another penalty's gradient, not of the KL's; "
            "k1, or ppo.kl_as loss, has the right one",
            ppo.kl_estimator,
        )


def float16_problems(model: nn.Module) -> list[str]:
    """Weights that learn in float16: Adam's squares of gradients below 2e-4 are 0 there, and so is the 1e-8 beside them."""
    learns = next((name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16), "")
    told = (
        f"model.dtype: float16, in which weights that learn ({learns}) diverge; load them in float32 (with mixed_precision "
        "fp16 in the accelerate config, if you like) or bfloat16, or train a LoRA alone (model.peft), which is float32"
    )
    return [told] if learns else []


def _unweighed(sampling: Sampling, ppo: PPOSettings, steering: Any) -> bool:
    """Whether rows of another law than the policy's count as if they were the policy's."""
    correction = ppo.correction or getattr(steering, "correction", None)
    other = ppo.replay or not sampling.is_plain or getattr(steering, "role", "") == "behaviour"
    return bool(other) and correction is not None and correction.type == "none"


def law_problems(sampling: Sampling, ppo: PPOSettings, steering: Any = None) -> list[str]:
    """Samplers whose law is not the policy's need importance weights, or are refused."""
    if ppo.replay:
        if ppo.correction is None:
            return [
                "ppo.correction: missing; stored rollouts come from other weights than those that learn, so the clipped ratio "
                "is off; set ppo.correction.type, for example token_truncate (none accepts the bias)"
            ]
        return []
    if sampling.greedy:
        return ["sampling.greedy: greedy rollouts have no law to weigh by, so PPO cannot learn from them; set it to false"]
    if steering is not None and steering.role == "data":
        return [
            "steering.role: data is for dumps that the supervised stage clones; PPO learns with role policy, trainable or "
            "behaviour"
        ]
    behaviour = steering is not None and steering.role == "behaviour"
    if behaviour and sampling.truncates:
        return [
            "sampling: top_k, top_p or min_p together with steering.role behaviour leaves tokens of the policy that are never "
            "drawn, so weights pi / mu are wrong; sample with the temperature alone"
        ]
    if not sampling.is_plain and ppo.correction is None:
        return [
            "sampling: top_k, top_p, min_p, penalties and bans draw from another law than the policy's, so the clipped ratio "
            "would be off; sample with the temperature alone, or set ppo.correction.type, for example token_truncate "
            "(none accepts the bias)"
        ]
    if behaviour and ppo.correction is None and getattr(steering, "correction", None) is None:
        return [
            "steering.correction: missing; rollouts of steering.role behaviour come from another law than the policy's; "
            "set its type, for example token_truncate (none accepts the bias)"
        ]
    return []
