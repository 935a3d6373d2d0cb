"""The losses: tensors in, (loss, metrics) out. `ppo.loss` says which of `policy_loss`, `gspo`, `cispo` and `dppo` it is,
or names a function of the same form (custom.py).

Every loss is a weighted sum over actions, never a mean. The weights come from `token_weights`, which divides by counts of
the whole minibatch on all ranks; so losses, metrics and gradients of micro-batches simply add up, however the rows are
split. Metrics are sums of the same kind, over actions; their ratios are those of tokens, whatever the loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["token", "sequence", "constant"]
Divergence = Literal["tv", "kl"]
Metrics = dict[str, Tensor]


def token_weights(mask_BR: Tensor, *, tokens: int, rows: int, reduction: Reduction = "token") -> Tensor:
    """Global token count: an action counts 1 / `tokens`, or 1 / (actions of its row x `rows`).

    `tokens` are the actions of the minibatch on all ranks, `rows` its rows that have any. Constant: as token, for metrics are
    means; the loss is then multiplied by `filled`."""
    if reduction == "sequence":
        weight = 1.0 / (mask_BR.sum(1, keepdim=True).clamp(min=1) * max(rows, 1))
    else:
        weight = torch.tensor(1.0 / max(tokens, 1), device=mask_BR.device)
    return torch.where(mask_BR, weight, 0.0)


def filled(*, tokens: int, rows: int, limit: int) -> float:
    """Share that a minibatch's rows have of the actions that they might have had. Dr. GRPO (arXiv:2503.20783): it takes a mean
    over tokens to the constant reduction, where every action counts 1 / (`limit` x `rows`), however long rows are."""
    return tokens / (limit * max(rows, 1))


def policy_loss(
    new_BR: Tensor,
    old_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    weights_BR: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    importance_BR: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Ratio and clipping, the clipped surrogate: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = new / old.

    Dual clip: c > 1 bounds the loss of tokens with A < 0 at c |A|, however large r is. Importance weights:
    `importance_BR` weighs every token for a sampler whose distribution was not the policy's (see importance.py)."""
    log_ratio_BR = torch.where(mask_BR, new_BR - old_BR, 0.0)
    objective_BR, clipped_BR = _clipped(log_ratio_BR.exp(), advantages_BR, clip_low, clip_high, dual_clip)
    return _told(objective_BR, clipped_BR, log_ratio_BR, mask_BR, weights_BR, importance_BR)


