"""What a step says of itself: metrics of the scored rollouts, the gap alarm, rows for samples.jsonl.

Everything here reads the rows of all ranks, so it is global, and the same on every rank.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from steerl.reward.types import metrics as reward_metrics
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.engines.source import PromptSource
from steerl.rollout.environments.outcomes import environment_metrics
from steerl.rollout.prompts.chat import Speller
from steerl.rollout.prompts.sources import source_metrics
from steerl.rollout.types import STOP_REASONS, Rollout, row_name
from steerl.training.algorithm import kl
from steerl.training.algorithm.minibatch import select, share
from steerl.training.model.actor_critic import ActorCritic
from steerl.training.settings import PPOSettings
from steerl.training.types import Experience, GapStats, KLStats, Scored, SteeringStats, StepStats, UpdateStats


def mean(value: Tensor, mask: Tensor) -> float:
    return float(value[mask].double().mean()) if bool(mask.any()) else 0.0


def step_stats(
    scored: Scored,
    experience: Experience,
    update: UpdateStats,
    gap: GapStats | None,
    steering: SteeringStats | None,
    *,
    cut_prompts: int,
    kl_coef: float,
) -> StepStats:
    return StepStats(
        rows=len(scored.rollout),
        tokens=int(scored.rollout.actions_B.sum()),
        cut_prompts=cut_prompts,
        reward=float(scored.scores.total_B.double().mean()),
        kl=kl_to_reference(scored, experience.importance_BR),
        kl_coef=kl_coef,
        gap=gap,
        steering=steering,
        update=update,
    )


def step_metrics(stats: StepStats, scored: Scored, credited: Mapping[str, float]) -> dict[str, float]:
    """All that metrics.jsonl has of a step's records. Nothing reads these names but people and their tools."""
    metrics = rollout_metrics(stats, scored)
    if stats.gap is not None:
        metrics |= {"gap/max": stats.gap.largest, "gap/mean": stats.gap.mean}
    if stats.steering is not None:
        metrics |= {f"steering/{name}": value for name, value in vars(stats.steering).items() if value is not None}
    metrics |= {"rollout/cut_prompts": float(stats.cut_prompts), **credited}
    if stats.kl is not None:
        metrics |= {"kl/ref": stats.kl.per_response, "kl/ref_k3_token": stats.kl.k3_token}
    return metrics | {"kl/coef": stats.kl_coef} | stats.update.metrics()


def rollout_metrics(stats: StepStats, scored: Scored) -> dict[str, float]:
    """Rewards, lengths and entropy. What is counted are actions."""
    rollout = scored.rollout
    metrics = {
        "rollout/rows": float(stats.rows),
        "rollout/tokens": float(stats.tokens),
        "rollout/length_mean": float(rollout.actions_B.double().mean()),
        "rollout/length_max": float(rollout.actions_B.max()),
        "rollout/ended": float(rollout.ended_B.double().mean()),
        "policy/entropy": mean(scored.entropy_BR, rollout.action_mask_BR),
    }
    if scored.texts.episodes:
        metrics["rollout/fed_tokens"] = float((rollout.lengths_B - rollout.actions_B).sum())
        metrics |= environment_metrics(scored.texts.episodes)
    metrics |= reward_metrics([scored.scores])
    return metrics | {f"time/{name}_pass_s": value for name, value in scored.seconds.items()}


def of_sources(prompts: PromptSource, scored: Scored) -> dict[str, float]:
    """Of prompts from several sources: what each one's rows earned, and their share."""
    table = getattr(prompts, "table", None)  # a dump's rows are of another
    return source_metrics(table, scored.rollout.row_B.tolist(), scored.scores.total_B.tolist())


def kl_to_reference(scored: Scored, importance_BR: Tensor | None = None) -> KLStats | None:
    """The policy's KL to the reference: k1 summed over a response, mean over rows that have actions; k3 per action.

    Rows of another distribution than the policy's count by their importance weights, which share out 1 whatever bounds them;
    those that the plain model drew, which is what will be left, are its own."""
    if scored.reference_logprobs_BR is None:
        return None
    importance_BR = importance_BR if scored.plain_logprobs_BR is None else None
    mask_BR, k1_B = scored.rollout.action_mask_BR, kl_per_response(scored, importance_BR)
    k3_BR = kl.estimate(scored.left_logprobs_BR, scored.reference_logprobs_BR, "k3")
    if importance_BR is None:
        return KLStats(mean(k1_B, mask_BR.any(1)), mean(k3_BR, mask_BR))
    weights_BR = importance_BR.double()
    rows_B = weights_BR.sum(1) / mask_BR.sum(1).clamp(min=1)
    least = torch.finfo(torch.float64).tiny  # a step whose weights are all 0 says nothing
    return KLStats(
        per_response=float(k1_B.sum() / rows_B.sum().clamp(min=least)),
        k3_token=float((k3_BR * weights_BR)[mask_BR].sum() / weights_BR[mask_BR].sum().clamp(min=least)),
    )


