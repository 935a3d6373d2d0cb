"""Running: one episode under way, from its first prompt to its last turn.

open ──> reset ──> begin: prompt, room ──> ask ──> take: a turn, what it said ──> step ──> answered: what it is told ──.
                                            ^                                                                           │
                                            '─────────────────── the row, ids as they were drawn and fed <─────────────┘
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from steerl.rollout.applied import Applied
from steerl.rollout.common.errors import DataError, UserError
from steerl.rollout.decoding.stops import Stops
from steerl.rollout.environments.environment import Environment
from steerl.rollout.environments.types import Answer, Ending, Opening, Session
from steerl.rollout.episodes import Episode, Turn
from steerl.rollout.prompts.chat import is_conversation
from steerl.rollout.types import STOP_LENGTH, STOP_USER


@dataclass(frozen=True)
class Drawn:
    """A turn as an engine drew it, a number of each kind for every token."""

    ids: list[int]
    behaviour: list[float]
    policy: list[float]
    entropy: list[float]
    kept: list[list[int]] | None
    stop: int


@dataclass(eq=False)
class Running:
    """What is known of one row. The driver calls open, begin, then take and answered in turn, until `ended_by` says why not."""

    environment: Environment
    stops: Stops
    row: int
    sample: int
    prompt: Any
    data: dict[str, Any]
    """The data row."""
    max_new_tokens: int
    seed: int
    """Of the numbers that the user's code draws."""
    prompt_ids: list[int] = field(default_factory=list)
    room: int = 0
    """Most tokens of the response."""
    applied: Applied | None = None
    ids: list[int] = field(default_factory=list)
    actions: list[bool] = field(default_factory=list)
    behaviour: list[float] = field(default_factory=list)
    policy: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    stop: int = STOP_LENGTH
    ended_by: str = ""
    failure: str = ""
    session: Session | None = None
    reset: Future[Opening] | None = None
    pending: Future[Answer] | None = None
    """What the environment is at."""
    ending: Future[Ending] | None = None

    @property
    def name(self) -> str:
        return f"row {self.row} sample {self.sample}"

    @property
    def is_chat(self) -> bool:
        return is_conversation(self.prompt)

    @property
    def context(self) -> list[int]:
        return self.prompt_ids + self.ids

    @property
    def limit(self) -> int:
        """Most tokens of the next turn."""
        return min(self.max_new_tokens, self.room - len(self.ids))

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Its turns, as places in the context."""
        return [(len(self.prompt_ids) + turn.first, len(self.prompt_ids) + turn.end) for turn in self.turns]

    def open(self) -> None:
        self.session = self.environment.pool.session(self.seed)
        self.reset = self.session.reset(self.data)

    def begin(self) -> None:
        """The first prompt, as the environment gives it. An environment that is gone already leaves the data's."""
        assert self.reset is not None
        opening, environment = self.reset.result(), self.environment
        self.failure = opening.failure
        if opening.observation is not None:
            try:
                self.prompt, self.prompt_ids = environment.conversation.opening(
                    self.prompt, self.data, opening, environment.pool.kind
                )
                return
            except DataError as error:  # what it gave is no prompt
                self.failure = str(error)
        kind = "gym" if self.failure else environment.pool.kind
        self.prompt, self.prompt_ids = environment.conversation.opening(self.prompt, self.data, Opening(), kind)

    def take(self, drawn: Drawn) -> None:
        """A turn was drawn: hand it to the environment, where there is anything to do."""
        first, context = len(self.ids), self.context
        self._put(drawn, True)
        self.stop = drawn.stop
        text = self.stops.text(drawn.ids, context)
        said = self.environment.conversation.said(drawn.ids, text, self.is_chat, context)
        self.turns.append(Turn(first, len(self.ids), text, said.message, calls=len(said.calls)))
        if self.failure:
            self._end("failure")
        elif self.environment.pool.kind == "gym" or said.calls:
            assert self.session is not None
            self.pending = self.session.step(said)
        else:  # nothing is asked for: that was its answer
            self._end("policy" if self.stop != STOP_LENGTH else "length")

    def answered(self) -> None:
        """The environment has answered: the row goes on, or has ended."""
        assert self.pending is not None
        answer, self.pending = self.pending.result(), None
        content = answer.content
        if isinstance(content, list) and not self.is_chat and not answer.failure:
            told = "the environment gave messages, but the episode's prompt is a text; give a text"
            answer = dataclasses.replace(answer, content=None, failure=told)
        elif isinstance(content, str) and self.is_chat:
            content = [{"role": "user", "content": content}] if content else None
        self._note(reward=answer.reward, errors=answer.errors)
        if answer.failure:
            self.failure = answer.failure
            self._end("failure")
        elif answer.done:
            self._end("environment")
        elif len(self.turns) >= self.environment.settings.max_turns:
            self._end("turns")
        else:
            self._tell(content)

    def _tell(self, content: list[dict[str, Any]] | str | None) -> None:
        if content:
            most = self.environment.settings.max_tool_tokens
            try:
                fed = self.environment.conversation.answer(self.context, content, self.is_chat, most, self.data)
            except DataError as error:  # messages that the template does not take
                self.failure = str(error)
                return self._end("failure")
            if len(self.ids) + len(fed.ids) < self.room:
                nothing = [0.0] * len(fed.ids)
                self._put(Drawn(fed.ids, nothing, nothing, nothing, None, STOP_LENGTH), False)
                self._note(answer=fed.content, cut=fed.cut)
                return
        if content or self.limit < 1:
            self._end("tokens")

    def _put(self, part: Drawn, drawn: bool) -> None:
        """At the end of the row; of what was fed all numbers are 0."""
        self.ids += part.ids
        self.actions += [drawn] * len(part.ids)
        self.behaviour += part.behaviour
        self.policy += part.policy
        self.entropy += part.entropy
        self.kept += part.kept or [[]] * len(part.ids)

    def _note(self, **changes: Any) -> None:
        self.turns[-1] = dataclasses.replace(self.turns[-1], **changes)

    def give_up(self) -> None:
        """Nobody asks for the rest of it."""
        if self.session is not None and self.ending is None:
            self.ending = self.session.end()

    def _end(self, by: str) -> None:
        assert self.session is not None
        self.ended_by, self.ending = by, self.session.end()
        if by == "environment" and self.stop == STOP_LENGTH:
            self.stop = STOP_USER
        elif by in ("turns", "tokens"):
            self.stop = STOP_LENGTH

    def episode(self) -> Episode:
        """The whole of it. A reward that the environment could not give is none."""
        assert self.ending is not None
        ending = self.ending.result()
        return Episode(tuple(self.turns), self.ended_by, ending.reward, self.failure or ending.failure, ending.state)

    def text(self) -> str:
        """All that follows the prompt."""
        last = self.turns[-1]
        before = self.stops.speller.tail(self.prompt_ids)
        return self.stops.speller.after(before, self.ids[: last.first]) + last.text

    def fit(self, room: int | None) -> None:
        """How much may follow the prompt."""
        settings = self.environment.settings
        bounds = [bound for bound in (settings.max_tokens or None, room) if bound is not None]
        self.room = min(bounds, default=settings.longest(self.max_new_tokens))
        if self.room < 1:
            raise UserError(
                f"environment: the prompt of {self.name} has {len(self.prompt_ids)} tokens as the environment opens it, which "
                "leaves no room for a turn in the model's context; give shorter ones"
            )
