"""Which rows learn together: minibatches, ranks, micro-batches.

    rows of the step --key of (seed, step, epoch, row, sample)--> minibatches     (the algorithm: the same on any machine)
    a minibatch --sorted by length, dealt out--> ranks --> micro-batches          (memory only: losses add up, see loss.py)

Sorting by length keeps padding small and gives every rank the same work; rows x longest row is what a micro-batch costs.
All ranks have the same number of micro-batches, so that a rank that has no row left still takes part in every collective
call; its micro-batch is then empty.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from steerl.rollout.common import processes
from steerl.rollout.common.random import uniforms
from steerl.rollout.types import Rollout
from steerl.training.settings import PPOSettings

Item = TypeVar("Item")
_MINIBATCH_STREAM = 0x6D696E69
"""Keeps these random numbers apart from those that draw tokens."""
_START = {"cpu": 64, "cuda": 4096}
"""What a pass forward and back costs beside its tokens, in tokens."""


def minibatches(rollout: Rollout, *, count: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """Minibatches, shuffled anew in every epoch: `count` parts of equal size.

    A row's place depends on its identity, not on its position in the rollout."""
    key_B = uniforms(seed ^ _MINIBATCH_STREAM, step, rollout.row_B, rollout.sample_B, epoch)
    # Rows that are the same (one prompt twice in a step) are told apart by their position.
    order = torch.argsort(key_B, stable=True).tolist()
    size = len(order) // count
    return [order[i * size : (i + 1) * size] for i in range(count)]


def passes(rows: list[int], rollout: Rollout, settings: PPOSettings) -> list[list[int]]:
    """Gradient accumulation: this rank's micro-batches of `rows`, as the settings and its device have them."""
    process = processes.start()
    return micro_batches(
        rows,
        rollout,
        size=settings.micro_batch_size,
        tokens=settings.micro_batch_tokens,
        packed=settings.packing,
        rank=process.rank,
        world_size=process.world_size,
        start=_START.get(process.device.type, _START["cuda"]),
    )


def micro_batches(
    rows: list[int],
    rollout: Rollout,
    *,
    size: int,
    tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    start: int = _START["cpu"],
    packed: bool = False,
) -> list[list[int]]:
    """This rank's share of `rows` in micro-batches of rows of like length; as many on every rank, the last ones maybe empty.

    A micro-batch has at most `tokens` tokens, padding counted; None = those of `size` rows of the rollout's full length,
    0 = any number, and `size` rows. Cuts are where rows x longest row, and `start` tokens for each pass, are fewest. Of
    `packed` rows their own tokens are counted, and the fewest passes are cut as even as they can be."""
    prompts, responses, both = (n.tolist() for n in (rollout.prompt_mask_BP.sum(1), rollout.lengths_B, whole_lengths(rollout)))
    longest_first = sorted(rows, key=lambda i: (-both[i], i))
    # Every round deals one row to each rank. Cuts are between rounds, so that all ranks cut alike.
    rounds = [longest_first[i : i + world_size] for i in range(0, len(longest_first), world_size)]
    if tokens == 0:
        cuts = [*range(0, len(rounds), size), len(rounds)]
    else:
        # An encoder's input and a decoder's rows are padded apart.
        apart = rollout.is_encoder_decoder
        sizes = [
            (max(prompts[i] for i in dealt), max(responses[i] for i in dealt)) if apart else (max(both[i] for i in dealt), 0)
            for dealt in rounds
        ]
        widest = max(prompts) + max(responses)
        most = size * widest if tokens is None else tokens
        cuts = _even_cuts([size for size, _ in sizes], most) if packed else _cheapest_cuts(sizes, most, start)
    own = [dealt[rank] if rank < len(dealt) else None for dealt in rounds]
    return [[i for i in own[a:b] if i is not None] for a, b in pairwise(cuts)]


def _cheapest_cuts(sizes: list[tuple[int, int]], most: int, start: int) -> list[int]:
    """Where to cut a list of rows (two widths each) so that the parts cost least: rows x widest, and `start` for each.

    Filling each part up instead takes 1.1 to 2.3 times the tokens where lengths differ (equal lengths: the same)."""
    cost, previous = [0, *[math.inf] * len(sizes)], [0] * (len(sizes) + 1)
    for i in range(len(sizes)):
        wide = [0, 0]
        for j in range(i, len(sizes)):
            wide = [max(wide[0], sizes[j][0]), max(wide[1], sizes[j][1])]
            took = (j + 1 - i) * sum(wide)
            if took > most and j > i:
                break
            if cost[i] + took + start < cost[j + 1]:
                cost[j + 1], previous[j + 1] = cost[i] + took + start, i
    return _back(previous)


def _even_cuts(sizes: list[int], most: int) -> list[int]:
    """Where to cut a list of rows so that there are as few parts as there can be, and their squares (a full mask has as many
    entries) sum to least."""
    cost, previous = [(0, 0), *[(len(sizes) + 1, 0)] * len(sizes)], [0] * (len(sizes) + 1)
    for i in range(len(sizes)):
        (parts, squares), took = cost[i], 0
        for j in range(i, len(sizes)):
            took += sizes[j]
            if took > most and j > i:
                break
            cost[j + 1], previous[j + 1] = min((cost[j + 1], previous[j + 1]), ((parts + 1, squares + took * took), i))
    return _back(previous)


def _back(previous: list[int]) -> list[int]:
    cuts = [len(previous) - 1]
    while cuts[-1]:
        cuts.append(previous[cuts[-1]])
    return cuts[::-1]


def select(rollout: Rollout, rows: list[int], device: torch.device) -> Rollout:
    """Some rows, on the model's device, without padding that none of them needs."""
    return rollout.select(rows).trim().to(device)


def whole_lengths(rollout: Rollout) -> Tensor:
    """Prompt and response of every row, in tokens: what a row costs."""
    return rollout.prompt_mask_BP.sum(1) + rollout.lengths_B


def occurrences(rows: list[int]) -> list[int]:
    """How often each row was there before in the list: a small dataset comes round within a step."""
    seen: Counter[int] = Counter()
    times = []
    for row in rows:
        times.append(seen[row])
        seen[row] += 1
    return times


def share(items: Sequence[Item], rank: int, world_size: int) -> Sequence[Item]:
    """This rank's part of a list, by position: contiguous, sizes differing by one at most."""
    size, over = divmod(len(items), world_size)
    start = rank * size + min(rank, over)
    return items[start : start + size + (rank < over)]
