"""What wraps a run's actor and critic: nothing, DDP, DeepSpeed (ZeRO 1-3) or FSDP2, as accelerate's config file says.

    engine           spread over ranks                      gradients (gradients.py)          generation
    one process, DDP nothing                                summed once per optimizer step    the policy as it is
    ZeRO-1, ZeRO-2   optimizer states; gradients too        DeepSpeed's, times ranks          the policy as it is
    ZeRO-3, FSDP2    the weights as well                    the engine's, times ranks         EngineSampler: ppo.gather

    start ── models of unread weights ── place: each weight read to where it is held ── optimizer ── wrap ── observe

A copied reference is held as the policy is. Where weights are spread, a rank reads its share of each out of the file.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from steerl.rollout.common import processes
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.environments.sampler import EpisodeSampler
from steerl.rollout.model import unread
from steerl.rollout.model.sharding import by_zero3, gathered
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring.logit_postprocessing import logit_postprocessing
from steerl.rollout.types import Samples
from steerl.training.engine import zero
from steerl.training.engine.zero import DTYPES
from steerl.training.model.actor_critic import ActorCritic, pack_rows
from steerl.training.model.held import Held, read_whole
from steerl.training.model.reference import Reference
from steerl.training.settings import PPOSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer


def start() -> Accelerator:
    """accelerate's Accelerator. What it accumulates by itself is nothing: micro-batches are the update's business."""
    zero.ready()
    # Its new name, forward_sync_buffers, is not one that accelerate passes on.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`broadcast_buffers` is deprecated")
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    accelerator = Accelerator(
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if uses_deepspeed(accelerator):
        zero.models_stay_whole()
    return accelerator


def place(accelerator: Accelerator, actor_critic: ActorCritic, reference: Reference | None, settings: PPOSettings) -> None:
    """Have every weight where it is held, in the dtype that it is used in: each rank's share, where the engine spreads them."""
    held: list[Held] = [actor_critic]
    if reference is not None:
        reference.autocast, reference.inside = accelerator.autocast, (reference.held or actor_critic).inside
        held += [reference.held] if reference.held is not None else []
    for module in held:
        unread.to_device(module, accelerator.device)
    if uses_deepspeed(accelerator):
        zero.place(accelerator, held, settings)
    elif is_fsdp2(accelerator):
        for module in held:
            for parameter in module.parameters():
                if not parameter.is_contiguous():  # a rotation that learns: FSDP takes rows that lie one after another
                    parameter.data = parameter.data.contiguous()
            if module is not actor_critic:
                unread.cast(module, DTYPES.get(accelerator.mixed_precision))  # as it is computed with
            fully_shard(accelerator, module)
    else:
        read_whole(held)


def fully_shard(accelerator: Accelerator, module: Held) -> None:
    """FSDP2: of each weight a rank keeps its own rows, and reads no others."""
    from accelerate.utils import fsdp2_prepare_model

    fsdp2_prepare_model(accelerator, module)


def wrap(
    accelerator: Accelerator, actor_critic: ActorCritic, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """(model, optimizer) as the engine wants them."""
    if uses_deepspeed(accelerator):
        return zero.wrap(accelerator, actor_critic, optimizer)
    if is_fsdp2(accelerator):  # its optimizer has been made of its own weights
        return actor_critic, accelerator.prepare_optimizer(optimizer)
    return accelerator.prepare(actor_critic, optimizer)


def observe(actor_critic: ActorCritic, reference: Reference | None, settings: PPOSettings) -> None:
    """What is seen of the models by passes of theirs is seen here, where every rank comes."""

    def look() -> None:
        for policy in actor_critic.policies if processes.is_distributed() else ():
            _ = policy.capabilities
        logit_postprocessing(actor_critic.policy)
        if settings.packing:
            pack_rows(actor_critic, reference)

    actor_critic.inside(look)
    if reference is not None and reference.held is not None:
        reference.held.inside(lambda: logit_postprocessing(reference.policy))


def uses_deepspeed(accelerator: Accelerator) -> bool:
    return getattr(accelerator, "deepspeed_plugin", None) is not None


def is_fsdp2(accelerator: Accelerator) -> bool:
    return bool(accelerator.is_fsdp2)


def holder(accelerator: Accelerator) -> str:
    """The engine that has cut or taken over weights or their updates; empty with one process and DDP."""
    return "DeepSpeed" if uses_deepspeed(accelerator) else "FSDP" if is_fsdp2(accelerator) else ""


class EngineSampler:
    """A Sampler of the policy as its engine holds it: in the engine's precision, the weights together on every rank for a whole
    phase of sampling, or layer by layer (ppo.gather)."""

    def __init__(self, sampler: Sampler | EpisodeSampler, accelerator: Accelerator, actor_critic: ActorCritic, gather: str):
        self.sampling = sampler.sampling
        self._sampler, self._accelerator, self._actor_critic, self._gather = sampler, accelerator, actor_critic, gather

    def draw(self, prompts: PromptBatch, /, *, step: int = 0, progress: float = 0.0) -> Samples:
        """Responses of the policy as it stands; every rank comes here at the same time."""

        phase, model = self._gather == "phase", self._actor_critic

        def sampled() -> Samples:
            whole = gathered(*model.policy_modules()) if phase else contextlib.nullcontext()
            with whole, self._accelerator.autocast():
                return self._sampler.sample(prompts, step=step, progress=progress)

        # ZeRO-3 brings weights together anywhere, FSDP inside the root's forward pass alone
        return sampled() if phase and by_zero3(model) else model.inside(sampled)

    def weights_changed(self, step: int) -> None:
        self._sampler.weights_changed(step)

    def close(self) -> None:
        self._sampler.close()
