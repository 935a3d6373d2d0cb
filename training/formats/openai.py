"""OpenAI's messages, as their fine-tuning takes them: a line {"messages": [...], "tools": [...]} per row. Pure."""

from __future__ import annotations

from typing import Any

from steerl.training.formats.messages import linked
from steerl.training.formats.records import Record

_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")


def line(record: Record) -> dict[str, Any]:
    """What was said before the policy's turns has weight 0 where it is the assistant's, which is all that can be learned from.
    What follows the policy's last turn is left out: a conversation that is learned from ends with the assistant."""
    prompt, said = record.said
    last = max(i for i, message in enumerate(said) if message["role"] == "assistant")
    messages = [_message(message) for message in linked([*prompt, *said[: last + 1]])]
    for message in messages[: len(prompt)]:
        if message["role"] == "assistant":
            message["weight"] = 0
    return {"messages": messages, **({"tools": record.tools} if record.tools else {})}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    found = {name: message[name] for name in _FIELDS if message.get(name) is not None}
    if message["role"] == "tool":
        found.pop("name", None)
        if not message["tool_call_id"]:  # of a call that could not be read: as a tool's message it would be refused
            return {"role": "user", "content": found.get("content", "")}
    return found if "content" in found or "tool_calls" in found else {**found, "content": ""}
