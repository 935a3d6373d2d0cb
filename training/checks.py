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
from steerl.rollout.steering.core.table import TABLE
from steerl.rollout.steering.spec.spec import ROLES
from steerl.rollout.steering.strengths import samples_problems
from steerl.training.algorithm import custom
from steerl.training.algorithm.custom import compares_samples, uses_value
from steerl.training.algorithm.schedule import check_schedule
from steerl.training.engine.optimizer import try_optimizer
from steerl.training.settings import PPOSettings

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
    if ppo.rollouts_per_step % sampling.n:
        problems.append(
            f"ppo.rollouts_per_step: {ppo.rollouts_per_step} cannot be split into groups of sampling.n = {sampling.n} samples "
            f"per prompt; {ppo.rollouts_per_step // sampling.n * sampling.n or sampling.n} would do"
        )
    if compares_samples(ppo) and sampling.n < 2:
        problems.append(f"sampling.n: {sampling.n}, but ppo.credit {ppo.credit} compares samples of one prompt; set 2 or more")
    if policy is not None and ppo.reference == "adapter" and not hasattr(policy.model, "peft_config"):
        problems.append("ppo.reference: adapter, but the policy has none; set model.peft, or ppo.reference to copy")
    elif policy is not None and ppo.reference == "adapter" and (name := adapters.learns_in_base(policy.model)):
        problems.append(
            f"ppo.reference: adapter, but {name} of the base learns, too, and stays changed where the adapter is off; set copy"
        )
    if prompts is not None and not prompts.first(1):
        problems.append("prompts: there are none; check prompts.path and prompts.limit")
    copies_value = uses_value(ppo) and ppo.value == "separate"
    if policy is not None and (copies_value or getattr(steering, "role", "") != "trainable"):
        problems += float16_problems(policy.model) + quantization_problems(policy.model)
    problems += sampling_problems(sampling, ppo, steering)
    problems += length_problems(sampling, ppo, environment or EnvironmentSettings())
    if steering is not None and not ppo.replay:  # whose rows say how strongly they were steered
        problems += samples_problems(steering, sampling.n)
    problems += engine_problems(engine or EngineSettings(), ppo, steering)
    problems += environment_problems(environment or EnvironmentSettings(), engine or EngineSettings(), ppo)
    if ppo.kl_target is not None and _unweighed(sampling, ppo, steering):
        problems.append(
            "ppo.kl_target: with a correction of type none the KL that is measured is the sampler's, not the policy's; "
            "set the type to token_truncate, or leave kl_target out"
        )
    if ppo.weight_decay and steering is not None and steering.role == "trainable":
        turned = [site.name for site in steering.sites if "rotation" in TABLE[site.op.type].tensors]
        problems += [
            f"ppo.weight_decay: {ppo.weight_decay:g}, but site {name!r} trains a rotation, of which decay leaves nothing after "
            "one step (torch keeps its signs as weights that no gradient reaches); set it to 0"
            for name in turned
        ]
    if problems:
        raise ConfigError(*problems)
    if policy is not None and not ppo.replay and isinstance(prompts, Prompts):
        warn_endless(policy, sampling, prompts.table[0][prompts.column])
    if ppo.reference == "none" and ppo.kl_coef:
        logger.warning("ppo.kl_coef: %s has no effect without a reference", ppo.kl_coef)
    if _unweighed(sampling, ppo, steering) and ppo.kl_as == "loss" and ppo.kl_coef:
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


def length_problems(sampling: Sampling, ppo: PPOSettings, environment: EnvironmentSettings) -> list[str]:
    """What counts the actions of a response, beside what bounds them."""
    if not ppo.counts_to_limit:
        return []
    elsewhere = "environment" if environment.given else "ppo.replay" if ppo.replay else ""
    if elsewhere:
        missing = ppo.response_limit is None
        told = f"missing; with {elsewhere} sampling.max_new_tokens does not bound a row; set the most actions of one"
        return [f"ppo.response_limit: {told}"] if missing else []
    limit = sampling.max_new_tokens if ppo.response_limit is None else ppo.response_limit
    if ppo.overlong_buffer > limit:
        told = f"{ppo.overlong_buffer} actions do not fit before the limit of {limit} (sampling.max_new_tokens)"
        return [f"ppo.overlong_buffer: {told}; lower it"]
    if ppo.overlong_buffer and limit - ppo.overlong_buffer >= sampling.max_new_tokens:
        told = f"begins after {limit - ppo.overlong_buffer} actions, which sampling.max_new_tokens {sampling.max_new_tokens}"
        return [f"ppo.overlong_buffer: {told} never passes, so it has no effect; lower ppo.response_limit"]
    return []


