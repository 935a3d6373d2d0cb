"""A Steering at work: calls noted, sites edited, edits counted.

Active      one context: makes a Call when a stack is entered, checks it when it is left; `select` follows the batch
SiteEdit    one site at one layer, handed to the hook of its point
Kept        what it comes to where every decode step is edited alike: one tensor to add, until the rows change
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from steerl.rollout.common.errors import UserError
from steerl.rollout.model.hooks import Arguments, Edit, Frame
from steerl.rollout.steering.core import operations
from steerl.rollout.steering.core.structure import Point
from steerl.rollout.steering.rows import Call, Rows
from steerl.rollout.steering.selection import Selection, select
from torch import Tensor

if TYPE_CHECKING:
    from steerl.rollout.steering.sites import BoundSite
    from steerl.rollout.steering.steering import Steering


class Active:
    """A Steering at work in one context. `select` keeps it in line with a batch whose rows leave, move or multiply."""

    def __init__(self, steering: Steering, rows: Rows | None, make: Callable[[Tensor, Tensor | None], Rows], policy_step: int):
        self.steering, self.rows, self.policy_step = steering, rows, policy_step
        self._make, self._bare = make, rows is None
        self._left_away = 0
        self.calls = 0
        self.collected: dict[str, list[Collected]] = {}
        """By site: what `collect` sites read, one record per layer and call."""
        self._may_be_steady = all(site.steady and site.plain_add and site.gate is None for site in steering.sites)
        self._steady_for: tuple[Rows | None, tuple[int, int], int] = (None, (0, 0), 0)
        """Of the frame's steady edits: our rows then, the shape of a call's ids, and columns of the prompt."""

    def select(self, index: Tensor | Sequence[int]) -> None:
        """Keep the rows of `index`, in its order and with repeats, as the decode loop did with its cache."""
        if self.rows is not None:
            self.rows = self.rows.select(torch.as_tensor(index, dtype=torch.int64, device=self.rows.row_B.device))

    # -- told by the stack's hooks ---------------------------------------------------------------------------------------

    def opened(self, frame: Frame, stack: str, arguments: Arguments) -> None:
        count, width = arguments.shape()
        encoder = stack == "encoder"
        first = 0 if encoder else arguments.seen(width)
        if self._bare:
            self._adopt(stack, arguments, count, width, first)
        rows = self.rows
        assert rows is not None
        if not rows.count or count % rows.count:
            raise UserError(
                f"steering: the {stack} was called with {count} rows, and steering is active for {rows.count}; "
                "open the context with the batch's own rows (samples already repeated)"
            )
        if encoder and rows.encoder_mask_BP is not None and rows.encoder_mask_BP.shape[1] != width:
            raise UserError(
                f"steering: the encoder got {width} columns and the prompt mask has {rows.encoder_mask_BP.shape[1]}"
            )
        if not encoder and first == 0 and rows.lead:
            self._left_away = _left_away(rows, arguments, count)
        rows = rows.without(self._left_away if rows.lead else 0).times(count // rows.count)
        frame.calls[self, stack] = frame.calls[self, ""] = Call(rows, first, width, arguments.ids, encoder)
        self.calls += 1

    def closed(self, frame: Frame, stack: str) -> None:
        call = frame.calls.get((self, stack))
        if call is not None and not call.edits and self.steering.points_in(stack):
            raise UserError(
                "steering did not run: the model's forward passed its blocks without calling their hooks; a model compiled "
                "before Steering was made ignores them, so make Steering first, or use the model as it was before torch.compile"
            )
        if call is not None and self.steering.look is not None:
            self.steering.look(self, call, stack)
        elif call is not None and call.step is not None and self._may_be_steady:
            frame.steady = self._steady(frame, call)

    def _steady(self, frame: Frame, call: Call) -> dict[int, tuple[Edit, ...]] | None:
        """What the edits of this decode step come to, if the next ones are like it; None where they need to be asked."""
        found: dict[int, tuple[Edit, ...]] = {}
        for (module, io), edits in frame.points.items():
            for edit in edits:
                if not isinstance(edit, SiteEdit) or edit.active is not self or io != "output":
                    return None  # somebody else acts in this frame too, or before a module
                selection = call.selections.get(edit.number)
                if selection is None:
                    continue
                kept = None if selection.kept is None else selection.kept.get(edit.at)
                if kept is None:
                    return None
                found[module] = (*found.get(module, ()), kept)
        self._steady_for = (self.rows, (call.rows.count, 1), call.rows.width)
        return found

    def goes_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """One more column of the rows that the steady edits were made for."""
        rows, shape, width = self._steady_for
        ids, cache = kwargs.get("input_ids", args[0] if args else None), kwargs.get("past_key_values")
        if cache is None or ids is None or ids.shape != shape or self.rows is not rows or self.steering.look is not None:
            self._may_be_steady &= "cache_params" not in kwargs
            return False
        try:
            seen = cache.get_seq_length()
        except (AttributeError, ValueError):  # tuples, and states without a length: their calls are counted
            self._may_be_steady = False
            return False
        if seen < width:
            return False
        self.calls += 1
        return True

    def _adopt(self, stack: str, arguments: Arguments, count: int, width: int, first: int) -> None:
        """Without a prompt mask: the first call's input is the prompt, and so is that of every call with a fresh cache."""
        fresh = first == 0 and (self.rows is None or arguments.cache() is not None)
        if stack == "decoder" and self.steering.is_encoder_decoder:
            fresh = self.rows is None
        if not fresh and self.rows is not None:
            return
        mask = arguments.mask()
        if mask is None or mask.shape[1] != width:
            if arguments.kwargs.get("attention_mask") is not None and mask is None:
                raise UserError(
                    "steering: the attention mask is not one number per token; open the context with prompt_mask_BP"
                )
            device = next(a for a in (*arguments.args, *arguments.kwargs.values()) if isinstance(a, Tensor)).device
            mask = torch.ones((count, width), dtype=torch.bool, device=device)
        if self.steering.is_encoder_decoder:
            self.rows = self._make(mask.new_ones((count, 1)), mask if stack == "encoder" else None)
        else:
            self.rows = self._make(mask, None)

    def collect(self, site: BoundSite, at: int, hidden: Tensor, call: Call) -> None:
        """Note what a collecting site sees at its positions."""
        selection = call.selections[site.index]
        if selection is None:
            return
        mask_BT = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if selection.mask_BT1 is not None:
            mask_BT = selection.mask_BT1[:, -hidden.shape[1] :, 0].to(hidden.device)
        index_BT = call.index()[0][:, -hidden.shape[1] :].to(hidden.device)
        row_N = call.rows.row_B.to(hidden.device)[:, None].expand_as(mask_BT)[mask_BT]
        sample_N = call.rows.sample_B.to(hidden.device)[:, None].expand_as(mask_BT)[mask_BT]
        values = operations.collect(hidden, None, site.spec.op.coordinates)[mask_BT]
        record = Collected(site.points[at].layer, row_N, sample_N, index_BT[mask_BT], values)
        self.collected.setdefault(site.name, []).append(record)


