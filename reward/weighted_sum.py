"""The weighted sum of named parts: what `build_reward` gives to a job.

rollout, texts --+--> part 1 --> finite? --> normalise --> clip --> parts["1"] --x weight--+
                 +--> part 2 -->   ...                                                     +--> total_B (and tokens_BR)
                 +--> part 3 -->   ...        (asynchronous parts run beside the others) --+
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from steerl.reward.normalize import Shape
from steerl.reward.types import Scores, on_last_action, row_name
from steerl.rollout.common.errors import UserError
from steerl.rollout.types import Rollout, Texts
from torch import Tensor


@dataclass(frozen=True)
class RewardTerm:
    """One entry of the `reward:` list, ready to use."""

    name: str
    where: str
    """What messages call it: `reward[1] (regex)`."""
    weight: float
    score: Callable[..., Any]
    """(rollout, texts, vocabulary) -> Scores; asynchronous where `is_async`."""
    is_async: bool = False
    shape: Shape | None = None
    """Normalisation and clipping of the part's values."""
    content: Callable[[], str] = str
    """A hash of what the part scores with besides its settings: weights, a function's file."""
    close: Callable[[], object] = object

    def score_now(self, rollout: Rollout, texts: Texts) -> Scores:
        """The raw scores, outside any event loop."""
        scores = self.score(rollout, texts, None)
        return asyncio.run(scores) if self.is_async else scores  # type: ignore[no-any-return]


@dataclass(frozen=True)
class WeightedSum:
    """The reward of a job: `total = sum of weight x part`, in float64, kept as float32."""

    parts: tuple[RewardTerm, ...]
    vocabulary: str | None = None
    """Which vocabulary the rollout's ids belong to (`vocabulary_of`); None where that is not known."""
    leaves_out: bool = False
    """The total of a row to which no part applies is NaN, not an error: the asker of a server may have other parts."""

    @property
    def is_collective(self) -> bool:
        """Whether every rank must call, with no rows if it has none: a running normalisation counts over all ranks."""
        return any(part.shape is not None and part.shape.is_running for part in self.parts)

    def still(self) -> WeightedSum:
        """The same reward for looking at the policy: running normalisations stay where they are."""
        parts = (replace(part, shape=None if part.shape is None else part.shape.still()) for part in self.parts)
        return replace(self, parts=tuple(parts))

    def __call__(self, rollout: Rollout, texts: Texts) -> Scores:
        if len(rollout) != len(texts):
            raise UserError(f"reward: the rollout has {len(rollout)} rows, the texts {len(texts)}")
        slow = [part for part in self.parts if part.is_async]
        with ThreadPoolExecutor(max_workers=1) as thread:
            # A thread of its own: the caller may sit inside a running event loop (notebooks).
            waiting: Future[list[Any]] | None = thread.submit(asyncio.run, self._gather(slow, rollout, texts)) if slow else None
            found = {part.name: _timed(part, rollout, texts, self.vocabulary) for part in self.parts if not part.is_async}
            if waiting is not None:
                found |= dict(zip((part.name for part in slow), waiting.result(), strict=True))
        return self._sum(rollout, found)

    async def _gather(self, parts: Sequence[RewardTerm], rollout: Rollout, texts: Texts) -> list[Any]:
        async def one(part: RewardTerm) -> tuple[Scores, float]:
            started = time.perf_counter()
            return await part.score(rollout, texts, self.vocabulary), time.perf_counter() - started

        return await asyncio.gather(*(one(part) for part in parts))

    def _sum(self, rollout: Rollout, found: Mapping[str, tuple[Scores, float]]) -> Scores:
        sequence_B = torch.zeros(len(rollout), dtype=torch.float64, device=rollout.device)
        dense_BR: Tensor | None = None
        applies_B = torch.zeros_like(sequence_B, dtype=torch.bool)
        parts: dict[str, Tensor] = {}
        seconds: dict[str, float] = {}
        fallbacks: dict[str, int] = {}
        metrics: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        for part in self.parts:
            scores, seconds[part.name] = found[part.name]
            _check(part, scores, rollout)
            scores = scores.to(rollout.device)
            values_B = part.shape(scores.total_B) if part.shape is not None else scores.total_B
            parts[part.name] = values_B
            if part.shape is not None:
                parts[f"{part.name}.raw"] = scores.total_B
            parts |= {f"{part.name}.{inner}": values for inner, values in scores.parts.items()}
            if sum(scores.fallbacks.values()):
                fallbacks[part.name] = sum(scores.fallbacks.values())
            metrics |= {f"{part.name}/{name}": values for name, values in scores.metrics.items()}
            extra |= {f"{part.name}/{column}": values for column, values in scores.extra.items()}
            applies_B |= ~values_B.isnan()
            if scores.tokens_BR is None:
                sequence_B = sequence_B + part.weight * values_B.double().nan_to_num(nan=0.0)
            else:
                weighted_BR = part.weight * scores.per_token(rollout).double()
                dense_BR = weighted_BR if dense_BR is None else dense_BR + weighted_BR
        tokens_BR = None if dense_BR is None else (dense_BR + on_last_action(sequence_B, rollout)).float()
        total_B = (sequence_B if dense_BR is None else sequence_B + dense_BR.sum(1)).float()
        bad = torch.nonzero(~total_B.isfinite()).flatten().tolist()
        if bad:
            raise UserError(
                f"reward: {row_name(rollout, bad[0])} has the total {total_B[bad[0]].item()}; weights or values are too large"
            )
        if not self.leaves_out:
            _refuse_lonely_rows(applies_B, rollout)
        return Scores(total_B.where(applies_B, torch.nan), parts, tokens_BR, seconds, fallbacks, metrics, extra)

    # -- what a checkpoint keeps, and the end -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of running normalisations by part; empty without any."""
        return {part.name: part.shape.state_dict() for part in self.parts if part.shape is not None and part.shape.is_running}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        missing = sorted(set(self.state_dict()) ^ set(state))
        if missing:
            raise UserError(f"reward: the saved state and this job differ in the normalised part(s) {', '.join(missing)}")
        for part in self.parts:
            if part.shape is not None and part.name in state:
                part.shape.load_state_dict(state[part.name])

    def close(self) -> None:
        """End the worker processes that time limits need."""
        for part in self.parts:
            part.close()


