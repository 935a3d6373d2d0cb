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
    """One row's turns.

    A conversation of two turns, as its row of a Rollout has it. The policy guesses a number; after its first turn it is told
    "higher", and the chat template puts the rest around that word. Every token before an answer stays as it was.

        prompt          user:  guess  </s>   assistant:
        prompt_ids      [4,    8,     2,     5]
        place           [0,    1,     2,     3,      4,     5,          6,     7]
        response        5      </s>   user:  higher  </s>   assistant:  7      </s>
        response_ids    [9,    2,     4,     11,     2,     5,          10,    2]
        action_mask     [1,    1,     0,     0,      0,     0,          1,     1]
        logprobs        [-1.2, -0.1,  0,     0,      0,     0,          -0.8,  -0.2]
        turns           [(0, 2), (6, 8)]

    The policy drew places 0, 1, 6 and 7, the last of each turn its stop token; places 2 to 5 are fed. A log-prob stands at the
    token that it is of, given all before it, what was fed too; it is 0 where nothing was drawn. The seventh draw is keyed by
    place 6. A turn's reward is put on its last action (places 1 and 7), and what is earned later goes from action to action:
    from place 6 to place 1, as if what was fed were not there.
    """

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
