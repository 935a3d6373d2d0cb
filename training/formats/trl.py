"""A flat parquet file with TRL's names: its trainers' data sets, and what GRPO logs of its completions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerl.rollout.common.errors import DataError
from steerl.training.formats.records import Record, Source

if TYPE_CHECKING:
    from datasets import Features

CHUNK = 256
"""Rows per row group."""
_TOKENS = {"behaviour_logprobs": "logprobs"}
"""Numbers per token that have another name there."""
_WHOLE = {str: "string", int: "int64", float: "float64", bool: "bool"}


def row(record: Record) -> dict[str, Any]:
    """A value per column. Conversations are lists of messages, texts are texts."""
    prompt: Any = record.prompt
    completion: Any = record.completion
    if not isinstance(record.prompt, str):
        prompt, completion = record.said
    advantages = record.drawn("advantages")
    found = {
        "prompt_index": record.row,
        "sample_index": record.sample,
        "prompt": prompt,
        "completion": completion,
        "reward": None if record.reward is None else float(record.reward),
        **({} if advantages is None else {"advantage": sum(advantages) / len(advantages) if advantages else None}),
        "prompt_ids": record.prompt_ids,
        "completion_ids": record.ids,
        "tool_mask": [int(own) for own in record.action_mask],
    }
    found |= {_TOKENS.get(name, name): values for name, values in record.numbers.items()}
    others = [
        *(("", name, value) for name, value in record.facts.items()),
        ("", "episode", None if record.episode is None else record.episode.as_json()),
        ("", "tools", record.tools or None),
        *(("rewards/", name, float(value)) for name, value in record.parts.items()),
        *(("columns/", name, value) for name, value in record.columns.items()),
    ]
    for where, name, value in others:
        found[f"{where}{name}" if name in found else name] = value
    return found


def write(path: Path, source: Source) -> int:
    """How many there were. The records are read twice: which columns there are, and what they hold, parquet is told first."""
    import pyarrow.parquet as pq
    from datasets import Dataset

    features = _features(source)
    schema = Dataset.from_dict({name: [] for name in features}, features=features).data.schema
    rows = ({name: _value(found.get(name), kind) for name, kind in features.items()} for found in map(row, source.read()))
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while chunk := list(itertools.islice(rows, CHUNK)):
            writer.write_table(Dataset.from_list(chunk, features=features).data.table)
            count += len(chunk)
    return count


def _features(source: Source) -> Features:
    from datasets import Features, Json, List, Value

    kinds: dict[str, set[str]] = {}
    for record in source.read():
        numbers = {_TOKENS.get(name, name) for name in record.numbers} | {"strengths"}
        for name, value in row(record).items():
            kinds.setdefault(name, set()).add("numbers" if name in numbers and value is not None else _kind(value, name))
    if len(forms := kinds["prompt"] & {"string"} | {"conversation" for kind in kinds["prompt"] if kind != "string"}) > 1:
        raise DataError(f"{source.folder}: its prompts are {' and '.join(sorted(forms))}s, and TRL takes one kind in a file")
    number = "float32" if source.kind == "dump" else "float64"  # a run records decimals
    known = {"ids": List(Value("int32")), "mask": List(Value("int8")), "numbers": List(Value(number))}
    known |= {"messages": List({"role": Value("string"), "content": Value("string")}), "conversation": List(Json())}
    found: dict[str, Any] = {}
    for name, several in kinds.items():
        match sorted(several - {"null"}):
            case []:
                continue
            case [kind]:
                found[name] = known.get(kind) or (Json() if kind == "json" else Value(kind))
            case ["conversation", "messages"]:
                found[name] = known["conversation"]
            case ["float64", "int64"]:
                found[name] = Value("float64")
            case _:
                found[name] = Json()
    return Features(found)


def _kind(value: Any, name: str) -> str:
    if value is None:
        return "null"
    if name in ("prompt_ids", "completion_ids"):
        return "ids"
    if name == "tool_mask":
        return "mask"
    if name in ("prompt", "completion") and isinstance(value, list):
        bare = all(message.keys() == {"role", "content"} and isinstance(message["content"], str) for message in value)
        return "messages" if bare else "conversation"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "json"
    return _WHOLE.get(type(value), "json")


def _value(value: Any, kind: Any) -> Any:
    """As the library is to be given it: JSON as text, which it would guess at."""
    from datasets import Json, List

    if value is None:
        return None
    if isinstance(kind, List) and isinstance(kind.feature, Json):
        return [json.dumps(inner) for inner in value]
    return json.dumps(value) if isinstance(kind, Json) else value
