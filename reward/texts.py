"""Texts and conversations that were not sampled here, as the rollout and texts that a reward takes.

    messages                    a conversation; its last message, the assistant's, is the completion
    prompt + completion         both texts, or both conversations (completion: [{"role": "assistant", ...}])
    text (or completion alone)  a completion without a prompt

All other columns go to rules and functions. Such rows have no ids: reward models read their text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from steerl.reward.settings import TextSettings
from steerl.rollout.common.errors import DataError
from steerl.rollout.prompts.chat import check_messages, text_of
from steerl.rollout.prompts.tables import columns_of, read_table
from steerl.rollout.types import Rollout, Texts

_COMPLETIONS = ("completion", "response", "answer", "text")


@dataclass(frozen=True)
class TextTable:
    """The rows of a dataset, read when they are asked for."""

    rows: Sequence[dict[str, object]]
    messages: str
    prompt: str
    completion: str
    field: str

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def others(self) -> list[str]:
        """The data set's columns that are neither prompt nor completion: every batch has them all."""
        return [name for name in columns_of(self.rows) if name not in (self.messages, self.prompt, self.completion)]

    def batch(self, index: range) -> tuple[Rollout, Texts]:
        """These rows; `row_B` is their place in the dataset."""
        records = [self.rows[i] for i in index]
        pairs = [self._pair(i, record) for i, record in zip(index, records, strict=True)]
        texts = Texts(
            prompts=[prompt for prompt, _ in pairs],
            prompt_texts=[prompt if isinstance(prompt, str) else _plain(prompt) for prompt, _ in pairs],
            completions=[completion for _, completion in pairs],
            columns={name: [record.get(name) for record in records] for name in self.others},
        )
        return Rollout.of_ids([[]] * len(texts), [[]] * len(texts), row_B=index), texts

    def _pair(self, index: int, record: dict[str, Any]) -> tuple[Any, str]:
        where = f"{self.field}: row {index}"
        if self.messages:
            said = _messages(record.get(self.messages), f"{where}, column {self.messages!r}")
            return said[:-1], _last(said, f"{where}, column {self.messages!r}")
        prompt, completion = record.get(self.prompt, "") if self.prompt else "", record.get(self.completion)
        if isinstance(prompt, list) and prompt:
            prompt = _messages(prompt, f"{where}, column {self.prompt!r}")
        if not isinstance(prompt, str | list):
            raise DataError(f"{where}: column {self.prompt!r} holds {type(prompt).__name__}; expected text or messages")
        if isinstance(completion, list) and completion:
            said = _messages(completion, f"{where}, column {self.completion!r}")
            before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}] if prompt else []
            return [*before, *said[:-1]], _last(said, f"{where}, column {self.completion!r}")
        if not isinstance(completion, str):
            raise DataError(f"{where}: column {self.completion!r} holds {completion!r:.40}; expected text or messages")
        return prompt, completion


def load_texts(settings: TextSettings, field: str) -> TextTable:
    """The dataset of `settings`; `field` is what messages call it."""
    rows = read_table(settings.path, settings.split, settings.name, field)
    if not len(rows):
        raise DataError(f"{field}.path: {settings.path} has no rows")
    names = columns_of(rows)
    for spot in ("messages", "prompt", "completion"):
        column = getattr(settings, spot)
        if column and column not in names:
            raise DataError(f"{field}.{spot}: {column!r} is not a column of {settings.path}; it has: {', '.join(names)}")
    if settings.messages and (settings.prompt or settings.completion):
        raise DataError(
            f"{field}.messages: holds whole conversations; {field}.prompt and {field}.completion have no effect, leave them out"
        )
    named = settings.prompt or settings.completion
    messages = settings.messages or ("messages" if "messages" in names and not named else "")
    if messages:
        prompt = completion = ""
    else:
        prompt = settings.prompt or ("prompt" if "prompt" in names else "")
        completion = settings.completion or next((n for n in _COMPLETIONS if n in names and n != prompt), "")
        if not completion:
            raise DataError(
                f"{field}.completion: none of the usual columns is there; {settings.path} has: {', '.join(names)}; name one"
            )
    kept = rows[: settings.limit] if settings.limit and isinstance(rows, list) else rows
    table = TextTable(kept, messages, prompt, completion, field)
    if settings.limit and len(table) > settings.limit:
        table = TextTable([rows[i] for i in range(settings.limit)], messages, prompt, completion, field)
    return table


def _messages(value: object, where: str) -> list[dict[str, object]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a list of messages with a role and a content, found {value!r:.60}")
    check_messages(value, where)
    return value


def _last(said: list[dict[str, object]], where: str) -> str:
    if said[-1]["role"] != "assistant" or not isinstance(said[-1].get("content"), str | list):
        raise DataError(
            f"{where}: the last message is {said[-1]!r:.60}; expected the assistant's text, which is what is scored"
        )
    return text_of(said[-1]["content"])


def _plain(said: list[dict[str, object]]) -> str:
    """A conversation as text, for a reward model without a chat template."""
    return "".join(f"{message['role']}: {text_of(message.get('content'))}\n" for message in said)
