"""The weighted sum of named parts: what `build_reward` gives to a job.

rollout, texts --+--> term 1 --> finite? --> normalise --> clip --> parts["1"] --x weight--+
                 +--> term 2 -->   ...                                                     +--> total_B (and tokens_BR)
                 +--> term 3 -->   ...        (asynchronous parts run beside the others) --+
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steerl.reward.normalize import Shape
from steerl.reward.types import Scores, on_last_action, refuse_rewards_of_fed
from steerl.rollout.common.errors import UserError
from steerl.rollout.types import Rollout, Texts, row_name


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
    """A hash of what the term scores with besides its settings: weights, a function's file."""
    close: Callable[[], object] = object
    memory: Any = None
    """What the term keeps from call to call, over all ranks, with `state_dict` and `load_state_dict`; its `score` then takes
    `still`, for calls that leave it as it is."""

    def still(self) -> RewardTerm:
        """The same for now, which nothing that is scored changes."""
        score = self.score if self.memory is None else partial(self.score, still=True)
        return replace(self, score=score, shape=None if self.shape is None else self.shape.still())

    def score_now(self, rollout: Rollout, texts: Texts) -> Scores:
        """The raw scores, outside any event loop."""
        scores = self.score(rollout, texts, None)
        return asyncio.run(scores) if self.is_async else scores  # type: ignore[no-any-return]


