"""Seconds of a PPO step on many GPUs: no phase is faster than its bytes over the bandwidth or its operations over the peak.

    sample          a prefill, then a step per token: weights and cache are read, or operations, or kernels started one by one
    score           one forward pass of policy, value and reference
    learn           epochs x (forward and backward pass of policy and value)
    communication   gradients and weights over the slowest link, as often as the engine sends them

`share` says how much of the peak is reached; what a rank waits for others, a reward takes, or Python does, is not in here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from steerl.training.planning.hardware import Machines
from steerl.training.planning.memory import Engine, PlannedStep, chunks, in_half
from steerl.training.planning.passes import cache_bytes, count, layers_of, plain_pass, training_pass
from steerl.training.planning.settings import Shares

_LAUNCHES = 36
"""Kernels that an eager layer starts in one step of decoding."""


@dataclass(frozen=True)
class Seconds:
    """Of one PPO step."""

    sample: float
    score: float
    learn: float
    communication: float

    @property
    def total(self) -> float:
        return self.sample + self.score + self.learn + self.communication


def seconds(work: PlannedStep, engine: Engine, machines: Machines, shares: Shares) -> Seconds:
    """Of one step, under one engine."""
    peak = machines.operations * shares.train
    rows = work.rows(machines.ranks)
    return Seconds(
        sample=_sample(work, machines, shares),
        score=rows * _forward(work, reference=work.has_reference) / peak,
        learn=work.ppo.epochs * rows * _update(work) / peak,
        communication=sent(work, engine, machines.ranks) / (machines.between * shares.network) if machines.ranks > 1 else 0.0,
    )


def _sample(work: PlannedStep, machines: Machines, shares: Shares) -> float:
    rows, together = work.rows(machines.ranks), work.decoded_together(machines.ranks)
    counts = count(work.policy)
    model = in_half(work.policy, work.precision)
    width = 2.0 if work.precision == "bf16" else counts.bytes / counts.all
    read = width * (counts.all - counts.vocabulary * counts.width * (counts.head > 0))  # rows of an embedding are picked
    cache = cache_bytes(model, together, work.prompt, work.response)
    half = cache * (work.prompt + work.response / 2) / (work.prompt + work.response)  # it grows
    logits = 4.0 * 5 * together * counts.vocabulary
    tokens = plain_pass(model, 1, work.prompt, work.response).operations / (work.prompt + work.response)
    step = max(
        (read + half + logits) / (machines.bandwidth * shares.decode),
        together * (tokens + 2 * counts.vocabulary * counts.width) / (machines.operations * shares.train),
        0.0 if work.sampling.compile else _LAUNCHES * layers_of(work.policy.config) * shares.launch_us * 1e-6,
    )
    prompts = together / work.sampling.n
    prefill = prompts * work.prompt * tokens / (machines.operations * shares.train)
    return math.ceil(rows / together) * (prefill + work.response * step)


def _forward(work: PlannedStep, *, reference: bool) -> float:
    """Operations of one row: policy, value, reference."""
    operations = 0.0
    for model in [work.policy, *([work.value] if work.value else []), *([work.policy] if reference else [])]:
        operations += plain_pass(in_half(model, work.precision), 1, work.prompt, work.response).operations
    return operations + _head(work) * (2 if reference else 1)


def _update(work: PlannedStep) -> float:
    """Operations of one row's forward and backward pass."""
    operations = 0.0
    for model in [work.policy, *([work.value] if work.value else [])]:
        operations += training_pass(
            in_half(model, work.precision), 1, work.prompt, work.response, checkpointing=work.ppo.checkpointing
        ).operations
    # Logits, those of all chunks but one again, the gradient of the states, and of the weight where it learns.
    counts = count(work.policy)
    parts = chunks(work, counts, work.micro_batch(1), "cuda")[1]
    return operations + _head(work) * (1 + (1 - 1 / parts) + 1 + counts.trains_head)


def _head(work: PlannedStep) -> float:
    counts = count(work.policy)
    return 2.0 * work.response * counts.vocabulary * counts.width


def sent(work: PlannedStep, engine: Engine, ranks: int) -> float:
    """Bytes that one GPU sends in a step: a ring passes (ranks - 1) / ranks of a tensor on to gather or to reduce it."""
    if ranks == 1:
        return 0.0
    models = [count(model) for model in (work.policy, work.value) if model is not None]
    halved = work.precision == "bf16" and engine != "ddp"
    weights = sum(2.0 * c.all if halved else c.bytes for c in models)
    trained = sum(2.0 * c.trained if halved else c.trained_bytes for c in models)
    ring = (ranks - 1) / ranks
    updates = work.ppo.epochs * work.ppo.minibatches
    passes = updates * work.micro_batches(ranks)
    if engine == "ddp":
        return ring * 2 * updates * trained
    if engine in ("zero1", "zero2"):
        reductions = updates if engine == "zero1" else passes
        return ring * (reductions * trained + updates * trained)
    policy = weights / len(models) if work.value else weights
    scored = weights + policy * work.has_reference  # a copy or the policy's own, it is spread as they are
    scoring = math.ceil(work.rows(ranks) / work.micro_batch(ranks)) * scored
    batches = math.ceil(work.rows(ranks) / work.decoded_together(ranks))
    sampling = policy * (1 if work.ppo.gather == "phase" else batches * work.response)
    return ring * (passes * (2 * weights + trained) + scoring + sampling)
