"""Minibatches depend on who a row is, not on where it stands; micro-batches cover a minibatch on any number of ranks."""

from __future__ import annotations

import pytest
import torch

from steerl.rollout.types import Rollout
from steerl.training.algorithm.minibatch import micro_batches, minibatches, share, whole_lengths


def rows(count: int = 24, width: int = 5) -> Rollout:
    prompts, responses = ([1] * (3 - b % 3) for b in range(count)), ([1] * (b % width + 1) for b in range(count))
    row_B, sample_B = torch.arange(count) // 2 + 100, torch.arange(count) % 2
    return Rollout.of_ids(list(prompts), list(responses), row_B=row_B, sample_B=sample_B)


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
    picked = [3, 5, 8, 11, 20]
    for tokens, packed in ((0, False), (None, False), (None, True), (9, True)):
        settings = {"size": size, "tokens": tokens, "world_size": world_size, "packed": packed}
        parts = [micro_batches(picked, rows(), rank=r, **settings) for r in range(world_size)]
        assert sorted(i for part in parts for batch in part for i in batch) == picked
        assert len({len(part) for part in parts}) == 1  # a rank without rows takes part
        assert tokens != 0 or all(len(batch) <= size for part in parts for batch in part)


def cost(rollout: Rollout, parts: list[list[int]], start: int) -> int:
    """Rows x longest row of each part, and what each costs to begin."""
    lengths = (rollout.prompt_mask_BP.sum(1) + rollout.lengths_B).tolist()
    return sum(len(part) * max(lengths[i] for i in part) + start for part in parts)


@pytest.mark.parametrize("start", [0, 3, 1000])
def test_cuts_are_the_cheapest_of_all_within_the_budget(start):
    """All ways to cut the rows, longest first, are tried out."""
    rollout = rows(11)
    lengths = (rollout.prompt_mask_BP.sum(1) + rollout.lengths_B).tolist()
    order = sorted(range(11), key=lambda i: (-lengths[i], i))
    for tokens in (1, 14, 30, 1000):
        found = micro_batches(list(range(11)), rollout, size=99, tokens=tokens, start=start)
        ways = []
        for places in range(2**10):
            cuts = [0, *[i + 1 for i in range(10) if places >> i & 1], 11]
            parts = [order[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
            if all(len(part) == 1 or len(part) * lengths[part[0]] <= tokens for part in parts):
                ways.append(cost(rollout, parts, start))
        assert cost(rollout, found, start) == min(ways) and sorted(sum(found, [])) == list(range(11))


@pytest.mark.parametrize("tokens", [1, 9, 14, 30, 1000])
def test_packed_rows_are_counted_by_their_own_tokens(tokens):
    """All ways to cut the rows, longest first, are tried out: the fewest parts within the budget, as even as can be."""
    rollout = rows(11)
    lengths = (rollout.prompt_mask_BP.sum(1) + rollout.lengths_B).tolist()
    order = sorted(range(11), key=lambda i: (-lengths[i], i))
    found = micro_batches(list(range(11)), rollout, size=99, tokens=tokens, packed=True)
    sums = [sum(lengths[i] for i in part) for part in found]
    assert sorted(sum(found, [])) == list(range(11))
    assert all(total <= tokens or len(part) == 1 for total, part in zip(sums, found, strict=True))
    ways = []
    for places in range(2**10):
        cuts = [0, *[i + 1 for i in range(10) if places >> i & 1], 11]
        parts = [order[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        totals = [sum(lengths[i] for i in part) for part in parts]
        if all(total <= tokens or len(part) == 1 for total, part in zip(totals, parts, strict=True)):
            ways.append((len(parts), sum(total**2 for total in totals)))
    assert (len(found), sum(total**2 for total in sums)) == min(ways)


def test_a_rows_budget_is_in_tokens_of_full_rows():
    rollout = rows(24)  # prompts of 1 to 3 and responses of 1 to 5: a full row has 8 tokens
    parts = micro_batches(list(range(24)), rollout, size=4, start=1000)
    assert max(map(len, parts)) > 4 and all(len(part) * int(whole_lengths(rollout)[part].max()) <= 4 * 8 for part in parts)


def test_whole_lengths_and_shares():
    rollout = rows(4)
    assert whole_lengths(rollout).tolist() == [3 + 1, 2 + 2, 1 + 3, 3 + 4]
    for world_size in (1, 2, 3, 9):
        parts = [share(list(range(8)), r, world_size) for r in range(world_size)]
        assert sum(parts, []) == list(range(8)) and max(map(len, parts)) - min(map(len, parts)) <= 1
