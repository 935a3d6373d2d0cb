"""verifiers' traces: what was said as a chain of nodes, each with the tokens that it adds. Pure.

node     user              assistant          tool          assistant
tokens   the prompt's      drawn              fed           drawn
mask     False             True               False         True          log-probs, advantages: of the drawn ones alone
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from steerl.rollout.prompts.chat import text_of
from steerl.training.formats.messages import linked, reasoning, role
from steerl.training.formats.records import Record, Source

VERSION = "0.4.0"
"""The one whose schema this is."""
STREAMS = {
    "logprobs": "behaviour_logprobs",
    "trainer_logprobs": "policy_logprobs",
    "reference_logprobs": "reference_logprobs",
    "advantages": "advantages",
    "entropies": "entropy",
}
"""Field of a node -> number of ours per token."""
_STOPS = {"policy": "agent_completed", "environment": "agent_completed", "length": "max_output_tokens", "turns": "max_turns"}
_STOPS |= {"tokens": "max_total_tokens", "failure": "env_error", "eos": "agent_completed", "stop": "agent_completed"}


def episode(source: Source, record: Record) -> dict[str, Any]:
    """What holds a trace in the files that the tool itself writes (traces.jsonl)."""
    one = trace(source, record)
    of_group = {"id": f"{record.facts['step']}-{record.row}" if source.kind == "run" else str(record.row)}
    env = {"id": source.data or source.kind}
    return {"id": one["id"], "env": env, "task": one["task"], "group": of_group, "ok": one["ok"], "traces": [one]}


def trace(source: Source, record: Record) -> dict[str, Any]:
    prompt, _ = record.said
    nodes = list(_nodes(record))
    drawn = [at for at, node in enumerate(nodes) if node["sampled"]]
    failure = "" if record.episode is None else record.episode.failure
    ended = record.facts.get("stop_reason") if record.episode is None else record.episode.ended_by
    info = {**record.about, "prompt_text": record.prompt_text, "completion": record.completion, "producer": "steerl"}
    if record.episode is not None:
        info["tool_errors"] = [list(turn.errors) for turn in record.episode.turns]
        info["turn_rewards"] = [turn.reward for turn in record.episode.turns]
    asked: Any = record.prompt if isinstance(record.prompt, str) else [_message(message) for message in linked(prompt)]
    return {
        "version": 1,
        "id": f"{source.key}-{record.id}",
        "verifiers": {"version": VERSION},
        "task": {"type": "steerl", "data": {"idx": record.row, "prompt": asked}, "key": str(record.row)},
        "agent": {"config": {"model": source.model or None}, "name": "policy"},
        "tools": [_tool(tool) for tool in record.tools],
        "nodes": nodes,
        "calls": [_call(source, record, nodes, at, at == drawn[-1]) for at in drawn],
        "rewards": {} if record.reward is None else {"reward": {"score": record.reward, "weight": 1.0}},
        "metrics": record.parts,
        "info": info,
        "is_completed": True,
        "ok": not failure,
        "stop_condition": _STOPS.get(str(ended), "agent_completed"),
        "errors": [{"type": "EnvError", "message": failure}] if failure else [],
        "timing": {"start": 0.0},
    }


def _nodes(record: Record) -> Iterator[dict[str, Any]]:
    prompt, said = record.said
    messages = linked([*prompt, *said])
    ids, mask = [*record.prompt_ids, *record.ids], [False] * len(record.prompt_ids) + record.action_mask
    start, ends = 0, _ends(record, len(prompt), len(messages))
    streams = {name: record.drawn(ours) for name, ours in STREAMS.items()}
    seen = 0
    for at, (message, end) in enumerate(zip(messages, ends, strict=True)):
        own = mask[start:end]
        count = sum(own)
        node: dict[str, Any] = {
            "parent": at - 1 if at else None,
            "message": _message(message),
            "sampled": at >= len(prompt) and message["role"] == "assistant",
            "timestamp": 0.0,
            "token_ids": ids[start:end],
            "mask": own,
            "logprobs": [],
        }
        if node["sampled"]:
            node |= {name: values[seen : seen + count] for name, values in streams.items() if values is not None}
        start, seen = end, seen + count
        yield node


def _ends(record: Record, prompt: int, messages: int) -> list[int]:
    """Up to which token, of prompt and response, each message goes: the prompt's are all its last message's, what was fed after
    a turn the last one's of those that the policy was told."""
    before, whole = len(record.prompt_ids), len(record.prompt_ids) + len(record.ids)
    ends = [0] * (prompt - 1) + [before] * bool(prompt)
    turns = () if record.episode is None else record.episode.turns
    for turn, after in zip(turns, [*turns[1:], None], strict=True) if turns else ():
        told = len(turn.answer) if isinstance(turn.answer, list) else bool(turn.answer)
        until = whole if after is None else before + after.first
        ends += [before + turn.end] * told + [until] if told else [until if after is None else before + turn.end]
    return ends if turns else [*ends, *[whole] * (messages - prompt)]


def _call(source: Source, record: Record, nodes: list[dict[str, Any]], at: int, last: bool) -> dict[str, Any]:
    drawn = sum(nodes[at]["mask"])
    fed = sum(len(node["token_ids"]) for node in nodes[: at + 1]) - drawn
    cut = last and record.facts.get("stop_reason") == "length"
    return {
        "node": at,
        "model": source.model or None,
        "sampling": {"temperature": record.facts.get("temperature")},
        "finish_reason": "length" if cut else "tool_calls" if nodes[at]["message"].get("tool_calls") else "stop",
        "usage": {"prompt_tokens": fed, "completion_tokens": drawn},
    }


def _message(message: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"role": role(message), "content": text_of(message.get("content"))}
    if found["role"] == "tool":
        found |= {"tool_call_id": message.get("tool_call_id", ""), "name": message.get("name")}
    if found["role"] == "assistant":
        found["reasoning_content"] = reasoning(message) or None
        calls = [{"id": call["id"], **call["function"]} for call in message.get("tool_calls") or []]
        found["tool_calls"] = calls or None
    return found


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    named = {"name": str(function.get("name", "")), "description": str(function.get("description") or "")}
    return {**named, "parameters": function.get("parameters") or {}}