@dataclass(frozen=True)
class WeightedSum:
    """The reward of a job: `total = sum of weight x part`, in float64, kept as float32."""

    terms: tuple[RewardTerm, ...]
    vocabulary: str | None = None
    """Which vocabulary the rollout's ids belong to (`vocabulary_of`); None where that is not known."""
    leaves_out: bool = False
    """The total of a row to which no part applies is NaN, not an error: the asker of a server may have other parts."""

    @property
    def is_collective(self) -> bool:
        """Whether every rank must call, with no rows if it has none: what is kept counts over all ranks."""
        return bool(self._kept())

    def still(self) -> WeightedSum:
        """The same reward for looking at the policy: running normalisations stay where they are."""
        return replace(self, terms=tuple(term.still() for term in self.terms))

    def _kept(self) -> dict[str, Any]:
        """What terms keep from call to call, by name."""
        shapes = {term.name: term.shape for term in self.terms if term.shape is not None and term.shape.is_running}
        return shapes | {f"{term.name}.memory": term.memory for term in self.terms if term.memory is not None}

    def __call__(self, rollout: Rollout, texts: Texts) -> Scores:
        if len(rollout) != len(texts):
            raise UserError(f"reward: the rollout has {len(rollout)} rows, the texts {len(texts)}")
        awaited = [term for term in self.terms if term.is_async]
        with ThreadPoolExecutor(max_workers=1) as thread:
            # A thread of its own: the caller may sit inside a running event loop (notebooks).
            gathered: Future[list[Any]] | None = (
                thread.submit(asyncio.run, self._gather(awaited, rollout, texts)) if awaited else None
            )
            scored = {term.name: _timed(term, rollout, texts, self.vocabulary) for term in self.terms if not term.is_async}
            if gathered is not None:
                scored |= dict(zip((term.name for term in awaited), gathered.result(), strict=True))
        return self._sum(rollout, scored)

    async def _gather(self, terms: Sequence[RewardTerm], rollout: Rollout, texts: Texts) -> list[Any]:
        async def one(term: RewardTerm) -> tuple[Scores, float]:
            started = time.perf_counter()
            return await term.score(rollout, texts, self.vocabulary), time.perf_counter() - started

        return await asyncio.gather(*(one(term) for term in terms))

    def _sum(self, rollout: Rollout, scored: Mapping[str, tuple[Scores, float]]) -> Scores:
        sequence_B = torch.zeros(len(rollout), dtype=torch.float64, device=rollout.device)
        dense_BR: Tensor | None = None
        applies_B = torch.zeros_like(sequence_B, dtype=torch.bool)
        parts: dict[str, Tensor] = {}
        seconds: dict[str, float] = {}
        fallbacks: dict[str, int] = {}
        metrics: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        screened_B: Tensor | None = None
        for term in self.terms:
            scores, seconds[term.name] = scored[term.name]
            _check(term, scores, rollout)
            scores = scores.to(rollout.device)
            values_B = term.shape(scores.total_B) if term.shape is not None else scores.total_B
            parts[term.name] = values_B
            if term.shape is not None:
                parts[f"{term.name}.raw"] = scores.total_B
            parts |= {f"{term.name}.{inner}": values for inner, values in scores.parts.items()}
            if sum(scores.fallbacks.values()):
                fallbacks[term.name] = sum(scores.fallbacks.values())
            metrics |= {f"{term.name}/{name}": values for name, values in scores.metrics.items()}
            extra |= {f"{term.name}/{column}": values for column, values in scores.extra.items()}
            if scores.screened_B is not None:
                screened_B = scores.screened_B if screened_B is None else screened_B | scores.screened_B
            applies_B |= ~values_B.isnan()
            if scores.tokens_BR is None:
                sequence_B = sequence_B + term.weight * values_B.double().nan_to_num(nan=0.0)
            else:
                weighted_BR = term.weight * scores.per_token(rollout).double()
                dense_BR = weighted_BR if dense_BR is None else dense_BR + weighted_BR
        tokens_BR = None if dense_BR is None else (dense_BR + on_last_action(sequence_B, rollout)).float()
        total_B = (sequence_B if dense_BR is None else sequence_B + dense_BR.sum(1)).float()
        bad = torch.nonzero(~total_B.isfinite()).flatten().tolist()
        if bad:
            raise UserError(
                f"reward: {row_name(rollout, bad[0])} has the total {total_B[bad[0]].item()}; weights or values are too large"
            )
        if not self.leaves_out:
            _refuse_unscored_rows(applies_B, rollout)
        weights = {term.name: term.weight for term in self.terms}
        return Scores(
            total_B.where(applies_B, torch.nan), parts, tokens_BR, seconds, fallbacks, metrics, extra, weights, screened_B
        )

    # -- what a checkpoint keeps, and the end -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of running normalisations and of what terms remember; empty without any."""
        return {name: kept.state_dict() for name, kept in self._kept().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        missing = sorted(set(self.state_dict()) ^ set(state))
        if missing:
            raise UserError(f"reward: the saved state and this job differ in the normalised part(s) {', '.join(missing)}")
        for name, kept in self._kept().items():
            kept.load_state_dict(state[name])

    def close(self) -> None:
        """End the worker processes that time limits need."""
        for term in self.terms:
            term.close()


def _timed(term: RewardTerm, rollout: Rollout, texts: Texts, vocabulary: str | None) -> tuple[Scores, float]:
    started = time.perf_counter()
    return term.score(rollout, texts, vocabulary), time.perf_counter() - started


def _check(term: RewardTerm, scores: Scores, rollout: Rollout) -> None:
    """A row per row, no infinity, and tokens that fit the rollout."""
    if not isinstance(scores, Scores):
        raise UserError(f"{term.where}: expected Scores, found {type(scores).__name__}")
    if len(scores) != len(rollout):
        raise UserError(f"{term.where}: gave {len(scores)} scores for {len(rollout)} rows; give one per row")
    bad = torch.nonzero(scores.total_B.isinf()).flatten().tolist()
    if bad:
        raise UserError(
            f"{term.where}: {row_name(rollout, bad[0])} scored {scores.total_B[bad[0]].item()}; scores must be finite"
        )
    if scores.tokens_BR is None:
        return
    if term.shape is not None:
        raise UserError(f"{term.where}: gives a reward per token, which `normalise` and `clip` do not change; leave them out")
    if scores.tokens_BR.shape != rollout.response_BR.shape:
        expected, shape = tuple(rollout.response_BR.shape), tuple(scores.tokens_BR.shape)
        raise UserError(f"{term.where}: tokens_BR has shape {shape}, the responses {expected}; give one number per token")
    refuse_rewards_of_fed(scores.tokens_BR, rollout, term.where)
    real_BR = torch.where(rollout.action_mask_BR, scores.tokens_BR, 0.0)
    bad = torch.nonzero(~real_BR.isfinite().all(1)).flatten().tolist()
    if bad:
        raise UserError(f"{term.where}: {row_name(rollout, bad[0])} has a reward per token that is not finite")


def _refuse_unscored_rows(applies_B: Tensor, rollout: Rollout) -> None:
    unscored = torch.nonzero(~applies_B).flatten().tolist()
    if unscored:
        names = ", ".join(row_name(rollout, index) for index in unscored[:3]) + (", ..." if len(unscored) > 3 else "")
        raise UserError(
            f"reward: no part applies to {len(unscored)} of {len(rollout)} rows ({names}): each gave None there; "
            "leave such rows out of the data, or add a part that scores every row"
        )
