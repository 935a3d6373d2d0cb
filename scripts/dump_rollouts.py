"""Rollouts as parquet files.

    steerl dump --config steerl:dump --model.path DIR --prompts.path FILE --run.dir RUN
    accelerate launch -m steerl.scripts.dump_rollouts ...                 several processes, the same rows

Leaves RUN/rollouts-NNNNN.parquet, RUN/manifest.json and RUN/tokenizer. A dump that was cut short goes on with
--run.resume true, on any number of processes, and ends up identical to an undisturbed one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from steerl.configs.reader import run_command

from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError
from steerl.rollout.common.fingerprint import model_fingerprint, tokenizer_fingerprint
from steerl.rollout.common.run_folder import RunSettings, begin, opened, versions, written_aside
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.dumps.manifest import RECORDS, Manifest, Plan, load_manifest, start
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.environments.outcomes import look_at
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.model.settings import ModelSettings
from steerl.rollout.prompts.prompts import PromptSettings, load_prompts
from steerl.rollout.steering import load_spec

if TYPE_CHECKING:
    from steerl.rollout.analysis.verify import Report
    from steerl.rollout.model.policy import Policy
    from steerl.rollout.types import Samples


@dataclass(frozen=True)
class DumpJob:
    """Sample every prompt sampling.n times and keep the rows with both log-probs of every token."""

    model: ModelSettings = field(default_factory=ModelSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    sampling: Sampling = field(default_factory=Sampling)
    engine: EngineSettings = field(default_factory=EngineSettings)
    environment: EnvironmentSettings = field(default_factory=EnvironmentSettings)
    """What the policy talks to between its turns; nothing, where it has one."""
    steering: dict[str, object] | str | None = field(default=None, metadata={"check": load_spec})
    """An intervention's mapping, or the path of a YAML that holds it."""
    run: RunSettings = field(default_factory=RunSettings)
    verify: bool = False
    """Rescore every row alone, unpadded, in float32, and say how far the log-probs are off."""


def main(job: DumpJob) -> None:
    me = processes.start()
    if me.is_main:
        for name in ("seed", "keep", "trackers", "push_to_hub", "allow_changes"):
            if getattr(job.run, name) != getattr(RunSettings(), name):
                print(f"run.{name}: has no effect on a dump{', sampling.seed has' if name == 'seed' else ''}", file=sys.stderr)
    with opened(job.run, dataclasses.asdict(job)) as folder, contextlib.ExitStack() as ending:
        write(job, folder, ending)


def write(job: DumpJob, folder: Path, ending: contextlib.ExitStack) -> None:
    from steerl.rollout.analysis.verify import verify
    from steerl.rollout.decoding.stops import warn_endless
    from steerl.rollout.dumps.dump import dump, left_to_do
    from steerl.rollout.engines.vllm.sampler import sampler_of
    from steerl.rollout.environments.environment import environment_of
    from steerl.rollout.environments.sampler import EpisodeSampler
    from steerl.rollout.model.policy import load_policy
    from steerl.rollout.steering import Steering
    from steerl.rollout.steering.strengths import samples_problems

    me = processes.start()
    policy = load_policy(job.model, me.device)
    environment = ending.enter_context(environment_of(job.environment, policy))
    prompts = load_prompts(job.prompts, policy, job.environment.response(job.sampling.max_new_tokens), once="a dump")
    if environment is not None:
        environment.check(prompts)
    steering = Steering(policy.model, load_spec(job.steering), policy.tokenizer, job.sampling.seed) if job.steering else None
    if steering is not None and (problems := samples_problems(steering.spec, job.sampling.n)):
        raise ConfigError(*problems)
    bound = job.environment.bound(job.sampling.max_new_tokens)
    longest = None if prompts.most is None or bound is None else prompts.most + bound
    drawn = ending.enter_context(sampler_of(policy, job.sampling, steering, job.engine, folder, longest))
    sampler = drawn if environment is None else EpisodeSampler(drawn, environment)
    warn_endless(policy, job.sampling, prompts.table[0][prompts.column])
    plan = Plan.of(len(prompts), job.sampling.n, job.sampling.batch_size, job.run.save_every)

    def start_here() -> Manifest:
        made_from = {
            "model.path": model_fingerprint(policy.model),
            "model.tokenizer": tokenizer_fingerprint(policy.tokenizer),
            **prompts.fingerprints("prompts.path"),
            "steering": steering.label if steering else "",
            **({} if environment is None else {"environment": job.environment.content()}),
        }
        begin(folder, job.run)
        tools = {} if environment is None else {"tools": environment.conversation.tools}
        begun = start(folder, plan, dataclasses.asdict(job), made_from, versions=versions(), world_size=me.world_size, **tools)
        save_tokenizer(folder, policy)
        return begun

    begun = processes.on_main(start_here)
    work = left_to_do(folder, begun)
    if me.is_main:
        for index, damage in work.damaged.items():
            print(f"{folder / plan.file(index)}: {damage}; it is made again", file=sys.stderr)

    reports: list[Report] = []

    def sample(rows: range) -> Samples:
        samples = sampler.sample(prompts.batch(list(rows)))
        look_at(samples.texts.episodes)
        if job.verify:
            reports.append(verify(policy, samples.rollout, job.sampling, steering=steering))
        return samples

    done = begun["finished"] and not work.todo and not (folder / RECORDS).exists()
    if not done:
        with processes.stop_signal() as stop:
            dump(
                *(folder, begun, work, sample, sys.stderr, stop.here),
                cut=prompts.cut,
                versions=versions(),
                world_size=me.world_size,
            )
    if job.verify:
        for line in together(reports).lines() if reports else ["verify: nothing was sampled, so nothing was checked"]:
            print(line, file=sys.stderr)
    if me.is_main:
        cut = load_manifest(folder)["counts"].get("cut_prompts", 0)
        told = f"; {cut:,} of {plan.prompts:,} prompts were cut to {prompts.most:,} tokens" if cut else ""
        print(f"{folder}: {'finished already, ' if done else ''}{plan.rows:,} rows in {len(plan)} shards{told}")
        print(f"next: steerl inspect {shlex.quote(str(folder))}")


def together(reports: list[Report]) -> Report:
    """This process's calls as one: the worst of them, and the mean over all tokens."""
    worst = max(reports, key=lambda report: report.largest)
    tokens = sum(report.tokens for report in reports)
    mean = sum(report.mean * report.tokens for report in reports) / max(tokens, 1)
    return dataclasses.replace(worst, mean=mean, tokens=tokens, rows=sum(report.rows for report in reports))


def save_tokenizer(folder: Path, policy: Policy) -> None:
    if policy.tokenizer is not None and not (folder / "tokenizer").exists():
        with written_aside(folder / "tokenizer") as aside:
            policy.tokenizer.save_pretrained(aside)


def cli() -> None:
    run_command(main, DumpJob)


if __name__ == "__main__":
    cli()
