"""What a remote reward is asked and what it answers, as JSON. Both sides use it: reward.remote and reward.server.

    POST /score   {"prompts": [...], "completions": [...], "prompt_texts": [...], "columns": {name: [...]}, "ended": [...],
                   "rows": [[dataset row, sample], ...],
                   "ids": {"prompts": [[...]], "responses": [[...]], "start": [...], "vocabulary": "..."} or null}
    200           {"scores": [...], "parts": {name: [...]}, "tokens": [[...], ...] or null, "fallbacks": {name: count}}

A server of another make needs only `prompts` and `completions`, and may answer with `scores` alone. null: the reward
does not apply to the row. A float32 travels as the shortest text that reads back as the same number: nothing is lost.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reward.base import Scores, has_ids
from reward.texts import rollout_of
from rollout.batch import Rollout, Texts
from rollout.errors import Problem


def ask(rollout: Rollout, texts: Texts, vocabulary: str | None, where: str) -> bytes:
    ids = None
    if has_ids(rollout):
        lengths = rollout.lengths_B.tolist()
        ids = {
            "prompts": [row[mask].tolist() for row, mask in zip(rollout.prompt_BP, rollout.prompt_mask_BP, strict=True)],
            "responses": [row[:n] for row, n in zip(rollout.response_BR.tolist(), lengths, strict=True)],
            "start": list(rollout.start_ids),
            "vocabulary": vocabulary,
        }

    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):
            return value.tolist()
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        raise Problem(f"{where}: a column holds {type(value).__name__}, which JSON cannot carry; drop the column")

    question = {
        "prompts": texts.prompts,
        "completions": texts.completions,
        "prompt_texts": texts.prompt_texts,
        "columns": texts.columns,
        "ended": rollout.ended_B.tolist(),
        "rows": list(zip(rollout.row_B.tolist(), rollout.sample_B.tolist(), strict=True)),
        "ids": ids,
    }
    return json.dumps(question, ensure_ascii=False, default=plain).encode()


def read_question(body: bytes) -> tuple[Rollout, Texts, str | None]:
    """A Problem says what is wrong with the question, in the words of its own fields."""
    try:
        asked = json.loads(body)
    except ValueError as error:
        raise Problem(f"body: not JSON: {error}") from error
    if not isinstance(asked, dict) or not isinstance(asked.get("completions"), list):
        raise Problem("completions: missing; expected an object with a list of prompts and one of completions")
    rows = len(asked["completions"])
    prompts = asked.get("prompts") or [""] * rows
    columns = asked.get("columns") or {}
    lists = {
        "prompts": prompts,
        "prompt_texts": asked.get("prompt_texts") or [p if isinstance(p, str) else "" for p in prompts],
    }
    lists |= {"ended": asked.get("ended") or [True] * rows, "rows": asked.get("rows") or [[i, 0] for i in range(rows)]}
    if not isinstance(columns, dict):
        raise Problem("columns: expected an object of lists")
    for name, values in {**lists, **{f"columns.{name}": column for name, column in columns.items()}}.items():
        if not isinstance(values, list) or len(values) != rows:
            raise Problem(f"{name}: expected a list of {rows}, as completions has")
    if not all(isinstance(text, str) for text in (*asked["completions"], *lists["prompt_texts"])):
        raise Problem("completions: expected a list of texts")
    ids = asked.get("ids") or {}
    try:
        rollout = rollout_of(
            rows,
            prompts=ids.get("prompts"),
            responses=ids.get("responses"),
            ended=lists["ended"],
            row=[int(row) for row, _ in lists["rows"]],
            sample=[int(sample) for _, sample in lists["rows"]],
            start_ids=ids.get("start") or (),
        )
    except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise Problem(f"ids, ended, rows: {error!s:.200}") from error
    texts = Texts(prompts=prompts, prompt_texts=lists["prompt_texts"], completions=asked["completions"], columns=columns)
    if len(rollout) != rows:
        raise Problem(f"ids: expected {rows} rows, as completions has")
    return rollout, texts, ids.get("vocabulary")


def answer(scores: Scores, rollout: Rollout) -> bytes:
    tokens = None
    if scores.tokens_BR is not None:
        tokens = [row[:n] for row, n in zip(scores.tokens_BR.tolist(), rollout.lengths_B.tolist(), strict=True)]
    told = {
        "scores": _plain(scores.total_B),
        "parts": {name: _plain(values) for name, values in scores.parts.items()},
        "tokens": tokens,
        "fallbacks": scores.fallbacks,
    }
    return json.dumps(told, allow_nan=False).encode()


def read_answer(body: bytes, rollout: Rollout) -> dict[str, Any]:
    """{"scores": list, "parts": {name: tensor}, "tokens": (B, R) tensor or None}; ValueError says what is wrong."""
    told = json.loads(body)
    if not isinstance(told, dict) or not isinstance(told.get("scores"), list):
        raise ValueError('the answer has no list "scores"')
    rows = len(rollout)
    if len(told["scores"]) != rows:
        raise ValueError(f"the answer has {len(told['scores'])} scores for {rows} rows")
    parts = {str(name): _tensor(name, values, rows) for name, values in (told.get("parts") or {}).items()}
    tokens_BR: Tensor | None = None
    if told.get("tokens") is not None:
        lengths = rollout.lengths_B.tolist()
        if [len(row) for row in told["tokens"]] != lengths:
            raise ValueError("the answer's tokens are not one number per sampled token")
        tokens_BR = torch.zeros(rollout.response_BR.shape)
        for index, row in enumerate(told["tokens"]):
            tokens_BR[index, : lengths[index]] = torch.tensor(row)
    return {"scores": told["scores"], "parts": parts, "tokens": tokens_BR, "fallbacks": told.get("fallbacks") or {}}


def _plain(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _tensor(name: str, values: Any, rows: int) -> Tensor:
    if not isinstance(values, list) or len(values) != rows:
        raise ValueError(f"the answer's part {name!r} has not {rows} scores")
    return torch.tensor([math.nan if value is None else float(value) for value in values])


def read_error(body: bytes) -> str:
    """What a server says went wrong, in one short line."""
    try:
        told = json.loads(body)
        text = str(told["error"]) if isinstance(told, Mapping) and "error" in told else body.decode(errors="replace")
    except ValueError:
        text = body.decode(errors="replace")
    return " ".join(text.split())[:200]
