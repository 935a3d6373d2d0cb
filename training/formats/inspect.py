"""An Inspect log (.eval): a zip of a JSON file per sample, their summaries, and a header with what the scores are."""

from __future__ import annotations

import datetime
import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import steerl
from steerl.rollout.prompts.chat import text_of
from steerl.training.formats.messages import linked, reasoning, role
from steerl.training.formats.records import Record, Source

_STOPS = {"length": "max_tokens", "eos": "stop", "stop": "stop"}
_SUMMARY = ("id", "epoch", "input", "target", "metadata", "scores", "model_usage", "uuid", "limit")
MOST = 1024
"""Characters of a text in a summary, and of a score's answer; the messages have all of it."""


def write(path: Path, source: Source, records: Iterable[Record]) -> int:
    """How many there were. Memory: that of one record, of the sums of the scores, the ids, and the zip's own index."""
    sums: dict[str, list[float]] = {}
    ids: dict[int | str, None] = {}
    count, epochs = 0, 1
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, tempfile.TemporaryFile(dir=path.parent) as summaries:
        for record in records:
            one = sample(source, record)
            file.writestr(f"samples/{one['id']}_epoch_{one['epoch']}.json", json.dumps(one))
            summaries.write(("," if count else "[").encode() + json.dumps(summary(one)).encode())
            for name, score in one["scores"].items():
                total = sums.setdefault(name, [0, 0.0, 0.0])
                total[:] = total[0] + 1, total[1] + score["value"], total[2] + score["value"] ** 2
            count, epochs = count + 1, max(epochs, one["epoch"])
            ids[one["id"]] = None
        summaries.write(b"]" if count else b"[]")
        summaries.seek(0)
        with file.open("summaries.json", "w") as out:
            shutil.copyfileobj(summaries, out)
        log = header(source, count, list(ids), epochs, sums)
        start = {name: log[name] for name in ("version", "eval", "plan")}
        file.writestr("_journal/start.json", json.dumps(start))
        file.writestr("header.json", json.dumps(log))
    return count


def sample(source: Source, record: Record) -> dict[str, Any]:
    prompt, said = record.said
    messages = [
        _message(message, f"{source.key}-{record.id}-{at}", source if at >= len(prompt) else None)
        for at, message in enumerate(linked([*prompt, *said]))
    ]
    model, events = _model(source), list(_events(source, record, messages))
    drawn = sum(record.action_mask)
    fed = len(record.prompt_ids) + len(record.ids) - drawn
    usage = {model: {"input_tokens": fed, "output_tokens": drawn, "total_tokens": fed + drawn}}
    answer = text_of(events[-1]["output"]["choices"][0]["message"]["content"])[:MOST]
    scores = {} if record.reward is None else {"reward": record.reward}
    scores |= {name if name != "reward" else "rewards/reward": value for name, value in record.parts.items()}
    failure = "" if record.episode is None else record.episode.failure
    dump = source.kind == "dump"
    return {
        "id": record.row if dump else record.id,
        "epoch": record.sample + 1 if dump else 1,
        "input": record.prompt if isinstance(record.prompt, str) else messages[: len(prompt)],
        "target": str(record.columns.get("answer") or ""),
        "messages": messages,
        "output": {**events[-1]["output"], "usage": usage[model]},
        "scores": {name: {"value": value, "answer": answer} for name, value in scores.items()},
        "metadata": record.about | ({} if record.episode is None else _of_episode(record)),
        "store": {},
        "events": events,
        "events_data": {"messages": messages, "calls": []},
        "model_usage": usage,
        "uuid": f"{source.key}-{record.id}",
        "attachments": {},
        **({"error": {"message": failure, "traceback": "", "traceback_ansi": ""}} if failure else {}),
    }


