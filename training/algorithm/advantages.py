"""Credit: per-token rewards, advantages and returns. Pure tensors.

    task_BR, kl_BR --token_rewards--> rewards_BR --gae | rloo | group | parts--> advantages_BR, returns_BR --whiten-->

All rows of all ranks are in the tensors, so a mean here is a global mean. Masks are True at every action. Actions need not
lie side by side: a row counts as if what stands between them were cut out, and a row without any as if it were not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Credit(NamedTuple):
    advantages_BR: Tensor
    returns_BR: Tensor
    """What the value is trained towards."""


def token_rewards(task_BR: Tensor, mask_BR: Tensor, kl_BR: Tensor | None = None, kl_coef: float = 0.0) -> Tensor:
    """KL penalty in the reward: per token, what the task gives (a score stands on the last action) - kl_coef x KL."""
    rewards_BR = task_BR if kl_BR is None else task_BR - kl_coef * kl_BR
    return torch.where(mask_BR, rewards_BR, 0.0)


def gae(
    rewards_BR: Tensor,
    values_BR: Tensor,
    mask_BR: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_B: Tensor | None = None,
) -> Credit:
    """GAE, generalized advantage estimation, and the returns that the value learns.

    Time is actions: what comes after an action is the next one, however far off. Beyond the last there is neither value nor
    carry; `bootstrap_B` is the value of the state after it, for rows that were cut (0 for rows that ended)."""
    rewards_BR = torch.where(mask_BR, rewards_BR, 0.0)
    values_BR = torch.where(mask_BR, values_BR, 0.0)
    advantages_BR = torch.zeros_like(values_BR)
    carry_B = torch.zeros_like(values_BR[:, 0])
    next_B = carry_B if bootstrap_B is None else bootstrap_B.to(values_BR)
    for t in reversed(range(mask_BR.shape[1])):
        acts_B = mask_BR[:, t]
        delta_B = rewards_BR[:, t] + gamma * next_B - values_BR[:, t]
        carry_B = torch.where(acts_B, delta_B + gamma * lam * carry_B, carry_B)
        next_B = torch.where(acts_B, values_BR[:, t], next_B)
        advantages_BR[:, t] = torch.where(acts_B, carry_B, 0.0)
    return Credit(advantages_BR, torch.where(mask_BR, advantages_BR + values_BR, 0.0))


def rloo(rewards_BR: Tensor, mask_BR: Tensor, group_B: Tensor, *, gamma: float = 1.0) -> Credit:
    """RLOO, leave-one-out baseline: the row's discounted return minus the mean return of the other samples of its prompt."""
    total_B = discounted_sum(rewards_BR, mask_BR, gamma)
    sum_B, count_B = _group_sum(total_B, group_B), _group_sum(mask_BR.any(1).to(total_B), group_B)
    others_B = (sum_B - total_B) / (count_B - 1).clamp(min=1)
    # A prompt with one sample has nothing to compare with: no signal, not its whole return.
    return _spread(torch.where(count_B > 1, total_B - others_B, 0.0), total_B, mask_BR)


def group(
    rewards_BR: Tensor, mask_BR: Tensor, group_B: Tensor, *, gamma: float = 1.0, std: bool = True, eps: float = 1e-4
) -> Credit:
    """Group-relative advantages (GRPO): the row's discounted return, standardized among the samples of its prompt.

    Without `std` it is centred only (Dr. GRPO; whitened over the step's tokens: the baseline of REINFORCE++)."""
    total_B = discounted_sum(rewards_BR, mask_BR, gamma)
    return _spread(_standardized(total_B, mask_BR.any(1), group_B, eps if std else None), total_B, mask_BR)


def parts(
    weighed: Sequence[tuple[float, Tensor]], rewards_BR: Tensor, mask_BR: Tensor, group_B: Tensor, *, eps: float = 1e-4
) -> Credit:
    """Several rewards, (weight, its value of each row), each standardized among the samples of a prompt before they are summed
    (GDPO). One that does not apply to a row (NaN) adds nothing to it, and the row is in neither mean nor deviation."""
    advantage_B = torch.zeros_like(rewards_BR[:, 0])
    for weight, part_B in weighed:
        counts_B = mask_BR.any(1) & ~part_B.isnan()
        advantage_B = advantage_B + weight * _standardized(part_B, counts_B, group_B, eps)
    return _spread(advantage_B, discounted_sum(rewards_BR, mask_BR, 1.0), mask_BR)


def discounted_sum(rewards_BR: Tensor, mask_BR: Tensor, gamma: float) -> Tensor:
    """The row's rewards, the first action's as it is, each later one gamma times less."""
    discount_R = gamma ** torch.arange(mask_BR.shape[1], device=mask_BR.device, dtype=rewards_BR.dtype)
    before_BR = (mask_BR.cumsum(1) - 1).clamp(min=0)
    return torch.where(mask_BR, rewards_BR * discount_R[before_BR], 0.0).sum(1)


def _group_sum(value_B: Tensor, group_B: Tensor) -> Tensor:
    """For every row the sum over the rows of its group."""
    groups, index_B = torch.unique(group_B, return_inverse=True)
    return torch.zeros(len(groups), dtype=value_B.dtype, device=value_B.device).index_add(0, index_B, value_B)[index_B]


def _standardized(value_B: Tensor, counts_B: Tensor, group_B: Tensor, eps: float | None) -> Tensor:
    """Less the mean of its group and, with an eps, divided by the deviation (n - 1) + eps; 0 for rows that do not count."""
    value_B = torch.where(counts_B, value_B, 0.0)
    count_B = _group_sum(counts_B.to(value_B), group_B)
    centred_B = torch.where(counts_B, value_B - _group_sum(value_B, group_B) / count_B, 0.0)
    if eps is None:
        return centred_B
    variance_B = _group_sum(centred_B.square(), group_B) / (count_B - 1).clamp(min=1)
    return centred_B / (variance_B.sqrt() + eps)


def _spread(advantage_B: Tensor, total_B: Tensor, mask_BR: Tensor) -> Credit:
    return Credit(torch.where(mask_BR, advantage_B[:, None], 0.0), torch.where(mask_BR, total_B[:, None], 0.0))


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (population) variance over the entries under the mask; zeros where there are none."""
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, values, 0.0).sum() / count
    variance = torch.where(mask, values - mean, 0.0).square().sum() / count
    return mean, variance


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool = False, eps: float = 1e-8) -> Tensor:
    """Whitening, over all tokens of the step on all ranks: advantages to mean 0 and variance 1; rewards keep their mean.

    One valid entry becomes 0, not NaN."""
    mean, variance = masked_moments(values, mask)
    white = (values - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask, white + mean if keep_mean else white, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - var(returns - values) / var(returns); 0 where the returns do not vary."""
    _, residual = masked_moments(returns - values, mask)
    _, variance = masked_moments(returns, mask)
    return float(1 - residual / variance) if float(variance) > 1e-12 else 0.0
