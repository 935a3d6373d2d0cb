"""Steering inside a compiled decode step: tensors at fixed addresses, which its graph reads and the decode loop fills.

    select(site, call)  ──>  strength (B, 1, 1), where (B, 1, 1)  ──>  hook in the graph: where(mask, apply(h), h)
    the plain path's own     one pair per site, written in place       the plain path's own formula, always there

A graph is made for a structure (operations and points), not for a Steering: vectors and parameters are copied into its
tensors, so another vector, strength or window at the same points compiles nothing. Where nothing is selected the hook
gives back the very numbers it got.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import UserError
from steerl.rollout.model import compat
from steerl.rollout.steering.core import operations
from steerl.rollout.steering.engine import Active
from steerl.rollout.steering.selection import select
from steerl.rollout.steering.sites import BoundSite
from steerl.rollout.steering.state import SiteSelection, StackCall
from steerl.rollout.steering.steering import Steering


def why_not(steering: object, core: nn.Module) -> str | None:
    """Why this steering cannot act inside a graph; None where it can."""
    if not isinstance(steering, Steering) or steering.model is not core:
        return "the steering was not made for this model"
    for site in steering.sites:
        op = site.spec.op
        if site.operation.collects or site.operation.family == "function":
            return f"steering site {site.name!r}: op {op.type} is more than tensors"
        if site.gate is not None and site.gate.spec.on == "token":
            return f"steering site {site.name!r}: its gate reads every token"
        width_matters = site.operation.source == "noise" or op.coordinates is not None
        if width_matters and any(point.width is None for point in site.points):
            return f"steering site {site.name!r}: the width at module {site.spec.at.module!r} cannot be told"
    return None


def structure(steering: Steering) -> tuple[object, ...]:
    """What a graph is made for: operations, points and shapes, without any vector, strength or position."""
    return tuple(
        (
            site.spec.op,
            site.spec.strength.norm_match,
            tuple(
                (id(point.module), point.io, point.columns, tuple(tensor.shape for tensor in held.values()))
                for point, held in zip(site.points, site.held, strict=True)
            ),
        )
        for site in steering.sites
    )


class FixedSteering:
    """All that the graph of one structure and number of rows reads of a steering."""

    def __init__(self, steering: Steering, rows: int, device: torch.device):
        self.sites = [_FixedSite(site, rows, device) for site in steering.sites]
        self.edits: dict[nn.Module, dict[str, tuple[_FixedEdit, ...]]] = {}
        for site in self.sites:
            for at, point in enumerate(site.points):
                here = self.edits.setdefault(point.module, {})
                here[point.io] = (*here.get(point.io, ()), _FixedEdit(site, at, rows, device))

    def load(self, steering: Steering) -> None:
        """Take over the numbers of a steering of this structure, and be off until a step is filled in."""
        for fixed, site in zip(self.sites, steering.sites, strict=True):
            fixed.load(site)

    def fill(self, active: Active, ids: Tensor) -> None:
        """Before a step that feeds the last of `ids`: what each site does in it, as the plain path finds it."""
        rows = active.rows
        assert rows is not None and not active.left_away, "the sampler gives whole prompt masks"
        call = StackCall(rows, ids.shape[1] - 1, 1, ids[:, -1:])
        for fixed, site in zip(self.sites, active.sites, strict=True):
            call.selections[site.index] = selection = select(site, call)
            fixed.put(site, selection, call)
        active.calls += 1
        if active.look is not None:
            active.look(active, call, "decoder")


class _FixedSite(BoundSite):
    """A site whose tensors never move: the plain path's formulas over them."""

    def __init__(self, site: BoundSite, rows: int, device: torch.device):
        held = [{name: torch.empty_like(tensor, device=device) for name, tensor in tensors.items()} for tensors in site.held]
        op = site.spec.op
        if op.coordinates is not None:  # made once: a graph for CUDA can make no tensor on the CPU
            width = site.points[0].width
            if site.operation.latent is not None:
                name, dim = site.operation.latent
                width = held[0][name].shape[dim]
            mask = operations.chosen(op.coordinates, torch.empty(int(width or 0)))
            assert mask is not None
            op = dataclasses.replace(op, coordinates=mask.to(device))  # type: ignore[arg-type]
        if "boundary" in site.settings:
            op = dataclasses.replace(op, boundary=torch.tensor(op.boundary, device=device))  # type: ignore[arg-type]
        spec = dataclasses.replace(site.spec, op=op)
        super().__init__(spec, site.index, site.points, held, None, site.function)
        self.strength = torch.zeros(rows, 1, 1, device=device)
        self.mask = torch.zeros(rows, 1, 1, dtype=torch.bool, device=device)
        self.drawn: list[Tensor | None] = [None] * len(site.points)
        if site.operation.source == "noise":
            self.drawn = [torch.zeros(rows, 1, int(p.width or 0), device=device) for p in site.points]
        self._put: SiteSelection | None = None
        for tensor in (self.strength, self.mask, *self.drawn, *(t for tensors in held for t in tensors.values())):
            if tensor is not None:
                compat.mark_static(tensor)  # read where it is: a CUDA graph copies other inputs each time

    def load(self, site: BoundSite) -> None:
        for at, held in enumerate(self.held):
            for name, tensor in site.tensors(at, self.mask.device).items():
                held[name].copy_(tensor.detach())
        self.mask.fill_(False)
        self._put = None

    def put(self, site: BoundSite, selection: SiteSelection | None, call: StackCall) -> None:
        if selection is not self._put:  # the rows' cache holds a selection from step to step
            self._put = selection
            if selection is None or selection.mask_BT1 is None:
                self.mask.fill_(selection is not None)
            else:
                self.mask.copy_(selection.mask_BT1)
            if selection is not None:
                self.strength.copy_(selection.strength_BT1)
        if selection is not None:
            for at, drawn in enumerate(self.drawn):
                if drawn is not None:
                    rows, index_BT = call.rows, call.index()[0]
                    drawn.copy_(site.noise(at, rows.applied, rows.row_B, rows.sample_B, index_BT, drawn.shape[-1]))


class _FixedEdit:
    """One site at one point, as the hook there calls it while the graph is made."""

    def __init__(self, site: _FixedSite, at: int, rows: int, device: torch.device):
        self.site, self.at, self.rows, self.columns = site, at, rows, None
        if site.points[at].columns is not None:
            self.columns = torch.tensor(site.points[at].columns, device=device)
            compat.mark_static(self.columns)

    def __call__(self, frame: object, hidden: Tensor) -> Tensor:
        shape, site = hidden.shape, self.site
        if hidden.dim() == 2:
            hidden = hidden.unsqueeze(1)
        if hidden.dim() != 3 or hidden.shape[0] != self.rows or hidden.shape[1] != 1:
            raise UserError(f"site {site.name!r}: the activation of a decode step has shape {tuple(shape)}")
        part = hidden if self.columns is None else hidden[..., self.columns]
        edited = torch.where(site.mask, site.apply(self.at, part, site.strength, noise=site.drawn[self.at]), part)
        if self.columns is not None:
            edited = hidden.index_copy(-1, self.columns, edited)
        return edited.reshape(shape)
