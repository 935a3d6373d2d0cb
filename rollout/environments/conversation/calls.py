"""A turn's ids -> its message and the tool calls in it.

By the tokenizer's `response_template` where it has one; else calls are JSON in <tool_call> tags, and what stands around them
stays the content. A call that cannot be read or made is a Call with a problem, which the policy is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from steerl.rollout.environments.types import Call
from steerl.rollout.prompts.chat import Speller

TAGS = ("<tool_call>", "</tool_call>")
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
"""The last one may be open: a stop string ended the turn there, or its limit did."""


def names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(tool.get("function", tool)["name"]) for tool in tools]


def call_of(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call as templates take it in a message."""
    return {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def read_turn(
    speller: Speller, tools: Sequence[Mapping[str, Any]], ids: Sequence[int], text: str, before: Sequence[int] = ()
) -> tuple[dict[str, Any], tuple[Call, ...]]:
    """The message that `ids` are after `before`, and its calls. `text`: what they say without special tokens.

    Without tools nothing is a call."""
    if getattr(speller.tokenizer, "response_template", None):
        return _by_template(speller, tools, ids, text, before)
    if not tools:
        return {"role": "assistant", "content": text}, ()
    special = {i for i in speller.tokenizer.convert_tokens_to_ids(list(TAGS)) if i in speller.silent}
    if special:  # they are no part of the text
        text = speller.after(before, [i for i in ids if i in special or i not in speller.silent], skip=False)
    calls, written, around, at = [], [], [], 0
    for found in _CALL.finditer(text):
        call = _of_json(found[1], tools)
        calls.append(call)
        if call.name:
            written.append(call)
            around.append(text[at : found.start()])
            at = found.end()
    if not written:
        return {"role": "assistant", "content": text}, tuple(calls)
    around = [piece for piece in map(str.strip, [*around, text[at:]]) if piece]
    asked = [call_of(call.name, call.arguments) for call in written]
    return {"role": "assistant", "content": "\n".join(around), "tool_calls": asked}, tuple(calls)


def _of_json(text: str, tools: Sequence[Mapping[str, Any]]) -> Call:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Call("", problem=f"the call is not JSON: {error}")
    return _checked(given, tools)


def _checked(given: object, tools: Sequence[Mapping[str, Any]]) -> Call:
    """A call as {name, arguments}, looked up among the tools."""
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str) or not given["name"]:
        return Call("", problem='the call has no name; write {"name": ..., "arguments": {...}}')
    name, arguments = given["name"], given.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # told below, as what it is
            arguments = json.loads(arguments)
    try:
        json.dumps([name, arguments], ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        return Call("", problem=f"the call cannot be written as JSON: {error}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        return Call(name, problem=f"the arguments of {name} are no mapping of names to values")
    known = names(tools)
    return Call(name, arguments, "" if name in known else f"no tool named {name!r}; there are: {', '.join(known)}")


def _by_template(
    speller: Speller, tools: Sequence[Mapping[str, Any]], ids: Sequence[int], text: str, before: Sequence[int]
) -> tuple[dict[str, Any], tuple[Call, ...]]:
    tokenizer = speller.tokenizer
    try:
        parsed = dict(tokenizer.parse_response(list(ids), prefix=list(before), tools=list(tools) or None))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        told = " ".join(str(error).split())
        problem = Call("", problem=f"the call could not be read: {told:.200}")
        return {"role": "assistant", "content": text}, (problem,) if tools else ()
    content = parsed.get("content") or ""
    if ids and ids[-1] in speller.silent:  # an end of turn that the template does not know as one
        content = content.removesuffix(tokenizer.convert_ids_to_tokens(int(ids[-1])))
    if stop := speller.after(before, ids)[len(text) :]:  # the stop string that ended it, which the text ends before
        content = content.removesuffix(stop)
    message = {**parsed, "role": "assistant", "content": content}
    asked = message.pop("tool_calls", None) or []
    calls = tuple(_checked(call.get("function", call), tools) for call in asked)
    if written := [call for call in calls if call.name]:
        message["tool_calls"] = [call_of(call.name, call.arguments) for call in written]
    return message, calls if tools else ()
