"""PPO's losses: tensors in, (loss, metrics) out.

Every loss is a weighted sum over actions, never a mean. The weights come from `token_weights`, which divides by counts of
the whole minibatch on all ranks; so losses, metrics and gradients of micro-batches simply add up, however the rows are
split. Metrics are sums of the same kind, over actions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["token", "sequence"]
Metrics = dict[str, Tensor]


def token_weights(mask_BR: Tensor, *, tokens: int, rows: int, reduction: Reduction = "token") -> Tensor:
    """Global token count: an action counts 1 / `tokens`, or 1 / (actions of its row x `rows`).

    `tokens` are the actions of the minibatch on all ranks, `rows` its rows that have any."""
    if reduction == "token":
        weight = torch.tensor(1.0 / max(tokens, 1), device=mask_BR.device)
    else:
        weight = 1.0 / (mask_BR.sum(1, keepdim=True).clamp(min=1) * max(rows, 1))
    return torch.where(mask_BR, weight, 0.0)


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
    ratio_BR = log_ratio_BR.exp()
    plain_BR = ratio_BR * advantages_BR
    clipped_BR = ratio_BR.clamp(1 - clip_low, 1 + clip_high) * advantages_BR
    objective_BR = torch.minimum(plain_BR, clipped_BR)
    if dual_clip is not None:
        floor_BR = dual_clip * advantages_BR
        objective_BR = torch.where(advantages_BR < 0, torch.maximum(objective_BR, floor_BR), objective_BR)
    if importance_BR is not None:
        objective_BR = importance_BR * objective_BR
    loss = -weighted_sum(objective_BR, mask_BR, weights_BR)
    with torch.no_grad():
        metrics = {
            "policy_loss": loss.detach(),
            "clip_fraction": weighted_sum((clipped_BR < plain_BR).to(ratio_BR), mask_BR, weights_BR),
            # k3 of KL(old || new), from tokens of the old policy
            "approx_kl": weighted_sum(torch.expm1(log_ratio_BR) - log_ratio_BR, mask_BR, weights_BR),
            # mean of ratio - 1: exactly 0 where every ratio is 1, which a sum of weights would miss by a rounding
            "ratio_excess": weighted_sum(torch.expm1(log_ratio_BR), mask_BR, weights_BR),
        }
    return loss, metrics


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
