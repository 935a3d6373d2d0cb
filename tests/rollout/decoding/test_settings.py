"""Settings are checked when built."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling

BAD: dict[str, list[Any]] = {
    "max_new_tokens": [0, -3],
    "temperature": [-0.5, float("nan"), float("inf"), 0.0],
    "top_k": [-1],
    "top_p": [0.0, -0.1, 1.5],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0.0, -1.0],
    "no_repeat_ngram_size": [-1],
    "bad_words": [[""]],
    "bad_words_ids": [[[]]],
    "stop": [[""]],
    "stop_ids": [[-1]],
    "n": [0],
    "batch_size": [0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_setting_is_one_line_that_names_it_its_value_and_a_remedy(name: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        Sampling(**{name: value})
    assert len(caught.value.lines) == 1 and caught.value.lines[0].startswith(f"sampling.{name}: ")
    assert str(value) in caught.value.lines[0] or value == 0.0


def test_problems_are_gathered_and_temperature_zero_names_greedy() -> None:
    with pytest.raises(UserError) as caught:
        Sampling(top_p=0.0, top_k=-1, temperature=0.0)
    assert len(caught.value.lines) == 3
    assert any("greedy" in line for line in caught.value.lines)


def test_settings_without_effect_under_greedy_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Sampling(greedy=True, top_p=0.9)
    assert "top_p" in caplog.text


@pytest.mark.parametrize(
    ("settings", "truncates", "same"),
    [({}, False, True), ({"temperature": 2.0}, False, True), ({"top_k": 5}, True, True), ({"top_p": 0.5}, True, True),
     ({"min_p": 0.1}, True, True), ({"repetition_penalty": 1.1}, False, False), ({"greedy": True}, False, False),
     ({"top_p": 0.5, "replay_mask": False}, True, False), ({"top_k": 5, "replay_mask": True}, True, True),
     ({"top_k": 5, "bad_words_ids": [[3]]}, True, False), ({"replay_mask": False}, False, True)],
)  # fmt: skip
def test_what_a_setting_does_to_the_two_laws(settings: dict[str, Any], truncates: bool, same: bool) -> None:
    sampling = Sampling(**settings)
    assert (sampling.truncates, sampling.is_policy) == (truncates, same)
    assert sampling.replays_mask == (truncates and settings.get("replay_mask") is not False)


@pytest.mark.parametrize(
    ("settings", "why"),
    [({}, "top_k, top_p and min_p leave no token out"), ({"repetition_penalty": 1.3}, "top_k, top_p and min_p leave no token"),
     ({"greedy": True, "top_k": 5}, "greedy rows are not drawn")],
)  # fmt: skip
def test_a_mask_that_leaves_nothing_out_is_not_replayed(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=f"sampling.replay_mask: true, but {why}"):
        Sampling(**settings, replay_mask=True)
