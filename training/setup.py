"""What a PPO run is made of, built once: actor and critic, reference, optimizer, samplers, state, log."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings, versions, write_text
from steerl.rollout.common.yaml_files import Dumper
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model import adapters, virtual_tokens
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.chat import Speller
from steerl.rollout.types import Rollout, Texts
from steerl.training import steering as steered
from steerl.training.algorithm.kl import AdaptiveKL, FixedKL
from steerl.training.algorithm.minibatch import occurrences, share
from steerl.training.engine import engine
from steerl.training.model.actor_critic import ActorCritic, Reference, build, checkpoint_activations
from steerl.training.run import checkpoint, resume
from steerl.training.run.log import RunLog
from steerl.training.run.state import TrainState
from steerl.training.settings import PPOSettings

_EVALUATION_SEED = 0x6576616C
"""Added to sampling.seed: an evaluation draws other numbers than the step that it belongs to."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """What stays the same over the steps; `state` holds all that changes."""

    policy: Policy
    actor_critic: ActorCritic
    reference: Reference | None
    reward: Any
    sampler: Sampler
    evaluation_sampler: Sampler
    steering: Any
    state: TrainState
    gather: str = "phase"
    """How weights that are spread over ranks come together to sample: phase or layers."""

    def draw(self, prompts: Any, sampler: Any, rows: list[int], *, progress: float) -> tuple[Rollout, Texts, bool]:
        """This rank's share of a step's prompts, `sampling.n` rows each. `progress` is what steering's schedules go by.

        False where there are more ranks than prompts: the rows then only keep this rank in step with the others."""
        ours = processes.start()
        if self.steering is not None:
            self.steering.progress = progress
        mine = share(list(zip(rows, occurrences(rows), strict=True)), ours.rank, ours.world_size)
        batch = prompts.batch(*zip(*(mine or [(rows[0], 0)]), strict=True))
        if sampler is self.sampler:
            rollout, texts = self.sample(sampler, batch, progress)
        else:  # stored rows
            rollout, texts = sampler.sample(batch, step=self.state.step, progress=progress)
        return rollout, texts, bool(mine)

    def sample(self, sampler: Sampler, batch: Any, progress: float | None = None) -> tuple[Rollout, Texts]:
        """Responses of the policy as it stands, on every rank at the same time."""

        def sampled() -> tuple[Rollout, Texts]:
            with self.state.accelerator.autocast():
                return sampler.sample(batch, step=self.state.step, progress=progress)

        return engine.gathering(self.actor_critic, self.gather, sampled)

    @cached_property
    def decode(self) -> Callable[[int], str]:
        """One token as text, for tables and the viewer."""
        return Speller(self.policy.tokenizer).token


def prepare(
    policy: Policy, reward: Any, sampling: Sampling, settings: PPOSettings, run: RunSettings, steering_spec: Any = None
) -> Components:
    """Build the parts of a run. Copies of the policy are taken before steering is attached to it."""
    from accelerate.utils import set_seed

    processes.start()
    set_seed(run.seed)  # every global generator: rewards may draw from them, and a resumed run goes on with them
    accelerator = engine.start()
    actor_critic, reference, steering = build(policy, settings, steering_spec, seed=run.seed)
    steered.check(steering, policy, settings.export_merged)
    engine.check(accelerator, steering, settings)
    if settings.checkpointing:
        checkpoint_activations(actor_critic)
    actor_critic.to(accelerator.device)
    grouped = groups(actor_critic, settings)
    # One pass over each weight, and no buffers beside it. It walks through memory and looks at no strides.
    fused = all(parameter.is_contiguous() for group in grouped for parameter in group["params"])
    optimizer = torch.optim.AdamW(grouped, weight_decay=settings.weight_decay, fused=fused)
    model, optimizer = engine.wrap(accelerator, actor_critic, optimizer, settings)
    engine.link_reference(reference, accelerator, actor_critic)
    sampler = Sampler(policy, sampling, steering)
    examined = dataclasses.replace(sampling, n=1, seed=sampling.seed + _EVALUATION_SEED)
    # An evaluation is of what the run leaves behind: a plain model, or a model with its steering.
    kept = steering is not None and steering.role in ("policy", "trainable") and steering.spec.on_deploy != "strip"
    controller = (
        FixedKL(settings.kl_coef)
        if settings.kl_target is None
        else AdaptiveKL(settings.kl_coef, settings.kl_target, settings.kl_horizon)
    )
    return Components(
        policy=policy,
        actor_critic=actor_critic,
        reference=reference,
        reward=reward,
        sampler=sampler,
        evaluation_sampler=Sampler(policy, examined, steering if kept else None),
        steering=steering,
        gather=settings.gather,
        state=TrainState(
            model=model, optimizer=optimizer, accelerator=accelerator, kl=controller, reward=reward, steering=steering
        ),
    )


def with_peft(policy: Policy, mapping: dict[str, Any] | None) -> Policy:
    """The policy with a fresh adapter of `model.peft`, which is then all that learns."""
    if not mapping:
        return policy
    if hasattr(policy.model, "peft_config"):
        raise UserError("model.peft: the model has an adapter already, which is trained further; leave one of the two out")
    device = policy.device
    adapted = policy.with_model(adapters.add(policy.model, mapping).to(device))
    taken = virtual_tokens.count(adapted.model)  # room that no prompt or response can use
    limits = {name: limit and limit - taken for name in ("context", "decoder_context") for limit in [getattr(policy, name)]}
    return dataclasses.replace(adapted, **limits)


def groups(actor_critic: ActorCritic, settings: PPOSettings) -> list[dict[str, Any]]:
    """The optimizer's two groups: what the policy is made of, and what only the value is made of."""
    value_rate = settings.learning_rate if settings.value_learning_rate is None else settings.value_learning_rate
    found = [
        {"name": "policy", "params": actor_critic.policy_parameters(), "base_lr": settings.learning_rate},
        {"name": "value", "params": actor_critic.value_parameters(), "base_lr": value_rate},
    ]
    return [{**group, "lr": group["base_lr"]} for group in found if group["params"]]


def open_log(
    folder: Path,
    run: RunSettings,
    settings: PPOSettings,
    state: TrainState,
    config: Mapping[str, Any] | None,
    made_from: Mapping[str, str],
) -> RunLog:
    """The log of the run and, on a resume, the newest whole checkpoint put into `state`."""
    found, changed = resume.find(folder, config or {}, run, settings.schedule, made_from) if run.resume else (None, [])
    log = RunLog(folder, trackers=run.trackers, config=config)
    log.rewind(checkpoint.load(found, state)["log"] if found is not None else {})
    told = [f"from step {state.step}: {line}" for line in changed if not line.startswith("run.")]
    if found is None or told:
        processes.on_main(lambda: _describe(folder, config or {}, told))
    return log


def _describe(folder: Path, config: Mapping[str, Any], changed: Sequence[str] = ()) -> None:
    """config.yaml, which --config reads back; the versions stand in it as comments, and what a resumed run changed."""
    notes = "".join(f"# {name}: {version}\n" for name, version in versions().items())
    if changed:
        path = folder / "config.yaml"
        before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        notes += "".join(line for line in before.splitlines(keepends=True) if line.startswith("# from step "))
        notes += "".join(f"# {line}\n" for line in changed)
    write_text(folder / "config.yaml", notes + yaml.dump(dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True))
