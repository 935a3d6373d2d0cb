"""Scores, what a reward gives; the Reward protocol; what a step's scores say in the log.

A reward is anything callable `reward(rollout, texts) -> Scores`. A part that does not apply to a row (a function gave
None) is NaN in `parts`, adds nothing to that row's total and is left out of the part's mean; a row to which no part
applies is refused by name.
"""

from __future__ import annotations

import logging
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from steerl.rollout.common.errors import UserError, visible
from steerl.rollout.types import Rollout, Texts, row_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """One number per row, the named parts it is made of and, for dense rewards, what each action earned."""

    total_B: Tensor
    """float32, finite. Where tokens_BR is given: its sum over the row."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """(B,) float32 each, before weighting; NaN where a part does not apply. `<part>.raw`: before normalisation, too."""
    tokens_BR: Tensor | None = None
    """The whole reward, at the place of each action in the response; 0 at what was fed and beyond a row's end. None: the total
    sits on the last action."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that each part took."""
    fallbacks: dict[str, int] = field(default_factory=dict)
    """Rows of each part that raised, hung or gave no number and got the part's `fallback` instead."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """`<part>/<name>`: numbers that functions gave to `log_metric`; their mean over all rows and ranks is logged."""
    extra: dict[str, list[object]] = field(default_factory=dict)
    """`<part>/<column>`: what functions gave to `log_extra`, a value per row; None where there is none."""
    weights: dict[str, float] = field(default_factory=dict)
    """Of the parts whose weighted sum the total is; empty where it is none, or not known."""
    screened_B: Tensor | None = None
    """bool: rows that nothing is to be learned from; None where none are looked for."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "total_B", _column("total_B", self.total_B, None))
        rows = len(self.total_B)
        object.__setattr__(self, "parts", {visible(str(n)): _column(f"parts[{n!r}]", v, rows) for n, v in self.parts.items()})
        object.__setattr__(self, "weights", {visible(str(n)): float(weight) for n, weight in self.weights.items()})
        if unknown := [name for name in self.weights if name not in self.parts]:
            raise UserError(f"Scores.weights: {', '.join(unknown)}: no such part among {list(self.parts)}")
        screened = self.screened_B
        if screened is not None and not (
            isinstance(screened, Tensor) and screened.dtype == torch.bool and len(screened) == rows
        ):
            raise UserError(f"Scores.screened_B: expected a tensor of {rows} bools, found {screened!r:.80}")
        if self.tokens_BR is not None:
            tokens = self.tokens_BR
            if not isinstance(tokens, Tensor) or tokens.dim() != 2 or len(tokens) != rows:
                found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
                raise UserError(f"Scores.tokens_BR: expected a tensor of shape ({rows}, R), found {found}")
            object.__setattr__(self, "tokens_BR", tokens.float())

    def __len__(self) -> int:
        return len(self.total_B)

    def per_token(self, rollout: Rollout) -> Tensor:
        """(B, R): what each action earned; a total without tokens sits on the last action. Empty rows earn nothing."""
        if self.tokens_BR is not None:
            return torch.where(rollout.action_mask_BR, self.tokens_BR, torch.zeros_like(self.tokens_BR))
        return on_last_action(self.total_B, rollout)

    def to(self, device: torch.device | str) -> Scores:
        return Scores(
            self.total_B.to(device),
            {name: values.to(device) for name, values in self.parts.items()},
            None if self.tokens_BR is None else self.tokens_BR.to(device),
            self.seconds,
            self.fallbacks,
            self.metrics,
            self.extra,
            self.weights,
            None if self.screened_B is None else self.screened_B.to(device),
        )

    def select(self, rows: Sequence[int]) -> Scores:
        """Some rows, in this order. What was logged or counted of a call stays as it is."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.total_B.device)
        return replace(
            self,
            total_B=self.total_B[index],
            parts={name: values[index] for name, values in self.parts.items()},
            tokens_BR=None if self.tokens_BR is None else self.tokens_BR[index],
            extra={name: [values[row] for row in rows] if values else values for name, values in self.extra.items()},
            screened_B=None if self.screened_B is None else self.screened_B[index],
        )

    @staticmethod
    def join(parts: Sequence[Scores]) -> Scores:
        """The rows of all, one after another; tokens as wide as the widest. Parts that some lack are NaN there."""
        names = dict.fromkeys(name for scores in parts for name in scores.parts)
        some = [scores for scores in parts if len(scores)]
        dense = [scores.tokens_BR for scores in some if scores.tokens_BR is not None]
        if dense and len(dense) < len(some):
            raise UserError("reward: a reward per token came for some rows only; give it for all rows, or for none")
        width = max((tokens_BR.shape[1] for tokens_BR in dense), default=0)
        return Scores(
            torch.cat([scores.total_B for scores in parts]),
            {n: torch.cat([s.parts.get(n, torch.full_like(s.total_B, math.nan)) for s in parts]) for n in names},
            torch.cat([pad(tokens_BR, (0, width - tokens_BR.shape[1])) for tokens_BR in dense]) if dense else None,
            {n: max(s.seconds.get(n, 0.0) for s in parts) for n in dict.fromkeys(n for s in parts for n in s.seconds)},
            {n: sum(s.fallbacks.get(n, 0) for s in parts) for n in dict.fromkeys(n for s in parts for n in s.fallbacks)},
            joined_metrics([scores.metrics for scores in parts]),
            joined_extra([scores.extra for scores in parts], [len(scores) for scores in parts]),
            {name: weight for scores in parts for name, weight in scores.weights.items()},
            joined_screened(parts),
        )


@runtime_checkable
class Reward(Protocol):
    """What a job needs: `total_B` in the order of the rollout's rows."""

    def __call__(self, rollout: Rollout, texts: Texts) -> Scores: ...


