"""A model run in which things are read or set at positions: what `intervene` puts into its frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.common.errors import UserError
from steerl.rollout.model.hooks import Arguments, Frame
from steerl.rollout.steering.core import operations, positions
from steerl.rollout.steering.core.places import Ramp
from steerl.rollout.steering.interventions.plan import Planned


@dataclass(frozen=True)
class PassCall:
    """One call of a stack in a run: its columns, among the real positions of the run's examples (B)."""

    width: int
    lengths_B: Tensor
    index_BT: Tensor
    real_BT: Tensor
    times: int
    """Rows of the call per example: beams, return sequences."""


@dataclass(frozen=True)
class Rules:
    """Where and how strongly a run is edited beside the positions of each intervention. A source's has none of its own."""

    prompt: bool = True
    steps: object = "none"
    strength: float | Tensor = 1.0
    ramp: Ramp | None = None


class InterventionPass:
    """Reader of one model run: knows each call's columns; hands edits the positions."""

    def __init__(self, masks: dict[str, Tensor]):
        self.masks = masks
        self.ran = 0

    def opened(self, frame: Frame, stack: str, arguments: Arguments) -> None:
        rows, width = arguments.shape()
        first = 0 if stack == "encoder" else arguments.seen(width)
        mask = self.masks[stack]
        if rows % mask.shape[0]:
            raise UserError(f"the model was called with {rows} rows, and the base has {mask.shape[0]}")
        call = PassCall(width, mask.sum(1), *positions.real_index(mask, first, width), rows // mask.shape[0])
        frame.calls[self, stack] = frame.calls[self, ""] = call

    def closed(self, frame: Frame, stack: str) -> None:
        self.ran += 1

    def goes_on(self, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        return False


def _as_batch(hidden: Tensor, width: int) -> Tensor:
    return hidden.reshape(-1, width, hidden.shape[-1]) if hidden.dim() == 2 else hidden


class Read:
    """Keeps a source's activation at its positions, (B, units, D)."""

    def __init__(self, run: InterventionPass, plan: Planned, units: Tensor | None, into: dict[int, Tensor]):
        self.run, self.plan, self.units, self.into = run, plan, units, into

    def __call__(self, frame: Frame, hidden: Tensor) -> Tensor:
        call: PassCall = frame.calls[self.run, self.plan.point.stack]
        part = _as_batch(hidden, call.width)
        if self.plan.point.columns is not None:
            part = part[..., list(self.plan.point.columns)]
        if self.units is not None:
            match = (call.index_BT[:, None, :] == self.units[:, :, None]) & call.real_BT[:, None, :]
            columns = torch.where(match.any(-1), match.int().argmax(-1), torch.full_like(self.units, -1))
            part = part.gather(1, columns[:, :, None].expand(-1, -1, part.shape[-1]))
        self.into[self.plan.number] = part
        return hidden


class Set:
    """Edits the pass at its positions: prompt units, and response steps in generate."""

    def __init__(self, run: InterventionPass, plan: Planned, rules: Rules, collected: dict[int, list[Tensor]]):
        self.run, self.plan, self.rules, self.collected = run, plan, rules, collected

    def _spread(self, call: PassCall, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """(source at every column, which columns are edited) for this call."""
        plan, source, units = self.plan, self.plan.source, self.plan.units
        mask_BT = call.real_BT & (call.index_BT < call.lengths_B[:, None])
        if not self.rules.prompt:
            mask_BT = torch.zeros_like(mask_BT)
        elif units is not None:
            mask_BT = mask_BT & (call.index_BT[:, :, None] == units[:, None, :]).any(-1)
        if self.rules.steps != "none":
            step_BT = call.index_BT - (call.lengths_B[:, None] - 1)
            mask_BT = mask_BT | (call.real_BT & positions.select_steps(self.rules.steps, step_BT))
        if source is None:
            return None, mask_BT
        source = source.to(device)
        if source.shape[1] == 1:
            return source, mask_BT
        if units is None:
            if source.shape[1] != call.width:
                raise UserError(
                    f"interventions[{plan.number}]: the source has {source.shape[1]} positions and this pass {call.width}; "
                    "give unit_locations"
                )
            return source, mask_BT
        if source.shape[1] != units.shape[1]:
            raise UserError(
                f"interventions[{plan.number}]: {source.shape[1]} source positions for {units.shape[1]} base positions"
            )
        at = (call.index_BT[:, :, None] == units[:, None, :]).int().argmax(-1)
        spread = source.expand(units.shape[0], -1, -1).gather(1, at[:, :, None].expand(-1, -1, source.shape[-1]).to(device))
        return spread, mask_BT

    def __call__(self, frame: Frame, hidden: Tensor) -> Tensor:
        call: PassCall = frame.calls[self.run, self.plan.point.stack]
        whole, point = _as_batch(hidden, call.width), self.plan.point
        part = whole if point.columns is None else whole[..., list(point.columns)]
        source, mask_BT = self._spread(call, hidden.device)
        coordinates = self.plan.coordinates
        if call.times > 1:
            source = None if source is None else source.expand(len(call.lengths_B), -1, -1).repeat_interleave(call.times, 0)
            mask_BT = mask_BT.repeat_interleave(call.times, 0)
            if coordinates and isinstance(coordinates[0], list):
                coordinates = [row for row in coordinates for _ in range(call.times)]
        mask = mask_BT[..., None].to(hidden.device)
        if self.plan.collects:
            self._collect(part, mask_BT, coordinates)
            return hidden
        edited = self.plan.apply(part, source, coordinates)
        strength = self._strength(call, part)
        if strength is not None:
            edited = torch.where(strength == 1, edited, (part + strength * (edited - part)).to(part.dtype))
            mask = mask & (strength != 0)
        edited = torch.where(mask, edited, part)
        if point.columns is not None:
            edited = whole.index_copy(-1, torch.tensor(point.columns, device=whole.device), edited)
        return edited.reshape(hidden.shape)

    def _strength(self, call: PassCall, part: Tensor) -> Tensor | None:
        """(rows, columns, 1), or None where it is 1 everywhere."""
        strength, ramp, count = self.rules.strength, self.rules.ramp, len(call.lengths_B)
        if isinstance(strength, int | float) and strength == 1 and ramp is None:
            return None
        given = torch.as_tensor(strength, dtype=torch.float32, device=part.device).reshape(-1)
        if given.shape[0] not in (1, count):
            raise UserError(f"strength: expected one number or one per example ({count}), found {given.shape[0]}")
        strength_BT = given.expand(count)[:, None]
        if ramp is not None:
            step_BT = call.index_BT - (call.lengths_B[:, None] - 1)
            strength_BT = strength_BT * positions.ramp_factors(ramp, step_BT).to(part.device)
        return strength_BT.repeat_interleave(call.times, 0)[..., None]

    def _collect(self, part: Tensor, mask_BT: Tensor, coordinates: Any) -> None:
        counts = mask_BT.sum(1)
        if not bool(counts.any()):
            return
        values = operations.collect(part, None, coordinates)
        if bool((counts == counts[0]).all()):
            taken = values[mask_BT.to(values.device)].reshape(part.shape[0], int(counts[0]), -1)
            if (
                self.plan.units is not None
                and self.plan.units.shape[1] == taken.shape[1]
                and taken.shape[0] == self.plan.units.shape[0]
            ):
                order = self.plan.units.argsort(1).argsort(1).to(taken.device)  # in the order in which they were asked for
                taken = taken.gather(1, order[:, :, None].expand_as(taken))
        else:
            widest = int(counts.max())
            taken = values.new_zeros(part.shape[0], widest, values.shape[-1])
            for row in range(part.shape[0]):
                taken[row, : int(counts[row])] = values[row][mask_BT[row].to(values.device)]
        self.collected.setdefault(self.plan.number, []).append(taken)
