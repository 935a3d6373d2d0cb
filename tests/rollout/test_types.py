"""Rollouts from lists of tokens: where every token and number comes to stand."""

from __future__ import annotations

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.rollout.ragged import Kept, left_pad
from steerl.rollout.types import Rollout, Samples, Texts


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


# -- a row of two turns ----------------------------------------------------------------------------------------------


def two_turns() -> Rollout:
    """One turn of two tokens; two turns of two and one with 3 and 4 fed in between and 5 at the end; nothing at all."""
    return Rollout.of_ids(
        [[5], [4, 5], [6]],
        [[7, 2], [7, 8, 3, 4, 9, 5], []],
        action_mask_BR=[[1, 1], [1, 1, 0, 0, 1, 0], []],
        policy_logprobs_BR=[[-1.0, -2.0], [-3.0, -4.0, 0.0, 0.0, -5.0, 0.0], []],
        strength_BK=[[0.5, 0.0], [1.0, 2.0], [0.0, 0.0]],
        positions_BKN=[[[0, -1], [-1, -1]], [[1, 0], [-1, -1]], [[-1, -1], [-1, -1]]],
        policy_step_B=[3, 4, -1],
        kept=Kept.of_lists([[[7, 1], [2]], [[7], [], [], [], [9, 8, 6], []], []]),
    )


def test_extent_and_actions_of_rows_with_gaps():
    rollout = two_turns()
    assert rollout.lengths_B.tolist() == [2, 6, 0] and rollout.actions_B.tolist() == [2, 3, 0]
    assert rollout.extent_BR.sum(1).tolist() == [2, 6, 0]
    assert rollout.turns == [[(0, 2)], [(0, 2), (4, 5)], []]
    assert rollout.sequences_mask_BS.sum(1).tolist() == [3, 8, 1]
    one_turn = Rollout.of_ids([[5]], [[7, 8]])
    assert one_turn.action_mask_BR.tolist() == [[True, True]] and one_turn.strength_BK.shape == (1, 0)
    assert one_turn.policy_step_B.tolist() == [-1] and one_turn.kept is None and one_turn.strength_B.tolist() == [0.0]


def as_lists(rollout: Rollout) -> list[tuple[object, ...]]:
    """Every row by itself, without padding: what must stay whatever is done to the table."""
    rows: list[tuple[object, ...]] = []
    kept = rollout.kept.lists() if rollout.kept is not None else [[[]] * rollout.response_width] * len(rollout)
    for b in range(len(rollout)):
        length = int(rollout.lengths_B[b])
        per_token = (rollout.response_BR, rollout.action_mask_BR, rollout.policy_logprobs_BR)
        rows.append((
            rollout.prompt_BP[b][rollout.prompt_mask_BP[b]].tolist(),
            *(table[b, :length].tolist() for table in per_token),
            [sorted(ids) for ids in kept[b][:length]],
            rollout.strength_BK[b].tolist(),
            [sorted(p for p in places if p >= 0) for places in rollout.positions_BKN[b].tolist()],
            int(rollout.policy_step_B[b]),
        ))  # fmt: skip
    return rows


def test_rows_stay_what_they_are_in_every_view():
    rollout = two_turns()
    rows = as_lists(rollout)
    for index in ([2, 0, 1], [1, 1, 0], [], torch.tensor([False, True, True])):
        wanted = [rows[i] for i in (index if isinstance(index, list) else [1, 2])]
        assert as_lists(rollout.select(index)) == wanted
    assert as_lists(rollout.select(slice(1, 3))) == rows[1:]
    assert as_lists(rollout.select([0]).trim()) == rows[:1] and rollout.select([0]).trim().response_width == 2
    assert as_lists(rollout.pad_to(5, 9)) == rows and as_lists(rollout.to("cpu")) == rows
    parts = [rollout.select([1]).trim(), rollout.select([2]).trim(), rollout.select([0]).trim()]
    assert as_lists(Rollout.join(parts)) == [rows[1], rows[2], rows[0]]
    plain = Rollout.of_ids([[9]], [[1, 2, 3]], strength_BK=[[0.0, 1.0]])
    assert as_lists(Rollout.join([rollout, plain])) == [*rows, *as_lists(plain)]


def test_kept_is_a_mask_of_the_vocabulary_at_any_places():
    kept = two_turns().kept
    assert kept is not None
    place_N = torch.tensor([10, 0, 7, 1])  # (row, token) x 6: (1, 4), (0, 0), (1, 1): nothing recorded, (0, 1)
    wanted = torch.zeros(4, 12, dtype=torch.bool)
    for row, ids in enumerate(([9, 8, 6], [7, 1], range(12), [2])):
        wanted[row, list(ids)] = True
    assert torch.equal(kept.mask(place_N, 12), wanted)
    assert kept.mask(place_N[:0], 12).shape == (0, 12)


def test_records_that_contradict_themselves_are_named():
    with pytest.raises(UserError, match="Rollout.action_mask_BR: row 1 has actions beyond its length 1"):
        Rollout.of_ids([[5], [6]], [[7, 8], [7]], action_mask_BR=[[1, 1], [1, 1]])
    with pytest.raises(UserError, match="Rollout.positions_BKN: expected K = 1"):
        Rollout.of_ids([[5]], [[7]], strength_BK=[[1.0]], positions_BKN=[[[0], [1]]])
    with pytest.raises(UserError, match=r"Rollout.kept: expected counts of shape \(1, 1\), found \(1, 2\)"):
        Rollout.of_ids([[5]], [[7]], kept=Kept.of_lists([[[1], [2]]]))
    with pytest.raises(UserError, match="Kept.ids: expected 3 ids as counts_BR says, found 2"):
        Kept(torch.tensor([1, 2], dtype=torch.int32), torch.tensor([[3]]))
    with pytest.raises(UserError, match=r"Rollout.join: the number of steering sites differs between the parts: \[0, 1\]"):
        Rollout.join([Rollout.of_ids([[5]], [[7]]), Rollout.of_ids([[5]], [[7]], strength_BK=[[1.0]])])
    with pytest.raises(UserError, match="Rollout.join: steering_seed differs between the parts: 0 and 1"):
        Rollout.join([Rollout.of_ids([[5]], [[7]]), Rollout.of_ids([[5]], [[7]], steering_seed=1)])


def test_rows_and_what_they_say_stay_together():
    texts = Texts(prompts=["a", "b", "c"], prompt_texts=["a", "b", "c"], completions=["1", "2", "3"], columns={"n": [1, 2, 3]})
    samples = Samples(two_turns(), texts)
    rollout, said = samples.select([2, 0])
    assert rollout.policy_step_B.tolist() == [-1, 3] and said.completions == ["3", "1"] and said.columns == {"n": [3, 1]}
    again = Samples.join([samples.select([1]), samples.select([0, 2])]).to("cpu")
    assert again.rollout.lengths_B.tolist() == [6, 2, 0] and again.texts.prompts == ["b", "a", "c"]
