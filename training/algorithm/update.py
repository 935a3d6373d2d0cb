"""The update of one step: epochs x minibatches, each accumulated over micro-batches and ranks into one optimizer step.

minibatch (global) --> this rank's micro-batches: forward, losses as sums over one global count, backward
                   --> sum over ranks, clip once (gradients.py) --> optimizer step
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from steerl.rollout.common import processes
from steerl.rollout.common.errors import Broken
from steerl.training.algorithm import kl, loss
from steerl.training.algorithm.custom import OWN, custom_loss
from steerl.training.algorithm.minibatch import minibatches, passes, select
from steerl.training.algorithm.schedule import share_of_rate
from steerl.training.engine.gradients import accumulating, backward, finish
from steerl.training.model.offload import offloaded
from steerl.training.settings import PPOSettings, is_custom
from steerl.training.types import Experience, MinibatchStats, PolicyOutput, TrainState, UpdateStats


def learn(state: TrainState, experience: Experience, settings: PPOSettings, *, seed: int) -> UpdateStats:
    """Change the weights in place; what was measured on the way.

    PPO details: every epoch shuffles the rows anew; learning rates fall over the steps; early stop: a minibatch whose
    approximate KL exceeds `stop_kl` is the step's last. A minibatch without any action (all of its rows screened out) is left
    out: the optimizer's momentum would move weights that nothing speaks for."""
    set_learning_rates(state.optimizer, settings, state.step)
    done: list[MinibatchStats] = []
    for epoch in range(settings.epochs):
        for rows in minibatches(experience.rollout, count=settings.minibatches, seed=seed, step=state.step, epoch=epoch):
            if not bool(experience.rollout.action_mask_BR[rows].any()):
                continue
            done.append(update(state, experience, rows, settings))
            if state.step == settings.value_warmup_steps and len(done) == 2:
                check_first_move(done[-1].approx_kl, settings, state.step)
            if settings.stop_kl is not None and done[-1].approx_kl > settings.stop_kl:
                break
        else:
            continue
        break
    worst = max(processes.gather_objects([one.ratio_error for one in done[:1]]), default=0.0)
    return UpdateStats.of(done, worst, state.optimizer.param_groups[0]["lr"])


def update(state: TrainState, experience: Experience, rows: list[int], settings: PPOSettings) -> MinibatchStats:
    """One optimizer step from the rows of one minibatch, on all ranks together.

    PPO details: the losses of all micro-batches and ranks are shares of one mean, over one global count of tokens; the gradient
    is clipped once, after accumulation."""
    actions_B = experience.rollout.actions_B[rows]
    counts = {"tokens": int(actions_B.sum()), "rows": int((actions_B > 0).sum())}
    micro_batches = passes(rows, experience.rollout, settings)
    sums: dict[str, Tensor] = {}
    worst = torch.zeros((), device=processes.start().device)
    with state.module.recomputing():
        for i, micro_batch in enumerate(micro_batches):
            with accumulating(state, last=i + 1 == len(micro_batches)) as factor:
                with offloaded() if settings.offload_activations else contextlib.nullcontext():
                    total, parts, error = micro_batch_loss(state, experience, micro_batch, counts, settings)
                backward(state, total * factor)
            sums |= {name: sums.get(name, 0.0) + value for name, value in parts.items()}
            worst = torch.maximum(worst, error)
    # What a loss of the user's own tells may hang on the rows.
    names = sorted(set(processes.gather_objects(list(sums))) if is_custom(settings.loss) else sums)
    summed = processes.sum_(torch.stack([sums.get(name, torch.zeros_like(worst)).float() for name in names]))
    means = dict(zip(names, summed.tolist(), strict=True))
    watched = {"ppo/policy_loss": "policy_loss", "ppo/approx_kl": "approx_kl", "value/loss": "value_loss"}
    check_finite({told: means[name] for told, name in watched.items() if name in means}, state.step)
    grad_norm = finish(state, settings.max_grad_norm)
    check_finite({"ppo/grad_norm": grad_norm}, state.step)
    state.optimizer.step()  # DeepSpeed has taken it
    state.optimizer.zero_grad()
    ratio_mean, own = 1.0 + means.pop("ratio_excess"), {name: means.pop(name) for name in names if name.startswith(OWN)}
    return MinibatchStats(ratio_mean=ratio_mean, ratio_error=float(worst), grad_norm=grad_norm, own=own, **means)


