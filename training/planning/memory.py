"""Memory of a PPO step on one GPU: what stands all the time, and what each phase adds. The total is the highest phase.

stands      weights, value, reference, optimizer states; ZeRO-3's gradients and the bucket that it sends them in
load        what stands, without the optimizer's moments, + a tensor that is read
sample      + weights brought together + KV cache + the logits of a step of decoding
score       + what a forward pass of a micro-batch takes at most, and logits: no graph is kept
learn       + gradients + activations and logits of a micro-batch
update      + gradients + what the optimizer works with
save        + a tensor that is brought together
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.scoring.chunked_head import CHUNK
from steerl.training.planning.passes import (
    Blueprint,
    Counts,
    PassCost,
    cache_bytes,
    count,
    layers_of,
    plain_pass,
    training_pass,
)
from steerl.training.settings import PPOSettings

Engine = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
ENGINES: tuple[Engine, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SPREAD = ("zero3", "fsdp2")
"""Those that spread the weights themselves."""
GB = 1e9
_HOLES = 1.2
"""On a CPU the heap keeps holes between activations: so much more than the tensors take (1.0 where every tensor is mapped by
itself, MALLOC_MMAP_THRESHOLD_=65536)."""


@dataclass(frozen=True)
class Buffers:
    """DeepSpeed's own sizes, in numbers; the defaults are its defaults, and a config file for accelerate may say others."""

    reduce_bucket_size: int = 500_000_000
    """Gradients that are reduced together: a buffer that is always that large."""
    stage3_max_live_parameters: int = 1_000_000_000
    """Weights that ZeRO-3 holds together at most, beside those of one layer."""
    sub_group_size: int = 1_000_000_000
    """Numbers of a rank that ZeRO-3's optimizer steps together."""

    @staticmethod
    def of(config: Mapping[str, Any]) -> Buffers:
        """From `deepspeed_config` of an accelerate file, or a DeepSpeed configuration."""
        zero = config.get("zero_optimization", config)
        names = [field.name for field in dataclasses.fields(Buffers)]
        return Buffers(**{name: int(float(zero[name])) for name in names if name in zero})


