"""The rows under way in the server, and those that wait to be fetched: what the worker knows of each."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from steerl.rollout.decoding.distribution import Distribution
from steerl.rollout.decoding.stops import Stops
from steerl.rollout.decoding.weights import Space
from steerl.rollout.engines.vllm.plugin import batch
from steerl.rollout.engines.vllm.wire import Answer, Ask, Law

MOST = 1 << 16
"""Rows that are kept for a client which does not fetch them."""
MOST_GONE = 64
"""Requests that the runner has dropped, beside as many as it has, which are known here until they are looked through."""


class Rules:
    """A law ready to be applied."""

    def __init__(self, text: str):
        self.law = Law.of_text(text)
        self.distribution = Distribution(self.law.sampling, self.law)
        self.stops = Stops(self.law.sampling, self.law)
        self.space = Space()


@dataclass(eq=False)
class Row:
    """One request."""

    ask: Ask
    rules: Rules
    prompt: list[int]
    before: list[int]
    answer: Answer = field(default_factory=Answer)
    ended: bool = False
    seen: int = 0
    """Positions whose activations have been through the blocks: a preempted row's are read again, and counted once."""


class Rows:
    """By request while they are under way, by the ask's id until they are fetched."""

    def __init__(self, runner: Any):
        self.runner = runner
        self.rules: dict[str, Rules] = {}
        self.requests: dict[str, Row | None] = {}
        self.waiting: OrderedDict[str, Row] = OrderedDict()
        self.version = -1

    def of(self, request: str) -> Row | None:
        """The row of a request; None where it is not the trainer's."""
        if request not in self.requests:
            self.requests[request] = self._read(request)
        return self.requests[request]

    def rules_of(self, text: str) -> Rules:
        if text not in self.rules:
            self.rules[text] = Rules(text)
        return self.rules[text]

    def forget(self) -> None:
        """Requests that the runner has dropped."""
        self.requests = {name: row for name, row in self.requests.items() if name in self.runner.requests}

    def _read(self, request: str) -> Row | None:
        arguments, prompt = batch.arguments(self.runner, request)
        if (given := Ask.read(arguments)) is None:
            return None
        text, ask = given
        rules = self.rules_of(text)
        row = Row(ask, rules, prompt, rules.stops.before(prompt))
        row.ended = self.version < 0  # weights that are not whole draw nothing
        if rules.law.sampling.replays_mask:
            row.answer.kept = []
        row.answer.edits = [0] * len(ask.strengths)
        self.waiting[ask.id] = row
        while len(self.waiting) > MOST:
            self.waiting.popitem(last=False)
        if len(self.requests) > 2 * len(self.runner.requests) + MOST_GONE:
            self.forget()
        return row

    def take(self, ids: list[str]) -> dict[str, object]:
        """The answers of these asks, which are then forgotten; those that are not known are left out."""
        return {name: row.answer.packed() for name in ids if (row := self.waiting.pop(name, None)) is not None}