def _events(source: Source, record: Record, messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A call of the model per turn; what it was given are the messages before, by their places."""
    turns = [at for at, message in enumerate(messages) if message.get("source") == "generate"]
    for at in turns:
        stop = _STOPS.get(str(record.facts.get("stop_reason")), "unknown") if at == turns[-1] else "stop"
        stop = "tool_calls" if messages[at].get("tool_calls") and stop == "stop" else stop
        yield {
            "event": "model",
            "uuid": f"{source.key}-{record.id}-call-{at}",
            "timestamp": _when(source),
            "working_start": 0.0,
            "model": _model(source),
            "input": [],
            "input_refs": [[0, at]],
            "tools": [],
            "tool_choice": "auto",
            "config": {"temperature": record.facts.get("temperature")},
            "output": {"model": _model(source), "choices": [{"message": messages[at], "stop_reason": stop}]},
        }


def _of_episode(record: Record) -> dict[str, Any]:
    assert record.episode is not None
    return {
        "ended_by": record.episode.ended_by,
        "turn_rewards": [turn.reward for turn in record.episode.turns],
        "tool_errors": [list(turn.errors) for turn in record.episode.turns],
    }


def summary(one: dict[str, Any]) -> dict[str, Any]:
    kept = {name: one[name] for name in _SUMMARY if name in one}
    if isinstance(kept["input"], str):
        kept["input"] = kept["input"][:MOST]
    else:
        kept["input"] = [{**message, "content": text_of(message["content"])[:MOST]} for message in kept["input"]]
    kept["metadata"] = {
        n: v[:MOST] if isinstance(v, str) else v for n, v in one["metadata"].items() if not isinstance(v, dict | list)
    }
    error = {"error": one["error"]["message"]} if "error" in one else {}
    return {**kept, **error, "completed": True, "message_count": len(one["messages"])}


def header(source: Source, count: int, ids: list[int | str], epochs: int, sums: dict[str, list[float]]) -> dict[str, Any]:
    when, name = _when(source), source.folder.resolve().name
    made = {"steerl": steerl.__version__, **{n: v for n, v in source.versions.items() if isinstance(v, str)}}
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "eval_id": source.key,
            "run_id": source.key,
            "created": when,
            "task": name,
            "task_id": source.key,
            "dataset": {"name": source.data or None, "samples": len(ids), "sample_ids": ids, "shuffled": False},
            "model": _model(source),
            "config": {"epochs": epochs},
            "packages": made,
            "metadata": {"source": source.kind, "config": source.config},
        },
        "plan": {"name": "steerl", "steps": [], "config": {}},
        "results": {
            "total_samples": count,
            "completed_samples": count,
            "scores": [
                {"name": name, "scorer": name, "scored_samples": int(n), "metrics": _metrics(n, total, squares)}
                for name, (n, total, squares) in sums.items()
            ],
        },
        "stats": {"started_at": when, "completed_at": when},
    }


def _metrics(count: float, total: float, squares: float) -> dict[str, Any]:
    mean = total / count
    spread = math.sqrt(max(squares - count * mean**2, 0.0) / (count - 1) / count) if count > 1 else 0.0
    return {name: {"name": name, "value": value} for name, value in (("mean", mean), ("stderr", spread))}


def _when(source: Source) -> str:
    return datetime.datetime.fromtimestamp(source.changed, datetime.UTC).isoformat(timespec="seconds")


def _model(source: Source) -> str:
    return f"steerl/{source.model or source.folder.resolve().name}"


def _message(message: dict[str, Any], own_id: str, source: Source | None) -> dict[str, Any]:
    """`source`: of the policy's own messages and what it was told between them."""
    content: Any = text_of(message.get("content"))
    if thought := reasoning(message):
        content = [{"type": "reasoning", "reasoning": thought}, {"type": "text", "text": content}]
    found: dict[str, Any] = {"id": own_id, "role": role(message), "content": content}
    if found["role"] == "assistant":
        found |= {"source": "generate", "model": _model(source)} if source else {}
        if calls := message.get("tool_calls"):
            found["tool_calls"] = [_call(call) for call in calls]
    elif found["role"] == "tool":
        found |= {"tool_call_id": message.get("tool_call_id") or None, "function": message.get("name") or None}
    return found | ({} if source else {"source": "input"})


def _call(call: dict[str, Any]) -> dict[str, Any]:
    written = call["function"]["arguments"]
    wrong = None
    try:
        arguments = json.loads(written)
        if not isinstance(arguments, dict):
            raise ValueError("no mapping of names to values")
    except (ValueError, RecursionError) as error:
        arguments, wrong = {"arguments": written}, str(error)
    return {
        "id": call["id"],
        "function": call["function"]["name"],
        "arguments": arguments,
        "parse_error": wrong,
        "type": "function",
    }