def cut_prompts(prompts: PromptSource, rows: Sequence[int]) -> int:
    """How many of the step's prompts were cut, over all ranks: each knows of those that it read itself."""
    process = processes.start()
    count = sum(row in prompts.cut for row in share(rows, process.rank, process.world_size))
    return int(processes.sum_(torch.tensor(count, device=process.device)))


def kl_per_response(scored: Scored, importance_BR: Tensor | None = None) -> Tensor:
    """k1 summed over each response's actions, in float64, each by its weight; zeros without a reference."""
    if scored.reference_logprobs_BR is None:
        return torch.zeros(len(scored.rollout), dtype=torch.float64)
    k1_BR = kl.estimate(scored.left_logprobs_BR.double(), scored.reference_logprobs_BR.double())
    weighed_BR = k1_BR if importance_BR is None else k1_BR * importance_BR
    return torch.where(scored.rollout.action_mask_BR, weighed_BR, 0.0).sum(1)


# -- the gap between the sampler and the trainer ----------------------------------------------------------------------


def check_gap(scored: Scored, tolerance: float, step: int, *, corrected: bool) -> GapStats | None:
    """Measure |sampler's - trainer's| policy log-prob of every action; above the tolerance the run stops. Where the plain model
    draws and the steered one learns, both are measured: what was drawn by is then a law of the trainer's, too.

    Rollouts of other weights (a replayed dump) have a gap by right: it is what the correction weighs. Where nothing is
    corrected they are refused."""
    rollout = scored.rollout
    own_B1 = (rollout.policy_step_B == step)[:, None]
    sampled_BR, trained_BR = rollout.policy_logprobs_BR, scored.old_logprobs_BR
    gap_BR = (sampled_BR.double() - trained_BR.double()).abs()
    if scored.plain_logprobs_BR is not None:
        plain_BR = (rollout.behaviour_logprobs_BR.double() - scored.plain_logprobs_BR.double()).abs()
        wider_BR = plain_BR.nan_to_num(nan=torch.inf) > gap_BR
        sampled_BR = torch.where(wider_BR, rollout.behaviour_logprobs_BR, sampled_BR)
        trained_BR = torch.where(wider_BR, scored.plain_logprobs_BR, trained_BR)
        gap_BR = torch.where(wider_BR, plain_BR, gap_BR)
    # NaN is the widest gap of all, and compares as less than nothing
    measured_BR = rollout.action_mask_BR & own_B1
    gap_BR = torch.where(measured_BR, gap_BR.nan_to_num(nan=torch.inf), 0.0)
    largest = float(gap_BR.amax()) if gap_BR.numel() else 0.0
    if largest > tolerance:
        place = int(gap_BR.argmax())
        row, token = divmod(place, rollout.response_width)
        raise UserError(
            f"step {step + 1}: the sampler's log-prob of token {token} of {row_name(rollout, row)} "
            f"is {float(sampled_BR[row, token]):.4f}, the trainer's forward pass "
            f"gives {float(trained_BR[row, token]):.4f}: a gap of {largest:.3g} nats (mean "
            f"{mean(gap_BR, measured_BR):.3g}), above ppo.gap_tolerance {tolerance:g}. Usual causes: dropout left on, "
            "position ids or attention masks that differ, a penalty or a temperature that one side lacks, an adapter or a "
            "steering vector active on one side only, half precision (then raise ppo.gap_tolerance), rows of other weights "
            "(then policy_step_B is to say so)"
        )
    if not corrected:
        check_behaviour(scored, tolerance, step)
    return GapStats(largest, mean(gap_BR, measured_BR)) if bool(own_B1.any()) else None


def check_behaviour(scored: Scored, tolerance: float, step: int) -> None:
    """Rows that no correction weighs were drawn by the weights that learn, and from the policy's own distribution."""
    rollout = scored.rollout
    remedy = "ppo.correction is missing; set ppo.correction.type, for example token_truncate (none accepts the bias)"
    if len(others := ((rollout.policy_step_B != step) & (rollout.policy_step_B >= 0)).nonzero()):
        drawn = int(rollout.policy_step_B[row := int(others[0])])
        raise UserError(
            f"step {step + 1}: {row_name(rollout, row)} was drawn by the weights of step {drawn}, not by those that learn, and "
            f"{remedy}"
        )
    off_BR = (rollout.behaviour_logprobs_BR.double() - scored.old_logprobs_BR.double()).abs().nan_to_num(nan=torch.inf)
    off_BR = torch.where(rollout.action_mask_BR, off_BR, 0.0)
    if off_BR.numel() and float(off_BR.amax()) > tolerance:
        row, token = divmod(int(off_BR.argmax()), rollout.response_width)
        raise UserError(
            f"step {step + 1}: token {token} of {row_name(rollout, row)} was drawn with log-prob "
            f"{float(rollout.behaviour_logprobs_BR[row, token]):.4f}, where the policy gives "
            f"{float(scored.old_logprobs_BR[row, token]):.4f} (tolerance {tolerance:g}), and {remedy}"
        )


