"""Memory of a PPO step on one GPU: what stands all the time, and what each phase adds. The total is the highest phase.

stands      weights, value, reference, optimizer states; ZeRO-3's gradients and the bucket that it sends them in, DDP's buckets
load        weights, value, reference + a tensor that is read
wrap        what stands, without the optimizer's moments, + weights brought together, or copied by the engine
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
from steerl.training.algorithm.custom import uses_value
from steerl.training.engine.optimizer import state_bytes
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
_SENT = 4.0 * 32 * 2**20
"""Bytes of gradients that are summed together under DDP (engine/gradients.py)."""
_BROADCAST = 250.0 * 2**20
"""Bytes of weights that DDP sends together as it begins."""
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
    stage3_prefetch_bucket_size: int = 50_000_000
    """Weights that ZeRO-3 sends for together."""
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
    coming = 0.0 if engine == "zero3" else size.gradients  # they have their place there
    held = policy + value + reference
    standing = size.gradients - coming + size.buckets - passing
    stands = held + size.masters + size.moments + standing
    live = _live(work, engine, counts, device, size.weights + size.value)
    largest = max(c.largest for c in counts) * size.width
    # The first passes, which observe: ZeRO-3 sends for nothing ahead before it has seen one, and its bucket is empty.
    first = live.most if engine == "fsdp2" else 2 * largest - (size.buckets if device == "cpu" else 0.0) if live.most else 0.0

    # A micro-batch of the update: both graphs stand at once, and one of them works at a time.
    rows = work.micro_batch(ranks)
    halves = _passes(work, engine, models, rows, trained=True)
    plain = _passes(work, engine, models, rows, trained=False)
    activations = _activations(work, halves) * (_HOLES if device == "cpu" else 1.0)
    logits = chunk_bytes(work, counts[0], rows, device)
    forward = sum(p.peak for p in plain)  # autocast's copies of both stand until the pass is over

    # Gradients come while activations go; from the second micro-batch on they stand from the beginning. The embedding's are
    # made whole at the very end, and added to what is there: the head's, where the two are one weight.
    head = head_gradient(counts[0])
    several = work.micro_batches(ranks) > 1
    ends = head * (counts[0].tied + several) if not live.root else live.root * (3 if device == "cpu" else 2)
    working = live.worked + head + activations + logits + (coming if several else 0.0)
    learn = passing + max(live.most, working, (live.root or live.most) + ends + coming)

    # Decoding: a batch's cache (one layer's is there twice while it grows), the logits of a step, bfloat16 copies of weights.
    batch = work.decoded_together(ranks)
    cache = cache_bytes(in_half(work.policy, work.precision), batch, work.prompt, work.response)
    whole = 2.0 * counts[0].all if work.precision == "bf16" else size.weights  # beside this rank's share
    gathered = 0.0 if size.spread == 1 else whole if work.ppo.gather == "phase" else min(live.most, whole)
    casts = counts[0].half_bytes if engine == "ddp" and work.precision == "bf16" else 0.0
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
        "engine": live.most + size.buckets,
    }
    phases = {
        "load": held + largest + (_mapped(work, engine, size, counts[0]) if device == "cpu" else 0.0),
        "wrap": held + size.masters + max(size.wrapped, standing + first),
        "sample": stands + sample,
        "score": stands + live.scored + forward + logits,
        "learn": stands + learn,
        "update": stands + size.stepped + coming,
        "save": stands + largest,
    }
    return Memory(parts, phases)


def _activations(work: PlannedStep, halves: list[PassCost]) -> float:
    """Of both graphs. What goes to the host leaves a layer's."""
    saved = [p.saved for p in halves]
    if work.ppo.offload_activations:
        saved = [0.0 if work.ppo.checkpointing else size / layers_of(work.policy.config) for size in saved]
    return sum(saved) + max(p.peak - p.saved for p in halves)


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
    buckets: float
    wrapped: float
    """What is copied while the engine wraps the models."""
    stepped: float
    """What the optimizer's step copies of the gradients."""
    spread: float
    """Over how many ranks the weights lie."""


