"""What a PPO job needs before it is started: memory of a GPU and seconds of a step, by strategy, and which one to take.

steerl plan --model.path DIR --gpus 8 --memory 80          reads DIR/config.json, no weights
steerl plan --config steerl:ppo --model.path DIR --gpus 8 --nodes 4 --gpu h200 --prompt_tokens 512

All settings of `steerl ppo` count, by flag or from its YAML files.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from steerl.configs.reader import run_command

import yaml

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError, reading
from steerl.rollout.model.settings import ModelSettings, adapter_config
from steerl.scripts.train_ppo import PPOJob, learnable
from steerl.training.planning.settings import Shares

if TYPE_CHECKING:
    from steerl.training.planning.hardware import Machines
    from steerl.training.planning.memory import Buffers, PlannedStep
    from steerl.training.planning.passes import Blueprint


@dataclass(frozen=True)
class PlanJob(PPOJob):
    """Plan a PPO job: memory of a GPU and seconds of a step."""

    gpus: int = 1
    """GPUs of a node."""
    nodes: int = 1
    """Nodes to begin with; more are tried."""
    gpu: str = "h100"
    """Whose figures are taken where none are given: a100, a100-40, h100, h200, b200, l4, l40s, mi300x."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: what a process on a CPU takes, to compare with its peak."""
    memory: float | None = None
    """GB of one GPU; unset = the named GPU's."""
    headroom: float = 0.1
    """Share of the memory that is left free: CUDA's own, fragments, what is not planned."""
    tflops: float | None = None
    """TFLOP/s of matrix products in the job's precision; unset = the named GPU's."""
    bandwidth: float | None = None
    """GB/s between a GPU's memory and its cores; unset = the named GPU's."""
    link: float | None = None
    """GB/s from a GPU to the others of its node, one way; unset = the named GPU's."""
    network: float = 50.0
    """GB/s from a GPU to other nodes."""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """accelerate's: bf16, or no for float32."""
    accelerate: str = ""
    """accelerate's config file whose sizes of DeepSpeed's buffers are taken; none = DeepSpeed's own."""
    prompt_tokens: int = 256
    """Tokens of the longest prompt; prompts.max_tokens where that is less."""
    measure: bool = False
    """Take matrix products and bandwidth from a measurement on this machine."""
    shares: Shares = field(default_factory=Shares)
    """How much of each limit is reached."""
    json: bool = False
    """One JSON object instead of a table."""


def main(job: PlanJob) -> None:
    from steerl.training.planning.plan import LORA, advise, as_mapping, flags, rows, table, words

    check(job)
    machines = machines_of(job)
    works = [work_of(job, None), work_of(job, job.model.peft or LORA)]
    asked = works[1] if job.model.peft else works[0]
    usable = machines.memory * (1 - job.headroom)
    found = rows(works, machines, job.shares, usable)
    advice = advise(asked, works[1], machines, job.shares, usable)
    if job.json:
        print(
            json.dumps(
                {
                    "machines": dataclasses.asdict(machines) | {"usable": usable},
                    "rows": [as_mapping(row) for row in found],
                    "advice": as_mapping(advice.row) | {"flags": flags(advice.row, machines)} if advice.row else None,
                    "least": as_mapping(advice.least),
                    "engines": {name: as_mapping(row) for name, row in advice.engines.items()},
                    "more_nodes": {nodes: as_mapping(row) for nodes, row in advice.nodes.items()},
                    "would_fit": {name: as_mapping(row) for name, row in advice.others.items()},
                },
                indent=2,
            )
        )
        return
    for line in (*heading(job, asked, machines), "", *table(found), "", *words(advice, machines, usable)):
        print(line)


def check(job: PlanJob) -> None:
    """Numbers that cannot be."""
    positive: dict[str, float | None] = {
        "gpus": job.gpus, "nodes": job.nodes, "memory": job.memory, "tflops": job.tflops, "bandwidth": job.bandwidth,
        "link": job.link, "network": job.network, "prompt_tokens": job.prompt_tokens,
    } | {f"shares.{name}": value for name, value in dataclasses.asdict(job.shares).items() if name != "launch_us"}  # fmt: skip
    problems = [
        f"{name}: {value:g}, but it must be above 0" for name, value in positive.items() if value is not None and value <= 0
    ]
    if job.dry_run:
        problems.append("dry_run: true, but a plan starts nothing; leave it out")
    if not 0 <= job.headroom < 1:
        problems.append(f"headroom: {job.headroom:g}, but it is a share of the memory; set 0 or more and less than 1")
    if problems:
        raise UserError(*problems)


