"""`kind: function`: a reward of the user's own, `file.py:name` or `module:name`.

    name(prompts, completions, **columns) -> list of numbers     as TRL's trainers call it; None: does not apply to the row
    name(rollout, texts) -> Scores (or one number per row)       this package's own; may give a reward per token

Either may be asynchronous. A function gets the columns it names, and everything if it takes **kwargs. Where the
prompts are conversations, completions are `[{"role": "assistant", "content": ...}]`.

    in this process (the default) ---- raises? rows one by one, to name the row ---- fallback, or a Problem
    `timeout` set: a process of its own, killed when the time is over ---- rows one by one, each with that time
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reward.base import Failure, Scores, on_last_action, settle
from reward.loading import load_function, said
from reward.mixture import Part
from reward.worker import Overdue, Worker, WorkerFailed
from rollout.batch import Rollout, Texts
from rollout.errors import Problem
from rollout.fingerprint import SHORT, sha256_file

logger = logging.getLogger(__name__)
PATIENCE = 60.0
"""Seconds after which a function without a time limit is said to be running still."""


@dataclass(frozen=True, kw_only=True)
class FunctionSettings:
    """A reward function of the user's own."""

    function: str | Callable[..., Any]
    """`file.py:name` or `module:name`."""
    arguments: dict[str, Any] | None = None
    """Further keyword arguments, the same in every call."""
    timeout: float | None = None
    """Seconds that one call may take. Unless it is asynchronous, the function then runs in a process of its own."""
    fallback: float | None = None
    """The score of rows that raise, hang or give no finite number; without it such a row is an error."""

    def __post_init__(self) -> None:
        if self.timeout is not None and self.timeout <= 0:
            raise Problem(f"timeout: expected more than 0 seconds, found {self.timeout}")
        if isinstance(self.function, str) and not all(self.function.rpartition(":")[::2]):
            raise Problem(f"function: expected file.py:name or module:name, found {self.function!r}")

    def build(self, where: str, around: Any) -> Part:
        function = load_function(self.function, where) if isinstance(self.function, str) else self.function
        if inspect.isclass(function):
            raise Problem(f"{where}.function: {self.function!r} is a class; name a function, or an instance of the class")
        reward = FunctionReward(function, self, where)
        return Part(
            "",
            where,
            1.0,
            reward.score_async if reward.is_async else reward.score,
            reward.is_async,
            content=reward.content,
            close=reward.close,
        )


