"""Minibatches depend on who a row is, not on where it stands; micro-batches cover a minibatch on any number of ranks."""

from __future__ import annotations

import pytest
import torch

from rollout.batch import Rollout
from training.minibatch import micro_batches, minibatches, share, whole_lengths


def rows(count: int = 24, width: int = 5) -> Rollout:
    numbers = torch.zeros(count, width)
    return Rollout(
        prompt_BP=torch.ones(count, 3, dtype=torch.int64),
        prompt_mask_BP=torch.arange(3)[None] >= torch.arange(count)[:, None] % 3,
        response_BR=torch.ones(count, width, dtype=torch.int64),
        lengths_B=torch.arange(count) % width + 1,
        ended_B=torch.ones(count, dtype=torch.bool),
        behaviour_logprobs_BR=numbers,
        policy_logprobs_BR=numbers,
        row_B=torch.arange(count) // 2 + 100,
        sample_B=torch.arange(count) % 2,
    )


def named(rollout: Rollout, parts: list[list[int]]) -> list[set[tuple[int, int]]]:
    return [{(int(rollout.row_B[i]), int(rollout.sample_B[i])) for i in part} for part in parts]


def test_every_row_is_in_one_minibatch_and_epochs_differ():
    rollout = rows()
    first = minibatches(rollout, count=4, seed=0, step=3, epoch=0)
    assert [len(part) for part in first] == [6] * 4 and sorted(sum(first, [])) == list(range(24))
    for other in (dict(epoch=1), dict(step=4), dict(seed=1)):
        assert minibatches(rollout, **{**dict(count=4, seed=0, step=3, epoch=0), **other}) != first


def test_the_order_of_the_rows_does_not_matter():
    rollout = rows()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved = rollout.select(order)
    settings = dict(count=3, seed=7, step=0, epoch=2)
    assert named(rollout, minibatches(rollout, **settings)) == named(moved, minibatches(moved, **settings))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_ranks_cover_a_minibatch_once_in_as_many_micro_batches(world_size, size):
    lengths = whole_lengths(rows())
    picked = [3, 5, 8, 11, 20]
    parts = [micro_batches(picked, lengths, size=size, rank=r, world_size=world_size) for r in range(world_size)]
    assert sorted(i for part in parts for batch in part for i in batch) == picked
    assert len({len(part) for part in parts}) == 1  # a rank without rows takes part
    assert all(len(batch) <= size for part in parts for batch in part)


def test_whole_lengths_and_shares():
    rollout = rows(4)
    assert whole_lengths(rollout).tolist() == [3 + 1, 2 + 2, 1 + 3, 3 + 4]
    for world_size in (1, 2, 3, 9):
        parts = [share(list(range(8)), r, world_size) for r in range(world_size)]
        assert sum(parts, []) == list(range(8)) and max(map(len, parts)) - min(map(len, parts)) <= 1
