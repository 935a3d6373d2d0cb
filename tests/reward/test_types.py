"""Scores, the weighted sum, metrics: against loops written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from steerl.reward.build import build_reward
from steerl.reward.types import Scores, metrics, missing_stop_penalty, on_turns
from steerl.rollout.common.errors import UserError
from tests.reward.rows import episodes, made


def test_the_total_is_the_weighted_sum_of_the_parts():
    lengths, vowels = [1, 4, 2], [0.5, -2.0, 1.25]

    def length(completions, **columns):
        return [float(len(text)) for text in completions]

    def vowel(completions, **columns):
        return list(vowels)

    reward = build_reward([{"kind": "function", "function": length, "name": "len", "weight": 0.3}, vowel])
    scores = reward(*made(["a", "bcde", "fg"]))
    expected = [0.3 * a + 1.0 * b for a, b in zip(lengths, vowels, strict=True)]
    assert scores.total_B.dtype == torch.float32
    assert scores.total_B.tolist() == pytest.approx(expected, abs=1e-6)
    assert scores.parts["len"].tolist() == lengths
    assert scores.parts["vowel"].tolist() == vowels
    assert set(scores.seconds) == {"len", "vowel"} and all(value >= 0 for value in scores.seconds.values())


def test_a_part_that_does_not_apply_adds_nothing_and_is_not_averaged():
    def some(completions, **columns):
        return [2.0, None, None]

    def others(completions, **columns):
        return [1.0, 3.0, 2.0]

    reward = build_reward([{"kind": "function", "function": some, "name": "some", "weight": 10.0}, others])
    scores = reward(*made(["a", "b", "c"]))
    assert scores.total_B.tolist() == [21.0, 3.0, 2.0]
    assert scores.parts["some"][0] == 2.0 and scores.parts["some"][1:].isnan().all()
    logged = metrics([scores])
    assert logged["reward/some"] == 2.0 and logged["reward/some_not_applicable"] == 2.0
    assert logged["reward/others"] == 2.0
    assert logged["reward/mean"] == pytest.approx(26 / 3)


def test_a_row_to_which_no_part_applies_is_refused():
    def some(completions, **columns):
        return [2.0, None, None]

    def others(completions, **columns):
        return [1.0, 3.0, None]

    with pytest.raises(
        UserError, match=r"reward: no part applies to 1 of 3 rows \(row 12 sample 0\): each gave None there; leave"
    ):
        build_reward([some, others])(*made(["a", "b", "c"]))


def test_a_total_that_float32_cannot_hold_is_refused():
    def huge(completions, **columns):
        return [1.0, 1e30]

    with pytest.raises(UserError, match="reward: row 11 sample 0 has the total inf; weights or values are too large"):
        build_reward([{"kind": "function", "function": huge, "weight": 1e30}])(*made(["a", "b"]))


def test_metrics_of_several_ranks_are_those_of_all_rows():
    values = torch.tensor([0.1, -4.0, 2.5, 7.0, 3.0])
    whole = metrics([Scores(values, {"p": values * 2})])
    halves = metrics(
        [Scores(values[:2], {"p": values[:2] * 2}), Scores(values[2:], {"p": values[2:] * 2}), Scores(torch.zeros(0))]
    )
    assert halves == pytest.approx(whole)
    mean = sum(values.double().tolist()) / 5
    assert whole["reward/mean"] == pytest.approx(mean)
    assert whole["reward/std"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values.double().tolist()) / 5))


def test_joined_scores_are_those_of_each_row():
    """Other widths, parts that some lack, a rank without rows: row by row as the row's own."""
    one = Scores(
        torch.tensor([1.0, 2.0]), {"a": torch.tensor([0.5, math.nan])}, torch.tensor([[1.0], [2.0]]), {"a": 1.0}, {"a": 1}
    )
    two = Scores(
        torch.tensor([3.0]), {"b": torch.tensor([7.0])}, torch.tensor([[1.0, 0.0, 2.0]]), {"a": 0.5, "b": 2.0}, {"a": 2, "b": 0},
        {"b/x": [4.0]}, {"b/y": ["z"]},
    )  # fmt: skip
    none = Scores(torch.zeros(0), {"a": torch.zeros(0)})
    joined = Scores.join([one, none, two])
    assert joined.total_B.tolist() == [1.0, 2.0, 3.0]
    assert joined.parts["a"].nan_to_num(nan=-9).tolist() == [0.5, -9, -9]
    assert joined.parts["b"].nan_to_num(nan=-9).tolist() == [-9, -9, 7.0]
    assert joined.tokens_BR.tolist() == [[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.0, 0.0, 2.0]]
    assert joined.seconds == {"a": 1.0, "b": 2.0} and joined.fallbacks == {"a": 3, "b": 0}
    assert joined.metrics == {"b/x": [4.0]} and joined.extra == {"b/y": [None, None, "z"]}
    assert Scores.join([none, none]).tokens_BR is None
    with pytest.raises(UserError, match="a reward per token came for some rows only"):
        Scores.join([one, Scores(torch.tensor([1.0]))])


