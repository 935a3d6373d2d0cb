"""What the environment gave, on the right actions; what rewards see of an episode."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from steerl.reward.build import build_reward
from steerl.rollout.common.errors import UserError
from steerl.rollout.episodes import ENDS
from steerl.rollout.types import Samples
from tests.episodes import CALCULATOR, samples_of, talk
from tests.reward.rows import made

PART = {"kind": "environment"}


def placed(samples: Samples, row: int, rewards: dict[str, float]) -> list[float]:
    """A row of zeros with each number where its text ends in the row, by search in the text itself."""
    text = samples.texts.completions[row]
    values = [0.0] * samples.rollout.response_width
    for said, number in rewards.items():
        values[text.index(said) + len(said) - 1] = number
    return values


def test_each_turn_earns_on_its_last_action():
    samples = samples_of(CALCULATOR[:2])
    scores = build_reward([{**PART, "weight": 2.0}])(*samples)
    assert scores.parts["environment"].tolist() == [2.5, 0.5]
    assert scores.tokens_BR is not None and scores.tokens_BR.tolist() == [
        placed(samples, 0, {"<add 2 3>": 1.0, "it is 5": 4.0}),
        placed(samples, 1, {"<mul 4 5>": -1.0, "20": 2.0}),
    ]


def test_turns_with_nothing_between_them_stay_two():
    samples = samples_of([talk("go", ("left", ""), ("right", ""), rewards=[1.0, 2.0], chat=False)])
    assert samples.rollout.turns == [[(0, 9)]]
    assert build_reward([PART])(*samples).tokens_BR.tolist() == [placed(samples, 0, {"left": 1.0, "right": 2.0})]


def test_what_was_given_nothing_is_not_judged_and_what_was_cut_keeps_what_it_was_given():
    zero = {"kind": "regex", "pattern": "zzz"}
    scores = build_reward([PART, zero])(*samples_of(CALCULATOR))
    assert scores.parts["environment"][:2].tolist() == [2.5, 0.5]
    assert scores.parts["environment"][2].isnan() and scores.parts["environment"][3] == 0.25
    lost = [talk("x", ("y", ""), ended_by=end, failure="gone" * (end == "failure")) for end in ENDS[2:]]
    assert len(lost) == 4 and build_reward([PART])(*samples_of(lost)).total_B.tolist() == [0.0] * 4
    done = talk("x", ("y", ""), ended_by="environment")
    with pytest.raises(UserError, match="no part applies to 1 of 1 rows"):
        build_reward([PART])(*samples_of([done]))
    scores = build_reward([{**PART, "fallback": -1.0}, zero])(*samples_of(CALCULATOR))
    assert scores.parts["environment"][3] == -1.0 and scores.fallbacks == {"environment": 1}
    assert scores.tokens_BR[3].tolist() == placed(samples_of(CALCULATOR), 3, {"<add 1": -1.0})


def test_an_environment_that_never_began_leaves_a_row_without_an_action():
    lost = talk("x", ended_by="failure", failure="OSError: no port")
    samples = samples_of([lost, CALCULATOR[0]])
    assert build_reward([PART])(*samples).total_B.tolist() == [0.0, 2.5]


def test_rows_without_an_environment_and_numbers_that_are_none():
    with pytest.raises(UserError, match=r"reward\[0\] \(environment\): no environment took part in these rows"):
        build_reward([PART])(*made(["a"]))
    odd = samples_of([talk("x", ("y", ""), rewards=[float("nan")])])
    with pytest.raises(UserError, match=r"reward\[0\] \(environment\): row 10 sample 0: gave nan"):
        build_reward([PART])(*odd)
    assert build_reward([{**PART, "fallback": 0.5}])(*odd).total_B.tolist() == [0.5]


def test_any_cut_of_the_rows_gives_the_same_numbers():
    samples = samples_of(CALCULATOR[:2] + CALCULATOR[3:])
    whole = build_reward([PART])(*samples)
    for row in range(3):
        one = build_reward([PART])(*samples.select([row]))
        assert torch.equal(one.tokens_BR[0], whole.tokens_BR[row]) and one.total_B[0] == whole.total_B[row]


def paid(completions, environments, episodes, turns, calls=None, **columns):
    """As for TRL: messages, and the environments' attributes."""
    from steerl.reward import TurnRewards

    assert calls is None and [len(row) for row in turns] == [len(episode.turns) for episode in episodes]
    assert all(message["role"] in ("assistant", "tool") for messages in completions for message in messages)
    return TurnRewards([[environment.calls / 10] * len(row) for environment, row in zip(environments, turns, strict=True)])


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_functions_see_turns_as_messages_and_environments_as_they_were_left(timeout):
    """In this process, and pickled into another one."""
    samples = samples_of(CALCULATOR[:3])
    named = {"kind": "function", "function": f"{__file__}:paid", "timeout": timeout}
    reward = build_reward([named])
    try:
        scores = reward(*samples)
    finally:
        reward.close()
    ends = [["<add 2 3>", "it is 5"], ["<add 4 5>", "<mul 4 5>", "20"], ["one"]]
    calls = [1, 2, 0]
    expected = [placed(samples, row, dict.fromkeys(ends[row], calls[row] / 10)) for row in range(3)]
    assert torch.allclose(scores.tokens_BR, torch.tensor(expected))


def test_completions_are_messages_where_prompts_are_conversations():
    seen = []

    def look(completions, **others):
        seen.append((completions, set(others)))
        return [0.0] * len(completions)

    build_reward([look])(*samples_of(CALCULATOR[:1]))
    build_reward([look])(*samples_of([talk("go", ("left", " you are here"), (" right", ""), chat=False)]))
    build_reward([look])(*made(["a"], prompts=[[{"role": "user", "content": "hi"}]]))
    (chat, named), (text, _), (plain, unnamed) = seen
    call = {"type": "function", "function": {"name": "add", "arguments": {"of": ["2", "3"]}}}
    assert chat == [
        [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "5"},
            {"role": "assistant", "content": "it is 5"},
        ]
    ]
    assert text == ["left you are here right"] and plain == [[{"role": "assistant", "content": "a"}]]
    assert {"environments", "episodes"} <= named and not {"environments", "episodes"} & unnamed


def test_turns_of_nobody_are_no_numbers():
    samples = samples_of(CALCULATOR[:1])
    other = dataclasses.replace(samples.texts, episodes=None)
    for texts in (samples.texts, other):
        with pytest.raises(UserError, match="gave 3 numbers for 2 turns"):
            from steerl.reward import TurnRewards

            build_reward([lambda completions, **_: TurnRewards([[1.0, 2.0, 3.0]])])(samples.rollout, texts)
