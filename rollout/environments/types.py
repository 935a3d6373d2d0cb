"""What goes between an episode and the process that runs the user's code, both ways.

policy's turn ── Said ──> tools or environment ── Answer ──> what it is told, earns, and whether it goes on
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Call:
    """A tool call, as it was read out of a turn."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    """Why it cannot be made (wrong JSON, no such tool): the policy is told so instead of a result."""


@dataclass(frozen=True)
class Said:
    """One turn of the policy."""

    text: str
    message: dict[str, Any] | None = None
    """As a message, where the prompt is a conversation."""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Opening:
    """What an environment says of a new episode."""

    observation: Any = None
    """Text or messages; None: the prompt as it is."""
    failure: str = ""


@dataclass(frozen=True)
class Answer:
    """What came of a turn."""

    content: list[dict[str, Any]] | str | None = None
    """Messages (tool results among them), a text, or nothing."""
    reward: float | None = None
    done: bool = False
    errors: tuple[str, ...] = ()
    """Calls that failed and were told so."""
    failure: str = ""
    """Why the environment is gone: the episode ends here."""


@dataclass(frozen=True)
class Ending:
    """What an environment leaves."""

    reward: float | None = None
    """`get_reward()`, where it has one."""
    state: dict[str, Any] = field(default_factory=dict)
    """Its public attributes that are JSON values."""
    failure: str = ""


class Session(Protocol):
    """One episode's own environment. Nothing raises: what goes wrong is said in what comes back."""

    def reset(self, row: dict[str, Any]) -> Future[Opening]:
        """Begin. `row`: the data row, its prompt among the columns."""

    def step(self, said: Said) -> Future[Answer]:
        """Give it a turn."""

    def end(self) -> Future[Ending]:
        """The episode is over; its process goes."""
