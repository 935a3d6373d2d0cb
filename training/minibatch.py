"""Which rows learn together: minibatches, ranks, micro-batches.

    rows of the step --key of (seed, step, epoch, row, sample)--> minibatches     (the algorithm: the same on any machine)
    a minibatch --sorted by length, dealt out--> ranks --> micro-batches          (memory only: losses add up, see loss.py)

Sorting by length keeps padding small and gives every rank the same work. All ranks have the same number of micro-batches,
so that a rank that has no row left still takes part in every collective call; its micro-batch is then empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rollout.batch import Rollout
from rollout.sampling import uniforms

Item = TypeVar("Item")
_MINIBATCH_STREAM = 0x6D696E69
"""Keeps these random numbers apart from those that draw tokens."""


def minibatches(rollout: Rollout, *, count: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """`count` parts of equal size. A row's place depends on its identity, not on its position in the rollout."""
    key_B = uniforms(seed ^ _MINIBATCH_STREAM, step, rollout.row_B, rollout.sample_B, epoch)
    # Rows that are the same (one prompt twice in a step) are told apart by their position.
    order = torch.argsort(key_B, stable=True).tolist()
    size = len(order) // count
    return [order[i * size : (i + 1) * size] for i in range(count)]


def micro_batches(rows: list[int], lengths: Tensor, *, size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """This rank's share of `rows`, in micro-batches of at most `size`; as many on every rank, the last ones maybe empty.

    `lengths` are whole lengths (prompt and response) of all rows of the step."""
    longest_first = sorted(rows, key=lambda i: (-int(lengths[i]), i))
    mine = longest_first[rank::world_size]
    most = -(-len(longest_first) // world_size)
    count = -(-most // size)
    return [mine[i * size : (i + 1) * size] for i in range(count)]


def whole_lengths(rollout: Rollout) -> Tensor:
    """Prompt and response of every row, in tokens: what a row costs."""
    return rollout.prompt_mask_BP.sum(1) + rollout.lengths_B


def occurrences(rows: list[int]) -> list[int]:
    """How often each row was there before in the list: a small dataset comes round within a step."""
    seen: Counter[int] = Counter()
    found = []
    for row in rows:
        found.append(seen[row])
        seen[row] += 1
    return found


def share(items: Sequence[Item], rank: int, world_size: int) -> Sequence[Item]:
    """This rank's part of a list, by position: contiguous, sizes differing by one at most."""
    size, over = divmod(len(items), world_size)
    start = rank * size + min(rank, over)
    return items[start : start + size + (rank < over)]
