"""What a PPO run is made of, built once: actor and critic, reference, optimizer, sources of prompts and rows, state."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from steerl.reward.types import Reward
from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError
from steerl.rollout.common.progress import doing
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler, drawing
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.source import CheckedSource, PromptSource, RolloutSource
from steerl.rollout.engines.vllm.engine import LOG, VllmEngine
from steerl.rollout.engines.vllm.sampler import ServerSampler
from steerl.rollout.environments.environment import Environment
from steerl.rollout.environments.sampler import EpisodeSampler
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.model import adapters, unread, virtual_tokens
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import Prompts
from steerl.rollout.steering import Steering, SteeringSpec
from steerl.training.ahead import Ahead
from steerl.training.algorithm.custom import uses_value
from steerl.training.algorithm.kl import AdaptiveKL, FixedKL
from steerl.training.checks import check_precision, check_quantization
from steerl.training.engine import engine
from steerl.training.engine.engine import EngineSampler
from steerl.training.engine.optimizer import build_optimizer, check_optimizer
from steerl.training.model import offload
from steerl.training.model.actor_critic import ActorCritic, checkpoint_activations
from steerl.training.model.compiled import compile_layers
from steerl.training.model.reference import Reference, build_reference
from steerl.training.model.value_model import build_value_model
from steerl.training.replay import Replay
from steerl.training.run.export import check_export, deployed
from steerl.training.run.metrics import gap_tolerance
from steerl.training.settings import PPOSettings
from steerl.training.types import TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator

Value = TypeVar("Value")
Draws = EngineSampler | EpisodeSampler | ServerSampler
_EVALUATION_SEED = 0x6576616C
"""Added to sampling.seed: an evaluation draws other numbers than the step that it belongs to."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """What stays the same over the steps; `state` holds all that changes."""

    policy: Policy
    actor_critic: ActorCritic
    reference: Reference | None
    sampler: Draws
    """What draws the training's rows where nothing else does."""
    evaluation_sampler: Draws
    server: VllmEngine | None
    """What draws for both, where that is a server."""
    steering: Steering | None
    state: TrainState


def prepare(
    policy: Policy,
    reward: Reward,
    sampling: Sampling,
    settings: PPOSettings,
    run: RunSettings,
    steering_spec: SteeringSpec | None = None,
    engine_settings: EngineSettings | None = None,
    longest: int | None = None,
    environment: Environment | None = None,
) -> Components:
    """Build the components of a run. Copies of the policy are taken before steering is attached to it. `longest`: tokens of the
    longest prompt with its response, where that is known."""
    from accelerate.utils import set_seed

    processes.join()
    set_seed(run.seed)  # every global generator: rewards may draw from them, and a resumed run goes on with them
    accelerator = engine.start()
    check_precision(accelerator)
    check_quantization(accelerator, policy, settings.export_merged)
    check_optimizer(accelerator, settings)
    if settings.offload_activations:
        offload.check(accelerator.device)
    with doing("making the value and the reference"):
        actor_critic, reference = build_models(policy, settings, steering_spec, seed=run.seed)
    steering = actor_critic.steering
    check_export(actor_critic, accelerator, settings)
    if settings.checkpointing:
        checkpoint_activations(actor_critic)
    with doing("reading the weights"):
        engine.place(accelerator, actor_critic, reference, settings)
    grouped = groups(actor_critic, settings)
    optimizer = build_optimizer(accelerator, grouped, settings)
    with doing("wrapping the models"):
        model, optimizer = engine.wrap(accelerator, actor_critic, optimizer)
        engine.observe(actor_critic, reference, settings)
    _autocast(accelerator, lambda: compile_layers(actor_critic, settings, engine.holder(accelerator)))

    server = None
    if engine_settings is not None and engine_settings.kind == "vllm":
        server = VllmEngine(
            policy,
            engine_settings,
            Path(run.dir) / LOG,
            steering=drawing(steering),
            longest=longest,
            dtype="bfloat16" if accelerator.mixed_precision == "bf16" else None,
            tolerance=gap_tolerance(settings, actor_critic.dtype, accelerator.mixed_precision),
            inside=lambda call: actor_critic.inside(lambda: _autocast(accelerator, call)),
        )

    def sampler(how: Sampling, steered: Steering | None) -> Draws:
        if server is not None:
            asked = ServerSampler(server, how, steered)
            return asked if environment is None else EpisodeSampler(asked, environment)
        inner = Sampler(policy, how, steered, engine_settings)
        played = inner if environment is None else EpisodeSampler(inner, environment)
        return EngineSampler(played, accelerator, actor_critic, settings.gather)

    evaluation = dataclasses.replace(sampling, n=1, seed=sampling.seed + _EVALUATION_SEED)
    controller = (
        FixedKL(settings.kl_coef)
        if settings.kl_target is None
        else AdaptiveKL(settings.kl_coef, settings.kl_target, settings.kl_horizon)
    )
    return Components(
        policy=policy,
        actor_critic=actor_critic,
        reference=reference,
        sampler=sampler(sampling, steering),
        # An evaluation is of what the run leaves behind: a plain model, or a model with its steering.
        evaluation_sampler=sampler(evaluation, steering if deployed(steering) != "strip" else None),
        server=server,
        steering=steering,
        state=TrainState(
            model=model, optimizer=optimizer, accelerator=accelerator, kl=controller, reward=reward, steering=steering
        ),
    )


