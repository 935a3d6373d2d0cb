"""Steering at work in a context: it owns the state of its passes, notes their calls, edits at the sites and counts the edits.

    stack's hook ──> Active.opened: a StackCall over the rows     module's hook ──> SiteEdit: selection, edit
                     Active.closed: did it run; is it steady                        GateReading: how open

Where every decode step is edited alike, it comes to a HeldAddition per module, until the rows change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.model.hooks import Arguments, Edit, Frame
from steerl.rollout.scoring.alignment import Packing
from steerl.rollout.steering.core import operations
from steerl.rollout.steering.core.structure import Stack
from steerl.rollout.steering.gates import BoundGate
from steerl.rollout.steering.selection import select
from steerl.rollout.steering.sites import BoundSite
from steerl.rollout.steering.state import HeldAddition, SiteSelection, StackCall, SteeredRows

MakeRows = Callable[[Tensor, Tensor | None], SteeredRows]
"""Rows of a decoder's prompt mask, and an encoder's where there is one."""
Look = Callable[["Active", StackCall, str], None]
"""Shown every call of a stack when it has run."""


class Active:
    """The passes of one context. `select` keeps the rows in line with a batch whose rows leave, move or multiply."""

    def __init__(
        self,
        sites: Sequence[BoundSite],
        rows: SteeredRows | None,
        make: MakeRows,
        is_encoder_decoder: bool,
        look: Look | None,
        packing: Packing | None = None,
    ):
        self.sites, self.rows, self.look, self.is_encoder_decoder = sites, rows, look, is_encoder_decoder
        self.packing = packing
        self.calls = 0
        self.collected: dict[str, list[Collected]] = {}
        """By site: what `collect` sites read, one record per layer and call."""
        self.left_away = 0
        """Columns of padding that calls lack on the left."""
        self._make, self._adopts = make, rows is None
        self._edited_stacks = {point.stack for site in sites for point in site.points}
        self._may_be_steady = look is None and all(site.steady and site.plain_add and site.gate is None for site in sites)
        self._steady: StackCall | None = None
        """The call that the frame's steady edits were made from; they hold for calls like it while the rows stay."""

    def frame(self, outer: Frame | None, stacks: Mapping[str, Stack]) -> Frame:
        """What the hooks are to do inside: in this order at each module."""
        frame = Frame(outer)
        for stack in stacks.values():
            frame.read(stack.module, self, stack.name)
        for site in self.sites:
            if site.gate is not None:
                frame.add(site.gate.point.module, "output", GateReading(self, site.gate))
        for site in self.sites:
            for at, point in enumerate(site.points):
                frame.add(point.module, point.io, SiteEdit(self, site, at))
        return frame

    def select(self, index: Tensor | Sequence[int]) -> None:
        """Keep the rows of `index`, in its order and with repeats, as the decode loop did with its cache."""
        if self.rows is not None:
            self.rows = self.rows.select(torch.as_tensor(index, dtype=torch.int64, device=self.rows.row_B.device))
            self._steady = None

    # -- told by the stack's hooks ---------------------------------------------------------------------------------------

    def opened(self, frame: Frame, stack: str, arguments: Arguments) -> None:
        count, width = arguments.shape()
        encoder = stack == "encoder"
        first = 0 if encoder else arguments.seen(width)
        if self._adopts:
            self._adopt(stack, arguments, count, width, first)
        rows = self.rows
        assert rows is not None
        if self.packing is not None:
            self._opened_packed(frame, stack, arguments, count, width)
            return
        if not rows.count or count % rows.count:
            raise ConfigError(
                f"steering: the {stack} was called with {count} rows, and steering is active for {rows.count}; "
                "open the context with the batch's own rows (samples already repeated)"
            )
        if encoder and rows.encoder_mask_BP is not None and rows.encoder_mask_BP.shape[1] != width:
            raise ConfigError(
                f"steering: the encoder got {width} columns and the prompt mask has {rows.encoder_mask_BP.shape[1]}"
            )
        if not encoder and first == 0 and rows.lead:
            self.left_away = _left_away(rows, arguments, count)
        rows = rows.without(self.left_away if rows.lead else 0).times(count // rows.count)
        frame.calls[self, stack] = frame.calls[self, ""] = StackCall(rows, first, width, arguments.ids, encoder)
        self.calls += 1

    def _opened_packed(self, frame: Frame, stack: str, arguments: Arguments, count: int, width: int) -> None:
        """A call of all rows in one: to the sites it has the rows' own columns."""
        packing, rows = self.packing, self.rows
        assert packing is not None and rows is not None
        assert (count, width) == (1, len(packing.column_N)), "another call than the one whose rows were packed"
        ids_BW = None if arguments.ids is None else packing.unpacked(arguments.ids[..., None])[..., 0]
        frame.calls[self, stack] = frame.calls[self, ""] = StackCall(
            rows, 0, packing.place_BW.shape[1], ids_BW, packing=packing
        )
        self.calls += 1

    def closed(self, frame: Frame, stack: str) -> None:
        call: StackCall | None = frame.calls.get((self, stack))
        if call is None:
            return
        if not call.edits and stack in self._edited_stacks:
            raise ConfigError(
                "steering did not run: the model's forward passed its blocks without calling their hooks; a model compiled "
                "before Steering was made ignores them, so make Steering first, or use the model as it was before torch.compile"
            )
        if self.look is not None:
            self.look(self, call, stack)
        elif call.step is not None and self._may_be_steady:
            frame.steady = self._steady_edits(frame, call)
            self._steady = call

    def _steady_edits(self, frame: Frame, call: StackCall) -> dict[int, tuple[Edit, ...]] | None:
        """What the edits of this decode step come to, if the next ones are like it; None where they need to be asked."""
        steady: dict[int, tuple[Edit, ...]] = {}
        for (module, io), edits in frame.points.items():
            for edit in edits:
                if not isinstance(edit, SiteEdit) or edit.active is not self or io != "output":
                    return None  # somebody else acts in this frame too, or before a module
                selection = call.selections.get(edit.site.index)
                if selection is None:
                    continue
                addition = call.rows.additions.get((edit.site.index, selection.factor, edit.at))
                if addition is None:
                    return None
                steady[module] = (*steady.get(module, ()), addition)
        return steady

    def goes_on(self, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        """One more column of the rows that the steady edits were made for."""
        steady = self._steady
        ids, cache = kwargs.get("input_ids", args[0] if args else None), kwargs.get("past_key_values")
        if steady is None or cache is None or not isinstance(ids, Tensor) or ids.shape != (steady.rows.count, 1):
            self._may_be_steady &= "cache_params" not in kwargs
            return False
        try:
            seen: int = cache.get_seq_length()  # type: ignore[attr-defined]
        except (AttributeError, ValueError):  # tuples, and states without a length: their calls are counted
            self._may_be_steady = False
            return False
        if seen < steady.rows.width:
            return False
        self.calls += 1
        return True

    def _adopt(self, stack: str, arguments: Arguments, count: int, width: int, first: int) -> None:
        """Without a prompt mask: the first call's input is the prompt, and so is that of every call with a fresh cache."""
        fresh = first == 0 and (self.rows is None or arguments.cache() is not None)
        if stack == "decoder" and self.is_encoder_decoder:
            fresh = self.rows is None
        if not fresh and self.rows is not None:
            return
        mask = arguments.mask()
        if mask is None or mask.shape[1] != width:
            if arguments.kwargs.get("attention_mask") is not None and mask is None:
                raise ConfigError(
                    "steering: the attention mask is not one number per token; open the context with prompt_mask_BP"
                )
            device = next(a for a in (*arguments.args, *arguments.kwargs.values()) if isinstance(a, Tensor)).device
            mask = torch.ones((count, width), dtype=torch.bool, device=device)
        if self.is_encoder_decoder:
            self.rows = self._make(mask.new_ones((count, 1)), mask if stack == "encoder" else None)
        else:
            self.rows = self._make(mask, None)

    def collect(self, site: BoundSite, at: int, hidden: Tensor, call: StackCall, selection: SiteSelection) -> None:
        """Note what a collecting site sees at its positions."""
        mask_BT = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if selection.mask_BT1 is not None:
            mask_BT = selection.mask_BT1[:, -hidden.shape[1] :, 0].to(hidden.device)
        index_BT = call.index()[0][:, -hidden.shape[1] :].to(hidden.device)
        row_N = call.rows.row_B.to(hidden.device)[:, None].expand_as(mask_BT)[mask_BT]
        sample_N = call.rows.sample_B.to(hidden.device)[:, None].expand_as(mask_BT)[mask_BT]
        values = operations.collect(hidden, None, site.spec.op.coordinates)[mask_BT]
        record = Collected(site.points[at].layer, row_N, sample_N, index_BT[mask_BT], values)
        self.collected.setdefault(site.name, []).append(record)


def _left_away(rows: SteeredRows, arguments: Arguments, count: int) -> int:
    """Columns of padding that the call lacks on the left: callers trim what all rows of a part share.

    Read off the attention mask of a call that starts a sequence; a call without one has no padding at all.
    """
    mask = arguments.mask()
    if mask is None and arguments.kwargs.get("attention_mask") is not None:
        return 0  # not one number per token: columns are taken to be the prompt mask's
    call_padding_B = torch.zeros(count, dtype=torch.int64) if mask is None else (mask.cumsum(1) == 0).sum(1).cpu()
    padding_B = (rows.prompt_mask_BP.cumsum(1) == 0).sum(1).cpu().repeat_interleave(count // len(rows))
    left_away_B = padding_B - call_padding_B
    if bool((left_away_B != left_away_B[0]).any()) or int(left_away_B[0]) < 0:
        raise ConfigError(
            f"steering: the prompt mask has {padding_B.tolist()} columns of padding on the left and the call's attention mask "
            f"{call_padding_B.tolist()}; open the context with the mask of the batch that is run"
        )
    return int(left_away_B[0])


@dataclass(frozen=True)
class Collected:
    """What a collecting site read in one call: N (row, sample, real position) and their activations."""

    layer: int | None
    row_N: Tensor
    sample_N: Tensor
    position_N: Tensor
    values_ND: Tensor


class GateReading:
    """A gate at its block: reads and leaves the activation as it is."""

    __slots__ = ("gate", "key")

    def __init__(self, active: Active, gate: BoundGate):
        self.key, self.gate = (active, gate.point.stack), gate

    def __call__(self, frame: Frame, hidden: Tensor) -> Tensor:
        call: StackCall = frame.calls[self.key]
        self.gate.read(call, hidden if call.packing is None else call.packing.unpacked(hidden))
        return hidden


class SiteEdit:
    """One site at one of its layers: what the hook of that point calls."""

    __slots__ = ("active", "at", "held", "key", "point", "site")

    def __init__(self, active: Active, site: BoundSite, at: int):
        self.active, self.site, self.at, self.point = active, site, at, site.points[at]
        self.key = (active, self.point.stack)
        self.held = site.plain_add and self.point.columns is None

    def __call__(self, frame: Frame, hidden: Tensor) -> Tensor:
        call: StackCall | None = frame.calls.get(self.key)
        site = self.site
        if call is None:
            raise ConfigError(
                f"steering: site {site.name!r} was reached outside its model's forward; call the model, not the module"
            )
        call.edits += 1
        if call.packing is not None:
            return self._in_packed(call, call.packing, frame, hidden)
        return self._edited(call, frame, hidden)

    def _in_packed(self, call: StackCall, packing: Packing, frame: Frame, hidden: Tensor) -> Tensor:
        """Rows as they are by themselves, edited, and back in one."""
        before_BWD = packing.unpacked(hidden)
        after_BWD = self._edited(call, frame, before_BWD)
        return hidden if after_BWD is before_BWD else packing.packed(after_BWD).reshape(hidden.shape)

    def _edited(self, call: StackCall, frame: Frame, hidden: Tensor) -> Tensor:
        site = self.site
        if site.index in call.selections:
            selection = call.selections[site.index]
        else:
            selection = call.selections[site.index] = select(site, call)
        if selection is None:
            return hidden
        if selection.factor is None or not self.held or hidden.dim() != 3:
            return self._general(selection, call, hidden)
        key = (site.index, selection.factor, self.at)
        addition = call.rows.additions.get(key)
        if addition is None or addition.moved_B1D.dtype != hidden.dtype or addition.moved_B1D.device != hidden.device:
            vector, mask = site.tensors(self.at, hidden.device)["vector"], selection.mask_BT1
            moved = (selection.strength_BT1.to(hidden.device) * vector).to(hidden.dtype) * site.operation.adds
            addition = call.rows.additions[key] = HeldAddition(moved, None if mask is None else mask.to(hidden.device))
        return addition(frame, hidden)

    def _general(self, selection: SiteSelection, call: StackCall, hidden: Tensor) -> Tensor:
        site, shape, batch = self.site, hidden.shape, len(call.rows)
        if hidden.dim() == 2 and shape[0] == batch * call.width:
            hidden = hidden.reshape(batch, call.width, -1)
        if hidden.dim() != 3 or hidden.shape[0] != batch or hidden.shape[1] > call.width:
            raise ConfigError(
                f"site {site.name!r}: the activation has shape {tuple(shape)}, expected ({batch}, {call.width}, width); "
                "choose a module that sees every row and position"
            )
        strength, mask, width = selection.strength_BT1.to(hidden.device), selection.mask_BT1, hidden.shape[1]
        if width < call.width:  # an output head that keeps the last columns only
            strength, mask = strength[:, -width:], None if mask is None else mask[:, -width:]
        columns = None if self.point.columns is None else torch.tensor(self.point.columns, device=hidden.device)
        part = hidden if columns is None else hidden[..., columns]
        if site.operation.collects:
            self.active.collect(site, self.at, part, call, selection)
            return hidden.reshape(shape)
        noise = None
        if site.operation.source == "noise":
            rows, index_BT = call.rows, call.index()[0][:, -width:]
            noise = site.noise(self.at, rows.applied, rows.row_B, rows.sample_B, index_BT, part.shape[-1]).to(part.device)
        edited = site.apply(self.at, part, strength, selection.unit, noise)
        if mask is not None:
            edited = torch.where(mask.to(hidden.device), edited, part)
        if columns is not None:
            edited = hidden.index_copy(-1, columns, edited)
        return edited.reshape(shape)
