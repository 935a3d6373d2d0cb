"""A scripted environment without processes: a test plays the other side."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.environments.types import Answer, Ending, Opening, Said

Reply = Callable[[dict[str, Any], list[Said]], Answer]
"""(the data row, the turns so far) -> what comes of the last of them."""


class ScriptedSession:
    def __init__(self, reply: Reply, opening: Callable[[dict[str, Any]], Opening]):
        self.reply, self.opening, self.said, self.row = reply, opening, list[Said](), dict[str, Any]()

    def reset(self, row: dict[str, Any]) -> Future[Opening]:
        self.row = row
        return done(self.opening(row))

    def step(self, said: Said) -> Future[Answer]:
        self.said.append(said)
        return done(self.reply(self.row, self.said))

    def end(self) -> Future[Ending]:
        return done(Ending(state={"steps": len(self.said)}))


class IdConversation:
    """Answers are texts of numbers, which are their ids; so is what an environment opens with."""

    def opening(self, prompt: object, row: dict[str, Any], opening: Opening, kind: str) -> tuple[object, list[int]]:
        text = str(prompt if opening.observation is None else opening.observation)
        return text, [int(word) for word in text.split()]

    def said(self, ids: list[int], text: str, is_chat: bool, before: list[int]) -> Said:
        return Said(" ".join(map(str, ids)))

    def answer(self, before: list[int], content: str, is_chat: bool, most: int | None, row: Any) -> Any:
        ids = [int(word) for word in content.split()]
        return SimpleNamespace(ids=ids[:most], content=content, cut=len(ids) > (most or len(ids)))


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def scripted(reply: Reply, opening: Callable[[dict[str, Any]], Opening] = lambda row: Opening(), **settings: Any) -> Any:
    """What EpisodeSampler takes as its environment."""
    pool = SimpleNamespace(kind="gym", tools=[], session=lambda seed: ScriptedSession(reply, opening), close=lambda: None)
    return SimpleNamespace(
        settings=EnvironmentSettings(factory="scripted.py:make", **settings), pool=pool, conversation=IdConversation()
    )
