"""From prompts to experience: steps 1 to 3 of the loop in ppo.py.

    1 sample   this rank's prompts --source--> Samples
    2 score    --reward, gather_scored: all rows on every rank--> scores --score: forward passes, dealt over ranks--> Scored
    3 credit   Scored --KL, per-token rewards, advantages, whitening, importance weights--> Experience

From the gathering on every rank holds all rows of the step (ids and a few floats per token, on the CPU), so every mean,
variance and count is global, and every rank decides the same. What the rows say is on the main process alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from steerl.reward.types import Reward, Scores, joined_extra, missing_stop_penalty, on_last_action, overlong_penalty
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.engines.source import PromptSource, RolloutSource
from steerl.rollout.environments.outcomes import look_at
from steerl.rollout.model.sharding import needs_sync
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.ragged import Kept
from steerl.rollout.types import Rollout, Samples, Texts, row_name
from steerl.training.algorithm import advantages, kl
from steerl.training.algorithm.custom import custom_credit, whitens
from steerl.training.algorithm.importance import importance_weights
from steerl.training.algorithm.minibatch import occurrences, passes, select, share
from steerl.training.model.actor_critic import ActorCritic
from steerl.training.model.reference import Reference
from steerl.training.settings import PPOSettings, is_custom
from steerl.training.types import Experience, Scored

# -- 1 sample --------------------------------------------------------------------------------------------------------


def sample(
    prompts: PromptSource,
    source: RolloutSource,
    rows: list[int],
    *,
    step: int,
    progress: float,
    before: Sequence[int] = (),
) -> Samples:
    """This rank's share of the prompts `rows`, with all samples of each; no rows where there are more ranks than prompts.

    `progress` (0 to 1) is what steering's schedules read; `before`: prompts that the step has drawn already."""
    return source.draw(asked_here(prompts, rows, before), step=step, progress=progress)


def asked_here(prompts: PromptSource, rows: list[int], before: Sequence[int] = ()) -> PromptBatch:
    """This rank's share of a step's prompts."""
    process = processes.start()
    times = occurrences([*before, *rows])[len(before) :]
    shared = share(list(zip(rows, times, strict=True)), process.rank, process.world_size)
    return prompts.batch([row for row, _ in shared], [before for _, before in shared])


# -- 2 score ---------------------------------------------------------------------------------------------------------


def gather_scored(samples: Samples, reward: Reward) -> tuple[Samples, Scores]:
    """The rows of all ranks together, then their rewards, each rank's of its own rows. A rank without rows calls a reward that
    keeps statistics over all ranks, to be in step with the others. Texts go to the main process, which alone shows them.

    The rows come first: an environment that never works is told before a reward stumbles over what it left."""
    rollout = gather_rollout(samples.rollout)
    texts = Texts.join(processes.gather_to_main([samples.texts] if len(samples.rollout) else []))
    processes.on_main(lambda: look_at(texts.episodes))
    parts = []
    if len(samples.rollout) or getattr(reward, "is_collective", False):
        scores = check_scores(reward(*samples), samples.rollout)
        parts = [scores.to("cpu")] if len(scores) else []
    return Samples(rollout, texts), gather_scores(parts)


def gather_rollout(rollout: Rollout) -> Rollout:
    """The rows of all ranks, field by field in its own dtype: a rank holds all rows once, and one field twice."""
    if not processes.is_distributed():
        return rollout.to("cpu")
    said = processes.gather_objects([(rollout.select([]).to("cpu"), len(rollout))])
    # Of no rows, with the widths and fields of all: what ranks differ in is refused here.
    form = Rollout.join([part for part, rows in said if rows])
    own = Rollout.join([form.to(rollout.device), rollout]) if len(rollout) else form
    counts = [rows for _, rows in said]
    fields: dict[str, Any] = {name: processes.gather_rows(value, counts) for name, value in own.tensors().items()}
    if own.kept is not None:
        ids = processes.gather_rows(own.kept.ids, processes.gather_objects([len(own.kept.ids)]))
        fields["kept"] = Kept(ids, processes.gather_rows(own.kept.counts_BR, counts))
    return replace(form, **fields)