def micro_batch_loss(
    state: TrainState, experience: Experience, micro_batch: list[int], counts: dict[str, int], settings: PPOSettings
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """This micro-batch's share of the minibatch's loss and metrics, and its largest |ratio - 1|.

    total = policy loss - entropy_coef x entropy (+ KL coefficient x KL, with kl_as: loss) + value_coef x value loss; during
    the value warm-up the value loss alone."""
    device = processes.start().device
    rows = micro_batch or [0]  # a rank without rows takes part with a row that counts nothing
    rollout = select(experience.rollout, rows, device)
    width = rollout.response_width

    def part(value_BR: Tensor) -> Tensor:
        return value_BR[rows, :width].to(device)

    warming = state.step < settings.value_warmup_steps
    output: PolicyOutput = state.model(rollout, entropy=settings.entropy_coef != 0, detach_value=warming)
    new_BR, mask_BR = output.logprobs_BR, rollout.action_mask_BR
    if not micro_batch:
        mask_BR = torch.zeros_like(mask_BR)
    weights_BR = loss.token_weights(mask_BR, **counts, reduction=settings.loss_reduction)
    importance_BR = None if experience.importance_BR is None else part(experience.importance_BR)
    total, metrics = chosen_loss(settings)(
        new_BR,
        part(experience.old_logprobs_BR),
        part(experience.advantages_BR),
        mask_BR,
        weights_BR,
        importance_BR=importance_BR,
    )
    if output.entropy_BR is not None:
        total = total - settings.entropy_coef * loss.weighted_sum(output.entropy_BR, mask_BR, weights_BR)
    if settings.kl_as == "loss" and experience.reference_logprobs_BR is not None:
        terms_BR = kl.as_loss(
            new_BR, part(experience.old_logprobs_BR), part(experience.reference_logprobs_BR), settings.kl_estimator
        )
        if importance_BR is not None:  # the mean over tokens of another distribution is then that over the policy's
            terms_BR = terms_BR * importance_BR
        penalty = loss.weighted_sum(terms_BR, mask_BR, weights_BR)
        metrics["kl_loss"] = penalty.detach()
        total = total + state.kl.coefficient * penalty
    if warming:
        total = total * 0.0  # the graph stays whole, so that every wrapper finds a gradient for every weight
    if output.values_BR is not None:
        value, value_metrics = loss.value_loss(
            output.values_BR,
            part(experience.values_BR),
            part(experience.returns_BR),
            mask_BR,
            weights_BR,
            clip=settings.value_clip,
        )
        metrics |= value_metrics
        total = total + settings.value_coef * value
    if settings.loss_reduction == "constant":
        assert settings.response_limit is not None  # with_response_limit
        total = total * loss.filled(**counts, limit=settings.response_limit)
    error = torch.where(mask_BR, (new_BR.detach() - part(experience.old_logprobs_BR)).expm1().abs(), 0.0).amax()
    return total, metrics, error


def chosen_loss(settings: PPOSettings) -> Callable[..., tuple[Tensor, loss.Metrics]]:
    """The policy loss of `ppo.loss`, with the settings that it has."""
    if is_custom(settings.loss):
        return custom_loss(settings)
    if settings.loss == "dppo":
        return partial(loss.dppo, divergence=settings.dppo_divergence, threshold=settings.dppo_bound)
    high = settings.clip if settings.clip_high is None else settings.clip_high
    if settings.loss == "cispo":
        return partial(loss.cispo, clip_low=settings.clip, clip_high=high)
    clipped = loss.gspo if settings.loss == "gspo" else loss.policy_loss
    return partial(clipped, clip_low=settings.clip, clip_high=high, dual_clip=settings.dual_clip)


def set_learning_rates(optimizer: Optimizer, settings: PPOSettings, step: int) -> None:
    """Learning-rate annealing, and the value warm-up. A function of the step, so that a resumed run has nothing to restore."""
    factor = share_of_rate(settings, step)
    for group in optimizer.param_groups:
        warming = group["name"] == "policy" and step < settings.value_warmup_steps
        group["lr"] = 0.0 if warming else group["base_lr"] * factor


def check_finite(watched: Mapping[str, float], step: int) -> None:
    """Stop before a loss or gradient that is no number reaches the weights. The sums are global: every rank stops."""
    bad = [f"{name} = {value}" for name, value in watched.items() if not math.isfinite(value)]
    if bad:
        raise Broken(
            f"step {step + 1}: {', '.join(bad)}; the weights were left as they were. Likely causes: a learning rate that is "
            "too high (lower ppo.learning_rate), scores that are far too large, or float16 that overflows (use bfloat16 or "
            "float32)"
        )


def check_first_move(approx_kl: float, settings: PPOSettings, step: int) -> None:
    """The run's second minibatch sees what one optimizer step did. Adam's first moves every weight by the learning rate,
    whatever the rewards are, so this tells of the rate and the dtype alone. Where most ratios reach a clip of 0.2 it is 0.02;
    at 1 a hundred tokens are e^100 times less likely, and nothing that is sampled from there on is of the policy that began."""
    bound = max(1.0, settings.stop_kl or 0.0)
    if approx_kl > bound:
        raise Broken(
            f"step {step + 1}: one optimizer step moved the policy by {approx_kl:.3g} nats per token (ppo/approx_kl), above "
            f"{bound:g}; lower ppo.learning_rate ({settings.learning_rate:g}; 1e-5 is usual, 1e-4 for adapters), use float32 "
            "weights (model.dtype), or set ppo.stop_kl above it where this is meant"
        )