def on_last_action(values_B: Tensor, rollout: Rollout) -> Tensor:
    """(B, R) with `values_B` on each row's last action (the stop token, or the last token of a cut row), 0 elsewhere."""
    return torch.where(last_of(rollout.action_mask_BR), values_B.to(rollout.device)[:, None], 0.0)


def last_of(mask_BR: Tensor) -> Tensor:
    """The last place of each row under the mask."""
    return mask_BR & (mask_BR.flip(1).cumsum(1).flip(1) == 1)


@dataclass(frozen=True)
class TurnRewards:
    """What a reward function may return instead of a number per row: what each of the policy's turns earned.

    Two rows, of two turns and of one: `TurnRewards([[0.5, 1.0], [0.0]])`. A number sits on its turn's last action, and a row's
    total is the sum of its numbers; None for a row to which the term does not apply."""

    rows: Sequence[Sequence[float] | Failure | None]


Turns = list[list[tuple[int, int]]]


def turns_of(rollout: Rollout, texts: Texts) -> Turns:
    """Of each row the policy's turns, (first, one past the last): as its environment heard them, else the runs of actions."""
    if texts.episodes is None:
        return rollout.turns
    return [[(turn.first, turn.end) for turn in episode.turns] for episode in texts.episodes]


def on_turns(rewards: Sequence[Sequence[float]], rollout: Rollout, where: str = "reward", turns: Turns | None = None) -> Tensor:
    """(B, R) with each row's numbers on the last actions of its turns (`rollout.turns`), one for each turn; 0 elsewhere.

    action_mask_BR   1 1 0 0 1     [0.5, 1.0]  -->   . 0.5 . . 1.0
    """
    _one_per_row(len(rewards), rollout, where)
    values_BR = torch.zeros(rollout.response_BR.shape, device=rollout.device)
    for row, (numbers, places) in enumerate(zip(rewards, rollout.turns if turns is None else turns, strict=True)):
        if len(numbers) != len(places):
            found = f"{len(numbers)} numbers for {len(places)} turns"
            raise UserError(f"{where}: {row_name(rollout, row)}: gave {found}; give one for each run of its actions")
        for number, (_, end) in zip(numbers, places, strict=True):
            values_BR[row, end - 1] = number
    return values_BR


