"""How episodes went: metrics, the line of what went wrong, and when a run stops."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from steerl.rollout.common.errors import UserError
from steerl.rollout.environments.outcomes import environment_metrics, look_at, trouble
from steerl.rollout.episodes import ENDS, Episode, Turn
from tests.episodes import CALCULATOR

EPISODES = [one.episode for one in CALCULATOR]


def failed(*errors: str) -> Episode:
    return Episode((Turn(0, 1, "x", calls=len(errors), errors=errors),), "policy")


def test_metrics_against_numbers_counted_by_hand():
    assert environment_metrics(EPISODES) == {
        "environment/turns": (2 + 3 + 1 + 1) / 4,
        "environment/tool_calls": (1 + 2 + 0 + 1) / 4,
        "environment/tool_errors": 1 / 4,
        "environment/cut_answers": 1.0,
        "environment/failures": 1.0,
        "environment/reward": (2.5 + 0.5 + 0.25) / 3,
        **{f"environment/ended_{end}": {"policy": 0.75, "failure": 0.25}.get(end, 0.0) for end in ENDS},
    }
    assert "environment/reward" not in environment_metrics(EPISODES[2:3])


def test_the_line_groups_what_is_alike_and_stays_short():
    alike = [failed(f"search: TimeoutError: {n} s") for n in range(9)]
    others = [
        failed("add: TypeError: got '3'", "add: TypeError: got '4'"),
        failed("x: unknown"),
        failed("y: \x1b[2J" + "z" * 999),
    ]
    lost = dataclasses.replace(failed(), failure="OSError: no port\nat all")
    line = trouble([*alike, *others, lost, failed("w: no")])
    assert line.startswith("1 of 14 episodes lost it: 1 OSError: no port at all; 14 of 14 calls failed: ")
    assert "9 search: TimeoutError: 0 s, 2 add: TypeError: got '3', 1 x: unknown, 2 others" in line
    assert len(line) < 600 and not any(ord(character) < 32 for character in line)
    assert trouble(EPISODES[:1]) == ""
    assert len(trouble([failed(*["y: " + "z" * 9999] * 50)])) < 200


def test_a_run_stops_where_all_lost_their_environment_and_goes_on_with_a_word_where_some_did(caplog):
    with caplog.at_level(logging.WARNING):
        look_at(None)
        look_at([])
        look_at(EPISODES[:1])
        assert not caplog.records
        look_at(EPISODES)
    assert [record.getMessage() for record in caplog.records] == [
        "environment: 1 of 4 episodes lost it: 1 TimeoutError: 60 s; 1 of 4 calls failed: 1 mul: ValueError: no"
    ]
    with pytest.raises(UserError, match="all 2 episodes drawn together lost it, the first by TimeoutError: 60 s; correct it"):
        look_at(EPISODES[3:] * 2)