class FunctionReward:
    """Calls the function, and makes Scores out of what it gives."""

    def __init__(self, function: Callable[..., Any], settings: FunctionSettings, where: str):
        self.where, self.settings = where, settings
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        self.is_native, self.takes = _reads(function)
        self.function = functools.partial(function, **(settings.arguments or {}))
        self.worker: Worker | None = None
        if settings.timeout is not None and not self.is_async:
            if not isinstance(settings.function, str):
                raise Problem(
                    f"{where}.timeout: needs the function by name (file.py:name), to load it in a process that can be killed"
                )
            self.worker = Worker(settings.function, settings.arguments or {})

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()

    def content(self) -> str:
        """Of the file that the function is written in."""
        try:
            file = inspect.getsourcefile(inspect.unwrap(self.function.func))
        except TypeError:  # an object, a builtin
            file = inspect.getsourcefile(type(self.function.func))
        return sha256_file(Path(file))[:SHORT] if file and Path(file).is_file() else ""

    # -- synchronous -----------------------------------------------------------------------------------------------

    def score(self, rollout: Rollout, texts: Texts, vocabulary: str | None = None) -> Scores:
        if not len(rollout):
            return Scores(torch.zeros(0, device=rollout.device))
        with _patience(self.where):
            result = self._attempt(rollout, texts)
            if not isinstance(result, Failure):
                return self._scores(result, rollout)
            rows = (
                [self._attempt(rollout.select([i]), texts.select([i])) for i in range(len(rollout))]
                if len(rollout) > 1
                else [result]
            )
        return self._join(rows, result, rollout)

    def _attempt(self, rollout: Rollout, texts: Texts) -> Any:
        """What the function gives, or the Failure that it raised or took too long."""
        arguments = self._arguments(rollout, texts)
        try:
            if self.worker is not None:
                return self.worker.call(arguments, self.settings.timeout)
            result = self.function(**arguments)
            if inspect.isawaitable(result):  # a plain function around an asynchronous one
                with ThreadPoolExecutor(max_workers=1) as thread:
                    result = thread.submit(asyncio.run, _awaited(result)).result()
            return result
        except (Overdue, WorkerFailed) as error:
            return Failure(str(error))
        except Problem:
            raise
        except Exception as error:  # noqa: BLE001  the user's own code may raise anything; the row is named and settled, never hidden
            return Failure(said(error))

    # -- asynchronous ----------------------------------------------------------------------------------------------

    async def score_async(self, rollout: Rollout, texts: Texts, vocabulary: str | None = None) -> Scores:
        if not len(rollout):
            return Scores(torch.zeros(0, device=rollout.device))
        with _patience(self.where):
            result = await self._attempt_async(rollout, texts)
            if not isinstance(result, Failure):
                return self._scores(result, rollout)
            rows = [result]
            if len(rollout) > 1:
                singles = (self._attempt_async(rollout.select([i]), texts.select([i])) for i in range(len(rollout)))
                rows = await asyncio.gather(*singles)
        return self._join(rows, result, rollout)

    async def _attempt_async(self, rollout: Rollout, texts: Texts) -> Any:
        try:
            return await asyncio.wait_for(self.function(**self._arguments(rollout, texts)), self.settings.timeout)
        except TimeoutError:
            return Failure(f"not done after {self.settings.timeout} s")
        except Problem:
            raise
        except Exception as error:  # noqa: BLE001  as above
            return Failure(said(error))

    # -- what goes in, what comes out -------------------------------------------------------------------------------

    def _arguments(self, rollout: Rollout, texts: Texts) -> dict[str, Any]:
        if self.is_native:
            return {"rollout": rollout, "texts": texts}
        offered = trl_arguments(rollout, texts)
        if self.takes is None:
            return offered
        absent = [
            name for name, needed in self.takes.items() if needed and name not in offered and name not in self.function.keywords
        ]
        if absent:
            columns = ", ".join(texts.columns) or "none"
            raise Problem(
                f"{self.where}: the function asks for {absent[0]!r}, which is no column of the data (columns: {columns})"
            )
        return {name: value for name, value in offered.items() if name in self.takes}

    def _scores(self, result: Any, rollout: Rollout) -> Scores:
        if not isinstance(result, Scores):
            return settle(_listed(result, self.where), rollout, self.where, self.settings.fallback)
        totals_B = result.total_B
        if result.tokens_BR is not None and result.tokens_BR.shape == rollout.response_BR.shape:
            sums_B = result.per_token(rollout).sum(1)
            if bool(totals_B.any()) and not torch.allclose(totals_B.to(sums_B), sums_B, rtol=1e-3, atol=1e-4):
                raise Problem(
                    f"{self.where}: total_B is not the sum of tokens_BR; what a whole response earns belongs on its last action"
                )
            totals_B = sums_B
        values: list[Any] = totals_B.tolist()
        settled = settle(values, rollout, self.where, self.settings.fallback)
        tokens_BR = result.tokens_BR
        if tokens_BR is not None and settled.fallbacks:
            failed_B = ~totals_B.isfinite()
            tokens_BR = torch.where(failed_B[:, None], on_last_action(settled.total_B, rollout), tokens_BR)
        return Scores(settled.total_B, result.parts, tokens_BR, result.seconds, settled.fallbacks)

    def _join(self, rows: Sequence[Any], whole: Failure, rollout: Rollout) -> Scores:
        """The scores of rows that were tried one by one, after the call with all of them failed."""
        if not any(isinstance(row, Failure) for row in rows):
            logger.warning("%s: failed with all %d rows together (%s), not with any alone", self.where, len(rows), whole.reason)
        values: list[Any] = []
        dense: list[torch.Tensor | None] = []
        for index, row in enumerate(rows):
            found = row if isinstance(row, Failure) else self._scores(row, rollout.select([index]))
            values.append(found if isinstance(found, Failure) else None if found.total_B.isnan() else found.total_B.item())
            dense.append(None if isinstance(found, Failure) else found.tokens_BR)
        settled = settle(values, rollout, self.where, self.settings.fallback)
        if all(tokens is None for tokens in dense):
            return settled
        last_BR = on_last_action(settled.total_B, rollout)
        tokens_BR = torch.cat([last_BR[i : i + 1] if tokens is None else tokens for i, tokens in enumerate(dense)])
        return Scores(settled.total_B, {}, tokens_BR, {}, settled.fallbacks)


def trl_arguments(rollout: Rollout, texts: Texts) -> dict[str, Any]:
    """The keyword arguments that TRL's trainers hand to a reward function; beside them prompt_ids and ended."""
    lengths = rollout.lengths_B.tolist()
    completions: list[Any] = [
        [{"role": "assistant", "content": text}] if is_conversation(prompt) else text
        for prompt, text in zip(texts.prompts, texts.completions, strict=True)
    ]
    prompt_ids = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_BP, rollout.prompt_mask_BP, strict=True)]
    return {
        "prompt_ids": prompt_ids,
        "ended": rollout.ended_B.tolist(),
        **{name: column for name, column in texts.columns.items() if name.isidentifier()},
        "prompts": texts.prompts,
        "completions": completions,
        "completion_ids": [ids[:n] for ids, n in zip(rollout.response_BR.tolist(), lengths, strict=True)],
    }


def is_conversation(prompt: Any) -> bool:
    return (
        isinstance(prompt, list) and bool(prompt) and all(isinstance(message, dict) and "role" in message for message in prompt)
    )


def _reads(function: Callable[..., Any]) -> tuple[bool, dict[str, bool] | None]:
    """(takes rollout and texts; what else it takes and whether it must have it, None = everything)."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False, None
    if [p.name for p in parameters[:2]] == ["rollout", "texts"]:
        return True, None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return False, None
    return False, {p.name: p.default is p.empty for p in parameters if p.kind is not p.VAR_POSITIONAL}


def _listed(result: Any, where: str) -> list[Any]:
    """A list of what a function gave: a list, a tensor, an array."""
    if isinstance(result, str | bytes | dict) or not hasattr(result, "__iter__"):
        raise Problem(f"{where}: gave {type(result).__name__}; give a list with one number per row")
    if isinstance(result, torch.Tensor) and result.dim() == 0:
        raise Problem(f"{where}: gave a single number; give a list with one number per row")
    return list(result)


async def _awaited(result: Any) -> Any:
    return await result


@contextmanager
def _patience(where: str) -> Iterator[None]:
    """Says after a minute that a function without a time limit is running still: a hang is never silent."""
    timer = threading.Timer(
        PATIENCE, logger.warning, (f"{where}: still running after {PATIENCE:.0f} s; `timeout` would stop it",)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