def machines_of(job: PlanJob) -> Machines:
    import torch

    from steerl.training.planning.hardware import GIGA, TERA, Machines, measure_device, named

    gpu = named(job.gpu)
    operations = (gpu.half if job.mixed_precision == "bf16" else gpu.single) * TERA
    bandwidth, memory = gpu.bandwidth * GIGA, gpu.memory * GIGA
    if job.measure:
        device = processes.start().device
        operations, bandwidth = measure_device(device, torch.bfloat16 if job.mixed_precision == "bf16" else torch.float32)
        if device.type == "cuda":
            memory = float(torch.cuda.get_device_properties(device).total_memory)
    return Machines(
        gpus=job.gpus,
        nodes=job.nodes,
        memory=memory if job.memory is None else job.memory * GIGA,
        operations=operations if job.tflops is None else job.tflops * TERA,
        bandwidth=bandwidth if job.bandwidth is None else job.bandwidth * GIGA,
        link=(gpu.link if job.link is None else job.link) * GIGA,
        network=job.network * GIGA,
        device=job.device,
    )


def work_of(job: PlanJob, peft: dict[str, object] | None) -> PlannedStep:
    """The job, with an adapter or without; the policy is loaded in the precision that training would load it in."""
    from steerl.training.algorithm.custom import uses_value
    from steerl.training.planning.memory import PlannedStep
    from steerl.training.planning.passes import Blueprint

    if peft:
        adapter_config(peft)
    model = dataclasses.replace(job.model, peft=peft)
    policy = Blueprint.of(learnable(model))
    value: Blueprint | None = None
    if uses_value(job.ppo) and job.ppo.value != "shared":
        value = policy
        if job.ppo.value != "separate":
            value = Blueprint.of(ModelSettings(path=job.ppo.value, dtype="float32"), "ppo.value", like=policy)
    prompt = max(min(job.prompt_tokens, job.prompts.max_tokens or job.prompt_tokens), 1)
    episode, context = 0, getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    if job.environment.given:
        episode = job.environment.longest(job.sampling.max_new_tokens)
        episode = min(episode, max(context - prompt, 1)) if context else episode
    return PlannedStep(policy, value, job.ppo, job.sampling, prompt, job.mixed_precision, episode, buffers_of(job.accelerate))


def buffers_of(path: str) -> Buffers:
    """Of an accelerate file, or of the DeepSpeed file that it names."""
    from steerl.training.planning.memory import Buffers

    if not path:
        return Buffers()
    with reading(f"accelerate: {path!r} cannot be read as an accelerate config: "):
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["deepspeed_config"]
        if file := config.get("deepspeed_config_file"):
            config = json.loads(Path(file).read_text(encoding="utf-8"))
        return Buffers.of(config)


def heading(job: PlanJob, work: PlannedStep, machines: Machines) -> list[str]:
    from steerl.training.algorithm.custom import uses_value
    from steerl.training.planning.hardware import GIGA, TERA
    from steerl.training.planning.passes import count

    counts = count(work.policy)
    return [
        f"{job.model.path}: {counts.all / 1e9:.3f} billion weights, {counts.trained / 1e9:.3f} trained; vocabulary "
        f"{counts.vocabulary:,}",
        f"{job.ppo.rollouts_per_step} rollouts of {work.prompt} + {work.response} tokens, {job.ppo.epochs} epochs, value "
        f"{job.ppo.value if uses_value(job.ppo) else 'none'}, mixed_precision {job.mixed_precision}",
        f"{machines.nodes} x {machines.gpus} GPUs of {machines.memory / GIGA:.0f} GB ({1 - job.headroom:.0%} planned with), "
        f"{machines.operations / TERA:.4g} TFLOP/s, {machines.bandwidth / GIGA:,.4g} GB/s, links {machines.link / GIGA:,.4g} "
        f"and {machines.network / GIGA:,.4g} GB/s" + (" (measured here)" if job.measure else ""),
    ]


def cli() -> None:
    run_command(main, PlanJob)


if __name__ == "__main__":
    cli()
