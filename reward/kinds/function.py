"""`kind: function`: a reward of the user's own, `file.py:name` or `module:name`.

    name(prompts, completions, **columns) -> list of numbers     as TRL's trainers call it; None: does not apply to the row
    name(rollout, texts) -> Scores (or one number per row)       this package's own; may give a reward per token

Either may give TurnRewards (what each of the policy's turns earned), and may be asynchronous. A function gets the columns that
it names, and everything if it takes **kwargs. Where the prompts are conversations, completions are `[{"role": "assistant",
"content": ...}]`; of an episode all messages that follow the prompt, tool calls and results too. As TRL's, it may ask for
`log_metric(name, number)`, whose mean over all calls and ranks is the metric reward/<part>/<name>, and for
`log_extra(column, values)`, one value per row, which rows of samples.jsonl show as extra/<part>/<column>.

    in this process (the default) ---- raises? rows one by one, to name the row ---- fallback, or a UserError
    `timeout` set: a process of its own, killed when the time is over ---- rows one by one, each with that time
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from steerl.reward.kinds.loading import LOGS, CallResult, load_function, with_arguments
from steerl.reward.kinds.worker import Worker, WorkerFailed
from steerl.reward.settings import FunctionSettings
from steerl.reward.types import (
    Failure,
    Scores,
    TurnRewards,
    joined_extra,
    joined_metrics,
    on_last_action,
    refuse_rewards_of_fed,
    settle,
    settle_turns,
    turns_of,
)
from steerl.reward.weighted_sum import RewardTerm
from steerl.rollout.common.errors import UserError, said
from steerl.rollout.common.fingerprint import source_fingerprint
from steerl.rollout.common.worker import Overdue
from steerl.rollout.prompts.chat import is_conversation
from steerl.rollout.types import Rollout, Texts

logger = logging.getLogger(__name__)
SLOW_S = 60.0
"""Seconds after which a function without a time limit is said to be running still."""


def build(settings: FunctionSettings, where: str, around: object) -> RewardTerm:
    function = load_function(settings.function, where) if isinstance(settings.function, str) else settings.function
    reward = FunctionReward(function, settings, where)
    return RewardTerm(
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
        self.function = with_arguments(function, settings.arguments or {}, where)
        function = self.function.func
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        self.signature = Signature.of(function)
        self._check_arguments()
        self.worker: Worker | None = None
        if settings.timeout is not None and not self.is_async:
            if not isinstance(settings.function, str):
                raise UserError(
                    f"{where}.timeout: needs the function by name (file.py:name), to load it in a process that can be killed"
                )
            self.worker = Worker(settings.function, settings.arguments or {}, where)

    @property
    def name(self) -> str:
        function = self.settings.function
        return function if isinstance(function, str) else getattr(function, "__name__", type(function).__name__)

    def _check_arguments(self) -> None:
        given, signature = self.function.keywords, self.signature
        field = f"{self.where}.arguments"
        unknown = [name for name in given if signature.takes is not None and name not in signature.takes]
        if unknown:
            raise UserError(
                f"{field}: {self.name} takes no {unknown[0]!r}; it takes: {', '.join(signature.takes or ()) or 'nothing'}"
            )
        lacking = [name for name in signature.needs if signature.is_native and name not in given]
        if lacking:
            raise UserError(f"{field}: {self.name} needs {lacking[0]!r} beside rollout and texts; give it here")

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()

    def content(self) -> str:
        """Of the file that the function is written in."""
        return source_fingerprint(self.function.func)

    # -- synchronous -----------------------------------------------------------------------------------------------

    def score(self, rollout: Rollout, texts: Texts, vocabulary: str | None = None) -> Scores:
        if not len(rollout):
            return Scores(torch.zeros(0, device=rollout.device))
        with _warn_if_slow(self.where):
            result = self._attempt(rollout, texts)
            if not isinstance(result, Failure):
                return self._scores(result, rollout, texts)
            rows = (
                [self._attempt(rollout.select([i]), texts.select([i])) for i in range(len(rollout))]
                if len(rollout) > 1
                else [result]
            )
        return self._join(rows, result, rollout, texts)

    def _attempt(self, rollout: Rollout, texts: Texts) -> CallResult | Failure:
        """What the function gives, or the Failure that it raised or took too long."""
        arguments, call = self._arguments(rollout, texts), CallResult(len(rollout))
        try:
            if self.worker is not None:
                return self.worker.call(arguments, call, self.logs, self.settings.timeout)
            result = self.function(**arguments, **call.log(self.logs))
            if inspect.isawaitable(result):  # a plain function around an asynchronous one
                with ThreadPoolExecutor(max_workers=1) as thread:
                    result = thread.submit(asyncio.run, _awaited(result)).result()
            return call.take(result)
        except (Overdue, WorkerFailed) as error:
            return Failure(str(error))
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001  the user's own code may raise anything; the row is named and settled, never hidden
            return Failure(said(error))

    # -- asynchronous ----------------------------------------------------------------------------------------------

    async def score_async(self, rollout: Rollout, texts: Texts, vocabulary: str | None = None) -> Scores:
        if not len(rollout):
            return Scores(torch.zeros(0, device=rollout.device))
        with _warn_if_slow(self.where):
            result = await self._attempt_async(rollout, texts)
            if not isinstance(result, Failure):
                return self._scores(result, rollout, texts)
            rows: Sequence[CallResult | Failure] = [result]
            if len(rollout) > 1:
                singles = (self._attempt_async(rollout.select([i]), texts.select([i])) for i in range(len(rollout)))
                rows = await asyncio.gather(*singles)
        return self._join(rows, result, rollout, texts)

    async def _attempt_async(self, rollout: Rollout, texts: Texts) -> CallResult | Failure:
        try:
            return await asyncio.wait_for(self._called(rollout, texts), self.settings.timeout)
        except TimeoutError:
            return Failure(f"not done after {self.settings.timeout} s")

    async def _called(self, rollout: Rollout, texts: Texts) -> CallResult | Failure:
        arguments, call = self._arguments(rollout, texts), CallResult(len(rollout))
        try:
            return call.take(await self.function(**arguments, **call.log(self.logs)))
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001  as above, and within: SystemExit would end the event loop
            return Failure(said(error))

    # -- what goes in, what comes out -------------------------------------------------------------------------------

    @property
    def logs(self) -> list[str]:
        """Which of TRL's two logging functions the function is given."""
        given = self.function.keywords
        return [name for name in LOGS if (self.signature.takes is None or name in self.signature.takes) and name not in given]

    def _arguments(self, rollout: Rollout, texts: Texts) -> dict[str, object]:
        if self.signature.is_native:
            return {"rollout": rollout, "texts": texts}
        given = {*LOGS, *self.function.keywords}
        offered = {name: value for name, value in trl_arguments(rollout, texts).items() if name not in given}
        absent = [name for name in self.signature.needs if name not in offered and name not in given]
        if absent:
            columns = ", ".join(texts.columns) or "none"
            raise UserError(
                f"{self.where}: {self.name} asks for {absent[0]!r}, which is no column of the data (columns: {columns})"
            )
        return {name: value for name, value in offered.items() if self.signature.takes is None or name in self.signature.takes}

    def _scores(self, call: CallResult, rollout: Rollout, texts: Texts) -> Scores:
        for column, values in call.extra.items():
            if len(values) != len(rollout):
                found = f"{len(values)} values" if len(values) <= len(rollout) else "more values than rows"
                raise UserError(f"{self.where}: log_extra({column!r}) got {found} for {len(rollout)} rows; give one per row")
        scores = self._settled(call.result, rollout, texts)
        return replace(scores, metrics={**scores.metrics, **call.metrics}, extra={**scores.extra, **call.extra})

    def _settled(self, result: object, rollout: Rollout, texts: Texts) -> Scores:
        if isinstance(result, TurnRewards):
            return settle_turns(result, rollout, self.where, self.settings.fallback, turns_of(rollout, texts))
        if not isinstance(result, Scores):
            return settle(_listed(result, self.where), rollout, self.where, self.settings.fallback)
        totals_B = result.total_B
        if result.tokens_BR is not None and result.tokens_BR.shape == rollout.response_BR.shape:
            refuse_rewards_of_fed(result.tokens_BR, rollout, self.where)
            sums_B = result.per_token(rollout).sum(1)
            if bool(totals_B.any()) and not torch.allclose(totals_B.to(sums_B), sums_B, rtol=1e-3, atol=1e-4):
                raise UserError(
                    f"{self.where}: total_B is not the sum of tokens_BR; what a whole response earns belongs on its last action"
                )
            totals_B = sums_B
        values: list[object] = totals_B.tolist()
        settled = settle(values, rollout, self.where, self.settings.fallback)
        tokens_BR = result.tokens_BR
        if tokens_BR is not None and settled.fallbacks:
            failed_B = ~totals_B.isfinite()
            tokens_BR = torch.where(failed_B[:, None], on_last_action(settled.total_B, rollout), tokens_BR)
        return replace(result, total_B=settled.total_B, tokens_BR=tokens_BR, fallbacks=settled.fallbacks)

    def _join(self, rows: Sequence[Any], whole: Failure, rollout: Rollout, texts: Texts) -> Scores:
        """The scores of rows that were tried one by one, after the call with all of them failed."""
        if not any(isinstance(row, Failure) for row in rows):
            logger.warning("%s: failed with all %d rows together (%s), not with any alone", self.where, len(rows), whole.reason)
        values: list[object] = []
        tokens_by_row: list[torch.Tensor | None] = []
        for index, row in enumerate(rows):
            found = row if isinstance(row, Failure) else self._scores(row, rollout.select([index]), texts.select([index]))
            values.append(found if isinstance(found, Failure) else None if found.total_B.isnan() else found.total_B.item())
            tokens_by_row.append(None if isinstance(found, Failure) else found.tokens_BR)
        settled = replace(settle(values, rollout, self.where, self.settings.fallback), **_logs_of(rows))
        if all(tokens is None for tokens in tokens_by_row):
            return settled
        last_BR = on_last_action(settled.total_B, rollout)
        tokens_BR = torch.cat([last_BR[i : i + 1] if tokens is None else tokens for i, tokens in enumerate(tokens_by_row)])
        return replace(settled, tokens_BR=tokens_BR)