def gspo(
    new_BR: Tensor,
    old_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    weights_BR: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    importance_BR: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """GSPO (arXiv:2507.18071): `policy_loss` of one ratio for the whole row, s = exp(mean over its actions of new - old).

    In the paper's form for tokens (GSPO-token): s_t = sg(s) pi_t / sg(pi_t) has the value of s and the gradient of its own
    token, so that advantages may differ within a row (gae). Where they do not, it is the gradient through the mean:
    s A d log pi_t summed over the row, times the weight that its actions share. `mask_BR` holds whole rows."""
    log_ratio_BR = torch.where(mask_BR, new_BR - old_BR, 0.0)
    log_row_B1 = log_ratio_BR.detach().sum(1, keepdim=True) / mask_BR.sum(1, keepdim=True).clamp(min=1)
    ratio_BR = (log_row_B1 + (log_ratio_BR - log_ratio_BR.detach())).exp()
    objective_BR, clipped_BR = _clipped(ratio_BR, advantages_BR, clip_low, clip_high, dual_clip)
    return _told(objective_BR, clipped_BR, log_ratio_BR, mask_BR, weights_BR, importance_BR)


def cispo(
    new_BR: Tensor,
    old_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    weights_BR: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    importance_BR: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """CISPO (arXiv:2506.13585): -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi. No token loses its gradient; its weight is
    bounded. The paper leaves the lower end open: clip_low of 1 or more."""
    new_BR = torch.where(mask_BR, new_BR, 0.0)
    log_ratio_BR = torch.where(mask_BR, new_BR - old_BR, 0.0)
    ratio_BR = log_ratio_BR.detach().exp()
    held_BR = ratio_BR.clamp(1 - clip_low, 1 + clip_high)
    return _told(held_BR * advantages_BR * new_BR, held_BR != ratio_BR, log_ratio_BR, mask_BR, weights_BR, importance_BR)


def dppo(
    new_BR: Tensor,
    old_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    weights_BR: Tensor,
    *,
    divergence: Divergence,
    threshold: float,
    importance_BR: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """DPPO (arXiv:2602.04879, eq. 12): -M r A. M is 0 where the policy has moved further than `threshold` and the advantage
    would move it on (A > 0 and r > 1, or A < 0 and r < 1), else 1.

    How far is asked of two outcomes, this token or another (binary), from log-probs alone: tv = |pi - pi_old|, or
    kl = KL(pi_old || pi)."""
    log_ratio_BR = torch.where(mask_BR, new_BR - old_BR, 0.0)
    moved_BR = binary_divergence(new_BR.detach(), old_BR, divergence)
    masked_BR = (moved_BR > threshold) & (advantages_BR * log_ratio_BR > 0)
    objective_BR = torch.where(masked_BR, 0.0, log_ratio_BR.exp() * advantages_BR)
    return _told(objective_BR, masked_BR, log_ratio_BR, mask_BR, weights_BR, importance_BR)


def binary_divergence(new_BR: Tensor, old_BR: Tensor, divergence: Divergence) -> Tensor:
    """Of (pi_old, 1 - pi_old) and (pi, 1 - pi), from the logarithms of the first of each."""
    if divergence == "tv":
        return (new_BR.exp() - old_BR.exp()).abs()
    other_BR, old_other_BR = -torch.expm1(new_BR), -torch.expm1(old_BR)
    # x log y is 0 where x is, which a certain token makes of 1 - pi
    elsewhere_BR = torch.xlogy(old_other_BR, old_other_BR) - torch.xlogy(old_other_BR, other_BR)
    return old_BR.exp() * (old_BR - new_BR) + elsewhere_BR


def _clipped(
    ratio_BR: Tensor, advantages_BR: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """PPO's objective of some ratio, and where the clipped one is taken."""
    plain_BR = ratio_BR * advantages_BR
    clipped_BR = ratio_BR.clamp(1 - clip_low, 1 + clip_high) * advantages_BR
    objective_BR = torch.minimum(plain_BR, clipped_BR)
    if dual_clip is not None:
        floor_BR = dual_clip * advantages_BR
        objective_BR = torch.where(advantages_BR < 0, torch.maximum(objective_BR, floor_BR), objective_BR)
    return objective_BR, clipped_BR < plain_BR


def _told(
    objective_BR: Tensor,
    clipped_BR: Tensor,
    log_ratio_BR: Tensor,
    mask_BR: Tensor,
    weights_BR: Tensor,
    importance_BR: Tensor | None,
) -> tuple[Tensor, Metrics]:
    """The loss of an objective, and what is told of every policy loss."""
    if importance_BR is not None:
        objective_BR = importance_BR * objective_BR
    loss = -weighted_sum(objective_BR, mask_BR, weights_BR)
    clipped = weighted_sum(clipped_BR.to(log_ratio_BR), mask_BR, weights_BR).detach()
    return loss, {"clip_fraction": clipped, **moved(loss, log_ratio_BR, mask_BR, weights_BR)}


def moved(loss: Tensor, log_ratio_BR: Tensor, mask_BR: Tensor, weights_BR: Tensor) -> Metrics:
    """How far the policy is from the old one, beside its loss."""
    with torch.no_grad():
        return {
            "policy_loss": loss.detach(),
            # k3 of KL(old || new), from tokens of the old policy
            "approx_kl": weighted_sum(torch.expm1(log_ratio_BR) - log_ratio_BR, mask_BR, weights_BR),
            # mean of ratio - 1: exactly 0 where every ratio is 1, which a sum of weights would miss by a rounding
            "ratio_excess": weighted_sum(torch.expm1(log_ratio_BR), mask_BR, weights_BR),
        }


def value_loss(
    values_BR: Tensor,
    old_values_BR: Tensor,
    returns_BR: Tensor,
    mask_BR: Tensor,
    weights_BR: Tensor,
    *,
    clip: float | None,
) -> tuple[Tensor, Metrics]:
    """Value clipping: half the squared error, or the worse of it and of that of the value held within `clip` of the old."""
    error_BR = (values_BR - returns_BR).square()
    clipped_share = torch.zeros((), device=values_BR.device)
    if clip is not None:
        held_BR = old_values_BR + (values_BR - old_values_BR).clamp(-clip, clip)
        held_error_BR = (held_BR - returns_BR).square()
        # Asked of the distance, too: the held value differs from a free one by roundings.
        counts_BR = ((values_BR - old_values_BR).abs() > clip) & (held_error_BR > error_BR)
        clipped_share = weighted_sum(counts_BR.to(error_BR), mask_BR, weights_BR)
        error_BR = torch.maximum(error_BR, held_error_BR)
    loss = weighted_sum(error_BR, mask_BR, weights_BR) / 2
    return loss, {"value_loss": loss.detach(), "value_clip_fraction": clipped_share.detach()}


def weighted_sum(value_BR: Tensor, mask_BR: Tensor, weights_BR: Tensor) -> Tensor:
    """The minibatch's mean of a per-token quantity (its share from these rows)."""
    # where, not a product with the weight 0: what stands under the mask may be inf or NaN
    return (torch.where(mask_BR, value_BR, 0.0) * weights_BR).sum()
