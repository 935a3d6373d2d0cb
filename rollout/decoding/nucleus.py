"""The smallest set of tokens whose mass reaches p, without sorting a vocabulary.

    d = top - score       |0 . . . . . . . . . . . . 32|        up to 2,048 buckets of equal width in score
    mass per bucket       |#####:::::....              |        summed up from the likeliest
    goal p                       ^                              the one bucket in which it is reached
    inside that bucket            sort a handful of tokens      likeliest first, the lower id first among equals

Five passes over the scores and a sort of one bucket, where a sort of 32,000 tokens costs some thirty times that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from steerl.rollout.decoding.distribution import Weights

_MOST, _RANGE = 2048, 32.0
"""Buckets; and how many nats below the top the last one begins: what is there weighs 1e-14 of the top."""


def nucleus(weights: Weights, top_p: float) -> Tensor:
    """True for the tokens of the nucleus. Tokens of weight 0 (taken out before) are never in it."""
    keep_BV = weights.space.like("kept", weights.shifted_BV, torch.bool)
    # A mass that equals p up to float32's rounding reaches it: 0.5 + 0.3 + 0.1 of p = 0.9.
    goal_B = top_p * (1 - 1e-6) * weights.total_B
    for piece in weights.pieces:
        _of_rows(weights, piece, goal_B[piece], keep_BV[piece])
    return keep_BV


def _of_rows(weights: Weights, piece: slice, goal_B: Tensor, keep_BV: Tensor) -> None:
    """The nucleus of some rows, written into `keep_BV`."""
    shifted_BV, weights_BV = weights.shifted_BV[piece], weights.weights_BV[piece]
    rows, buckets = len(goal_B), min(_MOST, shifted_BV.shape[1] // 16 + 1)
    depth_BV = torch.mul(shifted_BV, -buckets / _RANGE, out=weights.space.like("depths", shifted_BV))
    bucket_BV = weights.space.like("buckets", depth_BV, torch.int64).copy_(depth_BV).clamp_(0, buckets - 1)
    mass_BK = torch.zeros(rows, buckets, device=goal_B.device).scatter_add_(1, bucket_BV, weights_BV)
    edge_B = (mass_BK.double().cumsum(dim=1) < goal_B[:, None]).sum(dim=1).clamp(max=buckets - 1)
    for _ in range(3):
        torch.lt(bucket_BV, edge_B[:, None], out=keep_BV)
        before_B = weights.mass_of(keep_BV, piece)
        edge_BV = torch.eq(bucket_BV, edge_B[:, None], out=weights.space.like("edge", bucket_BV, torch.bool))
        row, column = edge_BV.nonzero(as_tuple=True)
        left = weights_BV[row, column] > 0
        inside = (row[left], column[left])
        place, ranked = _rank(shifted_BV[inside], inside[0], rows)
        reached_BC = before_B[:, None] + ranked.values.double().exp().cumsum(dim=1)
        # The buckets were summed in float32, one token after the other: the edge may be a bucket off.
        back_B = (before_B >= goal_B) & (edge_B > 0)
        on_B = ~back_B & (reached_BC[:, -1] < goal_B) & (edge_B < buckets - 1)
        if not bool((back_B | on_B).any()):
            break
        edge_B = edge_B - back_B.long() + on_B.long()
    needed_B1 = (reached_BC < goal_B[:, None]).sum(dim=1, keepdim=True) + 1
    width = reached_BC.shape[1]
    chosen_BC = torch.zeros_like(reached_BC, dtype=torch.bool)
    chosen_BC.scatter_(1, ranked.indices, (torch.arange(width, device=goal_B.device) < needed_B1))
    keep_BV[inside] = chosen_BC[inside[0], place]


def _rank(values: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Any]:
    """Each value's place in its row, and the rows sorted: likeliest first, the lower id first among equals."""
    counts_B = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=row.device) - (counts_B.cumsum(0) - counts_B)[row]
    table_BC = torch.full((rows, max(int(counts_B.max()), 1)), float("-inf"), device=row.device)
    table_BC[row, place] = values
    return place, table_BC.sort(dim=1, descending=True, stable=True)