def _sizes(work: PlannedStep, engine: Engine, ranks: int, counts: list[Counts], device: str) -> _Sizes:
    """What stands for every weight. DeepSpeed in bf16 keeps bfloat16 weights; the others what is stored."""
    groups = [counts[0].trained, *(c.trained - c.head_trained for c in counts[1:])]
    trained = sum(groups)
    head = counts[0].width * uses_value(work.ppo)  # the value's, one number out
    zero = engine.startswith("zero")
    halved = zero and work.precision == "bf16"
    trained_bytes = counts[0].trained_bytes + sum(_without_head(c) for c in counts[1:]) + 4.0 * head
    width = 2.0 if halved else trained_bytes / max(trained + head, 1)
    gradients = width * (trained + head)
    state = state_bytes(work.ppo)
    # in float32 under ZeRO, in 8 bits whatever the weights are in, else as wide as the weights
    moments = state * (trained if zero or work.ppo.optimizer == "adamw8bit" else trained_bytes / 4)
    return _Sizes(
        weights=2.0 * counts[0].all if halved else counts[0].bytes,
        value=sum((2.0 * (c.all - c.head) if halved else c.value_bytes) for c in counts[1:]),
        reference=2.0 * counts[0].all if work.precision == "bf16" and engine != "ddp" else counts[0].bytes,
        width=2.0 if halved else counts[0].bytes / counts[0].all,
        gradients=gradients / (ranks if engine in ("zero2", "zero3", "fsdp2") else 1),
        masters=4.0 * trained / ranks if zero else 0.0,  # in float32 beside float32 weights, too
        moments=moments / (1 if engine == "ddp" else ranks),
        spread=ranks if engine in SPREAD else 1,
        **_copies(work, engine, ranks, device, gradients, width * max(groups), max(groups) / ranks),
    )


def _copies(
    work: PlannedStep, engine: Engine, ranks: int, device: str, gradients: float, weights: float, share: float
) -> dict[str, float]:
    """Engines' own buffers. `weights`: bytes of the optimizer's largest group; `share`: a rank's numbers of it. A CPU gives no
    pages that nothing is put into."""
    on_cpu, sizes = device == "cpu", work.buffers
    width = 2.0 if work.precision == "bf16" else 4.0
    if engine == "ddp":
        sent = min(_SENT, gradients) if ranks > 1 else 0.0  # gradients are summed by us, buckets stay as they are
        buckets = gradients if ranks > 1 and not on_cpu else 0.0
        return {"buckets": buckets, "wrapped": 2 * min(_BROADCAST, gradients) if ranks > 1 else 0.0, "stepped": sent}
    if engine == "fsdp2":
        return {"buckets": 0.0, "wrapped": 0.0, "stepped": 0.0}
    bucket = sizes.reduce_bucket_size * width
    if engine == "zero3":
        share = min(share, sizes.sub_group_size)
    return {
        "buckets": min(bucket, gradients) if on_cpu else bucket,
        "wrapped": weights if on_cpu and engine != "zero3" else 4.0 * share,  # GPUs without the room flatten on the host
        "stepped": share * (6.0 if width == 2.0 else 4.0),  # flat, and in float32
    }


def _without_head(counts: Counts) -> float:
    """Trained bytes of a value's trunk: trained heads are as wide as what is trained on average."""
    return counts.trained_bytes * (1 - counts.head_trained / max(counts.trained, 1))


@dataclass(frozen=True)
class _Live:
    """Weights that a layer-by-layer pass brings together."""

    most: float
    scored: float
    """While the reference is run: FSDP2 leaves the root's of actor and critic together until they learn."""
    worked: float
    """While activations stand."""
    root: float = 0.0
    """FSDP2's outside of layers: embeddings and head, together through forward and backward pass."""


def _live(work: PlannedStep, engine: Engine, counts: list[Counts], device: str, weights: float) -> _Live:
    width = 2.0 if work.precision == "bf16" else 4.0
    if engine == "zero3":
        # Weights are copied out of what was gathered; gloo copies once more.
        copied = work.buffers.stage3_prefetch_bucket_size * (2 if device == "cpu" else 1)
        together = width * (work.buffers.stage3_max_live_parameters + counts[0].largest + copied)
        return _Live(*[min(together, weights)] * 3)
    if engine != "fsdp2":
        return _Live(0.0, 0.0, 0.0)
    embedding = width * counts[0].vocabulary * counts[0].width
    own = embedding * (2 if counts[0].head else 1)
    root = own + embedding * len(counts[1:])
    block = (width * counts[0].all - own) / layers_of(work.policy.config)

    def most(root: float) -> float:
        """Weights are copied out of what was gathered, which goes when the next layer has come; gloo copies once more."""
        return max(2 * root + block, root + 2 * block) + (block if device == "cpu" else 0.0)

    scored = max(most(root), root + most(own)) if work.copies_reference else most(root)
    return _Live(most(root), scored, root + 3 * block, root)


def _mapped(work: PlannedStep, engine: Engine, size: _Sizes, counts: Counts) -> float:
    """Pages of the file that stand while it is read: ZeRO-3's first rank reads all, FSDP2's each its share. The policy stays in
    them where it is as it is stored, one process's own."""
    config = work.policy.config
    stored = torch.finfo(config.dtype).bits / 8 if isinstance(config.dtype, torch.dtype) else 4.0
    if size.spread == 1 and stored == size.width:
        return 0.0
    return stored * counts.all / (size.spread if engine == "fsdp2" else 1)


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
