"""From prompts to experience: steps 1 to 3 of the loop in ppo.py.

    1 sample   this rank's prompts --source--> Samples
    2 score    --reward, gather_scored: all rows on every rank--> scores --score: forward passes, dealt over ranks--> Scored
    3 credit   Scored --KL, per-token rewards, advantages, whitening, importance weights--> Experience

From the gathering on every rank holds all rows of the step (ids and a few floats per token, on the CPU), so every mean,
variance and count is global, and every rank decides the same.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from steerl.reward.types import Reward, Scores, missing_stop_penalty, on_last_action
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.engines.source import PromptSource, RolloutSource
from steerl.rollout.environments.outcomes import look_at
from steerl.rollout.model.sharding import needs_sync
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.types import Rollout, Samples, row_name
from steerl.training.algorithm import advantages, kl
from steerl.training.algorithm.importance import importance_weights
from steerl.training.algorithm.minibatch import occurrences, passes, select, share
from steerl.training.model.actor_critic import ActorCritic
from steerl.training.model.reference import Reference
from steerl.training.settings import PPOSettings
from steerl.training.types import Experience, Scored

# -- 1 sample --------------------------------------------------------------------------------------------------------


def sample(prompts: PromptSource, source: RolloutSource, rows: list[int], *, step: int, progress: float) -> Samples:
    """This rank's share of the prompts `rows`, with all samples of each; no rows where there are more ranks than prompts.

    `progress` (0 to 1) is what steering's schedules read."""
    return source.draw(asked_here(prompts, rows), step=step, progress=progress)


def asked_here(prompts: PromptSource, rows: list[int]) -> PromptBatch:
    """This rank's share of a step's prompts."""
    process = processes.start()
    shared = share(list(zip(rows, occurrences(rows), strict=True)), process.rank, process.world_size)
    return prompts.batch([row for row, _ in shared], [before for _, before in shared])


# -- 2 score ---------------------------------------------------------------------------------------------------------


def gather_scored(samples: Samples, reward: Reward) -> tuple[Samples, Scores]:
    """The rows of all ranks together, then their rewards, each rank's of its own rows. A rank without rows calls a reward that
    keeps statistics over all ranks, to be in step with the others.

    The rows come first: an environment that never works is told before a reward stumbles over what it left."""
    whole = Samples.join(processes.gather_objects([samples.to("cpu")] if len(samples.rollout) else []))
    look_at(whole.texts.episodes, aloud=processes.start().is_main)
    parts = []
    if len(samples.rollout) or getattr(reward, "is_collective", False):
        scores = check_scores(reward(*samples), samples.rollout)
        parts = [scores.to("cpu")] if len(scores) else []
    return whole, Scores.join(processes.gather_objects(parts))


def check_scores(scores: Scores, rollout: Rollout) -> Scores:
    """A reward may be any object: a finite number for every row, or the error that names the row."""
    if not isinstance(scores, Scores):
        raise UserError(f"reward: expected Scores, found {type(scores).__name__}")
    if len(scores) != len(rollout):
        raise UserError(f"reward: gave {len(scores)} scores for {len(rollout)} rows; give one per row")
    bad = torch.nonzero(~scores.total_B.isfinite()).flatten().tolist()
    if bad:
        value = scores.total_B[bad[0]].item()
        raise UserError(f"reward: {row_name(rollout, bad[0])} scored {value}; scores must be finite numbers")
    return scores


