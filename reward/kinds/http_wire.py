"""What a remote reward is asked and what it answers, as JSON. Both sides use it: reward.remote and reward.server.

    POST /score   {"prompts": [...], "completions": [...], "prompt_texts": [...], "columns": {name: [...]}, "ended": [...],
                   "rows": [[dataset row, sample], ...],
                   "ids": {"prompts": [[...]], "responses": [[...]], "start": [...], "vocabulary": "...",
                           "action_mask": [[...]] where a row was fed something in between} or null,
                   "episodes": [...] where an environment took part, as rollout.episodes.Episode.as_json gives them}
    200           {"scores": [...], "parts": {name: [...]}, "tokens": [[...], ...] or null, "fallbacks": {name: count}}
                  and where rows are screened "screened": [true, false, ...]

`tokens` are as long as the row's response, and 0 where its `action_mask` is (1: the policy drew the token, 0: it was fed).
A server of another make needs only `prompts` and `completions`, and may answer with `scores` alone. null: the reward
does not apply to the row. A float32 travels as the shortest text that reads back as the same number: nothing is lost.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import re
from typing import Any

import torch
from torch import Tensor

from steerl.reward.types import Scores, has_ids
from steerl.rollout.common.errors import UserError, visible
from steerl.rollout.episodes import Episode
from steerl.rollout.types import Rollout, Texts

MOST_LISTS = 1_000_000
"""Lists and objects in a question or an answer: 13 million of them take 18 s to read."""
MOST_CELLS = 2**27
"""Token ids of a question's rows, padded to the longest."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


def ask(rollout: Rollout, texts: Texts, vocabulary: str | None, where: str) -> bytes:
    ids = None
    if has_ids(rollout):
        ids = {
            "prompts": rollout.prompt_ids,
            "responses": (responses := rollout.response_ids),
            "start": list(rollout.start_ids),
            "vocabulary": vocabulary,
        }
        if bool((rollout.actions_B < rollout.lengths_B).any()):
            masks = rollout.action_mask_BR.int().tolist()
            ids["action_mask"] = [row[: len(response)] for row, response in zip(masks, responses, strict=True)]

    def plain(value: object) -> object:
        if hasattr(value, "tolist"):
            return value.tolist()
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        raise UserError(f"{where}: a column holds {type(value).__name__}, which JSON cannot carry; drop the column")

    question = {
        "prompts": texts.prompts,
        "completions": texts.completions,
        "prompt_texts": texts.prompt_texts,
        "columns": texts.columns,
        "ended": rollout.ended_B.tolist(),
        "rows": list(zip(rollout.row_B.tolist(), rollout.sample_B.tolist(), strict=True)),
        "ids": ids,
    }
    if texts.episodes is not None:
        question["episodes"] = [episode.as_json() for episode in texts.episodes]
    try:
        return json.dumps(question, ensure_ascii=False, default=plain).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can only spell out
        return json.dumps(question, default=plain).encode()
    except RecursionError as error:
        raise UserError(f"{where}: a column holds lists in lists too deep for JSON; drop the column") from error


class TooLarge(Exception):
    """The question is over a limit."""


def parse(body: bytes) -> object:
    """What JSON says; ValueError where it is none, or lists in lists that would take minutes and gigabytes to read."""
    if body.count(b"[") + body.count(b"{") > MOST_LISTS:
        plain = _STRING.sub(b"", body)
        if plain.count(b"[") + plain.count(b"{") > MOST_LISTS:
            raise ValueError(f"more than {MOST_LISTS:,} lists and objects")
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError("lists in lists too deep") from error