def refuse_rewards_of_fed(tokens_BR: Tensor, rollout: Rollout, where: str) -> None:
    """A tool's result or a later user turn is not the policy's to be rewarded for."""
    wrong_BR = rollout.extent_BR & ~rollout.action_mask_BR & (tokens_BR.to(rollout.device) != 0)
    if bool(wrong_BR.any()):
        row, place = wrong_BR.nonzero()[0].tolist()
        found = f"earns {tokens_BR[row, place].item():.6g} at token {place}, which the policy did not draw"
        raise UserError(f"{where}: {row_name(rollout, row)} {found}; rewards belong where rollout.action_mask_BR is true")


def missing_stop_penalty(ended_B: Tensor, penalty: float) -> Tensor:
    """What is added to the total of each row: -penalty where it was cut at the limit, 0 where it stopped by itself."""
    return torch.where(ended_B, 0.0, -float(penalty))


def overlong_penalty(actions_B: Tensor, limit: int, buffer: int) -> Tensor:
    """The same for long rows (DAPO's soft overlong punishment): 0 up to limit - buffer actions, then falling evenly, -1 from
    the limit on."""
    return (limit - buffer - actions_B).clamp(-buffer, 0).float() / buffer


def has_ids(rollout: Rollout) -> bool:
    """Whether the rows were sampled. Texts that were not (`reward.texts`) come in a rollout of width 0."""
    return rollout.prompt_width + rollout.response_width > 0


def _column(name: str, values: object, rows: int | None) -> Tensor:
    if not isinstance(values, Tensor) or values.dim() != 1 or (rows is not None and len(values) != rows):
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise UserError(f"Scores.{name}: expected a tensor of shape ({'B' if rows is None else rows},), found {found}")
    return values.detach().float()


# -- numbers that terms hand in -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """Why a row has no score."""

    reason: str


def settle(values: Sequence[object], rollout: Rollout, where: str, fallback: float | None) -> Scores:
    """One number per row out of what was handed in: a number; None (does not apply); a Failure or no number (fallback)."""
    _one_per_row(len(values), rollout, where)
    settled: list[float] = []
    failed: list[str] = []
    for index, value in enumerate(values):
        number, reason = _number(value)
        if reason:
            failed.append(f"{row_name(rollout, index)}: {visible(reason)}")
            number = math.nan if fallback is None else fallback
        settled.append(number)
    if failed and fallback is None:
        more = f" (and {len(failed) - 1} more of {len(values)} rows)" if len(failed) > 1 else ""
        raise UserError(f"{where}: {failed[0]}{more}; fix it, or set `fallback` to the score that such rows are to get")
    if failed:
        shown = "; ".join(failed[:3]) + ("; ..." if len(failed) > 3 else "")
        logger.warning("%s: %d of %d rows got the fallback %s: %s", where, len(failed), len(values), fallback, shown)
    total_B = torch.tensor(settled, dtype=torch.float64).float()
    return Scores(total_B.to(rollout.device), fallbacks={"": len(failed)} if failed else {})


def settle_turns(given: TurnRewards, rollout: Rollout, where: str, fallback: float | None, turns: Turns) -> Scores:
    """The same for rewards of turns: a row with a turn that has no number gets the fallback, on its last action."""
    _one_per_row(len(given.rows), rollout, where)
    totals: list[object] = []
    numbers: list[list[float]] = []
    for row, places in zip(given.rows, turns, strict=True):
        if row is None or isinstance(row, Failure):
            totals.append(row)
            numbers.append([0.0] * len(places))
            continue
        pairs = [_number(value) if value is not None else (math.nan, "gave None for a turn") for value in row]
        reason = next((reason for _, reason in pairs if reason), "")
        totals.append(Failure(reason) if reason else math.fsum(number for number, _ in pairs))
        numbers.append([0.0 if reason else number for number, _ in pairs])
    tokens_BR = on_turns(numbers, rollout, where, turns)
    settled = settle(totals, rollout, where, fallback)
    failed_B = torch.tensor([isinstance(total, Failure) for total in totals], dtype=torch.bool, device=rollout.device)
    return replace(settled, tokens_BR=torch.where(failed_B[:, None], on_last_action(settled.total_B, rollout), tokens_BR))


