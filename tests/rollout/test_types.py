"""Rollouts from lists of tokens: where every token and number comes to stand."""

from __future__ import annotations

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.rollout.types import Rollout, left_pad


def test_lists_of_tokens_stand_at_the_border_of_prompt_and_response():
    rollout = Rollout.of_ids(
        [[5], [4, 6, 7]],
        [torch.tensor([8, 9, 2]), [7]],
        pad_id=3,
        behaviour_logprobs_BR=[[-0.5, -1.0, -2.0], torch.tensor([-4.0])],
        row_B=range(10, 12),
        stop_B=torch.tensor([1, 0]),
        temperature=0.5,
    )
    assert rollout.prompt_BP.tolist() == [[3, 3, 5], [4, 6, 7]] and rollout.response_BR.tolist() == [[8, 9, 2], [7, 0, 0]]
    assert rollout.prompt_mask_BP.tolist() == [[False, False, True], [True, True, True]]
    assert rollout.lengths_B.tolist() == [3, 1] and rollout.mask_BR.tolist() == [[True] * 3, [True, False, False]]
    assert rollout.behaviour_logprobs_BR.tolist() == [[-0.5, -1.0, -2.0], [-4.0, 0.0, 0.0]]
    assert not rollout.policy_logprobs_BR.any() and rollout.policy_logprobs_BR.dtype == torch.float32
    assert rollout.row_B.tolist() == [10, 11] and rollout.sample_B.tolist() == [0, 0] and rollout.stop_B.tolist() == [1, 0]
    assert rollout.ended_B.all() and rollout.temperature == 0.5 and rollout.entropy_BR is None


def test_no_rows_and_rows_without_tokens():
    assert len(Rollout.of_ids([], [], entropy_BR=[])) == 0
    bare = Rollout.of_ids([[]] * 3, [[]] * 3)
    assert len(bare) == 3 and bare.prompt_width == bare.response_width == 0
    assert left_pad([[], [5]], pad_id=1)[0].tolist() == [[1], [5]]


def test_lists_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="Rollout.lengths_B: expected B = 2"):
        Rollout.of_ids([[5], [6]], [[7]], row_B=[0, 1], response_BR=torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(UserError, match="Rollout.policy_logprobs_BR: expected R = 1"):
        Rollout.of_ids([[5]], [[7]], policy_logprobs_BR=[[-1.0, -2.0]])
