"""A model run in which things are read or set at positions: what `intervene` puts into its frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from steerl.rollout.common.errors import UserError
from steerl.rollout.model.hooks import Arguments, Frame
from steerl.rollout.steering.core import operations, positions
from steerl.rollout.steering.interventions.plan import Planned
from torch import Tensor

if TYPE_CHECKING:
    from steerl.rollout.steering.interventions.intervene import Job


class Pass:
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
        times = rows // mask.shape[0]
        index = positions.real_index(mask, first, width)
        call = (first, width, mask.shape[1], mask.sum(1), index, times)
        frame.calls[self, stack] = frame.calls[self, ""] = call

    def closed(self, frame: Frame, stack: str) -> None:
        self.ran += 1

    def goes_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return False


def _columns(units: Tensor, index_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Column of each (row, unit) in this call, -1 where it is not in it."""
    match = (index_BT[:, None, :] == units[:, :, None]) & real_BT[:, None, :]
    return torch.where(match.any(-1), match.int().argmax(-1), torch.full_like(units, -1))


def _as_batch(hidden: Tensor, width: int, columns: tuple[int, ...] | None) -> Tensor:
    if hidden.dim() == 2:
        hidden = hidden.reshape(-1, width, hidden.shape[-1])
    return hidden if columns is None else hidden[..., list(columns)]


class Read:
    """Keeps a source's activation at its positions, (B, units, D)."""

    def __init__(self, watch: Pass, plan: Planned, units: Tensor | None, into: dict[int, Tensor]):
        self.watch, self.plan, self.units, self.into = watch, plan, units, into

    def __call__(self, frame: Frame, hidden: Tensor) -> Tensor:
        _, width, _, _, (index_BT, real_BT), _ = frame.calls[self.watch, self.plan.point.stack]
        part = _as_batch(hidden, width, self.plan.point.columns)
        if self.units is not None:
            columns = _columns(self.units, index_BT, real_BT)
            part = part.gather(1, columns[:, :, None].expand(-1, -1, part.shape[-1]))
        self.into[self.plan.number] = part
        return hidden


class Set:
    """Edits the pass at its positions: prompt units, and response steps in generate."""

    def __init__(self, job: Job, watch: Pass, plan: Planned, base: bool):
        self.job, self.watch, self.plan, self.is_base = job, watch, plan, base

    def _spread(self, call: Any, like: Tensor) -> tuple[Tensor | None, Tensor]:
        """(source at every column, which columns are edited) for this call."""
        first, width, prompt, lengths, (index_BT, real_BT), times = call
        plan, source = self.plan, self.plan.source
        device = like.device
        units = plan.units
        inside = real_BT & (index_BT < lengths[:, None])
        if not self.job.prompt and self.is_base:
            mask_BT = torch.zeros_like(inside)
        elif units is None:
            mask_BT = inside
        else:
            mask_BT = inside & (index_BT[:, :, None] == units[:, None, :]).any(-1)
        if self.is_base and self.job.steps not in ("none",):
            step_BT = index_BT - (lengths[:, None] - 1)
            mask_BT = mask_BT | (real_BT & positions.select_steps(self.job.steps, step_BT))
        if source is None:
            return None, mask_BT
        source = source.to(device)
        if source.shape[1] == 1:
            return source, mask_BT
        if units is None:
            if source.shape[1] != width:
                raise UserError(
                    f"interventions[{plan.number}]: the source has {source.shape[1]} positions and this pass {width}; "
                    "give unit_locations"
                )
            return source, mask_BT
        if source.shape[1] != units.shape[1]:
            raise UserError(
                f"interventions[{plan.number}]: {source.shape[1]} source positions for {units.shape[1]} base positions"
            )
        at = (index_BT[:, :, None] == units[:, None, :]).int().argmax(-1)
        spread = source.expand(units.shape[0], -1, -1).gather(1, at[:, :, None].expand(-1, -1, source.shape[-1]).to(device))
        return spread, mask_BT

    def __call__(self, frame: Frame, hidden: Tensor) -> Tensor:
        call = frame.calls[self.watch, self.plan.point.stack]
        times, width = call[5], call[1]
        whole = _as_batch(hidden, width, None)
        part = whole if self.plan.point.columns is None else whole[..., list(self.plan.point.columns)]
        source, mask_BT = self._spread(call, hidden)
        if times > 1:
            source = None if source is None else source.expand(call[3].shape[0], -1, -1).repeat_interleave(times, 0)
            mask_BT = mask_BT.repeat_interleave(times, 0)
        mask = mask_BT[..., None].to(hidden.device)
        coordinates = self.plan.coordinates
        if times > 1 and coordinates and isinstance(coordinates[0], list):
            coordinates = [row for row in coordinates for _ in range(times)]
        if self.plan.collects:
            self._collect(part, mask_BT, coordinates)
            return hidden
        edited = self.plan.apply(part, source, coordinates)
        strength = self._strength(call, part)
        if strength is not None:
            edited = torch.where(strength == 1, edited, (part + strength * (edited - part)).to(part.dtype))
            mask = mask & (strength != 0)
        edited = torch.where(mask, edited, part)
        if self.plan.point.columns is not None:
            edited = whole.index_copy(-1, torch.tensor(self.plan.point.columns, device=whole.device), edited)
        return edited.reshape(hidden.shape)

    def _strength(self, call: Any, part: Tensor) -> Tensor | None:
        strength, ramp = self.job.strength, self.job.ramp
        if not self.is_base or (isinstance(strength, int | float) and strength == 1 and ramp is None):
            return None
        table = torch.as_tensor(strength, dtype=torch.float32, device=part.device).reshape(-1)
        if table.shape[0] not in (1, call[3].shape[0]):
            raise UserError(f"strength: expected one number or one per example ({call[3].shape[0]}), found {table.shape[0]}")
        rows = table.expand(call[3].shape[0])[:, None]
        if ramp is not None:
            step_BT = call[4][0] - (call[3][:, None] - 1)
            rows = rows * positions.ramp_factors(ramp, step_BT).to(part.device)
        return rows.repeat_interleave(call[5], 0)[..., None]

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
        self.job.collected.setdefault(self.plan.number, []).append(taken)