def _left_away(rows: Rows, arguments: Arguments, count: int) -> int:
    """Columns of padding that the call lacks on the left: callers trim what all rows of a part share.

    Read off the attention mask of a call that starts a sequence; a call without one has no padding at all.
    """
    mask = arguments.mask()
    if mask is None and arguments.kwargs.get("attention_mask") is not None:
        return 0  # not one number per token: columns are taken to be the prompt mask's
    theirs = torch.zeros(count, dtype=torch.int64) if mask is None else (mask.cumsum(1) == 0).sum(1).cpu()
    mine = (rows.prompt_mask_BP.cumsum(1) == 0).sum(1).cpu().repeat_interleave(count // len(rows))
    away = mine - theirs
    if bool((away != away[0]).any()) or int(away[0]) < 0:
        raise UserError(
            f"steering: the prompt mask has {mine.tolist()} columns of padding on the left and the call's attention mask "
            f"{theirs.tolist()}; open the context with the mask of the batch that is run"
        )
    return int(away[0])


@dataclass(frozen=True)
class Collected:
    """What a collecting site read in one call: N (row, sample, real position) and their activations."""

    layer: int | None
    row_N: Tensor
    sample_N: Tensor
    position_N: Tensor
    values_ND: Tensor


class Kept:
    """An addition that holds from step to step."""

    __slots__ = ("mask_B11", "moved_B1D")

    def __init__(self, moved_B1D: Tensor, mask_B11: Tensor | None):
        self.moved_B1D, self.mask_B11 = moved_B1D, mask_B11

    def __call__(self, frame: Any, hidden: Tensor) -> Tensor:
        edited = hidden + self.moved_B1D
        return edited if self.mask_B11 is None else torch.where(self.mask_B11, edited, hidden)


class SiteEdit:
    """One site at one of its layers: what the hook of that point calls."""

    __slots__ = ("active", "at", "key", "number", "plain_add", "point", "site")

    def __init__(self, active: Active, site: BoundSite, at: int, point: Point):
        self.active, self.site, self.at, self.point = active, site, at, point
        self.key, self.number = (active, point.stack), site.index
        self.plain_add = site.plain_add and point.columns is None

    def __call__(self, frame: Frame, hidden: Tensor) -> Tensor:
        call: Call | None = frame.calls.get(self.key)
        if call is None:
            raise UserError(
                f"steering: site {self.site.name!r} was reached outside its model's forward; call the model, not the module"
            )
        call.edits += 1
        if self.number in call.selections:
            selection = call.selections[self.number]
        else:
            selection = call.selections[self.number] = select(self.site, call)
        if selection is None:
            return hidden
        if selection.kept is None or not self.plain_add or hidden.dim() != 3:
            return self._general(selection, call, hidden)
        kept = selection.kept.get(self.at)
        if kept is None or kept.moved_B1D.dtype != hidden.dtype or kept.moved_B1D.device != hidden.device:
            vector, mask = self.site.vector(self.at, hidden), selection.mask_BT1
            moved = (selection.strength_BT1.to(hidden.device) * vector).to(hidden.dtype)
            kept = selection.kept[self.at] = Kept(moved, None if mask is None else mask.to(hidden.device))
        return kept(frame, hidden)

    def _general(self, selection: Selection, call: Call, hidden: Tensor) -> Tensor:
        shape = hidden.shape
        batch = len(call.rows)
        if hidden.dim() == 2 and shape[0] == batch * call.width:
            hidden = hidden.reshape(batch, call.width, -1)
        if hidden.dim() != 3 or hidden.shape[0] != batch or hidden.shape[1] > call.width:
            raise UserError(
                f"site {self.site.name!r}: the activation has shape {tuple(shape)}, expected ({batch}, {call.width}, width); "
                "choose a module that sees every row and position"
            )
        strength, mask = selection.strength_BT1.to(hidden.device), selection.mask_BT1
        index_BT = call.index()[0] if self.site.spec.op.type == "noise" else None
        if hidden.shape[1] < call.width:  # an output head that keeps the last columns only
            cut = hidden.shape[1]
            strength = strength[:, -cut:]
            mask = None if mask is None else mask[:, -cut:]
            index_BT = None if index_BT is None else index_BT[:, -cut:]
        columns = None if self.point.columns is None else torch.tensor(self.point.columns, device=hidden.device)
        part = hidden if columns is None else hidden[..., columns]
        edited = self.site.apply(self.at, part, strength, selection.unit, self.active, call, index_BT)
        if mask is not None:
            edited = torch.where(mask.to(hidden.device), edited, part)
        if columns is not None:
            edited = hidden.index_copy(-1, columns, edited)
        return edited.reshape(shape)