@dataclass(frozen=True)
class PlannedStep:
    """What one PPO step does, whatever it runs on."""

    policy: Blueprint
    value: Blueprint | None
    """Of the value's own model; None where it shares the policy's, or there is none."""
    ppo: PPOSettings
    sampling: Sampling
    prompt: int
    """Tokens of the longest prompt."""
    precision: Literal["bf16", "no"] = "bf16"
    """accelerate's mixed_precision."""
    episode: int = 0
    """Tokens of the longest episode, all that follows the prompt; 0 = rows have one turn."""
    buffers: Buffers = Buffers()

    @property
    def response(self) -> int:
        return self.episode or self.sampling.max_new_tokens

    @property
    def adapted(self) -> bool:
        return bool(self.policy.peft)

    @property
    def copies_reference(self) -> bool:
        """`auto` needs no copy beside a fresh adapter."""
        return self.ppo.reference == "copy" or (self.ppo.reference == "auto" and not self.adapted)

    @property
    def has_reference(self) -> bool:
        return self.ppo.reference != "none"

    def rows(self, ranks: int) -> int:
        """Rollouts of a step on one rank."""
        return -(-self.ppo.rollouts_per_step // ranks)

    def decoded_together(self, ranks: int) -> int:
        return min(self.sampling.batch_size, self.rows(ranks))

    def micro_batch(self, ranks: int) -> int:
        """Rows that learn together on one rank, all of full length: `micro_batch_tokens` counts in tokens."""
        rows = self.ppo.micro_batch_size
        if self.ppo.micro_batch_tokens:
            rows = max(1, self.ppo.micro_batch_tokens // (self.prompt + self.response))
        return min(rows, self.minibatch(ranks))

    def minibatch(self, ranks: int) -> int:
        """One rank's rows of a minibatch."""
        return -(-(self.ppo.rollouts_per_step // self.ppo.minibatches) // ranks)

    def micro_batches(self, ranks: int) -> int:
        """Of one rank in one minibatch."""
        return -(-self.minibatch(ranks) // self.micro_batch(ranks))


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    parts: dict[str, float]
    """What there is, each at its own largest."""
    phases: dict[str, float]
    """What stands together in each phase of a step, at most."""

    @property
    def total(self) -> float:
        return max(self.phases.values())

    @property
    def highest(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])


def memory(work: PlannedStep, engine: Engine, ranks: int, *, device: Literal["cuda", "cpu"] = "cuda") -> Memory:
    """Of one process of `ranks` under an engine. `device`: chunks of logits and allocators differ."""
    models = [model for model in (work.policy, work.value) if model is not None]
    counts = [count(model) for model in models]
    size = _sizes(work, engine, ranks, counts, device)
    policy, value = size.weights / size.spread, size.value / size.spread
    reference = size.reference / size.spread if work.copies_reference else 0.0
    passing = 0.0 if engine in ("ddp", "zero3") else size.buckets  # there and gone with each backward pass
    loaded = policy + value + reference + size.masters + size.buckets - passing + size.gradients * (engine == "zero3")
    stands = loaded + size.moments
    live = _live(work, engine, size.weights + size.value)
    largest = max(c.largest for c in counts) * size.width

    # A micro-batch of the update: both graphs stand at once, and one of them works at a time.
    rows = work.micro_batch(ranks)
    halves = _passes(work, engine, models, rows, trained=True)
    plain = _passes(work, engine, models, rows, trained=False)
    activations = sum(p.saved for p in halves) + max(p.peak - p.saved for p in halves)
    activations *= _HOLES if device == "cpu" else 1.0
    logits = chunk_bytes(work, counts[0], rows, device)
    forward = sum(p.peak for p in plain)  # autocast's copies of both stand until the pass is over

    # Gradients come while activations go; from the second micro-batch on they stand from the beginning. The embedding's are
    # made whole at the very end, and added to what is there: the head's, where the two are one weight.
    head = head_gradient(counts[0])
    coming = 0.0 if engine == "zero3" else size.gradients  # they have their place there
    first = max(head + activations + logits, coming + (head if counts[0].tied else 0.0))
    again = max(head + activations + logits, head * (2 if counts[0].tied else 1)) + coming
    learn = again if work.micro_batches(ranks) > 1 else first

    # Decoding: a batch's cache (one layer's is there twice while it grows), the logits of a step, bfloat16 copies of weights.
    batch = work.decoded_together(ranks)
    cast = engine in ("ddp", "fsdp2") and work.precision == "bf16"
    cache = cache_bytes(in_half(work.policy, work.precision), batch, work.prompt, work.response)
    whole = 2.0 * counts[0].all if work.precision == "bf16" else size.weights  # beside this rank's share
    gathered = 0.0 if size.spread == 1 else whole if work.ppo.gather == "phase" else min(live, whole)
    casts = counts[0].half_bytes if cast and engine == "ddp" else 0.0
    decoded = decoding_logits(work, counts[0].vocabulary, batch)
    sample = gathered + cache * (1 + 1 / layers_of(work.policy.config)) + decoded + casts

    parts = {
        "weights": policy,
        "gradients": size.gradients,
        "optimizer": size.masters + size.moments,
        "reference": reference,
        "value": value,
        "cache": cache,
        "activations": activations,
        "logits": max(logits, decoded),
        "engine": live + size.buckets,
    }
    phases = {
        "load": loaded + largest,
        "sample": stands + sample,
        "score": stands + live + forward + logits,
        "learn": stands + live + passing + learn,
        "update": stands + size.stepped + coming,
        "save": stands + largest,
    }
    return Memory(parts, phases)


# -- weights and what goes with them -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    weights: float
    value: float
    reference: float
    width: float
    """Bytes of a weight as it is used."""
    gradients: float
    masters: float
    moments: float
    stepped: float
    """The gradients of what is stepped together, as DeepSpeed copies them: flat, and in float32."""
    buckets: float
    spread: float
    """Over how many ranks the weights lie."""


def _sizes(work: PlannedStep, engine: Engine, ranks: int, counts: list[Counts], device: str) -> _Sizes:
    """What stands for every weight. DeepSpeed in bf16 keeps bfloat16 weights and float32 masters; the others what is stored."""
    groups = [counts[0].trained, *(c.trained - c.head_trained for c in counts[1:])]
    trained = sum(groups)
    head = counts[0].width * (work.ppo.credit == "gae")  # the value's, one number out
    zero = engine.startswith("zero")
    halved = zero and work.precision == "bf16"
    trained_bytes = counts[0].trained_bytes + sum(_without_head(c) for c in counts[1:]) + 4.0 * head
    width = 2.0 if halved else trained_bytes / max(trained + head, 1)
    gradients = width * (trained + head)
    bucket = work.buffers.reduce_bucket_size * (2.0 if halved else 4.0)
    stepped = max(groups) / ranks
    if engine == "zero3":
        stepped = min(stepped, work.buffers.sub_group_size)
    return _Sizes(
        weights=2.0 * counts[0].all if halved else counts[0].bytes,
        value=sum((2.0 * (c.all - c.head) if halved else c.value_bytes) for c in counts[1:]),
        reference=2.0 * counts[0].all if halved else counts[0].bytes,
        width=2.0 if halved else counts[0].bytes / counts[0].all,
        gradients=gradients / (ranks if engine in ("zero2", "zero3", "fsdp2") else 1),
        masters=4.0 * trained / ranks if engine in ("zero1", "zero2") or halved else 0.0,
        moments=2 * (4.0 * trained if zero else trained_bytes) / (1 if engine == "ddp" else ranks),  # two per number
        stepped=stepped * (6.0 if halved else 4.0) if zero else 0.0,
        # DDP holds buckets as large as all gradients, whether it reduces or not. A CPU gives no pages that nothing is put into.
        buckets={"ddp": gradients if ranks > 1 else 0.0, "fsdp2": 0.0}.get(
            engine, bucket if device == "cuda" else min(bucket, gradients)
        ),
        spread=ranks if engine in SPREAD else 1,
    )


def _without_head(counts: Counts) -> float:
    """Trained bytes of a value's trunk: trained heads are as wide as what is trained on average."""
    return counts.trained_bytes * (1 - counts.head_trained / max(counts.trained, 1))


def _live(work: PlannedStep, engine: Engine, weights: float) -> float:
    """Weights that a layer-by-layer pass holds together."""
    if engine == "zero3":
        counts = count(work.policy)
        together = work.buffers.stage3_max_live_parameters + counts.largest
        return min(together * (2.0 if work.precision == "bf16" else 4.0), weights)
    if engine == "fsdp2":  # this block and the next, embedding and head
        counts = count(work.policy)
        width = 2.0 if work.precision == "bf16" else 4.0
        ends = counts.vocabulary * counts.width * (2 if counts.head else 1)
        return width * (ends + 2 * (counts.all - ends) / layers_of(work.policy.config))
    return 0.0


# -- passes --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def in_half(blueprint: Blueprint, precision: str) -> Blueprint:
    """With weights of the precision that products are taken in."""
    return dataclasses.replace(blueprint, dtype=torch.bfloat16) if precision == "bf16" else blueprint


def computed(blueprint: Blueprint, engine: Engine, precision: str) -> Blueprint:
    """As the engine computes with it: DeepSpeed and FSDP2 bring bfloat16 weights, DDP casts them in every operation."""
    return blueprint if engine == "ddp" else in_half(blueprint, precision)


def _passes(work: PlannedStep, engine: Engine, models: list[Blueprint], rows: int, *, trained: bool) -> list[PassCost]:
    autocast = work.precision == "bf16" and engine == "ddp"
    taken = [computed(model, engine, work.precision) for model in models]
    if not trained:
        return [plain_pass(model, rows, work.prompt, work.response, autocast=autocast) for model in taken]
    again = work.ppo.checkpointing
    return [training_pass(model, rows, work.prompt, work.response, checkpointing=again, autocast=autocast) for model in taken]


# -- logits: what rollout/scoring/chunked_head.py and rollout/decoding/distribution.py make of them ---------------------------


def chunks(work: PlannedStep, counts: Counts, rows: int, device: str) -> tuple[int, int]:
    """(logits that are computed together, how many times), for a micro-batch of `rows` rows."""
    positions = rows * work.response
    together = max(1, CHUNK[device] // counts.vocabulary)
    parts = -(-positions // together)
    return -(-positions // parts) * counts.vocabulary, parts


def chunk_bytes(work: PlannedStep, counts: Counts, rows: int, device: str) -> float:
    """Scores and probabilities of a chunk in float32; with bfloat16 products the logits as they came, and the head's weight."""
    numbers, _ = chunks(work, counts, rows, device)
    half = work.precision == "bf16"
    return numbers * (4.0 + 4.0 + 2.0 * half) + (2.0 * counts.vocabulary * counts.width if half else 0.0)


def head_gradient(counts: Counts) -> float:
    """Added up over chunks in float32."""
    return 4.0 * counts.vocabulary * counts.width if counts.trains_head else 0.0


def decoding_logits(work: PlannedStep, vocabulary: int, rows: int) -> float:
    """One step's logits and the draw's buffers: shifted, weights, products; one more where they are cast or tempered."""
    cast = work.precision == "bf16" or work.sampling.temperature != 1
    return rows * vocabulary * 4.0 * (5 if cast else 4)