def gather_scores(parts: list[Scores]) -> Scores:
    """This rank's scores, if any, with those of all; what is shown of rows on the main process alone."""
    extra = processes.gather_to_main([(scores.extra, len(scores)) for scores in parts])
    dense = [scores.tokens_BR for scores in parts if scores.tokens_BR is not None]
    thin = [replace(s, extra={}, tokens_BR=None if s.tokens_BR is None else s.tokens_BR[:, :0]) for s in parts]
    told = processes.gather_objects([(thin, max((tokens_BR.shape[1] for tokens_BR in dense), default=0))])
    whole = Scores.join([scores for thin, _ in told for scores in thin])
    if whole.tokens_BR is not None:
        width, counts = max(width for _, width in told), [sum(map(len, thin)) for thin, _ in told]
        own = [pad(tokens_BR, (0, width - tokens_BR.shape[1])) for tokens_BR in dense]
        whole = replace(whole, tokens_BR=processes.gather_rows(torch.cat([*own, torch.zeros(0, width)]), counts))
    return replace(whole, extra=joined_extra([columns for columns, _ in extra], [rows for _, rows in extra]))


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
    micro_batches = passes(list(range(rows)), rollout, settings)
    measured: dict[str, list[Tensor]] = {}
    seconds = {"policy": 0.0, "reference": 0.0}
    in_grad_mode = not (needs_sync(model.actor) or settings.checkpointing)
    for micro_batch in micro_batches:
        part = select(rollout, micro_batch or [0], model.device)
        began = time.perf_counter()
        with torch.set_grad_enabled(in_grad_mode), torch.autograd.graph.saved_tensors_hooks(_keep_nothing, _keep_nothing):
            output = model(part, entropy=True, after=settings.bootstrap_cut)
            found = {**output._asdict(), "plain_BR": model.plain_logprobs(part)}
        values = {name: value.detach() for name, value in found.items() if value is not None}
        del output, found  # and its graph
        seconds["policy"] += time.perf_counter() - began
        began = time.perf_counter()
        if reference:
            values["reference_BR"] = reference.logprobs(part)
        seconds["reference"] += time.perf_counter() - began
        for name, value in values.items():
            value_BT = value.reshape(len(value), -1)[: len(micro_batch)].float().cpu()
            wide = (width if name.endswith("BR") else 1) - value_BT.shape[1]
            measured.setdefault(name, []).append(pad(value_BT, (0, wide)))
    dealt = [row for micro_batch in micro_batches for row in micro_batch]
    counts = processes.gather_objects([len(dealt)])
    place = processes.gather_rows(torch.tensor(dealt, dtype=torch.int64), counts).argsort()

    def whole(name: str) -> Tensor:
        if name not in measured:
            return torch.zeros(rows, width)
        return processes.gather_rows(torch.cat(measured[name]), counts)[place]

    return Scored(
        rollout=rollout,
        texts=texts,
        scores=scores,
        old_logprobs_BR=whole("logprobs_BR"),
        reference_logprobs_BR=whole("reference_BR") if reference else None,
        values_BR=whole("values_BR"),
        after_B=torch.where(rollout.ended_B, 0.0, whole("after_B")[:, 0]),
        entropy_BR=whole("entropy_BR"),
        seconds=seconds,
        plain_logprobs_BR=whole("plain_BR") if "plain_BR" in measured else None,
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


Weighed = tuple[float, Tensor]
"""A part of the reward: its weight, and its value of every row (NaN where it does not apply)."""


def length_penalties(rollout: Rollout, settings: PPOSettings) -> list[Weighed]:
    """What length takes off every row: parts of 0 to -1, their weights the penalties."""
    found = []
    if settings.missing_stop_penalty:
        found.append((settings.missing_stop_penalty, missing_stop_penalty(rollout.ended_B, 1.0)))
    if settings.overlong_buffer:
        assert settings.response_limit is not None  # with_response_limit
        over_B = overlong_penalty(rollout.actions_B, settings.response_limit, settings.overlong_buffer)
        found.append((settings.overlong_penalty, over_B))
    return found


def overlong_metrics(rollout: Rollout, settings: PPOSettings) -> dict[str, float]:
    """What `ppo.overlong_buffer` took, over rows that have actions."""
    if not settings.overlong_buffer:
        return {}
    weight, over_B = length_penalties(rollout, settings)[-1]
    over_B = over_B[rollout.actions_B > 0].double()
    rows = max(len(over_B), 1)
    return {"credit/overlong": weight * float(over_B.sum()) / rows, "credit/overlong_share": int((over_B < 0).sum()) / rows}


def without_screened(scored: Scored) -> Scored:
    screened_B = scored.scores.screened_B
    if screened_B is None or not bool(screened_B.any()):
        return scored
    mask_BR = scored.rollout.action_mask_BR & ~screened_B.to(scored.rollout.device)[:, None]
    return replace(scored, rollout=replace(scored.rollout, action_mask_BR=mask_BR))


def task_rewards(rollout: Rollout, scores: Scores, settings: PPOSettings) -> Tensor:
    """(B, R): what the task gives each action, with the penalties of `ppo`; the KL comes later."""
    task_BR = scores.per_token(rollout)
    for weight, value_B in length_penalties(rollout, settings):
        task_BR = task_BR + on_last_action(weight * value_B, rollout)
    return task_BR


def weighed_parts(rollout: Rollout, scores: Scores, settings: PPOSettings) -> list[Weighed]:
    """The parts whose weighted sum the reward is, and the penalties of `ppo`."""
    if not scores.weights:
        told = "the reward does not say by which weights its parts are summed (Scores.weights)"
        raise UserError(f"ppo.group_parts: {told}; build it of a list of terms, or leave group_parts out")
    found = [(weight, scores.parts[name]) for name, weight in scores.weights.items()]
    weighed_KB = torch.stack([weight * part_B.double().nan_to_num(nan=0.0) for weight, part_B in found])
    sum_B = weighed_KB.sum(0)
    off = torch.nonzero(~((scores.total_B - sum_B).abs() <= 1e-4 * (1 + weighed_KB.abs().sum(0)))).flatten().tolist()
    if off:
        told = f"{row_name(rollout, off[0])} has parts that come to {sum_B[off[0]]:.6g} by their weights (Scores.weights)"
        raise UserError(f"ppo.group_parts: {told}, but the total {scores.total_B[off[0]]:.6g}; give the weights of its sum")
    return [*found, *length_penalties(rollout, settings)]


def credit(scored: Scored, settings: PPOSettings, kl_coef: float) -> tuple[Experience, dict[str, float]]:
    """Per-token rewards, advantages and returns of all rows, and what they say.

    Rows that the reward screens out lose their actions: they are as if they were not there.

    PPO details, in their order: the score and the penalties for length on the last action; the KL taken off per token; reward
    whitening (variance only); GAE, or a critic-free baseline; advantage whitening; importance weights."""
    scored = without_screened(scored)
    rollout, mask_BR, reference_BR = scored.rollout, scored.rollout.action_mask_BR, scored.reference_logprobs_BR
    task_BR = task_rewards(rollout, scored.scores, settings)
    kl_BR = None
    if reference_BR is not None and settings.kl_as == "reward":
        kl_BR = kl.estimate(scored.left_logprobs_BR, reference_BR, settings.kl_estimator)
    rewards_BR = advantages.token_rewards(task_BR, mask_BR, kl_BR, kl_coef)
    if settings.whiten_rewards:
        rewards_BR = advantages.whiten(rewards_BR, mask_BR, keep_mean=True)
    if is_custom(settings.credit):
        advantages_BR, returns_BR = custom_credit(settings)(
            rewards_BR=rewards_BR,
            values_BR=scored.values_BR,
            mask_BR=mask_BR,
            group_B=rollout.row_B,
            bootstrap_B=scored.after_B,
        )
    elif settings.credit == "gae":
        advantages_BR, returns_BR = advantages.gae(
            rewards_BR, scored.values_BR, mask_BR, gamma=settings.gamma, lam=settings.lam, bootstrap_B=scored.after_B
        )
    elif settings.group_parts:
        weighed = weighed_parts(rollout, scored.scores, settings)
        advantages_BR, returns_BR = advantages.parts(weighed, rewards_BR, mask_BR, rollout.row_B)
    elif settings.credit == "rloo":
        advantages_BR, returns_BR = advantages.rloo(rewards_BR, mask_BR, rollout.row_B, gamma=settings.gamma)
    else:
        std = settings.credit == "group" and settings.group_std
        advantages_BR, returns_BR = advantages.group(rewards_BR, mask_BR, rollout.row_B, gamma=settings.gamma, std=std)
    if whitens(settings):
        advantages_BR = advantages.whiten(advantages_BR, mask_BR)
    importance_BR, corrected = importance(scored, settings)
    metrics = corrected | overlong_metrics(rollout, settings)
    if (screened_B := scored.scores.screened_B) is not None:
        metrics["reward/screened"] = float(screened_B.double().mean())
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
