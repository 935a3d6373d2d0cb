"""Steering inside a compiled decode step: tensors at fixed places, which its graph reads and the decode loop fills.

    select(site, call)  ──>  strength (B, 1, 1), where (B, 1, 1)  ──>  hook in the graph: where(mask, apply(h), h)
    the plain path's own     one pair per site, written in place       the plain path's own formula, always there

A graph is made for a structure (operations and points), not for a Steering: vectors and parameters are copied into its
tensors, so another vector, strength or window at the same points compiles nothing. Where nothing is selected the hook
gives back the very numbers it got.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from steerl.rollout.common.errors import UserError
from steerl.rollout.model import compat
from steerl.rollout.steering.core import operations
from steerl.rollout.steering.core.structure import Point
from steerl.rollout.steering.engine import Active
from steerl.rollout.steering.learned import PARAMETERS
from steerl.rollout.steering.rows import Call
from steerl.rollout.steering.selection import Selection, select
from steerl.rollout.steering.sites import BoundSite
from steerl.rollout.steering.spec.spec import LEARNED
from steerl.rollout.steering.steering import Steering
from torch import Tensor, nn

_LATENT = {
    "rotated": ("rotation", 1), "low_rank_rotated": ("weight", 1), "pca": ("components", 0), "autoencoder": ("encoder", 0),
    "jumprelu": ("encoder", 1),
}  # fmt: skip
"""Operations whose coordinates are those of their space: the tensor and dimension that say how many there are."""


def why_not(steering: Any, core: nn.Module) -> str | None:
    """Why this steering cannot act inside a graph; None where it can."""
    if not isinstance(steering, Steering) or steering.model is not core:
        return "the steering was not made for this model"
    for site in steering.sites:
        op = site.spec.op
        if op.type in ("collect", "function"):
            return f"steering site {site.name!r}: op {op.type} is more than tensors"
        if site.gate is not None and site.gate.spec.on == "token":
            return f"steering site {site.name!r}: its gate reads every token"
        if (op.type == "noise" or op.coordinates is not None) and any(point.width is None for point in site.points):
            return f"steering site {site.name!r}: the width at module {site.spec.at.module!r} cannot be told"
    return None


def structure(steering: Steering) -> tuple[Any, ...]:
    """What a graph is made for: operations, points and shapes, without any vector, strength or position."""

    def shapes(site: BoundSite, at: int) -> tuple[torch.Size, ...]:
        return tuple(tensor.shape for tensor in _tensors(site, at).values())

    return tuple(
        (
            site.spec.op,
            site.spec.strength.norm_match,
            tuple((id(p.module), p.io, p.columns, shapes(site, at)) for at, p in enumerate(site.points)),
        )
        for site in steering.sites
    )


def _tensors(site: BoundSite, at: int) -> dict[str, Tensor]:
    """The numbers of a site at a point as they are now: its vector and its operation's parameters, by name."""
    found: dict[str, Tensor] = {}
    if site.trained is not None:
        layer = site.trained.layers[at]
        names = PARAMETERS[site.spec.op.type] if site.spec.op.type in LEARNED else ("vector",)
        return {name: getattr(layer, name).detach() for name in names}
    if site.vectors is not None:
        found["vector"] = site.vectors[at]
    return {**found, **(site.parameters[at] if site.parameters is not None else {})}


class FixedSteering:
    """All that the graph of one structure and number of rows reads of a steering."""

    def __init__(self, steering: Steering, rows: int, device: torch.device):
        self.sites = [_FixedSite(site, rows, device) for site in steering.sites]
        self.edits: dict[nn.Module, dict[str, tuple[_FixedEdit, ...]]] = {}
        for site in self.sites:
            for at, point in enumerate(site.points):
                here = self.edits.setdefault(point.module, {})
                here[point.io] = (*here.get(point.io, ()), _FixedEdit(site, at, point, rows, device))

    def load(self, steering: Steering) -> None:
        """Take over the numbers of a steering of this structure, and be off until a step is filled in."""
        for site, theirs in zip(self.sites, steering.sites, strict=True):
            site.load(theirs)

    def fill(self, active: Active, ids: Tensor) -> None:
        """Before a step that feeds the last of `ids`: what each site does in it, as the plain path finds it."""
        rows = active.rows
        assert rows is not None and not active._left_away, "the sampler gives whole prompt masks"
        call = Call(rows, ids.shape[1] - 1, 1, ids[:, -1:], encoder=False)
        for fixed, site in zip(self.sites, active.steering.sites, strict=True):
            call.selections[site.index] = selection = select(site, call)
            fixed.put(site, selection, call, active.policy_step)
        active.calls += 1
        if active.steering.look is not None:
            active.steering.look(active, call, "decoder")


