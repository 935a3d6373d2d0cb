"""Episode: what was said in a row of several turns, beside its ids, and what the environment made of it.

prompt ──> turn ──> answer ──> turn ──> answer ──> turn             one row of a Rollout; its turns are the runs of actions
           reward   errors     reward                               that Turn.first and Turn.end name
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ENDS = ("policy", "environment", "length", "turns", "tokens", "failure")
"""What ended an episode: the policy (its turn asked for nothing more), the environment, a last turn that was cut, the limit of
turns or of tokens, or an environment that is gone."""


@dataclass(frozen=True)
class Turn:
    """One of the policy's turns, and what it was told then."""

    first: int
    """Its actions in the response: from here,"""
    end: int
    """up to here."""
    text: str
    """Without special tokens, ending before a matched stop string."""
    message: dict[str, Any] | None = None
    """The same as a message, its tool calls taken out of the text; None where the prompt is a text."""
    answer: list[dict[str, Any]] | str = ""
    """What the policy was told then, as it was told: messages, or a text; empty where nothing follows."""
    calls: int = 0
    errors: tuple[str, ...] = ()
    """Calls that failed: wrong JSON, an unknown tool, an exception, a time-out; the policy was told."""
    cut: bool = False
    """Part of the answer was left out, for its length."""
    reward: float | None = None
    """What the environment gave for the turn."""


@dataclass(frozen=True)
class Episode:
    """One row's turns."""

    turns: tuple[Turn, ...]
    ended_by: str
    """One of ENDS."""
    reward: float | None = None
    """What the environment gave for the whole, beside its turns."""
    failure: str = ""
    """Why the environment is gone."""
    state: dict[str, Any] = field(default_factory=dict)
    """The environment's public attributes at the end, as JSON values: what reward functions get as `environments`."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All that follows the prompt, where that is a conversation."""
        said: list[dict[str, Any]] = []
        for turn in self.turns:
            said.append(turn.message or {"role": "assistant", "content": turn.text})
            said += (
                turn.answer
                if isinstance(turn.answer, list)
                else [{"role": "user", "content": turn.answer}]
                if turn.answer
                else []
            )
        return said

    @property
    def rewards(self) -> list[float] | None:
        """What each turn earned, the whole's on the last one; None where the environment gives none."""
        given = [turn.reward for turn in self.turns]
        if not given or (self.reward is None and all(reward is None for reward in given)):
            return None
        rewards = [reward or 0.0 for reward in given]
        rewards[-1] += self.reward or 0.0
        return rewards

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def of_json(given: Mapping[str, Any]) -> Episode:
        turns = tuple(Turn(**{**turn, "errors": tuple(turn["errors"])}) for turn in given["turns"])
        return Episode(**{**given, "turns": turns})