def read_question(body: bytes, max_rows: int) -> tuple[Rollout, Texts, str | None]:
    """A UserError says what is wrong with the question, in the words of its own fields."""
    try:
        asked = parse(body)
    except ValueError as error:
        raise UserError(f"body: not JSON: {error!s:.200}") from error
    if not isinstance(asked, dict) or not isinstance(asked.get("completions"), list):
        raise UserError("completions: missing; expected an object with a list of prompts and one of completions")
    rows = len(asked["completions"])
    if rows > max_rows:
        raise TooLarge(f"{rows} rows; at most {max_rows} in a request")
    prompts = asked.get("prompts") or [""] * rows
    columns = asked.get("columns") or {}
    lists = {
        "prompts": prompts,
        "prompt_texts": asked.get("prompt_texts") or [p if isinstance(p, str) else "" for p in prompts],
    }
    lists |= {"ended": asked.get("ended") or [True] * rows, "rows": asked.get("rows") or [[i, 0] for i in range(rows)]}
    if not isinstance(columns, dict):
        raise UserError("columns: expected an object of lists")
    for name, values in {**lists, **{f"columns.{name}": column for name, column in columns.items()}}.items():
        if not isinstance(values, list) or len(values) != rows:
            raise UserError(f"{name}: expected a list of {rows}, as completions has")
    if not all(isinstance(text, str) for text in (*asked["completions"], *lists["prompt_texts"])):
        raise UserError("completions: expected a list of texts")
    ids = asked.get("ids") or {}
    try:
        masks = ids.get("action_mask")
        if masks is not None and [len(row) for row in masks] != [len(row) for row in ids.get("responses") or ()]:
            raise UserError("action_mask: expected as many as the responses' ids")
        cells = sum(rows * max(map(len, ids.get(name) or [[]])) for name in ("prompts", "responses"))
        if cells > MOST_CELLS:
            raise TooLarge(f"{cells:,} places for token ids, padded; at most {MOST_CELLS:,} in a request")
        rollout = Rollout.of_ids(
            ids.get("prompts") or [[]] * rows,
            ids.get("responses") or [[]] * rows,
            ended_B=lists["ended"],
            row_B=[int(row) for row, _ in lists["rows"]],
            sample_B=[int(sample) for _, sample in lists["rows"]],
            start_ids=tuple(ids.get("start") or ()),
            **({} if masks is None else {"action_mask_BR": masks}),
        )
    except (UserError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise UserError(f"ids, ended, rows: {error!s:.200}") from error
    texts = Texts(
        prompts=prompts,
        prompt_texts=lists["prompt_texts"],
        completions=asked["completions"],
        columns=columns,
        episodes=_episodes(asked["episodes"], rollout) if asked.get("episodes") is not None else None,
    )
    if len(rollout) != rows:
        raise UserError(f"ids: expected {rows} rows, as completions has")
    if bool((rollout.prompt_BP < 0).any() or (rollout.response_BR < 0).any()):
        raise UserError("ids: expected 0 and up")
    return rollout, texts, ids.get("vocabulary")


def _episodes(given: Any, rollout: Rollout) -> list[Episode]:
    try:
        episodes = [Episode.of_json(one) for one in given]
        sound = [_is_sound(one, length) for one, length in zip(episodes, rollout.lengths_B.tolist(), strict=True)]
    except (TypeError, KeyError, ValueError, AttributeError):
        sound = [False]
    if not all(sound):
        raise UserError("episodes: expected one for each row, as Episode.as_json gives them")
    return episodes


def _is_sound(episode: Episode, length: int) -> bool:
    """Its turns lie within the row, and what a reward reads is of its kind."""
    return all(isinstance(value, kind) for value, kind in ((episode.failure, str), (episode.state, dict))) and all(
        isinstance(turn.text, str)
        and isinstance(turn.first, int)
        and isinstance(turn.end, int)
        and 0 <= turn.first <= turn.end <= length
        and isinstance(turn.message, dict | None)
        and (isinstance(turn.answer, str) or all(isinstance(message, dict) for message in turn.answer))
        for turn in episode.turns
    )


def answer(scores: Scores, rollout: Rollout) -> bytes:
    tokens = None
    if scores.tokens_BR is not None:
        tokens = [row[:n] for row, n in zip(scores.tokens_BR.tolist(), rollout.lengths_B.tolist(), strict=True)]
    told: dict[str, object] = {
        "scores": _plain(scores.total_B),
        "parts": {name: _plain(values) for name, values in scores.parts.items()},
        "tokens": tokens,
        "fallbacks": scores.fallbacks,
    }
    told |= {} if scores.screened_B is None else {"screened": scores.screened_B.tolist()}
    told |= {"logs": {"metrics": scores.metrics, "extra": scores.extra}} if scores.metrics or scores.extra else {}
    return json.dumps(told, allow_nan=False).encode()


def read_answer(body: bytes, rollout: Rollout) -> dict[str, object]:
    """{"scores": list, "parts": {name: tensor}, "tokens": (B, R) tensor or None, ...}; ValueError says what is wrong."""
    told = parse(body)
    if not isinstance(told, dict) or not isinstance(told.get("scores"), list):
        raise ValueError('the answer has no list "scores"')
    rows = len(rollout)
    if len(told["scores"]) != rows:
        raise ValueError(f"the answer has {len(told['scores'])} scores for {rows} rows")
    parts = {name: _tensor(name, values, rows) for name, values in _mapping(told, "parts").items()}
    tokens_BR: Tensor | None = None
    if told.get("tokens") is not None:
        lengths, wrong = rollout.lengths_B.tolist(), "the answer's tokens are not one number per token of the response"
        lists = told["tokens"]
        if not isinstance(lists, list) or [len(row) if isinstance(row, list) else -1 for row in lists] != lengths:
            raise ValueError(wrong)
        tokens_BR = torch.zeros(rollout.response_BR.shape)
        for index, row in enumerate(lists):
            tokens_BR[index, : lengths[index]] = torch.tensor([_number(value, wrong) for value in row])
    screened = told.get("screened")
    if screened is not None and not (
        _list(screened, wrong := "the answer's screened are not true or false for each row", rows)
        and all(isinstance(mark, bool) for mark in screened)
    ):
        raise ValueError(wrong)
    fallbacks = {
        name: int(_number(count, "the answer's fallbacks are no counts")) for name, count in _mapping(told, "fallbacks").items()
    }
    logs = _mapping(told, "logs")
    wrong = "the answer's logs are not numbers and a value per row"
    metrics = {name: [_number(v, wrong) for v in _list(values, wrong)] for name, values in _mapping(logs, "metrics").items()}
    extra = {name: _list(values, wrong, rows) for name, values in _mapping(logs, "extra").items()}
    return {
        "scores": told["scores"],
        "parts": parts,
        "tokens": tokens_BR,
        "fallbacks": fallbacks,
        "metrics": metrics,
        "extra": extra,
        "screened": screened,
    }


def _mapping(told: dict[str, object], name: str) -> dict[str, object]:
    found = told.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"the answer's {name} are no object")
    return {visible(key): value for key, value in found.items()}


def _list(values: object, wrong: str, length: int | None = None) -> list[object]:
    if not isinstance(values, list) or length not in (None, len(values)) or any(isinstance(v, list | dict) for v in values):
        raise ValueError(wrong)
    return values


def _number(value: object, wrong: str) -> float:
    """A finite number that float32 holds."""
    if not isinstance(value, int | float) or not abs(value) <= torch.finfo(torch.float32).max:
        raise ValueError(wrong)
    return float(value)


def _plain(values: Tensor) -> list[float | None]:
    """JSON has no NaN and no infinity."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _tensor(name: str, values: object, rows: int) -> Tensor:
    wrong = f"the answer's part {name!r} has not {rows} scores"
    given = _list(values, wrong, rows)
    return torch.tensor([math.nan if value is None else _number(value, wrong) for value in given])


def read_error(body: bytes) -> str:
    """What a server says went wrong, in one short line."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError):
        told = parse(body)
        text = str(told["error"]) if isinstance(told, dict) and isinstance(told.get("error"), str) else text
    return " ".join(visible(text[:1000]).split())[:200]