def _timed(part: RewardTerm, rollout: Rollout, texts: Texts, vocabulary: str | None) -> tuple[Scores, float]:
    started = time.perf_counter()
    return part.score(rollout, texts, vocabulary), time.perf_counter() - started


def _check(part: RewardTerm, scores: Scores, rollout: Rollout) -> None:
    """A row per row, no infinity, and tokens that fit the rollout."""
    if not isinstance(scores, Scores):
        raise UserError(f"{part.where}: expected Scores, found {type(scores).__name__}")
    if len(scores) != len(rollout):
        raise UserError(f"{part.where}: gave {len(scores)} scores for {len(rollout)} rows; give one per row")
    bad = torch.nonzero(scores.total_B.isinf()).flatten().tolist()
    if bad:
        raise UserError(
            f"{part.where}: {row_name(rollout, bad[0])} scored {scores.total_B[bad[0]].item()}; scores must be finite"
        )
    if scores.tokens_BR is None:
        return
    if part.shape is not None:
        raise UserError(f"{part.where}: gives a reward per token, which `normalise` and `clip` do not change; leave them out")
    if scores.tokens_BR.shape != rollout.response_BR.shape:
        expected, shape = tuple(rollout.response_BR.shape), tuple(scores.tokens_BR.shape)
        raise UserError(f"{part.where}: tokens_BR has shape {shape}, the responses {expected}; give one number per action")
    real_BR = torch.where(rollout.mask_BR, scores.tokens_BR, 0.0)
    bad = torch.nonzero(~real_BR.isfinite().all(1)).flatten().tolist()
    if bad:
        raise UserError(f"{part.where}: {row_name(rollout, bad[0])} has a reward per token that is not finite")


def _refuse_lonely_rows(applies_B: Tensor, rollout: Rollout) -> None:
    lonely = torch.nonzero(~applies_B).flatten().tolist()
    if lonely:
        names = ", ".join(row_name(rollout, index) for index in lonely[:3]) + (", ..." if len(lonely) > 3 else "")
        raise UserError(
            f"reward: no part applies to {len(lonely)} of {len(rollout)} rows ({names}): each gave None there; "
            "leave such rows out of the data, or add a part that scores every row"
        )
