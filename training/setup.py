"""What a PPO run is made of, built once: actor and critic, reference, optimizer, samplers, state, log."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rollout import processes
from rollout.policy import Policy
from rollout.run import RunSettings, write_json, write_text
from rollout.sampler import Sampler
from rollout.sampling import Sampling
from training import checkpoint, resume
from training.actor_critic import ActorCritic, Reference, build
from training.kl import AdaptiveKL, FixedKL
from training.log import RunLog
from training.state import TrainState

if TYPE_CHECKING:
    from training.ppo import PPOSettings

_EVALUATION_SEED = 0x6576616C
"""Added to sampling.seed: an evaluation draws other numbers than the step that it belongs to."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What stays the same over the steps; `state` holds all that changes."""

    policy: Policy
    actor_critic: ActorCritic
    reference: Reference | None
    reward: Any
    sampler: Sampler
    evaluation_sampler: Sampler
    steering: Any
    state: TrainState

    def decode(self, token: int) -> str:
        """One token as text, for tables and the viewer."""
        return str(self.policy.tokenizer.decode([token]))


def prepare(
    policy: Policy, reward: Any, sampling: Sampling, settings: PPOSettings, run: RunSettings, steering_spec: Any = None
) -> Parts:
    """Build the parts of a run. Copies of the policy are taken before steering is attached to it."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    processes.start()
    torch.manual_seed(run.seed)
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    actor_critic, reference, steering = build(policy, settings, steering_spec, seed=run.seed)
    actor_critic.to(accelerator.device)
    optimizer = torch.optim.AdamW(groups(actor_critic, settings), weight_decay=settings.weight_decay)
    model, optimizer = accelerator.prepare(actor_critic, optimizer)
    sampler = Sampler(policy, sampling, steering)
    examined = dataclasses.replace(sampling, n=1, seed=sampling.seed + _EVALUATION_SEED)
    controller = (
        FixedKL(settings.kl_coef)
        if settings.kl_target is None
        else AdaptiveKL(settings.kl_coef, settings.kl_target, settings.kl_horizon)
    )
    return Parts(
        policy=policy,
        actor_critic=actor_critic,
        reference=reference,
        reward=reward,
        sampler=sampler,
        evaluation_sampler=Sampler(policy, examined, steering),
        steering=steering,
        state=TrainState(model=model, optimizer=optimizer, accelerator=accelerator, kl=controller, reward=reward),
    )


def groups(actor_critic: ActorCritic, settings: PPOSettings) -> list[dict[str, Any]]:
    """The optimizer's two groups: what the policy is made of, and what only the value is made of."""
    value_rate = settings.learning_rate if settings.value_learning_rate is None else settings.value_learning_rate
    found = [
        {"name": "policy", "params": actor_critic.policy_parameters(), "base_lr": settings.learning_rate},
        {"name": "value", "params": actor_critic.value_parameters(), "base_lr": value_rate},
    ]
    return [{**group, "lr": group["base_lr"]} for group in found if group["params"]]


def open_log(folder: Path, run: RunSettings, state: TrainState, config: Mapping[str, Any] | None) -> RunLog:
    """The log of the run and, on a resume, the newest whole checkpoint put into `state`."""
    from rollout.run import versions

    found = resume.find(folder, config or {}) if run.resume else None
    log = RunLog(folder, trackers=run.trackers, config=config)
    if found is not None:
        log.rewind(checkpoint.load(found, state)["log"])
    elif run.resume:
        log.rewind({})
    if found is None:
        processes.on_main(lambda: _describe(folder, config, versions()))
    return log


def _describe(folder: Path, config: Mapping[str, Any] | None, found: dict[str, str]) -> None:
    import yaml

    write_text(folder / "config.yaml", yaml.safe_dump(dict(config or {}), sort_keys=False, allow_unicode=True))
    write_json(folder / "versions.json", found)