def _one_per_row(count: int, rollout: Rollout, where: str) -> None:
    if count != len(rollout):
        found = f"{count} scores" if count < len(rollout) else "more scores than one per row"
        raise UserError(f"{where}: gave {found} for {len(rollout)} rows; give one per row")


def _number(value: object) -> tuple[float, str]:
    """(number, "") or (nan, why it is none). NaN with no reason: the part does not apply to the row."""
    if isinstance(value, Failure):
        return math.nan, value.reason
    if value is None:
        return math.nan, ""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return math.nan, f"gave {brief(value)}, not a number"
    try:
        number = float(value)
    except Exception:  # noqa: BLE001  an object of the user's own may raise anything
        return math.nan, f"gave {type(value).__name__}, not one number"
    if not abs(number) <= torch.finfo(torch.float32).max:  # NaN too
        return math.nan, f"gave {number}"
    return number, ""


def brief(value: object) -> str:
    """A value in a few words, however large it is or deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return short.repr(value)


# -- what is logged -----------------------------------------------------------------------------------------------------


def metrics(scores: Sequence[Scores]) -> dict[str, float]:
    """What is logged of a step's scores, all ranks' together: `reward/<part>` is the mean over the rows it applies to."""
    logged = _moments("reward", torch.cat([s.total_B.cpu() for s in scores]), mean="reward/mean")
    for name in dict.fromkeys(name for s in scores for name in s.parts):
        values = torch.cat([s.parts[name].cpu() for s in scores if name in s.parts])
        logged |= _moments(f"reward/{name}", values[~values.isnan()], mean=f"reward/{name}")
        skipped = int(values.isnan().sum())
        if skipped:
            logged[f"reward/{name}_not_applicable"] = float(skipped)
    for name in dict.fromkeys(name for s in scores for name in s.fallbacks):
        logged[f"reward/{name}_fallbacks"] = float(sum(s.fallbacks.get(name, 0) for s in scores))
    logged |= mean_metrics(joined_metrics([s.metrics for s in scores]), "reward")
    for name in dict.fromkeys(name for s in scores for name in s.seconds):
        logged[f"time/reward_{name}_s"] = max(s.seconds.get(name, 0.0) for s in scores)
    return logged


def joined_screened(parts: Sequence[Scores]) -> Tensor | None:
    """The rows' marks one after another; None where nobody looked for any."""
    if all(scores.screened_B is None for scores in parts):
        return None
    return torch.cat([torch.zeros_like(s.total_B, dtype=torch.bool) if s.screened_B is None else s.screened_B for s in parts])


def joined_metrics(calls: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """All numbers that were logged under each name."""
    names = dict.fromkeys(name for call in calls for name in call)
    return {name: [value for call in calls for value in call.get(name, [])] for name in names}


def joined_extra(calls: Sequence[Mapping[str, list[object]]], rows: Sequence[int]) -> dict[str, list[object]]:
    """The columns one after the other; None for the rows of a call that has not logged it."""
    names = dict.fromkeys(name for call in calls for name in call)
    return {
        name: [value for call, count in zip(calls, rows, strict=True) for value in call.get(name, [None] * count)]
        for name in names
    }


def mean_metrics(logged: Mapping[str, list[float]], prefix: str) -> dict[str, float]:
    return {f"{prefix}/{name}": math.fsum(values) / len(values) for name, values in logged.items() if values}


def _moments(name: str, values: Tensor, mean: str) -> dict[str, float]:
    if not len(values):
        return {}
    values = values.double()
    spread = f"{name}/std" if name == "reward" else f"{name}_std"
    return {mean: values.mean().item(), spread: values.std(correction=0).item()}