def engine_problems(engine: EngineSettings, ppo: PPOSettings, steering: SteeringSpec | None) -> list[str]:
    """What a server cannot do for a run."""
    if engine.kind != "vllm":
        return []
    if ppo.replay:
        return ["engine.kind: vllm, but ppo.replay reads rows where others draw; leave one of the two out"]
    if engine.ahead and ppo.drop_equal_groups:
        return [
            "engine.ahead: 1 with ppo.drop_equal_groups, which knows the step's prompts only when all is scored; set it to 0"
        ]
    if engine.ahead and steering is not None and not ROLES[steering.role].one_law:
        return [
            f"engine.ahead: 1 with steering.role {steering.role}, whose rows need a pass of the weights that drew them, gone "
            "by then; set it to 0"
        ]
    return []


def environment_problems(environment: EnvironmentSettings, engine: EngineSettings, ppo: PPOSettings) -> list[str]:
    """What does not go together with episodes."""
    if not environment.given:
        return []
    problems = []
    if ppo.replay and not ppo.eval_prompts:
        told = "has no effect with ppo.replay, whose episodes were played already, and without evaluations; leave it out"
        problems.append(f"environment: {told}")
    if engine.ahead:
        problems.append("engine.ahead: 1, but episodes are not played ahead of learning; set it to 0")
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


def _unweighed(sampling: Sampling, ppo: PPOSettings, steering: SteeringSpec | None) -> bool:
    """Whether rows of another distribution than the policy's count as if they were the policy's."""
    correction = ppo.correction or getattr(steering, "correction", None)
    other = ppo.replay or not sampling.is_policy or getattr(steering, "role", "") == "behaviour"
    return bool(other) and correction is not None and correction.type == "none"


def sampling_problems(sampling: Sampling, ppo: PPOSettings, steering: SteeringSpec | None = None) -> list[str]:
    """Samplers whose distribution is not the policy's need importance weights, or are refused."""
    if steering is not None and steering.role == "preventative":
        if ppo.replay:
            return [
                "steering.role: preventative learns from rows that the plain policy of today draws, and ppo.replay reads those "
                "of a dump; leave one of the two out"
            ]
        if ppo.kl_as == "loss" and ppo.reference != "none":
            return [
                "ppo.kl_as: loss has the gradient of the steered policy's KL, and steering.role preventative leaves the plain "
                "one; set it to reward, or ppo.reference to none"
            ]
    if ppo.replay:
        if ppo.correction is None:
            return [
                "ppo.correction: missing; stored rollouts come from other weights than those that learn, so the clipped ratio "
                "is off; set ppo.correction.type, for example token_truncate (none accepts the bias)"
            ]
        return []
    if sampling.greedy:
        return [
            "sampling.greedy: greedy rollouts have no distribution to weigh by, so PPO cannot learn from them; set it to false"
        ]
    if steering is not None and steering.role == "data":
        return [
            "steering.role: data is for dumps that the supervised stage clones; PPO learns with role policy, trainable, "
            "behaviour or preventative"
        ]
    weighed = steering is not None and not ROLES[steering.role].one_law
    role = "" if steering is None else steering.role
    if weighed and sampling.truncates:
        return [
            f"sampling: top_k, top_p or min_p together with steering.role {role} leaves tokens of the policy that are never "
            "drawn, so weights pi / mu are wrong; sample with the temperature alone"
        ]
    if role == "preventative" and not sampling.is_policy:
        return [
            "sampling: penalties and bans together with steering.role preventative, whose rows and KL are to be those of the "
            "plain policy that is left; sample without them"
        ]
    if not sampling.is_policy and ppo.correction is None:
        cut = sampling.truncates and not sampling.replays_mask
        what = "top_k, top_p and min_p with replay_mask false" if cut else "penalties and bans"
        remedy = "leave replay_mask out" if cut else "sample without them"
        return [
            f"sampling: {what} draw from another distribution than the policy's, so the clipped ratio would be off; {remedy}, "
            "or set ppo.correction.type, for example token_truncate (none accepts the bias)"
        ]
    if weighed and ppo.correction is None and getattr(steering, "correction", None) is None:
        return [
            f"steering.correction: missing; rollouts of steering.role {role} come from another distribution than the "
            "policy's; set its type, for example token_truncate (none accepts the bias)"
        ]
    return []
