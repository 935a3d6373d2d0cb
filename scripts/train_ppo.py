"""Train a language model with PPO.

    steerl ppo --config steerl:ppo --model.path DIR ...
    accelerate launch --config_file configs/accelerate/ddp.yaml scripts/train_ppo.py --config ...      several processes

RUN/config.yaml     the resolved settings          RUN/checkpoints/   for --run.resume true
RUN/metrics.jsonl   an object per step             RUN/model/         from_pretrained loads it
RUN/samples.jsonl   best, worst and random rows    RUN/summary.json   before, after, steps, seconds
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerl.configs.reader import run_command, to_mapping

from steerl.reward.build import build_reward, read_terms
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.progress import doing
from steerl.rollout.common.run_folder import RunSettings, check_folder
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.model.settings import ModelSettings, is_adapter_folder
from steerl.rollout.prompts.prompts import PromptSettings, load_prompts
from steerl.rollout.steering import load_spec
from steerl.training.combinations import combination_problems
from steerl.training.settings import PPOSettings

if TYPE_CHECKING:
    from steerl.training.planning.dry_run import Findings


@dataclass(frozen=True)
class PPOJob:
    """Train a language model with PPO."""

    model: ModelSettings = field(default_factory=ModelSettings)
    """The policy."""
    prompts: PromptSettings = field(default_factory=PromptSettings)
    """What it is trained on."""
    heldout: PromptSettings = field(default_factory=PromptSettings)
    """What it is evaluated on; without a path, the first of the training prompts."""
    sampling: Sampling = field(default_factory=Sampling)
    """How rollouts are drawn."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """What draws them."""
    environment: EnvironmentSettings = field(default_factory=EnvironmentSettings)
    """What the policy talks to between its turns; nothing, where it has one."""
    steering: dict[str, object] | str | None = field(default=None, metadata={"check": load_spec})
    """What is done to activations while sampling and learning: a mapping, or the path of a YAML file with it."""
    reward: list[dict[str, object]] = field(default_factory=list, metadata={"check": read_terms})
    """The parts of the reward."""
    ppo: PPOSettings = field(default_factory=PPOSettings)
    """The algorithm."""
    run: RunSettings = field(default_factory=RunSettings)
    """Where it is written, and how it goes on."""
    dry_run: bool = False
    """Check what can be checked without weights and network, say what was and what was not, and stop. Nothing is written."""


def main(job: PPOJob) -> None:
    config = to_mapping(job)
    del config["dry_run"]
    if job.dry_run:
        from steerl.training.planning.dry_run import dry_run

        return processes.on_main(lambda: show(dry_run(job, learnable(job.model), config)))
    folder = Path(job.run.dir)
    if run(job, config) and processes.start().is_main:
        print(f"{folder / 'model'}: the policy, which from_pretrained loads")
        print(f"{folder / 'report.html'}: curves, and every token of the samples; metrics.jsonl and summary.json lie beside it")
        print(f"next: steerl complete --model.path {shlex.quote(str(folder / 'model'))} PROMPT")


def run(job: PPOJob, config: dict[str, object]) -> dict[str, Any]:
    """The whole job; what its summary.json holds. `config` is the job as a mapping."""
    processes.on_main(lambda: check(job, config))  # before anything large is imported or loaded
    import torch

    from steerl.rollout.model.policy import load_policy
    from steerl.training.ppo import train
    from steerl.training.setup import with_peft

    torch.manual_seed(job.run.seed)  # fresh adapters
    policy = with_peft(load_policy(learnable(job.model), processes.start().device, read=False), job.model.peft)
    new = job.environment.response(job.sampling.max_new_tokens)
    with doing("reading the prompts"):
        prompts = load_prompts(job.prompts, policy, new)
        heldout = load_prompts(job.heldout, policy, new) if job.heldout.path else None
    with contextlib.closing(build_reward(job.reward, policy=policy, device=policy.device)) as reward:
        return train(
            policy,
            prompts,
            reward,
            job.sampling,
            job.ppo,
            job.run,
            steering=load_spec(job.steering) if job.steering else None,
            engine=job.engine,
            environment=job.environment,
            heldout=heldout,
            config=config,
        )


def check(job: PPOJob, config: dict[str, object]) -> None:
    check_folder(job.run, config)
    spec = load_spec(job.steering) if job.steering else None
    if problems := combination_problems(job.sampling, job.ppo, spec, job.engine, job.environment):
        raise UserError(*problems)
    job.model.base()


def show(found: Findings) -> None:
    for line in [*(f"checked: {what}" for what in found.checked), *(f"not checked: {what}" for what in found.unchecked)]:
        print(line)
    if found.problems:
        raise UserError(*found.problems)


def learnable(model: ModelSettings) -> ModelSettings:
    """Weights that learn are float32 unless asked otherwise: a bfloat16 step of 1e-5 is rounded away. Adapters are anyway."""
    adapted = model.peft or model.adapter or is_adapter_folder(model.path)
    return model if adapted or model.dtype != "auto" else dataclasses.replace(model, dtype="float32")


def cli() -> None:
    run_command(main, PPOJob)


if __name__ == "__main__":
    cli()