def gap_tolerance(settings: PPOSettings, dtype: torch.dtype, mixed_precision: str = "no") -> float:
    if settings.gap_tolerance is not None:
        return settings.gap_tolerance
    return 1e-3 if dtype in (torch.float32, torch.float64) and mixed_precision == "no" else 1.0


# -- rows for samples.jsonl -------------------------------------------------------------------------------------------


def sample_rows(
    scored: Scored, experience: Experience, model: ActorCritic, *, each: int, seed: int, step: int
) -> list[dict[str, object]]:
    """`each` best, worst and random rows with everything per token, for the table and the viewer: on the main process, with the
    passes of all ranks.

    Lists are as long as `response_ids`, None at tokens that were fed; `action_mask` says which, in rows that have any;
    `episode` what was said, turn by turn, where an environment took part."""
    if not each:
        return []
    token_text = Speller(model.policy.tokenizer).token
    order = torch.argsort(scored.scores.total_B, stable=True, descending=True).tolist()
    kinds = {"best": order[:each], "worst": order[::-1][:each]}
    kinds["random"] = random.Random(f"{seed}/{step}").sample(range(len(order)), min(each, len(order)))
    ratios = {i: ratio(scored, model, i) for i in sorted({i for rows in kinds.values() for i in rows})}
    if not processes.start().is_main:
        return []
    return [
        {"kind": kind, **_row(scored, experience, token_text, i), "ratio": ratios[i]}
        for kind, rows in kinds.items()
        for i in rows
    ]


def ratio(scored: Scored, model: ActorCritic, i: int) -> list[float | None]:
    """new / old of every action of a row, after all of the step's updates."""
    with torch.no_grad():
        new_R = model(select(scored.rollout, [i], model.device)).logprobs_BR[0].float().cpu()
    return _numbers((new_R - scored.old_logprobs_BR[i, : len(new_R)]).exp(), scored.rollout, i)


def _numbers(value_R: Tensor, rollout: Rollout, i: int) -> list[float | None]:
    """A row's numbers, as many as it has tokens."""
    length = int(rollout.lengths_B[i])
    pairs = zip(value_R[:length].tolist(), rollout.action_mask_BR[i, :length].tolist(), strict=True)
    return [round(value, 6) if acts else None for value, acts in pairs]


def _row(scored: Scored, experience: Experience, token_text: Callable[[int], str], i: int) -> dict[str, object]:
    rollout, texts = scored.rollout, scored.texts

    def numbers(value_BR: Tensor | None) -> list[float | None] | None:
        return None if value_BR is None else _numbers(value_BR[i], rollout, i)

    prompt_ids = rollout.prompt_BP[i][rollout.prompt_mask_BP[i]].tolist()
    response_ids = rollout.response_BR[i, : int(rollout.lengths_B[i])].tolist()
    action_mask = rollout.action_mask_BR[i, : len(response_ids)].tolist()
    return {
        "row": int(rollout.row_B[i]),
        "sample": int(rollout.sample_B[i]),
        "prompt": texts.prompts[i],
        "prompt_text": texts.prompt_texts[i],
        "completion": texts.completions[i],
        "reward": float(scored.scores.total_B[i]),
        "parts": {name: float(values[i]) for name, values in scored.scores.parts.items()},
        **{f"extra/{name}": values[i] for name, values in scored.scores.extra.items()},
        "kl": float(kl_per_response(scored)[i]),
        "ended": bool(rollout.ended_B[i]),
        "stop_reason": STOP_REASONS[int(rollout.stop_B[i])],
        "steering": rollout.steering,
        "strength": float(rollout.strength_B[i]),
        **({"strengths": rollout.strength_BK[i].tolist()} if rollout.strength_BK.shape[1] > 1 else {}),
        "prompt_ids": prompt_ids,
        "prompt_tokens": [token_text(token) for token in prompt_ids],
        "response_ids": response_ids,
        "response_tokens": [token_text(token) for token in response_ids],
        **({} if all(action_mask) else {"action_mask": action_mask}),
        **({} if texts.episodes is None else {"episode": texts.episodes[i].as_json()}),
        "policy_logprobs": numbers(scored.old_logprobs_BR),
        "gap": numbers(rollout.policy_logprobs_BR - scored.old_logprobs_BR),
        "importance": numbers(experience.importance_BR),
        "behaviour_logprobs": numbers(rollout.behaviour_logprobs_BR),
        "reference_logprobs": numbers(scored.reference_logprobs_BR),
        "entropy": numbers(scored.entropy_BR),
        "values": numbers(scored.values_BR),
        "rewards": numbers(experience.rewards_BR),
        "advantages": numbers(experience.advantages_BR),
        "returns": numbers(experience.returns_BR),
    }