def _logs_of(rows: Sequence[CallResult | Failure]) -> dict[str, Any]:
    """What was logged by calls with one row each, in the order of the rows."""
    calls = [row if isinstance(row, CallResult) else CallResult(1) for row in rows]
    return {
        "metrics": joined_metrics([call.metrics for call in calls]),
        "extra": joined_extra([call.extra for call in calls], [1] * len(calls)),
    }


def trl_arguments(rollout: Rollout, texts: Texts) -> dict[str, object]:
    """The keyword arguments that TRL's trainers hand to a reward function, and prompt_ids, ended, action_mask and turns; of
    rows with an environment `episodes` too.

    As in TRL, completion_ids hold a tool's result too; action_mask, as long, says which of them the policy drew. `environments`
    have what the environments left as attributes; `trainer_state.global_step` are the updates of the weights that drew."""
    completion_ids, episodes = rollout.response_ids, texts.episodes
    completions: list[object] = list(texts.completions)
    for row, prompt in enumerate(texts.prompts):
        if is_conversation(prompt):
            answer = {"role": "assistant", "content": texts.completions[row]}
            completions[row] = [answer] if episodes is None else episodes[row].messages
    outside: dict[str, object] = {}
    if episodes is not None:
        outside = {"episodes": episodes, "environments": [SimpleNamespace(**episode.state) for episode in episodes]}
    return {
        "prompt_ids": rollout.prompt_ids,
        "ended": rollout.ended_B.tolist(),
        "action_mask": [row[: len(ids)] for row, ids in zip(rollout.action_mask_BR.tolist(), completion_ids, strict=True)],
        "turns": turns_of(rollout, texts),
        **texts.columns,
        **outside,
        "trainer_state": SimpleNamespace(global_step=max([0, *rollout.policy_step_B.tolist()])),
        "prompts": texts.prompts,
        "completions": completions,
        "completion_ids": completion_ids,
    }