def score(model: ActorCritic, reference: Reference | None, samples: Samples, scores: Scores, settings: PPOSettings) -> Scored:
    """The forward passes of all rows before learning: old log-probs, values, reference. Each rank takes its share.

    PPO detail: old log-probs come from the trainer's own forward pass, not from the sampler, and are fixed here, before the
    first minibatch; so the first ratio is 1. The policy's pass is taken as the update takes it, in grad mode: some kernels
    round otherwise without, and the first ratio would be off 1 by that. The graph has nothing in it. (Not where weights are
    spread over ranks, whose engines follow passes in grad mode, nor where activations are computed again, which follows what a
    graph keeps.)"""
    rollout, texts = samples
    rows, width = rollout.response_BR.shape
    # Zeros where another rank has the row, so that the sum over ranks is the row itself.
    measured = {name: torch.zeros(rows, width) for name in ("logprobs_BR", "entropy_BR", "values_BR", "reference_BR")}
    measured["after_B"] = torch.zeros(rows, 1)
    seconds = {"policy": 0.0, "reference": 0.0}
    in_grad_mode = not (needs_sync(model.actor) or settings.checkpointing)
    for micro_batch in passes(list(range(rows)), rollout, settings):
        part = select(rollout, micro_batch or [0], model.device)
        began = time.perf_counter()
        with torch.set_grad_enabled(in_grad_mode), torch.autograd.graph.saved_tensors_hooks(_keep_nothing, _keep_nothing):
            output = model(part, entropy=True, after=settings.bootstrap_cut)
        values = {name: value.detach() for name, value in output._asdict().items() if value is not None}
        del output  # and its graph
        seconds["policy"] += time.perf_counter() - began
        began = time.perf_counter()
        if reference:
            values["reference_BR"] = reference.logprobs(part)
        seconds["reference"] += time.perf_counter() - began
        for name, value in values.items() if micro_batch else ():
            value_BT = value.reshape(len(value), -1)
            measured[name][micro_batch, : value_BT.shape[1]] = value_BT.float().cpu()
    summed = {name: processes.sum_(value.to(model.device)).cpu() for name, value in measured.items()}
    return Scored(
        rollout=rollout,
        texts=texts,
        scores=scores,
        old_logprobs_BR=summed["logprobs_BR"],
        reference_logprobs_BR=summed["reference_BR"] if reference else None,
        values_BR=summed["values_BR"],
        after_B=torch.where(rollout.ended_B, 0.0, summed["after_B"][:, 0]),
        entropy_BR=summed["entropy_BR"],
        seconds=seconds,
    )


def _keep_nothing(_: object) -> Any:
    """Drop saved tensors: this graph is never differentiated."""


# -- 3 credit --------------------------------------------------------------------------------------------------------


def importance(scored: Scored, settings: PPOSettings) -> tuple[Tensor | None, dict[str, float]]:
    """pi_old / mu of every token or row as `ppo.correction` says, and its metrics; None where nothing is corrected."""
    if settings.correction is None:
        return None, {}
    rollout = scored.rollout
    return importance_weights(
        scored.old_logprobs_BR, rollout.behaviour_logprobs_BR, rollout.action_mask_BR, settings.correction
    )


def credit(scored: Scored, settings: PPOSettings, kl_coef: float) -> tuple[Experience, dict[str, float]]:
    """Per-token rewards, advantages and returns of all rows, and what they say.

    PPO details, in their order: the score and the missing-stop penalty on the last action; the KL taken off per token; reward
    whitening (variance only); GAE, or a critic-free baseline; advantage whitening; importance weights."""
    rollout, mask_BR, reference_BR = scored.rollout, scored.rollout.action_mask_BR, scored.reference_logprobs_BR
    task_BR = scored.scores.per_token(rollout)
    if settings.missing_stop_penalty:
        task_BR = task_BR + on_last_action(missing_stop_penalty(rollout.ended_B, settings.missing_stop_penalty), rollout)
    kl_BR = None
    if reference_BR is not None and settings.kl_as == "reward":
        kl_BR = kl.estimate(scored.old_logprobs_BR, reference_BR, settings.kl_estimator)
    rewards_BR = advantages.token_rewards(task_BR, mask_BR, kl_BR, kl_coef)
    if settings.whiten_rewards:
        rewards_BR = advantages.whiten(rewards_BR, mask_BR, keep_mean=True)
    if settings.credit == "gae":
        advantages_BR, returns_BR = advantages.gae(
            rewards_BR, scored.values_BR, mask_BR, gamma=settings.gamma, lam=settings.lam, bootstrap_B=scored.after_B
        )
    else:
        baseline = advantages.rloo if settings.credit == "rloo" else advantages.group
        advantages_BR, returns_BR = baseline(rewards_BR, mask_BR, rollout.row_B, gamma=settings.gamma)
    if settings.credit == "gae" if settings.whiten_advantages is None else settings.whiten_advantages:
        advantages_BR = advantages.whiten(advantages_BR, mask_BR)
    importance_BR, metrics = importance(scored, settings)
    metrics["value/explained_variance"] = advantages.explained_variance(scored.values_BR, returns_BR, mask_BR)
    experience = Experience(
        rollout=rollout,
        old_logprobs_BR=scored.old_logprobs_BR,
        reference_logprobs_BR=reference_BR,
        values_BR=scored.values_BR,
        rewards_BR=rewards_BR,
        advantages_BR=advantages_BR,
        returns_BR=returns_BR,
        importance_BR=importance_BR,
    )
    return experience, metrics
