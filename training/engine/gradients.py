"""Gradients of a minibatch: accumulated over micro-batches, summed over ranks, clipped once.

    micro-batch, micro-batch, ... --accumulating--> gradients of this rank --summed_over_ranks--> clipped --> optimizer step

Replicas (DDP) are summed here, once, after the last micro-batch, and not by DDP's own hooks: those count a weight that the
last micro-batch did not use (an expert, an encoder's global attention) as done, and its gradient would stay this rank's own.
DeepSpeed and FSDP reduce by themselves.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steerl.rollout.common import processes
from steerl.training.types import TrainState

_BUCKET = 32 * 2**20
"""Numbers that are sent together."""


@contextlib.contextmanager
def accumulating(state: TrainState, *, last: bool) -> Iterator[float]:
    """Around the forward and backward pass of a micro-batch; yields the factor that its loss is to have.

    Losses are shares of one global sum. Engines that reduce gradients themselves (ZeRO, FSDP) divide the sum by the number of
    ranks, which the factor undoes."""
    if is_deepspeed(state.model):
        state.model.set_gradient_accumulation_boundary(last)
        yield float(processes.start().world_size)
        return
    if isinstance(state.model, DistributedDataParallel):
        with state.model.no_sync():
            yield 1.0
        return
    with contextlib.nullcontext() if last else state.accelerator.no_sync(state.model):
        yield float(processes.start().world_size)


def backward(state: TrainState, loss: Tensor) -> None:
    """Inside `accumulating`. accelerate's own would take DeepSpeed's optimizer step along with the last micro-batch."""
    if is_deepspeed(state.model):
        state.model.backward(loss)
    else:
        state.accelerator.backward(loss)


def is_deepspeed(model: object) -> bool:
    return type(model).__name__ == "DeepSpeedEngine"


def finish(state: TrainState, bound: float) -> float:
    """Sum over ranks, clip to the bound (0 = none), and return the norm before clipping.

    DeepSpeed does this in one with its optimizer step (with `bound` in its config), and leaves the weights as they were
    where the norm is no finite number."""
    if is_deepspeed(state.model):
        state.model.step()
        return float(state.model.get_global_grad_norm()) if state.model.was_step_applied() else math.nan
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    if isinstance(state.model, DistributedDataParallel):
        summed_over_ranks(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(hasattr(gradient, "full_tensor") for gradient in gradients):  # FSDP's
        return float(state.accelerator.clip_grad_norm_(parameters, bound or math.inf))
    norm = torch.nn.utils.get_total_norm(gradients)
    if bound and float(bound / (norm + 1e-6)) < 1:  # torch's own goes through every gradient, and mostly multiplies by 1
        torch.nn.utils.clip_grads_with_norm_(parameters, bound, norm)
    return float(norm)


def summed_over_ranks(parameters: list[nn.Parameter]) -> None:
    """Every gradient becomes its sum over ranks. A weight that no rank used keeps none, as in one process."""
    device = parameters[0].device
    used = processes.sum_(torch.tensor([float(p.grad is not None) for p in parameters], device=device))
    bucket: list[Tensor] = []
    for parameter, count in zip(parameters, used.tolist(), strict=True):
        if not count:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (bucket[0].dtype != parameter.grad.dtype or sum(g.numel() for g in bucket) + parameter.numel() > _BUCKET):
            _sum_together(bucket)
            bucket = []
        bucket.append(parameter.grad)
    if bucket:
        _sum_together(bucket)


def _sum_together(gradients: list[Tensor]) -> None:
    flat = processes.sum_(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