@dataclass(frozen=True)
class Signature:
    """What a function can be called with."""

    is_native: bool
    """It takes rollout and texts; the other names are arguments beside them."""
    needs: tuple[str, ...] = ()
    """What it must be given."""
    takes: tuple[str, ...] | None = None
    """All that it may be given; None: everything."""

    @staticmethod
    def of(function: Callable[..., object]) -> Signature:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            return Signature(False)
        is_native = [p.name for p in parameters[:2]] == ["rollout", "texts"]
        named = [p for p in parameters[2 if is_native else 0 :] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        needs = tuple(p.name for p in named if p.default is p.empty)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters) and not is_native
        return Signature(is_native, needs, None if open_ended else tuple(p.name for p in named))


def _listed(result: object, where: str) -> list[object]:
    """A list of what a function gave: a list, a tensor, an array."""
    if isinstance(result, str | bytes | dict) or not hasattr(result, "__iter__"):
        raise UserError(f"{where}: gave {type(result).__name__}; give a list with one number per row")
    if not getattr(result, "ndim", 1):
        raise UserError(f"{where}: gave a single number; give a list with one number per row")
    return list(result)


async def _awaited(result: Any) -> object:
    return await result


@contextmanager
def _warn_if_slow(where: str) -> Iterator[None]:
    """Says after a minute that a function without a time limit is running still: a hang is never silent."""
    timer = threading.Timer(SLOW_S, logger.warning, (f"{where}: still running after {SLOW_S:.0f} s; `timeout` would stop it",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
