"""What PPO refuses before it starts: settings out of range, and settings that do not fit each other, the model or the data."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.decoding.stops import warn_endless
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.model import adapters
from steerl.rollout.model.auto_classes import is_quantized
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import Prompts
from steerl.rollout.steering import SteeringSpec
from steerl.rollout.steering.strengths import samples_problems
from steerl.training.algorithm import custom
from steerl.training.algorithm.custom import compares_samples, uses_value
from steerl.training.algorithm.schedule import check_schedule
from steerl.training.combinations import combination_problems, group_problems, unweighed
from steerl.training.engine.optimizer import try_optimizer
from steerl.training.settings import PPOSettings, is_custom

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def check_objects(policy: object, prompts: object, reward: object) -> None:
    """What a program hands to `train` is of this package's kinds: a path, a data set or another trainer's reward function is
    told with what makes the right object of it."""
    problems = []
    if not isinstance(policy, Policy):
        made = "Policy.of(model, tokenizer) or load_policy(ModelSettings(path=...)) makes one"
        problems.append(f"policy: expected a Policy, found {type(policy).__name__}; {made}")
    if not callable(getattr(prompts, "take", None)) or not hasattr(prompts, "most"):  # a datasets.Dataset has a take, too
        made = 'Prompts(rows, "prompt", policy, PromptSettings()) or load_prompts(PromptSettings(path=...), policy) makes them'
        problems.append(f"prompts: expected Prompts, found {type(prompts).__name__}; {made}")
    if not callable(reward) or takes_completions(reward):
        found = f"{type(reward).__name__} of completions" if callable(reward) else type(reward).__name__
        problems.append(f"reward: expected reward(rollout, texts), found a {found}; build_reward([...]) makes one of functions")
    if problems:
        raise ConfigError(*problems)


def takes_completions(function: Any) -> bool:
    """Whether it is a reward function as TRL calls them."""
    try:
        return not {"prompts", "completions", "completion_ids"}.isdisjoint(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False


def check_job(
    policy: Policy | None,
    prompts: Any,
    sampling: Sampling,
    ppo: PPOSettings,
    steering: SteeringSpec | None = None,
    engine: EngineSettings | None = None,
    environment: EnvironmentSettings | None = None,
) -> None:
    """Raise a UserError with a line for everything in the job that does not fit together, as far as it is known."""
    if problems := functions_problems(ppo):
        raise ConfigError(*problems)  # what they use decides on the rest
    if is_custom(ppo.credit) and compares_samples(ppo):
        problems += group_problems(sampling, ppo)
    if policy is not None and ppo.reference == "adapter" and not hasattr(policy.model, "peft_config"):
        problems.append("ppo.reference: adapter, but the policy has none; set model.peft, or ppo.reference to copy")
    elif policy is not None and ppo.reference == "adapter" and (name := adapters.learns_in_base(policy.model)):
        problems.append(
            f"ppo.reference: adapter, but {name} of the base learns, too, and stays changed where the adapter is off; set copy"
        )
    if prompts is not None and not prompts:
        problems.append("prompts: there are none; check prompts.path and prompts.limit")
    copies_value = uses_value(ppo) and ppo.value == "separate"
    if policy is not None and (copies_value or getattr(steering, "role", "") != "trainable"):
        problems += float16_problems(policy.model) + quantization_problems(policy.model)
    problems += combination_problems(sampling, ppo, steering, engine, environment)
    if steering is not None and not ppo.replay:  # whose rows say how strongly they were steered
        problems += samples_problems(steering, sampling.n)
    if problems:
        raise ConfigError(*problems)
    if policy is not None and not ppo.replay and isinstance(prompts, Prompts):
        warn_endless(policy, sampling, prompts.table[0][prompts.column])
    if ppo.reference == "none" and ppo.kl_coef:
        logger.warning("ppo.kl_coef: %s has no effect without a reference", ppo.kl_coef)
    if unweighed(sampling, ppo, steering) and ppo.kl_as == "loss" and ppo.kl_coef:
        logger.warning(
            "ppo.kl_as: loss with a correction of type none has not the KL's gradient, for the rows come from another "
            "distribution than the policy's; token_truncate weighs them, and ppo.kl_as reward shares the bias of the policy "
            "loss alone"
        )
    if ppo.kl_as == "reward" and ppo.kl_estimator != "k1":
        logger.warning(
            "ppo.kl_estimator: %s in the reward has the mean of another penalty's gradient, not of the KL's; "
            "k1, or ppo.kl_as loss, has the right one",
            ppo.kl_estimator,
        )


def functions_problems(ppo: PPOSettings) -> list[str]:
    """What is named by the user: functions, optimizers, schedules. All of them are tried here."""
    problems = custom.check(ppo)
    for check in (try_optimizer, check_schedule):
        try:
            check(ppo)
        except UserError as problem:
            problems += problem.lines
    return problems


def float16_problems(model: nn.Module) -> list[str]:
    """Weights that learn in float16: Adam's squares of gradients below 2e-4 are 0 there, and so is the 1e-8 beside them."""
    learns = next((name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16), "")
    told = (
        f"model.dtype: float16, in which weights that learn ({learns}) diverge; load them in float32 or bfloat16, or train a "
        "LoRA alone (model.peft), which is float32"
    )
    return [told] if learns else []


def quantization_problems(model: nn.Module) -> list[str]:
    """Weights in few bits learn nothing themselves."""
    if not is_quantized(model) or hasattr(model, "peft_config"):
        return []
    told = "the model is in few bits, which do not learn; add an adapter that does (model.peft), or leave it out"
    return [f"model.quantization: {told}"]


def check_quantization(accelerator: Accelerator, policy: Policy, export_merged: bool) -> None:
    """Engines that cut weights, or make masters of them, and what merges an adapter, need them as numbers."""
    if not is_quantized(policy.core):
        return
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU"):
        name = accelerator.distributed_type.value
        raise ConfigError(
            f"model.quantization: the base is in few bits, which {name} cannot hold; run one process or DDP "
            "(configs/accelerate/ddp.yaml), or leave it out"
        )
    if export_merged:
        raise ConfigError(
            "ppo.export_merged: true, but the base is in few bits, which a merged adapter would be rounded to; leave it out, "
            "and merge the adapter that is left into the base's own weights"
        )


def check_precision(accelerator: Accelerator) -> None:
    """DeepSpeed's own fp16 is told here, too. Losses are scaled up there until a gradient overflows, and the step is lost."""
    if accelerator.mixed_precision == "fp16":
        raise ConfigError(
            "mixed_precision: fp16 in the accelerate (or DeepSpeed) config, in which gradients overflow; set it to bf16, or to "
            '"no" for float32'
        )
