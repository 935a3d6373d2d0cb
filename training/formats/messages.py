"""Messages as other projects' formats have them: JSON values that UTF-8 can hold, tool calls with ids, their results linked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from steerl.rollout.prompts.chat import text_of

REASONING = ("reasoning_content", "reasoning", "thinking")
"""What templates call it in a message."""


def plain(value: Any) -> Any:
    """Without halves of surrogate pairs, infinities and NaN: what strict readers of JSON, and Arrow, take."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {plain(str(name)): plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def linked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """With the fields that OpenAI's messages have: each call has an id and its arguments as JSON text, each tool's message the
    id of the call that it answers, "" where it answers none (a call that could not be read)."""
    found: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []
    count = 0
    for given in messages:
        message = dict(given)
        if calls := message.pop("tool_calls", None):
            message["tool_calls"] = []
            for call in calls:
                function = call.get("function", call)
                said = function.get("arguments")
                arguments = said if isinstance(said, str) else json.dumps({} if said is None else said, ensure_ascii=False)
                count += 1
                call_id = str(call.get("id") or f"call_{count}")
                named = {"name": str(function.get("name", "")), "arguments": arguments}
                message["tool_calls"].append({"id": call_id, "type": "function", "function": named})
                open_calls.append((call_id, named["name"]))
        elif message.get("role") == "tool":
            name, own = message.get("name"), message.get("tool_call_id")
            answers = [call for call in open_calls if own in (None, call[0]) and name in (None, call[1])][:1]
            message["tool_call_id"] = str(own or (answers[0][0] if answers else ""))
            open_calls = [call for call in open_calls if call[0] != message["tool_call_id"]]
        found.append(message)
    return found


def reasoning(message: Mapping[str, Any]) -> str:
    return next((text_of(message[name]) for name in REASONING if message.get(name)), "")


def role(message: Mapping[str, Any]) -> str:
    """One of the four that every format knows."""
    name = str(message.get("role"))
    return {"developer": "system", "function": "tool"}.get(name, name if name in ("system", "assistant", "tool") else "user")