class _FixedSite(BoundSite):
    """A site whose tensors never move: the plain path's formulas over them."""

    def __init__(self, site: BoundSite, rows: int, device: torch.device):
        spec = site.spec
        here = [
            {k: torch.empty_like(v, device=device) for k, v in _tensors(site, at).items()} for at in range(len(site.points))
        ]
        op = spec.op
        if op.coordinates is not None:  # made once: a graph for CUDA can make no tensor on the CPU
            name, dim = _LATENT.get(op.type, ("", 0))
            width = here[0][name].shape[dim] if name else site.points[0].width
            mask = operations.chosen(op.coordinates, torch.empty(int(width or 0)))
            assert mask is not None
            op = dataclasses.replace(op, coordinates=mask.to(device))  # type: ignore[arg-type]
        if op.type == "boundless":
            op = dataclasses.replace(op, boundary=torch.tensor(op.boundary, device=device))  # type: ignore[arg-type]
        super().__init__(
            dataclasses.replace(spec, op=op), site.index, site.points, None, None, None, None, None, None, site.seed
        )
        self.tensors_here = here
        self.strength = torch.zeros(rows, 1, 1, device=device)
        self.mask = torch.zeros(rows, 1, 1, dtype=torch.bool, device=device)
        self.noise: list[Tensor] = []
        if op.type == "noise":
            self.noise = [torch.zeros(rows, 1, int(p.width or 0), device=device) for p in site.points]
        self._last: Selection | None = None
        for tensor in (self.strength, self.mask, *self.noise, *(t for layer in here for t in layer.values())):
            compat.mark_static(tensor)  # read where it is: a CUDA graph copies other inputs each time

    def load(self, site: BoundSite) -> None:
        for at, mine in enumerate(self.tensors_here):
            for name, tensor in _tensors(site, at).items():
                mine[name].copy_(tensor)
        self.mask.fill_(False)
        self._last = None

    def put(self, site: BoundSite, selection: Selection | None, call: Call, policy_step: int) -> None:
        if selection is not self._last:  # the plain path keeps a selection from step to step
            self._last = selection
            if selection is None or selection.mask_BT1 is None:
                self.mask.fill_(selection is not None)
            else:
                self.mask.copy_(selection.mask_BT1)
            if selection is not None:
                self.strength.copy_(selection.strength_BT1)
        if selection is not None and self.noise:
            for at, drawn in enumerate(self.noise):
                drawn.copy_(site.drawn(at, policy_step, call.rows, call.index()[0], drawn.shape[-1]))

    # what the formulas of BoundSite ask for

    def vector(self, at: int, like: Tensor) -> Tensor:
        return self.tensors_here[at]["vector"]

    def tensors(self, at: int, like: Tensor) -> list[Tensor]:
        return [self.tensors_here[at][name] for name in PARAMETERS[self.spec.op.type]]


class _FixedEdit:
    """One site at one point, as the hook there calls it while the graph is made."""

    def __init__(self, site: _FixedSite, at: int, point: Point, rows: int, device: torch.device):
        self.site, self.at, self.rows, self.columns = site, at, rows, None
        if point.columns is not None:
            self.columns = torch.tensor(point.columns, device=device)
            compat.mark_static(self.columns)

    def __call__(self, frame: Any, hidden: Tensor) -> Tensor:
        shape, site = hidden.shape, self.site
        if hidden.dim() == 2:
            hidden = hidden.unsqueeze(1)
        if hidden.dim() != 3 or hidden.shape[0] != self.rows or hidden.shape[1] != 1:
            raise UserError(f"site {site.name!r}: the activation of a decode step has shape {tuple(shape)}")
        part = hidden if self.columns is None else hidden[..., self.columns]
        if site.noise:
            edited = operations.noise(part, site.noise[self.at], site.strength, site.spec.op.coordinates)
        else:
            edited = site.apply(self.at, part, site.strength, False, None, None, None)  # type: ignore[arg-type]
        edited = torch.where(site.mask, edited, part)
        if self.columns is not None:
            edited = hidden.index_copy(-1, self.columns, edited)
        return edited.reshape(shape)
