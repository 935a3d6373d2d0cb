"""Conversation: an episode's first prompt, what a turn says, and the ids of what the policy is told then.

prompt, observation ── opening ──> ids ── turn ── said ──> message, calls ──> tools, environment
                                    ^                                                 │
                                    └── ids + turn + fed <── answer <── messages, text ┘

The ids before an answer stay as they were sampled: the chat template is applied to the new messages only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from steerl.rollout.common.errors import ConfigError, DataError
from steerl.rollout.environments.conversation.calls import read_turn
from steerl.rollout.environments.conversation.check import check_template
from steerl.rollout.environments.conversation.template import ChatTemplate, clean
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.environments.types import Opening, Said
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.chat import conversation_ids, is_conversation, text_ids, text_of


@dataclass(frozen=True)
class Fed:
    """What is put after a turn."""

    ids: list[int]
    content: list[dict[str, Any]] | str
    """As the policy was told it, after cutting."""
    cut: bool = False


class Conversation:
    """Prompts, turns and answers for one policy and its environment."""

    def __init__(self, policy: Policy, tools: Sequence[dict[str, Any]], settings: EnvironmentSettings):
        self.policy, self.tools, self.settings = policy, list(tools), settings
        self.field = "environment.tools" if settings.tools else "environment.factory"
        self.tried = False
        """Whether the chat template was tried."""

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.policy, self.tools)

    def opening(
        self, prompt: object, row: Mapping[str, Any], opening: Opening, kind: str
    ) -> tuple[str | list[dict[str, Any]], list[int]]:
        """The prompt that begins an episode, and its ids. tools: as read. trl: what `reset` gave is put at the end of its last
        message. gym: what `reset` gave is the prompt, and as read where it gave nothing."""
        told = opening.observation if kind != "tools" else None
        told = clean(told) if isinstance(told, str) else told
        value: Any = prompt if told is None else told if kind == "gym" else _extended(prompt, told)
        where = f"{self.field}: the prompt that reset gave" if told is not None else "prompts"
        if isinstance(value, list):
            self._check_chat(where)
            tools, extra = self.template.all_tools(row), row.get("chat_template_kwargs")
            ids = conversation_ids(self.policy.tokenizer, value, tools, extra, where=where)
            if kind == "gym" and not self.tried:  # the data has texts, and the environment makes conversations of them
                self.check(value, row)
            return value, ids
        self._check_text(kind)
        if not isinstance(value, str) or not value:
            raise DataError(f"{where} is {value!r:.60}; expected a text or a list of messages")
        return value, text_ids(self.policy, value)

    def said(self, turn_ids: Sequence[int], text: str, is_chat: bool, before: Sequence[int] = ()) -> Said:
        """What a turn says; `text` is that of its ids without special tokens. `before`: the ids that it follows."""
        if not is_chat:
            return Said(text)
        message, calls = read_turn(self.template.speller, self.tools, turn_ids, text, before)
        return Said(text, message, calls)

    def answer(
        self,
        before: Sequence[int],
        content: list[dict[str, Any]] | str,
        is_chat: bool,
        most: int | None,
        row: Mapping[str, Any] | None = None,
    ) -> Fed:
        """The ids of what the policy is told after its turn, the last of `before`; each message's content has `most` tokens.

        Of a conversation: all that the template puts there, the end of the turn (but for what of it was drawn) and the
        beginning of the next one. Of a text: the tokenizer's ids of it alone."""
        if not is_chat:
            if not isinstance(content, str):
                raise DataError(f"{self.field}: the environment gave messages, but the prompts are texts; give texts")
            text, cut = self._fit(clean(content), most)
            return Fed(self.template.ids(self.template.shield(text), inside=False), text, cut)
        given = [{"role": "user", "content": content}] if isinstance(content, str) else content
        fitted = [self._fit(as_text(message.get("content")), most) for message in given]
        told = [{**message, "content": text} for message, (text, _) in zip(given, fitted, strict=True)]
        shielded = [
            {name: value if name == "role" else self.template.shield(value) for name, value in message.items()}
            for message in told
        ]
        after = self.template.after_turn(shielded, row or {})
        ids, begins = self.template.ids(after), after.find(shielded[0]["content"].strip()) if shielded else 0
        own = len(self.template.ids(after[:begins])) if begins > 0 else len(ids)  # the template's, before the first content
        drawn = next((n for n in range(min(own, len(before)), 0, -1) if list(before[-n:]) == ids[:n]), 0)
        return Fed(ids[drawn:], told, any(cut for _, cut in fitted))

    def check(self, prompt: object, row: Mapping[str, Any]) -> None:
        """Refuse, in a line, prompts and chat templates that episodes cannot be made of."""
        if not is_conversation(prompt):
            return self._check_text("tools" if self.tools else "gym")
        assert isinstance(prompt, list)
        self._check_chat(self.field)
        self.tried = True
        check_template(self.template, prompt, row, self.field, self.settings.earlier_turns == "same")

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _check_chat(self, where: str) -> None:
        if not getattr(self.policy.tokenizer, "chat_template", None):
            raise ConfigError(f"{where}: a conversation, but the tokenizer has no chat template; give texts, or add one to it")

    def _check_text(self, kind: str) -> None:
        if kind != "gym":
            raise ConfigError(f"{self.field}: tools need conversations and a chat template; give prompts as messages")

    def _fit(self, text: str, most: int | None) -> tuple[str, bool]:
        """A text of at most so many tokens, and whether it was cut."""
        if most is None or len(text) <= most // 4 or (total := self._count(text)) <= most:
            return text, False

        def cut(n: int) -> str:
            return f"{text[:n]}... [cut after {self._count(text[:n]):,} of {total:,} tokens]"

        fits = cut if self._count(cut(0)) <= most else lambda n: text[:n]  # no room for a mark
        low, high = 0, min(len(text), 8 * most)
        while high < len(text) and self._count(fits(high)) <= most:
            low, high = high, min(len(text), 2 * high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._count(fits(middle)) <= most else (low, middle)
        return fits(low), True

    def _count(self, text: str) -> int:
        return len(self.template.ids(self.template.shield(text), inside=False))


def _extended(prompt: object, told: object) -> list[dict[str, Any]] | object:
    """A conversation whose last message goes on with what an environment gave: a text or a list of parts."""
    if not is_conversation(prompt):
        return prompt
    assert isinstance(prompt, list)
    if not isinstance(told, str | list):
        raise DataError(f"environment.factory: reset gave {told!r:.60}; expected a text, a list of parts or None")
    content: Any = prompt[-1].get("content") or ""
    if isinstance(content, str) and isinstance(told, str):
        return [*prompt[:-1], {**prompt[-1], "content": content + told}]
    parts = [[{"type": "text", "text": given}] if isinstance(given, str) else given for given in (content, told)]
    return [*prompt[:-1], {**prompt[-1], "content": [*parts[0], *parts[1]]}]


def as_text(content: object) -> str:
    """A message's content: a text as it is, parts as theirs, all else as JSON."""
    if content is None or isinstance(content, str):
        return clean(content or "")
    if (
        isinstance(content, list)
        and content
        and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content)
    ):
        return clean(text_of(content))
    try:
        return clean(json.dumps(content, ensure_ascii=False, default=str))
    except (ValueError, TypeError, RecursionError):  # keys that are no texts, or itself within itself
        return clean(str(content))
