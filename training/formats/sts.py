"""The hub's session traces (Session Trace Simple Format): a header and a line per message; a file per row. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from steerl.rollout.prompts.chat import text_of
from steerl.training.formats.messages import linked, plain, reasoning, role
from steerl.training.formats.records import Record, Source


def lines(source: Source, record: Record) -> Iterator[dict[str, Any]]:
    prompt, said = record.said
    session = {"harness": "steerl", "id": f"{source.key}-{record.id}", "name": f"{source.folder.resolve().name} {record.id}"}
    metadata = {"model": source.model, "reward": record.reward, "rewards": record.parts, **record.about}
    yield {"type": "session", **session, "metadata": plain(metadata)}
    for at, message in enumerate(linked([*prompt, *said])):
        yield {"type": "message", "message": _message(source, message, at >= len(prompt))}


def _message(source: Source, message: dict[str, Any], ours: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"role": role(message), "content": text_of(message.get("content"))}
    if thought := reasoning(message):
        found["reasoningContent"] = thought
    if calls := message.get("tool_calls"):
        found["toolCalls"] = [{"id": call["id"], "function": call["function"]} for call in calls]
    if message.get("tool_call_id"):
        found["toolCallId"] = message["tool_call_id"]
    if ours and found["role"] == "assistant" and source.model:
        found["model"] = source.model
    return found