def longest(
    prompts: Prompts, heldout: Prompts | None, sampling: Sampling, environment: EnvironmentSettings | None
) -> int | None:
    """Most tokens of a prompt with its response; None where neither settings nor the model bound them."""
    response = (environment or EnvironmentSettings()).bound(sampling.max_new_tokens)
    if response is None:
        return None
    of_sources = [getattr(source, "most", None) for source in (prompts, heldout) if source is not None]
    most = [count for count in of_sources if count is not None]
    return max(most) + response if most and len(most) == len(of_sources) else None


def _autocast(accelerator: Accelerator, call: Callable[[], Value]) -> Value:
    with accelerator.autocast():
        return call()


class Rows(NamedTuple):
    """Where a run's rows come from."""

    prompts: PromptSource
    source: RolloutSource
    samples: int
    """Of each prompt."""


def training_rows(
    parts: Components,
    prompts: Prompts,
    sampling: Sampling,
    settings: PPOSettings,
    run: RunSettings,
    own: RolloutSource | None,
    ending: contextlib.ExitStack,
) -> Rows:
    """The dump of ppo.replay, which is prompts and source in one; a source of the caller's own; or the policy itself. What is
    made here is closed by `ending`."""
    if own is not None:
        label = parts.steering.label if parts.steering is not None else ""
        return Rows(prompts, CheckedSource(own, parts.policy, sampling, label), sampling.n)
    if settings.replay:
        stored = Replay(settings.replay, parts.policy, settings, parts.steering)
        made = Rows(stored, stored, stored.samples)
    elif isinstance(parts.sampler, ServerSampler) and parts.sampler.engine.settings.ahead:
        made = Rows(prompts, Ahead(parts.sampler, prompts, parts.state, settings, run.seed), sampling.n)
    else:
        made = Rows(prompts, parts.sampler, sampling.n)
    ending.callback(made.source.close)
    return made


def check_source(
    source: RolloutSource, settings: PPOSettings, engine_settings: EngineSettings | None, ending: contextlib.ExitStack
) -> None:
    """A source of the caller's own has all that the loop calls, and nothing else in the job says who draws. From here on it is
    closed by `ending`."""
    if missing := [name for name in ("draw", "weights_changed", "close") if not callable(getattr(source, name, None))]:
        raise ConfigError(f"source: {type(source).__name__} lacks {', '.join(missing)}; steerl.RolloutSource has all three")
    ending.callback(source.close)
    problems = []
    if settings.replay:
        problems.append("ppo.replay: the run has a source of its own, and draws from one; leave one of the two out")
    if engine_settings is not None and engine_settings.kind != EngineSettings().kind:
        told = "the run has a source of its own, which draws in its place; leave one of the two out"
        problems.append(f"engine.kind: {engine_settings.kind}, but {told}")
    if problems:
        raise ConfigError(*problems)


def build_models(
    policy: Policy, settings: PPOSettings, spec: SteeringSpec | None, *, seed: int
) -> tuple[ActorCritic, Reference | None]:
    """Actor and critic with the steering, and the reference. Copies are taken first, so that they are of the plain model."""
    trains_vectors = spec is not None and spec.role == "trainable"
    reference = build_reference(policy, settings.reference, trains_vectors=trains_vectors)
    value_model, head = build_value_model(policy, settings.value) if uses_value(settings) else (None, None)
    if trains_vectors:
        for parameter in policy.model.parameters():
            parameter.requires_grad_(False)
    steering = Steering(policy.core, spec, policy.tokenizer, seed) if spec is not None else None
    return ActorCritic(policy, value_model, head, steering), reference


def with_peft(policy: Policy, mapping: dict[str, Any] | None) -> Policy:
    """The policy with a fresh adapter of `model.peft`, which is then all that learns."""
    if not mapping:
        return policy
    if hasattr(policy.model, "peft_config"):
        raise ConfigError("model.peft: the model has an adapter already, which is trained further; leave one of the two out")
    device = policy.device
    adapted = policy.with_model(adapters.add(policy.model, policy.hub.noted(mapping)))
    unread.to_device(adapted.model, device)
    taken = virtual_tokens.count(adapted.model)  # room that no prompt or response can use
    limits = {name: limit and limit - taken for name in ("context", "decoder_context") for limit in [getattr(policy, name)]}
    return dataclasses.replace(adapted, **limits)


def groups(actor_critic: ActorCritic, settings: PPOSettings) -> list[dict[str, Any]]:
    """The optimizer's two groups: what the policy is made of, and what only the value is made of."""
    value_rate = settings.learning_rate if settings.value_learning_rate is None else settings.value_learning_rate
    both = [
        {"name": "policy", "params": actor_critic.policy_parameters(), "base_lr": settings.learning_rate},
        {"name": "value", "params": actor_critic.value_parameters(), "base_lr": value_rate},
    ]
    return [{**group, "lr": group["base_lr"]} for group in both if group["params"]]
