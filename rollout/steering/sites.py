"""A site tied to a model (by bind.py): its points, vectors and parameters, and its operation ready to be applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from steerl.rollout.common.errors import UserError, said
from steerl.rollout.steering import learned, strengths
from steerl.rollout.steering.core import operations
from steerl.rollout.steering.core.structure import Point
from steerl.rollout.steering.engine import Active, Call
from steerl.rollout.steering.gates import BoundGate
from steerl.rollout.steering.rows import Rows
from steerl.rollout.steering.spec.spec import LEARNED, Site
from torch import Tensor, nn

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x, "relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh,
}  # fmt: skip
_NATIVE = ("add", "subtract", "noise", "ablate", "rotate", "renormalise", "function")
"""Operations whose own formula takes the strength; the others are mixed in: h + a (op(h) - h)."""


@dataclass(eq=False)
class BoundSite:
    """One site of the spec on one model. `at` is the index of a point (a layer) of this site."""

    spec: Site
    index: int
    points: list[Point]
    vectors: list[Tensor] | None
    parameters: list[dict[str, Tensor]] | None
    trained: learned.Parameters | None
    excluded_ids: Tensor | None
    function: Callable[..., Tensor] | None
    gate: BoundGate | None
    seed: int
    _placed: dict[Any, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.spec.name

    @cached_property
    def additive(self) -> bool:
        """Plainly h + a v: the edit can be scaled once and kept."""
        return self.spec.op.type == "add" and not self.spec.strength.norm_match and self.spec.op.coordinates is None

    @cached_property
    def plain_add(self) -> bool:
        """One addition of a fixed vector: it can be scaled before, and kept from step to step."""
        return self.additive and self.trained is None

    @cached_property
    def same_for_all_rows(self) -> bool:
        """In a response column, every row is selected alike (strengths may differ)."""
        where = self.spec.where
        token_gate = self.gate is not None and self.gate.spec.on == "token"
        return not (where.exclude_tokens or where.exclude_positions or token_gate or isinstance(where.prompt, tuple))

    @cached_property
    def steady(self) -> bool:
        """Every response column is edited alike."""
        return self.same_for_all_rows and self.spec.where.steps == "all" and self.spec.where.ramp is None

    def vector(self, at: int, like: Tensor) -> Tensor:
        """The site's vector at a point, float32 on the activation's device."""
        if self.trained is not None:
            return self.trained.layers[at].vector.to(like.device)  # type: ignore[union-attr, return-value]
        assert self.vectors is not None
        key = (at, like.device)
        if key not in self._placed:
            self._placed[key] = self.vectors[at].to(like.device)
        return self._placed[key]

    def tensors(self, at: int, like: Tensor) -> list[Tensor]:
        """The operation's parameters at a point, in the order in which its function takes them."""
        names = learned.PARAMETERS[self.spec.op.type]
        if self.trained is not None:
            return [t.to(like.device) for t in self.trained.layers[at].tensors(names)]  # type: ignore[union-attr, operator]
        assert self.parameters is not None
        key = ("parameters", at, like.device)
        if key not in self._placed:
            self._placed[key] = [self.parameters[at][name].to(like.device) for name in names]
        return self._placed[key]

    def apply(
        self, at: int, base: Tensor, strength: Tensor, unit: bool, active: Active, call: Call, index_BT: Tensor | None
    ) -> Tensor:
        """The edited activation at every position; the caller keeps it where the site selects."""
        op = self.spec.op
        if op.type == "collect":
            active.collect(self, at, base, call)
            return base
        if op.type in _NATIVE:
            return self._native(at, base, strength, active, call, index_BT)
        new = self._whole(at, base)
        if unit:
            return new
        mixed = operations.wide(base) + strength * (operations.wide(new) - operations.wide(base))
        return torch.where(strength == 1, new, mixed.to(base.dtype))

    def _native(self, at: int, base: Tensor, strength: Tensor, active: Active, call: Call, index_BT: Tensor | None) -> Tensor:
        op = self.spec.op
        if op.type == "noise":
            assert index_BT is not None
            drawn = self.drawn(at, active.policy_step, call.rows, index_BT, base.shape[-1])
            return operations.noise(base, drawn.to(base.device), strength, op.coordinates)
        if op.type == "function":
            assert self.function is not None
            source = self.vector(at, base) if self.vectors is not None else None
            try:
                new = self.function(base, source, strength)
            except (Exception, SystemExit) as error:
                raise UserError(f"site {self.name!r}: {op.function} {said(error)}") from error
            if not isinstance(new, Tensor) or new.shape != base.shape:
                found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise UserError(
                    f"site {self.name!r}: {op.function} gave {found}; expected a tensor of shape {tuple(base.shape)}"
                )
            return new.to(base.dtype)
        source = self.vector(at, base)
        self._check_width(source, base)
        if self.spec.strength.norm_match:
            length = operations.wide(base).norm(dim=-1, keepdim=True)
            strength = strength * length / source.norm().clamp_min(torch.finfo(source.dtype).tiny)
        if op.type == "add":
            return operations.add(base, source, strength, op.coordinates)
        if op.type == "subtract":
            return operations.subtract(base, source, strength, op.coordinates)
        return {"ablate": operations.ablate, "rotate": operations.rotate, "renormalise": operations.renormalise}[op.type](
            base, source, strength
        )

    def drawn(self, at: int, policy_step: int, rows: Rows, index_BT: Tensor, width: int) -> Tensor:
        """The noise at a point, a function of row, sample and real position."""
        stream = 4096 + 64 * self.index + at
        return strengths.keyed_normals(self.seed, stream, policy_step, rows.row_B, rows.sample_B, index_BT, width)

    def _whole(self, at: int, base: Tensor) -> Tensor:
        """Operations at full strength."""
        op = self.spec.op
        if op.type == "zero":
            return operations.zero(base, None, op.coordinates)
        if op.type == "scale":
            return operations.scale(base, None, op.factor, op.coordinates)
        if op.type in LEARNED:
            act = {"act": _ACTIVATIONS[op.act]} if op.act else {}
            return getattr(operations, op.type)(base, None, *self.tensors(at, base), **act)
        source = self.vector(at, base)
        self._check_width(source, base)
        if op.type in ("set", "vanilla"):
            return operations.vanilla(base, source, op.coordinates)
        if op.type == "project":
            return operations.project(base, source)
        if op.type == "clamp":
            return operations.clamp(base, source, op.value)
        parameters = self.tensors(at, base)
        if op.type == "boundless":
            return operations.boundless(base, source, parameters[0], op.boundary, op.temperature)
        if op.type in ("sigmoid_mask", "sigmoid_mask_rotated"):
            return getattr(operations, op.type)(base, source, *parameters, op.temperature)
        extra = {"residual": op.residual} if op.type in ("autoencoder", "jumprelu") else {}
        return getattr(operations, op.type)(base, source, *parameters, coordinates=op.coordinates, **extra)

    def _check_width(self, source: Tensor, base: Tensor) -> None:
        if source.shape[-1] != base.shape[-1]:
            raise UserError(
                f"site {self.name!r}: its vector is {source.shape[-1]} wide, and the activation at "
                f"{self.spec.at.module or 'its layer'} "
                f"is {base.shape[-1]} wide; it was made for another model or component"
            )