def test_a_total_sits_on_the_last_action_of_finished_and_of_cut_rows():
    rollout, _ = made(["abc", "a", ""], ended=[True, False, False])
    rewards_BR = Scores(torch.tensor([1.0, 2.0, 3.0])).per_token(rollout)
    assert rewards_BR.tolist() == [[0.0, 0.0, 1.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_total_sits_on_the_last_action_before_what_was_fed_last():
    rollout, _ = episodes(["abcde", "abcd", "ab"], ["11001", "0110", "00"])
    rewards_BR = Scores(torch.tensor([1.0, 2.0, 3.0])).per_token(rollout)
    assert rewards_BR.tolist() == [[0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 2.0, 0.0, 0.0], [0.0] * 5]


def test_what_turns_earned_sits_on_their_last_actions():
    rollout, _ = episodes(["abcde", "abcd", "ab", "abcdef"], ["11001", "0110", "00", "101010"])
    assert on_turns([[0.5, -1.0], [2.0], [], [1.0, 2.0, 4.0]], rollout).tolist() == [
        [0.0, 0.5, 0.0, 0.0, -1.0, 0.0],
        [0.0, 0.0, 2.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 2.0, 0.0, 4.0, 0.0],
    ]
    with pytest.raises(UserError, match="reward: row 11 sample 0: gave 2 numbers for 1 turns"):
        on_turns([[0.5, -1.0], [2.0, 0.0], [], [1.0, 2.0, 4.0]], rollout)
    with pytest.raises(UserError, match="reward: gave 1 scores for 4 rows"):
        on_turns([[0.5, -1.0]], rollout)


def test_a_reward_for_what_was_fed_is_refused_where_it_stands():
    given_BR = torch.tensor([[1.0, 2.0, 0.0, 0.0, 4.0], [0.0, 1.0, 0.0, 0.25, 9.0]])  # the 9 lies beyond the row's end

    def steps(rollout, texts):
        return Scores(torch.zeros(len(rollout)), tokens_BR=given_BR[rollout.row_B - 10])

    rollout, texts = episodes(["abcde", "abcd"], ["11001", "0110"])
    scores = build_reward([steps])(rollout.select([0]), texts.select([0]))
    assert scores.tokens_BR.tolist() == [[1.0, 2.0, 0.0, 0.0, 4.0]] and scores.total_B.tolist() == [7.0]
    with pytest.raises(UserError, match="row 11 sample 0 earns 0.25 at token 3, which the policy did not draw"):
        build_reward([steps])(rollout, texts)


def test_dense_and_whole_rewards_add_up_token_by_token():
    dense = torch.tensor([[0.5, 0.25, 9.0], [1.0, 2.0, 4.0]])  # the 9 lies beyond the first row's end

    def steps(rollout, texts):
        return Scores(torch.zeros(2), tokens_BR=dense)

    def whole(completions, **columns):
        return [10.0, 20.0]

    rollout, texts = made(["ab", "cde"])
    scores = build_reward([{"kind": "function", "function": steps, "name": "steps", "weight": 2.0}, whole])(rollout, texts)
    assert scores.per_token(rollout).tolist() == [[1.0, 10.5, 0.0], [2.0, 4.0, 28.0]]
    assert scores.total_B.tolist() == [11.5, 34.0]
    assert scores.parts["steps"].tolist() == [0.75, 7.0]


def test_dense_rewards_may_not_contradict_their_total():
    def steps(rollout, texts):
        return Scores(torch.tensor([5.0]), tokens_BR=torch.tensor([[1.0, 1.0]]))

    with pytest.raises(UserError, match=r"reward\[0\] \(steps\): total_B is not the sum of tokens_BR"):
        build_reward([steps])(*made(["ab"]))


def test_the_penalty_hits_unfinished_rows_only():
    ended_B = torch.tensor([True, False, True])
    assert missing_stop_penalty(ended_B, 1.5).tolist() == [0.0, -1.5, 0.0]


def test_no_rows_no_calls():
    def never(completions, **columns):
        raise AssertionError

    scores = build_reward([never])(*made([]))
    assert scores.total_B.shape == (0,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(total_B=[1.0]), "Scores.total_B: expected a tensor of shape"),
        (dict(total_B=torch.zeros(2, 2)), "Scores.total_B"),
        (
            dict(total_B=torch.zeros(2), parts={"a": torch.zeros(3)}),
            r"Scores.parts\['a'\]: expected a tensor of shape \(2,\), found shape \(3,\)",
        ),
        (dict(total_B=torch.zeros(2), tokens_BR=torch.zeros(3, 2)), "Scores.tokens_BR"),
    ],
)
def test_scores_say_which_field_is_wrong(values, message):
    with pytest.raises(UserError, match=message):
        Scores(**values)


def test_a_reward_that_is_infinite_or_too_short_names_part_and_row():
    def short(completions, **columns):
        return [1.0]

    def infinite(rollout, texts):
        return Scores(torch.tensor([0.0, math.inf]))

    with pytest.raises(UserError, match=r"reward\[0\] \(short\): gave 1 scores for 2 rows"):
        build_reward([short])(*made(["a", "b"]))
    with pytest.raises(UserError, match=r"reward\[0\] \(infinite\): row 11 sample 0: gave inf"):
        build_reward([infinite])(*made(["a", "b"]))
